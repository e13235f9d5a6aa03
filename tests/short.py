"""short.py: a command of train.py with tiny lengths, in the run folder of the real one: short.py FLAGS.

Pages have commands that take minutes. test_readme.py runs them through this file, from a copy of the repository.
"""
import sys

sys.path.insert(0, ".")                                 # the copy, which is the working directory

import train                                            # noqa: E402
from data.toy import tasks                              # noqa: E402

SHORT = dict(steps=2, batch=4, eval_items=4, max_new_tokens=4, minibatches=1, num_generations=2, save_every=100)
ROWS = (200, 60, 60)                                    # of train, valid and test, for every data set of the toy world
FOLDERS = {}                                            # {flags of the short command: folder of the real one}
parse, default_out = train.parse, train.default_out


def key(cfg):
    return repr(sorted(cfg.to_dict().items()))


def short_parse(argv):
    cfg = parse(argv)
    greedy = cfg.get("num_generations") == 1            # --task eval samples only where a command asks for it
    short = cfg.replace(**{name: value for name, value in SHORT.items()
                           if name in cfg and not (greedy and name == "num_generations")})
    if cfg.task == "sample":                            # only answers that end are written as rows
        short = short.replace(max_new_tokens=cfg.max_new_tokens, eval_items=40)
    if "out" in cfg and "seed" in cfg:
        FOLDERS[key(short.replace(out=None))] = default_out(cfg)
    return short


def short_default_out(cfg):
    return FOLDERS.get(key(cfg.replace(out=None))) or default_out(cfg)


if __name__ == "__main__":
    train.parse = short_parse
    train.default_out = short_default_out
    tasks.SIZE, tasks.SIZES = ROWS, {}
    train.run_and_exit()
