"""data/results/resources.py: what runs took and left: steps, bytes on disk, numbers, memory, speed.

Public: RESOURCES, resource_of, resource_columns, format_size
"""
from data.results.layout import Column
from data.results.metrics import summary
from data.results.runs import MISSING, metric_values


def format_size(n):
    """Bytes -> "3.7 MB"; two digits at least from 1 kB on."""
    for unit in ("B", "kB", "MB", "GB"):
        if n < 999.5 or unit == "GB":
            decimals = 1 if n < 10 and unit != "B" else 0
            return f"{n:.{decimals}f} {unit}"
        n /= 1000


# {title of the column: (keys in result.json, of which a run has one; function that formats the number)},
# the least important last
RESOURCES = {"steps": (("steps",), "{:,.0f}".format),
             "stored": (("adapter_bytes", "model_bytes"), format_size),
             "trainable": (("params_trainable",), "{:,.0f}".format),
             "memory": (("peak_memory_mb",), "{:.0f} MB".format),
             "tokens/s": (("tokens_per_second",), "{:,.0f}".format)}


def resource_of(title, runs):
    """The mean over runs of a number of RESOURCES; None if no run has it."""
    values = sum((metric_values(runs, name) for name in RESOURCES[title][0]), [])
    return summary(values)[0] if values else None


def resource_columns(rows, without=()):
    """A Column for each of RESOURCES that some run has, but those named in `without`. rows: lists of runs."""
    columns = []
    for number, (title, (_, text)) in enumerate(RESOURCES.items()):
        values = [resource_of(title, runs) for runs in rows]
        if title not in without and any(value is not None for value in values):
            columns.append(Column(title, [MISSING if value is None else text(value) for value in values],
                                  4 + number))
    return columns
