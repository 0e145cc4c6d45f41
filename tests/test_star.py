"""STaR: problems, answers, what is kept, rounds, the table and the picture."""

import io
import json
import re
from contextlib import redirect_stdout

import pytest
from conftest import ROOT, TINY_TRAINING, load_script, present, save_guesser, user
from datasets import Dataset

from eval.drawing.figures import rounds_figure
from eval.drawing.tables import tables_of
from eval.measuring.solving import references_of, solved_share, solving_rows, summarize_solving
from rlhf.data.datasets import Row
from rlhf.errors import InputError
from rlhf.run.files import write_jsonl
from rlhf.starter.problems import PROBLEM_KINDS, starter_problems
from rlhf.tasks.problems import few_shot, final_answer, known_answer, majority, plain_answer
from rlhf.tasks.star import StarArguments, gather_solutions, keep, problem_rows, solve_held_out, write_solutions

BOXES = ("red", "blue", "green", "white", "black", "brown", "grey", "pink", "gold", "silver", "amber", "olive")


# ---------------------------------------------------------------------------------------------- problems and answers


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("3 + 4 = 7 apples. The answer is 7.", "7"),
        ("#### 1,234.50", "1234.5"),
        ("The answer is 5. No, the answer is $70,000.", "70000"),
        ("Tom has 3 boxes, so he has 12", "12"),
        ("The answer is -0.0", "0"),
        ("The answer is: (B)", "b"),
        ("#### 10\nQuestion: 5 apples", "10"),
        ("The answer is 300", "300"),
        ("I don't know.", None),
        ("The answer is 3 + 4 = 7.", "7"),
        ("The answer is 18 apples", "18"),
        ("The answer is 3/4.", "3/4"),
        ("The answer is 10:30", "10:30"),
        ("The answer is  Room 3  or 4.", "room 3 or 4"),
        ("The answer is .5", "0.5"),
        ("so it is -.50", "-0.5"),
        ("The answer is 7. Tom has 3 more.", "7"),
        ("The answer is St. Louis 3 or 4", "st. louis 3 or 4"),
        ("The answer is", None),
    ],
)
def test_the_answer_that_a_solution_ends_with(text, answer):
    assert final_answer(text) == answer


def test_answers_of_datasets_and_majorities():
    assert known_answer({"answer": 18}) == known_answer({"answer": " 18.0"}) == known_answer({"answer": "$18"}) == "18"
    assert known_answer({"answer": "Yes."}) == plain_answer("yes") == "yes"
    assert known_answer({}) is known_answer({"answer": None}) is known_answer({"answer": " "}) is None
    assert known_answer({"answer": "x = 3"}) == "3" and known_answer({"answer": "3 ="}) == "3"
    assert majority(["1", None, "2", "2", None, None]) == "2"
    assert majority(["3", "1"]) == "3" and majority([None]) is None and majority([]) is None


def test_starter_problems_are_right_and_what_is_held_out_is_new():
    splits = starter_problems()
    first = [re.findall(r" ([-+*]) ", row["solution"]) for row in splits["train"].select(range(len(PROBLEM_KINDS)))]
    assert first == [["+", "-"], ["+", "+"], ["*", "+"], ["*", "-"]]  # the examples: one of each
    numbers: dict[str, set[tuple[object, ...]]] = {"train": set(), "test": set()}
    for split, rows in splits.items():
        for number, row in enumerate(rows):
            steps = re.findall(r"(\d+) ([-+*]) (\d+) = (\d+)", row["solution"])
            for left, sign, right, result in steps:
                a, b = int(left), int(right)
                assert int(result) == {"+": a + b, "-": a - b, "*": a * b}[sign]
            assert steps[-1][-1] == row["answer"] and int(row["answer"]) >= 0
            numbers[split].add((number % len(PROBLEM_KINDS), *re.findall(r"\d+", row["prompt"])))
        assert len(set(rows["prompt"])) == len(rows)
    assert len(numbers["train"]) > 200 and not numbers["train"] & numbers["test"]
    assert starter_problems()["test"][:] == splits["test"][:]
    assert len(starter_problems("full")["train"]) == 2048 and starter_problems("full")["test"][:] == splits["test"][:]
    with pytest.raises(InputError, match="'small' or 'full'"):
        starter_problems("large")


def test_the_prompt_shows_examples_and_tells_the_answer_only_as_a_hint():
    example = {"prompt": "1 + 1?", "answer": "2", "solution": "1 + 1 is <<1+1=2>>2.\n#### 2"}
    plain = few_shot([example], {"prompt": "2 + 3?", "answer": "5"})
    assert plain == [*user("1 + 1?"), {"role": "assistant", "content": "1 + 1 is 2. The answer is 2."}, *user("2 + 3?")]
    hinted = few_shot([example], {"prompt": user("2 + 3?"), "answer": "5"}, hint=True)
    assert [m["content"] for m in hinted[::2]] == ["1 + 1? (The answer is 2.)", "2 + 3? (The answer is 5.)"]


# ---------------------------------------------------------------------------------------------- what is kept


def test_right_solutions_are_kept_once():
    rows: list[Row] = [{"prompt": "a", "reference": "2"}, {"prompt": "b", "reference": None},
                       {"prompt": "c", "reference": "9"}]  # fmt: skip
    solutions = [["it is 2", "it is 3", "it is 2", "so 2"], ["4", "5", "is 5", ""], ["1", "2", "none", "3"]]
    kept = keep(rows, solutions, "sampled")
    assert [(row["prompt"], row["completion"][0]["content"], row["answer"]) for row in kept] == [
        (user("a"), "it is 2", "2"), (user("a"), "so 2", "2"), (user("b"), "5", "5"), (user("b"), "is 5", "5"),
    ]  # fmt: skip
    assert keep([{"prompt": "d", "reference": None}], [["no number", "none"]], "sampled") == []


def make_solver(log, sampled, hinted="it is {reference}"):
    """A solver that gives every problem the same solution and logs its calls."""

    def solver(rows, what, *, count=1, seed=None, hints=None):
        log.append((what, [row["prompt"] for row in rows], count, hints))
        text = sampled if hints is None else hinted
        return [[text.format(**row)] * count for row in rows]

    return solver


def test_only_what_was_not_solved_is_rationalized_and_trained_on_without_the_hint():
    rows: list[Row] = [
        {"prompt": "a", "answer": "1", "reference": "1"},
        {"prompt": "b", "answer": "2", "reference": "2"},
        {"prompt": "c", "answer": None, "reference": None},
    ]
    args, examples = StarArguments(num_generations=3, rationalize=True), [{"prompt": "example"}]
    log: list[tuple] = []
    kept = gather_solutions(make_solver(log, "it is 1"), rows, examples, args, seed=0)
    assert [(row["prompt"], row["kind"]) for row in kept] == [
        (user("a"), "sampled"), (user("c"), "sampled"), (user("b"), "rationalized"),
    ]  # fmt: skip
    assert log == [("sampling", ["a", "b", "c"], 3, None), ("rationalizing", ["b"], 1, examples)]
    args.rationalize = False
    assert {row["kind"] for row in gather_solutions(make_solver(log, "it is 1"), rows, [], args, seed=0)} == {"sampled"}
    with pytest.raises(InputError, match=r"none of the solutions of 2 problems .* --rationalize true"):
        gather_solutions(make_solver(log, "it is 7"), rows[:2], [], args, seed=0)


def problems(count, first=0, **more):
    return [{"prompt": f"What is in the {BOXES[n % 12]} box number {n}?", "answer": str(1 + n % 2), **more}
            for n in range(first, first + count)]  # fmt: skip


def settings(**changes):
    return StarArguments(**{"num_fewshot": 0, "max_train_samples": 9, "max_eval_samples": 9, "max_new_tokens": 9,
                            **changes})  # fmt: skip


def test_examples_are_neither_trained_on_nor_limited(tokenizer):
    train = [*problems(2), *problems(4, 2, solution="Look.")]
    train = Dataset.from_list([{"solution": None, **row} for row in train])
    test = Dataset.from_list(problems(3, 50))
    examples, rows, held_out = problem_rows(
        train, test, "d", settings(num_fewshot=2, max_train_samples=3, max_eval_samples=2), 256, tokenizer
    )
    assert [row["prompt"] for row in examples] == train["prompt"][2:4]
    assert [row["prompt"] for row in rows] == [*train["prompt"][:2], train["prompt"][4]] and len(held_out) == 2
    assert [row["reference"] for row in rows] == ["1", "2", "1"]
    voted = problem_rows(train, test, "d", settings(majority_vote=True), 256, tokenizer)
    assert {row["reference"] for row in voted[1]} == {None} and {row["reference"] for row in voted[2]} == {"1", "2"}


@pytest.mark.parametrize(
    ("train", "test", "changes", "context", "said"),
    [
        ([{"question": "a"}], [{"question": "b"}], {}, 256, "needs column 'prompt'; found ['question']"),
        (problems(3), problems(1, 2), {}, 256, "1 held-out problems are in the training split too"),
        ([{"prompt": "What  IS it?"}], [{"prompt": "what is it?"}], {}, 256, "1 held-out"),
        (problems(3), problems(1, 5), {"num_fewshot": 1}, 256, "has 0 training problems with 'answer' and 'solution'"),
        (problems(1, solution="x"), problems(1, 5), {"num_fewshot": 1}, 256, "no problem is left"),
        (problems(3), problems(1, 5), {"max_new_tokens": 300}, 256, "more than the model's context of 256"),
    ],
)  # fmt: skip
def test_bad_problems(train, test, changes, context, said, tokenizer):
    with pytest.raises(InputError) as error:
        problem_rows(Dataset.from_list(train), Dataset.from_list(test), "d", settings(**changes), context, tokenizer)
    assert said in str(error.value)


# ---------------------------------------------------------------------------------------------- the evaluation


def test_accuracy_of_one_of_the_majority_and_of_the_best():
    solutions, references = [["1", "2", "2"], ["3", "3", "4"], ["5", "6", "7"]], ["1", "3", None]
    assert solved_share(solutions, references).mean == pytest.approx((1 / 3 + 2 / 3) / 2)
    assert solved_share(solutions, references, "majority").mean == 0.5
    assert solved_share(solutions, references, "best").mean == 1.0
    assert references_of([{"reference": None, "samples": ["1", "2", "2"]}])[0] == ["2"]


def test_solutions_of_one_problem_stay_together(tmp_path):
    kept = [{"prompt": user(f"p{number // 3}"), "answer": str(number)} for number in range(45)]
    write_solutions(tmp_path / "many", kept)
    train, test = (lines(tmp_path / "many" / f"{split}.jsonl") for split in ("train", "test"))
    assert {row["prompt"][0]["content"] for row in test} == {"p0", "p10"} and len(train) == 39
    assert sorted(train + test, key=lambda row: int(row["answer"])) == kept
    write_solutions(tmp_path / "one", kept[:2])
    assert lines(tmp_path / "one" / "train.jsonl") == kept[:2] and not (tmp_path / "one" / "test.jsonl").exists()


def test_summary_table_and_picture(tmp_path):
    for number, right in enumerate((2, 4)):
        rows: list[Row] = [
            {"prompt": f"p{n}", "reference": "1", "solution": "1" if n < right else "0"} for n in range(8)
        ]
        if number == 0:
            rows = [{**row, "samples": ["0", "1"]} for row in rows]
        write_jsonl(tmp_path / f"round-{number}" / "held_out.jsonl", rows)
    kept = [
        {"prompt": "a", "kind": "sampled"},
        {"prompt": "a", "kind": "sampled"},
        {"prompt": "b", "kind": "rationalized"},
    ]
    write_solutions(tmp_path / "round-1" / "solutions", kept)
    summary = summarize_solving(str(tmp_path), 1)
    assert json.loads((tmp_path / "rounds.json").read_text()) == summary
    first, second = summary["rounds"]
    assert first["truth"]["mean"] == 0.25 and second["truth"]["mean"] == 0.5
    # paired: the first two problems are right in both, so only what changed varies
    assert second["difference"]["mean"] == 0.25 and 0 <= second["difference"]["low"] < 0.25
    headings, cells = solving_rows(summary)
    assert headings[1] == "held-out accuracy" and cells[0][0] == "base (round 0)" and cells[0][1].startswith("25.0% [")
    assert cells[1][2].startswith("+25.0% [") and headings[3] == "kept"
    assert cells[1][3] == "3 solutions of 2 problems, 1 rationalized"
    assert [row[1].split()[0] for row in cells[2:]] == ["50.0%", "0.0%", "100.0%"]
    axis = rounds_figure(summary).axes[0]
    assert [text.get_text() for text in present(axis.get_legend()).get_texts()] == list(summary["baselines"])
    assert tables_of([tmp_path])[0].rows == cells


# ---------------------------------------------------------------------------------------------- the recipe


@pytest.fixture(scope="module")
def guesser(tokenizer, tmp_path_factory):
    return save_guesser(tmp_path_factory.mktemp("guesser"), tokenizer)


def star(monkeypatch, *words):
    """Run the recipe's main in this process; its stages are processes of their own."""
    module = load_script("recipes/star.py")
    monkeypatch.setattr("sys.argv", ["star.py", *map(str, words)])
    monkeypatch.chdir(ROOT)
    module.main()


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def rounds(guesser, tmp_path_factory, monkeypatch_module):
    """One round, then the same command with two: its words, folder and what it said."""
    out = tmp_path_factory.mktemp("star")
    (out / "data").mkdir()
    write_jsonl(out / "data" / "train.jsonl", problems(10))
    write_jsonl(out / "data" / "test.jsonl", problems(6, 100))
    sft = dict(zip((w.removeprefix("--") for w in TINY_TRAINING[::2]), TINY_TRAINING[1::2], strict=True))
    sft |= {"use_peft": "true", "lora_target_modules": "all-linear", "learning_rate": "0.005", "max_steps": "2"}
    (out / "sft.yaml").write_text("".join(f"{key}: {value}\n" for key, value in sft.items()))
    words = ["--model_name_or_path", guesser, "--dataset_name", out / "data", "--num_fewshot", 0, "--dtype", "float32",
             "--max_new_tokens", 8, "--temperature", 1, "--sft_config", out / "sft.yaml",
             "--output_dir", out / "star"]  # fmt: skip
    star(monkeypatch_module, *words, "--rounds", 1)
    first = (out / "star" / "round-1" / "model" / "adapter_model.safetensors").stat().st_mtime_ns
    with redirect_stdout(io.StringIO()) as said:
        star(monkeypatch_module, *words, "--rounds", 2)
    return words, out / "star", said.getvalue(), first


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_two_rounds_each_from_the_base(rounds, guesser):
    _, out, said, first = rounds
    assert (out / "round-1" / "model" / "adapter_model.safetensors").stat().st_mtime_ns == first  # not made again
    assert said.count("===") == 2
    for number in (1, 2):
        train, test = (lines(out / f"round-{number}" / "solutions" / f"{split}.jsonl") for split in ("train", "test"))
        assert not {str(row["prompt"]) for row in train} & {str(row["prompt"]) for row in test}
        kept = train + test
        right = {json.dumps(user(row["prompt"])): row["answer"] for row in problems(10)}
        assert kept and all(row["answer"] == right[json.dumps(row["prompt"])] for row in kept)
        assert all(final_answer(row["completion"][0]["content"]) == row["answer"] for row in kept)
        run_file = json.loads((out / f"round-{number}" / "model" / "run.json").read_text())
        assert (
            run_file["settings"]["model_name_or_path"] == guesser
            and run_file["settings"].get("seed", 42) == 41 + number
        )
    summary = json.loads((out / "rounds.json").read_text())
    assert [entry["round"] for entry in summary["rounds"]] == [0, 1, 2]
    assert all(entry["truth"]["n"] == 6 for entry in summary["rounds"])
    assert "base, majority of 4" in said and "less round 0" in said
    assert (out / "rounds.png").stat().st_size > 3000
    assert "solutions of" in (out / "report.html").read_text()
    assert not any("samples" in row for row in lines(out / "round-1" / "held_out.jsonl"))


def test_a_run_with_an_edited_sft_config_is_another_run(rounds, monkeypatch):
    words, out, _, _ = rounds
    file = out.parent / "sft.yaml"
    before = file.read_text()
    try:
        file.write_text(before.replace("0.005", "0.004"))
        with pytest.raises(InputError, match=r"these differ: content of .*sft\.yaml"):
            star(monkeypatch, *words, "--rounds", 2)
    finally:
        file.write_text(before)


def test_a_finished_run_is_skipped(rounds, monkeypatch, capsys):
    words, out, _, _ = rounds
    before = (out / "rounds.json").read_bytes()
    star(monkeypatch, *words, "--rounds", 2)
    assert "already finished" in capsys.readouterr().out and (out / "rounds.json").read_bytes() == before


@pytest.mark.parametrize(
    ("words", "said"),
    [(["--rounds", 0], "--rounds 0: must be at least 1"), (["--num_generations", 0], "--num_generations 0"),
     (["--sft_config", "no.yaml"], "--sft_config no.yaml: no such file"), (["--round", 1], "unknown flag --round"),
     (["--num_fewshot", 1], "--num_fewshot 1"),
     (["--majority_vote", "true", "--rationalize", "true"], "--rationalize true: gives the answer"),
     (["--use_peft", "true"], "--use_peft True: would not reach the training"),
     (["--lora_r", 8], "--lora_r 8: would not reach"), (["--load_in_4bit", "true"], "of --sft_config (")],
)  # fmt: skip
def test_bad_settings(words, said, rounds, monkeypatch, tmp_path):
    good = list(rounds[0])
    good[good.index("--output_dir") + 1] = tmp_path / "out"
    with pytest.raises(InputError) as error:
        star(monkeypatch, *good, *words)
    assert said in str(error.value) and not (tmp_path / "out").exists()


def test_without_any_answer_the_majority_stands_in(rounds):
    _, out, _, _ = rounds
    rows = [{**row, "reference": None} for row in lines(out / "round-0" / "held_out.jsonl")]
    references, name = references_of(rows)
    assert name == "agreement with the base's majority"
    assert references == [majority([final_answer(text) for text in row["samples"]]) for row in rows]


def test_held_out_solutions_are_greedy(tokenizer):
    log: list[tuple] = []
    rows = solve_held_out(make_solver(log, "it is 3"), [{"prompt": "a", "reference": "3"}], count=2, seed=5)
    assert rows == [{"prompt": "a", "reference": "3", "solution": "it is 3", "samples": ["it is 3", "it is 3"]}]
    assert [(what, count) for what, _, count, _ in log] == [("held out", 1), ("held out, samples", 2)]
