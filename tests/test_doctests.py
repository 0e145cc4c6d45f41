"""The examples in docstrings give what they show."""

import doctest
import importlib

import pytest
from conftest import ROOT

EXAMPLES = {
    file.relative_to(ROOT): count
    for package in ("rlhf", "eval")
    for file in sorted((ROOT / package).rglob("*.py"))
    if (count := file.read_text(encoding="utf-8").count(">>> "))
}
assert EXAMPLES  # pytest skips a test without parameters


@pytest.mark.parametrize("file", EXAMPLES, ids=str)
def test_the_examples_of_a_module(file):
    module = importlib.import_module(".".join(file.with_suffix("").parts).removesuffix(".__init__"))
    failed, attempted = doctest.testmod(module)
    assert (failed, attempted) == (0, EXAMPLES[file])  # an example where doctest doesn't look is an error too
