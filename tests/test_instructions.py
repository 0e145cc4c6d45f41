"""Templates, mixing and holding out: instructions are worded as written down, and bad templates are named."""

import json
import runpy
from collections import Counter

import pytest
from conftest import ROOT, run
from trl import ScriptArguments

from rlhf.errors import InputError
from rlhf.starter.tasks import CLUSTERS, TASKS, starter_task
from rlhf.tasks.instructions import (
    FOLDER,
    InstructionTask,
    TaskArguments,
    Template,
    as_conversation,
    check_templates,
    hold_out,
    load_tasks,
    read_templates,
    render,
    word_instructions,
)

MINE = """
task: mine
cluster: own
choices: [bad, good]
templates:
  - name: plain
    prompt: "{{ review }} ({{ options | join('/') }})"
  - name: worded
    prompt: "Film: {{ review }}"
    choices: [thumbs down, thumbs up]
"""


@pytest.fixture(scope="module")
def mine(tmp_path_factory):
    """A folder with my.jsonl, labelled by text, and my.yaml."""
    folder = tmp_path_factory.mktemp("mine")
    rows = [{"review": f"film {n}", "label": ["bad", "good"][n % 2]} for n in range(40)]
    (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my.yaml").write_text(MINE)
    return folder


@pytest.fixture(scope="module")
def made(mine, tmp_path_factory):
    """Output folder and log of the recipe: starter tasks and one's own, the cluster sorting held out."""
    out = tmp_path_factory.mktemp("instructions") / "out"
    arguments = ["--dataset_name", mine / "my.jsonl", "--templates", mine / "my.yaml", "--tasks", "sort_numbers",
                 "addition", "which_reply", "--held_out_clusters", "sorting", "--max_examples_per_task", 60,
                 "--max_test_examples_per_task", 8, "--output_dir", out]  # fmt: skip
    return out, run("recipes/instructions.py", *arguments).stdout, arguments


def lines(file):
    return [json.loads(line) for line in file.read_text().splitlines()]


@pytest.mark.parametrize("name", TASKS)
def test_every_starter_task_has_ten_templates_that_fit_its_rows(name):
    file, splits = read_templates(FOLDER / f"{name}.yaml"), starter_task(name, 20, 20)
    check_templates(file, set(splits["train"].column_names), name)
    assert (file.task, file.cluster) == (name, TASKS[name].cluster)
    assert len(file.templates) >= 10
    assert len({template.prompt for template in file.templates}) == len(file.templates)
    rows = word_instructions(
        InstructionTask(name, file.cluster, file.templates, splits["train"], splits["test"]), splits["test"]
    )
    assert {row["template"] for row in rows} == {template.name for template in file.templates}
    for row in rows:
        assert len(set(row["choices"])) == len(row["choices"]) and all(row["choices"]) and row["prompt"].strip()


def test_rendering_by_hand():
    row = {"text": "I love {{ it }}", "choices": ["negative", "positive"], "label": 1, "answer": "positive"}
    fixed = Template("a", "{{ text }}: {{ options | join(' or ') }}?", ["bad", "good"], "{{ choice }}")
    assert render(fixed, row) == ("I love {{ it }}: bad or good?", ["bad", "good"])
    each = Template("b", "{{ text }}\n", None, "It is {{ choice | upper }}.")
    assert render(each, row) == ("I love {{ it }}", ["It is NEGATIVE.", "It is POSITIVE."])
    listed = word_instructions(InstructionTask("t", "c", [fixed, each], [], []), [row, row], include_options=True)
    assert [instruction["prompt"] for instruction in listed] == [
        "I love {{ it }}: bad or good?",
        "I love {{ it }}\nOptions:\n- It is NEGATIVE.\n- It is POSITIVE.",
    ]
    instruction = {"prompt": "p", "choices": ["x", "y"], "label": 1, "task": "t", "cluster": "c", "template": "b"}
    assert as_conversation(instruction) == {
        "prompt": [{"role": "user", "content": "p"}],
        "completion": [{"role": "assistant", "content": "y"}],
        "task": "t",
        "cluster": "c",
        "template": "b",
    }


def load(folder, templates=MINE, rows=None, **arguments):
    if rows is not None:
        (folder / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "my.yaml").write_text(templates)
    given = TaskArguments(templates=str(folder / "my.yaml"), **arguments)
    return load_tasks(ScriptArguments(dataset_name=str(folder / "my.jsonl")), given, 50, 50, seed=0)


GOOD = [{"review": f"film {n}", "label": n % 2} for n in range(30)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("{{ review }} (", "{{ text }} ("), "template 'plain' of task 'mine' names the column 'text' in its 'prompt'"),
        (("{{ review }} (", "{{ label }} ("), "names the column 'label'"),
        (("{{ review }} (", "{{ review ("), "template 'plain' of task 'mine': not a Jinja template"),
        (("{{ review }} (", "{{ review.__class__.__mro__ }} ("), "template 'plain' can't be rendered"),
        (("[thumbs down, thumbs up]", "[thumbs down]"), "template 'worded' words 1 choices; a row has 2"),
        (("[thumbs down, thumbs up]", "[no, yes]"), "template 1: 'choices' must be a list of texts; found [False"),
        (("cluster: own\n", ""), "needs 'task', 'cluster' and 'templates'"),
        (("name: worded", "name: plain"), "two templates of one name"),
        (("task: mine", "task: addition"), "a starter task has the same name"),
        (("choices: [bad, good]\n", ""), "and 'choices' as a column or in my.yaml; found ['label', 'review']"),
        (("prompt: \"Film", "promt: \"Film"), "template 1 has no 'prompt'"),
    ],
)  # fmt: skip
def test_a_bad_template_is_named(change, message, tmp_path):
    tasks = {"tasks": ["addition"]} if "addition" in change[1] else {}
    with pytest.raises(InputError) as error:
        for task in load(tmp_path, MINE.replace(*change), GOOD, **tasks):
            word_instructions(task, task.train)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"review": "x", "label": 2}] * 5, "row 0 has the label 2 for 2 choices"),
        ([{"review": "x", "label": "fine"}] * 5, "has the label 'fine', not among ['bad', 'good']"),
        ([{"review": "the same", "label": 1}] * 20, "2 of 2 test rows of task 'mine' are training rows too"),
        ([{"review": "only one", "label": 1}], "are training rows too. Example: review 'only one'. Remove"),
        ([{"id": n, "review": f"film {n % 20}", "label": 1} for n in range(40)], "of 4 test rows of task 'mine'"),
        ([{"review": f"{n}", "label": 0, "choices": "no"} for n in range(9)], "row 0 has the choices no, not a list"),
        ([{"review": f"{n}", "label": 0, "choices": {"text": ["a"]}} for n in range(9)], "has the choices {'text'"),
        ([{"review": f"{n}", "label": 0, "choices": [True, False]} for n in range(9)], "choices [True, False], not"),
        ([{"review": f"{n}", "label": 0, "options": ["a"]} for n in range(9)], "has a column 'options'"),
        ([{"review": "x", "stars": 3}] * 5, "needs 'label' (a number) or 'answer' (a text)"),
    ],
)
def test_a_dataset_without_usable_labels_or_held_out_part_is_refused(rows, message, tmp_path):
    with pytest.raises(InputError) as error:
        load(tmp_path, rows=rows)
    assert message in str(error.value)


def test_choices_may_be_numbers(tmp_path):
    (task,) = load(tmp_path, rows=[{"review": f"{n}", "answer": "4", "choices": [3, 4]} for n in range(9)])
    assert task.train[0]["choices"] == ["3", "4"] and task.train[0]["label"] == 1


def test_a_row_on_which_a_template_fails_is_named():
    template = Template("long", "{{ text | length }} {{ number }}", None, "{{ choice }}")
    row = {"text": None, "number": 5, "choices": ["a", "b"], "label": 0}
    with pytest.raises(InputError, match=r"task 't': template 'long' can't be rendered \(.*NoneType.*'number': 5"):
        render(template, row, "task 't'")


def test_clusters_that_cannot_be_held_out():
    addition, sorting = (
        InstructionTask(name, TASKS[name].cluster, [], None, None) for name in ("addition", "sort_words")
    )
    assert hold_out([addition, sorting], ["sorting"]) == ([addition], [sorting])
    with pytest.raises(InputError, match=r"--held_out_clusters poetry: has no task. Clusters are arith"):
        hold_out([addition, sorting], ["poetry"])
    with pytest.raises(InputError, match="leaves no task to train on"):
        hold_out([addition, sorting], ["arithmetic", "sorting"])


def test_the_recipe_mixes_with_a_cap_and_holds_a_cluster_out(made):
    out, log, _ = made
    train, test, held_out = (lines(out / f"{split}.jsonl") for split in ("train", "test", "held_out"))
    # 36 of the 40 own rows are for training: fewer than the cap, so all of them
    assert Counter(row["task"] for row in train) == {"mine": 36, "addition": 60, "which_reply": 60}
    assert Counter(row["task"] for row in test) == {"mine": 4, "addition": 8, "which_reply": 8}
    assert {row["cluster"] for row in held_out} == {"sorting"} and len(held_out) == 8
    assert "156 instructions to train on, 20 to test, 8 of held-out clusters (sorting)" in log
    assert [row["task"] for row in train] != sorted(row["task"] for row in train)
    assert {row["template"] for row in train if row["task"] == "mine"} == {"plain", "worded"}
    for row in train:
        assert [message["role"] for message in row["prompt"] + row["completion"]] == ["user", "assistant"]
        if row["template"] == "worded":
            number = int(row["prompt"][0]["content"].splitlines()[0].removeprefix("Film: film "))
            assert row["completion"][0]["content"] == ["thumbs down", "thumbs up"][number % 2]
    prompts = {row["prompt"][0]["content"] for row in train}
    assert not prompts & {row["prompt"][0]["content"] for row in test}
    assert json.loads((out / "run.json").read_text())["finished"] and (out / "report.html").exists()


def test_the_recipe_is_done_once_and_says_what_is_wrong(made, tmp_path, monkeypatch, capsys):
    out, _, arguments = made
    script, before = str(ROOT / "recipes" / "instructions.py"), (out / "train.jsonl").read_bytes()
    monkeypatch.setattr("sys.argv", [script, *map(str, arguments)])
    runpy.run_path(script, run_name="__main__")
    assert "already finished" in capsys.readouterr().out
    assert (out / "train.jsonl").read_bytes() == before
    unknown = [str(word).replace("sorting", "poetry") for word in arguments[:-1]]
    monkeypatch.setattr("sys.argv", [script, *unknown, str(tmp_path / "out")])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script, run_name="__main__")
    assert stopped.value.code == 2 and not (tmp_path / "out").exists()
    assert capsys.readouterr().err.startswith("error: --held_out_clusters poetry: has no task")


def test_the_same_seed_gives_the_same_instructions():
    def rows(seed):
        (task,) = load_tasks(ScriptArguments(dataset_name="starter"), TaskArguments(tasks=["addition"]), 8, 8, seed)
        return word_instructions(task, task.train)

    assert rows(1) == rows(1) != rows(2)
    assert all(cluster in {task.cluster for task in TASKS.values()} for cluster in CLUSTERS)
