"""The check of a GPU in one command: `make gpu`, without network. It is meant to take 8 minutes on one H100.

    python tests/gpu/check.py --keep                        # everything; writes benchmarks/gpu.json
    python tests/gpu/check.py --tiny --only agreement resume          # small sizes, on a CPU too

Each piece is a script of its own, `tests/gpu/<piece>.py`, with a process of its own, so that a failure of one leaves
the others alone. The machine needs the packages of pyproject.toml, but neither the starter's model nor a Hub.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
KEPT = ROOT / "benchmarks" / "gpu.json"
PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate")
# what it shows, and the seconds after which it is stopped
PIECES = {
    "card": ("the rate of matrix products and of copies", 60),
    "agreement": ("log-probabilities, values and one update beside the CPU's", 90),
    "sharded": ("PPO under FSDP2 beside one process", 180),
    "resume": ("a resumed run ends in the same bytes", 150),
    "sampling": ("tokens per second: own loop, transformers' generate, continuous batching", 150),
    "beside_trl": ("PPO beside TRL's at the size of Pythia 1B", 300),
    "road": ("tokenizer, pretraining, SFT, preferences, reward model, PPO, comparison", 420),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="sizes that a CPU can do")
    parser.add_argument("--only", nargs="+", choices=list(PIECES), default=list(PIECES))
    parser.add_argument("--results_dir", type=Path, default=ROOT / "outputs" / "gpu", help="for logs and models")
    parser.add_argument("--keep", action="store_true", help="write benchmarks/gpu.json too")
    parser.add_argument("--commit", help="of this code, where there is no git")
    arguments = parser.parse_args()
    if arguments.keep and (arguments.tiny or len(arguments.only) < len(PIECES)):
        parser.error("--keep: keeps a whole run. Leave out --tiny and --only.")
    arguments.results_dir.mkdir(parents=True, exist_ok=True)
    file = arguments.results_dir / "gpu.json"
    record: dict[str, Any] = {
        "command": " ".join(["python tests/gpu/check.py", *sys.argv[1:]]),
        "commit": arguments.commit or commit(),
        "machine": machine(),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
        "pieces": {},
    }
    for piece in arguments.only:
        record["pieces"][piece] = run(piece, arguments.tiny, arguments.results_dir)
        for kept in (file, KEPT)[: 1 + arguments.keep]:
            kept.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    failed = [name for name, result in record["pieces"].items() if "error" in result]
    print(f"Wrote {KEPT if arguments.keep else file}." + f" Failed: {', '.join(failed)}." * bool(failed))
    sys.exit(bool(failed))


def commit() -> str:
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    found = subprocess.run(git, capture_output=True, text=True)
    return found.stdout.strip() if found.returncode == 0 else "unknown"


def machine() -> dict[str, Any]:
    """The card, or the processor; without a host name."""
    import torch

    known: dict[str, Any] = {"cores": len(os.sched_getaffinity(0))}
    if torch.cuda.is_available():
        card = torch.cuda.get_device_properties(0)
        known |= {"gpu": card.name, "gpu_memory_gib": round(card.total_memory / 2**30), "cuda": torch.version.cuda}
    return known


def run(piece: str, tiny: bool, folder: Path) -> dict[str, Any]:
    """What a piece measured and how long it took; on a failure, its last lines."""
    result, log = folder / f"{piece}.json", folder / f"{piece}.log"
    result.unlink(missing_ok=True)
    command = [sys.executable, str(HERE / f"{piece}.py"), "--output_file", str(result), *["--tiny"] * tiny]
    about, limit = PIECES[piece]
    print(f"=== {piece}: {about}", flush=True)
    start = time.perf_counter()
    with log.open("w") as output:
        try:
            code = subprocess.run(
                command, stdout=output, stderr=output, timeout=limit, env={**os.environ, "PYTHONPATH": python_path()}
            ).returncode
        except subprocess.TimeoutExpired:
            code = f"stopped after {limit} s"  # type: ignore[assignment]
    found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    found["seconds"] = round(time.perf_counter() - start, 1)
    if code:
        found["error"] = [f"exit code {code}", *log.read_text(errors="replace").splitlines()[-12:]]
    print(json.dumps(found, indent=1), flush=True)
    return found


def python_path() -> str:
    return os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])])


if __name__ == "__main__":
    main()
