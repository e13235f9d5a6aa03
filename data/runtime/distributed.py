"""data/runtime/distributed.py: one run by several processes, `torchrun --nproc_per_node 2 train.py ...`.

Every process (rank) holds the whole run: data, plan, weights, optimiser. What takes time is dealt out, and
what comes of it is exchanged, so that all ranks know the same and take the same next step:

    step       each rank plans the whole step and computes its share of the examples, about equal in tokens.
               The loss is divided by the count of the whole step, so gradients just add up over the ranks;
               then each clips and steps alike. --batch is global; a rank may come away with nothing.
    measuring  rows are dealt out, and what was found goes to every rank
    sampling   token t of row b is drawn by number (b, t) of one table, whoever draws it (PPO)
    dropout    on virtual tokens: one draw for all ranks. In LoRA's branch: a function of (seed, step, rank),
               so there --dropout binds a run to its number of processes; nothing else does
    writing    rank 0 alone reads and writes the run folder, and speaks
    signals    one that reaches any rank rides with the next exchange: there all stop, and rank 0 saves
    failure    the first process to fail says why; the others find it gone at their next exchange, and end

Gradients are exchanged as one sum of all that is small and one in place for each large tensor: no buckets, no
hooks; by gloo on CPUs, nccl on CUDA. A run alone exchanges nothing: what goes in comes out.

--shard (FSDP2; Zhao et al. 2023, arXiv 2304.11277; ZeRO-3, 1910.02054) keeps a slice of each weight, gradient
and moment on each rank, and puts a block together while it computes. All ranks must then run the same
forwards: one that is short of micro-batches runs another at weight 0, and measuring is not dealt out.

Public: world, Interrupted, Lost, start, end, own, deal, share, gather, merged, alike, lead, meet, add_up,
first, shard, full, collect, scatter, scatter_state, reshard, clip
"""
import contextlib
import io
import math
import os
import warnings

import torch
import torch.distributed as dist
import torch.nn as nn

from data.runtime.files import UserError

LARGE = 1 << 20                                     # numbers; a tensor of so many is summed where it lies


class Interrupted(BaseException):
    """SIGINT or SIGTERM. Not an Exception, so that nobody handles it by accident."""


class Lost(UserError):
    """Another process of this run has ended."""
    code = 1


class World:
    """Which process this is, of how many. turn: commands so far. stop: a signal has reached this process.
    alike: nothing is dealt out."""
    rank, size, store, turn, stop, alike = 0, 1, None, 0, False, False


world = World()


def start():
    """Before a command: join the others, if torchrun has started us and we have not yet."""
    world.stop, world.alike, world.turn = False, False, world.turn + 1
    if world.size > 1 or int(os.environ.get("WORLD_SIZE", 1)) == 1 or "MASTER_ADDR" not in os.environ:
        return
    store, rank, size = next(dist.rendezvous("env://"))
    dist.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo", store=store,
                            rank=rank, world_size=size)
    world.rank, world.size, world.store = rank, size, store


def end():
    if world.size > 1:
        dist.destroy_process_group()


def own(device):
    """The GPU of this rank, where there are several."""
    if world.size > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
        torch.cuda.set_device(device)
    return device


# -------------------------------------------------------------------------------------------------- exchanges

@contextlib.contextmanager
def exchange():
    try:
        yield
    except RuntimeError as e:                       # what gloo and nccl raise when the other end is gone
        fault = str(e).split(". ")[0].splitlines()[0]
        raise Lost(reason() or f"another process of this run is gone, without a word ({fault})") from None


def reason():
    """What the first process to fail has said, if one has."""
    with contextlib.suppress(RuntimeError):
        key = f"why {world.turn}"
        return world.store.get(key).decode() if world.store and world.store.check([key]) else None


def first(why):
    """Is this process the first to fail? It alone says why; the others end in silence."""
    with contextlib.suppress(RuntimeError):         # the store is gone with the process that kept it
        if world.store and world.store.add(f"failed {world.turn}", 1) > 1:
            return False
        if world.store:
            world.store.set(f"why {world.turn}", why)
    return True


def heed(stopped):
    """All ranks come here together and know alike: was any of them told to stop?"""
    if stopped:
        raise Interrupted


def packed(x):
    buffer = io.BytesIO()
    torch.save(x, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def unpacked(data):
    return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)


def gather(x):
    """[x of rank 0, x of rank 1, ...] on every rank: numbers, strings, tensors, lists and dicts of them."""
    if world.size == 1 or world.alike:
        return [x]
    data = packed(x)
    with exchange():
        heads = [torch.empty(2, dtype=torch.int64) for _ in range(world.size)]
        dist.all_gather(heads, torch.tensor([len(data), int(world.stop)]))
        sizes, stops = torch.stack(heads).T.tolist()
        rows = [torch.empty(max(sizes), dtype=torch.uint8) for _ in sizes]      # all of one length
        dist.all_gather(rows, torch.cat((data, data.new_zeros(max(sizes) - len(data)))))
    heed(any(stops))
    return [unpacked(row[:n]) for row, n in zip(rows, sizes)]


def merged(found):
    """{row: what was found}, each rank's own, as a list of all rows, in order, on every rank."""
    return [value for _, value in sorted({k: v for one in gather(found) for k, v in one.items()}.items())]


def lead(f):
    """f() of rank 0, on every rank. If it raises there, the others find rank 0 gone."""
    if world.size == 1:
        return f()
    data = packed(f()) if world.rank == 0 else None
    with exchange():
        n = torch.tensor([len(data) if world.rank == 0 else 0])
        dist.broadcast(n, 0)
        data = torch.empty(int(n), dtype=torch.uint8) if data is None else data
        dist.broadcast(data, 0)
    return unpacked(data)


def meet():
    """Wait for all."""
    lead(lambda: None)


def add_up(params, numbers=()):
    """The gradients of params, in place, and the numbers, returned: summed over ranks. A gradient that no
    rank has stays None: 0 would let the optimiser decay it. FSDP has already taken the mean of its own."""
    params, numbers = list(params), list(numbers)
    if world.size == 1:
        return numbers
    for p in params:
        if sharded(p) and p.grad is not None:
            p.grad.mul_(world.size)
    whole = [p for p in params if not sharded(p)]
    has = [float(p.grad is not None) for p in whole]
    for p in whole:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    small, large = ([p.grad for p in whole if (p.numel() >= LARGE) == big] for big in (False, True))
    said = torch.tensor([*has, *map(float, numbers), float(world.stop)])
    flat = torch.cat([*(g.flatten().float() for g in small), said.to(params[0].device)])
    with exchange():
        for t in (flat, *large):
            dist.all_reduce(t)
    *sums, said = flat.split([*(g.numel() for g in small), len(said)])
    for g, total in zip(small, sums):
        g.copy_(total.view_as(g))
    said = said.tolist()
    for p, n in zip(whole, said):
        p.grad = p.grad if n else None
    heed(said[-1])
    return said[len(has):-1]


# ---------------------------------------------------------------------------------------------------- dealing

def deal(items, weights, hands):
    """A hand of items for each rank, in their old order: the heaviest first, to whoever has least so far."""
    if hands == 1:
        return [list(items)]
    load, out = [0] * hands, [[] for _ in range(hands)]
    for i in sorted(range(len(items)), key=lambda i: -weights[i]):
        rank = load.index(min(load))
        out[rank].append(i)
        load[rank] += weights[i]
    return [[items[i] for i in sorted(hand)] for hand in out]


def share(items, weights):
    """This rank's hand."""
    return list(items) if world.alike else deal(items, weights, world.size)[world.rank]


@contextlib.contextmanager
def alike():
    """Inside, every rank does all of it: one stream of random numbers, or a sharded model's forwards."""
    before, world.alike = world.alike, True
    try:
        yield
    finally:
        world.alike = before


# --------------------------------------------------------------------------------------------------- sharding

def sharded(t):
    return hasattr(t, "full_tensor")                # a DTensor, without importing them into every run


def shard(model, device):
    """FSDP2: each block, and all that is in none (embedding and tied head, one weight) with the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")    # none is changed in place
    mesh = init_device_mesh(device.type, (world.size,))
    for module in (*model.blocks, model):           # moved to the device a block at a time
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(model, "trunk")    # a head comes behind it, while the root is still whole
    world.alike = True
    return model


def reshard(model):
    """After a forward without backward the root is still whole; weights are read and written in slices."""
    if world.alike and hasattr(model, "reshard"):
        model.reshard()


def full(t):
    """A tensor, put together if it is in slices: every rank must ask, and has it."""
    return t.full_tensor() if sharded(t) else t


def collect(x):
    """The same for all through a state dict, one by one, into rank 0's memory; the others keep nothing."""
    if isinstance(x, dict):
        return {key: collect(value) for key, value in x.items()}
    if isinstance(x, list):
        return [collect(value) for value in x]
    if sharded(x):
        x = x.full_tensor()
        return None if world.rank else x.cpu()
    return x.cpu() if isinstance(x, torch.Tensor) else x


def scatter(p, value):
    """A whole tensor as parameter p is kept: in slices, if p is."""
    if not sharded(p):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)


def scatter_state(optimiser, state):
    """An optimiser's state dict of whole tensors, as this optimiser keeps its own."""
    params = [p for group in optimiser.param_groups for p in group["params"]]
    return {**state, "state": {i: {name: scatter(params[i], t) if t.shape == params[i].shape else t
                                   for name, t in one.items()} for i, one in state["state"].items()}}


def clip(params, largest):
    """torch's clip_grad_norm_, also where some gradients lie in slices. Returns the norm, for float()."""
    params = [p for p in params if p.grad is not None]
    if not any(map(sharded, params)):
        return nn.utils.clip_grad_norm_(params, largest)
    kinds = [[p.grad for p in params if sharded(p) == kind] for kind in (True, False)]
    norm = math.hypot(*(full(nn.utils.get_total_norm(grads)).item() for grads in kinds if grads))
    for grad in sum(kinds, []) if norm > largest else ():
        grad.mul_(largest / (norm + 1e-6))
    return norm
