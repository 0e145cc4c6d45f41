"""Scaling laws: train models of many sizes on many amounts of text, fit the laws, forecast a larger model, check it.

    accelerate launch recipes/scaling.py
    accelerate launch recipes/scaling.py --hidden_sizes 64 128 256 --num_hidden_layers 4 4 6 \
        --forecast_hidden_size 512 --forecast_num_hidden_layers 8 --token_budgets 4000000 16000000 64000000 \
        --dataset_name roneneldan/TinyStories --tokenizer_name outputs/stories-tokenizer \
        --output_dir outputs/stories-scaling

Without arguments it reads recipes/configs/scaling.yaml: the starter conversations, with the tokenizer of
recipes/tokenizer.py. Each point of the sweep is a run of recipes/pretrain.py (--base_config) that sees its budget of
text once. Results: L(N), L(D) and L(C) with intervals (Kaplan et al. 2020; Hoffmann et al. 2022); the loss of a larger
model, forecast before its training; and, beside the largest fitted Transformer, the loss of an LSTM of the same size by
position in the context. Output: points/, scaling.json, scaling.png, positions.png and report.html. After an
interruption, run the same command again to continue.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

from pathlib import Path

from eval.measuring.loss_by_position import compare_positions, packed_blocks
from eval.report import write_report
from eval.stats.intervals import JsonObject
from eval.stats.scaling_laws import (
    SCALING_FILE,
    check_forecast,
    fit_sweep,
    forecast_larger,
    results_of,
    scaling_verdicts,
)
from rlhf.data.datasets import DatasetArguments, load_splits
from rlhf.data.rows import texts_of
from rlhf.errors import report_errors
from rlhf.pretraining.scaling import (
    TEXTS,
    ScalingArguments,
    block_size_of,
    check_base_config,
    check_sweep,
    cut_texts,
    folder_of,
    forecast_point,
    lstm_point,
    sweep_points,
    train_points,
    trained_points,
    transformer_parameters,
    write_texts,
)
from rlhf.pretraining.tokenization import resolve_tokenizer
from rlhf.run.files import write_json
from rlhf.run.folders import finish_run, start_run
from rlhf.run.processes import need_one_process

PRETRAIN = Path(__file__).resolve().with_name("pretrain.py")


def main() -> None:
    # Arguments
    script_args, args = parse(__file__, DatasetArguments, ScalingArguments)
    need_one_process(__file__)
    check_sweep(args)
    check_base_config(args, PRETRAIN)

    # Data
    train, test = load_splits(script_args, "pretrain")
    train, test = texts_of(train, script_args.dataset_name), texts_of(test, script_args.dataset_name)

    # Tokenizer
    tokenizer = resolve_tokenizer(args.tokenizer_name)
    texts = cut_texts(train, test, tokenizer, args)
    open_flags = [] if trained_points(args) else ["base_config"]  # pretrain.py checks its own settings
    if not start_run(__file__, args.output_dir, script_args, args, open_flags=open_flags, derived=[TEXTS]):
        return
    folders = write_texts(texts, args.output_dir)
    train_with = (folders, PRETRAIN)

    # Sweep
    points = sweep_points(args)
    summary: JsonObject = {"points": train_points(args, points, *train_with)}
    fits = fit_sweep(summary["points"])
    summary["fits"] = {law: fit and fit.to_json() for law, fit in fits.items()}

    # Forecast
    larger = forecast_point(args)
    size = transformer_parameters(larger.hidden_size, larger.num_hidden_layers)
    summary["forecast"] = forecast_larger(summary["points"], fits, size)
    write_json(Path(args.output_dir) / SCALING_FILE, summary)  # before the larger model is trained
    summary["forecast"] = check_forecast(summary["forecast"], train_points(args, [larger], *train_with)[0])

    # LSTM
    if args.lstm_num_hidden_layers:
        lstm = lstm_point(args, summary["points"][-1]["counted_parameters"])
        summary["lstm"] = train_points(args, [lstm], *train_with)[0]
        pair = {"Transformer": folder_of(args, points[-1]), "LSTM": folder_of(args, lstm)}
        blocks = packed_blocks(texts[lstm.tokens]["test"], tokenizer, block_size_of(args.base_config))
        summary["positions"] = compare_positions(pair, blocks)
    write_json(Path(args.output_dir) / SCALING_FILE, summary)

    # Report
    print("\n".join(["", *scaling_verdicts(summary)]))
    finish_run(args.output_dir, results_of(summary))
    write_report(args.output_dir)


if __name__ == "__main__":
    with report_errors():
        main()
