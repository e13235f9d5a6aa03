"""A device that is not there: its tensors say they are on it, hold their numbers on the CPU, and refuse to
meet a tensor that is not, where CUDA's do. Finds a tensor that is made, or left, on the wrong device.

    python tests/pretend.py "--method lora --out FOLDER" ...        commands of train.py, on --device pretend

Not shown by it: CUDA's own kernels, their rounding, speed and memory.
"""
import pathlib
import sys
import traceback

import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend as setup

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))
import train                                            # noqa: E402

aten, NAME = torch.ops.aten, "pretend"
MIXES = {aten.copy_.default, aten._to_copy.default, aten.index.Tensor, aten.index_put_.default,
         aten.index_put.default, aten._index_put_impl_.default}             # CUDA takes indices from the CPU


class Pretended(torch.Tensor):
    @staticmethod
    def __new__(cls, t):
        out = torch.Tensor._make_wrapper_subclass(cls, t.size(), strides=t.stride(), dtype=t.dtype,
                                                  storage_offset=t.storage_offset(), device=f"{NAME}:0")
        out.held = t
        return out

    __torch_function__ = torch._C._disabled_torch_function_impl

    def tolist(self):                                   # torch has none for subclasses
        return self.held.tolist()

    def data_ptr(self):
        return self.held.data_ptr()

    def __deepcopy__(self, memo):                       # torch's own would copy a storage that is not there
        out = Pretended(self.held.detach().clone())
        if isinstance(self, torch.nn.Parameter):
            out = torch.nn.Parameter(out, self.requires_grad)
        return memo.setdefault(id(self), out)

    def __reduce_ex__(self, protocol):                  # as torch.load(map_location="cpu") will see it
        return self.held.__reduce_ex__(protocol)

    def __repr__(self):
        return f"Pretended({self.held})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return go(func, args, kwargs or {})


def go(func, args, kwargs):
    flat = tree_flatten((args, kwargs))[0]
    there = [t for t in flat if isinstance(t, Pretended)]
    here = [t for t in flat if isinstance(t, torch.Tensor) and not isinstance(t, Pretended) and t.dim()]
    if there and here and func not in MIXES:
        raise RuntimeError(f"{func}: tensors on two devices, {[list(t.shape) for t in there + here]}")
    device = kwargs.get("device")
    if func is aten._fused_sdp_choice.default:
        return 0                                        # the one that is made of ordinary operations
    def held(t):
        return t.held
    inner = tree_map_only(Pretended, held, (args, kwargs))
    if device is not None:
        inner[1]["device"] = torch.device("cpu")
        if func is aten._to_copy.default and there and torch.device(device).type == "cpu":
            return func(*inner[0], **inner[1])
    out = func(*inner[0], **inner[1])
    if torch.device(device).type == NAME if device is not None else there and (
            func is not aten.copy_.default or isinstance(args[0], Pretended)):
        out = tree_map_only(torch.Tensor, Pretended, out)
        return return_and_correct_aliasing(func, args, kwargs, out) if there else out
    return out


class Generator(torch.Generator):
    def __new__(cls, device="cpu"):
        return super().__new__(cls, "cpu")


class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return go(func, args, kwargs or {})


class Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


def main():
    """Each argument is a command of train.py; says how each of them ended, and goes on."""
    setup(NAME, Backend())
    torch.Generator = Generator
    torch._C._set_only_lift_cpu_tensors(True)
    with Mode():
        for line in sys.argv[1:]:
            try:
                code = train.main([*line.split(), "--device", NAME])
            except Exception as e:
                at = [f"{f.name}:{f.lineno}" for f in traceback.extract_tb(e.__traceback__)][-12:]
                code = f"{type(e).__name__}: {e} {at}".replace("\n", " ")
            print("ended", code, flush=True)


if __name__ == "__main__":
    main()
