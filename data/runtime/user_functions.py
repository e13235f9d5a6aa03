r"""data/runtime/user_functions.py: --reward module:function, a function of the user's that scores answers.

    score = load_reward("reward", "my:score")
    score(["a prompt"], ["an answer"], [{"answer": "4"}])  ->  [0.5]

    def score(prompt, answer)           texts of a prompt and of the model's answer -> a finite number
    def score(prompt, answer, row)      also the row that the prompt is from, a dict of its own
    def score(prompts, answers)         lists of these -> a list, array or tensor of as many numbers
    def score(prompts, answers, rows)

Lists go to a function whose first parameter is called `prompts`, and to no other. The row goes to one whose
third positional parameter is called `row` or has no default; rows to one whose third is called `rows`. A
number is what float() takes and is no text: bool, Fraction, numpy scalar, array or tensor of one element.

A WORD names such a function as module:function; or as module:make(TEXT), where make("TEXT") returns it. TEXT
is everything up to the last parenthesis, unquoted. Several stand in one flag, separated by commas; the name
of an existing folder may hold commas itself.

Every error names the flag, the function, the prompt's and the answer's beginning, and what the function did,
an exception with its line in the user's file; a word that is written wrongly is answered with the right one.

Public: load_reward, split_words, is_function, target, no_such_reward, Reward
"""
import ast
import copy
import difflib
import importlib
import inspect
import math
import os
import re
import reprlib
import sys
import traceback
from typing import Callable, NamedTuple

from data.runtime.files import UserError, printable

EXPECTED = ("it must be a function of the texts of a prompt and an answer, and of their row if it has a "
            "third parameter, that returns a finite number")
EXPECTED_LIST = ("its first parameter is called prompts, so it gets lists of prompts and answers, and of "
                 "their rows if its third is called rows, and must return a list of as many finite numbers")
LARGEST = 3.4e38                                        # scores are fp32
FAILURES = (Exception, SystemExit)                      # a script without a main guard ends in sys.exit()
SWAPPED = (("answer", "prompt"), ("answers", "prompts"))
ATOM = re.compile(r"\\.|\[\^?\]?(?:\\.|[^\]\\])*\]|.", re.S)     # \x, [...], or one character


# ---- words -------------------------------------------------------------------------------------------------
def split_words(flag_name, text):
    r"""The words of a list such as "my:score,other:make(a{1,2}),out/run": at commas outside of parentheses.

    A parenthesis behind a backslash or in [...] does not count, as in a regular expression. Parts that
    together name an existing file or folder are one word. Raises UserError for an empty word and for an open
    parenthesis.
    """
    parts = []
    start = 0
    depth = 0
    for atom in ATOM.finditer(text):
        if atom[0] == "(":
            depth += 1
        elif atom[0] == ")":
            depth = max(depth - 1, 0)
        elif atom[0] == "," and depth == 0:
            parts.append(text[start:atom.start()])
            start = atom.end()
    parts.append(text[start:])
    if depth and is_function(parts[-1]):
        raise UserError(f"--{flag_name} {parts[-1]} has a parenthesis that is not closed; in a regular "
                        r"expression write a literal one as \( or [(]")
    words = [word.strip() for word in _join_paths(parts)]
    if "" in words:
        raise UserError(f"--{flag_name} {text} has nothing before or behind a comma; give functions or "
                        "folders as a:f,b:g")
    return words


def _join_paths(parts):
    """Neighbouring parts that together name a file or folder, joined; the longest such name counts."""
    words = []
    i = 0
    while i < len(parts):
        ends = [end for end in range(len(parts), i + 1, -1) if os.path.exists(",".join(parts[i:end]))]
        end = ends[0] if ends else i + 1
        words.append(",".join(parts[i:end]))
        i = end
    return words


def is_function(word):
    """Whether a word names a function: module:function, or module:make(TEXT). Other words name folders."""
    return ":" in word.partition("(")[0]


def target(word):
    """module:function of a word, without the text in parentheses."""
    return word.partition("(")[0] if is_function(word) else word


def no_such_reward(flag_name, word):
    """The sentence for a word of --reward that is neither a function nor a folder."""
    file = module_file(word)
    functions = public_functions(file)
    says = (f"--{flag_name} {word} is no folder; --{flag_name} takes a run of --task reward, or "
            "module:function")
    if functions:
        module = module_name(word)
        words = [f"{module}:{name}" for name in functions[:8]]
        return f"{says}; in {file} there is {', '.join(words)}"
    if file:
        return f"{says}; {file} is there and has no public function"
    return says


def module_name(word):
    """"rewards/mine.py" -> "rewards.mine": a module as Python imports it."""
    return os.path.normpath(word).removesuffix(".py").replace(os.sep, ".")


def module_file(word):
    """The file of a module in the working directory, also of one that is written as a file; else None."""
    path = module_name(word).replace(".", os.sep) + ".py"
    return path if os.path.isfile(path) else None


def public_functions(file):
    """The names of the functions that a file defines, without those that begin with _; [] if it cannot be
    read."""
    if file is None:
        return []
    try:
        with open(file, "rb") as f:
            tree = ast.parse(f.read())
    except (OSError, SyntaxError, ValueError):          # ValueError: NUL
        return []
    return [node.name for node in tree.body
            if isinstance(node, ast.FunctionDef) and not node.name.startswith("_")]


def right_spelling(word):
    """What a module:function that cannot be imported should be, or how one is written."""
    module, _, name = word.partition(":")
    file = module_file(module)
    if file is None:                                    # not here: where Python found it
        file = getattr(sys.modules.get(module), "__file__", None)
    known = public_functions(file)
    near = name if name in known else "".join(difflib.get_close_matches(name, known, 1))
    right = f"{module_name(module)}:{near}"
    return f"write {right}" if near and right != word else "write module:function"


# ---- functions ---------------------------------------------------------------------------------------------
class Reward(NamedTuple):
    """A function of the user's own and how it is called: Reward(...)(prompts, answers, rows) -> floats."""
    name: str                                           # the flag and its word, for errors
    function: Callable
    takes_lists: bool
    takes_rows: bool
    files: tuple = ()                                   # the user's, for the line of an exception

    def __call__(self, prompts, answers, rows):
        """Lists of texts and of dicts -> a list of floats. Raises UserError, see load_reward."""
        if self.takes_rows:                             # a function may change its row, for itself alone
            rows = [copy.deepcopy(row) for row in rows]
        if self.takes_lists:
            return self._call_with_lists(prompts, answers, rows)
        return [self._call(*each) for each in zip(prompts, answers, rows)]

    def _call(self, prompt, answer, row):
        try:
            value = self.function(prompt, answer, row) if self.takes_rows else self.function(prompt, answer)
        except FAILURES as e:
            raise UserError(f"{self.name} failed for {_begin(prompt, answer)} ({one_line(e)})"
                            f"{line_of(e, self.files)}; {EXPECTED}") from e
        return self._number(value, prompt, answer, EXPECTED)

    def _call_with_lists(self, prompts, answers, rows):
        if not prompts:
            return []
        arguments = (list(prompts), list(answers), rows)[:3 if self.takes_rows else 2]
        first = _begin(prompts[0], answers[0])
        try:
            values = self.function(*arguments)
        except FAILURES as e:
            raise UserError(f"{self.name} failed for {len(prompts)} answers, the first with {first} "
                            f"({one_line(e)}){line_of(e, self.files)}; {EXPECTED_LIST}") from e
        shape = getattr(values, "shape", None)
        if isinstance(shape, tuple) and len(shape) != 1:
            raise UserError(f"{self.name} returned a {type(values).__name__} of shape {tuple(shape)} for "
                            f"{len(prompts)} answers, the first with {first}; its shape must be "
                            f"({len(prompts)},), one number for each answer")
        found = _as_list(values)
        if found is None or len(found) != len(prompts):
            count = "" if found is None else f", a list of {len(found)},"
            raise UserError(f"{self.name} returned {shown(values)}{count} for {len(prompts)} answers, the "
                            f"first with {first}; {EXPECTED_LIST}")
        return [self._number(*each, EXPECTED_LIST) for each in zip(found, prompts, answers)]

    def _number(self, value, prompt, answer, expected):
        number = as_number(value)
        if number is None:
            if isinstance(value, list) and not self.takes_lists:
                expected += "; a function of lists calls its first parameter prompts"
            raise UserError(f"{self.name} returned {shown(value)} for {_begin(prompt, answer)}; {expected}")
        return number


def _begin(prompt, answer):
    return f"the prompt {prompt[:40]!r} and the answer {answer[:40]!r}"


def shown(value):
    """A value and its type, shortened, on one line."""
    return f"{printable(' '.join(reprlib.repr(value).split()))} ({type(value).__name__})"


def one_line(error):
    return f"{type(error).__name__}: {printable(' '.join(str(error).split()), 200)}"


def line_of(error, files):
    """" at line 3 of my.py": the last line in these files that an exception passed; "" if it passed none."""
    lines = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename in files]
    if not lines:
        return ""
    inside = lines[-1].filename.startswith(os.getcwd() + os.sep)
    file = os.path.relpath(lines[-1].filename) if inside else lines[-1].filename
    return f" at line {lines[-1].lineno} of {printable(file)}"


def files_of(word, function):
    """The files of a module:function: where it is named, and where it is defined."""
    files = [getattr(sys.modules.get(word.partition(":")[0]), "__file__", None)]
    try:
        files.append(inspect.getsourcefile(inspect.unwrap(function)))
    except (TypeError, ValueError):                     # it is an object, or wrapped around itself
        pass
    return tuple(file for file in files if file)


def as_number(value):
    """A value as a float; None if it is no number, not finite, or beyond fp32."""
    if value is None or isinstance(value, (str, bytes)):
        return None
    try:
        number = float(value.item() if hasattr(value, "item") else value)
    except Exception:                                   # an object of the user's own may raise anything
        return None
    return number if math.isfinite(number) and abs(number) <= LARGEST else None


def _as_list(values):
    """The elements of a list, tuple, array or tensor; None for anything else."""
    if hasattr(values, "tolist"):
        values = values.tolist()
    return list(values) if isinstance(values, (list, tuple)) else None


def load_reward(flag_name, word):
    """module:function or module:make(TEXT) -> a Reward.

    Raises UserError if it cannot be imported, made, or called with two texts, or two and a row; the Reward
    raises it for an answer on which the function fails or gives no finite number, and for a list of another
    length than its arguments.
    """
    name = f"--{flag_name} {word}"
    function = import_function(name, target(word))
    if target(word) != word:
        function = _made(name, function, word)
    if not callable(function):
        raise UserError(f"{name} is no function but a value of type {type(function).__name__}; {EXPECTED}")
    files = files_of(target(word), function)
    try:
        signature = inspect.signature(function)
    except ValueError:                                  # a function of a C module says nothing of itself
        return Reward(name, function, False, False, files)
    positional = [p for p in signature.parameters.values()
                  if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    third = positional[2] if len(positional) > 2 else None
    first_two = tuple(p.name for p in positional[:2])
    if first_two in SWAPPED:
        right = ", ".join(reversed(first_two))
        raise UserError(f"{name} calls its parameters {', '.join(first_two)}, and gets the prompt first and "
                        f"the answer second; write them as ({right})")
    takes_lists = bool(positional) and positional[0].name == "prompts"
    takes_rows = third is not None and (third.default is third.empty or third.name in ("row", "rows"))
    if takes_lists and takes_rows and third.name != "rows":
        raise UserError(f"{name} gets lists, because its first parameter is called prompts, and its third is "
                        f"called {third.name}; the third is the rows: call it rows")
    try:
        signature.bind(*("prompt", "answer", "row")[:3 if takes_rows else 2])
    except TypeError as e:
        raise UserError(f"{name} cannot be called with two texts, nor with two texts and a row ({e}); "
                        f"{EXPECTED}") from None
    return Reward(name, function, takes_lists, takes_rows, files)


def _made(name, make, word):
    """What make(TEXT) returns."""
    text = word.partition("(")[2]
    if not text.endswith(")"):
        raise UserError(f"{name} does not end with its closing parenthesis; write module:function(TEXT)")
    try:
        return make(text[:-1])
    except FAILURES as e:
        raise UserError(f"{name} cannot be made ({one_line(e)}); a function that is written with parentheses "
                        "takes the text in them and returns the function that scores") from e


def import_function(name, word):
    """What module:function names. Raises UserError if it cannot be imported."""
    module, _, attribute = word.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), attribute)
    except FAILURES as e:                               # whatever the module does while it is imported
        file = module_file(module)
        files = (os.path.abspath(file),) if file else ()
        raise UserError(f"{name} cannot be imported ({one_line(e)}){line_of(e, files)}; "
                        f"{right_spelling(word)}; {EXPECTED}") from e
