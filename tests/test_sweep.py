"""A sweep in a real shell, two runs at a time, killed in the middle and started again."""
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import tiny

import train
from data.checkpoints.safetensors import read_tensors
from data.runtime.files import read_json

RANKS = (1, 2, 3, 4)


def flags(world, rank):
    where = ["--init", str(world / "base"), "--data", str(world / "chat"), "--rank", str(rank)]
    return [*where, "--steps", "150", "--batch", "4", "--max_new_tokens", "2", "--eval_every", "1000",
            "--save_every", "5", "--forgetting_data", "none"]


def sweep(world, folder):
    """for r in 1 2 3 4, two at a time, in a process group of its own."""
    one = shlex.join([sys.executable, train.__file__, *flags(world, "R")])
    line = f"printf '%s\\n' {' '.join(map(str, RANKS))} | xargs -P 2 -I R {one}"
    return subprocess.Popen(["sh", "-c", line], cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                            text=True, env={**os.environ, "OMP_NUM_THREADS": "1"}, start_new_session=True)


def runs(folder):
    """{rank: run folder}"""
    found = {read_json(p.parent / "config.json")["config"]["rank"]: p.parent
             for p in folder.glob("out/*/config.json")}
    return dict(sorted(found.items()))


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("xargs"), reason="xargs is not installed")
def test_a_sweep_that_is_killed_and_started_again_is_the_sweep(tmp_path, monkeypatch):
    world, cut, whole = tiny.world(tmp_path), tmp_path / "cut", tmp_path / "whole"
    cut.mkdir()
    whole.mkdir()
    p = sweep(world, cut)
    end = time.monotonic() + 300
    while time.monotonic() < end and p.poll() is None:      # until one is done and another one has begun
        done = list(cut.glob("out/*/result.json"))
        begun = [s for s in cut.glob("out/*/state.pt") if not (s.parent / "result.json").exists()]
        if done and begun:
            break
        time.sleep(0.01)
    os.killpg(p.pid, signal.SIGKILL)
    p.communicate()
    finished = {r: f for r, f in runs(cut).items() if (f / "result.json").exists()}
    resumed = {r: f for r, f in runs(cut).items() if (f / "state.pt").exists() and r not in finished}
    assert finished and resumed, "the kill came too late to prove anything"
    stamps = {r: (f / "result.json").stat().st_mtime_ns for r, f in finished.items()}
    first = {r: (f / "log.jsonl").read_text().splitlines()[:5] for r, f in resumed.items()}

    p = sweep(world, cut)
    out, err = p.communicate(timeout=300)
    assert p.returncode == 0, err
    assert {r: (f / "result.json").stat().st_mtime_ns for r, f in finished.items()} == stamps
    for r, lines in first.items():                          # the wall clock in them says: not computed again
        assert (resumed[r] / "log.jsonl").read_text().splitlines()[:5] == lines

    monkeypatch.chdir(whole)
    for rank in RANKS:
        assert train.main(flags(world, rank)) == 0
    assert runs(cut).keys() == runs(whole).keys() == set(RANKS)
    for rank, folder in runs(whole).items():
        other = runs(cut)[rank]
        a, b = read_json(folder / "result.json"), read_json(other / "result.json")
        for name in ("metrics", "baseline_metrics", "tokens", "item_correct", "samples", "adapter_bytes"):
            assert a[name] == b[name], (rank, name)
        a, b = (read_tensors(f / "adapter" / "adapter_model.safetensors") for f in (folder, other))
        assert a.keys() == b.keys() and all((a[k] == b[k]).all() for k in a)
        events = [json.loads(line) for line in (other / "log.jsonl").read_text().splitlines()]
        steps = [e["step"] for e in events if e["event"] == "train"]
        assert steps == list(range(1, 151)), rank
    lines = (cut / "out" / "results.jsonl").read_text().splitlines()
    folders = [str(folder.relative_to(cut)) for folder in runs(cut).values()]
    assert sorted(json.loads(line)["out"] for line in lines) == sorted(folders)


@pytest.mark.slow
def test_a_run_that_failed_is_in_the_table_and_is_tried_again(tmp_path, monkeypatch, capsys):
    world = tiny.world(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert train.main(flags(world, 1)) == 0
    tiny.stopped(monkeypatch, 3, lambda: train.main(flags(world, 2)))
    capsys.readouterr()
    assert train.main(["--task", "table"]) == 0
    out = capsys.readouterr().out
    assert "Not in the table, 1:" in out and "failed: " in out and "lora" in out
    (world / "chat" / "train.jsonl").rename(world / "away")
    for rank in (2, 4):                                     # of the run that has not begun nothing is left
        assert train.main(flags(world, rank)) == 65
    assert len(list((tmp_path / "out").glob("*-s1"))) == 2
    (world / "away").rename(world / "chat" / "train.jsonl")
    assert train.main(flags(world, 2)) == 0
    capsys.readouterr()
    assert train.main(["--task", "table", "--by", "rank"]) == 0
    out = capsys.readouterr().out
    assert [line.split()[0] for line in out.splitlines()[1:3]] == ["1", "2"] and "Not in" not in out
