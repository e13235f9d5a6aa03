"""data/runtime/files.py: whole files or none, and safetensors that are sound to the last byte."""
import errno
import hashlib
import json
import os
import pickle
import warnings
import zipfile

import pytest
import torch

from data.checkpoints.safetensors import read_tensors, write_tensors
from data.runtime.files import (DataError, UserError, WriteError, atomic, atomic_folder, cannot_write, read_json,
                                remove_abandoned, write_atomic, write_json)

SAMPLE = {"b": torch.tensor([1.5, -2.0]).bfloat16(), "a": torch.arange(6.).reshape(2, 3),
          "i": torch.tensor([1, -1]), "d": torch.tensor(0.5, dtype=torch.float64),
          "q": torch.tensor([True, False, True]), "h": torch.tensor([[0.25]], dtype=torch.float16),
          "e": torch.empty(0, 4),
          "u": torch.tensor([7], dtype=torch.uint8), "n": torch.tensor([-7], dtype=torch.int8),
          "j": torch.tensor([3], dtype=torch.int16), "k": torch.tensor([4], dtype=torch.int32)}
# Of the bytes that the reference library, safetensors 0.8.0, makes of the sample:
SHA256 = "4dbbff0667d499e7929f950b861f524a3def93ea9869ec05f4efd4a4faeb990e"


def container(header, data=b"", pad=True):
    """A safetensors file with any header: an object, or its text."""
    head = header.encode() if isinstance(header, str) else json.dumps(header).encode()
    head += b" " * (-len(head) % 8) if pad else b""
    return len(head).to_bytes(8, "little") + head + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


def same(got, want):
    return got.dtype == want.dtype and got.shape == want.shape and torch.equal(got, want)


def test_the_reference_library_writes_the_same_bytes(tmp_path):
    write_tensors(tmp_path / "x.safetensors", SAMPLE)
    assert hashlib.sha256((tmp_path / "x.safetensors").read_bytes()).hexdigest() == SHA256


def test_tensors_come_back_as_they_were(tmp_path):
    path = tmp_path / "new" / "folder" / "x.safetensors"    # folders are made
    odd = {"x": torch.tensor([float("nan"), float("inf"), -0.0]), "grad": torch.ones(3, requires_grad=True),
           "columns": torch.arange(12.).reshape(3, 4)[:, 1:3]}
    write_tensors(path, {**SAMPLE, **odd})
    got = read_tensors(path)
    assert got.keys() == {**SAMPLE, **odd}.keys() and not got["grad"].requires_grad
    for name, t in SAMPLE.items():
        assert same(got[name], t), name
    assert torch.equal(got["x"].view(torch.int32), odd["x"].view(torch.int32))
    assert torch.equal(got["columns"], torch.tensor([[1., 2], [5, 6], [9, 10]]))


def test_other_legal_files(tmp_path):
    path = tmp_path / "x.safetensors"
    path.write_bytes(container("{}"))
    assert read_tensors(path) == {}
    data = torch.tensor([1., 2.]).numpy().tobytes()
    for extra in range(9):                                  # unpadded headers leave the data at any address
        path.write_bytes(container({"x" * (extra + 1): entry(log_progress="unknown fields pass")}, data, pad=False))
        x = read_tensors(path)["x" * (extra + 1)]
        assert same(x, torch.tensor([1., 2.])) and x.data_ptr() % 4 == 0
    path.write_bytes(container({"x": entry(), "none": entry("U8", [0], [8, 8]), "__metadata__": {"a": ""}},
                               data))
    assert read_tensors(path)["none"].shape == (0,)
    header = json.dumps({"x": entry()})                     # 640 = 0x280: the first bytes of a pickle
    path.write_bytes(container(header + " " * (640 - len(header)), data))
    assert path.read_bytes()[:2] == b"\x80\x02" and same(read_tensors(path)["x"], torch.tensor([1., 2.]))


FAULTS = [
    ("empty", b"", "0 bytes"),
    ("seven bytes", b"\0" * 7, "7 bytes"),
    ("header longer than the file", (1000).to_bytes(8, "little") + b"{}", "claims 1000 bytes"),
    ("huge header", (2 ** 63).to_bytes(8, "little") + b"{}", "claims 9223"),
    ("not an object", container("[1]"), "truncated, or another format"),
    ("broken JSON", container('{"x": '), "not a sound"),
    ("invalid UTF-8", container('{"x"')[:-4] + b'{"\xff"', "not a sound"),
    ("deep JSON", container('{"x":' + "[" * 100_000), "not a sound"),
    ("duplicate names", container('{"x":%s,"x":%s}' % (2 * (json.dumps(entry()),)), b"\0" * 8), "twice"),
    ("metadata of numbers", container({"__metadata__": {"epoch": 3}}), "__metadata__"),
    ("metadata list", container({"__metadata__": ["a"]}), "__metadata__"),
    ("entry is a list", container({"x": [1]}), '"x" lacks'),
    ("no shape", container({"x": {"dtype": "F32", "data_offsets": [0, 0]}}), '"x" lacks'),
    ("unknown dtype", container({"x": entry("F99")}, b"\0" * 8), "F99"),
    ("dtype in lower case", container({"x": entry("f32")}, b"\0" * 8), "f32"),
    ("dtype is a list", container({"x": entry(["F32"])}, b"\0" * 8), "dtype"),
    ("negative shape", container({"x": entry(shape=[-2])}, b"\0" * 8), "cannot be"),
    ("two negatives", container({"x": entry(shape=[-1, -2])}, b"\0" * 8), "cannot be"),
    ("shape with true", container({"x": entry(shape=[2, True])}, b"\0" * 8), "cannot be"),
    ("shape with float", container({"x": entry(shape=[2.0])}, b"\0" * 8), "cannot be"),
    ("shape is a number", container({"x": {**entry(), "shape": 2}}, b"\0" * 8), "cannot be"),
    ("overflowing shape", container({"x": entry(shape=[2 ** 40, 2 ** 40])}, b"\0" * 8), "cannot be"),
    ("empty but endless", container({"x": entry(shape=[0, 2 ** 70], offsets=[0, 0])}), "cannot be"),
    ("three offsets", container({"x": entry(offsets=[0, 8, 8])}, b"\0" * 8), "cannot be"),
    ("negative offset", container({"x": entry(offsets=[-8, 0])}, b"\0" * 8), "cannot be"),
    ("offsets backwards", container({"x": entry(offsets=[8, 0])}, b"\0" * 8), "not [2] of F32"),
    ("size and shape differ", container({"x": entry(shape=[3])}, b"\0" * 8), "which is not [3] of F32"),
    ("starts late", container({"x": entry(offsets=[4, 12])}, b"\0" * 12), "begins at byte 4"),
    ("gap", container({"x": entry(), "y": entry(offsets=[12, 20])}, b"\0" * 20), '"y" begins at byte 12'),
    ("overlap", container({"x": entry(), "y": entry(offsets=[4, 12])}, b"\0" * 12), '"y" begins at byte 4'),
    ("shared range", container({"x": entry(), "y": entry()}, b"\0" * 8), '"y" begins at byte 0'),
    ("truncated data", container({"x": entry()}, b"\0" * 7), "truncated or padded"),
    ("trailing byte", container({"x": entry()}, b"\0" * 9), "truncated or padded"),
    ("bool of 2", container({"x": entry("BOOL", [2], [0, 2])}, b"\1\2"), "BOOL"),
    ("Git LFS pointer", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n", "Git LFS"),
    ("web page", b"<!DOCTYPE html><html>Not found</html>", "web page"),
]


@pytest.mark.parametrize("fault, content, says", FAULTS, ids=[fault for fault, *_ in FAULTS])
def test_unsound_files_are_refused(tmp_path, fault, content, says):
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(DataError) as e:
        read_tensors(path)
    assert str(path) in str(e.value) and says in str(e.value) and "\n" not in str(e.value)


def test_every_truncation_is_noticed(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, SAMPLE)
    raw = path.read_bytes()
    for n in (*range(0, len(raw), 7), len(raw) - 1):
        path.write_bytes(raw[:n])
        with pytest.raises(DataError):
            read_tensors(path)


def test_a_pickle_is_refused_and_not_run(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)
    for protocol in range(6):
        (tmp_path / "model.bin").write_bytes(pickle.dumps(Evil(), protocol))
        with pytest.raises(DataError, match="pickle" if protocol >= 2 else "another format|header"):
            read_tensors(tmp_path / "model.bin")
    with zipfile.ZipFile(tmp_path / "model.pt", "w") as z:
        z.writestr("archive/data.pkl", pickle.dumps(Evil()))
    torch.save({"w": torch.ones(2)}, tmp_path / "real.pt")
    for name in ("model.pt", "real.pt"):
        with pytest.raises(DataError, match="zip archive.*pickle"):
            read_tensors(tmp_path / name)
    assert not (tmp_path / "ran").exists()


def test_missing_files_and_folders_are_named(tmp_path):
    for path in (tmp_path / "none.safetensors", tmp_path):
        for read in (read_tensors, read_json):
            with pytest.raises(DataError, match=str(path)):
                read(path)


def test_read_tensors_are_private_and_outlive_the_file(tmp_path):
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"w": torch.arange(4096.)})
    with warnings.catch_warnings():
        warnings.simplefilter("error")                      # torch warns of memory that is read-only
        w = read_tensors(path)["w"]
        w += 1
    assert torch.equal(read_tensors(path)["w"], torch.arange(4096.))
    again = read_tensors(path)["w"]
    write_tensors(path, {"w": torch.zeros(2)})              # a new file takes the name, we keep the old
    assert torch.equal(again, torch.arange(4096.)) and torch.equal(w, torch.arange(4096.) + 1)
    write_tensors(path, {"w": again})                       # onto the very file that it came from
    write_tensors(path, read_tensors(path))
    assert torch.equal(read_tensors(path)["w"], torch.arange(4096.))


def test_one_memory_under_two_names_is_refused(tmp_path):
    w = torch.randn(4, 3)
    for twin in (w, w.view(3, 4), w.T, w[:2]):
        with pytest.raises(ValueError, match='"head" and "wte"|"wte" and "head"'):
            write_tensors(tmp_path / "x.safetensors", {"wte": w, "head": twin})
    assert not list(tmp_path.iterdir())
    write_tensors(tmp_path / "x.safetensors", {"q": w[:, :1], "k": w[:, 1:], "none": w[:0], "zero": w[:0]})
    assert torch.equal(read_tensors(tmp_path / "x.safetensors")["k"], w[:, 1:])


def full_disk(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("when", ["fsync", "replace"])
def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch, when):
    for name, write, read in (("x.json", lambda p: write_json(p, [2]), read_json),
                              ("x.st", lambda p: write_tensors(p, {"w": torch.zeros(9)}),
                               lambda p: read_tensors(p)["w"].tolist())):
        path = tmp_path / name
        write_json(path, [1]) if name == "x.json" else write_tensors(path, {"w": torch.ones(1)})
        with monkeypatch.context() as m:
            m.setattr(os, when, full_disk)
            with pytest.raises(UserError, match="No space left"):
                write(path)
        assert read(path) == [1]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["x.json", "x.st"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_a_disk_that_fills_while_writing(tmp_path, monkeypatch):
    write_atomic(tmp_path / "x", "old")
    real = open
    monkeypatch.setattr("builtins.open", lambda path, mode="r", **k: real(path, mode, **k) if "w" not in mode
                        else os.symlink("/dev/full", path) or real(path, mode, **k))
    with pytest.raises(UserError, match="No space left"):
        write_atomic(tmp_path / "x", b"new" * 100_000)
    monkeypatch.undo()
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_an_interrupt_leaves_the_old_file(tmp_path):
    write_atomic(tmp_path / "x", "old")
    with pytest.raises(KeyboardInterrupt):
        with atomic(tmp_path / "x") as f:
            f.write(b"half")
            raise KeyboardInterrupt
    assert (tmp_path / "x").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_data_is_on_disk_before_its_name(tmp_path, monkeypatch):
    done = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda f: (done.append("fsync"), fsync(f)))
    monkeypatch.setattr(os, "replace", lambda a, b: (done.append("rename"), replace(a, b)))
    write_atomic(tmp_path / "x", "text\r\nas it is é")
    assert done == ["fsync", "rename", "fsync"]
    assert (tmp_path / "x").read_bytes() == "text\r\nas it is é".encode()


def test_a_target_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "x", tmp_path):        # a folder that is a file; a file that is a folder
        with pytest.raises(UserError, match="cannot be written"):
            write_atomic(path, "x")


def test_json(tmp_path):
    path, value = tmp_path / "x.json", {"b": 1, "a": ["é", None, 0.5, {"deep": True}]}
    write_json(path, value)
    assert read_json(path) == value and list(read_json(path)) == ["b", "a"]
    assert path.read_bytes().endswith(b"}\n")
    path.write_bytes(b"\xef\xbb\xbf[1]\r\n")                # a byte order mark
    assert read_json(path) == [1]
    for bad in (b"", b"{", b"\xff\xfe", b'{"a": 1, "a": 2}', b"[" * 100_000):
        path.write_bytes(bad)
        with pytest.raises(DataError, match=f"{path} is not valid JSON"):
            read_json(path)


def test_exit_codes():
    assert UserError.code == 2 and DataError.code == 65 and issubclass(DataError, UserError)


def test_a_message_is_one_printable_line_of_bounded_length():
    assert str(UserError("--data a\nb\x1b[31m\0 does not exist")) == "--data a\\nb\\x1b[31m\\x00 does not exist"
    long = str(UserError("x" * 5000 + " is not a flag; see --help"))
    assert len(long) < 1000 and long.startswith("xxx") and long.endswith("is not a flag; see --help")


# ----------------------------------------------------------------------------------------- writers that were killed

def test_the_next_writer_of_a_file_deletes_what_a_killed_one_left(tmp_path):
    """Not the temporary file of a writer that lives, nor of another file."""
    (tmp_path / ".x.json.999999999.tmp").write_text("{")
    (tmp_path / ".y.json.999999999.tmp").write_text("{")
    with atomic(tmp_path / "x.json") as f:
        assert not (tmp_path / ".x.json.999999999.tmp").exists() and (tmp_path / ".y.json.999999999.tmp").exists()
        remove_abandoned(tmp_path)
        f.write(b"1")
    assert sorted(os.listdir(tmp_path)) == ["x.json"] and read_json(tmp_path / "x.json") == 1


def test_a_folder_is_whole_or_not_there(tmp_path):
    for left in (".new.999999999.tmp", ".other.999999999.tmp"):
        (tmp_path / left).mkdir()
        (tmp_path / left / "half").write_text("")
    with pytest.raises(KeyError), atomic_folder(tmp_path / "new") as folder:
        write_json(folder / "a.json", 1)
        raise KeyError
    assert sorted(os.listdir(tmp_path)) == [".other.999999999.tmp"]
    (tmp_path / "new").mkdir()                                              # an empty one is as good as none
    with atomic_folder(tmp_path / "new") as folder:
        write_json(folder / "a.json", 1)
        assert os.listdir(tmp_path / "new") == []
    assert os.listdir(tmp_path / "new") == ["a.json"] and len(os.listdir(tmp_path)) == 2
    with pytest.raises(UserError, match="new has been written by another process meanwhile"), atomic_folder(tmp_path / "new"):
        pass
    assert len(os.listdir(tmp_path)) == 2


def test_whose_temporary_file_is_deleted(tmp_path):
    """That of a process that is gone, or had this one's number; not that of another, nor one that is being written."""
    numbers = {"gone": 999999999, "same": os.getpid(), "other": os.getppid()}
    for name, number in numbers.items():
        (tmp_path / f".{name}.{number}.tmp").write_text("{")
    with atomic(tmp_path / "new"):
        remove_abandoned(tmp_path)
        left = {f".other.{os.getppid()}.tmp", f".new.{os.getpid()}.tmp"}
        assert set(os.listdir(tmp_path)) == left


def write_many(path, letter, times):
    """A child's life: write versions of different lengths, as fast as it goes. Returns its process number."""
    pid = os.fork()
    if not pid:
        code = 1
        try:
            for n in range(times):
                write_atomic(path, letter * (1 + 5000 * (n % 7)))
            code = 0
        finally:
            os._exit(code)
    return pid


def test_two_processes_that_write_one_file_do_not_hurt_each_other(tmp_path):
    path = tmp_path / "state.pt"
    write_atomic(path, "start")
    running = {write_many(path, letter, 100) for letter in "ab"}
    seen = set()
    while running:
        text = path.read_text()                                 # there at every moment, and whole
        assert text == "start" or len(set(text)) == 1 and len(text) % 5000 == 1
        seen.add(text)
        ended = {pid: status for pid, status in (os.waitpid(pid, os.WNOHANG) for pid in running) if pid}
        running -= ended.keys()
        assert not any(map(os.waitstatus_to_exitcode, ended.values()))
    assert {text[0] for text in seen} >= {"a", "b"}                         # their versions came in turns
    assert [p.name for p in tmp_path.iterdir()] == ["state.pt"]


def test_only_a_full_disk_is_told_to_free_space():
    for number, asks in ((errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EROFS, False), (errno.EIO, False)):
        error = cannot_write("x", OSError(number, os.strerror(number)))
        assert error.code == 74 and ("free some space" in str(error)) == asks and os.strerror(number) in str(error)
