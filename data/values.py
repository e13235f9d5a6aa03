"""values.py: flags whose value is a small language: ranks by module, layers by range.

Public: numbers, ranges
"""
from data.files import UserError


def numbers(text):
    """"down=16,blocks.0.attn.q=2" -> {"down": 16, "blocks.0.attn.q": 2}"""
    try:
        return {name: int(n) for name, n in (part.split("=") for part in text.split(","))} if text else None
    except ValueError:
        raise UserError(f"--rank_map {text} cannot be read; write it as down=16,blocks.0.attn.q=2") from None


def ranges(text):
    """"0-3,5" -> [0, 1, 2, 3, 5]"""
    try:
        ends = [part.split("-") for part in text.split(",")] if text else []
        return [i for e in ends for i in range(int(e[0]), int(e[-1]) + 1)] or None
    except ValueError:
        raise UserError(f"--layers {text} cannot be read; write it as 0-3,5") from None
