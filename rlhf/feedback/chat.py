"""Chatting with one model or two, in the terminal; which of two replies was better goes into a votes file.

The terminal and the page (chat_page.py) share `Chat`: it fits the conversation into the context, streams the replies
and records votes. Two models reply as A and B, in an order drawn anew each turn.
"""

import contextlib
import random
import sys
import threading
import unicodedata
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import (
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from trl import ModelConfig

from rlhf.comparisons import Messages, make_task
from rlhf.data.encoding import encode_prompt
from rlhf.errors import InputError
from rlhf.feedback.chat_votes import ChatVotes, Preferred
from rlhf.models.adapters import active_adapter
from rlhf.models.generation import seeded
from rlhf.models.loading import load_causal_lm
from rlhf.models.sources import Source, base_revision, context_length, named_models, resolve

PLACES = "AB"


# ---------------------------------------------------------------------------------------------- models


class Speaker(NamedTuple):
    """A model that replies."""

    name: str  # as the user calls it
    model: PreTrainedModel | PeftModel  # the same object for speakers over one base
    adapter: str | None  # active while it speaks
    tokenizer: PreTrainedTokenizerBase
    context: int | None


def chosen_models(words: list[str]) -> dict[str, Source]:
    """The one or two models of --models, by name: `name=model`, or a model alone, which is then its own name.

    Raises:
        InputError: for another number of them, equal names, a model that isn't there, or a reward adapter.
    """
    if len(words) > 2:
        raise InputError(f"--models {' '.join(words)}: {len(words)} models; a conversation has one or two.")
    sources = {name: resolve(model, "--models") for name, model in named_models(words, bare=True)}
    for source in sources.values():
        if source.is_reward_adapter:
            raise InputError(f"--models {source.name}: is a reward adapter; a language model is needed here.")
    return sources


def load_speakers(
    sources: dict[str, Source],
    tokenizers: dict[str, PreTrainedTokenizerBase],
    model_args: ModelConfig,
    *,
    max_new_tokens: int,
    temperature: float,
    trust_remote_code: bool = False,
) -> list[Speaker]:
    """Load the models. Adapters over one base, and that base itself, share it in memory."""
    loaded: dict[str, tuple[Source, PreTrainedModel | PeftModel]] = {}
    speakers = {}
    for name in sorted(sources, key=lambda name: sources[name].adapter is None):  # others can join an adapter's model
        source, tokenizer = sources[name], tokenizers[name]
        host = next((model for other, model in loaded.values() if _share_a_base(source, other)), None)
        adapter = "default" if source.adapter else None
        if host is None:
            host = load_causal_lm(
                source, model_args, tokenizer, trainable=False, trust_remote_code=trust_remote_code
            ).eval()
            loaded[name] = source, host
        elif source.adapter is not None:
            adapter = _join(host, source)
        _only_sample(host, tokenizer, max_new_tokens, temperature)
        speakers[name] = Speaker(name, host, adapter, tokenizer, context_length(source, trust_remote_code))
    return [speakers[name] for name in sources]


def _share_a_base(one: Source, other: Source) -> bool:
    same = (one.base, base_revision(one)) == (other.base, base_revision(other))
    return same and not any(s.peft_config is not None and s.peft_config.is_prompt_learning for s in (one, other))


def _join(host: PeftModel, source: Source) -> str:
    """Put a second adapter beside the first, in its base's precision, as load_causal_lm does; returns its name."""
    dtype, name = host.get_base_model().dtype, "second"
    host.load_adapter(source.adapter, name, revision=source.revision, is_trainable=False)
    for parameter_name, parameter in host.named_parameters():
        if f".{name}." in parameter_name:
            parameter.data = parameter.data.to(dtype)
    return name


def _only_sample(
    model: PreTrainedModel | PeftModel, tokenizer: PreTrainedTokenizerBase, max_new_tokens: int, temperature: float
) -> None:
    """Pure sampling, as in training and evaluation: nothing else of the model's own generation_config stays."""
    owners = [model, model.get_base_model()] if isinstance(model, PeftModel) else [model]
    config = GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=True,
        temperature=temperature,
        top_k=0,
        top_p=1.0,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=sorted({tokenizer.eos_token_id, *owners[-1].generation_config.eos_token_id}),
    )
    for owner in owners:
        owner.generation_config = config


# ---------------------------------------------------------------------------------------------- the chat


@dataclass
class Conversation:
    """What was said, and the replies among which none was kept yet."""

    messages: Messages = field(default_factory=list)  # ends with the user's message while it is replied to
    order: list[int] = field(default_factory=list)  # place on the screen, A or B -> model
    replies: list[str] = field(default_factory=list)  # to the last message, by place


class _Shown(TextStreamer):
    """Hands each piece of a reply to a function; without the spaces that it begins with."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, show: Callable[[str], None]) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.show, self.started = show, False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        text = text if self.started else text.lstrip()
        self.started = self.started or bool(text)
        if text:
            self.show(text)


class Chat:
    """One or two models that reply to any number of conversations, one reply at a time.

    Args:
        votes: where answers go; needed for two models.
        seed: of sampling and of who is A. What a folder holds counts as earlier turns, so that chatting there again
            does not repeat itself.
    """

    def __init__(self, speakers: list[Speaker], votes: ChatVotes | None, *, max_new_tokens: int, seed: int) -> None:
        self.speakers, self.votes = speakers, votes
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.turns = len(votes.tasks()) if votes else 0
        self._lock = threading.Lock()  # one base holds both adapters, and torch one random state
        for speaker in speakers:
            if speaker.context is not None and max_new_tokens >= speaker.context:
                raise InputError(
                    f"--max_new_tokens {max_new_tokens}: leaves no room for a message in the {speaker.context} tokens "
                    f"that {speaker.name} can read."
                )

    def say(self, conversation: Conversation, text: str) -> str | None:
        """Add the user's message, without the oldest turns if the models can't read them all.

        Returns:
            a sentence if turns were left out.

        Raises:
            InputError: if the message alone is too long; it is not added.
        """
        self.keep(conversation, 0)
        text = text.encode("utf-8", "replace").decode()  # half a surrogate pair could not be saved
        messages = [*conversation.messages, {"role": "user", "content": text}]
        while not self._fits(messages):
            if len(messages) == 1:
                raise InputError("This message is longer than the context leaves room for. Shorten it.")
            messages = messages[2:]
        dropped = (len(conversation.messages) + 1 - len(messages)) // 2
        conversation.messages = messages
        self.turns += 1
        conversation.order = list(range(len(self.speakers)))
        random.Random(f"{self.seed} {self.turns}").shuffle(conversation.order)
        if not dropped:
            return None
        what = "message and its reply" if dropped == 1 else f"{dropped} messages and their replies"
        return f"The conversation is longer than the context: the oldest {what} were forgotten."

    def _fits(self, messages: Messages) -> bool:
        return all(
            speaker.context is None
            or len(encode_prompt(speaker.tokenizer, messages)) + self.max_new_tokens <= speaker.context
            for speaker in self.speakers
        )

    def reply(self, conversation: Conversation, place: int) -> Generator[str, None, None]:
        """Stream the reply in a place, word by word, and then remember it whole."""
        speaker = self.speakers[conversation.order[place]]
        streamer = TextIteratorStreamer(speaker.tokenizer, skip_prompt=True, skip_special_tokens=True)
        stop = threading.Event()
        with ThreadPoolExecutor(1) as pool:
            try:
                reply = pool.submit(self._generate, conversation, place, streamer, stop)
                started = False
                for piece in streamer:
                    piece = piece if started else piece.lstrip()
                    started = started or bool(piece)
                    if piece:
                        yield piece
            finally:  # also when the listener is gone
                stop.set()
        conversation.replies.append(reply.result())

    def reply_here(self, conversation: Conversation, place: int, show: Callable[[str], None]) -> None:
        """The same without a thread: `show` is called with every piece, and Ctrl-C ends it."""
        speaker = self.speakers[conversation.order[place]]
        streamer = _Shown(speaker.tokenizer, show)
        conversation.replies.append(self._generate(conversation, place, streamer, threading.Event()))

    def _generate(self, conversation: Conversation, place: int, streamer: TextStreamer, stop: threading.Event) -> str:
        number = conversation.order[place]
        speaker = self.speakers[number]
        ids = encode_prompt(speaker.tokenizer, conversation.messages)
        seed = zlib.crc32(f"{self.seed} {self.turns} {number}".encode())

        def stopped(input_ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

        prompt = torch.tensor([ids], device=speaker.model.device)
        try:
            with self._lock, active_adapter(speaker.model, speaker.adapter), seeded(seed):
                output = speaker.model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([stopped]),
                )
        except BaseException:
            streamer.end()  # else its listener would wait for ever
            raise
        return speaker.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True).strip()

    def why_no_vote(self, conversation: Conversation) -> str | None:
        """What is wrong with comparing the replies, if anything."""
        if not all(conversation.replies):
            return "There is an empty reply, so there is nothing to compare."
        if len(set(conversation.replies)) == 1:
            return "Both replies are the same, so there is nothing to compare."
        return None

    def vote(self, conversation: Conversation, place: int | None) -> str:
        """Save that the reply in a place was better, or None for a tie; then say who wrote which.

        Raises:
            InputError: if there is nothing to vote on, or it can't be saved; the question stays open.
        """
        if self.votes is None or len(conversation.replies) < 2 or self.why_no_vote(conversation):
            raise InputError("There is nothing to vote on.")
        replies = [conversation.replies[conversation.order.index(number)] for number in range(2)]
        task = make_task("train", conversation.messages, replies, [speaker.name for speaker in self.speakers])
        preferred: Preferred = "tie" if place is None else "second" if conversation.order[place] else "first"
        new = self.votes.save(task, preferred)
        self.votes.write_pairs()
        self.keep(conversation, place or 0)
        was = ", ".join(f"{PLACES[n]} was {name}" for n, name in enumerate(self.names(conversation)))
        return f"{'Saved. Thank you!' if new else 'You answered that before; your first answer counts.'} {was}."

    def names(self, conversation: Conversation) -> list[str]:
        """Who is A and who is B."""
        return [self.speakers[number].name for number in conversation.order]

    def keep(self, conversation: Conversation, place: int) -> None:
        """Go on with the reply in a place; with another one if that is empty, and without the message if all are."""
        if conversation.messages and conversation.messages[-1]["role"] == "user":
            kept = [reply for reply in (*conversation.replies[place:], *conversation.replies) if reply]
            if kept:
                conversation.messages = [*conversation.messages, {"role": "assistant", "content": kept[0]}]
            else:
                conversation.messages = conversation.messages[:-1]
        conversation.replies = []


# ---------------------------------------------------------------------------------------------- the terminal


def chat_in_terminal(chat: Chat) -> None:
    """Chat until an empty line, /quit, the end of the input or Ctrl-C."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # no byte that is typed and no letter that is sampled may end the chat
            stream.reconfigure(errors="replace")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then has editing and a history)
    names = " and ".join(speaker.name for speaker in chat.speakers)
    print(f"Chatting with {names}. /new starts over; an empty line or /quit ends.", flush=True)
    conversation = Conversation()
    try:
        while (text := input("You: ").strip()) not in ("", "/quit"):
            if text == "/new":
                conversation = Conversation()
                print("A new conversation.")
            else:
                _one_turn(chat, conversation, text)
    except (EOFError, KeyboardInterrupt):
        print()
    finally:
        if chat.votes:
            chat.votes.write_pairs()
    if chat.votes and chat.votes.file.votes:
        print(f"Votes: {chat.votes.file.path}; pairs to train on: {chat.votes.folder / 'train.jsonl'}")
    elif chat.votes:
        print("No votes.")


def _one_turn(chat: Chat, conversation: Conversation, text: str) -> None:
    try:
        notice = chat.say(conversation, text)
    except InputError as error:
        print(error)
        return
    if notice:
        print(notice)
    for place in range(len(chat.speakers)):
        name = PLACES[place] if len(chat.speakers) > 1 else chat.speakers[0].name
        print(f"{name}: ", end="", flush=True)
        chat.reply_here(conversation, place, lambda piece: print(harmless(piece), end="", flush=True))
        print()
    if len(chat.speakers) > 1:
        _ask(chat, conversation)
    else:
        chat.keep(conversation, 0)


def _ask(chat: Chat, conversation: Conversation) -> None:
    """Ask which reply was better until that is answered, or skipped."""
    reason = chat.why_no_vote(conversation)
    if reason:
        print(reason)
        return chat.keep(conversation, 0)
    places: dict[str, int | None] = {"a": 0, "b": 1, "t": None}
    while answer := input("Which was better? A, B, T for a tie, Enter to skip: ").strip().lower():
        if answer == "/quit":
            raise EOFError
        if answer == "/new":
            conversation.messages = []
            break
        try:
            if answer in places:
                print(chat.vote(conversation, places[answer]))
                return None
        except InputError as error:
            print(error)
    chat.keep(conversation, 0)


def harmless(text: str) -> str:
    """Text without control characters, which a terminal might take for commands."""
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
