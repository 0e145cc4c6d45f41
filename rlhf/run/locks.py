"""One process at a time in a run folder.

The lock is the operating system's (flock) on the file `.lock` of the folder. It ends with the process that holds it,
however that ends. Where there is no flock (Windows, some network disks) nothing is locked.
"""

import os
from pathlib import Path

from rlhf.errors import InputError

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LOCK_FILE = ".lock"
_held: dict[Path, int] = {}  # descriptors by folder


def hold_folder(folder: Path) -> None:
    """Keep other processes out of a folder until this one ends.

    Raises:
        InputError: if another process holds the folder.
    """
    given, folder = folder, folder.resolve()
    if fcntl is None or folder in _held:
        return
    descriptor = os.open(folder / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.read(descriptor, 20).decode(errors="replace").strip()
        os.close(descriptor)
        if holder == str(os.getpid()):  # by another path
            return
        raise InputError(
            f"--output_dir {given}: in use by process {holder or 'of another command'}. Wait until it ends, or "
            "give another --output_dir."
        ) from None
    except OSError:  # a disk without locks
        os.close(descriptor)
        return
    os.ftruncate(descriptor, 0)
    os.write(descriptor, str(os.getpid()).encode())
    _held[folder] = descriptor


def _forget() -> None:
    """In a forked child: the lock is its parent's, and must end with that."""
    while _held:
        os.close(_held.popitem()[1])


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_forget)
