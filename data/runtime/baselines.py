"""data/runtime/baselines.py: what a model does before training is measured once, by the first run of a sweep.

    FOLDER/.baselines/HASH.json     FOLDER holds the folders of the runs; HASH is of all that decides the
                                    numbers: code, data, base, what is measured and how, the machine

A run that finds the file takes the numbers from it, to the last bit. Whatever is edited has another hash, so
there is nothing to invalidate, and the folder can be deleted at any time. A file is written whole or not at
all: runs that start together, or are killed, measure for themselves. --fresh measures anew.

Public: remembered
"""
import contextlib

from data.runtime import distributed
from data.runtime.code_hash import hash_json
from data.runtime.files import DataError, WriteError, read_json, write_json
from data.runtime.progress import log_progress


def remembered(run, key, what, measure):
    """The dict that measure() gives, or gave another run of the same key beside this one.

    run      a Run; key: anything that JSON holds, with all that decides the numbers; None: they are not shared
    what     the words for people
    measure  () -> a dict that JSON holds; all processes call it together
    """
    if key is None:
        return measure()
    path = run.folder.parent / ".baselines" / f"{hash_json(key)}.json"

    def read():
        with contextlib.suppress(DataError):
            return None if run.fresh or not path.exists() else read_json(path)

    found = distributed.broadcast(read)
    if isinstance(found, dict):
        log_progress(f"{what} is known: {path}", distributed.dist_state.rank)
        return found
    found = measure()
    if distributed.dist_state.rank == 0:
        with contextlib.suppress(WriteError):               # this run does not need the file
            write_json(path, found)
    return found
