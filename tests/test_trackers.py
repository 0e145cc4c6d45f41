"""--report_to: TensorBoard, trackio and Weights & Biases, all without a network."""

import sqlite3

import pytest
from conftest import TINY_PPO, TINY_TRAINING, run
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator


@pytest.mark.parametrize(
    ("recipe", "data", "flags", "metric"),
    [("sft", "sft", TINY_TRAINING, "loss"), ("reward", "pairs", TINY_TRAINING, "margin"),
     ("ppo", "prompts", TINY_PPO, "objective/kl")],
)  # fmt: skip
def test_every_tracker_gets_the_metrics(recipe, data, flags, metric, tiny, files, tmp_path):
    environment = {
        "WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "TRACKIO_DIR": str(tmp_path / "trackio"),
        "TENSORBOARD_LOGGING_DIR": str(tmp_path / "tensorboard"),
    }  # fmt: skip
    run(f"recipes/{recipe}.py", "--model_name_or_path", tiny, "--dataset_name", files / f"{data}.jsonl",
        "--output_dir", tmp_path / "out", *flags, "--logging_steps", 1, "--report_to", "all",
        environment=environment)  # fmt: skip
    events = EventAccumulator(str(next((tmp_path / "tensorboard").rglob("events.*")).parent)).Reload()
    assert f"train/{metric}" in events.Tags()["scalars"]
    runs = list((tmp_path / "wandb").glob("offline-run-*/*.wandb"))
    assert len(runs) == 1 and metric.split("/")[-1].encode() in runs[0].read_bytes()
    databases = list((tmp_path / "trackio").glob("*.db"))
    assert len(databases) == 1
    with sqlite3.connect(databases[0]) as database:
        rows = database.execute("select metrics from metrics").fetchall()
    assert any(metric in str(row) for row in rows)
