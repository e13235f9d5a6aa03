"""data.toy: a small world in plain English, and the tasks about it; `python -m data.toy --out DIR` writes them.

Public: NAMES, SPLITS, SIZES, SIZE, rows, and gold, the gold reward of toy/prompts
"""
from data.toy.tasks import NAMES, SIZE, SIZES, SPLITS, TAU, gold, rows       # noqa: F401
