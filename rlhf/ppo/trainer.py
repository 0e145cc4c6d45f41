"""PPOTrainer: TRL's interface, with a train() that reads like the algorithm."""

import functools
import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import gather_object, set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import DataCollator, PreTrainedTokenizerBase, Trainer, TrainerCallback
from transformers.trainer_utils import HubStrategy, TrainOutput

from rlhf.data.datasets import Row
from rlhf.engines.seam import Decoding
from rlhf.errors import InputError
from rlhf.models.adapters import disable_dropout
from rlhf.models.precision import autocast, mixed_precision, without_casts
from rlhf.models.prefix import Rows
from rlhf.models.sources import usable_context
from rlhf.ppo.advantages import estimate_advantages
from rlhf.ppo.checkpoint import save_samples
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.control import adapted_kl_coef
from rlhf.ppo.conventions import TrainerConventions
from rlhf.ppo.engine import make_engine
from rlhf.ppo.evaluation import evaluation_rows
from rlhf.ppo.inputs import Model, Roles, check_model_init_kwargs, config_or_default, load_roles, tokenized
from rlhf.ppo.metrics import batch_metrics, evaluation_metrics, sample_table, update_metrics
from rlhf.ppo.mismatch import check_engine, importance_weights
from rlhf.ppo.model import Reference, TokenOutputs
from rlhf.ppo.rollout import draw_uniforms, rollout_of
from rlhf.ppo.scoring import (
    collect_rewards,
    logprobs_and_values,
    measure_scale,
    shape_scores,
    start_value_head,
)
from rlhf.ppo.setup import (
    EvalDataset,
    check_extra_datasets,
    check_models,
    check_optimizers,
    check_prompts,
    one_reward,
    policy_and_value,
    reward_weights,
    same_for_each,
    set_sizes,
    set_value_learning_rate,
    stop_ids,
    trains_on_reward,
)
from rlhf.ppo.sharding import group_value_function, prepare, processes, say_gathered, shard, whole
from rlhf.ppo.types import Advantages, Rewards, Rollout, Scored, UpdateStats
from rlhf.ppo.update import UpdateSettings, clip_gradients, minibatches, ptx_batches, update
from rlhf.ppo.upstream import OnlineTrainerState
from rlhf.ppo.value_function import check_value_function, load_value_function
from rlhf.rewards import (
    RewardArgument,
    RewardFunction,
    RewardScale,
    gathered_means,
    need_scores,
    reward_functions,
)


class PPOTrainer(TrainerConventions):
    """Proximal policy optimization of a language model (https://arxiv.org/abs/1707.06347, 1909.08593, 2009.01325).

    The constructor has TRL's parameters in TRL's order, with these differences: only `model`, `train_dataset` and a
    reward are needed, models may be names as in GRPOTrainer, `reward_funcs` may replace `reward_model`, and prompts
    may be text or messages.

    Args:
        args: the configuration; default: PPOConfig's own, with `<name of the model>-PPO` as output folder.
        processing_class: the policy's tokenizer; its pad token must differ from eos. Default: the tokenizer of the
            model's name.
        model: the policy, a causal language model, a PeftModel of one, or the name of either (Hub id or folder), which
            is loaded with `args.model_init_kwargs`.
        ref_model: the reference. None means with PEFT the adapter `args.ref_adapter_name`, or the model with adapters
            off; without PEFT a frozen copy of the policy.
        reward_model: a sequence classifier with one output that shares the policy's tokenizer; or the name of any
            reward model; or a list of several, an ensemble (`args.reward_ensemble`).
        train_dataset: rows with `prompt` (text or messages) or `input_ids` (token ids of a prompt). Other columns go
            to the reward functions.
        value_model: a sequence classifier with one output, trained as the value function. None: what
            `args.value_function` says.
        data_collator: must be None; prompts are padded on the left.
        eval_dataset: prompts like those of `train_dataset`, or a dict of several such datasets by name.
        optimizers: an optimizer of the policy and its scheduler, which takes one step per update. The parameters of a
            value function are added to the optimizer if it lacks them.
        peft_config: makes `model` a PeftModel.
        reward_funcs: one or several functions `(prompts, completions, completion_ids, **columns) -> list[float]`, see
            rlhf.rewards, or reward models, or names of either; with `args.reward_weights`, their weighted sum is the
            score.
        eval_reward_funcs: rewards for evaluation only: the true reward where it is known, or a second model.
        ptx_dataset: rows with `input_ids` and perhaps `labels`, for `args.ptx_coef`.
        reward_processing_classes: the tokenizers of the models in `reward_funcs`; default: those of their names.

    Raises:
        InputError: for models, datasets, tokenizers or settings that can't work together.
    """

    def __init__(
        self,
        args: PPOConfig | None = None,
        processing_class: PreTrainedTokenizerBase | None = None,
        model: str | Model | None = None,
        ref_model: str | Model | None = None,
        reward_model: str | Model | list[str | Model] | None = None,
        train_dataset: Dataset | None = None,
        value_model: str | Model | None = None,
        data_collator: DataCollator | None = None,
        eval_dataset: EvalDataset = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        reward_funcs: RewardArgument | list[RewardArgument] | None = None,
        eval_reward_funcs: RewardArgument | list[RewardArgument] | None = None,
        ptx_dataset: Dataset | None = None,
        reward_processing_classes: PreTrainedTokenizerBase | list[PreTrainedTokenizerBase | None] | None = None,
    ) -> None:
        args = config_or_default(args, model)
        set_seed(args.seed)  # so that new adapters don't depend on what was drawn before
        if data_collator is not None:
            raise InputError("data_collator: PPO pads prompts itself, on the left. Leave it out.")
        check_models(model, ref_model, reward_model, value_model)
        check_model_init_kwargs(args, model, ref_model, reward_model, value_model, reward_funcs, eval_reward_funcs)
        roles = load_roles(args, model, processing_class, ref_model, value_model, peft_config)
        self.args, self.processing_class, self.context = args, roles.tokenizer, usable_context(roles.policy.config)
        train_dataset = self.prompts_of(train_dataset, "train_dataset")
        if isinstance(eval_dataset, dict):
            eval_dataset = {name: self.prompts_of(rows, name) for name, rows in eval_dataset.items()}
        elif eval_dataset is not None:
            eval_dataset = self.prompts_of(eval_dataset, "eval_dataset")
        check_extra_datasets(args, eval_dataset, ptx_dataset)
        self.train_dataset_len, self.ptx_dataset = len(train_dataset), ptx_dataset
        first, others, held_out = (
            reward_functions(
                given, name, roles.model_args, tokenizers=tokenizers, policy=roles.policy,
                columns=train_dataset.column_names, batch_size=args.per_device_eval_batch_size,
                trust_remote_code=roles.trust_remote_code, judge=args,
            )
            for given, name, tokenizers in (
                (reward_model, "reward_model", same_for_each(reward_model, roles.tokenizer)),
                (reward_funcs, "reward_funcs", reward_processing_classes),
                (eval_reward_funcs, "eval_reward_funcs", None),
            )
        )  # fmt: skip
        self.reward_funcs, self.eval_reward_funcs = one_reward(first, args) + others, held_out
        self.reward_weights = reward_weights(self.reward_funcs, args)
        args.world_size = PartialState().num_processes  # where TRL's field hides transformers' property
        # TRL's own constructor would build an Accelerator and a wrapper of its own. transformers' Trainer brings mixed
        # precision, callbacks, reporting and the schedules that TRL's class ignores.
        Trainer.__init__(
            self, roles.policy, args, None, train_dataset, eval_dataset, roles.tokenizer, callbacks=callbacks,
            optimizers=optimizers,
        )  # fmt: skip
        self._prepare(roles)

    def _prepare(self, roles: Roles) -> None:
        """The trained module, its optimizer and the sizes, once transformers' Trainer has been set up."""
        if self.args.push_to_hub and self.args.hub_strategy in (HubStrategy.CHECKPOINT, HubStrategy.ALL_CHECKPOINTS):
            raise InputError(
                f"--hub_strategy {self.args.hub_strategy.value}: checkpoints stay here. Use every_save or end."
            )
        args, policy = self.args, roles.policy
        set_sizes(args, self.train_dataset_len, self.accelerator.num_processes)
        self.is_peft_model = isinstance(policy, PeftModel)
        self.model_adapter_name = args.model_adapter_name or (
            policy.active_adapter if self.is_peft_model else "default"
        )
        self.ref_model, self.ref_adapter_name = roles.reference, args.ref_adapter_name
        self.stop_token_ids = stop_ids(args, policy, roles.tokenizer)
        self.model = policy_and_value(
            policy, roles.value, self.model_adapter_name, args, trains_on_reward(self.reward_funcs)
        )
        for module in (self.model, self.ref_model):
            if module is not None:
                disable_dropout(module)
        if args.value_model_path is not None:
            check_value_function(args.value_model_path, self.model)
        check_optimizers((self.optimizer, self.lr_scheduler), self.model)
        shard(self.accelerator, self.model, args.ds3_gather_for_generation, args.ddp_timeout)
        self.reference = None
        if self.ref_model is not None:
            self.ref_model.to(self.accelerator.device)
            self.reference = Reference(self.ref_model)
            shard(self.accelerator, self.reference, args.ds3_gather_for_generation, args.ddp_timeout)
        say_gathered(self.accelerator, self.model, self.reference)
        own_optimizer = self.optimizer is not None
        self.create_optimizer()
        set_value_learning_rate(self.model, self.optimizer, args, own_optimizer)
        group_value_function(self.accelerator, self.model, self.optimizer, self.lr_scheduler, args.value_warmup_steps)
        self.create_scheduler(args.num_total_batches)
        self.has_begun = False
        self.model_wrapped, self.optimizer = prepare(
            self.accelerator, self.model, self.optimizer, args.per_device_train_batch_size, args.max_grad_norm
        )
        self.processes = processes(self.accelerator, self.model, self.model_wrapped)
        longest = max(len(ids) for ids in self.train_dataset["input_ids"])
        self.engine = make_engine(args, self.model, self.model_adapter_name, roles.tokenizer, self.accelerator, longest)
        self.mixed_precision = self.accelerator.mixed_precision
        self.seconds: dict[str, float] = {}  # of each phase since the last update
        self.reward_scale: RewardScale | None = None  # measured on the first batch
        self.first_step = 0  # of this call of `train`
        self.kl_coef = args.kl_coef
        self.state = OnlineTrainerState(**vars(self.state))
        self.state.episode = 0

    def prompts_of(self, dataset: Dataset | None, name: str) -> Dataset:
        """The rows of a dataset with the tokens of their prompts.

        Raises:
            InputError: if it has no prompts, or a prompt leaves no room for a response.
        """
        limits = (self.processing_class, self.args.response_length, self.context)
        rows = tokenized(dataset, name, *limits)
        check_prompts(rows, name, *limits)
        return rows

    # ------------------------------------------------------------------------------------------ the algorithm

    def train(self, resume_from_checkpoint: str | bool | None = None) -> TrainOutput:
        """Run PPO for `args.total_episodes` episodes.

        Args:
            resume_from_checkpoint: folder of a checkpoint of this run to continue from; True: the newest whole one.

        Returns:
            the number of updates, the mean loss and the times, as of every Trainer.
        """
        self._begin(resume_from_checkpoint)
        for rows in self.prompts():
            rollout = self.rollout(rows)  # the policy samples completions
            scored = self.score(rollout)  # reward, values, reference logprobs
            advantages = self.advantages(rollout, scored)  # KL penalty, GAE, whitening
            stats = self.update(rollout, scored, advantages)
            self.record(rollout, scored, advantages, stats)  # log, evaluate, checkpoint, stop
        return self._end()

    def prompts(self) -> Iterator[list[Row]]:
        """This process's rows of the dataset, one batch per update."""
        for rows in self.get_train_dataloader():
            if self.control.should_training_stop:
                break
            self.control = self.callback_handler.on_step_begin(self.args, self.state, self.control)
            yield rows

    def rollout(self, rows: list[Row]) -> Rollout:
        """Sample one completion per prompt."""
        device, length = self.accelerator.device, self.args.response_length
        uniforms = draw_uniforms(self.state.episode, self.own_rows(), length, self.args.seed, device)
        with self._timed("rollout"):
            return self._sample(rows, uniforms)

    def score(self, rollout: Rollout) -> Scored:
        """Scores of the completions, and logprobs and values of their tokens before the update."""
        args = self.args
        with self._timed("reward"):
            rewards = self.rewards(rollout)
        if self.reward_scale is None:
            self.reward_scale = (
                measure_scale(rewards.scores, self.processes) if args.normalize_reward else RewardScale(0.0, 1.0)
            )
            if args.value_model_path is None:
                start_value_head(self.model, self.reward_funcs, self.reward_weights, self.reward_scale)
            else:
                load_value_function(args.value_model_path, self.model, self.reward_scale)
        scores, per_token = shape_scores(
            rewards,
            self.reward_scale,
            rollout.completion_mask.sum(1),
            rollout.ended,
            score_clip=args.score_clip,
            length_penalty=args.length_penalty,
            missing_eos_penalty=args.missing_eos_penalty,
            missing_eos_score=args.missing_eos_score,
        )
        with self._timed("logprobs"):
            logprobs, values, reference, states = self._logprobs_and_values(
                rollout, args.local_rollout_forward_batch_size
            )
        weights = self.sampling_weights(rollout, logprobs, reference)
        return Scored(rewards.scores, scores, logprobs, reference, values, per_token, rewards, weights, states)

    def sampling_weights(
        self, rollout: Rollout, logprobs: torch.Tensor, reference: torch.Tensor
    ) -> torch.Tensor | None:
        """Importance weights of the tokens that another engine sampled, once it is clear that it has our weights."""
        args, sampled, mask = self.args, rollout.sampling_logprobs, rollout.completion_mask
        if self.engine.exact or sampled is None:
            return None
        first = self.state.global_step == self.first_step
        check_engine(logprobs, reference, sampled, mask, self.engine.advice, first=first, processes=self.processes)
        if not args.vllm_importance_sampling_correction:
            return None
        bounds = (args.vllm_importance_sampling_clip_min, args.vllm_importance_sampling_clip_max)
        return importance_weights(logprobs, sampled, mask, args.vllm_importance_sampling_mode, *bounds)

    def rewards(self, rollout: Rollout) -> Rewards:
        """The rewards of the completions."""
        self._scale_ensembles(rollout)
        rewards = self._collect(rollout, self.reward_funcs, self.reward_weights)
        scored = int(self.processes.sum((~rewards.scores.isnan()).sum()))
        need_scores(self.reward_funcs, scored, self.processes.number * len(rollout.prompts))
        return rewards

    def _collect(self, rollout: Rollout, functions: list[RewardFunction], weights: list[float]) -> Rewards:
        """What reward functions give. Processes meet behind the passes of the models, of which they may need different
        numbers, and not among them.
        """
        found = whole(lambda: collect_rewards(rollout, functions, weights, self.state), self.model)
        return found._replace(metrics=gathered_means(found.metrics or {}) if functions else {})

    def measure_ensembles(self) -> None:
        """Set the scales of ensembles from the first batch before it is trained on: an evaluation comes before it."""
        numbers = next(iter(self.get_train_dataloader().batch_sampler or []))
        self._scale_ensembles(self.rollout([self.train_dataset[number] for number in numbers]))
        self.seconds.clear()

    def _scale_ensembles(self, rollout: Rollout) -> None:
        """Set the scales of ensembles from the first batch of all processes."""
        for ensemble in self.ensembles():
            if ensemble.scales is None:
                ones = [1.0] * len(ensemble.members)
                found = self._collect(rollout, ensemble.members, ones)
                own = [scores.tolist() for scores in found.by_function.values()]
                everywhere = zip(*gather_object([own]), strict=True)
                ensemble.measure([list(itertools.chain(*parts)) for parts in everywhere])

    def advantages(self, rollout: Rollout, scored: Scored) -> Advantages:
        """KL penalty, generalized advantage estimation and whitening over the batch of all processes."""
        args = self.args
        return estimate_advantages(
            scored.scores,
            scored.logprobs,
            scored.reference_logprobs,
            scored.values,
            rollout.completion_mask,
            kl_coef=self.kl_coef,
            gamma=args.gamma,
            lam=args.lam,
            whiten_rewards=args.whiten_rewards,
            per_token=scored.per_token,
            processes=self.processes,
        )

    def update(self, rollout: Rollout, scored: Scored, advantages: Advantages) -> UpdateStats:
        """`num_ppo_epochs` × `num_mini_batches` optimizer steps."""
        args, size = self.args, self.args.per_device_train_batch_size
        seed = args.seed + 100_003 * self.accelerator.process_index + 7 * self.state.global_step
        lengths = rollout.attention_mask.sum(1).cpu()
        generator = torch.Generator().manual_seed(seed)
        self.model.warming_up = self._warming_up()
        with self._timed("update"), without_casts(self.accelerator, self.model.policy):
            return update(
                self._forward,
                self._step,
                rollout,
                scored,
                advantages,
                minibatches(lengths, args.num_ppo_epochs, args.num_mini_batches, size, generator),
                UpdateSettings.of(args, warming_up=self._warming_up()),
                self.processes,
                ptx_batches(self.ptx_dataset, size, seed, self.accelerator.device),
            )

    # ------------------------------------------------------------------------------------------ after each update

    def record(self, rollout: Rollout, scored: Scored, advantages: Advantages, stats: UpdateStats) -> None:
        """Count the update, log it, adapt the schedules, evaluate and save."""
        self.count_update()
        metrics = self.metrics_of_update(rollout, scored, advantages, stats)
        self.seconds.clear()
        self.note_metrics(metrics, scored, stats)
        self.adapt_kl_coef(metrics["objective/kl"])
        self.step_scheduler()
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        self.log_if_due()
        self.print_samples_if_due(rollout, scored)
        self.evaluate_if_due()
        self.save_if_due()

    def metrics_of_update(
        self, rollout: Rollout, scored: Scored, advantages: Advantages, stats: UpdateStats
    ) -> dict[str, float]:
        """The numbers to log for an update."""
        return {
            **batch_metrics(rollout, scored, advantages, self.processes),
            **update_metrics(stats),
            "objective/kl_coef": self.kl_coef,
            "lr": self._get_learning_rate(),
            "episode": self.state.episode,
            "eps": self.args.batch_size / max(1e-9, sum(self.seconds.values())),
            **{f"time/{phase}": value for phase, value in self.seconds.items()},
        }

    def adapt_kl_coef(self, kl: float) -> None:
        """Move the KL coefficient towards `args.adaptive_kl_target`, if there is one."""
        args = self.args
        if args.adaptive_kl_target is not None:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef, kl, args.adaptive_kl_target, args.batch_size, args.adaptive_kl_horizon
            )

    # ------------------------------------------------------------------------------------------ evaluation

    def evaluate_prompts(self, rows: Dataset, prefix: str) -> dict[str, float]:
        """The metrics of an evaluation of prompts with tokens; the first 32 samples go to a file."""
        args = self.args
        numbers = evaluation_rows(len(rows), self.accelerator.num_processes, self.accelerator.process_index)
        uniforms = draw_uniforms(0, numbers, args.response_length, -1, self.accelerator.device)
        rollout = self._sample([rows[number % len(rows)] for number in numbers], uniforms)
        rewards = self.rewards(rollout)
        size = args.per_device_eval_batch_size
        logprobs, _, reference, _ = self._logprobs_and_values(rollout, size, with_values=False)
        weights = [1.0] * len(self.eval_reward_funcs)
        held_out = self._collect(rollout, self.eval_reward_funcs, weights)
        metrics = evaluation_metrics(rollout, rewards, held_out, logprobs - reference, self.processes)
        save_samples(args, self.state.global_step, prefix, sample_table(rollout, rewards, 32))
        return {f"{prefix}_{name}": value for name, value in metrics.items()}

    # ------------------------------------------------------------------------------------------ passes of the models

    def _sample(self, rows: list[Row], uniforms: torch.Tensor) -> Rollout:
        args, policy = self.args, self.model.policy.eval()
        decoding = Decoding(args.response_length, args.temperature, self.stop_token_ids, args.stop_strings or [])
        self.engine.sync()  # it samples with the policy as it is now
        sample = functools.partial(rollout_of, self.engine, policy, self.processing_class, rows, decoding, uniforms)
        return sample() if self.engine.own_weights else whole(sample, self.model)

    def _logprobs_and_values(
        self, rollout: Rollout, batch_size: int, with_values: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
        compute = functools.partial(
            logprobs_and_values, self.model, self.ref_model, self.ref_adapter_name, rollout,
            batch_size=batch_size, temperature=self.args.temperature, with_values=with_values,
        )  # fmt: skip
        with mixed_precision(self.accelerator, self.model.policy):
            return whole(compute, self.model, self.reference)

    def _forward(self, rows: Rows, temperature: float, **settings: Any) -> TokenOutputs:
        self.model_wrapped.train()
        with autocast(self.accelerator):
            return self.model_wrapped(rows, temperature, **settings)

    def _step(self) -> float:
        zero, warming_up = self.model.zero, self._warming_up()
        only = self.model.value_parameters() if warming_up else None
        norm = 0.0 if zero else clip_gradients(self.accelerator, self.model_wrapped, self.args.max_grad_norm, only)
        self.control = self.callback_handler.on_pre_optimizer_step(self.args, self.state, self.control)
        if zero:
            norm = zero.step(warming_up)  # DeepSpeed clips there
        else:
            self.optimizer.step()
        self.control = self.callback_handler.on_optimizer_step(self.args, self.state, self.control)
        self.optimizer.zero_grad()
        return norm

    def _warming_up(self) -> bool:
        return self.state.global_step < self.args.value_warmup_steps

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        if self.accelerator.device.type != "cpu":
            torch.accelerator.synchronize()  # a GPU works on while Python goes on
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
