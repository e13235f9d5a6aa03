"""data/runtime/identity.py: what identifies a run besides its flags, and what differs between two runs.

    identity = {"code": {definition: hash}, "data": hash, "base": hash,
                "reward": hash, {definition: hash} or None, "gold_reward": likewise,
                NAME: likewise, of another flag --NAME that a task lists in its record's `input_flags`}

config.json stores it as `code` (a short hash of all definitions), `code_hashes`, `data_sha256`,
`base_sha256`, `reward`, `gold_reward` and `inputs` (the others).

Public: Change, compare_identity, compare_flags, to_config, from_config, code_of, has_code, UNKNOWN_CODE
"""
import json
from typing import NamedTuple

from data.runtime.code_hash import changed, short_hash
from data.runtime.files import UserError
from data.runtime.flags import RENAMED, RENAMED_VALUES

KEYS = {"code": "code_hashes", "data": "data_sha256", "base": "base_sha256", "reward": "reward",
        "gold_reward": "gold_reward"}               # part: its key in config.json
LABELS = {"data": "--data", "base": "--init", "reward": "--reward", "gold_reward": "--gold_reward"}
UNKNOWN_CODE = "the code (unknown)"                 # of a run from before code was recorded


def to_config(identity):
    """An identity as config.json stores it; the long `code_hashes` last."""
    parts = {part: value for part, value in (identity or {}).items() if value is not None}
    found = {"code": short_hash(parts["code"])} if "code" in parts else {}
    others = {part: value for part, value in parts.items() if part not in KEYS}
    if others:
        found["inputs"] = others
    for part in sorted(KEYS, key=lambda part: part == "code"):
        if part in parts:
            found[KEYS[part]] = parts[part]
    return found


def from_config(config):
    """The identity that a config.json stores."""
    return {**{part: config[key] for part, key in KEYS.items() if key in config}, **config.get("inputs", {})}


def has_code(config):
    """Was the code recorded when this config.json was written?"""
    return KEYS["code"] in config


def code_of(config):
    """What result.json says of the code."""
    return {key: config[key] for key in ("code", "kept") if key in config}


class Change(NamedTuple):
    """What is different from the stored run: definitions of code, and inputs such as --data."""
    code: list
    inputs: list

    def __bool__(self):
        return bool(self.code or self.inputs)

    def __str__(self):
        names = [*self.code, *self.inputs]
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        return ", ".join(names[:3]) + more


def compare_identity(old, new):
    """The Change between two identities, each {part: hash, or {definition: hash}}."""
    code = []
    inputs = []
    for part in dict.fromkeys([*old, *new]):
        before, now = old.get(part), new.get(part)
        if isinstance(before, dict) and isinstance(now, dict):
            code += changed(before, now)
        elif before != now:
            inputs.append(LABELS.get(part, f"--{part}"))
    return Change(code, inputs)


def compare_flags(old, new, defaults):
    """The stored flags that no longer exist, but for those that were off, as that of a variant that was tried and
    taken out again. Raises UserError for the first flag that has another value.

    old   from config.json     new   of this command     defaults   {flag: value where `old` does not have it}
    """
    old = dict(old)
    new, defaults = json.loads(json.dumps([new, defaults]))         # tuples as JSON keeps them
    for name in [*old]:
        if name not in new and RENAMED.get(name) in new:
            old.setdefault(RENAMED[name], old.pop(name))
    for name, values in RENAMED_VALUES.items():
        if name in old:
            old[name] = values.get(old[name], old[name])
    for name in sorted(new, key=lambda name: name not in old):      # first the flags that both have
        before = old.get(name, defaults.get(name))
        if before != new[name]:
            raise UserError(f"holds a run with --{name} {before}; this command says --{name} {new[name]}. "
                            "Use another --out, or --fresh to start over")
    on = [name for name, value in old.items() if value is not None and value is not False]
    return [f"--{name} (gone)" for name in on if name not in new]
