"""PPOTrainer: TRL's interface, with a train() that reads like the algorithm."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from transformers import (
    DataCollator,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainerControl,
)
from trl.experimental.utils import create_reference_model
from trl.trainer.utils import print_prompt_completions_sample

from rlhf.data.datasets import Row
from rlhf.errors import InputError
from rlhf.models.precision import mixed_precision, without_casts
from rlhf.models.prefix import Rows
from rlhf.ppo.advantages import estimate_advantages
from rlhf.ppo.checkpoint import (
    Progress,
    atomic_folder,
    checkpoint_folder,
    delete_old_checkpoints,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_random_state,
    save_samples,
)
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.control import adapted_kl_coef
from rlhf.ppo.evaluation import evaluation_rows, note_best
from rlhf.ppo.metrics import batch_metrics, evaluation_metrics, sample_table, update_metrics
from rlhf.ppo.model import PolicyAndValue, TokenOutputs
from rlhf.ppo.monitor import remarks, without_repeats
from rlhf.ppo.processes import Processes
from rlhf.ppo.rollout import draw_uniforms, prompt_order, sample_rollout
from rlhf.ppo.scoring import (
    RewardScale,
    collect_rewards,
    logprobs_and_values,
    measure_scale,
    shape_scores,
    start_value_head,
)
from rlhf.ppo.setup import (
    EvalDataset,
    check_datasets,
    check_models,
    check_pad_token,
    disable_dropout,
    policy_and_value,
    set_sizes,
    weighted_rewards,
)
from rlhf.ppo.types import Advantages, Rewards, Rollout, Scored, UpdateStats
from rlhf.ppo.update import UpdateSettings, minibatches, optimizer_step, ptx_batches, update
from rlhf.ppo.upstream import OnlineTrainerState, TRLPPOTrainer
from rlhf.rewards import RewardFunction


class PPOTrainer(TRLPPOTrainer):
    """Proximal policy optimization of a language model (https://arxiv.org/abs/1707.06347, 1909.08593, 2009.01325).

    The constructor has TRL's parameters in TRL's order, with these differences: `value_model` may be None (the value
    function is then a head on the policy's trunk, or an adapter of its own), `reward_funcs` may replace `reward_model`,
    and the dataset may have columns besides `input_ids`, such as `prompt`, which go to the reward functions.

    Args:
        args: the configuration.
        processing_class: the policy's tokenizer; its pad token must differ from eos.
        model: the policy, a causal language model or a PeftModel of one.
        ref_model: the reference. None means with PEFT the adapter `args.ref_adapter_name`, or the model with adapters
            off; without PEFT a frozen copy of the policy.
        reward_model: a sequence classifier with one output that shares the policy's tokenizer.
        train_dataset: rows with `input_ids` (token ids of a prompt).
        value_model: a sequence classifier with one output, trained as the value function.
        data_collator: accepted because TRL's class does; prompts are always padded on the left.
        eval_dataset: prompts like those of `train_dataset`, or a dict of several such datasets by name.
        peft_config: makes `model` a PeftModel.
        reward_funcs: functions `(prompts, completions, completion_ids, **columns) -> list[float]`, see rlhf.rewards;
            with `args.reward_weights`, their weighted sum is the score.
        eval_reward_funcs: reward functions for evaluation only: the true reward where it is known, or a second model.
        ptx_dataset: rows with `input_ids` and perhaps `labels`, for `args.ptx_coef`.

    Raises:
        InputError: for models, datasets, tokenizers or settings that can't work together.
    """

    # narrower than transformers declares them
    args: PPOConfig
    state: OnlineTrainerState
    control: TrainerControl
    model: nn.Module
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    processing_class: PreTrainedTokenizerBase

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        reward_model: PreTrainedModel | None = None,
        train_dataset: Dataset | None = None,
        value_model: PreTrainedModel | None = None,
        data_collator: DataCollator | None = None,
        eval_dataset: EvalDataset = None,
        optimizers: tuple[Optimizer | None, LRScheduler | None] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        reward_funcs: list[RewardFunction] | None = None,
        eval_reward_funcs: list[RewardFunction] | None = None,
        ptx_dataset: Dataset | None = None,
    ) -> None:
        check_models(model, ref_model, reward_model, value_model)
        check_pad_token(processing_class)
        check_datasets(args, model, train_dataset, eval_dataset, ptx_dataset)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        self.is_peft_model = isinstance(model, PeftModel)
        if ref_model is None and not self.is_peft_model:
            ref_model = create_reference_model(model)
        self.model_adapter_name = args.model_adapter_name or (model.active_adapter if self.is_peft_model else "default")
        trained = policy_and_value(model, value_model, self.model_adapter_name, args)
        for module in (model, ref_model, reward_model, value_model):
            if module is not None:
                disable_dropout(module)
        self.ref_model, self.ref_adapter_name, self.reward_model = ref_model, args.ref_adapter_name, reward_model
        self.reward_funcs, self.reward_weights = weighted_rewards(reward_model, processing_class, reward_funcs, args)
        self.ptx_dataset, self.eval_reward_funcs = ptx_dataset, list(eval_reward_funcs or [])
        self.stop_token_ids = [processing_class.eos_token_id] if args.stop_token == "eos" else args.stop_token_id or []
        # TRL's own constructor would build an Accelerator and a wrapper of its own. transformers' Trainer brings mixed
        # precision, callbacks, reporting and the schedules that TRL's class ignores.
        Trainer.__init__(
            self,
            model=trained,
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self._prepare()

    def _prepare(self) -> None:
        """Sizes, optimizer and state, once transformers' Trainer has been set up."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError("PPO runs on one process or under DDP; FSDP and DeepSpeed don't work with it yet.")
        args = self.args
        self.train_dataset_len = len(self.train_dataset)
        set_sizes(args, self.train_dataset_len, self.accelerator.num_processes)
        # this trainer weights the loss of each microbatch itself, so accelerate must not divide it again
        self.accelerator.gradient_accumulation_steps = 1
        self.state = OnlineTrainerState(
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
            stateful_callbacks=self.state.stateful_callbacks,
        )
        for module in (self.ref_model, self.reward_model):
            if module is not None:
                module.to(self.accelerator.device)
        self.create_optimizer_and_scheduler(num_training_steps=args.num_total_batches)
        self.model, self.optimizer = self.accelerator.prepare(self.model, self.optimizer)
        self.model_wrapped = self.model
        self.processes = Processes.of(self.accelerator, self.model)
        self.seconds: dict[str, float] = {}  # of each phase since the last update
        self.reward_scale: RewardScale | None = None  # measured on the first batch
        self.kl_coef = args.kl_coef
        self.remarked: dict[str, int] = {}  # the update of the monitor's last remark, by rule

    # ------------------------------------------------------------------------------------------ the algorithm

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Run PPO for `args.total_episodes` episodes.

        Args:
            resume_from_checkpoint: folder of a checkpoint of this run to continue from.
        """
        self._begin(resume_from_checkpoint)
        for rows in self.prompts():
            rollout = self.rollout(rows)  # the policy samples completions
            scored = self.score(rollout)  # reward, values, reference logprobs
            advantages = self.advantages(rollout, scored)  # KL penalty, GAE, whitening
            stats = self.update(rollout, scored, advantages)
            self.record(rollout, scored, advantages, stats)  # log, evaluate, checkpoint, stop
        self._end()

    def prompts(self) -> Iterator[list[Row]]:
        """This process's rows of the dataset, one batch per update."""
        args = self.args
        while self.state.global_step < args.num_total_batches and not self.control.should_training_stop:
            order = prompt_order(self.train_dataset_len, self.state.episode, args.batch_size, args.seed)
            yield [self.train_dataset[order[number]] for number in self._own_rows()]

    def rollout(self, rows: list[Row]) -> Rollout:
        """Sample one completion per prompt."""
        device, length = self.accelerator.device, self.args.response_length
        uniforms = draw_uniforms(self.state.episode, self._own_rows(), length, self.args.seed, device)
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
            start_value_head(self._module, self.reward_funcs, self.reward_weights, self.reward_scale)
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
            logprobs, values, reference = self._logprobs_and_values(rollout, args.per_device_train_batch_size)
        return Scored(rewards.scores, scores, logprobs, reference, values, per_token, rewards.by_function)

    def rewards(self, rollout: Rollout) -> Rewards:
        """The rewards of the completions."""
        return collect_rewards(rollout, self.reward_funcs, self.reward_weights, trainer_state=self.state)

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
        self._module.warming_up = self._warming_up()
        with self._timed("update"), without_casts(self.accelerator, self._module.policy):
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
        self.adapt_kl_coef(metrics["objective/kl"])
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(self.args, self.state, self.control)
        self.log_if_due(metrics)
        self.print_samples_if_due(rollout, scored)
        self.evaluate_if_due()
        self.save_if_due()

    def count_update(self) -> None:
        """Count the episodes and the step of an update."""
        self.state.episode += self.args.batch_size
        self.state.global_step += 1
        self.state.epoch = self.state.episode / self.train_dataset_len

    def metrics_of_update(
        self, rollout: Rollout, scored: Scored, advantages: Advantages, stats: UpdateStats
    ) -> dict[str, float]:
        """The numbers to log for an update."""
        return {
            **batch_metrics(rollout, scored, advantages, self.processes),
            **update_metrics(stats),
            "objective/kl_coef": self.kl_coef,
            "lr": self.lr_scheduler.get_last_lr()[0],
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

    def log_if_due(self, metrics: dict[str, float]) -> None:
        """Log an update: the first and the last one, and those that `logging_steps` asks for."""
        if self.control.should_log or self.state.global_step in (1, self.args.num_total_batches):
            self.log(metrics)
            self.report_problems()

    def print_samples_if_due(self, rollout: Rollout, scored: Scored) -> None:
        """Print three completions, `num_sample_generations` times in a run."""
        times, step = self.args.num_sample_generations, self.state.global_step
        every = max(1, self.args.num_total_batches // max(1, times))
        if times > 0 and step % every == 0 and self.is_world_process_zero():
            scores = {"score": scored.raw_scores.tolist()}
            print_prompt_completions_sample(rollout.prompts, rollout.completions, scores, None, step, num_samples=3)

    def evaluate_if_due(self) -> None:
        """Evaluate if `eval_strategy` asks for it."""
        if self.control.should_evaluate:
            self.evaluate()
            self.report_problems()

    def save_if_due(self) -> None:
        """Save a checkpoint if `save_strategy` asks for it, or if it is the best one so far."""
        if self.control.should_save:
            self._save_checkpoint_folder()
            self.control = self.callback_handler.on_save(self.args, self.state, self.control)

    def report_problems(self) -> None:
        """Print the monitor's remarks and add them to the log. A rule is repeated after ten updates at the earliest."""
        can_end = bool(self.stop_token_ids or self.args.stop_strings)
        found = remarks(self.state.log_history, self.args.response_length, can_end)
        for step, name, text in without_repeats(found, self.remarked):
            self.remarked[name] = step
            self.state.log_history.append({"step": step, "remark": name, "text": text})
            if self.is_world_process_zero():
                print(f"[monitor, update {step}] {text}", flush=True)

    # ------------------------------------------------------------------------------------------ evaluation

    def evaluate(
        self, eval_dataset: EvalDataset = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample a completion for every evaluation prompt, always with the same random numbers, and score them.

        Returns:
            `eval_score` (the training reward, raw), `eval_kl`, `eval_length`, `eval_ended`, `eval_rewards/<name>/mean`
            and, for functions that training never sees, `eval_held_out/<name>`; a table of completions goes to
            `<output_dir>/eval_samples/<step>.jsonl`.
        """
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if sets is None:
            raise InputError("evaluate: there is no eval_dataset. Pass one, here or to PPOTrainer.")
        metrics: dict[str, float] = {}
        for name, rows in sets.items() if isinstance(sets, dict) else [("", sets)]:
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            metrics.update(self._evaluate_one(rows, prefix))
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if note_best(self.args, self.state, metrics):
            self.control.should_save |= self.args.load_best_model_at_end or self.args.save_strategy == "best"
        return metrics

    def _evaluate_one(self, rows: Dataset, prefix: str) -> dict[str, float]:
        start, args = time.perf_counter(), self.args
        numbers = evaluation_rows(len(rows), self.accelerator.num_processes, self.accelerator.process_index)
        uniforms = draw_uniforms(0, numbers, args.response_length, -1, self.accelerator.device)
        rollout = self._sample([rows[number % len(rows)] for number in numbers], uniforms)
        rewards = self.rewards(rollout)
        logprobs, _, reference = self._logprobs_and_values(rollout, args.per_device_eval_batch_size)
        weights = [1.0] * len(self.eval_reward_funcs)
        held_out = collect_rewards(rollout, self.eval_reward_funcs, weights, trainer_state=self.state)
        metrics = evaluation_metrics(rollout, rewards, held_out, logprobs - reference, self.processes)
        save_samples(args, self.state.global_step, prefix, sample_table(rollout, rewards.scores, 32))
        metrics["runtime"] = time.perf_counter() - start
        return {f"{prefix}_{name}": value for name, value in metrics.items()}

    # ------------------------------------------------------------------------------------------ begin, save, end

    def _begin(self, resume_from_checkpoint: str | None) -> None:
        args, state = self.args, self.state
        state.global_step, state.episode, state.max_steps = 0, 0, args.num_total_batches
        state.num_train_epochs = args.total_episodes / self.train_dataset_len
        state.compute_steps(args, args.num_total_batches)
        self.reward_scale, self.kl_coef, self.remarked = None, args.kl_coef, {}
        set_seed(args.seed + 100_003 * self.accelerator.process_index)
        if resume_from_checkpoint:
            self._resume(Path(resume_from_checkpoint))
        self.control = self.callback_handler.on_train_begin(args, state, self.control)
        if args.eval_on_start and not resume_from_checkpoint:
            self.evaluate()

    def _resume(self, folder: Path) -> None:
        rank = self.accelerator.process_index
        progress = load_checkpoint(folder, self._module, self.optimizer, self.lr_scheduler, rank)
        state, scale = self.state, progress["reward_scale"]
        state.global_step, state.episode, state.log_history = progress["step"], progress["episode"], progress["log"]
        state.best_metric, state.best_global_step, state.best_model_checkpoint = progress["best"]
        self.reward_scale = None if scale is None else RewardScale(*scale)
        self.kl_coef, self.remarked = progress["kl_coef"], progress["remarked"]

    def _progress(self) -> Progress:
        state = self.state
        return {
            "step": state.global_step,
            "episode": state.episode,
            "log": state.log_history,
            "reward_scale": self.reward_scale,
            "kl_coef": self.kl_coef,
            "remarked": self.remarked,
            "best": (state.best_metric, state.best_global_step, state.best_model_checkpoint),
        }

    def _save_checkpoint_folder(self) -> None:
        args, accelerator = self.args, self.accelerator
        folder = checkpoint_folder(args, self.state.global_step)
        with atomic_folder(folder, args.should_save, accelerator.wait_for_everyone) as working:
            save_random_state(working, accelerator.process_index)
            if args.should_save:
                save_checkpoint(working, self._module, self.optimizer, self.lr_scheduler, self._progress())
                self.save_model(str(working))
        if args.should_save:
            best = self.state.best_model_checkpoint if args.metric_for_best_model else None
            delete_old_checkpoints(args.output_dir, args.save_total_limit, keep=best)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy alone, with its tokenizer. With LoRA that is one adapter."""
        folder = output_dir or self.args.output_dir
        if self.args.should_save:
            adapters = {"selected_adapters": [self.model_adapter_name]} if self.is_peft_model else {}
            self._module.policy.save_pretrained(folder, **adapters)
            self.processing_class.save_pretrained(folder)

    def _end(self) -> None:
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            best = Path(self.state.best_model_checkpoint)
            load_weights(best, self._module)
            if self.is_world_process_zero():
                print(f"Kept the best checkpoint, {best.name}: {self.args.metric_for_best_model} "
                      f"{self.state.best_metric:.4g}.")  # fmt: skip
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    # ------------------------------------------------------------------------------------------ passes of the models

    @property
    def _module(self) -> PolicyAndValue:
        """The trained module without the wrapper of DDP."""
        return self.accelerator.unwrap_model(self.model)

    def _own_rows(self) -> range:
        """The row numbers of a batch that belong to this process."""
        start = self.accelerator.process_index * self.args.local_batch_size
        return range(start, start + self.args.local_batch_size)

    def _sample(self, rows: list[Row], uniforms: torch.Tensor) -> Rollout:
        with mixed_precision(self.accelerator, self._module.policy):
            return sample_rollout(
                self._module.policy.eval(),
                self.processing_class,
                rows,
                response_length=self.args.response_length,
                temperature=self.args.temperature,
                stop_token_ids=self.stop_token_ids,
                stop_strings=self.args.stop_strings,
                batch_size=self.args.local_rollout_forward_batch_size,
                uniforms=uniforms,
                device=self.accelerator.device,
            )

    def _logprobs_and_values(
        self, rollout: Rollout, batch_size: int
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        temperature = self.args.temperature
        with mixed_precision(self.accelerator, self._module.policy):
            return logprobs_and_values(
                self._module, self.ref_model, self.ref_adapter_name, rollout,
                batch_size=batch_size, temperature=temperature,
            )  # fmt: skip

    def _forward(self, rows: Rows, temperature: float, **settings: bool) -> TokenOutputs:
        self.model.train()
        with self.accelerator.autocast():
            return self.model(rows, temperature, **settings)

    def _step(self) -> float:
        only = self._module.value_parameters() if self._warming_up() else None
        return optimizer_step(self.accelerator, self.model, self.optimizer, self.args.max_grad_norm, only)

    def _warming_up(self) -> bool:
        return self.state.global_step < self.args.value_warmup_steps

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start
