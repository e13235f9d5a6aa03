"""ranks.py: commands, one after the other, in each process of a torchrun: ranks.py JOBS.json [MODULE ...].

JOBS.json holds lists of argv. Modules beside it are imported first: to break something in one process, say.
Beside it go pid0, pid1, ..., and codes0, codes1, ...: the exit codes of the commands.
"""
import importlib
import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import train                                            # noqa: E402
from data.runtime import distributed                            # noqa: E402

if __name__ == "__main__":
    jobs, rank = pathlib.Path(sys.argv[1]), os.environ["RANK"]
    sys.path.insert(0, str(jobs.parent))
    for name in sys.argv[2:]:
        importlib.import_module(name)
    (jobs.parent / f"pid{rank}").write_text(str(os.getpid()))
    codes = [train.main(argv) for argv in json.loads(jobs.read_text())]
    (jobs.parent / f"codes{rank}").write_text(json.dumps(codes))
    distributed.end()
