"""What a model name stands for, before any weights are loaded.

A model's name is a Hub id, a local folder, the word `starter`, or the folder or repo of an adapter. The base of an
adapter is found from its `adapter_config.json`.
"""

import warnings
from collections.abc import Collection
from pathlib import Path
from typing import NamedTuple

from huggingface_hub import hf_hub_download, try_to_load_from_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    LocalEntryNotFoundError,
    OfflineModeIsEnabled,
    RevisionNotFoundError,
)
from peft import PeftConfig, TaskType
from peft import __version__ as peft_version
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
)
from transformers.utils import GENERATION_CONFIG_NAME
from trl import ModelConfig

from rlhf.data.paths import need_model, need_name
from rlhf.errors import InputError
from rlhf.models.checks import (
    ADAPTER_WEIGHTS,
    DENIED,
    WEIGHTS,
    adapter_shapes,
    check_dtypes,
    check_files,
    check_quantization,
    check_repo,
    loading,
    made_whole,
    read_settings,
)
from rlhf.models.lstm import LSTMConfig  # noqa: F401 (importing it makes saved LSTMs loadable)
from rlhf.starter.model import STARTER, starter_model

# what architectures call the embeddings, and the output matrix, in an adapter that saves them
EMBEDDINGS = tuple(
    f".{name}.weight"
    for name in (
        "embed_tokens", "wte", "word_embeddings", "embed_in", "shared", "embeddings", "tok_embeddings", "embedding",
        "word_embedding", "lm_head", "embed_out",
    )
)  # fmt: skip
CONFIGS = ("config.json", "adapter_config.json")
# the positions of these begin after the pad token's id
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
    flag: str = "--model_name_or_path"  # that named it, for error messages
    trust_remote_code: bool = False  # run code that the model brings along

    @property
    def is_reward_adapter(self) -> bool:
        """Whether this is an adapter of a sequence classifier."""
        return self.peft_config is not None and self.peft_config.task_type == TaskType.SEQ_CLS


@made_whole()
def _starter() -> str:
    return starter_model()


def resolve(
    name: str | None,
    flag: str = "--model_name_or_path",
    revision: str | None = None,
    *,
    trust_remote_code: bool = False,
    weights: bool = True,
) -> Source:
    """Find out what a model name stands for, without loading weights.

    Args:
        trust_remote_code: of the model and of everything that is loaded with it, such as its tokenizer.
        weights: whether the model itself is needed, and not only its tokenizer; its config and files are checked then.

    Raises:
        InputError: if there is no such folder or repo, a Hub id can't be reached, an adapter's base is missing, or
            weights are needed and can't be loaded as far as config and headers tell.
    """
    revision = None if revision == "main" else revision
    name = STARTER if name is None else name
    path = Path(name).expanduser()
    if revision is not None and (name == STARTER or path.is_dir()):
        raise InputError(
            f"--model_revision {revision}: only a Hub repo has revisions; {name} is a folder on this machine. Leave it "
            "off, or give the Hub id."
        )
    if name == STARTER:
        return Source(STARTER, _starter(), None, None, None, flag)
    source = _resolve_folder(name, path, flag) if path.is_dir() else _resolve_repo(name, flag, revision)
    source = source._replace(trust_remote_code=trust_remote_code)
    if weights:
        _check_source(source)
    return source


def _resolve_folder(name: str, path: Path, flag: str) -> Source:
    if (path / "adapter_config.json").exists():
        return _resolve_adapter(name, str(path), flag, None)
    if (path / "config.json").exists():
        return Source(name, str(path), None, None, None, flag)
    inner = sorted(file.parent.name for file in path.glob("*/*config.json") if file.name in CONFIGS)
    raise InputError(
        f"{flag} {name}: neither config.json nor adapter_config.json in this folder. "
        + (f"Is it {path / inner[0]}?" if inner else "Is it a model?")
    )


def _resolve_repo(name: str, flag: str, revision: str | None) -> Source:
    need_model(name, flag)
    if hub_file(name, "adapter_config.json", flag, revision):
        return _resolve_adapter(name, name, flag, revision)
    if not hub_file(name, "config.json", flag, revision):
        raise InputError(f"{flag} {name}: this Hub repo has neither config.json nor adapter_config.json.")
    return Source(name, name, None, revision, None, flag)


def _check_source(source: Source) -> None:
    """Raise InputError if config or headers show that the model can't be loaded."""
    config = base_config(source)
    check_quantization(config, source.flag, source.name)
    layers = getattr(config.get_text_config(), "num_hidden_layers", None)
    if isinstance(layers, int) and layers < 1:
        raise InputError(f"{source.flag} {source.name}: config.json: num_hidden_layers {layers} makes no model.")
    if config.is_encoder_decoder and is_decoder(config) and type(config) not in AutoModelForSeq2SeqLM._model_mapping:
        raise InputError(
            f"{source.flag} {source.name}: config.json: is_encoder_decoder is true, and {config.model_type} has no "
            "encoder. Set it to false."
        )
    generation = Path(source.base) / GENERATION_CONFIG_NAME
    if generation.exists():  # transformers passes over a broken one, and its end tokens are lost
        settings = read_settings(generation, source.flag, source.name)
        ends = settings.get("eos_token_id")
        for end in ends if isinstance(ends, list) else [ends]:
            if end is not None and (type(end) is not int or end < 0):
                raise InputError(
                    f"{source.flag} {source.name}: generation_config.json: eos_token_id {end!r} isn't a token's id. "
                    "Give an id or a list of them."
                )
    places = [(source.base, base_revision(source), WEIGHTS), (source.adapter, source.revision, ADAPTER_WEIGHTS)]
    for place, revision, weights in places:
        if place is not None and Path(place).is_dir():
            dtypes = check_files(Path(place), source.flag, source.name, weights)
            if weights == WEIGHTS:
                check_dtypes(config, dtypes, source.flag, source.name)
        elif place is not None:
            check_repo(place, revision, source.flag, source.name, weights)


def base_config(source: Source, **options: object) -> PreTrainedConfig:
    """The config of the base.

    An attention or experts implementation that it names has no effect: transformers would fetch a kernel from the Hub
    and run it. The flag --attn_implementation names one. Outputs are named, and only those that are read are returned.

    Args:
        options: other values of the config, such as `num_labels`.

    Raises:
        InputError: if it can't be loaded.
    """
    folder = Path(source.base)
    what = f"{source.flag} {source.name}: config.json:"
    if folder.is_dir():
        quantization = read_settings(folder / "config.json", source.flag, source.name).get("quantization_config")
        if not isinstance(quantization, dict | None):
            raise InputError(f"{what} quantization_config must be an object of settings; found {quantization!r}.")
    with loading(source.flag, source.name, "its config"):
        config = AutoConfig.from_pretrained(
            source.base, revision=base_revision(source), trust_remote_code=source.trust_remote_code, **options
        )
        config._attn_implementation = config._experts_implementation = None
    names = [config.architectures] if isinstance(config.architectures, str) else config.architectures
    if names and not (isinstance(names, list) and all(isinstance(name, str) for name in names)):
        raise InputError(f"{what} architectures must be a list, such as ['LlamaForCausalLM']; found {names!r}.")
    config.architectures = names or None
    for part in (config, *(getattr(config, name, None) for name in config.sub_configs)):
        if isinstance(part, PreTrainedConfig):
            part.return_dict, part.output_attentions, part.output_hidden_states = True, False, False
    return config


def hub_file(repo: str, file: str, flag: str, revision: str | None) -> bool:
    """Whether a Hub repo has a file; it is downloaded into the cache.

    Raises:
        InputError: if the repo doesn't exist, or the Hub can't be reached and the repo is not in the cache.
    """
    cached = try_to_load_from_cache(repo, file, revision=revision)
    if isinstance(cached, str):
        return True
    in_cache = any(isinstance(try_to_load_from_cache(repo, name, revision=revision), str) for name in CONFIGS)
    try:
        hf_hub_download(repo, file, revision=revision)
        return True
    except (OfflineModeIsEnabled, LocalEntryNotFoundError) as error:
        if in_cache:  # the repo was downloaded before and lacks this file
            return False
        if answer := getattr(error.__cause__, "response", None):
            raise InputError(f"{flag} {repo}: {_refusal(answer.status_code, error.__cause__)}.") from error
        raise InputError(
            f"{flag} {repo}: not a local folder, and the Hub can't be reached to look for it there. Go online, "
            "download it before, or give a local folder or 'starter'."
        ) from error
    except EntryNotFoundError:
        return False
    except RevisionNotFoundError as error:
        raise InputError(f"{flag} {repo}: the Hub repo has no revision {revision!r} (--model_revision).") from error
    except (HfHubHTTPError, ValueError) as error:
        status = getattr(getattr(error, "response", None), "status_code", None)
        raise InputError(f"{flag} {repo}: {_refusal(status, error)}.") from error
    except OSError as error:
        raise InputError(f"{flag} {repo}: no such local folder, and the Hub can't be reached ({error}).") from error


def _refusal(status: int | None, error: BaseException | None) -> str:
    why = "it doesn't exist, is gated or needs a token (hf auth login)" if status in DENIED else str(error)[:150]
    return f"no such local folder, and the Hub says no: {why}"


def _resolve_adapter(name: str, adapter: str, flag: str, revision: str | None) -> Source:
    config = _adapter_config(name, adapter, flag, revision)
    base = config.base_model_name_or_path
    if not base:
        raise InputError(f"{flag} {name}: adapter_config.json names no base model (base_model_name_or_path). Add it.")
    if Path(base).name.startswith("starter-") and not Path(base).exists():
        base = _starter()  # the cache was cleared or moved: make the starter again
    folder = Path(base).expanduser()
    try:
        if folder.is_dir():
            nested = (folder / "adapter_config.json").exists()
            source = None if nested else _resolve_folder(base, folder, flag)
        else:
            need_model(base, flag)
            nested = hub_file(base, "adapter_config.json", flag, config.revision)
            source = None if nested else _resolve_repo(base, flag, config.revision)
    except InputError as error:
        raise InputError(f"{flag} {name}: the adapter's base model is missing. {error}") from error
    if source is None:
        raise InputError(f"{flag} {name}: its base {base!r} is itself an adapter. Merge that one into its base first.")
    return Source(name, source.base, adapter, revision, config, flag)


def _adapter_config(name: str, adapter: str, flag: str, revision: str | None) -> PeftConfig:
    """An adapter's config.

    Raises:
        InputError: if it can't be read, or has a setting that the installed PEFT would pass over.
    """
    file = adapter_file(adapter, "adapter_config.json", revision)
    settings = read_settings(file, flag, name)
    if not isinstance(settings.get("peft_type"), str):
        raise InputError(f"{flag} {name}: adapter_config.json has no peft_type, such as LORA.")
    if not isinstance(settings.get("base_model_name_or_path"), str | None):
        raise InputError(f"{flag} {name}: adapter_config.json: base_model_name_or_path must be a name or a folder.")
    with loading(flag, name, "adapter_config.json"), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PEFT's warning of unknown settings; they are refused below
        config = PeftConfig.from_pretrained(adapter, revision=revision)
    # a newer PEFT writes its new settings into every adapter, and they are empty where they are not used
    unknown = sorted(key for key, value in settings.items() if value and not hasattr(config, key))
    if unknown:
        raise InputError(
            f"{flag} {name}: adapter_config.json has the setting {unknown[0]!r}, which PEFT {peft_version} doesn't "
            "know and would pass over. Upgrade peft (pip install -U peft), or remove it if it isn't PEFT's."
        )
    return config


def adapter_file(adapter: str, name: str, revision: str | None) -> Path:
    """A file of an adapter: in its folder, or downloaded into the cache from its Hub repo."""
    folder = Path(adapter)
    return folder / name if folder.is_dir() else Path(hf_hub_download(adapter, name, revision=revision))


def saved_shapes(source: Source) -> dict[str, tuple[int, ...]]:
    """The shapes of an adapter's weights, by name; empty for a full model.

    Raises:
        InputError: if its file can't be read.
    """
    if source.adapter is None:
        return {}
    with loading(source.flag, source.name, ADAPTER_WEIGHTS):
        return adapter_shapes(adapter_file(source.adapter, ADAPTER_WEIGHTS, source.revision))


def saved_rows(source: Source) -> int | None:
    """How many tokens the embeddings have that an adapter brings along, or None: it leaves those of its base alone."""
    for key, shape in saved_shapes(source).items():
        if key.endswith(EMBEDDINGS):
            return shape[0]
        if key.endswith(".lora_embedding_A"):
            return shape[1]
    return None


def base_revision(source: Source) -> str | None:
    """The revision of the base: the one asked for, or the one that an adapter's config names."""
    return source.revision if source.peft_config is None else source.peft_config.revision


def named_models(
    words: list[str],
    flag: str = "--models",
    *,
    repeated: bool = False,
    bare: bool = False,
    taken: Collection[str] = (),
) -> list[tuple[str, str]]:
    """(name, model) for each of a flag's words `name=model`.

    >>> named_models(["sft=outputs/sft", "starter"], bare=True)
    [('sft', 'outputs/sft'), ('starter', 'starter')]

    Args:
        repeated: a name may occur several times, for one method with several seeds.
        bare: a word may be a model alone, which is then its own name.
        taken: names that the results give to something else.

    Raises:
        InputError: if there is no word, a name or model is missing, a name is repeated or taken, or it has a slash or
            a character that can't be printed.
    """
    pairs = []
    for word in words:
        name, equals, model = word.partition("=")
        if bare and Path(word).expanduser().is_dir():
            name, equals = word, ""
        pairs.append((name, model if equals or not bare else name))
        need_name(word, flag)
        if name in taken:
            raise InputError(f"{flag} {word}: the results call something else {name!r}. Give another name.")
    distinct = repeated or len(dict(pairs)) == len(pairs)
    if not pairs or not distinct or not all(name and model for name, model in pairs):
        raise InputError(
            f"{' '.join([flag, *words])}: give name=model pairs{'' if repeated else ' with different names'}, as in: "
            "base=starter sft=outputs/sft."
        )
    return pairs


def refuse_single_model(model_args: ModelConfig) -> None:
    """Refuse the flags for one model where --models names all models: they would have no effect.

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


def context_length(source: Source) -> int | None:
    """The base's context length in tokens, or None if its config sets no limit."""
    return usable_context(base_config(source))


def first_position(model_type: str, pad_token_id: int | None) -> int:
    """The first position: after the pad token's id for RoBERTa and its relatives (for MPNet always 2), else 0.

    >>> first_position("roberta", 1), first_position("llama", 1)
    (2, 0)
    """
    return max(pad_token_id or 0, 1) + 1 if model_type in ROBERTA else 0


def usable_context(config: PreTrainedConfig) -> int | None:
    """A model's context length in tokens; None if its config sets no limit. An encoder-decoder's is the encoder's."""
    text = config.get_text_config()
    config = getattr(config, "encoder", text) if config.is_encoder_decoder else text
    positions = getattr(config, "max_position_embeddings", getattr(config, "max_encoder_position_embeddings", None))
    if positions is None or positions < 0:  # XLNet says -1
        return None
    return positions - first_position(config.model_type, config.pad_token_id)


def resolve_start(model_name_or_path: str | None, source: Source, revision: str | None = None) -> Source:
    """The model that PPO's policy starts from: the named adapter, or the SFT model `source` if both are the same.

    Args:
        revision: of `model_name_or_path`.

    Raises:
        InputError: if the adapter's base is not that of the SFT model, or the revision would have no effect.
    """
    start = resolve(model_name_or_path, revision=revision, trust_remote_code=source.trust_remote_code)
    if start.adapter is None or start.adapter == source.adapter:
        if revision not in (None, "main"):
            raise InputError(
                f"--model_revision {revision}: belongs to --model_name_or_path, and the policy starts from "
                f"--sft_model_path {source.name} instead. Leave --sft_model_path out."
            )
        return source
    if start.base != source.base:
        raise InputError(
            f"--model_name_or_path {start.name}: the policy starts from this adapter, so --sft_model_path "
            f"{source.name} must be its base ({start.base}) or another adapter of that base."
        )
    return start


def is_decoder(config: PreTrainedConfig) -> bool:
    """Whether the architecture is a causal language model and not also a masked one."""
    kind = config.model_type
    return kind in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and kind not in MODEL_FOR_MASKED_LM_MAPPING_NAMES


def is_half(config: PreTrainedConfig) -> bool:
    """Whether the model is one half of an encoder-decoder, such as BartForCausalLM."""
    return type(config) in AutoModelForSeq2SeqLM._model_mapping and not config.is_encoder_decoder


def reads_pairs(tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> bool:
    """Whether a classifier reads prompt and reply as a pair of texts: an encoder without a chat template.

    Encoder-decoders (T5, BART) always do: they read the score at the last eos token and need equally many in all rows.
    A chat template puts one behind each turn.
    """
    return bool(config.is_encoder_decoder) or (tokenizer.chat_template is None and not is_decoder(config))


def language_model_class(source: Source) -> type[AutoModelForCausalLM] | type[AutoModelForSeq2SeqLM]:
    """The class that loads a language model: a causal one, or an encoder-decoder.

    Raises:
        InputError: if the model is something else: a classifier, an encoder, or half of an encoder-decoder. As a
            language model it would get a random head, or see the tokens that it should predict.
    """
    config, what = base_config(source), f"{source.flag} {source.name}"
    architecture = (config.architectures or [""])[0]
    if architecture.endswith(("Classification", "QuestionAnswering", "MultipleChoice", "SentencePrediction")):
        raise InputError(
            f"{what}: is a {architecture}; a language model is needed here. A classifier can be a reward "
            "(--reward_model_path), or a base of recipes/reward.py."
        )
    kind, remote = config.model_type, getattr(config, "auto_map", None) or {}
    known = [auto for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM) if type(config) in auto._model_mapping]
    known += [auto for auto in (AutoModelForCausalLM, AutoModelForSeq2SeqLM) if auto.__name__ in remote]
    encoder = kind in MODEL_FOR_MASKED_LM_MAPPING_NAMES and getattr(config, "is_decoder", None) is False
    if not known and kind in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        raise InputError(
            f"{what}: {architecture or kind} is a vision-language model, which transformers doesn't load for text "
            "alone. Give a language model (Llama, GPT-2, T5, ...)."
        )
    if not known or architecture.endswith("EncoderModel") or (encoder and not config.is_encoder_decoder):
        raise InputError(
            f"{what}: {architecture or kind} is an encoder or another model that predicts no next token; a language "
            "model is needed here. Give a decoder (Llama, GPT-2, ...) or an encoder-decoder (T5, BART, ...). Encoders "
            "are bases of recipes/reward.py and recipes/finetune.py."
        )
    return known[-1] if config.is_encoder_decoder else known[0]
