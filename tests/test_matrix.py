"""The matrices of tests/README.md: which task, RL algorithm and preference loss runs with which method, by running
two steps of every cell.

    python tests/test_matrix.py        runs every cell and writes the tables between the markers of tests/README.md

A task, method, algorithm or loss that is new appears by itself. What a task needs beyond the flags of every run
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

import ppo
import train
from data.checkpoints.model_folders import ROOT
from data.runtime.command import groups_of
from data.runtime.flags import fields_of

README = ROOT / "tests" / "README.md"
METHODS = [method.name for method in train.METHODS]
TASKS = [task.name for task in train.TASKS]
# the default of each flag is the row of the task alone
ALGORITHMS = [("ppo", "--algo", record.name) for record in ppo.ALGORITHMS if record.name != "ppo"]
LOSSES = [("dpo", "--preference_loss", record.name) for record in ppo.PREFERENCE_LOSSES if record.name != "dpo"]
TABLES = {"matrix": [(task,) for task in TASKS], "records": ALGORITHMS + LOSSES}        # rows: a task, and words
DATA = {"classify": "label", "pretrain": "text", "tag": "tags", "reward": "pairs", "dpo": "pairs"}  # or chat
SHORT = dict(steps=2, batch=4, eval_every=100, max_new_tokens=2, forgetting_data="none", num_virtual_tokens=2,
             eval_items=2, block_size=32, num_generations=2, minibatches=1, question="?")
QUICK = [("sft", "prefix_tuning"), ("classify", "ia3"), ("pretrain", "full"), ("eval", "none"), ("eval", "lora"),
         ("merge", "none"), ("table", "none")]
QUICK_RECORDS = [(("ppo", "--algo", "grpo"), "ia3"), (("dpo", "--preference_loss", "kto"), "lora")]
REMARK = "<!-- `python tests/test_matrix.py` runs every cell and writes this table -->"


def flags_of(task, method):
    """The flags that a command has; --task check has those of the task that its rows are for."""
    task, method = train.find_task(task), train.find_method(method)
    found = set(fields_of(groups_of(train.PROGRAM, task, method)))
    if task.parses_itself:
        found |= set(fields_of(groups_of(train.PROGRAM, train.find_task("sft"), method)))
        found -= {name for name, field in fields_of(train.RUN).items() if not field.metadata["identity"]}
    return found


def command(world, task, method, out, *words):
    """The shortest command of a cell: of SHORT, the flags that this task and method read; and some words."""
    reads = flags_of(task, method)
    optional = method == "none" and not train.find_task(task).trains
    argv = ["--task", task, *words] + ["--method", method] * (not optional)
    if task == "table":
        return [*argv, "--runs", str(world / "lora")]
    argv += [word for name, value in SHORT.items() if name in reads for word in (f"--{name}", str(value))]
    argv += ["--init", str(world / ("lora" if task == "merge" else "base"))]
    some = dict(data=world / DATA.get(task, "chat"), out=out, prompt="ab", reward="data.toy:gold")
    for name, value in some.items():
        argv += [f"--{name}", str(value)] * (name in reads)
    return argv


def outcome(world, task, method, out, *words):
    """"ok", or the sentence with which the command refuses."""
    err = io.StringIO()
    with contextlib.redirect_stderr(err), contextlib.redirect_stdout(io.StringIO()):
        code = train.main(command(world, task, method, out, *words))
    if code == 0:
        return "ok"
    assert code == 2, f"--task {task} --method {method}: exit code {code}, {err.getvalue()}"
    message = err.getvalue().strip().splitlines()[-1].removeprefix("train.py: ")
    return message.replace(f"--task {task}", "this task").replace(f"--method {method}", "--method M")


def label(row):
    """A row's first cell."""
    return f"--task {row[0]}" if len(row) == 1 else " ".join(row[1:])


def matrix(cells, rows):
    """{(row, method): outcome} in Markdown; reasons are footnotes."""
    why = list(dict.fromkeys(result for result in cells.values() if result != "ok"))
    lines = [REMARK, "", "| | " + " | ".join(f"`{m}`" for m in METHODS) + " |",
             "|---" * (1 + len(METHODS)) + "|"]
    for row in rows:
        results = [cells[row, m] for m in METHODS]
        lines.append(f"| `{label(row)}` | " + " | ".join(
            s if s == "ok" else f"no ({why.index(s) + 1})" for s in results) + " |")
    return "\n".join([*lines, *(f"\n({i}) refused: {reason}" for i, reason in enumerate(why, 1))]) + "\n"


def section(name):
    """The text of a table of tests/README.md."""
    return README.read_text().split(f"<!-- {name} -->\n")[1].split("<!-- end -->")[0]


def documented_rows(name):
    """A table of tests/README.md as {(first cell, method): outcome}."""
    text = section(name)
    why = dict(re.findall(r"^\((\d+)\) refused: (.*)$", text, re.M))
    head, _, *rows = [[c.strip().strip("`") for c in line.strip("|").split("|")]
                      for line in text.splitlines() if line.startswith("|")]
    return {(row[0], method): why.get(cell.removeprefix("no (")[:-1], cell)
            for row in rows for method, cell in zip(head[1:], row[1:])}


def documented():
    """The matrix of tests/README.md as {(task, method): outcome}."""
    return {(row.removeprefix("--task "), method): result
            for (row, method), result in documented_rows("matrix").items()}


def prepare(folder):
    """The tiny world, and an adapter to be merged."""
    assert outcome(tiny.world(folder), "sft", "lora", folder / "lora") == "ok"
    return folder


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return prepare(tmp_path_factory.mktemp("world"))


@pytest.mark.parametrize("name", TABLES)
def test_the_readme_has_every_row_and_method(name):
    assert list(documented_rows(name)) == [(label(row), m) for row in TABLES[name] for m in METHODS], \
        "run `python tests/test_matrix.py`: it writes the matrices of tests/README.md"


@pytest.mark.parametrize("task, method", QUICK)
def test_a_few_cells(task, method, world, tmp_path):
    assert outcome(world, task, method, tmp_path / "r") == documented()[task, method]


@pytest.mark.parametrize("row, method", QUICK_RECORDS)
def test_a_few_algorithms(row, method, world, tmp_path):
    assert outcome(world, row[0], method, tmp_path / "r", *row[1:]) == documented_rows("records")[label(row), method]


@pytest.mark.slow
@pytest.mark.parametrize("name", TABLES)
def test_every_cell(name, world, tmp_path):
    assert matrix(all_cells(world, tmp_path, TABLES[name]), TABLES[name]) == section(name), \
        "run `python tests/test_matrix.py`: it writes the matrices of tests/README.md"


def all_cells(world, folder, rows):
    return {(row, m): outcome(world, row[0], m, folder / "-".join((*row, m)), *row[1:])
            for row in rows for m in METHODS}


def main():
    for name, rows in TABLES.items():
        with tempfile.TemporaryDirectory() as temporary:
            folder = pathlib.Path(temporary)
            text = matrix(all_cells(prepare(folder), folder, rows), rows)
        before, rest = README.read_text().split(f"<!-- {name} -->\n")
        README.write_text(f"{before}<!-- {name} -->\n{text}<!-- end -->" + rest.split("<!-- end -->", 1)[1])
        print(text)


if __name__ == "__main__":
    main()
