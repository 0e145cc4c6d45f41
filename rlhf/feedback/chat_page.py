"""The page to chat with one model, or with two side by side."""

import functools
import html
from collections.abc import Iterator
from typing import Any

from rlhf.comparisons import Messages
from rlhf.errors import InputError
from rlhf.feedback.chat import PLACES, Chat, Conversation
from rlhf.feedback.serving import gr, serve, wait  # not from gradio: serving first turns its telemetry off

Updates = dict[gr.blocks.Block, object]  # new values by component of the page
STYLE = """<style>
.gradio-container main { max-width: 60rem !important; margin: 0 auto; }
#talk .text, #replies .text { white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.5; }
#talk .messages { display: flex; flex-direction: column; gap: .5rem; padding: .2rem; }
#talk .message { border-radius: .8rem; padding: .5rem .8rem; max-width: 85%; align-self: flex-start;
  background: var(--background-fill-secondary); border: 1px solid var(--border-color-primary); }
#talk .user { align-self: flex-end; background: var(--color-accent-soft); border-color: transparent; }
#replies .pair { display: grid; grid-template-columns: 1fr 1fr; gap: .8rem; }
@media (max-width: 42rem) { #replies .pair { grid-template-columns: 1fr; } }
#replies .reply { border: 2px solid var(--border-color-primary); border-radius: .8rem; padding: .6rem .8rem;
  background: var(--block-background-fill); min-height: 5rem; min-width: 0; }
#replies .better { border-color: var(--color-accent); }
#replies .who, #names { font-size: .85rem; font-weight: 600; opacity: .75; overflow-wrap: anywhere; }
#status { min-height: 1.6rem; font-size: .95rem; line-height: 1.6rem; overflow-wrap: anywhere; }
#status b { color: #16a34a; }
</style>"""


class ChatPage:
    """The requests of the page. Each browser tab has its own conversation, which stays on the server."""

    def __init__(self, chat: Chat) -> None:
        self.chat, self.two = chat, len(chat.speakers) > 1

    def send(self, text: str | None, conversation: Conversation) -> Iterator[Updates]:
        """Take the user's message and stream the replies, A's before B's."""
        if not text or not text.strip():
            yield {self.status: ""}
            return
        try:
            notice = self.chat.say(conversation, text.strip())
        except InputError as error:
            yield {self.status: html.escape(str(error))}
            return
        replies = [""] * len(self.chat.speakers)
        yield {self.box: "", self.status: html.escape(notice or ""), self.choice: hide()} | {
            self.talk: bubbles(conversation.messages), self.replies: pair(replies) if self.two else ""
        }  # fmt: skip
        for place in range(len(replies)):
            for piece in self.chat.reply(conversation, place):
                replies[place] += piece
                yield self._so_far(conversation, replies)
            replies[place] = conversation.replies[place]
            yield self._so_far(conversation, replies)
        reason = self.chat.why_no_vote(conversation) if self.two or not all(replies) else None
        if self.two and reason is None:
            yield {self.choice: gr.update(visible=True)}
            return
        self.chat.keep(conversation, 0)
        if reason:
            yield {self.status: html.escape(reason)}

    def _so_far(self, conversation: Conversation, replies: list[str]) -> Updates:
        if self.two:
            return {self.replies: pair(replies)}
        return {self.talk: bubbles([*conversation.messages, {"role": "assistant", "content": replies[0]}])}

    def vote(self, place: int | None, conversation: Conversation) -> Updates:
        """Save which reply was better, then thank and reveal which model wrote which."""
        replies = conversation.replies
        try:
            thanks = self.chat.vote(conversation, place)
        except InputError as error:
            return {self.status: html.escape(str(error))}
        return {
            self.status: f"<b>✓</b> {html.escape(thanks)}",
            self.choice: hide(),
            self.replies: pair(replies, self.chat.names(conversation), place),
        }

    def skip(self, conversation: Conversation) -> Updates:
        """Continue with A and keep no answer."""
        self.chat.keep(conversation, 0)
        return {self.status: "Skipped, nothing is saved. The conversation continues with A.", self.choice: hide()}

    def start_over(self) -> Updates:
        """Begin a new conversation."""
        return {
            self.conversation: Conversation(),
            self.choice: hide(),
            self.talk: "",
            self.replies: "",
            self.status: "",
        }

    def blocks(self) -> gr.Blocks:
        """The page itself."""
        names = " and ".join(speaker.name for speaker in self.chat.speakers)
        how = " reply as A and B, in random order" if self.two else ""
        with gr.Blocks(title="Chat", analytics_enabled=False) as blocks:
            self.conversation = gr.State(Conversation())
            gr.HTML(f'{STYLE}<div id="names">{html.escape(names)}{how}</div>')
            self.talk = gr.HTML("", elem_id="talk", max_height=360 if self.two else 560, autoscroll=True)
            self.replies = gr.HTML("", elem_id="replies", visible=self.two)
            with gr.Row(visible=False) as self.choice:
                buttons = [gr.Button(label, min_width=140) for label in ("A is better", "B is better", "Tie", "Skip")]
            self.status = gr.HTML("", elem_id="status")
            self.box = gr.Textbox(placeholder="Write a message", label="Message", container=False, autofocus=True)
            with gr.Row():
                send = gr.Button("Send", variant="primary", scale=3, min_width=90)
                new = gr.Button("Start over", scale=1, min_width=120)
            self._wire(buttons, send, new)
        return blocks

    def _wire(self, buttons: list[gr.Button], send: gr.Button, new: gr.Button) -> None:
        parts = [self.box, self.talk, self.replies, self.choice, self.status, self.conversation]
        # one queue for all: a vote can't overtake its reply, and a double click is one vote
        same: dict[str, Any] = {"outputs": parts, "show_progress": "hidden", "concurrency_id": "chat"}
        gr.on([self.box.submit, send.click], self.send, [self.box, self.conversation], **same)
        for button, place in zip(buttons, (0, 1, None), strict=False):
            button.click(functools.partial(self.vote, place), [self.conversation], **same)
        buttons[3].click(self.skip, [self.conversation], **same)
        new.click(self.start_over, [], **same)


# gr.Chatbot interprets HTML in messages, also with render_markdown=False: it drops <script> and loads <img>
def bubbles(messages: Messages) -> str:
    """A conversation as HTML; messages are escaped, so that they stay text."""
    lines = [
        f'<div class="message {html.escape(message["role"])}"><div class="text">{html.escape(message["content"])}'
        "</div></div>"
        for message in messages
    ]
    return f'<div class="messages">{"".join(lines)}</div>'


def pair(replies: list[str], names: list[str] | None = None, better: int | None = None) -> str:
    """Replies A and B as HTML, escaped.

    Args:
        names: of the models, once they may be known.
        better: the place of the chosen reply.
    """
    cards = []
    for place, reply in enumerate(replies):
        who = PLACES[place] + (f": {html.escape(names[place])}" if names else "")
        mark = " better" if place == better else ""
        cards.append(
            f'<div class="reply{mark}"><div class="who">{who}</div><div class="text">{html.escape(reply)}</div></div>'
        )
    return f'<div class="pair">{"".join(cards)}</div>'


def hide() -> object:
    """The update that hides a component."""
    return gr.update(visible=False)


def chat_on_page(chat: Chat, server_name: str, server_port: int) -> None:
    """Serve the page until Ctrl-C."""
    blocks = ChatPage(chat).blocks()
    print(f"Chat at {serve(blocks, server_name, server_port)} (Ctrl-C stops)", flush=True)
    if chat.votes:
        print(f"Votes: {chat.votes.file.path}", flush=True)
    wait(lambda: False)
    blocks.close(verbose=False)
    if chat.votes:
        chat.votes.write_pairs()
