"""The import rules of DESIGN: four packages, the arrows between our own files, no circle, no pickle.

Nothing here looks at style: how long a file, a line or a function is, is reported by tests/style.py and never
fails a test.
"""
import ast
import pathlib
import re
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).resolve().parent.parent
PACKAGES = {"torch", "numpy", "tiktoken", "tqdm"}               # what requirements.txt installs
LAZY = {"matplotlib"}                                           # only inside a function: plots are optional
ERRORS = {"data.runtime.files", "data.runtime.flags"}         # errors, and how a flag is declared
ARROWS = {                                                      # what a file or package may import of ours
    "data.runtime": {"data.runtime"},
    "data.toy": {"data.toy", "data.runtime"},
    "data.checkpoints": {"data.checkpoints", "data.runtime"},
    "data.text": {"data.text", "data.runtime"},
    "data.batches": {"data.batches", "data.text", "data.runtime"},
    "data.results": {"data.results", "model", "data.batches", "data.text", "data.runtime"},
    "data.fetch": {"data.runtime"},
    "data": {"data.text"},                                      # data/__init__.py
    "model": {"data.checkpoints", "data.batches", "data.runtime"},
    "lora": {"data.checkpoints", *ERRORS},
    "prompts": {"data.checkpoints", *ERRORS},
    "ppo": {"model", "data"},
    "train": {"model", "lora", "prompts", "ppo", "data"},
}
INSIDE = {("data.text.formats", "data.toy")}                    # imported inside a function, when asked for
NO_NUMPY = {"lora", "prompts"}                                  # torch only


def source_files():
    """The tracked Python files, or, in an unpacked archive, all of them."""
    git = subprocess.run(["git", "ls-files", "-co", "--exclude-standard", "*.py"], cwd=ROOT,
                         capture_output=True, text=True)
    names = git.stdout.split() if git.returncode == 0 and git.stdout else \
        [str(p.relative_to(ROOT)) for p in ROOT.rglob("*.py") if not any(s[0] == "." for s in p.parts[1:])]
    return sorted(name for name in names if (ROOT / name).exists())


FILES = source_files()
PRODUCT = [name for name in FILES if not name.startswith("tests/")]


def tree(name):
    return ast.parse((ROOT / name).read_text(encoding="utf-8"), name)


def module_of(name):
    return name.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


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
                path = ROOT / full.replace(".", "/")
                found.append((full if path.with_suffix(".py").exists() or path.is_dir() else module, inside))
        for child in ast.iter_child_nodes(node):
            walk(child, inside)

    walk(tree(name), False)
    return found


def ours(module):
    path = ROOT / module.replace(".", "/")
    return path.with_suffix(".py").exists() or path.is_dir() and module != "tests"


def within(module, package):
    return module == package or module.startswith(package + ".")


def test_the_house_is_found():
    assert {"model.py", "data/runtime/files.py", "data/checkpoints/hf.py"} <= set(PRODUCT)
    top = {p.name for p in (ROOT / "data").iterdir() if p.is_dir() and not p.name.startswith("__")}
    assert {"text", "batches", "checkpoints", "runtime", "results", "toy"} <= top


@pytest.mark.parametrize("name", PRODUCT)
def test_packages(name):
    for module, inside in imports(name):
        top = module.split(".")[0]
        known = top in sys.stdlib_module_names | PACKAGES or ours(module)
        assert known or top in LAZY and inside, f"{name} imports {module}: it is not in {sorted(PACKAGES)}"


def test_requirements_are_these_packages():
    lines = (ROOT / "requirements.txt").read_text().split()
    assert {re.match(r"[\w-]+", line)[0] for line in lines} == PACKAGES


def place_of(name):
    """The key of ARROWS that a file stands under. Raises AssertionError for a file that has no place."""
    known = [package for package in ARROWS if within(module_of(name), package)]
    assert known, (f"{name} has no place in the house: the repository root holds "
                   f"{', '.join(f'{p}.py' for p in ARROWS if '.' not in p and p != 'data')}; move it to a package of "
                   "data/ or to tests/, or say in ARROWS what it may import")
    return max(known, key=len)


@pytest.mark.parametrize("name", PRODUCT)
def test_arrows(name):
    """No file imports one that stands above it."""
    own = module_of(name)
    package = place_of(name)
    for module, inside in imports(name):
        if ours(module) and module != own:
            allowed = any(within(module, p) for p in ARROWS[package])
            lazily = inside and any(own == a and within(module, b) for a, b in INSIDE)
            assert allowed or lazily, f"{name} imports {module}; it may import {sorted(ARROWS[package])}"
        if own in NO_NUMPY:
            assert module.split(".")[0] != "numpy", f"{name} imports numpy; it is torch only"


def test_a_file_without_a_place_is_named_in_a_sentence():
    with pytest.raises(AssertionError, match="scratch.py has no place in the house: .*train.py; move it"):
        place_of("scratch.py")
    assert place_of("data/results/best.py") == "data.results" and place_of("train.py") == "train"


def test_nothing_imports_in_a_circle():
    """Among the top-level imports; those inside a function run later, on purpose."""
    edges = {module_of(name): {m for m, inside in imports(name) if ours(m) and not inside} for name in PRODUCT}

    def visit(node, path):
        assert node not in path, " -> ".join([*path, node])
        for after in edges.get(node, ()):
            if after != node:
                visit(after, [*path, node])

    for node in edges:
        visit(node, [])


@pytest.mark.parametrize("name", PRODUCT)
def test_public_names_exist(name):
    """What a header promises under "Public:" is defined in the file."""
    module = tree(name)
    text = ast.get_docstring(module) or ""
    public = re.search(r"^Public: (.+?)(\n\n|\Z)", text, re.M | re.S)
    if not public:
        return
    defined = {getattr(node, field, None) for node in ast.walk(module) for field in ("name", "id", "attr")}
    for word in re.split(r"[,;]\s*", public[1].replace("\n", " ")):
        if word.isidentifier():
            assert word in defined, f"{name}: Public names {word}, which is not in the file"


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
