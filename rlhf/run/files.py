"""JSON files and digests of files. A file is written beside its target and renamed, so it is complete or absent."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

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
        sha.update(file.read_bytes())
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


def read_json(path: Path) -> Any:
    """Content of a JSON file, or None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_jsonl(file: Path) -> list[Row]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
