"""make_model_fixtures.py: what `transformers` computes, pinned, so that the tests need no `transformers`.

    python tests/make_model_fixtures.py                            writes tests/fixtures/model/, in seconds
    python tests/make_model_fixtures.py --logits OUT.npz FOLDER... logits of folders, for the slow test

For each case in CASES: `<case>.json` holds config.json as transformers 5 wrote it, the same in the dialect of
transformers 4, and the name and shape of every tensor in the model.safetensors that it wrote; `logits.npz`
has the logits, and greedy continuations of the first 6 ids. The weights are not stored: maker and test draw
them by `draw`, from the tensor's name.
Two folders are stored whole, just as `save_pretrained` left them: `gpt2/`, and `sharded/` with its index.
"""
import json
import pathlib
import re
import shutil
import sys
import tempfile
import zlib

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent / "fixtures" / "model"
IDS = np.random.RandomState(7).randint(0, 64, (2, 24))     # 24 tokens tell every llama3 wavelength apart

SHAPE = dict(vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=40,
             max_position_embeddings=64, bos_token_id=1, eos_token_id=2)
GPT2 = dict(vocab_size=64, n_embd=32, n_layer=2, n_head=4, n_positions=64, eos_token_id=[2, 5])
LLAMA3 = dict(rope_type="llama3", rope_theta=10000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
              original_max_position_embeddings=40)
GLM = dict(SHAPE, num_key_value_heads=2, head_dim=16, pad_token_id=None)
NEOX = dict(SHAPE, num_attention_heads=2)               # heads of 16, of which 4 numbers turn
CASES = {
    "gpt2-tied": ("GPT2", GPT2),
    "gpt2-untied": ("GPT2", dict(GPT2, tie_word_embeddings=False, n_inner=48, layer_norm_epsilon=1e-3,
                                 activation_function="gelu_pytorch_tanh")),
    "llama-plain": ("Llama", dict(SHAPE, rms_norm_eps=1e-3)),
    "llama-llama3": ("Llama", dict(SHAPE, num_key_value_heads=2, head_dim=16, rope_parameters=LLAMA3,
                                   tie_word_embeddings=True)),
    "llama-linear": ("Llama", dict(SHAPE, num_key_value_heads=1,
                                   rope_parameters=dict(rope_type="linear", factor=4.0, rope_theta=500.0))),
    "llama-bias": ("Llama", dict(SHAPE, attention_bias=True, mlp_bias=True, num_key_value_heads=2)),
    "qwen2-tied": ("Qwen2", dict(SHAPE, num_key_value_heads=2, tie_word_embeddings=True, sliding_window=None,
                                 rope_parameters=dict(rope_type="default", rope_theta=1e6))),
    "qwen2-untied": ("Qwen2", dict(SHAPE, num_key_value_heads=4)),
    "qwen3-tied": ("Qwen3", dict(SHAPE, num_key_value_heads=2, head_dim=16, tie_word_embeddings=True)),
    "qwen3-bias": ("Qwen3", dict(SHAPE, num_key_value_heads=2, head_dim=8, attention_bias=True)),
    "mistral-untied": ("Mistral", dict(SHAPE, num_key_value_heads=2, sliding_window=None)),
    "mistral-tied": ("Mistral", dict(SHAPE, num_key_value_heads=1, sliding_window=64, head_dim=16,
                                     tie_word_embeddings=True)),
    "glm-untied": ("Glm", dict(GLM)),
    "glm-tied": ("Glm", dict(GLM, attention_bias=False, head_dim=8, tie_word_embeddings=True,
                             rope_parameters=dict(rope_type="default", rope_theta=500.0,
                                                  partial_rotary_factor=1.0))),
    "glm4-untied": ("Glm4", dict(GLM)),
    "glm4-tied": ("Glm4", dict(GLM, num_key_value_heads=1, attention_bias=False, rms_norm_eps=1e-3,
                               tie_word_embeddings=True)),
    "gpt_neox-untied": ("GPTNeoX", dict(NEOX)),
    "gpt_neox-tied": ("GPTNeoX", dict(NEOX, num_attention_heads=4, tie_word_embeddings=True,
                                      use_parallel_residual=False, hidden_act="gelu_fast", layer_norm_eps=1e-3,
                                      rope_parameters=dict(LLAMA3, partial_rotary_factor=0.5))),
    "gpt_neox-bias": ("GPTNeoX", dict(NEOX, attention_bias=False)),
}


def draw(name, shape):
    """The tensor called `name`: large enough that every bias, norm and position shows in the logits.

    RandomState is frozen by numpy's compatibility promise; default_rng is not.
    """
    z = np.random.RandomState(zlib.crc32(name.encode())).standard_normal(shape).astype(np.float32)
    if len(shape) == 2 and min(shape) > 1:
        return z if re.search("embed_(in|tokens)|wte", name) else 1.5 * z / np.float32(32 ** 0.5)
    return 0.3 * z + np.float32(name.endswith("weight"))       # norms around 1, biases around 0


def dialect4(config):
    """config.json as transformers 4 would have written it."""
    old = {k: v for k, v in config.items() if k not in ("rope_parameters", "dtype", "layer_types")}
    old |= dict(torch_dtype=config["dtype"], transformers_version="4.44.0")
    if rope := dict(config.get("rope_parameters") or {}):
        neox = config["model_type"] == "gpt_neox"
        old["rotary_emb_base" if neox else "rope_theta"] = rope.pop("rope_theta")
        if "partial_rotary_factor" in rope:
            old["rotary_pct" if neox else "partial_rotary_factor"] = rope.pop("partial_rotary_factor")
        if rope["rope_type"] == "linear":                       # the older of the two spellings
            rope["type"] = rope.pop("rope_type")
        old["rope_scaling"] = rope if len(rope) > 1 else None
    return old


def loaded(folder):
    from transformers import AutoModelForCausalLM
    model, notes = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True,
                                                        attn_implementation="eager")
    assert not any(notes.values()), notes                       # nothing missing, unexpected or mismatched
    return model.eval()


def logits(folder, ids):
    import torch
    with torch.no_grad():
        return loaded(folder)(torch.tensor(ids)).logits.float().numpy()


def greedy(folder, ids):
    """Up to 12 new tokens per row, -1 behind an end token."""
    import torch
    x = torch.tensor(ids)
    new = loaded(folder).generate(x, max_new_tokens=12, do_sample=False, pad_token_id=63)[:, x.size(1):].tolist()
    end = json.loads((pathlib.Path(folder) / "config.json").read_text())["eos_token_id"]
    for row in new:
        first = min((row.index(e) for e in np.atleast_1d(end) if e in row), default=len(row))
        row[first + 1:] = [-1] * (12 - first - 1)
    return np.array([row + [-1] * (12 - len(row)) for row in new])


def build(family, config):
    import torch
    import transformers
    config = getattr(transformers, f"{family}Config")(**config)
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.from_numpy(draw(name, tuple(p.shape))))
    return model


def redraw(path):
    """Draw by the names in the file: GPT-NeoX's head has another name in memory."""
    import torch
    from safetensors.torch import save_file
    tensors = {name: torch.from_numpy(draw(name, tuple(shape))) for name, shape in header(path).items()}
    save_file(tensors, path, metadata={"format": "pt"})


def header(path):
    raw = path.read_bytes()
    found = json.loads(raw[8:8 + int.from_bytes(raw[:8], "little")])
    return {name: entry["shape"] for name, entry in found.items() if name != "__metadata__"}


def main():
    HERE.mkdir(parents=True, exist_ok=True)
    out = {"ids": IDS}
    for case, (family, config) in CASES.items():
        with tempfile.TemporaryDirectory() as temp:
            folder = pathlib.Path(temp)
            build(family, config).save_pretrained(folder)
            redraw(folder / "model.safetensors")
            out[case] = logits(folder, IDS)
            out[case + "-greedy"] = greedy(folder, IDS[:, :6])
            path = folder / "config.json"
            new = json.loads(path.read_text())
            old = dialect4(new)
            path.write_text(json.dumps(old))
            assert np.array_equal(logits(folder, IDS), out[case]), f"{case}: the old dialect differs"
            (HERE / f"{case}.json").write_text(json.dumps(
                {"config": new, "config4": old, "shapes": header(folder / "model.safetensors")}, indent=1))
            print(case, out[case].std())
    tiny = dict(vocab_size=64, bos_token_id=1, eos_token_id=2)
    for name, family, config, size in (
            ("gpt2", "GPT2", dict(tiny, n_embd=16, n_layer=1, n_head=2, n_positions=32), "1GB"),
            ("sharded", "Llama", dict(SHAPE, hidden_size=16, intermediate_size=24, num_key_value_heads=2),
             "9KB")):
        shutil.rmtree(HERE / name, ignore_errors=True)
        build(family, config).save_pretrained(HERE / name, max_shard_size=size)
        (HERE / name / "generation_config.json").unlink(missing_ok=True)
        out[name] = logits(HERE / name, IDS)
    np.savez_compressed(HERE / "logits.npz", **out)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--logits"]:
        np.savez(sys.argv[2], **{pathlib.Path(folder).name: logits(folder, IDS) for folder in sys.argv[3:]})
    else:
        main()
