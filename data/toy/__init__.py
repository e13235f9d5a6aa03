"""data.toy: a small world in plain English and the tasks about it. See README.md in this folder.

`python -m data.toy --out DIR` writes everything as JSONL files.

Public: NAMES, SPLITS, SIZES, SIZE, TAU, rows, and gold, the gold reward of toy/prompts
"""
from data.toy.tasks import NAMES, SIZE, SIZES, SPLITS, TAU, gold, rows       # noqa: F401
