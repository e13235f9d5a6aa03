"""data/runtime/definitions.py: our source files as definitions, and the text of one that is hashed.

Source is parsed, never run or imported. Project finds the file of a module; Module splits a file into
definitions, imports and other statements; Digest reduces statements to the text that matters (no comments,
docstrings, format) and to the global names they use, by Python's scopes: a local variable hides a module's
name. Where a scope rule is not followed (class bodies, type parameters), a name counts as global: more is
hashed than needed, never less.

Public: Project, Module, Digest, class_members, assigned_names, dotted
"""
import ast
import os

from data.runtime.files import UserError

# In an excluded folder, but what they return is computed with: sums over processes, layers and ranks that words mean,
# scores of the user's functions.
INCLUDED = ("data/runtime/distributed.py", "data/runtime/flags.py", "data/runtime/user_functions.py")
FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef)
DEFINITIONS = (*FUNCTIONS, ast.ClassDef)
IMPORTS = (ast.Import, ast.ImportFrom)
COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)
INNER_SCOPES = (ast.Lambda, *COMPREHENSIONS)
MAIN_TESTS = ("__name__ == '__main__'", "'__main__' == __name__")


class Project:
    """Our source files by module name, of several folders; where two have it, of the first.

    excluded   paths below the last folder, the repository, that do not count
    only       the one file that counts, as (folder, path), or None
    """

    def __init__(self, folders, excluded, only=None):
        self.folders = [os.path.abspath(folder) for folder in folders]
        self.excluded = tuple(excluded)
        self.only = only
        self.locations = {}
        self.modules = {}

    def locate(self, name):
        """(folder, path below it) of a module's source; None for a module that is not ours."""
        if name not in self.locations:
            inner = name.replace(".", "/")
            labels = (inner + "/__init__.py", inner + ".py")
            found = ((folder, label) for folder in self.folders for label in labels
                     if os.path.isfile(os.path.join(folder, label)))
            self.locations[name] = next(found, None)
        return self.locations[name]

    def files(self):
        """The paths of all modules that were parsed."""
        locations = [self.locate(name) for name, module in self.modules.items() if module]
        return [os.path.join(folder, label) for folder, label in locations]

    def split(self, dotted):
        """(longest prefix that is one of our modules, the names behind it); (None, ...) if there is none."""
        for n in range(len(dotted), 0, -1):
            name = ".".join(dotted[:n])
            if self.locate(name):
                return name, dotted[n:]
        return None, dotted

    def counts(self, name):
        """Is this module of ours among those that count?"""
        folder, label = self.locate(name)
        if self.only:
            return (folder, label) == self.only
        if folder != self.folders[-1] or label in INCLUDED:
            return True
        return not label.startswith(self.excluded)

    def module(self, name):
        """The parsed module; None for one that does not count. Raises UserError."""
        if name not in self.modules:
            self.modules[name] = Module(name, *self.locate(name)) if self.counts(name) else None
        return self.modules[name]


def import_targets(node, package):
    """{name it binds: (module, attribute or None)} of an import statement; "*" for a star."""
    if isinstance(node, ast.Import):
        return {alias.asname or alias.name.split(".")[0]:
                (alias.name if alias.asname else alias.name.split(".")[0], None) for alias in node.names}
    above = package.split(".")[:len(package.split(".")) - node.level + 1] if node.level else []
    module = ".".join(filter(None, [*above, node.module]))
    return {alias.asname or alias.name: (module, alias.name) for alias in node.names}


def assigned_names(node):
    """The names a plain assignment binds; () for other statements and other targets."""
    if isinstance(node, ast.AnnAssign):
        targets = [node.target] if node.value else []
    else:
        targets = node.targets if isinstance(node, ast.Assign) else []
    names = []
    for target in targets:
        names += target.elts if isinstance(target, ast.Tuple) else [target]
    return [name.id for name in names] if all(isinstance(name, ast.Name) for name in names) else []


class Module:
    """One file: definitions {name: statements}, imports {name: targets}, the other statements."""

    def __init__(self, name, folder, label):
        self.name = name
        self.label = label
        self.package = name if label.endswith("__init__.py") else name.rpartition(".")[0]
        self.defs = {}
        self.imports = {}
        self.stars = []                             # modules that are imported with *
        self.statements = []
        self.loose = set()                          # names bound inside the other statements
        try:
            with open(os.path.join(folder, label), "rb") as f:
                tree = ast.parse(f.read())
        except (SyntaxError, ValueError) as e:
            raise UserError(f"{os.path.join(folder, label)} is not valid Python ({e})") from e
        for node in tree.body:
            self.add(node)

    def add(self, node):
        if isinstance(node, DEFINITIONS):
            self.defs.setdefault(node.name, []).append(node)
        elif isinstance(node, IMPORTS):
            self.add_import(node)
        elif names := assigned_names(node):
            for name in names:
                self.defs.setdefault(name, []).append(node)
        elif isinstance(node, ast.If) and ast.unparse(node.test) in MAIN_TESTS:
            for other in node.orelse:
                self.add(other)
        else:
            self.statements.append(node)
            for inner in ast.walk(node):
                if isinstance(inner, IMPORTS):
                    self.add_import(inner)
                elif isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store):
                    self.loose.add(inner.id)
                elif isinstance(inner, DEFINITIONS):
                    self.loose.add(inner.name)

    def add_import(self, node):
        for name, target in import_targets(node, self.package).items():
            if name == "*":
                self.stars.append(target[0])
            else:
                self.imports.setdefault(name, []).append(target)

    def binds(self, name):
        return name in self.defs or name in self.imports or name in self.loose


# -------------------------------------------------------------------------------------------- one definition

def dotted(node):
    """("a", "b", "c") of the expression a.b.c; None for any other."""
    names = []
    while isinstance(node, ast.Attribute):
        names.append(node.attr)
        node = node.value
    return (node.id, *reversed(names)) if isinstance(node, ast.Name) else None


def local_names(function, package):
    """({name: its import targets, [] for a plain variable} of the scope of a function or lambda, its globals)."""
    args = function.args
    plain = [*args.posonlyargs, *args.args, *args.kwonlyargs, *filter(None, (args.vararg, args.kwarg))]
    found = {arg.arg: [] for arg in plain}
    global_names = set()
    stack = list(function.body) if isinstance(function.body, list) else []
    while stack:
        node = stack.pop()
        kind = node.__class__
        if kind is ast.Name:
            if node.ctx.__class__ is not ast.Load:
                found.setdefault(node.id, [])
        elif kind in IMPORTS:
            for name, target in import_targets(node, package).items():
                found.setdefault(name, []).append(target)
        elif kind in DEFINITIONS:
            found.setdefault(node.name, [])
        elif kind is ast.Global:
            global_names.update(node.names)
        elif kind not in INNER_SCOPES:
            if kind is ast.ExceptHandler and node.name:
                found.setdefault(node.name, [])
            for field in getattr(node, "_fields", ()):
                value = getattr(node, field, None)
                if value.__class__ is list:
                    stack += value
                elif isinstance(value, ast.AST):
                    stack.append(value)
    return {name: targets for name, targets in found.items() if name not in global_names}, global_names


class Digest:
    """The text of statements without what does not matter, and the global names that they use.

    text      to be hashed. Written here rather than by ast.dump, whose form changes between Python versions
    chains    {("ppo", "gae"), ("whiten",), ...}: dotted names that begin with a global one
    targets   {((module, attribute), names behind it)}: the same for names that are imported inside a function
    """
    IGNORED = {"ctx", "type_comment", "kind"}

    def __init__(self, package, nodes=()):
        self.package = package
        self.text = []
        self.chains = set()
        self.targets = set()
        for node in nodes:
            self.visit(node, {})

    def visit(self, node, local):
        special = self.SPECIAL.get(node.__class__)
        if special:
            special(self, node, local)
        else:
            self.generic(node, local, local)

    def generic(self, node, local, inner):
        """Any node; its body, if it has one, sees the names `inner`."""
        text = self.text
        text.append(node.__class__.__name__)
        for field in node._fields:
            value = getattr(node, field, None)
            if value is None or field in self.IGNORED:
                continue
            scope = inner if field == "body" else local
            if isinstance(value, list):
                if not value:                       # newer Pythons have more fields
                    continue
                text.append(field + "[")
                for item in value:
                    if isinstance(item, ast.AST):
                        self.visit(item, scope)
                    else:
                        text.append(ascii(item))
                text.append("]")
            elif isinstance(value, ast.AST):
                text.append(field)
                self.visit(value, scope)
            else:
                text.append(ascii(value))

    def statement(self, node, local):
        if not isinstance(node.value, ast.Constant):        # a docstring, or a comment as a string
            self.generic(node, local, local)

    def nothing(self, node, local):
        pass

    def name(self, node, local):
        chain = dotted(node)
        if chain is None:
            self.generic(node, local, local)
            return
        self.text.append(".".join(chain))
        if chain[0] not in local:
            self.chains.add(chain)
        for target in local.get(chain[0], ()):
            self.targets.add((target, chain[1:]))

    def function(self, node, local):
        own, global_names = local_names(node, self.package)
        outer = {name: targets for name, targets in local.items() if name not in global_names}
        self.generic(node, local, {**outer, **own})

    def comprehension(self, node, local):
        bound = [name.id for part in node.generators for name in ast.walk(part.target)
                 if isinstance(name, ast.Name)]
        self.visit(node.generators[0].iter, local)          # the one part outside the comprehension's scope
        inner = {**local, **dict.fromkeys(bound, ())}
        self.generic(node, inner, inner)

    def call(self, node, local):
        words = [arg.value if isinstance(arg, ast.Constant) else None for arg in node.args]
        called = (dotted(node.func) or ("",))[-1]
        if called in ("import_module", "__import__") and words and isinstance(words[0], str):
            self.targets.add(((words[0], None), ()))
        self.generic(node, local, local)

    SPECIAL = {ast.Expr: statement, ast.Pass: nothing, ast.Name: name, ast.Attribute: name, ast.Call: call,
               **dict.fromkeys((*FUNCTIONS, ast.Lambda), function),
               **dict.fromkeys(COMPREHENSIONS, comprehension)}


def class_members(node):
    """({member: statements}, the other statements of a class body)."""
    members = {}
    others = []
    for part in node.body:
        names = [part.name] if isinstance(part, DEFINITIONS) else assigned_names(part)
        if isinstance(part, ast.AnnAssign) and not part.value and isinstance(part.target, ast.Name):
            names = [part.target.id]
        for name in names:
            members.setdefault(name, []).append(part)
        if not names:
            others.append(part)
    return members, others
