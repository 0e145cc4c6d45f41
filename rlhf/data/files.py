"""Files of rows → a Dataset with exactly what they say.

`datasets` guesses types: it makes dates of texts like "2024-01-01", nothing of the word "NA" in a CSV, 1 of "001", and
gives every tool the arguments of all others. Here text stays text, and a list or mapping stays as it is (a `Json`
column). In a CSV, columns other than those of text become numbers if every cell is written as one.

A file's rows are counted from 0, as `datasets` does; the header and blank lines don't count.
"""

import csv
import json
import re
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Json, Value

from rlhf.errors import InputError

TEXT_COLUMNS = {"text", "messages", "prompt", "completion", "chosen", "rejected"}
CSV_TYPES = {
    "int64": re.compile(r"-?(0|[1-9][0-9]{0,17})"),
    # no more digits than a float keeps: longer numbers, such as ids, stay text
    "float64": re.compile(r"-?(0|[1-9][0-9]{0,14})(\.[0-9]+)?([eE][+-]?[0-9]+)?"),
    "bool": re.compile(r"True|False"),
}

LONG_NUMBER = re.compile(r"[0-9]{19}")

READ_AS: dict[str, Callable[[str], Any]] = {"int64": int, "float64": float, "bool": "True".__eq__}


def read_rows(file: Path, name: str) -> Dataset:
    """The rows of a .jsonl, .json or .csv file.

    Args:
        name: how the user named the dataset; the error begins with it.

    Raises:
        InputError: for a file that isn't UTF-8, a line or row that can't be read, or one without rows.
    """
    where = f"--dataset_name {name}" + ("" if str(file) == str(Path(name).expanduser()) else f": {file.name}")
    try:
        features = _csv_features(file, where) if file.suffix == ".csv" else _json_features(file, where)
    except UnicodeDecodeError as error:
        raise InputError(
            f"{where}: isn't UTF-8 (byte {error.object[error.start]:#04x}: {error.reason}). Save it as UTF-8, for "
            f"example with iconv -f latin1 -t utf-8."
        ) from error
    state = file.stat()  # so that a changed file is read again
    return Dataset.from_generator(
        _encoded,
        features=features,
        gen_kwargs={"file": str(file.resolve()), "where": where, "state": (state.st_size, state.st_mtime_ns)},
        split="train",
    )


def _encoded(file: str, where: str, state: tuple[int, int]) -> Iterator[dict[str, Any]]:
    """Rows as `from_generator` takes them: in a `Json` column as JSON, else a text in it would be taken for JSON."""
    path = Path(file)
    if path.suffix == ".csv":
        features, rows = _csv_features(path, where), _csv_rows(path, where)
    else:
        features, rows = _json_features(path, where), _json_rows(path, where)
    for row in rows:
        encoded = {}
        for column, feature in features.items():
            value = row.get(column)
            if isinstance(feature, Json) and value is not None:
                value = json.dumps(value, ensure_ascii=False)
            elif path.suffix == ".csv" and feature.dtype != "string":
                value = READ_AS[feature.dtype](value) if value else None
            encoded[column] = value
        yield encoded


def _json_features(file: Path, where: str) -> Features:
    kinds: dict[str, set[str]] = {}
    count = 0
    for row in _json_rows(file, where):
        for column, value in row.items():
            found = kinds.setdefault(column, set())
            found.add(_kind(value))
            if column in TEXT_COLUMNS and {"string", "json"} <= found:
                one, others = ("text", "messages") if isinstance(value, str) else ("messages", "text")
                raise InputError(
                    f"{where}: column {column!r}, row {count} is {one}, those before {others}. Make all the same."
                )
        count += 1
    if not count:
        raise InputError(f"{where}: has no rows.")
    return Features({column: _feature(found - {"none"}) for column, found in kinds.items()})


def _kind(value: object) -> str:
    if value is None:
        return "none"
    if isinstance(value, str):
        return "string"
    if isinstance(value, bool):
        return "bool"
    if isinstance(value, int):
        return "int64" if -(2**63) <= value < 2**63 else "json"
    return "float64" if isinstance(value, float) else "json"


def _feature(kinds: set[str]) -> Value | Json:
    if kinds == {"int64", "float64"}:
        return Value("float64")
    if len(kinds) > 1 or kinds == {"json"}:
        return Json()
    return Value(next(iter(kinds), "string"))


def _json_rows(file: Path, where: str) -> Iterator[dict[str, Any]]:
    """The objects of a JSON Lines file, or of a list in a JSON file."""
    with open(file, encoding="utf-8-sig") as lines:
        first = next((line for line in lines if line.strip()), "")
        lines.seek(0)
        if first.lstrip().startswith("["):
            whole = _parse(lines.read(), where)
            rows: Iterator[tuple[str, Any]] = ((f"row {number}", row) for number, row in enumerate(whole))
        else:
            rows = _parsed_lines(lines, where, file)
        for place, row in rows:
            if not isinstance(row, dict):
                raise InputError(f"{where}: {place}: an object with columns is needed; found {str(row)[:60]!r}.")
            yield row


def _parsed_lines(lines: Any, where: str, file: Path) -> Iterator[tuple[str, Any]]:
    number, only = 0, None
    for line_number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = _parse(line, f"{where}: line {line_number} (row {number})")
        except InputError:
            if number == 0 and line.strip() == "{":  # an object over several lines
                raise InputError(_one_object(where)) from None
            raise
        if number == 0:
            only = row
        else:
            if number == 1:
                yield "row 0", only
            yield f"row {number}", row
        number += 1
    if number == 1:
        if file.suffix == ".json":
            raise InputError(_one_object(where))
        yield "row 0", only


def _one_object(where: str) -> str:
    return f"{where}: holds one object instead of rows. Give a list of objects, or one object on each line (.jsonl)."


def _parse(text: str, where: str) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise InputError(f"{where}: has {twice!r} twice. Keep one.")
        return found

    try:
        value = json.loads(text, object_pairs_hook=unique)
    except json.JSONDecodeError as error:
        line = f"line {error.lineno}, " if error.lineno > 1 else ""  # `where` names the line of a .jsonl
        raise InputError(f"{where}: isn't JSON ({error.msg}: {line}column {error.colno}).") from error
    except RecursionError as error:
        raise InputError(f"{where}: isn't JSON that can be read ({error}).") from error
    if LONG_NUMBER.search(text):
        json.loads(text, parse_int=lambda digits: _need_64_bits(digits, where))
    if "\\ud" in text or "\\uD" in text:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError as error:
            raise InputError(f"{where}: has half of a surrogate pair, which is no text. Remove it.") from error
    return value


def _need_64_bits(digits: str, where: str) -> None:
    """Refuse a number that a `Json` column would give back as text, with all that is around it."""
    if not -(2**63) <= int(digits) < 2**64:
        raise InputError(f"{where}: the number {digits[:40]} has more than 64 bits. Write it as text, in quotes.")


def _csv_features(file: Path, where: str) -> Features:
    possible: dict[str, set[str]] = {}
    count = 0
    for row in _csv_rows(file, where):
        count += 1
        for column, cell in row.items():
            types = possible.setdefault(column, set() if column in TEXT_COLUMNS else set(CSV_TYPES))
            if cell:
                types -= {name for name in types if not CSV_TYPES[name].fullmatch(cell)}
    if not count:
        raise InputError(f"{where}: has no rows.")
    order = ("int64", "float64", "bool")
    return Features(
        {
            column: Value(next((name for name in order if name in types and len(types) < 3), "string"))
            for column, types in possible.items()
        }
    )


def _csv_rows(file: Path, where: str) -> Iterator[dict[str, str]]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    with open(file, encoding="utf-8-sig", newline="") as lines:
        reader, begins = csv.reader(lines, strict=True), 1
        try:
            header = next((cells for cells in reader if cells), [])
            if twice := [column for column in header if header.count(column) > 1]:
                raise InputError(f"{where}: has the column {twice[0]!r} twice. Rename one.")
            number = 0
            begins = reader.line_num + 1
            for cells in reader:
                begins = reader.line_num + 1
                if not cells:
                    continue
                if len(cells) != len(header):
                    raise InputError(
                        f"{where}: row {number} (line {reader.line_num}) has {len(cells)} cells, and the header "
                        f"{len(header)}. Put text with commas or line breaks between double quotes."
                    )
                yield dict(zip(header, cells, strict=True))
                number += 1
        except csv.Error as error:
            reason = "a quote never closes" if str(error) == "unexpected end of data" else error
            raise InputError(
                f"{where}: the row that begins in line {begins} can't be read ({reason}). Close every quote, and write "
                "a quote inside a text as two."
            ) from error
