"""Held-out results with intervals and row by row, in addition to those that the trainers log.

A reward model's accuracy by length and its calibration; a fine-tuned model's predictions.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from datasets import Dataset
from trl import RewardTrainer

from eval.metrics import metric, metric_results
from eval.stats.intervals import Interval, JsonObject, interval
from rlhf.run.files import write_json, write_jsonl
from rlhf.run.processes import main_process
from rlhf.tasks.finetuning import FinetuningTrainer
from rlhf.tasks.labelled import LABEL_COLUMNS, LabelledTask
from rlhf.tasks.labelled_rows import predict_labels


@torch.no_grad()
def evaluate_reward_model(trainer: RewardTrainer, rows: Dataset) -> JsonObject:
    """Score both replies of every held-out pair, and write evaluation.json into the run's folder.

    Every process scores all pairs, so that sharded models work too. TRL's own accuracy and margin are means of batches,
    the last of which weighs as much as a full one (of 133 pairs in batches of 32: 64.9% instead of 69.9%). The last
    evaluation in the log gets the means over pairs instead.

    Args:
        rows: `chosen_ids` and `rejected_ids`, as the trainer's collator takes them.

    Returns:
        all results of the metric reward_accuracy; lengths are in tokens.
    """
    model, size = trainer.model_wrapped, trainer.args.per_device_eval_batch_size
    model.eval()  # DeepSpeed's engine returns nothing
    scores: dict[str, list[float]] = {"chosen_ids": [], "rejected_ids": []}
    for start in range(0, len(rows), size):
        batch = trainer.data_collator(rows.select(range(start, min(start + size, len(rows)))).to_list())
        batch = {key: values.to(trainer.args.device) for key, values in batch.items() if key != "margin"}
        with trainer.autocast_smart_context_manager():
            logits = model(**batch, use_cache=False).logits
        for column, found in zip(scores, logits.squeeze(-1).float().chunk(2), strict=True):
            scores[column] += found.tolist()
    result = metric_results(
        "reward_accuracy",
        predictions=scores["chosen_ids"],
        references=scores["rejected_ids"],
        length_differences=[len(a) - len(b) for a, b in zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)],
    )
    trainer.state.log_history[-1] |= {"eval_accuracy": result["mean"], "eval_margin": result["margin"]}
    if main_process():
        write_json(Path(trainer.args.output_dir) / "evaluation.json", result)
    return result


class FinetunedResults(NamedTuple):
    """The results of a fine-tuned model on the test rows."""

    loss: float
    metrics: dict[str, Interval]


def evaluate_finetuned(trainer: FinetuningTrainer, task: LabelledTask, rows: Dataset) -> FinetunedResults:
    """Predict every test row; write predictions.jsonl and evaluation.json into the run's folder.

    Metrics are accuracy and macro F1 for sentences and pairs, accuracy and F1 of the tags, F1 and exact match of the
    spans. The first one is the mean of `score` in predictions.jsonl.

    Args:
        rows: what `finetuning_rows` made of the test split.
    """
    output = trainer.predict(rows, metric_key_prefix="eval")
    found = predict_labels(task, rows, output.predictions)
    scores, cells = _score(task, found)
    if main_process():
        metrics = {name: cell.to_json() for name, cell in cells.items()}
        result = {"task": task.kind, "labels": task.labels, "n": len(found), "metrics": metrics}
        lines = [{**row, "prediction": answer, "score": score}
                 for row, answer, score in zip(task.test, found, scores, strict=True)]  # fmt: skip
        write_jsonl(Path(trainer.args.output_dir) / "predictions.jsonl", lines)
        write_json(Path(trainer.args.output_dir) / "evaluation.json", result)
    return FinetunedResults(output.metrics["eval_loss"], cells)


def _score(task: LabelledTask, found: list) -> tuple[list[float], dict[str, Interval]]:
    """Score of each row in [0, 1], and the metrics.

    Args:
        found: the predictions: a label, the tags of a sentence, or the text of a span.
    """
    if task.kind == "spans":
        answers = [answer["text"] for answer in task.test["answers"]]
        spans = metric_results("span_f1", predictions=found, references=answers)
        cells = {"f1": Interval.from_json(spans), "exact_match": Interval.from_json(spans["exact_match"])}
        return spans["values"], cells
    true = task.test[LABEL_COLUMNS[task.kind]]
    if task.kind == "tags":  # a word that was cut off was not tagged right
        right = [float(sum(a == b for a, b in zip(*row, strict=True))) for row in zip(found, true, strict=True)]
        lengths = [float(len(tags)) for tags in true]
        tags = metric("tag_f1", predictions=[[tag or "" for tag in row] for row in found], references=list(true))
        shares = [count / length for count, length in zip(right, lengths, strict=True)]
        return shares, {"accuracy": interval(right, lengths), "f1": tags}
    numbers = {label: number for number, label in enumerate(task.labels)}
    pair = {"predictions": [numbers[label] for label in found], "references": [numbers[label] for label in true]}
    accuracy = metric_results("accuracy", **pair)
    f1 = metric("f1", **pair, average="macro")
    return accuracy["values"], {"accuracy": Interval.from_json(accuracy), "f1": f1}
