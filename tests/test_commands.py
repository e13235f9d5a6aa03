"""What a command says of itself: which data it reads, where it goes on, what its run cannot learn."""
import json

import pytest

import tiny
import train

SHORT = ["--steps", "4", "--batch", "4", "--eval_every", "100", "--forgetting_data", "none"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """tiny.py's world, and a classifier."""
    folder = tiny.world(tmp_path_factory.mktemp("world"))
    assert train.main([*flags(folder, "label"), "--task", "classify", *SHORT, "--out", str(folder / "words")]) == 0
    return folder


def flags(world, data):
    return ["--init", str(world / "base"), "--data", str(world / data)]


def result(folder):
    return json.loads((folder / "result.json").read_text())


# -------------------------------------------------------------------------------------------- which data is read

def test_eval_reads_the_data_of_the_run(world, tmp_path, capsys):
    command = ["--task", "eval", "--init", str(world / "words")]
    assert train.main([*command, "--out", str(tmp_path / "own")]) == 0
    said = capsys.readouterr().err
    assert said.count(f"without --data, {world / 'words'} is measured on the data of its run, {world / 'label'}") == 1
    assert result(tmp_path / "own")["data"] == str(world / "label")
    assert result(tmp_path / "own")["metrics"] == result(world / "words")["metrics"]
    assert train.main([*command, "--data", str(world / "label"), "--out", str(tmp_path / "own")]) == 0     # the same run
    assert "without --data" not in capsys.readouterr().err


def test_a_model_that_is_no_run_is_measured_on_the_toy(world, capsys):
    assert train.parse(["--task", "eval", "--init", str(world / "base")]).data == "toy"
    assert train.parse(["--task", "predict", "--init", str(world / "words")]).data is None
    assert capsys.readouterr().err == ""


def test_a_resumed_run_says_where_it_goes_on(world, tmp_path, monkeypatch, capsys):
    command = [*flags(world, "label"), "--task", "classify", *SHORT, "--save_every", "1", "--out", str(tmp_path / "r")]
    tiny.stopped(monkeypatch, 3, lambda: train.main(command))
    assert "continuing" not in capsys.readouterr().err
    assert train.main(command) == 0
    assert capsys.readouterr().err.count("continuing from step 2 of 4\n") == 1
