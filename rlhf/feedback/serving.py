"""Serving a page from this machine until people are done."""

import os
import signal
import socket
import threading
from collections.abc import Callable

from rlhf.errors import InputError

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before Gradio is imported: nothing leaves the machine

import gradio as gr

THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])


def serve(blocks: gr.Blocks, server_name: str, server_port: int) -> str:
    """Start serving a page in background threads. Returns its address.

    Raises:
        InputError: if the port is in use.
    """
    try:
        _, url, _ = blocks.launch(
            server_name=server_name, server_port=server_port, prevent_thread_lock=True, quiet=True, share=False,
            theme=THEME, footer_links=[], ssr_mode=False,
        )  # fmt: skip
    except OSError as error:
        raise InputError(f"--server_port {server_port}: in use. Give another one.") from error
    return url


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
    try:
        socket.create_server(
            (server_name, server_port), family=socket.AF_INET6 if ":" in server_name else socket.AF_INET
        ).close()
    except socket.gaierror as error:
        raise InputError(f"--server_name {server_name}: no such address ({error.strerror}).") from error
    except (OSError, OverflowError) as error:
        raise InputError(f"--server_port {server_port}: in use. Give another one.") from error
