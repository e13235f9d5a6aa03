"""data/runtime/records.py: records that a flag chooses by name, and groups of flags whose defaults they set.

A record is a frozen dataclass instance in a tuple, such as ppo.ALGORITHMS. Its class says which flag names it
(selected_by); the instance has

    name        the value of that flag
    defaults    {flag: value}: where it differs from the defaults of the fields
    own_flags   flags that only this record reads, or those that list them too
    unused      other flags that it does not read

Public: find_record, unused_flags, RecordConfig, check_types
"""
import dataclasses
import difflib
import numbers

from data.runtime.files import UserError
from data.runtime.flags import check_ranges, fields_of, unknown_choice


def find_record(records, name):
    """The record of this name. Raises UserError, with a suggestion."""
    for record in records:
        if record.name == name:
            return record
    raise UserError(unknown_choice("--" + records[0].selected_by, str(name), [r.name for r in records]))


def unused_flags(record, records):
    """The flags that a record does not read: those it lists as unused, and those that belong to others."""
    unused = list(record.unused)
    for other in records:
        unused += [name for name in other.own_flags if name not in record.own_flags]
    return tuple(dict.fromkeys(unused))


class RecordConfig:
    """A group of flags of which one chooses a record, for a dataclass(frozen=True, init=False).

    Config(algo="grpo", steps=100): fields that are not given take the record's defaults, then their own. A
    subclass defines the static method records(), the tuple, and check_values(cfg, record) for its exclusions.
    Raises UserError for an unknown record or field, a value of another type or out of range, and a flag that
    the record does not read.
    """

    def __init__(self, **given):
        fields = fields_of([type(self)])
        for name in given:
            if name not in fields:
                near = difflib.get_close_matches(name, fields, 1)
                hint = f"did you mean {near[0]}?" if near else f"it has {' '.join(fields)}"
                raise UserError(f"{type(self).__name__} has no field {name}; {hint}")
        selector = self.records()[0].selected_by
        record = find_record(self.records(), given.get(selector, fields[selector].default))
        for name, field in fields.items():
            value = given.get(name, record.defaults.get(name, field.default))
            object.__setattr__(self, name, value)
        check_types(type(self).__name__, dataclasses.asdict(self), fields)
        check_ranges(dataclasses.asdict(self), fields)
        check_choices(dataclasses.asdict(self), fields)
        self.check(self)

    @classmethod
    def from_flags(cls, cfg):
        """A config of a command's flags, an object with attributes; flags it does not read are left out."""
        unused = unused_flags(cls.record_of(cfg), cls.records())
        names = [name for name in fields_of([cls]) if name not in unused and hasattr(cfg, name)]
        return cls(**{name: getattr(cfg, name) for name in names})

    @classmethod
    def record_of(cls, cfg):
        """The record that cfg, an object with attributes, chooses."""
        records = cls.records()
        return find_record(records, getattr(cfg, records[0].selected_by))

    @classmethod
    def check(cls, cfg):
        """Raises UserError for a flag that was given but is not read, and for values that exclude each other.

        cfg: an object with the fields as attributes. cfg.given, if there, are the names on a command line;
        without it a value that differs from the default counts as given.
        """
        record = cls.record_of(cfg)
        for name in unused_flags(record, cls.records()):
            if cls.is_given(cfg, name):
                raise UserError(f"--{name} means nothing to --{record.selected_by} {record.name}; "
                                "leave one of them out")
        cls.check_values(cfg, record)

    @classmethod
    def is_given(cls, cfg, name):
        """Was this flag given? cfg: as check takes it."""
        given = getattr(cfg, "given", None)
        if given is not None:
            return name in given
        return getattr(cfg, name) != cls.record_of(cfg).defaults.get(name, fields_of([cls])[name].default)


ACCEPTED = {bool: ((bool,), "True or False"), int: ((numbers.Integral,), "a whole number"),
            float: ((numbers.Real,), "a number"), str: ((str,), "a string")}


def check_types(owner, values, fields):
    """Raises UserError for a value that is not of the type its field declares. A float takes an int, neither
    takes a bool; None is accepted where the flag reads a word as None: a type of its own."""
    for name, field in fields.items():
        value = values[name]
        types, words = ACCEPTED[field.type]
        own_type = field.metadata["type"] is not field.type
        if value is None and own_type:
            continue
        if not isinstance(value, types) or isinstance(value, bool) and field.type is not bool:
            raise UserError(f"{owner} takes {words}{' or None' if own_type else ''} as {name}, not {value!r}")


def check_choices(values, fields):
    """Raises UserError for a word that is none of its field's choices."""
    for name, field in fields.items():
        choices = field.metadata["choices"]
        known = choices() if callable(choices) else choices
        if known and values[name] not in known:
            raise UserError(unknown_choice(f"--{name}", str(values[name]), known))
