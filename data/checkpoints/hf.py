"""data/checkpoints/hf.py: what a Hugging Face model folder says, in our words, and back.

    config.json                   -> the fields of GPTConfig, as a dict             read_config (parse_config)
    the fields of GPTConfig       -> config.json                                    hf_config
    model.safetensors, or shards  -> one dict of tensors under their stored names   read_weights
    our module path               -> their module path                              hf_names

transformers 4 and 5 spell two things differently (`rope_theta` + `rope_scaling` against `rope_parameters`,
`torch_dtype` against `dtype`): both are read, both are written. Whatever would change the mathematics and is
not implemented here is refused by name, never ignored.

Public: read_config, parse_config, hf_config, read_weights, hf_names
"""
import json
import os

from data.checkpoints.safetensors import read_tensors
from data.runtime.files import DataError, read_json


def read_weights(folder):
    """All tensors of a model folder, by name: one model.safetensors, or the shards that the index lists."""
    single, index = (os.path.join(folder, n) for n in ("model.safetensors", "model.safetensors.index.json"))
    if os.path.exists(single):
        return read_tensors(single)
    if not os.path.exists(index):
        raise DataError(f"{folder}: no model.safetensors and no model.safetensors.index.json; "
                        "pickled weights (.bin, .pt) are never read, so convert them first")
    found, out = read_json(index), {}
    weight_map = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(weight_map, dict) or not all(isinstance(shard, str) for shard in weight_map.values()):
        raise DataError(f"{index}: weight_map is missing or does not map tensor names to file names")
    for shard in sorted(set(weight_map.values())):
        if os.path.basename(shard) != shard:
            raise DataError(f"{index}: shard {shard!r} is not a file name inside this folder")
        for name, t in read_tensors(os.path.join(folder, shard)).items():
            if weight_map.get(name) != shard:
                raise DataError(f"{index}: {shard} holds {name}, but the index says {weight_map.get(name)}")
            out[name] = t
    if missing := sorted(set(weight_map) - set(out)):
        raise DataError(f"{index}: no shard holds {missing[0]}")
    return out


def read_config(folder):
    """config.json -> the fields of GPTConfig."""
    path = os.path.join(folder, "config.json")
    if not os.path.exists(path):
        raise DataError(f"{folder}: no config.json; a model folder holds config.json, model.safetensors "
                        "and a tokenizer")
    return parse_config(read_json(path), path)


def parse_config(h, path):
    """The object in config.json -> the fields of GPTConfig. JSON's null means absent, as in transformers."""
    kind = h.get("model_type") if isinstance(h, dict) else None
    if kind not in ("gpt2", "llama", "qwen2", "qwen3"):
        raise DataError(f"{path}: model_type {kind!r} is not supported; gpt2, llama, qwen2 and qwen3 are")

    def only(key, *accepted):
        if h.get(key) not in (None, *accepted):
            raise DataError(f"{path}: {key} is {json.dumps(h[key])[:80]}; supported here: "
                            f"{' or '.join(map(json.dumps, accepted))}")

    def take(key, what, *default, of=h):
        value = of.get(key)
        if value is None and default:
            return default[0]
        number = type(value) is int or what is float and type(value) is float
        if type(value) is not bool if what is bool else not (number and 0 < value < float("inf")):
            need = {int: "a whole number above 0", float: "a number above 0", bool: "true or false"}[what]
            found = "missing" if value is None else f"{value!r:.80}"
            raise DataError(f"{path}: {key} is {found}, and a {kind} model needs {need} there")
        return value

    only("quantization_config", None)                   # packed weights are no weights
    common = dict(vocab_size=take("vocab_size", int), bos=h.get("bos_token_id"), eos=h.get("eos_token_id"))
    if kind == "gpt2":
        only("activation_function", "gelu_new", "gelu_pytorch_tanh")
        only("scale_attn_weights", True)
        only("scale_attn_by_inverse_layer_idx", False)
        only("add_cross_attention", False)
        return dict(common, n_layer=take("n_layer", int), n_head=take("n_head", int),
                    n_embd=take("n_embd", int), n_inner=take("n_inner", int, None),
                    block_size=take("n_positions", int, 1024), tied=take("tie_word_embeddings", bool, True),
                    norm_eps=take("layer_norm_epsilon", float, 1e-5))
    only("hidden_act", "silu")
    only("use_sliding_window", False)
    only("pretraining_tp", 1)
    only("partial_rotary_factor", 1)
    block_size = take("max_position_embeddings", int)
    bias = take("attention_bias", bool, False) and kind != "qwen2"      # Qwen2 has q, k, v biases whatever
    return dict(
        common, n_layer=take("num_hidden_layers", int), n_head=take("num_attention_heads", int),
        n_embd=take("hidden_size", int), n_kv_head=take("num_key_value_heads", int, None),
        head_size=take("head_dim", int, 128 if kind == "qwen3" else None),
        n_inner=take("intermediate_size", int), block_size=block_size,
        norm_eps=take("rms_norm_eps", float, 1e-6), tied=take("tie_word_embeddings", bool, False),
        position="rope", norm="rmsnorm", mlp="swiglu", qkv_bias=bias or kind == "qwen2", o_bias=bias,
        mlp_bias=kind == "llama" and take("mlp_bias", bool, False), qk_norm=kind == "qwen3",
        **parse_rope(h, path, take, block_size))


def parse_rope(h, path, take, block_size):
    """rope_theta and rope_scaling, from either dialect; given both, transformers 5 reads the old one."""
    rope = h.get("rope_scaling") or h.get("rope_parameters") or {}
    kind = (rope.get("rope_type") or rope.get("type") or "default") if isinstance(rope, dict) else None
    fields = dict(default=(), linear=("factor",), llama3=("factor", "low_freq_factor", "high_freq_factor"))
    if not isinstance(kind, str) or kind not in fields or rope.get("partial_rotary_factor") not in (None, 1) \
            or any(isinstance(value, dict) for value in rope.values()):
        raise DataError(f"{path}: rotary positions {rope!r:.150} are not supported; rope_type default, "
                        "linear and llama3 are, the same in every layer")
    theta = float(take("rope_theta", float, take("rope_theta", float, 10000.0), of=rope))
    scaling = {"rope_type": kind, **{name: take(name, float, of=rope) for name in fields[kind]}}
    if kind == "llama3":                                # the context before it was stretched
        old = "original_max_position_embeddings"
        scaling[old] = take(old, int, take(old, int, block_size, of=rope))
    return dict(rope_theta=theta, rope_scaling=None if kind == "default" else scaling)


def hf_config(c, dtype):
    """GPTConfig -> the dict of config.json, for weights stored in `dtype`."""
    name = str(dtype).removeprefix("torch.")
    common = dict(vocab_size=c.vocab_size, tie_word_embeddings=c.tied, bos_token_id=c.bos, eos_token_id=c.eos,
                  dtype=name, torch_dtype=name)
    if c.family == "gpt2":
        return dict(common, model_type="gpt2", architectures=["GPT2LMHeadModel"], n_positions=c.block_size,
                    n_ctx=c.block_size, n_layer=c.n_layer, n_head=c.n_head, n_embd=c.n_embd,
                    n_inner=c.n_inner, activation_function="gelu_new", layer_norm_epsilon=c.norm_eps)
    rope = {"rope_theta": c.rope_theta, "rope_type": "default", **(c.rope_scaling or {})}
    return dict(common, model_type=c.family, architectures=[c.family.capitalize() + "ForCausalLM"],
                hidden_size=c.n_embd, intermediate_size=c.n_inner, num_hidden_layers=c.n_layer,
                num_attention_heads=c.n_head, num_key_value_heads=c.n_kv_head, head_dim=c.head_size,
                hidden_act="silu", rms_norm_eps=c.norm_eps, max_position_embeddings=c.block_size,
                attention_bias=c.o_bias, mlp_bias=c.mlp_bias, rope_theta=c.rope_theta,
                rope_scaling=c.rope_scaling, rope_parameters=rope)


GPT2 = {"ln_1": "ln_1", "attn.q": "attn.c_attn", "attn.k": "attn.c_attn", "attn.v": "attn.c_attn",
        "ln_2": "ln_2", "attn.o": "attn.c_proj", "mlp.up": "mlp.c_fc", "mlp.down": "mlp.c_proj"}
LLAMA = {"ln_1": "input_layernorm", "attn.q": "self_attn.q_proj", "attn.k": "self_attn.k_proj",
         "attn.v": "self_attn.v_proj", "attn.o": "self_attn.o_proj", "attn.q_norm": "self_attn.q_norm",
         "attn.k_norm": "self_attn.k_norm", "ln_2": "post_attention_layernorm", "mlp.up": "mlp.up_proj",
         "mlp.gate": "mlp.gate_proj", "mlp.down": "mlp.down_proj"}


def hf_names(model):
    """Our module path -> (their module path, part); part is "q" | "k" | "v" of a fused c_attn, or None."""
    gpt2 = model.config.family == "gpt2"
    names = dict(wte="transformer.wte", wpe="transformer.wpe") if gpt2 else dict(wte="model.embed_tokens")
    for i in range(model.config.n_layer):
        stem = f"transformer.h.{i}" if gpt2 else f"model.layers.{i}"
        inner = GPT2 if gpt2 else LLAMA
        names.update({f"blocks.{i}.{ours}": f"{stem}.{theirs}" for ours, theirs in inner.items()})
    names.update(ln_f="transformer.ln_f" if gpt2 else "model.norm", head="lm_head")
    mine = dict(model.named_modules())
    return {ours: (theirs, ours[-1] if theirs.endswith("c_attn") else None)
            for ours, theirs in names.items() if mine.get(ours) is not None}
