"""data.toy: a small world in plain English and the tasks about it. See README.md in this folder.

`python -m data.toy --out DIR` writes everything as JSONL files.

Public: NAMES, SPLITS, SIZES, SIZE, TAU, RL, rows, gold, the gold reward of toy/prompts, and right, the reward
of toy/sums
"""
from data.toy.sums import right                                              # noqa: F401
from data.toy.tasks import NAMES, RL, SIZE, SIZES, SPLITS, TAU, gold, rows   # noqa: F401
