"""The models that reply in a chat: one, or two that share a base in memory if they can."""

from typing import NamedTuple

from peft import PeftModel
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from trl import ModelConfig

from rlhf.errors import InputError
from rlhf.models.adapters import why_alone
from rlhf.models.checks import check_adapter, loading
from rlhf.models.loading import load_causal_lm
from rlhf.models.seq2seq import decoder_prefix
from rlhf.models.sources import Source, base_revision, context_length, named_models, resolve, saved_rows, saved_shapes
from rlhf.models.tokenizers import end_ids


class Speaker(NamedTuple):
    """A model that replies."""

    name: str  # the user's name for it
    model: PreTrainedModel | PeftModel  # the same object for speakers over one base
    adapter: str | None  # the adapter to activate while this speaker replies
    tokenizer: PreTrainedTokenizerBase
    context: int | None  # longest context, in tokens


def resolve_speakers(words: list[str], trust_remote_code: bool = False) -> dict[str, Source]:
    """The one or two models of --models by name. A word is `name=model`, or a model that is its own name.

    Raises:
        InputError: for another number of models, equal names, a missing model or a reward adapter.
    """
    if len(words) > 2:
        raise InputError(f"--models {' '.join(words)}: {len(words)} models; a conversation has one or two.")
    sources = {
        name: resolve(model, "--models", trust_remote_code=trust_remote_code)
        for name, model in named_models(words, bare=True)
    }
    for source in sources.values():
        if source.is_reward_adapter:
            raise InputError(f"--models {source.name}: is a reward adapter. Give a language model.")
    return sources


def load_speakers(
    sources: dict[str, Source],
    tokenizers: dict[str, PreTrainedTokenizerBase],
    model_args: ModelConfig,
    *,
    max_new_tokens: int,
    temperature: float,
) -> list[Speaker]:
    """Load the models. Adapters over one base share it in memory, also with the base itself as the second model."""
    loaded: dict[str, tuple[Source, PreTrainedModel | PeftModel]] = {}
    speakers = {}
    for name in sorted(sources, key=lambda name: sources[name].adapter is None):  # a host with an adapter can be shared
        source, tokenizer = sources[name], tokenizers[name]
        host = next((model for other, model in loaded.values() if _share_a_base(source, other)), None)
        adapter = "default" if source.adapter else None
        if host is None:
            host = load_causal_lm(source, model_args, tokenizer, trainable=False).eval()
            loaded[name] = source, host
        elif source.adapter is not None:
            adapter = _join(host, source)
        _only_sample(host, tokenizer, max_new_tokens, temperature)
        speakers[name] = Speaker(name, host, adapter, tokenizer, context_length(source))
    return [speakers[name] for name in sources]


def _share_a_base(one: Source, other: Source) -> bool:
    same = (one.base, base_revision(one)) == (other.base, base_revision(other))
    return same and not (_needs_its_own(one) or _needs_its_own(other))


def _needs_its_own(source: Source) -> bool:
    """Whether an adapter changes its base; embeddings that it brings along would go into the base."""
    config = source.peft_config
    return bool(saved_rows(source) or (config and (config.is_prompt_learning or why_alone(config))))


def _join(host: PeftModel, source: Source) -> str:
    """Load a second adapter beside the first, in the base's precision as load_causal_lm does. Returns its name."""
    dtype, name = host.get_base_model().dtype, "second"
    with loading(source.flag, source.name, "the adapter"):
        host.load_adapter(source.adapter, name, revision=source.revision, is_trainable=False)
    check_adapter(host, name, saved_shapes(source), source.flag, source.name)
    for parameter_name, parameter in host.named_parameters():
        if f".{name}." in parameter_name:
            parameter.data = parameter.data.to(dtype)
    return name


def _only_sample(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
) -> None:
    """Pure sampling, as in training and evaluation.

    The stop tokens of the model's generation_config stay, and what the decoder of an encoder-decoder begins with.
    """
    owners = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    own = owners[-1].generation_config
    start = decoder_prefix(owners[-1])[0] if model.config.is_encoder_decoder else None
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=end_ids(owners[-1], tokenizer),
        decoder_start_token_id=start,
        forced_bos_token_id=own.forced_bos_token_id,
    )
    for owner in owners:
        owner.generation_config = config
