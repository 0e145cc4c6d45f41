"""JSON files and digests of files. A file is written beside its target and renamed, so it is complete or absent."""

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import UnionType
from typing import Any

from rlhf.errors import InputError

Row = dict[str, Any]  # of a file of JSON lines


def digest(path: str) -> str:
    """Short SHA-256 of a file or folder. A name that is neither is its own digest.

    Of a folder it covers the weights and data files; without those the tokenizer; without that all files but hidden
    ones and cards.
    """
    target = Path(path)
    if not target.exists():
        return path
    files = [target]
    if target.is_dir():
        kinds = ("*.safetensors", "*.jsonl", "*.csv", "*.parquet", "**/*.arrow")
        files = sorted(file for kind in kinds for file in target.glob(kind)) or sorted(target.glob("tokenizer.json"))
        files = files or [file for file in sorted(target.rglob("*")) if file.is_file() and file.suffix != ".md"
                          and not any(part.startswith(".") for part in file.relative_to(target).parts)]  # fmt: skip
    sha = hashlib.sha256()
    for file in files:
        with open(file, "rb") as content:
            while part := content.read(1 << 20):  # weights may be larger than the memory
                sha.update(part)
    return sha.hexdigest()[:12]


def write_jsonl(path: Path, rows: Iterable[Mapping[str, object]]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    working = path.with_name(path.name + ".partial")
    with open(working, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    working.replace(path)


def write_json(path: Path, content: object) -> None:
    """Write JSON. NumPy's numbers become floats."""
    working = path.with_name(path.name + ".partial")
    working.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=float) + "\n", encoding="utf-8")
    working.replace(path)


def read_json(path: Path, **needed: type | UnionType) -> Any:
    """Content of a JSON file that holds an object, or None if there is no file.

    Args:
        needed: keys that the object must have, and the type of each one's value.

    Raises:
        InputError: naming the file, if it is unreadable or holds something else.
    """
    if not path.exists():
        return None
    return _parse_object(_read_text(path), str(path), needed)


def read_jsonl(file: Path, **needed: type | UnionType) -> list[Row]:
    """The rows of a file of JSON lines.

    Args:
        needed: keys that every row must have, and the type of each one's value.

    Raises:
        InputError: naming the file and the line, if the file is missing or unreadable or a line holds something else.
    """
    lines = enumerate(_read_text(file).split("\n"), 1)
    return [_parse_object(line, f"{file}, line {number}", needed) for number, line in lines if line.strip()]


@contextmanager
def content_of(file: Path) -> Iterator[None]:
    """Say in one line that a file lacks what is read from it here.

    Raises:
        InputError: naming the file.
    """
    try:
        yield
    except InputError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        what = f"lacks {error}" if isinstance(error, LookupError) else str(error)
        raise InputError(f"{file}: not as this project writes it ({what}). Restore it, or run again.") from error


def _read_text(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise InputError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start}). Restore it.") from error
    except OSError as error:
        raise InputError(f"{file}: can't be read ({error.strerror}).") from error


def _parse_object(text: str, where: str, needed: Mapping[str, type | UnionType]) -> Any:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}). Restore it, or run again.") from error
    if not isinstance(content, dict):
        raise InputError(f"{where}: holds a {type(content).__name__}, not an object. Restore it, or run again.")
    for key, kind in needed.items():
        if not isinstance(content.get(key), kind):
            found = type(content[key]).__name__ if key in content else "no such key"
            name = getattr(kind, "__name__", kind)
            raise InputError(f"{where}: needs {key!r} of type {name}; found {found}. Restore it, or run again.")
    return content
