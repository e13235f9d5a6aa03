"""The matrix of the README: which task runs with which method, by running two steps of every cell.

    python tests/test_matrix.py        runs every cell and writes the table between the markers of README.md

A task or method that is new in train.py appears by itself. What a task needs beyond the flags of every run
stands in DATA and `command`.
"""
import contextlib
import io
import pathlib
import re
import sys
import tempfile

if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import pytest
import tiny

import train
from data.runtime import flags
from data.checkpoints.model_folders import ROOT

README = ROOT / "README.md"
DATA = {"classify": "label", "pretrain": "text", "tag": "tags", "reward": "pairs", "dpo": "pairs"}  # or chat
SHORT = dict(steps=2, batch=4, eval_every=100, max_new=2, forget="none", n_virtual=2, items=2, block=32,
             samples=2)
QUICK = [("sft", "prefix"), ("classify", "ia3"), ("pretrain", "full"), ("eval", "none"), ("eval", "lora"),
         ("merge", "none"), ("table", "none")]
REMARK = "<!-- `python tests/test_matrix.py` runs every cell and writes this table -->"


def command(world, task, method, out):
    """The shortest command of a cell: of SHORT, the flags that this task and method read."""
    reads = {name for name, f in flags.fields_of(task, train.CONCERNS).items()
             if task in f.metadata["tasks"] and method in f.metadata["methods"]}
    argv = ["--task", task] + ["--method", method] * (method != "none" or task in flags.TRAIN)
    if task == "table":
        return [*argv, "--runs", str(world / "lora")]
    argv += [word for name, value in SHORT.items() if name in reads for word in (f"--{name}", str(value))]
    argv += ["--init", str(world / ("lora" if task == "merge" else "base"))]
    some = dict(data=world / DATA.get(task, "chat"), out=out, prompt="ab", reward="data.toy:gold")
    for name, value in some.items():
        argv += [f"--{name}", str(value)] * (name in reads)
    return argv


def outcome(world, task, method, out):
    """"ok", or the sentence with which the command refuses."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = train.main(command(world, task, method, out))
    if code == 0:
        return "ok"
    assert code == 2, f"--task {task} --method {method}: exit code {code}, {err.getvalue()}"
    said = err.getvalue().strip().splitlines()[-1].removeprefix("train.py: ")
    return said.replace(f"--task {task}", "this task").replace(f"--method {method}", "--method M")


def matrix(cells):
    """{(task, method): outcome} in Markdown; reasons are footnotes."""
    why = list(dict.fromkeys(said for said in cells.values() if said != "ok"))
    lines = [REMARK, "", "| | " + " | ".join(f"`{m}`" for m in flags.METHODS) + " |",
             "|---" * (1 + len(flags.METHODS)) + "|"]
    for task in flags.TASKS:
        said = [cells[task, m] for m in flags.METHODS]
        lines.append(f"| `--task {task}` | " + " | ".join(
            s if s == "ok" else f"no ({why.index(s) + 1})" for s in said) + " |")
    return "\n".join([*lines, *(f"\n({i}) refused: {said}" for i, said in enumerate(why, 1))]) + "\n"


def told():
    """The README's matrix as {(task, method): outcome}."""
    text = README.read_text().split("<!-- matrix -->\n")[1].split("<!-- end -->")[0]
    why = dict(re.findall(r"^\((\d+)\) refused: (.*)$", text, re.M))
    head, _, *rows = [[c.strip().strip("`") for c in line.strip("|").split("|")]
                      for line in text.splitlines() if line.startswith("|")]
    return {(row[0].removeprefix("--task "), method): why.get(cell.removeprefix("no (")[:-1], cell)
            for row in rows for method, cell in zip(head[1:], row[1:])}


def prepare(folder):
    """The tiny world, and an adapter to be merged."""
    assert outcome(tiny.world(folder), "sft", "lora", folder / "lora") == "ok"
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("world"))


def test_the_readme_has_every_task_and_method():
    assert list(told()) == [(t, m) for t in flags.TASKS for m in flags.METHODS], \
        "run `python tests/test_matrix.py`: it writes the matrix of README.md"


@pytest.mark.parametrize("task, method", QUICK)
def test_a_few_cells(task, method, world, tmp_path):
    assert outcome(world, task, method, tmp_path / "r") == told()[task, method]


@pytest.mark.slow
def test_every_cell(world, tmp_path):
    text = matrix(all_cells(world, tmp_path))
    assert text == README.read_text().split("<!-- matrix -->\n")[1].split("<!-- end -->")[0], \
        "run `python tests/test_matrix.py`: it writes the matrix of README.md"


def all_cells(world, folder):
    return {(t, m): outcome(world, t, m, folder / f"{t}-{m}") for t in flags.TASKS for m in flags.METHODS}


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        text = matrix(all_cells(prepare(folder), folder))
    before, rest = README.read_text().split("<!-- matrix -->\n")
    README.write_text(before + "<!-- matrix -->\n" + text + "<!-- end -->" + rest.split("<!-- end -->", 1)[1])
    print(text)


if __name__ == "__main__":
    main()
