"""People in the loop, from end to end: a recipe opens the page, people vote in Chromium, the recipe goes on."""

import json
import signal

import pytest
from conftest import ENVIRONMENT, ROOT, run
from recipe_process import Forked
from test_pages import answered, browser, free_port, shown_replies  # noqa: F401  (browser is a fixture)

SAMPLING = ["--dtype", "float32", "--max_new_tokens", "6"]


class Page:
    """A recipe in a process of its own that serves the voting page."""

    def __init__(self, script, *words):
        command = [str(ROOT / script), *map(str, words), "--server_port", str(free_port())]
        self.process = Forked(command, ENVIRONMENT, ROOT, together=True)
        self.said = []
        for line in self.process.stdout:
            self.said.append(line)
            if line.startswith("Vote at "):
                self.url = line.split()[2]
                return
        raise AssertionError("".join(self.said))

    def rest(self):
        """What it says until it ends."""
        said = self.process.stdout.read()
        self.process.wait()
        return said


def vote_for_all(browser, url, labeler, better):  # noqa: F811
    """Answer everything that there is for one labeler, by keyboard.

    Args:
        better: score of a reply's text; the highest is picked, and equal ones tie.
    """
    page = browser.new_context().new_page()
    page.goto(f"{url}?labeler={labeler}")
    page.get_by_text("Start", exact=True).click()
    count, done = 0, page.locator("[data-part=done]:not([hidden])")
    page.wait_for_selector("[data-part=work]:not([hidden]), [data-part=done]:not([hidden])")
    while not done.count():
        scores = [better(text) for text in shown_replies(page)]
        if len(set(scores)) == 1:
            page.keyboard.press("t")
        else:
            page.keyboard.press("ab"[scores.index(max(scores))])
            page.keyboard.press("Enter")
        count += 1
        answered(page, count)
    assert "sft" not in page.content() and "base" not in page.locator("[data-part=work]").inner_text()
    page.close()
    return count


@pytest.fixture(scope="module")
def kept():
    """Processes to end with the module."""
    pages: list[Page] = []
    yield pages
    for page in pages:
        page.process.send_signal(signal.SIGKILL)
        page.process.wait()


def test_two_models_are_compared_blind_by_people(browser, kept, tiny, sft, files, tmp_path):  # noqa: F811
    words = ["--models", f"base={tiny}", f"sft={sft}", "--reference", "base", "--dataset_name", files / "prompts.jsonl",
             "--judges", "human", "--best_of_n", 1, "--repeats", 0, "--output_dir", tmp_path / "out",
             *SAMPLING]  # fmt: skip
    page = Page("eval/compare.py", *words)
    kept.append(page)
    count = vote_for_all(browser, page.url, "ada", len)
    said = page.rest()
    assert page.process.returncode == 0, said
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    samples = [json.loads(line) for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    assert count == sum(row["base"] != row["sft"] for row in samples) > 0
    wins = [
        0.5 + (len(row["sft"]) > len(row["base"])) / 2 - (len(row["sft"]) < len(row["base"])) / 2 for row in samples
    ]
    assert results["models"]["sft"]["win_rate/human"]["mean"] == pytest.approx(sum(wins) / len(wins))
    again = run("eval/compare.py", *words)
    assert "already finished" in again.stdout


def test_votes_of_people_become_preference_pairs(browser, kept, sft, files, tmp_path):  # noqa: F811
    words = ["--model_name_or_path", sft, "--dataset_name", files / "prompts.jsonl", "--labeler", "human",
             "--num_generations", 2, "--overlap", 1, "--repeats", 0, "--output_dir", tmp_path / "out",
             *SAMPLING]  # fmt: skip
    page = Page("recipes/collect.py", *words)
    kept.append(page)
    vote_for_all(browser, page.url, "ada", len)
    said = page.rest()  # it ends by itself: nothing is left to compare
    assert page.process.returncode == 0, said
    assert json.loads((tmp_path / "out" / "agreement.json").read_text())["labelers"] == 1
    rows = [json.loads(line) for name in ("train", "test")
            for line in (tmp_path / "out" / f"{name}.jsonl").read_text().splitlines()]  # fmt: skip
    assert rows and {row["labeler"] for row in rows} == {"ada"}
    for row in rows:
        assert len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"])
