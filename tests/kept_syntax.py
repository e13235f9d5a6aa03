"""kept_syntax.py: source files are parsed once for all runs of a test session.

Every run hashes the code that it executes (data/runtime/code_hash.py): half a second, of which nine tenths are
parsing files and reducing definitions to text. Both are functions of a file's content, so here they are kept:
hundreds of runs in one process pay for them once. What is reached and hashed is worked out for every run.

Public: install
"""
import copy
import os

from data.runtime import code_hash, definitions

MODULES = {}                            # {(name, folder, file): (its content, Module)}
DIGESTS = {}                            # {(package, ids of statements): (the statements, their Digest)}
Module, Digest = definitions.Module, definitions.Digest


def kept_module(name, folder, label):
    with open(os.path.join(folder, label), "rb") as f:
        content = f.read()
    key = (name, folder, label)
    if key not in MODULES or MODULES[key][0] != content:
        MODULES[key] = content, Module(name, folder, label)
    return MODULES[key][1]


def kept_digest(package, nodes=()):
    key = (package, *map(id, nodes))
    if key not in DIGESTS:
        DIGESTS[key] = nodes, Digest(package, nodes)    # an id belongs to its statement as long as that is kept
    found = copy.copy(DIGESTS[key][1])
    for name in ("text", "chains", "targets"):          # the graph adds to them
        setattr(found, name, copy.copy(getattr(found, name)))
    return found


def install():
    definitions.Module = kept_module
    code_hash.Digest = kept_digest
