"""Wrong commands, as people type them: each ends in one line with the right words and exit code 2.

    make mistakes                  all of them, and docs/mistakes.md with the counts
    make mistakes ONLY=yaml        those whose group or name has this text

Of each case: the wrong command, run in a folder of its own, says one line on standard error, with the words that name
the flag, file or row; it ends with exit code 2, without a traceback. Then the corrected command runs in the same folder
(`finish` of mistake_table.Mistake: to its end; else as far as its flags are read). Cases in which no file has to be
read are started in a process of their own, as a user's are, and must answer within 2 s of processor time. The others
are forked from a server that has imported the libraries.
"""

import argparse
import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from mistake_inputs import make_inputs
from mistake_table import BASES, MISTAKES, Mistake
from recipe_process import run_recipe, start

from rlhf.data.paths import check_paths
from rlhf.errors import InputError
from rlhf.run.arguments import read_command_line

ROOT = Path(__file__).resolve().parents[1]
TABLE = ROOT / "docs" / "mistakes.md"
ENVIRONMENT = {
    **os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT), "HF_HUB_DISABLE_PROGRESS_BARS": "1", "NETRC": os.devnull, "WANDB_API_KEY": "",
}  # fmt: skip
SECONDS = 2.0  # of a processor, where no file has to be read


class Answer(NamedTuple):
    """What a command did."""

    code: int
    said: str  # on standard error
    seconds: float | None  # of a processor, if it was measured


class Result(NamedTuple):
    """What became of a case; no word stands for right."""

    mistake: Mistake
    wrong: str
    corrected: str
    said: str
    seconds: float | None


def words_of(mistake: Mistake, more: str) -> list[str]:
    """The words of a command: its base's flags, of which `more` replaces or adds some; `--flag -` drops one."""
    flags: dict[str, list[str]] = {}
    for text in (BASES[mistake.command], mistake.base, more):
        here: dict[str, list[str]] = {}
        name = ""
        for word in shlex.split(text):
            if word.startswith("--"):
                name = word.split("=")[0]
                here.setdefault(name, []).append(word)
            else:
                here.setdefault(name, []).append(word)
        flags |= here
    return [word for words in flags.values() if words[1:] != ["-"] for word in words]


def run_command(mistake: Mistake, more: str, folder: Path, fresh: bool) -> Answer:
    """Run a command to its end, in a process of its own or forked from the server."""
    words = [str(ROOT / mistake.command), *words_of(mistake, more)]
    if not fresh:
        result = run_recipe(start(ENVIRONMENT), words, ENVIRONMENT, folder)
        return Answer(result.returncode, result.stderr, None)
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            [sys.executable, *words], cwd=folder, env=ENVIRONMENT, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=errors,
        )  # fmt: skip
        _, status, used = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        errors.seek(0)
        return Answer(process.returncode, errors.read(), used.ru_utime + used.ru_stime)


def what_is_wrong(mistake: Mistake, answer: Answer) -> str:
    """Why an answer to a mistake isn't right; empty if it is."""
    lines = [line for line in answer.said.splitlines() if line.startswith("error: ")]
    if "Traceback (most recent call last)" in answer.said:
        return "traceback"
    if answer.code == 0:
        return "accepted"
    if answer.code != 2:
        return f"exit code {answer.code}"
    if len(lines) != 1:
        return f"{len(lines)} lines"
    if missing := [word for word in mistake.says if word not in lines[0]]:
        return f"line without {missing}"
    if answer.seconds is not None and answer.seconds > SECONDS:
        return f"{answer.seconds:.1f} s"
    return ""


def finish(mistake: Mistake, folder: Path) -> str:
    """Run the corrected command to its end, in the same folder. Why it fails; empty if it succeeds."""
    answer = run_command(mistake, mistake.right, folder, fresh=False)
    return "" if answer.code == 0 else f"corrected: exit code {answer.code}: {last_line(answer.said)}"


def reread(mistake: Mistake, folder: Path) -> str:
    """Read the flags of the corrected command. Why they are refused; empty if they aren't."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        parsed = read_command_line(str(ROOT / mistake.command), words_of(mistake, mistake.right))
        check_paths({flag: value for part in parsed for flag, value in vars(part).items()}, {})
    except InputError as error:
        return f"corrected: {error}"
    finally:
        os.chdir(before)
    return ""


def write(folder: Path, name: str, content: object) -> None:
    """Make a file or folder of a case: text, bytes, or a function that is given the path."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if callable(content):
        content(path)
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        path.write_text(str(content), encoding="utf-8")


def last_line(text: str) -> str:
    return next((line[:300] for line in reversed(text.splitlines()) if line.strip()), "")


def try_mistake(mistake: Mistake, root: Path, made: Path) -> tuple[Result, Path]:
    """Run a wrong command, and the corrected one if that is to finish. Also the folder that both ran in."""
    folder = Path(tempfile.mkdtemp(dir=root))
    (folder / "made").symlink_to(made)
    (folder / "recipes").symlink_to(ROOT / "recipes")  # whose configurations are the defaults
    for name, content in mistake.files.items():
        write(folder, name, content)
    answer = run_command(mistake, mistake.wrong, folder, fresh=mistake.early)
    wrong, corrected = what_is_wrong(mistake, answer), ""
    if not wrong:
        for name, content in mistake.mend.items():
            write(folder, name, content)
        corrected = finish(mistake, folder) if mistake.finish else ""
    return Result(mistake, wrong, corrected, last_line(answer.said), answer.seconds), folder


def try_all(mistakes: list[Mistake], root: Path, made: Path, workers: int) -> list[Result]:
    """Run all of them, and the corrections of those that answered right."""
    results = []
    with ThreadPoolExecutor(workers) as pool:
        tried = pool.map(lambda mistake: try_mistake(mistake, root, made), mistakes)
        for number, (result, folder) in enumerate(tried, 1):
            if not result.wrong and not result.mistake.finish:
                result = result._replace(corrected=reread(result.mistake, folder))
            if result.wrong or result.corrected:
                print(f"{number:4} {result.mistake.group}: {result.mistake.name}: {result.wrong or result.corrected}\n"
                      f"       {result.said}", flush=True)  # fmt: skip
            results.append(result)
    return results


def table_of(results: list[Result]) -> str:
    """The counts as a table in Markdown."""
    lines = ["| kind | commands | one right line | corrected command runs | traceback | accepted | other |",
             "| - | - | - | - | - | - | - |"]  # fmt: skip
    groups: dict[str, list[Result]] = {"all": results}
    for result in results:
        groups.setdefault(result.mistake.group, []).append(result)
    for group in [*sorted(set(groups) - {"all"}), "all"]:
        wrong = Counter(result.wrong for result in groups[group])
        right = wrong.pop("", 0)
        fixed = sum(not result.wrong and not result.corrected for result in groups[group])
        known = wrong["traceback"], wrong["accepted"]
        cells = (group, len(groups[group]), right, fixed, *known, wrong.total() - sum(known))
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--only", default="", help="text in the group or name of a case")
    parser.add_argument("--inputs", type=Path, help="where models and data stand from an earlier call, or are to stay")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    chosen = [case for case in MISTAKES if arguments.only in f"{case.group}: {case.name}"]
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        made = (arguments.inputs or Path(folder)).absolute() / "made"
        if not made.exists():
            make_inputs(made)
        results = try_all(chosen, Path(folder), made, arguments.workers)
    table = table_of(results)
    measured = [result.seconds for result in results if result.seconds is not None]
    print(f"\n{table}\n\n{time.monotonic() - began:.0f} s.")
    if measured:
        print(f"{len(measured)} commands without a file to read: at most {max(measured):.2f} s of processor time.")
    if not arguments.only:
        TABLE.write_text(
            "# Wrong commands\n\n`make mistakes` runs each of tests/mistake_table.py and then the corrected command in "
            f"the same folder.\n\n{table}\n\nCommands for which no file has to be read: {len(measured)}, at most "
            f"{max(measured):.1f} s of processor time.\n"
        )
    sys.exit(any(result.wrong or result.corrected for result in results))


if __name__ == "__main__":
    main()
