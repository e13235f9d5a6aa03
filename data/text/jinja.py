r"""data/text/jinja.py: the part of Jinja that chat templates use, without the package.

    render(source, {name: value}) -> text

A template is text with {{ expressions }} and {% statements %}. It is translated into Python source, one
statement a line, and Python's parser (ast) reads it; then the tree is walked. Nothing is compiled or executed
as Python: only the kinds of nodes, methods, filters and tests that are listed here exist.

    Jinja                                            Python
    text   {{ x }}                                   "text"   x            statements that write
    {% if c %} {% elif d %} {% else %} {% endif %}   if c:   elif d:   else:
    {% for x in y %} {% endfor %}                    for x in y:
    {% set x = y %}                                  x = y
    x | trim                                         x @ trim             binds more tightly than +
    a ~ b                                            a + b

As in transformers, a newline behind a statement and blanks in front of one are dropped (trim_blocks,
lstrip_blocks), and {% generation %} is ignored. What is set inside a loop is forgotten after each pass. A
missing name, key or attribute is undefined. Deviation: strftime_now is
undefined, so that no rendering depends on the day; templates with a date have one for that case.

Macros, imports and filters that are not listed raise JinjaError; so does a template that runs for more than
MAX_STEPS statements or builds a text, list or number above MAX_TEXT.

Public: render, JinjaError
"""
import ast
import collections
import json
import operator
import re
import warnings

MAX_STEPS = 20_000                      # a conversation of four messages takes a few hundred
MAX_TEXT = 20_000
STRING = r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\""
TAG = re.compile(rf"(\{{%(?:{STRING}|[^'\"])*?%\}}|\{{\{{(?:{STRING}|[^'\"])*?\}}\}}|\{{#.*?#\}})", re.S)


class JinjaError(Exception):
    """A template that cannot be rendered here, or that refuses these messages."""


class Undefined:
    """The value of what is missing: false, empty, written as nothing."""

    def __len__(self):
        return 0

    def __iter__(self):
        return iter(())

    def __str__(self):
        return ""


UNDEFINED = Undefined()


def render(source, values):
    """The text that a template makes of {name: value}. Raises JinjaError."""
    try:
        with warnings.catch_warnings(action="ignore"):          # "\d" in a string is fine in Jinja
            tree = ast.parse(_python(source))
        walker = _Walker()
        walker.block(tree.body, collections.ChainMap({}, values))
    except JinjaError:
        raise
    except (SyntaxError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError,
            MemoryError) as e:
        raise JinjaError(f"{type(e).__name__}: {e}") from e
    return "".join(walker.out)


# ---- translation -------------------------------------------------------------------------------------------
def _python(source):
    """Template -> Python source."""
    lines = []
    depth = 0
    pieces = TAG.split(source.replace("\r\n", "\n").removesuffix("\n"))
    for i, piece in enumerate(pieces):
        if i % 2 == 0:
            text = _trimmed(piece, pieces[i - 1] if i else "", pieces[i + 1] if i + 1 < len(pieces) else "")
            if "{{" in text or "{%" in text:
                raise JinjaError(f"a tag is not closed: {text[:60]!r}")
            if text:
                lines.append(" " * depth + repr(text))
            continue
        if piece.startswith("{#"):
            continue
        code = piece[2:-2].strip("-+").strip()
        if not code:
            raise JinjaError(f"it holds {piece}")
        if piece.startswith("{{"):
            lines.append(" " * depth + f"({_expression(code)})")
            continue
        word, *rest = code.split(None, 1)
        rest = _expression("".join(rest))
        if word in ("if", "for"):
            lines.append(" " * depth + f"{word} {rest}:")
            depth += 1
            lines.append(" " * depth + "pass")
        elif word in ("elif", "else"):
            lines.append(" " * (depth - 1) + f"{word} {rest}:")
            lines.append(" " * depth + "pass")
        elif word in ("endif", "endfor") and depth:
            depth -= 1
        elif word == "set" and "=" in rest:
            lines.append(" " * depth + rest)
        elif word not in ("generation", "endgeneration"):
            raise JinjaError(f"it uses {{% {word} %}}")
    if depth:
        raise JinjaError("it lacks an endif or endfor")
    return "\n".join(lines)


def _trimmed(text, before, after):
    """Text between two tags, without the white space that the tags drop."""
    at_line_start = before == "" or "\n" in text
    if before.endswith(("-%}", "-}}", "-#}")):
        text = text.lstrip()
    elif before.endswith(("%}", "#}")):
        text = text.removeprefix("\n")
    if after[2:3] == "-":
        return text.rstrip()
    line = text.rpartition("\n")[2]
    if after[:2] in ("{%", "{#") and after[2:3] != "+" and at_line_start and not line.strip():
        return text.removesuffix(line) if line else text
    return text


def _expression(code):
    """An expression in Python's spelling; strings stay, on one line."""
    parts = re.split(f"({STRING})", code, flags=re.S)
    for i, part in enumerate(parts):
        if i % 2:
            parts[i] = part.replace("\n", r"\n")
        else:
            parts[i] = part.replace("|", "@").replace("~", "+").replace("\n", " ")
    return "".join(parts)


# ---- what exists -------------------------------------------------------------------------------------------
CONSTANTS = {"true": True, "false": False, "none": None, "True": True, "False": False, "None": None}
METHODS = {str: ("strip", "lstrip", "rstrip", "split", "startswith", "endswith", "replace", "upper", "lower"),
           dict: ("items", "get")}
TESTS = {"defined": lambda x: x is not UNDEFINED, "none": lambda x: x is None,
         "string": lambda x: isinstance(x, str), "mapping": lambda x: isinstance(x, dict),
         "iterable": lambda x: isinstance(x, (str, list, dict)), "true": lambda x: x is True,
         "sequence": lambda x: isinstance(x, (str, list, dict)), "false": lambda x: x is False}
FILTERS = {"trim": lambda x: str(x).strip(), "length": len, "upper": str.upper, "lower": str.lower,
           "string": str, "list": list, "first": lambda x: x[0], "last": lambda x: x[-1],
           "items": lambda x: x.items(), "join": lambda x, by="": by.join(map(str, x)),
           "default": lambda x, y="", empty=False: y if x is UNDEFINED or empty and not x else x,
           "tojson": lambda x, indent=None: json.dumps(x, ensure_ascii=False, indent=indent)}
OPERATORS = {ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt, ast.LtE: operator.le,
             ast.Gt: operator.gt, ast.GtE: operator.ge, ast.In: lambda x, y: x in y,
             ast.NotIn: lambda x, y: x not in y, ast.Add: operator.add, ast.Sub: operator.sub,
             ast.Mod: operator.mod}


class Namespace(dict):
    """namespace(x=1): what a loop may set for those after it."""


def _raise(message):
    raise JinjaError(message)


FUNCTIONS = {"raise_exception": _raise, "namespace": Namespace, "range": range}


def _checked(value):
    """A value of bounded size."""
    size = len(value) if isinstance(value, (str, list, range)) else value if type(value) is int else 0
    if abs(size) > MAX_TEXT:
        raise JinjaError(f"it builds a text, list or number above {MAX_TEXT}")
    return value


# ---- evaluation --------------------------------------------------------------------------------------------
class _Walker:
    """Walks the statements of a translated template; out: the texts that it writes."""

    def __init__(self):
        self.out = []
        self.steps = 0

    def block(self, statements, scope):
        for statement in statements:
            self.steps += 1
            if self.steps > MAX_STEPS:
                raise JinjaError(f"it runs for more than {MAX_STEPS} steps")
            self.statement(statement, scope)

    def statement(self, node, scope):
        match node:
            case ast.Expr():
                self.out.append(str(self.value(node.value, scope)))
            case ast.If():
                self.block(node.body if self.value(node.test, scope) else node.orelse, scope)
            case ast.For():
                self.loop(node, scope)
            case ast.Assign(targets=[ast.Name(name)]):
                scope[name] = self.value(node.value, scope)
            case ast.Assign(targets=[ast.Attribute(owner, name)]):
                space = self.value(owner, scope)
                if not isinstance(space, Namespace):
                    raise JinjaError(f"it sets {name} of something that is no namespace")
                space[name] = self.value(node.value, scope)
            case ast.Pass():
                pass
            case _:
                raise JinjaError(f"it uses {ast.unparse(node)[:60]}")

    def loop(self, node, scope):
        items = list(self.value(node.iter, scope))
        several = isinstance(node.target, ast.Tuple)
        names = node.target.elts if several else [node.target]
        for i, item in enumerate(items):
            loop = {"index": i + 1, "index0": i, "first": i == 0, "last": i + 1 == len(items),
                    "length": len(items)}
            for step, name in ((-1, "previtem"), (1, "nextitem")):
                loop[name] = items[i + step] if 0 <= i + step < len(items) else UNDEFINED
            parts = zip(names, item if several else [item], strict=True)
            self.block(node.body, scope.new_child({"loop": loop, **{name.id: part for name, part in parts}}))

    def value(self, node, scope):
        """The value of an expression."""
        def go(inner):
            return self.value(inner, scope)

        match node:
            case ast.Constant(value):
                return value
            case ast.Name(name):
                return CONSTANTS[name] if name in CONSTANTS else scope.get(name, UNDEFINED)
            case ast.List(elements) | ast.Tuple(elements):
                return [go(element) for element in elements]
            case ast.Dict(keys, values):
                return {go(key): go(value) for key, value in zip(keys, values)}
            case ast.BoolOp(op, values):
                stop = isinstance(op, ast.Or)
                for inner in values:
                    result = go(inner)
                    if bool(result) == stop:
                        break
                return result
            case ast.UnaryOp(ast.Not(), inner):
                return not go(inner)
            case ast.UnaryOp(ast.USub(), ast.Constant(int(number))):
                return -number
            case ast.IfExp(test, yes, no):
                return go(yes) if go(test) else go(no)
            case ast.Compare(left, [ast.Is() | ast.IsNot() as operation], [ast.Name(test)]) if test in TESTS:
                return TESTS[test](go(left)) == isinstance(operation, ast.Is)
            case ast.Compare(left, [operation], [right]):
                return self.binary(go(left), operation, go(right))
            case ast.BinOp(left, ast.MatMult(), right):
                return self.filter(go(left), right, scope)
            case ast.BinOp(left, operation, right):
                return self.binary(go(left), operation, go(right))
            case ast.Attribute(owner, name):
                return self.item(go(owner), name)
            case ast.Subscript(owner, ast.Slice(lower, upper, step)):
                ends = [go(end) if end else None for end in (lower, upper, step)]
                return go(owner)[slice(*ends)]
            case ast.Subscript(owner, key):
                return self.item(go(owner), go(key))
            case ast.Call(ast.Attribute(owner, name)):
                return self.method(go(owner), name, node, scope)
            case ast.Call(ast.Name(name)) if name in FUNCTIONS:
                return self.call(FUNCTIONS[name], [], node, scope)
        raise JinjaError(f"it uses {ast.unparse(node)[:60]}")

    def item(self, owner, key):
        if owner is UNDEFINED or owner is None:
            raise JinjaError(f"it reads {key} of something undefined")
        try:
            return owner[key]
        except (LookupError, TypeError):
            return UNDEFINED

    def binary(self, left, operation, right):
        if type(operation) not in OPERATORS or isinstance(operation, ast.Mod) and isinstance(left, str):
            raise JinjaError(f"it uses the operator {type(operation).__name__}")
        if isinstance(operation, ast.Add) and isinstance(left, str) != isinstance(right, str):      # of a ~
            return _checked(str(left) + str(right))
        return _checked(OPERATORS[type(operation)](left, right))

    def filter(self, value, right, scope):
        name = right.func if isinstance(right, ast.Call) else right
        if not isinstance(name, ast.Name) or name.id not in FILTERS:
            raise JinjaError(f"it uses the filter {ast.unparse(name)}")
        return self.call(FILTERS[name.id], [value], right, scope)

    def method(self, owner, name, node, scope):
        if name not in METHODS.get(dict if isinstance(owner, dict) else type(owner), ()):
            raise JinjaError(f"it calls {name}")
        return self.call(getattr(owner, name), [], node, scope)

    def call(self, function, values, node, scope):
        """function(values, and the arguments in the call node, if it is one)."""
        named = {}
        if isinstance(node, ast.Call):
            values = values + [self.value(argument, scope) for argument in node.args]
            named = {keyword.arg: self.value(keyword.value, scope) for keyword in node.keywords}
        return _checked(function(*values, **named))
