"""The same command again after an edit of the code: where the edit counts, a new result beside the old one.

A copy of the repository is edited, and real commands run in it.
"""
import shutil
import subprocess
import time
from typing import NamedTuple

import pytest
import tiny

import train
from data.checkpoints.model_folders import ROOT
from data.runtime.files import read_json

EQUATION = ("lora.py", "return y + self.branch(self.drop(x), *self.factors()).to(y.dtype)",
            "return y + 2 * self.branch(self.drop(x), *self.factors()).to(y.dtype)")
HARMLESS = (                                        # a comment, a docstring, what a LoRA run does not execute
    ("lora.py", "# (..., in) -> (..., r) -> (..., out)", "# first A, then B"),
    ("lora.py", '(A, B) of the plain LoRA that this adapter amounts to.', 'Two matrices.'),
    ("ppo.py", "running = delta + gamma * lam * running", "running = delta + gamma * running"),
    ("prompts.py", "F.dropout(self.embedding, self.dropout, self.training)", "self.embedding"),
    ("data/results/report.py", "arithmetic, about:", "arithmetic, roughly:"),
)


class Repository(NamedTuple):
    """A copy of the repository, tiny data, and a finished run of it."""
    python: str                 # the fixture of conftest.py
    folder: object
    world: object
    first: object               # the run folder
    printed: str                # what the finished run printed


def command(world, out, *more):
    return ["--init", str(world / "base"), "--data", str(world / "chat"), "--out", str(out), "--steps", "6",
            "--batch", "4", "--eval_every", "100", "--max_new_tokens", "2", "--forgetting_data", "none", "--lr",
            "0.02", *more]


def execute(repository, out, *more):
    """The command in a process of its own, with the code of that repository."""
    words = [repository.python, "train.py", *command(repository.world, out, *more)]
    return subprocess.run(words, cwd=repository.folder, capture_output=True, text=True)


@pytest.fixture(scope="module")
def repository(python, tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT, folder / "code", ignore=shutil.ignore_patterns(".*", "out", "tests"))
    made = Repository(python, folder / "code", tiny.world(folder), folder / "r", "")
    done = execute(made, made.first)
    assert done.returncode == 0, done.stderr
    return made._replace(printed=done.stdout)


@pytest.fixture
def edit(repository):
    """edit(file, old, new); afterwards the file is as it was."""
    before = {}

    def change(name, old, new):
        path = repository.folder / name
        before.setdefault(path, path.read_text())
        assert path.read_text().count(old) == 1
        path.write_text(path.read_text().replace(old, new))
    yield change
    for path, text in before.items():
        path.write_text(text)


def copied(repository, tmp_path):
    """The finished run, at a place of this test's own."""
    return shutil.copytree(repository.first, tmp_path / "r")


def test_an_edited_equation_gives_a_new_result_beside_the_old_one(repository, edit, tmp_path):
    out = copied(repository, tmp_path)
    edit(*EQUATION)
    again = execute(repository, out)
    assert again.returncode == 0, again.stderr
    lines = [line for line in again.stderr.splitlines() if "changed" in line]
    old, = tmp_path.glob("r.*")
    assert lines == [f"lora.py: LoRA.forward changed since this run was made; the old run is now {old}; starting anew"]
    before, after = read_json(old / "result.json"), read_json(out / "result.json")
    assert before == read_json(repository.first / "result.json")
    assert (old / "adapter" / "adapter_model.safetensors").exists()
    assert after["metrics"]["loss"] != before["metrics"]["loss"] and after["code"] != before["code"]
    assert after["baseline_metrics"] == before["baseline_metrics"]
    stamp = (out / "result.json").stat().st_mtime_ns
    assert execute(repository, out).stdout == again.stdout
    assert (out / "result.json").stat().st_mtime_ns == stamp and list(tmp_path.glob("r.*")) == [old]


def test_edits_that_do_not_count_print_the_finished_result(repository, edit):
    """All at once: were one of them counted, the line on stderr would name it."""
    out = repository.first
    stamp = (out / "result.json").stat().st_mtime_ns
    for change in HARMLESS:
        edit(*change)
    again = execute(repository, out)
    assert again.returncode == 0, again.stderr
    assert "changed" not in again.stderr and again.stdout == repository.printed
    assert (out / "result.json").stat().st_mtime_ns == stamp and not list(out.parent.glob("r.*"))


def test_keep_accepts_the_old_result_and_says_so(repository, edit, tmp_path):
    out = copied(repository, tmp_path)
    edit(*EQUATION)
    kept = execute(repository, out, "--keep")
    assert kept.returncode == 0, kept.stderr
    assert kept.stderr.count("is kept, although it was made before this changed: lora.py: LoRA.forward") == 1
    before, after = read_json(repository.first / "result.json"), read_json(out / "result.json")
    assert after["kept"] == ["lora.py: LoRA.forward"] and after["metrics"] == before["metrics"]
    later = execute(repository, out)           # accepted once, accepted for good
    assert later.returncode == 0 and read_json(out / "result.json") == after and not list(tmp_path.glob("r.*"))


@pytest.mark.slow
def test_an_edit_in_the_middle_starts_anew(repository, edit, tmp_path):
    """Never half of a run under one equation and half under another."""
    out = tmp_path / "r"
    more = ["--steps", "100000", "--save_every", "1"]
    words = [repository.python, "train.py", *command(repository.world, out, *more)]
    process = subprocess.Popen(words, cwd=repository.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    tiny.wait_for(out / "state.pt", process)
    process.kill()
    process.communicate()
    edit(*EQUATION)
    process = subprocess.Popen(words, cwd=repository.folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    end = time.monotonic() + 300
    while not list(tmp_path.glob("r.*")) and time.monotonic() < end and process.poll() is None:
        time.sleep(0.02)
    tiny.wait_for(out / "state.pt", process)
    process.kill()
    process.communicate()
    old, = tmp_path.glob("r.*")
    steps = [[line for line in (folder / "log.jsonl").read_text().splitlines() if '"baseline"' in line]
             for folder in (old, out)]
    assert list(map(len, steps)) == [1, 1]
    hashes = [read_json(folder / "config.json")["code_hashes"]["lora.py: LoRA.forward"] for folder in (old, out)]
    assert hashes[0] != hashes[1]


# ---------------------------------------------------------------------------------------- data and base model

@pytest.fixture
def world(tmp_path):
    (tmp_path / "w").mkdir()
    return tiny.world(tmp_path / "w")


def test_edited_data_gives_a_new_result_beside_the_old_one(world, tmp_path, capsys):
    out = tmp_path / "r"
    assert train.main(command(world, out)) == 0
    with open(world / "chat" / "test.jsonl", "a") as f:
        f.write('{"prompt": "zz", "completion": "z"}\n')
    capsys.readouterr()
    assert train.main(command(world, out)) == 0
    old, = tmp_path.glob("r.*")
    assert f"--data changed since this run was made; the old run is now {old}" in capsys.readouterr().err
    before, after = read_json(old / "result.json"), read_json(out / "result.json")
    assert (len(before["item_correct"]), len(after["item_correct"])) == (8, 9)


def test_an_edited_base_gives_a_new_result_and_keep_does_not_accept_it(world, tmp_path, capsys):
    out = tmp_path / "r"
    assert train.main(command(world, out)) == 0
    model, _, _ = train.load(world / "base")
    model.wte.weight.data[0] += 1
    model.save_pretrained(world / "base")
    assert train.main(command(world, out, "--keep")) == 2
    assert "--init changed since this run was made, and --keep accepts changed code only" in capsys.readouterr().err
    assert train.main(command(world, out)) == 0
    old, = tmp_path.glob("r.*")
    hashes = [read_json(folder / "config.json")["base_sha256"] for folder in (old, out)]
    assert hashes[0] != hashes[1] and (old / "result.json").exists()
