"""Several datasets in one training: what is drawn, what is held out, and that a run of them resumes exactly."""

import json

import numpy as np
import pytest
from conftest import TINY_TRAINING, assistant, run, user
from datasets import Dataset

from rlhf.data.mixture import MixtureArguments, Splits, draw, load_mixture, mix
from rlhf.data.rows import preference_rows, sft_rows
from rlhf.errors import InputError
from rlhf.run.files import write_jsonl


def test_shares_are_exact_and_rows_come_once_or_in_turns():
    first = draw([100, 10, 50], [5, 1, 2], "first_exhausted")
    assert [len(rows) for rows in first] == [50, 10, 20]  # ten rows are an eighth of 80
    assert all(len({*rows}) == len(rows) and max(rows) < size for rows, size in zip(first, (100, 10, 50), strict=True))
    every = draw([100, 10, 50], [0.5, 0.1, 0.2], "all_exhausted")
    assert [len(rows) for rows in every] == [125, 25, 50]  # fifty rows are a quarter of 200
    assert [sorted({*np.bincount(rows)}) for rows in every] == [[1, 2], [2, 3], [1]]
    assert all((one == other).all() for one, other in zip(first, draw([100, 10, 50], [5, 1, 2], "first_exhausted"),
                                                          strict=True))  # fmt: skip
    assert [len(rows) for rows in draw([3, 1000], [1, 999], "first_exhausted")] == [1, 1000]


def mixture(names, part, encode, **settings):
    args = MixtureArguments(dataset_name=[str(name) for name in names], **settings)
    return mix(args, load_mixture(args, part), encode)


def test_formats_may_differ_and_no_prompt_is_trained_and_held_out(tokenizer, tmp_path, capsys):
    questions = [f"Number {n}?" for n in range(40)]
    write_jsonl(tmp_path / "a.jsonl", [{"messages": user(q) + assistant(f"a {q}")} for q in questions])
    write_jsonl(tmp_path / "b.jsonl", [{"prompt": q, "completion": f" b {q}"} for q in questions[::-1]])
    names = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]

    def encode(rows, name):
        return sft_rows(rows, name, tokenizer)

    def numbers(rows):
        texts = [tokenizer.decode(row["input_ids"]) for row in rows]
        return [(int(text.split("Number ")[1].split("?")[0]), " b " in text) for text in texts]

    train, test = (numbers(rows) for rows in mixture(names, "sft", encode))
    assert len(test) == 8 and {kind for _, kind in test} == {False, True}
    assert not {number for number, _ in train} & {number for number, _ in test}
    left_out = [line for line in capsys.readouterr().out.splitlines() if "whose prompts are held out" in line]
    assert len(left_out) == 2 and len(train) == 72 - sum(
        int(line.split("left out ")[1].split()[0]) for line in left_out
    )
    half, same = (numbers(rows) for rows in mixture(names, "sft", encode, dataset_probs=[1.0, 3.0]))
    assert same == test
    of_b = sum(kind for _, kind in half)
    assert len(half) == len({*half}) and of_b == sum(kind for _, kind in train) and len(half) - of_b == round(of_b / 3)
    assert sum(kind for _, kind in half[: len(half) // 2]) not in (0, len(half) // 2)  # in random order
    assert half == numbers(mixture(names, "sft", encode, dataset_probs=[1.0, 3.0])[0])
    single = MixtureArguments(dataset_name=[str(names[0])])
    assert single.dataset_name == str(names[0]) and len(load_mixture(single, "sft")[0].train) == 36


def test_what_cant_be_mixed_is_refused(tokenizer):
    pair = {"prompt": "hi", "chosen": "yes", "rejected": "no"}
    plain, other = (Dataset.from_list([{**pair, **more}] * 2) for more in ({}, {"margin": 1.0}))
    found = [Splits("a.jsonl", plain, plain), Splits("b.jsonl", other, other)]
    with pytest.raises(InputError, match=r"^--dataset_name a\.jsonl b\.jsonl: one of them has margin and the other"):
        mix(MixtureArguments(["a", "b"]), found, lambda rows, name: preference_rows(rows, name, tokenizer, None))
    for message, names, settings in (
        (r"^--dataset_probs: 1 shares for 2 datasets", ["a", "b"], {"dataset_probs": [1.0]}),
        (r"^--dataset_probs: shares are of several datasets; found a alone", ["a"], {"dataset_probs": [1.0]}),
        (r"^--stopping_strategy all_exhausted: has no effect without --dataset_probs", ["a", "b"],
         {"stopping_strategy": "all_exhausted"}),
        (r"^--dataset_name a: is given twice", ["a", "b", "a"], {}),
        (r"^--dataset_config small: belongs to one dataset, and here are 2", ["a", "b"], {"dataset_config": "small"}),
    ):  # fmt: skip
        with pytest.raises(InputError, match=message):
            MixtureArguments(names, **settings)


def test_all_prompts_held_out_elsewhere_is_refused(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for split, count in (("train", 3), ("test", 3 if name == "a" else 1)):
            rows = [{"prompt": user(f"{split if name == 'a' else 'test'} {n}"), "completion": assistant("x")}
                    for n in range(count)]  # fmt: skip
            write_jsonl(tmp_path / name / f"{split}.jsonl", rows)
    args = MixtureArguments([str(tmp_path / "a"), str(tmp_path / "b")])
    with pytest.raises(InputError, match="/b: the prompts of all its training rows are held out"):
        load_mixture(args, "sft")


def test_a_reward_model_of_two_datasets_names_both_and_resumes_exactly(tiny, files, tmp_path):
    rows = [{"prompt": user(f"Is it {n}?"), "chosen": assistant("Yes"), "rejected": assistant("No")} for n in range(20)]
    write_jsonl(tmp_path / "more.jsonl", rows)
    folder = tmp_path / "reward"
    words = ["--model_name_or_path", tiny, "--dataset_name", files / "pairs.jsonl", tmp_path / "more.jsonl",
             "--dataset_probs", 0.75, 0.25, "--max_steps", 8, "--output_dir", folder, *TINY_TRAINING]  # fmt: skip
    said = run("recipes/reward.py", *words).stdout
    assert "pairs.jsonl: 28 training rows, drawn from 28." in said
    assert "more.jsonl: 9 training rows, drawn from 18." in said
    state = json.loads((folder / "run.json").read_text())
    assert state["settings"]["dataset_name"] == [str(files / "pairs.jsonl"), str(tmp_path / "more.jsonl")]
    for page in ("README.md", "report.html"):
        text = (folder / page).read_text()
        assert "pairs.jsonl" in text and "more.jsonl" in text
    finished = (folder / "adapter_model.safetensors").read_bytes()
    (folder / "run.json").write_text(json.dumps({**state, "finished": False}))
    (folder / "adapter_model.safetensors").unlink()
    (folder / "checkpoint-8").rename(tmp_path / "gone")
    assert "Resuming from" in run("recipes/reward.py", *words).stdout
    assert (folder / "adapter_model.safetensors").read_bytes() == finished
