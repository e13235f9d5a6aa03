"""tests/odd_rewards.py: functions that a user might give as --reward, most of them broken."""
import math
import sys


def deep(prompt, answer):
    return deep(prompt, answer)


def none(prompt, answer):
    pass


def one(prompt):
    return 1.0


def three(prompt, answer, reference):
    return 1.0


def four(prompt, answer, row, other):
    return 1.0


def changes(prompt, answer, row):
    row.clear()
    return 1.0


def lists(prompts, answers):
    return [len(answer) for answer in answers]


def too_few(prompts, answers, rows):
    return [1.0]


def no_list(prompts, answers):
    return {answer: 1.0 for answer in answers}


def holes(prompts, answers):
    return [None for _ in answers]


def columns(prompts, answers, answer):
    return [1.0 for _ in answers]


def text(prompt, answer):
    return "good"


def nan(prompt, answer):
    return math.nan


def infinite(prompt, answer):
    return -math.inf


def huge(prompt, answer):
    return 10 ** 400


def many(prompt, answer):
    return [1.0, 2.0]


def truth(prompt, answer):
    return len(answer) % 2 == 0


def raises(prompt, answer):
    raise RuntimeError("line one\nline two \x1b[31m" + 1000 * "x")


def bare(prompt, answer):
    raise Exception


def leaves(prompt, answer):
    sys.exit(3)


def prints(prompt, answer):
    print("x" * 10000)
    return 1.0


def several(prompt, answer):
    raise ExceptionGroup("several", [ValueError("a")])


def length(prompt, answer):
    return float(len(answer))


class Score:
    def __init__(self, prompt, answer):
        pass


number = 3.0
