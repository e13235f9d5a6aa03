"""values.py: flags whose value is a small language: ranks by module, layers by range.

Public: numbers, ranges
"""
import re

from data.files import UserError


def numbers(text):
    """"down=16,blocks.0.attn.q=2" -> {"down": 16, "blocks.0.attn.q": 2}"""
    try:
        return {name: int(n) for name, n in (part.split("=") for part in text.split(","))} if text else None
    except ValueError:
        raise UserError(f"--rank_map {text} cannot be read; write it as down=16,blocks.0.attn.q=2") from None


def ranges(text):
    """"0-3,5" -> [0, 1, 2, 3, 5]; None, as nobody says it, stays None"""
    if text is None:
        return None
    found = []
    for part in text.split(","):
        if not (ends := re.fullmatch(r"(\d+)(?:-(\d+))?", part)) or int(ends[2] or ends[1]) < int(ends[1]):
            raise UserError(f"--layers {text} cannot be read; write it as 0-3,5, each range upwards")
        found += range(int(ends[1]), int(ends[2] or ends[1]) + 1)
    return found
