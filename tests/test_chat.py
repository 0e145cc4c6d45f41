"""Chatting: the recipe in the terminal as a user runs it, and the page in a real headless Chromium."""

import json
import os
import signal
import socket
import urllib.error
import urllib.request

import pytest
import torch
from conftest import ENVIRONMENT, LORA, ROOT, make_adapter, present, save_tiny, user
from datasets import load_dataset
from playwright.sync_api import sync_playwright
from recipe_process import Forked, run_recipe, start
from safetensors.torch import load_file, save_file
from test_pages import free_port, launch

from rlhf.comparisons import make_task
from rlhf.data.encoding import encode_prompt
from rlhf.data.rows import preference_rows
from rlhf.errors import InputError
from rlhf.feedback.chat import Chat, Conversation
from rlhf.feedback.chat_terminal import harmless
from rlhf.feedback.chat_votes import ChatVotes
from rlhf.feedback.sampling import read_tasks, write_tasks
from rlhf.feedback.speakers import load_speakers, resolve_speakers
from rlhf.feedback.votes import Vote, VoteFile, now
from rlhf.models.adapters import active_adapter
from rlhf.models.tokenizers import load_tokenizer
from rlhf.run.files import write_jsonl

NASTY = (
    "<script>document.title='own'</script> <img src=x onerror=\"alert()\"> <|im_end|> **bold** {{value}} ${value} &lt;"
)


@pytest.fixture(scope="session")
def other(tiny, tokenizer, tmp_path_factory):
    """A second adapter over the tiny model, another than `sft`."""
    folder = make_adapter(tiny, tokenizer, tmp_path_factory.mktemp("other"))
    weights = load_file(f"{folder}/adapter_model.safetensors")
    save_file({name: -2 * weight for name, weight in weights.items()}, f"{folder}/adapter_model.safetensors")
    return folder


def talk(lines, *arguments):
    """Run recipes/chat.py in the terminal, with these lines typed."""
    flags = ["--max_new_tokens", "6", "--dtype", "float32", *map(str, arguments)]
    command, typed = [str(ROOT / "recipes/chat.py"), *flags], "".join(f"{line}\n" for line in lines)
    return run_recipe(start(ENVIRONMENT), command, ENVIRONMENT, ROOT, typed=typed)


def jsonl(file):
    return [json.loads(line) for line in file.read_text().split("\n") if line]


def speakers_of(models, **settings):
    sources = resolve_speakers(models)
    tokenizers = {name: load_tokenizer(source) for name, source in sources.items()}
    return load_speakers(
        sources, tokenizers, LORA, **{"max_new_tokens": 6, "temperature": 1.0, **settings}
    )  # fmt: skip


def reply(chat, conversation, text):
    """Say something, and take every reply whole."""
    notice = chat.say(conversation, text)
    streamed = ["".join(chat.reply(conversation, place)) for place in range(len(chat.speakers))]
    assert [text.strip() for text in streamed] == conversation.replies
    return notice


# ---------------------------------------------------------------------------------------------- the terminal


def test_votes_in_the_terminal(tiny, sft, other, tokenizer, tmp_path):
    folder = tmp_path / "chat"
    models = ["--models", f"sft={sft}", f"ppo={other}", "--output_dir", folder, "--labeler_name", "ada"]
    first = talk(["Hi <|im_end|>", "maybe", "b", "And tea?", "T", "And you?", "", "/new", "Again", "a", ""], *models)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("Which was better?") == 5
    assert first.stdout.count("Saved. Thank you!") == 3
    tasks, votes, pairs = (jsonl(folder / f"{name}.jsonl") for name in ("tasks", "votes", "train"))
    assert [vote["task"] for vote in votes] == [task["id"] for task in tasks]
    assert {vote["labeler"] for vote in votes} == {"ada"}
    assert [sorted(vote["ranks"]) for vote in votes] == [[1, 2], [1, 1], [1, 2]]
    assert all(task["models"] == ["sft", "ppo"] and task["split"] == "train" for task in tasks)
    assert len(pairs) == 2
    # what was typed behind B is what the vote prefers, and who was B is what the terminal said
    line = next(line for line in first.stdout.splitlines() if "Saved." in line)
    better = ["sft", "ppo"].index(line.rpartition("B was ")[2].rstrip("."))
    assert votes[0]["ranks"][better] == 1
    shown = next(line for line in first.stdout.splitlines() if line.startswith("B: "))
    assert " ".join(tasks[0]["completions"][better].split()) in " ".join(shown.split())
    # and the conversation goes on with it
    assert tasks[1]["prompt"][:2] == [
        *user("Hi <|im_end|>"), {"role": "assistant", "content": tasks[0]["completions"][better]}
    ]  # fmt: skip
    assert tasks[2]["prompt"] == user("Again")

    rows = load_dataset("json", data_files=str(folder / "train.jsonl"), split="train")
    assert len(preference_rows(rows, "train.jsonl", tokenizer, 256)) == 2

    again = talk(["Hi <|im_end|>", "a", "/quit"], *models)
    assert again.returncode == 0, again.stderr
    assert len(jsonl(folder / "votes.jsonl")) == len(jsonl(folder / "tasks.jsonl")) == 4
    assert jsonl(folder / "votes.jsonl")[:3] == votes


def test_one_model_needs_no_folder_and_sampling_is_seeded(tiny, tmp_path):
    session = talk(["Hi", "Well?"], "--models", tiny, "--output_dir", tmp_path / "no")
    assert (session.returncode, session.stdout.count(f"{tiny}: ")) == (0, 2), session.stderr
    assert "Which was better" not in session.stdout
    assert not (tmp_path / "no").exists()
    replies = []
    for seed in (1, 1, 2):
        chat, conversation = Chat(speakers_of([tiny]), None, max_new_tokens=6, seed=seed), Conversation()
        for text in ("Hi", "Hi"):
            reply(chat, conversation, text)
        replies.append((conversation.messages, conversation.replies))
    assert replies[0] == replies[1] != replies[2]
    messages, last = replies[0]
    assert messages[1]["content"] != last[0]


def test_ctrl_c_ends_cleanly(tiny, sft, tmp_path):
    process = Forked([str(ROOT / "recipes/chat.py"), "--models", sft, "--max_new_tokens", "200"], ENVIRONMENT, ROOT)
    process.stdin.write("Hi\n")
    process.stdin.flush()
    seen = ""
    while f"{sft}: " not in seen:
        letter = process.stdout.read(1)
        assert letter, process.stderr.read()
        seen += letter
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0, process.stderr.read()
    assert "Traceback" not in process.stderr.read()


MISTAKES = {
    "three models": (["--models", "starter", "a=starter", "b=starter"], "--models"),
    "labeler": (["--models", "a=starter", "b=starter", "--labeler_name", "a\tb"], "labeler needs a name"),
    "temperature": (["--temperature", "0"], "--temperature"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_one_line(mistake, tmp_path):
    flags, expected = MISTAKES[mistake]
    result = talk([], *flags, "--output_dir", tmp_path / "chat")
    assert result.returncode == 2
    assert expected in result.stderr.splitlines()[-1]
    assert result.stderr.splitlines()[-1].startswith("error: ")
    assert "Loading weights" not in result.stderr


@pytest.mark.parametrize("words", [["a=starter", "a=starter"], ["=starter"], ["a="], ["starter", "starter"], ["./no"]])
def test_models_that_can_not_be_meant(words):
    with pytest.raises(InputError, match="--models"):
        resolve_speakers(words)


def test_a_port_in_use_and_a_reward_adapter_are_refused_before_loading(tiny, sft, reward_adapter):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = talk([], "--models", tiny, "--page", "true", "--server_port", taken.getsockname()[1])
    assert (result.returncode, "in use. Give another one." in result.stderr) == (2, True)
    assert "Loading weights" not in result.stderr
    with pytest.raises(InputError, match="is a reward adapter"):
        resolve_speakers([f"sft={sft}", f"reward={reward_adapter}"])


def test_a_terminal_gets_no_control_characters():
    assert harmless("a\x1b[2Jb\r\x07\n\tc \u200d🙂") == "a\ufffd[2Jb\ufffd\ufffd\n\tc \u200d🙂"


# ---------------------------------------------------------------------------------------------- folders


def task_and_vote(folder, labeler="me", number=0):
    votes = ChatVotes(str(folder), labeler)
    new = votes.save(make_task("train", user(f"Hi {number}\u2028"), ["yes", "no"], ["a", "b"]), "second")
    votes.write_pairs()
    return new


def test_votes_join_those_of_a_collection(tmp_path):
    tasks = [make_task(split, user(f"{split}?"), ["x", "y", "z"], ["m"] * 3) for split in ("train", "test")]
    write_tasks(str(tmp_path), tasks)
    run_file = {"recipe": "collect", "settings": {"labeler": "human"}, "finished": True}
    (tmp_path / "run.json").write_text(json.dumps(run_file))
    file = VoteFile(tmp_path / "votes.jsonl")
    for task in tasks:
        file.append(Vote(task.id, "bob", False, [2, 1, 3], None, False, now()))
        file.append(Vote(task.id, "bob", True, [1, 2, 3], None, False, now()))
    assert task_and_vote(tmp_path)
    assert [row["chosen"][0]["content"] for row in jsonl(tmp_path / "train.jsonl")] == ["y", "x", "y", "no"]
    assert len(jsonl(tmp_path / "test.jsonl")) == 3
    assert [task.id for task in present(read_tasks(str(tmp_path)))][:2] == [task.id for task in tasks]


def test_foreign_folders_are_refused_and_left_alone(tmp_path):
    pairs, run_folder, unsampled, file = (tmp_path / name for name in ("pairs", "run", "unsampled", "file"))
    write_jsonl(pairs / "train.jsonl", [{"chosen": "a", "rejected": "b"}])
    for folder, recipe, settings in ((run_folder, "collect", {}), (unsampled, "collect", {"labeler": "human"})):
        folder.mkdir()
        (folder / "run.json").write_text(json.dumps({"recipe": recipe, "settings": settings, "finished": True}))
    file.write_text("")
    for folder in (pairs, run_folder, unsampled, file):
        before = sorted(str(path) for path in folder.rglob("*"))
        with pytest.raises(InputError, match="--output_dir"):
            ChatVotes(str(folder), "me")
        assert sorted(str(path) for path in folder.rglob("*")) == before
    for content in ('{"recipe": "coll', '{"recipe": "collect", "finished": true}', "[]"):
        (unsampled / "run.json").write_text(content)
        with pytest.raises(InputError, match=r"unsampled/run\.json: "):
            ChatVotes(str(unsampled), "me")
    result = talk(["Hi"], "--models", "a=starter", "b=starter", "--output_dir", pairs)
    assert (result.returncode, "--output_dir" in result.stderr.splitlines()[-1]) == (2, True)
    assert jsonl(pairs / "train.jsonl") == [{"chosen": "a", "rejected": "b"}]


def test_a_cut_off_task_is_passed_over(tmp_path):
    assert task_and_vote(tmp_path)
    with (tmp_path / "tasks.jsonl").open("ab") as file:
        file.write(b'{"id": "0123", "spl')
    assert task_and_vote(tmp_path, number=1)
    assert not task_and_vote(tmp_path, number=1)  # answered already
    assert task_and_vote(tmp_path, labeler="eve", number=1)
    assert len(present(read_tasks(str(tmp_path)))) == 2
    assert [row["labeler"] for row in jsonl(tmp_path / "train.jsonl")] == ["me", "me", "eve"]


def test_nothing_is_thanked_for_that_is_not_saved(sft, other, tmp_path, monkeypatch):
    chat = Chat(speakers_of([f"a={sft}", f"b={other}"]), ChatVotes(str(tmp_path), "me"), max_new_tokens=6, seed=0)
    conversation = Conversation()
    reply(chat, conversation, "Hi")

    def full(_descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="not saved"):
        chat.vote(conversation, 0)
    monkeypatch.undo()
    assert "Saved" in chat.vote(conversation, 0)
    assert len(present(read_tasks(str(tmp_path)))) == len(ChatVotes(str(tmp_path), "me").file.votes) == 1
    with pytest.raises(InputError, match="nothing to vote on"):
        chat.vote(conversation, 0)


# ---------------------------------------------------------------------------------------------- models


def test_two_adapters_share_one_base(tiny, sft, other, tokenizer):
    speakers = speakers_of([f"a={sft}", f"b={other}"], temperature=0.01)
    assert speakers[0].model is speakers[1].model
    base_and_adapter = speakers_of([f"a={tiny}", f"b={sft}"], temperature=0.01)
    assert base_and_adapter[0].model is base_and_adapter[1].model
    assert [speaker.adapter for speaker in base_and_adapter] == [None, "default"]
    for pair, paths in ((speakers, (sft, other)), (base_and_adapter, (tiny, sft))):
        apart = [speakers_of([path], temperature=0.01)[0] for path in paths]
        ids = torch.tensor([encode_prompt(tokenizer, user("Hello there"))])
        for together, alone in zip(pair, apart, strict=True):
            with torch.no_grad(), active_adapter(together.model, together.adapter):
                torch.testing.assert_close(together.model(ids).logits, alone.model(ids).logits)
        replies = []
        for both in (pair, apart):
            conversation = Conversation()
            reply(Chat(both, None, max_new_tokens=6, seed=3), conversation, "Hi")
            replies.append(conversation.replies)
        assert replies[0] == replies[1]
        assert len(set(replies[0])) == 2


def test_models_of_different_families(sft, tokenizer, tmp_path):
    small = save_tiny(tmp_path / "small", tokenizer, seed=5, hidden_size=8, max_position_embeddings=64)
    speakers = speakers_of([f"a={sft}", small])
    assert [speaker.name for speaker in speakers] == ["a", small]
    assert speakers[0].model is not speakers[1].model
    assert [speaker.context for speaker in speakers] == [256, 64]


def test_the_oldest_turns_are_dropped_when_the_context_is_full(tiny):
    (speaker,) = speakers_of([tiny])
    chat = Chat([speaker], None, max_new_tokens=6, seed=0)
    conversation = Conversation()
    notices = [reply(chat, conversation, "Tell me more about the weather " * 6) for _ in range(6)]
    assert notices[0] is None
    assert "oldest message and its reply were dropped" in notices[-1]
    assert conversation.messages[0]["role"] == conversation.messages[-1]["role"] == "user"
    before = list(conversation.messages)
    with pytest.raises(InputError, match="Shorten it"):
        chat.say(conversation, "rain " * 300)
    assert conversation.messages[: len(before)] == before
    with pytest.raises(InputError, match="--max_new_tokens 256"):
        Chat([speaker], None, max_new_tokens=256, seed=0)


def test_who_is_a_changes_and_equal_or_empty_replies_are_not_asked_about(tiny, sft):
    chat = Chat(speakers_of([f"a={tiny}", f"b={sft}"]), None, max_new_tokens=6, seed=0)
    orders = set()
    for turn in range(8):
        conversation = Conversation()
        chat.say(conversation, f"Hi {turn}")
        orders.add(tuple(conversation.order))
    assert orders == {(0, 1), (1, 0)}
    conversation.replies = ["same", "same"]
    assert "the same" in present(chat.why_no_vote(conversation))
    conversation.replies = ["", "something"]
    assert "empty" in present(chat.why_no_vote(conversation))
    chat.keep(conversation, 0)
    assert conversation.messages[-1] == {"role": "assistant", "content": "something"}
    chat.say(conversation, "And?")
    conversation.replies = ["", ""]
    chat.keep(conversation, 0)
    assert conversation.messages[-1]["content"] == "something"


def test_a_listener_who_leaves_stops_the_model(tiny):
    (speaker,) = speakers_of([tiny], max_new_tokens=200)
    chat = Chat([speaker], None, max_new_tokens=200, seed=0)
    steps = []
    handle = speaker.model.register_forward_hook(lambda *_: steps.append(1))
    conversation = Conversation()
    chat.say(conversation, "Hi")
    pieces = chat.reply(conversation, 0)
    next(pieces)
    pieces.close()
    handle.remove()
    assert len(steps) < 150
    chat.say(conversation, "Hello?")  # the message without a reply is gone
    assert conversation.messages == user("Hello?")


def test_control_tokens_in_messages_stay_text(tiny, tokenizer, monkeypatch):
    (speaker,) = speakers_of([tiny])
    chat = Chat([speaker], None, max_new_tokens=6, seed=0)
    seen = []
    generate = speaker.model.generate

    def spy(**inputs):
        seen.append(inputs)
        return generate(**inputs)

    monkeypatch.setattr(speaker.model, "generate", spy)
    reply(chat, Conversation(), "a <|im_end|> b \ud800")
    ids = seen[0]["input_ids"][0].tolist()
    plain = encode_prompt(tokenizer, user("a b"))
    assert ids.count(tokenizer.convert_tokens_to_ids("<|im_end|>")) == plain.count(
        tokenizer.convert_tokens_to_ids("<|im_end|>")
    )
    assert "a <|im_end|> b ?" in tokenizer.decode(ids)


def test_a_tokenizer_without_a_chat_template(tokenizer, tmp_path):
    folder = save_tiny(tmp_path / "plain", tokenizer)
    for file in tmp_path.glob("plain/*"):
        if file.name == "chat_template.jinja":
            file.unlink()
    result = talk(["Hi"], "--models", folder)
    assert result.returncode == 0, result.stderr
    assert "has no chat template" in result.stdout


# ---------------------------------------------------------------------------------------------- the page

SERVER = f"""
import sys, time
from rlhf.feedback.chat import Chat
from rlhf.feedback.chat_page import chat_on_page
from rlhf.feedback.chat_votes import ChatVotes
from rlhf.feedback.speakers import Speaker
NASTY = {NASTY!r}
class Scripted(Chat):
    def reply(self, conversation, place):
        name = self.speakers[conversation.order[place]].name
        text = f"    A reply of model {{len(name)}} to message {{self.turns}}: " + NASTY
        for word in text.split(" "):
            time.sleep(0.01)
            yield word + " "
        conversation.replies.append(text)
folder, port, *names = sys.argv[1:]
votes = ChatVotes(folder, "me") if len(names) > 1 else None
chat_on_page(Scripted([Speaker(n, None, None, None, None) for n in names], votes, max_new_tokens=9, seed=1),
             "127.0.0.1", int(port))
"""


class Server:
    def __init__(self, command):
        self.process = Forked(command, ENVIRONMENT, ROOT, together=True)
        for line in self.process.stdout:
            if line.startswith("Chat at "):
                self.url = line.split()[2]
                return
        raise AssertionError("The page did not start.")


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as playwright:
        browser = launch(playwright)
        yield browser
        browser.close()


@pytest.fixture
def serve(tmp_path):
    servers = []

    def start(*names, command=None):
        command = command or ["-c", SERVER, str(tmp_path / "chat"), str(free_port()), *names]
        servers.append(Server(command))
        return servers[-1]

    yield start
    for server in servers:
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()


def open_page(browser, server, **context):
    page = browser.new_context(**context).new_page()
    page.problems, page.asked, page.sent = [], [], []
    page.on("pageerror", lambda error: page.problems.append(str(error)))
    page.on("console", lambda line: page.problems.append(line.text) if line.type == "error" else None)
    page.on("request", lambda request: page.asked.append(request.url))
    page.on("request", lambda request: page.sent.append(request.post_data) if request.url.count("queue/join") else None)
    page.goto(server.url)
    page.wait_for_selector("textarea")
    return page


def status(page, text):
    page.wait_for_function(
        "text => document.querySelector('#status')?.innerText.includes(text)", arg=text, timeout=20_000
    )
    return page.locator("#status").inner_text()


def local(page, server):
    return all(url.startswith(server.url) or url.startswith(("data:", "blob:")) for url in page.asked)


def test_two_models_on_the_page(browser, serve, tmp_path):
    server = serve("sft", "secret-ppo")
    page = open_page(browser, server, viewport={"width": 1200, "height": 900})
    page.locator("textarea").fill(f"  Hello {NASTY}")
    page.keyboard.press("Enter")
    page.get_by_text("A is better").wait_for()
    assert NASTY in page.locator("#talk").inner_text()
    sides = page.locator(".reply").all_inner_texts()
    assert len(sides) == 2
    assert all(NASTY in side for side in sides)
    assert page.title() == "Chat"
    assert page.locator("img[src=x]").count() == 0
    assert "secret-ppo" not in "".join(sides)
    assert "Votes" not in page.content()
    assert not (tmp_path / "chat" / "votes.jsonl").exists()
    page.get_by_text("B is better").dblclick()
    said = status(page, "Saved. Thank you!")
    (vote,) = jsonl(tmp_path / "chat" / "votes.jsonl")
    (task,) = jsonl(tmp_path / "chat" / "tasks.jsonl")
    better = task["models"].index(said.rpartition("B was ")[2].rstrip("."))
    assert (vote["task"], vote["ranks"][better], len(task["prompt"])) == (task["id"], 1, 1)
    assert f"model {len(task['models'][better])} " in sides[1]
    assert page.get_by_text(f"B: {task['models'][better]}").count() == 1

    page.locator("textarea").fill("And then?")
    page.get_by_role("button", name="Send").click()
    page.get_by_text("Tie").click()
    status(page, "Saved. Thank you!")
    tasks = jsonl(tmp_path / "chat" / "tasks.jsonl")
    assert tasks[1]["prompt"][1]["content"] == task["completions"][better]
    page.locator("textarea").fill("And now?")
    page.keyboard.press("Enter")
    page.get_by_text("Skip").click()
    status(page, "Skipped")
    assert len(jsonl(tmp_path / "chat" / "votes.jsonl")) == 2
    assert len(jsonl(tmp_path / "chat" / "train.jsonl")) == 1
    page.get_by_text("Start over").click()
    page.wait_for_function("!document.querySelector('#talk').innerText.includes('Hello')")
    assert local(page, server)
    assert page.problems == []

    event = json.loads(page.sent[0])  # forged: in the name of that tab, from elsewhere, and with wrong values
    other = {"session_hash": "x"}
    for changes, headers, code in (
        ({}, {}, 403), (other, {"Origin": "http://evil.example"}, 403), (other, {"Host": "evil.example"}, 403),
        (other, {"Content-Type": "text/plain"}, 415), ({"fn_index": 99}, {}, 400), ({"fn_index": "0"}, {}, 400),
        ({"data": []}, {}, 400), ({"data": ["Hi"]}, {}, 400), ({"data": {"0": "Hi"}}, {}, 400),
    ):  # fmt: skip
        request = urllib.request.Request(
            f"{server.url}gradio_api/queue/join", json.dumps(event | changes).encode(),
            {"Content-Type": "application/json", **headers},
        )  # fmt: skip
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(request)
        assert refused.value.code == code, changes


def test_two_models_on_a_phone(browser, serve):
    server = serve("sft", "policy")
    phone = {"viewport": {"width": 390, "height": 800}, "is_mobile": True, "has_touch": True, "color_scheme": "dark"}
    page = open_page(browser, server, **phone)
    page.locator("textarea").fill("Hello")
    page.get_by_role("button", name="Send").tap()
    page.get_by_text("A is better").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    first, second = (page.locator(".reply").nth(n).bounding_box() for n in (0, 1))
    assert second["y"] >= first["y"] + first["height"]
    page.get_by_text("A is better").tap()
    status(page, "Saved. Thank you!")
    assert page.problems == []


def test_one_model_on_the_page_of_the_recipe(browser, serve, sft):
    command = [str(ROOT / "recipes/chat.py"), "--models", f"mine={sft}", "--page", "true", "--dtype", "float32"]
    server = serve(command=[*command, "--server_port", str(free_port()), "--max_new_tokens", "8"])
    page = open_page(browser, server)
    page.locator("textarea").fill("Hi")
    page.keyboard.press("Enter")
    page.locator("#talk .assistant .text").first.wait_for()
    assert page.locator(".reply").count() == 0
    assert not page.get_by_text("A is better").is_visible()
    page.locator("textarea").fill("rain " * 400)
    for _ in range(300):  # while the reply is written, another message isn't taken
        page.keyboard.press("Enter")
        if "Shorten it" in page.locator("#status").inner_text():
            break
        page.wait_for_timeout(200)
    status(page, "Shorten it")
    assert local(page, server)
    assert page.problems == []
    server.process.send_signal(signal.SIGINT)
    assert server.process.wait(60) == 0
