"""transformers' Trainer with whole checkpoints, and with a check that there is room for them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypedDict, TypeVar, cast

import torch
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader, RandomSampler, Sampler
from transformers import Trainer
from transformers.trainer_callback import TrainerState
from transformers.trainer_pt_utils import nested_gather
from transformers.trainer_utils import TrainOutput

from rlhf.errors import InputError
from rlhf.run.checkpoints import atomic_folder, checkpoint_folder, delete_old_checkpoints
from rlhf.run.files import read_json, write_json
from rlhf.run.processes import main_process
from rlhf.run.saving import make_savable, need_room

STATE_FILE = "trainer_state.json"
LOG_FILE = "log.json"  # of a checkpoint: what the next entry of the log is made of
T = TypeVar("T", bound=Trainer)


class _Log(TypedDict, total=False):
    """Content of log.json: what the Trainer and TRL keep of the steps since the last entry of the log."""

    loss: float  # sum, mean over the processes
    last_step: int  # of the last entry
    metrics: dict[str, list[float]]
    noted: dict[str, list[float]]
    num_tokens: float  # trained on since the run began


class WholeCheckpoints(Trainer):
    """A Trainer whose checkpoints are written as a whole and carry digests.

    A checkpoint knows the best one by its name alone, so that a run folder may move. A resumed run logs what the
    undisturbed one does: it goes on counting TRL's `num_tokens`, its means are also over the steps before the
    checkpoint, and it makes no second evaluation at the start.
    """

    _writing: Path | None = None
    _resumed: _Log | None = None  # until the first epoch begins
    _resumed_from: str | None = None
    _sampler: Sampler | None = None
    _total_train_tokens: float  # of TRL's trainers for SFT and rewards, which don't save it
    _metrics: dict[str, Any]  # of TRL's trainers, whose log has the means of these lists
    _noted: dict[str, list[Any]]  # likewise, of our own trainers

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the Trainer's.

        Raises:
            InputError: if the disk has no room for two checkpoints and the model, a configuration can't be saved, or
                --dataloader_drop_last leaves nothing to train on.
        """
        if self.args.dataloader_drop_last and not len(self.get_train_dataloader()):
            batch = self.args.train_batch_size * self.args.world_size
            raise InputError(
                f"--dataloader_drop_last true: drops all {len(self.train_dataset)} rows, which fill no batch of "
                f"{batch}. Leave it off, or lower --per_device_train_batch_size."
            )
        make_savable(self.model, self.processing_class)
        need_room(self.args, self.model)
        eval_on_start = self.args.eval_on_start
        try:
            return super().train(*args, **kwargs)
        finally:
            self.args.eval_on_start = eval_on_start

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        """As the Trainer's; under FSDP2 embeddings are a unit of their own, which a class of layers must not hold.

        Raises:
            InputError: if FSDP2 can't spread such a model.
        """
        if not self.is_fsdp_enabled:
            return super()._prepare_for_training(*args, **kwargs)
        base = self.model.get_base_model() if isinstance(self.model, PeftModel) else self.model
        embeddings = base.get_input_embeddings()
        around = {type(part).__name__ for part in base.modules() if embeddings in part.children()}
        base._no_split_modules = [name for name in base._no_split_modules or [] if name not in around]
        sharing = [part for part in base.modules() if getattr(part, "weight", None) is embeddings.weight]
        try:
            if len(sharing) > 2:  # more than embeddings and head: torch would refuse it at the first step
                raise ValueError("its stacks share their embeddings")
            return super()._prepare_for_training(*args, **kwargs)
        except (TypeError, ValueError) as error:
            reason = " ".join(str(error).split())[:150]
            raise InputError(
                f"FSDP2 can't spread a model of type {base.config.model_type} ({reason}). Launch with "
                "recipes/accelerate/ddp.yaml or zero3.yaml."
            ) from error

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._writing is None else str(self._writing)

    def _get_dataloader(self, *args: Any, is_training: bool = False, **kwargs: Any) -> DataLoader:
        """As the Trainer's; --dataloader_drop_last drops no row of an evaluation."""
        drop_last = self.args.dataloader_drop_last
        self.args.dataloader_drop_last = drop_last and is_training
        try:
            return super()._get_dataloader(*args, is_training=is_training, **kwargs)
        finally:
            self.args.dataloader_drop_last = drop_last

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Sampler | None:
        self._sampler = super()._get_train_sampler(*args, **kwargs)
        return self._sampler

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        sampler: Any = self._sampler
        if hasattr(sampler, "generator") and not isinstance(sampler, RandomSampler):
            # accelerate draws the order of a RandomSampler from the seed and the epoch's number. TRL's RepeatSampler
            # and transformers' LengthGroupedSampler go on from the epoch before, which a resumed run has not seen.
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            sampler.generator = torch.Generator().manual_seed(seed + kwargs["epoch"])
        if self._resumed is not None:  # the Trainer sets these to 0 just before
            self._tr_loss += self._resumed["loss"]
            self._total_loss_scalar -= self._resumed["loss"]  # train_loss is that of this session
            self._globalstep_last_logged = self._resumed["last_step"]
            self._resumed = None
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        # resumed from its last checkpoint, within an epoch: the Trainer would train one more step
        self.control.should_training_stop = True

    def _finalize_training(self, *args: Any, **kwargs: Any) -> TrainOutput:
        if self.state.global_step == self._initial_global_step:
            # resumed without a step left; the Trainer reads the random state only before a step
            self._load_rng_state(self._resumed_from)
            if main_process():
                print(f"{self._resumed_from} is at step {self.state.global_step}, and this run ends at step "
                      f"{self.state.max_steps}: nothing is left to train.")  # fmt: skip
        return super()._finalize_training(*args, **kwargs)

    def _load_from_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        with self._fitting():
            super()._load_from_checkpoint(*args, **kwargs)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        with self._fitting():
            super()._load_optimizer_and_scheduler(checkpoint)

    @contextmanager
    def _fitting(self) -> Iterator[None]:
        """Refuse a checkpoint of another model. The run's own fits, or this is a bug.

        Raises:
            InputError: naming it.
        """
        asked = self.args.resume_from_checkpoint
        try:
            yield
        except (KeyError, RuntimeError, ValueError) as error:
            if not isinstance(asked, str) or not Path(asked).expanduser().is_dir():
                raise
            reason = " ".join(str(error).split())[:200]
            raise InputError(
                f"--resume_from_checkpoint {asked}: was made with another model or other flags, and doesn't fit "
                f"({reason}). Give a checkpoint of this run, or leave the flag out."
            ) from error

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        args, state = self.args, self.state
        folder, limit = checkpoint_folder(args, state.global_step), args.save_total_limit
        log = self._log_so_far()
        with atomic_folder(folder, args.should_save, self.accelerator.wait_for_everyone) as working:
            self._writing, args.save_total_limit = working.parent, None
            try:
                super()._save_checkpoint(model, trial)
            finally:
                self._writing, args.save_total_limit = None, limit
            if state.best_global_step == state.global_step:
                state.best_model_checkpoint = str(folder)
            if args.should_save:
                _save_state(state, working)
                write_json(working / LOG_FILE, log)
        if args.should_save:
            delete_old_checkpoints(args.output_dir, limit, state.global_step, state.best_model_checkpoint)

    def _log_so_far(self) -> _Log:
        """All processes call it."""
        loss = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()
        log: _Log = {"loss": loss, "last_step": self._globalstep_last_logged}
        if hasattr(self, "_metrics"):
            log["metrics"] = self._metrics["train"]
        if hasattr(self, "_noted"):
            log["noted"] = {name: [float(number) for number in numbers] for name, numbers in self._noted.items()}
        if hasattr(self, "_total_train_tokens"):
            log["num_tokens"] = self._total_train_tokens
        return log

    def _determine_best_metric(self, metrics: dict[str, float], trial: Any) -> bool:
        """As the Trainer's.

        Raises:
            InputError: if --metric_for_best_model isn't among the metrics.
        """
        try:
            return super()._determine_best_metric(metrics=metrics, trial=trial)
        except KeyError as error:
            names = ", ".join(sorted(name for name in metrics if name.startswith("eval_")))
            best = self.args.metric_for_best_model
            raise InputError(f"--metric_for_best_model {best}: isn't measured. Give one of {names}.") from error

    def save_model(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's. The tokenizer is saved without the limits of its last call, which a file would apply.

        That call may be another one in a resumed run: `datasets` keeps what it has tokenized.
        """
        tokenizer = getattr(self.processing_class, "backend_tokenizer", None)  # a fast one's
        if tokenizer is not None:
            tokenizer.no_truncation()
            tokenizer.no_padding()
        super().save_model(*args, **kwargs)

    def _save(self, output_dir: str | None = None, state_dict: dict[str, Any] | None = None) -> None:
        """As the Trainer's, with no token in training_args.bin, and with tied weights once.

        transformers knows them by their memory, of which those that FSDP has gathered share none.
        """
        if state_dict is not None:
            tied = getattr(self.accelerator.unwrap_model(self.model), "all_tied_weights_keys", {})
            state_dict = {name: value for name, value in state_dict.items() if tied.get(name) not in state_dict}
        token, self.args.hub_token = self.args.hub_token, None
        super()._save(output_dir, state_dict)
        self.args.hub_token = token

    def _init_training_state(self, *args: Any) -> Any:
        folder = self._resumed_from = args[3]  # resume_from_checkpoint
        with _without_warning("The best checkpoint"):
            begin = super()._init_training_state(*args)
        best = (read_json(Path(folder) / STATE_FILE) or {}).get("best_model_checkpoint") if folder else None
        if best:
            here = Path(self.args.output_dir) / Path(best).name
            self.state.best_model_checkpoint = str(here) if here.is_dir() else None
        if folder:
            self.args.eval_on_start = False  # `train` sets it back
            self._resumed = read_json(
                Path(folder) / LOG_FILE, loss=float, last_step=int
            )  # other programs' checkpoints have none
            if self._resumed and "metrics" in self._resumed:
                self._metrics["train"].update(self._resumed["metrics"])
            if self._resumed and "noted" in self._resumed:
                self._noted.update(self._resumed["noted"])
            if self._resumed and "num_tokens" in self._resumed:
                self._total_train_tokens = self._resumed["num_tokens"]
        return begin


def whole_checkpoints(trainer: type[T]) -> type[T]:
    """A trainer class of TRL or transformers, with whole checkpoints."""
    return cast(type[T], type(trainer.__name__, (WholeCheckpoints, trainer), {}))


def _save_state(state: TrainerState, folder: Path) -> None:
    best = state.best_model_checkpoint
    state.best_model_checkpoint = best and Path(best).name
    state.save_to_json(str(folder / STATE_FILE))
    state.best_model_checkpoint = best


@contextmanager
def _without_warning(beginning: str) -> Iterator[None]:
    """The Trainer looks for the best checkpoint by its name alone, in the current folder, and doesn't find it."""
    logger = logging.getLogger("transformers.trainer")

    def keep(record: logging.LogRecord) -> bool:
        return not record.getMessage().startswith(beginning)

    logger.addFilter(keep)
    try:
        yield
    finally:
        logger.removeFilter(keep)
