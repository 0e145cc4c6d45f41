"""Files that a run wrote and something damaged since: one line that names the file."""

import json

import pytest
from test_finetune import write_run
from test_report import make_run

from eval.curves import read_curves
from eval.report import write_report
from eval.transfer import read_runs, read_scores
from rlhf.errors import InputError
from rlhf.run.files import read_json, read_jsonl

CUT = '{"recipe": "ppo", "sett'
LOG = [{"episode": 8, "objective/raw_scores": 1.0, "objective/kl": 0.5}]


@pytest.mark.parametrize(
    ("content", "words"),
    [(CUT.encode(), "not JSON"), (b"", "not JSON"), (b"[1]", "holds a list"), (b"null", "holds a NoneType"),
     (b'{"a": "\xff"}', "not UTF-8"), (b'{"a": 1}', "needs 'recipe' of type str; found no such key"),
     (b'{"recipe": 3}', "needs 'recipe' of type str; found int"), (b"[" * 100_000, "not JSON")],
)  # fmt: skip
def test_what_is_no_object_with_its_keys_is_refused_by_file_and_line(tmp_path, content, words):
    file = tmp_path / "x.json"
    assert read_json(file, recipe=str) is None
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"x\.json: {words}"):
        read_json(file, recipe=str)
    if content and b"\xff" not in content:
        file.write_bytes(b'{"recipe": "a\xe2\x80\xa8b"}\n\n' + content + b"\n")
        with pytest.raises(InputError, match=rf"x\.json, line 3: {words}"):
            read_jsonl(file, recipe=str)
    file.unlink()
    file.mkdir()
    with pytest.raises(InputError, match=r"x\.json: can't be read"):
        read_json(file)


@pytest.mark.parametrize(
    ("name", "content"),
    [("run.json", CUT), ("run.json", '{"recipe": "ppo", "settings": [], "finished": true}'),
     ("trainer_state.json", '{"log_history": ['), ("trainer_state.json", '{"log_history": [3]}'),
     ("results.json", "{"), ("results.json", "{}"), ("results.json", '{"models": {"a": {"kl": {"mean": 1}}}}'),
     ("results.json", '{"models": [1]}'), ("overoptimization.json", '{"ppo": 1}'), ("samples.jsonl", '{"reply": "x"}'),
     ("evaluation.json", '{"reliability": [{"confidence": "x"}], "n": 3}')],
)  # fmt: skip
def test_the_report_names_the_damaged_file(tmp_path, name, content):
    folder = make_run(tmp_path / "p", "ppo")
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=f"p/{name}"):
        write_report(str(folder))
    assert not (folder / "report.html").exists()


@pytest.mark.parametrize(
    ("name", "content"),
    [("run.json", CUT), ("run.json", "[]"), ("run.json", '{"recipe": "ppo"}'), ("trainer_state.json", "{x"),
     ("trainer_state.json", json.dumps({"log_history": [{**LOG[0], "objective/kl": "high"}]}))],
)  # fmt: skip
def test_curves_name_the_damaged_run(tmp_path, name, content):
    folder = make_run(tmp_path / "p", "ppo")
    (folder / "trainer_state.json").write_text(json.dumps({"log_history": LOG}))
    assert read_curves([f"a={folder}"])[0]["points"] == [{"episode": 8.0, "reward": 1.0, "kl": 0.5}]
    (folder / name).write_text(content)
    with pytest.raises(InputError, match=str(folder)):
        read_curves([f"a={folder}"])


@pytest.mark.parametrize(
    ("name", "content"),
    [("evaluation.json", "{"), ("evaluation.json", '{"loss": 1}'), ("evaluation.json", None),
     ("predictions.jsonl", "{"), ("predictions.jsonl", '{"text": "x", "score": "1"}\n'), ("predictions.jsonl", None)],
)  # fmt: skip
def test_transfer_names_the_damaged_run(tmp_path, name, content):
    folder = tmp_path / "p"
    write_run(folder, [1.0, 0.0], 1)
    assert read_scores(read_runs([f"scratch={folder}"], "scratch")[0])[0]["scratch"].tolist() == [[1.0, 0.0]]
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_text(content)
    with pytest.raises(InputError, match="p.*" + name):
        read_scores(read_runs([f"scratch={folder}"], "scratch")[0])
