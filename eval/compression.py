"""Compression: bits per byte of held-out text, for language models, xz and an n-gram model.

    accelerate launch eval/compression.py
    accelerate launch eval/compression.py --models mine=outputs/pretrain starter=starter --max_texts 400 \
        --output_dir outputs/compression

A model that gives a text the probability p can store it in -log2(p) bits. So prediction is compression, and tokenizers
don't matter. Every byte counts, including the first token of a text and its end. `xz` is `xz -9` on all the texts in
one file; `xz_primed` is the growth of the compressed training text when the texts follow it; `3-gram` is an
interpolated Kneser-Ney model of the training text over the tokens of the first of --models. Written: results.json
({mean, low, high, n} of each; intervals are bootstrapped over texts) and compression.png.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

import functools
import sys
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table
from trl import ModelConfig

from eval.drawing.figures import compression_figure, save_figure
from eval.measuring.bits import bits_per_byte, in_groups, ngram_bits, xz_bits
from eval.measuring.replies import use_model
from eval.report import write_report
from eval.stats.intervals import Interval, JsonObject, interval
from rlhf.data.datasets import DatasetArguments, load_splits
from rlhf.data.rows import texts_of
from rlhf.errors import InputError, report_errors
from rlhf.models.sources import (
    Source,
    base_config,
    context_length,
    is_decoder,
    named_models,
    refuse_single_model,
    resolve,
)
from rlhf.models.tokenizers import load_tokenizer
from rlhf.run.files import write_json
from rlhf.run.folders import finish_run, start_run
from rlhf.run.processes import need_one_process
from rlhf.run.ranges import AtLeastTwo, PositiveInt

GROUPS = 50  # groups of texts over which xz is bootstrapped: its output's size is known only after each group


@dataclass
class CompressionArguments:
    """What is compared, on which texts."""

    models: list[str] = field(default_factory=list, metadata={"help": "name=model pairs; the first one's tokenizer is "
                                                                      "the n-gram model's."})  # fmt: skip
    ngram_order: PositiveInt = field(default=3, metadata={"help": "Order of the n-gram model."})
    max_texts: AtLeastTwo = field(default=200, metadata={"help": "Use at most this many held-out texts."})
    max_length: AtLeastTwo = field(
        default=1024, metadata={"help": "Longest window in tokens; a model's context if shorter."}
    )
    per_device_eval_batch_size: PositiveInt = field(default=4, metadata={"help": "Windows to score at once."})
    output_dir: str = field(default="outputs/compression", metadata={"help": "Folder for results.json."})
    trust_remote_code: bool = field(default=False, metadata={"help": "Run code that a Hub model brings along."})


def by_groups(cell: Interval, groups: int) -> Interval:
    """A mean over texts, bootstrapped over groups of texts."""
    assert cell.sample is not None
    columns = (cell.sample.values, cell.sample.weights)
    values, weights = ([sum(group) for group in in_groups(column, groups)] for column in columns)
    return interval(values, weights)


def measure_compression(
    sources: dict[str, Source], train: list[str], texts: list[str], args: CompressionArguments, model_args: ModelConfig
) -> dict[str, Interval]:
    """Bits per byte of every model, the n-gram model and xz."""
    sizes = [float(len(text.encode())) for text in texts]
    # first, since an order may be too large for the vocabulary
    bits, _ = ngram_bits(load_tokenizer(next(iter(sources.values()))), train, texts, args.ngram_order)
    cells = {}
    for name, source in sources.items():
        window = min(args.max_length, context_length(source) or args.max_length)
        text_bits = functools.partial(
            bits_per_byte, texts=texts, max_length=window, batch_size=args.per_device_eval_batch_size
        )
        cells[name] = use_model(source, model_args, text_bits)
    cells[f"{args.ngram_order}-gram"] = interval(bits, sizes)
    in_bytes = [sum(group) for group in in_groups(sizes, GROUPS)]
    cells["xz_primed"] = interval(xz_bits(texts, train, GROUPS), in_bytes)
    cells["xz"] = interval(xz_bits(texts, [], GROUPS), in_bytes)
    return cells


def refuse_look_ahead(name: str, source: Source) -> None:
    """Raise InputError unless the model predicts each token from those before it."""
    config = base_config(source)
    if config.is_encoder_decoder or not (is_decoder(config) or getattr(config, "is_decoder", False)):
        raise InputError(
            f"--models {name}={source.name}: a {config.model_type} sees the whole text, so it gives no probability of "
            "the text. Give causal language models."
        )


def differences_to_others(cells: dict[str, Interval], models: list[str]) -> dict[str, Interval]:
    """Paired differences of each model to everything else, `<model>_minus_<other>`."""
    differences = {}
    for name in models:
        for other, cell in cells.items():
            if other != name:
                own = cells[name] if cells[name].n == cell.n else by_groups(cells[name], GROUPS)
                differences[f"{name}_minus_{other}"] = own.minus(cell)
    return differences


def print_table(results: JsonObject) -> None:
    """Bits per byte, and the first model's minus the others'."""
    first = next(iter(results["bits_per_byte"]))
    table = Table(title=f"Bits per byte of {results['texts']} held-out texts ({results['bytes']:,} bytes)")
    for heading in ("", "bits per byte", f"{first} less this"):
        table.add_column(heading)
    for name, cell in results["bits_per_byte"].items():
        less = results["differences"].get(f"{first}_minus_{name}")
        table.add_row(name, f"{Interval.from_json(cell):.3f}", f"{Interval.from_json(less):+.3f}" if less else "")
    Console(width=None if sys.stdout.isatty() else 100).print(table)


def main() -> None:
    script_args, args, model_args = parse(__file__, DatasetArguments, CompressionArguments, ModelConfig)
    need_one_process(__file__)
    refuse_single_model(model_args)
    trust = args.trust_remote_code
    # the results' other rows
    pairs = named_models(args.models, taken=("xz", "xz_primed", f"{args.ngram_order}-gram"))
    sources = {name: resolve(path, "--models", trust_remote_code=trust) for name, path in pairs}
    for name, source in sources.items():
        refuse_look_ahead(name, source)
    train, test = load_splits(script_args, "pretrain")
    train, test = (texts_of(split, script_args.dataset_name) for split in (train, test))
    test = test[: args.max_texts]
    if not start_run(__file__, args.output_dir, script_args, args, model_args):
        return

    cells = measure_compression(sources, train, test, args, model_args)
    differences = differences_to_others(cells, list(sources))
    results = {
        "bits_per_byte": {name: cell.to_json() for name, cell in cells.items()},
        "differences": {name: cell.to_json() for name, cell in differences.items()},
        "texts": len(test),
        "bytes": sum(len(text.encode()) for text in test),
        "training_bytes": sum(len(text.encode()) for text in train),
    }
    folder = Path(args.output_dir)
    write_json(folder / "results.json", results)
    save_figure(compression_figure(results), folder / "compression.png")
    print_table(results)
    finish_run(args.output_dir, {f"bits_per_byte/{name}": cell.mean for name, cell in cells.items()})
    write_report(args.output_dir)


if __name__ == "__main__":
    with report_errors():
        main()
