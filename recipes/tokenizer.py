"""Tokenizer: learn byte-pair encoding from text, the first stage.

    accelerate launch recipes/tokenizer.py
    accelerate launch recipes/tokenizer.py --vocab_size 32000 --dataset_name roneneldan/TinyStories \
        --output_dir outputs/stories-tokenizer

Without arguments it reads recipes/configs/tokenizer.yaml: the starter conversations, seconds on a laptop. A dataset
needs a column `text` or `messages`. The fast tokenizer has pad, mask, cls, sep and T5's sentinel tokens and a chat
template, for recipes/pretrain.py and every later recipe. It can encode any text, because every byte is in the
vocabulary. The report compares bytes per token on held-out text with the starter's tokenizer, if that is installed.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

from dataclasses import dataclass, field

from eval.measuring.bits import bytes_per_token
from eval.report import write_report
from rlhf.data.datasets import DatasetArguments, load_splits
from rlhf.data.rows import texts_of
from rlhf.errors import report_errors
from rlhf.pretraining.tokenization import check_vocab_size, resolve_tokenizer, train_tokenizer
from rlhf.run.folders import finish_run, start_run
from rlhf.run.processes import need_one_process
from rlhf.run.ranges import NonNegativeInt, PositiveInt
from rlhf.starter.model import STARTER, starter_is_installed


@dataclass
class TokenizerArguments:
    """Size and content of the vocabulary."""

    vocab_size: PositiveInt = field(default=4096, metadata={"help": "Size: 256 bytes, special tokens and merges."})
    min_frequency: PositiveInt = field(default=2, metadata={"help": "Least number of occurrences of a merged pair."})
    extra_ids: NonNegativeInt = field(
        default=100, metadata={"help": "Sentinel tokens <extra_id_0>, ... for span corruption."}
    )
    model_max_length: PositiveInt = field(default=1024, metadata={"help": "Longest input of models, in tokens."})
    output_dir: str = field(default="outputs/tokenizer", metadata={"help": "Folder for the tokenizer."})


def main() -> None:
    # Arguments
    script_args, args = parse(__file__, DatasetArguments, TokenizerArguments)
    need_one_process(__file__)
    check_vocab_size(args.vocab_size, args.extra_ids)

    # Data
    train, test = load_splits(script_args, "pretrain")
    train, test = texts_of(train, script_args.dataset_name), texts_of(test, script_args.dataset_name)
    if not start_run(__file__, args.output_dir, script_args, args):
        return

    # Tokenizer
    tokenizer = train_tokenizer(train, args.vocab_size, args.min_frequency, args.extra_ids, args.model_max_length)
    if len(tokenizer) < args.vocab_size:
        print(f"{len(tokenizer)} tokens: no other pair occurs --min_frequency {args.min_frequency} times.")

    # Save, report
    tokenizer.save_pretrained(args.output_dir)
    cells = {"own": bytes_per_token(tokenizer, test)}
    if starter_is_installed():
        other = bytes_per_token(resolve_tokenizer(STARTER), test)
        cells |= {STARTER: other, "own less starter": cells["own"].minus(other)}
    metrics: dict[str, float] = {"vocab_size": len(tokenizer)}
    for name, cell in cells.items():
        print(f"{name:>16}: {cell:.2f} held-out bytes per token")
        ends = (("", cell.mean), ("_low", cell.low), ("_high", cell.high))
        metrics |= {f"bytes_per_token/{name}{end}": value for end, value in ends}
    finish_run(args.output_dir, metrics)
    write_report(args.output_dir)


if __name__ == "__main__":
    with report_errors():
        main()
