"""data/runtime/distributed.py: one run by several processes, `torchrun --nproc_per_node 2 train.py ...`.

Every process (rank) holds the whole run: data, plan, weights, optimiser. Expensive work is partitioned and
its results are exchanged, so that all ranks have the same state and take the same next step:

    step         every rank plans the whole step and computes its shard of the examples, about equal in
                 tokens. The loss is divided by the target count of the whole step, so gradients are summed
                 over ranks; then each rank clips and steps in the same way. --batch is global; a rank may
                 have no examples
    evaluation   rows are partitioned; every rank gets all results
    sampling     token t of row b is drawn with the uniform (b, t) of one table, on whichever rank (PPO)
    dropout      on virtual tokens: the same draw on all ranks. In LoRA: a function of (seed, step, rank), so
                 only with --dropout does a run depend on its number of processes
    files        rank 0 alone reads and writes the run folder, and prints
    signals      a signal to any rank is sent along with the next exchange; there all ranks stop, and rank 0
                 saves
    failure      the first rank to fail reports why; the others find it gone at their next exchange, and end

Gradients are exchanged as one sum of all small tensors together and one sum in place per large tensor,
without buckets or hooks; with gloo on CPUs, nccl on CUDA. A single process exchanges nothing: every
function here returns its input.

--shard (FSDP2; Zhao et al. 2023, arXiv 2304.11277; ZeRO-3, 1910.02054) keeps a slice of each weight,
gradient and optimiser moment on each rank, and gathers a block while it is computed. All ranks must then
run the same number of forwards: a rank that has fewer micro-batches repeats one with weight 0, and
evaluation is replicated.

Public: dist_state, Interrupted, LostProcess, start, end, local_device, gather, gather_rows, broadcast,
barrier, all_reduce, first_to_fail, raise_if_stopped, partition, local_rows, replicated, shard, reshard,
full, collect, scatter, scatter_state, clip_grad_norm
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

LARGE = 1 << 20                                     # elements; larger tensors are summed in place


class Interrupted(BaseException):
    """SIGINT or SIGTERM. Not an Exception, so that no handler of ordinary errors catches it."""


class LostProcess(UserError):
    """Another process of this run has ended."""
    code = 1


class DistState:
    """Which process this is, of how many."""
    rank = 0
    size = 1
    store = None                                    # key-value store of the process group
    command = 0                                     # how many commands have been started
    stop = False                                    # this process has received a signal
    replicated = False                              # nothing is partitioned: every rank computes everything


dist_state = DistState()


def start():
    """Called before a command: join the process group, if torchrun has started this process."""
    dist_state.stop = False
    dist_state.replicated = False
    dist_state.command += 1
    launched = "MASTER_ADDR" in os.environ and int(os.environ.get("WORLD_SIZE", 1)) > 1
    if dist_state.size > 1 or not launched:
        return
    store, rank, size = next(dist.rendezvous("env://"))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size)
    dist_state.rank = rank
    dist_state.size = size
    dist_state.store = store


def end():
    """Leave the process group."""
    if dist_state.size > 1:
        dist.destroy_process_group()


def local_device(device):
    """The device of this rank: with several processes on CUDA, one GPU each."""
    if dist_state.size > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return device


# ---- exchanges ---------------------------------------------------------------------------------------------
@contextlib.contextmanager
def _exchange():
    """Turn the error of a broken connection into LostProcess."""
    try:
        yield
    except RuntimeError as e:                       # what gloo and nccl raise when another process is gone
        fault = str(e).split(". ")[0].splitlines()[0]
        message = _failure_reason() or f"another process of this run is gone and gave no reason ({fault})"
        raise LostProcess(message) from None


def _failure_reason():
    """Why the first process to fail has failed; None if none has reported."""
    key = f"reason {dist_state.command}"
    with contextlib.suppress(RuntimeError):         # the store is gone with the process that held it
        if dist_state.store and dist_state.store.check([key]):
            return dist_state.store.get(key).decode()
    return None


def first_to_fail(reason):
    """Whether this process is the first to fail. If so, its reason is reported to the others."""
    with contextlib.suppress(RuntimeError):         # the store is gone with the process that held it
        if dist_state.store:
            if dist_state.store.add(f"failed {dist_state.command}", 1) > 1:
                return False
            dist_state.store.set(f"reason {dist_state.command}", reason)
    return True


def raise_if_stopped(stopped):
    """Raise Interrupted if any rank has received a signal; `stopped` must be the same on all ranks."""
    if stopped:
        raise Interrupted


def _serialize(value):
    """A value as a uint8 tensor."""
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(buffer.getbuffer(), dtype=torch.uint8)


def _deserialize(data):
    return torch.load(io.BytesIO(data.numpy().tobytes()), map_location="cpu", weights_only=True)


def gather(value):
    """[value of rank 0, value of rank 1, ...], on every rank.

    Values are numbers, strings, tensors, and lists and dicts of them. Raises Interrupted after a signal to
    any rank, LostProcess when another process has ended.
    """
    if dist_state.size == 1 or dist_state.replicated:
        return [value]
    data = _serialize(value)
    with _exchange():
        header = torch.tensor([len(data), int(dist_state.stop)])
        headers = [torch.empty(2, dtype=torch.int64) for _ in range(dist_state.size)]
        dist.all_gather(headers, header)
        lengths, stops = torch.stack(headers).T.tolist()
        padded = torch.cat((data, data.new_zeros(max(lengths) - len(data))))    # all_gather needs one length
        buffers = [torch.empty(max(lengths), dtype=torch.uint8) for _ in lengths]
        dist.all_gather(buffers, padded)
    raise_if_stopped(any(stops))
    return [_deserialize(buffer[:length]) for buffer, length in zip(buffers, lengths)]


def gather_rows(results):
    """{row index: result} of this rank's rows -> the list of all results, in order of rows, on every rank."""
    merged = {}
    for part in gather(results):
        merged.update(part)
    return [merged[row] for row in sorted(merged)]


def broadcast(f):
    """f() of rank 0, on every rank. If f raises on rank 0, the others raise LostProcess."""
    if dist_state.size == 1:
        return f()
    data = _serialize(f()) if dist_state.rank == 0 else None
    with _exchange():
        length = torch.tensor([len(data) if dist_state.rank == 0 else 0])
        dist.broadcast(length, 0)
        if data is None:
            data = torch.empty(int(length), dtype=torch.uint8)
        dist.broadcast(data, 0)
    return _deserialize(data)


def barrier():
    """Wait until all ranks are here."""
    broadcast(lambda: None)


def all_reduce(params, numbers=()):
    """Sum over ranks: the gradients of params in place, and numbers, which are returned as a list.

    A gradient that no rank has stays None, because a gradient of 0 would let the optimiser decay the weight.
    FSDP has already averaged the gradients of sharded parameters, so those are multiplied by the ranks.
    Raises Interrupted and LostProcess as gather does.
    """
    params = list(params)
    numbers = list(numbers)
    if dist_state.size == 1:
        return numbers
    whole = []
    for p in params:
        if not is_sharded(p):
            whole.append(p)
        elif p.grad is not None:
            p.grad.mul_(dist_state.size)
    has_grad = [float(p.grad is not None) for p in whole]
    for p in whole:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    small = [p.grad for p in whole if p.numel() < LARGE]
    large = [p.grad for p in whole if p.numel() >= LARGE]
    scalars = torch.tensor([*has_grad, *map(float, numbers), float(dist_state.stop)])
    device = params[0].device if params else "cpu"
    flat = torch.cat([*(grad.flatten().float() for grad in small), scalars.to(device)])
    with _exchange():
        for tensor in (flat, *large):
            dist.all_reduce(tensor)
    *sums, scalars = flat.split([*(grad.numel() for grad in small), len(scalars)])
    for grad, total in zip(small, sums):
        grad.copy_(total.view_as(grad))
    scalars = scalars.tolist()
    for p, ranks_with_grad in zip(whole, scalars):
        if not ranks_with_grad:
            p.grad = None
    raise_if_stopped(scalars[-1])
    return scalars[len(has_grad):-1]


# ---- partitioning ------------------------------------------------------------------------------------------
def partition(items, weights, n):
    """n lists of items (the rank shards) of about equal weight, each in the old order.

    Greedy: the heaviest item first, to the list that is lightest so far.
    """
    if n == 1:
        return [list(items)]
    loads = [0] * n
    shards = [[] for _ in range(n)]
    for i in sorted(range(len(items)), key=lambda i: -weights[i]):
        lightest = loads.index(min(loads))
        shards[lightest].append(i)
        loads[lightest] += weights[i]
    return [[items[i] for i in sorted(shard)] for shard in shards]


def local_rows(items, weights):
    """This rank's shard of items; all of them where work is replicated."""
    if dist_state.replicated:
        return list(items)
    return partition(items, weights, dist_state.size)[dist_state.rank]


@contextlib.contextmanager
def replicated():
    """Inside, every rank computes everything: one stream of random numbers, equal forwards (FSDP)."""
    before = dist_state.replicated
    dist_state.replicated = True
    try:
        yield
    finally:
        dist_state.replicated = before


# ---- sharding ----------------------------------------------------------------------------------------------
def is_sharded(tensor):
    return hasattr(tensor, "full_tensor")           # a DTensor; importing the class would slow every start


def shard(model, device):
    """Shard a model with FSDP2: each block, and all other weights (embedding and tied head) with the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method
    warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view")    # none is changed in place
    mesh = init_device_mesh(device.type, (dist_state.size,))
    for module in (*model.blocks, model):           # moves the model to the device one block at a time
        fully_shard(module, mesh=mesh)
    register_fsdp_forward_method(model, "hidden_states")    # the head then runs while the root is gathered
    dist_state.replicated = True
    return model


def reshard(model):
    """Free the gathered root after a forward without backward; weights are read and written as slices."""
    if dist_state.replicated and hasattr(model, "reshard"):
        model.reshard()


def full(tensor):
    """The whole of a tensor that may be sharded. All ranks must call this, and all get it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor


def collect(value):
    """A state dict (dicts and lists of tensors) with whole tensors, in CPU memory.

    Sharded tensors are gathered one at a time, on rank 0 only; the other ranks get None in their place.
    """
    if isinstance(value, dict):
        return {key: collect(item) for key, item in value.items()}
    if isinstance(value, list):
        return [collect(item) for item in value]
    if is_sharded(value):
        whole = value.full_tensor()
        return whole.cpu() if dist_state.rank == 0 else None
    return value.cpu() if isinstance(value, torch.Tensor) else value


def scatter(p, value):
    """A whole tensor in the form of parameter p: sharded, if p is."""
    if not is_sharded(p):
        return value
    from torch.distributed.tensor import distribute_tensor
    return distribute_tensor(value.to(p.device), p.device_mesh, p.placements)


def scatter_state(optimiser, state):
    """An optimiser's state dict of whole tensors, with the moments of sharded parameters sharded."""
    params = [p for group in optimiser.param_groups for p in group["params"]]
    scattered = {}
    for i, moments in state["state"].items():
        p = params[i]
        scattered[i] = {name: scatter(p, moment) if moment.shape == p.shape else moment
                        for name, moment in moments.items()}
    return {**state, "state": scattered}


def clip_grad_norm(params, max_norm):
    """torch's clip_grad_norm_, also for a mix of sharded and whole gradients.

    Returns the norm before clipping, a float or a scalar tensor.
    """
    params = [p for p in params if p.grad is not None]
    sharded = [p.grad for p in params if is_sharded(p)]
    whole = [p.grad for p in params if not is_sharded(p)]
    if not sharded:
        return nn.utils.clip_grad_norm_(params, max_norm)
    norms = [full(nn.utils.get_total_norm(grads)).item() for grads in (sharded, whole) if grads]
    norm = math.hypot(*norms)
    if norm > max_norm:
        for grad in sharded + whole:
            grad.mul_(max_norm / (norm + 1e-6))
    return norm
