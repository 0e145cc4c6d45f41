"""The starter's labelled tasks: the given answer is the right one, nothing leaks, labels are balanced."""

from collections import Counter

import pytest
from datasets import ClassLabel

from rlhf.errors import InputError
from rlhf.starter.conversations import starter_pairs
from rlhf.starter.scorer import gold_scores
from rlhf.starter.tasks import CLUSTERS, KEPT_OUT, TASKS, starter_task
from rlhf.tasks.instructions import FOLDER, read_templates

SMALL = {"max_train": 24, "max_test": 24}


@pytest.fixture(scope="module")
def tasks():
    return {name: starter_task(name, **SMALL) for name in TASKS}


def rows_of(tasks, name):
    return [*tasks[name]["train"], *tasks[name]["test"]]


@pytest.mark.parametrize("name", TASKS)
def test_every_task_has_the_common_form(name, tasks):
    for split in ("train", "test"):
        rows = tasks[name][split]
        assert rows.column_names == [*TASKS[name].columns, "choices", "label", "answer"]
        for row in rows:
            assert row["choices"][row["label"]] == row["answer"]
            assert len(set(row["choices"])) == len(row["choices"]) >= 2
        counts = Counter(rows["label"])
        assert len(rows) == 24 and len(set(counts.values())) == 1, counts
    if TASKS[name].label_names:
        assert isinstance(tasks[name]["train"].features["label"], ClassLabel)
        assert all(tuple(row["choices"]) == TASKS[name].label_names for row in rows_of(tasks, name))


@pytest.mark.parametrize("name", TASKS)
def test_no_test_input_is_trained_on_and_a_seed_gives_the_same_rows(name, tasks):
    inputs = [[tuple(row[column] for column in TASKS[name].columns) for row in tasks[name][split]] for split in
              ("train", "test")]  # fmt: skip
    assert not set(inputs[0]) & set(inputs[1])
    assert len({*inputs[0], *inputs[1]}) == 48
    again, other = starter_task(name, **SMALL), starter_task(name, **SMALL, seed=1)
    assert again["test"].to_list() == tasks[name]["test"].to_list()
    assert other["test"].to_list() != tasks[name]["test"].to_list()


@pytest.mark.parametrize("name", ["addition", "subtraction", "reverse_words"])
def test_training_leaves_alone_what_a_larger_test_would_ask(name):
    train = starter_task(name, max_train=400, max_test=6)["train"]
    test = starter_task(name, max_train=6, max_test=KEPT_OUT)["test"]
    inputs = [{tuple(row[column] for column in TASKS[name].columns) for row in rows} for rows in (train, test)]
    assert not inputs[0] & inputs[1]
    first = starter_task(name, max_train=6, max_test=6)["test"].to_list()
    assert all(row in test.to_list() for row in first)


def test_texts_come_from_conversations_of_their_part(tasks):
    for split, part in (("train", "sft"), ("test", "held_out")):
        messages = {message for message, _ in starter_pairs(part)}
        for name in ("sentiment", "more_positive", "reply", "which_reply"):
            assert set(tasks[name][split]["text"]) <= messages
        marked = {message.rstrip()[:-1].rstrip(): message.rstrip()[-1] for message in messages}
        for row in tasks["question"][split]:
            assert marked[row["text"]] == ("?" if row["answer"] == "question" else ".")


def test_dialogue_answers_are_the_real_replies(tasks):
    pairs = {*starter_pairs("sft"), *starter_pairs("held_out")}
    for row in rows_of(tasks, "reply"):
        assert ((row["text"], row["text_pair"]) in pairs) == (row["answer"] == "yes")
    for row in rows_of(tasks, "which_reply"):
        assert [(row["text"], reply) in pairs for reply in row["choices"]].index(True) == row["label"]
        assert len({len(reply.split()) for reply in row["choices"]}) == 1


def test_sentiment_answers_agree_with_the_scorer(tasks):
    for row in rows_of(tasks, "sentiment"):
        (score,) = gold_scores([row["text"]])
        assert abs(score) >= 0.5 and (score > 0) == (row["answer"] == "positive")
    for row in rows_of(tasks, "more_positive"):
        first, second = gold_scores([row["text"], row["text_pair"]])
        assert (first > second) == (row["answer"] == "first") and min(first, second) <= -0.5


RIGHT = {
    "sort_numbers": lambda row: ", ".join(map(str, sorted(map(int, row["items"].split(", "))))),
    "sort_words": lambda row: ", ".join(sorted(row["items"].split(", "))),
    "addition": lambda row: str(int(row["a"]) + int(row["b"])),
    "subtraction": lambda row: str(int(row["a"]) - int(row["b"])),
    "larger_number": lambda row: str(max(int(row["a"]), int(row["b"]))),
    "reverse_words": lambda row: " ".join(reversed(row["text"].split())),
    "upper_case": lambda row: row["text"].upper(),
    "replace_word": lambda row: " ".join(row["new"] if w == row["old"] else w for w in row["text"].split()),
    "count_words": lambda row: str(len(row["text"].split())),
    "count_letter": lambda row: str(sum(character == row["letter"] for character in row["text"])),
}


@pytest.mark.parametrize("name", RIGHT)
def test_generated_answers_are_right(name, tasks):
    for row in rows_of(tasks, name):
        assert row["answer"] == RIGHT[name](row), row


def test_word_order_is_that_of_a_message_or_another_one(tasks):
    from rlhf.starter.tasks import _words

    natural = {" ".join(_words(message)) for part in ("sft", "held_out") for message, _ in starter_pairs(part)}
    for row in rows_of(tasks, "word_order"):
        assert (row["text"] in natural) == (row["answer"] == "natural"), row


def test_clusters_hold_every_task_once_and_an_unknown_task_is_refused():
    assert sorted(name for names in CLUSTERS.values() for name in names) == sorted(TASKS)
    assert len(CLUSTERS) >= 4 and all(len(names) >= 2 for names in CLUSTERS.values())
    with pytest.raises(InputError, match="no starter task 'sentimen'"):
        starter_task("sentimen")


@pytest.mark.parametrize(("name", "sizes", "least"), [("sort_numbers", (200, 3), 4), ("addition", (2, 200), 4),
                                                      ("question", (200, 1), 2)])  # fmt: skip
def test_fewer_rows_than_labels_are_refused(name, sizes, least):
    with pytest.raises(InputError, match=rf"{name}.* Give at least {least} \(--limit, --max_examples_per_task"):
        starter_task(name, *sizes)
    assert {len(rows) for rows in starter_task(name, least, least).values()} == {least}


def test_the_list_to_choose_is_the_only_right_one():
    for template in read_templates(FOLDER / "sort_numbers.yaml").templates:
        if template.name in ("choose", "pick", "options"):
            assert "from small to large" in template.prompt.lower()
