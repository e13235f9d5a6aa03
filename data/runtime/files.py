"""data/runtime/files.py: files that are either whole or not there.

Writing.  Bytes go to a temporary file .NAME.PID.tmp in the same folder, are flushed and fsynced, and only
then renamed over the target; the folder is fsynced last.  Whatever stops us (full disk, Ctrl-C), the old file
is intact. A writer holds a lock on its temporary file, which ends with its process: a temporary file that
nobody has locked, of a process that is gone, is from a killed writer, and the next writer of the same file
deletes it.

Public: UserError, DataError, WriteError, cannot_write, atomic, atomic_folder, write_atomic,
remove_abandoned, try_lock, read_json, write_json, unique_keys, printable, check_path
"""
import collections
import contextlib
import errno
import glob
import json
import os
import pathlib
import re
import shutil

try:
    import fcntl                                    # locks that die with their process; absent on Windows
except ImportError:
    fcntl = None


class UserError(ValueError):
    """A mistake of the user, in one sentence; the command prints it, no traceback, and exits with `code`."""
    code = 2

    def __str__(self):
        """On one line, without control characters; of a very long message the middle is cut."""
        text = super().__str__()
        text = text if len(text) <= 900 else f"{text[:600]} ... {text[-300:]}"
        return printable(text, len(text))


class DataError(UserError):
    """Bad or missing data, model or adapter files."""
    code = 65


class WriteError(UserError):
    """A file or folder that cannot be written: a full disk, no permission."""
    code = 74


def cannot_write(path, error):
    """The WriteError for an OSError. Only where space is missing does it ask for some."""
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    remedy = "; free some space and give the same command again" if full else ""
    return WriteError(f"{path} cannot be written ({error.strerror or error}){remedy}")


def try_lock(file):
    """Lock a file or folder, an object with fileno() or a descriptor. False if another process has locked it."""
    if not fcntl:
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


def temporary(path):
    """Where a file or folder is written before it gets its name: beside it, so that a rename is one step."""
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def is_another(pid):
    """Whether there is such a process on this machine, besides this one."""
    if pid == os.getpid():                              # in a container every run may have the same number
        return False
    try:
        os.kill(pid, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:                                     # there is one, of another user
        return True
    return True


def remove_abandoned(folder, name="*"):
    """Delete what killed writers of folder/name (a glob pattern) have left."""
    for path in glob.glob(os.path.join(glob.escape(folder), f".{name}.*.tmp")):
        writer = re.search(r"\.(\d+)\.tmp$", path)
        if writer and not is_another(int(writer[1])):       # which may not have locked its file yet
            with contextlib.suppress(OSError), opened_path(path) as descriptor:
                if try_lock(descriptor):
                    shutil.rmtree(path) if os.path.isdir(path) else os.unlink(path)


@contextlib.contextmanager
def opened_path(path, flags=os.O_RDONLY):
    """The descriptor of a file or folder."""
    descriptor = os.open(path, flags)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def atomic(path):
    """A binary file that appears only if the block ends well: `with atomic(path) as f: torch.save(x, f)`.

    Raises WriteError, and what the block raises; the old file is then as it was.
    """
    path = pathlib.Path(path)
    temp = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, glob.escape(path.name))
        with open(temp, "wb") as f:
            try_lock(f)
            yield f
            f.flush()
            os.fsync(f.fileno())                                # else the new name may outlive its data
        os.replace(temp, path)
    except BaseException as e:                                  # Ctrl-C too must not leave a stray file
        with contextlib.suppress(OSError):
            temp.unlink()
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save lays an error of its own over it
        if isinstance(cause, OSError):
            raise cannot_write(path, cause) from e
        raise
    sync_folder(path.parent)


def sync_folder(path):
    """Make renames in a folder durable, where the system can (Windows cannot)."""
    with contextlib.suppress(OSError, AttributeError), opened_path(path, os.O_RDONLY | os.O_DIRECTORY) as folder:
        os.fsync(folder)


@contextlib.contextmanager
def atomic_folder(path):
    """A folder that appears only if the block ends well: `with atomic_folder(path) as folder: ...`.

    `path` must be new or an empty folder. Raises UserError if another process has filled it meanwhile,
    WriteError, and what the block raises; nothing is then left.
    """
    path = pathlib.Path(path).absolute()
    temp = temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path.parent, glob.escape(path.name))
        temp.mkdir()
        with opened_path(temp) if fcntl else contextlib.nullcontext() as descriptor:
            try_lock(descriptor)
            yield temp
        os.replace(temp, path)
    except WriteError as e:                             # of a file inside, which is not there any more
        raise WriteError(str(e).replace(str(temp), str(path))) from e
    except OSError as e:
        if e.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise UserError(f"{path} has been written by another process meanwhile; use another --out") from e
        raise cannot_write(path, e) from e
    finally:
        shutil.rmtree(temp, ignore_errors=True)
    sync_folder(path.parent)


def write_atomic(path, content):
    """Write bytes, or a string as UTF-8 (its line ends as they are)."""
    content = content.encode() if isinstance(content, str) else content
    with atomic(path) as f:
        f.write(content)


def unique_keys(pairs):
    """A JSON object with every key once; of two, Python would keep the last in silence."""
    out = dict(pairs)
    if len(out) < len(pairs):
        key = collections.Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f'the key "{key}" appears twice')
    return out


def printable(text, limit=80):
    """Text from a file or a server as part of a message: cut, on one line, without control characters."""
    escaped = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:limit])
    return escaped + "..." * (len(text) > limit)


def check_path(name):
    """Raises DataError for a path that no file can have: with NUL, not UTF-8, a name of over 255 bytes."""
    try:
        longest = max(len(part) for part in str(name).encode().split(b"/"))
    except UnicodeEncodeError as e:
        raise DataError(f"{printable(str(name))} is no path in UTF-8; rename the file or folder") from e
    if "\0" in str(name) or longest > 255:
        fault = "holds the character NUL" if "\0" in str(name) else f"has a name of {longest} bytes, over 255"
        raise DataError(f"the path {printable(str(name))} {fault}; give another one")


def read_json(path):
    try:
        text = pathlib.Path(path).read_bytes().decode("utf-8-sig")
        return json.loads(text, object_pairs_hook=unique_keys)
    except OSError as e:
        raise DataError(f"{path} cannot be read ({e.strerror or e})") from e
    except (ValueError, RecursionError) as e:
        raise DataError(f"{path} is not valid JSON ({e})") from e


def write_json(path, obj):
    write_atomic(path, json.dumps(obj, indent=1, ensure_ascii=False) + "\n")
