"""CONTRIBUTING.md and CHANGELOG.md name what there is."""

import re
from importlib.util import find_spec

from conftest import ROOT

CODE = ("recipes", "eval", "rlhf", "tests")


def test_contributing_names_what_there_is():
    named = set(re.findall(r"`([^`\n]+)`", (ROOT / "CONTRIBUTING.md").read_text()))
    paths = {name for name in named if re.fullmatch(rf"({'|'.join(CODE)}|benchmarks)/[\w./]+", name)}
    assert len(paths) > 10
    assert not {path for path in paths if not (ROOT / path).exists()}
    source = "\n".join(file.read_text() for folder in CODE for file in (ROOT / folder).rglob("*.py"))
    constants = {name for name in named if re.fullmatch(r"[A-Z]{2,}(_[A-Z]+)*", name)}
    functions = {name for name in named if re.fullmatch(r"[a-z]+(_[a-z]+)+", name)} - {"reward_adapter"}
    assert len(constants) > 4 and len(functions) > 8
    assert not {name for name in constants if not re.search(rf"^{name}\b.*=", source, flags=re.M)}
    assert not {name for name in functions if f"def {name}(" not in source}


def test_every_move_in_the_changelog_leads_to_a_module():
    unreleased = (ROOT / "CHANGELOG.md").read_text().split("\n## ")[1]
    targets = set()
    for old, new in re.findall(r"^\| (.*`(?:rlhf|eval)\..*) \| (.*) \|$", unreleased, flags=re.M):
        olds = re.findall(r"`([\w.]+)`", old)
        for name in re.findall(r"`((?:rlhf|eval)\.[\w.*]+)`", new):
            targets |= {name.replace("*", one.split(".")[-1]) for one in olds} if "*" in name else {name}
    assert len(targets) > 40
    assert not {name for name in targets if find_spec(name) is None}
