"""Which pictures a run has: the file each is drawn from, its name and its caption."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from eval.drawing.figures import (
    calibration_figure,
    comparison_figure,
    compression_figure,
    curves_figure,
    front_figure,
    in_context_figure,
    overoptimization_figure,
    positions_figure,
    reward_bench_figure,
    rounds_figure,
    save_figure,
    scaling_figure,
    sizes_figure,
    tax_figure,
    transfer_figure,
)
from eval.stats.intervals import JsonObject
from eval.stats.scaling_laws import SCALING_FILE
from rlhf.run.files import content_of, read_json


class Picture(NamedTuple):
    """A picture, drawn if the run's folder has the file `source` and `content` finds something in it."""

    source: str
    name: str
    content: Callable[[JsonObject], Any]  # returns the part of the source's content that is drawn, or None
    figure: Callable[[Any], Figure | None]
    caption: str  # with fields of what is drawn


PICTURES = (
    Picture("evaluation.json", "calibration.png", lambda found: found if "reliability" in found else None,
            calibration_figure, "On {n} held-out pairs: is the reward model right as often as it is sure?"),
    Picture("results.json", "comparison.png", lambda found: found if "models" in found else None,
            comparison_figure, "Win rates with 95% intervals."),
    Picture("results.json", "calibration.png", lambda found: found.get("reward_model"),
            calibration_figure, "The reward model beside the gold score, on {n} held-out pairs."),
    Picture("overoptimization.json", "overoptimization.png", lambda found: found, overoptimization_figure,
            "Scores against distance from the start, with 95% intervals and the curves of Gao et al. (2022). Where the "
            "gold score turns down while the proxy rises, the reward model has stopped telling the truth."),
    Picture("front.json", "front.png", lambda found: found, front_figure,
            "Mean scores by two rewards, with 95% intervals. No other model dominates one on the line, that is, is as "
            "good as it by both rewards and better by one."),
    Picture("rounds.json", "rounds.png", lambda found: found, rounds_figure,
            "Held-out scores after each round, with 95% intervals."),
    Picture("curves.json", "curves.png", lambda found: found["curves"], curves_figure,
            "Reward and KL of the completions of each update; thin lines are runs, thick ones the mean of a method."),
    Picture("results.json", "compression.png", lambda found: found if "bits_per_byte" in found else None,
            compression_figure, "Bits per byte of held-out text, with 95% intervals: fewer is better prediction."),
    Picture("results.json", "in_context.png", lambda found: found if "num_fewshot" in found else None,
            in_context_figure, "Accuracy with examples in the prompt, with 95% intervals."),
    Picture("instructgpt.json", "instructgpt.png", lambda found: found, sizes_figure,
            "Win rate against the largest SFT model, and ratings, by size; 95% intervals over prompts and seeds."),
    Picture("instructgpt.json", "tax.png", lambda found: found, tax_figure,
            "What PPO makes worse, against the gold score that it reaches; 95% intervals over prompts and seeds."),
    Picture("transfer.json", "transfer.png", lambda found: found, transfer_figure,
            "Held-out {score}, and its difference to {reference}, with 95% intervals."),
    Picture("reward_bench.json", "reward_bench.png", lambda found: found, reward_bench_figure,
            "How often {model} prefers the better reply, by category, with 95% intervals."),
    Picture(SCALING_FILE, "scaling.png", lambda found: found, scaling_figure,
            "Scaling laws: held-out loss against size, tokens and compute; the forecast with its 95% interval."),
    Picture(SCALING_FILE, "positions.png", lambda found: found.get("positions"), positions_figure,
            "Loss by position on {blocks} held-out blocks, with 95% bootstrap intervals."),
)  # fmt: skip


def draw_pictures(folder: Path) -> list[tuple[Path, str]]:
    """Draw what a run's results show into its folder.

    Returns:
        file and caption of each picture.
    """
    drawn = []
    for picture in PICTURES:
        source = read_json(folder / picture.source)
        with content_of(folder / picture.source):
            content = picture.content(source) if source else None
            figure = picture.figure(content) if content else None
            if figure is not None:
                caption = picture.caption.format(**content) if isinstance(content, dict) else picture.caption
                save_figure(figure, folder / picture.name)
                drawn.append((folder / picture.name, caption))
    return drawn
