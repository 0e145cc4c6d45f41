"""STaR: sample solutions, keep those whose answer is right, fine-tune the base on them, repeat.

    accelerate launch recipes/star.py
    accelerate launch recipes/star.py --rationalize true --output_dir outputs/star-rationalized
    accelerate launch recipes/star.py --majority_vote true --output_dir outputs/self-improved
    accelerate launch recipes/star.py --model_name_or_path Qwen/Qwen2.5-0.5B-Instruct --dataset_name gsm8k.jsonl \\
        --max_new_tokens 256 --output_dir outputs/qwen-star

Without arguments it reads recipes/configs/star.yaml: the starter model and generated word problems. A dataset has
`prompt` and `answer`, and `solution` in the few rows that become the base's examples. --rationalize reveals the answer
to problems that were not solved and keeps the solutions that reach it (Zelikman et al. 2022). --majority_vote takes the
most common answer as the right one (Huang et al. 2022), as always for rows without `answer`.

Each round samples with the newest model and fine-tunes the original base with recipes/sft.py. The solutions of a tenth
of the problems are held out for its loss. Output: round-<r>/{solutions, model, held_out.jsonl}, rounds.json, rounds.png
and report.html. After an interruption, run the same command again to continue, also with more --rounds.
"""

from rlhf.run.arguments import answer_early, parse

if __name__ == "__main__":  # before the imports below, which take seconds
    answer_early(__file__)

from pathlib import Path

from trl import ModelConfig

from eval.measuring.solving import HELD_OUT_FILE, SOLUTIONS, print_solving, summarize_solving
from eval.report import write_report
from rlhf.data.datasets import DatasetArguments, load_splits
from rlhf.engines.arguments import SamplerArguments
from rlhf.engines.completions import make_sampler
from rlhf.errors import report_errors
from rlhf.models.generation import Sampling
from rlhf.models.sources import context_length, resolve
from rlhf.models.tokenizers import load_tokenizer
from rlhf.run.files import write_jsonl
from rlhf.run.folders import finish_run, start_run
from rlhf.run.processes import need_one_process
from rlhf.run.stages import check_stage, run_stage
from rlhf.tasks.star import (
    Solver,
    StarArguments,
    check_star,
    gather_solutions,
    problem_rows,
    sft_flags,
    solve_held_out,
    write_solutions,
)

SFT = Path(__file__).resolve().with_name("sft.py")


def main() -> None:
    # Arguments
    script_args, args, engine_args, model_args = parse(
        __file__, DatasetArguments, StarArguments, SamplerArguments, ModelConfig
    )
    need_one_process(__file__)
    check_star(args, model_args)
    last = Path(args.output_dir) / f"round-{args.rounds}"
    flags = sft_flags(args, model_args, last / SOLUTIONS, args.rounds - 1)
    check_stage(SFT, "--sft_config", args.sft_config, last / "model", flags)

    # Data
    train, test = load_splits(script_args, "problems")

    # Tokenizer
    trust = args.trust_remote_code
    base = resolve(model_args.model_name_or_path, revision=model_args.model_revision, trust_remote_code=trust)
    tokenizer = load_tokenizer(base)
    examples, problems, held_out = problem_rows(
        train, test, script_args.dataset_name, args, context_length(base), tokenizer
    )
    folders = [Path(args.output_dir) / f"round-{number}" for number in range(args.rounds + 1)]
    more = not (folders[-1] / HELD_OUT_FILE).exists()
    again = {"open_flags": ["sft_config"], "derived": [folders[0].name]}  # sft.py checks its own settings
    if not start_run(__file__, args.output_dir, script_args, args, engine_args, model_args, more=more, **again):
        return

    # Rounds
    size, engine = args.per_device_eval_batch_size, make_sampler(engine_args, args.output_dir, [base])
    sampling = Sampling(args.max_new_tokens, args.temperature, size, engine=engine)
    for number, folder in enumerate(folders):
        newest = resolve(str(folder / "model"), trust_remote_code=trust) if number else base
        solver = Solver(newest, [] if number else examples, model_args, sampling)
        if not (folder / HELD_OUT_FILE).exists():
            count = 0 if number else args.num_generations  # the base's samples are the baselines
            write_jsonl(folder / HELD_OUT_FILE, solve_held_out(solver, held_out, count, args.seed))
        summary = summarize_solving(args.output_dir, number)
        if number < args.rounds:
            following = folders[number + 1]
            if not (following / SOLUTIONS / "train.jsonl").exists():
                kept = gather_solutions(solver, problems, examples, args, args.seed + number)
                write_solutions(following / SOLUTIONS, kept)
            flags = sft_flags(args, model_args, following / SOLUTIONS, number)
            run_stage(SFT, args.sft_config, following / "model", flags)

    # Report
    print_solving(summary)
    last = summary["rounds"][-1]
    finish_run(args.output_dir, {"rounds": args.rounds, summary["truth_name"]: last["truth"]["mean"]})
    write_report(args.output_dir)


if __name__ == "__main__":
    with report_errors():
        main()
