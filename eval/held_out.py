"""A reward model on held-out pairs, beyond what its trainer logs: intervals, calibration, accuracy by length."""

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import PreTrainedTokenizerBase
from trl import RewardTrainer

from eval.metrics import metric
from rlhf.arguments import main_process
from rlhf.data import write_json


@torch.no_grad()
def evaluate_reward_model(trainer: RewardTrainer, tokenizer: PreTrainedTokenizerBase, rows: Dataset) -> dict[str, Any]:
    """Score both replies of every held-out pair, and write evaluation.json into the run's folder.

    Every process scores all pairs, so that sharded models work too.

    Args:
        rows: `chosen_ids` and `rejected_ids`.

    Returns:
        result of the metric reward_accuracy; lengths are in tokens.
    """
    model, size = trainer.model_wrapped.eval(), trainer.args.per_device_eval_batch_size
    scores: dict[str, list[float]] = {}
    for column in ("chosen_ids", "rejected_ids"):
        ids, scores[column] = rows[column][:], []
        for start in range(0, len(ids), size):
            batch = tokenizer.pad({"input_ids": ids[start : start + size]}, padding_side="right", return_tensors="pt")
            with trainer.autocast_smart_context_manager():
                logits = model(**batch.to(trainer.args.device), use_cache=False).logits
            scores[column] += logits.squeeze(-1).float().tolist()
    result = metric(
        "reward_accuracy",
        predictions=scores["chosen_ids"],
        references=scores["rejected_ids"],
        length_differences=[len(a) - len(b) for a, b in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)],
    )
    if main_process():
        write_json(Path(trainer.args.output_dir) / "evaluation.json", result)
    return result
