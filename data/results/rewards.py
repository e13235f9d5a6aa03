r"""data/results/rewards.py: rewards that a program checks, for --reward data.results.rewards:NAME.

    exact_match    1 if the answer equals the row's, or one of its "references" (metrics.exact_match)
    last_number    1 if the answer's number equals the row's. Of both texts it is the first number behind
                   "####" (GSM8K's convention, Cobbe et al. 2021, arXiv 2110.14168), else the last number
    matches(RE)    1 if all of the answer fits a regular expression, with . for any character, line ends too

Numbers are compared exactly: 1,234.50 = $1234.5 = 2469/2 = 1234 1/2 = \frac{2469}{2} = 1.2345e3 = 1234.5 %.
A percent or currency sign is a unit, and adds nothing. A - behind a letter, a digit or a parenthesis is no
sign: 5-3 ends with 3. Digits are ASCII; a number of more than 100 digits is none.

The pattern stands with its function, --reward 'data.results.rewards:matches(<a>.*</a>)', and not in a flag of
its own: two patterns can then be two rewards, and no flag is without effect.

All are functions of texts and of the row, a dict whose "answer" is the right one; a row without it, or
without a number in it, is a ValueError, because every answer would score 0.

Public: exact_match, last_number, matches, number
"""
import re
from fractions import Fraction

from data.results import metrics

LATEX_FRACTION = re.compile(r"""
    (?P<whole>\d)? \s* \\[dt]?frac \s* \{\s*(?P<top>\d+)\s*\} \s* \{\s*(?P<divisor>\d+)\s*\}
    """, re.ASCII | re.VERBOSE)
NUMBER = re.compile(r"""
    (?:(?<![\w)]) (?P<sign>[-+\u2212]))? [$\u20ac\u00a3]?           # -5, -$5; a currency
    (?:(?<=[$\u20ac\u00a3]) (?P<sign_behind>[-+\u2212]))?           # $-5
    (?P<whole>\d{1,3}(?:,\d{3})+(?!\d) | \d+ | (?=\.\d))          # 1,234 or 1234, or nothing: .5
    (?P<decimals>\.\d+)?
    (?:[eE] (?P<exponent>[-+]?\d{1,2}) (?!\d))?
    (?:(?:[ ](?P<top>\d+))? / (?P<divisor>0*[1-9]\d*) (?!\d|\.\d))?    # /2, or the 1/2 of 3 1/2
    """, re.ASCII | re.VERBOSE)
MOST_DIGITS = 100                                       # int() has a limit, and time


def exact_match(prompt, answer, row):
    """1.0 if the answer equals the right one, or one of several, white space normalised; else 0.0."""
    references = row.get("references") or [_right_answer(row)]
    return float(metrics.exact_match(answer, references))


def last_number(prompt, answer, row):
    """1.0 if the number of the answer equals that of the right one; else 0.0."""
    expected = number(_right_answer(row))
    if expected is None:
        raise ValueError(f'the row\'s "answer" {_right_answer(row)[:40]!r} has no number')
    return float(number(answer) == expected)


def matches(pattern):
    """A regular expression -> a reward that is 1.0 where all of an answer fits it. Raises re.error."""
    expression = re.compile(pattern, re.DOTALL)

    def reward(prompt, answer):
        return float(expression.fullmatch(answer) is not None)
    return reward


def number(text):
    """The number that a text gives as its answer, a Fraction; None without one."""
    text = LATEX_FRACTION.sub(_plain_fraction, text)
    _, mark, behind = text.partition("####")
    found = list(NUMBER.finditer(behind if mark else text))
    if not found:
        return None
    return _value(found[0] if mark else found[-1])


def _plain_fraction(match):
    """3\\frac{1}{2} as 3 1/2."""
    whole = match["whole"] + " " if match["whole"] else ""
    return f"{whole}{match['top']}/{match['divisor']}"


def _value(match):
    """A match of NUMBER as a Fraction; None if it is too long."""
    whole = match["whole"].replace(",", "")
    decimals = (match["decimals"] or ".")[1:]
    top = match["top"]
    divisor = match["divisor"] or "1"
    if max(len(whole + decimals), len(top or ""), len(divisor)) > MOST_DIGITS:
        return None
    value = Fraction(int(whole + decimals), 10 ** len(decimals))
    value *= Fraction(10) ** int(match["exponent"] or 0)
    value = value / int(divisor) if top is None else value + Fraction(int(top), int(divisor))
    negative = (match["sign"] or match["sign_behind"]) in ("-", "\u2212")
    return -value if negative else value


def _right_answer(row):
    """The text of a row's "answer"; a number of JSON as it is written. Raises ValueError without one."""
    answer = row.get("answer")
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise ValueError(f'the row has no "answer", a text or a number, but the keys {", ".join(row)}')
    return str(answer)
