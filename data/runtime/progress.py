"""data/runtime/progress.py: say what takes longer than two seconds, and how far it is.

    with Progress("encoding train", len(rows)) as progress:
        for row in rows:
            ...
            progress.update()

A phase that ends within two seconds prints nothing. A longer one has a bar on a terminal; elsewhere it writes
a line every five seconds. Both go to stderr, from process 0. A phase may lie inside another: the innermost
one is shown, with the names of those around it that have no total. A thread prints, because a single piece
of work can be longer than two seconds.

Public: Progress, track, format_seconds
"""
import sys
import threading
import time

from tqdm import tqdm

from data.runtime.distributed import dist_state
from data.runtime.run_folder import log_progress

SILENT = 2.0                                        # seconds before a phase is shown
LINE_EVERY = 5.0
BAR_EVERY = 0.5
active = []                                         # the phases that have begun, the innermost last


class Progress:
    """A phase: what it is, and how much of `total` is done (total None: only the time is shown).

    done is where it begins: a run that is continued has steps already.
    """

    def __init__(self, what, total=None, done=0, unit="rows"):
        self.what = what
        self.total = total
        self.first = done
        self.done = done
        self.unit = unit
        self.note = ""
        self.bar = None
        self.thread = None
        self.ended = threading.Event()

    def start(self):
        self.began = time.time()
        active.append(self)
        if dist_state.rank == 0:
            self.thread = threading.Thread(target=self._show_until_ended, daemon=True)
            self.thread.start()
        return self

    def update(self, n=1, note=""):
        """n more are done; note: what else the line says, the loss for example."""
        self.done += n
        self.note = note

    def close(self):
        self.ended.set()
        if self.thread:
            self.thread.join()
        if self.bar is not None:
            self.bar.close()
        active.remove(self)

    def __enter__(self):
        return self.start()

    def __exit__(self, *error):
        self.close()

    def _show_until_ended(self):
        wait = SILENT
        while not self.ended.wait(wait):
            on_terminal = sys.stderr.isatty()
            wait = BAR_EVERY if on_terminal else LINE_EVERY
            if active[-1:] == [self]:
                if on_terminal:
                    self._refresh_bar()
                else:
                    log_progress(self._line())

    def _refresh_bar(self):
        if self.bar is None:
            only_time = dict(bar_format="{desc}: {elapsed}") if self.total is None else {}
            self.bar = tqdm(desc=self.what, total=self.total, initial=self.first, unit=self.unit,
                            leave=False, file=sys.stderr, delay=1e-9, **only_time)
            self.bar.start_t = self.began           # delay: nothing is shown before this
        self.bar.n = self.done
        self.bar.set_postfix_str(self.note, refresh=False)
        self.bar.refresh()

    def _line(self):
        around = [phase.what + ", " for phase in active if phase.total is None and phase is not self]
        seconds = time.time() - self.began
        parts = [f"{''.join(around)}{self.what}", format_seconds(seconds)]
        if self.total is not None:
            parts[0] += f" {self.done}/{self.total}"
            if self.done > self.first:
                left = seconds / (self.done - self.first) * (self.total - self.done)
                parts[1] += f", about {format_seconds(left)} left"
        if self.note:
            parts.insert(1, self.note)
        return "  ".join(parts)


def track(parts, what, unit="rows"):
    """Yield `parts`, lists of items, and show how many items are done."""
    with Progress(what, sum(map(len, parts)), unit=unit) as progress:
        for part in parts:
            yield part
            progress.update(len(part))


def format_seconds(seconds):
    """Two digits at least, in s, min or h."""
    unit, name = next(((n, name) for n, name in ((3600, "h"), (60, "min")) if seconds >= n), (1, "s"))
    amount = seconds / unit
    return f"{amount:.2g} {name}" if amount < 10 else f"{amount:,.0f} {name}"
