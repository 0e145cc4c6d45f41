"""Serving a page from this machine until people are done."""

import errno
import os
import signal
import socket
import threading
import time
from collections.abc import Callable

from rlhf.errors import InputError
from rlhf.feedback.guard import Guard

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio is imported: nothing leaves the machine

import fastapi
import gradio as gr
import uvicorn

THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


class _Server(uvicorn.Server):
    """A server in a thread of its own."""

    def start(self, listener: socket.socket) -> None:
        self.thread = threading.Thread(target=self.run, kwargs={"sockets": [listener]}, daemon=True)
        self.thread.start()
        while not self.started and self.thread.is_alive():
            time.sleep(0.01)

    def close(self) -> None:
        self.should_exit = True
        self.thread.join(5)


def serve(blocks: gr.Blocks, server_name: str, server_port: int) -> str:
    """Start serving a page in background threads, behind a Guard. Returns its address. `blocks.close` ends it.

    Raises:
        InputError: if the address is not free.
    """
    listener = _listen(server_name, server_port)
    port = listener.getsockname()[1]
    app = gr.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None), blocks, "/", server_name=server_name, server_port=port,
        theme=THEME, footer_links=[], run_history=False, ssr_mode=False, show_error=False,
    )  # fmt: skip
    inputs = {event["id"]: len(event["inputs"]) for event in blocks.config["dependencies"]}
    config = uvicorn.Config(
        Guard(app, server_name, port, inputs), log_level="critical", access_log=False, server_header=False,
        proxy_headers=False, http="h11", ws="none", timeout_graceful_shutdown=1,
    )  # fmt: skip
    # what `launch` sets and `close` reads; `launch` would leave no place for a guard before its own middleware
    blocks.app = blocks.server_app = app.routes[-1].app
    blocks.server = server = _Server(config)  # type: ignore[assignment]
    server.start(listener)
    host = "localhost" if server_name in ("0.0.0.0", "::") else server_name.strip("[]")
    return f"http://[{host}]:{port}/" if ":" in host else f"http://{host}:{port}/"


def wait(done: Callable[[], bool], seconds: float = 2.0) -> None:
    """Wait until `done()` or a SIGINT or SIGTERM; checks every `seconds`."""
    stop = threading.Event()
    before = {number: signal.signal(number, lambda *_: stop.set()) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        while not stop.wait(seconds) and not done():
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def need_free_port(server_name: str, server_port: int) -> None:
    """Refuse an address or port that is not free, before any model is loaded.

    Raises:
        InputError: naming the flag.
    """
    _listen(server_name, server_port).close()


def _listen(server_name: str, server_port: int) -> socket.socket:
    name = server_name.strip("[]")
    try:
        if not name:
            raise ValueError("it is empty")
        # asked first, because create_server hides which of the two is wrong
        family = socket.getaddrinfo(name, server_port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((name, server_port), family=family)
    except (socket.gaierror, UnicodeError, ValueError) as error:
        raise InputError(f"--server_name {server_name}: no such address ({error}). Give 127.0.0.1.") from error
    except OverflowError as error:
        raise InputError(f"--server_port {server_port}: must be from 0 to 65535.") from error
    except OSError as error:
        if error.errno == errno.EADDRNOTAVAIL:
            raise InputError(
                f"--server_name {server_name}: no address of this machine. Give 127.0.0.1, or 0.0.0.0 for all of them."
            ) from error
        why = "in use" if error.errno == errno.EADDRINUSE else error.strerror
        raise InputError(f"--server_port {server_port}: {why}. Give another one.") from error
