"""PPOTrainer: TRL's interface, with a train() that reads like the algorithm."""

import math
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase, Trainer, TrainerCallback
from trl.experimental.utils import create_reference_model
from trl.trainer.utils import disable_dropout_in_model, print_prompt_completions_sample

from rlhf.arguments import checkpoints
from rlhf.errors import InputError
from rlhf.ppo import checkpoint
from rlhf.ppo.advantages import estimate_advantages
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.model import PolicyAndValue, reference_logprobs
from rlhf.ppo.rollout import prompt_order, sample_rollout
from rlhf.ppo.types import Advantages, Rollout, Scored, UpdateStats
from rlhf.ppo.update import minibatches, trim, update
from rlhf.ppo.upstream import OnlineTrainerState, TRLPPOTrainer
from rlhf.rewards import RewardFunction, RewardModel, check_scores


def _check(
    tokenizer: PreTrainedTokenizerBase,
    model: Any,
    ref_model: Any,
    reward_model: Any,
    value_model: Any,
    train_dataset: Dataset | None,
    reward_funcs: list[RewardFunction] | None,
) -> None:
    """Raise InputError for arguments of PPOTrainer that can't work together."""
    if train_dataset is None or len(train_dataset) == 0:
        raise InputError("train_dataset: PPO needs at least one prompt.")
    if tokenizer.pad_token_id is None or tokenizer.pad_token_id == tokenizer.eos_token_id:
        raise InputError("The tokenizer's pad token must be set and differ from eos, or no reply would end.")
    if ref_model is model:
        raise InputError("ref_model is the policy itself. Pass a copy, or None.")
    if reward_model is not None and value_model is reward_model:
        raise InputError("value_model is the reward model itself, so training would change the reward. Pass a copy.")
    if reward_model is None and not reward_funcs:
        raise InputError("PPO needs a reward: pass reward_model or reward_funcs.")


def _disable_dropout(model: nn.Module) -> None:
    """No dropout anywhere, or the ratio of new to old probabilities would not start at 1."""
    disable_dropout_in_model(model)
    for module in model.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):  # attention reads it on every forward
            module.attention_dropout = 0.0


def _checkpoint_activations(model: PreTrainedModel | PeftModel | None, args: PPOConfig) -> None:
    """Trade compute for memory in the update: recompute activations instead of keeping them."""
    if model is not None:
        inner = model.get_base_model() if isinstance(model, PeftModel) else model
        inner.enable_input_require_grads()
        inner.activation_checkpointing_enable(args.activation_checkpointing_kwargs or {"use_reentrant": False})


class PPOTrainer(TRLPPOTrainer):
    """Proximal policy optimization of a language model (https://arxiv.org/abs/1707.06347, 1909.08593, 2009.01325).

    The constructor takes what TRL's takes, in the same order. What differs: `value_model` may be None (the value
    function is then a head on the policy's trunk), `reward_funcs` may replace `reward_model`, and the dataset
    may carry `prompt` and other columns beside `input_ids`, which reward functions receive.

    Args:
        args: the configuration.
        processing_class: the policy's tokenizer; its pad token has to differ from eos.
        model: the policy, a causal language model or a PeftModel of one.
        ref_model: the reference. None with PEFT: adapter `args.ref_adapter_name`, or the model with adapters off; None
            without PEFT: a frozen copy of the policy.
        reward_model: a sequence classifier with one output that shares the policy's tokenizer.
        train_dataset: rows with `input_ids` (token ids of a prompt).
        value_model: a sequence classifier with one output, trained as the value function.
        data_collator, eval_dataset: taken for TRL's sake; prompts are always padded on the left, and models compared
            with eval/compare.py.
        reward_funcs: functions `(prompts, completions, **columns) -> list[float]`; scores are summed.

    Raises:
        InputError: if pad equals eos, no reward is given, or the dataset has no prompts.
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
    ) -> None:
        _check(processing_class, model, ref_model, reward_model, value_model, train_dataset, reward_funcs)
        if peft_config is not None:
            model = get_peft_model(model, peft_config)
        self.is_peft_model = isinstance(model, PeftModel)
        if ref_model is None and not self.is_peft_model:
            ref_model = create_reference_model(model)
        for module in (model, ref_model, reward_model, value_model):
            if module is not None:
                _disable_dropout(module)
        if args.activation_checkpointing:
            _checkpoint_activations(model, args)
            _checkpoint_activations(value_model, args)
        self.policy_model, self.ref_model, self.value_model = model, ref_model, value_model
        self.model_adapter_name, self.ref_adapter_name = args.model_adapter_name or "default", args.ref_adapter_name
        self.reward_funcs = list(reward_funcs or [])
        if reward_model is not None:
            self.reward_funcs.append(RewardModel(reward_model, processing_class, args.per_device_eval_batch_size))
        self.reward_model = reward_model
        self.stop_token_id = processing_class.eos_token_id if args.stop_token == "eos" else args.stop_token_id
        # past TRL's own constructor, which builds an Accelerator and a wrapper of its own, to transformers' Trainer:
        # with that come mixed precision, callbacks, reporting and the schedules that TRL's class ignores
        Trainer.__init__(
            self,
            model=PolicyAndValue(model, value_model),
            args=args,
            data_collator=data_collator,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        if self.is_fsdp_enabled or self.is_deepspeed_enabled:
            raise InputError("PPO runs on one process or under DDP; FSDP and DeepSpeed don't work with it yet.")
        self.train_dataset_len = len(self.train_dataset)
        self._set_sizes()
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
        self.seconds: dict[str, float] = {}
        self.reward_scale: tuple[float, float] | None = None  # mean and standard deviation of the first batch

    def _set_sizes(self) -> None:
        """Fill in the batch sizes that TRL's PPOConfig derives from the others."""
        args = self.args
        if args.total_episodes is None:
            args.total_episodes = int(args.num_train_epochs * self.train_dataset_len)
        args.world_size = self.accelerator.num_processes
        args.local_batch_size = args.per_device_train_batch_size * args.gradient_accumulation_steps
        args.micro_batch_size = args.per_device_train_batch_size * args.world_size
        args.batch_size = args.local_batch_size * args.world_size
        args.mini_batch_size = args.batch_size // args.num_mini_batches
        args.local_mini_batch_size = args.local_batch_size // args.num_mini_batches
        if args.max_steps > 0:
            args.total_episodes = args.max_steps * args.batch_size
        args.num_total_batches = math.ceil(args.total_episodes / args.batch_size)

    # ------------------------------------------------------------------------------------------ the algorithm

    def train(self, resume_from_checkpoint: str | None = None) -> None:
        """Run PPO for `args.total_episodes` episodes, rounded up to whole batches.

        Args:
            resume_from_checkpoint: folder of a checkpoint of this run to go on from.
        """
        self._begin(resume_from_checkpoint)
        for rows in self.prompts():
            rollout = self.rollout(rows)  # the policy samples completions
            scored = self.score(rollout)  # reward, values, reference logprobs
            advantages = self.advantages(rollout, scored)  # KL penalty, GAE, whitening
            stats = self.update(rollout, scored, advantages)
            self.record(rollout, scored, advantages, stats)  # log, checkpoint, stop
        self.control = self.callback_handler.on_train_end(self.args, self.state, self.control)

    def prompts(self) -> Iterator[list[dict[str, Any]]]:
        """This process's rows of the dataset, one batch per update."""
        args = self.args
        while self.state.global_step < args.num_total_batches and not self.control.should_training_stop:
            order = prompt_order(self.train_dataset_len, self.state.episode, args.batch_size, args.seed)
            start = self.accelerator.process_index * args.local_batch_size
            yield [self.train_dataset[number] for number in order[start : start + args.local_batch_size]]

    def rollout(self, rows: list[dict[str, Any]]) -> Rollout:
        """Sample one completion per prompt."""
        with self._timed("rollout"), self._policy() as policy:
            return sample_rollout(
                policy,
                self.processing_class,
                rows,
                response_length=self.args.response_length,
                temperature=self.args.temperature,
                stop_token_ids=[] if self.stop_token_id is None else [self.stop_token_id],
                batch_size=self.args.local_rollout_forward_batch_size,
                device=self.accelerator.device,
            )

    @torch.no_grad()
    def score(self, rollout: Rollout) -> Scored:
        """Scores of the completions, and logprobs and values of their tokens before the update."""
        with self._timed("reward"):
            raw_scores = self.rewards(rollout)
        scores = self.normalized(raw_scores)
        if self.args.missing_eos_penalty is not None:
            scores[~rollout.ended] -= self.args.missing_eos_penalty
        with self._timed("logprobs"), self.accelerator.autocast():
            logprobs, values, reference = self._before_update(rollout)
        return Scored(raw_scores, scores, logprobs, reference, values)

    def normalized(self, raw_scores: torch.Tensor) -> torch.Tensor:
        """Scores (B,) on the scale of the first batch, if `args.normalize_reward`; (raw - mean) / std of that batch."""
        if not self.args.normalize_reward:
            return raw_scores.clone()
        if self.reward_scale is None:
            moments = torch.stack([raw_scores.mean(), (raw_scores**2).mean()])
            mean, squares = self.accelerator.reduce(moments, "mean").tolist()
            std = math.sqrt(max(0.0, squares - mean**2))
            self.reward_scale = (mean, std if std > 1e-6 else 1.0)
        mean, std = self.reward_scale
        return (raw_scores - mean) / std

    def _before_update(self, rollout: Rollout) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Logprobs, values and reference logprobs, (B, T), computed on rows of similar length at a time."""
        model, temperature = self.accelerator.unwrap_model(self.model).eval(), self.args.temperature
        results = [torch.zeros(rollout.completion_mask.shape, device=self.accelerator.device) for _ in range(3)]
        for rows in rollout.attention_mask.sum(1).argsort().split(self.args.per_device_train_batch_size):
            input_ids, attention_mask, length = trim(rollout, rows)
            policy = model(input_ids, attention_mask, length, temperature)
            reference = reference_logprobs(
                model.policy, self.ref_model, self.ref_adapter_name, input_ids, attention_mask, length, temperature
            )
            for result, part in zip(results, (policy.logprobs, policy.values, reference), strict=True):
                result[rows, :length] = part
        return results[0], results[1], results[2]

    def rewards(self, rollout: Rollout) -> torch.Tensor:
        """Scores (B,) float32: the sum of all reward functions."""
        total = torch.zeros(len(rollout.completions), device=self.accelerator.device)
        for function in self.reward_funcs:
            scores = function(rollout.prompts, rollout.completions, **rollout.columns)
            total += torch.tensor(check_scores(function, scores, rollout.completions), device=total.device)
        return total

    def advantages(self, rollout: Rollout, scored: Scored) -> Advantages:
        """KL penalty, generalized advantage estimation and whitening over the batch of all processes."""
        args = self.args
        return estimate_advantages(
            scored.scores,
            scored.logprobs,
            scored.reference_logprobs,
            scored.values,
            rollout.completion_mask,
            kl_coef=args.kl_coef,
            gamma=args.gamma,
            lam=args.lam,
            whiten_rewards=args.whiten_rewards,
            reduce=lambda sums: self.accelerator.reduce(sums, "sum"),
        )

    def update(self, rollout: Rollout, scored: Scored, advantages: Advantages) -> UpdateStats:
        """`num_ppo_epochs` × `num_mini_batches` optimizer steps."""
        args = self.args
        generator = torch.Generator().manual_seed(
            args.seed + 100_003 * self.accelerator.process_index + 7 * self.state.global_step
        )
        batches = minibatches(
            len(rollout.input_ids),
            args.num_ppo_epochs,
            args.num_mini_batches,
            args.per_device_train_batch_size,
            generator,
        )
        with self._timed("update"):
            return update(
                self._forward,
                self._step,
                rollout,
                scored,
                advantages,
                batches,
                backward=self._backward,
                count_tokens=lambda count: float(self.accelerator.reduce(count.float(), "mean")),
                temperature=args.temperature,
                cliprange=args.cliprange,
                cliprange_value=args.cliprange_value,
                vf_coef=args.vf_coef,
            )

    def _forward(self, *inputs: Any) -> Any:
        self.model.train()
        with self.accelerator.autocast():
            return self.model(*inputs)

    def _backward(self, loss: torch.Tensor, last: bool) -> None:
        with nullcontext() if last else self.accelerator.no_sync(self.model):
            self.accelerator.backward(loss)

    def _step(self) -> float:
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        limit = self.args.max_grad_norm if self.args.max_grad_norm and self.args.max_grad_norm > 0 else math.inf
        norm = self.accelerator.clip_grad_norm_(parameters, limit)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return float(norm)

    # ------------------------------------------------------------------------------------------ before, after, around

    def _begin(self, resume_from_checkpoint: str | None) -> None:
        args, state = self.args, self.state
        state.global_step, state.episode, state.max_steps = 0, 0, args.num_total_batches
        state.num_train_epochs = args.total_episodes / self.train_dataset_len
        state.compute_steps(args, args.num_total_batches)
        if resume_from_checkpoint:
            self._load_checkpoint(Path(resume_from_checkpoint))
        else:
            from accelerate.utils import set_seed

            set_seed(args.seed + 100_003 * self.accelerator.process_index)
        self.control = self.callback_handler.on_train_begin(args, state, self.control)

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = self.seconds.get(phase, 0.0) + time.perf_counter() - start

    @contextmanager
    def _policy(self) -> Iterator[nn.Module]:
        """The policy, ready to generate."""
        policy = self.accelerator.unwrap_model(self.model).policy.eval()
        with self.accelerator.autocast():
            yield policy

    def record(self, rollout: Rollout, scored: Scored, advantages: Advantages, stats: UpdateStats) -> None:
        """Log the update, move the schedule on, save a checkpoint if it is due."""
        args = self.args
        self.state.episode += args.batch_size
        self.state.global_step += 1
        self.state.epoch = self.state.episode / self.train_dataset_len
        metrics = self._metrics(rollout, scored, advantages, stats)
        self.lr_scheduler.step()
        self.control = self.callback_handler.on_step_end(args, self.state, self.control)
        if self.control.should_log or self.state.global_step in (1, args.num_total_batches):
            self.log(metrics)
        if args.num_sample_generations > 0:
            every = max(1, args.num_total_batches // args.num_sample_generations)
            if self.state.global_step % every == 0 and self.is_world_process_zero():
                print_prompt_completions_sample(
                    rollout.prompts,
                    rollout.completions,
                    {"score": scored.raw_scores.tolist()},
                    None,
                    self.state.global_step,
                    num_samples=3,
                )
        if self.control.should_save:
            self._save_ppo_checkpoint()
            self.control = self.callback_handler.on_save(args, self.state, self.control)

    def _metrics(
        self, rollout: Rollout, scored: Scored, advantages: Advantages, stats: UpdateStats
    ) -> dict[str, float]:
        mask = rollout.completion_mask

        def mean(values: torch.Tensor) -> float:
            return float(self.accelerator.reduce(values.float().mean(), "mean"))

        kl = ((scored.logprobs - scored.reference_logprobs) * mask).sum(1)
        non_score = advantages.kl_rewards.sum(1)
        error = ((advantages.returns - scored.values) * mask)[mask].var(unbiased=False)
        explained = 1 - error / advantages.returns[mask].var(unbiased=False).clamp(min=1e-8)
        metrics = {
            "objective/kl": mean(kl),
            "objective/entropy": mean((-scored.logprobs * mask).sum(1)),
            "objective/non_score_reward": mean(non_score),
            "objective/rlhf_reward": mean(non_score + scored.scores),
            "objective/scores": mean(scored.scores),
            "objective/raw_scores": mean(scored.raw_scores),
            "objective/kl_coef": self.args.kl_coef,
            "policy/approxkl_avg": stats.approxkl,
            "policy/clipfrac_avg": stats.clipfrac,
            "policy/entropy_avg": stats.entropy,
            "policy/grad_norm": stats.grad_norm,
            "loss/policy_avg": stats.policy_loss,
            "loss/value_avg": stats.value_loss,
            "val/clipfrac_avg": stats.value_clipfrac,
            "val/ratio": stats.ratio,
            "val/ratio_var": stats.ratio_var,
            "val/first_ratio": stats.first_ratio,
            "val/explained_variance": mean(explained),
            "val/num_eos_tokens": float(self.accelerator.reduce(rollout.ended.float().sum(), "sum")),
            "completions/mean_length": mean(mask.sum(1)),
            "lr": self.lr_scheduler.get_last_lr()[0],
            "episode": self.state.episode,
            "eps": self.args.batch_size / max(1e-9, sum(self.seconds.values())),
            **{f"time/{phase}": seconds for phase, seconds in self.seconds.items()},
        }
        self.seconds.clear()
        return metrics

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
        folder = Path(self.args.output_dir) / f"checkpoint-{self.state.global_step}"
        working = folder.with_name(f"writing-{folder.name}")
        checkpoint.save_random_state(working, self.accelerator.process_index)
        if self.args.should_save:
            state = {"step": self.state.global_step, "episode": self.state.episode, "log": self.state.log_history}
            state["reward_scale"] = self.reward_scale
            model = self.accelerator.unwrap_model(self.model)
            checkpoint.save(working, model, self.optimizer, self.lr_scheduler, state)
            self.save_model(str(working))
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            if folder.exists():
                shutil.rmtree(folder)  # an earlier checkpoint of this step, from before a resume
            os.replace(working, folder)
            self._drop_old_checkpoints()
        self.accelerator.wait_for_everyone()

    def _drop_old_checkpoints(self) -> None:
        limit = self.args.save_total_limit
        found = checkpoints(self.args.output_dir)
        for old in found[:-limit] if limit else []:
            shutil.rmtree(old)

    def _load_checkpoint(self, folder: Path) -> None:
        model = self.accelerator.unwrap_model(self.model)
        state = checkpoint.load(folder, model, self.optimizer, self.lr_scheduler, self.accelerator.process_index)
        self.state.global_step, self.state.episode = state["step"], state["episode"]
        self.state.log_history = state["log"]
        self.reward_scale = state["reward_scale"] and tuple(state["reward_scale"])
