"""A chat with one model or two; votes on two replies go into a votes file.

The terminal (chat_terminal.py) and the page (chat_page.py) share `Chat`. It fits the conversation into the context,
streams the replies and records votes. Two models reply as A and B, in an order drawn anew each turn.
"""

import random
import threading
import zlib
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedTokenizerBase, StoppingCriteriaList, TextIteratorStreamer, TextStreamer

from rlhf.comparisons import Messages, make_task
from rlhf.data.encoding import encode_prompt, is_seq2seq, tokens_needed
from rlhf.errors import InputError
from rlhf.feedback.chat_votes import ChatVotes, Preferred
from rlhf.feedback.speakers import Speaker
from rlhf.models.adapters import active_adapter
from rlhf.models.generation import seeded
from rlhf.models.seq2seq import decoder_prefix
from rlhf.models.tokenizers import end_ids, reply_text

PLACES = "AB"


@dataclass
class Conversation:
    """The messages so far, and the pending replies."""

    messages: Messages = field(default_factory=list)  # the last is the user's while replies are pending
    order: list[int] = field(default_factory=list)  # place (A, B) -> number of the speaker
    replies: list[str] = field(default_factory=list)  # to the last message, by place; empty once one is kept


class _Printer(TextStreamer):
    """Hands each piece of a reply to a function, without leading spaces."""

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
        votes: keeps the answers; needed for two models.
        max_new_tokens: longest reply.
        seed: of sampling and of the order of A and B. Tasks already in the folder count as earlier turns, so that a
            second chat there does not repeat the first.

    Raises:
        InputError: if `max_new_tokens` fills a model's context.
    """

    def __init__(self, speakers: list[Speaker], votes: ChatVotes | None, *, max_new_tokens: int, seed: int) -> None:
        self.speakers, self.votes = speakers, votes
        self.max_new_tokens, self.seed = max_new_tokens, seed
        self.turns = len(votes.tasks()) if votes else 0
        self._lock = threading.Lock()  # both adapters share one base and torch has one random state
        for speaker in speakers:
            if speaker.context is not None and max_new_tokens >= speaker.context:
                raise InputError(
                    f"--max_new_tokens {max_new_tokens}: leaves no room for a message in the context of "
                    f"{speaker.name}, {speaker.context} tokens. Lower it."
                )

    def say(self, conversation: Conversation, text: str) -> str | None:
        """Add the user's message. Drop the oldest turns if the context can't hold them all.

        Returns:
            a sentence if turns were dropped.

        Raises:
            InputError: if the message alone is too long. It is not added.
        """
        self.keep(conversation, 0)
        text = text.encode("utf-8", "replace").decode()  # a lone surrogate could not be saved
        messages = [*conversation.messages, {"role": "user", "content": text}]
        while not self._fits(messages):
            if len(messages) == 1:
                raise InputError("This message does not fit into the context. Shorten it.")
            messages = messages[2:]
        dropped = (len(conversation.messages) + 1 - len(messages)) // 2
        conversation.messages = messages
        self.turns += 1
        conversation.order = list(range(len(self.speakers)))
        random.Random(f"{self.seed} {self.turns}").shuffle(conversation.order)
        if not dropped:
            return None
        what = "message and its reply" if dropped == 1 else f"{dropped} messages and their replies"
        return f"The conversation is longer than the context: the oldest {what} were dropped."

    def _fits(self, messages: Messages) -> bool:
        return all(
            speaker.context is None
            or tokens_needed(speaker.tokenizer, len(encode_prompt(speaker.tokenizer, messages)), self.max_new_tokens)
            <= speaker.context
            for speaker in self.speakers
        )

    def reply(self, conversation: Conversation, place: int) -> Generator[str, None, None]:
        """Stream the reply in a place piece by piece, then keep the whole text in `conversation.replies`."""
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
            finally:  # also if the caller stops reading
                stop.set()
        conversation.replies.append(reply.result())

    def reply_here(self, conversation: Conversation, place: int, show: Callable[[str], None]) -> None:
        """Like `reply`, without a thread: `show` gets every piece, and Ctrl-C stops it."""
        speaker = self.speakers[conversation.order[place]]
        streamer = _Printer(speaker.tokenizer, show)
        conversation.replies.append(self._generate(conversation, place, streamer, threading.Event()))

    def _generate(self, conversation: Conversation, place: int, streamer: TextStreamer, stop: threading.Event) -> str:
        number = conversation.order[place]
        speaker = self.speakers[number]
        ids = encode_prompt(speaker.tokenizer, conversation.messages)
        seed = zlib.crc32(f"{self.seed} {self.turns} {number}".encode())

        def asked_to_stop(input_ids: torch.Tensor, _scores: torch.Tensor, **_: object) -> torch.Tensor:
            return torch.full((len(input_ids),), stop.is_set(), device=input_ids.device)

        prompt = torch.tensor([ids], device=speaker.model.device)
        try:
            with self._lock, active_adapter(speaker.model, speaker.adapter), seeded(seed):
                output = speaker.model.generate(
                    input_ids=prompt,
                    attention_mask=torch.ones_like(prompt),
                    streamer=streamer,
                    stopping_criteria=StoppingCriteriaList([asked_to_stop]),
                )
        except BaseException:
            streamer.end()  # else its reader would wait forever
            raise
        # an encoder-decoder's output has what its decoder begins with in the prompt's place
        before = len(decoder_prefix(speaker.model)) if is_seq2seq(speaker.tokenizer) else len(ids)
        reply = output[0, before:].tolist()
        return reply_text(speaker.tokenizer, reply, end_ids(speaker.model, speaker.tokenizer)).strip()

    def why_no_vote(self, conversation: Conversation) -> str | None:
        """The reason why the replies can't be compared, or None."""
        if not all(conversation.replies):
            return "There is an empty reply, so there is nothing to compare."
        if len(set(conversation.replies)) == 1:
            return "Both replies are the same, so there is nothing to compare."
        return None

    def vote(self, conversation: Conversation, place: int | None) -> str:
        """Save which reply was better, then reveal which model wrote which.

        Args:
            place: of the better reply; None for a tie.

        Raises:
            InputError: if there is nothing to vote on, or the vote can't be saved. It can then be cast again.
        """
        if self.votes is None or len(conversation.replies) < 2 or self.why_no_vote(conversation):
            raise InputError("There is nothing to vote on.")
        replies = [conversation.replies[conversation.order.index(number)] for number in range(2)]
        task = make_task("train", conversation.messages, replies, [speaker.name for speaker in self.speakers])
        preferred: Preferred = "tie" if place is None else "second" if conversation.order[place] else "first"
        new = self.votes.save(task, preferred)
        self.votes.write_pairs()
        self.keep(conversation, place or 0)
        authors = ", ".join(f"{PLACES[n]} was {name}" for n, name in enumerate(self.names(conversation)))
        return f"{'Saved. Thank you!' if new else 'You answered that before; your first answer counts.'} {authors}."

    def names(self, conversation: Conversation) -> list[str]:
        """The names of A and B."""
        return [self.speakers[number].name for number in conversation.order]

    def keep(self, conversation: Conversation, place: int) -> None:
        """Continue with the reply in a place, or with another if it is empty. If all are empty, drop the message."""
        if conversation.messages and conversation.messages[-1]["role"] == "user":
            kept = [reply for reply in (*conversation.replies[place:], *conversation.replies) if reply]
            if kept:
                conversation.messages = [*conversation.messages, {"role": "assistant", "content": kept[0]}]
            else:
                conversation.messages = conversation.messages[:-1]
        conversation.replies = []
