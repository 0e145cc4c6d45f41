"""Where a reward model reads its score: at the very end of its own chat template; one trained here at a reply's end."""

import copy
import json
from pathlib import Path

import pytest
import torch
import trl
from conftest import TINY_TRAINING, assistant, run, save_tiny, user
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlhf.data.encoding import encode_messages, encode_scored
from rlhf.data.rendering import RenderedChat, close_template, training_template
from rlhf.rewards import load_reward, resolve_reward
from rlhf.rewards.model import RewardModel

NEWLINE = "{{ '\n' }}"
BETWEEN = "{% if not loop.last or add_generation_prompt %}" + NEWLINE + "{% endif %}"
BODY = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>{{ '\n' }}{% endfor %}"
ASK = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PLAIN = "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}{{ '\n' }}{% endfor %}"
TEMPLATES = {
    "newline": BODY + ASK,
    "no newline": BODY.replace(NEWLINE, BETWEEN) + ASK,
    "two newlines": BODY.replace("'\n'", "'\n\n'") + ASK,
    "no end token": PLAIN + "{% if add_generation_prompt %}assistant:{% endif %}",
    "a last line": BODY + ASK + "\n",
    "text behind": BODY + "{% if not add_generation_prompt %}<|im_end|>\n{% endif %}" + ASK,
}
CHATS = [
    [*user("Tell me"), *assistant("hello there")],
    [*user("a"), *assistant("b"), *user("c d"), *assistant("")],
    [{"role": "system", "content": "Be kind."}, *user("x"), *assistant("y\nz")],
]


@pytest.fixture(scope="module")
def classifier(tiny):
    torch.manual_seed(1)
    return AutoModelForSequenceClassification.from_pretrained(tiny, num_labels=1).eval()


def plain_score(model, tokenizer, messages):
    ids = tokenizer.apply_chat_template(messages, return_tensors="pt", return_dict=True)
    return float(model(**ids).logits[0, 0])


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_reward_model_from_elsewhere_scores_as_plain_transformers(name, classifier, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATES[name]
    reward = RewardModel(classifier, own)
    for messages in CHATS:
        [score] = reward([messages[:-1]], [[messages[-1]]])
        assert score == pytest.approx(plain_score(classifier, own, messages), abs=1e-4)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_closed_template_ends_where_training_ended(name, tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = TEMPLATES[name]
    trained = [encode_messages(own, messages) for messages in CHATS]
    prompts = [encode_messages(own, messages[:-1], add_generation_prompt=True) for messages in CHATS]
    close_template(own)
    once = own.chat_template
    close_template(own)
    assert own.chat_template == once  # closed once
    for messages, ids, prompt in zip(CHATS, trained, prompts, strict=True):
        assert encode_scored(own, messages) == ids
        assert own.apply_chat_template(messages)["input_ids"] == ids
        assert encode_messages(own, messages[:-1], add_generation_prompt=True) == prompt


def test_each_of_several_templates_is_closed(tokenizer):
    own = copy.deepcopy(tokenizer)
    own.chat_template = {"default": TEMPLATES["newline"], "tool_use": TEMPLATES["no end token"]}
    trained = [encode_messages(own, messages) for messages in CHATS]
    close_template(own)
    assert [encode_scored(own, messages) for messages in CHATS] == trained
    assert all(template.startswith("{% set conversation %}") for template in own.chat_template.values())


def test_trls_training_variant_is_found_behind_a_closed_template(tokenizer):
    folder = Path(trl.__file__).parent / "chat_templates"
    own = copy.deepcopy(tokenizer)
    own.chat_template = (folder / "qwen3.jinja").read_text()
    variant = training_template(own.chat_template)
    messages = [*user("a"), {**assistant("4")[0], "reasoning_content": "hm"}, *user("b"), *assistant("5")]
    trained = encode_messages(own, messages)
    close_template(own)
    assert variant and variant in str(training_template(own.chat_template))
    assert encode_scored(own, messages) == trained
    assert RenderedChat(own, messages).reply(3)[3] == ""


def test_a_reward_model_trained_here_is_read_alike_by_everyone(tokenizer, files, tmp_path):
    base = save_tiny(tmp_path / "base", tokenizer)
    run("recipes/reward.py", "--model_name_or_path", base, "--use_peft", "false", "--dataset_name",
        files / "pairs.jsonl", "--output_dir", tmp_path / "reward", *TINY_TRAINING, "--max_steps", 2)  # fmt: skip
    theirs = AutoTokenizer.from_pretrained(tmp_path / "reward")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "reward", dtype=torch.float32).eval()
    pair = json.loads((files / "pairs.jsonl").read_text().splitlines()[0])
    messages = [*pair["prompt"], *pair["chosen"]]
    assert theirs.apply_chat_template(messages)["input_ids"] == encode_messages(tokenizer, messages)
    reward = load_reward(resolve_reward(str(tmp_path / "reward")), trl.ModelConfig(dtype="float32"))
    [score] = reward([pair["prompt"]], [pair["chosen"]])
    assert score == pytest.approx(plain_score(model, theirs, messages), abs=1e-5)
