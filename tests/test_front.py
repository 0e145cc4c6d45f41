"""Two rewards: the starter's kindness, the front by hand, and eval/front.py and PPO beside plain numbers."""

import json
import sys

import numpy as np
import pytest
from conftest import ROOT, TINY_PPO, assistant, make_adapter, present, run, save_tiny, user
from scipy.stats import rankdata
from trl import ModelConfig
from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer

from eval.drawing.tables import disagreement_line
from eval.front import FrontArguments, resolve_two
from eval.measuring.front import front_of, largest_disagreement, score_by_each, undominated
from eval.measuring.replies import Replies
from eval.stats.intervals import Scores, mean_difference
from rlhf.errors import InputError
from rlhf.rewards import load_reward, resolve_reward
from rlhf.starter.conversations import starter_dataset
from rlhf.starter.kindness import SAD, is_sad, kind
from rlhf.starter.scorer import gold_scores

sys.path.append(str(ROOT / "docs"))
import tables

SAMPLED = ["--dtype", "float32", "--max_new_tokens", 6]
SAYINGS = ["I'm sad that my dog died.", "Do you like tea?", "I hate this terrible rain.", "What a lovely day!",
           "My exam was awful.", "Tell me about trains."]  # fmt: skip
# `second` has no opinion on tea, and none on short replies
REWARDS = """
def first(completions, mood): return [float(len(c[-1]["content"]) % 7) for c, _ in zip(completions, mood, strict=True)]
def second(prompts, completions, **columns):
    return [None if "tea" in p[-1]["content"] else -float(sum(map(ord, c[-1]["content"])) % 11)
            for p, c in zip(prompts, completions)]
def silent(completions, **columns): return [None for _ in completions]
"""


# ------------------------------------------------------------------------------------------------ kindness


def test_kindness_is_minus_cheerfulness_where_the_message_is_sad():
    compound = {text: SentimentIntensityAnalyzer().polarity_scores(text)["compound"]
                for text in ("I'm sad that my dog died.", "haha that's awesome!", "Oh no, how terrible.")}  # fmt: skip
    sad, glad, sorry = compound
    assert compound[sad] <= SAD and compound[glad] > 0.5 and compound[sorry] < 0
    assert kind([sad, sad, glad], [glad, sorry, glad]) == [-compound[glad], 0.0, None]
    chats = [user(sad), [*user(glad), *assistant(glad), *user(sad)], [*user(sad), *assistant(sorry), *user(glad)]]
    assert kind(chats, [assistant(glad)] * 3) == [-compound[glad], -compound[glad], None]
    # a reply that is continued: the user's message counts, not its own beginning
    assert kind([[*user(glad), *assistant(sad)], [*user(sad), *assistant(glad)]], [assistant(glad)] * 2) == [
        None,
        -compound[glad],
    ]
    assert kind([[{"role": "system", "content": sad}], sad, sad], [glad, "", sorry]) == [None, 0.0, 0.0]


def test_the_border_is_exact(monkeypatch):
    monkeypatch.setattr("rlhf.starter.kindness.gold_scores", lambda texts: [float(text) for text in texts])
    assert kind(["-0.2", "-0.1999", "0.2", "-1"], ["0.5", "0.5", "0.5", "-0.5"]) == [-0.5, None, None, 0.0]


# ------------------------------------------------------------------------------------------------ the front


def test_a_model_that_is_as_good_by_both_and_better_by_one_dominates():
    means = {"worse": (1.0, 1.0), "right": (2.0, 1.0), "up": (1.0, 2.0), "far": (3.0, 0.0), "behind": (2.9, 0.0)}
    assert undominated(means) == ["right", "up", "far"]
    assert undominated({"a": (1.0, 1.0), "same": (1.0, 1.0)}) == ["a", "same"]  # equal ones don't dominate each other
    assert undominated({"a": (2.0, 2.0), "b": (1.0, 1.0)}) == ["a"]


def test_prompts_without_opinion_do_not_count():
    scores: dict[str, list[Scores]] = {
        "a": [[1.0, 2.0, 3.0], [0.0, None, -3.0]],  # an opinion of 0 counts
        "b": [[3.0, 3.0, 3.0], [None, -1.0, -2.0]],
    }
    found = front_of(scores, ["x", "y"])
    assert [[cell["mean"], cell["n"]] for cell in found["models"]["a"]] == [[2.0, 3], [-1.5, 2]]
    assert [[cell["mean"], cell["n"]] for cell in found["models"]["b"]] == [[3.0, 3], [-1.5, 2]]
    gaps = found["differences"]["b_minus_a"]
    assert [[cell["mean"], cell["n"]] for cell in gaps] == [[1.0, 3], [1.0, 1]]  # both have one on the last prompt only
    assert found["front"] == ["b"] and gaps[0]["low"] == pytest.approx(0.0) and gaps[0]["high"] == pytest.approx(2.0)
    assert mean_difference([1.0, None], [None, 1.0]) is None
    with pytest.raises(InputError, match=r"--reward_funcs: y has no opinion on any of 2 replies of b"):
        front_of({**scores, "b": [[1.0, 2.0], [None, None]]}, ["x", "y"])


def test_rewards_per_token_are_added_up():
    def per_token(completion_ids, **columns):
        return [[0.5] * len(ids) for ids in completion_ids]

    replies = Replies([[1, 2, 3], [4]], ["a", "b"])
    columns = score_by_each([per_token, kind], ["This is awful.", "Hello."], replies)
    assert columns == [[1.5, 0.5], [0.0, None]]


def test_the_largest_disagreement_is_of_ranks():
    rows = [
        {"prompt": user("q"), "a": "A", "b": "B", "scores": {"a": [1.0, 5.0], "b": [2.0, 5.0]}},
        {"prompt": "r", "a": "C", "b": "D", "scores": {"a": [100.0, 6.0], "b": [3.0, -9.0]}},
        {"prompt": "s", "a": "E", "b": "F", "scores": {"a": [200.0, None], "b": [0.0, 7.0]}},
    ]
    # ranks of A, B, C, D, F by the first: 4, 3, 1, 2, 5; by the second: 3.5, 3.5, 2, 5, 1; E has no second score
    found = largest_disagreement(rows)
    assert found == {"prompt": "s", "model": "b", "reply": "F", "scores": [0.0, 7.0], "ranks": [5.0, 1.0], "of": 5}
    line = disagreement_line({"rewards": ["x", "y"], "disagreement": found})
    assert line.endswith("rank 1 of 5 by y (7) and rank 5 of 5 by x (0): b replies to 's': 'F'")
    agreed = [{"prompt": "q", "a": "A", "b": "B", "scores": {"a": [1.0, 3.0], "b": [2.0, 4.0]}}]
    assert largest_disagreement(agreed) is None and largest_disagreement([]) is None
    assert "agree" in disagreement_line({"rewards": ["x", "y"], "disagreement": None})


# ------------------------------------------------------------------------------------------------ the recipes


@pytest.fixture(scope="module")
def place(tokenizer, tmp_path_factory):
    """A folder with two tiny models that say different things, prompts and rewards."""
    folder = tmp_path_factory.mktemp("front")
    for seed, name in enumerate(("one", "two")):
        save_tiny(folder / name, tokenizer, seed=seed, initializer_range=0.5)
    make_adapter(folder / "one", tokenizer, folder / "three")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": user(text), "mood": "?"}) + "\n"
                                                  for text in SAYINGS * 2))  # fmt: skip
    (folder / "taste.py").write_text(REWARDS)
    return folder


@pytest.fixture(scope="module")
def measured(place):
    """The run folder of eval/front.py, below a folder of its own, and what it said."""
    (place / "outputs").mkdir()
    models = [f"{name}={place / name}" for name in ("one", "two", "three")]
    said = run("eval/front.py", "--models", *models, "--dataset_name", "prompts.jsonl", "--dataset_test_split", "train",
               "--reward_funcs", "taste.first", "taste.second", *SAMPLED, "--output_dir", "outputs/front/both",
               cwd=place).stdout  # fmt: skip
    return place / "outputs/front/both", said


def test_the_numbers_are_those_of_the_samples(measured):
    folder, said = measured
    found = json.loads((folder / "front.json").read_text())
    samples = [json.loads(line) for line in (folder / "samples.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in samples] == [user(text) for text in SAYINGS * 2]
    for row in samples:
        for name, (first, second) in row["scores"].items():
            assert first == len(row[name]) % 7
            assert second == (None if "tea" in row["prompt"][0]["content"] else -(sum(map(ord, row[name])) % 11))
    assert found["rewards"] == ["first", "second"] and list(found["models"]) == ["one", "two", "three"]
    scores = {name: np.array([row["scores"][name] for row in samples], dtype=float) for name in found["models"]}
    for name, cells in found["models"].items():
        assert [cell["n"] for cell in cells] == [12, 10]
        assert [cell["mean"] for cell in cells] == pytest.approx(np.nanmean(scores[name], axis=0))
        assert all(cell["low"] < cell["mean"] < cell["high"] for cell in cells)
        # the bootstrap's interval of a mean is near the normal one
        errors = np.nanstd(scores[name], axis=0) / np.sqrt([12, 10])
        assert [cell["high"] - cell["low"] for cell in cells] == pytest.approx(2 * 1.96 * errors, rel=0.15)
    for name in ("two", "three"):
        gaps = np.nanmean(scores[name] - scores["one"], axis=0)
        assert [cell["mean"] for cell in found["differences"][f"{name}_minus_one"]] == pytest.approx(gaps)
    assert len({tuple(np.nanmean(own, axis=0)) for own in scores.values()}) == 3, "models that say the same"
    means = {name: np.nanmean(own, axis=0) for name, own in scores.items()}
    beaten = {a for a in means for b in means if (means[b] >= means[a]).all() and (means[b] > means[a]).any()}
    assert found["front"] == [name for name in means if name not in beaten]
    flat = [(row, name) for row in samples for name in means if row["scores"][name][1] is not None]
    ranks = [rankdata([-row["scores"][name][which] for row, name in flat]) for which in (0, 1)]
    worst = found["disagreement"]
    assert abs(worst["ranks"][0] - worst["ranks"][1]) == abs(ranks[0] - ranks[1]).max() and worst["of"] == len(flat)
    assert any(row[worst["model"]] == worst["reply"] and row["prompt"] == worst["prompt"] for row in samples)
    assert "The rewards disagree most here" in said and "three" in said
    assert found["commands"][-1].startswith("accelerate launch eval/front.py")


def test_the_report_and_the_docs_show_it(measured, tmp_path):
    folder, _ = measured
    assert (folder / "front.png").read_bytes().startswith(b"\x89PNG")
    page = (folder / "report.html").read_text()
    assert "Two rewards" in page and "Mean scores by two rewards" in page and "data:image/png" in page
    assert page.count('data-column="') == 3  # the replies, without the scores beside them
    kept = tables.keep(folder.parent)
    assert kept["source"].startswith("make ") and tables.keep(folder)["runs"]["."]["front"]
    (tmp_path / "docs/results").mkdir(parents=True)
    for name in ("front", "demo"):
        content = kept if name == "front" else tables.load("demo")
        (tmp_path / f"docs/results/{name}.json").write_text(tables.dumps(content))
    (tmp_path / "docs/rewards.md").write_text("<!-- table: front -->\nNot measured yet.\n<!-- end -->\n")
    tables.write(tmp_path)
    lines = (tmp_path / "docs/rewards.md").read_text().splitlines()
    heading = "| | first | second | first, minus one | second, minus one | on the front |"
    assert lines[1].endswith("(front.png)") and lines[3] == heading and lines[5].startswith("| one | ")
    assert (tmp_path / "docs/front.png").exists()


@pytest.mark.parametrize(
    ("words", "says"),
    [(["--reward_funcs", "taste.first"], "--reward_funcs taste.first: found 1. Give two different rewards."),
     (["--reward_funcs", "taste.first", "taste.first"], "both are the same"),
     (["--reward_funcs", "taste.first", "taste.third"], "taste has no function 'third'"),
     ([], "--reward_funcs: found 0"),
     (["--models", "scores=one"], "the results call something else 'scores'"),
     (["--reward_funcs", "taste.first", "taste.silent"], "silent has no opinion on any of 12 replies of a")],
)  # fmt: skip
def test_wrong_rewards_are_refused(words, says, place):
    models = [] if "--models" in words else ["--models", "a=one"]
    taste = [] if "--reward_funcs" in words or not words else ["--reward_funcs", "taste.first", "taste.second"]
    refused = run("eval/front.py", *models, *words, *taste, "--dataset_name", "prompts.jsonl", *SAMPLED,
                  "--dataset_test_split", "train", "--output_dir", "refused", check=False, cwd=place)  # fmt: skip
    lines = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert refused.returncode == 2 and len(lines) == 1 and says in lines[0]
    assert not (place / "refused/front.json").exists()


def test_a_judge_rates_by_its_flags(tiny):
    flags = {"judge_model_name_or_path": tiny, "principle": "Be kind."}
    judge, _ = resolve_two(FrontArguments(reward_funcs=["judge", "starter"], **flags), "mine.jsonl", [])
    assert present(judge.judge).criteria[0].text == "Be kind."
    with pytest.raises(InputError, match=r"^--judge_model_name_or_path: is a judge's, and none judges"):
        resolve_two(FrontArguments(**flags), "starter", [])


def test_ppo_weighs_both_rewards_and_evaluates_by_both(sft, reward_adapter, place):
    words = ["--model_name_or_path", sft, "--reward_model_path", reward_adapter, "--reward_funcs",
             "rlhf.starter.kindness.kind", "--reward_weights", 1, 5, "--eval_reward_funcs", "starter",
             "rlhf.starter.kindness.kind", "--dataset_name", "prompts.jsonl", "--dataset_test_split", "train",
             "--eval_strategy", "steps", "--eval_steps", 2, "--output_dir", "ppo"]  # fmt: skip
    run("recipes/ppo.py", *words, *TINY_PPO, "--response_length", 64, cwd=place)  # long, for a word of cheer
    log = json.loads((place / "ppo/trainer_state.json").read_text())["log_history"]
    found = next(entry for entry in log if entry.get("step") == 2 and "eval_score" in entry)
    rows = [json.loads(line) for line in (place / "ppo/eval_samples/2.jsonl").read_text().splitlines()]
    kindness = kind([row["prompt"] for row in rows], [row["completion"] for row in rows])
    known = [score for score in kindness if score is not None]
    assert len(rows) == 12 and len(known) == 6 and min(known) < 0
    model = load_reward(resolve_reward(reward_adapter), ModelConfig(dtype="float32"))
    upbeat = model([row["prompt"] for row in rows], [row["completion"] for row in rows])
    weighted = [own + 5 * (score or 0.0) for own, score in zip(upbeat, kindness, strict=True)]
    assert [row["score"] for row in rows] == pytest.approx(weighted, abs=1e-4)
    assert found["eval_held_out/kind"] == found["eval_rewards/kind/mean"] == pytest.approx(np.mean(known))
    assert found["eval_held_out/starter_reward"] == pytest.approx(np.mean(gold_scores([r["completion"] for r in rows])))


def test_every_second_message_of_moods_is_sad():
    rows = starter_dataset("ppo", "moods")
    for split, number in (("train", 512), ("test", 64)):
        sad = is_sad([row["prompt"][-1]["content"] for row in rows[split]])
        assert sad == [True, False] * (number // 2)
    assert not {row["prompt"][-1]["content"] for row in rows["test"]} & {
        row["prompt"][-1]["content"] for row in rows["train"]
    }
