"""ranks.py: several commands, one after the other, in every process of a torchrun: ranks.py FILE of argv lists."""
import json
import os
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import train                                            # noqa: E402
from data import distributed                            # noqa: E402

if __name__ == "__main__":
    commands = json.loads(pathlib.Path(sys.argv[1]).read_text())
    sys.path[:0] = sys.argv[2:]                         # where functions that are rewards are
    codes = [train.main(argv) for argv in commands]
    print(os.environ["RANK"], codes)
    distributed.end()
    sys.exit(max(codes))
