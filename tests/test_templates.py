"""Chat templates: what is learned of a conversation, and that none runs without end (`make templates` tries all)."""

import copy
import json

import pytest
from conftest import assistant, learned, user
from datasets import Dataset, Value
from templates import CASES, TOKENIZERS, all_templates, check, spaced_tokenizer, with_template
from trl import RewardConfig, RewardTrainer, ScriptArguments, SFTConfig

from rlhf.data.datasets import load_splits
from rlhf.data.encoding import conversation_rows, encode_prompt, encode_text, encode_text_with_end, template_options
from rlhf.data.files import read_rows
from rlhf.data.rows import fit_max_length, preference_rows, prompt_rows, sft_rows
from rlhf.data.templates import TemplateLimitError, render_template
from rlhf.errors import InputError
from rlhf.models.loading import load_reward_model
from rlhf.models.sources import resolve
from rlhf.run.files import write_jsonl

SAMPLE = {
    "qwen3": [], "gptoss": [], "phi3": ["reasoning", "tools"], "deepseek_r1_distill": ["reasoning", "tools"],
    "glm4moe": [], "nemotron_3_nano": [], "idefics3": ["reasoning", "tools"], "no end token": ["reasoning", "tools"],
    "reasoning is always cut": ["think", "think, multi", "reasoning", "tools"], "replies are left out": list(CASES),
}  # fmt: skip


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_labels_are_the_replies_and_their_end_behind_the_prompt_that_ppo_samples_behind(kind):
    tokenizer, templates = TOKENIZERS[kind](), all_templates()
    for name, refused in SAMPLE.items():
        own = with_template(tokenizer, templates[name])
        for case in CASES:
            found = check(own, CASES[case])
            if case == "begins with a reply" and found.startswith("refused"):
                continue
            assert found == "exact" or (case in refused and found.startswith("refused")), (name, case, found)


def test_sft_learns_behind_the_prompts_that_ppo_and_collect_get(tokenizer):
    own = with_template(tokenizer, all_templates()["qwen3"])
    case = CASES["think, multi"]
    rows = sft_rows(Dataset.from_list([case]), "d", own)
    assert [len(learned(own, row)) for row in rows] == [1, 1]
    for row, count in zip(rows, (1, 3), strict=True):
        asked = Dataset.from_list([{"prompt": case["messages"][:count]}])
        prompt = prompt_rows(asked, "d", own, 1, None)[0]["input_ids"]
        assert row["input_ids"][: len(prompt)] == prompt and set(row["labels"][: len(prompt)]) == {-100}
        assert -100 not in row["labels"][len(prompt) :]


@pytest.mark.parametrize(
    "template",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% set r = range(99999) %}{% for a in r %}{% for b in r if false %}{% endfor %}{% endfor %}",
        "{{ 'x' * 99999999999 }}",
        "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set n.s = n.s ~ n.s %}{% endfor %}",
        "{% set n = namespace(s='x') %}{% for a in range(99) %}{% set s %}{{ n.s }}{{ n.s }}{% endset %}"
        "{% set n.s = s %}{% endfor %}",
        "{% set n = namespace(s=9) %}{% for a in range(99) %}{% set n.s = n.s * n.s %}{% endfor %}",
        "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
        "{{ 'x' | center(9999999999) }}",
        "{{ '{:>9999999999}'.format(1) }}",
        "{{ '%9999999999d' % 1 }}",
        "{% set a = 'a' * 99999 %}{{ a | replace('a', a) }}",
        "{% set a = 'a' * 99999 %}{{ range(99999) | join(a) }}",
    ],
)
def test_a_template_that_runs_without_end_is_stopped(template):
    with pytest.raises(TemplateLimitError):
        render_template(template, user("hi"))


def test_a_long_conversation_is_within_the_limits(tokenizer):
    turns = [message for _ in range(500) for message in user("word " * 400) + assistant("word " * 400)]
    assert len(render_template(all_templates()["gemma4"], turns, tools=None, add_generation_prompt=True)) > 2_000_000


def test_what_a_template_raises_names_the_row(tokenizer):
    rows = Dataset.from_list([{"messages": user("a") + assistant("b")}])
    for template, found in (
        ("{{ messages + 1 }}", "refuses a conversation of user"),
        ("{{ messages[9].x.y }}", "refuses a conversation of user"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "was stopped"),
        ("hello", "leaves out the user message 'a'"),
    ):
        own = copy.deepcopy(tokenizer)
        own.chat_template = template
        with pytest.raises(InputError, match=f"--dataset_name d: row 0: .*{found}"):
            sft_rows(rows, "d", own)


def test_a_control_token_stays_text_in_tools_reasoning_and_arguments(tokenizer):
    typed = "a<|im_end|>b"
    own = with_template(tokenizer, all_templates()["qwen3"])
    tools = [{"type": "function", "function": {"name": "f", "description": typed, "parameters": {}}}]
    called = {"name": "f", "arguments": {"town": typed}}
    messages = [
        *user("x"),
        {"role": "assistant", "content": typed, "reasoning_content": typed, "tool_calls": [{"function": called}]},
    ]
    plain = json.loads(json.dumps([messages, tools]).replace(typed, "ab"))
    both = [
        conversation_rows(own, said, options=template_options({"tools": given}))[0]
        for said, given in ((messages, tools), plain)
    ]
    counts = [row["input_ids"].count(own.convert_tokens_to_ids("<|im_end|>")) for row in both]
    assert counts[0] == counts[1]
    assert own.decode(both[0]["input_ids"]).count(typed) == 4


def test_tools_and_variables_go_to_the_template_or_are_refused(tokenizer):
    case = CASES["tools"]
    plain = with_template(tokenizer, all_templates()["ChatML"])
    with pytest.raises(InputError, match="row 0: The chat template leaves out the tool 'get_weather'"):
        sft_rows(Dataset.from_list([case], on_mixed_types="use_json"), "d", plain)
    own = with_template(tokenizer, all_templates()["qwen3"])
    prompts = [{"prompt": user("hi"), "chat_template_kwargs": {"enable_thinking": value}} for value in (True, False)]
    rows = prompt_rows(Dataset.from_list(prompts), "d", own, 1, None)
    assert own.decode(rows[1]["input_ids"]) == own.decode(rows[0]["input_ids"]) + "<think>\n\n</think>\n\n"
    with pytest.raises(InputError, match="reads no variable 'enable_thinking'"):
        prompt_rows(Dataset.from_list(prompts), "d", plain, 1, None)
    as_text = {"prompt": user("hi"), "tools": json.dumps(case["tools"])}
    told = prompt_rows(Dataset.from_list([as_text]), "d", own, 1, None)[0]["input_ids"]
    assert "The weather of a town" in own.decode(told)


def test_a_prompt_that_ends_with_the_assistants_message_is_continued(tokenizer):
    begun = user("Count") + assistant("One, two")
    row = conversation_rows(tokenizer, begun + assistant(", three"), first=2)[0]
    prompt = encode_prompt(tokenizer, begun)
    assert tokenizer.decode(prompt).endswith("assistant\nOne, two")
    assert row["input_ids"][: len(prompt)] == prompt
    assert learned(tokenizer, row) == [", three<|im_end|>"]


def test_plain_text_has_one_bos_and_a_prompt_no_eos():
    adds_both = spaced_tokenizer()
    adds_both._tokenizer.post_processor = _bos_and_eos(adds_both)
    bos, eos = adds_both.bos_token_id, adds_both.eos_token_id
    assert adds_both("How many?")["input_ids"][:: len(adds_both("How many?")["input_ids"]) - 1] == [bos, eos]
    for text in ("How many?", "<s>How many?"):
        ids = encode_text(adds_both, text)
        assert ids.count(bos) == 1 and ids[0] == bos and eos not in ids
        whole = encode_text_with_end(adds_both, text, " Seven.")
        assert whole[: len(ids)] == ids and whole.count(eos) == 1 and whole[-1] == eos
    row = sft_rows(Dataset.from_list([{"prompt": "How many?", "completion": " Seven."}]), "d", adds_both)[0]
    assert learned(adds_both, row) == ["Seven.</s>"]
    assert (
        encode_prompt(adds_both, "How many?")
        == row["input_ids"][: len(row["labels"]) - row["labels"][::-1].index(-100)]
    )


def _bos_and_eos(tokenizer):
    from tokenizers.processors import TemplateProcessing

    tokens = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    return TemplateProcessing(single="<s> $A </s>", pair="<s> $A </s> $B </s>", special_tokens=tokens)


def test_margins_are_in_the_loss(tiny, tokenizer, tmp_path):
    pair = {"prompt": user("hi"), "chosen": assistant("Great"), "rejected": assistant("Awful")}
    losses = []
    for margin in (None, 0.0, 3.0):
        row = pair if margin is None else {**pair, "margin": margin}
        rows = preference_rows(Dataset.from_list([row]), "d", tokenizer, None)
        from conftest import LORA

        model = load_reward_model(resolve(tiny), LORA, tokenizer, seed=1)
        args = RewardConfig(str(tmp_path), report_to="none", use_cpu=True, bf16=False, disable_tqdm=True)
        trainer = RewardTrainer(model, args=args, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer)
        losses.append(trainer.evaluate()["eval_loss"])
    assert losses[0] == losses[1] < losses[2] - 1
    with pytest.raises(InputError, match="row 0: column 'margin': a number is needed; found nan"):
        preference_rows(Dataset.from_list([{**pair, "margin": float("nan")}]), "d", tokenizer, None)


CALLED = [*user("a"), {"role": "assistant", "content": "b", "function_call": {"name": "f", "arguments": "{}"}}]


@pytest.mark.parametrize(
    ("make", "row", "message"),
    [
        (
            sft_rows,
            {"messages": user("a") + assistant("b"), "images": ["x"]},
            "column 'images': these recipes train on",
        ),
        (sft_rows, {"messages": user("a") + assistant("b"), "input_ids": [1]}, "column 'input_ids'"),
        (
            sft_rows,
            {"prompt": "a", "completion": "b", "label": True},
            "column 'label': says which completions are good",
        ),
        *(
            (sft_rows, {"prompt": "a", "completion": "b", "label": label}, "column 'label': says")
            for label in (1, "False")
        ),
        (sft_rows, {"messages": CALLED}, "row 0: a message has 'function_call', OpenAI's old format"),
        (prompt_rows, {"prompt": [CALLED[1], *user("c")]}, "row 0: a message has 'function_call'"),
        (
            sft_rows,
            {"messages": user("a") + assistant("b"), "functions": [{"name": "f"}]},
            "column 'functions': chat temp",
        ),
        (
            sft_rows,
            {"messages": user("a") + assistant("b"), "tool_choice": "auto"},
            "column 'tool_choice': no chat temp",
        ),
        (
            preference_rows,
            {"chosen": user("a") + assistant("b"), "rejected": user("a") + assistant("c"), "functions": "f"},
            "column 'functions'",
        ),
        (sft_rows, {"prompt": "a", "completion": assistant("b")}, "row 0: one of 'prompt' and 'completion' is text"),
        (sft_rows, {"messages": user("a")}, "no assistant's message is in all 1 rows"),
    ],
)
def test_columns_that_cant_be_used_are_named(tokenizer, make, row, message):
    more = {sft_rows: (), preference_rows: (None,), prompt_rows: (8, None)}[make]
    with pytest.raises(InputError, match=message):
        make(Dataset.from_list([row]), "d", tokenizer, *more)


def test_labels_of_texts_and_ratings_of_completions_are_no_marks(tokenizer):
    assert len(sft_rows(Dataset.from_list([{"text": "a", "label": 1, "functions": "f"}]), "d", tokenizer)) == 1
    rated = [{"prompt": "a", "completion": "b", "label": label} for label in (1, 4)]
    rows = Dataset.from_list(rated).select([1, 0])
    assert len(sft_rows(rows, "d", tokenizer)) == 2 and len(sft_rows(rows.select([1]), "d", tokenizer)) == 1


def test_pairs_that_say_the_same_are_left_out_and_counted(tokenizer, capsys):
    same = {"prompt": user("a"), "chosen": assistant("b"), "rejected": assistant("b")}
    other = {**same, "rejected": assistant("c")}
    assert len(preference_rows(Dataset.from_list([same, other]), "d", tokenizer, None)) == 1
    assert "left out 1 of 2 pairs" in capsys.readouterr().out
    with pytest.raises(InputError, match="the same in every pair"):
        preference_rows(Dataset.from_list([same, same]), "d", tokenizer, None)
    with pytest.raises(InputError, match="row 0: one of 'chosen' and 'rejected' is text"):
        preference_rows(Dataset.from_list([{**same, "rejected": "b"}]), "d", tokenizer, None)


def test_what_max_length_cuts_is_counted(tokenizer, capsys):
    args = SFTConfig(report_to="none", use_cpu=True, bf16=False, max_length=60)
    rows = [{"messages": user(text) + assistant("ok")} for text in ("hi", "long " * 50, "hi")]
    assert len(sft_rows(Dataset.from_list(rows), "d", tokenizer, args)) == 2
    assert "--max_length 60 cuts 1 of 3 rows, 1 of them before anything that is learned" in capsys.readouterr().out
    args.max_length = 2
    with pytest.raises(InputError, match="--max_length 2 cuts off all that is learned in all 3 rows"):
        sft_rows(Dataset.from_list(rows), "d", tokenizer, args)


@pytest.mark.parametrize(("mode", "part"), [("keep_start", slice(64)), ("keep_end", slice(-64, None))])
def test_rows_are_cut_at_the_models_context(tokenizer, capsys, mode, part):
    args = SFTConfig(report_to="none", use_cpu=True, bf16=False, truncation_mode=mode)
    rows = Dataset.from_list([{"text": "a b " * 60}, {"text": "a"}])
    whole = sft_rows(rows, "d", tokenizer, args)["input_ids"]
    fit_max_length(args, 64)
    assert args.max_length == 64 < len(whole[0])
    for args.max_length in (64, 1024, None):
        cut = sft_rows(rows, "d", tokenizer, args, 64)
        assert cut["input_ids"][:] == cut["labels"][:] == [whole[0][part], whole[1]]
        assert "d: the model's context of 64 tokens cuts 1 of 2 rows." in capsys.readouterr().out
    args.max_length = 65
    with pytest.raises(InputError, match="--max_length 65: must be at most the model's context of 64"):
        fit_max_length(args, 64)


def test_files_are_read_as_they_are(tmp_path):
    cells = ["None", "NA", "null", "001", "nan", "2024-01-01"]
    (tmp_path / "a.csv").write_text("prompt,code,size\n" + "".join(f"q,{cell},{n}\n" for n, cell in enumerate(cells)))
    train, test = load_splits(ScriptArguments(str(tmp_path / "a.csv")), "sft")
    assert sorted([*train["code"], *test["code"]]) == sorted(cells) and isinstance(train[0]["size"], int)
    (tmp_path / "d.csv").write_text("prompt,id,size\n" + f"q,{10**18 + 1},1\nq,{10**20 + 1},1.5\n" * 2)
    train, _ = load_splits(ScriptArguments(str(tmp_path / "d.csv")), "sft")
    assert set(train["id"]) <= {str(10**18 + 1), str(10**20 + 1)} and set(train["size"]) <= {1.0, 1.5}
    rows = [{"prompt": f"p{n}", "completion": "2024-01-01", "meta": {"a": n} if n else {"b": 1}} for n in range(5)]
    write_jsonl(tmp_path / "b.jsonl", rows)
    train, test = load_splits(ScriptArguments(str(tmp_path / "b.jsonl")), "sft")
    assert sorted([*train, *test], key=lambda row: row["prompt"]) == rows
    quoted = ['one "two"', 'a\n\nb, "c\n"', '"', ' "d" e', 'f "g', "h"]
    cells = ['"one ""two"""', '"a\n\nb, ""c\n"""', '""""', ' "d" e', 'f "g', "h"]
    (tmp_path / "q.csv").write_text("text\n" + "\n".join(cells))
    assert read_rows(tmp_path / "q.csv", "q.csv")["text"][:] == quoted
    chat = json.dumps(user("a") + assistant("b")).replace('"', '""')
    (tmp_path / "c.csv").write_text("messages\n" + f'"{chat}"\n' * 3, encoding="utf-8-sig")
    assert load_splits(ScriptArguments(str(tmp_path / "c.csv")), "sft")[0][0]["messages"] == user("a") + assistant("b")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "caf\xe9"}\n', "isn't UTF-8"),
        ("b.json", b'{"text": "one"}', "holds one object instead of rows"),
        ("c.jsonl", b'{"prompt": "a"}\n\n{"prompt": [{"role": "user", "content": "b"}]}\n', "row 1 is messages"),
        ("d.jsonl", b'{"text": "a"}\n{"text": }\n', r"line 2 \(row 1\): isn't JSON \(Expecting value: column 10\)"),
        ("e.csv", b"text,text\na,b\n", "has the column 'text' twice"),
        ("f.csv", b"text,b\na,b\nc\n", r"row 1 \(line 3\) has 1 cells, and the header 2"),
        ("j.csv", b'text\na\n\n"b\nc\nd\n', r"row that begins in line 4 can't be read \(a quote never closes\)"),
        ("k.csv", b'id,text\n1,a\n2,"b ""c""\nd\n', "begins in line 3 can't be read .a quote never closes"),
        ("l.csv", b'text\na\n"b\nc\nd "e" f\ng\n', "begins in line 3 can't be read"),
        ("m.csv", b'"text\na\n', "begins in line 1 can't be read .a quote never closes"),
        ("g.jsonl", b"\n\n", "has no rows"),
        (
            "i.jsonl",
            b'{"text": "a", "meta": {"id": 99999999999999999999}}\n',
            r"row 0\): the number 9+ has more than 64",
        ),
        ("h.csv", b"messages\n[{'role': 'user'}]\n", "must be JSON"),
    ],
)
def test_files_that_cant_be_read_are_refused_in_one_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        load_splits(ScriptArguments(str(tmp_path / name)), "sft")


@pytest.mark.parametrize(
    ("files", "place"),
    [
        ({"a.jsonl": ["x"] * 3 + [" "] + ["x"] * 26}, "row 3:"),
        ({"a.jsonl": ["x"] * 8 + [" ", "x"]}, "row 8:"),  # the test split is this row
        ({"pairs.jsonl": ["x"] * 4 + [" "]}, "row 4:"),  # the train split is rows 2 to 4
        ({"train-1.jsonl": ["x"] * 16, "train-2.jsonl": ["x", "x", "x", " "]}, "row 3 of train-2.jsonl:"),
        ({"data/train.jsonl": ["x"] * 9 + [" "], "data/test.jsonl": ["x"]}, "row 9 of data/train.jsonl:"),
        ({"train.jsonl": ["x"] * 16, "test.jsonl": ["x", " "]}, "row 1 of test.jsonl:"),
    ],
)
def test_a_row_is_named_as_it_stands_in_the_file(tokenizer, tmp_path, files, place):
    for name, replies in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        alike = 2 if name == "pairs.jsonl" else 1
        rows = [{"messages": user(f"tea {n // alike}") + assistant(reply)} for n, reply in enumerate(replies)]
        write_jsonl(tmp_path / name, rows)
    name = next(iter(files)) if {"a.jsonl", "pairs.jsonl"} & {*files} else ""
    halves = load_splits(ScriptArguments(str(tmp_path / name)), "sft")
    with pytest.raises(InputError, match=f"{place} the assistant message has no text"):
        [sft_rows(half, "d", tokenizer) for half in halves]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": assistant("b"), "rejected": assistant("c")}, "'chosen' messages without the prompt"),
        ({"prompt": "a", "chosen": user("x") + assistant("b"), "rejected": user("x") + assistant("c")}, "without the"),
        ({"chosen": user("a") + assistant("b"), "rejected": user("x") + assistant("c")}, "have different prompts"),
        ({"chosen": user("a") + assistant("b") + user("d"), "rejected": user("a") + assistant("c")}, "the user's"),
    ],
)
def test_sides_that_are_no_two_replies_to_one_prompt_are_refused(tokenizer, row, message):
    with pytest.raises(InputError, match=f"row 0: .*{message}"):
        preference_rows(Dataset.from_list([row]), "d", tokenizer, None)
    turns = {side: user("a") + assistant(side) + user("d") + assistant("e") for side in ("chosen", "rejected")}
    assert len(preference_rows(Dataset.from_list([turns, {**turns, "prompt": "a"}]), "d", tokenizer, None)) == 2


def test_tools_beside_plain_text_are_named_as_not_used(tokenizer, capsys):
    tools = [{"type": "function", "function": {"name": "get"}}]
    text = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c", "completion": "b", "tools": tools}])
    sft_rows(text, "d", tokenizer)
    preference_rows(text, "d", tokenizer, None)
    prompt_rows(text, "d", tokenizer, 1, None)
    assert capsys.readouterr().out.count("d: tools not used") == 3


def test_parts_of_other_types_are_refused(tokenizer):
    parts = [{"role": role, "content": [{"type": kind, "text": "a"}]} for role, kind in
             (("user", "text"), ("assistant", "reasoning"))]  # fmt: skip
    with pytest.raises(InputError, match="row 0: the assistant message has a part 'reasoning'"):
        sft_rows(Dataset.from_list([{"messages": parts}]), "d", tokenizer)


@pytest.mark.parametrize(
    ("key", "value"),
    [("weight", 0), ("weight", 0.5), ("weight", "0"), ("train", False), ("training", False), ("loss", False),
     ("masked", True)],
)  # fmt: skip
def test_replies_that_are_marked_as_not_to_be_learned_are_refused(tokenizer, key, value):
    marked = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b", key: value}]
    with pytest.raises(InputError, match=f"row 0: message 1 has '{key}' {value!r}"):
        sft_rows(Dataset.from_list([{"messages": marked}]), "d", tokenizer)
    marked[1][key] = not value if isinstance(value, bool) else 1
    assert len(sft_rows(Dataset.from_list([{"messages": marked}]), "d", tokenizer)) == 1


def test_tool_calls_may_be_json_text(tokenizer):
    own = with_template(tokenizer, all_templates()["qwen3"])
    call = {"type": "function", "function": {"name": "get", "arguments": {"n": 1}}}
    rows = [
        {"messages": [*user("a"), {"role": "assistant", "content": None, "tool_calls": calls}]}
        for calls in ([call], json.dumps([call]))
    ]
    made = [sft_rows(Dataset.from_list([row]), "d", own)[0]["input_ids"] for row in rows]
    assert made[0] == made[1] and '"n": 1' in own.decode(made[0])


def test_messages_written_as_text_are_found_by_their_roles(tokenizer, tmp_path):
    chat = [{"name": "x", "role": "user", "content": "a"}]
    rows = [{"prompt": json.dumps(chat, indent=1)}] * 3
    Dataset.from_list(rows).cast_column("prompt", Value("large_string")).to_parquet(str(tmp_path / "a.parquet"))
    write_jsonl(tmp_path / "b.jsonl", rows)
    for name in ("a.parquet", "b.jsonl"):
        assert load_splits(ScriptArguments(str(tmp_path / name)), "ppo")[0][0]["prompt"] == chat
    mixed = Dataset.from_list([{"prompt": "a"}, *rows])
    with pytest.raises(InputError, match="row 1 holds messages as text"):
        prompt_rows(mixed, "d", tokenizer, 1, None)
    one = Dataset.from_list([{"prompt": json.dumps(chat[0])}])
    with pytest.raises(InputError, match="row 0 holds messages as text"):
        prompt_rows(one, "d", tokenizer, 1, None)
    assert len(prompt_rows(Dataset.from_list([{"prompt": '{"role": "clerk"}'}]), "d", tokenizer, 1, None)) == 1


def test_text_that_ends_with_eos_and_a_newline_gets_no_second_end(tokenizer):
    for text, completion in ((f"a{tokenizer.eos_token}\n", ""), ("a", f"b{tokenizer.eos_token}\n")):
        ids = encode_text_with_end(tokenizer, text, completion)
        assert ids.count(tokenizer.eos_token_id) == 1 and ids[-1] == tokenizer.eos_token_id
