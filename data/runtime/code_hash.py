"""data/runtime/code_hash.py: which definitions a run executes, and a hash of each.

    code_hashes(["train.py: run_supervised", 'train.py: TASKS["sft"]', 'lora.py: VARIANTS["LoRA"]'])
        -> {"lora.py: LoRA.forward": "ab12...", "train.py: run_supervised": "90ff...", ...}

A definition is a function (nested ones included), a class header (bases, decorators), a method, a class
attribute or a module-level value. Its hash ignores comments, docstrings, formatting and position. What a run
executes is what its roots reach in a static call graph, through

    a name        of the same module, an imported one (also inside a function), an attribute of a module
    a class       to all of its methods and attributes, and to its bases
    a module      used as a value, as in getattr(module, name), to everything in it
    the rest      module-level statements that are no definition (`if`, `try`, `x += 1`, `C.f = g`) are one
                  entry, "m.py: module-level code", reached with anything of the module; the body of
                  `if __name__ == "__main__":` does not count

Records.  A module-level dict, or a tuple or list of records, has one hash per named element: 'm.py:
TASKS["sft"]'. The name is a dict's key, the first string argument or name= of a call of our own class
(Task("sft", ...)), the `name` attribute of a class, or the class's own name. As soon as one element is a
root, the others are not followed: 'm.py: TASKS["sft"]' selects one, 'm.py: TASKS[]' none. A collection
without a selection is followed as a whole. Elements without names (plain constants, functions in a tuple) are
part of the value that holds them.

Added definitions, class members and named elements are no change: `changed` names only what was changed or
removed. Some act without being called by a new name, and count as a change of the class: a member that
overrides an inherited one, or a special method. Flags (`x: int = flag(...)`) are left out: their values are
compared as flags. Where the graph is unsure, it includes. It cannot see __subclasses__(), names that are
computed while the program runs, or a member that was added for a getattr to find.

Public: code_hashes, function_hashes, changed, hash_json, short_hash, EXCLUDED
"""
import ast
import builtins
import contextlib
import gc
import hashlib
import json
import os
import pathlib
import re
import sys
import sysconfig

from data.runtime.definitions import FUNCTIONS, Digest, Project, assigned_names, class_members, dotted

ROOT = pathlib.Path(__file__).resolve().parent.parent.parent
EXCLUDED = {                                        # folder/ or file: why an edit there changes no result
    "tests/": "no run executes them",
    "data/runtime/": "the process around a run: files, devices, messages; see INCLUDED",
    "data/results/tables.py": "reads results, computes none",
    "data/results/runs.py": "reads results, computes none",
    "data/results/compare.py": "reads results, computes none",
    "data/results/plots.py": "reads results, computes none",
    "data/results/log_plots.py": "reads results, computes none",
    "data/results/report.py": "prints results, computes none",
    "data/results/next_token.py": "--task show: prints, stores no result",
    "data/results/conversation.py": "--task chat: prints, stores no result",
    "data/results/cost_model.py": "--dry_run and --task check: estimates",
    "data/results/large_models.py": "prints estimates",
    "data/results/inspect_data.py": "--task check: looks at data",
    "data/toy/": "makes data, and the rows themselves are hashed",
    "data/fetch.py": "brings files, and their content is hashed"}
PRODUCT = ("data/", "model.py", "lora.py", "prompts.py", "ppo.py", "train.py")
MODULE_CODE = "module-level code"
CACHE = {}  # {arguments of code_hashes: (contents of its files, hashes)}
COLLECTIONS = (ast.Tuple, ast.List, ast.Set, ast.Dict)


def code_hashes(roots, folder=ROOT, excluded=EXCLUDED):
    """{definition: hash} of everything that `roots` reach below `folder`, sorted by name.

    roots   "file.py: name", 'file.py: NAME["element"]', 'file.py: NAME[]', or "file.py" for all of a file.
    The order of a class's annotated fields has an entry of its own: a list of names.
    Raises ValueError for a root that does not exist, UserError for a file that is no Python.
    """
    key = (tuple(roots), str(folder), tuple(excluded))
    if key not in CACHE or CACHE[key][0] != contents(CACHE[key][0]):
        project = Project([folder], excluded)
        with collector_off():
            hashes = Graph(project).hashes(roots)
        CACHE[key] = contents(project.files()), hashes
    return dict(CACHE[key][1])


def contents(paths):
    """{path: hash of the file, None if it cannot be read}"""
    found = {}
    for path in paths:
        found[path] = None
        with contextlib.suppress(OSError), open(path, "rb") as f:
            found[path] = hashlib.sha256(f.read()).digest()
    return found


def function_hashes(word, folder=ROOT):
    """{definition: hash} of "module:function": its whole file, and what that reaches beside it or in our
    files; of files of the user's own also what acts while they are imported: all that carries a decorator, and
    the files that they import in turn.

    The module is searched for as Python would, from the working directory on, but not imported. An installed
    package (site-packages, the standard library) counts with the one file; a module without source gives
    {word: "no source"}. Data of the toy world counts here: it may be what the function computes with.
    Raises UserError for a file that is no Python.
    """
    name, _, function = word.partition(":")
    for beside in dict.fromkeys(os.path.abspath(path) for path in [os.getcwd(), *sys.path]):
        found = Project([beside], ()).locate(name)
        if found:
            installed = is_installed(beside)
            excluded = [path for path in EXCLUDED
                        if path not in ("tests/", "data/toy/") and not found[1].startswith(path)]
            project = Project([beside], (), only=found) if installed else Project([beside, folder], excluded)
            graph = Graph(project, imported=True)
            module = project.module(name)
            graph.reach(module, None)
            graph.reach_all(graph.follow(module, (function,)))      # imported from another file, perhaps
            return graph.finish()
    return {word: "no source"}


def is_installed(folder):
    """Whether a folder of sys.path is one of packages, or the standard library."""
    standard = {sysconfig.get_paths()[name] for name in ("stdlib", "platstdlib")}
    return pathlib.Path(folder).name in ("site-packages", "dist-packages") or folder in standard


@contextlib.contextmanager
def collector_off():
    """Syntax trees are many small objects; the garbage collector would take a third of the time."""
    was = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was:
            gc.enable()


def changed(old, new):
    """The names of definitions in `old` that are different in `new`, or missing; added ones do not count."""
    def same(a, b):
        if isinstance(a, list) and isinstance(b, list):  # the order of fields; added ones may be between
            rest = iter(b)
            return all(name in rest for name in a if name in b)
        return a == b
    return [name for name, value in old.items() if name not in new or not same(value, new[name])]


def hash_json(value):
    """A hash of anything that JSON can hold: rows of data, say."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def short_hash(value, digits=8):
    """The first hexadecimal digits of `hash_json`."""
    return hash_json(value)[:digits]


# ------------------------------------------------------------------------------------------------- call graph

def is_flag(node):
    """A field `x: int = flag(...)`: its value is one of a run's flags, which are compared as such."""
    value = getattr(node, "value", None)
    return isinstance(node, ast.AnnAssign) and isinstance(value, ast.Call) and list(dotted(value.func)
                                                                                    or ()) == ["flag"]


class Graph:
    """What roots reach. reached: {(module, name)}; name None is all of a module. imported: with the other
    statements of a module of the user's own comes what acts on its import, decorated definitions and the modules
    that it imports."""

    def __init__(self, project, imported=False):
        self.project = project
        self.imported = imported
        self.reached = set()
        self.queue = []
        self.selected = {}                          # {(module, name of a collection): keys of its elements}
        self.digests = {}                           # {entry: (module, Digest)}
        self.classes = []                           # [(entry, module, ClassDef)]
        self.orders = {}                            # {entry: names of annotated fields}

    def hashes(self, roots):
        starts = [self.parse_root(root) for root in roots]     # all selections, before anything is followed
        for module, name in starts:
            self.reach(module, name)
            self.reach_all(self.follow(module, (name,)) if name else ())    # which the file may import
        return self.finish()

    def finish(self):
        """Follow everything, then {entry: hash}."""
        while self.queue:
            module, name = self.queue.pop()
            if name is None:
                for inner in module.defs:
                    self.reach(module, inner)
            else:
                self.expand(module, name)
        for entry, module, node in self.classes:
            self.digests[entry][1].text += ["overrides", *sorted(self.overriding(module, node))]
        found = {entry: self.hash(*pair) for entry, pair in self.digests.items()}
        return dict(sorted({**found, **self.orders}.items()))

    def hash(self, module, digest):
        """Of the text and of what its global names mean: another import, or a new function that hides a
        builtin,
        is a change."""
        meaning = []
        for name in sorted({chain[0] for chain in digest.chains}):
            if name in module.defs:
                meaning.append(f"{name} here")
            stars = [] if module.binds(name) else [(star, "*") for star in module.stars]
            targets = map(self.meaning, [*module.imports.get(name, ()), *stars])
            meaning += [f"{name} {target}" for target in sorted(targets) if target]
        return hashlib.sha256("\n".join([*digest.text, "names", *meaning]).encode()).hexdigest()[:12]

    def meaning(self, target):
        """An import target as text; "" for a file that does not count. A file of the user's own says so: one that
        is new takes the name over from a package, or from an `except ImportError`."""
        words = (*target[0].split("."), *filter(None, target[1:]))
        name, _ = self.project.split(words)
        if name is None:
            return ".".join(words)
        if not self.project.counts(name):
            return ""
        own = self.imported and not self.project.locate(name)[1].startswith(PRODUCT)
        return ".".join(words) + (" in a file" if own else "")

    # ---- roots
    def parse_root(self, root):
        label, _, rest = root.partition(": ")
        name = label.removesuffix(".py").replace("/", ".").removesuffix(".__init__")
        module = self.project.module(name) if self.project.locate(name) else None
        match = re.fullmatch(r'(\w+)(?:\.[\w.]+)?(\["?([^"\]]*)"?\])?', rest)
        if module is None or rest and (not match or not module.binds(match[1])):
            raise ValueError(f"{root} names no definition whose code is hashed")
        if not rest:
            return module, None
        if match[2]:
            self.selected.setdefault((module, match[1]), set()).update(filter(None, [match[3]]))
        return module, match[1]

    def reach(self, module, name):
        if (module, name) in self.reached:
            return
        self.reached.add((module, name))
        self.queue.append((module, name))
        if name is None:
            self.reach(module, MODULE_CODE)
        elif name != MODULE_CODE:
            self.reach(module, MODULE_CODE)
            parent = module.name
            while parent := parent.rpartition(".")[0]:          # importing a module runs its packages' files
                if self.project.locate(parent) and self.project.module(parent):
                    self.reach(self.project.module(parent), MODULE_CODE)

    def reach_all(self, targets):
        for module, name in targets:
            self.reach(module, name)

    # ---- edges
    def follow(self, module, chain, seen=()):
        """The (module, name) pairs that a dotted name means; nothing for builtins and other packages."""
        name = chain[0]
        if (module, name) in seen:                  # two modules that import it from each other
            return
        seen = (*seen, (module, name))
        if name in module.defs:
            yield module, name
        for target in module.imports.get(name, ()):
            yield from self.follow_target(target, chain[1:], seen)
        if not module.binds(name):
            for star in module.stars:
                if self.project.locate(star) and self.project.module(star):
                    yield from self.follow(self.project.module(star), chain, seen)
            if name == "globals":
                yield module, None

    def follow_target(self, target, behind, seen=()):
        words = (*target[0].split("."), *filter(None, target[1:]), *behind)
        name, rest = self.project.split(words)
        module = self.project.module(name) if name else None
        if module is None:
            return
        if not rest:
            yield module, None
        elif module.binds(rest[0]) or module.stars:
            yield from self.follow(module, rest, seen)
            yield module, MODULE_CODE
        else:                                       # __getattr__, or set from outside
            yield module, None

    def follow_digest(self, module, digest):
        for chain in digest.chains:
            self.reach_all(self.follow(module, chain))
        for target, behind in digest.targets:
            self.reach_all(self.follow_target(target, behind))

    # ---- definitions
    def expand(self, module, name):
        if name == MODULE_CODE:
            self.record(module, name, module.statements)
            if self.imported and not module.label.startswith(PRODUCT):
                self.reach_all(self.acting_on_import(module))
            return
        plain = []
        for node in module.defs.get(name, ()):
            if isinstance(node, ast.ClassDef):
                self.expand_class(module, name, node)
            elif not self.expand_collection(module, name, node):
                plain.append(node)
        if plain:
            self.record(module, name, plain)

    def acting_on_import(self, module):
        for name, nodes in module.defs.items():
            if any(getattr(node, "decorator_list", ()) for node in nodes):
                yield module, name
        for target in (*sum(module.imports.values(), []), *((star, None) for star in module.stars)):
            name, _ = self.project.split((*target[0].split("."), *filter(None, target[1:])))
            other = self.project.module(name) if name else None
            if other and not other.label.startswith(PRODUCT):
                yield other, MODULE_CODE

    def record(self, module, name, nodes):
        """Digest statements under one entry, and follow them. A name that is defined twice has one entry."""
        entry = f"{module.label}: {name}"
        digest = Digest(module.package, nodes)
        if entry in self.digests:
            before = self.digests[entry][1]
            digest.text = before.text + digest.text
            digest.chains |= before.chains
            digest.targets |= before.targets
        self.digests[entry] = module, digest
        self.follow_digest(module, digest)

    def expand_class(self, module, name, node):
        members, others = class_members(node)
        self.record(module, name, [*node.decorator_list, *node.bases, *node.keywords, *others])
        self.classes.append((f"{module.label}: {name}", module, node))
        for member, parts in members.items():
            for part in parts:
                if is_flag(part):
                    continue
                if isinstance(part, ast.ClassDef):
                    self.expand_class(module, f"{name}.{member}", part)
                else:
                    self.record(module, f"{name}.{member}", [part])
        fields = [part.target.id for part in node.body
                  if isinstance(part, ast.AnnAssign) and isinstance(part.target,
                                                                    ast.Name) and not is_flag(part)]
        if len(fields) > 1:
            self.orders[f"{module.label}: {name} (order of fields)"] = fields

    def overriding(self, module, node):
        """The members of a class that have an effect without being called by a new name."""
        return [name for name in class_members(node)[0] if name.startswith("__")
                or any(self.has_member(module, base, name) for base in node.bases)]

    def has_member(self, module, base, name):
        """Does this base class, or a base of it, have a member of this name? True where it is unknown."""
        base = base.value if isinstance(base, ast.Subscript) else base          # Generic[T]
        chain = dotted(base)
        ours = [(m, n) for m, n in self.follow(module, chain) if n in m.defs] if chain else []
        for owner, known in ours:
            for node in owner.defs[known]:
                if not isinstance(node, ast.ClassDef) or name in class_members(node)[0]:
                    return True
                if any(self.has_member(owner, above, name) for above in node.bases):
                    return True
        if ours:
            return False
        value = self.loaded(module, chain) if chain else None
        return value is None or hasattr(value, name)

    def loaded(self, module, chain):
        """Another package's object, if its module is loaded already: nothing is imported for this."""
        for target in module.imports.get(chain[0], ()):
            words = (*target[0].split("."), *filter(None, target[1:]), *chain[1:])
            for n in range(len(words), 0, -1):
                value = sys.modules.get(".".join(words[:n]))
                if value is not None:
                    for word in words[n:]:
                        value = getattr(value, word, None)
                    return value
        return getattr(builtins, chain[0], None)

    # ---- records
    def expand_collection(self, module, name, node):
        """A dict, or a sequence of records, element by element; False for any other statement."""
        if not isinstance(node, (ast.Assign, ast.AnnAssign)) or not isinstance(node.value, COLLECTIONS):
            return False
        elements = self.elements(module, node.value)
        if elements is None or assigned_names(node) != [name]:
            return False
        selected_keys = self.selected.get((module, name))
        known = {key for keys, _ in elements for key in keys}
        everything = selected_keys is None or not selected_keys <= known  # an unknown one came in another way
        unnamed = [part for keys, part in elements if not keys]
        self.record(module, name, unnamed)
        self.digests[f"{module.label}: {name}"][1].text.append(node.value.__class__.__name__)
        for keys, part in elements:
            if keys and (everything or selected_keys & set(keys)):
                self.record(module, f'{name}["{keys[0]}"]', part if isinstance(part, list) else [part])
        return True

    def elements(self, module, value):
        """[(names of the element, its expression)]; None for a sequence that has elements without names."""
        if isinstance(value, ast.Dict):
            found = []
            for key, part in zip(value.keys, value.values):
                if isinstance(key, ast.Constant):
                    found.append(((str(key.value),), [key, part]))
                elif key is None:                   # {**other}
                    found.append(((), part))
                else:
                    keys = self.keys_of(module, part)
                    found.append((keys, [key, part]) if keys else ((), ast.Tuple([key, part], ast.Load())))
            return found
        found = [((), part) if isinstance(part, ast.Starred) else (self.keys_of(module, part), part)
                 for part in value.elts]
        named = all(keys or isinstance(part, ast.Starred) for keys, part in found)
        return found if named and found else None

    def keys_of(self, module, part, depth=0):
        """The names of a record, the one to show first; () for anything else.

        A record is a class, a call of our own class, a call with name="...", or a variable that holds one of
        them.
        """
        if isinstance(part, ast.Call):
            return self.keys_of_call(module, part)
        chain = dotted(part)
        for owner, name in self.follow(module, chain) if chain and depth < 8 else ():
            for node in owner.defs.get(name, ()):
                if isinstance(node, ast.ClassDef):
                    named = [getattr(p, "value", None) for p in class_members(node)[0].get("name", ())]
                    return (*[value.value for value in named if isinstance(value, ast.Constant)], name)
                if isinstance(node, (ast.Assign, ast.AnnAssign)):
                    keys = self.keys_of(owner, node.value, depth + 1)
                    if keys:
                        return (*keys, name)
        return ()

    def keys_of_call(self, module, call):
        """The constant string of name=, or the first argument if it is a class of ours that is called."""
        chain = dotted(call.func)
        called = [node for owner, name in (self.follow(module, chain) if chain else ())
                  for node in owner.defs.get(name, ())]
        words = [keyword.value for keyword in call.keywords if keyword.arg == "name"]
        if any(not isinstance(node, FUNCTIONS) for node in called):         # a class, or a namedtuple
            words += call.args[:1]
        constants = [word.value for word in words if isinstance(word, ast.Constant)]
        return tuple(word for word in constants if isinstance(word, str))
