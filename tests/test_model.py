"""test_model.py: the transformer against transformers' logits (pinned), a naive oracle, and itself.

The fixtures come from make_model_fixtures.py, which also draws the weights (`draw`): two rows of 24 ids,
vocabulary 64, width 32, 2 layers. Weights, biases and norms are all random and large: a dropped one shows.
"""
import dataclasses
import json
import math
import os
import pathlib
import pickle
import shutil
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data.checkpoints.safetensors import read_tensors, write_tensors
from data.runtime.files import DataError, UserError, read_json, write_json
from data.checkpoints import hf
from data.checkpoints.hf import FAMILIES, find_family, parse_config, read_config
from make_model_fixtures import CASES, HERE, IDS, draw
from model import GPT, GPTConfig, KVCache, Past, RMSNorm, attend, generate, glm_position_ids, length_groups
from model import filter_logits, past_length, rope_table, sample, token_logprobs

LOGITS = np.load(HERE / "logits.npz")
CLOSE = 5e-5            # logits reach 23; two fp32 programs, each up to 3e-5 from the same sum in fp64
SMALL = GPTConfig(vocab_size=64, block_size=32, n_layer=2, n_head=4, n_embd=32)
STRETCH = dict(rope_type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
               original_max_position_embeddings=32)
KINDS = {"gpt2": SMALL, "llama": SMALL.as_family("llama", n_kv_head=2, head_size=16, rope_scaling=STRETCH),
         "qwen3": SMALL.as_family("qwen3", n_kv_head=1, tied=False),
         "glm4": SMALL.as_family("glm4", n_kv_head=2, head_size=16, tied=False),
         "gpt_neox": SMALL.as_family("gpt_neox", head_size=16, n_inner=64, tied=False)}
ANY = pytest.mark.parametrize("kind", KINDS)


def make(kind, seed=0, **changes):
    """A model whose every parameter matters: as `draw`, but for our own names and any config."""
    model = GPT(dataclasses.replace(KINDS[kind], **changes))
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            z = torch.randn(p.shape, generator=rng)
            loud = 1.0 if name.startswith(("wte", "wpe")) else 1.5 / 32 ** 0.5
            p.copy_(z * loud if p.dim() == 2 else 0.3 * z + name.endswith("weight"))
    return model.eval()


def ids(*lengths, seed=1):
    rng = np.random.RandomState(seed)
    return [rng.randint(0, 64, n).tolist() for n in lengths]


def pad(rows, fill=0):
    return torch.tensor([row + [fill] * (max(map(len, rows)) - len(row)) for row in rows])


def soft(model, P, B=1, seed=2, gate=None):
    """A random past of P columns and batch B in every layer; with `gate`, side memory."""
    rng, (nh, nkv, hs) = torch.Generator().manual_seed(seed), model.blocks[0].attn.heads
    dtype = model.wte.weight.dtype
    k, v = (torch.randn(len(model.blocks), B, nkv, P, hs, generator=rng).to(dtype) for _ in range(2))
    return [Past(k[i], v[i], gate) for i in range(len(model.blocks))]


def folder_of(case, tmp_path, dialect="config", edit=None, config=None):
    """The Hugging Face folder of a case; `edit` changes its tensors, `config` its configuration, in place."""
    case = json.loads((HERE / f"{case}.json").read_text())
    tensors = {name: torch.from_numpy(draw(name, tuple(shape))) for name, shape in case["shapes"].items()}
    if edit:
        edit(tensors)
    if config:
        config(case[dialect])
    tmp_path.mkdir(exist_ok=True)
    write_tensors(tmp_path / "model.safetensors", tensors)
    write_json(tmp_path / "config.json", case[dialect])
    return tmp_path


def load_case(case, tmp_path, **how):
    return GPT.from_pretrained(folder_of(case, tmp_path, **how))


@torch.no_grad()
def logits(model, x, past=None):
    return model(torch.as_tensor(x), past=past)[0]


# ---- the oracle: one row, one head, one query at a time, in numpy at float64 -------------------------------

def naive(model, row, past=None, side=None):
    """Logits (T, V) of one row of ids. past, side: (k, v) per layer, each (nkv, P, hs); side adds a gate. An
    entry of `past` may be None: that layer attends to the row alone, whose positions still start at P."""
    c, every = model.config, model.named_parameters(remove_duplicate=False)
    w = {name: p.detach().double().numpy() for name, p in every}

    def linear(name, x):
        return x @ w[name + ".weight"].T + w.get(name + ".bias", 0.0)

    def norm(name, x):
        if c.norm == "layernorm":
            x = x - x.mean(-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(-1, keepdims=True) + c.norm_eps)
        return x * w[name + ".weight"] + w.get(name + ".bias", 0.0)

    def turn(x, position):                  # (hs,): rotation of the plane (j, j + hs/2), as complex numbers
        half = c.head_size // 2
        turned = int(half * c.rotary_fraction)                          # the other planes stand still
        freq = np.append(c.rope_theta ** (-np.arange(turned) / turned), np.zeros(half - turned))
        if (s := c.rope_scaling) is not None:
            for j, f in enumerate(freq):
                wave, old = 2 * math.pi / f, s["original_max_position_embeddings"]
                smooth = (old / wave - s["low_freq_factor"]) / (s["high_freq_factor"] - s["low_freq_factor"])
                if wave > old / s["low_freq_factor"]:
                    freq[j] = f / s["factor"]
                elif wave > old / s["high_freq_factor"]:
                    freq[j] = (1 - smooth) * f / s["factor"] + smooth * f
        z = (x[:half] + 1j * x[half:]) * np.exp(1j * position * freq)
        return np.concatenate([z.real, z.imag])

    def look(q, k, v):                      # one query over the keys that it may see
        score = np.array([q @ key for key in k]) / math.sqrt(c.head_size)
        weight = np.exp(score - score.max())
        return (weight[:, None] * np.array(v)).sum(0) / weight.sum()

    T, P = len(row), max([0, *(entry[0].shape[1] for entry in past or () if entry is not None)])
    h = w["wte.weight"][row]
    if c.position == "learned":
        h = h + w["wpe.weight"][P:P + T]
    for i in range(c.n_layer):
        at, z = f"blocks.{i}.attn", norm(f"blocks.{i}.ln_1", h)
        heads = {n: linear(f"{at}.{n}", z).reshape(T, -1, c.head_size) for n in "qkv"}
        for n in "qk":
            if c.qk_norm:
                heads[n] = norm(f"{at}.{n}_norm", heads[n])
            if c.position == "rope":
                for t in range(T):
                    heads[n][t] = [turn(x, P + t) for x in heads[n][t]]
        y = np.zeros((T, c.n_head, c.head_size))
        for n in range(c.n_head):
            g = n // (c.n_head // c.n_kv_head)                          # the group's key/value head
            before = ([], [])
            if past is not None and past[i] is not None:
                before = [list(t[g].double().numpy()) for t in past[i]]
            for t in range(T):
                y[t, n] = look(heads["q"][t, n], before[0] + list(heads["k"][:t + 1, g]),
                               before[1] + list(heads["v"][:t + 1, g]))
                if side is not None:
                    k, v, gate = side[i]
                    memory = look(heads["q"][t, n], k[g].double().numpy(), v[g].double().numpy())
                    y[t, n] = (1 - gate[n]) * y[t, n] + gate[n] * memory
        y = linear(f"{at}.o", y.reshape(T, -1))
        y = h + (norm(f"blocks.{i}.post_1", y) if c.post_norm else y)
        z = norm(f"blocks.{i}.ln_2", h if c.parallel_residual else y)
        a = linear(f"blocks.{i}.mlp.up", z)
        if c.mlp == "swiglu":
            b = linear(f"blocks.{i}.mlp.gate", z)
            a = a * b / (1 + np.exp(-b))
        elif c.mlp == "gelu_exact":
            a = a * np.vectorize(lambda x: (1 + math.erf(x / math.sqrt(2))) / 2)(a)
        else:
            a = 0.5 * a * (1 + np.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a ** 3)))
        a = linear(f"blocks.{i}.mlp.down", a)
        h = y + (norm(f"blocks.{i}.post_2", a) if c.post_norm else a)
    return norm("ln_f", h) @ w["head.weight"].T


@ANY
def test_the_model_is_the_textbook(kind):
    model, (row,) = make(kind).double(), ids(11)
    past, gate = soft(model, 5), torch.tensor([0.0, 1.0, 0.5, 0.2])
    side = soft(model, 4, gate=gate.view(4, 1, 1))                      # one gate per head
    closed = (side[0].k[0], side[0].v[0], np.zeros(4))                  # side memory that has no effect
    first = [(k[0], v[0]) for k, v, _ in past]
    second = [(k[0], v[0], gate.numpy()) for k, v, _ in side]
    for given, expected in ((None, naive(model, row)), (past, naive(model, row, first)),
                          (side, naive(model, row, side=second)),
                          ([None, past[1]], naive(model, row, [None, first[1]])),
                          ([past[0], None], naive(model, row, [first[0], None])),
                          ([None, side[1]], naive(model, row, side=[closed, second[1]])),
                          ([past[0], side[1]], naive(model, row, [first[0], None], [closed, second[1]]))):
        assert np.abs(logits(model, [row], given)[0].numpy() - expected).max() < 1e-5      # angles are fp32


# ---- Hugging Face folders ----------------------------------------------------------------------------------

@pytest.mark.parametrize("dialect", ["config", "config4"])
@pytest.mark.parametrize("case", CASES)
def test_logits_of_transformers(case, dialect, tmp_path):
    model = load_case(case, tmp_path, dialect=dialect)
    assert np.abs(logits(model, IDS).numpy() - LOGITS[case]).max() < CLOSE
    stored = read_tensors(tmp_path / "model.safetensors")
    head = find_family(model.config.family).names["head"] + ".weight"
    assert (model.head.weight is model.wte.weight) == (head not in stored)


@pytest.mark.parametrize("case", CASES)
def test_greedy_tokens_of_transformers(case, tmp_path):
    model = load_case(case, tmp_path)
    found = generate(model, IDS[:, :6].tolist(), 12, temperature=0, eos=model.config.eos)
    assert found == [[i for i in row if i >= 0] for row in LOGITS[case + "-greedy"].tolist()]


@pytest.mark.parametrize("name", ["gpt2", "sharded"])
def test_folders_written_by_transformers(name):
    assert np.abs(logits(GPT.from_pretrained(HERE / name), IDS).numpy() - LOGITS[name]).max() < 1e-5


def test_config_dialects():
    def read(h):
        return parse_config(h, "config.json")

    def rope(h):
        return {k: v for k, v in read(h).items() if k.startswith("rope")}

    base = json.loads((HERE / "llama-plain.json").read_text())["config4"] | {"rope_theta": 777.0}
    linear = {"rope_theta": 777.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    assert rope(base) == {"rope_theta": 777.0, "rope_scaling": None}
    assert rope(base | {"rope_scaling": {"type": "linear", "factor": 2.0}}) == linear
    assert rope(base | {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 777.0},
                        "rope_theta": 5.0}) == linear
    assert rope(base | {"rope_scaling": None, "rope_parameters": {"rope_theta": 5.0}})["rope_theta"] == 5.0
    stretched = {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = "original_max_position_embeddings"
    assert rope(base | {"rope_scaling": stretched})["rope_scaling"][old] == base["max_position_embeddings"]
    assert rope(base | {"rope_scaling": stretched | {old: 9}})["rope_scaling"][old] == 9
    assert rope(base | {"rope_scaling": stretched | {old: 9}, old: 7})["rope_scaling"][old] == 7
    mistral = json.loads((HERE / "mistral-tied.json").read_text())["config"]
    mistral.pop("sliding_window")                       # absent is 4096, as in transformers; null is none
    assert read(mistral)["block_size"] == 64
    with pytest.raises(DataError, match="sliding_window is 4096, shorter than the context of 8192"):
        read(mistral | {"max_position_embeddings": 8192})
    assert read(mistral | {"max_position_embeddings": 8192, "sliding_window": None})["block_size"] == 8192
    glm = json.loads((HERE / "glm-untied.json").read_text())["config"]
    for key in ("rope_parameters", "rms_norm_eps", "attention_bias", "head_dim"):
        glm.pop(key)
    bare = GPTConfig(**read(glm))
    assert (bare.rotary_fraction, bare.norm_eps, bare.qkv_bias, bare.head_size) == (0.5, 1.5625e-7, True, 128)
    absent = dict.fromkeys(("head_dim", "num_key_value_heads", "tie_word_embeddings"))
    bare = GPTConfig(**read(base | absent))
    assert (bare.n_kv_head, bare.head_size, bare.tied) == (4, 8, False)


def test_hub_gpt2_without_prefix_and_with_mask_buffers(tmp_path):
    def edit(t):
        for name in list(t):
            t[name.removeprefix("transformer.")] = t.pop(name)
        for i in range(2):
            t[f"h.{i}.attn.bias"] = torch.ones(1, 1, 64, 64).tril()
            t[f"h.{i}.attn.masked_bias"] = torch.tensor(-1e4)
    model = load_case("gpt2-tied", tmp_path, edit=edit)
    assert np.abs(logits(model, IDS).numpy() - LOGITS["gpt2-tied"]).max() < CLOSE


def test_old_rotary_buffers_and_a_stored_copy_of_the_tied_head_are_no_fault(tmp_path):
    def edit(t):
        t["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(8)
        t["lm_head.weight"] = t["model.embed_tokens.weight"].clone()
    model = load_case("llama-llama3", tmp_path, edit=edit)
    assert model.head.weight is model.wte.weight
    assert np.abs(logits(model, IDS).numpy() - LOGITS["llama-llama3"]).max() < CLOSE


def test_hub_pythia_with_mask_and_rotary_buffers(tmp_path):
    def edit(t):
        for i in range(2):
            t[f"gpt_neox.layers.{i}.attention.bias"] = torch.ones(1, 1, 64, 64).tril().bool()
            t[f"gpt_neox.layers.{i}.attention.masked_bias"] = torch.tensor(-1e9)
            t[f"gpt_neox.layers.{i}.attention.rotary_emb.inv_freq"] = torch.ones(2)
    model = load_case("gpt_neox-untied", tmp_path, edit=edit)
    assert np.abs(logits(model, IDS).numpy() - LOGITS["gpt_neox-untied"]).max() < CLOSE


@pytest.mark.parametrize("case", CASES)
def test_save_is_what_transformers_wrote(case, tmp_path):
    """Same names, shapes and bits as the file that transformers saved; a config that reads the same."""
    def shape(folder):
        return GPTConfig(**read_config(folder))

    source, target = folder_of(case, tmp_path / "in"), tmp_path / "new" / "out"
    GPT.from_pretrained(source).save_pretrained(target)
    theirs, ours = read_tensors(source / "model.safetensors"), read_tensors(target / "model.safetensors")
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[k], ours[k]) for k in theirs)
    assert shape(target) == shape(source)
    written = read_json(target / "config.json")
    assert written["dtype"] == written["torch_dtype"] == "float32"
    # What transformers 5 reads and what transformers 4 reads must each be the model.
    new = {k: v for k, v in written.items() if k not in ("rope_theta", "rope_scaling", "torch_dtype")}
    old = {k: v for k, v in written.items() if k not in ("rope_parameters", "dtype")}
    for dialect in (new, old):
        write_json(target / "config.json", dialect)
        assert shape(target) == shape(source)


@pytest.mark.slow
def test_transformers_loads_what_we_save(tmp_path):
    """PEERS is a python that has transformers; it loads our folders, and may miss nothing or find more."""
    if not os.environ.get("PEERS"):
        pytest.skip("PEERS: no python with transformers given")
    ours = {}
    for case in CASES:
        model = load_case(case, tmp_path / "in")
        with torch.no_grad():
            for p in model.parameters():                # not the fixture's numbers: trained ones
                p.mul_(0.9)
        model.save_pretrained(tmp_path / case)
        ours[case] = logits(model, IDS).numpy()
    script = pathlib.Path(__file__).parent / "make_model_fixtures.py"
    subprocess.run([os.environ["PEERS"], script, "--logits", tmp_path / "theirs.npz", *(tmp_path / c for c in CASES)],
                   check=True, capture_output=True)
    theirs = np.load(tmp_path / "theirs.npz")
    for case in CASES:
        assert np.abs(ours[case] - theirs[case]).max() < CLOSE, case
        assert np.abs(theirs[case] - LOGITS[case]).max() > 0.01, case


def test_adapter_parameters_stay_out_of_the_saved_model(tmp_path):
    model = make("gpt2")
    expected = set(hf.hf_names(load_case("gpt2-tied", tmp_path / "a")))
    model.blocks[0].attn.q.lora_A = torch.nn.Parameter(torch.ones(2, 32))
    model.save_pretrained(tmp_path / "b")
    saved = read_tensors(tmp_path / "b" / "model.safetensors")
    assert set(hf.hf_names(model)) == expected and not [name for name in saved if "lora" in name]
    fused = saved["transformer.h.0.attn.c_attn.weight"]
    assert torch.equal(fused[:, 32:64], model.blocks[0].attn.k.weight.t())


def test_hf_names_cover_every_parameter_once():
    for kind, config in KINDS.items():
        model = make(kind)
        names = {f"{ours}.{leaf}" for ours in hf.hf_names(model)
                 for leaf, _ in model.get_submodule(ours).named_parameters()}
        assert names == {name for name, _ in model.named_parameters(remove_duplicate=False)}
        assert config.family in (kind, "llama")
    names = hf.hf_names(make("gpt2"))
    assert names["blocks.1.attn.k"] == "transformer.h.1.attn.c_attn"
    assert names["blocks.1.attn.o"] == "transformer.h.1.attn.c_proj"
    assert hf.hf_names(make("llama"))["blocks.0.mlp.gate"] == "model.layers.0.mlp.gate_proj"


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_stored_dtype(dtype, tmp_path):
    model = make("llama").to(dtype)
    model.save_pretrained(tmp_path)
    assert read_json(tmp_path / "config.json")["dtype"] == str(dtype)[6:]
    again = GPT.from_pretrained(tmp_path, dtype=dtype)
    assert all(torch.equal(a, b) and a.dtype == dtype for a, b in zip(model.parameters(), again.parameters()))
    assert GPT.from_pretrained(tmp_path).wte.weight.dtype == torch.float32
    model.blocks[1].attn.v.float()
    model.save_pretrained(tmp_path)                     # the widest: a loader that obeys it rounds nothing
    assert read_json(tmp_path / "config.json")["dtype"] == {2: "float32", 8: "float64"}[dtype.itemsize]


def test_loading_draws_nothing_and_training_never_reaches_the_file(tmp_path):
    folder, state = folder_of("llama-plain", tmp_path), torch.get_rng_state()
    before = (folder / "model.safetensors").read_bytes()
    model = GPT.from_pretrained(folder)
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.requires_grad and p.is_leaf and not p.is_meta for p in model.parameters())
    with torch.no_grad():
        for p in model.parameters():
            p.zero_()
    assert (folder / "model.safetensors").read_bytes() == before
    model.save_pretrained(folder)                       # over the file that it is mapped from
    assert not any(t.any() for t in read_tensors(folder / "model.safetensors").values())


# ---- folders with a fault: one sentence, which names the file and the tensor or field ----------------------

def drop(name):
    return lambda t: t.pop(name)


def put(name, value):
    return lambda t: t.update({name: value})


CONFIG_FAULTS = [
    ("gpt2-tied", {"model_type": "bert"}, "model_type 'bert' is not supported"),
    ("gpt2-tied", {"model_type": None}, "model_type None"),
    ("llama-plain", {"model_type": ["llama"]}, "model_type ['llama']"),
    ("gpt2-tied", {"activation_function": "relu"}, 'activation_function is "relu"'),
    ("gpt2-tied", {"scale_attn_weights": False}, "scale_attn_weights is false"),
    ("gpt2-tied", {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx is true"),
    ("gpt2-tied", {"add_cross_attention": True}, "add_cross_attention is true"),
    ("gpt2-tied", {"vocab_size": None}, "vocab_size is missing"),
    ("gpt2-tied", {"n_layer": 0}, "n_layer is 0, and a gpt2 model needs a whole number above 0"),
    ("gpt2-tied", {"n_layer": "2"}, "n_layer is '2'"),
    ("gpt2-tied", {"n_head": True}, "n_head is True"),
    ("gpt2-tied", {"n_head": 5}, "width 32 is not 5 heads times 6"),
    ("gpt2-tied", {"n_embd": 32.0}, "n_embd is 32.0"),
    ("gpt2-tied", {"n_inner": -1}, "n_inner is -1"),
    ("gpt2-tied", {"n_positions": []}, "n_positions is []"),
    ("gpt2-tied", {"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon is nan"),
    ("gpt2-tied", {"tie_word_embeddings": "yes"}, "is 'yes', and a gpt2 model needs true or false"),
    ("llama-plain", {"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
    ("llama-plain", {"pretraining_tp": 2}, "pretraining_tp is 2"),
    ("llama-plain", {"quantization_config": {"bits": 4}}, "quantization_config is"),
    ("llama-plain", {"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
    ("llama-plain", {"num_hidden_layers": None}, "num_hidden_layers is missing, and a llama model"),
    ("llama-plain", {"num_key_value_heads": 3}, "4 heads cannot share 3 key/value heads"),
    ("llama-plain", {"head_dim": 7}, "head_size must be even; it is 7"),
    ("llama-plain", {"rms_norm_eps": "1e-6"}, "rms_norm_eps is '1e-6'"),
    ("llama-plain", {"max_position_embeddings": None}, "max_position_embeddings is missing"),
    ("llama-plain", {"rope_parameters": {"rope_type": "yarn", "factor": 2.0}}, "'rope_type': 'yarn'"),
    ("llama-plain", {"rope_parameters": {"rope_type": ["linear"]}}, "rotary positions"),
    ("llama-plain", {"rope_parameters": "linear"}, "rotary positions 'linear'"),
    ("llama-plain", {"rope_parameters": {"full_attention": {"rope_type": "default"}}}, "in every layer"),
    ("llama-plain", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("llama-plain", {"rope_parameters": {"rope_theta": 0}}, "rope_theta is 0"),
    ("llama-plain", {"rope_parameters": {"rope_type": "linear"}}, "factor is missing"),
    ("llama-plain", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'type': 'dynamic'"),
    ("llama-llama3", {"rope_parameters": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 1.0}},
     "high_freq_factor is missing"),
    ("qwen2-tied", {"use_sliding_window": True}, "use_sliding_window is true"),
    ("mistral-untied", {"sliding_window": 63}, "sliding_window is 63, shorter than the context of 64"),
    ("mistral-untied", {"sliding_window": "32"}, "sliding_window is '32'"),
    ("glm-untied", {"hidden_act": "gelu"}, 'hidden_act is "gelu"'),
    ("glm-untied", {"rope_parameters": {"partial_rotary_factor": 1.5}}, "partial_rotary_factor is 1.5; a glm model"),
    ("glm4-untied", {"rope_parameters": {"partial_rotary_factor": 0.2}}, "it is 16, of which 3 turn"),
    ("glm4-untied", {"attention_bias": "yes"}, "attention_bias is 'yes'"),
    ("gpt_neox-untied", {"hidden_act": "relu"}, 'hidden_act is "relu"'),
    ("gpt_neox-untied", {"use_parallel_residual": 1}, "use_parallel_residual is 1"),
    ("gpt_neox-untied", {"num_attention_heads": 32}, "head_size must be even; it is 1"),
    ("qwen3-tied", {"use_sliding_window": True}, "use_sliding_window is true"),
]


@pytest.mark.parametrize("case, change, words", CONFIG_FAULTS)
def test_config_faults(case, change, words, tmp_path):
    folder_of(case, tmp_path, config=lambda h: h.update(change))
    with pytest.raises(DataError) as e:
        GPT.from_pretrained(tmp_path)
    assert words in str(e.value) and str(tmp_path / "config.json") in str(e.value)
    assert len(str(e.value)) < 400 and e.value.code == 65


@pytest.mark.parametrize("value", [5000, 2 ** 31 - 1, 2 ** 31, 10 ** 30])
@pytest.mark.parametrize("case", ["gpt2-tied", "llama-plain"])
def test_sizes_that_the_weights_cannot_have_are_refused_before_they_are_built(case, value, tmp_path, monkeypatch):
    def never(*args):
        raise AssertionError("built")

    sizes = dict(gpt2=("vocab_size", "n_layer", "n_embd", "n_inner", "n_positions"),
                 llama=("vocab_size", "num_hidden_layers", "hidden_size", "intermediate_size", "head_dim"))
    monkeypatch.setattr(GPT, "__init__", never)
    for key in sizes[case[:5].rstrip("-")]:
        change = {key: value, "n_head": 1} if key == "n_embd" else {key: value}
        folder_of(case, tmp_path, config=lambda h: h.update(change))
        with pytest.raises(DataError, match="config.json") as e:
            GPT.from_pretrained(tmp_path)
        assert str(tmp_path) in str(e.value) and len(str(e.value)) < 300
    shutil.copytree(HERE / "sharded", tmp_path / "sharded")
    path = tmp_path / "sharded" / "config.json"
    sharded = read_json(path)
    for key in ("num_hidden_layers", "vocab_size", "intermediate_size"):
        write_json(path, sharded | {key: value})
        with pytest.raises(DataError, match=f"{value}"):
            GPT.from_pretrained(tmp_path / "sharded")


@pytest.mark.parametrize("text, words", [
    ("[]", "model_type None"), ("7", "model_type None"), ("", "not valid JSON"),
    ('{"model_type": "gpt2", "model_type": "gpt2"}', "twice")])
def test_config_that_is_no_object(text, words, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(DataError, match=words):
        GPT.from_pretrained(tmp_path)


C_ATTN, GATE = "transformer.h.1.attn.c_attn.weight", "model.layers.1.mlp.gate_proj.weight"
GATE_UP, FUSED_QKV = "model.layers.0.mlp.gate_up_proj.weight", "gpt_neox.layers.1.attention.query_key_value.bias"
TENSOR_FAULTS = [                                       # case, edit of the tensors, words of the error
    ("gpt2-tied", drop(C_ATTN), f"the weights lack {C_ATTN}, which a gpt2 model needs"),
    ("gpt2-tied", drop("transformer.ln_f.bias"), "lack transformer.ln_f.bias"),
    ("gpt2-tied", put(C_ATTN, torch.zeros(96, 32)), f"{C_ATTN} is torch.float32 [32, 96]"),
    ("gpt2-tied", put(C_ATTN, torch.zeros(32, 97)), f"{C_ATTN} is"),
    ("gpt2-tied", put(C_ATTN, torch.zeros(32, 96, dtype=torch.int8)), f"{C_ATTN} is torch.int8"),
    ("gpt2-tied", put("transformer.h.2.ln_1.weight", torch.ones(32)), "hold transformer.h.2.ln_1.weight"),
    ("gpt2-tied", put("score.weight", torch.ones(1, 32)), "hold score.weight, which a gpt2 model does"),
    ("gpt2-tied", put("wte.weight", torch.ones(64, 32)), "hold wte.weight"),    # with the prefix and without
    ("gpt2-tied", put("lm_head.weight", torch.zeros(64, 32)), "lm_head.weight differs"),
    ("gpt2-untied", drop("lm_head.weight"), "lack lm_head.weight"),
    ("llama-llama3", put("lm_head.weight", torch.zeros(64, 32)), "set tie_word_embeddings to false"),
    ("llama-plain", drop("lm_head.weight"), "lack lm_head.weight"),
    ("llama-plain", drop(GATE), f"lack {GATE}"),
    ("llama-plain", put(GATE, torch.zeros(32, 40)), f"{GATE} is torch.float32 [32, 40], but config"),
    ("llama-plain", put("model.layers.0.self_attn.q_proj.bias", torch.zeros(32)), "q_proj.bias"),
    ("qwen2-tied", drop("model.layers.1.self_attn.v_proj.bias"), "lack model.layers.1.self_attn.v_proj.bias"),
    ("qwen3-tied", drop("model.layers.0.self_attn.k_norm.weight"), "lack model.layers.0.self_attn.k_norm"),
    ("llama-plain", put("model.layers.0.self_attn.q_norm.weight", torch.ones(8)), "q_norm.weight"),
    ("llama-plain", put("base_model.model.x.lora_A.weight", torch.ones(8)), "lora_A.weight"),
    ("glm4-tied", drop(GATE_UP), f"the weights lack {GATE_UP}, which a glm4 model needs"),
    ("glm4-tied", put(GATE_UP, torch.zeros(40, 32)), f"{GATE_UP} is torch.float32 [40, 32], but config.json asks "
                                                     "for floats of [80, 32]"),
    ("glm-untied", put("model.layers.0.post_mlp_layernorm.weight", torch.ones(32)), "hold model.layers.0.post_mlp"),
    ("gpt_neox-untied", drop("embed_out.weight"), "lack embed_out.weight"),
    ("gpt_neox-untied", put(FUSED_QKV, torch.zeros(95)), f"{FUSED_QKV} is torch.float32 [95], but config.json asks "
                                                         "for floats of [96]"),
]


@pytest.mark.parametrize("case, edit, words", TENSOR_FAULTS)
def test_weight_faults(case, edit, words, tmp_path):
    folder_of(case, tmp_path, edit=edit)
    with pytest.raises(DataError) as e:
        GPT.from_pretrained(tmp_path)
    assert words in str(e.value) and str(tmp_path) in str(e.value) and "\n" not in str(e.value)


class Bomb:
    def __reduce__(self):
        return os.mkdir, ("exploded",)


def test_file_faults(tmp_path, monkeypatch):
    def fault(words):
        with pytest.raises(DataError, match=words):
            GPT.from_pretrained(folder)

    monkeypatch.chdir(tmp_path)
    folder = tmp_path / "m"
    fault("no config.json")                                             # no such folder
    weights = folder_of("gpt2-tied", folder) / "model.safetensors"
    sound = weights.read_bytes()
    for bad in (sound[:-1], sound[:100], b"", sound + b"x"):
        weights.write_bytes(bad)
        fault("model.safetensors is not a sound safetensors file")
    weights.write_bytes(pickle.dumps(Bomb()))                           # fault 45: refused, never executed
    fault("model.safetensors is not a sound .* pickle")
    torch.save({"x": Bomb()}, weights)
    fault("model.safetensors is not a sound .* pickle")
    weights.rename(folder / "pytorch_model.bin")
    fault("no model.safetensors and no .*index.json; pickled weights")
    assert not (tmp_path / "exploded").exists()


def test_shard_faults(tmp_path):
    def fault(words, **changes):
        write_json(index, {"weight_map": weight_map | changes} if changes else bad)
        with pytest.raises(DataError, match=words):
            GPT.from_pretrained(folder)

    folder = tmp_path / "m"
    shutil.copytree(HERE / "sharded", folder)
    index, norm = folder / "model.safetensors.index.json", "model.norm.weight"
    weight_map = read_json(index)["weight_map"]
    bad, here = [], weight_map[norm]
    other = next(shard for shard in weight_map.values() if shard != here)
    fault("index.json: weight_map is missing")
    for bad in ({}, {"weight_map": [1]}, {"weight_map": {"x": None}}):
        fault("index.json: weight_map is missing")
    fault("index.json: no shard holds ghost", ghost=here)
    fault(f"holds {norm}, but the index says {other}", **{norm: other})
    fault("shard '../model.safetensors' is not a file name inside", ghost="../model.safetensors")
    fault("shard '/etc/passwd' is not a file name", ghost="/etc/passwd")
    fault("cannot be read", ghost="..")
    (folder / here).rename(folder / "gone")
    fault(f"{here} cannot be read", **{norm: here})


def test_impossible_configs():
    for change, words in (({"n_kv_head": 3}, "cannot share 3"), ({"head_size": 4}, "width 32"),
                          ({"family": "bert"}, "'bert' is unknown; known: gpt2, llama, mistral, qwen2, qwen3"),
                          ({"position": "rotary"}, "position is 'rotary'; it can be learned or rope"),
                          ({"norm": "batchnorm"}, "norm is"), ({"mlp": "relu"}, "mlp is"),
                          ({"position": "rope", "head_size": 5}, "must be even"),
                          ({"n_head": 0}, "n_head is 0; it must be a whole number above 0"),
                          ({"n_layer": 0}, "n_layer is 0"), ({"n_embd": -32}, "n_embd is -32"),
                          ({"vocab_size": "64"}, "vocab_size is '64'"), ({"block_size": None}, "block_size is None"),
                          ({"n_kv_head": 0}, "n_kv_head is 0"), ({"n_inner": 1.5}, "n_inner is 1.5"),
                          ({"n_layer": True}, "n_layer is True"),
                          ({"position": "rope", "n_embd": 2, "head_size": None}, "head_size is 0")):
        with pytest.raises(UserError, match=words):
            dataclasses.replace(SMALL, **change)


def test_a_hybrid_trains_but_has_no_hugging_face_form(tmp_path):
    for config, odd in ((SMALL.as_family("llama", mlp="gelu"), "mlp"),
                        (SMALL.as_family("llama", norm="layernorm"), "norm"),
                        (dataclasses.replace(SMALL, qkv_bias=False), "qkv_bias"),
                        (SMALL.as_family("qwen3", mlp_bias=True), "mlp_bias"),
                        (SMALL.as_family("gpt_neox", n_kv_head=1), "n_kv_head"),
                        (SMALL.as_family("gpt_neox", mlp="swiglu"), "mlp"),
                        (SMALL.as_family("glm", post_norm=True), "post_norm"),
                        (SMALL.as_family("glm", qk_norm=True), "qk_norm"),
                        (SMALL.as_family("llama", parallel_residual=True), "parallel_residual")):
        model = GPT(config)
        assert model(torch.tensor([[1, 2, 3]]))[0].shape == (1, 3, 64)
        with pytest.raises(UserError, match=f"with this .*{odd}"):
            model.save_pretrained(tmp_path / "out")
        assert not (tmp_path / "out").exists()


# ---- families ----------------------------------------------------------------------------------------------

def test_families_are_complete_records():
    """Every record decides the same fields, so that a change of family leaves nothing of the old one."""
    assert {tuple(family.dialect) for family in FAMILIES} == {tuple(FAMILIES[0].dialect)}
    for family in FAMILIES:
        config = dataclasses.replace(KINDS["qwen3"], mlp_bias=True).as_family(family.model_type)
        assert config.family == family.model_type
        assert {name: getattr(config, name) for name in family.dialect} == family.dialect
        bare = GPTConfig(64, 32, 2, 4, 32, family=family.model_type)
        assert {name: getattr(bare, name) for name in family.dialect} == family.dialect
    assert SMALL.as_family("llama", qk_norm=True, n_kv_head=2).qk_norm is True
    for call in (SMALL.as_family, find_family):
        with pytest.raises(UserError, match="family 'bert' is unknown; known: gpt2, llama, mistral, qwen2, qwen3"):
            call("bert")


def test_a_family_without_new_mathematics_is_one_record(tmp_path, monkeypatch):
    olive = dataclasses.replace(find_family("llama"), model_type="olive", architecture="OliveForCausalLM",
                                dialect={**find_family("llama").dialect, "o_bias": True}, bias_keys={},
                                block_path="decoder.{i}", default_targets=("o_proj",))
    monkeypatch.setattr(hf, "FAMILIES", (*FAMILIES, olive))
    model = GPT(SMALL.as_family("olive", n_kv_head=2))
    assert "olive" in str(pytest.raises(UserError, SMALL.as_family, "bert").value)
    torch.nn.init.normal_(model.blocks[0].attn.o.bias)
    model.save_pretrained(tmp_path)
    written = read_json(tmp_path / "config.json")
    assert written["model_type"] == "olive" and written["architectures"] == ["OliveForCausalLM"]
    assert "decoder.1.self_attn.o_proj.bias" in read_tensors(tmp_path / "model.safetensors")
    again = GPT.from_pretrained(tmp_path)
    assert again.config == model.config and torch.equal(logits(again, IDS), logits(model, IDS))


# ---- logits and loss ---------------------------------------------------------------------------------------

@ANY
def test_targets_give_the_mean_cross_entropy(kind):
    model, x = make(kind), torch.tensor(ids(9, 9))
    targets = torch.tensor(ids(9, 9, seed=4))
    targets[0, 3:] = -1                                                 # ignored
    found, loss = model(x, targets)
    assert model(x)[1] is None and torch.equal(found, model(x)[0])
    p = found.detach().double().softmax(-1)
    by_hand = [-math.log(p[b, t, targets[b, t]]) for b in range(2) for t in range(9) if targets[b, t] >= 0]
    assert len(by_hand) == 12 and abs(loss.item() - sum(by_hand) / 12) < 1e-5
    loss.backward()
    assert all(q.grad is not None for q in model.parameters())
    past = soft(model, 3)
    behind, loss_behind = model(x, targets, past=past)
    assert torch.equal(behind, model(x, past=past)[0]) and abs(loss_behind - loss) > 1e-3
    assert torch.allclose(model(model.embed(x), targets)[1], loss)
    assert model(x, torch.full_like(x, -1))[1].isnan()
    as_in_transformers = targets.masked_fill(targets == -1, -100)
    assert torch.equal(model(x, as_in_transformers)[1], loss) and torch.equal(model(x, targets.int())[1], loss)


def test_the_loss_of_a_bf16_model_is_fp32():
    model, x = make("gpt2").bfloat16(), torch.tensor(ids(9, 9))
    found, loss = model(x, x)
    assert found.dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert torch.equal(loss, F.cross_entropy(found.float().flatten(0, 1), x.flatten()))


def test_targets_must_match():
    model, x = make("gpt2"), torch.tensor(ids(9, 9))
    with pytest.raises(UserError, match=r"targets are .*\[2, 8\], but these tokens need ids \[2, 9\]"):
        model(x, x[:, 1:])
    with pytest.raises(UserError, match=r"targets are torch.float32 \[2, 9\]"):
        model(x, x.float())
    for beyond in (64, -2):
        with pytest.raises(UserError, match="a target is not in the vocabulary .* from 0 to 63, and -1 or -100 are"):
            model(x, torch.full_like(x, beyond))
    with pytest.raises(UserError, match=r"targets are list.*give a past by name"):
        model(x, soft(model, 3))


@ANY
def test_what_is_no_batch_of_tokens_is_a_sentence(kind):
    model = make(kind)
    for wrong, found in (([1, 2], "a list"), ("ab", "a str"), (torch.tensor([1, 2]), r"torch.int64 \[2\]"),
                         (torch.zeros(1, 2), "torch.float32"), (torch.ones(1, 2, dtype=torch.int16), "torch.int16"),
                         (torch.zeros(1, 2, 31), r"torch.float32 \[1, 2, 31\]"), (None, "a NoneType"),
                         (torch.zeros(1, 2, 32, dtype=torch.long), "torch.int64")):
        for call in (model, model.hidden_states):
            with pytest.raises(UserError, match=f"tokens are {found}.*; they must be a tensor of ids"):
                call(wrong)
    for token in (64, -1, -100):
        with pytest.raises(UserError, match="a token id is not in the vocabulary of this model; ids go from 0 to 63"):
            model(torch.tensor([[1, token]]))
    assert torch.equal(model(torch.tensor([[1, 2]]).int())[0], model(torch.tensor([[1, 2]]))[0])


# ---- past, padding, decoding -------------------------------------------------------------------------------

def test_past_length():
    k = torch.zeros(1, 2, 5, 8)
    gated = Past(k, k, torch.tensor(0.5))
    assert [past_length(past) for past in (None, [], [None, None], [gated, gated], [None, gated])] == [0] * 5
    assert [past_length(past) for past in ([Past(k, k)], [None, Past(k, k)], [Past(k, k), gated])] == [5] * 3
    shorter = Past(k[:, :, :3], k[:, :, :3])
    assert past_length([shorter, gated]) == 3                           # a gated one may have any length
    with pytest.raises(UserError, match=r"entries of a past differ in length: \[3, 5\]"):
        past_length([Past(k, k), shorter])
    for wrong in (5, "ab", torch.zeros(2)):
        with pytest.raises(UserError, match="a past is a list with an entry per layer, not a"):
            make("gpt2")(torch.tensor([[1]]), past=wrong)
    with pytest.raises(UserError, match="k and v of a Past are tensors"):
        past_length([Past(None, None)])
    with pytest.raises(UserError, match=r"None or Past\(k, v, gate\), not a tuple"):
        past_length([(k, k)])


@ANY
def test_a_past_that_does_not_fit_is_refused(kind):
    model, x = make(kind), torch.tensor(ids(6, 6))
    k, v, _ = soft(model, 3)[0]
    narrow, gate = k[:, :, :, :4], torch.tensor(0.5)
    for entry in (Past(narrow, v), Past(k, narrow), Past(k.repeat(1, 2, 1, 1), v), Past(k.repeat(3, 1, 1, 1), v),
                  Past(k[0], v[0]), Past(narrow, v, gate)):
        with pytest.raises(UserError, match=r"past\[1\] holds .* k and v must be \(1 or 2, "):
            model(x, past=[None, entry])
    wide = torch.zeros(2, k.size(1), 33, k.size(3))
    cache = KVCache([Past(wide, wide.clone())] * 2, torch.tensor([1, 1]))
    with pytest.raises(UserError, match="cache of 33 columns does not fit the context of 32"):
        model.hidden_states(x[:, :1], cache=cache)
    with pytest.raises(UserError, match="behind a cache, attention is causal"):
        model.hidden_states(x[:, :1], cache=cache.narrow(9), bidirectional_len=torch.tensor([1, 1]))
    with pytest.raises(UserError, match="generate: past must have batch 1"):
        generate(model, ids(4, 4), 3, past=soft(model, 3, B=2))


@ANY
@pytest.mark.parametrize("empty", [0, 1])
@pytest.mark.parametrize("how", ["causal", "bidirectional", "glm", "one token"])
def test_a_layer_without_a_past_attends_to_the_tokens_only(kind, empty, how):
    """Against the same past in every layer, whose keys the mask of one layer then hides."""
    model, x = make(kind).double(), torch.tensor(ids(7, 7))
    past = soft(model, 4)
    partial = [None if i == empty else entry for i, entry in enumerate(past)]
    view = {"bidirectional": {"bidirectional_len": torch.tensor([3, 7])}, "glm": {
        "bidirectional_len": torch.tensor([4, 5]),
        "glm_positions": glm_position_ids(torch.arange(7), torch.tensor([5, 6]))}}.get(how, {})
    x = x[:, :1] if how == "one token" else x
    got, made = model.hidden_states(x, partial, **view)
    layer = model.blocks[empty].attn
    forward = layer.forward

    def without_prefix(h, rope, mask, past, cache, columns, select):
        T = h.size(1)
        mask = torch.ones(T, 4 + T, dtype=torch.bool).tril(4) if mask is None else mask.clone()
        mask[..., :4] = False
        return forward(h, rope, mask, past, cache, columns, select)
    layer.forward = without_prefix
    want, _ = model.hidden_states(x, past, **view)
    assert (got - want).abs().max() < 1e-12
    del layer.forward
    plain, _ = model.hidden_states(x, past, **view)
    assert (got - plain).abs().max() > 1e-3
    T = x.size(1)
    assert [entry.k.size(2) for entry in made] == [T if i == empty else 4 + T for i in range(2)]


@ANY
def test_a_cache_continues_a_past_of_some_layers(kind):
    """Ragged rows behind a past in the top layer and side memory below: in pieces against all at once."""
    model, rows = make(kind).double(), ids(3, 9, 1)
    past = [soft(model, 5, gate=torch.tensor(0.3).double())[0], soft(model, 2)[1]]
    more = torch.tensor(ids(6, 6, 6, seed=5))
    lengths = torch.tensor([3, 9, 1])
    with torch.no_grad():
        _, made = model.hidden_states(pad(rows), past)
        cache = KVCache.extend(made, 2 + lengths, 6)
        assert [entry.k.size(2) for entry in cache.layers] == [9 + 6, 2 + 9 + 6]
        for piece in more.split([1, 3, 2], 1):
            used = int(cache.lengths.max()) + piece.size(1)
            hidden, _ = model.hidden_states(piece, past, cache=cache.narrow(used))
            cache = cache._replace(lengths=cache.lengths + piece.size(1))
        for b, row in enumerate(rows):
            whole = logits(model, [row + more[b].tolist()], past)[0, -2:]
            assert (model.logits(hidden[b]) - whole).abs().max() < 1e-12
        some = cache.rows(torch.tensor([2, 0]))
        assert some.lengths.tolist() == [2 + 1 + 6, 2 + 3 + 6]
        assert all(torch.equal(a.k, b.k[[2, 0]]) for a, b in zip(some.layers, cache.layers))


@ANY
@pytest.mark.parametrize("P", [0, 3])
def test_cached_equals_uncached(kind, P):
    """The same 12 tokens: at once, then in pieces of 5, 1 and 6, each behind the past of the others."""
    model, x = make(kind).double(), torch.tensor(ids(12, 12))
    past = soft(model, P) if P else None
    whole, out = logits(model, x, past), []
    for piece in x.split([5, 1, 6], 1):
        hidden, past = model.hidden_states(piece, past)
        out.append(model.logits(hidden))
    assert (torch.cat(out, 1) - whole).abs().max() < 1e-12
    assert past[0][0].shape == (2, model.config.n_kv_head, P + 12, model.config.head_size)


@ANY
@pytest.mark.parametrize("T", [1, 2])
def test_decoding_in_place_equals_the_full_forward_at_every_step(kind, T):
    """Ragged rows in preallocated caches, whose unused columns hold large rubbish."""
    model, rows, P = make(kind).double(), ids(3, 9, 1), 2
    prompt, starts = soft(model, P), torch.tensor([3, 9, 1])
    more = torch.tensor(ids(8, 8, 8, seed=5))
    with torch.no_grad():
        hidden, past = model.hidden_states(pad(rows), prompt)
        rubbish = torch.full((3, *past[0][0][0].shape), 1e4).double()[:, :, :1].expand(-1, -1, 24, -1)
        caches = [Past(rubbish.clone(), rubbish.clone()) for _ in past]
        for old, new in zip(past, caches):
            for b in range(3):
                for s, t in zip(old[:2], new[:2]):
                    t[b, :, :P + starts[b]] = s[b, :, :P + starts[b]]
        for step in range(0, 8, T):
            lengths = P + starts + step
            cache = KVCache(caches, lengths).narrow(int(lengths.max()) + T)
            hidden, _ = model.hidden_states(more[:, step:step + T], prompt, cache=cache)
            for b, row in enumerate(rows):
                full = logits(model, [row + more[b, :step + T].tolist()], prompt)[0, -T:]
                assert (model.logits(hidden[b]) - full).abs().max() < 1e-12


@ANY
@pytest.mark.parametrize("past_in", [(), (0,), (0, 1)])
def test_rows_read_in_groups_of_their_length_are_the_same_rows(kind, past_in):
    """A past in no, one or all layers; every cut is made, and what a group leaves out is rubbish."""
    model, rows, P = make(kind).double(), ids(1, 3, 3, 9), 2 if past_in else 0
    past = [entry if i in past_in else None for i, entry in enumerate(soft(model, 2))]
    lengths = P + torch.tensor([1, 3, 3, 9])
    groups = length_groups((lengths + 1).tolist(), least=1)
    assert groups == [(slice(0, 1), P + 2), (slice(1, 3), P + 4), (slice(3, 4), P + 10)]
    with torch.no_grad():
        _, made = model.hidden_states(pad(rows), past)
        whole = KVCache.extend(made, lengths, 1)
        want, _ = model.hidden_states(torch.tensor([[7]] * 4), past, cache=whole)
        cut = KVCache.extend(made, lengths, 1)
        for layer in cut.layers:
            front = layer.k.size(2) - 10                    # the columns of the past in this layer
            for row, n in enumerate((1, 3, 3)):
                layer.k[row, :, front + n + 1:] = layer.v[row, :, front + n + 1:] = torch.nan
        got, _ = model.hidden_states(torch.tensor([[7]] * 4), past, cache=cut._replace(groups=groups))
    assert (got - want).abs().max() < 1e-12


def test_length_groups_by_hand():
    """A cut at row i spares i rows the difference of two lengths; the best is made if it spares enough."""
    assert length_groups([5, 5, 5]) is None and length_groups([100]) is None
    assert length_groups([10, 20, 100], least=160) == [(slice(0, 2), 20), (slice(2, 3), 100)]       # 2 * 80
    assert length_groups([10, 20, 100], least=161) is None
    assert length_groups([10, 20, 100], least=10) == [(slice(0, 1), 10), (slice(1, 2), 20), (slice(2, 3), 100)]
    assert length_groups([10, 95, 100], least=90) == [(slice(0, 1), 10), (slice(1, 3), 100)]        # 90 beats 2 * 5


@ANY
def test_generated_rows_keep_their_order_and_their_tokens_in_groups(kind, monkeypatch):
    model, prompts = make(kind).double(), ids(9, 2, 5, 2, 12)
    uniforms = torch.rand(5, 8, generator=torch.Generator().manual_seed(3))
    alone = [generate(model, [p], 8, uniforms=uniforms[i:i + 1])[0] for i, p in enumerate(prompts)]
    seen = []

    def all_cuts(lengths):
        seen.append(length_groups(lengths, least=1))
        return seen[-1]
    monkeypatch.setattr("model.length_groups", all_cuts)
    assert generate(model, prompts, 8, uniforms=uniforms) == alone
    assert [rows for rows, _ in seen[0]] == [slice(0, 2), slice(2, 3), slice(3, 5)]


@ANY
@pytest.mark.parametrize("P", [0, 3])
def test_padding_changes_nothing(kind, P):
    for dtype, tolerance in ((torch.float32, 5e-6), (torch.float64, 1e-14)):
        model, rows = make(kind).to(dtype), ids(7, 1, 12)
        past = soft(model, P) if P else None
        zeros, junk = logits(model, pad(rows), past), logits(model, pad(rows, 63), past)
        for b, row in enumerate(rows):
            assert torch.equal(zeros[b, :len(row)], junk[b, :len(row)])     # bit for bit: pads are never seen
            alone = logits(model, [row], past)[0]                       # another shape, other kernels
            assert (zeros[b, :len(row)] - alone).abs().max() <= tolerance * alone.abs().max()


@ANY
def test_a_batch_1_past_serves_every_row_and_its_gradients_add_up(kind):
    model, x = make(kind).double(), torch.tensor(ids(6, 6, 6))

    def gradients(x, B):
        past = [Past(*(t.expand(B, -1, -1, -1).clone().requires_grad_() for t in layer[:2]))
                for layer in soft(model, 4)]
        out, _ = model(x, past=past)
        (out * torch.linspace(-1, 1, 64)).sum().backward()
        return out.detach(), [t.grad.sum(0, keepdim=True) for layer in past for t in layer[:2]]

    shared, own = gradients(x, 1), gradients(x, 3)
    assert (shared[0] - own[0]).abs().max() < 1e-12
    assert all((a - b).abs().max() < 1e-9 and a.abs().max() > 1e-3 for a, b in zip(shared[1], own[1]))


@ANY
def test_gate_0_is_no_prompt_exactly_and_gate_1_only_memory(kind):
    model, x = make(kind), torch.tensor(ids(9, 9))
    off = soft(model, 5, gate=torch.zeros(4, 1, 1))
    assert torch.equal(logits(model, x, off), logits(model, x))
    on = soft(model, 5, gate=torch.ones(()))
    before = logits(model, x, on)
    with torch.no_grad():
        for block in model.blocks:
            block.attn.v.weight.mul_(2)                                 # what the tokens hold does not matter
    assert torch.equal(logits(model, x, on), before)
    assert (before - logits(model, x)).abs().max() > 0.1
    with pytest.raises(UserError, match="1 entries and the model 2 layers"):
        model(x, past=on[:1])


def test_past_may_be_stored_in_another_dtype():
    model, x = make("llama"), torch.tensor(ids(6, 6))
    past = soft(model, 3)
    half = [Past(k.bfloat16(), v.bfloat16()) for k, v, _ in past]
    same = [Past(k.float(), v.float()) for k, v, _ in half]
    assert torch.equal(logits(model, x, half), logits(model, x, same))
    low = make("llama").bfloat16()
    assert logits(low, x, past).dtype == torch.bfloat16
    assert low.hidden_states(torch.randn(2, 4, 32))[0].dtype == torch.bfloat16  # fp32 embeddings, bf16 model


@ANY
def test_context_limit(kind):
    model = make(kind)
    assert logits(model, ids(32)).shape == (1, 32, 64)
    assert logits(model, ids(30), soft(model, 2)).shape == (1, 30, 64)
    for x, past in ((ids(33), None), (ids(31), soft(model, 2))):
        with pytest.raises(UserError, match="do not fit the context of 32"):
            logits(model, x, past)
    gated = soft(model, 9, gate=torch.tensor(0.5))                      # side memory takes no positions
    assert logits(model, ids(32), gated).shape == (1, 32, 64)


@ANY
def test_embeddings_in_place_of_ids(kind):
    model, x = make(kind), torch.tensor(ids(9, 9))
    assert torch.equal(logits(model, x), logits(model, model.embed(x)))
    e = model.embed(x).detach().requires_grad_()
    model.hidden_states(e)[0][:, 4].square().sum().backward()
    assert e.grad[:, :5].abs().amin((0, 2)).min() > 0 and not e.grad[:, 5:].any()


@ANY
def test_recomputed_activations_give_equal_gradients(kind):
    x, got = torch.tensor(ids(9, 9)), []
    for flag in (False, True):
        model = make(kind)
        past = [Past(k.clone().requires_grad_(), v.clone().requires_grad_()) for k, v, _ in soft(model, 2)]
        hidden, out = model.hidden_states(x, past, gradient_checkpointing=flag)
        (model.logits(hidden).logsumexp(-1).sum() + out[0].k.sum()).backward()
        got.append([p.grad for p in model.parameters()] + [t.grad for layer in past for t in layer[:2]])
    assert all(torch.equal(a, b) and a.any() for a, b in zip(*got) if a is not None)
    assert sum(a is None for a in got[0]) == 0


def test_logits_are_computed_at_the_selected_positions_only():
    model, seen = make("llama"), []
    model.head.register_forward_hook(lambda module, args, out: seen.append(tuple(args[0].shape)))
    with torch.no_grad():
        hidden, _ = model.hidden_states(torch.tensor(ids(9, 9)))
        assert seen == []
        some, every = model.logits(hidden[[0, 1], [3, 8]]), logits(model, ids(9, 9))
        assert torch.allclose(some, every[[0, 1], [3, 8]], atol=1e-5)
    seen.clear()
    generate(model, ids(3, 8), 3, temperature=0)
    assert seen == [(2, 32)] * 3


@ANY
def test_the_last_block_computes_the_selected_positions_only(kind):
    x, at, got = torch.tensor(ids(9, 9)), (torch.tensor([0, 1, 1]), torch.tensor([8, 0, 5])), []
    for asked in (None, at):
        model = make(kind).double()
        hidden, past = model.hidden_states(x, soft(model, 2), select=asked)
        hidden = hidden if asked else hidden[at]
        hidden.sin().sum().backward()
        got.append([hidden, past[-1][0], *(p.grad for p in model.parameters() if p.grad is not None)])
    assert all((a - b).abs().max() < 1e-12 for a, b in zip(*got)) and len(got[0]) == len(got[1])
    rows = []
    model.blocks[-1].mlp.register_forward_hook(lambda module, args, out: rows.append(len(args[0])))
    model.hidden_states(x, select=at)
    assert rows == [3]


def test_norm_by_hand_has_the_gradients_of_autograd():
    norm = RMSNorm(16, 1e-5).double()
    norm.weight.data.uniform_(0.5, 2)
    x, g = torch.randn(2, 2, 3, 5, 16).double().unbind()
    x, g = x.transpose(1, 2).requires_grad_(), g.transpose(1, 2)
    by_hand = torch.autograd.grad((norm(x) * g).sum(), (x, norm.weight))
    norm.weight.grad = None
    y = torch.nn.functional.rms_norm(x, (16,), norm.weight, 1e-5)
    assert torch.equal(norm(x), y) and torch.equal(norm(x.detach()), y)
    for a, b in zip(by_hand, torch.autograd.grad((y * g).sum(), (x, norm.weight))):
        assert (a - b).abs().max() < 1e-12


@pytest.mark.parametrize("frozen", [True, False])
def test_token_logprobs_in_slices(frozen):
    """300 rows with a weight each; one logit is banned, one so large that its token is almost sure."""
    head, seen = torch.nn.Linear(8, 50).double().requires_grad_(not frozen), []
    head.register_forward_hook(lambda module, args, out: seen.append(len(args[0])))
    g, t = torch.randn(300).double(), torch.randint(1, 50, (300,))

    def act(h):
        bias = torch.zeros(50).double().index_fill(0, torch.tensor(0), -torch.inf)
        return head(h) * 1.5 + bias
    h = (100 * torch.randn(300, 8)).double().requires_grad_()
    learn = [h] if frozen else [h, head.weight, head.bias]
    got = token_logprobs(act, h, t)
    slices = list(seen)
    want = act(h).log_softmax(-1).gather(-1, t[:, None])[:, 0]
    assert (got - want).abs().max() < 1e-11 * want.abs().max()
    for a, b in zip(*(torch.autograd.grad((g * y).sum(), learn) for y in (got, want))):
        assert (a - b).abs().max() < 1e-10 * b.abs().max()
    assert slices == ([0, 128, 128, 44] if frozen else [0, 300])
    with torch.no_grad():
        assert (token_logprobs(act, h, t) - want).abs().max() < 1e-11 * want.abs().max()


@ANY
def test_precisions(kind):
    x, reference = torch.tensor(ids(20, 20)), None
    for dtype, tolerance in ((torch.float64, 0), (torch.float32, 1e-5), (torch.bfloat16, 0.1)):
        y = logits(make(kind).to(dtype), x)
        assert y.dtype == dtype
        reference = y if reference is None else reference
        assert (y.double() - reference).square().mean() <= tolerance ** 2 * reference.square().mean()
    with torch.autocast("cpu", torch.bfloat16):
        model = make(kind)
        y = logits(model, x, soft(model, 2))
        assert len(generate(model, ids(3, 8), 4, past=soft(model, 2))[1]) == 4
    assert (y.double() - logits(model, x, soft(model, 2))).square().mean() < 0.01 * reference.square().mean()


def test_positions_are_fp32_even_in_a_bf16_model():
    c = KINDS["llama"]
    cos, _ = rope_table(c, torch.tensor([[4099], [4100]]))
    assert cos.dtype == torch.float32 and cos.shape == (2, 1, 16)
    assert abs(cos[0, 0, 0].item() - math.cos(4099)) < 1e-3 and (cos[0] != cos[1]).all()


def test_initial_weights():
    torch.manual_seed(0)
    model = GPT(dataclasses.replace(SMALL, vocab_size=500, n_layer=8))
    std = {name: p.std().item() for name, p in model.named_parameters() if p.dim() == 2}
    assert abs(std["wte.weight"] - 0.02) < 1e-3 and abs(std["blocks.3.attn.q.weight"] - 0.02) < 2e-3
    for name in ("attn.o", "mlp.down"):                                 # 0.02 / sqrt(2 * 8)
        assert abs(std[f"blocks.3.{name}.weight"] - 0.005) < 5e-4
    assert not any(p.any() for name, p in model.named_parameters() if name.endswith("bias"))
    assert model.head.weight is model.wte.weight and len({id(p) for p in model.parameters()}) == len(std) + 82
    x, y = torch.tensor(ids(32, 32)), torch.tensor(ids(32, 32, seed=9))
    loss = F.cross_entropy(logits(model, x).flatten(0, 1), y.flatten())
    assert abs(loss - math.log(500)) < 0.1
    assert isinstance(GPT(SMALL.as_family("llama")).ln_f, RMSNorm)


def test_stories(assets):
    model = GPT.from_pretrained(assets / "stories260k")
    last = logits(model, [[1, 403, 407, 261, 378]])[0, -1]
    for token, value in ((432, 17.7994), (383, 14.2813), (322, 9.7097)):
        assert abs(last[token].item() - value) < 1e-3


# ---- generation --------------------------------------------------------------------------------------------

def greedy(model, row, n, past=None, eos=()):
    """No cache: the whole row again for every token."""
    new, P = [], past_length(past)
    while len(new) < n and P + len(row) + len(new) <= model.config.block_size:
        new.append(logits(model, [row + new], past)[0, -1].argmax().item())
        if new[-1] in eos:
            break
    return new


def watch(model, monkeypatch):
    """The rows, tokens and cache columns (None: no cache) of each call of hidden_states."""
    seen, hidden_states = [], model.hidden_states

    def spy(x, past=None, cache=None, **view):
        seen.append((*x.shape, cache.layers[0].k.size(2) if cache is not None else None))
        return hidden_states(x, past, cache, **view)
    monkeypatch.setattr(model, "hidden_states", spy)
    return seen


@ANY
@pytest.mark.parametrize("what", ["plain", "soft prompt", "memory", "top layer", "both"])
def test_ragged_batch_equals_one_by_one_equals_no_cache(kind, what):
    model, prompts = make(kind, tied=False).double(), ids(4, 11, 1, 7, 7)
    past = None if what == "plain" else soft(model, 5)
    if what == "memory":
        past = soft(model, 5, gate=torch.tensor(0.4).double())
    if what == "top layer":
        past[0] = None
    if what == "both":                      # a prefix in layer 0, side memory in layer 1
        past[1] = past[1]._replace(gate=torch.tensor(0.4).double())
    expected = [greedy(model, row, 12, past) for row in prompts]
    assert generate(model, prompts, 12, temperature=0, past=past) == expected
    assert [generate(model, [row], 12, temperature=0, past=past)[0] for row in prompts] == expected
    assert len({tuple(row) for row in expected}) == 5 and sum(len(set(row)) for row in expected) > 20
    stop = expected[1][4]
    for eos in (stop, {stop}, [stop, 1000]):
        assert generate(model, prompts, 12, temperature=0, past=past, eos=eos) == \
            [row[:row.index(stop) + 1] if stop in row else row for row in expected]


@ANY
def test_prompts_that_fill_the_context(kind):
    model, prompts = make(kind).double(), ids(32, 31, 28, 2)
    out = generate(model, prompts, 6, temperature=0)
    assert list(map(len, out)) == [1, 2, 5, 6] and out == [greedy(model, row, 6) for row in prompts]
    past = soft(model, 4)
    assert list(map(len, generate(model, ids(28, 3), 40, past=past))) == [1, 26]
    for x, p in ((ids(33), None), (ids(29), past)):
        with pytest.raises(UserError, match="do not fit the context"):
            generate(model, x, 1, past=p)


def test_finished_rows_leave_the_batch(monkeypatch):
    model, prompts = make("llama").double(), ids(9, 3, 5, 20)
    free = generate(model, prompts, 10, temperature=0)
    seen = watch(model, monkeypatch)
    stop = free[0][0]                                                   # ends row 0 at its first token
    out = generate(model, prompts, 10, temperature=0, eos=stop)
    alive = [sum(len(row) > step for row in out) for step in range(10)]
    assert out[0] == [stop] and alive[1] < 4
    assert [rows for rows, *_ in seen] == [4] + [n for n in alive[1:] if n]
    assert all(T == 1 for _, T, _ in seen[1:])
    columns = [max(len(p) + step for p, row in zip(prompts, out) if len(row) > step) for step in range(1, 10)
               if alive[step]]
    assert [S for *_, S in seen[1:]] == columns                         # and none looks past the longest row


def test_prompts_are_read_by_length(monkeypatch):
    model, prompts = make("llama").double(), ids(*[25, 3] * 22)
    want = [generate(model, [p], 4, temperature=0)[0] for p in prompts]
    seen = watch(model, monkeypatch)
    assert generate(model, prompts, 4, temperature=0) == want
    read = [(rows, T) for rows, T, S in seen if S is None]
    assert sum(rows for rows, _ in read) == 44 and sum(rows * T for rows, T in read) < 44 * 20
    assert all(rows * T <= 512 for rows, T in read) and sum(S is not None for *_, S in seen) == 3


def test_all_rows_finish_at_step_1(monkeypatch):
    model, prompts = make("gpt2"), ids(4, 9, 2)
    first = {row[0] for row in generate(model, prompts, 1, temperature=0)}
    seen = watch(model, monkeypatch)
    assert all(len(row) == 1 for row in generate(model, prompts, 50, temperature=0, eos=first))
    assert len(seen) == 1


def test_no_eos_ever_and_nothing_to_do():
    model = make("gpt2")
    assert list(map(len, generate(model, ids(4, 9), 20, eos=64))) == [20, 20]    # an id that is never drawn
    assert list(map(len, generate(model, ids(4, 9), 20, eos=set()))) == [20, 20]
    assert generate(model, ids(4, 9), 0) == [[], []] and generate(model, [], 5) == []
    with pytest.raises(UserError, match="a prompt is empty"):
        generate(model, [[1], []], 5)


def test_eos_in_the_prompt_ends_nothing():
    model = make("gpt2")
    assert generate(model, [[7, 7, 7]], 3, temperature=0, eos=7)[0] == \
        greedy(model, [7, 7, 7], 3, eos=[7])


@pytest.mark.parametrize("bad", [dict(temperature=-1), dict(temperature=float("nan")), dict(top_k=0),
                                 dict(top_k=-5), dict(top_p=1.5), dict(top_p=-0.1)])
def test_impossible_sampling(bad):
    with pytest.raises(UserError, match="generate: temperature"):
        generate(make("gpt2"), [[1, 2]], 3, **bad)


@pytest.mark.parametrize("prompts, more, says", [
    (torch.tensor([[1, 2]]), {}, "prompts are a Tensor; they must be a list of lists of token ids"),
    ([1, 2], {}, "must be a list of lists"), (["ab"], {}, "must be a list of lists"), ("ab", {}, "a list of lists"),
    ([[1.5]], {}, "must be a list of lists"), ([["a"]], {}, "must be a list of lists"),
    ([[1]], {"eos": "x"}, "eos is 'x'; it must be a token id"), ([[1]], {"eos": [None]}, "eos is .None."),
    ([[1]], {"eos": torch.tensor([3])}, "eos is tensor"), ([[1]], {"max_new_tokens": 2.5}, "max_new_tokens 2.5 and"),
    ([[1]], {"uniforms": [[0.5] * 3]}, "uniforms are a list; they must be a tensor"),
    ([[1]], {"top_k": 1.5}, "top_k 1.5 must be whole numbers"), ([[1]], {"temperature": "1"}, "temperature '1' and"),
    ([[64]], {}, "a token id is not in the vocabulary")])
def test_impossible_prompts(prompts, more, says):
    with pytest.raises(UserError, match=says):
        generate(make("gpt2"), prompts, **{"max_new_tokens": 3, **more})


def test_sampling_edges():
    logit = torch.randn(5, 64, generator=torch.Generator().manual_seed(0))
    best = logit.argmax(-1)
    assert torch.equal(sample(logit, 0), best) and torch.equal(sample(logit, 0, top_k=3, top_p=0.5), best)
    for how in (dict(top_p=0), dict(top_k=1), dict(top_p=1e-9), dict(temperature=1e-4)):
        assert torch.equal(sample(logit, **how), best)
    for how in (dict(top_k=64), dict(top_k=10 ** 6), dict(top_p=1), dict(top_p=1.0, top_k=65)):
        draws = [sample(logit, generator=torch.Generator().manual_seed(3), **kw) for kw in (how, {})]
        assert torch.equal(*draws)                                      # no restriction at all
    assert torch.equal(sample(logit.bfloat16(), 0), logit.bfloat16().argmax(-1))
    assert sample(logit.bfloat16(), 1.0, 5, 0.9).shape == (5,)


def test_uniforms_decide_each_row_alone():
    """A row sampled by its own uniforms is the same in any batch, and takes the token that they point at."""
    model, prompts = make("llama").double(), ids(4, 9, 2)
    u = torch.rand(3, 8, generator=torch.Generator().manual_seed(0))
    state = torch.get_rng_state()
    together = generate(model, prompts, 8, uniforms=u)
    assert torch.equal(state, torch.get_rng_state())
    assert together == [generate(model, [p], 8, uniforms=u[b:b + 1])[0] for b, p in enumerate(prompts)]
    assert together == generate(model, prompts[::-1], 8, uniforms=u.flip(0))[::-1]
    p = torch.tensor([[0.2, 0.0, 0.5, 0.3]]).log()
    points = torch.tensor([0.0, 0.199, 0.201, 0.699, 0.701, 0.9999999])
    assert sample(p.expand(6, 4), uniforms=points).tolist() == [0, 0, 2, 2, 3, 3]
    for wrong in (u[:2], u[:, :7]):
        with pytest.raises(UserError, match=r"3 prompts and 8 new tokens need \[3, 8\]"):
            generate(model, prompts, 8, uniforms=wrong)


def test_greedy_generation_ignores_the_generator_and_top_p_0_is_greedy():
    model, prompts = make("llama"), ids(4, 9)
    expected = generate(model, prompts, 8, temperature=0)
    assert generate(model, prompts, 8, temperature=1.0, top_p=0) == expected
    assert generate(model, prompts, 8, temperature=2.0, top_k=1) == expected
    assert generate(model, prompts, 8, temperature=0, top_k=9999, top_p=0.1) == expected


@pytest.mark.parametrize("how", [dict(), dict(temperature=0.5), dict(temperature=2.0), dict(top_k=3),
                                 dict(top_p=0.7), dict(temperature=3.0, top_k=4, top_p=0.6)])
def test_sampling_frequencies(how):
    """40,000 draws against the definition, by chi-square: the 99.9 % quantile of 5 degrees is 20.5."""
    logit = torch.tensor([2.0, -0.5, 1.0, 0.3, 0.0, 1.5])
    p = torch.softmax(logit / how.get("temperature", 1), 0)
    order = p.argsort(descending=True)[:how.get("top_k", 6)].tolist()
    p = p / p[order].sum()
    kept, mass = [], 0.0
    for i in order:                         # the likeliest tokens up to the first that reaches top_p
        kept, mass = kept + [i], mass + p[i].item()
        if mass >= how.get("top_p", 1):
            break
    drawn = sample(logit.expand(40000, 6), generator=torch.Generator().manual_seed(0), **how)
    count = torch.bincount(drawn, minlength=6)
    expected = torch.zeros(6)
    expected[kept] = 40000 * p[kept] / p[kept].sum()
    assert not count[expected == 0].any()
    assert ((count - expected)[kept].square() / expected[kept]).sum() < 20.5
    assert len(kept) == {"{}": 6, "{'top_k': 3}": 3, "{'top_p': 0.7}": 3}.get(str(how), len(kept))


def test_own_generator():
    model, prompts = make("gpt2"), ids(4, 9)
    torch.manual_seed(5)
    state = torch.get_rng_state()
    one, same, other = (generate(model, prompts, 12, generator=torch.Generator().manual_seed(s))
                        for s in (1, 1, 2))
    assert one == same != other and torch.equal(state, torch.get_rng_state())
    free = generate(model, prompts, 12)
    assert not torch.equal(state, torch.get_rng_state())
    torch.manual_seed(5)
    assert generate(model, prompts, 12) == free


def test_generate_keeps_no_graph_and_no_state():
    model, past = make("llama"), soft(make("llama"), 3)
    model.train()
    past = [Past(k.requires_grad_(), v.requires_grad_()) for k, v, _ in past]
    copy, keys = [[t.clone() for t in layer[:2]] for layer in past], set(vars(model))
    first = generate(model, ids(4, 9), 5, temperature=0, past=past)
    assert generate(model, ids(4, 9), 5, temperature=0, past=past) == first     # nothing wrote to the prompt
    assert all(torch.equal(a, b) for x, y in zip(past, copy) for a, b in zip(x, y))
    assert model.training and set(vars(model)) == keys and torch.is_grad_enabled()


@pytest.mark.parametrize("masked", [False, True])
def test_attention_written_out_is_the_fused_one(masked):
    """bf16 with gradients takes the textbook path, without them the fused kernel: the same up to rounding."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, n, 7, 8, dtype=torch.bfloat16, requires_grad=True) for n in (4, 2, 2))
    mask = torch.arange(7) <= torch.tensor([3, 3, 3, 3, 4, 5, 6])[:, None] if masked else None
    ours = attend(q, k, v, mask)
    with torch.no_grad():
        fused = attend(q, k, v, mask)
    assert torch.allclose(ours.float(), fused.float(), atol=2e-2)
    weight = torch.randn(2, 4, 7, 8)
    mine = torch.autograd.grad((ours.float() * weight).sum(), (q, k, v))
    wide = [t.detach().float().requires_grad_() for t in (q, k, v)]
    exact = torch.autograd.grad((attend(*wide, mask) * weight).sum(), wide)
    assert all((a.float() - b).abs().max() < 0.05 * b.abs().max() for a, b in zip(mine, exact))


def test_one_token_behind_a_past_sees_all_of_it_with_gradients_in_bf16():
    """T = 1 needs no mask, and "causal" must then not mean the first column only."""
    model, x = make("llama").bfloat16(), torch.tensor([[3], [9]])
    past = soft(model, 5)
    learning = model(x, past=past)[0].detach().float()
    assert (learning - logits(model, x, past).float()).abs().max() < 0.05 * learning.abs().max()


def test_fp16_norm_has_the_gradient_of_fp32():
    for size in (0.01, 1.0, 20.0):
        x = (size * torch.randn(4, 256, generator=torch.Generator().manual_seed(0))).half().requires_grad_()
        wide = x.detach().float().requires_grad_()
        g = torch.linspace(-1, 1, 256).half()
        norm = RMSNorm(256, 1e-5).half().requires_grad_(False)
        (norm(x) * g).sum().backward()
        (F.rms_norm(wide, (256,), None, 1e-5) * g.float()).sum().backward()
        torch.testing.assert_close(x.grad.float(), wide.grad, rtol=1e-2, atol=1e-2 * wide.grad.abs().max().item())


def test_unknown_rope_type_is_a_sentence():
    for scaling in ({"rope_type": "yarn", "factor": 2.0}, {"type": "linear", "factor": 2.0},
                    {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 16,
                     "low_freq_factor": 1.0, "high_freq_factor": 4.0}):
        with pytest.raises(UserError, match="rope"):
            GPTConfig(64, 32, 2, 2, 32, family="llama", rope_scaling=scaling)


def test_top_p_ends_where_its_mass_is_reached():
    assert filter_logits(torch.zeros(1, 4), top_p=0.5).isfinite().sum() == 2
    assert filter_logits(torch.zeros(1, 4), top_p=0.51).isfinite().sum() == 3
