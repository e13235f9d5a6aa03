"""data/runtime/user_functions.py: --reward module:function, a function of the user's own that scores an answer.

    score = load_reward("reward", "my:score")           score("the prompt", "an answer", row) -> float

Every error names the flag, the function, and what it did.

Public: load_reward
"""
import contextlib
import importlib
import inspect
import math
import os
import reprlib
import sys

from data.runtime.files import UserError

EXPECTED = "it must be a function of the texts of a prompt and an answer that returns a finite number"


def load_reward(flag_name, word):
    """module:function -> a function of two texts and the row of the prompt that returns a float.

    The user's function gets the row if it takes a third argument.

    Raises UserError if it cannot be imported or called with two texts; the function that is returned raises it
    for an answer on which the user's function fails or gives no finite number.
    """
    name = f"--{flag_name} {word}"
    function = import_function(name, word)
    with_row = reads_row(function)

    def score(prompt, answer, row=None):
        try:
            value = function(prompt, answer, row) if with_row else function(prompt, answer)
        except Exception as e:
            raise UserError(f"{name} failed on the answer {answer[:40]!r} ({one_line(e)}); {EXPECTED}") from e
        with contextlib.suppress(TypeError, ValueError, RuntimeError, OverflowError):
            if not isinstance(value, (str, bytes)) and math.isfinite(value):
                return float(value)
        raise UserError(f"{name} returned {reprlib.repr(value)} ({type(value).__name__}) for the answer "
                        f"{answer[:40]!r}; {EXPECTED}")
    return score


def one_line(error):
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def import_function(name, word):
    """The function that module:function names. Raises UserError if it is none, or none of two arguments."""
    module, _, attribute = word.partition(":")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module), attribute)
    except Exception as e:                              # whatever the module does while it is imported
        raise UserError(f"{name} cannot be imported ({one_line(e)}); write module:function; {EXPECTED}") from e
    if not callable(function):
        raise UserError(f"{name} is no function but a value of type {type(function).__name__}; {EXPECTED}")
    try:
        inspect.signature(function).bind(*("prompt", "answer", "row")[:3 if reads_row(function) else 2])
    except TypeError as e:
        raise UserError(f"{name} cannot be called with two texts ({e}); {EXPECTED}") from None
    except ValueError:                                  # a function of a C module says nothing of itself
        pass
    return function


def reads_row(function):
    """Whether a function has a third parameter of its own."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError):
        return False
    return sum(p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters) > 2
