"""A server on 127.0.0.1 that speaks OpenAI's chat completions, as `vllm serve` does, and answers by a rule."""

import json
import threading
from collections.abc import Callable
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class ChatServer(ThreadingHTTPServer):
    """Answers a question with what `rule` makes of it: a text, and log-probabilities of its first token or None."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, rule: Callable[[str], tuple[str | None, dict[str, float] | None]]) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.rule = rule
        self.models: list[dict[str, Any]] = [{"id": "small", "parent": None}, {"id": "small-lora", "parent": "small"}]
        self.key: str | None = None  # that it asks for
        self.unknown: dict[str, str] = {}  # fields that it refuses, and in what words
        self.failures: list[tuple[int, str]] = []  # status and body of the next answers
        self.failure: tuple[int, str] | None = None  # of all answers
        self.together: threading.Barrier | None = None  # of so many questions that are answered at the same time
        self.lock = threading.Lock()
        self.under_way = self.most_under_way = 0
        self.bodies: list[dict[str, Any]] = []
        self.keys: list[str | None] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"

    def questions(self) -> list[str]:
        """What it was asked, but for the first question."""
        return [body["messages"][0]["content"] for body in self.bodies if "Hello, how are you?" not in str(body)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: ChatServer

    def log_message(self, *_):
        pass

    def do_GET(self):
        if self.path != "/v1/models":
            return self.answer(404, {"detail": "Not Found"})
        if self.refuses_key():
            return self.answer(401, {"error": {"message": f"Incorrect API key provided: {self.key_given()}"}})
        self.answer(200, {"data": self.server.models})

    def do_POST(self):
        server = self.server
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with server.lock:
            server.bodies.append(body)
            server.keys.append(self.key_given())
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
            failure = server.failures.pop(0) if server.failures else server.failure
        if server.together is not None:
            server.together.wait(120)
        with server.lock:
            server.under_way -= 1
        if self.path != "/v1/chat/completions":
            return self.answer(404, {"detail": "Not Found"})
        if self.refuses_key():
            return self.answer(401, {"error": {"message": f"Incorrect API key provided: {self.key_given()}"}})
        if failure is not None:
            return self.answer(*failure)
        if body["model"] not in [model["id"] for model in server.models]:
            return self.answer(404, {"error": {"message": f"The model `{body['model']}` does not exist."}})
        for field, words in server.unknown.items():
            if field in body:
                return self.answer(400, {"error": {"message": words}})
        text, logprobs = server.rule(body["messages"][0]["content"])
        choice: dict[str, Any] = {
            "message": {"role": "assistant", "content": text},
            "finish_reason": "stop",
            "logprobs": None,
        }
        if logprobs is not None and body.get("logprobs"):
            tops = [{"token": token, "logprob": value} for token, value in logprobs.items()][: body["top_logprobs"]]
            choice["logprobs"] = {"content": [{"token": text, "logprob": 0.0, "top_logprobs": tops}]}
        self.answer(200, {"choices": [choice]})

    def key_given(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def refuses_key(self):
        return self.server.key is not None and self.key_given() != self.server.key

    def answer(self, status, content):
        data = content.encode() if isinstance(content, str) else json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        with suppress(ConnectionError):  # who asked may be gone
            self.wfile.write(data)


@contextmanager
def chat_server(rule):
    """A running server."""
    server = ChatServer(rule)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
