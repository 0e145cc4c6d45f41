"""A model's tokenizer: its pad token, its chat template, and the token that ends a reply."""

from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from rlhf.data.encoding import control_ids, encode_messages
from rlhf.data.paths import TEMPLATE_FILES, need_file
from rlhf.errors import InputError
from rlhf.models.sources import Source, base_revision, hub_file, resolve

# Tokens that model families reserve for padding or never use, in order of preference.
PAD_CANDIDATES = (
    "<pad>", "[PAD]", "<|pad|>", "<|finetune_right_pad_id|>", "<|reserved_special_token_0|>", "<unk>", "[UNK]",
    "<|padding|>", "<|fim_pad|>", "<|vision_pad|>", "<|image_pad|>", "<|endoftext|>", "<|endofprompt|>",
    "<empty_output>",
)  # fmt: skip
# For base models without a chat template: plain words, so that no new token must be learned.
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


def load_tokenizer(
    source: Source,
    *,
    eos_token: str | None = None,
    pad_token: str | None = None,
    chat_template_path: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, with a pad token that differs from eos and with a chat template.

    A tokenizer saved with an adapter is preferred to the base's. If pad is missing or equals eos, an unused token of
    the vocabulary becomes pad. If they were equal, every end of a reply would be masked as padding, and the model would
    never learn to stop.

    Args:
        chat_template_path: a .jinja file, or a model that has the template.

    Raises:
        InputError: if `pad_token` is eos, one of the two isn't in the vocabulary or can't be found, or the chat
            template ends replies with a token other than `eos_token`.
    """
    folder = source.adapter if source.adapter and _has_tokenizer(source.adapter, source.revision) else source.base
    revision = source.revision if folder == source.adapter else base_revision(source)
    tokenizer = AutoTokenizer.from_pretrained(folder, revision=revision, trust_remote_code=trust_remote_code)
    if eos_token is not None:
        if eos_token not in tokenizer.get_vocab():
            raise InputError(f"--eos_token {eos_token!r}: not in the vocabulary of {source.name}.")
        tokenizer.eos_token = eos_token
    if tokenizer.eos_token is None:
        raise InputError(f"The tokenizer of {source.name} has no eos_token, so replies could never end. Set one.")
    set_pad_token(tokenizer, source, pad_token)
    if chat_template_path and chat_template_path.endswith(TEMPLATE_FILES):
        need_file(chat_template_path, "--chat_template_path")
        tokenizer.chat_template = Path(chat_template_path).read_text(encoding="utf-8")
    elif chat_template_path:
        other = resolve(chat_template_path, "--chat_template_path")
        tokenizer.chat_template = AutoTokenizer.from_pretrained(other.base).chat_template
    if tokenizer.chat_template is None:
        print(
            f"{source.name} has no chat template; using 'User: ... Assistant: ...' (change it: --chat_template_path)."
        )
        tokenizer.chat_template = PLAIN_TEMPLATE
    _end_turns_with_eos(tokenizer, source)
    if eos_token not in (None, tokenizer.eos_token):
        raise InputError(
            f"--eos_token {eos_token!r}: the chat template ends a reply with {tokenizer.eos_token!r}. Leave it off, or "
            "give a template that agrees with --chat_template_path."
        )
    return tokenizer


def _end_turns_with_eos(tokenizer: PreTrainedTokenizerBase, source: Source) -> None:
    """Make the control token that ends an assistant's turn the eos token, so that sampling stops where training ended.

    The chat template of many base models ends turns with <|im_end|>, which is not their eos token.
    """
    last = encode_messages(tokenizer, [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}])[-1]
    if last != tokenizer.eos_token_id and last in control_ids(tokenizer) and last != tokenizer.pad_token_id:
        token = tokenizer.convert_ids_to_tokens(last)
        print(
            f"{source.name}: its chat template ends a reply with {token!r}; eos was {tokenizer.eos_token!r}, now that."
        )
        tokenizer.eos_token = token


def _has_tokenizer(adapter: str, revision: str | None) -> bool:
    if Path(adapter).is_dir():
        return (Path(adapter) / "tokenizer_config.json").exists()
    return hub_file(adapter, "tokenizer_config.json", "--model_name_or_path", revision)


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
        if not unused:
            raise InputError(
                f"The pad token of {source.name} is {tokenizer.pad_token!r} and its eos token {tokenizer.eos_token!r}; "
                "they must differ, and no unused token was found. Name one with --pad_token (sft.py, reward.py, "
                "finetune.py), or set pad_token in the tokenizer_config.json of a local copy."
            )
        print(f"{source.name}: pad token was {tokenizer.pad_token!r}, now {unused[0]!r}, so that it differs from eos.")
        tokenizer.pad_token = unused[0]
