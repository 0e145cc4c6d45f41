"""The plan of recipes/ppo.py."""

import functools
import math
from collections.abc import Callable

from datasets import Dataset
from torch._subclasses.fake_tensor import FakeTensorMode
from trl import ModelConfig

from rlhf.models.sources import Source
from rlhf.planning.arguments import PlanConfig
from rlhf.planning.launch import Launch, launch_of
from rlhf.planning.models import like_layers, parameters
from rlhf.planning.plan import Need, Phase, Plan, over_layers
from rlhf.planning.ppo import PPOModels, PPOPasses, on_stage, ppo_models
from rlhf.planning.rows import shared_prefix, words_for
from rlhf.planning.stage import Stage
from rlhf.planning.supervised import BATCH
from rlhf.planning.trace import Trace
from rlhf.ppo.config import PPOConfig
from rlhf.rewards.sources import RewardSource

Run = Callable[[PPOPasses, Trace], object]


class _Trials:
    """Needs of PPO's passes, from models of few layers if all layers are alike."""

    def __init__(
        self, build: Callable[..., PPOModels], args: PPOConfig, launch: Launch, layers: int, shared: int
    ) -> None:
        self.shared = shared
        self.build, self.args, self.launch, self.layers = build, args, launch, layers
        self.mode = FakeTensorMode()
        self.stages: dict[int | None, tuple[Stage, PPOModels]] = {}

    def need(self, run: Run, trains: bool = False, accumulates: bool = False) -> Need:
        """What some passes need; see `Stage.need`."""

        def tried(few: int | None) -> Need:
            if few not in self.stages:
                models = self.build(layers=few)
                with self.mode:
                    self.stages[few] = on_stage(models, self.args, self.launch), models
            stage, models = self.stages[few]
            passes = PPOPasses(stage, models, self.args, self.shared)
            with self.mode:
                gathers_all = self.args.ds3_gather_for_generation and not trains
                return stage.need(lambda trace: run(passes, trace), trains, gathers_all, accumulates)

        return over_layers(self.layers, tried)


def plan_ppo(
    plan: PlanConfig,
    args: PPOConfig,
    model_args: ModelConfig,
    sources: tuple[Source, Source],
    rewards: tuple[list[RewardSource], list[RewardSource]],
    prompts: Dataset,
) -> Plan:
    """The plan of a PPO run.

    Args:
        sources: of the reference and of the policy's start.
        rewards: those of training and those of evaluation.
        prompts: as `prompt_rows` makes them.
    """
    launch = launch_of(args, plan)
    build = functools.partial(ppo_models, *sources, *rewards, args, model_args, launch)
    whole = build()
    lengths = [len(ids) for ids in prompts["input_ids"]]
    layers = like_layers(whole.trained.policy)
    for model in [*whole.rewards, *whole.others]:  # of another depth: all are tried as they are
        layers = layers if isinstance(model, str) or like_layers(model) == layers else 0
    phases = _phases(
        _Trials(build, args, launch, layers, shared_prefix(prompts["input_ids"])), args, lengths, bool(whole.rewards)
    )
    found = {"policy and value function": parameters(whole.trained)}
    if whole.reference is not None:
        found["reference"] = parameters(whole.reference)
    beside = [model for model in [*whole.rewards, *whole.others] if not isinstance(model, str)]
    found |= {f"reward model {number}": parameters(model) for number, model in enumerate(beside, 1)}
    local = args.per_device_train_batch_size * args.gradient_accumulation_steps
    rows, share = [words_for(lengths, "prompts"), f"replies of {args.response_length} tokens, all of them"], 0.0
    if args.use_vllm:
        rows.append("sampled by vLLM, which is not planned")
    if any(found.judge and found.judge.model for found in [*rewards[0], *rewards[1]]):
        rows.append("rated by a judge in this process, which is not planned")
    if args.colocated and not args.vllm_enable_sleep_mode:
        share = args.vllm_gpu_memory_utilization
        rows.append(f"and has {share:.0%} of each GPU")
    return Plan(
        recipe="ppo",
        launch=launch,
        rows=rows,
        parameters=found,
        phases=phases,
        tokens=(sum(lengths) / len(lengths) + args.response_length) * local * launch.processes,
        step="update",
    ).fitted(plan.plan_memory, share)


def _phases(trials: _Trials, args: PPOConfig, lengths: list[int], scores: bool) -> list[Phase]:
    prompt, reply = max(lengths), args.response_length
    typical = round(sum(lengths) / len(lengths))
    local = args.per_device_train_batch_size * args.gradient_accumulation_steps
    size, score_size = args.per_device_train_batch_size, min(args.per_device_eval_batch_size, local)
    sample_size = min(args.local_rollout_forward_batch_size, local)
    micro_batches = math.ceil(local / args.num_mini_batches / size)

    def sampling(rows: int) -> Need:
        return trials.need(lambda passes, trace: passes.sample(trace, rows, prompt))

    def scoring(rows: int) -> Need:
        return trials.need(lambda passes, _: passes.score(rows, prompt + reply))

    def logprobs(rows: int) -> Need:
        return trials.need(lambda passes, _: passes.logprobs(rows, prompt + reply))

    def update(rows: int) -> Need:
        return trials.need(lambda passes, _: passes.step(rows, prompt + reply, micro_batches), True, micro_batches > 1)

    def operations(run: Run, times: float) -> float:
        return trials.need(run).operations * times

    first = operations(lambda passes, trace: passes.prompts(trace, sample_size, typical), 1)
    middle = operations(
        lambda passes, trace: passes.next_token(
            trace, passes.prompts(trace, sample_size, 1), sample_size, typical + reply // 2
        ), 1,
    ) - operations(lambda passes, trace: passes.prompts(trace, sample_size, 1), 1)  # fmt: skip
    total = typical + reply
    found = []
    if not args.use_vllm:
        found.append(
            Phase.of("sampling", "--local_rollout_forward_batch_size", sample_size, sampling,
                     (first + (reply - 1) * middle) * local / sample_size)
        )  # fmt: skip
    if scores:
        found.append(
            Phase.of("scoring", "--per_device_eval_batch_size", score_size, scoring,
                     operations(lambda passes, _: passes.score(score_size, total), local / score_size))
        )  # fmt: skip
    found.append(
        Phase.of("log-probabilities", "--local_rollout_forward_batch_size", sample_size, logprobs,
                 operations(lambda passes, _: passes.logprobs(sample_size, total), local / sample_size))
    )  # fmt: skip
    found.append(
        Phase.of("update", BATCH, size, update,
                 operations(lambda passes, _: passes.backward(size, total), local / size * args.num_ppo_epochs))
    )  # fmt: skip
    return found
