"""The report of a run in a real browser: complete, self-contained, readable on a phone, nothing executed."""

import json
import re

import pytest
from conftest import ROOT, present, run
from playwright.sync_api import sync_playwright
from test_pages import launch

from eval.drawing.figures import Log
from eval.report import find_runs, write_report
from rlhf.errors import InputError

HOSTILE = "<script>document.title = 'taken'</script><img src=http://example.com/x.png> {{ 7 * 7 }} <|im_end|>"
CELL = {"mean": 0.6, "low": 0.5, "high": 0.7, "n": 3}


def make_run(folder, recipe, finished=True, **settings):
    folder.mkdir(parents=True)
    entry = {"recipe": recipe, "command": f"accelerate launch recipes/{recipe}.py", "settings": settings,
             "finished": finished, "metrics": {}}  # fmt: skip
    (folder / "run.json").write_text(json.dumps(entry))
    return folder


@pytest.fixture
def runs(tmp_path):
    """SFT → PPO, compared: with a log that the monitor remarked on, and hostile replies."""
    sft = make_run(tmp_path / "sft", "sft", model_name_or_path="starter", dataset_name="starter", hub_token="hf_secret")
    ppo = make_run(tmp_path / "ppo", "ppo", model_name_or_path=str(sft))
    log: Log = [{"step": n, "objective/raw_scores": n / 9, "objective/kl": n, "policy/entropy_avg": 4 - n / 9,
            "completions/mean_length": 9, "time/rollout": 3} for n in range(1, 9)]  # fmt: skip
    log.append({"step": 5, "remark": "kl_exploding", "text": "The KL to the reference is <b>31</b> nats."})
    (ppo / "trainer_state.json").write_text(json.dumps({"log_history": log}))
    compared = make_run(tmp_path / "comparison", "compare", models=[f"sft={sft}", f"ppo={ppo}"])
    cells = {"kl": CELL, "win_rate/gold": CELL, "length_controlled_win_rate/gold": CELL}
    bins = [{"confidence": 0.6, "accuracy": 0.7, "n": 5}, {"confidence": 0.9, "accuracy": 0.8, "n": 5}]
    accuracy = {**CELL, "n": 10, "calibration_error": 0.1, "reliability": bins,
                "by_length_difference": [{**CELL, "shortest": -3, "longest": 1}]}  # fmt: skip
    results = {"models": {"sft": cells, "ppo": cells}, "reference": "sft", "reward_model": accuracy}
    (compared / "results.json").write_text(json.dumps(results))
    samples = [{"prompt": [{"role": "user", "content": f"question {n}"}], "sft": HOSTILE, "ppo": f"answer {n}"}
               for n in range(30)]  # fmt: skip
    (compared / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in samples))
    return tmp_path


def test_a_comparison_without_a_reward_model_has_no_picture_of_it(tmp_path):
    compared = make_run(tmp_path / "comparison", "compare")
    cells = {"kl": CELL, "win_rate/gold": CELL}
    results = {"models": {"sft": cells}, "reference": "sft", "reward_model": {}}
    (compared / "results.json").write_text(json.dumps(results))
    assert present(write_report(str(compared))).exists()
    assert not (compared / "calibration.png").exists()


def test_the_report_in_a_browser(runs):
    page_file = present(write_report(str(runs / "comparison")))
    for name in ("comparison/comparison.png", "comparison/calibration.png", "ppo/training.png"):
        assert (runs / name).stat().st_size > 5000
    with sync_playwright() as playwright:
        browser = launch(playwright)
        page = browser.new_page(viewport={"width": 390, "height": 844}, color_scheme="dark")
        errors, requests = [], []
        page.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_file.as_uri())
        assert page.title() == "comparison: report"
        assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()]
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        assert page.evaluate("[...document.images].every(image => image.naturalWidth > 100)")
        assert page.locator("img").count() == 3
        text = page.inner_text("body")
        for word in ("question 29", "answer 29", "<script>document.title", "{{ 7 * 7 }}", "<|im_end|>",
                     "Update 5: The KL to the reference is <b>31</b> nats.", "60.0% [50.0%, 70.0%]",
                     "accelerate launch recipes/ppo.py", "transformers "):  # fmt: skip
            assert word in text, word
        assert "secret" not in page.content() and str(runs) not in page.content()
        visible = page.locator("#samples tbody tr:visible")
        assert visible.count() == 30
        page.fill("#filter", "ANSWER 17")
        assert visible.count() == 1 and "question 17" in visible.inner_text()
        page.uncheck("[data-column='1']")
        assert "document.title" not in visible.inner_text()
        assert errors == []
        browser.close()


def test_runs_come_after_what_they_were_made_from(runs):
    assert [path.name for path in find_runs(runs / "comparison")] == ["sft", "ppo", "comparison"]
    assert {path.name for path in find_runs(runs)} == {"sft", "ppo", "comparison"}
    with pytest.raises(InputError, match="no run in it"):
        find_runs(runs / "nothing")


def test_runs_with_one_name_are_told_apart(tmp_path):
    for number in (1, 2):
        reward = make_run(tmp_path / f"round-{number}" / "reward", "reward", model_name_or_path="starter")
        make_run(tmp_path / f"round-{number}" / "ppo", "ppo", reward_model_path=str(reward))
    make_run(tmp_path / "sft", "sft")
    make_run(tmp_path / "base", "pretrain", dataset_name="starter", tokenizer_name="starter", hub_token="hf_secret")
    page = present(write_report(str(tmp_path))).read_text()
    lineage = page[page.index("<tbody>") : page.index("</tbody>")]
    for number in (1, 2):
        assert f"<td>round-{number}/ppo</td><td>ppo</td><td>reward model round-{number}/reward</td>" in lineage
    assert "<td>sft</td><td>sft</td>" in lineage
    assert "<td>base</td><td>pretrain</td><td>data starter, tokenizer starter</td>" in lineage
    assert "hf_secret" not in page
    assert re.search(r"6 runs: .*2 of reward, 2 of ppo", page)


def test_of_many_runs_the_training_curves_are_folded_up(runs):
    log = json.dumps({"log_history": [{"step": n, "loss": 1 / n} for n in range(1, 4)]})
    for number in range(12):
        folder = make_run(runs / f"tuned-{number}", "finetune", model_name_or_path=str(runs / "sft"))
        (folder / "trainer_state.json").write_text(log)
    page = present(write_report(str(runs))).read_text()
    folded = page[page.index("<details>") : page.index("</details>")]
    assert "13 runs" in folded and "<h3>tuned-7</h3>" in folded and "<h3>ppo</h3>" in folded
    assert '">comparison</h2>' in page and '">tuned-7</h2>' not in page and "→" not in page


def test_the_command_writes_the_same_page_about_a_folder_of_runs(runs):
    said = run("eval/report.py", "--output_dir", runs)
    assert f"Report: {runs / 'report.html'}" in said.stdout
    page = (runs / "report.html").read_text()
    assert "3 runs" in page and "question 3" in page
    missing = run("eval/report.py", "--output_dir", ROOT / "tests", check=False)
    assert missing.returncode == 2 and missing.stderr.strip().splitlines()[-1].startswith("error: --output_dir")
