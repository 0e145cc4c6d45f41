"""transformers' Trainer with whole checkpoints, and with a check that there is room for them."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar, cast

from torch import nn
from transformers import Trainer
from transformers.trainer_callback import TrainerState
from transformers.trainer_utils import TrainOutput

from rlhf.errors import InputError
from rlhf.run.checkpoints import atomic_folder, checkpoint_folder, delete_old_checkpoints
from rlhf.run.files import read_json, write_json
from rlhf.run.saving import make_savable, need_room

STATE_FILE = "trainer_state.json"
TOKENS_FILE = "num_tokens.json"  # of a checkpoint: tokens trained on so far
T = TypeVar("T", bound=Trainer)


class WholeCheckpoints(Trainer):
    """A Trainer whose checkpoints are written as a whole and carry digests.

    A checkpoint knows the best one by its name alone, so that a run folder may move. A resumed run logs what the
    undisturbed one does: it goes on counting TRL's `num_tokens`, and makes no second evaluation at the start.
    """

    _writing: Path | None = None
    _total_train_tokens: float  # of TRL's trainers for SFT and rewards, which don't save it

    def train(self, *args: Any, **kwargs: Any) -> TrainOutput:
        """As the Trainer's.

        Raises:
            InputError: if the disk has no room for two checkpoints and the model, or a configuration can't be saved.
        """
        make_savable(self.model, self.processing_class)
        need_room(self.args, self.model)
        eval_on_start = self.args.eval_on_start
        try:
            return super().train(*args, **kwargs)
        finally:
            self.args.eval_on_start = eval_on_start

    def _get_output_dir(self, trial: Any) -> str:
        return super()._get_output_dir(trial) if self._writing is None else str(self._writing)

    def _run_epoch(self, *args: Any, **kwargs: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            return super()._run_epoch(*args, **kwargs)
        # resumed from its last checkpoint, within an epoch: the Trainer would train one more step
        self.control.should_training_stop = True

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        args, state = self.args, self.state
        folder, limit = checkpoint_folder(args, state.global_step), args.save_total_limit
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
                if hasattr(self, "_total_train_tokens"):
                    write_json(working / TOKENS_FILE, {"num_tokens": self._total_train_tokens})
        if args.should_save:
            delete_old_checkpoints(args.output_dir, limit, state.global_step, state.best_model_checkpoint)

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

    def _save(self, *args: Any, **kwargs: Any) -> None:
        """As the Trainer's, with no token in training_args.bin."""
        token, self.args.hub_token = self.args.hub_token, None
        super()._save(*args, **kwargs)
        self.args.hub_token = token

    def _init_training_state(self, *args: Any) -> Any:
        folder = args[3]  # resume_from_checkpoint
        with _without_warning("The best checkpoint"):
            begin = super()._init_training_state(*args)
        best = (read_json(Path(folder) / STATE_FILE) or {}).get("best_model_checkpoint") if folder else None
        if best:
            here = Path(self.args.output_dir) / Path(best).name
            self.state.best_model_checkpoint = str(here) if here.is_dir() else None
        if folder:
            self.args.eval_on_start = False  # `train` sets it back
            if tokens := read_json(Path(folder) / TOKENS_FILE):  # other programs' checkpoints have none
                self._total_train_tokens = tokens["num_tokens"]
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
