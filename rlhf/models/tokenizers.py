"""A model's tokenizer: its pad token, its chat template, and the token that ends a reply."""

from pathlib import Path

from peft import PeftModel
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from rlhf.data.encoding import control_ids, encode_messages
from rlhf.data.paths import TEMPLATE_FILES, need_file
from rlhf.errors import InputError
from rlhf.models.checks import loading
from rlhf.models.sources import (
    Source,
    base_config,
    base_revision,
    hub_file,
    is_decoder,
    language_model_class,
    resolve,
    saved_rows,
)

# Tokens that model families reserve for padding or never use, in order of preference.
PAD_CANDIDATES = (
    "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<unk>", "[UNK]",
    "<|padding|>", "<|fim_pad|>", "<|vision_pad|>", "<|image_pad|>", "<|endoftext|>", "<|endofprompt|>",
    "<empty_output>",
)  # fmt: skip
# The byte 0xFF, which no text in UTF-8 has, in SentencePiece's and in GPT-2's spelling.
IMPOSSIBLE = ("<0xFF>", "\u00ff")
# For base models without a chat template: plain words, so that no new token must be learned.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def read_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The tokenizer that was saved with a model's adapter, or else with its base, as it is.

    Raises:
        InputError: if it can't be loaded or knows no words.
    """
    own = source.adapter is not None and _has_tokenizer(source)
    folder = source.adapter if own else source.base
    revision = source.revision if own else base_revision(source)
    with loading(source.flag, source.name, "its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=source.trust_remote_code)
        words = tokenizer("Hello world", add_special_tokens=False)["input_ids"]
    if not words:  # without its files, transformers makes some tokenizers with an empty vocabulary
        raise InputError(
            f"{source.flag} {source.name}: its tokenizer knows no words. Copy tokenizer.json and tokenizer_config.json "
            "(or vocab.json and merges.txt, tokenizer.model, vocab.txt) into the folder."
        )
    return tokenizer


def load_tokenizer(
    source: Source,
    *,
    eos_token: str | None = None,
    pad_token: str | None = None,
    chat_template_path: str | None = None,
    classifier: bool = False,
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token that differs from eos and, for a decoder, with a chat template.

    A tokenizer saved with an adapter is preferred to the base's. If pad is missing or equals eos, an unused token of
    the vocabulary becomes pad. If they were equal, every end of a reply would be masked as padding, and the model would
    never learn to stop.

    The tokenizer of an encoder or encoder-decoder is left without a template if it has none (rlhf/data/pairs.py and
    rlhf/data/encoding.py say what is read then).

    Args:
        chat_template_path: a .jinja file, or a model that has the template.
        classifier: it is a reward model's. An encoder then needs no eos token.

    Raises:
        InputError: if the model is neither a language model nor, with `classifier`, a base of a reward model; or if the
            tokenizer can't be loaded, `pad_token` is eos, one of the two isn't in the vocabulary or can't be found,
            a token has no embedding, or the chat template ends replies with a token other than `eos_token`.
    """
    config = base_config(source)
    if not classifier:
        language_model_class(source)  # refuses other models
    generates = not classifier or (is_decoder(config) and not config.is_encoder_decoder)
    tokenizer = read_tokenizer(source)
    tokenizer.is_encoder_decoder = bool(config.is_encoder_decoder)  # for `encode_prompt`
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise InputError(f"--eos_token {eos_token!r}: not in the vocabulary of {source.name}.")
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token is None and generates:
        raise InputError(
            f"The tokenizer of {source.name} has no eos_token, so replies could never end. Name one of its "
            "tokens with --eos_token (sft.py, reward.py), or set it in the tokenizer_config.json of a local copy."
        )
    if chat_template_path:
        tokenizer.chat_template = _template_of(chat_template_path)
    if tokenizer.chat_template is None and generates and not config.is_encoder_decoder:
        print(
            f"{source.name} has no chat template; using 'User: ... Assistant: ...' (change it: --chat_template_path)."
        )
        tokenizer.chat_template = PLAIN_TEMPLATE
    if tokenizer.chat_template is not None and generates:
        _end_turns_with_eos(tokenizer, source)
    if eos_token not in (None, tokenizer.eos_token):
        raise InputError(
            f"--eos_token {eos_token!r}: the chat template ends a reply with {tokenizer.eos_token!r}. Leave it off, or "
            "give a template that agrees with --chat_template_path."
        )
    set_pad_token(tokenizer, source, pad_token)  # when the eos token is known, from which it must differ
    need_embeddings(tokenizer, source)
    return tokenizer


def _template_of(path: str) -> str | None:
    """The chat template in a .jinja file, or of a model."""
    if not path.endswith(TEMPLATE_FILES):
        return read_tokenizer(resolve(path, "--chat_template_path", weights=False)).chat_template
    need_file(path, "--chat_template_path")
    return Path(path).read_text(encoding="utf-8")


def need_embeddings(tokenizer: PreTrainedTokenizerBase, source: Source) -> None:
    """Refuse a tokenizer that has tokens for which the model has no embedding, if they can occur.

    Control tokens beyond the embeddings that neither the tokenizer nor the chat template uses never occur (Gemma 3's
    text models have one for images).

    Raises:
        InputError: naming the token.
    """
    rows = saved_rows(source) or getattr(base_config(source).get_text_config(), "vocab_size", None)
    if rows is None or len(tokenizer) <= rows:
        return
    named = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}
    controls, template = control_ids(tokenizer), str(tokenizer.chat_template)
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        if number >= rows and (number in named or number not in controls or token in template):
            raise InputError(
                f"{source.flag} {source.name}: its tokenizer has the token {token!r} with id {number}, and the model "
                f"has embeddings for {rows} ids only. Give the tokenizer that belongs to the model, or save the model "
                "with resized embeddings (resize_token_embeddings)."
            )


def end_ids(model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids of all tokens that end a reply: the tokenizer's eos and those of the model's generation_config, ascending.

    The chat models of Llama 3, Qwen2.5 and Gemma 3 have several. Everything that samples stops at each of them.
    """
    config = model.generation_config
    named = None if config is None else config.eos_token_id
    ids = named if isinstance(named, list) else [named]
    return sorted({number for number in [tokenizer.eos_token_id, *ids] if number is not None})


def reply_text(tokenizer: PreTrainedTokenizerBase, ids: list[int], ends: list[int]) -> str:
    """The text of a sampled reply, without the token of `end_ids` that ended it and without control tokens."""
    return tokenizer.decode(ids[:-1] if ids and ids[-1] in ends else ids, skip_special_tokens=True)


def _end_turns_with_eos(tokenizer: PreTrainedTokenizerBase, source: Source) -> None:
    """Make the control token that ends an assistant's turn the eos token, so that sampling stops where training ended.

    The chat template of many base models ends turns with <|im_end|>, which is not their eos token.
    """
    last = encode_messages(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])[-1]
    if last != tokenizer.eos_token_id and last in control_ids(tokenizer):
        token = tokenizer.convert_ids_to_tokens(last)
        print(
            f"{source.name}: its chat template ends a reply with {token!r}; eos was {tokenizer.eos_token!r}, now that."
        )
        tokenizer.eos_token = token


def _has_tokenizer(source: Source) -> bool:
    assert source.adapter is not None
    if Path(source.adapter).is_dir():
        return (Path(source.adapter) / "tokenizer_config.json").exists()
    return hub_file(source.adapter, "tokenizer_config.json", source.flag, source.revision)


def set_pad_token(tokenizer: PreTrainedTokenizerBase, source: Source, pad_token: str | None) -> None:
    """Give the tokenizer a pad token that differs from eos; see `load_tokenizer`."""
    vocabulary = tokenizer.get_vocab()
    if pad_token is not None:
        if pad_token not in vocabulary:
            raise InputError(f"--pad_token {pad_token!r}: not in the vocabulary of {source.name}.")
        tokenizer.pad_token = pad_token
        if tokenizer.pad_token_id == tokenizer.eos_token_id:
            raise InputError(
                f"--pad_token {pad_token!r} is also the eos token of {source.name}: the end of replies would be masked "
                "as padding. Name another token."
            )
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        taken = {tokenizer.eos_token, tokenizer.bos_token}
        unused = [token for token in PAD_CANDIDATES if token in vocabulary and token not in taken]
        unused += [token for token in IMPOSSIBLE if tokenizer.decode(vocabulary.get(token, 0)) == "\ufffd"]
        if not unused:
            raise InputError(
                f"The pad token of {source.name} is {tokenizer.pad_token!r} and its eos token {tokenizer.eos_token!r}; "
                "they must differ, and no unused token was found. Name one with --pad_token (sft.py, reward.py, "
                "finetune.py), or set pad_token in the tokenizer_config.json of a local copy."
            )
        print(f"{source.name}: pad token was {tokenizer.pad_token!r}, now {unused[0]!r}, so that it differs from eos.")
        tokenizer.pad_token = unused[0]
