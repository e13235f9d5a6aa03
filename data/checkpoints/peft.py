"""data/checkpoints/peft.py: what a peft adapter folder says, in our words, and back.

    adapter_config.json         kind, rank, alpha, dropout, target modules by full path, exceptions by pattern
    adapter_model.safetensors   base_model.model.<their module path>.<field>
    run.json                    ours: which base (a fingerprint), and which rows of a fused module are whose

Low rank: lora_A (r, in), lora_B (out, r), stored so even for GPT-2's (in, out) matrices; DoRA adds
lora_magnitude_vector (out); AdaLoRA adds lora_E (r, 1) and writes all three without ".weight". IA3: ia3_l
(out, 1), or (1, in) where it rescales the input. Scales: see the top of lora.py.

q, k and v of a fused GPT-2 c_attn become diagonal blocks: A stacked, B block-diagonal, rank the sum; where
they share one A they are one plain adapter. Nothing is skipped in silence: what is missing, foreign or
misshaped, or would change the mathematics, is refused by name, where peft warns or says nothing.

Models and adapters are known here by their attributes only.
Public: fused, fuse, split, base_fingerprint, same_base, write_adapter, read_adapter
"""
import math
import os
import re
from statistics import mode

import torch

from data.checkpoints.safetensors import read_tensors, write_tensors
from data.runtime.files import DataError, UserError, read_json, write_json

FIELDS = {"lora": ["lora_A", "lora_B"], "dora": ["lora_A", "lora_B", "lora_magnitude_vector"],
          "adalora": ["lora_A", "lora_B", "lora_E"], "ia3": ["ia3_l"]}


def key(kind, module, field):
    """The name of a tensor in the file; torch modules there (A and B of a LoRA) add ".weight"."""
    suffix = ".weight" if kind in ("lora", "dora") and field in ("lora_A", "lora_B") else ""
    return f"base_model.model.{module}.{field}{suffix}"


def fused(model):
    """{their module path: [our paths]}: one Linear each, or the q, k and v of a fused c_attn."""
    out = {}
    for path, (theirs, _) in model.hf_names().items():
        if isinstance(model.get_submodule(path), torch.nn.Linear):
            out.setdefault(theirs, []).append(path)
    return out


def fuse(pieces, shared):
    """The adapters of q, k and v (or of one Linear) as one; each a dict of tensors by field, an absent one of
    rank 0 (or with magnitudes, or ones, that do nothing). shared: all hold the very same A and E."""
    out = {}
    for f in pieces[0]:
        ts = [p[f] for p in pieces]
        if f in ("lora_A", "lora_E", "kept") and shared:
            out[f] = ts[0]
        else:
            out[f] = torch.block_diag(*ts) if f == "lora_B" and not shared else torch.cat(ts)
    return out


def split(whole, outs, ranks=None):
    """Undo `fuse`: a dict per part of outs[i] rows. ranks: how many columns of B are whose; a part with none
    is None. Without ranks, or once somebody has trained outside of the blocks, all share the same A and E."""
    if len(outs) == 1:
        return [whole]
    pieces = [{f: (t.split(outs)[i] if f in ("lora_B", "lora_magnitude_vector", "ia3_l") else t)
               for f, t in whole.items()} for i in range(len(outs))]
    if ranks and "ia3_l" in whole:
        return [p if r or (p["ia3_l"] != 1).any() else None for p, r in zip(pieces, ranks)]
    if ranks and sum(ranks) == whole["lora_B"].size(1):
        blocks = [p["lora_B"].split(ranks, 1)[i] for i, p in enumerate(pieces)]
        if torch.equal(torch.block_diag(*blocks), whole["lora_B"]):
            own = [{f: t.split(ranks)[i] for f, t in p.items() if f in ("lora_A", "lora_E")}
                   for i, p in enumerate(pieces)]
            return [{**p, **o, "lora_B": b} if r else None for p, o, b, r in zip(pieces, own, blocks, ranks)]
    return pieces


def base_fingerprint(model):
    """The first number of every base tensor, as text: which base an adapter belongs to. Adapters, casts and
    quantisation leave it recognisable; most training does not."""
    values = []
    for path, m in model.named_modules():
        if ".adapters" not in path and ".quant" not in path:
            values += [m.quant.first] if getattr(m, "quant", None) is not None else []
            values += [p.flatten()[0].item() for p in m.parameters(recurse=False)]
    return " ".join([str(model.wte.weight.dtype)] + [f"{v:.7g}" for v in values])


def same_base(a, b):
    """Do two fingerprints agree, to the precision of the coarser of their dtypes?"""
    (da, *a), (db, *b) = a.split(), b.split()
    eps = max(torch.finfo(getattr(torch, d.removeprefix("torch."))).eps for d in (da, db))
    return len(a) == len(b) and all(math.isclose(float(x), float(y), rel_tol=2 * eps, abs_tol=1e-7)
                                for x, y in zip(a, b))


def piece(a, scale, fold, whole):
    """One adapter as a file has it, for a module whose scale is `scale`; AdaLoRA's dead triplets drop out."""
    if a.kind == "ia3":
        return {"ia3_l": a.ia3_l}
    A, B = a.factors()                                  # PiSSA: the exact change, of rank 2r
    out = {"lora_A": A, "lora_B": B * (a.scale / scale)}
    if a.kind == "dora":
        out["lora_magnitude_vector"] = a.lora_magnitude_vector
    if a.kind == "adalora":
        kept = (a.lora_E[:, 0] != 0) | whole                            # (r,) bool
        out = {"lora_A": (A if fold else a.lora_A)[kept], "lora_B": out["lora_B"][:, kept]}
        out.update({} if fold else {"lora_E": a.lora_E[kept], "kept": kept})
    return out


def write_adapter(model, folder, found, idle, base, fold, extra):
    """found, idle: {our path: adapter}, the real ones, and those without effect that complete a c_attn."""
    modules, parts, like, every = {}, {}, next(iter(found.values())), {**idle, **found}
    kind = "lora" if like.kind == "pissa" or fold and like.kind == "adalora" else like.kind
    whole = like.kind == "adalora" and not any(a.lora_E.any() for a in found.values())  # untrained: keep all
    for theirs, paths in fused(model).items():
        mine = [found[p] for p in paths if p in found]
        if not mine:
            continue
        scale = getattr(like if kind == "adalora" else mine[0], "scale", None)          # AdaLoRA: one for all
        shared = len(mine) == len(paths) > 1 and len({id(getattr(a, "lora_A", a)) for a in mine}) == 1
        pieces = [piece(every[p], scale, fold, whole) for p in paths]
        m = dict(fuse(pieces, shared), scale=scale, inputs=getattr(mine[0], "inputs", None))
        if kind != "lora" or len(m["lora_A"]):                          # a plain LoRA of peft has no rank 0
            modules[theirs] = m
        if len(paths) > 1 and not shared:
            parts[theirs] = {p: len(next(iter(t.values()))) for p, t in zip(paths, pieces) if p in found}
    if not modules:
        raise UserError("every triplet of this AdaLoRA adapter is pruned: folded, nothing is left to save")
    extra, targets = extra or {}, list(modules)
    config = dict(peft_type="LORA", task_type="SEQ_CLS" if "score.weight" in extra else "CAUSAL_LM",
                  base_model_name_or_path=base, inference_mode=True, target_modules=targets,
                  fan_in_fan_out=model.config.family == "gpt2",
                  modules_to_save=sorted({name.rpartition(".")[0] for name in extra}) or None)
    if kind == "ia3":
        for m in modules.values():
            m["ia3_l"] = m["ia3_l"][None] if m["inputs"] else m["ia3_l"][:, None]
        config.update(peft_type="IA3", feedforward_modules=[t for t in targets if modules[t]["inputs"]])
    elif kind == "adalora":                             # one init_r for all: who had less was pruned to that
        kept = {f"{t}.lora_E": m["kept"].tolist() for t, m in modules.items()}
        r = max(map(len, kept.values()))
        kept = {t: k + [False] * (r - len(k)) for t, k in kept.items()}
        config.update(peft_type="ADALORA", init_r=r, lora_alpha=like.scale * (r + 1e-5), bias="none",
                      lora_dropout=like.drop.p, rank_pattern=None if all(map(all, kept.values())) else kept,
                      orth_reg_weight=0.0, total_step=1, tinit=0, tfinal=0, target_r=1)     # training is over
    else:
        ranks = {t: len(m["lora_A"]) for t, m in modules.items()}
        power = 0.5 if like.rslora else 1
        alphas = {t: round(m["scale"] * ranks[t] ** power, 9) for t, m in modules.items()}
        alphas = {t: int(a) if a == int(a) else a for t, a in alphas.items()}
        r, alpha = mode(ranks.values()), mode(alphas.values())
        config.update(r=r, lora_alpha=alpha, lora_dropout=like.drop.p, use_rslora=like.rslora, bias="none",
                      use_dora=kind == "dora", rank_pattern={t: n for t, n in ranks.items() if n != r},
                      alpha_pattern={t: a for t, a in alphas.items() if a != alpha})
    tensors = {key(kind, t, f): m[f].detach().clone() for t, m in modules.items() for f in FIELDS[kind]}
    tensors.update({f"base_model.model.{name}": t for name, t in extra.items()})
    write_tensors(os.path.join(folder, "adapter_model.safetensors"), tensors)
    write_json(os.path.join(folder, "adapter_config.json"), config)
    side = {"base_fingerprint": base_fingerprint(model), "parts": parts}
    write_json(os.path.join(folder, "run.json"), side)


# -------------------------------------------------------------------------------------------------- reading

# Settings that change the mathematics in a way not implemented here, with the values that do not. Any other
# init_lora_weights has changed the base weight, too.
NEUTRAL = {"bias": ("none",), "lora_bias": (False,), "use_qalora": (False,), "use_bdlora": (None, False),
           "init_lora_weights": (True, False, "gaussian", "eva"), "layer_replication": (None,),
           "trainable_token_indices": (None,), "target_parameters": (None,), "arrow_config": (None,),
           "alora_invocation_tokens": (None,), "kasa_config": (None,), "velora_config": (None,),
           "monteclora_config": (None,)}


def targeted(config, path):
    """peft's rule for which modules an adapter sits on."""
    def hit(rule):
        if isinstance(rule, str):
            return path != "lm_head" if rule == "all-linear" else re.fullmatch(rule, path) is not None
        return any(path == word or path.endswith("." + word) for word in rule or ())

    block, layers = re.search(r"\.(\d+)\.", path), config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    return (hit(config["target_modules"]) and not hit(config.get("exclude_modules")) and
            (layers is None or block is not None and int(block[1]) in layers))


def pattern(config, key, path, default):
    """An exception to `default` for this module; keys are suffixes or regular expressions, as in peft."""
    found = [v for k, v in (config.get(key) or {}).items() if re.fullmatch(rf"(.*\.)?({k})", path)]
    return found[0] if found else default


def read_adapter(model, folder, force):
    """(kind, {our path: (tensors by field, settings)}, extra) of a peft folder, checked against this model.

    settings: scale, dropout, rslora, inputs. Parts that share A and E hold the very same tensors.
    """
    path, run = (os.path.join(folder, name) for name in ("adapter_config.json", "run.json"))
    config, side = read_json(path), read_json(run) if os.path.exists(run) else {}
    try:
        return parse(model, folder, path, config, side, force)
    except (TypeError, AttributeError, KeyError, ZeroDivisionError, re.error) as e:
        raise DataError(f"{path} (or run.json beside it) makes no sense as an adapter's settings: {e}") from e


def parse(model, folder, path, config, side, force):
    file = os.path.join(folder, "adapter_model.safetensors")
    kind = {"LORA": "lora", "ADALORA": "adalora", "IA3": "ia3"}.get(config.get("peft_type"))
    if kind is None:
        raise DataError(f"{path}: peft_type {config.get('peft_type')!r} is not an adapter of Linears; LORA, "
                        "ADALORA and IA3 are")
    for name, accepted in NEUTRAL.items():
        if config.get(name, accepted[0]) not in accepted:
            raise DataError(f"{path}: {name} is {config[name]!r}, which changes the model in a way that is "
                            f"not supported; {' or '.join(map(str, accepted))} is")
    kind = "dora" if config.get("use_dora") else kind
    if config.get("target_modules") is None:                            # peft's defaults
        config["target_modules"] = ["c_attn"] if model.config.family == "gpt2" else ["q_proj", "v_proj"]
    was = side.get("base_fingerprint")
    if was and not force and not same_base(was, base_fingerprint(model)):
        raise DataError(f"{folder}: this adapter was trained on another base than the one loaded here (it "
                        f"names {config.get('base_model_name_or_path') or 'none'}); load that, or force it")
    tensors, out, modules = read_tensors(file), {}, fused(model)
    for target in (t for t in modules if targeted(config, t)):
        linears = [model.get_submodule(p) for p in modules[target]]
        outs = [linear.out_features for linear in linears]
        m = {f: tensors.pop(key(kind, target, f), None) for f in FIELDS[kind]}
        if lost := [f for f in m if m[f] is None]:
            raise DataError(f"{file}: {key(kind, target, lost[0])} is missing, but its config targets it")
        how = check(file, config, kind, target, m, linears[0].in_features, outs)
        ranks = side.get("parts", {}).get(target)
        ranks = ranks and [ranks.get(p, 0) for p in modules[target]]
        out.update({p: (t, how) for p, t in zip(modules[target], split(m, outs, ranks)) if t is not None})
    if not out:
        raise DataError(f"{path}: target_modules {config['target_modules']} matches nothing in this model; "
                        f"its modules are called like {' and '.join(list(modules)[:2])}")
    extra, names = {}, {theirs: ours for ours, (theirs, _) in model.hf_names().items()}
    for name, t in ((name.removeprefix("base_model.model."), t) for name, t in tensors.items()):
        owner, _, leaf = name.replace(".base_layer", "").rpartition(".")
        if owner not in names and owner in (config.get("modules_to_save") or ()):
            extra[name] = t
        elif owner not in names or not is_copy(t, getattr(model.get_submodule(names[owner]), leaf, None)):
            raise DataError(f"{file}: {name} belongs to nothing that this adapter targets in this model")
    return kind, out, extra


def is_copy(t, own):
    """Is t the weight that the model has already, up to a cast? peft adds an adapted head's own weight."""
    if own is None or t.shape != own.shape:
        return False
    return torch.allclose(t.double(), own.double(), 2 * max(torch.finfo(x.dtype).eps for x in (t, own)), 0)


def check(file, config, kind, target, m, width, outs):
    """Shapes of one module's tensors against config and model. Returns its settings; flattens ia3_l."""
    how = dict(dropout=config.get("lora_dropout", 0.0), rslora=bool(config.get("use_rslora")), inputs=False,
               scale=None)
    alpha = pattern(config, "alpha_pattern", target, config.get("lora_alpha", 8))
    if kind == "ia3":
        how["inputs"] = tuple(m["ia3_l"].shape) == (1, width) and len(outs) == 1
        want = {"ia3_l": (1, width) if how["inputs"] else (sum(outs), 1)}
    elif kind == "adalora":
        first, kept = config.get("init_r", 12), (config.get("rank_pattern") or {}).get(target + ".lora_E")
        r, how["scale"] = first if kept is None else sum(kept), alpha / (first + 1e-5)
    else:
        r = pattern(config, "rank_pattern", target, config.get("r", 8))
        how["scale"] = alpha / (math.sqrt(r) if how["rslora"] else r)
    if kind != "ia3":
        out = sum(outs)
        want = {"lora_A": (r, width), "lora_B": (out, r), "lora_E": (r, 1), "lora_magnitude_vector": (out,)}
    for f, t in m.items():
        if tuple(t.shape) != want[f]:
            raise DataError(f"{file}: {f} of {target} is {list(t.shape)}, but this model and "
                            f"adapter_config.json ask for {list(want[f])}")
    if kind == "ia3":
        m["ia3_l"] = m["ia3_l"].flatten()
    return how
