"""data/runtime/device.py: how many threads a run takes, and why; what its config.json says of them."""
import json

import pytest
import torch

import tiny
import train
from data.runtime.device import pick_device, pick_threads
from data.runtime.distributed import dist_state


@pytest.fixture(autouse=True)
def threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name, processes, expected", [
    ("auto", 2, "cuda:1"), ("cuda", 2, "cuda:1"), ("cuda:0", 2, "cuda:1"), ("auto", 1, "cuda"), ("cuda:0", 1, "cuda:0"),
])
def test_a_process_touches_its_own_gpu_alone(name, processes, expected, monkeypatch):
    touched = []
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(dist_state, "size", processes)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch, "empty", lambda *size, device: touched.append(str(torch.device(device))))
    for function in ("set_device", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, function, lambda device: touched.append(str(device)))
    assert str(pick_device(name)[0]) == expected
    assert set(touched) == {expected}


@pytest.mark.parametrize("asked, environment, width, expected", [
    (0, None, 128, (1, "width 128 is below 512")),              # small: one, however many cores there are
    (0, None, 512, (4, "every core")),
    (0, "4", 128, (4, "OMP_NUM_THREADS")),                      # the user's own rule
    (2, "4", 128, (2, "requested")),
    (2, None, 1024, (2, "requested")),
])
def test_how_many_threads(asked, environment, width, expected, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if environment:
        monkeypatch.setenv("OMP_NUM_THREADS", environment)
    torch.set_num_threads(4)                                    # as torch begins on four cores
    assert pick_threads(asked, width) == expected
    assert torch.get_num_threads() == expected[0]


@pytest.mark.parametrize("flags, count, why", [([], 1, "width 32 is below 512"), (["--threads", "2"], 2, "requested")])
def test_a_run_says_and_records_its_threads(flags, count, why, tmp_path, monkeypatch, capsys):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    torch.set_num_threads(2)
    world = tiny.world(tmp_path)
    assert train.main(["--init", str(world / "base"), "--data", str(world / "chat"), "--steps", "1", "--max_new_tokens", "2",
                       "--forgetting_data", "none", "--out", str(tmp_path / "r"), *flags]) == 0
    assert f"{count} thread{'s' * (count > 1)} ({why})" in capsys.readouterr().err
    assert json.loads((tmp_path / "r" / "config.json").read_text())["machine"]["threads"] == count
    assert "threads" not in json.loads((tmp_path / "r" / "config.json").read_text())["config"]     # not what is computed


def test_waiting_threads_sleep():
    """OMP reads the variable when torch is loaded, so train.py sets it before."""
    source = open(train.__file__).read()
    assert source.index('"OMP_WAIT_POLICY", "PASSIVE"') < source.index("\nimport torch\n")
