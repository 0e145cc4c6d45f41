"""Files and folders that flags name, checked before anything is imported that reads them."""

import pytest

from rlhf.data.paths import behind_name, check_paths, need_checkpoint
from rlhf.errors import InputError

VALUES = {"dataset_name": None, "ptx_dataset_name": None, "model_name_or_path": None}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"dataset_name": "gone.jsonl"}, "--dataset_name gone.jsonl: no such file or folder"),
        ({"ptx_dataset_name": "gone.jsonl"}, "--ptx_dataset_name gone.jsonl: no such file or folder"),
        ({"model_name_or_path": "./gone"}, "--model_name_or_path ./gone: no such model folder"),
        ({"dataset_name": 5}, "--dataset_name 5: needs a name or a path; found int"),
        ({"ptx_dataset_name": ["a", "b"]}, "--ptx_dataset_name ['a', 'b']: needs a name or a path; found list"),
        ({"dataset_name": ["gone.jsonl", "b"]}, "--dataset_name gone.jsonl: no such file or folder"),
        ({"chat_template_path": 5}, "--chat_template_path 5: needs a name or a path; found int"),
        ({"models": ["sft=./gone"]}, "--models ./gone: no such model folder"),
        ({"models": [5]}, "--models 5: needs a name or a path; found int"),
        ({"models": ["a/b=you/model"]}, "--models 'a/b=you/model': a name has up to 60 characters, no slash"),
        ({"models": ["a\nb=you/model"]}, "--models 'a\\nb=you/model': a name has up to 60 characters"),
        ({"models": ["a\u202eb=you/model"]}, "no control character"),
        ({"models": [" a=you/model"]}, "no space at its ends"),
        ({"models": ["a" * 61 + "=you/model"]}, "a name has up to 60 characters"),
    ],
)
def test_what_is_missing_or_no_path_is_one_line(changes, said):
    with pytest.raises(InputError) as error:
        check_paths({**VALUES, **changes}, {})
    assert said in str(error.value)


def test_hub_ids_the_starter_and_what_is_there_pass(tmp_path):
    (tmp_path / "rows.jsonl").touch()
    passing = {"dataset_name": "you/rows", "model_name_or_path": "you/model", "models": ["starter", "a=b/c"]}
    there = {**VALUES, "dataset_name": str(tmp_path / "rows.jsonl"), "model_name_or_path": str(tmp_path)}
    for values in (passing, there):
        check_paths(values, {})  # raises what is missing
    (tmp_path / "rows.jsonl").unlink()
    with pytest.raises(InputError, match=r"rows\.jsonl: no such file"):
        check_paths(there, {})


def test_a_run_folder_may_have_an_equals_sign(tmp_path, monkeypatch):
    (tmp_path / "lr=1").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path))
    check_paths({"output_dir": "~/lr=1"}, {"output_dir": "no run in it."})
    assert behind_name("~/lr=1") == tmp_path / "lr=1" and behind_name("name=~/lr=1") == tmp_path / "lr=1"
    with pytest.raises(InputError, match="--output_dir ~/lr=2: no run in it"):
        check_paths({"output_dir": "~/lr=2"}, {"output_dir": "no run in it."})
    (tmp_path / "lr=1" / "trainer_state.json").write_text("{}")
    need_checkpoint("~/lr=1")
