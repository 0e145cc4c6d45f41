"""Reward training: what `recipes/reward.py` minimizes, beside numbers by hand and plain transformers."""

import math

import pytest
import torch
from conftest import LORA, TINY_TRAINING, assistant, run, user
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer
from transformers.modeling_outputs import SequenceClassifierOutput
from trl import RewardConfig, RewardTrainer

from rlhf.data.pairs import PreferenceCollator
from rlhf.data.rows import preference_rows
from rlhf.models.loading import load_reward_model
from rlhf.models.sources import resolve
from rlhf.run.files import read_json, write_jsonl
from rlhf.run.trainers import whole_checkpoints

PAIRS = [
    {"prompt": user(question), "chosen": assistant("Great"), "rejected": assistant("Awful"), "margin": margin}
    for question, margin in (("hi", 0.5), ("hello", 0.0), ("you?", 0.25), ("well", 1.0))
]


@pytest.mark.parametrize(
    ("coefficient", "expected"),
    [
        # margins 0.5 and 0, so that the logistic loss is of 1.5 - 0.5 = 1 and 3; (2 + 0.5)² = 6.25 and (1 - 2)² = 1
        (None, (math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))) / 2),
        (0.01, (math.log1p(math.exp(-1)) + math.log1p(math.exp(-3))) / 2 + 0.01 * (6.25 + 1) / 2),
    ],
)
def test_centering_adds_the_squared_sum_of_a_pairs_scores(tiny, tokenizer, tmp_path, coefficient, expected):
    rows = preference_rows(Dataset.from_list(PAIRS[:2]), "d", tokenizer, None)
    args = RewardConfig(
        str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True, remove_unused_columns=False,
        center_rewards_coefficient=coefficient,
    )  # fmt: skip
    collator = PreferenceCollator(tokenizer.pad_token_id)
    trainer = whole_checkpoints(RewardTrainer)(
        load_reward_model(resolve(tiny), LORA, tokenizer), args=args, train_dataset=rows, eval_dataset=rows,
        processing_class=tokenizer, data_collator=collator,
    )  # fmt: skip

    def scores(**inputs):  # of the two chosen replies, then of the rejected
        return SequenceClassifierOutput(logits=torch.tensor([[2.0], [1.0], [0.5], [-2.0]]))

    assert float(trainer.compute_loss(scores, collator(list(rows)))) == pytest.approx(expected, abs=1e-6)


def test_the_recipes_flag_centers_the_scores(tiny, tmp_path):
    write_jsonl(tmp_path / "train.jsonl", PAIRS * 2)
    write_jsonl(tmp_path / "test.jsonl", PAIRS)
    run("recipes/reward.py", "--model_name_or_path", tiny, "--dataset_name", tmp_path, "--output_dir", tmp_path / "r",
        "--center_rewards_coefficient", 0.5, "--learning_rate", 0.1, *TINY_TRAINING)  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "r")
    base = AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1, pad_token_id=tokenizer.pad_token_id)
    model = PeftModel.from_pretrained(base, tmp_path / "r").eval()

    def score(reply, pair):
        ids = tokenizer.apply_chat_template([*pair["prompt"], *pair[reply]], return_tensors="pt", return_dict=True)
        return float(model(**ids).logits)

    both = [(score("chosen", pair), score("rejected", pair), pair["margin"]) for pair in PAIRS]
    losses = [math.log1p(math.exp(rejected + margin - chosen)) for chosen, rejected, margin in both]
    penalty = sum(0.5 * (chosen + rejected) ** 2 for chosen, rejected, _ in both) / 4
    log = read_json(tmp_path / "r" / "trainer_state.json")["log_history"]
    found = [entry["eval_loss"] for entry in log if "eval_loss" in entry]
    assert penalty > 0.01 and found[-1] == pytest.approx(sum(losses) / 4 + penalty, abs=1e-4)
