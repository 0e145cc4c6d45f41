"""A sample of `make families`: the checks of tests/families.py on a few model types."""

import json

import pytest
from families import check_family

from rlhf.models.losses import FUSED

OTHER_LOSS = ("recurrent_gemma", "llama4_text")  # where TRL from 1.15 on would take another loss than the model's


@pytest.mark.parametrize(
    ("name", "checks"),
    [
        ("gpt_neo", ["PPO"]),  # windows by place in the cache
        ("opt", ["PPO"]),  # dropout outside of nn.Dropout
        ("bloom", ["PPO"]),  # ALiBi
        ("mistral", ["PPO"]),  # a cache of windows
        ("mamba", ["PPO LoRA"]),  # a recurrent state alone
        ("qwen3_next", ["PPO LoRA"]),  # recurrent states and keys and values
        ("rwkv", ["PPO"]),  # reads padding; its cache is wrong for several rows
        ("git", ["PPO", "SFT"]),  # its cache counts tokens of an image: wrong behind padding; no loss without an image
        ("laguna", ["SFT LoRA"]),  # PEFT would rename its shared_experts a second time
        ("recurrent_gemma", ["PPO", "SFT"]),  # keeps its state; caps its logits by another name than TRL knows
        ("moss_transcribe_diarize", ["PPO"]),  # counts padding as positions
        ("youtu", ["SFT"]),  # transformers zeroes the pad token's embedding at each loading
        ("blt", ["PPO"]),  # transformers can't make its cache
        ("deepseek_v3", ["PPO"]),  # values narrower than queries
        ("llama4_text", ["SFT LoRA"]),  # a router that returns two things, and no loss for it
        ("granite", ["SFT"]),  # divides its logits
        ("t5 (encoder-decoder)", ["PPO LoRA", "reward LoRA"]),
        ("bart (encoder-decoder)", ["PPO"]),
        ("deberta-v2 (encoder)", ["reward"]),
        ("xlnet", ["reward LoRA"]),  # reads its score at the last token, and names a context of -1
        ("canine (encoder)", ["reward LoRA"]),  # pools neighbouring tokens, padding too
    ],
)
def test_a_family_is_exact(name, checks, tmp_path):
    check_family(name, checks, tmp_path / "outcomes.json")
    outcomes = json.loads((tmp_path / "outcomes.json").read_text())
    found = {what: text.split(",")[0] for what, text in outcomes.items()}
    expected = dict.fromkeys(checks, "exact")
    if FUSED and name in OTHER_LOSS:
        refused = "refused: --model_name_or_path: from 1.15 on"
        expected |= {what: refused for what in checks if what.startswith("SFT")}
    assert found == expected
