"""One event loop, in a thread of its own, for everything async in this process.

An async function may keep a client, a lock or a connection from one call to the next. Those belong to the event loop in
which they were first used, so all calls run in the same loop. The loop's thread is not the caller's, so this also works
where an event loop runs already, as in a notebook.
"""

import asyncio
import atexit
import os
import threading
from collections.abc import Awaitable, Sequence
from typing import Any

_lock = threading.Lock()
_loop: asyncio.AbstractEventLoop | None = None


def run_together(awaitables: Sequence[Awaitable[Any]]) -> list[Any]:
    """Wait for all of them at the same time.

    Returns:
        for each, its result, or the exception that it raised, SystemExit included.
    """

    async def settle(awaitable: Awaitable[Any]) -> Any:
        try:
            return await awaitable
        except BaseException as error:
            return error

    async def gather() -> list[Any]:
        return await asyncio.gather(*(settle(awaitable) for awaitable in awaitables))

    waiting = asyncio.run_coroutine_threadsafe(gather(), _running_loop())
    try:
        return waiting.result()
    except BaseException:  # Ctrl-C in the thread that waits
        waiting.cancel()
        raise


def _running_loop() -> asyncio.AbstractEventLoop:
    """The loop of this process. The first call starts it, and it ends with the process."""
    global _loop
    with _lock:
        if _loop is None:
            _loop = asyncio.new_event_loop()
            thread = threading.Thread(target=_run, args=(_loop,), name="reward-functions", daemon=True)
            thread.start()
            atexit.register(_end, _loop, thread, os.getpid())
        return _loop


def _run(loop: asyncio.AbstractEventLoop) -> None:
    asyncio.set_event_loop(loop)
    while True:
        try:
            loop.run_forever()
            break
        except (SystemExit, KeyboardInterrupt):  # a task raised it; whoever awaits the task gets it too
            continue
    loop.run_until_complete(_cancel_all())
    loop.run_until_complete(loop.shutdown_asyncgens())
    loop.close()


async def _cancel_all() -> None:
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _end(loop: asyncio.AbstractEventLoop, thread: threading.Thread, process: int) -> None:
    if os.getpid() == process and thread.is_alive():
        loop.call_soon_threadsafe(loop.stop)
        thread.join(timeout=5)


def _forget() -> None:
    """A forked child has a copy of the loop, but no thread that runs it."""
    global _loop, _lock
    _loop, _lock = None, threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
