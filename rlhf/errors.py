"""One clear line for input that cannot work.

Recipes wrap `main` in `report_errors`. An `InputError` raised anywhere then ends the process with that line on standard
error and exit code 2, the code that argparse uses for a bad command line. So does a full disk. SIGTERM and Ctrl-C end
it with one line too, after what cleans up behind itself has run.
"""

import errno
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

PARENT_PIPE = "RLHF_RECIPES_PARENT_PIPE"  # of a stage of another recipe: the pipe that is closed when that ends
CONTINUE = "Run the same command again to continue."


class InputError(ValueError):
    """The user's input cannot work. The message names the flag or column, what was found and what to do."""

    of_one_process = False  # True: other processes may not meet it, so the one that does prints it


class _Terminated(SystemExit):
    """SIGTERM came. Its line is said at the end: until then a stage may still draw its progress bar."""


_at_failure: list[Callable[[], None]] = []
_may_say: Callable[[], bool] = lambda: True  # noqa: E731


def say_if(allowed: Callable[[], bool]) -> None:
    """Ask this before an error is said: of runs beside each other, which fill the same disk, one says it."""
    global _may_say
    _may_say = allowed


def at_failure(action: Callable[[], None]) -> None:
    """Have `report_errors` do this before the process ends with an exception."""
    _at_failure.append(action)


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn an `InputError` and a full disk into one line on standard error and exit code 2.

    Ctrl-C and SIGTERM end in one line as well, with the exit codes 130 and 143. Other exceptions pass through.
    """
    hook, before = sys.unraisablehook, _raise_at_signals()
    try:
        with _undone_at_failure():
            yield
    except InputError as error:
        _say(f"error: {error}", every_process=error.of_one_process)
        sys.exit(2)
    except _Terminated:
        _say_once(f"Ended by SIGTERM. {CONTINUE}")
        raise
    except KeyboardInterrupt:
        _say_once(f"Interrupted. {CONTINUE}")
        sys.exit(128 + signal.SIGINT)
    except Exception as error:
        place = full_disk(error)
        if place is None:
            raise
        _say(f"error: the disk is full{place}. Free some space. {CONTINUE}")
        sys.exit(2)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        sys.unraisablehook = hook


def _say(line: str, every_process: bool = False) -> None:
    if (every_process or int(os.environ.get("RANK", "0")) == 0) and _may_say():
        _end_progress_bars()
        print(" ".join(line.split()), file=sys.stderr)


def _say_once(line: str) -> None:
    """What a recipe and its stage would both say, the recipe says."""
    if PARENT_PIPE not in os.environ:
        _say(line)


def end_at_signals() -> None:
    """Have Ctrl-C and SIGTERM end the process at once, in their line, until `report_errors` takes over.

    That is for the imports of a command: they take seconds and leave nothing to clean up. An exception would be printed
    with a traceback, or caught by one of them.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, _end_at_once)
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # a shell may have it ignored
            signal.signal(signal.SIGINT, _end_at_once)


def _end_at_once(number: int, _frame: object) -> NoReturn:
    _say_once(f"{'Interrupted.' if number == signal.SIGINT else 'Ended by SIGTERM.'} {CONTINUE}")
    os._exit(128 + number)


def _raise_at_signals() -> dict[int, Any]:
    """Have SIGTERM raise SystemExit and Ctrl-C KeyboardInterrupt, so that files half written are removed.

    Returns:
        the handlers that were there before.
    """

    def end(_number: int, _frame: object) -> NoReturn:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # a second one ends the process at once
        raise _Terminated(128 + signal.SIGTERM)

    if threading.current_thread() is not threading.main_thread():
        return {}
    hook = sys.unraisablehook

    def again(swallowed: Any) -> None:  # Python passes over what is raised in __del__
        number = {_Terminated: signal.SIGTERM, KeyboardInterrupt: signal.SIGINT}.get(swallowed.exc_type)
        if number is None:
            return hook(swallowed)
        signal.signal(signal.SIGTERM, end)
        threading.Timer(0.1, os.kill, (os.getpid(), number)).start()

    sys.unraisablehook = again
    before: dict[int, Any] = {signal.SIGTERM: signal.signal(signal.SIGTERM, end)}
    if signal.getsignal(signal.SIGINT) is _end_at_once:
        before[signal.SIGINT] = signal.signal(signal.SIGINT, signal.default_int_handler)
    return before


def full_disk(error: BaseException) -> str | None:
    """Where the disk is full, as ` (path)`; empty if the error doesn't say; None if it is another error.

    torch and safetensors write with code of their own, and say it in the text of other exceptions.
    """
    texts = ("No space left on device", "Disk quota exceeded", "File too large", "PytorchStreamWriter failed writing",
             "inline_container.cc")  # fmt: skip
    cause: BaseException | None = error
    while cause is not None:
        full = isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        if full or any(text in str(cause) for text in texts):
            return f" ({cause.filename})" if isinstance(cause, OSError) and cause.filename else ""
        cause = cause.__cause__ or cause.__context__
    return None


def _end_progress_bars() -> None:
    """End the line of an open progress bar, so that the error gets a line of its own."""
    tqdm = getattr(sys.modules.get("tqdm.std"), "tqdm", None)
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()


@contextmanager
def _undone_at_failure() -> Iterator[None]:
    try:
        yield
    except BaseException:
        while _at_failure:
            _at_failure.pop()()
        raise
