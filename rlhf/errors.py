"""One clear line for input that cannot work.

Recipes wrap `main` in `report_errors`. An `InputError` raised anywhere then ends the process with that line on standard
error and exit code 2, the code that argparse uses for a bad command line.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class InputError(ValueError):
    """The user's input cannot work. The message names the flag or column, what was found and what to do."""

    of_one_process = False  # True: other processes may not meet it, so the one that does prints it


_at_failure: list[Callable[[], None]] = []


def at_failure(action: Callable[[], None]) -> None:
    """Have `report_errors` do this before the process ends with an exception."""
    _at_failure.append(action)


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn an `InputError` into one line on standard error and exit code 2. Other exceptions pass through."""
    try:
        with _undone_at_failure():
            yield
    except InputError as error:
        if error.of_one_process or int(os.environ.get("RANK", "0")) == 0:
            _end_progress_bars()
            print("error: " + " ".join(str(error).split()), file=sys.stderr)
        sys.exit(2)


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
