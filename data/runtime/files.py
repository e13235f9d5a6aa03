"""data/runtime/files.py: files that are either whole or not there.

Writing.  Bytes go to a temporary file in the same folder, are flushed and fsynced, and only then renamed
over the target; the folder is fsynced last.  Whatever stops us (full disk, Ctrl-C), the old file is intact.

Public: UserError, DataError, WriteError, atomic, write_atomic, read_json, write_json, unique_keys, printable,
check_path
"""
import collections
import contextlib
import json
import os
import pathlib


class UserError(ValueError):
    """A mistake of the user, in one sentence; the command prints it, no traceback, and exits with `code`."""
    code = 2


class DataError(UserError):
    """Bad or missing data, model or adapter files."""
    code = 65


class WriteError(UserError):
    """A file or folder that cannot be written: a full disk, no permission."""
    code = 74


@contextlib.contextmanager
def atomic(path):
    """A binary file that appears only if the block ends well: `with atomic(path) as f: torch.save(x, f)`.

    Raises WriteError, and what the block raises; the old file is then as it was.
    """
    path = pathlib.Path(path)
    temp = path.with_name(f".{path.name}.{os.getpid()}.tmp")    # same folder: a rename stays on one disk
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temp, "wb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())                                # else the new name may outlive its data
        os.replace(temp, path)
    except BaseException as e:                                  # Ctrl-C too must not leave a stray file
        with contextlib.suppress(OSError):
            temp.unlink()
        cause = e if isinstance(e, OSError) else e.__context__  # torch.save lays an error of its own over it
        if isinstance(cause, OSError):
            raise WriteError(f"{path} cannot be written ({cause.strerror or cause}); it is as it was") from e
        raise
    if hasattr(os, "O_DIRECTORY"):                              # Windows cannot fsync a folder
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
