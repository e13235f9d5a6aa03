"""A process of the fork server ends, prints and is ended as a real one."""
import os
import signal
import subprocess
import sys
import time

import pytest

PROGRAMS = {"code 0": "print('x')", "a code": "raise SystemExit(65)", "a sentence": "raise SystemExit('no')",
            "killed": "import os; os.kill(os.getpid(), 9)", "terminated": "import os; os.kill(os.getpid(), 15)",
            "Ctrl-C": "raise KeyboardInterrupt", "an error": "1 / 0",
            "at the end": "import atexit; atexit.register(print, 'bye'); print('x')",
            "arguments": "import os, sys; print(__name__, sys.argv, os.getcwd(), os.environ['WORD'], sys.stdin.read())",
            "its own main": "import sys; print(sys.modules['__main__'].__dict__ is globals())"}


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_program_is_as_in_a_real_process(name, python, tmp_path):
    (tmp_path / "beside.py").write_text("")
    (tmp_path / "script.py").write_text("import beside\n" + PROGRAMS[name])
    for words in (["-c", PROGRAMS[name]], ["script.py"], ["-m", "script"]):
        ours, real = (subprocess.run([program, *words, "a", "-b"], cwd=tmp_path, input="in", text=True,
                                     capture_output=True, env={**os.environ, "WORD": "w"})
                      for program in (python, sys.executable))
        assert (ours.returncode, ours.stdout) == (real.returncode, real.stdout), words
        assert ours.stderr.splitlines()[-1:] == real.stderr.splitlines()[-1:], words


def sleeper(python):
    """(a process that waits, the id of what does its work)"""
    code = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
    process = subprocess.Popen([python, "-c", code], stdout=subprocess.PIPE, text=True)
    return process, int(process.stdout.readline())


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_signal_to_it_ends_its_work(number, python):
    process, worker = sleeper(python)
    process.send_signal(number)
    assert process.wait(timeout=60) == -number
    end = time.monotonic() + 60
    with pytest.raises(ProcessLookupError):
        while time.monotonic() < end:
            os.kill(worker, 0)
            time.sleep(0.01)
    process.stdout.close()
