"""Simulated people label 300 comparisons on the voting page in Chromium; is a reward model from their votes as good as
one from the same labeler asked directly?

    python tests/people_votes.py --model_name_or_path outputs/demo/sft --output_dir outputs/people

Three of them share the work, each in a browser of their own: with the noise of --labeler simulated, they pick the
better of two replies by keyboard, or tie. Both reward models are trained with recipes/configs/reward.yaml and compared
with the noise-free gold score on the same pairs of held-out replies.
"""

import argparse
import json
import random
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from datasets import DatasetDict
from playwright.sync_api import sync_playwright
from test_pages import answered, launch, shown_replies
from test_people import Page

from rlhf.comparisons import bradley_terry
from rlhf.feedback.labelers import LabelerArguments
from rlhf.starter.conversations import starter_dataset
from rlhf.starter.scorer import gold_scores

ROOT = Path(__file__).resolve().parents[1]
PEOPLE = ("ada", "ben", "cleo")


def recipe(script: str, *words: object) -> None:
    subprocess.run([sys.executable, str(ROOT / script), *map(str, words)], cwd=ROOT, check=True)


def vote(url: str, name: str, temperature: float) -> int:
    """One person's session, until there is nothing left to compare. Returns how many questions it answered."""
    rng = random.Random(name)
    with sync_playwright() as playwright:
        browser = launch(playwright)
        page = browser.new_page()
        page.goto(f"{url}?labeler={name}")
        page.get_by_text("Start", exact=True).click()
        page.wait_for_selector("[data-part=work]:not([hidden]), [data-part=done]:not([hidden])")
        count, done = 0, page.locator("[data-part=done]:not([hidden])")
        while not done.count():
            first, second = gold_scores(shown_replies(page))
            if first == second:
                page.keyboard.press("t")
            else:
                page.keyboard.press("a" if rng.random() < bradley_terry(first - second, temperature) else "b")
                page.keyboard.press("Enter")
            count += 1
            answered(page, count)
        browser.close()
    return count


def collect(model: str, folder: Path, comparisons: int) -> None:
    """The same replies, compared by the simulated labeler and by people: folder/direct and folder/people."""
    prompts = starter_dataset("preference")
    few = DatasetDict(train=prompts["train"].select(range(comparisons)), test=prompts["test"].select(range(32)))
    few.save_to_disk(str(folder / "prompts"))
    words = ["--model_name_or_path", model, "--dataset_name", folder / "prompts"]
    words += ["--config", ROOT / "recipes/configs/collect.yaml"]
    recipe("recipes/collect.py", *words, "--output_dir", folder / "direct")
    shared = ["--labeler", "human", "--overlap", 0, "--repeats", 0, "--output_dir", folder / "people"]
    page = Page("recipes/collect.py", *words, *shared)
    temperature = LabelerArguments().labeler_temperature
    with ThreadPoolExecutor(len(PEOPLE)) as pool:
        counts = list(pool.map(lambda name: vote(page.url, name, temperature), PEOPLE))
    print(page.rest()[-300:])
    print(f"Answered on the page: {dict(zip(PEOPLE, counts, strict=True))}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model_name_or_path", required=True, help="SFT adapter that replies.")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--comparisons", type=int, default=300)
    args = parser.parse_args()
    folder = Path(args.output_dir).resolve()
    model = str(Path(args.model_name_or_path).resolve())
    collect(model, folder, args.comparisons)
    for name in ("direct", "people"):
        recipe("recipes/reward.py", "--model_name_or_path", model, "--dataset_name", folder / name, "--output_dir",
               folder / f"reward-{name}")  # fmt: skip
        recipe("eval/compare.py", "--models", f"sft={model}", "--reward_model_path", folder / f"reward-{name}",
               "--output_dir", folder / f"comparison-{name}")  # fmt: skip
    for name in ("direct", "people"):
        results = json.loads((folder / f"comparison-{name}" / "results.json").read_text())
        pairs = len((folder / name / "train.jsonl").read_text().splitlines())
        print(name, f"{pairs} pairs to train on; accuracy against gold",
              "{mean:.3f} [{low:.3f}, {high:.3f}], {n} pairs".format(**results["reward_model"]))  # fmt: skip


if __name__ == "__main__":
    main()
