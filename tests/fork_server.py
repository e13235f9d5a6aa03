"""fork_server.py: a `python` that starts in milliseconds, for tests of real processes.

    with running(folder) as python: subprocess.run([python, "train.py", "--help"])

A new process of a training run spends three seconds on importing torch. Here a server imports it once, and each
command is a fork of the server: a process of its own, with the working directory, environment, arguments and
standard files of the one who calls, that imports the code of this repository, or of a copy, itself.

    caller -- runs --> python (the client) -- socket: command, 3 open files --> server -- fork --> the command
                          ^------------------------ how it ended ----------------'

The client passes signals on and ends as the command has ended; if it is killed, the command is killed. Scripts,
-c and -m are understood; with other options of Python the client becomes a real one.
Not as in a new process: the hash seed and the process group are the server's, torch is there before the first line
of the script.

Public: running
"""
import array
import atexit
import contextlib
import gc
import io
import json
import os
import pathlib
import random
import runpy
import selectors
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types

CLIENT = """#!{python} -IS
import array, json, os, signal, socket, sys

words = sys.argv[1:]
if not words or words[0].startswith("-") and words[0] not in ("-c", "-m", "-u"):       # torchrun says -u SCRIPT
    os.execv({python!r}, [{python!r}, *words])
server = socket.socket(socket.AF_UNIX)
server.connect({address!r})
command = json.dumps([words, os.getcwd(), dict(os.environ)]).encode()
files = array.array("i", [0, 1, 2])
server.sendmsg([b"%12d" % len(command)], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, files)])
server.sendall(command)
for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
    if signal.getsignal(number) != signal.SIG_IGN:
        signal.signal(number, lambda number, frame: server.sendall(bytes([number])))
for descriptor in (0, 1, 2):
    os.close(descriptor)
code = int(server.recv(12) or 1)
if code < 0:
    if -code != signal.SIGKILL:
        signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""


@contextlib.contextmanager
def running(folder):
    """The path of a `python` in this folder; the server behind it ends with the block, or with this process."""
    folder = pathlib.Path(folder)
    address = str(folder / "socket")
    client = folder / "python"
    client.write_text(CLIENT.format(python=sys.executable, address=address))
    client.chmod(0o755)
    server = subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE,
                              stdout=subprocess.PIPE, start_new_session=True)
    try:
        assert server.stdout.readline() == b"ready\n", "the fork server did not start"
        yield str(client)
    finally:
        server.stdin.close()
        server.wait(timeout=60)
        server.stdout.close()


# ------------------------------------------------------------------------------------------------- the server

def receive(connection):
    """([argv, cwd, environment], [stdin, stdout, stderr]) that a client sends."""
    head, parts, _, _ = connection.recvmsg(12, socket.CMSG_SPACE(3 * array.array("i").itemsize))
    files = array.array("i")
    files.frombytes(parts[0][2])
    text = b""
    while len(text) < int(head):
        text += connection.recv(1 << 16)
    return json.loads(text), list(files)


def serve(address):
    """Until stdin is closed."""
    clients = {}                                        # {pid of a command: connection of its client}
    woken, wakes = os.pipe()
    for descriptor in (woken, wakes):
        os.set_blocking(descriptor, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wakes, warn_on_full_buffer=False)
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    selector = selectors.DefaultSelector()
    for source in (0, woken, listener):
        selector.register(source, selectors.EVENT_READ)
    os.write(1, b"ready\n")
    while True:
        for key, _ in selector.select():
            if key.fd == 0:
                for pid in clients:
                    os.kill(pid, signal.SIGKILL)
                return
            if key.fd == woken:
                os.read(woken, 1 << 10)
                reap(clients, selector)
            elif key.fileobj is listener:
                connection, _ = listener.accept()
                command, files = receive(connection)
                pid = os.fork()
                if not pid:
                    open_here = [listener, selector, connection, *clients.values()]
                    become(command, files, [woken, wakes, *(one.fileno() for one in open_here)])
                for descriptor in files:
                    os.close(descriptor)
                clients[pid] = connection
                selector.register(connection, selectors.EVENT_READ, pid)
            elif key.data in clients:
                numbers = key.fileobj.recv(16)
                for number in numbers or [signal.SIGKILL]:      # the client is gone
                    os.kill(key.data, number)
                if not numbers:
                    selector.unregister(key.fileobj)


def reap(clients, selector):
    """Tell the clients of the commands that have ended how they ended."""
    while clients:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if not pid:
            return
        connection = clients.pop(pid)
        with contextlib.suppress(OSError):              # the client is gone
            connection.sendall(b"%12d" % os.waitstatus_to_exitcode(status))
        with contextlib.suppress(KeyError):
            selector.unregister(connection)
        connection.close()


# ----------------------------------------------------------------------------------------------- the command

def become(command, files, foreign):
    """All of a command's life."""
    argv, cwd, environment = command
    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    for number, descriptor in enumerate(files):
        os.dup2(descriptor, number)
    for descriptor in (*files, *foreign):
        os.close(descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(environment)
    random.seed()
    sys.stdin = sys.__stdin__ = open(0, closefd=False)
    sys.stdout = sys.__stdout__ = io.TextIOWrapper(open(1, "wb", closefd=False), line_buffering=os.isatty(1))
    sys.stderr = sys.__stderr__ = io.TextIOWrapper(open(2, "wb", closefd=False), errors="backslashreplace",
                                                   line_buffering=True)
    code = exit_code(lambda: execute(argv))
    threading._shutdown()
    atexit._run_exitfuncs()
    if not sys.stdout.closed:
        code = exit_code(sys.stdout.flush) or code
    sys.stderr.flush()
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(code)


def execute(argv):
    """python ARGV"""
    if argv[0] == "-u":
        sys.stdout.reconfigure(write_through=True)
        argv = argv[1:]
    first = {"-c": "", "-m": os.getcwd()}.get(argv[0], os.path.dirname(os.path.abspath(argv[0])))
    more = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.path[:] = [first, *more, *LIBRARIES]
    if argv[0] == "-m":
        sys.argv[:] = argv[1:]
        runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        return
    sys.argv[:] = ["-c", *argv[2:]] if argv[0] == "-c" else argv
    source = argv[1] if argv[0] == "-c" else pathlib.Path(argv[0]).read_bytes()
    main = sys.modules["__main__"] = types.ModuleType("__main__")
    if argv[0] != "-c":
        main.__file__ = argv[0]
    exec(compile(source, "<string>" if argv[0] == "-c" else argv[0], "exec"), main.__dict__)


def exit_code(action):
    """How a process that does this ends; -2: by SIGINT."""
    try:
        action()
    except SystemExit as e:
        if isinstance(e.code, str):
            print(e.code, file=sys.stderr)
        return e.code if isinstance(e.code, int) else int(e.code is not None)
    except BaseException as e:
        traceback.print_exc()
        return -signal.SIGINT if isinstance(e, KeyboardInterrupt) else 1
    return 0


if __name__ == "__main__":
    LIBRARIES = sys.path[1:]
    import torch._dynamo                                # noqa: F401   the first step of an optimiser imports it
    import torch.distributed.run                        # noqa: F401
    import numpy                                        # noqa: F401
    import tiktoken                                     # noqa: F401
    import tqdm                                         # noqa: F401
    gc.collect()
    gc.freeze()                                         # a fork shares what no collection touches
    serve(sys.argv[1])
