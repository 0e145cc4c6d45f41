"""JSON files that are complete or not there, and digests of files."""

import hashlib
import json
from pathlib import Path
from typing import Any


def digest(path: str) -> str:
    """Short SHA-256 of a file; of a folder's weights and data files, or else its tokenizer, or else all in it but
    hidden files and cards; of anything else the name.
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


def write_jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    """Write rows as JSON lines, beside the target first, so that the file is complete or not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    working = path.with_name(path.name + ".partial")
    with open(working, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    working.replace(path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, beside the target first, so that the file is complete or not there. Numbers of NumPy are floats."""
    working = path.with_name(path.name + ".partial")
    working.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=float) + "\n", encoding="utf-8")
    working.replace(path)


def read_json(path: Path) -> Any:
    """Content of a JSON file, or None if there is none."""
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_jsonl(file: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").split("\n") if line]
