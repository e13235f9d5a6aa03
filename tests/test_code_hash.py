"""Code hashes: what an edit changes, in small projects made here and in a copy of the repository."""
import ast
import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest

from data.runtime.code_hash import CACHE, EXCLUDED, changed, code_hashes, function_hashes, short_hash
from data.runtime.files import UserError

ROOT = pathlib.Path(__file__).resolve().parent.parent

LORA = '''
"""The header."""
import math
import torch.nn as nn
from data import text, tools as t
from data.text import chat
import data.deep.inner

SCALE = 2                                   # a value
LIMITS = {"low": 0, "high": math.inf}
TARGETS = ("q", "v")

def scaled(x):
    """The docstring."""
    return x * SCALE                        # a comment

def unused(x):
    return x + 1

class Base:
    gain = 1.0

    def shape(self):
        return self.gain

class LoRA(Base):
    """A variant."""
    rate: float = 1e-4
    rank: int = 8

    def __init__(self, x):
        self.x = scaled(x)

    def forward(self, x):
        return x * self.rate

class DoRA(LoRA):
    def forward(self, x):
        return text.clean(chat.render(x))

VARIANTS = (LoRA, DoRA)

def make(name):
    return next(v for v in VARIANTS if v.__name__ == name)
'''
TRAIN = '''
import lora
import ppo
from ppo import gae as advantage

class Task:
    def __init__(self, name, run, loss=None):
        self.name = name

def run_supervised(cfg):
    task = find(cfg.task)
    return lora.make(cfg.variant)

def run_rl(cfg):
    return ppo.train(advantage)

TASKS = (Task("sft", run_supervised), Task("ppo", run=run_rl), Task(run=run_rl, name="dpo"))

def find(name):
    return {task.name: task for task in TASKS}[name]
'''
FILES = {
    "lora.py": LORA, "train.py": TRAIN,
    "ppo.py": "def gae(x):\n    return x\n\ndef train(f):\n    return f(1)\n\ndef other():\n    return 2\n",
    "data/__init__.py": "", "data/text/__init__.py": "from data.text.rows import clean\n",
    "data/text/rows.py": "def clean(x):\n    return x.strip()\n\ndef rest():\n    return 0\n",
    "data/text/chat.py": "def render(x):\n    return x\n", "data/tools.py": "def tool():\n    return 1\n",
    "data/deep/inner.py": "def core():\n    return 3\n",
    "data/runtime/__init__.py": "", "data/runtime/files.py": "def atomic():\n    return 1\n",
    "data/runtime/distributed.py": "def clip(x):\n    return x\n"}


@pytest.fixture
def folder(tmp_path):
    for name, source in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    return tmp_path


def edit(folder, name, old, new, count=1):
    source = (folder / name).read_text()
    assert source.count(old) == count, f"{old!r} is {source.count(old)} times in {name}"
    (folder / name).write_text(source.replace(old, new))


def after(folder, roots, name, old, new, count=1):
    """What an edit changes for these roots."""
    before = code_hashes(roots, folder)
    edit(folder, name, old, new, count)
    return changed(before, code_hashes(roots, folder))


def append(folder, roots, name, text):
    """What text at the end of a file changes for these roots."""
    before = code_hashes(roots, folder)
    with open(folder / name, "a") as f:
        f.write(text)
    return changed(before, code_hashes(roots, folder))


# ------------------------------------------------------------------------------------ what is no change, what is

@pytest.mark.parametrize("old, new", [
    ("# a comment", "# another"), ('"""The docstring."""', '"""Others say: 3 * x."""'), ('"""The header."""', ""),
    ('"""A variant."""', '"""A better variant."""'), ("x * SCALE", "(x\n            * SCALE)"),
    ("\nSCALE = 2", "\n\n\n\nSCALE = 2"), ('("q", "v")', "('q',\n    'v',)"), ("SCALE = 2   ", "SCALE = 0x2   ")])
def test_comments_docstrings_and_format_change_nothing(old, new, folder):
    assert after(folder, ["lora.py"], "lora.py", old, new) == []


def test_neither_line_nor_folder_nor_hash_seed_matters(folder, tmp_path_factory):
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(folder, other, dirs_exist_ok=True)
    code = ("import sys; sys.path.insert(0, sys.argv[2]); from data.runtime.code_hash import code_hashes; "
            "print(code_hashes(['train.py'], sys.argv[1]))")
    found = {subprocess.run([sys.executable, "-c", code, str(where), str(ROOT)], cwd=cwd, capture_output=True, text=True,
                            check=True, env={**os.environ, "PYTHONHASHSEED": seed}).stdout
             for where, cwd, seed in ((folder, folder, "1"), (other, "/", "2"), (other, other, "3"))}
    assert len(found) == 1 and "run_supervised" in found.pop()


@pytest.mark.parametrize("old, new, names", [
    ("x * SCALE ", "x * SCALE * 2 ", ["lora.py: scaled"]),
    ("return x * self.rate", "return -x * self.rate", ["lora.py: LoRA.forward"]),
    ("SCALE = 2", "SCALE = 3", ["lora.py: SCALE"]),
    ("1e-4", "1e-3", ["lora.py: LoRA.rate"]),
    ("return self.gain", "return 2 * self.gain", ["lora.py: Base.shape"]),         # a base's method
    ("gain = 1.0", "gain = 2.0", ["lora.py: Base.gain"]),
    ("class LoRA(Base)", "class LoRA(Base, nn.Module)", ["lora.py: LoRA"]),
    ("class LoRA(Base)", "@t.tool\nclass LoRA(Base)", ["lora.py: LoRA"]),
    ("    def forward(self, x):\n        return x *", "    @t.tool\n    def forward(self, x):\n        return x *",
     ["lora.py: LoRA.forward"]),
    ("def scaled(x)", "def scaled(x, y=1)", ["lora.py: scaled"]),
    ('"low": 0', '"low": 1', ['lora.py: LIMITS["low"]']),
    ('("q", "v")', '("q", "v", "k")', ["lora.py: TARGETS"]),            # plain elements belong to the value
    ("def scaled", "def rescaled", ["lora.py: LoRA.__init__", "lora.py: scaled"]),
    ("    def shape", "    def form", ["lora.py: Base.shape"]),
    ("    rate: float = 1e-4\n    rank: int = 8\n", "    rank: int = 8\n    rate: float = 1e-4\n",
     ["lora.py: LoRA (order of fields)"]),
    ("(LoRA, DoRA)", "(DoRA,)", ['lora.py: VARIANTS["LoRA"]']),
    ("import math", "import cmath as math", ['lora.py: LIMITS["high"]'])])         # the same name, another module
def test_a_changed_or_removed_definition_is_named(old, new, names, folder):
    assert after(folder, ["lora.py"], "lora.py", old, new) == names


@pytest.mark.parametrize("old, new", [
    ("def unused", "def added(x):\n    return 0\n\ndef unused"),
    ("(LoRA, DoRA)", "(LoRA, DoRA, Mine)\nclass Mine(LoRA):\n    def forward(self, x):\n        return 0\n"),
    ("    rank: int = 8", "    rank: int = 8\n    more: int = 1"),
    ("    rate: float = 1e-4", "    more: int = 1\n    rate: float = 1e-4"),
    ('"low": 0,', '"middle": 1, "low": 0,'), ("import math", "import math\nimport json"),
    ("    def shape", "    def area(self):\n        return 0\n\n    def shape")])
def test_an_added_definition_changes_nothing(old, new, folder):
    assert after(folder, ["lora.py"], "lora.py", old, new) == []


@pytest.mark.parametrize("old, new, names", [
    ("    rank: int = 8\n", "    rank: int = 8\n    def shape(self):\n        return 0\n", ["lora.py: LoRA"]),
    ("    rank: int = 8\n", "    rank: int = 8\n    gain = 0\n", ["lora.py: LoRA"]),
    ("class DoRA(LoRA):\n", "class DoRA(LoRA):\n    rate = 0\n", ["lora.py: DoRA"]),
    ("    gain = 1.0\n", "    gain = 1.0\n    def __call__(self):\n        return 0\n", ["lora.py: Base"]),
    ("\ndef unused", "\ndef next(x):\n    return x\n\ndef unused", ["lora.py: make"]),        # hides a builtin
    ("SCALE = 2", "SCALE = 2\nif SCALE:\n    nn.Linear = None\n", ["lora.py: module-level code"]),
    ("\ndef unused", "\nLoRA.forward = scaled\n\ndef unused", ["lora.py: module-level code"]),
    ("SCALE = 2", "SCALE = 2\nSCALE += 1\n", ["lora.py: module-level code"])])
def test_what_is_added_and_acts_at_once_counts(old, new, names, folder):
    assert after(folder, ["lora.py"], "lora.py", old, new) == names


def test_a_class_has_one_hash_whatever_reaches_it(folder):
    """Else runs of two methods from one source tree would count as different code."""
    edit(folder, "lora.py", "    return next(v", "    hook = getattr(LoRA, 'rank', None)\n    return next(v")
    alone = code_hashes(["lora.py: LoRA"], folder)
    with_others = code_hashes(["lora.py: make"], folder)
    shared = alone.keys() & with_others.keys()
    assert "lora.py: LoRA" in shared and all(alone[name] == with_others[name] for name in shared)


@pytest.mark.parametrize("head, base", [
    ("", "nn.Module"), ("import torch\n", "torch.nn.Module"), ("from torch import nn as n\n", "n.Module"),
    ("from torch.nn import Module\n", "Module"), ("from torch.nn import Module\nclass Own(Module):\n    pass\n", "Own"),
    ("import unittest.case\n", "unittest.case.TestCase"), ("from torch.nn import Module\n", "Generic[Module]"),
    ("", "unknown_function()"), ("import not_loaded\n", "not_loaded.Base")])
def test_a_method_that_overrides_another_package_counts_when_added(head, base, folder):
    """Of a base that is not known, every method may override one."""
    edit(folder, "lora.py", "class Base:", f"{head}class Base({base}):")
    known = {"describe": []} if "not_loaded" not in head and "(" not in base and "[" not in base else {}
    for name, names in {"eval": ["lora.py: Base"], "run": ["lora.py: Base"], "describe": ["lora.py: Base"], **known}.items():
        if name == ("eval" if "unittest" in head else "run"):
            names = known.get("describe", names)
        new = f"    gain = 1.0\n    def {name}(self):\n        return 0\n"
        assert after(folder, ["lora.py: LoRA"], "lora.py", "    gain = 1.0\n", new) == names, name
        edit(folder, "lora.py", new, "    gain = 1.0\n")


def test_other_spellings_of_a_string_and_other_stars(folder):
    (folder / "user.py").write_text("from math import *\ndef f():\n    return sqrt('a')\n")
    assert after(folder, ["user.py: f"], "user.py", "'a'", "u'a'") == []
    assert after(folder, ["user.py: f"], "user.py", "from math", "from cmath") == ["user.py: f"]


# ---------------------------------------------------------------------------------------------- what is reached

def test_an_unreached_function_changes_nothing(folder):
    assert after(folder, ["lora.py: LoRA"], "lora.py", "x + 1", "x + 2") == []
    assert after(folder, ["lora.py: make"], "data/text/rows.py", "return 0", "return 1") == []
    assert after(folder, ["lora.py: make"], "data/text/rows.py", "x.strip()", "x") == ["data/text/rows.py: clean"]
    assert after(folder, ["lora.py: LoRA"], "lora.py", "text.clean", "text.cleaned") == []      # another variant


IMPORTS = {
    "an attribute": "import ppo\ndef f():\n    return ppo.gae\n",
    "an alias": "import ppo as rl\ndef f():\n    return rl.gae(1)\n",
    "a name": "from ppo import gae\ndef f():\n    return gae\n",
    "a renamed name": "from ppo import gae as g\ndef f():\n    return map(g, ())\n",
    "inside a function": "def f():\n    import ppo\n    def inner():\n        return ppo.gae\n    return inner\n",
    "a name inside a function": "def f():\n    from ppo import gae\n    return gae\n",
    "a star": "from ppo import *\ndef f():\n    return gae\n",
    "under a condition": "import sys\nif sys.argv:\n    from ppo import gae\nelse:\n    gae = None\n\ndef f():\n    return gae\n",
    "or another": "try:\n    from nowhere import gae\nexcept ImportError:\n    from ppo import gae\ndef f():\n    return gae\n",
    "a default": "import ppo\ndef f(g=ppo.gae):\n    return g\n",
    "a decorator": "import ppo\n@ppo.gae\ndef f():\n    return 1\n",
    "an annotation": "import ppo\ndef f(x: ppo.gae):\n    return x\n",
    "a value": "import ppo\nG = [ppo.gae]\ndef f():\n    return G\n",
    "a dict": "import ppo\nG = {'g': ppo.gae}\ndef f():\n    return G\n",
    "a class attribute": "import ppo\nclass C:\n    g = ppo.gae\ndef f():\n    return C()\n",
    "a base": "import ppo\nclass B:\n    g = ppo.gae\nclass C(B):\n    pass\ndef f():\n    return C\n",
    "a property": "import ppo\nclass C:\n    @property\n    def g(self):\n        return 1\n    @g.setter\n"
                  "    def g(self, x):\n        ppo.gae(x)\ndef f():\n    return C\n",
    "a nested class": "import ppo\nclass C:\n    class D:\n        def g(self):\n            return ppo.gae\ndef f():\n    return C\n",
    "a lambda": "import ppo\nf = lambda x: ppo.gae(x)\n",
    "a comprehension": "import ppo\ndef f():\n    return [x for x in ppo.gae(1)]\n",
    "the first iterable": "from ppo import gae\ndef f():\n    return [gae for gae in gae(1)]\n",
    "a global": "from ppo import gae\ndef f():\n    global gae\n    gae = gae(1)\n",
    "the whole module": "import ppo\ndef f(name):\n    return getattr(ppo, name)\n",
    "globals": "from ppo import gae\ndef g():\n    return gae\ndef f(name):\n    return globals()[name]\n",
    "import_module": "import importlib\ndef f():\n    return importlib.import_module('ppo')\n",
    "module-level code": "import ppo\nfor x in (1,):\n    ppo.gae(x)\ndef f():\n    return 1\n",
    "a chain of files": "from middle import f\n"}


@pytest.mark.parametrize("how", IMPORTS)
def test_a_definition_is_followed_through(how, folder):
    (folder / "user.py").write_text(IMPORTS[how])
    (folder / "middle.py").write_text("import ppo\ndef f():\n    return ppo.gae\n")
    assert after(folder, ["user.py: f"], "ppo.py", "    return x", "    return -x") == ["ppo.py: gae"]


@pytest.mark.parametrize("source", [
    "from ppo import gae\ndef f(gae):\n    return gae\n", "from ppo import gae\ndef f():\n    gae = 1\n    return gae\n",
    "from ppo import gae\ndef f():\n    return [gae for gae in ()]\n",
    "from ppo import gae\nf = lambda gae: gae\n", "import ppo\ndef f(x):\n    return x.gae\n",
    "from ppo import gae\ndef f():\n    def gae():\n        return 1\n    return gae\n",
    "from ppo import gae\ndef f():\n    try:\n        pass\n    except OSError as gae:\n        return gae\n",
    "from ppo import gae\ndef f():\n    return 1\nif __name__ == '__main__':\n    f(gae)\n",
    "import ppo\ndef f():\n    return 'ppo.gae'\n", "import ppo\ndef f():\n    return ppo.train(1)\n"])
def test_a_local_variable_is_not_an_import(source, folder):
    (folder / "user.py").write_text(source)
    assert after(folder, ["user.py: f"], "ppo.py", "    return x", "    return -x") == []


@pytest.mark.parametrize("source", [
    "import data.deep.inner\ndef f():\n    return data.deep.inner.core()\n",
    "from data.deep import inner\ndef f():\n    return inner.core()\n",
    "from data.deep.inner import core\ndef f():\n    return core()\n",
    "import data.deep.inner as d\ndef f():\n    return d.core()\n",
    "from data import deep\ndef f():\n    return deep.inner.core()\n"])
def test_nested_modules_are_followed(source, folder):
    """data/deep is a package without __init__.py."""
    (folder / "user.py").write_text(source)
    assert after(folder, ["user.py: f"], "data/deep/inner.py", "3", "4") == ["data/deep/inner.py: core"]


def test_relative_imports_and_packages_are_followed(folder):
    (folder / "data/user.py").write_text("from .text import clean\nfrom . import tools\n\ndef f():\n    return clean, tools.tool\n")
    assert after(folder, ["data/user.py: f"], "data/text/rows.py", "x.strip()", "x") == ["data/text/rows.py: clean"]
    assert after(folder, ["data/user.py: f"], "data/tools.py", "1", "2") == ["data/tools.py: tool"]
    assert append(folder, ["data/user.py: f"], "data/__init__.py", "print(1)\n") == [
        "data/__init__.py: module-level code"]
    (folder / "data/deep/user.py").write_text("from ..text import clean\nfrom .. import tools\nfrom .inner import core\n"
                                              "\ndef f():\n    return clean, tools.tool, core\n")
    assert {"data/text/rows.py: clean", "data/tools.py: tool", "data/deep/inner.py: core"} < code_hashes(
        ["data/deep/user.py: f"], folder).keys()


def test_imports_in_a_circle_end(folder):
    (folder / "a.py").write_text("from b import x\ndef f():\n    return x\n")
    (folder / "b.py").write_text("from a import x\n")
    assert list(code_hashes(["a.py: f"], folder)) == ["a.py: f", "a.py: module-level code", "b.py: module-level code"]


def test_files_that_do_not_count(folder):
    (folder / "user.py").write_text("from data.runtime import distributed\nfrom data.runtime.files import atomic\n\n"
                                    "def f():\n    atomic()\n    return distributed.clip(1)\n")
    assert after(folder, ["user.py: f"], "data/runtime/files.py", "return 1", "return 2") == []
    assert after(folder, ["user.py: f"], "data/runtime/distributed.py", "return x", "return 2 * x") == [
        "data/runtime/distributed.py: clip"]
    assert after(folder, ["user.py: f"], "user.py", "from data.runtime.files", "from data.runtime.device") == []
    assert after(folder, ["user.py: f"], "user.py", "from data.runtime.device", "from data.tools") == ["user.py: f"]


def test_a_removed_module_counts(folder):
    before = code_hashes(["train.py: run_rl"], folder)
    (folder / "ppo.py").rename(folder / "rl.py")
    edit(folder, "train.py", "import ppo", "import rl as ppo")
    edit(folder, "train.py", "from ppo", "from rl")
    assert {"ppo.py: gae", "ppo.py: train"} < set(changed(before, code_hashes(["train.py: run_rl"], folder)))


def test_a_repeated_call_is_cheap_and_sees_every_edit(folder, monkeypatch):
    """Also one that keeps a file's size and time."""
    first = code_hashes(["train.py"], folder)
    first["mine"] = "x"                                     # the caller's own copy
    with monkeypatch.context() as patch:
        patch.setattr(ast, "parse", None)
        again = code_hashes(["train.py"], folder)
    assert again == {name: value for name, value in first.items() if name != "mine"}
    stat = os.stat(folder / "ppo.py")
    edit(folder, "ppo.py", "return f(1)", "return f(2)")
    os.utime(folder / "ppo.py", ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert changed(again, code_hashes(["train.py"], folder)) == ["ppo.py: train"]
    (folder / "ppo.py").unlink()
    assert "ppo.py: train" not in code_hashes(["train.py"], folder)


# ---------------------------------------------------------------------------------------------------- records

SFT = ["train.py: run_supervised", 'train.py: TASKS["sft"]', 'lora.py: VARIANTS["LoRA"]']


def test_only_the_selected_records_are_followed(folder):
    found = code_hashes(SFT, folder)
    assert {'train.py: TASKS["sft"]', "train.py: find", "lora.py: LoRA.forward", "lora.py: Base.shape"} < found.keys()
    assert not [name for name in found if "ppo" in name or "dpo" in name or "DoRA" in name or "run_rl" in name]
    assert after(folder, SFT, "ppo.py", "    return x", "    return -x") == []
    assert after(folder, SFT, "train.py", 'Task("sft", run_supervised)', 'Task("sft", run_supervised, 1)') == [
        'train.py: TASKS["sft"]']
    assert after(folder, SFT, "train.py", 'Task(run=run_rl, name="dpo")', 'Task("rloo", run_rl), Task("raft", run_rl)') == []
    assert after(folder, SFT, "train.py", 'Task("sft", run_supervised, 1), ', "") == ['train.py: TASKS["sft"]']


@pytest.mark.parametrize("roots, reached", [
    (["train.py: find"], {"sft", "ppo", "dpo"}), (["train.py: find", "train.py: TASKS[]"], set()),
    (["train.py: find", 'train.py: TASKS["dpo"]'], {"dpo"}),                        # named by a keyword
    (['train.py: TASKS["ppo"]', 'train.py: TASKS["sft"]'], {"sft", "ppo"}),
    (['train.py: TASKS["unknown"]'], {"sft", "ppo", "dpo"})])                       # unsure: all of them
def test_selection(roots, reached, folder):
    found = code_hashes([*roots, "lora.py: VARIANTS[]"], folder)
    assert {name for name in ("sft", "ppo", "dpo") if f'train.py: TASKS["{name}"]' in found} == reached
    assert ("ppo.py: train" in found) == bool(reached & {"ppo", "dpo"})


RECORDS = {
    "classes": "class A:\n    x = 1\nclass B:\n    x = 1\nALL = (A, B)\n",
    "classes with names": "class One:\n    name = 'A'\n    x = 1\nclass Two:\n    name: str = 'B'\n    x = 1\nALL = [One, Two]\n",
    "instances": "class R:\n    pass\nA = R('A', fa)\nB = R('B', fb)\nALL = (A, B)\n",
    "instances of other names": "class R:\n    pass\nalpha = R('A', fa)\nbeta = R('B', fb)\nALL: tuple = (alpha, beta)\n",
    "namedtuples": "import collections\nR = collections.namedtuple('R', 'name f')\nALL = (R('A', fa), R(name='B', f=fb))\n",
    "a dict of calls": "class R:\n    pass\nALL = {'A': R(fa), 'B': R(fb)}\n",
    "a dict of functions": "ALL = {'A': fa, 'B': fb}\n",
    "a dict by attribute": "class A:\n    x = 1\nclass B:\n    x = 1\nALL = {A.x: A, B.x: B}\n",
    "copies": "import dataclasses\nbase = None\nALL = (dataclasses.replace(base, name='A', f=fa), dict(name='B', f=fb))\n",
    "classes of another file": "import others\nfrom others import B\nALL = (others.A, B)\n",
    "more from another": "from others import MORE\nclass R:\n    pass\nALL = (*MORE, R('A', fa), R('B', fb))\n",
    "a dict and more": "from others import MORE\nALL = {**MORE, 'A': fa, 'B': fb}\n"}


@pytest.mark.parametrize("how", RECORDS)
def test_every_way_to_write_records(how, folder):
    head = "def fa():\n    return 1\ndef fb():\n    return 1\n"
    (folder / "others.py").write_text("class A:\n    x = 1\nclass B:\n    x = 1\nMORE = ()\n")
    (folder / "user.py").write_text(head + RECORDS[how] + "\ndef find(name):\n    return ALL\n")
    both = code_hashes(["user.py: find"], folder)
    one = code_hashes(["user.py: find", 'user.py: ALL["A"]'], folder)
    none = code_hashes(["user.py: find", "user.py: ALL[]"], folder)
    assert one.keys() < both.keys() and none.keys() < one.keys() and one.items() <= both.items()
    assert changed(both, one) and all(word in "B Two fb beta".split() for name in changed(both, one)
                                      for word in [name.split(": ")[1].replace('ALL["B"]', "B").split(".")[0]])


@pytest.mark.parametrize("source", [
    "import re\nALL = (re.compile('a'), re.compile('b'))\n", "ALL = (fa, fb)\n", "ALL = [1, 2]\n", "ALL = ()\n",
    "ALL = fa(), fb()\n", "class A:\n    pass\nALL = (A, 'b')\n", "ALL = tuple(f for f in (fa, fb))\n"])
def test_elements_without_names_are_followed_and_counted_as_a_whole(source, folder):
    head = "def fa():\n    return 1\ndef fb():\n    return 1\n"
    (folder / "user.py").write_text(head + source + "\ndef find(name):\n    return ALL\n")
    found = code_hashes(["user.py: find", 'user.py: ALL["A"]'], folder)
    assert ("user.py: fb" in found) == ("fb" in source) and not [name for name in found if "[" in name]
    added = {"ALL = ()": "ALL = (1,)"}.get(source.splitlines()[-1])
    old = source.splitlines()[-1]
    new = added or old.replace("ALL = ", "ALL = 5, *") if "tuple(" not in old else old + " + (1,)"
    assert after(folder, ["user.py: find"], "user.py", old + "\n", new + "\n") == ["user.py: ALL"]


def test_a_record_that_came_in_another_way_is_found(folder):
    (folder / "user.py").write_text("import ppo\nclass R:\n    pass\nALL = (R('a'),)\nALL += (R('b', ppo.gae),)\n"
                                    "def find(name):\n    return ALL\n")
    assert after(folder, ['user.py: ALL["b"]'], "ppo.py", "    return x", "    return -x") == ["ppo.py: gae"]


@pytest.mark.parametrize("root", ["nothing.py: f", "lora.py: nothing", "data/runtime/files.py: atomic", "lora.py: "
                                  "VARIANTS[", "lora"])
def test_a_root_that_is_nothing_is_an_error(root, folder):
    if root == "lora":
        assert code_hashes([root], folder) == code_hashes(["lora.py"], folder)
        return
    with pytest.raises(ValueError, match="names no definition"):
        code_hashes([root], folder)


# --------------------------------------------------------------------------------------------- reward functions

@pytest.fixture
def rewards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_reward.py").write_text("import words\nimport torch\n\ndef score(prompt, answer):\n    "
                                           "return words.count(answer)\n\ndef other():\n    return 1\n")
    (tmp_path / "words.py").write_text("def count(x):\n    return len(x)\n\ndef rest():\n    return 1\n")
    return tmp_path


@pytest.mark.parametrize("name, old, new, names", [
    ("words.py", "len(x)", "len(x) + 1", ["words.py: count"]), ("words.py", "return 1", "return 2", []),
    ("my_reward.py", "return 1", "return 2", ["my_reward.py: other"]),              # all of the file counts
    ("my_reward.py", "(answer)", "(prompt)", ["my_reward.py: score"]),
    ("my_reward.py", "import torch", "import torch  # needed", [])])
def test_a_reward_function_is_its_file_and_what_it_reaches(name, old, new, names, rewards):
    before = function_hashes("my_reward:score")
    edit(rewards, name, old, new)
    assert changed(before, function_hashes("my_reward:score")) == names


HELPERS = {"words.py": "import effects\nfrom rules import RULES\ntry:\n    from fast import scale\nexcept ImportError:\n"
                       "    def scale(x):\n        return x\n\n"
                       "def count(x):\n    return scale(sum(rule(x) for rule in RULES))\n",
           "rules.py": "RULES = []\n\n@RULES.append\ndef short(answer):\n    return -len(answer)\n",
           "effects.py": "import os\nos.environ['SCALE'] = '1'\n"}


@pytest.mark.parametrize("name, text, names", [
    ("rules.py", HELPERS["rules.py"].replace("-len", "len"), ["rules.py: short"]),      # registered, never named
    ("effects.py", HELPERS["effects.py"].replace("'1'", "'2'"), ["effects.py: module-level code"]),
    ("fast.py", "def scale(x):\n    return 2 * x\n", ["words.py: count", "words.py: module-level code"]),
    ("effects.py", HELPERS["effects.py"] + "# a comment\n", [])])
def test_what_acts_while_a_reward_is_imported_counts(name, text, names, rewards):
    for helper, content in HELPERS.items():
        (rewards / helper).write_text(content)
    before = function_hashes("my_reward:score")
    (rewards / name).write_text(text)
    found = changed(before, function_hashes("my_reward:score"))
    assert found == names or (name == "fast.py" and set(found) & set(names))


def test_a_folder_that_is_called_python_is_no_package(tmp_path, monkeypatch):
    (tmp_path / "python3").mkdir()
    monkeypatch.chdir(tmp_path / "python3")
    for name, text in (("my_reward.py", "import words\n\ndef score(p, a):\n    return words.count(a)\n"),
                       ("words.py", "def count(x):\n    return len(x)\n")):
        pathlib.Path(name).write_text(text)
    assert {"my_reward.py: score", "words.py: count"} <= function_hashes("my_reward:score").keys()


def test_a_global_of_an_inner_function_is_one(folder):
    code = "x = 1\n\ndef f():\n    x = 2\n    def h():\n        global x\n        return x\n    return h() + x\n"
    (folder / "lora.py").write_text(code)
    assert "lora.py: x" in code_hashes(["lora.py: f"], folder)


def test_reward_functions_of_other_places(rewards, monkeypatch):
    ours = function_hashes("data.toy:gold")                 # by way of data/toy/__init__.py
    assert "data/toy/tasks.py: gold" in ours and any("lexicon" in name for name in ours)
    (rewards / "judge.py").write_text("from data.results.metrics import exact_match\nfrom data.runtime.files import atomic\n")
    assert function_hashes("judge:exact_match").keys() >= {"judge.py: module-level code", "data/results/metrics.py: exact_match"}
    monkeypatch.chdir(ROOT)
    assert "tests/test_code_hash.py: edit" in function_hashes("tests.test_code_hash:changed")
    assert "data/runtime/files.py: atomic" in function_hashes("data.runtime.files:atomic")
    monkeypatch.chdir(rewards)
    (rewards / "toys.py").write_text("from data.toy.tasks import gold\nfrom data.runtime.files import atomic\n\n"
                                     "def f():\n    return gold, atomic\n")
    assert {name for name in function_hashes("toys:f") if "gold" in name or "files" in name} == {"data/toy/tasks.py: gold"}
    assert function_hashes("no_such_module:f") == {"no_such_module:f": "no source"}
    assert {name.split(":")[0] for name in function_hashes("textwrap:dedent")} == {"textwrap.py"}
    (rewards / "broken.py").write_text("def f(:\n")
    with pytest.raises(UserError, match="broken.py is not valid Python"):
        function_hashes("broken:f")
    assert short_hash({"a": 1, "b": [2]}) == short_hash({"b": [2], "a": 1}) != short_hash({"a": 1, "b": [3]})


# --------------------------------------------------------------------------------------------- this repository

@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    folder = tmp_path_factory.mktemp("repository")
    for path in [*ROOT.glob("*.py"), *(ROOT / "data").rglob("*.py")]:
        (folder / path.relative_to(ROOT)).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / path.relative_to(ROOT))
    return folder


def rewritten(folder, name, change):
    """Write a file again from its syntax tree, every function changed by change(node)."""
    path = folder / name
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            change(node)
    path.write_text(ast.unparse(ast.fix_missing_locations(tree)))


def mark(node):
    node.body.insert(0, ast.parse("_edited = 1").body[0])


SUPERVISED = ["lora.py: LoRA", "lora.py: inject", "lora.py: save_adapter", "model.py: GPT", "model.py: token_logprobs",
              "data/results/evaluate.py"]


def test_our_own_edits_touch_what_they_should(repository, tmp_path):
    before = code_hashes(SUPERVISED, repository)
    assert {"lora.py: LoRA", "model.py: GPT", "model.py: Attention.forward", "data/results/metrics.py: exact_match"} < before.keys()
    shutil.copytree(repository, tmp_path / "copy")
    for name in ("ppo.py", "prompts.py", "train.py", "data/runtime/files.py", "data/results/tables.py"):
        rewritten(tmp_path / "copy", name, mark)
    assert code_hashes(SUPERVISED, tmp_path / "copy") == before
    rewritten(tmp_path / "copy", "model.py", lambda node: mark(node) if node.name == "token_logprobs" else None)
    assert changed(before, code_hashes(SUPERVISED, tmp_path / "copy")) == ["model.py: token_logprobs"]
    rewritten(tmp_path / "copy", "data/runtime/distributed.py", mark)
    assert any("distributed.py" in name for name in changed(before, code_hashes(SUPERVISED, tmp_path / "copy")))
    before = code_hashes(SUPERVISED, tmp_path / "copy")     # --layers upper: a word whose meaning is computed
    rewritten(tmp_path / "copy", "data/runtime/flags.py", lambda node: mark(node) if node.name == "parse_layers" else None)
    assert changed(before, code_hashes(SUPERVISED, tmp_path / "copy")) == ["data/runtime/flags.py: parse_layers"]


def test_our_own_files_written_anew_are_the_same(repository, tmp_path):
    shutil.copytree(repository, tmp_path / "copy")
    roots = [name for name in ("model.py", "lora.py", "prompts.py", "ppo.py", "train.py")]
    names = [str(path.relative_to(repository)) for path in repository.rglob("*.py")]
    for name in names:
        rewritten(tmp_path / "copy", name, lambda node: None)
    found = code_hashes(roots, repository)
    assert len(found) > 400 and found == code_hashes(roots, tmp_path / "copy")


def test_the_excluded_files_exist_and_hashing_is_fast():
    for name in EXCLUDED:
        assert (ROOT / name).exists() or name in ("data/download.py", "data/sources.py"), name
    roots = [name for name in ("model.py", "lora.py", "prompts.py", "ppo.py", "train.py")]
    seconds = []
    for _ in range(3):
        CACHE.clear()
        began = time.process_time()
        code_hashes(roots)
        seconds.append(time.process_time() - began)
    assert min(seconds) < 1, seconds                # 0.15 s when it was written; a busy machine is slower


def test_methods_of_one_source_tree_have_the_same_code():
    """Else tables would never compare two methods: no shared definition may depend on what else is reached."""
    import train
    hashes = {}
    for method in ("lora", "adalora", "p_tuning", "full"):
        hashes[method] = code_hashes(train.code_roots(train.parse(["--method", method])))
    for one in hashes.values():
        for other in hashes.values():
            assert not changed({name: value for name, value in one.items() if name in other}, other)
