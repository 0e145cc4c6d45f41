"""What a model name stands for, before any weights are loaded.

Wherever a recipe takes a model it takes a Hub id, a local folder, the word `starter`, or the adapter of any of them (a
folder or a repo); an adapter's base is found from its `adapter_config.json`.
"""

from pathlib import Path
from typing import NamedTuple

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled
from peft import (
    PeftConfig,
)
from transformers import (
    AutoConfig,
    PreTrainedConfig,
    PretrainedConfig,
)
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MASKED_LM_MAPPING_NAMES
from trl import ModelConfig

from rlhf.errors import InputError
from rlhf.models.lstm import LSTMConfig  # noqa: F401 (importing it makes saved LSTMs loadable)
from rlhf.run.paths import need_model
from rlhf.starter.model import STARTER, starter_model

# their positions begin behind that of the pad token
ROBERTA = (
    "roberta", "roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "data2vec-text", "xmod", "esm",
    "ibert", "luke", "mpnet",
)  # fmt: skip


class Source(NamedTuple):
    """Where a model comes from."""

    name: str  # as the user gave it
    base: str  # what `from_pretrained` of a full model takes
    adapter: str | None  # what `PeftModel.from_pretrained` takes, or None for a full model
    revision: str | None  # of the adapter if there is one, else of the base
    peft_config: PeftConfig | None


def resolve(name: str | None, flag: str = "--model_name_or_path", revision: str | None = None) -> Source:
    """Find out what a model name stands for, without loading weights.

    Raises:
        InputError: if there is no such folder or repo, a Hub id can't be reached, or an adapter's base is missing.
    """
    if name is None or name == STARTER:
        return Source(STARTER, starter_model(), None, None, None)
    path = Path(name).expanduser()
    if path.is_dir():
        if (path / "adapter_config.json").exists():
            return _resolve_adapter(name, str(path), flag, None)
        if (path / "config.json").exists():
            return Source(name, str(path), None, None, None)
        raise InputError(f"{flag} {name}: neither config.json nor adapter_config.json in this folder. Is it a model?")
    need_model(name, flag)
    revision = None if revision == "main" else revision
    if hub_file(name, "adapter_config.json", flag, revision):
        return _resolve_adapter(name, name, flag, revision)
    if not hub_file(name, "config.json", flag, revision):
        raise InputError(f"{flag} {name}: this Hub repo has neither config.json nor adapter_config.json.")
    return Source(name, name, None, revision, None)


def hub_file(repo: str, file: str, flag: str, revision: str | None) -> bool:
    cached = try_to_load_from_cache(repo, file, revision=revision)
    if isinstance(cached, str):
        return True
    in_cache = any(
        isinstance(try_to_load_from_cache(repo, name, revision=revision), str)
        for name in ("config.json", "adapter_config.json")
    )
    try:
        hf_hub_download(repo, file, revision=revision)
        return True
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        if in_cache:  # the repo was downloaded before, and without this file
            return False
        raise InputError(
            f"{flag} {repo}: not a local folder, and the Hub can't be reached to look for it there. Go online, "
            "download it before, or give a local folder or 'starter'."
        ) from error
    except EntryNotFoundError:
        return False
    except (HfHubHTTPError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        why = "it doesn't exist or needs a token (hf auth login)" if status in (401, 403, 404) else str(error)[:150]
        raise InputError(f"{flag} {repo}: no such local folder, and the Hub says no: {why}.") from error
    except OSError as error:
        raise InputError(f"{flag} {repo}: no such local folder, and the Hub can't be reached ({error}).") from error


def _resolve_adapter(name: str, adapter: str, flag: str, revision: str | None) -> Source:
    config = PeftConfig.from_pretrained(adapter, revision=revision)
    base = config.base_model_name_or_path
    if not base:
        raise InputError(f"{flag} {name}: adapter_config.json names no base model (base_model_name_or_path). Add it.")
    if Path(base).name.startswith("starter-") and not Path(base).exists():
        base = starter_model()  # the cache was cleared or is elsewhere: the starter can be made again
    try:
        source = resolve(base, flag)
    except InputError as error:
        raise InputError(f"{flag} {name}: the adapter's base model is missing. {error}") from error
    if source.adapter is not None:
        raise InputError(f"{flag} {name}: its base {base!r} is itself an adapter. Merge that one into its base first.")
    return Source(name, source.base, adapter, revision, config)


def base_revision(source: Source) -> str | None:
    """The revision of the base: the one asked for, or the one that an adapter's config names."""
    return source.revision if source.peft_config is None else source.peft_config.revision


def refuse_single_model(model_args: ModelConfig) -> None:
    """Refuse the flags for one model where --models names them all, as they would reach none.

    Raises:
        InputError: if --model_name_or_path or --model_revision is given.
    """
    if model_args.model_name_or_path is not None:
        raise InputError(f"--model_name_or_path {model_args.model_name_or_path}: models are given with --models here.")
    if model_args.model_revision not in (None, "main"):
        raise InputError(
            f"--model_revision {model_args.model_revision}: would reach none of --models. Download that revision (hf "
            "download <id> --revision <revision> --local-dir <folder>) and give its folder."
        )


def context_length(source: Source, trust_remote_code: bool = False) -> int | None:
    """How many tokens the base takes at once, or None where its config sets no limit."""
    config = AutoConfig.from_pretrained(
        source.base, revision=base_revision(source), trust_remote_code=trust_remote_code
    )
    return usable_context(config)


def first_position(model_type: str, pad_token_id: int | None) -> int:
    """Where a model's positions begin: for RoBERTa's kind behind that of the pad token, for MPNet always at 2."""
    return max(pad_token_id or 0, 1) + 1 if model_type in ROBERTA else 0


def usable_context(config: PreTrainedConfig) -> int | None:
    """How many tokens a model takes at once, or None where its config sets no limit."""
    config = config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None)
    return positions and positions - first_position(config.model_type, config.pad_token_id)


def resolve_start(model_name_or_path: str | None, source: Source, revision: str | None = None) -> Source:
    """What PPO's policy starts from: an adapter that differs from the SFT model `source`, or else the SFT model itself.

    Args:
        revision: of `model_name_or_path`.

    Raises:
        InputError: if the adapter's base is not that of the SFT model, or the revision would reach nothing.
    """
    start = resolve(model_name_or_path, revision=revision)
    if start.adapter is None or start.adapter == source.adapter:
        if revision not in (None, "main"):
            raise InputError(
                f"--model_revision {revision}: belongs to --model_name_or_path, and the policy starts from "
                f"--sft_model_path {source.name} instead. Leave --sft_model_path out."
            )
        return source
    if start.base != source.base:
        raise InputError(
            f"--model_name_or_path {start.name}: the policy goes on from this adapter, so --sft_model_path "
            f"{source.name} has to be its base ({start.base}), or another adapter of that."
        )
    return start


def is_decoder(config: PretrainedConfig) -> bool:
    """Whether the model reads from left to right: a causal language model that is no masked one too."""
    kind = config.model_type
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES
