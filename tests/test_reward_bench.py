"""RewardBench and RewardBench 2: categories and weights by hand, and scores beside plain transformers."""

import json
import math

import pytest
from conftest import assistant, present, run, user
from datasets import Dataset
from peft import PeftModel
from transformers import AutoModelForSequenceClassification

from eval.measuring.reward_bench import Item, accuracy_of_choices, accuracy_of_pairs, mean_of, read_items
from eval.stats.intervals import interval
from rlhf.errors import InputError
from rlhf.models.sources import resolve
from rlhf.run.files import write_jsonl

RIGHT, WRONG = [2.0, 1.0], [1.0, 1.0]  # of two replies with one score, none is right


def pairs(**right):
    """Items and scores: for each subset, which rows are right."""
    rows = [(subset.replace("_", "-"), own) for subset, found in right.items() for own in found]
    items = [Item(str(number), subset, "q", ["a", "b"], 1) for number, (subset, _) in enumerate(rows)]
    return items, [RIGHT if own else WRONG for _, own in rows]


def test_rewardbench_weights_math_as_all_code_together_and_averages_sections():
    found = accuracy_of_pairs(
        *pairs(math_prm=[1, 0], hep_cpp=[1, 1, 1], hep_go=[0], alpacaeval_easy=[1, 0, 0], mt_bench_med=[1], mine=[1])
    )
    categories = {name: cell.mean for name, cell in found.categories.items()}
    # four rows of code, so that each of the two rows of math counts twice
    assert categories == {"Chat": 0.5, "Reasoning": (2 * 1 + 3) / 8, "mine": 1.0}
    assert present(found.overall).mean == (0.5 + 5 / 8) / 2
    assert found.subsets["math-prm"].mean == 0.5 and found.subsets["hep-cpp"].mean == 1.0
    assert 0 <= present(found.overall).low < present(found.overall).mean < present(found.overall).high <= 1
    # the published sizes: 447 rows of math as 984
    code = {f"hep_{name}": [1] * 164 for name in ("cpp", "go", "java", "js", "python", "rust")}
    whole = accuracy_of_pairs(*pairs(math_prm=[0] * 447, **code))
    assert whole.categories["Reasoning"].mean == pytest.approx(984 / (984 + 984))
    alone = accuracy_of_pairs(*pairs(math_prm=[1, 0], mine=[1]))
    assert alone.categories["Reasoning"].mean == present(alone.overall).mean == 0.5
    assert accuracy_of_pairs(*pairs(mine=[1])).overall is None


def test_the_interval_of_a_mean_of_categories_draws_each_by_itself():
    cells = [interval([0.0, 1.0] * 50), interval([1.0, 0.0, 1.0, 0.0])]
    overall = present(mean_of(cells))
    # the standard error is that of two independent means: sqrt(0.25 / 100 + 0.25 / 4) / 2
    assert overall.mean == 0.5 and overall.n == 104
    assert overall.high - overall.low == pytest.approx(2 * 1.96 * math.sqrt(0.25 / 100 + 0.25 / 4) / 2, rel=0.1)


def test_rewardbench_2_is_best_of_four_and_ties():
    four = [([3.0, 1.0, 2.0, 0.0], 1.0), ([1.0, 1.0, 0.0, 1.0], 1 / 3), ([0.0, 1.0, 0.0, 0.0], 0.0)]
    items = [Item(str(number), "Math", "q", list("abcd"), 1) for number in range(3)]
    items.append(Item("0", "mine", "q", list("ab"), 1))
    ties = [
        ("tied:1", [3.0, 2.0, 1.0], 2),  # gap 1, spread 1
        ("ref:1", [5.0, 1.0], 1),  # gap 4
        ("tied:2", [2.0, 1.5, 0.0, -1.0], 2),  # gap 1.5, spread 0.5
        ("ref:2", [0.0, 1.0], 1),  # gap -1
    ]
    items += [Item(name, "Ties", "q", list("abcd")[: len(own)], right) for name, own, right in ties]
    found = accuracy_of_choices(items, [*(own for own, _ in four), [0.0, 1.0], *(own for _, own, _ in ties)])
    score = 0.3 * 1.0 + 0.3 * 0.5 + 0.2 * 0.5 + 0.2 * 0.0 + 0.01 * (math.tanh(1 / 1 - 1) + math.tanh(-1 / 0.5 - 1)) / 2
    categories = {name: cell.mean for name, cell in found.categories.items()}
    assert categories == pytest.approx({"Math": (1 + 1 / 3) / 3, "mine": 0.0, "Ties": score})
    assert present(found.overall).mean == pytest.approx((categories["Math"] + score) / 2)
    # a question without its reference counts among the ties alone; right replies with one score and a gap: tanh(inf)
    more = [*items, Item("tied:3", "Ties", "q", list("abc"), 2)]
    scores = [*(own for own, _ in four), [0.0, 1.0], *(own for _, own, _ in ties), [1.0, 0.0, 2.0]]
    assert accuracy_of_choices(more, scores).categories["Ties"].mean == pytest.approx(score - 0.3 / 3)


ROW = {"id": "1", "subset": "Math", "prompt": "hi", "chosen": ["a"], "rejected": ["b", "c"]}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"subset": ""}, "row 1: 'subset' is ''"),
        ({"rejected": []}, "row 1: 'chosen' and 'rejected' are texts, or lists of texts"),
        ({"rejected": ["b", " "]}, "row 1: 'chosen' and 'rejected' are texts"),
        ({"chosen": ["a", "b"]}, "row 1: has 2 chosen replies, which only the subset Ties has"),
        ({"subset": "Ties", "chosen": ["a", "b"]}, "row 1: has the id '1'; those of the subset Ties are ref:"),
        ({"prompt": ""}, "row 1: 'prompt' is empty"),
    ],
)
def test_rows_that_cant_be_scored_are_named(row, message):
    with pytest.raises(InputError, match=f"^--dataset_name d: {message}"):
        read_items(Dataset.from_list([ROW, {**ROW, **row}]), "d")


def plain_scores(folder, tokenizer, rows):
    """Scores of all replies, by transformers and PEFT alone."""
    base = AutoModelForSequenceClassification.from_pretrained(
        resolve(folder).base, num_labels=1, pad_token_id=tokenizer.pad_token_id
    )
    model = PeftModel.from_pretrained(base, folder).eval()

    def score(prompt, reply):
        chat = [*user(prompt), *assistant(reply)]
        ids = tokenizer.apply_chat_template(chat, return_tensors="pt", return_dict=True)
        return float(model(**ids).logits)

    both = [
        [row[side] if isinstance(row[side], list) else [row[side]] for side in ("chosen", "rejected")] for row in rows
    ]
    return [[score(row["prompt"], reply) for side in sides for reply in side]
            for row, sides in zip(rows, both, strict=True)]  # fmt: skip


def measured(reward_adapter, rows, folder):
    """What the command writes."""
    write_jsonl(folder / "rows.jsonl", rows)
    words = ["--reward_model_path", reward_adapter, "--dataset_name", folder / "rows.jsonl", "--dtype", "float32",
             "--output_dir", folder / "out", "--per_device_eval_batch_size", 3]  # fmt: skip
    said = run("eval/reward_bench.py", *words).stdout
    scores = [json.loads(line)["scores"] for line in (folder / "out" / "scores.jsonl").open()]
    assert (folder / "out" / "reward_bench.png").exists()
    assert "Accuracy of the reward model by category" in (folder / "out" / "report.html").read_text()
    return json.loads((folder / "out" / "reward_bench.json").read_text()), scores, said


def test_pairs_are_scored_as_plain_transformers_do(reward_adapter, tokenizer, tmp_path):
    rows = [
        {"prompt": f"Number {n}?", "chosen": f"It is {n}.", "rejected": f"No {n * n}!", "subset": subset, "id": n,
         "chosen_model": "a", "rejected_model": "b"}
        for n, subset in enumerate(["alpacaeval-easy"] * 4 + ["math-prm"] * 2 + ["hep-rust"] * 3 + ["donotanswer"])
    ]  # fmt: skip
    results, scores, said = measured(reward_adapter, rows, tmp_path)
    expected = plain_scores(reward_adapter, tokenizer, rows)
    assert all(own == pytest.approx(plain, abs=1e-5) for own, plain in zip(scores, expected, strict=True))
    right = [float(chosen > rejected) for chosen, rejected in expected]
    assert 0 < sum(right) < len(right)
    reasoning = (sum(right[4:6]) * 1.5 + sum(right[6:9])) / 6
    means = {name: cell["mean"] for name, cell in results["categories"].items()}
    assert means == pytest.approx({"Chat": sum(right[:4]) / 4, "Safety": right[9], "Reasoning": reasoning})
    assert results["overall"]["mean"] == pytest.approx(sum(means.values()) / 3)
    assert "overall" in said and "Reasoning" in said


def test_lists_are_scored_as_plain_transformers_do(reward_adapter, tokenizer, tmp_path):
    rows = [
        {"prompt": f"Is it {n}?", "chosen": ["Yes."], "rejected": ["No.", "Never!", f"{n}"], "num_correct": 1,
         "subset": "Focus", "id": str(n)}
        for n in range(5)
    ]  # fmt: skip
    rows += [
        {"prompt": "A color?", "chosen": colors, "rejected": ["Seven", "Dog"], "num_correct": len(colors),
         "subset": "Ties", "id": f"{form}:7"}
        for form, colors in (("tied", ["Red", "Blue", "Green"]), ("ref", ["Pink"]))
    ]  # fmt: skip
    results, scores, _ = measured(reward_adapter, rows, tmp_path)
    expected = plain_scores(reward_adapter, tokenizer, rows)
    assert all(own == pytest.approx(plain, abs=1e-5) for own, plain in zip(scores, expected, strict=True))
    best = [float(own[0] == max(own)) for own in expected[:5]]
    assert results["categories"]["Focus"]["mean"] == pytest.approx(sum(best) / 5)
    assert set(results["categories"]) == {"Focus", "Ties"} and results["replies"] == "lists"
