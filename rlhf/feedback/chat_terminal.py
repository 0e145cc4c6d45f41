"""The chat in the terminal."""

import contextlib
import sys
import unicodedata

from rlhf.errors import InputError
from rlhf.feedback.chat import PLACES, Chat, Conversation


def chat_in_terminal(chat: Chat) -> None:
    """Chat until an empty line, /quit, the end of the input or Ctrl-C."""
    for stream in (sys.stdin, sys.stdout):
        if hasattr(stream, "reconfigure"):  # no typed byte and no sampled character ends the chat
            stream.reconfigure(errors="replace")
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() line editing and a history)
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
    """Ask which reply was better until the user answers or skips."""
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
    r"""Text without control characters, which a terminal could take for commands.

    >>> harmless("a\x1b[2Jb")
    'a�[2Jb'
    """
    return "".join("\ufffd" if unicodedata.category(c) == "Cc" and c not in "\n\t" else c for c in text)
