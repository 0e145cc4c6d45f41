"""The plans of recipes/sft.py and recipes/reward.py."""

import functools
from collections.abc import Callable

from datasets import Dataset
from torch._subclasses.fake_tensor import FakeTensorMode
from trl import ModelConfig, RewardConfig, SFTConfig

from rlhf.models.sources import Source
from rlhf.planning.arguments import PlanConfig
from rlhf.planning.launch import Launch, launch_of
from rlhf.planning.models import Model, language_model, like_layers, parameters, reward_model
from rlhf.planning.plan import Need, Phase, Plan, over_layers
from rlhf.planning.rows import padded_length, words_for
from rlhf.planning.stage import Stage
from rlhf.planning.training import Training, checkpoint_layers

BATCH = "--per_device_train_batch_size"


def plan_sft(plan: PlanConfig, args: SFTConfig, model_args: ModelConfig, source: Source, rows: Dataset) -> Plan:
    """The plan of an SFT run.

    Args:
        rows: as `sft_rows` makes them.
    """
    limit = args.max_length or 2**30
    lengths = [limit if args.packing else min(len(ids), limit) for ids in rows["input_ids"]]
    learned = [sum(label != -100 for label in labels[:limit]) for labels in rows["labels"]]
    share = sum(learned) / sum(min(len(ids), limit) for ids in rows["input_ids"])
    launch = launch_of(args, plan)
    build = functools.partial(language_model, source, model_args, launch.on_cpu)
    said = [words_for(lengths, "rows"), f"{share:.0%} of the tokens are learned"]
    return _planned("sft", build, args, plan, launch, lengths, share, said)


def plan_reward(plan: PlanConfig, args: RewardConfig, model_args: ModelConfig, source: Source, rows: Dataset) -> Plan:
    """The plan of a reward training.

    Args:
        rows: as `preference_rows` makes them.
    """
    sides = zip(rows["chosen_ids"], rows["rejected_ids"], strict=True)
    lengths = [max(len(chosen), len(rejected)) for chosen, rejected in sides]
    launch = launch_of(args, plan)
    build = functools.partial(reward_model, source, model_args, launch.on_cpu)
    return _planned("reward", build, args, plan, launch, lengths, 1.0, [words_for(lengths, "longer replies of pairs")])


def _planned(
    recipe: str,
    build: Callable[..., Model],
    args: SFTConfig | RewardConfig,
    plan: PlanConfig,
    launch: Launch,
    lengths: list[int],
    share: float,
    said: list[str],
) -> Plan:
    whole = build()
    layers, size = like_layers(whole), args.per_device_train_batch_size
    accumulated = args.gradient_accumulation_steps

    def tried(few: int | None, rows: int, tokens: int, steps: bool) -> Need:
        model = build(layers=few)
        checkpoint_layers(model, args)
        with FakeTensorMode():
            stage = Stage(model, [model], [], model.config.get_text_config().vocab_size, args, launch)
            training = Training(stage, model, args)
            learned = round(share * rows * tokens)
            if not steps:
                return stage.need(lambda _: training.backward(rows, tokens, learned))
            return stage.need(lambda _: training.step(rows, tokens, learned), accumulates=accumulated > 1)

    def need(rows: int) -> Need:
        return over_layers(layers, lambda few: tried(few, rows, max(lengths), True))

    typical = round(padded_length(lengths, size))
    operations = over_layers(layers, lambda few: tried(few, size, typical, False)).operations * accumulated
    sides = 1 if recipe == "sft" else 2
    return Plan(
        recipe=recipe,
        launch=launch,
        rows=said,
        parameters={"model": parameters(whole)},
        phases=[Phase.of("training step", BATCH, size, need, operations)],
        tokens=sides * sum(lengths) / len(lengths) * size * accumulated * launch.processes,
        step="optimizer step",
    ).fitted(plan.plan_memory)
