"""Shared test set-up: the repository root on the path, one thread, and where the real data is.

Tests that need real data take the fixture `assets`; they are skipped, with the reason, when the folder is
missing (environment variable ASSETS; the README says what it holds).
"""
import contextlib
import os
import pathlib
import signal
import sys

with contextlib.suppress(ImportError):                  # not on Windows
    import readline                                     # noqa: F401   writes COLUMNS for the programs that follow
os.environ.setdefault("OMP_NUM_THREADS", "1")           # before torch: workers that spin get in the way
os.environ.pop("COLUMNS", None)                         # lines are as long as in a pipe
os.unsetenv("COLUMNS")                                  # also where Python has not seen it being set
ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import fork_server                                      # noqa: E402
import pytest                                           # noqa: E402
import torch                                            # noqa: E402

import kept_syntax                                      # noqa: E402

torch.set_num_threads(1)
kept_syntax.install()
# Under nohup, or in the background of a script, these are ignored, and so they would be in the programs of tests.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_configure(config):
    config.addinivalue_line("markers", "slow: a longer proof; run with `pytest -m slow`")


def pytest_collection_modifyitems(config, items):
    """`pytest -q` is the quick suite; `pytest -m slow` selects the rest."""
    if not config.option.markexpr:
        skip = pytest.mark.skip(reason="slow: run with -m slow")
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(skip)


@pytest.fixture(scope="session")
def python(tmp_path_factory):
    """A `python` for subprocess that has imported torch already: fork_server.py."""
    with fork_server.running(tmp_path_factory.mktemp("python")) as path:
        yield path


@pytest.fixture
def assets():
    folder = pathlib.Path(os.environ.get("ASSETS", ROOT.parent / "shared" / "assets"))
    if not folder.is_dir():
        pytest.skip(f"ASSETS: {folder} is missing, so this test on real data is skipped")
    return folder
