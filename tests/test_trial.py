"""The optimizer and the schedule are tried before a model is loaded."""

import pytest
from transformers import TrainingArguments
from transformers.trainer_callback import TrainerState
from trl import RewardConfig, SFTConfig

from rlhf.errors import InputError
from rlhf.pretraining.config import PretrainingConfig
from rlhf.run.trainers import WholeCheckpoints
from rlhf.run.trial import check_training


def training(kind=TrainingArguments, **changes):
    return kind(output_dir="never", use_cpu=True, bf16=False, report_to="none", **changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"optim": "galore_adamw", "optim_target_modules": ["q"]}, "--optim galore_adamw"),
        ({"optim_args": "speed=3"}, "--optim adamw_torch_fused with --optim_args speed=3: .* takes none"),
        ({"optim": "adamw_torch", "optim_args": "speed"}, "--optim adamw_torch with --optim_args speed"),
        ({"lr_scheduler_kwargs": {"speed": 3}}, "--lr_scheduler_type linear with --lr_scheduler_kwargs"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "--lr_scheduler_type warmup_stable_decay"),
        ({"dataloader_persistent_workers": True}, "--dataloader_persistent_workers true"),
        ({"kind": SFTConfig, "metric_for_best_model": "eval_beauty"}, "--metric_for_best_model eval_beauty"),
        ({"kind": RewardConfig, "metric_for_best_model": "entropy"}, "--metric_for_best_model entropy: .*accuracy"),
        ({"metric_for_best_model": "eval_f1"}, "--metric_for_best_model eval_f1: .*accuracy"),  # of fine-tuning
        ({"kind": PretrainingConfig, "metric_for_best_model": "perplexity"}, "--metric_for_best_model perplexity"),
    ],
)
def test_what_a_trainer_would_refuse_late(changes, said):
    args = training(**changes)
    with pytest.raises(InputError, match=f"^{said}"):
        check_training(args)


@pytest.mark.parametrize("optim", ["adamw_torch", "adamw_torch_fused", "adafactor", "sgd", "rmsprop", "adagrad"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant", "inverse_sqrt", "reduce_lr_on_plateau"])
def test_what_works_passes(optim, schedule):
    evaluated = {"eval_strategy": "steps", "eval_steps": 1} if schedule == "reduce_lr_on_plateau" else {}
    args = training(SFTConfig, optim=optim, lr_scheduler_type=schedule, **evaluated)
    before = args.to_dict()
    check_training(args)
    assert args.to_dict() == before


def test_a_metric_that_only_the_evaluation_knows_is_one_line():
    trainer = WholeCheckpoints.__new__(WholeCheckpoints)
    trainer.args, trainer.state = training(metric_for_best_model="rewards/gone/mean"), TrainerState()
    with pytest.raises(InputError, match=r"^--metric_for_best_model rewards/gone/mean: .* Give one of eval_reward"):
        trainer._determine_best_metric(metrics={"eval_reward": 1.0, "epoch": 2.0}, trial=None)
    trainer.args.metric_for_best_model = "reward"
    assert trainer._determine_best_metric(metrics={"eval_reward": 1.0}, trial=None)
