"""test_families.py: families that store heads and fused modules in another layout than ours, beyond plain folders.

What an adapter or prefix file says is read here as peft reads it, on the stored tensors: y = x (W + s B A)^T with
W as stored, keys as a stored W makes them. tests/peft_roundtrip.py and the slow test below ask peft itself.
"""
import dataclasses
import os
import pathlib
import subprocess

import numpy as np
import pytest
import tiny
import torch
from test_matrix import METHODS, documented, outcome

import lora
from data.checkpoints.hf import from_stored, key_order, parse_config, stored_tensors
from data.checkpoints.safetensors import read_tensors
from data.runtime.files import DataError, read_json
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig, generate
from prompts import PromptTuning, PrefixTuning, PTuning, PTuningV2, load_prompt, save_prompt

SMALL = GPTConfig(vocab_size=64, block_size=32, n_layer=2, n_head=4, n_embd=32)
KINDS = {"gpt2": SMALL, "glm": SMALL.as_family("glm", n_kv_head=2, head_size=16, tied=False),
         "glm4": SMALL.as_family("glm4", n_kv_head=2, head_size=8),
         "gpt_neox": SMALL.as_family("gpt_neox", tied=False)}
ANY = pytest.mark.parametrize("kind", KINDS)
PERMUTED = pytest.mark.parametrize("kind", ["glm", "glm4", "gpt_neox"])
PROMPTS = {PromptTuning: {}, PTuning: dict(encoder="mlp"), PrefixTuning: {}, PTuningV2: {}}
IDS = torch.arange(30).view(3, 10) * 7 % 64


def make(kind):
    model = GPT(KINDS[kind])
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in model.named_parameters():
            z = torch.randn(p.shape, generator=generator)
            p.copy_(0.25 * z if p.dim() == 2 else 0.3 * z + name.endswith("weight"))
    return model.eval()


def randomise(parameters):
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in parameters:
            p.add_(0.1 * torch.randn(p.shape, generator=generator))


@torch.no_grad()
def logits(model, past=None):
    return model(IDS, past=past)[0]


def far(a, b):
    return (a - b).abs().max().item()


def words(model):
    return ["q", "k", "v", "o", "up", "down"] + ["gate"] * (model.config.mlp == "swiglu")


# ---- the published models ---------------------------------------------------------------------------------

PYTHIA = dict(model_type="gpt_neox", hidden_act="gelu", hidden_size=512, intermediate_size=2048, layer_norm_eps=1e-5,
              max_position_embeddings=2048, num_attention_heads=8, num_hidden_layers=6, rotary_emb_base=10000,
              rotary_pct=0.25, tie_word_embeddings=False, use_parallel_residual=True, vocab_size=50304)
GLM_4_9B = dict(model_type="glm", attention_bias=True, head_dim=128, hidden_act="silu", hidden_size=4096,
                intermediate_size=13696, max_position_embeddings=131072, num_attention_heads=32, num_hidden_layers=40,
                num_key_value_heads=2, rms_norm_eps=1.5625e-7, rope_theta=10000.0, tie_word_embeddings=False,
                vocab_size=151552)
MISTRAL_7B = dict(model_type="mistral", hidden_act="silu", hidden_size=4096, intermediate_size=14336,
                  max_position_embeddings=32768, num_attention_heads=32, num_hidden_layers=32, num_key_value_heads=8,
                  rms_norm_eps=1e-5, rope_theta=1000000.0, sliding_window=None, tie_word_embeddings=False,
                  vocab_size=32768)


@pytest.mark.parametrize("config, parameters", [
    (PYTHIA, 70_426_624),                                                               # Pythia 70M
    (PYTHIA | dict(hidden_size=768, intermediate_size=3072, num_attention_heads=12, num_hidden_layers=12), 162_322_944),
    (GLM_4_9B, 9_399_951_360),                                                          # glm-4-9b
    (GLM_4_9B | {"model_type": "glm4"}, 9_400_279_040),                                 # GLM-4-9B-0414
    (MISTRAL_7B, 7_248_023_552)])                                                       # 7B v0.3
def test_published_models_have_their_number_of_parameters(config, parameters):
    with torch.device("meta"):
        model = GPT(GPTConfig(**parse_config(config, "config.json")))
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_windowed_mistral_is_refused():
    with pytest.raises(DataError, match="sliding_window is 4096, shorter than the context of 32768, .*; "
                                        "max_position_embeddings 4096 would do without one"):
        parse_config(MISTRAL_7B | {"sliding_window": 4096}, "config.json")


# ---- adapters ----------------------------------------------------------------------------------------------

def as_peft_adapts(weight, module, config, peft_type):
    """The stored weight (out, in) that an adapter file makes of a stored weight."""
    if peft_type == "IA3":
        return weight * module["ia3_l"]                     # (out, 1) or (1, in)
    if peft_type == "ADALORA":
        scale = config["lora_alpha"] / (config["init_r"] + 1e-5)
        return weight + scale * module["lora_B"] @ (module["lora_A"] * module["lora_E"])
    name, rank = module["name"], len(module["lora_A.weight"])
    alpha = config["alpha_pattern"].get(name, config["lora_alpha"])
    adapted = weight + alpha / rank * module["lora_B.weight"] @ module["lora_A.weight"]
    if config["use_dora"]:
        adapted *= (module["lora_magnitude_vector"] / adapted.norm(dim=1))[:, None]
    return adapted


@ANY
@pytest.mark.parametrize("variant", ["lora", "dora", "adalora", "ia3"])
def test_an_adapter_file_is_about_the_stored_matrices(kind, variant, tmp_path):
    model = make(kind)
    stored = stored_tensors(model)
    plain = logits(model)
    lora.inject(model, words(model), variant=variant, **{} if variant == "ia3" else {"rank": 3})
    randomise(lora.adapter_parameters(model).values())
    adapted = logits(model)
    assert far(adapted, plain) > 0.01
    lora.save_adapter(model, tmp_path)

    config = read_json(tmp_path / "adapter_config.json")
    modules = {}
    for name, t in read_tensors(tmp_path / "adapter_model.safetensors").items():
        path, leaf = next((name[:i], name[i + 1:]) for i in [name.index(".lora_" if ".lora_" in name else ".ia3_l")])
        modules.setdefault(path.removeprefix("base_model.model."), {})[leaf] = t
    merged = stored_tensors(lora.merge(model))
    transposed = KINDS[kind].family == "gpt2"
    for path, module in modules.items():
        weight, found = (t.T if transposed else t for t in (stored[path + ".weight"], merged[path + ".weight"]))
        expected = as_peft_adapts(weight.clone(), module | {"name": path}, config, config["peft_type"])
        assert far(found, expected) < 1e-5 and far(found, weight) > 1e-3, path
    assert far(logits(model), adapted) < 1e-4
    assert {name for name in stored if name.endswith("weight") and far(stored[name], merged[name]) > 0} == \
        {path + ".weight" for path in modules}

    again = make(kind)
    lora.load_adapter(again, tmp_path)
    assert far(logits(again), adapted) < 1e-5


@PERMUTED
@pytest.mark.parametrize("targets", [["k"], ["q", "v"], ["up"]])
def test_adapters_of_a_part_of_a_fused_module(kind, targets, tmp_path):
    model = make(kind)
    lora.inject(model, targets, rank=2)
    randomise(lora.adapter_parameters(model).values())
    lora.save_adapter(model, tmp_path)
    again = make(kind)
    lora.load_adapter(again, tmp_path)
    assert lora.adapters(again).keys() == lora.adapters(model).keys()
    assert far(logits(again), logits(model)) < 1e-5 and far(logits(again), logits(make(kind))) > 1e-3


@PERMUTED
@pytest.mark.parametrize("dtype", ["int8", "nf4"])
def test_quantized_bases(kind, dtype, tmp_path):
    """An adapter trains on a quantized base, travels, and merges into it, also through a folder."""
    model = make(kind)
    plain = logits(model)
    lora.quantize(model, dtype)
    assert 0 < far(logits(model), plain) < (0.3 if dtype == "int8" else 6)
    lora.inject(model, ["q", "k", "up"], rank=2)
    model(IDS, IDS)[1].backward()
    assert all(p.grad is not None for p in lora.adapter_parameters(model).values())
    randomise(lora.adapter_parameters(model).values())
    lora.save_adapter(model, tmp_path / "adapter")
    again = make(kind)
    lora.quantize(again, dtype)
    lora.load_adapter(again, tmp_path / "adapter")
    expected = logits(model)
    assert far(logits(again), expected) < 1e-4
    lora.merge(model).save_pretrained(tmp_path / "merged")
    assert far(logits(GPT.from_pretrained(tmp_path / "merged")), expected) < 1e-4


# ---- soft prompts ------------------------------------------------------------------------------------------

@PERMUTED
@pytest.mark.parametrize("prompt_class", PROMPTS)
def test_soft_prompts_travel_and_decode(kind, prompt_class, tmp_path):
    model = make(kind)
    prompt = prompt_class(model, 3, **PROMPTS[prompt_class]).eval()
    randomise(prompt.parameters())
    with torch.no_grad():
        past = prompt(model)
    save_prompt(prompt, tmp_path)
    again = load_prompt(model, tmp_path)
    with torch.no_grad():
        assert far(logits(model, again(model)), logits(model, past)) < 1e-5
    assert far(logits(model, past), logits(model)) > 1e-3
    rows = [[3, 9, 4], [7], [5, 1, 60, 2, 8]]
    for row, new in zip(rows, generate(model, rows, 6, temperature=0, past=past)):
        for i, token in enumerate(new):                     # without a cache, one row at a time
            assert model(torch.tensor([row + new[:i]]), past=past)[0][0, -1].argmax() == token


def turned(key, kind, position):
    """A stored key (hs,) at a position, as its family's paper rotates it, plane by plane."""
    c = KINDS[kind]
    n = int(c.head_size * c.rotary_fraction)
    out = key.clone()
    for j in range(n // 2):
        a, b = (2 * j, 2 * j + 1) if kind.startswith("glm") else (j, j + n // 2)
        angle = torch.tensor(position * 10000.0 ** (-2 * j / n), dtype=torch.float64)
        out[a] = key[a] * angle.cos() - key[b] * angle.sin()
        out[b] = key[a] * angle.sin() + key[b] * angle.cos()
    return out


@PERMUTED
def test_a_prefix_file_holds_keys_as_the_stored_weights_make_them(kind, tmp_path):
    model = make(kind)
    c = model.config
    text = [5, 9, 60]
    prompt = PTuningV2(model, 3, init="text", ids=text).eval()      # starts as the keys and values of a text
    save_prompt(prompt, tmp_path)
    table = read_tensors(tmp_path / "adapter_model.safetensors")["prompt_embeddings"]
    keys = table.view(3, c.n_layer, 2, c.n_kv_head, c.head_size)[:, 0, 0]               # of layer 0: (P, nkv, hs)
    stored = {name: t.double() for name, t in stored_tensors(model).items()}
    x = model.blocks[0].ln_1(model.wte(torch.tensor(text))).double().detach()           # (P, C)
    if kind == "gpt_neox":
        path = "gpt_neox.layers.0.attention.query_key_value."
        made = (x @ stored[path + "weight"].T + stored[path + "bias"]).view(3, c.n_head, 3, c.head_size)[:, :, 1]
    else:
        path = "model.layers.0.self_attn.k_proj."
        made = (x @ stored[path + "weight"].T + stored[path + "bias"]).view(3, c.n_kv_head, c.head_size)
    expected = torch.stack([torch.stack([turned(key, kind, p) for key in row]) for p, row in enumerate(made)])
    assert far(keys, expected) < 1e-5
    ours = prompt(model)[0].k[0].transpose(0, 1)                                        # (P, nkv, hs)
    assert far(ours, keys) > 0.1 and far(ours, from_stored(keys.movedim(-1, 0), key_order(c)).movedim(0, -1)) == 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["glm4", "gpt_neox"])
def test_peft_loads_our_prompts(kind, tmp_path):
    if "PEERS" not in os.environ:
        pytest.skip("PEERS names no Python that has peft, so loading our folders there is not tested")
    model = make(kind)
    model.save_pretrained(tmp_path / "base")
    np.save(tmp_path / "ids.npy", IDS.numpy())
    expected = {}
    for prompt_class, options in PROMPTS.items():
        prompt = prompt_class(model, 3, **options).eval()
        randomise(prompt.parameters())
        folder = tmp_path / prompt_class.__name__
        with torch.no_grad():
            expected[folder] = logits(model, prompt(model))
        save_prompt(prompt, folder, base=tmp_path / "base")
    script = pathlib.Path(__file__).parent / "make_prompts_fixtures.py"
    subprocess.run([os.environ["PEERS"], script, "logits", tmp_path / "base", tmp_path / "ids.npy", *expected],
                   check=True, capture_output=True)
    for folder, ours in expected.items():
        theirs = torch.from_numpy(np.load(folder / "logits.npy"))[:, -IDS.size(1):]
        assert far(ours, theirs) < 2e-5, folder.name


# ---- runs --------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """tiny.world with a base of each family: {family: folder}."""
    folders = {}
    for kind in ("glm4", "gpt_neox"):
        folder = tiny.world(tmp_path_factory.mktemp(kind))
        config = GPT.from_pretrained(folder / "base").config
        torch.manual_seed(0)
        GPT(dataclasses.replace(config).as_family(kind)).save_pretrained(folder / "base")
        assert Tokenizer.from_pretrained(folder / "base").vocab_size == config.vocab_size
        folders[kind] = folder
    return folders


@pytest.mark.parametrize("kind, task, method", [
    ("glm4", "sft", "lora"), ("glm4", "sft", "p_tuning_v2"), ("glm4", "pretrain", "full"), ("glm4", "eval", "none"),
    ("gpt_neox", "classify", "ia3"), ("gpt_neox", "sft", "adalora"), ("gpt_neox", "dpo", "prefix_tuning")])
def test_a_few_cells_of_the_matrix(kind, task, method, worlds, tmp_path):
    assert outcome(worlds[kind], task, method, tmp_path / "r") == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["glm4", "gpt_neox"])
def test_every_method_trains(kind, worlds, tmp_path):
    for method in METHODS:
        for task in ("sft", "ppo") if method in ("lora", "p_tuning_v2") else ("sft",):
            result = outcome(worlds[kind], task, method, tmp_path / f"{task}-{method}")
            assert result == documented()[task, method], (task, method)
