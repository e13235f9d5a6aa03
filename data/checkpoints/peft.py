"""data/checkpoints/peft.py: adapter folders as peft has them, read and written.

    adapter_config.json         peft_type, rank, alpha, dropout, target modules by full path, exceptions by
    pattern
    adapter_model.safetensors   base_model.model.<their module path>.<field>
    run.json                    ours: which base (a fingerprint), and which rows of a fused module belong to
    what

Low rank: lora_A (r, in), lora_B (out, r), stored so even for GPT-2's (in, out) matrices; DoRA adds
lora_magnitude_vector (out); AdaLoRA adds lora_E (r, 1) and writes all three without ".weight". IA3: ia3_l
(out, 1), or (1, in) where it rescales the input. Scales: see the top of lora.py.

The parts of a fused module (GPT-2's c_attn, GPT-NeoX's query_key_value, GLM's gate_up_proj) become diagonal
blocks: A stacked, B block-diagonal, rank the sum; where they share one A they are one plain adapter. What
belongs to an output (a row of B, a magnitude, an ia3_l) stands where the family stores that row. A variant
that peft does not have is written as its state dict, by our module paths, with the settings it was built
with. What is missing, foreign or misshaped, or would change the mathematics, is refused by name, where peft
warns or is silent.

What an adapter file holds beside the adapter (modules_to_save) is `extra`: the head of a SEQ_CLS adapter,
`score.weight` (labels, C), is a classifier's; anything else is refused by whoever would not use it.

Models and adapters are used through their attributes only.
Public: peft_type_of, fused, fuse, split, base_fingerprint, same_base, require_base, write_adapter,
read_adapter_config, read_adapter, require_known_extra
"""
import math
import os
import re
from statistics import mode

import torch

from data.checkpoints.hf import find_family, from_stored, grouped, live_names, stored_rows, to_stored
from data.checkpoints.safetensors import read_tensors, write_tensors
from data.runtime.files import DataError, UserError, read_json, write_json
from data.runtime.run_files import check_object, read_object


def peft_type_of(variant):
    """The peft_type that a variant's folder carries; one that peft does not have gets a name that peft
    refuses."""
    return variant.peft_type or "PLAINTUNE_" + variant.name.upper()


def key(peft_type, module, leaf):
    """The name of a tensor in the file; torch modules there (A and B of a LoRA) add ".weight"."""
    suffix = ".weight" if peft_type == "LORA" and leaf in ("lora_A", "lora_B") else ""
    return f"base_model.model.{module}.{leaf}{suffix}"


def fused(model):
    """{their module path: [our paths]}: one Linear each, or the parts of a fused one."""
    return {theirs: paths for theirs, paths in grouped(live_names(model)).items()
            if isinstance(model.get_submodule(paths[0]), torch.nn.Linear)}


OUTPUTS = ("lora_B", "lora_magnitude_vector", "ia3_l")          # they have a row for each output of a Linear


def fuse(pieces, shared):
    """The adapters of a fused module's parts (or of one Linear) as one; each a dict of tensors by field, an
    absent one of rank 0 (or with magnitudes, or ones, that do nothing). shared: all hold the very same A and E."""
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
    pieces = [{f: (t.split(outs)[i] if f in OUTPUTS else t)
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
    """The first number of every base tensor, as text: which base an adapter belongs to.

    `same_base` recognises it after adding adapters, a cast or quantization; after most training it does not.
    """
    values = []
    for path, m in model.named_modules():
        if ".adapters" not in path and ".quant" not in path:
            values += [m.quant.first] if getattr(m, "quant", None) is not None else []
            values += [p.flatten()[0].item() for p in m.parameters(recurse=False)]
    return " ".join([str(model.wte.weight.dtype)] + [f"{v:.7g}" for v in values])


def same_base(a, b):
    """Do two fingerprints agree, to the precision of the coarser of their dtypes?"""
    da, *a = a.split()
    db, *b = b.split()
    eps = max(torch.finfo(getattr(torch, d.removeprefix("torch."))).eps for d in (da, db))
    return len(a) == len(b) and all(math.isclose(float(x), float(y), rel_tol=2 * eps, abs_tol=1e-7)
                                for x, y in zip(a, b))


def require_base(model, folder, side):
    """Raises DataError unless the model is the base of an adapter folder, as its run.json (`side`) knows it."""
    was = side.get("base_fingerprint")
    try:
        other = was and not same_base(was, base_fingerprint(model))
    except (AttributeError, TypeError, ValueError) as e:
        raise DataError(f"{folder}/run.json: base_fingerprint is {was!r:.80}, which names no base; train this "
                        "adapter again, or delete the entry") from e
    if other:
        base = read_adapter_config(folder).get("base_model_name_or_path") or "none"
        raise DataError(f"{folder}: this adapter was trained on another base than the one loaded here (it names "
                        f"{base}); load that one, or force it")


# -------------------------------------------------------------------------------------------------- writing

def write_adapter(model, folder, adapters, idle, base, fold, extra):
    """Write {our path: adapter} as a folder; `idle`: adapters without effect that complete a fused module.

    The classes of lora.py say their peft_type, peft_fields and peft_tensors. Raises UserError if an AdaLoRA
    is folded of which no triplet is left.
    """
    variant = type(next(iter(adapters.values())))
    if variant.peft_type is None:
        tensors, config = own_format(adapters, variant)
        parts = {}
    else:
        tensors, config, parts = peft_format(model, adapters, idle, fold)
    extra = extra or {}
    config.update(task_type="SEQ_CLS" if "score.weight" in extra else "CAUSAL_LM",
                  base_model_name_or_path=base, inference_mode=True,
                  modules_to_save=sorted({name.rpartition(".")[0] for name in extra}) or None)
    tensors.update({f"base_model.model.{name}": t for name, t in extra.items()})
    write_tensors(os.path.join(folder, "adapter_model.safetensors"), tensors)
    write_json(os.path.join(folder, "adapter_config.json"), config)
    write_json(os.path.join(folder, "run.json"), {"base_fingerprint": base_fingerprint(model),
                                                  "parts": parts})


def own_format(adapters, variant):
    """The default for a variant that peft does not have: its state dict by our paths, and its settings."""
    config = dict(peft_type=peft_type_of(variant), modules={p: a.settings for p, a in adapters.items()})
    tensors = {key(config["peft_type"], path, leaf): t.detach().clone()
               for path, a in adapters.items() for leaf, t in a.state_dict().items()}
    return tensors, config


def peft_format(model, adapters, idle, fold):
    """(tensors, config, parts) as peft has them; parts: which rows of a fused module are whose."""
    like = next(iter(adapters.values()))
    variant = type(like)
    peft_type = "LORA" if fold else variant.peft_type
    leaves = ("lora_A", "lora_B") if fold and variant.peft_type == "ADALORA" else variant.peft_fields
    untrained = variant.peft_type == "ADALORA" and not any(a.lora_E.any() for a in adapters.values())
    modules = {}
    parts = {}
    for theirs, paths in fused(model).items():
        own = [adapters[p] for p in paths if p in adapters]
        if not own:
            continue
        # AdaLoRA: one for all
        scale = getattr(like if variant.peft_type == "ADALORA" else own[0], "scale", None)
        shared = len(own) == len(paths) > 1 and len({id(getattr(a, "lora_A", a)) for a in own}) == 1
        pieces = [{**idle, **adapters}[p].peft_tensors(scale, fold, untrained) for p in paths]
        module = dict(fuse(pieces, shared), scale=scale, inputs=getattr(own[0], "inputs", None))
        rows = None if module["inputs"] else stored_rows(model.config, paths)
        module.update({f: to_stored(module[f], rows) for f in OUTPUTS if f in module})
        if peft_type != "LORA" or len(module["lora_A"]):                # a plain LoRA of peft has no rank 0
            modules[theirs] = module
        if len(paths) > 1 and not shared:
            parts[theirs] = {p: len(next(iter(t.values()))) for p, t in zip(paths, pieces) if p in adapters}
    if not modules:
        raise UserError("every triplet of this AdaLoRA adapter is pruned: folded, nothing is left to save")
    config = dict(peft_type=peft_type, target_modules=list(modules),
                  fan_in_fan_out=find_family(model.config.family).transposed)
    config.update(CONFIGS[peft_type](modules, like, variant))
    tensors = {key(peft_type, t, leaf): m[leaf].detach().clone() for t, m in modules.items()
               for leaf in leaves}
    return tensors, config, parts


def ia3_config(modules, like, variant):
    for module in modules.values():
        l = module["ia3_l"]
        module["ia3_l"] = l[None] if module["inputs"] else l[:, None]
    return dict(feedforward_modules=[t for t in modules if modules[t]["inputs"]])


def adalora_config(modules, like, variant):
    """One init_r for all modules: which had less was pruned to that."""
    kept = {f"{t}.lora_E": m["kept"].tolist() for t, m in modules.items()}
    r = max(map(len, kept.values()))
    kept = {t: k + [False] * (r - len(k)) for t, k in kept.items()}
    return dict(init_r=r, lora_alpha=like.scale * (r + 1e-5), bias="none", lora_dropout=like.drop.p,
                rank_pattern=None if all(map(all, kept.values())) else kept, orth_reg_weight=0.0,
                total_step=1, tinit=0, tfinal=0, target_r=1)            # training is over


def lora_config(modules, like, variant):
    ranks = {t: len(m["lora_A"]) for t, m in modules.items()}
    power = 0.5 if like.rslora else 1
    alphas = {t: round(m["scale"] * ranks[t] ** power, 9) for t, m in modules.items()}
    alphas = {t: int(a) if a == int(a) else a for t, a in alphas.items()}
    r = mode(ranks.values())
    alpha = mode(alphas.values())
    return dict(r=r, lora_alpha=alpha, lora_dropout=like.drop.p, use_rslora=like.rslora, bias="none",
                use_dora=variant.peft_config.get("use_dora", False),
                rank_pattern={t: n for t, n in ranks.items() if n != r},
                alpha_pattern={t: a for t, a in alphas.items() if a != alpha})


CONFIGS = {"LORA": lora_config, "ADALORA": adalora_config, "IA3": ia3_config}


# -------------------------------------------------------------------------------------------------- reading

# What is read here of adapter_config.json, but for null, which counts as absent.
CONFIG_KINDS = {
    "peft_type": "a string", "base_model_name_or_path": "a string", "task_type": "a string",
    "template": "a string", "modules_to_save": "a list of strings",
    "target_modules": "a string or a list of strings", "exclude_modules": "a string or a list of strings",
    "r": "a whole number", "init_r": "a whole number", "num_virtual_tokens": "a whole number", "lora_alpha": "a finite number",
    "lora_dropout": "a number from 0 to 1", "use_rslora": "true or false", "use_dora": "true or false",
    "rank_pattern": "an object", "alpha_pattern": "an object",
    "layers_to_transform": "a whole number or a list of them", "modules": "an object", "settings": "an object"}


def read_adapter_config(folder):
    """The object in adapter_config.json of a folder, each entry that is read here of its right type.

    Entries that are null are left out. Raises DataError.
    """
    path = os.path.join(folder, "adapter_config.json")
    config = {name: value for name, value in read_object(path, {}).items() if value is not None}
    check_object(config, CONFIG_KINDS, (), path)
    return config


# Settings that change the mathematics in a way not implemented here, with the values that do not. Any other
# init_lora_weights (pissa, olora, corda, loftq, lora_ga) has changed the base weight, too.
NEUTRAL = {"bias": ("none",), "lora_bias": (False,), "use_qalora": (False,), "use_bdlora": (None, False),
           "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
           "layer_replication": (None,), "trainable_token_indices": (None,), "target_parameters": (None,),
           "arrow_config": (None,),
           "alora_invocation_tokens": (None,), "kasa_config": (None,), "velora_config": (None,),
           "monteclora_config": (None,)}


def targeted(config, path):
    """peft's rule for which modules an adapter sits on."""
    def hit(rule):
        if isinstance(rule, str):
            return path != "lm_head" if rule == "all-linear" else re.fullmatch(rule, path) is not None
        return any(path == word or path.endswith("." + word) for word in rule or ())

    block = re.search(r"\.(\d+)\.", path)
    layers = config.get("layers_to_transform")
    layers = [layers] if isinstance(layers, int) else layers
    named = not isinstance(config["target_modules"], str) and path in config["target_modules"]     # in any layer
    return (hit(config["target_modules"]) and not hit(config.get("exclude_modules")) and
            (named or not layers or block is not None and int(block[1]) in layers))


def pattern(config, key, path, default):
    """An exception to `default` for this module; keys are suffixes or regular expressions, as in peft."""
    found = [v for k, v in (config.get(key) or {}).items() if re.fullmatch(rf"(.*\.)?({k})", path)]
    return found[0] if found else default


def read_adapter(model, folder, variants, force):
    """(variant, {our path: (tensors by field, settings)}, extra) of an adapter folder, checked against the
    model.

    settings: scale, dropout, rslora, inputs; for a variant that peft does not have, those it was built with.
    Parts that share A and E hold the very same tensors. Raises DataError.
    """
    path = os.path.join(folder, "adapter_config.json")
    run = os.path.join(folder, "run.json")
    config = read_adapter_config(folder)
    side = read_json(run) if os.path.exists(run) else {}
    try:
        variant = variant_of(config, variants, path)
        if not force:
            require_base(model, folder, side)
        tensors = read_tensors(os.path.join(folder, "adapter_model.safetensors"))
        read = read_own_format if variant.peft_type is None else read_peft_format
        modules = read(model, folder, config, side, variant, tensors)
        return variant, modules, read_extra(model, folder, config, tensors)
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError, KeyError, ArithmeticError, RuntimeError, re.error) as e:
        raise DataError(f"{path} (or run.json beside it) makes no sense as an adapter's settings: "
                        f"{' '.join(str(e).split())}") from e


def variant_of(config, variants, path):
    """The class whose peft_type and peft_config agree with the file. Raises DataError."""
    peft_type = config.get("peft_type")
    for variant in variants:
        stored = {name: bool(config.get(name)) for name in variant.peft_config} if variant.peft_type else {}
        if peft_type == peft_type_of(variant) and (not stored or stored == variant.peft_config):
            return variant
    known = dict.fromkeys(map(peft_type_of, variants))
    raise DataError(f"{path}: peft_type {peft_type!r} is not read as an adapter of Linears; "
                    f"{', '.join(known)} are")


def read_own_format(model, folder, config, side, variant, tensors):
    """What `own_format` wrote. Takes its tensors out of `tensors`."""
    known = dict(model.named_modules())
    modules = {}
    for path, settings in config["modules"].items():
        if not isinstance(known.get(path), torch.nn.Linear):
            raise DataError(f"{folder}: it changes {path}, which is no Linear of this model")
        prefix = key(config["peft_type"], path, "")
        own = {name.removeprefix(prefix): tensors.pop(name) for name in [*tensors] if name.startswith(prefix)}
        modules[path] = (own, settings)
    return modules


def read_peft_format(model, folder, config, side, variant, tensors):
    """The modules of peft's own types. Takes their tensors out of `tensors`. Raises DataError."""
    path = os.path.join(folder, "adapter_config.json")
    file = os.path.join(folder, "adapter_model.safetensors")
    for name, accepted in NEUTRAL.items():
        if config.get(name, accepted[0]) not in accepted:
            raise DataError(f"{path}: {name} is {config[name]!r}, which changes the model in a way that is "
                            f"not supported; {' or '.join(map(str, accepted))} is")
    if config.get("target_modules") is None:                            # peft's defaults
        config["target_modules"] = list(find_family(model.config.family).default_targets)
    out = {}
    modules = fused(model)
    for target in (t for t in modules if targeted(config, t)):
        linears = [model.get_submodule(p) for p in modules[target]]
        widths = [linear.out_features for linear in linears]
        names = {leaf: key(variant.peft_type, target, leaf) for leaf in variant.peft_fields}
        for name in names.values():
            if name not in tensors:
                raise DataError(f"{file}: {name} is missing, but its config targets it")
        module = {leaf: tensors.pop(name) for leaf, name in names.items()}
        settings = check_module(file, config, target, module, linears[0].in_features, widths)
        rows = None if settings["inputs"] else stored_rows(model.config, modules[target])
        module.update({f: from_stored(module[f], rows) for f in OUTPUTS if f in module})
        ranks = side.get("parts", {}).get(target)
        ranks = ranks and [ranks.get(p, 0) for p in modules[target]]
        for p, t in zip(modules[target], split(module, widths, ranks)):
            if t is not None:
                out[p] = (t, settings)
    if not out:
        raise DataError(f"{path}: target_modules {config['target_modules']} matches nothing in this model; "
                        f"its modules are called like {' and '.join(list(modules)[:2])}")
    return out


def read_extra(model, folder, config, tensors):
    """What is left of the file: tensors of modules_to_save, and copies of base weights. Raises DataError."""
    extra = {}
    ours_of = {theirs: ours for ours, theirs in live_names(model).items()}
    for name, t in tensors.items():
        name = name.removeprefix("base_model.model.")
        owner, _, leaf = name.replace(".base_layer", "").rpartition(".")
        if owner not in ours_of and owner in (config.get("modules_to_save") or ()):
            extra[name] = t
        elif owner not in ours_of or not is_copy(t, getattr(model.get_submodule(ours_of[owner]), leaf, None)):
            raise DataError(f"{folder}/adapter_model.safetensors: {name} belongs to nothing that this "
                            "adapter targets in this model")
    return extra


def require_known_extra(folder, extra, width):
    """DataError unless a folder's `extra` is none, or the head (labels, width) of a SEQ_CLS adapter."""
    config = read_adapter_config(folder)
    task_type = config.get("task_type", "CAUSAL_LM")
    path = os.path.join(folder, "adapter_config.json")
    if task_type not in ("CAUSAL_LM", "SEQ_CLS"):
        raise DataError(f"{path}: task_type {task_type!r} is not read here; CAUSAL_LM (a language model) and "
                        "SEQ_CLS (a classifier, with its head) are")
    foreign = sorted(set(extra) - {"score.weight"})
    if foreign or extra and task_type == "CAUSAL_LM":
        name = (foreign or [*extra])[0]
        raise DataError(f"{path}: {name} was trained beside the adapter (modules_to_save), and an adapter of "
                        f"task_type {task_type} is not used with it here")
    if task_type == "SEQ_CLS":
        shape = list(extra["score.weight"].shape) if extra else None
        if shape is None or len(shape) != 2 or shape[0] < 2 or shape[1] != width:
            found = "lacks score.weight" if shape is None else f"has score.weight {shape}"
            raise DataError(f"{path}: the task_type is SEQ_CLS, and the adapter {found}; a classifier of "
                            f"this model has a head of [labels, {width}], and of two labels or more")


def is_copy(t, own):
    """Is t the weight that the model has already, up to a cast? peft adds an adapted head's own weight."""
    if own is None or t.shape != own.shape:
        return False
    kinds = [torch.finfo(x.dtype) for x in (t, own)]
    smallest = max(kind.smallest_normal * kind.eps for kind in kinds)       # numbers near 0 are multiples of it
    return torch.allclose(t.double(), own.double(), 2 * max(kind.eps for kind in kinds), smallest)


def check_module(file, config, target, module, width, widths):
    """Shapes of one module's tensors against config and model. Returns its settings; flattens ia3_l.

    width: inputs of the module; widths: outputs of its parts. Raises DataError.
    """
    settings = dict(dropout=config.get("lora_dropout", 0.0), rslora=bool(config.get("use_rslora")),
                    inputs=False,
                    scale=None)
    alpha = pattern(config, "alpha_pattern", target, config.get("lora_alpha", 8))
    if config["peft_type"] == "IA3":
        settings["inputs"] = tuple(module["ia3_l"].shape) == (1, width) and len(widths) == 1
        want = {"ia3_l": (1, width) if settings["inputs"] else (sum(widths), 1)}
    else:
        if config["peft_type"] == "ADALORA":
            first = config.get("init_r", 12)
            kept = (config.get("rank_pattern") or {}).get(target + ".lora_E")
            r = first if kept is None else sum(kept)
            settings["scale"] = alpha / (first + 1e-5)
        else:
            r = pattern(config, "rank_pattern", target, config.get("r", 8))
            settings["scale"] = alpha / (math.sqrt(r) if settings["rslora"] else r)
        if not math.isfinite(settings["scale"]):
            raise DataError(f"{file}: the scale of {target}, alpha / rank, is {settings['scale']}")
        out = sum(widths)
        want = {"lora_A": (r, width), "lora_B": (out, r), "lora_E": (r, 1), "lora_magnitude_vector": (out,)}
    for leaf, t in module.items():
        if tuple(t.shape) != want[leaf]:
            raise DataError(f"{file}: {leaf} of {target} is {list(t.shape)}, but this model and "
                            f"adapter_config.json ask for {list(want[leaf])}")
    if "ia3_l" in module:
        module["ia3_l"] = module["ia3_l"].flatten()
    return settings
