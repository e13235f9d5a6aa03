"""test_house.py: the rules of the house, read off the source without running it.

Four packages; model -> lora -> prompts -> ppo -> train, and no file needs a later one; every file opens with
its specification; nothing is wide, nothing is long.
"""
import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = {"torch", "numpy", "tiktoken", "tqdm"}               # what requirements.txt installs
LAZY = {"matplotlib"}                                           # only inside a function: plots are a luxury
MAY = {                                                         # which of our own files each file may import
    "model": {"data"},
    "lora": {"data.files", "data.hf", "data.peft", "data.quant"},       # formats, but nothing about text
    "prompts": {"data.files", "data.hf", "data.peft"},
    "ppo": {"model", "data"},
    "train": {"model", "lora", "prompts", "ppo", "data"},
}
NO_NUMPY = {"lora", "prompts"}                                  # torch only
LINES = dict(model=535, lora=485, prompts=350, ppo=700, train=995)
LINES["data/flags"] = 360                                       # one table of every flag
DATA_LINES = 290


def source_files():
    """The tracked Python files, or, in an unpacked archive, all of them."""
    git = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True)
    names = git.stdout.split() if git.returncode == 0 and git.stdout else \
        [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if not any(s[0] == "." for s in p.parts[1:])]
    return sorted(name for name in names if (ROOT / name).exists())


FILES = source_files()
PRODUCT = [name for name in FILES if not name.startswith("tests/")]


def tree(name):
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def imports(name):
    """(module, whether inside a function) for every import of a file, `from data import x` being data.x."""
    found, package = [], name.split("/")[:-1]

    def walk(node, inside):
        inside = inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
        if isinstance(node, ast.Import):
            found.extend((alias.name, inside) for alias in node.names)
        if isinstance(node, ast.ImportFrom):
            above = package[:len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *filter(None, [node.module])])
            for full in (f"{module}.{alias.name}" for alias in node.names):
                file = (ROOT / full.replace(".", "/")).with_suffix(".py")
                found.append((full if file.exists() else module, inside))
        for child in ast.iter_child_nodes(node):
            walk(child, inside)

    walk(tree(name), False)
    return found


def ours(module):
    """Is the module a file of this repository? Scripts in data/ see their neighbours without a prefix."""
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").exists() or path.is_dir() and module != "tests"


def test_the_house_is_found():
    assert {"model.py", "data/files.py", "data/hf.py"} <= set(PRODUCT)


@pytest.mark.parametrize("name", PRODUCT)
def test_packages(name):
    for module, inside in imports(name):
        top = module.split(".")[0]
        beside = name.startswith("data/") and (ROOT / "data" / f"{top}.py").exists()
        known = top in sys.stdlib_module_names | PACKAGES or ours(module) or beside
        assert known or top in LAZY and inside, f"{name} imports {module}: it is not in {sorted(PACKAGES)}"


def test_requirements_are_these_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {re.match(r"[\w-]+", line)[0] for line in lines} == PACKAGES


@pytest.mark.parametrize("name", PRODUCT)
def test_directions(name):
    stem = name.removesuffix(".py")
    may = MAY.get(stem, {"data"})                               # whatever is in data/ knows data/ alone ...
    may = may | {"model"} if stem in ("data/evaluate", "data/show") else may    # ... but measuring generates
    for module, _ in imports(name):
        if ours(module) and (ROOT / name).stem != module:
            allowed = any(module == m or module.startswith(m + ".") for m in may)
            assert allowed, f"{name} imports {module}; it may import {sorted(may)}"
        if stem in NO_NUMPY:
            assert module.split(".")[0] != "numpy", f"{name} imports numpy; it is torch only"


def test_nothing_imports_in_a_circle():
    """Among the top-level imports (those inside a function run later, on purpose)."""
    edges = {name.removesuffix(".py").replace("/", ".").removesuffix(".__init__"):
             {m for m, inside in imports(name) if ours(m) and not inside} for name in PRODUCT}

    def visit(node, path):
        assert node not in path, " -> ".join([*path, node])
        for after in edges.get(node, ()):
            visit(after, [*path, node])

    for node in edges:
        visit(node, [])


@pytest.mark.parametrize("name", FILES)
def test_columns(name):
    for number, line in enumerate((ROOT / name).read_text(encoding="utf-8").split("\n"), 1):
        assert len(line) <= 110, f"{name}:{number} has {len(line)} columns, and 110 is the limit"
        assert line == line.rstrip() and "\t" not in line, f"{name}:{number} has a tab, or blanks at its end"


@pytest.mark.parametrize("name", PRODUCT)
def test_header(name):
    """The opening docstring names the file and its public names, and those exist."""
    module = tree(name)
    text = ast.get_docstring(module)
    assert text, f"{name} opens without a docstring"
    if name.endswith("__init__.py"):
        return
    assert text.split(":")[0].endswith(pathlib.Path(name).name), f"{name}: its docstring starts otherwise"
    public = re.search(r"^Public: (.+?)(\n\n|\Z)", text, re.M | re.S)
    assert public, f'{name}: its docstring has no line "Public: ..."'
    defined = {getattr(node, field, None) for node in ast.walk(module) for field in ("name", "id", "attr")}
    for word in re.split(r"[,;]\s*", public[1].replace("\n", " ")):
        if word.isidentifier():
            assert word in defined, f"{name}: Public names {word}, which is not in the file"


@pytest.mark.parametrize("name", PRODUCT)
def test_length(name):
    stem = name.removesuffix(".py")
    limit = LINES.get(stem, DATA_LINES if name.startswith("data/") else None)
    if limit is None:
        pytest.skip(f"{name} has no ceiling")
    lines = (ROOT / name).read_text(encoding="utf-8").count("\n")
    assert lines <= limit, f"{name} has {lines} lines; its ceiling is {limit}"


def test_nothing_is_pickled_but_our_own_state():
    """torch.load only with weights_only=True; pickle and its kin, eval and exec, nowhere."""
    for name in PRODUCT:
        assert not {m for m, _ in imports(name)} & {"pickle", "marshal", "shelve", "dill"}, name
        for node in ast.walk(tree(name)):
            if not isinstance(node, ast.Call):
                continue
            call = ast.unparse(node.func)
            assert call not in ("eval", "exec"), f"{name}:{node.lineno} calls {call}"
            if call == "torch.load":
                given = {k.arg: ast.unparse(k.value) for k in node.keywords}
                assert given.get("weights_only") == "True", f"{name}:{node.lineno}: torch.load of anything"
