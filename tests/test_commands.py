"""What a command says of itself: which data it reads, where it goes on, what its run cannot learn."""
import json
import os
import shlex

import pytest
import torch

import tiny
import train
from data.results import report
from data.runtime import run_folder
from data.runtime.files import DataError

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


def test_eval_of_prompts_names_the_command_that_measures_them(tmp_path):
    """A run of --task ppo on a data set of prompts: each word of the command that is named can be parsed."""
    run = tmp_path / "ppo"
    values = {"task": "ppo", "method": "lora", "data": "toy/sums", "reward": "data.toy:right"}
    run.mkdir()
    (run / "config.json").write_text(json.dumps({"config": values}))
    cfg = train.parse(["--task", "eval", "--init", str(run)])
    assert cfg.data == "toy/sums"
    with pytest.raises(DataError) as error:
        train.require_row_type(cfg, "prompt")
    command = (f"python train.py --task sample --init {run} --data toy/sums --reward data.toy:right "
               "--num_generations 16")
    assert str(error.value) == (
        "toy/sums holds prompt rows, whose answers a reward scores; --task eval reads chat or label or tags or text or "
        f"pairs or ranked rows, and this measures prompt rows: {command}")
    parsed = train.parse(shlex.split(command)[2:])
    assert parsed.reward == "data.toy:right" and parsed.num_generations == 16
    train.require_row_type(parsed, "prompt")
    base = train.parse(["--task", "eval", "--init", str(tmp_path), "--data", "mine.jsonl"])
    with pytest.raises(DataError, match=f"--init {tmp_path} --data mine.jsonl --reward REWARD --num_generations 16"):
        train.require_row_type(base, "prompt")          # no run that knows its reward


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


def test_a_save_without_an_entry_is_a_sentence(world, tmp_path, monkeypatch, capsys):
    """A state.pt of an earlier version, accepted by --keep."""
    command = [*flags(world, "label"), "--task", "classify", *SHORT, "--save_every", "1", "--out", str(tmp_path / "r")]
    tiny.stopped(monkeypatch, 3, lambda: train.main(command))
    path = tmp_path / "r" / "state.pt"
    state = torch.load(path, weights_only=True)
    for key in ("processes", "best", "item_correct"):
        torch.save({name: value for name, value in state.items() if name != key}, path)
        capsys.readouterr()
        assert train.main([*command, "--keep"]) == 65
        sentence = capsys.readouterr().err.splitlines()[-1]
        assert sentence == (f"train.py: {path} was saved by an earlier version and has no {key!r}; use --fresh to "
                            "start over")
    torch.save(state, path)
    assert train.main([*command, "--keep"]) == 0


# ------------------------------------------------------------------------------------- what a run cannot learn

@pytest.mark.parametrize("task, data, known", [
    ("classify", "label", "accuracy, macro_f1, loss"), ("pretrain", "text", "loss, perplexity"),
    ("sft", "chat", "exact_match, loss, perplexity, rouge_l, bleu"), ("tag", "tags", "precision, recall, f1, accuracy, loss"),
    ("reward", "pairs", "loss, accuracy"), ("dpo", "pairs", "loss, accuracy"),
])
def test_a_wrong_metric_is_refused_before_anything_is_measured(task, data, known, world, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "train_loop", lambda *args: pytest.fail("training has started"))
    record = train.find_task(task)
    if record.baseline_metrics:
        monkeypatch.setattr(train, "measure_baseline", lambda *args: pytest.fail("test was measured"))
    assert train.main([*flags(world, data), "--task", task, *SHORT, "--keep_best", "acuracy", "--out",
                       str(tmp_path / "r")]) == 2
    assert f"--keep_best acuracy is no metric of this run on valid; there are {known}" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_model_that_is_worse_than_before_is_said_to_be(world, tmp_path, capsys):
    command = [*flags(world, "label"), "--task", "classify", *SHORT, "--out", str(tmp_path / "r")]
    assert train.main([*command, "--lr", "1e9", "--method", "full"]) == 0
    lines = [line for line in capsys.readouterr().err.splitlines() if "made the model worse" in line]
    before = result(tmp_path / "r")["baseline_metrics"]["loss"]
    assert len(lines) == 1 and f"the loss on test was {before:.4g} before" in lines[0] and "--lr is too high" in lines[0]
    assert train.main([*flags(world, "label"), "--task", "classify", *SHORT, "--out", str(tmp_path / "good")]) == 0
    assert "worse" not in capsys.readouterr().err


@pytest.mark.parametrize("before, after, expected", [
    (2.0, 3.0, False), (2.0, 3.1, True), (0.1, 0.6, False), (4.95, 6.93, True), (2.0, float("inf"), True), (2.0, float("nan"), True),
    (None, 9.0, False), (2.0, None, False), (float("inf"), 9.0, False)])
def test_when_a_model_is_far_worse(before, after, expected):
    assert report.is_far_worse(before, after) is expected


@pytest.mark.parametrize("words, says", [
    (["--steps", "1"], "1 step teaches a model next to nothing: raise --steps"),
    (["--steps", "2"], "2 steps teach a model next to nothing: raise --steps"),
    (["--epochs", "1", "--batch", "64"], "1 step teaches a model next to nothing: raise --epochs, or lower --batch"),
    (["--steps", "10"], None), (["--steps", "0"], None),
])
def test_a_run_of_few_steps_is_said_to_learn_nothing(words, says, world, tmp_path, capsys):
    for command in (["--task", "check"], ["--task", "classify", "--dry_run", "--forgetting_data", "none"]):
        assert train.main([*flags(world, "label"), *command, *words]) == 0
        out = capsys.readouterr().out
        assert out.count("a model next to nothing") == (says is not None)
        assert says is None or any(line.removeprefix("- ") == says for line in out.splitlines())


@pytest.mark.parametrize("row, more, advice", [
    ({"prompt": "ab", "completion": "c"}, [], "compare with --method none --shots 4; use several seeds"),
    ({"prompt": "x" * 45, "completion": "c"}, [], "compare with --method none --shots 1; use several seeds"),
    ({"prompt": "x" * 120, "completion": "c"}, [], "are few: use several seeds"),
    ({"prompt": "ab", "chosen": "c", "rejected": "d"}, [], "are few: use several seeds"),
    ({"tokens": ["a", "b"], "tags": ["O", "B-X"]}, [], "are few: use several seeds"),
    ({"text": "ab", "label": "x"}, ["--classifier", "head"], "are few: use several seeds"),
])
def test_only_examples_that_fit_are_advised(row, more, advice, world, tmp_path, capsys):
    """The context has 160 tokens, an answer takes up to 64 of them."""
    rows = [{**row, **({"label": "xy"[i % 2]} if "label" in row else {})} for i in range(12)]
    (tmp_path / "d.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    assert train.main(["--task", "check", "--init", str(world / "base"), "--data", str(tmp_path / "d.jsonl"), "--steps", "1",
                       "--max_new_tokens", "8"][:-2 if "completion" not in row else None] + more) == 0
    few = [line for line in capsys.readouterr().out.splitlines() if "training rows are few" in line]
    assert len(few) == 1 and few[0].endswith(advice)


# ------------------------------------------------------------------------------------------ a terminal of 80 columns

def test_every_line_fits_a_terminal_of_80_columns(world, tmp_path, monkeypatch, capsys):
    """But for commands, which are copied, and the last line of a run, which is for programs."""
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.chdir(world)
    words = "the quick brown fox jumps over the lazy dog "
    tiny.write(world, {"long": [{"prompt": words * (1 + i % 2), "completion": words[:i]} for i in range(1, 40)]})
    short = ["--init", "base", *SHORT, "--out", "r"]
    long = [*short, "--data", "long", "--max_new_tokens", "40"]
    commands = [[*long, "--dry_run"], long, long, ["--task", "check", "--init", "base", "--data", "long"],
                ["--task", "show", "--init", "r", "--max_new_tokens", "40"],
                ["--task", "chat", "--init", "r", "--prompt", words, "--max_new_tokens", "40"],
                ["--task", "table", "--runs", "*"],
                ["--init", "base", "--data", "long", "--out", "shots", "--method", "none", "--shots", "0,1", "--max_new_tokens", "4"],
                [*short, "--task", "reward", "--data", "pairs", "--max_new_tokens", "4", "--out", "rm"],
                [*short, "--data", "chat", "--method", "prompt_tuning", "--max_new_tokens", "2", "--out", "p"],
                ["--task", "show", "--init", "p"]]
    for command in commands:
        assert train.main(command) == 0
        for text in capsys.readouterr():
            wide = [line for line in text.splitlines() if len(line) > 80 and not line.startswith(("python ", "task="))]
            assert not wide, (command, wide)


def test_text_without_a_terminal_stays_as_it_is(monkeypatch):
    text = "a " * 100 + "\n\n  b " + "c" * 200
    with open(os.devnull, "w") as nowhere:
        assert run_folder.fit(text, nowhere) == text and run_folder.terminal_width(nowhere) is None
        assert run_folder.fit("python " + text, nowhere, widest=50).splitlines()[0] == "python " + "a " * 100
        monkeypatch.setenv("COLUMNS", "80")
        lines = run_folder.fit("  " + text, nowhere).split("\n")
    assert [len(line) <= 80 for line in lines] == [True] * 3 + [True, True, False]
    assert lines[0].startswith("  a a") and lines[1].startswith("  a a") and lines[-1].strip() == "c" * 200
