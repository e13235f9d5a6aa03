"""A report on style, never a gate: `python tests/style.py` prints where files leave the guides.

Guides: model 500 lines, lora 500, prompts 400, ppo 850, train 850, a file of data/ 300; a function 60 lines and
8 parameters; a line 110 columns; one statement a line; a header that names the file and its public names.
"""
import ast
import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).resolve().parent.parent
LINES = {"model.py": 500, "lora.py": 500, "prompts.py": 400, "ppo.py": 850, "train.py": 850}
DATA_LINES, FUNCTION, PARAMETERS, COLUMNS = 300, 60, 8, 110
README_WORDS = 2000


def packed(node):
    """Does a tuple assignment bind several values that are all spelled out, as in `a, b = f(x), g(y)`?"""
    return (isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Tuple)
            and isinstance(node.value, ast.Tuple) and len(node.value.elts) > 1)


def faults(name, source):
    """What leaves a guide, a line each."""
    lines = source.split("\n")
    limit = LINES.get(name, DATA_LINES if name.startswith("data/") else None)
    if limit and len(lines) - 1 > limit:
        yield f"{name}: {len(lines) - 1} lines, the guide is {limit}"
    for number, line in enumerate(lines, 1):
        if len(line) > COLUMNS:
            yield f"{name}:{number}: {len(line)} columns"
        if line != line.rstrip() or "\t" in line:
            yield f"{name}:{number}: a tab, or blanks at the end"
    tree = ast.parse(source)
    header = ast.get_docstring(tree) or ""
    if not name.startswith("tests/") and not name.endswith(("__init__.py", "__main__.py")):
        if not header.split(":")[0].endswith(pathlib.Path(name).name):
            yield f"{name}: its header does not begin with its name"
        if not re.search(r"^Public: ", header, re.M):
            yield f"{name}: its header names nothing public"
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            length = node.end_lineno - node.lineno + 1
            count = len(node.args.posonlyargs + node.args.args + node.args.kwonlyargs)
            if length > FUNCTION and not name.startswith("tests/"):
                yield f"{name}:{node.lineno}: {node.name} has {length} lines, the guide is {FUNCTION}"
            if count > PARAMETERS and not name.startswith("tests/"):
                yield f"{name}:{node.lineno}: {node.name} has {count} parameters, the guide is {PARAMETERS}"
        if packed(node) and not name.startswith("tests/"):
            yield f"{name}:{node.lineno}: several assignments in one statement"


def main():
    names = subprocess.run(["git", "ls-files", "*.py"], cwd=ROOT, capture_output=True, text=True).stdout.split()
    found, total = [], 0
    for name in names:
        source = (ROOT / name).read_text(encoding="utf-8")
        found += faults(name, source)
        total += source.count("\n") * (not name.startswith("tests/"))
    words = len((ROOT / "README.md").read_text(encoding="utf-8").split())
    if words > README_WORDS:
        found.append(f"README.md: {words} words, the guide is {README_WORDS}")
    print("\n".join(found))
    print(f"{len(found)} remarks; {total:,} lines of product in {sum('tests/' not in n for n in names)} files")


if __name__ == "__main__":
    main()
