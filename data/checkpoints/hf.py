"""data/checkpoints/hf.py: Hugging Face model folders, and one record per model family.

    config.json                   -> the fields of GPTConfig, as a dict             read_config, parse_config
    a GPTConfig                   -> config.json                                    hf_config
    end tokens                    -> generation_config.json, config.json            save_generation
    model.safetensors, or shards  -> {stored name: tensor}                          read_weights
    our module path               -> stored module path, which others may share     hf_names, grouped
    rows of our modules           -> rows of the stored module, and back            stored_rows, to_stored
    a model folder                -> its stored tensors, as many as config asks     read_stored
    stored tensors                -> the model's state dict, checked strictly       read_state
    a model                       -> the tensors to store                           stored_tensors

FAMILIES holds one `Family` per model family: its `model_type`, how its config.json is read and written, its
module names, its storage layout, and the fields of GPTConfig that select its mathematics. Every other file
reads the record; a family that needs no new mathematics is one more record.

transformers 4 and 5 spell two things differently (`rope_theta` + `rope_scaling` against `rope_parameters`,
`torch_dtype` against `dtype`): both are read and both are written. A setting that changes the mathematics and
is not implemented here is refused by name, never ignored.

A stored module may hold the rows of several of ours (q, k and v; gate and up), and the numbers of a head in
another order: ours turns the pairs (j, j + hs/2) of a head, see `rotary_order`. Both are one permutation of
rows, exact for weights, biases and what an adapter has for each output; the scores q k^T do not change.

Models are used through their attributes only (config, get_submodule, named_modules).

Public: Family, FAMILIES, find_family, read_config, parse_config, hf_config, save_generation, read_weights,
hf_names, live_names, grouped, stored_rows, to_stored, from_stored, key_order, read_stored, read_state,
stored_tensors
"""
import collections
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from data.checkpoints.safetensors import read_tensors
from data.runtime.files import DataError, UserError, check_path, read_json, write_json


@dataclass(frozen=True)
class Family:
    """Everything that distinguishes one model family from another."""
    model_type: str                 # its name in config.json and in GPTConfig.family
    architecture: str               # the transformers class that loads the folder
    dialect: dict                   # the fields of GPTConfig that select its mathematics
    read: Callable                  # (ConfigReader, Family) -> further fields of GPTConfig
    write: Callable                 # (GPTConfig) -> further entries of config.json
    names: dict                     # our module outside the blocks -> stored module
    block_path: str                 # stored path of block {i}
    block_names: dict               # our module inside a block -> stored module
    rows: Callable = None           # (GPTConfig, our module) -> its rows of the stored one; None: as they are
    key_order: Callable = None      # (GPTConfig) -> which numbers of a stored head make one of ours
    transposed: bool = False        # the matrices of the blocks are stored (in, out)
    optional_prefix: str = ""       # some files lack this in front of every name but the head's
    bias_keys: dict = None          # key of config.json -> the bias fields of GPTConfig that it sets
    theta_key: str = "rope_theta"   # rotary positions as transformers 4 spells them
    fraction_key: str = "partial_rotary_factor"
    default_eps: float = 1e-6       # of RMSNorm, where config.json names none
    default_head_size: int = None   # where config.json names none; None: n_embd / n_head
    renamed: dict = None            # stored module -> its name in memory (transformers 5), where they differ
    default_targets: tuple = ()     # modules that peft adapts where adapter_config.json names none


# ------------------------------------------------------------------------------------------------ config.json

class ConfigReader:
    """Checked access to the object in config.json. JSON's null counts as absent, as in transformers."""

    def __init__(self, values, path, model_type):
        self.values = values
        self.path = path
        self.model_type = model_type

    def require(self, key, *accepted):
        """DataError unless the value is one of `accepted`, or absent."""
        value = self.values.get(key)
        if value is not None and value not in accepted:
            raise DataError(f"{self.path}: {key} is {json.dumps(value)[:80]}; supported here: "
                            f"{' or '.join(map(json.dumps, accepted))}")

    def take(self, key, expected, *default, section=None):
        """The value of `key`, bool, int below 2^31 or float above 0; `default` if absent, else DataError."""
        value = (self.values if section is None else section).get(key)
        if value is None and default:
            return default[0]
        if expected is bool:
            valid = type(value) is bool
        else:
            number = type(value) is int or expected is float and type(value) is float   # True is no number
            valid = number and 0 < value < (2 ** 31 if expected is int else float("inf"))
        if not valid:
            need = {int: "a whole number above 0 and below 2^31", float: "a number above 0",
                    bool: "true or false"}[expected]
            found = "missing" if value is None else f"{value!r:.80}"
            raise DataError(f"{self.path}: {key} is {found}, and a {self.model_type} model needs {need} "
                            "there")
        return value


def read_config(folder):
    """config.json of a model folder -> the fields of GPTConfig. DataError if it is missing or unsupported."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        raise DataError(f"{folder}: no config.json; a model folder holds config.json, model.safetensors "
                        "and a tokenizer")
    values = read_json(path)
    ends = _object_in(folder, "generation_config.json").get("eos_token_id")
    if ends is not None and isinstance(values, dict):       # transformers stops at these, whatever config.json names
        values = values | {"eos_token_id": ends}
    return parse_config(values, path)


def parse_config(values, path):
    """The object in config.json -> the fields of GPTConfig. DataError names `path` and the first bad key."""
    model_type = values.get("model_type") if isinstance(values, dict) else None
    if model_type not in [family.model_type for family in FAMILIES]:
        raise DataError(f"{path}: model_type {model_type!r} is not supported; supported: {known_families()}")
    family = find_family(model_type)
    reader = ConfigReader(values, path, model_type)
    reader.require("quantization_config")               # packed weights are not read
    return dict(family=model_type, vocab_size=reader.take("vocab_size", int), bos=values.get("bos_token_id"),
                eos=values.get("eos_token_id"), **family.read(reader, family))


def hf_config(config, dtype):
    """GPTConfig -> the dict of config.json, for weights stored in `dtype`."""
    family = find_family(config.family)
    dtype_name = str(dtype).removeprefix("torch.")
    return dict(vocab_size=config.vocab_size, tie_word_embeddings=config.tied, bos_token_id=config.bos,
                eos_token_id=config.eos, dtype=dtype_name, torch_dtype=dtype_name,
                model_type=family.model_type, architectures=[family.architecture], **family.write(config))


def save_generation(folder, end, base=None):
    """Write generation_config.json, and its end tokens into config.json: `transformers` stops where we do.

    end    the id of the token that ended answers in training; None keeps what the base has
    base   the folder of the model that it was trained from, whose settings and other end tokens are kept
    DataError for files that are not JSON objects.
    """
    config, values = (_object_in(base, name) for name in ("config.json", "generation_config.json"))
    if end is not None:
        if not values:                                  # transformers takes these from config.json then
            values = {key: config[key] for key in ("bos_token_id", "pad_token_id") if key in config}
        ends = [end]
        for eos in (values.get("eos_token_id"), config.get("eos_token_id")):
            ends += eos if isinstance(eos, list) else [eos]
        ends = [i for i in dict.fromkeys(ends) if type(i) is int]
        eos = {"eos_token_id": ends if len(ends) > 1 else end}
        values |= eos
        write_json(os.path.join(folder, "config.json"), _object_in(folder, "config.json") | eos)
    if values:
        write_json(os.path.join(folder, "generation_config.json"), values)


def _object_in(folder, name):
    """The JSON object in a file of a folder; {} where either is missing."""
    path = os.path.join(folder, name) if folder else ""
    value = read_json(path) if os.path.exists(path) else {}
    if not isinstance(value, dict):
        raise DataError(f"{path} holds no JSON object")
    return value


def read_gpt2(reader, family):
    reader.require("activation_function", "gelu_new", "gelu_pytorch_tanh")
    reader.require("scale_attn_weights", True)
    reader.require("scale_attn_by_inverse_layer_idx", False)
    reader.require("add_cross_attention", False)
    return dict(
        n_layer=reader.take("n_layer", int),
        n_head=reader.take("n_head", int),
        n_embd=reader.take("n_embd", int),
        n_inner=reader.take("n_inner", int, None),
        block_size=reader.take("n_positions", int, 1024),
        tied=reader.take("tie_word_embeddings", bool, True),
        norm_eps=reader.take("layer_norm_epsilon", float, 1e-5))


def write_gpt2(config):
    return dict(n_positions=config.block_size, n_ctx=config.block_size, n_layer=config.n_layer,
                n_head=config.n_head, n_embd=config.n_embd, n_inner=config.n_inner,
                activation_function="gelu_new", layer_norm_epsilon=config.norm_eps)


def read_llama(reader, family):
    reader.require("hidden_act", "silu")
    reader.require("use_sliding_window", False)
    reader.require("pretraining_tp", 1)
    fields = dict(
        n_layer=reader.take("num_hidden_layers", int),
        n_head=reader.take("num_attention_heads", int),
        n_embd=reader.take("hidden_size", int),
        n_kv_head=reader.take("num_key_value_heads", int, None),
        head_size=reader.take("head_dim", int, family.default_head_size),
        n_inner=reader.take("intermediate_size", int),
        block_size=reader.take("max_position_embeddings", int),
        tied=reader.take("tie_word_embeddings", bool, False),
        norm_eps=reader.take("rms_norm_eps", float, family.default_eps))
    return fields | read_biases(reader, family) | read_rope(reader, family, fields["block_size"])


def read_biases(reader, family):
    return {bias: reader.take(key, bool, family.dialect[bias])
            for key, biases in family.bias_keys.items() for bias in biases}


def write_llama(config):
    return dict(hidden_size=config.n_embd, intermediate_size=config.n_inner, num_hidden_layers=config.n_layer,
                num_attention_heads=config.n_head, num_key_value_heads=config.n_kv_head,
                head_dim=config.head_size, hidden_act="silu", rms_norm_eps=config.norm_eps,
                max_position_embeddings=config.block_size, attention_bias=config.o_bias,
                mlp_bias=config.mlp_bias, rope_theta=config.rope_theta, rope_scaling=config.rope_scaling,
                rope_parameters=rope_parameters(config))


def write_glm(config):
    return dict(write_llama(config), attention_bias=config.qkv_bias,
                partial_rotary_factor=config.rotary_fraction, pad_token_id=None)    # absent is 151329 there


def read_mistral(reader, family):
    fields = read_llama(reader, family)
    window = 4096                                       # of transformers, where the key is absent
    if reader.values.get("sliding_window", window) is not None:
        window = reader.take("sliding_window", int, window)
        if window < fields["block_size"]:
            raise DataError(f"{reader.path}: sliding_window is {window}, shorter than the context of "
                            f"{fields['block_size']}, and attention over a window is not supported; "
                            f"max_position_embeddings {window} would do without one")
    return fields


def write_mistral(config):
    return dict(write_llama(config), sliding_window=None)


# The tanh form of GELU has several names; the first of each is written.
GELUS = {"gelu": ("gelu_new", "gelu_pytorch_tanh", "gelu_fast"), "gelu_exact": ("gelu",)}


def read_gpt_neox(reader, family):
    reader.require("hidden_act", *sum(GELUS.values(), ()))
    fields = dict(
        n_layer=reader.take("num_hidden_layers", int),
        n_head=reader.take("num_attention_heads", int),
        n_embd=reader.take("hidden_size", int),
        n_inner=reader.take("intermediate_size", int),
        block_size=reader.take("max_position_embeddings", int),
        tied=reader.take("tie_word_embeddings", bool, False),
        norm_eps=reader.take("layer_norm_eps", float, 1e-5),
        parallel_residual=reader.take("use_parallel_residual", bool, True))
    for mlp, names in GELUS.items():
        if reader.values.get("hidden_act") in names:
            fields["mlp"] = mlp
    return fields | read_biases(reader, family) | read_rope(reader, family, fields["block_size"])


def write_gpt_neox(config):
    return dict(hidden_size=config.n_embd, intermediate_size=config.n_inner, num_hidden_layers=config.n_layer,
                num_attention_heads=config.n_head, hidden_act=GELUS.get(config.mlp, ("gelu",))[0],
                layer_norm_eps=config.norm_eps, max_position_embeddings=config.block_size,
                attention_bias=config.o_bias, use_parallel_residual=config.parallel_residual,
                rotary_emb_base=config.rope_theta, rotary_pct=config.rotary_fraction,
                rope_scaling=config.rope_scaling, rope_parameters=rope_parameters(config))


ROPE_KEYS = dict(default=(), linear=("factor",), llama3=("factor", "low_freq_factor", "high_freq_factor"))


def rope_parameters(config):
    return {"rope_theta": config.rope_theta, "rope_type": "default",
            "partial_rotary_factor": config.rotary_fraction, **(config.rope_scaling or {})}


def read_rope(reader, family, block_size):
    """Rotary positions, as transformers 4 or 5 spells them; of both, 5 reads the old spelling."""
    rope = reader.values.get("rope_scaling") or reader.values.get("rope_parameters") or {}
    rope_type = (rope.get("rope_type") or rope.get("type") or "default") if isinstance(rope, dict) else None
    if not isinstance(rope_type, str) or rope_type not in ROPE_KEYS \
            or any(isinstance(value, dict) for value in rope.values()):
        raise DataError(f"{reader.path}: rotary positions {rope!r:.150} are not supported; rope_type "
                        "default, linear and llama3 are, the same in every layer")
    outside = reader.take(family.theta_key, float, 10000.0)
    theta = float(reader.take("rope_theta", float, outside, section=rope))
    whole = family.dialect["rotary_fraction"]
    outside = reader.take(family.fraction_key, float, whole)
    fraction = float(reader.take("partial_rotary_factor", float, outside, section=rope))
    if fraction > 1 or whole == 1 and fraction != 1:
        most = "rotates whole heads, which is 1" if whole == 1 else "can rotate 1 at most"
        raise DataError(f"{reader.path}: partial_rotary_factor is {fraction}; a {reader.model_type} model "
                        f"{most}")
    fields = dict(rope_theta=theta, rope_scaling=None, rotary_fraction=fraction)
    if rope_type == "default":
        return fields
    scaling = {"rope_type": rope_type}
    for key in ROPE_KEYS[rope_type]:
        scaling[key] = reader.take(key, float, section=rope)
    if rope_type == "llama3":                           # the context length before it was extended
        key = "original_max_position_embeddings"
        inside = reader.take(key, int, block_size, section=rope)
        scaling[key] = reader.take(key, int, inside)
    return fields | dict(rope_scaling=scaling)


# ---------------------------------------------------------------------------------------------------- weights

def read_weights(folder):
    """{stored name: tensor} of a model folder: model.safetensors, or the shards that its index lists."""
    single = os.path.join(folder, "model.safetensors")
    if os.path.exists(single):
        return read_tensors(single)
    index = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.exists(index):
        raise DataError(f"{folder}: no model.safetensors and no model.safetensors.index.json; "
                        "pickled weights (.bin, .pt) are never read, so convert them first")
    content = read_json(index)
    weight_map = content.get("weight_map") if isinstance(content, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise DataError(f"{index}: weight_map is missing or does not map tensor names to file names")
    out = {}
    for shard in sorted(set(weight_map.values())):
        if os.path.basename(shard) != shard:
            raise DataError(f"{index}: shard {shard!r} is not a file name inside this folder")
        check_path(shard)
        for name, t in read_tensors(os.path.join(folder, shard)).items():
            if weight_map.get(name) != shard:
                raise DataError(f"{index}: {shard} holds {name}, but the index says {weight_map.get(name)}")
            out[name] = t
    missing = sorted(set(weight_map) - set(out))
    if missing:
        raise DataError(f"{index}: no shard holds {missing[0]}")
    return out


def hf_names(model):
    """{our module path: stored module path}."""
    family = find_family(model.config.family)
    names = {}
    for i in range(model.config.n_layer):
        for ours, theirs in family.block_names.items():
            names[f"blocks.{i}.{ours}"] = f"{family.block_path.format(i=i)}.{theirs}"
    names.update(family.names)
    modules = dict(model.named_modules())               # a model without k_norm, say, has no such name
    return {ours: stored for ours, stored in names.items() if modules.get(ours) is not None}


def live_names(model):
    """{our module path: its path in the model that transformers builds}, which is what peft sees."""
    renamed = find_family(model.config.family).renamed or {}
    return {ours: renamed.get(theirs, theirs) for ours, theirs in hf_names(model).items()}


def grouped(names):
    """{their module path: [our module paths]}, one or those of a fused module, of hf_names or live_names."""
    out = {}
    for ours, theirs in names.items():
        out.setdefault(theirs, []).append(ours)
    return out


def stored_rows(config, paths):
    """For each row of our modules at `paths`, one behind the other, its row in their stored module, (rows,).

    None where that is the order already.
    """
    family = find_family(config.family)
    names = [path.split(".", 2)[2] for path in paths if path.startswith("blocks.")]
    rows = [family.rows(config, name) for name in names if family.rows is not None]
    return torch.cat(rows) if rows and rows[0] is not None else None


def to_stored(t, rows):
    """Our rows (rows, ...) in the order of the stored module; rows as `stored_rows` gives them."""
    return t if rows is None else t[rows.argsort()]


def from_stored(t, rows):
    """Undo `to_stored`."""
    return t if rows is None else t[rows]


def key_order(config):
    """Which numbers of a stored key make one of ours, (hs,), for keys that no Linear makes (a prefix).

    None: all, in order.
    """
    family = find_family(config.family)
    return family.key_order(config) if family.key_order is not None else None


def swap_layout(t, path, family):
    """Between our (out, in) and the stored layout of the module at `path`; its own inverse."""
    return t.t() if family.transposed and t.dim() == 2 and path.startswith("blocks.") else t


def canonical_names(stored, family):
    """The stored tensors under full names, without the constant buffers that old versions wrote."""
    if family.optional_prefix and family.names["wte"] + ".weight" not in stored:
        head = family.names["head"] + "."
        stored = {name if name.startswith(head) else family.optional_prefix + name: t
                  for name, t in stored.items()}
    buffers = (".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias",
               "rotary_emb.inv_freq")
    return {name: t for name, t in stored.items() if not name.endswith(buffers)}


def read_stored(config, folder):
    """{full stored name: tensor} of a model folder, memory-mapped.

    Raises DataError where `config`, a GPTConfig, asks for more layers or a larger size than any tensor has: a
    model is built only where its weights can exist.
    """
    family = find_family(config.family)
    stored = canonical_names(read_weights(folder), family)
    block = re.compile(re.escape(family.block_path).replace(r"\{i\}", r"(\d+)") + r"\.")
    layers = {match[1] for match in map(block.match, stored) if match}
    if config.n_layer > len(layers):
        raise DataError(f"{folder}: config.json asks for {config.n_layer} layers, and the weights hold "
                        f"{len(layers)}")
    largest = max((max(t.shape, default=1) for t in stored.values() if t.numel()), default=0)
    sizes = {"a vocabulary": config.vocab_size, "a width": config.n_embd, "an MLP": config.n_inner,
             "a width of all heads": config.n_head * config.head_size,
             "a context": config.block_size if config.position == "learned" else 0}
    for what, size in sizes.items():
        if size > largest:
            raise DataError(f"{folder}: config.json asks for {what} of {size}, and no tensor of the weights "
                            f"has a size above {largest}")
    return stored


def read_state(model, stored, folder, dtype):
    """Stored tensors as the state dict of `model`, whose tensors may be on the meta device.

    Every tensor must be there, in shape, and no other beside it; DataError names the first that is not.
    Tensors that need neither reshaping nor a cast stay memory-mapped.
    """
    config = model.config
    family = find_family(config.family)
    state = {}
    used = set()
    names = hf_names(model)
    heights = collections.Counter()                     # rows of each stored module
    for path, stored_path in names.items():
        heights[stored_path] += sum(p.size(0) for p in model.get_submodule(path).parameters() if p.dim() == 2)
    for path, stored_path in names.items():
        if path == "head" and config.tied:
            continue
        rows = stored_rows(config, [path])
        for leaf, parameter in model.get_submodule(path).named_parameters():
            name = f"{stored_path}.{leaf}"
            if name not in stored:
                raise DataError(f"{folder}: the weights lack {name}, which a {config.family} model needs")
            t = swap_layout(stored[name], path, family)
            shape = [heights[stored_path] or parameter.size(0), *parameter.shape[1:]]   # a norm has no rows
            if list(t.shape) != shape or not t.is_floating_point():
                raise DataError(f"{folder}: {name} is {t.dtype} {list(t.shape)}, but config.json asks for "
                                f"floats of {shape} (out, in)")
            state[f"{path}.{leaf}"] = from_stored(t, rows).to(dtype).contiguous()
            used.add(name)
    if config.tied:
        state["head.weight"] = state["wte.weight"]
        copy = family.names["head"] + ".weight"         # some files store the tied weight twice
        if copy in stored and not torch.equal(stored[copy].to(dtype), state["wte.weight"]):
            raise DataError(f"{folder}: config.json ties the head to the embedding, but {copy} differs from "
                            "it; set tie_word_embeddings to false")
        used.add(copy)
    foreign = sorted(set(stored) - used)
    if foreign:
        raise DataError(f"{folder}: the weights hold {foreign[0]}, which a {config.family} model does "
                        f"not have ({len(foreign)} such tensors)")
    return state


def stored_tensors(model):
    """{stored name: tensor} of a model, as transformers stores it; adapter parameters stay out."""
    family = find_family(model.config.family)
    out = {}
    for stored_path, paths in grouped(hf_names(model)).items():
        if paths == ["head"] and model.config.tied:
            continue
        rows = stored_rows(model.config, paths)
        for leaf in ("weight", "bias"):
            parts = [getattr(model.get_submodule(path), leaf, None) for path in paths]
            if parts[0] is not None:
                t = parts[0].detach() if len(parts) == 1 else torch.cat([part.detach() for part in parts])
                out[f"{stored_path}.{leaf}"] = swap_layout(to_stored(t, rows), paths[0], family)
    return out


# --------------------------------------------------------------------------------------------------- families

QKV = ("attn.q", "attn.k", "attn.v")


def rotary_order(config, interleaved):
    """Which numbers of a stored head make one of ours, (hs,).

    Of a head, the first n = rotary_size numbers are turned, in the pairs (j, j + n/2) or, interleaved, (2j,
    2j + 1), and the rest are not. Ours has pairs (j, j + hs/2) of all numbers, those of the rest last.
    """
    turned = torch.arange(config.rotary_size)
    rest = torch.arange(config.rotary_size, config.head_size)
    pairs = turned.view(-1, 2).T if interleaved else turned.view(2, -1)
    return torch.cat((pairs, rest.view(2, -1)), 1).flatten()


def gpt2_rows(config, name):
    """Of c_attn: q, then k, then v."""
    if name not in QKV:
        return None
    return torch.arange(config.n_embd) + config.n_embd * QKV.index(name)


GPT2 = Family(
    model_type="gpt2",
    architecture="GPT2LMHeadModel",
    dialect=dict(position="learned", norm="layernorm", mlp="gelu", qkv_bias=True, o_bias=True, mlp_bias=True,
                 qk_norm=False, rotary_fraction=1.0, parallel_residual=False, post_norm=False),
    read=read_gpt2,
    write=write_gpt2,
    names={"wte": "transformer.wte", "wpe": "transformer.wpe", "ln_f": "transformer.ln_f", "head": "lm_head"},
    block_path="transformer.h.{i}",
    block_names={"ln_1": "ln_1", "attn.q": "attn.c_attn", "attn.k": "attn.c_attn", "attn.v": "attn.c_attn",
                 "ln_2": "ln_2", "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"},
    rows=gpt2_rows,
    transposed=True,
    optional_prefix="transformer.",
    default_targets=("c_attn",))

LLAMA = Family(
    model_type="llama",
    architecture="LlamaForCausalLM",
    dialect=dict(position="rope", norm="rmsnorm", mlp="swiglu", qkv_bias=False, o_bias=False, mlp_bias=False,
                 qk_norm=False, rotary_fraction=1.0, parallel_residual=False, post_norm=False),
    read=read_llama,
    write=write_llama,
    names={"wte": "model.embed_tokens", "ln_f": "model.norm", "head": "lm_head"},
    block_path="model.layers.{i}",
    block_names={"ln_1": "input_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
                 "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj",
                 "attn.q_norm": "self_attn.q_norm", "attn.k_norm": "self_attn.k_norm",
                 "ln_2": "post_attention_layernorm", "mlp.up": "mlp.up_proj", "mlp.gate": "mlp.gate_proj",
                 "mlp.down": "mlp.down_proj"},
    bias_keys={"attention_bias": ("qkv_bias", "o_bias"), "mlp_bias": ("mlp_bias",)},
    default_targets=("q_proj", "v_proj"))

QWEN2 = replace(LLAMA, model_type="qwen2", architecture="Qwen2ForCausalLM",
                dialect={**LLAMA.dialect, "qkv_bias": True}, bias_keys={})      # q, k, v always have biases

QWEN3 = replace(LLAMA, model_type="qwen3", architecture="Qwen3ForCausalLM",
                dialect={**LLAMA.dialect, "qk_norm": True}, default_head_size=128,
                bias_keys={"attention_bias": ("qkv_bias", "o_bias")})

MISTRAL = replace(LLAMA, model_type="mistral", architecture="MistralForCausalLM", read=read_mistral,
                  write=write_mistral, bias_keys={})


def glm_key_order(config):
    return rotary_order(config, interleaved=True)


def glm_rows(config, name):
    """Of q_proj and k_proj: each head in its stored order. Of gate_up_proj: gate, then up."""
    if name in ("attn.q", "attn.k"):
        heads = torch.arange(config.n_head if name == "attn.q" else config.n_kv_head)
        return (config.head_size * heads[:, None] + glm_key_order(config)).flatten()
    if name in ("mlp.gate", "mlp.up"):
        return torch.arange(config.n_inner) + (config.n_inner if name == "mlp.up" else 0)
    return None


GLM = replace(LLAMA, model_type="glm", architecture="GlmForCausalLM",
              dialect={**LLAMA.dialect, "qkv_bias": True, "rotary_fraction": 0.5},
              block_names={**LLAMA.block_names, "mlp.gate": "mlp.gate_up_proj", "mlp.up": "mlp.gate_up_proj"},
              write=write_glm, rows=glm_rows, key_order=glm_key_order, default_head_size=128,
              default_eps=1.5625e-7, bias_keys={"attention_bias": ("qkv_bias",)}, default_targets=())

GLM4 = replace(GLM, model_type="glm4", architecture="Glm4ForCausalLM",
               dialect={**GLM.dialect, "post_norm": True},
               block_names={**GLM.block_names, "post_1": "post_self_attn_layernorm",
                            "post_2": "post_mlp_layernorm"})


def gpt_neox_key_order(config):
    return rotary_order(config, interleaved=False)


def gpt_neox_rows(config, name):
    """Of query_key_value: q, k and v of the first head, then of the second, ..., each in its stored order."""
    if name not in QKV:
        return None
    hs = config.head_size
    order = torch.arange(hs) if name == "attn.v" else gpt_neox_key_order(config)
    starts = 3 * hs * torch.arange(config.n_head) + hs * QKV.index(name)
    return (starts[:, None] + order).flatten()


GPT_NEOX = Family(
    model_type="gpt_neox",
    architecture="GPTNeoXForCausalLM",
    dialect=dict(position="rope", norm="layernorm", mlp="gelu_exact", qkv_bias=True, o_bias=True,
                 mlp_bias=True, qk_norm=False, rotary_fraction=0.25, parallel_residual=True, post_norm=False),
    read=read_gpt_neox,
    write=write_gpt_neox,
    names={"wte": "gpt_neox.embed_in", "ln_f": "gpt_neox.final_layer_norm", "head": "embed_out"},
    block_path="gpt_neox.layers.{i}",
    block_names={"ln_1": "input_layernorm", **dict.fromkeys(QKV, "attention.query_key_value"),
                 "attn.o": "attention.dense", "ln_2": "post_attention_layernorm",
                 "mlp.up": "mlp.dense_h_to_4h", "mlp.down": "mlp.dense_4h_to_h"},
    rows=gpt_neox_rows,
    key_order=gpt_neox_key_order,
    theta_key="rotary_emb_base",
    fraction_key="rotary_pct",
    bias_keys={"attention_bias": ("qkv_bias", "o_bias")},
    renamed={"embed_out": "lm_head"},
    default_targets=("query_key_value",))

FAMILIES = (GPT2, LLAMA, MISTRAL, QWEN2, QWEN3, GLM, GLM4, GPT_NEOX)


def known_families():
    return ", ".join(family.model_type for family in FAMILIES)


def find_family(name):
    """The record of a family by its name; UserError lists the known ones."""
    for family in FAMILIES:
        if family.model_type == name:
            return family
    raise UserError(f"model family {name!r} is unknown; known: {known_families()}")
