"""A sample of `make families`: the checks of tests/families.py on a few model types."""

import json

import pytest
from families import check_family


@pytest.mark.parametrize(
    ("name", "checks"),
    [
        ("t5 (encoder-decoder)", ["PPO LoRA", "reward LoRA"]),
        ("bart (encoder-decoder)", ["PPO"]),
        ("deberta-v2 (encoder)", ["reward"]),
    ],
)
def test_a_family_is_exact(name, checks, tmp_path):
    check_family(name, checks, tmp_path / "outcomes.json")
    assert json.loads((tmp_path / "outcomes.json").read_text()) == dict.fromkeys(checks, "exact")
