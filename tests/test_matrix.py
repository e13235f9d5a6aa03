"""The matrix of tests/README.md: which task runs with which method, by running two steps of every cell.

    python tests/test_matrix.py        runs every cell and writes the table between the markers of tests/README.md

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
from data.checkpoints.model_folders import ROOT
from data.runtime.command import groups_of
from data.runtime.flags import fields_of

README = ROOT / "tests" / "README.md"
METHODS = [method.name for method in train.METHODS]
TASKS = [task.name for task in train.TASKS]
DATA = {"classify": "label", "pretrain": "text", "tag": "tags", "reward": "pairs", "dpo": "pairs"}  # or chat
SHORT = dict(steps=2, batch=4, eval_every=100, max_new_tokens=2, forgetting_data="none", num_virtual_tokens=2,
             eval_items=2, block_size=32, num_generations=2)
QUICK = [("sft", "prefix_tuning"), ("classify", "ia3"), ("pretrain", "full"), ("eval", "none"), ("eval", "lora"),
         ("merge", "none"), ("table", "none")]
REMARK = "<!-- `python tests/test_matrix.py` runs every cell and writes this table -->"


def flags_of(task, method):
    """The flags that a command has; --task check has those of the task that its rows are for."""
    task, method = train.find_task(task), train.find_method(method)
    found = set(fields_of(groups_of(train.PROGRAM, task, method)))
    if task.parses_itself:
        found |= set(fields_of(groups_of(train.PROGRAM, train.find_task("sft"), method)))
        found -= {name for name, field in fields_of(train.RUN).items() if not field.metadata["identity"]}
    return found


def command(world, task, method, out):
    """The shortest command of a cell: of SHORT, the flags that this task and method read."""
    reads = flags_of(task, method)
    optional = method == "none" and not train.find_task(task).trains
    argv = ["--task", task] + ["--method", method] * (not optional)
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
    message = err.getvalue().strip().splitlines()[-1].removeprefix("train.py: ")
    return message.replace(f"--task {task}", "this task").replace(f"--method {method}", "--method M")


def matrix(cells):
    """{(task, method): outcome} in Markdown; reasons are footnotes."""
    why = list(dict.fromkeys(result for result in cells.values() if result != "ok"))
    lines = [REMARK, "", "| | " + " | ".join(f"`{m}`" for m in METHODS) + " |",
             "|---" * (1 + len(METHODS)) + "|"]
    for task in TASKS:
        results = [cells[task, m] for m in METHODS]
        lines.append(f"| `--task {task}` | " + " | ".join(
            s if s == "ok" else f"no ({why.index(s) + 1})" for s in results) + " |")
    return "\n".join([*lines, *(f"\n({i}) refused: {reason}" for i, reason in enumerate(why, 1))]) + "\n"


def documented():
    """The matrix of tests/README.md as {(task, method): outcome}."""
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
    assert list(documented()) == [(t, m) for t in TASKS for m in METHODS], \
        "run `python tests/test_matrix.py`: it writes the matrix of tests/README.md"


@pytest.mark.parametrize("task, method", QUICK)
def test_a_few_cells(task, method, world, tmp_path):
    assert outcome(world, task, method, tmp_path / "r") == documented()[task, method]


@pytest.mark.slow
def test_every_cell(world, tmp_path):
    text = matrix(all_cells(world, tmp_path))
    assert text == README.read_text().split("<!-- matrix -->\n")[1].split("<!-- end -->")[0], \
        "run `python tests/test_matrix.py`: it writes the matrix of tests/README.md"


def all_cells(world, folder):
    return {(t, m): outcome(world, t, m, folder / f"{t}-{m}") for t in TASKS for m in METHODS}


def main():
    with tempfile.TemporaryDirectory() as name:
        folder = pathlib.Path(name)
        text = matrix(all_cells(prepare(folder), folder))
    before, rest = README.read_text().split("<!-- matrix -->\n")
    README.write_text(before + "<!-- matrix -->\n" + text + "<!-- end -->" + rest.split("<!-- end -->", 1)[1])
    print(text)


if __name__ == "__main__":
    main()
