"""A judge on a server with OpenAI's chat completions: `vllm serve`, llama.cpp's `llama-server`, a hosted model.

Where the server gives log-probabilities, the judge is read by them, as one in this process is (rlhf/rewards/
local_judge.py). Otherwise its text is parsed; a text that is no answer counts as none.
https://platform.openai.com/docs/api-reference/chat/create
"""

import asyncio
import json
import math
import os
import re
import threading
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from functools import partial
from typing import Any
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from rlhf.errors import InputError
from rlhf.rewards.answers import RewardError
from rlhf.rewards.event_loop import run_together
from rlhf.rewards.rubrics import LEAST_ANSWERED, RATINGS, rating_question

KEY = "OPENAI_API_KEY"
REQUESTS = 16  # that are under way at once, of each process
TIMEOUTS = (10.0, 600.0)  # seconds to connect, and for one answer
BACKOFF, TRIES = 0.5, 5  # waits 0, 1, 2, 4 and 8 s before another try, or as long as the server says
READS = 1  # more tries after an answer that didn't come in time: each may last TIMEOUTS[1]
BUSY = (408, 429, 500, 502, 503, 504)
ADVICE = {
    401: f"Set the environment variable {KEY} to a key of this server.",
    403: f"Set the environment variable {KEY} to a key of this server that may use the model.",
    404: "Does --judge_base_url end in /v1, and is --judge_model_name_or_path one of the server's models?",
    429: "It still refuses after waiting. Try later; the same command continues the run.",
}
AT_ONCE = 16  # a judge that may write no more than that answers at once: its answer is begun for it
BEGUN = {"add_generation_prompt": False, "continue_final_message": True}  # vLLM's; llama.cpp does so without
# what not every model takes: a word in the refusal, the field, and the one in its place
OPTIONAL = (
    ("max_completion_tokens", "max_tokens", "max_completion_tokens"), ("logprobs", "top_logprobs", None),
    ("logprobs", "logprobs", None), ("temperature", "temperature", None),
)  # fmt: skip


class _Refusal(Exception):
    """The server answered a request with an error: its status, and the reason in its words."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(f"{status} ({reason})")
        self.status = status


class ServerJudge:
    """A judge behind an address. The first question is asked at once, so a wrong address or key is found now.

    Args:
        url: such as http://127.0.0.1:8000/v1.
        model: the server's name for it; None: its only one.
        max_new_tokens: what it may write.

    Raises:
        InputError: if the server can't be reached, refuses the key or the model, or answers something else.
    """

    def __init__(self, url: str, model: str | None, max_new_tokens: int) -> None:
        self.url, self.key = url.rstrip("/"), os.environ.get(KEY, "").strip()
        try:
            parts = urlsplit(self.url)
        except ValueError:  # half an IPv6 address
            parts = urlsplit("")
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InputError(f"--judge_base_url {url}: needs an address such as http://127.0.0.1:8000/v1.")
        if parts.username or parts.password or parts.query:
            raise InputError(f"--judge_base_url: has more than an address in it. A key belongs in {KEY}.")
        if not (self.key.isascii() and self.key.isprintable()):
            raise InputError(f"{KEY}: has a character that no key has.")
        self.last_failure = ""  # of an answer that was none
        self.session = self._session(parts.hostname, connect=0)  # a server that isn't there now is said at once
        self.name, self.begun = model or self._only_model(), max_new_tokens <= AT_ONCE
        self.body: dict[str, Any] = {
            "model": self.name, "temperature": 0, "max_tokens": max_new_tokens, "logprobs": True, "top_logprobs": 20,
        }  # fmt: skip
        self._try()
        self.session = self._session(parts.hostname, connect=TRIES)

    def answers(self, questions: list[str], options: tuple[str, ...]) -> list[list[float]]:
        """P(each of the options) as the answer to each question; zeros where it gave none of them."""
        (found,) = run_together([self.answers_later(questions, options)])
        if isinstance(found, BaseException):
            raise found
        return found

    async def answers_later(self, questions: list[str], options: tuple[str, ...]) -> list[list[float]]:
        """The same without blocking the event loop; `REQUESTS` questions at a time, and none after an error."""
        free = asyncio.Semaphore(REQUESTS)

        async def ask(question: str) -> list[float]:
            async with free:
                return await _in_thread(partial(self._answer, question, options))

        asked = [asyncio.ensure_future(ask(question)) for question in questions]
        try:
            return await asyncio.gather(*asked)
        finally:
            for question in asked:
                question.cancel()

    def _answer(self, question: str, options: tuple[str, ...]) -> list[float]:
        """Raises RewardError if the server fails. What it refuses about this question alone has no answer."""
        try:
            choice = self._ask(question)
        except _Refusal as refusal:
            if refusal.status in ADVICE or refusal.status >= 500:
                raise RewardError(self._line(refusal)) from refusal
            self.last_failure = f"it refused a question: {refusal}"
            return [0.0] * len(options)
        except InputError as error:
            raise RewardError(str(error)) from error
        shares = read_answer(choice, options)
        if sum(shares) < LEAST_ANSWERED:
            text = str(choice["message"].get("content") or "")
            cut = ", cut off at --judge_max_new_tokens" if choice.get("finish_reason") == "length" else ""
            self.last_failure = f"it wrote {text[:80]!r}{cut}"
        return shares

    def _try(self) -> None:
        """Ask a first question, and leave out of all questions what the server doesn't take."""
        question = rating_question("A good reply is friendly.", "Hello!", "Hello, how are you?")
        for _ in range(len(OPTIONAL) + 2):
            try:
                read_answer(self._ask(question), RATINGS)
                return
            except _Refusal as refusal:
                unknown = [entry for entry in OPTIONAL if entry[0] in str(refusal) and entry[1] in self.body]
                if refusal.status not in (400, 403, 422) or not (unknown or self.begun):
                    raise InputError(self._line(refusal)) from refusal
                self.begun = self.begun and bool(unknown)
                for _, name, other in unknown:
                    value = self.body.pop(name)
                    if other is not None:
                        self.body[other] = value

    def _ask(self, question: str) -> dict[str, Any]:
        """The server's choice of an answer, with `message`.

        Raises:
            _Refusal: if it answers with an error.
            InputError: if it doesn't answer, or something that is no chat completion.
        """
        body: dict[str, Any] = {**self.body, "messages": [{"role": "user", "content": without_controls(question)}]}
        if self.begun:
            body |= {"messages": [*body["messages"], {"role": "assistant", "content": "Answer:"}], **BEGUN}
        answer = self._send("POST", "/chat/completions", body)
        try:
            choice = answer["choices"][0]
            choice["message"].get("content")
            return choice
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise InputError(f"--judge_base_url {self.url}: answered no chat completion. Give the address of a server "
                             "with OpenAI's API.") from error  # fmt: skip

    def _only_model(self) -> str:
        try:
            models = self._send("GET", "/models")["data"]
            names = [model["id"] for model in models if not model.get("parent")]  # vLLM lists adapters too
        except _Refusal as refusal:
            raise InputError(self._line(refusal)) from refusal
        except (KeyError, TypeError, AttributeError) as error:
            raise InputError(f"--judge_base_url {self.url}: has no list of models. Give the name of one with "
                             "--judge_model_name_or_path.") from error  # fmt: skip
        if len(names) != 1:
            raise InputError(f"--judge_base_url {self.url}: has {len(names)} models ({', '.join(names[:5])}, ...). "
                             "Name one with --judge_model_name_or_path.")  # fmt: skip
        return names[0]

    def _send(self, method: str, path: str, body: dict[str, Any] | None = None) -> Any:
        try:
            with self.session.request(method, self.url + path, json=body, timeout=TIMEOUTS) as answer:
                status, text = answer.status_code, answer.content.decode(errors="replace")
        except requests.RequestException as error:
            raise InputError(
                f"--judge_base_url {self.url}: does not answer ({self._hidden(_cause(error))}). Start the server, or "
                "give another address. The same command continues the run."
            ) from None  # the request that it holds has the key
        if status != 200:
            raise _Refusal(status, self._hidden(_reason(text)))
        with suppress(ValueError):
            return json.loads(text)
        return text

    def _session(self, host: str, connect: int) -> requests.Session:
        retry = Retry(
            TRIES, connect=connect, read=READS, status_forcelist=BUSY, allowed_methods=None, backoff_factor=BACKOFF,
            raise_on_status=False,
        )  # fmt: skip
        session = requests.Session()
        session.trust_env = host not in ("127.0.0.1", "localhost", "::1")  # no proxy to this machine
        session.auth = self._authorize  # with one, requests doesn't look for passwords in ~/.netrc
        for scheme in ("http://", "https://"):
            session.mount(scheme, HTTPAdapter(pool_maxsize=REQUESTS, max_retries=retry))
        return session

    def _authorize(self, request: requests.PreparedRequest) -> requests.PreparedRequest:
        if self.key:
            request.headers["Authorization"] = f"Bearer {self.key}"
        return request

    def _hidden(self, text: str) -> str:
        return text.replace(self.key, f"<{KEY}>") if self.key else text

    def _line(self, refusal: _Refusal) -> str:
        advice = ADVICE.get(refusal.status) or "Its own log says more. The same command continues the run."
        return f"--judge_base_url {self.url}: answered {refusal}. {advice}"


async def _in_thread(call: Callable[[], list[float]]) -> list[float]:
    """The result of a call in a thread of its own, for which the end of the process doesn't wait.

    It would wait for an executor's threads, so that Ctrl-C took as long as the slowest answer.
    """
    found: Future[list[float]] = Future()

    def work() -> None:
        try:
            found.set_result(call())
        except BaseException as error:
            found.set_exception(error)

    found.set_running_or_notify_cancel()
    threading.Thread(target=work, name="judge", daemon=True).start()
    return await asyncio.wrap_future(found)


def read_answer(choice: dict[str, Any], options: tuple[str, ...]) -> list[float]:
    """P(each of the options) in one choice of a chat completion; zeros if it has none of them.

    >>> tokens = [{"token": " B", "logprob": math.log(0.75)}, {"token": "A", "logprob": math.log(0.25)}]
    >>> first = {"token": "B", "top_logprobs": tokens}
    >>> read_answer({"message": {"content": "B"}, "logprobs": {"content": [first]}}, ("A", "B"))
    [0.25, 0.75]
    >>> read_answer({"message": {"content": "<think>A?</think> B."}}, ("A", "B"))
    [0.0, 1.0]
    """
    shares = dict.fromkeys(options, 0.0)
    with suppress(KeyError, StopIteration, TypeError, ValueError):
        first = next(token for token in choice["logprobs"]["content"] if token["token"].strip("Ġ▁ "))
        for entry in first["top_logprobs"]:
            if (answer := entry["token"].strip("Ġ▁ ")) in shares:
                shares[answer] += math.exp(min(0.0, float(entry["logprob"])))
    if sum(shares.values()) < LEAST_ANSWERED:  # it said something before its answer, or gave no log-probabilities
        found = parse_answer(str(choice["message"].get("content") or ""), options)
        shares = {option: float(option == found) for option in options}
    return list(shares.values())


def parse_answer(text: str, options: tuple[str, ...]) -> str | None:
    """The option that stands alone in the last line, or else in the first; None if there is none.

    >>> [parse_answer(text, RATINGS) for text in ("6", "Rating: **5**/7", "4. It is kind.", "8", "5.5", "From 1 to 7?")]
    ['6', '5', None, None, None, None]
    """
    lines = text.rpartition("</think>")[2].strip().splitlines() or [""]
    words = r"(?:(?:the|my|final|rating|score|answer|reply|is)\W+)*"
    pattern = rf"\W*{words}({'|'.join(map(re.escape, options))})\W*(?:(?:/|out of)\s*{re.escape(options[-1])}\W*)?"
    for line in (lines[-1], lines[0]):
        if match := re.fullmatch(pattern, line.strip(), re.I):
            return next(option for option in options if option.lower() == match[1].lower())
    return None


def without_controls(text: str) -> str:
    """The text with a space in everything that could be a control token of the server's tokenizer.

    A server renders the text into its chat template before it makes tokens, so it would take them for its own.

    >>> without_controls("<|im_end|> </s> [INST] <start_of_turn> a < b, [1]")
    '< |im_end|> < /s> [ INST] < start_of_turn> a < b, [1]'
    """
    return re.sub(r"(<(?=[^\s<>]{1,60}>)|\[(?=/?[A-Z_]+\]))", r"\1 ", text)


def _cause(error: BaseException) -> str:
    """What lies behind an error of requests, such as 'Connection refused'."""
    while (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    return " ".join(str(getattr(error, "strerror", None) or error).split())[:200]


def _reason(text: str) -> str:
    """The sentence in an error of a server.

    >>> _reason('{"error": {"message": "No such model."}}'), _reason('{"detail": "Not Found"}'), _reason("<html>")
    ('No such model.', 'Not Found', '<html>')
    """
    with suppress(ValueError, AttributeError):
        found = json.loads(text)
        found = found.get("error") or found.get("detail") or found.get("message") or text
        text = str(found.get("message", found) if isinstance(found, dict) else found)
    return " ".join(text.split())[:200] or "without a word"
