"""The `name=model` pairs of --models."""

from rlhf.errors import InputError


def split_pairs(words: list[str], example: str) -> list[tuple[str, str]]:
    """Name and model of each word.

    >>> split_pairs(["sft=outputs/sft"], "")
    [('sft', 'outputs/sft')]

    Args:
        example: for the error message, as it is written in a command line.

    Raises:
        InputError: if there is none, or one has no name or no model.
    """
    pairs = [(name, model) for name, _, model in (word.partition("=") for word in words)]
    if not pairs or not all(name and model for name, model in pairs):
        raise InputError(f"--models {' '.join(words)}: give name=model pairs, as in: {example}")
    return pairs


def read_named_models(words: list[str], example: str) -> dict[str, str]:
    """The models by name.

    Raises:
        InputError: as `split_pairs`, and if two have the same name.
    """
    pairs = split_pairs(words, example)
    if len(dict(pairs)) < len(pairs):
        raise InputError(f"--models {' '.join(words)}: give each model a name of its own, as in: {example}")
    return dict(pairs)
