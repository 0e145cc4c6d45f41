"""Run folders: who may use one, what they hold, corrected commands, moved folders, checkpoints, full disks."""

import dataclasses
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import types
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import ENVIRONMENT, ROOT, TINY_PPO, TINY_TRAINING, present, run, save_tiny
from safetensors import SafetensorError
from safetensors.torch import save_file
from transformers import LlamaForCausalLM, TrainingArguments
from trl import ModelConfig

from rlhf.data.paths import need_checkpoint, need_output_dir
from rlhf.errors import InputError, full_disk
from rlhf.feedback.labelers import labeler_flags
from rlhf.models.loading import load_causal_lm
from rlhf.models.sources import resolve
from rlhf.run import locks
from rlhf.run.checkpoints import (
    atomic_folder,
    checkpoints,
    damage,
    delete_old_checkpoints,
    last_checkpoint,
    write_digests,
)
from rlhf.run.folders import finish_run, read_run, start_run
from rlhf.run.saving import make_savable, need_room


@dataclasses.dataclass
class Flags:
    """Of an invented recipe."""

    output_dir: str = "out"
    size: int = 1
    sft_config: str | None = None
    model_name_or_path: str | None = None


def begin(folder, recipe="recipes/any.py", more=False, open_flags=(), derived=(), **flags):
    return start_run(recipe, str(folder), Flags(**flags), more=more, open_flags=open_flags, derived=derived)


# ---------------------------------------------------------------------------------------------- what may be written


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "run" / "run.json").mkdir(parents=True)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    for name, words in (
        (tmp_path / "file", "file is not a folder"),
        (tmp_path / "file" / "below" / "it", "file is not a folder"),
        (tmp_path / "dangling", "dangling is not a folder"),
        (tmp_path / "a\nb", "a character"),
        (tmp_path / "a\0b", "a character"),
        (tmp_path / "run", "run.json in it is not a file"),
    ):
        with pytest.raises(InputError, match=words) as refused:
            need_output_dir(str(name))
        assert "--output_dir" in str(refused.value) and "\n" not in str(refused.value)
    need_output_dir(str(tmp_path / "größer = besser" / "新"))
    for name in ("/proc/x", str(tmp_path / ("long" * 100))):  # only trying tells
        with pytest.raises(InputError, match="can't be written"):
            begin(name)


WITHOUT_PERMISSION = """
import os, sys
from rlhf.data.paths import need_output_dir
if os.getuid() == 0:  # root may write everywhere
    os.setuid(65534)
need_output_dir(sys.argv[1])
"""


def test_a_folder_without_permission_is_refused():
    with tempfile.TemporaryDirectory() as name:
        os.chmod(name, 0o555)
        said = subprocess.run([sys.executable, "-c", WITHOUT_PERMISSION, f"{name}/below/it"], cwd=ROOT, env=ENVIRONMENT,
                              capture_output=True, text=True)  # fmt: skip
        assert f"InputError: --output_dir {name}/below/it: you may not write in {name}." in said.stderr


@pytest.mark.parametrize("content", ["[]", "{}", '{"recipe": "sft"}', "{broken", "3", '{"recipe": 1, "settings": []}'])
def test_a_damaged_run_file_is_one_line_and_stays(content, tmp_path):
    (tmp_path / "run.json").write_text(content)
    with pytest.raises(InputError, match=r"run\.json: "):
        begin(tmp_path)
    with pytest.raises(InputError, match=r"run\.json: "):
        read_run(tmp_path)
    assert (tmp_path / "run.json").read_text() == content


# ---------------------------------------------------------------------------------------------- who may use a folder

HOLD = """
import sys, time
from pathlib import Path
from rlhf.errors import report_errors
from rlhf.run.locks import hold_folder
with report_errors():
    hold_folder(Path(sys.argv[1]))
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


def hold(folder, seconds):
    return subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder), str(seconds)], cwd=ROOT, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def test_a_second_process_is_told_who_uses_the_folder_until_that_one_is_dead(tmp_path):
    first = hold(tmp_path, 600)
    assert present(first.stdout).readline() == "held\n"
    second = hold(tmp_path, 0)
    assert second.wait() == 2 and present(second.stderr).read() == (
        f"error: --output_dir {tmp_path}: in use by process {first.pid}. Wait until it ends, or give another "
        "--output_dir.\n"
    )
    first.kill()
    first.wait()
    third = hold(tmp_path, 0)
    assert third.wait() == 0


def test_a_forked_worker_does_not_keep_the_folder(tmp_path):
    code = HOLD.replace('print("held"', 'import os\n    if os.fork() == 0:\n        time.sleep(60)\n    print("held"')
    first = subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path), "600"], cwd=ROOT, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert present(first.stdout).readline() == "held\n"
    workers = psutil.Process(first.pid).children()
    first.kill()
    first.wait()
    assert len(workers) == 1 and workers[0].is_running()
    assert hold(tmp_path, 0).wait() == 0
    workers[0].kill()


def test_the_same_process_may_come_again(tmp_path):
    assert begin(tmp_path) and begin(tmp_path)
    assert tmp_path.resolve() in locks._held


# ---------------------------------------------------------------------------------------------- corrected commands


def test_a_run_that_made_nothing_makes_room_for_a_corrected_command(tmp_path):
    assert begin(tmp_path, size=1)
    for name in ("eval_samples/0.jsonl", "writing/checkpoint-1/optimizer.pt", "train.jsonl.partial"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "round-1" / "preferences").mkdir(parents=True)
    assert begin(tmp_path, size=2)
    assert present(read_run(tmp_path))["settings"]["size"] == 2
    assert not (tmp_path / "eval_samples").exists() and not (tmp_path / "writing").exists()
    (tmp_path / "checkpoint-1").mkdir()
    (tmp_path / "checkpoint-1" / "optimizer.pt").write_text("x")
    with pytest.raises(InputError, match=r"holds another run .*size"):
        begin(tmp_path, size=3)
    assert begin(tmp_path, size=2)
    with pytest.raises(InputError, match=r"holds another run \(any.py\)"):
        begin(tmp_path, recipe="recipes/other.py", size=2)


def test_a_run_that_could_not_even_be_noted_is_no_foreign_file(tmp_path):
    (tmp_path / "run.json.partial").write_text("{")
    (tmp_path / ".lock").write_text("1")
    assert begin(tmp_path)
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "mine.txt").write_text("x")
    with pytest.raises(InputError, match="not empty, and not a run"):
        begin(tmp_path / "notes")


def test_what_a_stage_checks_itself_may_change_until_the_end(tmp_path):
    for name in ("a", "b", "c"):
        (tmp_path / f"{name}.yaml").write_text(f"learning_rate: {name}")
    out, flags = tmp_path / "out", {"open_flags": ["sft_config"], "derived": ["round-0"]}
    assert begin(out, sft_config=str(tmp_path / "a.yaml"), **flags)
    (out / "round-1").mkdir()
    (out / "round-1" / "train.jsonl").write_text("x")
    assert begin(out, sft_config=str(tmp_path / "b.yaml"), **flags)
    with pytest.raises(InputError, match="size"):
        begin(out, size=7, sft_config=str(tmp_path / "b.yaml"), **flags)
    finish_run(str(out), {})
    with pytest.raises(InputError, match="sft_config"):
        begin(out, sft_config=str(tmp_path / "c.yaml"), **flags)
    assert not begin(out, sft_config=str(tmp_path / "b.yaml"), **flags)
    assert begin(out, sft_config=str(tmp_path / "c.yaml"), more=True, **flags)


def test_what_a_run_can_make_again_makes_no_other_run_impossible(tmp_path):
    assert begin(tmp_path, derived=["round-0"])
    (tmp_path / "round-0").mkdir()
    (tmp_path / "round-0" / "held_out.jsonl").write_text("x")
    assert begin(tmp_path, derived=["round-0"])
    assert (tmp_path / "round-0").exists()  # the same settings: it is taken
    assert begin(tmp_path, size=2, derived=["round-0"])
    assert not (tmp_path / "round-0").exists()


def test_sampled_replies_serve_every_labeler_until_somebody_answered(tmp_path):
    assert {"labeler", "reward_funcs"} <= set(labeler_flags(str(tmp_path)))
    (tmp_path / "tasks.jsonl").write_text("")
    assert "labeler" in labeler_flags(str(tmp_path))
    (tmp_path / "votes.jsonl").write_text("")
    assert labeler_flags(str(tmp_path)) == []


def test_a_labeler_that_fails_leaves_the_samples_to_the_next_one(sft, files, tmp_path):
    words = ["--model_name_or_path", sft, "--dataset_name", files / "prompts.jsonl", "--dtype", "float32",
             "--max_new_tokens", 24, "--output_dir", tmp_path / "pairs"]  # fmt: skip
    (tmp_path / "failing.py").write_text("def score(prompts, completions, **columns):\n    raise RuntimeError('no')\n")
    failed = run(
        "recipes/collect.py", *words, "--labeler", "reward", "--reward_funcs", "failing.score", check=False,
        environment={"PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )  # fmt: skip
    assert failed.returncode != 0
    tasks = (tmp_path / "pairs" / "tasks.jsonl").read_bytes()
    again = run("recipes/collect.py", *words, "--labeler", "simulated")
    assert "Sampling" not in again.stderr and (tmp_path / "pairs" / "tasks.jsonl").read_bytes() == tasks
    assert "labeler" not in present(read_run(tmp_path / "pairs"))["settings"]  # the default
    other = run("recipes/collect.py", *words, "--labeler", "judge", check=False)
    assert other.returncode == 2 and "holds another run" in other.stderr and "labeler" in other.stderr


# ---------------------------------------------------------------------------------------------- moved folders


def test_the_same_content_elsewhere_is_the_same_run(tmp_path):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "model.safetensors").write_bytes(b"weights")
    assert begin(tmp_path / "out", model_name_or_path=str(tmp_path / "here"))
    (tmp_path / "out" / "model.safetensors").write_bytes(b"result")
    shutil.move(tmp_path / "here", tmp_path / "there")
    shutil.move(tmp_path / "out", tmp_path / "elsewhere")
    assert begin(tmp_path / "elsewhere", model_name_or_path=str(tmp_path / "there"))
    (tmp_path / "there" / "model.safetensors").write_bytes(b"others")
    with pytest.raises(InputError, match="model_name_or_path"):
        begin(tmp_path / "elsewhere", model_name_or_path=str(tmp_path / "there"))


@pytest.mark.parametrize("recipe", ["sft", "ppo"])
def test_a_moved_run_keeps_its_best_checkpoint(recipe, tiny, sft, files, tmp_path):
    """It is not the last one, and the folder moves before the run ends."""
    words = ["--load_best_model_at_end", "true", "--eval_strategy", "steps", "--save_total_limit", "9"]
    if recipe == "sft":
        words += ["--model_name_or_path", tiny, "--dataset_name", files / "sft.jsonl", *TINY_TRAINING]
        words += ["--max_steps", "6", "--eval_steps", "2", "--save_steps", "2", "--greater_is_better", "true"]
    else:
        words += ["--model_name_or_path", sft, "--dataset_name", files / "prompts.jsonl", *TINY_PPO]
        words += ["--eval_steps", "1", "--metric_for_best_model", "eval_kl", "--greater_is_better", "false"]
        words += ["--learning_rate", "0.5"]
    run(f"recipes/{recipe}.py", *words, "--output_dir", tmp_path / "whole")
    kept = (tmp_path / "whole" / "adapter_model.safetensors").read_bytes()
    *earlier, last = checkpoints(str(tmp_path / "whole"))
    assert kept in [(folder / "adapter_model.safetensors").read_bytes() for folder in earlier]
    moved = tmp_path / "moved"
    shutil.move(tmp_path / "whole", moved)
    state = json.loads((moved / "run.json").read_text())
    (moved / "run.json").write_text(json.dumps({**state, "finished": False}))
    shutil.rmtree(moved / last.name)
    (moved / "adapter_model.safetensors").unlink()
    again = run(f"recipes/{recipe}.py", *words, "--output_dir", moved)
    assert "Resuming from" in again.stdout
    assert (moved / "adapter_model.safetensors").read_bytes() == kept
    for file in moved.rglob("*_state.json"):
        if "checkpoint-" in str(file):
            assert str(tmp_path) not in file.read_text()


# ---------------------------------------------------------------------------------------------- checkpoints


def make_checkpoint(folder, processes=1):
    """A checkpoint as far as its files tell."""
    folder.mkdir(parents=True)
    names = ["rng_state.pth"] if processes == 1 else [f"rng_state_{rank}.pth" for rank in range(processes)]
    for name in ("trainer_state.json", "optimizer.pt", "adapter_model.safetensors", *names):
        (folder / name).write_text("{}")
    write_digests(folder)
    return folder


def arguments(folder, asked=None):
    return types.SimpleNamespace(output_dir=str(folder), resume_from_checkpoint=asked)


def test_a_damaged_checkpoint_is_passed_over_and_none_whole_is_one_line(tmp_path, capsys):
    assert last_checkpoint(arguments(tmp_path)) is None
    old, new = make_checkpoint(tmp_path / "checkpoint-2"), make_checkpoint(tmp_path / "checkpoint-10")
    assert last_checkpoint(arguments(tmp_path)) == str(new)
    for change, words in (
        (lambda: (new / "optimizer.pt").write_text("}{"), "optimizer.pt is damaged"),
        (lambda: (new / "rng_state.pth").unlink(), "rng_state.pth is missing"),
        (lambda: (new / "trainer_state.json").write_text(""), "trainer_state.json is damaged"),
        (lambda: (new / "digests.json").unlink(), "digests.json is missing"),
        (lambda: (new / "digests.json").write_text("{"), "digests.json is unreadable"),
        (lambda: (new / "digests.json").write_text("{}"), "digests.json lacks adapter_model.safetensors"),
        (lambda: (new / "more.pt").write_text(""), "digests.json lacks more.pt"),
    ):
        change()
        assert last_checkpoint(arguments(tmp_path)) == str(old)
        assert f"Warning: {new} is passed over: {words}." in capsys.readouterr().out
        if words != "digests.json is missing":  # other programs' checkpoints have none
            with pytest.raises(InputError, match=f"--resume_from_checkpoint .*{words}"):
                last_checkpoint(arguments(tmp_path, str(new)))
        shutil.rmtree(new)
        make_checkpoint(new)
    for folder in (old, new):
        (folder / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(InputError, match=r"none of its 2 checkpoints is whole .*--resume_from_checkpoint false"):
        last_checkpoint(arguments(tmp_path))
    assert last_checkpoint(arguments(tmp_path, "false")) is None


def test_another_number_of_processes_is_refused(tmp_path, monkeypatch):
    two = make_checkpoint(tmp_path / "two" / "checkpoint-1", processes=2)
    with pytest.raises(InputError, match=r"--num_processes 1: .*checkpoint-1 was made by 2"):
        last_checkpoint(arguments(two.parent))
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert last_checkpoint(arguments(two.parent)) == str(two)
    one = make_checkpoint(tmp_path / "one" / "checkpoint-1")
    for asked in (None, str(one)):
        with pytest.raises(InputError, match=r"--num_processes 2: .*checkpoint-1 was made by 1"):
            last_checkpoint(arguments(one.parent, asked))


def test_a_model_folder_is_no_checkpoint(tiny, tmp_path):
    with pytest.raises(InputError, match=r"--resume_from_checkpoint .*no checkpoint.*trainer_state\.json is missing"):
        need_checkpoint(tiny)
    make_checkpoint(tmp_path / "checkpoint-1")
    need_checkpoint(str(tmp_path / "checkpoint-1"), "sft")
    with pytest.raises(InputError, match=r"ppo_state\.json is missing"):
        need_checkpoint(str(tmp_path / "checkpoint-1"), "ppo")


def test_a_checkpoint_is_whole_or_absent(tmp_path):
    folder = tmp_path / "checkpoint-1"
    with pytest.raises(OSError, match="full"), atomic_folder(folder, True, lambda: None) as working:
        (working / "half").write_text("x")
        raise OSError("full")
    assert list(tmp_path.iterdir()) == []  # on a full disk the half would take space
    with atomic_folder(folder, True, lambda: None) as working:
        (working / "inner").mkdir()
        (working / "inner" / "shard").write_text("x")
        (working / "optimizer.pt").write_text("x")
        (working / "rng_state.pth").write_text("x")
    assert damage(folder) is None and [path.name for path in tmp_path.iterdir()] == ["checkpoint-1"]
    (folder / "inner" / "shard").write_text("y")
    assert damage(folder) == "inner/shard is damaged"


def test_old_checkpoints_go_but_neither_the_best_nor_what_is_resumed_from(tmp_path):
    def left(limit, step, best=None):
        for number in (1, 2, 3, 4, 5):
            (tmp_path / f"checkpoint-{number}").mkdir(exist_ok=True)
        delete_old_checkpoints(str(tmp_path), limit, step, best)
        return [int(path.name[-1]) for path in checkpoints(str(tmp_path))]

    assert left(None, 5) == left(0, 5) == left(-1, 5) == [1, 2, 3, 4, 5]
    assert left(2, 5) == [4, 5]
    assert left(2, 5, "elsewhere/checkpoint-1") == [1, 5]
    assert left(1, 5, "checkpoint-1") == [1, 5]
    assert left(1, 3) == [3, 4, 5]  # 4 and 5 were damaged, and the run went on from 2


# ---------------------------------------------------------------------------------------------- before training


def test_room_for_two_checkpoints_is_asked_for_before_training(tmp_path, monkeypatch):
    args = TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="steps")
    model = torch.nn.Linear(1000, 1000, bias=False)  # 4 MB, and 8 MB of Adam's state in a checkpoint
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((28_000_000, True), (27_999_999, False)):
        monkeypatch.setattr("shutil.disk_usage", lambda _path, free=free: usage._replace(free=free))
        if fits:
            need_room(args, model)
            continue
        with pytest.raises(
            InputError, match=r"--output_dir .*: 2 checkpoints and the model need about 28 MB, and 28 MB"
        ):
            need_room(args, model)
    make_checkpoint(tmp_path / "checkpoint-1")  # one of the two is there
    need_room(args, model)
    monkeypatch.setattr("shutil.disk_usage", lambda _path: usage._replace(free=0))
    with pytest.raises(InputError, match="1 checkpoint and the model"):
        need_room(args, model)
    need_room(TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", save_strategy="no"), model)


def test_a_generation_config_that_transformers_would_not_save_is_repaired(tokenizer, tmp_path, capsys):
    settings = ModelConfig(dtype="float32", use_peft=False)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"temperature": 0.6, "top_p": 0.9}, "do_sample is now true"),
        ({"early_stopping": True}, "only its token ids are kept"),
    ]
    for number, (odd, word) in enumerate(cases):
        folder = save_tiny(tmp_path / f"{number}", tokenizer)
        file = Path(folder) / "generation_config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **odd}))
        model = load_causal_lm(resolve(folder), settings, tokenizer)
        make_savable(model, tokenizer)
        assert f"generation_config.json; {word}" in " ".join(capsys.readouterr().out.split())
        model.save_pretrained(tmp_path / "saved")
        again = LlamaForCausalLM.from_pretrained(tmp_path / "saved").generation_config
        assert tokenizer.eos_token_id in again.eos_token_id and again.pad_token_id == tokenizer.pad_token_id
    folder = save_tiny(tmp_path / "plain", tokenizer)
    make_savable(load_causal_lm(resolve(folder), settings, tokenizer), tokenizer)
    assert "generation_config" not in capsys.readouterr().out


def test_what_cannot_be_saved_is_refused_before_training(tiny, tokenizer):
    model = LlamaForCausalLM.from_pretrained(tiny)
    make_savable(model, tokenizer)
    model.config.odd = object()
    with pytest.raises(InputError, match=r"the model's config can't be saved .*JSON serializable"):
        make_savable(model, tokenizer)


# ---------------------------------------------------------------------------------------------- full disks


def test_every_writer_of_a_full_disk_is_recognized(tmp_path):
    """The limit on a file's size makes writes fail as a full disk does: in Python, in torch and in safetensors."""

    def limited(write):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
        try:
            write()
        except Exception as error:
            return error
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        raise AssertionError("nothing was raised")

    tensor = torch.zeros(100_000)
    for write in (
        lambda: torch.save(tensor, tmp_path / "a.pt"),
        lambda: save_file({"x": tensor}, tmp_path / "a.safetensors"),
        lambda: (tmp_path / "a.json").write_text("x" * 100_000),
    ):
        error = limited(write)
        assert full_disk(error) is not None, repr(error)
    assert full_disk(OSError(28, "No space left on device", "/data/x")) == " (/data/x)"
    assert full_disk(SafetensorError("I/O error: No space left on device (os error 28)")) == ""
    for other in (ValueError("x"), OSError(2, "no such file"), RuntimeError("size mismatch")):
        assert full_disk(other) is None


# ---------------------------------------------------------------------------------------------- ended from outside


def started(words, text):
    """A command, once it has printed `text`."""
    process = subprocess.Popen(
        [sys.executable, *map(str, words)], cwd=ROOT, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell ignores it behind &
    )  # fmt: skip
    for line in present(process.stdout):
        if text in line:
            return process
    raise AssertionError(present(process.stderr).read())


PARENT = """
import sys
from pathlib import Path
from rlhf.errors import report_errors
from rlhf.run import stages
from rlhf.run.stages import run_all, run_stage
stages.LIBRARIES = ()  # this stage needs none
if __name__ == "__main__":
    with report_errors():
        script, out = Path(sys.argv[1]), Path(sys.argv[2])
        if sys.argv[3] == "one":
            run_stage(script, "none", out, {})
        else:
            run_all(script, "none", {out / "a": {}, out / "b": {}}, 2)
"""
STAGE = """
import os, time
from rlhf.run.arguments import answer_early
answer_early(__file__)
print("stage", os.getpid(), flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("way", ["one", "several"])
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_stages_end_with_their_parent(number, way, tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "stage.py").write_text(STAGE)
    process = started([tmp_path / "parent.py", tmp_path / "stage.py", tmp_path / "out", way], "stage ")
    stages = psutil.Process(process.pid).children(recursive=True)
    assert stages
    if number == signal.SIGINT:  # as a terminal does
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    _, said = process.communicate(timeout=60)
    psutil.wait_procs(stages, timeout=60)
    assert not [stage for stage in stages if stage.is_running() and stage.status() != psutil.STATUS_ZOMBIE]
    if number == signal.SIGTERM:
        assert process.returncode == 143 and said.endswith(
            "Ended by SIGTERM. Run the same command again to continue.\n"
        )
    if number == signal.SIGINT:
        assert process.returncode == 130 and said.count("Interrupted. Run the same command again to continue.") == 1


@pytest.mark.parametrize("number, said", [(signal.SIGTERM, "Ended by SIGTERM."), (signal.SIGINT, "Interrupted.")])
def test_a_signal_during_the_imports_ends_in_one_line(number, said, tmp_path):
    """A library may catch every exception while it is imported."""
    importing = "try:\n    time.sleep(600)\nexcept BaseException:\n    time.sleep(600)"
    (tmp_path / "recipe.py").write_text(STAGE.replace("time.sleep(600)", importing))
    process = started([tmp_path / "recipe.py"], "stage ")
    process.send_signal(number)
    assert process.communicate(timeout=60)[1] == f"{said} Run the same command again to continue.\n"
    assert process.returncode == 128 + number


def test_a_signal_after_the_imports_undoes_what_is_half_done(tmp_path):
    (tmp_path / "recipe.py").write_text(
        "import time\nfrom rlhf.errors import at_failure, report_errors\nfrom rlhf.run.arguments import answer_early\n"
        "answer_early(__file__)\nwith report_errors():\n    at_failure(lambda: print('undone'))\n"
        "    print('stage ', flush=True)\n    time.sleep(600)\n"
    )
    for number in (signal.SIGTERM, signal.SIGINT):
        process = started([tmp_path / "recipe.py"], "stage ")
        process.send_signal(number)
        out, said = process.communicate(timeout=60)
        assert out == "undone\n" and said.count("\n") == 1 and process.returncode == 128 + number


def test_a_signal_inside_of_del_is_not_lost(tmp_path):
    """Python prints what is raised there, and goes on."""
    (tmp_path / "recipe.py").write_text(
        "import time\nfrom rlhf.errors import report_errors\nfrom rlhf.run.arguments import answer_early\n"
        "class Lock:\n    def __del__(self):\n        print('stage ', flush=True)\n        time.sleep(600)\n"
        "answer_early(__file__)\nwith report_errors():\n    Lock()\n    time.sleep(600)\n"
    )
    for number, line in ((signal.SIGTERM, "Ended by SIGTERM."), (signal.SIGINT, "Interrupted.")):
        process = started([tmp_path / "recipe.py"], "stage ")
        process.send_signal(number)
        assert process.communicate(timeout=60)[1] == f"{line} Run the same command again to continue.\n"
        assert process.returncode == 128 + number


def test_stages_name_what_they_cache_apart(tmp_path):
    """`datasets` names what it can't hash at random, and a later stage would take it for its own."""
    (tmp_path / "parent.py").write_text(PARENT.replace("LIBRARIES = ()", "LIBRARIES = ('datasets',)"))
    (tmp_path / "stage.py").write_text(
        "from datasets.fingerprint import generate_random_fingerprint as name\nprint('named', name(), flush=True)"
    )
    said = subprocess.run(
        [sys.executable, tmp_path / "parent.py", tmp_path / "stage.py", tmp_path / "out", "several"],
        cwd=ROOT, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    names = [line for line in said.stdout.splitlines() if line.startswith("named")]
    assert len(names) == 2 == len({*names}), said.stderr[-2000:]


def test_a_stage_that_refuses_its_input_says_so_alone(tmp_path):
    (tmp_path / "parent.py").write_text(PARENT)
    (tmp_path / "stage.py").write_text(
        "from rlhf.errors import InputError, report_errors\n"
        "with report_errors():\n    raise InputError('--size 3: too small.')"
    )
    for way in ("one", "several"):
        said = subprocess.run(
            [sys.executable, tmp_path / "parent.py", tmp_path / "stage.py", tmp_path / "out", way],
            cwd=ROOT, env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
        )  # fmt: skip
        lines = [line for line in said.stderr.splitlines() if "gemm_4bit" not in line]  # bitsandbytes' own, on a CPU
        assert said.returncode == 2 and lines == ["error: --size 3: too small."]


def test_forks_leave_the_libraries_out_of_garbage_collection(tmp_path):
    (tmp_path / "stage.py").write_text("import gc\nprint('frozen:', gc.get_freeze_count() > 50_000)")
    (tmp_path / "parent.py").write_text(PARENT.replace("LIBRARIES = ()", "LIBRARIES = ('datasets',)"))
    said = subprocess.run(
        [sys.executable, tmp_path / "parent.py", tmp_path / "stage.py", tmp_path, "one"], cwd=tmp_path,
        env={**ENVIRONMENT, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert "frozen: True" in said.stdout, said.stderr
