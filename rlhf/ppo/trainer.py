"""PPOTrainer: TRL's interface, with a train() that reads like the algorithm."""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from peft.helpers import disable_input_dtype_casting
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl.experimental.utils import create_reference_model
from trl.trainer.utils import print_prompt_completions_sample

from rlhf.errors import InputError
from rlhf.models.adapters import VALUE, add_value_adapter
from rlhf.ppo.advantages import estimate_advantages
from rlhf.ppo.checkpoint import drop_old, load, load_weights, save, save_random_state, save_samples, written_aside
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.control import adapted_kl_coef
from rlhf.ppo.metrics import batch_metrics, reward_metrics, sample_table, update_metrics
from rlhf.ppo.model import PolicyAndValue
from rlhf.ppo.monitor import remarks
from rlhf.ppo.processes import Processes
from rlhf.ppo.rollout import draws, prompt_order, sample_rollout
from rlhf.ppo.scoring import RewardScale, before_update, collect_rewards, measure_scale, shape_scores
from rlhf.ppo.setup import (
    check_models,
    check_pad_token,
    check_prompts,
    checkpoint_activations,
    disable_dropout,
    set_sizes,
)
from rlhf.ppo.types import Advantages, Rewards, Rollout, Scored, UpdateStats
from rlhf.ppo.update import PtxBatch, UpdateSettings, minibatches, ptx_batches, update
from rlhf.ppo.upstream import OnlineTrainerState, TRLPPOTrainer
from rlhf.rewards import RewardFunction, RewardModel


class PPOTrainer(TRLPPOTrainer):
    """Proximal policy optimization of a language model (https://arxiv.org/abs/1707.06347, 1909.08593, 2009.01325).

    The constructor takes what TRL's takes, in the same order. What differs: `value_model` may be None (the value
    function is then a head on the policy's trunk, or an adapter of its own), `reward_funcs` may replace `reward_model`,
    and the dataset may carry `prompt` and other columns beside `input_ids`, which reward functions receive.

    Args:
        args: the configuration.
        processing_class: the policy's tokenizer; its pad token has to differ from eos.
        model: the policy, a causal language model or a PeftModel of one.
        ref_model: the reference. None with PEFT: adapter `args.ref_adapter_name`, or the model with adapters off; None
            without PEFT: a frozen copy of the policy.
        reward_model: a sequence classifier with one output that shares the policy's tokenizer.
        train_dataset: rows with `input_ids` (token ids of a prompt).
        value_model: a sequence classifier with one output, trained as the value function.
        data_collator: taken for TRL's sake; prompts are always padded on the left.
        eval_dataset: prompts like those of `train_dataset` for `eval_strategy`; a dict of them by name works too.
        peft_config: makes `model` a PeftModel.
        reward_funcs: functions `(prompts, completions, completion_ids, **columns) -> list[float]`, see rlhf.rewards;
            with `args.reward_weights`, their weighted sum is the score.
        eval_reward_funcs: like them, for evaluation alone: the truth, where it is known, or a second reward model.
        ptx_dataset: rows of `input_ids` and perhaps `labels`, for `args.ptx_coef`.

    Raises:
        InputError: for models, datasets, tokenizers or settings that can't work together.
    """

    # narrower than transformers declares them
    args: PPOConfig
    state: OnlineTrainerState
    model: Any
    optimizer: Any
    lr_scheduler: Any
    processing_class: Any
    control: Any

    def __init__(
        self,
        args: PPOConfig,
        processing_class: PreTrainedTokenizerBase,
        model: PreTrainedModel | PeftModel,
        ref_model: PreTrainedModel | None = None,
        reward_model: PreTrainedModel | None = None,
        train_dataset: Dataset | None = None,
        value_model: PreTrainedModel | None = None,
        data_collator: Any = None,
        eval_dataset: Dataset | dict[str, Dataset] | None = None,
        optimizers: tuple[Any, Any] = (None, None),
        callbacks: list[TrainerCallback] | None = None,
        peft_config: PeftConfig | None = None,
        reward_funcs: list[RewardFunction] | None = None,
        eval_reward_funcs: list[RewardFunction] | None = None,
        ptx_dataset: Dataset | None = None,
    ) -> None:
        check_models(model, ref_model, reward_model, value_model)
        check_pad_token(processing_class)
        if args.eval_strategy != "no" and eval_dataset is None:
            raise InputError("--eval_strategy: needs an eval_dataset; this one has none. Give one, or use 'no'.")
        sets = eval_dataset if isinstance(eval_dataset, dict) else {"eval_dataset": eval_dataset}
        for name, rows in {"train_dataset": train_dataset, **{k: v for k, v in sets.items() if v is not None}}.items():
            check_prompts(rows, name, args.response_length, model)
        if args.ptx_coef > 0 and not ptx_dataset:
            raise InputError("--ptx_coef: needs texts to mix in. Give --ptx_dataset_name, or ptx_dataset in Python.")
        self.ptx_dataset, self.eval_reward_funcs = ptx_dataset, list(eval_reward_funcs or [])
        trained = self._set_models(model, ref_model, reward_model, value_model, peft_config, args)
        self._set_rewards(reward_model, processing_class, reward_funcs, args)
        self.stop_token_ids = [processing_class.eos_token_id] if args.stop_token == "eos" else args.stop_token_id or []
        # past TRL's own constructor, which builds an Accelerator and a wrapper of its own, to transformers' Trainer:
        # with that come mixed precision, callbacks, reporting and the schedules that TRL's class ignores
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
        self._set_training()

    def _set_models(
        self, model: Any, ref_model: Any, reward_model: Any, value_model: Any, peft_config: Any, args: PPOConfig
    ) -> PolicyAndValue:
        """Give every model its role; returns what is trained."""
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        self.is_peft_model = isinstance(model, PeftModel)
        if ref_model is None and not self.is_peft_model:
            ref_model = create_reference_model(model)
        value_adapter = None
        self.model_adapter_name = args.model_adapter_name or (model.active_adapter if self.is_peft_model else "default")
        if args.value_function == "adapter" and value_model is None:
            if not self.is_peft_model:
                raise InputError("--value_function adapter: needs a LoRA policy. Use 'head', or pass a value_model.")
            add_value_adapter(model, self.model_adapter_name)
            value_adapter = VALUE
        for module in (model, ref_model, reward_model, value_model):
            if module is not None:
                disable_dropout(module)
        if args.activation_checkpointing:
            checkpoint_activations(model, args)
            checkpoint_activations(value_model, args)
        self.policy_model, self.ref_model, self.value_model = model, ref_model, value_model
        self.reward_model, self.ref_adapter_name = reward_model, args.ref_adapter_name
        return PolicyAndValue(model, value_model, value_adapter)

    def _set_rewards(
        self, reward_model: Any, tokenizer: Any, reward_funcs: list[RewardFunction] | None, args: PPOConfig
    ) -> None:
        """TRL's reward model first, then the reward functions, with a weight each."""
        self.reward_funcs = list(reward_funcs or [])
        if reward_model is not None:
            self.reward_funcs.insert(0, RewardModel(reward_model, tokenizer, args.per_device_eval_batch_size))
        if not self.reward_funcs:
            raise InputError("PPO needs a reward: pass reward_model or reward_funcs.")
        self.reward_weights = args.reward_weights or [1.0] * len(self.reward_funcs)
        if len(self.reward_weights) != len(self.reward_funcs):
            raise InputError(
                f"--reward_weights: {len(self.reward_weights)} weights for {len(self.reward_funcs)} rewards. Give one "
                "for each."
            )

    def _set_training(self) -> None:
        """Sizes, optimizer and state, once transformers' Trainer has been set up."""
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError("PPO runs on one process or under DDP; FSDP and DeepSpeed don't work with it yet.")
        args = self.args
        self.train_dataset_len = len(self.train_dataset)
        set_sizes(args, self.train_dataset_len, self.accelerator.num_processes)
        # one optimizer step per minibatch is this trainer's own business; accelerate must not divide the loss again
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
        self.seconds: dict[str, float] = {}
        self.reward_scale: RewardScale | None = None
        self.kl_coef = args.kl_coef
        self.remarked: dict[str, int] = {}  # the update at which the monitor last said something

    # ------------------------------------------------------------------------------------------ the algorithm

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Run PPO for `args.total_episodes` episodes.

        Args:
            resume_from_checkpoint: folder of a checkpoint of this run to go on from.
        """
        self._begin(resume_from_checkpoint)
        for rows in self.prompts():
            rollout = self.rollout(rows)  # the policy samples completions
            scored = self.score(rollout)  # reward, values, reference logprobs
            advantages = self.advantages(rollout, scored)  # KL penalty, GAE, whitening
            stats = self.update(rollout, scored, advantages)
            self.record(rollout, scored, advantages, stats)  # log, evaluate, checkpoint, stop
        self._end()

    def prompts(self) -> Iterator[list[dict[str, Any]]]:
        """This process's rows of the dataset, one batch per update."""
        args = self.args
        while self.state.global_step < args.num_total_batches and not self.control.should_training_stop:
            order = prompt_order(self.train_dataset_len, self.state.episode, args.batch_size, args.seed)
            yield [self.train_dataset[order[number]] for number in self._own_rows()]

    def _own_rows(self) -> range:
        """Which rows of a batch are this process's."""
        start = self.accelerator.process_index * self.args.local_batch_size
        return range(start, start + self.args.local_batch_size)

    def rollout(self, rows: list[dict[str, Any]]) -> Rollout:
        """Sample one completion per prompt."""
        device, length = self.accelerator.device, self.args.response_length
        uniforms = draws(self.state.episode, self._own_rows(), length, self.args.seed, device)
        with self._timed("rollout"):
            return self._sample(rows, uniforms)

    def _sample(self, rows: list[dict[str, Any]], uniforms: torch.Tensor) -> Rollout:
        policy = self.accelerator.unwrap_model(self.model).policy.eval()
        with self._mixed_precision():
            return sample_rollout(
                policy,
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

    def score(self, rollout: Rollout) -> Scored:
        """Scores of the completions, and logprobs and values of their tokens before the update."""
        args = self.args
        with self._timed("reward"):
            rewards = self.rewards(rollout)
        if self.reward_scale is None:
            self._set_reward_scale(rewards)
        scores, per_token = shape_scores(
            rewards,
            self.reward_scale or RewardScale(0.0, 1.0),
            rollout.completion_mask.sum(1),
            rollout.ended,
            score_clip=args.score_clip,
            length_penalty=args.length_penalty,
            missing_eos_penalty=args.missing_eos_penalty,
            missing_eos_score=args.missing_eos_score,
        )
        with self._timed("logprobs"), self._mixed_precision():
            logprobs, values, reference = before_update(
                self.accelerator.unwrap_model(self.model),
                self.ref_model,
                self.ref_adapter_name,
                rollout,
                batch_size=args.per_device_train_batch_size,
                temperature=args.temperature,
            )
        return Scored(rewards.scores, scores, logprobs, reference, values, per_token, rewards.by_function)

    def rewards(self, rollout: Rollout) -> Rewards:
        """What the reward functions say about the completions."""
        return collect_rewards(rollout, self.reward_funcs, self.reward_weights, trainer_state=self.state)

    def _set_reward_scale(self, rewards: Rewards) -> None:
        """Fix the scale of the scores on the first batch, and start an adapter value function on it."""
        self.reward_scale = RewardScale(0.0, 1.0)
        if self.args.normalize_reward:
            self.reward_scale = measure_scale(rewards.scores, self.processes)
        module = self.accelerator.unwrap_model(self.model)
        for function, weight in zip(self.reward_funcs, self.reward_weights, strict=True):
            if module.value_adapter is None or not isinstance(function, RewardModel) or function.head is None:
                continue
            with torch.no_grad():  # the critic starts as the reward model, as in InstructGPT
                module.value_head.weight.copy_(function.head.weight * weight / self.reward_scale.std)
                module.value_head.bias.fill_(-self.reward_scale.mean / self.reward_scale.std)

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
        args = self.args
        seed = args.seed + 100_003 * self.accelerator.process_index + 7 * self.state.global_step
        order = minibatches(
            rollout.attention_mask.sum(1).cpu(),
            args.num_ppo_epochs,
            args.num_mini_batches,
            args.per_device_train_batch_size,
            torch.Generator().manual_seed(seed),
        )
        self.accelerator.unwrap_model(self.model).warming_up = self._warming_up()
        with self._timed("update"), self._without_casts():
            return update(
                self._forward,
                self._step,
                rollout,
                scored,
                advantages,
                order,
                self._update_settings(),
                self.processes,
                self._ptx_batches(seed),
            )

    def _update_settings(self) -> UpdateSettings:
        args, warming_up = self.args, self._warming_up()
        return UpdateSettings(
            cliprange=args.cliprange,
            cliprange_value=args.cliprange_value,
            vf_coef=args.vf_coef,
            entropy_coef=args.entropy_coef,
            ptx_coef=0.0 if warming_up else args.ptx_coef,
            temperature=args.temperature,
            target_kl=args.target_kl,
            train_policy=not warming_up,
        )

    def _ptx_batches(self, seed: int) -> Iterator[PtxBatch]:
        return ptx_batches(self.ptx_dataset, self.args.per_device_train_batch_size, seed, self.accelerator.device)

    def _warming_up(self) -> bool:
        return self.state.global_step < self.args.value_warmup_steps

    def _forward(self, *inputs: Any, **settings: Any) -> Any:
        self.model.train()
        with self.accelerator.autocast():
            return self.model(*inputs, **settings)

    def _step(self) -> float:
        if self._warming_up():  # no gradient at all, so that weight decay and momentum leave the policy alone too
            module = self.accelerator.unwrap_model(self.model)
            of_value = module.value_parameters()
            for name, parameter in module.named_parameters():
                if name not in of_value:
                    parameter.grad = None
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        limit = self.args.max_grad_norm if self.args.max_grad_norm and self.args.max_grad_norm > 0 else math.inf
        norm = self.accelerator.clip_grad_norm_(parameters, limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    # ------------------------------------------------------------------------------------------ around it

    def _begin(self, resume_from_checkpoint: str | None) -> None:
        args, state = self.args, self.state
        state.global_step, state.episode, state.max_steps = 0, 0, args.num_total_batches
        state.num_train_epochs = args.total_episodes / self.train_dataset_len
        state.compute_steps(args, args.num_total_batches)
        self.reward_scale, self.kl_coef, self.remarked = None, args.kl_coef, {}
        set_seed(args.seed + 100_003 * self.accelerator.process_index)
        if resume_from_checkpoint:
            self._load_checkpoint(Path(resume_from_checkpoint))
        self.control = self.callback_handler.on_train_begin(args, state, self.control)
        if args.eval_on_start and not resume_from_checkpoint:
            self.evaluate()

    def _end(self) -> None:
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            best = Path(self.state.best_model_checkpoint)
            load_weights(best, self.accelerator.unwrap_model(self.model))
            if self.is_world_process_zero():
                print(f"Kept the best checkpoint, {best.name}: {self.args.metric_for_best_model} "
                      f"{self.state.best_metric:.4g}.")  # fmt: skip
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def _without_casts(self) -> Any:
        """Leave out PEFT's cast of each LoRA layer's input to float32, where autocast would undo it anyway."""
        policy = self.accelerator.unwrap_model(self.model).policy
        undone = self.is_peft_model and self.accelerator.mixed_precision in ("bf16", "fp16")
        return disable_input_dtype_casting(policy, active=undone)

    @contextmanager
    def _mixed_precision(self) -> Iterator[None]:
        """Autocast around forward passes alone: it keeps casts of weights until it ends, and a step changes them."""
        with self.accelerator.autocast(), self._without_casts():
            yield

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    def record(self, rollout: Rollout, scored: Scored, advantages: Advantages, stats: UpdateStats) -> None:
        """Log the update, move the schedules on, evaluate and save a checkpoint if it is due."""
        args, state = self.args, self.state
        state.episode += args.batch_size
        state.global_step += 1
        state.epoch = state.episode / self.train_dataset_len
        metrics = {
            **batch_metrics(rollout, scored, advantages, self.processes),
            **update_metrics(stats),
            "objective/kl_coef": self.kl_coef,
            "lr": self.lr_scheduler.get_last_lr()[0],
            "episode": state.episode,
            "eps": args.batch_size / max(1e-9, sum(self.seconds.values())),
            **{f"time/{phase}": seconds for phase, seconds in self.seconds.items()},
        }
        self.seconds.clear()
        if args.adaptive_kl_target is not None:
            self.kl_coef = adapted_kl_coef(
                self.kl_coef,
                metrics["objective/kl"],
                args.adaptive_kl_target,
                args.batch_size,
                args.adaptive_kl_horizon,
            )
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(args, state, self.control)
        if self.control.should_log or state.global_step in (1, args.num_total_batches):
            self.log(metrics)
            self._remark()
        self._print_samples(rollout, scored)
        if self.control.should_evaluate:
            self.evaluate()
            self._remark()
        if self.control.should_save:
            self._save_ppo_checkpoint()
            self.control = self.callback_handler.on_save(args, state, self.control)

    def _remark(self) -> None:
        """Print what the monitor finds wrong, each thing again only after ten updates, and keep it in the log."""
        can_end = bool(self.stop_token_ids or self.args.stop_strings)
        for step, name, text in remarks(self.state.log_history, self.args.response_length, can_end):
            if step - self.remarked.get(name, -10) >= 10:
                self.remarked[name] = step
                self.state.log_history.append({"step": step, "remark": name, "text": text})
                if self.is_world_process_zero():
                    print(f"[monitor, update {step}] {text}", flush=True)

    def _print_samples(self, rollout: Rollout, scored: Scored) -> None:
        every = self.args.num_total_batches // max(1, self.args.num_sample_generations)
        due = self.args.num_sample_generations > 0 and self.state.global_step % max(1, every) == 0
        if due and self.is_world_process_zero():
            print_prompt_completions_sample(
                rollout.prompts,
                rollout.completions,
                {"score": scored.raw_scores.tolist()},
                None,
                self.state.global_step,
                num_samples=3,
            )

    # ------------------------------------------------------------------------------------------ evaluation

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Sample a completion for every evaluation prompt, always with the same random numbers, and score them.

        Returns:
            `eval_score` (the training reward, raw), `eval_kl`, `eval_length`, `eval_ended`, `eval_rewards/<name>/mean`
            and, for functions that training never sees, `eval_held_out/<name>`; a table of completions goes to
            `<output_dir>/eval_samples/<step>.jsonl`.
        """
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if sets is None:
            raise InputError("evaluate: there is no eval_dataset.")
        metrics: dict[str, float] = {}
        for name, rows in sets.items() if isinstance(sets, dict) else [("", sets)]:
            prefix = f"{metric_key_prefix}_{name}" if name else metric_key_prefix
            metrics.update(self._evaluate_one(rows, prefix))
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self._note_best(metrics)
        return metrics

    def _evaluate_one(self, rows: Dataset, prefix: str) -> dict[str, float]:
        processes, rank = self.accelerator.num_processes, self.accelerator.process_index
        # every process takes as many rows; the first ones may be taken twice, so that none stands idle
        share = math.ceil(len(rows) / processes)
        own = [rows[(rank * share + number) % len(rows)] for number in range(share)]
        start = time.perf_counter()
        device, length = self.accelerator.device, self.args.response_length
        rollout = self._sample(own, draws(0, range(rank * share, (rank + 1) * share), length, -1, device))
        rewards = self.rewards(rollout)
        with self._mixed_precision():
            logprobs, _, reference = before_update(
                self.accelerator.unwrap_model(self.model),
                self.ref_model,
                self.ref_adapter_name,
                rollout,
                batch_size=self.args.per_device_eval_batch_size,
                temperature=self.args.temperature,
            )
        held_out = collect_rewards(
            rollout, self.eval_reward_funcs, [1.0] * len(self.eval_reward_funcs), trainer_state=self.state
        )
        kl = ((logprobs - reference) * rollout.completion_mask).sum(1)
        own_metrics = {
            "score": rewards.scores, "kl": kl, "length": rollout.completion_mask.sum(1), "ended": rollout.ended
        }  # fmt: skip
        metrics = {name: float(self.accelerator.reduce(v.float().mean(), "mean")) for name, v in own_metrics.items()}
        metrics.update(
            {k: v for k, v in reward_metrics(rewards.by_function, self.processes).items() if k.endswith("mean")}
        )
        for name, value in reward_metrics(held_out.by_function, self.processes).items():
            if name.endswith("/mean"):
                metrics[f"held_out/{name.split('/')[1]}"] = value
        save_samples(self.args, self.state.global_step, prefix, sample_table(rollout, rewards.scores, 32))
        metrics["runtime"] = time.perf_counter() - start
        return {f"{prefix}_{name}": value for name, value in metrics.items()}

    def _note_best(self, metrics: dict[str, float]) -> None:
        """Remember the step with the best `args.metric_for_best_model`, and save it if it may be asked for later.

        An evaluation before the first update (`eval_on_start`) has no checkpoint to go back to, and doesn't count.
        """
        name = self.args.metric_for_best_model
        if name is None:
            return
        key = name if name.startswith("eval_") else f"eval_{name}"
        if key == "eval_loss" and key not in metrics:
            key = "eval_score"  # transformers' default; PPO has no evaluation loss
        if key not in metrics:
            raise InputError(f"--metric_for_best_model {name}: not among {sorted(metrics)}.")
        sign = -1.0 if self.args.greater_is_better is False and key != "eval_score" else 1.0
        if self.state.global_step == 0:
            return
        if self.state.best_metric is None or sign * metrics[key] > sign * self.state.best_metric:
            self.control.should_save |= self.args.load_best_model_at_end or self.args.save_strategy == "best"
            self.state.best_metric, self.state.best_global_step = metrics[key], self.state.global_step
            folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
            self.state.best_model_checkpoint = str(folder)

    # ------------------------------------------------------------------------------------------ saving

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy, and nothing else, with its tokenizer: with LoRA, one adapter."""
        folder = output_dir or self.args.output_dir
        policy = self.accelerator.unwrap_model(self.model).policy
        if self.args.should_save:
            adapters = {"selected_adapters": [self.model_adapter_name]} if self.is_peft_model else {}
            policy.save_pretrained(folder, **adapters)
            self.processing_class.save_pretrained(folder)

    def _save_ppo_checkpoint(self) -> None:
        """Write a checkpoint aside and rename it, so that it is complete or not there."""
        state = {
            "step": self.state.global_step,
            "episode": self.state.episode,
            "log": self.state.log_history,
            "reward_scale": self.reward_scale,
            "kl_coef": self.kl_coef,
            "remarked": self.remarked,
            "best": [self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint],
        }
        module, rank = self.accelerator.unwrap_model(self.model), self.accelerator.process_index
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        with written_aside(folder, self.args.should_save, self.accelerator.wait_for_everyone) as working:
            save_random_state(working, rank)
            if self.args.should_save:
                save(working, module, self.optimizer, self.lr_scheduler, state)
                self.save_model(str(working))
        if self.args.should_save:
            best = self.state.best_model_checkpoint if self.args.metric_for_best_model else None
            drop_old(self.args.output_dir, self.args.save_total_limit, keep=best)

    def _load_checkpoint(self, folder: Path) -> None:
        module, rank = self.accelerator.unwrap_model(self.model), self.accelerator.process_index
        state = load(folder, module, self.optimizer, self.lr_scheduler, rank)
        self.state.global_step, self.state.episode = state["step"], state["episode"]
        self.state.log_history, self.kl_coef = state["log"], state["kl_coef"]
        self.state.best_metric, self.state.best_global_step, self.state.best_model_checkpoint = state["best"]
        self.reward_scale = state["reward_scale"] and RewardScale(*state["reward_scale"])
        self.remarked = state["remarked"]
