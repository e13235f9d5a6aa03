"""test_baselines.py: what the base does before training is measured once for a sweep, and the numbers are the same."""
import re

import pytest
import tiny

import train
from data.runtime import code_hash
from data.runtime.files import read_json


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return tiny.world(tmp_path_factory.mktemp("world"))


def command(world, out, *more):
    return ["--init", str(world / "base"), "--data", str(world / "chat"), "--steps", "2", "--max_new_tokens", "3",
            "--eval_items", "4", "--forgetting_data", str(world / "text"), "--out", str(out), *more]


@pytest.fixture
def measured(monkeypatch):
    """What is measured before training, in order."""
    seen = []
    for name in ("measure_untrained", "forgetting_loss"):
        real = getattr(train, name)

        def measure(*args, name=name, real=real):
            seen.append(name)
            return real(*args)
        monkeypatch.setattr(train, name, measure)
    return seen


BOTH = ["measure_untrained", "forgetting_loss", "forgetting_loss"]        # the last one after training


def numbers(out):
    """result.json and log.jsonl, without times and names."""
    clock = re.compile(r'"(seconds|tokens_per_second|peak_memory_mb|time|out|next_command|id)": ?("[^"]*"|[\d.e+-]+)')
    result = {key: value for key, value in read_json(out / "result.json").items()
              if key not in ("seconds", "tokens_per_second", "peak_memory_mb", "out", "next_command")}
    return result, [clock.sub("", line) for line in (out / "log.jsonl").read_text().splitlines()]


def test_a_sweep_measures_its_base_once(world, tmp_path, measured):
    assert train.main(command(world, tmp_path / "a" / "r")) == 0
    assert train.main(command(world, tmp_path / "b" / "first", "--seed", "2", "--rank", "2")) == 0
    assert measured == 2 * BOTH
    assert train.main(command(world, tmp_path / "a" / "s", "--seed", "2", "--rank", "2")) == 0
    assert measured == [*2 * BOTH, "forgetting_loss"]
    assert numbers(tmp_path / "a" / "s") == numbers(tmp_path / "b" / "first")
    assert len(list((tmp_path / "a" / ".baselines").iterdir())) == 2


@pytest.mark.parametrize("more", [["--max_new_tokens", "2"], ["--eval_items", "3"], ["--dtype", "bf16"], ["--fresh"],
                                  ["--task", "dpo", "--data", "pairs"]])
def test_what_is_measured_otherwise_is_measured_again(more, world, tmp_path, measured):
    assert train.main(command(world, tmp_path / "r")) == 0
    words = command(world, tmp_path / "s", *more)
    assert train.main([str(world / word) if word == "pairs" else word for word in words if "dpo" not in more
                       or word not in ("--max_new_tokens", "3")]) == 0
    assert measured.count("measure_untrained") == 2


def test_an_edit_of_the_code_or_the_data_measures_again(world, tmp_path, measured, monkeypatch):
    assert train.main(command(world, tmp_path / "r")) == 0
    hashes = code_hash.code_hashes
    monkeypatch.setattr(train, "code_hashes", lambda roots: {**hashes(roots), "data/results/metrics.py: rouge_l": "new"})
    assert train.main(command(world, tmp_path / "s")) == 0
    monkeypatch.setattr(train, "code_hashes", hashes)
    tiny.write(tmp_path, {"chat": tiny.ROWS["chat"][:-1]})
    assert train.main(command(world, tmp_path / "t", "--data", str(tmp_path / "chat"))) == 0
    assert measured == 3 * BOTH


@pytest.mark.parametrize("damage", ["", '{"base', "[]"])
def test_a_damaged_file_is_measured_again(damage, world, tmp_path, measured):
    assert train.main(command(world, tmp_path / "r")) == 0
    for path in (tmp_path / ".baselines").iterdir():
        path.write_text(damage)
    assert train.main(command(world, tmp_path / "s")) == 0
    assert measured == 2 * BOTH and numbers(tmp_path / "r") == numbers(tmp_path / "s")
    assert all(isinstance(read_json(path), dict) for path in (tmp_path / ".baselines").iterdir())


def test_a_run_without_training_is_its_own_measurement(world, tmp_path, measured):
    assert train.main(command(world, tmp_path / "r")) == 0
    words = command(world, tmp_path / "s", "--method", "none")
    for name in ("--steps", "--forgetting_data"):
        at = words.index(name)
        del words[at:at + 2]
    assert train.main(words) == 0
    assert measured == [*BOTH, "measure_untrained"]
