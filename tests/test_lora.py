"""lora.py against peft (numbers in fixtures/lora, made by make_lora_fixtures.py) and against its promises."""
import copy
import json
import os
import pathlib
import subprocess
import sys
import types

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import lora
from data.checkpoints.safetensors import read_tensors, write_tensors
from data.runtime.files import DataError, UserError, read_json, write_json
from data.checkpoints.peft import fused, is_copy, same_base, targeted
from data.checkpoints.quantization import NF4, QuantizedWeight, QuantProduct
from model import GPT, GPTConfig, generate

HERE = pathlib.Path(__file__).parent
FIXTURES = HERE / "fixtures" / "lora"
CASES = sorted(p.stem for p in FIXTURES.glob("*.npz") if not p.stem.startswith("base_"))
KINDS = {"lora": {}, "rslora": dict(rslora=True), "dora": dict(variant="dora"), "pissa": dict(variant="pissa"),
         "adalora": dict(variant="adalora"), "ia3": dict(variant="ia3", targets=("k", "v", "down"))}
IDS = torch.arange(30).view(3, 10) * 7 % 64                     # any batch will do


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    """{family: Hugging Face folder} of the two tiny bases of the fixtures."""
    out = {}
    for family in ("gpt2", "llama"):
        z = np.load(FIXTURES / f"base_{family}.npz")
        out[family] = tmp_path_factory.mktemp(family)
        (out[family] / "config.json").write_text(str(z["config"]))
        write_tensors(out[family] / "model.safetensors",
                      {k[7:]: torch.from_numpy(z[k]) for k in z.files if k.startswith("tensor/")})
    return out


def case(name):
    z = np.load(FIXTURES / f"{name}.npz")
    return {k: str(v) if v.dtype.kind == "U" else torch.from_numpy(v) for k, v in z.items()}


def folder_of(z, path, prefix="", **changes):
    """Write the adapter folder that peft wrote."""
    path.mkdir(exist_ok=True)
    write_json(path / "adapter_config.json", {**json.loads(z[prefix + "config"]), **changes})
    start = prefix + "tensor/"
    tensors = {k.removeprefix(start): t for k, t in z.items() if k.startswith(start)}
    write_tensors(path / "adapter_model.safetensors", tensors)
    return path


def tensors_of(folder):
    return dict(read_tensors(folder / "adapter_model.safetensors"))


def config_of(folder):
    return read_json(folder / "adapter_config.json")


def loss_of(logits, labels):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def in_their_names(model, value):
    """{peft's parameter name: value(p)}: thirds of a fused c_attn are joined, a shared A is one parameter."""
    out, mine = {}, lora.adapters(model)
    for theirs, paths in fused(model).items():
        group = [mine[p] for p in paths if p in mine]
        for field, p in (group[0].named_parameters() if group else ()):
            ps = [getattr(a, field) for a in group]
            one = all(q is p for q in ps)
            out[f"{theirs}.{field}"] = value(p) if one else torch.cat([value(q) for q in ps])
    return {k: t.detach().clone() for k, t in out.items()}


def close(got, want, tolerance):
    assert (got - want).abs().max() <= tolerance * want.abs().max().clamp_min(1e-6)


def fixed_case(name, bases, path, dtype):
    """A fixture's model with its adapter loaded, and the loss peft reports."""
    z = case(name)
    model = GPT.from_pretrained(bases[name.split("_")[0]], dtype)
    if "pissa" in name:                                         # peft's PiSSA lives on a base of its own
        for theirs, paths in fused(model).items():
            if (W := z.get(f"residual/{theirs}")) is not None:
                W = W.T if name.startswith("gpt2") else W
                for p, part in zip(paths, W.chunk(len(paths))):
                    model.get_submodule(p).weight.data.copy_(part)
    plain = {"init_lora_weights": True} if "pissa" in name else {}
    lora.load_adapter(model, folder_of(z, path / name, **plain))

    def loss(ids=z["ids"], labels=z["labels"]):
        reg = 0.5 * lora.orthogonality(model) if "adalora" in name else 0.0
        return loss_of(model(ids)[0], labels) + reg
    return z, model, loss


def make(bases, family="gpt2", dtype=torch.float32, noise=0.0, **kw):
    model = GPT.from_pretrained(bases[family], dtype)
    lora.inject(model, **{**dict(rank=4), **kw})
    randomise(model, noise)
    return model


def randomise(model, noise, seed=1, name=None):
    g = torch.Generator().manual_seed(seed)
    for p in lora.adapter_parameters(model, name).values():
        p.data.add_(noise * torch.randn(p.shape, generator=g))


def train(model, steps=8, lr=0.05, target=IDS, **kw):
    params = [p for p in model.parameters() if p.requires_grad]
    optimiser, losses = torch.optim.AdamW(params, lr=lr, weight_decay=0.0), []
    for _ in range(steps):
        loss = loss_of(model(IDS)[0], target)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    return losses


# ----------------------------------------------------------------------------------------------- against peft

@pytest.mark.parametrize("name", CASES)
def test_equals_peft_in_float64(name, bases, tmp_path):
    z, model, loss = fixed_case(name, bases, tmp_path, torch.float64)
    close(model(z["ids"])[0], z["logits"], 1e-9)
    close(loss(), z["loss"], 1e-9)
    loss().backward()
    want = {k[5:]: t for k, t in z.items() if k.startswith("grad/")}
    got = in_their_names(model, lambda p: p.grad)
    assert set(got) == set(want)                                # the same parameters learn, and no other
    assert not any(p.requires_grad for n, p in model.named_parameters() if ".adapters." not in n)
    for k in want:
        close(got[k].flatten(), want[k].flatten(), 1e-9)
    params = lora.adapter_parameters(model)
    start = {n: p.detach().clone() for n, p in params.items()}
    torch.optim.SGD(params.values(), lr=0.1).step()
    close(loss(), z["loss_sgd"], 1e-9)
    for n, p in params.items():
        p.data.copy_(start[n])
    torch.optim.AdamW(params.values(), lr=1e-2, weight_decay=0.0).step()
    for k, t in in_their_names(model, lambda p: p).items():
        close(t.flatten(), z["adamw/" + k].flatten(), 1e-9)
    for n, p in params.items():
        p.data.copy_(start[n])
    close(lora.merge(model)(z["ids"])[0], z["merged"], 1e-9)


@pytest.mark.parametrize("name", CASES)
def test_equals_peft_in_float32(name, bases, tmp_path):
    z, model, _ = fixed_case(name, bases, tmp_path, torch.float32)
    assert (model(z["ids"])[0] - z["logits"]).abs().max() < 1e-4
    assert (lora.merge(model)(z["ids"])[0] - z["merged"]).abs().max() < 1e-4


@pytest.mark.parametrize("name, kw", [
    ("gpt2_rslora_all", dict(targets="q,k,v,o,up,down", rslora=True)), ("llama_lora", dict(targets="q,v")),
    ("llama_dora", dict(targets="k,gate", variant="dora")), ("llama_ia3", dict(targets="k,v,down", variant="ia3")),
    ("llama_adalora", dict(targets="q,down", variant="adalora", rank=6)),
    ("llama_head", dict(targets="o,head"))])
def test_inject_builds_what_peft_builds(name, kw, bases, tmp_path):
    def seen(model):
        return {path: (type(a), getattr(a, "scale", None), getattr(a, "inputs", None),
                       {n: p.shape for n, p in a.named_parameters()})
                for path, a in lora.adapters(model).items()}

    _, model, _ = fixed_case(name, bases, tmp_path, torch.float32)
    assert seen(make(bases, name.split("_")[0], **{"alpha": 16, **kw})) == seen(model)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_adalora_run_equals_peft(family, bases, tmp_path):
    z, model, loss = fixed_case(f"{family}_adalora", bases, tmp_path, torch.float64)
    params = lora.adapter_parameters(model)
    optimiser = torch.optim.AdamW(params.values(), lr=2e-2, weight_decay=0.0)
    allocator = lora.RankAllocator(model, 16, target_rank=2, t_i=2, t_f=4, every=2)
    for t in range(16):
        value = loss(z["traj/ids"][t % 4], z["traj/labels"][t % 4])
        close(value, z["traj/loss"][t], 1e-9)
        value.backward()
        optimiser.step()
        allocator.update(t)
        optimiser.zero_grad()
        assert allocator.report()["budget"] == z["traj/budget"][t]
        if t == 7:
            name_of = {id(p): n for n, p in params.items()}
            for which, mine in (("I", allocator.I), ("U", allocator.U)):
                for k, v in in_their_names(model, lambda p: mine[name_of[id(p)]]).items():
                    close(v, z[f"traj/{which}/{k}"], 1e-9)
    final = in_their_names(model, lambda p: p)
    for k, v in final.items():
        close(v, z["traj/final/" + k], 1e-9)
        if k.endswith("lora_E"):
            assert torch.equal(v[:, 0] != 0, z["traj/keep/" + k])
    assert sum(allocator.report()["ranks"].values()) == 8
    close(model(z["traj/ids"][0])[0], z["traj/logits"], 1e-9)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_reads_pruned_adalora_of_peft(family, bases, tmp_path):
    z = case(f"{family}_adalora")
    model = GPT.from_pretrained(bases[family])
    lora.load_adapter(model, folder_of(z, tmp_path / "a", "traj/"))
    assert (model(z["traj/ids"][0])[0] - z["traj/logits"]).abs().max() < 1e-5
    ranks = {k: int(v.sum()) for k, v in z.items() if k.startswith("traj/keep/")}
    if family == "gpt2":                                        # a lucky seed: one module has no rank left
        assert 0 in ranks.values()


@pytest.mark.parametrize("targets", ["all-linear", r".*\.(c_attn|c_proj|c_fc)", ["c_attn", "c_proj", "c_fc"]])
def test_target_modules_are_read_as_peft_does(targets, bases, tmp_path):
    z, model = case("gpt2_rslora_all"), GPT.from_pretrained(bases["gpt2"])
    lora.load_adapter(model, folder_of(z, tmp_path / "a", target_modules=targets))
    assert (model(z["ids"])[0] - z["logits"]).abs().max() < 1e-4
    with pytest.raises(DataError, match="belongs to nothing"):
        lora.load_adapter(GPT.from_pretrained(bases["gpt2"]), folder_of(
            z, tmp_path / "b", target_modules=targets, layers_to_transform=[1]))
    with pytest.raises(DataError, match="belongs to nothing"):
        lora.load_adapter(GPT.from_pretrained(bases["gpt2"]), folder_of(
            z, tmp_path / "b", target_modules=targets, exclude_modules=["mlp.c_proj"]))


def test_pissa_start_is_pefts(bases):
    z, model = case("llama_pissa"), GPT.from_pretrained(bases["llama"])
    before = copy.deepcopy(model.state_dict())
    lora.inject(model, ("q", "down"), rank=4, alpha=16, variant="pissa")
    for theirs, (path,) in fused(model).items():
        if f"residual/{theirs}" in z:
            a, W = lora.adapters(model)[path], before[path + ".weight"]
            close(4 * a.lora_B0 @ a.lora_A0, W - z[f"residual/{theirs}"], 1e-5)
            best = torch.linalg.svdvals(W)[4:].square().sum().sqrt()
            close((W - 4 * a.lora_B0 @ a.lora_A0).norm(), best, 1e-4)       # no rank 4 matrix is nearer


def test_pissa_learns_as_pefts(bases, tmp_path):
    """W - s B0 A0 + s B A: a frozen residual in peft, a frozen second branch here; the same gradients."""
    z, model, _ = fixed_case("llama_pissa", bases, tmp_path, torch.float64)
    ours = GPT.from_pretrained(bases["llama"], torch.float64)
    lora.inject(ours, ("q", "down"), rank=4, alpha=16, variant="pissa")
    for path, a in lora.adapters(ours).items():
        theirs = lora.adapters(model)[path]
        for mine, t in ((a.lora_A, theirs.lora_A), (a.lora_B, theirs.lora_B), (a.lora_A0, theirs.lora_A),
                        (a.lora_B0, theirs.lora_B)):
            mine.data.copy_(t.data)
    loss_of(ours(z["ids"])[0], z["labels"]).backward()
    for k, g in in_their_names(ours, lambda p: p.grad).items():
        close(g, z["grad/" + k], 1e-5)                          # their residual was rounded to float32


# ----------------------------------------------------------------------------------- what every kind promises

@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_starts_at_the_base_and_goes_back(kind, family, bases):
    base = GPT.from_pretrained(bases[family])
    want, frozen = base(IDS)[0], copy.deepcopy(base.state_dict())
    model = make(bases, family, **KINDS[kind])
    assert torch.equal(model(IDS)[0], want)                     # exactly
    losses = train(model, target=(IDS + 1) % 64)
    assert losses[-1] < losses[0] - 0.02                        # a fixed batch is learned
    assert not torch.equal(model(IDS)[0], want)
    with lora.disable_adapter(model):
        assert torch.equal(model(IDS)[0], want)
    for n, t in frozen.items():                                 # no base name changed, no base bit moved
        assert torch.equal(model.state_dict()[n], t)


@pytest.mark.parametrize("kind", KINDS)
def test_all_of_the_adapter_learns_and_nothing_else(kind, bases):
    model = make(bases, **KINDS[kind])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    train(model, 3)
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved == set(lora.adapter_parameters(model))
    fields = {"lora_A", "lora_B", "lora_E", "lora_magnitude_vector", "ia3_l"}
    assert {n.rpartition(".")[2] for n in moved} <= fields


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_merged_equals_unmerged(kind, family, bases):
    words = {"targets": ("q", "k", "v", "o", "up", "down")} if kind != "ia3" else {}
    model = make(bases, family, noise=0.1, **{**KINDS[kind], **words})
    before, want = copy.deepcopy(model.state_dict()), model(IDS)[0]
    merged = lora.merge(model)
    assert (merged(IDS)[0] - want).abs().max() < 2e-5
    assert not any(isinstance(m, lora.LoRALinear) for m in merged.modules())
    assert all(torch.equal(t, model.state_dict()[n]) for n, t in before.items())        # a copy, really
    assert torch.equal(model(IDS)[0], want)
    with pytest.raises(UserError, match="nothing to merge"):
        lora.merge(merged)
    with lora.disable_adapter(model), pytest.raises(UserError, match="nothing to merge"):
        lora.merge(model)


@pytest.mark.parametrize("family", ["gpt2", "llama"])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_and_loaded(kind, family, bases, tmp_path):
    model = make(bases, family, noise=0.1, dropout=0.0 if kind == "ia3" else 0.1, **KINDS[kind]).eval()
    lora.save_adapter(model, tmp_path, base=str(bases[family]))
    again = GPT.from_pretrained(bases[family]).eval()
    assert lora.load_adapter(again, tmp_path) == {}
    assert (again(IDS)[0] - model(IDS)[0]).abs().max() < (1e-5 if kind == "pissa" else 1e-7)
    mine, theirs = lora.adapter_parameters(model), lora.adapter_parameters(again)
    assert list(mine) == list(theirs) and all(p.requires_grad for p in theirs.values())
    tensors, numel = tensors_of(tmp_path), sum(p.numel() for p in mine.values())
    if kind == "pissa":                                         # the exact change: a LoRA of twice the rank
        assert config_of(tmp_path)["r"] == (16 if family == "gpt2" else 8)
    elif family == "llama":                                     # only what was trained is in the file
        assert sum(t.numel() for t in tensors.values()) == numel > 0
        assert all(torch.equal(a, b) for a, b in zip(mine.values(), theirs.values()))
    config = config_of(tmp_path)
    assert config["base_model_name_or_path"] == str(bases[family]) and config["task_type"] == "CAUSAL_LM"
    if kind != "ia3":
        assert config["lora_dropout"] == 0.1
        assert all(a.drop.p == 0.1 for a in lora.adapters(again).values())
    lora.save_adapter(again, tmp_path / "2", base=str(bases[family]))       # and what we read, we write again
    for n, t in tensors_of(tmp_path / "2").items():
        assert torch.equal(t, tensors[n])


def test_an_untrained_adapter_keeps_its_shape(bases, tmp_path):
    for kind in KINDS:
        model = make(bases, **KINDS[kind])
        lora.save_adapter(model, tmp_path / kind)
        again = GPT.from_pretrained(bases["gpt2"])
        lora.load_adapter(again, tmp_path / kind)
        assert list(lora.adapter_parameters(again)) == list(lora.adapter_parameters(model))


# ----------------------------------------------------------------------------------------------- fused c_attn

def test_q_and_v_become_blocks_of_c_attn(bases, tmp_path):
    model = make(bases, noise=0.1, rank=4, alpha=16)
    lora.save_adapter(model, tmp_path)
    t, config = tensors_of(tmp_path), config_of(tmp_path)
    A, B = (t[f"base_model.model.transformer.h.0.attn.c_attn.lora_{x}.weight"] for x in "AB")
    q, v = (model.blocks[0].attn.get_submodule(x).adapters["default"] for x in "qv")
    assert config["r"] == 8 and config["lora_alpha"] == 32 and config["target_modules"] == [
        "transformer.h.0.attn.c_attn", "transformer.h.1.attn.c_attn"]
    assert torch.equal(A, torch.cat((q.lora_A, v.lora_A)))
    assert torch.equal(B[:32, :4], q.lora_B) and torch.equal(B[64:, 4:], v.lora_B)
    assert not B[:32, 4:].any() and not B[32:64].any() and not B[64:, :4].any()
    (tmp_path / "run.json").unlink()                            # peft's own two files say it as one shared A
    again = GPT.from_pretrained(bases["gpt2"])
    lora.load_adapter(again, tmp_path)
    assert (again(IDS)[0] - model(IDS)[0]).abs().max() < 1e-6
    assert "blocks.0.attn.k" in lora.adapters(again)


def test_blocks_trained_by_others_are_not_cut(bases, tmp_path):
    model = make(bases, noise=0.1)
    lora.save_adapter(model, tmp_path)
    t = {k: v.clone() for k, v in tensors_of(tmp_path).items()}
    t["base_model.model.transformer.h.0.attn.c_attn.lora_B.weight"][40, 0] = 1.0        # k learned something
    write_tensors(tmp_path / "adapter_model.safetensors", t)
    again = GPT.from_pretrained(bases["gpt2"])
    lora.load_adapter(again, tmp_path)
    assert "blocks.0.attn.k" in lora.adapters(again) and "blocks.1.attn.k" not in lora.adapters(again)
    close(lora.merge(again).blocks[0].attn.k.weight[8],
          GPT.from_pretrained(bases["gpt2"]).blocks[0].attn.k.weight[8] + 4 * t[
              "base_model.model.transformer.h.0.attn.c_attn.lora_A.weight"][0], 1e-5)
    lora.save_adapter(make(bases, noise=0.1, **KINDS["ia3"]), tmp_path / "ia3")
    t = {k: v.clone() for k, v in tensors_of(tmp_path / "ia3").items()}
    t["base_model.model.transformer.h.0.attn.c_attn.ia3_l"][3] = 2.0                # q learned something
    write_tensors(tmp_path / "ia3" / "adapter_model.safetensors", t)
    again = GPT.from_pretrained(bases["gpt2"])
    lora.load_adapter(again, tmp_path / "ia3")
    assert "blocks.0.attn.q" in lora.adapters(again) and "blocks.1.attn.q" not in lora.adapters(again)


def test_one_shared_A_stays_one(bases, tmp_path):
    z, model, _ = fixed_case("gpt2_lora", bases, tmp_path, torch.float32)
    q, k, v = (model.blocks[0].attn.get_submodule(x).adapters["default"] for x in "qkv")
    assert q.lora_A is k.lora_A is v.lora_A
    lora.save_adapter(model, tmp_path / "again")
    for n, t in tensors_of(tmp_path / "again").items():
        assert torch.equal(t, z["tensor/" + n])                 # rank 4 in, rank 4 out
    assert lora.merge(copy.deepcopy(model))(IDS)[0].isfinite().all()
    attn = copy.deepcopy(model).blocks[0].attn
    assert attn.q.adapters["default"].lora_A is attn.k.adapters["default"].lora_A


def test_other_scales_in_one_fused_module(bases, tmp_path):
    ranks = {"q": 2, "blocks.1.attn.v": 1}
    model = make(bases, noise=0.1, targets=("q", "k", "v", "o"), rank_pattern=ranks, alpha=16)
    assert [a.scale for a in lora.adapters(model).values()][:4] == [8, 4, 4, 4]
    assert lora.adapters(model)["blocks.1.attn.v"].lora_A.shape == (1, 32)
    for kind in ("lora", "dora", "adalora"):
        model = make(bases, noise=0.1, targets=("q", "v", "o"), rank_pattern=ranks, **KINDS[kind])
        lora.save_adapter(model, tmp_path / kind)
        again = GPT.from_pretrained(bases["gpt2"])
        lora.load_adapter(again, tmp_path / kind)
        assert (again(IDS)[0] - model(IDS)[0]).abs().max() < 2e-5
        assert [len(a.lora_A) for a in lora.adapters(again).values()] == [2, 4, 4, 2, 1, 4]


# ------------------------------------------------------------------------------------- strict, with sentences

def broken(change, tmp_path, bases, error, family="llama", kind="lora", **kw):
    """Save a sound adapter, let `change` spoil its config and tensors, and expect that sentence."""
    model = make(bases, family, noise=0.1, **KINDS[kind])
    lora.save_adapter(model, tmp_path)
    config, tensors = config_of(tmp_path), tensors_of(tmp_path)
    change(config, tensors)
    write_json(tmp_path / "adapter_config.json", config)
    write_tensors(tmp_path / "adapter_model.safetensors", tensors)
    fresh = GPT.from_pretrained(bases[family])
    before = {n for n, _ in fresh.named_parameters()}
    with pytest.raises(DataError, match=error) as e:
        lora.load_adapter(fresh, tmp_path, **kw)
    assert e.value.code == 65 and "\n" not in str(e.value)
    assert {n for n, _ in fresh.named_parameters()} == before           # nothing half done
    return e


HERE_IS = "base_model.model."
KEY = HERE_IS + "model.layers.1.self_attn.v_proj.lora_"
HEAD = {HERE_IS + "lm_head.weight": torch.ones(64, 32)}


@pytest.mark.parametrize("change, error", [
    (lambda c, t: t.pop(KEY + "B.weight"), "layers.1.self_attn.v_proj.lora_B.weight is missing"),
    (lambda c, t: [t.pop(KEY + x + ".weight") for x in "AB"], "v_proj.lora_A.weight is missing"),
    (lambda c, t: t.update({KEY.replace("1", "7") + "A.weight": torch.ones(4, 32)}),
     "layers.7.self_attn.v_proj.lora_A.weight belongs to nothing"),
    (lambda c, t: t.update({KEY + "A.weight": torch.ones(4, 31)}), r"A of .* \[4, 31\], .* for \[4, 32\]"),
    (lambda c, t: c.update(r=3), r"lora_A of .* \[4, 32\], .* for \[3, 32\]"),
    (lambda c, t: c.update(r="4"), '"r" is "4", and a whole number belongs there'),
    (lambda c, t: c.update(lora_alpha=float("inf")), '"lora_alpha" is Infinity, and a finite number belongs'),
    (lambda c, t: c.update(rank_pattern={".*": -4}, use_rslora=True), "makes no sense"),
    (lambda c, t: c.update(r=0), r"lora_A of .* is \[4, 32\]|makes no sense"),
    (lambda c, t: c.update(rank_pattern=[1]), r'"rank_pattern" is .1., and an object belongs'),
    (lambda c, t: c.update(target_modules="("), "makes no sense"),
    (lambda c, t: c.update(target_modules=["c_attn"]), "c_attn.* matches nothing in this model"),
    (lambda c, t: c.update(peft_type="LOHA"), "peft_type 'LOHA' is not read as an adapter of Linears; LORA, "),
    (lambda c, t: c.update(init_lora_weights="pissa"), "init_lora_weights is 'pissa'"),
    (lambda c, t: c.update(init_lora_weights="loftq"), "init_lora_weights is 'loftq'"),
    (lambda c, t: c.update(bias="all"), "bias is 'all'"),
    (lambda c, t: t.update({HERE_IS + "model.norm.weight": torch.ones(32)}), "norm.weight belongs to"),
    (lambda c, t: t.update(HEAD), "lm_head.weight belongs"),
    (lambda c, t: (c.update(modules_to_save=["lm_head"]), t.update(HEAD)), "lm_head.weight belongs"),
])
def test_a_broken_folder_is_refused(change, error, bases, tmp_path):
    broken(change, tmp_path, bases, error)


@pytest.mark.parametrize("init", [True, False, "gaussian", "eva", "orthogonal", "mica"])
def test_a_start_that_leaves_the_base_alone_is_read(init, bases, tmp_path):
    """peft's other starts (pissa, olora, corda, loftq, lora_ga) subtract A and B from the base weights."""
    model = make(bases, noise=0.1)
    lora.save_adapter(model, tmp_path)
    write_json(tmp_path / "adapter_config.json", {**config_of(tmp_path), "init_lora_weights": init})
    again = GPT.from_pretrained(bases["gpt2"])
    lora.load_adapter(again, tmp_path)
    assert torch.equal(again(IDS)[0], model(IDS)[0])


@pytest.mark.parametrize("text", ["[]", "null", "7", '"LORA"'])
def test_an_adapter_config_that_is_no_object(text, bases, tmp_path):
    lora.save_adapter(make(bases), tmp_path)
    (tmp_path / "adapter_config.json").write_text(text)
    with pytest.raises(DataError, match="adapter_config.json holds .*, and an object belongs there"):
        lora.load_adapter(GPT.from_pretrained(bases["gpt2"]), tmp_path)


def test_another_base_is_refused_unless_forced(bases, tmp_path):
    model = make(bases, noise=0.1)
    lora.save_adapter(model, tmp_path, base="the-right-one")
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):     # the same base, cast
        again = GPT.from_pretrained(bases["gpt2"], dtype)
        lora.load_adapter(again, tmp_path)
        wide = torch.promote_types(dtype, torch.float32)
        assert all(p.dtype == wide for p in lora.adapter_parameters(again).values())
    codes = GPT.from_pretrained(bases["gpt2"])
    lora.quantize(codes, "nf4")                                                 # the same base, in codes
    assert same_base(lora.base_fingerprint(codes), lora.base_fingerprint(model))
    lora.load_adapter(codes, tmp_path)
    other = GPT.from_pretrained(bases["gpt2"])
    other.blocks[1].mlp.up.weight.data += 1e-3
    with pytest.raises(DataError, match="another base than the one loaded here .it names the-right-one"):
        lora.load_adapter(other, tmp_path)
    lora.load_adapter(other, tmp_path, force=True)
    with pytest.raises(DataError):
        lora.load_adapter(GPT.from_pretrained(bases["llama"]), tmp_path, force=True)    # shapes never


def test_a_copy_of_the_heads_weight_is_no_surprise(bases, tmp_path):
    """peft stores lm_head's own weight beside its adapter; equal to ours it is dropped, else refused."""
    z = case("llama_head")
    extra = "tensor/base_model.model.lm_head.base_layer.weight"
    assert extra in z
    lora.load_adapter(GPT.from_pretrained(bases["llama"]), folder_of(z, tmp_path / "same"))
    lora.load_adapter(GPT.from_pretrained(bases["llama"], torch.bfloat16), folder_of(z, tmp_path / "same"))
    z[extra] = z[extra] + 1
    with pytest.raises(DataError, match="lm_head.base_layer.weight belongs to nothing"):
        lora.load_adapter(GPT.from_pretrained(bases["llama"]), folder_of(z, tmp_path / "else"))


def test_pickles_are_not_read(bases, tmp_path):
    lora.save_adapter(make(bases), tmp_path)
    torch.save({"x": torch.ones(1)}, tmp_path / "adapter_model.safetensors")
    with pytest.raises(DataError, match="pickle"):
        lora.load_adapter(GPT.from_pretrained(bases["gpt2"]), tmp_path)


def test_a_head_of_ones_own_travels_in_the_file(bases, tmp_path):
    model, score = make(bases, noise=0.1), torch.randn(1, 32)
    lora.save_adapter(model, tmp_path, extra={"score.weight": score})
    assert config_of(tmp_path)["task_type"] == "SEQ_CLS"
    extra = lora.load_adapter(GPT.from_pretrained(bases["gpt2"]), tmp_path)
    assert list(extra) == ["score.weight"] and torch.equal(extra["score.weight"], score)


@pytest.mark.parametrize("kw, error", [
    (dict(targets="qv"), "'qv' matches nothing in this model; it has q k v o up down head"),
    (dict(targets=("q", "gate")), "'gate' matches nothing"),
    (dict(targets=()), "are no modules at all"),
    (dict(rank=0), "rank 0 does not fit blocks.0.attn.q; it takes 1 to 32"),
    (dict(rank=33), "rank 33 does not fit"),
    (dict(rank_pattern={"w": 1}), "'w' matches nothing"),
    (dict(alpha=-1), "alpha must be positive"),
    (dict(dropout=1.0), "dropout in"),
    (dict(layers=[1, 2]), "no block 2 in this model; layers go from 0 to 1"),
    (dict(layers=[]), "are no modules at all"),
    (dict(variant="foo"), "known are " + ", ".join(v.name for v in lora.VARIANTS)),
    (dict(variant="adalora", rslora=True), "adalora has no use for rslora"),
    (dict(variant="ia3", dropout=0.1), "ia3 has no use for dropout"),
    (dict(name="a.b"), "cannot name an adapter"),
    (dict(name="values"), "cannot name an adapter"),
    (dict(rank="8"), "'8' has the wrong type; targets are words, ranks, layers .a list. and seed whole numbers"),
    (dict(rank=4.0), "4.0 has the wrong type"), (dict(alpha="16"), "'16' has the wrong type"),
    (dict(rank_pattern={"q": "4"}), "'4' has the wrong type"), (dict(layers=1), "1 has the wrong type"),
    (dict(layers="01"), "'0' has the wrong type"), (dict(seed=None), "None has the wrong type"),
    (dict(targets=None), "targets are None"), (dict(rank_pattern="q=4"), "rank_pattern 'q=4'; .* a dict"),
    (dict(foo=1), "no foo, nor has the variant lora; it has none"), (dict(name=3), "3 cannot name an adapter"),
    (dict(targets=[1]), "1 has the wrong type"), (dict(dropout=None), "None has the wrong type"),
])
def test_a_wrong_request_is_a_sentence(kw, error, bases):
    with pytest.raises(UserError, match=error) as e:
        lora.inject(GPT.from_pretrained(bases["gpt2"]), **kw)
    assert e.value.code == 2 and "\n" not in str(e.value)


class Scaled(lora.LoRA):
    """s D A^T R B^T: R is trained, and no field of peft's file."""
    name = "scaled"
    groups = (*lora.LoRA.groups, lora.Group("lora_R", decay=False))

    def __init__(self, linear, *args, **settings):
        super().__init__(linear, *args, **settings)
        self.lora_R = lora.new_parameter(linear, torch.ones(len(self.lora_A)))

    def forward(self, x, linear):
        return linear.base_forward(x) + self.branch(x, self.lora_A * self.lora_R[:, None], self.lora_B)


class ScaledFactors(Scaled):
    forward = lora.LoRA.forward

    def factors(self):
        return self.lora_A * self.lora_R[:, None], self.lora_B


class ScaledDoRA(lora.DoRA):
    name = "scaled"

    def forward(self, x, linear):
        return linear.base_forward(x) + 2 * (super().forward(x, linear) - linear.base_forward(x))


class ScaledAlone(Scaled):
    peft_type = None


@pytest.mark.parametrize("variant, refused", [(Scaled, True), (ScaledDoRA, True), (ScaledFactors, False),
                                              (ScaledAlone, False)])
def test_a_variant_that_its_file_would_change_is_refused(variant, refused, bases, monkeypatch):
    monkeypatch.setattr(lora, "VARIANTS", (*lora.VARIANTS, variant))
    model = GPT.from_pretrained(bases["llama"])
    if not refused:
        lora.inject(model, variant="scaled")
        return
    with pytest.raises(UserError, match=f"{variant.__name__}: peft's file of it would lose a part"):
        lora.inject(model, variant="scaled")


def test_targets_layers_and_counts(bases):
    model = make(bases, "llama", targets="q,gate,head", layers=[1])
    assert list(lora.adapters(model)) == ["blocks.1.attn.q", "blocks.1.mlp.gate", "head"]
    model = make(bases, targets=("q", "k", "v", "o", "up", "down"), rank=8)
    assert sum(p.numel() for p in lora.adapter_parameters(model).values()) == 2 * 8 * 32 * (2 * 4 + 5 + 5)
    with torch.device("meta"):                                  # GPT-2 small, q and v, r = 8
        small = GPT(GPTConfig(50257, 1024, 12, 12, 768))
    assert lora.inject(small, layers=[1], name="one") == ["blocks.1.attn.q", "blocks.1.attn.v"]  # not 10
    lora.inject(small)
    assert sum(p.numel() for p in lora.adapter_parameters(small, "default").values()) == 294912


# ------------------------------------------------------------------------------- behaviour inside the network

def test_several_adapters_on_one_base(bases):
    base = GPT.from_pretrained(bases["gpt2"])
    model = make(bases, name="policy", noise=0.1)
    policy = model(IDS)[0].detach()
    lora.inject(model, ("up", "down"), variant="ia3", name="value")
    randomise(model, 0.3, name="value")
    value = model(IDS)[0].detach()                              # the newest is live
    for first in ("policy", "value"):
        with lora.use_adapter(model, first):
            assert torch.equal(model(IDS)[0], policy if first == "policy" else value)
            with lora.disable_adapter(model):
                assert torch.equal(model(IDS)[0], base(IDS)[0])
            assert torch.equal(model(IDS)[0], policy if first == "policy" else value)
    with pytest.raises(RuntimeError), lora.use_adapter(model, "policy"):
        raise RuntimeError                                      # a signal may leave a context anywhere
    assert torch.equal(model(IDS)[0], value)
    with lora.use_adapter(model, "policy"):
        model(IDS)[0].sum().backward()
    assert all((p.grad is not None) == (".policy." in n) for n, p in lora.adapter_parameters(model).items())
    names = [*lora.adapter_parameters(model, "policy"), *lora.adapter_parameters(model, "value")]
    assert sorted(names) == sorted(lora.adapter_parameters(model))
    with pytest.raises(UserError, match="no adapter called 'critic'"), lora.use_adapter(model, "critic"):
        pass
    with pytest.raises(UserError, match="already has an adapter called 'policy'"):
        lora.inject(model, name="policy")
    with lora.use_adapter(model, "policy"):
        assert (lora.merge(model)(IDS)[0] - policy).abs().max() < 1e-5


def test_named_adapters_save_apart(bases, tmp_path):
    model = make(bases, name="policy", noise=0.1)
    lora.inject(model, ("q", "o"), variant="dora", name="value")
    randomise(model, 0.1, name="value")
    again = GPT.from_pretrained(bases["gpt2"])
    for name in ("policy", "value"):
        lora.save_adapter(model, tmp_path / name, name=name)
        lora.load_adapter(again, tmp_path / name, name=name, trainable=name == "policy")
    for name in ("policy", "value"):
        with lora.use_adapter(model, name), lora.use_adapter(again, name):
            assert (model(IDS)[0] - again(IDS)[0]).abs().max() < 1e-6
        params = lora.adapter_parameters(again, name).values()
        assert params and all(p.requires_grad == (name == "policy") for p in params)
    with pytest.raises(UserError, match="no adapter called 'reward' to save"):
        lora.save_adapter(model, tmp_path / "x", name="reward")


@pytest.mark.parametrize("kind", ["lora", "pissa", "dora", "adalora"])
def test_dropout_is_on_the_branch_only(kind):
    linear, x = lora.wrap_linear(torch.nn.Linear(16, 8)), torch.randn(5, 16)
    a = linear.adapters["default"] = lora.variant_called(kind)(linear, 4, 2.0, 0.5)
    for p in a.parameters():
        p.data += 0.3 * torch.randn_like(p)
    linear.active = "default"
    torch.manual_seed(3)
    y = linear(x)
    torch.manual_seed(3)
    A, B = (a.lora_A, a.lora_B) if kind == "pissa" else a.factors()
    want = linear.base_forward(x) + 2 * F.dropout(x, 0.5) @ A.T @ B.T
    if kind == "pissa":
        want = want - 2 * x @ a.lora_A0.T @ a.lora_B0.T
    if kind == "dora":
        want = a.gain(linear.weight) * (want - linear.bias) + linear.bias
    close(y, want, 1e-5)
    assert not torch.equal(y, linear(x))
    linear.eval()
    assert torch.equal(linear(x), linear(x))


def test_new_modules_inherit_training_mode(bases):
    model = GPT.from_pretrained(bases["gpt2"]).eval()
    lora.inject(model, dropout=0.5)
    randomise(model, 0.1)
    assert torch.equal(model(IDS)[0], model(IDS)[0])
    model.train()
    assert not torch.equal(model(IDS)[0], model(IDS)[0])


def test_the_global_generator_is_not_touched(bases, tmp_path):
    model, state = GPT.from_pretrained(bases["gpt2"]), torch.get_rng_state()
    for kind in KINDS:
        lora.inject(model, name=kind, **KINDS[kind])
        lora.save_adapter(model, tmp_path / kind, name=kind)
        lora.load_adapter(GPT.from_pretrained(bases["gpt2"]), tmp_path / kind)
    lora.merge(model)
    assert torch.equal(state, torch.get_rng_state())
    one, two, three = (make(bases, seed=s) for s in (1, 1, 2))
    name = "blocks.0.attn.q.adapters.default.lora_A"
    assert torch.equal(one.state_dict()[name], two.state_dict()[name])
    assert not torch.equal(one.state_dict()[name], three.state_dict()[name])
    assert one.state_dict()[name].abs().max() <= 32 ** -0.5


def test_no_backward_below_the_lowest_adapter(bases):
    model, seen = make(bases, layers=[1]), {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda m, a, out, i=i: seen.update({i: out[0].requires_grad}))
    model(IDS)[0].sum().backward()
    assert seen == {0: False, 1: True}


class Shapes(TorchDispatchMode):
    """The shapes of all floating-point results computed inside."""
    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, f, types, args=(), kwargs=None):
        out, same = f(*args, **(kwargs or {})), "view" in str(f) or str(f) == "aten.t.default"
        if isinstance(out, torch.Tensor) and out.is_floating_point() and not same:
            self.seen.add(tuple(out.shape))
        return out


@pytest.mark.parametrize("kind", KINDS)
def test_no_dense_delta_in_forward_or_backward(kind, bases):
    model = make(bases, noise=0.1, **{**KINDS[kind], "targets": ("down",)})
    with Shapes() as shapes:
        model(IDS)[0].sum().backward()
    assert (3, 10, 128) in shapes.seen                          # it does look
    assert not {(32, 128), (128, 32)} & shapes.seen


@pytest.mark.parametrize("kind", KINDS)
def test_checkpointing_changes_no_gradient(kind, bases):
    """With a frozen embedding no input of a block asks for a gradient; its adapters must learn even so."""
    model, grads = make(bases, noise=0.1, **KINDS[kind]), []
    for checkpoint in (False, True):
        model.zero_grad()
        model.logits(model.hidden_states(IDS, gradient_checkpointing=checkpoint)[0]).sum().backward()
        grads.append([p.grad.clone() for p in lora.adapter_parameters(model).values()])
    assert all(torch.equal(a, b) for a, b in zip(*grads))


@pytest.mark.parametrize("kind", KINDS)
def test_decoding_with_a_cache_equals_without(kind, bases):
    model = make(bases, "llama", noise=0.1, **KINDS[kind]).eval()
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    for prompt, new in zip(prompts, generate(model, prompts, 6, temperature=0)):
        seq = list(prompt)
        for token in new:
            assert model(torch.tensor([seq]))[0][0, -1].argmax() == token
            seq.append(token)


# -------------------------------------------------------------------------------------------------- precision

@pytest.mark.parametrize("kind", KINDS)
def test_adapters_stay_float32_on_a_half_base(kind, bases):
    full = make(bases, noise=0.1, **KINDS[kind])
    half = copy.deepcopy(full).bfloat16()                       # even a cast of the whole model leaves them
    for (n, p), q in zip(lora.adapter_parameters(full).items(), lora.adapter_parameters(half).values()):
        assert q.dtype == torch.float32 and torch.equal(p, q), n
    assert half.blocks[0].attn.q.weight.dtype == half(IDS)[0].dtype == torch.bfloat16
    assert (half(IDS)[0].float() - full(IDS)[0]).abs().max() < 0.1
    made = GPT.from_pretrained(bases["gpt2"], torch.bfloat16)
    want = made(IDS)[0]
    lora.inject(made, **KINDS[kind])
    assert all(p.dtype == torch.float32 for p in lora.adapter_parameters(made).values())
    assert torch.equal(made(IDS)[0], want)                      # a no-op start in bf16, too
    assert train(made)[-1] < loss_of(want, IDS)
    merged = lora.merge(made)
    assert all(p.dtype == torch.float32 for p in merged.parameters())
    with torch.autocast("cpu", torch.bfloat16):
        y = full(IDS)[0]
    assert y.dtype == torch.bfloat16 and (y.float() - full(IDS)[0]).abs().max() < 0.1


def test_dora_norms_are_not_rounded_by_autocast(bases):
    model = make(bases, variant="dora", noise=0.3)
    for path, a in lora.adapters(model).items():
        W = model.get_submodule(path).weight
        with torch.autocast("cpu", torch.bfloat16):
            got = a.gain(W)
        close(got, a.lora_magnitude_vector / (W + 4 * a.lora_B @ a.lora_A).norm(dim=1), 1e-5)


def test_a_small_delta_survives_merging(bases):
    """In bf16 a delta of a thousandth would drown: the merge is fp32, and keeps all of it."""
    model = make(bases, dtype=torch.bfloat16, targets=("up",))
    for a in lora.adapters(model).values():
        a.lora_B.data.normal_(0, 2e-5)
    W, merged = model.blocks[0].mlp.up.weight, lora.merge(model).blocks[0].mlp.up.weight
    a = model.blocks[0].mlp.up.adapters["default"]
    close(merged - W.float(), a.scale * a.lora_B @ a.lora_A, 1e-2)
    assert ((merged.bfloat16() == W).float().mean() > 0.5)      # what bf16 would have left unchanged


# NF4 as printed in QLoRA, appendix E
PRINTED = [-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
           -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725,
           0.24611230194568634, 0.33791524171829224, 0.44070982933044434, 0.5626170039176941,
           0.7229568362236023, 1.0]


def test_codes():
    assert (NF4 - torch.tensor(PRINTED, dtype=torch.float64)).abs().max() < 2e-7
    w = torch.randn(300, 70, generator=torch.Generator().manual_seed(0))        # the last block is padded
    for kind, double, error, bits in (("int8", False, 0.007, 8.5), ("nf4", False, 0.096, 4.5),
                                      ("nf4", True, 0.096, 4.13)):
        q = QuantizedWeight(w, kind, double)
        r = q(torch.float32)
        assert r.shape == w.shape and error / 2 < (r - w).norm() / w.norm() < error
        assert abs(q.bits() / w.numel() - bits) < 0.1
        again = QuantizedWeight(r, kind)                              # what is on the grid stays there
        assert (again(torch.float32) - r).abs().max() < (1e-6 if not double else 0.05)
        assert torch.equal(copy.deepcopy(q).bfloat16()(torch.float32), r)       # a cast rounds no scale
    flat, r = w.flatten(), QuantizedWeight(w, "nf4")(torch.float32).flatten()
    top, grid = flat[:64].abs().max(), torch.tensor(PRINTED)
    for i in range(64):                                         # the nearest code, by the naive search
        close(r[i], top * grid[(grid - flat[i] / top).abs().argmin()], 1e-5)
    assert not QuantizedWeight(torch.zeros(4, 64), "nf4")(torch.float32).any()
    w = torch.randn(512, 64) * torch.randn(512, 1).mul(3).exp()         # small maxima between large ones
    assert (QuantizedWeight(w, "nf4", double=True)(torch.float32) * w >= 0).all()     # no weight changes its sign


@pytest.mark.parametrize("kind, bits", [("int8", 8.5), ("nf4", 4.5)])
def test_quantised_base(kind, bits, bases):
    model = GPT.from_pretrained(bases["gpt2"])
    assert lora.quantize(model, kind) == bits
    dense = GPT.from_pretrained(bases["gpt2"])
    for path, m in lora.linears(model).items():
        if path != "head":
            assert m.weight is None
            dense.get_submodule(path).weight.data.copy_(lora.dequantized_weight(m, torch.float32))
    assert torch.equal(model(IDS)[0], dense(IDS)[0])
    for m in (model, dense):
        lora.inject(m, ("q", "v", "down"), rank=4)
        randomise(m, 0.1)
        loss_of(m(IDS)[0], IDS).backward()
    for p, q in zip(lora.adapter_parameters(model).values(), lora.adapter_parameters(dense).values()):
        close(p.grad, q.grad, 1e-5)
    codes = {n: b.clone() for n, b in model.named_buffers()}
    train(model, 3)
    assert all(torch.equal(b, codes[n]) for n, b in model.named_buffers()) and codes
    merged = lora.merge(model)                                  # into the weights it was trained against
    assert (merged(IDS)[0] - model(IDS)[0]).abs().max() < 1e-5
    assert torch.equal(merged.blocks[0].attn.k.weight, dense.blocks[0].attn.k.weight)


def test_quantised_with_every_kind(bases):
    for kind, kw in KINDS.items():
        model = GPT.from_pretrained(bases["llama"])
        assert lora.quantize(model, "nf4", double=True) < 6     # tiny matrices: padding shows; see test_codes
        want = model(IDS)[0]
        lora.inject(model, rank=4, **{k: v for k, v in kw.items()})
        assert torch.equal(model(IDS)[0], want), kind
        losses = train(model, 6)
        assert losses[-1] < losses[0]
        assert (lora.merge(model)(IDS)[0] - model(IDS)[0]).abs().max() < 2e-5
    with pytest.raises(UserError, match="int8 and nf4 are known"):
        lora.quantize(model, "int4")


def test_no_dense_weight_waits_for_backward():
    """What autograd saves for a product with codes is no bigger than its input."""
    q, x, saved = QuantizedWeight(torch.randn(64, 256), "nf4"), torch.randn(2, 256, requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        y = QuantProduct.apply(x, q, torch.zeros(64))
        z = F.linear(x, q(torch.float32))
    assert saved == [64 * 256]                                  # the dense product's; ours saved nothing
    close(torch.autograd.grad(y.sum(), x)[0], torch.autograd.grad(z.sum(), x)[0], 1e-6)


# -------------------------------------------------------------------------------------------------- tied head

def test_the_head_can_learn_without_the_embedding(bases, tmp_path):
    model, base = make(bases, targets=("head", "q")), GPT.from_pretrained(bases["gpt2"])
    assert model.head.weight is model.wte.weight
    train(model)
    assert torch.equal(model.wte.weight, base.wte.weight) and model.config.tied
    merged = lora.merge(model)
    assert torch.equal(merged.wte.weight, base.wte.weight)
    assert not torch.equal(merged.head.weight, merged.wte.weight)
    assert not merged.config.tied and (merged(IDS)[0] - model(IDS)[0]).abs().max() < 1e-5
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(GPT.from_pretrained(tmp_path / "merged")(IDS)[0], merged(IDS)[0])
    lora.save_adapter(model, tmp_path / "adapter")
    again = GPT.from_pretrained(bases["gpt2"])
    lora.load_adapter(again, tmp_path / "adapter")
    assert (again(IDS)[0] - model(IDS)[0]).abs().max() < 1e-6
    plain = make(bases, noise=0.1)
    assert lora.merge(plain).head.weight is not plain.head.weight and lora.merge(plain).config.tied
    merged = lora.merge(plain)
    assert merged.head.weight is merged.wte.weight              # not adapted: still one


# ------------------------------------------------------------------------------------------- optimiser groups

def test_param_groups(bases):
    def seen(model, **kw):
        return [(g["lr"], g["weight_decay"], len(g["params"])) for g in lora.param_groups(model, 1e-3, **kw)]

    model = make(bases, variant="dora")
    assert seen(model, loraplus_lr_ratio=16, weight_decay=0.1) == [(1e-3, 0.1, 4), (1.6e-2, 0.1, 4), (1e-3, 0, 4)]
    with pytest.raises(UserError, match="the adapter 'default' is a dora, and this is for adalora"):
        lora.RankAllocator(model, 10)
    with pytest.raises(UserError, match="no adapter called 'default'"):
        lora.orthogonality(GPT.from_pretrained(bases["gpt2"]))
    lora.quantize(model, "int8")
    with pytest.raises(UserError, match="this model is quantized already"):
        lora.quantize(model, "nf4")
    model = make(bases, variant="dora")
    with pytest.raises(UserError, match="no trainable adapter; inject one, or load it with trainable=True"):
        lora.param_groups(GPT.from_pretrained(bases["gpt2"]), 1e-3)
    grouped = {id(p) for g in lora.param_groups(model, 1e-3) for p in g["params"]}
    assert grouped == {id(p) for p in lora.adapter_parameters(model).values()}
    assert seen(make(bases, variant="ia3", targets=("k", "down")), weight_decay=0.1) == [(1e-3, 0, 4)]
    assert [g[1] for g in seen(make(bases, variant="adalora"), weight_decay=0.1)] == [0.1, 0.1, 0]


# ---------------------------------------------------------------------------------------------------- AdaLoRA

def test_budget_by_hand():
    b = [lora.budget(t, 20, 4, 6, 100, 20) for t in range(20)]
    assert b[:5] == [100] * 5 and b[14:] == [20] * 6
    assert b[9] == 20 + 80 * 0.125 and b[5] == int(20 + 80 * 0.9 ** 3) and b == sorted(b, reverse=True)


def test_the_ranks_are_final_once_the_last_budget_has_pruned(bases):
    """Step 14 of 20, counted from 0, is the first with the last budget; 15 steps are made then."""
    allocator = lora.RankAllocator(make(bases, variant="adalora"), 20, target_rank=2, t_i=4, t_f=6)
    assert [allocator.is_pruned(step) for step in range(21)] == [False] * 15 + [True] * 6


def ada_run(model, total, steps=None, allocator=None, optimiser=None, start=0, **kw):
    params = lora.adapter_parameters(model)
    optimiser = optimiser or torch.optim.AdamW(params.values(), lr=0.03, weight_decay=0.0)
    allocator = allocator or lora.RankAllocator(model, total, **kw)
    history = []
    for t in range(start, total if steps is None else steps):
        (loss_of(model(IDS)[0], IDS) + 0.1 * lora.orthogonality(model)).backward()
        optimiser.step()
        allocator.update(t)
        optimiser.zero_grad()
        history.append(allocator.report())
    return history, allocator, optimiser


def alive(model):
    return sum(int((a.lora_E != 0).sum()) for a in lora.adapters(model).values())


@pytest.mark.parametrize("t_f, every", [(1, 1), (1, 5), (3, 4), (7, 3)])
def test_the_last_prune_holds(t_f, every, bases):
    """Momentum would revive a pruned E; whatever the phase, the budget is met after the last pruning."""
    model = make(bases, targets=("q", "v", "up"), variant="adalora")
    history, *_ = ada_run(model, 15, target_rank=1, t_i=2, t_f=t_f, every=every)
    assert [h["budget"] for h in history][:3] == [24] * 3
    for h in history[15 - t_f:]:
        assert h["budget"] == sum(h["ranks"].values()) == alive(model) == 6
    assert history[-1]["ranks"] == history[15 - t_f]["ranks"]


def test_rank_zero_and_nothing_to_prune(bases, tmp_path):
    model = make(bases, targets=("q", "v", "up"), variant="adalora")
    ada_run(model, 8, target_rank=4)                            # target = initial: nothing goes
    assert alive(model) == 24
    ada_run(model, 12, target_rank=0, t_i=0)                    # everything goes: the base again
    assert alive(model) == 0
    assert torch.equal(model(IDS)[0], GPT.from_pretrained(bases["gpt2"])(IDS)[0])
    model = make(bases, targets=("q", "v", "up"), variant="adalora", noise=0.1)
    model.blocks[0].mlp.up.adapters["default"].lora_E.data.zero_()          # one module at rank 0
    model.blocks[1].attn.q.adapters["default"].lora_E.data[1:3].zero_()
    for fold in (False, True):
        lora.save_adapter(model, tmp_path / str(fold), fold=fold)
        config = config_of(tmp_path / str(fold))
        again = GPT.from_pretrained(bases["gpt2"])
        lora.load_adapter(again, tmp_path / str(fold))
        assert (again(IDS)[0] - model(IDS)[0]).abs().max() < 1e-5
        if fold:
            assert config["peft_type"] == "LORA" and len(config["target_modules"]) == 3
            assert config["rank_pattern"] and config["alpha_pattern"]
        else:
            assert [sum(v) for v in config["rank_pattern"].values()] == [8, 0, 6, 4]
        assert train(again, 3, lr=1e-3)[-1] < 99                # and it can go on


def test_ties_do_not_prune_more_than_asked(bases):
    model = make(bases, variant="adalora")
    allocator = lora.RankAllocator(model, 10, target_rank=2, t_i=0, t_f=9)
    for p in lora.adapter_parameters(model).values():
        p.data.fill_(1.0)
        p.grad = torch.ones_like(p)
    allocator.update(0)
    allocator.update(1)
    assert alive(model) == 8


def test_importance_by_hand(bases):
    model = make(bases, variant="adalora", targets=("q",), layers=[0], rank=2)
    allocator = lora.RankAllocator(model, 10, target_rank=1, t_i=5, t_f=1)
    (a,) = lora.adapters(model).values()
    w, g = {}, {}
    for t in range(2):
        for n in ("lora_A", "lora_B", "lora_E"):
            p = getattr(a, n)
            p.data.normal_()
            p.grad = torch.randn_like(p)
            w[n, t], g[n, t] = p.detach().clone(), p.grad
        allocator.update(t)

    def s(n, *at):
        I = U = 0.0
        for t in range(2):
            i = abs(w[n, t][at] * g[n, t][at])
            I = 0.85 * I + 0.15 * i
            U = 0.85 * U + 0.15 * abs(i - I)
        return I * U
    for i, got in enumerate(allocator.scores()[0]):
        close(got, s("lora_E", i, 0) + sum(s("lora_A", i, j) for j in range(32)) / 32
              + sum(s("lora_B", j, i) for j in range(32)) / 32, 1e-5)


def test_orthogonality_by_hand(bases):
    model = make(bases, variant="adalora", targets=("q",), layers=[0], rank=2)
    (a,) = lora.adapters(model).values()
    a.lora_A.data = torch.eye(32)[:2]
    a.lora_B.data = 2 * torch.eye(32)[:, :2]
    close(lora.orthogonality(model), torch.tensor((0 + 18 ** 0.5) / 2), 1e-6)   # 4 - 1, twice


def test_adalora_resumes_exactly(bases):
    kw = dict(target_rank=2, t_i=2, t_f=4, every=2)
    whole, half = (make(bases, variant="adalora") for _ in "ab")
    ada_run(whole, 16, **kw)
    for stop in (7, 13):                                        # before and after the last pruning
        half = make(bases, variant="adalora")
        _, allocator, optimiser = ada_run(half, 16, steps=stop, **kw)
        state = copy.deepcopy((half.state_dict(), allocator.state_dict(), optimiser.state_dict()))
        again = make(bases, variant="adalora", seed=5)
        again.load_state_dict(state[0])
        said = allocator.report()
        allocator = lora.RankAllocator(again, 16, **kw)
        allocator.load_state_dict(state[1])
        assert allocator.report() == said
        optimiser = torch.optim.AdamW(lora.adapter_parameters(again).values(), lr=9, weight_decay=0.0)
        optimiser.load_state_dict(state[2])
        ada_run(again, 16, allocator=allocator, optimiser=optimiser, start=stop, **kw)
        assert all(torch.equal(t, again.state_dict()[n]) for n, t in whole.state_dict().items())


def test_allocator_errors(bases):
    model = make(bases, variant="adalora")
    for kw in (dict(t_i=6, t_f=4), dict(t_f=0), dict(target_rank=5), dict(every=0), dict(t_i=-1)):
        with pytest.raises(UserError, match="AdaLoRA"):
            lora.RankAllocator(model, 10, **kw)
    with pytest.raises(UserError, match="no gradient; update between optimizer.step and zero_grad"):
        lora.RankAllocator(model, 10).update(0)
    for total in (2, 3, 5, 10, 1000):                           # the defaults fit every run that can be
        lora.RankAllocator(model, total)


# -------------------------------------------------------------------------------- peft itself, if it is there

@pytest.mark.slow
def test_folders_travel_both_ways(tmp_path):
    """PEERS names an interpreter with transformers and peft; ours is imported there, too."""
    if not os.environ.get("PEERS"):
        pytest.skip("PEERS: no interpreter with peft is named, so nothing is exchanged with it")
    command = [os.environ["PEERS"], "-W", "ignore", str(HERE / "peft_roundtrip.py"), str(tmp_path)]
    out = subprocess.run(command, capture_output=True, text=True,
                         env={**os.environ, "OMP_NUM_THREADS": "1"})
    print(out.stdout, out.stderr[-3000:], file=sys.stderr)
    assert out.returncode == 0 and "all equal" in out.stdout


def test_a_quantized_model_is_not_saved_without_its_weights(tmp_path):
    model = GPT(GPTConfig(64, 32, 2, 2, 32))
    lora.quantize(model, "int8")
    with pytest.raises(UserError, match="quantized"):
        model.save_pretrained(tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_copy_in_fp16_is_a_copy():
    w = torch.logspace(-8, 1, 1000)
    assert is_copy(w.half(), w)
    assert is_copy(w.bfloat16(), w)
    assert not is_copy(w.half() * 1.01, w)


def test_an_exact_name_is_targeted_in_any_layer():
    config = dict(target_modules=["q_proj", "lm_head"], layers_to_transform=[1])
    assert targeted(config, "lm_head")
    assert not targeted(config, "model.layers.0.self_attn.q_proj")
    assert targeted(dict(target_modules=["q_proj"], layers_to_transform=[]), "model.layers.0.self_attn.q_proj")


def test_adalora_prunes_by_the_flags_shares_and_in_half_of_the_run_by_default(bases):
    cfg = types.SimpleNamespace(target_rank=2, prune_start=0.1, prune_end=0.4, prune_every=5, orth=0.5)
    a = lora.rank_allocator(make(bases, variant="adalora"), cfg, 20)
    assert (a.t_i, a.t_f, a.every, a.orth, a.bT) == (2, 8, 5, 0.5, 2 * len(a.ranks))
    b = lora.RankAllocator(make(bases, variant="adalora"), 20, target_rank=2)
    assert (b.t_i, b.t_f) == (4, 6)
