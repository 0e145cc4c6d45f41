"""A sweep over model sizes and amounts of text: its points, their texts, and the training of each point."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from rlhf.errors import InputError
from rlhf.models.lstm import matching_hidden_size
from rlhf.pretraining.tokenization import tokens_and_bytes
from rlhf.run.files import read_json, write_jsonl
from rlhf.run.folders import RUN_FILE, is_finished
from rlhf.run.parser import read_yaml
from rlhf.run.ranges import LearningRate, NonNegativeInt, PositiveInt, Seed, check_ranges
from rlhf.run.stages import check_stage, run_all

TEXTS = "texts"  # folder of each budget's text in the run folder
LAW_PARAMETERS = 3  # of L = E + (x_c / x)^alpha


@dataclass
class ScalingArguments:
    """Which models are trained on how much text, and which model's loss is forecast."""

    hidden_sizes: list[PositiveInt] = field(default_factory=list, metadata={"help": "Widths of the fitted models."})
    num_hidden_layers: list[PositiveInt] = field(
        default_factory=list, metadata={"help": "Layers of the fitted models, one number for each width."}
    )
    token_budgets: list[PositiveInt] = field(
        default_factory=list, metadata={"help": "Training tokens; every fitted model is trained on every budget."}
    )
    forecast_hidden_size: PositiveInt = field(
        default=128, metadata={"help": "Width of the model whose loss is forecast."}
    )
    forecast_num_hidden_layers: PositiveInt = field(default=4, metadata={"help": "Layers of that model."})
    head_dim: PositiveInt = field(default=16, metadata={"help": "Width of an attention head; divides every width."})
    learning_rate: LearningRate = field(
        default=8e-3, metadata={"help": "Learning rate of the narrowest model; it falls as 1/width."}
    )
    lstm_num_hidden_layers: NonNegativeInt = field(
        default=2, metadata={"help": "Layers of the LSTM beside the largest fitted Transformer; 0 for none."}
    )
    lstm_learning_rate: LearningRate = field(default=1e-2, metadata={"help": "Learning rate of the LSTM."})
    base_config: str = field(
        default="recipes/configs/scaling_point.yaml", metadata={"help": "YAML of pretrain.py with all other settings."}
    )
    tokenizer_name: str = field(
        default="outputs/tokenizer", metadata={"help": "Folder of recipes/tokenizer.py, a Hub id, or 'starter'."}
    )
    max_eval_tokens: PositiveInt = field(default=100_000, metadata={"help": "Held-out tokens for the loss."})
    max_workers: PositiveInt = field(default=1, metadata={"help": "Models trained at once; they share the cores."})
    output_dir: str = field(default="outputs/scaling", metadata={"help": "Folder for the sweep."})
    seed: Seed = field(default=42, metadata={"help": "Seed of every model."})


class Point(NamedTuple):
    """One model of the sweep."""

    model_type: str
    hidden_size: int
    num_hidden_layers: int
    tokens: int
    learning_rate: float

    @property
    def name(self) -> str:
        return f"{self.model_type}-{self.hidden_size}x{self.num_hidden_layers}/{self.tokens}"


# ---------------------------------------------------------------------------------------------- checks


def check_sweep(args: ScalingArguments) -> None:
    """Refuse a sweep that can't be fitted, before anything is trained.

    Raises:
        InputError: naming the flag.
    """
    check_ranges(args)
    sizes, layers, budgets = args.hidden_sizes, args.num_hidden_layers, args.token_budgets
    for width in (*sizes, args.forecast_hidden_size):
        if width % args.head_dim:
            raise InputError(f"--head_dim {args.head_dim}: must divide every width; found {width}.")
    if len(sizes) != len(layers):
        raise InputError(
            f"--num_hidden_layers: {len(layers)} numbers for {len(sizes)} --hidden_sizes. Give one for each."
        )
    models = {depth * width**2 for width, depth in zip(sizes, layers, strict=True)}  # 1/12 of the fit's N
    for flag, what, count in (("hidden_sizes", "models (by layers * width^2)", len(models)),
                              ("token_budgets", "numbers", len(set(budgets)))):  # fmt: skip
        if count < LAW_PARAMETERS:
            raise InputError(
                f"--{flag}: {count} different {what}, fewer than the {LAW_PARAMETERS} parameters of the fit "
                f"L = E + (x_c / x)^alpha. Give at least {LAW_PARAMETERS}, better 5."
            )
    if args.forecast_num_hidden_layers * args.forecast_hidden_size**2 <= max(models):
        raise InputError(
            f"--forecast_hidden_size {args.forecast_hidden_size}: with {args.forecast_num_hidden_layers} layers no "
            "larger than the largest fitted model. Give a larger size: a forecast is for a size outside the fit."
        )


# ---------------------------------------------------------------------------------------------- points


def sweep_points(args: ScalingArguments) -> list[Point]:
    """Every size on every budget, smallest first."""
    models = sorted(set(zip(args.hidden_sizes, args.num_hidden_layers, strict=True)), key=lambda m: m[1] * m[0] ** 2)
    return [transformer_point(args, *model, tokens) for model in models for tokens in sorted(set(args.token_budgets))]


def transformer_point(args: ScalingArguments, hidden_size: int, num_hidden_layers: int, tokens: int) -> Point:
    """A Transformer whose learning rate falls as 1/width.

    A step of Adam changes every weight by about the learning rate, so a layer's output changes by learning rate times
    width. The best rate of one width is too high for a wider model, and one rate for all widths would bend the law.
    Source: Yang et al. 2022, table 3 (https://arxiv.org/abs/2203.03466), for hidden weights.
    """
    rate = args.learning_rate * min(args.hidden_sizes) / hidden_size
    return Point("gpt2", hidden_size, num_hidden_layers, tokens, rate)


def forecast_point(args: ScalingArguments) -> Point:
    """The model whose loss is forecast, on the largest budget."""
    return transformer_point(args, args.forecast_hidden_size, args.forecast_num_hidden_layers, max(args.token_budgets))


def lstm_point(args: ScalingArguments, parameters: int) -> Point:
    """An LSTM with about `parameters` non-embedding parameters, on the largest budget."""
    width = matching_hidden_size(parameters, args.lstm_num_hidden_layers)
    return Point("lstm", width, args.lstm_num_hidden_layers, max(args.token_budgets), args.lstm_learning_rate)


def cut_texts(
    train: list[str], test: list[str], tokenizer: PreTrainedTokenizerBase, args: ScalingArguments
) -> dict[int, dict[str, list[str]]]:
    """The text of each budget: the first texts that hold its tokens, so that one epoch is the budget.

    Returns:
        `train` and `test` texts by budget; all have the same test texts.

    Raises:
        InputError: if there is too little text for the largest budget.
    """
    lengths, _ = tokens_and_bytes(tokenizer, train)
    total = sum(lengths) + len(lengths)
    if max(args.token_budgets) > total:
        raise InputError(
            f"--token_budgets {max(args.token_budgets)}: the training text has {total} tokens, and none may be seen "
            "twice. Give a smaller budget, or more text (--dataset_config full, --dataset_name)."
        )
    held_out = _first(test, tokens_and_bytes(tokenizer, test)[0], args.max_eval_tokens)
    return {
        budget: {"train": _first(train, lengths, budget), "test": held_out}
        for budget in sorted(set(args.token_budgets))
    }


def write_texts(texts: dict[int, dict[str, list[str]]], output_dir: str) -> dict[int, Path]:
    """Write each budget's text as a dataset.

    Returns:
        folder of train.jsonl and test.jsonl, by budget.
    """
    folders = {budget: Path(output_dir) / TEXTS / str(budget) for budget in texts}
    for budget, splits in texts.items():
        for split, rows in splits.items():
            write_jsonl(folders[budget] / f"{split}.jsonl", [{"text": text} for text in rows])
    return folders


def _first(texts: list[str], lengths: list[int], tokens: int) -> list[str]:
    """The first texts with `tokens` tokens in all, counting an end token for each text.

    >>> _first(["a", "b", "c"], lengths=[3, 3, 3], tokens=5)
    ['a', 'b']
    """
    chosen: list[str] = []
    for text, length in zip(texts, lengths, strict=True):
        if tokens <= 0:
            break
        chosen.append(text)
        tokens -= length + 1
    return chosen


def train_points(
    args: ScalingArguments, points: list[Point], texts: dict[int, Path], script: Path
) -> list[dict[str, Any]]:
    """Train the points, `max_workers` at a time. Finished ones are skipped.

    Args:
        texts: folder of each budget's text.
        script: the recipe that trains one point.

    Returns:
        the results of each, see `describe_point`.

    Raises:
        InputError: if a run fails. Its own message is printed above.
    """
    runs = {folder_of(args, point): _flags_of(args, point, texts[point.tokens]) for point in points}
    run_all(script, args.base_config, runs, args.max_workers)
    return [describe_point(args, point) for point in points]


def _flags_of(args: ScalingArguments, point: Point, texts: Path) -> dict[str, Any]:
    """The flags with which recipes/pretrain.py trains a point."""
    return {
        **{name: getattr(point, name) for name in ("model_type", "hidden_size", "num_hidden_layers")},
        "num_attention_heads": 1 if point.model_type == "lstm" else point.hidden_size // args.head_dim,
        "learning_rate": point.learning_rate, "seed": args.seed, "tokenizer_name": args.tokenizer_name,
        "dataset_name": texts,
    }  # fmt: skip


def trained_points(args: ScalingArguments) -> list[Point]:
    """The points that are trained: with another --base_config they would be others, and are not trained again."""
    return [point for point in sweep_points(args) if is_finished(folder_of(args, point))]


def check_base_config(args: ScalingArguments, script: Path) -> None:
    """Refuse a --base_config that the recipe of the points wouldn't take, or that sets what the sweep sets.

    Args:
        script: the recipe that trains one point.

    Raises:
        InputError: naming the key.
    """
    point = sweep_points(args)[0]
    folder = folder_of(args, point)
    flags = _flags_of(args, point, folder)
    check_stage(script, "--base_config", args.base_config, folder, flags)
    if both := sorted(set(read_yaml(Path(args.base_config))) & set(flags)):
        raise InputError(f"--base_config {args.base_config}: {both[0]} is set for each point. Remove it from the file.")


def folder_of(args: ScalingArguments, point: Point) -> Path:
    """Run folder of a point."""
    return Path(args.output_dir) / "points" / point.name


# ---------------------------------------------------------------------------------------------- sizes and compute


def block_size_of(base_config: str) -> int:
    """Tokens in a row of packed text, from the YAML of pretrain.py, or its default 256."""
    return int(yaml.safe_load(Path(base_config).read_text(encoding="utf-8")).get("block_size", 256))


def transformer_parameters(hidden_size: int, num_hidden_layers: int) -> int:
    """N = 12 n_layer d_model², the non-embedding parameters of a Transformer with a feed-forward width of 4 d_model.

    >>> transformer_parameters(hidden_size=768, num_hidden_layers=12)
    84934656

    Source: Kaplan et al. 2020, equation 2.1 (https://arxiv.org/abs/2001.08361); biases and norms are left out.
    """
    return 12 * num_hidden_layers * hidden_size**2


def training_compute(parameters: int, tokens: int) -> int:
    """C = 6 N D, floating-point operations of training: 2 per parameter and token forward, 4 backward.

    >>> training_compute(parameters=1000, tokens=50)
    300000

    Source: Kaplan et al. 2020, section 2.1; attention to the context and the output projection are left out.
    """
    return 6 * parameters * tokens


def measured_flops(folder: Path, block_size: int) -> float | None:
    """Floating-point operations per token of a forward and backward pass, counted by torch; None for an LSTM.

    One row goes through a model with random weights. torch counts only matrix products, and none in an LSTM. Attention
    is eager, because torch does not count fused kernels everywhere.
    """
    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    if config.model_type == "lstm":
        return None
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", trust_remote_code=False)
    ids = torch.zeros(1, block_size, dtype=torch.int64)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return counter.get_total_flops() / block_size


def describe_point(args: ScalingArguments, point: Point) -> dict[str, Any]:
    """The results of a finished point.

    Returns:
        its settings; `parameters` (N = 12 n_layer d_model², or the counted ones of an LSTM) and `counted_parameters`
        (non-embedding); `tokens` (D, of the training); `compute` (6 N D) and `measured_compute`, FLOPs; `loss`, nats
        per token of held-out text; `bits_per_byte`; `tokens_per_second`.
    """
    metrics = read_json(folder_of(args, point) / RUN_FILE)["metrics"]
    counted, tokens = metrics["num_non_embedding_parameters"], metrics["train_tokens"]
    of_transformer = transformer_parameters(point.hidden_size, point.num_hidden_layers)
    size = counted if point.model_type == "lstm" else of_transformer
    per_token = measured_flops(folder_of(args, point), block_size_of(args.base_config))
    return {
        **point._asdict(), "name": point.name, "parameters": size, "counted_parameters": counted, "tokens": tokens,
        "compute": training_compute(size, tokens), "measured_compute": per_token and per_token * tokens,
        "loss": metrics["eval_loss"], "bits_per_byte": metrics["bits_per_byte"],
        "tokens_per_second": metrics["tokens_per_second"],
    }  # fmt: skip
