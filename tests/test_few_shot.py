"""Few-shot prompts: how they are drawn and chosen, and how eval/compare.py reads one."""

import json
import random

import pytest
import torch
from conftest import assistant, make_adapter, run, save_tiny, user
from peft import PeftModel
from transformers import AutoModelForCausalLM

from eval.measuring.few_shot import draw_turns, read_turns, with_turns
from rlhf.data.encoding import encode_prompt
from rlhf.errors import InputError

# so cold that the likeliest token is drawn
SAMPLING = ["--dtype", "float32", "--max_new_tokens", 4, "--max_prompts", 5, "--temperature", 0.001]
EXAMPLES = [[*user(f"Do you like {word}?"), *assistant(f"I love {word}!")] for word in ("tea", "rain", "snow", "chess")]


def test_turns_stand_behind_the_system_message():
    system = [{"role": "system", "content": "Be brief."}]
    assert with_turns([*system, *user("Hi")], EXAMPLES[0]) == [*system, *EXAMPLES[0], *user("Hi")]
    assert with_turns("Once upon", []) == "Once upon"
    with pytest.raises(InputError, match="these prompts are text"):
        with_turns("Once upon", EXAMPLES[0])


def test_examples_that_do_not_fit_are_passed_over(tokenizer):
    long = [*user("word " * 100), *assistant("yes")]
    sizes = (user("Hi"), tokenizer, 8)
    room = len(encode_prompt(tokenizer, [*EXAMPLES[0], *EXAMPLES[1], *user("Hi")])) + 8 + 3
    for seed in range(5):
        turns = draw_turns([long, *EXAMPLES], 2, *sizes, room, random.Random(seed))
        assert len(turns) == 4 and long[0] not in turns
        assert len(encode_prompt(tokenizer, [*turns, *user("Hi")])) + 8 <= room
    assert len(draw_turns([long, *EXAMPLES], 5, *sizes, None, random.Random(0))) == 10
    with pytest.raises(InputError, match=r"--num_fewshot 3: only 2 of 5 .* context of"):
        draw_turns([long, *EXAMPLES], 3, *sizes, room, random.Random(0))


@pytest.fixture(scope="module")
def sharp(tokenizer, tmp_path_factory):
    """Folder of a tiny model that is sure of the next token."""
    return save_tiny(tmp_path_factory.mktemp("sharp"), tokenizer, initializer_range=0.5)


@pytest.fixture(scope="module")
def chosen(sharp, files, tmp_path_factory):
    """The run folder of eval/few_shot.py with a reward that tells replies apart."""
    folder = tmp_path_factory.mktemp("few-shot")
    (folder / "taste.py").write_text(
        "def letters(completions, completion):\n"  # the dataset's column
        "    return [None, *(float(len(c[0]['content']) % 7) for c in completions[1:])]\n"
        "def silent(completions, **columns): return [None for _ in completions]\n"
    )
    result = run("eval/few_shot.py", "--model_name_or_path", sharp, "--dataset_name", files / "sft.jsonl",
                 "--reward_funcs", "taste.letters", "--num_prompts", 3, "--num_fewshot", 2, *SAMPLING,
                 "--output_dir", folder / "out", cwd=folder)  # fmt: skip
    return folder / "out", result.stdout


def test_the_best_of_several_prompts_is_chosen_and_said(chosen):
    folder, said = chosen
    found = json.loads((folder / "few_shot.json").read_text())
    means = [cell["mean"] for cell in found["scores"]]
    assert len(means) == 3 and found["chosen"] == means.index(max(means)) and len(set(means)) > 1
    assert {cell["n"] for cell in found["scores"]} == {4}
    messages = json.loads((folder / "prompt.json").read_text())["messages"]
    assert messages == found["prompts"][found["chosen"]]
    assert [message["role"] for message in messages] == ["user", "assistant"] * 2
    assert "chosen" in said and messages[-1]["content"] in said
    assert "Few-shot prompts of out" in (folder / "report.html").read_text()


def test_replies_without_any_score_are_one_line(chosen, sharp, files, tmp_path):
    refused = run("eval/few_shot.py", "--model_name_or_path", sharp, "--dataset_name", files / "sft.jsonl",
                  "--reward_funcs", "taste.silent", "--num_prompts", 1, "--num_fewshot", 1, *SAMPLING,
                  "--output_dir", tmp_path / "out", cwd=chosen[0].parent, check=False)  # fmt: skip
    assert refused.returncode == 2 and "error: Reward functions 'silent': returned None for all 5" in refused.stderr


def test_a_model_of_compare_reads_the_turns(chosen, sharp, tokenizer, files, tmp_path):
    sft = make_adapter(sharp, tokenizer, tmp_path / "sft")
    file = chosen[0] / "prompt.json"
    words = ["--models", f"base={sharp}", f"prompted={sharp}", f"sft={sft}", "--few_shot", f"prompted={file}",
             "--dataset_name", files / "sft.jsonl", *SAMPLING, "--output_dir", tmp_path / "out"]  # fmt: skip
    run("eval/compare.py", *words)
    replies = json.loads((tmp_path / "out" / "replies.json").read_text())
    rows = [json.loads(line) for line in (tmp_path / "out" / "values.jsonl").read_text().splitlines()]
    values = {(row["model"], row["metric"]): row["values"] for row in rows}
    prompts = [json.loads(line)["prompt"] for line in (tmp_path / "out" / "samples.jsonl").read_text().splitlines()]
    model, adapted = load(sharp), PeftModel.from_pretrained(load(sharp), sft).eval()
    turns = json.loads(file.read_text())["messages"]
    for name, before in (("base", []), ("prompted", turns)):
        for number, prompt in enumerate(prompts):
            said = replies[name]["ids"][number]
            read = tokenizer.apply_chat_template([*before, *prompt], add_generation_prompt=True, return_tensors="pt")
            greedy = model.generate(**read, do_sample=False, max_new_tokens=4)[0, read["input_ids"].shape[1] :]
            assert said == greedy.tolist()
            human = tokenizer("I love pizza!<|im_end|>", add_special_tokens=False)["input_ids"]
            if "pizza" in prompt[0]["content"]:
                loss = -logprob(model, read["input_ids"], human)
                assert values[name, "human_loss"][number] == pytest.approx(loss, abs=1e-3)
            # perplexity is that of the base without turns
            plain = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt")["input_ids"]
            assert -values[name, "perplexity"][number] == pytest.approx(logprob(model, plain, said), abs=1e-3)
            own = logprob(model, read["input_ids"], said)
            under_sft = logprob(adapted, plain, said)
            assert values[name, "kl"][number] == pytest.approx(own - under_sft, abs=1e-3)
    assert replies["base"]["ids"] != replies["prompted"]["ids"]
    words[-1], words[words.index("--few_shot") + 1] = tmp_path / "other", f"ppo={file}"
    refused = run("eval/compare.py", *words, check=False)
    assert refused.returncode == 2 and "--few_shot ppo=...: not among --models" in refused.stderr


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def logprob(model, before, reply):
    """Log-probability of a reply's ids behind ids (1, P)."""
    ids = torch.cat([before, torch.tensor([reply])], 1)
    logprobs = model(ids).logits[0, before.shape[1] - 1 : -1].log_softmax(-1)
    return float(logprobs.gather(1, torch.tensor(reply)[:, None]).sum())


@pytest.mark.parametrize(
    ("content", "says"),
    [({"messages": []}, "is empty"), ({"turns": []}, "needs 'messages'"),
     ({"messages": user("Hi")}, "end with the assistant's"),
     ({"messages": [{"role": "system", "content": "x"}, *assistant("y")]}, "turns of user and assistant")],
)  # fmt: skip
def test_a_file_without_turns_is_refused(content, says, tmp_path):
    file = tmp_path / "prompt.json"
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=says):
        read_turns(str(file), "--few_shot a=prompt.json")
