"""One function for all starter data."""

from datasets import Dataset

from rlhf.starter.conversations import starter_dataset
from rlhf.starter.labeler import starter_preferences
from rlhf.starter.labels import finetuning_dataset
from rlhf.starter.problems import starter_problems


def starter_splits(part: str, config: str | None) -> dict[str, Dataset]:
    """The splits of one part of the starter.

    Args:
        part: `preference_pairs`, `finetune`, `problems`, or a part of rlhf/starter/conversations.py.
        config: `small`, `full`, for messages and replies also `moods`, for `finetune` the name of a task; None is the
            default.

    Raises:
        InputError: if `config` is unknown, or a package of the starter is missing.
    """
    if part == "preference_pairs":
        return {split: Dataset.from_list(rows) for split, rows in starter_preferences(config).items()}
    if part == "finetune":
        return dict(finetuning_dataset(config))
    if part == "problems":
        return dict(starter_problems(config))
    return dict(starter_dataset(part, config))
