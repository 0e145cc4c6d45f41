"""What a model's files must hold before they are loaded, and what its weights must be afterwards."""

import json
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from accelerate.utils import broadcast_object_list
from huggingface_hub import list_repo_files
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError
from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_checkpoint_conversion_mapping
from transformers.integrations import is_fsdp_enabled
from transformers.integrations.deepspeed import HfDeepSpeedConfig, deepspeed_config, unset_hf_deepspeed_config
from transformers.quantizers.auto import AutoHfQuantizer, get_hf_quantizer

from rlhf.errors import InputError

WEIGHTS, ADAPTER_WEIGHTS = "model.safetensors", "adapter_model.safetensors"
# weights that this library does not read: pickles run code when they are loaded, the others are for other programs
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.h5", "*.msgpack", "*.onnx", "*.gguf")
DENIED = (401, 403, 404)
_deepspeed: dict[str, HfDeepSpeedConfig] = {}  # what transformers takes from DeepSpeed's configuration
A = TypeVar("A")
LAYER = re.compile(r"^(.*?)\.\d+\.")  # the beginning of a weight's name up to the number of its layer


@contextmanager
def loading(flag: str, name: str, what: str) -> Iterator[None]:
    """Turn the exception of a Hugging Face library that can't load something into one line of ours.

    Put nothing but the libraries' own calls inside: transformers, tokenizers, PEFT and safetensors raise nearly every
    class of exception for a broken file (a bare Exception, KeyError, ZeroDivisionError, ...), so all are taken.

    Args:
        flag: that named the model.
        name: of the model, as the user gave it.
        what: is loaded, for the message: "its config", "its weights".

    Raises:
        InputError: with the flag, the name and the first line of the library's message.
    """
    try:
        with _without_report():
            yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{flag} {name}: {_why(error, what)}") from error


@contextmanager
def made_whole() -> Iterator[None]:
    """Under ZeRO-3, make models whole on each process: they are checked before DeepSpeed spreads them."""
    config = deepspeed_config()
    unset_hf_deepspeed_config()
    try:
        yield
    finally:
        if config is not None:  # transformers itself holds a weak reference only
            _deepspeed["config"] = HfDeepSpeedConfig(config)


def has_weights() -> bool:
    """Whether models that are loaded now have weights: under FSDP, accelerate's `cpu_ram_efficient_loading` leaves them
    empty on all processes of a machine but one, until they are spread."""
    return not is_fsdp_enabled() or os.environ.get("LOCAL_RANK", "0") == "0"


def agreed(answer: A) -> A:
    """What trying a model has shown, from the first process where others have no weights. All processes call it."""
    return broadcast_object_list([answer])[0] if is_fsdp_enabled() else answer


def _why(error: Exception, what: str) -> str:
    text = str(error).strip()
    if "trust_remote_code" in text or "contains custom code" in text:
        return (
            f"{what} needs code that the model brings along, which is not run unasked. Read that code, then allow it "
            "with --trust_remote_code true."
        )
    if "does not recognize this architecture" in text:
        return (
            f"{text.splitlines()[0].split(' This could be')[0]} A newer transformers may: pip install -U transformers."
        )
    if "instantiate the backend tokenizer" in text:
        return (
            f"{what} isn't there. Copy its files, tokenizer.json and tokenizer_config.json for example, into the model."
        )
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, EntryNotFoundError):
        return f"{what} isn't in this Hub repo ({_first_line(text)})."
    if isinstance(error, HfHubHTTPError) and status in DENIED:
        return "the Hub says no: it doesn't exist, is gated, or needs a token (hf auth login)."
    if isinstance(error, KeyError) and " " in str(error.args[0]):  # a sentence
        return f"{what} can't be loaded ({_first_line(str(error.args[0]))})."
    if isinstance(error, KeyError):  # of a table of names: hidden_act "warp"
        return f"{what} can't be loaded (no {text} is known or given). Look for it in the model's files."
    kind = "" if isinstance(error, OSError | ImportError) else f"{type(error).__name__}: "
    misfit = [line for line in text.splitlines() if "size mismatch" in line]  # torch names them after a headline
    return f"{what} can't be loaded ({kind}{_first_line(misfit[0] if misfit else text)})."


def _first_line(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()] or ["no message"]
    headline = 1 + lines[0].endswith(":")
    line = " ".join(" ".join(lines[:headline]).split()).rstrip(".")
    return line if len(line) <= 300 else line[:300] + " ..."


@contextmanager
def _without_report() -> Iterator[None]:
    """Without transformers' table of missing and misfitting weights: `check_loaded` says in one line what is wrong."""
    logger = logging.getLogger("transformers.modeling_utils")

    def keep(record: logging.LogRecord) -> bool:
        return "LOAD REPORT" not in record.getMessage()

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)


# ---------------------------------------------------------------------------------------------- before loading


def read_settings(file: Path, flag: str, name: str) -> dict[str, object]:
    """The content of a local config.json or adapter_config.json.

    Raises:
        InputError: if it can't be read, or isn't a JSON object.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(f"{flag} {name}: {file.name} can't be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(
            f"{flag} {name}: {file.name} holds a {type(content).__name__}; an object of settings is needed."
        )
    return content


def check_files(folder: Path, flag: str, name: str, weights: str = WEIGHTS) -> set[str]:
    """Refuse a local folder whose weights are missing, cut off or in another format. Only headers are read.

    Args:
        weights: `WEIGHTS` or `ADAPTER_WEIGHTS`.

    Returns:
        the dtypes of the matrices, as safetensors calls them: F32, I8, ...

    Raises:
        InputError: naming the file and what to do.
    """
    index = folder / f"{weights}.index.json"
    files = [folder / weights]
    if not files[0].exists() and index.exists():
        shards = read_settings(index, flag, name).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(shard, str) for shard in shards.values()):
            raise InputError(f"{flag} {name}: {index.name} has no weight_map from weights to files.")
        files = [folder / shard for shard in sorted(set(shards.values()))]
    dtypes = set()
    for file in files:
        if not file.is_file():
            raise missing_weights(file.name, [path.name for path in folder.iterdir()], flag, name)
        try:
            with safe_open(file, framework="pt") as opened:
                matrices = [opened.get_slice(key) for key in opened.keys() if key.endswith("weight")]  # noqa: SIM118
                dtypes |= {matrix.get_dtype() for matrix in matrices if len(matrix.get_shape()) > 1}
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{flag} {name}: {file.name} is damaged or incomplete ({error}). Copy or download it again."
            ) from error
    return dtypes


def check_repo(repo: str, revision: str | None, flag: str, name: str, weights: str = WEIGHTS) -> None:
    """Refuse a Hub repo without weights in safetensors. Nothing is said offline: the cache may hold all.

    Raises:
        InputError: naming the file and what to do.
    """
    try:
        files = list_repo_files(repo, revision=revision)
    except (HfHubHTTPError, OSError, ValueError):  # loading says what is wrong
        return
    if not {weights, f"{weights}.index.json"} & set(files):
        raise missing_weights(weights, files, flag, name)


def missing_weights(wanted: str, files: list[str], flag: str, name: str) -> InputError:
    """The error of a folder or repo without a file of weights, with what it has instead."""
    others = sorted(file for file in files for pattern in OTHER_WEIGHTS if Path(file).match(pattern))
    found, advice = "", "Copy or download it again."
    if others:
        found = f"; found {', '.join(others[:3])}"
        advice = "To convert it: AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder), in Python."
    return InputError(f"{flag} {name}: {wanted} is missing{found}. Weights are read from safetensors only. {advice}")


def check_dtypes(config: object, dtypes: set[str], flag: str, name: str) -> None:
    """Refuse matrices of whole numbers that config.json doesn't call quantized, or plain ones that it calls packed.

    Args:
        dtypes: see `check_files`.

    Raises:
        InputError: naming quantization_config.
    """
    settings, whole = getattr(config, "quantization_config", None), sorted(dtypes & {"I8", "U8", "I16", "I32", "I64"})
    if settings is None and whole:
        raise InputError(
            f"{flag} {name}: its weights are of type {whole[0]}, as quantized ones are, and config.json has no "
            "quantization_config, without which they are read as plain numbers. Copy or download config.json again."
        )
    named = settings if isinstance(settings, dict | None) else settings.to_dict()
    if named and not whole and (named.get("load_in_4bit") or named.get("load_in_8bit")):
        raise InputError(
            f"{flag} {name}: config.json's quantization_config calls the weights packed by bitsandbytes, and they are "
            f"plain ({', '.join(sorted(dtypes))}). Remove it, and quantize with --load_in_4bit or --load_in_8bit."
        )


def check_quantization(config: object, flag: str, name: str) -> None:
    """Refuse a quantized model whose method is unknown, or whose package isn't installed.

    Raises:
        InputError: naming the method or the package.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return
    with loading(flag, name, "its quantization"):
        if not AutoHfQuantizer.supports_quant_method(settings):
            method = settings.get("quant_method") if isinstance(settings, dict) else settings
            raise InputError(
                f"{flag} {name}: transformers knows no quantization method {method!r}. Give another model."
            )
        get_hf_quantizer(config, None, None, True, {})


# ---------------------------------------------------------------------------------------------- after loading


def of_head(model: PreTrainedModel, key: str) -> bool:
    """Whether a weight belongs to a classifier's head: it lies outside of the body, or in the body's pooler."""
    return not key.startswith(f"{model.base_model_prefix}.") or ".pooler." in key


def check_loaded(model: PreTrainedModel, info: dict[str, set], flag: str, name: str, *, new_head: bool = False) -> None:
    """Refuse a model of which a part wasn't in its files: transformers fills it with random numbers and only warns.

    Args:
        info: what `from_pretrained(..., output_loading_info=True)` returned.
        new_head: the weights of a classifier's head may be missing, or have another shape.

    Raises:
        InputError: naming a weight that is missing or has another shape, or one that isn't finite.
    """
    missing = sorted(key for key in info["missing_keys"] if not (new_head and of_head(model, key)))
    if missing:
        raise InputError(
            f"{flag} {name}: its files lack {len(missing)} weights of config.json's model, {missing[0]} for example; "
            "they would be random. Copy or download the model again, or give one of the right kind."
        )
    mismatched = sorted(item for item in info["mismatched_keys"] if not (new_head and of_head(model, item[0])))
    if mismatched:
        key, found, wanted = mismatched[0]
        raise InputError(
            f"{flag} {name}: config.json doesn't fit the weights: {key} has shape {tuple(found)}, not {tuple(wanted)}. "
            "Use the config.json that was saved with them."
        )
    check_layers(model, info, flag, name)
    check_finite(model, flag, name)


def check_layers(model: PreTrainedModel, info: dict[str, set], flag: str, name: str) -> None:
    """Refuse files with more layers than config.json says: transformers drops the others and only warns.

    Args:
        info: as for `check_loaded`. What transformers leaves out by intention isn't in it.

    Raises:
        InputError: naming a weight that was dropped.
    """
    layers = {match[0] for key in model.state_dict() for match in LAYER.finditer(key)}
    kinds = {LAYER.sub(r"\1.", key) for key in model.state_dict()}
    dropped = sorted(
        key for key in info["unexpected_keys"]
        if LAYER.sub(r"\1.", key) in kinds and any(match[0] not in layers for match in LAYER.finditer(key))
    )  # fmt: skip
    if dropped:
        raise InputError(
            f"{flag} {name}: config.json has fewer layers than the weights: {len(dropped)} would be dropped, "
            f"{dropped[0]} for example. Use the config.json that was saved with them."
        )


@torch.no_grad()
def check_finite(model: torch.nn.Module, flag: str, name: str) -> None:
    """Refuse weights that are NaN or infinite: every loss and every sample would be NaN.

    Raises:
        InputError: naming a weight.
    """
    if not has_weights():
        return
    # one pass without a temporary tensor, and one wait for the accelerator; float8 has no minimum
    weights = {
        key: weight.detach()
        for key, weight in model.named_parameters()
        if weight.is_floating_point() and weight.itemsize > 1 and weight.numel() and not weight.is_meta
    }
    finite = [torch.stack(torch.aminmax(weight)).isfinite().all() for weight in weights.values()]
    bad = [key for key, fine in zip(weights, torch.stack(finite).tolist(), strict=True) if not fine] if finite else []
    if bad:
        raise InputError(
            f"{flag} {name}: {len(bad)} of its {len(weights)} weights are NaN or infinite, {bad[0]} for example. Its "
            "training diverged or its files are damaged. Give another model or checkpoint."
        )


def adapter_shapes(file: str | Path) -> dict[str, tuple[int, ...]]:
    """The shape of every weight in a safetensors file, by name; only its header is read."""
    with safe_open(file, framework="pt") as opened:
        return {key: tuple(opened.get_slice(key).get_shape()) for key in opened.keys()}  # noqa: SIM118


def check_adapter(model: PeftModel, adapter: str, shapes: dict[str, tuple[int, ...]], flag: str, name: str) -> None:
    """Refuse an adapter of which a part found no place in its base, or was not in its file: PEFT at most warns.

    Args:
        adapter: its name in `model`.
        shapes: of the weights in its file, see `adapter_shapes`.

    Raises:
        InputError: naming a weight.
    """
    base = model.get_base_model()
    own = set(get_peft_model_state_dict(model, adapter_name=adapter, save_embedding_layers=False))
    lost = sorted(set(shapes) - own - {f"base_model.model.{key}" for key in base.state_dict()})
    lacking = sorted(own - set(shapes))
    if lost and get_checkpoint_conversion_mapping(base.config.model_type):  # PEFT renames weights of transformers 4
        lost = lacking = []
    if lost or lacking:
        what = f"has no place for {lost[0]}" if lost else f"needs {lacking[0]}, which it lacks"
        raise InputError(
            f"{flag} {name}: the adapter doesn't fit its base: {what}. It belongs to another model, or "
            "adapter_config.json was changed."
        )
    check_finite(model, flag, name)
