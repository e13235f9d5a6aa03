"""peft.py: what a peft adapter folder says, in our words, and back.

    adapter_config.json           kind, rank, alpha, dropout, target modules by full path, exceptions by pattern
    adapter_model.safetensors     base_model.model.<their module path>.<field>
    run.json                      ours: which base (fingerprint), and which rows of a fused module are whose

Low rank: lora_A (r, in), lora_B (out, r), stored so even for GPT-2's (in, out) matrices; DoRA adds
lora_magnitude_vector (out); AdaLoRA adds lora_E (r, 1), all three without ".weight". IA3: ia3_l (out, 1), or
(1, in) where it rescales the input. scale = alpha / r | alpha / sqrt(r) | alpha / (init_r + 1e-5) for AdaLoRA.

q, k and v of a fused c_attn become diagonal blocks: A stacked, B block-diagonal, rank the sum; parts that
share one A are one plain adapter. Nothing is skipped in silence: what is missing, foreign, misshaped or would
change the mathematics is named and refused, where peft warns or says nothing.

Public: fuse, split, write_adapter, read_adapter
"""
import os
import re
from collections import Counter

import torch

from data.files import DataError, read_json, read_tensors, write_json, write_tensors

SUFFIX = {"lora_A": "lora_A.weight", "lora_B": "lora_B.weight"}         # the rest are stored as they are called


def fuse(parts, shared):
    """The adapters of q, k, v (or of one Linear) as one for the whole; `shared`: all hold the very same A, E.

    A part is a dict of tensors by field; an absent one has rank 0 (and the magnitudes or ones that do nothing).
    """
    out = {f: torch.cat([p[f] for p in parts]) for f in ("ia3_l", "lora_magnitude_vector") if f in parts[0]}
    if "lora_A" in parts[0]:
        for f in ("lora_A", "lora_E"):
            if f in parts[0]:
                out[f] = parts[0][f] if shared else torch.cat([p[f] for p in parts])
        Bs = [p["lora_B"] for p in parts]
        out["lora_B"] = torch.cat(Bs) if shared else torch.block_diag(*Bs)
    return out


def split(whole, outs, ranks=None):
    """Undo `fuse`: one dict per part of `outs` rows. ranks: how many columns of B belong to each part; None, or
    blocks that have since been trained outside them: every part shares A and E (the very same tensors)."""
    rows = {f: whole[f].split(outs) for f in ("ia3_l", "lora_magnitude_vector", "lora_B") if f in whole}
    if "lora_B" not in whole:
        return [{f: rows[f][i] for f in rows} for i in range(len(outs))]
    blocks = [b.split(ranks, 1)[i] for i, b in enumerate(rows["lora_B"])] if ranks else []
    if ranks and torch.equal(torch.block_diag(*blocks), whole["lora_B"]):
        rows["lora_B"] = blocks
        rows.update({f: whole[f].split(ranks) for f in ("lora_A", "lora_E") if f in whole})
    else:
        rows.update({f: [whole[f]] * len(outs) for f in ("lora_A", "lora_E") if f in whole})
    return [{f: rows[f][i] for f in rows} for i in range(len(outs))]


def common(values):
    return Counter(values).most_common(1)[0][0]


def number(x):
    return int(x) if x == int(x) else x


def write_adapter(folder, kind, modules, family, base="", dropout=0.0, rslora=False, side=None, extra=None):
    """Write a folder that peft loads.

    kind      "lora" | "dora" | "adalora" | "ia3"
    modules   {their path: the tensors of that whole module, and its `scale`; adalora: `kept`, a list of bools
              over the rows it once had; ia3: `inputs`, whether l rescales the input}
    extra     {name: tensor} outside the adapter, such as score.weight of a reward model
    """
    extra, targets = extra or {}, list(modules)
    config = dict(peft_type="LORA", task_type="SEQ_CLS" if "score.weight" in extra else "CAUSAL_LM",
                  base_model_name_or_path=base, inference_mode=True, target_modules=targets,
                  fan_in_fan_out=family == "gpt2",
                  modules_to_save=sorted({name.rpartition(".")[0] for name in extra}) or None)
    if kind == "ia3":
        config.update(peft_type="IA3", feedforward_modules=[t for t in targets if modules[t]["inputs"]])
    elif kind == "adalora":                     # one init_r for all: a shorter module is pruned to its length
        init_r = max(len(m["kept"]) for m in modules.values())
        s = common(m["scale"] for m in modules.values())
        modules = {t: {**m, "lora_E": m["lora_E"] * (m["scale"] / s)} for t, m in modules.items()}
        kept = {t + ".lora_E": m["kept"] + [False] * (init_r - len(m["kept"])) for t, m in modules.items()}
        config.update(peft_type="ADALORA", init_r=init_r, lora_alpha=s * (init_r + 1e-5), lora_dropout=dropout,
                      target_r=max(1, sum(map(sum, kept.values())) // len(kept)), tinit=0, tfinal=0, deltaT=1,
                      total_step=1, orth_reg_weight=0.0, bias="none",   # a schedule that is over: peft asks for one
                      rank_pattern=None if all(map(all, kept.values())) else kept)
    else:
        ranks = {t: m["lora_A"].size(0) for t, m in modules.items()}
        alphas = {t: number(m["scale"] * ranks[t] ** (0.5 if rslora else 1)) for t, m in modules.items()}
        r, alpha = common(ranks.values()), common(alphas.values())
        config.update(r=r, lora_alpha=alpha, lora_dropout=dropout, use_rslora=rslora, use_dora=kind == "dora",
                      bias="none", rank_pattern={t: n for t, n in ranks.items() if n != r},
                      alpha_pattern={t: a for t, a in alphas.items() if a != alpha})
    tensors = {f"base_model.model.{name}": t for name, t in extra.items()}
    for t, m in modules.items():
        for field in ("lora_A", "lora_B", "lora_E", "lora_magnitude_vector", "ia3_l"):
            if field in m:
                suffix = SUFFIX.get(field, field) if kind != "adalora" else field
                tensors[f"base_model.model.{t}.{suffix}"] = m[field].detach().clone()
    os.makedirs(folder, exist_ok=True)
    write_tensors(os.path.join(folder, "adapter_model.safetensors"), tensors)
    write_json(os.path.join(folder, "adapter_config.json"), config)
    write_json(os.path.join(folder, "run.json"), side or {})


# Settings that change the mathematics in a way that is not implemented here, with the values that do not.
NEUTRAL = {"bias": ("none",), "lora_bias": (False,), "layer_replication": (None,), "trainable_token_indices": (None,),
           "target_parameters": (None,), "alora_invocation_tokens": (None,), "use_qalora": (False,),
           "init_lora_weights": (True, False, "gaussian", "eva"), "init_ia3_weights": (True, False)}


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


def read_adapter(folder, sizes, family):
    """Read a peft folder, strictly. sizes: {their path: (in, out)} of every Linear the model has.

    Returns dict(kind, modules, dropout, rslora, base, side, extra), each as `write_adapter` takes it.
    """
    path = os.path.join(folder, "adapter_config.json")
    config, file = read_json(path), os.path.join(folder, "adapter_model.safetensors")
    kind = {"LORA": "lora", "ADALORA": "adalora", "IA3": "ia3"}.get(config.get("peft_type"))
    if kind is None:
        raise DataError(f"{path}: peft_type {config.get('peft_type')!r} is not an adapter of Linears; LORA, "
                        "ADALORA and IA3 are")
    for key, accepted in NEUTRAL.items():
        if config.get(key, accepted[0]) not in accepted:
            raise DataError(f"{path}: {key} is {config[key]!r}, which changes the model in a way that is not "
                            f"supported here; {' or '.join(map(str, accepted))} is")
    kind = "dora" if config.get("use_dora") else kind
    if config.get("target_modules") is None:
        config["target_modules"] = ["c_attn"] if family == "gpt2" else ["q_proj", "v_proj"]
    needed = {"ia3": ["ia3_l"], "adalora": ["lora_A", "lora_B", "lora_E"], "lora": ["lora_A", "lora_B"],
              "dora": ["lora_A", "lora_B", "lora_magnitude_vector"]}[kind]
    suffix = {f: f if kind == "adalora" else SUFFIX.get(f, f) for f in needed}
    tensors, modules, extra = read_tensors(file), {}, {}
    for target in (t for t in sizes if targeted(config, t)):
        m = modules[target] = {}
        for f in needed:
            key = f"base_model.model.{target}.{suffix[f]}"
            if key not in tensors:
                raise DataError(f"{file}: {key} is missing, and adapter_config.json targets it")
            m[f] = tensors.pop(key)
        check(file, config, kind, target, m, *sizes[target])
    if not modules:
        raise DataError(f"{path}: target_modules {config['target_modules']} matches nothing in this model; its "
                        f"modules are called like {' and '.join(list(sizes)[:2])}")
    for key in list(tensors):
        name = key.removeprefix("base_model.model.")
        if name.rpartition(".")[0] not in (config.get("modules_to_save") or ()) or name.rpartition(".")[0] in sizes:
            raise DataError(f"{file}: {key} belongs to no module that this adapter targets in this model")
        extra[name] = tensors[key]
    run = os.path.join(folder, "run.json")
    return dict(kind=kind, modules=modules, dropout=config.get("lora_dropout", 0.0), extra=extra,
                rslora=bool(config.get("use_rslora")), base=config.get("base_model_name_or_path"),
                side=read_json(run) if os.path.exists(run) else {})


def check(file, config, kind, target, m, width, out):
    """Shapes of one module against config and model; adds its `scale`, or for ia3 its side."""
    if kind == "ia3":
        m["inputs"] = m["ia3_l"].shape == (1, width) and (out, 1) != (1, width)
        want = {"ia3_l": (1, width) if m["inputs"] else (out, 1)}
    else:
        alpha = pattern(config, "alpha_pattern", target, config.get("lora_alpha", 8))
        if kind == "adalora":
            r = first = config.get("init_r", 12)
            kept = (config.get("rank_pattern") or {}).get(target + ".lora_E")
            r = sum(kept) if kept is not None else r
            m["scale"], m["kept"] = alpha / (first + 1e-5), [True] * r
        else:
            r = pattern(config, "rank_pattern", target, config.get("r", 8))
            m["scale"] = alpha / (r ** 0.5 if config.get("use_rslora") else r)
        want = {"lora_A": (r, width), "lora_B": (out, r), "lora_E": (r, 1), "lora_magnitude_vector": (out,)}
    for f, shape in want.items():
        if f in m and tuple(m[f].shape) != shape:
            raise DataError(f"{file}: {target} has {f} of {list(m[f].shape)}, but this model and "
                            f"adapter_config.json ask for {list(shape)}")
    if "ia3_l" in m:
        m["ia3_l"] = m["ia3_l"].flatten()
