"""What PPOTrainer does as every Trainer does: callbacks, logs, evaluation, checkpoints, the Hub."""

import copy
import math
import time
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import set_seed
from datasets import Dataset
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, ReduceLROnPlateau
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase, TrainerControl
from transformers.optimization import GreedyLR
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import HubStrategy, TrainOutput, speed_metrics
from transformers.utils import PushInProgress
from trl.trainer.utils import print_prompt_completions_sample

from rlhf.data.paths import need_checkpoint
from rlhf.errors import InputError
from rlhf.ppo.checkpoint import (
    Progress,
    load_checkpoint,
    load_weights,
    save_checkpoint,
    save_random_state,
)
from rlhf.ppo.config import PPOConfig
from rlhf.ppo.evaluation import best_metric, note_best
from rlhf.ppo.model import PolicyAndValue
from rlhf.ppo.monitor import remarks, without_repeats
from rlhf.ppo.rollout import PromptSampler
from rlhf.ppo.setup import EvalDataset
from rlhf.ppo.sharding import gather, is_sharded, optimizer_state, policy_part
from rlhf.ppo.types import Rollout, Scored, UpdateStats
from rlhf.ppo.upstream import OnlineTrainerState, TRLPPOTrainer
from rlhf.ppo.value_function import save_value_function
from rlhf.rewards import RewardEnsemble, RewardFunction, RewardScale, with_own
from rlhf.run.checkpoints import atomic_folder, checkpoint_folder, delete_old_checkpoints, last_checkpoint
from rlhf.run.saving import make_savable, need_room


class TrainerConventions(TRLPPOTrainer):
    """The part of PPOTrainer that is not the algorithm. A step, in logs and callbacks, is one update."""

    # narrower than transformers declares them
    args: PPOConfig
    state: OnlineTrainerState
    control: TrainerControl
    model: PolicyAndValue
    model_wrapped: nn.Module  # by DDP, if there are several processes
    optimizer: Optimizer
    lr_scheduler: LRScheduler
    processing_class: PreTrainedTokenizerBase
    # set by PPOTrainer
    train_dataset_len: int
    is_peft_model: bool
    model_adapter_name: str
    stop_token_ids: list[int]
    reward_funcs: list[RewardFunction]
    eval_reward_funcs: list[RewardFunction]
    reward_scale: RewardScale | None
    kl_coef: float
    mixed_precision: str
    # of the run that goes on
    has_begun: bool
    push_in_progress: PushInProgress | None
    last_metrics: dict[str, float]  # of the last update
    reward_metrics: dict[str, list[float]]  # what reward functions logged since the last log
    remarked: dict[str, int]  # the update of the monitor's last remark, by rule
    _created_lr_scheduler: bool

    # ------------------------------------------------------------------------------------------ begin and end

    def _begin(self, resume_from_checkpoint: str | bool | None) -> None:
        """Start a run from its beginning or from a checkpoint. Nothing is left of an earlier run, here or elsewhere."""
        args = self.args
        self.start_time = time.time()
        self._claim_shared_state()
        self.model.zero_grad()
        self.state = state = OnlineTrainerState(
            max_steps=args.num_total_batches,
            num_train_epochs=args.total_episodes / self.train_dataset_len,
            is_local_process_zero=self.is_local_process_zero(),
            is_world_process_zero=self.is_world_process_zero(),
            stateful_callbacks=self._stateful_callbacks(),
            train_batch_size=args.per_device_train_batch_size,
        )
        state.episode = 0
        state.compute_steps(args, args.num_total_batches)
        if self.has_begun and self._created_lr_scheduler:  # the schedule of an earlier call has ended
            self.lr_scheduler = None
            self.create_scheduler(args.num_total_batches)
        self.reward_scale, self.kl_coef, self.remarked = None, args.kl_coef, {}
        for ensemble in self.ensembles():
            ensemble.scales = None
        self.last_metrics, self.reward_metrics, self.loss_sum = {}, {}, 0.0
        set_seed(args.seed + 100_003 * self.accelerator.process_index)
        make_savable(self.model.policy, self.processing_class)
        need_room(args, self.model, copies=2)  # what PPO trains, and the policy for others to load
        folder = self._checkpoint_to_resume(resume_from_checkpoint)
        if folder is not None:
            self._resume(folder)
            if state.global_step >= args.num_total_batches and self.is_world_process_zero():
                print(f"{folder} is at step {state.global_step}, and this run ends at step {args.num_total_batches}: "
                      "nothing is left to train.")  # fmt: skip
        self.is_in_train, self.has_begun, self.first_step = True, True, state.global_step
        handler = self.callback_handler
        handler.model, handler.optimizer, handler.lr_scheduler = self.model, self.optimizer, self.lr_scheduler
        handler.train_dataloader = self.get_train_dataloader()
        self.control = handler.on_train_begin(args, self.state, self.control)
        if args.eval_on_start and folder is None:
            if self.ensembles():
                self.measure_ensembles()
            self.evaluate()

    def _claim_shared_state(self) -> None:
        """accelerate has one state for all trainers of a process; set what another trainer may have left in it.

        After an exception in the middle of a gradient accumulation, `sync_gradients` stays False, and every
        optimizer step would be skipped without a word.
        """
        self.accelerator.gradient_state._set_sync_gradients(True)
        # this trainer weights the loss of each microbatch itself, so accelerate must not divide it again
        self.accelerator.gradient_accumulation_steps = 1
        self.accelerator.state._mixed_precision = self.mixed_precision

    def ensembles(self) -> list[RewardEnsemble]:
        """The reward functions that have scales of their own."""
        functions = [*self.reward_funcs, *self.eval_reward_funcs]
        return [function for function in functions if isinstance(function, RewardEnsemble)]

    def _stateful_callbacks(self) -> list[ExportableState]:
        return [part for part in [*self.callback_handler.callbacks, self.control] if isinstance(part, ExportableState)]

    def _end(self) -> TrainOutput:
        """Log the totals of this call, as Trainer does. Rewards, KL and so on are in `state.log_history`."""
        args, state = self.args, self.state
        steps = state.global_step - self.first_step
        metrics = speed_metrics("train", self.start_time, num_samples=steps * args.batch_size, num_steps=steps)
        metrics["total_flos"] = state.total_flos  # 0: nothing counts them, as in GRPO
        metrics["train_loss"] = self.loss_sum / max(1, steps)
        self.log(metrics)
        if args.load_best_model_at_end and state.best_model_checkpoint:
            best = Path(state.best_model_checkpoint)
            load_weights(best, self.model)
            if self.is_world_process_zero():
                print(f"Kept the best checkpoint, {best.name}: {args.metric_for_best_model} {state.best_metric:.4g}.")
        self.control = self.callback_handler.on_train_end(args, state, self.control)
        self._finish_current_push()
        self.is_in_train = False
        return TrainOutput(state.global_step, metrics["train_loss"], metrics)

    # ------------------------------------------------------------------------------------------ data

    def get_train_dataloader(self) -> DataLoader:
        """This process's batches of prompts, lists of rows, from the episode at which the run stands."""
        args = self.args
        seed = args.seed if args.data_seed is None else args.data_seed
        sampler = PromptSampler(
            self.train_dataset_len, self.own_rows(), args.batch_size, self.state.episode, args.total_episodes, seed
        )
        return DataLoader(self.train_dataset, batch_sampler=sampler, collate_fn=list)

    def own_rows(self) -> range:
        """The row numbers of a batch that belong to this process."""
        start = self.accelerator.process_index * self.args.local_batch_size
        return range(start, start + self.args.local_batch_size)

    def get_eval_dataloader(self, eval_dataset: str | Dataset | None = None) -> DataLoader:
        """The evaluation prompts, in lists of rows. The name of one of several datasets is accepted too."""
        rows = self.eval_dataset if eval_dataset is None else eval_dataset
        rows = self.eval_dataset[rows] if isinstance(rows, str) else rows
        return DataLoader(rows, batch_size=self.args.per_device_eval_batch_size, collate_fn=list)

    # ------------------------------------------------------------------------------------------ after each update

    def count_update(self) -> None:
        """Count the episodes and the step of an update."""
        self.state.episode += self.args.batch_size
        self.state.global_step += 1
        self.state.epoch = self.state.episode / self.train_dataset_len

    def note_metrics(self, metrics: dict[str, float], scored: Scored, stats: UpdateStats) -> None:
        """Keep the numbers of an update for the log, and those that reward functions logged for their mean."""
        args = self.args
        self.last_metrics = metrics
        self.loss_sum += stats.policy_loss + args.vf_coef * stats.value_loss - args.entropy_coef * stats.entropy
        own = (scored.rewards.metrics if scored.rewards else None) or {}
        with_own(metrics, own)
        for name, value in own.items():
            self.reward_metrics.setdefault(name, []).append(value)

    def step_scheduler(self) -> None:
        """One step of the learning rate's schedule. Those that follow a metric take theirs at each evaluation."""
        if not isinstance(self.lr_scheduler, ReduceLROnPlateau | GreedyLR):
            self.lr_scheduler.step()

    def log_if_due(self) -> None:
        """Log an update if `logging_strategy` or a callback asks for it.

        Metrics of reward functions are means over the updates since the last log, as in GRPO.
        """
        if self.control.should_log:
            means = {name: sum(values) / len(values) for name, values in self.reward_metrics.items()}
            self.reward_metrics = {}
            self.log({**self.last_metrics, **means})
            self.report_problems()

    def print_samples_if_due(self, rollout: Rollout, scored: Scored) -> None:
        """Print three completions, `num_sample_generations` times in a run."""
        times, step = self.args.num_sample_generations, self.state.global_step
        every = max(1, self.args.num_total_batches // max(1, times))
        if times > 0 and step % every == 0 and self.is_world_process_zero():
            scores = {"score": scored.raw_scores.tolist()}
            extra = scored.rewards.extra if scored.rewards else None
            print_prompt_completions_sample(
                rollout.prompts, rollout.completions, scores, None, step, num_samples=3, extra=extra
            )

    def evaluate_if_due(self) -> None:
        """Evaluate if `eval_strategy` or a callback asks for it, and note whether this is the best step so far."""
        if self.control.should_evaluate:
            metrics = self._evaluate(trial=None, ignore_keys_for_eval=None)
            if note_best(self.args, self.state, metrics):
                self.control.should_save |= self.args.load_best_model_at_end or self.args.save_strategy == "best"
            self.report_problems()

    def save_if_due(self) -> None:
        """Save a checkpoint if `save_strategy` or a callback asks for it, or if it is the best one so far."""
        if self.control.should_save:
            self._save_checkpoint()
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
        self,
        eval_dataset: str | EvalDataset = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        """Sample a completion for every evaluation prompt, always with the same random numbers, and score them.

        Args:
            eval_dataset: prompts, or several datasets of them by name, or the name of one of the trainer's own.
            ignore_keys: must be None; there are no outputs to leave out.
            metric_key_prefix: of the metrics' names.

        Returns:
            `eval_score` (the training reward, raw), `eval_kl`, `eval_length`, `eval_ended`, `eval_rewards/<name>/mean`,
            what reward functions logged and, for functions that training never sees, `eval_held_out/<name>`; a table
            of completions goes to `<output_dir>/eval_samples/<step>.jsonl`.
        """
        sets = self.eval_dataset if eval_dataset is None else eval_dataset
        if sets is None:
            raise InputError("evaluate: there is no eval_dataset. Pass one, here or to PPOTrainer.")
        if ignore_keys:
            raise InputError("ignore_keys: an evaluation of PPO has no outputs to leave out.")
        if isinstance(sets, str):
            sets = {sets: self.eval_dataset[sets]} if isinstance(self.eval_dataset, dict) else {}
        if isinstance(sets, dict):
            metrics: dict[str, float] = {}
            for name, rows in sets.items():
                metrics |= self.evaluate(rows, metric_key_prefix=f"{metric_key_prefix}_{name}")
            if eval_dataset is None and metric_key_prefix == "eval":
                best_metric(self.args, metrics)
            return metrics
        start = time.time()
        self._claim_shared_state()
        rows = self.prompts_of(sets, "eval_dataset")
        self.callback_handler.eval_dataloader = self.get_eval_dataloader(rows)
        metrics = self.evaluate_prompts(rows, metric_key_prefix)
        steps = math.ceil(len(rows) / self.args.per_device_eval_batch_size / self.accelerator.num_processes)
        metrics |= speed_metrics(metric_key_prefix, start, num_samples=len(rows), num_steps=steps)
        if eval_dataset is None and metric_key_prefix == "eval":
            best_metric(self.args, metrics)  # refuses an unknown one
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def prompts_of(self, dataset: Dataset, name: str) -> Dataset:
        """The rows of a dataset with their tokens; see PPOTrainer."""
        raise NotImplementedError

    def measure_ensembles(self) -> None:
        """Set the scales of ensembles; see PPOTrainer."""
        raise NotImplementedError

    def evaluate_prompts(self, rows: Dataset, prefix: str) -> dict[str, float]:
        """Sample and score rows with tokens; see PPOTrainer."""
        raise NotImplementedError

    def predict(self, *_: object, **__: object) -> None:
        """Refused: PPO has no labels to predict.

        Raises:
            InputError: always.
        """
        raise InputError("predict: PPO has no labels. Use evaluate(dataset), or sample with trainer.model.policy.")

    # ------------------------------------------------------------------------------------------ checkpoints

    def _checkpoint_to_resume(self, asked: str | bool | None) -> Path | None:
        """The checkpoint that `train` was asked for; True means the newest whole one in `args.output_dir`."""
        if asked is None or asked is False:
            return None
        if asked is not True:
            need_checkpoint(asked)
            return Path(asked).expanduser()
        args = copy.copy(self.args)
        args.resume_from_checkpoint = True
        newest = last_checkpoint(args)
        if newest is None:
            raise InputError(f"resume_from_checkpoint: no whole checkpoint in {args.output_dir}. Leave it out.")
        return Path(newest)

    def _resume(self, folder: Path) -> None:
        rank = self.accelerator.process_index
        progress = load_checkpoint(folder, self.model, self.optimizer, self.lr_scheduler, rank)
        state, scale = self.state, progress["reward_scale"]
        state.global_step, state.episode, state.log_history = progress["step"], progress["episode"], progress["log"]
        state.epoch = state.episode / self.train_dataset_len
        state.best_metric, state.best_global_step, best = progress["best"]
        place = best and Path(self.args.output_dir) / Path(best).name  # the run folder may have moved
        state.best_model_checkpoint = str(place) if place and place.is_dir() else None
        self.reward_scale = None if scale is None else RewardScale(*scale)
        for ensemble, scales in zip(self.ensembles(), progress.get("ensemble_scales", []), strict=False):
            ensemble.scales = scales and [RewardScale(*own) for own in scales]
        self.kl_coef, self.remarked = progress["kl_coef"], progress["remarked"]
        # checkpoints of earlier versions lack what is asked for with `get`
        logged: dict[str, float] = next(
            (entry for entry in reversed(state.log_history) if "objective/raw_scores" in entry), {}
        )
        self.last_metrics, self.reward_metrics = progress.get("metrics", logged), progress.get("reward_metrics", {})
        state.stateful_callbacks = progress.get("callbacks", state.stateful_callbacks)
        self._load_callback_state()

    def _progress(self) -> Progress:
        state, best = self.state, self.state.best_model_checkpoint
        return {
            "step": state.global_step,
            "episode": state.episode,
            "log": state.log_history,
            "reward_scale": self.reward_scale,
            "ensemble_scales": [ensemble.scales for ensemble in self.ensembles()],
            "kl_coef": self.kl_coef,
            "remarked": self.remarked,
            "best": (state.best_metric, state.best_global_step, best and Path(best).name),
            "metrics": self.last_metrics,
            "reward_metrics": self.reward_metrics,
            "callbacks": OnlineTrainerState(stateful_callbacks=self._stateful_callbacks()).stateful_callbacks,
            "value_adapter": self.model.value_adapter,
        }

    def _save_checkpoint(self, model: nn.Module | None = None, trial: None = None) -> None:
        args, accelerator = self.args, self.accelerator
        folder = checkpoint_folder(args, self.state.global_step)
        weights, optimizer = gather(self.model), optimizer_state(self.model, self.optimizer)
        with atomic_folder(folder, args.should_save, accelerator.wait_for_everyone) as working:
            save_random_state(working, accelerator.process_index)
            if args.should_save:
                save_checkpoint(working, weights, optimizer, self.lr_scheduler, self._progress())
                self._save_policy(str(working), weights)
        if args.push_to_hub:
            self._push_from_checkpoint(str(folder))
        if args.should_save:
            best = self.state.best_model_checkpoint if args.metric_for_best_model else None
            delete_old_checkpoints(args.output_dir, args.save_total_limit, self.state.global_step, best)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Save the policy with its tokenizer (with LoRA one adapter), and the value function for another run."""
        own, folder = self.model.value_parameters(), output_dir or self.args.output_dir
        if is_sharded(self.model):
            weights = gather(self.model)
        else:  # the policy has its own itself
            weights = {name: p.detach().cpu() for name, p in self.model.named_parameters() if name in own}
        self._save_policy(folder, weights)
        if self.args.should_save and self.reward_scale is not None:
            values = {name: weight.contiguous() for name, weight in weights.items() if name in own}
            save_value_function(Path(folder), values, self.reward_scale, self.model)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_policy(self, folder: str, weights: dict[str, torch.Tensor]) -> None:
        """Write the policy and its tokenizer. `weights` are those that `gather` returns; read if sharded."""
        if not self.args.should_save:
            return
        settings: dict[str, Any] = {"selected_adapters": [self.model_adapter_name]} if self.is_peft_model else {}
        if is_sharded(self.model):
            settings["state_dict"] = policy_part(weights)
        self.model.policy.save_pretrained(folder, **settings)
        self.processing_class.save_pretrained(folder)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """Start to push the model as it is now, unless the last push goes on.

        Trainer's own push also sends its pickled arguments, which hold the Hub token.
        """
        args = self.args
        going_on = self.push_in_progress is not None and not self.push_in_progress.is_done()
        if args.hub_strategy == HubStrategy.END or (going_on and not args.hub_always_push):
            return
        message = f"Training in progress, step {self.state.global_step}"
        job = self.push_to_hub(commit_message=message, blocking=False, revision=args.hub_revision)
        self.push_in_progress = PushInProgress([job]) if self.is_world_process_zero() else None
