"""hf.py: what a Hugging Face model folder says, in our words, and back.

    config.json                       -> the fields of GPTConfig, as a dict            read_config, hf_config
    model.safetensors, or shards      -> one dict of tensors under their stored names   read_weights
    our module path                   -> their module path                              hf_names

transformers 4 and 5 spell two things differently (`rope_theta` + `rope_scaling` against `rope_parameters`,
`torch_dtype` against `dtype`): both are read, both are written. Whatever would change the mathematics and is
not implemented here is refused by name, never ignored.

Public: read_config, hf_config, read_weights, hf_names
"""
import os

from data.files import DataError, read_json, read_tensors


def read_weights(folder):
    """All tensors of a model folder, by name: one model.safetensors, or the shards that the index lists."""
    single, index = (os.path.join(folder, n) for n in ("model.safetensors", "model.safetensors.index.json"))
    if os.path.exists(single):
        return read_tensors(single)
    if not os.path.exists(index):
        raise DataError(f"{folder}: no model.safetensors and no model.safetensors.index.json; "
                        "pickled weights (.bin, .pt) are never read, so convert them first")
    weight_map, out = read_json(index).get("weight_map", {}), {}
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
    h = read_json(path)
    kind = h.get("model_type")
    if kind not in ("gpt2", "llama", "qwen2", "qwen3"):
        raise DataError(f"{path}: model_type {kind!r} is not supported; gpt2, llama, qwen2 and qwen3 are")

    def only(key, *accepted):
        if h.get(key, accepted[0]) not in accepted:
            raise DataError(f"{path}: {key} is {h[key]!r}; supported: {' or '.join(map(repr, accepted))}")

    try:
        common = dict(vocab_size=h["vocab_size"], bos=h.get("bos_token_id"), eos=h.get("eos_token_id"))
        if kind == "gpt2":
            only("activation_function", "gelu_new", "gelu_pytorch_tanh")
            only("scale_attn_weights", True)
            only("scale_attn_by_inverse_layer_idx", False)
            only("add_cross_attention", False)
            return dict(common, n_layer=h["n_layer"], n_head=h["n_head"], n_embd=h["n_embd"],
                        n_inner=h.get("n_inner"), block_size=h.get("n_positions", 1024),
                        norm_eps=h.get("layer_norm_epsilon", 1e-5), tied=h.get("tie_word_embeddings", True))
        only("hidden_act", "silu")
        only("use_sliding_window", False)
        only("pretraining_tp", 1)
        rope = {**(h.get("rope_scaling") or {}), **(h.get("rope_parameters") or {})}
        theta = rope.pop("rope_theta", None) or h.get("rope_theta", 10000.0)
        rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type", "default")
        kinds, plain = ("default", "linear", "llama3"), rope["rope_type"] == "default"
        if rope["rope_type"] not in kinds or rope.get("partial_rotary_factor", 1) != 1:
            raise DataError(f"{path}: rotary positions {rope} are not supported; default, linear, llama3 are")
        bias = h.get("attention_bias", False)           # Llama's switch; Qwen2 has q, k, v biases anyway
        return dict(
            common, n_layer=h["num_hidden_layers"], n_head=h["num_attention_heads"], n_embd=h["hidden_size"],
            n_kv_head=h.get("num_key_value_heads"), n_inner=h["intermediate_size"],
            head_size=h.get("head_dim") or (128 if kind == "qwen3" else None),
            block_size=h["max_position_embeddings"], norm_eps=h.get("rms_norm_eps", 1e-6),
            tied=h.get("tie_word_embeddings", False), position="rope", norm="rmsnorm", mlp="swiglu",
            qkv_bias=bias or kind == "qwen2", o_bias=bias and kind != "qwen2",
            mlp_bias=h.get("mlp_bias", False), qk_norm=kind == "qwen3",
            rope_theta=float(theta), rope_scaling=None if plain else rope)
    except KeyError as e:
        raise DataError(f"{path}: the field {e.args[0]} is missing, and a {kind} model needs it") from None


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
