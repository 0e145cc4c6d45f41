"""A new tokenizer: byte-level byte-pair encoding, with the special tokens of every later stage.

Source of the algorithm: Sennrich et al. (https://arxiv.org/abs/1508.07909); over bytes: GPT-2, section 2.2
(https://cdn.openai.com/better-language-models/language_models_are_unsupervised_multitask_learners.pdf).
"""

from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from rlhf.data.encoding import control_ids
from rlhf.data.paths import need_tokenizer
from rlhf.errors import InputError
from rlhf.models.sources import Source, resolve
from rlhf.models.tokenizers import PAD_CANDIDATES, read_tokenizer
from rlhf.starter.model import STARTER

BYTES = 256
AT_ONCE = 10_000  # texts to tokenize at once: ids in Python lists take ten times the memory of an array
NEW_PAD = "<|pad|>"
END, PAD, CLS, SEP, MASK, TURN = "<|endoftext|>", "[PAD]", "[CLS]", "[SEP]", "[MASK]", "<|im_start|>"
# Every message ends with the eos token, and nothing follows the last one: sampling stops where training ended.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}"
    "{% else %}{{ message['content'] + eos_token }}{% endif %}"
    "{% if not loop.last or add_generation_prompt %}{{ '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def sentinel(number: int) -> str:
    """Name of the token for missing span `number`, as in T5.

    >>> sentinel(0)
    '<extra_id_0>'
    """
    return f"<extra_id_{number}>"


def special_tokens(extra_ids: int) -> list[str]:
    """All special tokens in the order of their ids; pad is 0 and eos 1, as in T5."""
    return [PAD, END, CLS, SEP, MASK, TURN, *(sentinel(number) for number in range(extra_ids))]


def check_vocab_size(vocab_size: int, extra_ids: int) -> None:
    """Refuse a vocabulary without room for every byte and special token.

    Raises:
        InputError: naming the smallest size that works.
    """
    least = BYTES + len(special_tokens(extra_ids))
    if vocab_size < least:
        raise InputError(
            f"--vocab_size {vocab_size}: too small for {BYTES} bytes and {least - BYTES} special tokens. "
            f"Give at least {least}, or fewer --extra_ids."
        )


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, min_frequency: int = 2, extra_ids: int = 100, model_max_length: int = 1024
) -> PreTrainedTokenizerFast:
    """Learn a byte-level BPE vocabulary.

    It contains all 256 bytes, so any text can be encoded and decodes to itself. Nothing is normalized. Merges never
    cross the borders of GPT-2's pre-tokenization (words with the space before them, numbers, punctuation).

    Args:
        vocab_size: number of bytes, merges and special tokens; fewer if the texts have no more pairs to merge.
        min_frequency: least number of occurrences of a merged pair.
        extra_ids: number of sentinel tokens for span corruption.

    Raises:
        InputError: if `vocab_size` has no room for the bytes and special tokens.
    """
    check_vocab_size(vocab_size, extra_ids)
    specials = special_tokens(extra_ids)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=specials,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        cls_token=CLS,
        sep_token=SEP,
        mask_token=MASK,
        additional_special_tokens=[token for token in specials if token not in (PAD, END, CLS, SEP, MASK)],
        clean_up_tokenization_spaces=False,
        model_max_length=model_max_length,
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def resolve_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer that `--tokenizer_name` names: a folder, a Hub id, or `starter`.

    A tokenizer without its own pad token, such as GPT-2's, gets one.

    Raises:
        InputError: if the folder or repo does not exist, or its tokenizer can't be loaded.
    """
    folder, flag = Path(name).expanduser(), "--tokenizer_name"
    if name != STARTER and (folder / "tokenizer_config.json").exists():
        source = Source(name, str(folder), None, None, None, flag)
    else:
        if name != STARTER:
            need_tokenizer(name)
        source = resolve(name, flag, weights=False)
    tokenizer = read_tokenizer(source)
    # a new model has room for one more token; with pad = eos the collator would hide the ends of texts from the loss
    if tokenizer.pad_token is None or tokenizer.pad_token == tokenizer.eos_token:
        vocabulary, taken = tokenizer.get_vocab(), {tokenizer.eos_token, tokenizer.bos_token}
        unused = [token for token in PAD_CANDIDATES if token in vocabulary and token not in taken]
        tokenizer.add_special_tokens({"pad_token": unused[0] if unused else NEW_PAD})
    return tokenizer


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> list[list[int]]:
    """Token ids of plain texts. No special tokens are added, and one written inside a text stays text."""
    return tokenizer(texts, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def boundary(tokenizer: PreTrainedTokenizerBase) -> int:
    """Id of the token between texts in pretraining. It may differ from eos, which can be the end of a turn."""
    number = tokenizer.convert_tokens_to_ids(END)
    return number if number in control_ids(tokenizer) else tokenizer.eos_token_id


def tokens_and_bytes(tokenizer: PreTrainedTokenizerBase, texts: list[str]) -> tuple[list[int], list[int]]:
    """Number of tokens, and length in UTF-8 bytes, of each text."""
    parts = (texts[start : start + AT_ONCE] for start in range(0, len(texts), AT_ONCE))
    counts = [len(ids) for part in parts for ids in encode_texts(tokenizer, part)]
    return counts, [len(text.encode()) for text in texts]


def frame(tokenizer: PreTrainedTokenizerBase, objective: str) -> None:
    """Make the tokenizer add the objective's special tokens around a text.

    masked, replaced: [CLS] text [SEP], or [CLS] first [SEP] second [SEP]; span: text eos; causal: nothing. A tokenizer
    that already adds special tokens is unchanged.
    """
    backend = tokenizer.backend_tokenizer
    if tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"]:
        return
    if objective in ("masked", "replaced"):
        backend.post_processor = processors.TemplateProcessing(
            single=f"{tokenizer.cls_token} $A {tokenizer.sep_token}",
            pair=f"{tokenizer.cls_token} $A {tokenizer.sep_token} $B:1 {tokenizer.sep_token}:1",
            special_tokens=[
                (tokenizer.cls_token, tokenizer.cls_token_id),
                (tokenizer.sep_token, tokenizer.sep_token_id),
            ],
        )
    elif objective == "span":
        backend.post_processor = processors.TemplateProcessing(
            single=f"$A {tokenizer.eos_token}",
            pair=f"$A {tokenizer.eos_token} $B {tokenizer.eos_token}",
            special_tokens=[(tokenizer.eos_token, tokenizer.eos_token_id)],
        )
