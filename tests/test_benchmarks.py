"""The kept benchmarks: what the files hold, and what is said of a new run beside them."""

import dataclasses
import json

import pytest
from bench_ppo import compare_and_keep, table_rows
from benchmark_file import FOLDER, Machine, compare, measured, read_benchmark, this_machine, write_benchmark
from conftest import ROOT

REPORTS = {  # two updates of each
    "trl": [{"seconds": 30.0, "peak": 6.0}, {"seconds": 34.0, "peak": 6.4}],
    "ours": [{"seconds": 15.0, "peak": 3.2}, {"seconds": 17.0, "peak": 3.0}],
}
RATIOS = {"episodes/s": 2.0, "s per update": 0.5, "peak memory, GiB": 0.5}


def test_ratios_are_ours_to_trls():
    rows = {row.name: row for row in table_rows(REPORTS)}
    assert {name: row.ratio for name, row in rows.items()} == RATIOS
    assert (rows["s per update"].trl, rows["s per update"].ours) == (32.0, 16.0)
    assert (rows["peak memory, GiB"].trl, rows["peak memory, GiB"].ours) == (6.4, 3.2)


@pytest.mark.parametrize("file", [FOLDER / "ppo.json"], ids=lambda file: file.stem)
def test_kept_files_hold_what_the_benchmark_measures(file):
    kept = read_benchmark(file)
    assert set(kept.ratios) == set(RATIOS)
    assert kept.command.split()[1] == f"tests/bench_{file.stem}.py" and (ROOT / kept.command.split()[1]).exists()
    assert kept.machine.cores > 0 and kept.commit != "unknown"
    assert {"python", "torch", "transformers", "trl"} <= set(kept.versions)


def test_a_file_is_read_as_it_was_written_and_names_no_host(tmp_path):
    benchmark = measured("python tests/bench_ppo.py", {"episodes/s": 2.12345})
    write_benchmark(tmp_path / "ppo.json", benchmark)
    assert read_benchmark(tmp_path / "ppo.json") == benchmark
    assert benchmark.ratios == {"episodes/s": 2.123} and benchmark.machine == this_machine()
    content = json.loads((tmp_path / "ppo.json").read_text())
    assert set(content) == {"command", "commit", "machine", "versions", "ratios", "source"}
    assert set(content["machine"]) == {"cores", "cpu_flags", "memory_gib"}


def test_ratios_stand_beside_the_kept_ones():
    kept = dataclasses.replace(measured("a", {"episodes/s": 2.0, "gone": 1.0}), commit="abc1234")
    assert compare(measured("a", {"episodes/s": 2.5, "new": 1.0}), kept) == [
        "episodes/s: 2.50x, kept: 2.00x at commit abc1234, this machine"
    ]
    other = dataclasses.replace(kept, machine=dataclasses.replace(kept.machine, cores=1000))
    assert compare(measured("a", {"episodes/s": 2.5}), other)[0].endswith("another machine")


def test_another_command_is_not_compared():
    [line] = compare(measured("a --num_ppo_epochs 4", {"x": 1.0}), measured("a --num_ppo_epochs 2", {"x": 1.0}))
    assert "not compared" in line and "a --num_ppo_epochs 2" in line


def test_machines_are_alike_by_cores_flags_and_memory():
    machine = Machine(2, ["avx2"], 24)
    assert machine.is_like(Machine(2, ["avx2"], 24)) and machine.is_like(Machine(2, ["avx2"], None))
    for other in (Machine(4, ["avx2"], 24), Machine(2, ["avx2", "avx512_bf16"], 24), Machine(2, ["avx2"], 48)):
        assert not machine.is_like(other)


def test_only_keep_writes_the_file(tmp_path, capsys):
    file, rows = tmp_path / "ppo.json", table_rows(REPORTS)
    compare_and_keep(file, "a", rows, keep=False)
    assert not file.exists() and "--keep" in capsys.readouterr().out
    compare_and_keep(file, "a", rows, keep=True)
    assert read_benchmark(file).ratios == RATIOS
    compare_and_keep(file, "a", rows, keep=False)
    assert "s per update: 0.50x, kept: 0.50x" in capsys.readouterr().out
