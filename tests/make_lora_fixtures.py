"""Make tests/fixtures/lora/*.npz: what peft computes, so that lora.py can be held against it without peft.

    python tests/make_lora_fixtures.py        needs torch, transformers, peft; these were 2.13, 5.23, 0.21.2

Two tiny random bases, a GPT-2 and a Llama with grouped heads, with no zero bias and no unit norm, so that a
forgotten term shows. Per case a random adapter, drawn in float32 (and stored so), computed in float64:

    config  tensor/<name>       adapter_config.json and adapter_model.safetensors as peft wrote them
    ids  labels  logits  loss   a batch (labels -100 are not predicted) and what becomes of it
    grad/<module>.<field>       d loss / d parameter
    adamw/<module>.<field>      the parameter after one step of AdamW (lr .01, weight decay 0)
    loss_sgd                    the loss after one step of SGD (lr .1)
    merged                      the logits after merge_and_unload
    residual/<module>           PiSSA: what the base weight became
    traj/...                    AdaLoRA: a run of 16 steps, its budgets, pruned triplets and final weights
"""
import json
import pathlib
import tempfile

import numpy as np
import torch
import torch.nn.functional as F
from peft import AdaLoraConfig, IA3Config, LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

OUT = pathlib.Path(__file__).parent / "fixtures" / "lora"
ADALORA = dict(init_r=6, target_r=2, tinit=2, tfinal=4, total_step=16, deltaT=2, orth_reg_weight=0.5,
               lora_alpha=16)
generator = torch.Generator().manual_seed(0)


def noise(*shape, std=1.0, mean=0.0):
    return mean + std * torch.randn(*shape, generator=generator)


def bases():
    gpt2 = GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=32,
                                      bos_token_id=None, eos_token_id=None))
    llama = LlamaForCausalLM(LlamaConfig(
        num_hidden_layers=2, hidden_size=32, intermediate_size=48, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=64, max_position_embeddings=32, tie_word_embeddings=False))
    for name, model in (("gpt2", gpt2), ("llama", llama)):
        with torch.no_grad():
            for n, p in model.named_parameters():
                norm = "ln_" in n or "norm" in n
                p.copy_(noise(*p.shape, std=0.15, mean=1.0 if norm and n.endswith("weight") else 0.0))
        yield name, model


def batch():
    ids = torch.randint(64, (3, 10), generator=generator)
    labels = ids.clone()
    labels[0, :3], labels[2, 6:] = -100, -100
    return ids, labels


def loss_of(logits, labels, **kw):                      # transformers' own loss rounds the logits to float32
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def short(name):
    """h.0.attn.c_attn.lora_A, say, of base_model.model.h.0.attn.c_attn.lora_A.default.weight"""
    return name.removeprefix("base_model.model.").replace(".default", "").removesuffix(".weight")


def trained(model):
    return {n: p for n, p in model.named_parameters() if p.requires_grad}


def exact(model):
    """Widen to float64, also where transformers insists on float32 (RMSNorm) or rounds its way (rotary)."""
    for m in model.double().modules():
        if type(m) is LlamaRMSNorm:
            m.forward = lambda x, m=m: F.rms_norm(x, x.shape[-1:], m.weight, m.variance_epsilon)
        if type(m) is LlamaRotaryEmbedding:
            m.forward = lambda x, position_ids, hs=2 * len(m.inv_freq): rotary(position_ids, hs)
    return model


def rotary(positions, hs):
    angle = positions[..., None].float() * 10000.0 ** (-torch.arange(0, hs, 2, dtype=torch.float32) / hs)
    angle = torch.cat((angle, angle), -1)
    return angle.cos().double(), angle.sin().double()


def randomise(model):
    with torch.no_grad():
        for n, p in sorted(trained(model).items()):
            if "magnitude" in n:
                p.mul_(noise(*p.shape, std=0.1, mean=1.0))
            else:
                p.copy_(noise(*p.shape, std=0.2, mean=1.0 if "ia3" in n else 0.0))


def record(name, base, config, draw=True):
    model = get_peft_model(base(), config).eval()       # in float32: float64 is refused, or goes wrong, here
    z = {}
    if draw:
        randomise(model)
    else:
        z.update({"residual/" + short(n).replace(".base_layer", ""): p.detach().clone()
                  for n, p in model.named_parameters() if "base_layer.weight" in n})
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        z["config"] = np.array((pathlib.Path(folder) / "adapter_config.json").read_text())
        z.update({"tensor/" + k: t for k, t in load_file(folder + "/adapter_model.safetensors").items()})
    model = exact(model)
    model.base_model.model.loss_function = loss_of
    ids, labels = z["ids"], z["labels"] = batch()
    forward = lambda: model(input_ids=ids, labels=labels)       # noqa: E731  (AdaLoRA adds its regulariser)
    out, start = forward(), {n: p.detach().clone() for n, p in trained(model).items()}
    out.loss.backward()
    z["logits"], z["loss"] = out.logits, out.loss
    z.update({"grad/" + short(n): p.grad for n, p in trained(model).items()})
    optimiser = torch.optim.AdamW(trained(model).values(), lr=1e-2, weight_decay=0.0)
    optimiser.step()
    z.update({"adamw/" + short(n): p.clone() for n, p in trained(model).items()})
    with torch.no_grad():
        for n, p in trained(model).items():
            p.copy_(start[n] - 0.1 * p.grad)
        z["loss_sgd"] = forward().loss
        for n, p in trained(model).items():
            p.copy_(start[n])
    model.zero_grad()
    if config.peft_type == "ADALORA":
        z.update(trajectory(model))
    with torch.no_grad():
        z["merged"] = model.merge_and_unload()(input_ids=ids).logits
    save(name, z)


def trajectory(model):
    """16 steps of AdamW (lr .02, wd 0), pruning as peft does it; leaves the model as it ended."""
    z, start = {}, {n: p.detach().clone() for n, p in trained(model).items()}
    batches = [batch() for _ in range(4)]
    z["traj/ids"], z["traj/labels"] = (torch.stack(ts) for ts in zip(*batches))
    optimiser = torch.optim.AdamW(trained(model).values(), lr=2e-2, weight_decay=0.0)
    tuner, budgets, losses = model.base_model, [], []
    for t in range(ADALORA["total_step"]):
        loss = model(input_ids=batches[t % 4][0], labels=batches[t % 4][1]).loss
        loss.backward()
        optimiser.step()
        tuner.update_and_allocate(t)
        optimiser.zero_grad()
        losses.append(loss.item())
        budgets.append(tuner.rankallocator.budget_schedule(t)[0])
        if t == 7:                                      # a look at the averages in mid-course
            a = tuner.rankallocator
            for what, averages in (("I", a.exp_avg_ipt), ("U", a.exp_avg_unc)):
                z.update({f"traj/{what}/" + short(n): v.clone() for n, v in averages.items()
                          if "ranknum" not in n})
    z.update({"traj/final/" + short(n): p.detach().clone() for n, p in trained(model).items()})
    pattern = model.peft_config["default"].rank_pattern
    z.update({"traj/keep/" + short(n): np.array(v) for n, v in pattern.items()})
    z["traj/loss"], z["traj/budget"] = np.array(losses), np.array(budgets)
    z["traj/logits"] = model(input_ids=batches[0][0]).logits
    with tempfile.TemporaryDirectory() as folder:       # the pruned file, as peft writes it
        model.save_pretrained(folder)
        z["traj/config"] = np.array((pathlib.Path(folder) / "adapter_config.json").read_text())
        z.update({"traj/tensor/" + k: t for k, t in load_file(folder + "/adapter_model.safetensors").items()})
    with torch.no_grad():
        for n, p in trained(model).items():
            p.copy_(start[n])
    model.peft_config["default"].rank_pattern = None
    return z


def save(name, z):
    z = {k: v.detach().contiguous().numpy() if torch.is_tensor(v) else v for k, v in z.items()}
    np.savez_compressed(OUT / f"{name}.npz", **z)
    print(f"{name:16s} {(OUT / f'{name}.npz').stat().st_size:7d} bytes")


def main():
    OUT.mkdir(parents=True, exist_ok=True)
    for family, model in bases():
        state = {k: v.clone() for k, v in model.state_dict().items()}
        tied = "lm_head.weight" if family == "gpt2" else None
        save(f"base_{family}", {"config": np.array(json.dumps(model.config.to_dict())),
                                **{"tensor/" + k: v for k, v in state.items() if k != tied}})

        def base():
            again = type(model)(model.config)
            again.load_state_dict(state)
            return again

        def lora(*targets, **kw):
            return LoraConfig(**{**dict(task_type="CAUSAL_LM", r=4, lora_alpha=16, lora_dropout=0.0,
                                        target_modules=list(targets), fan_in_fan_out=family == "gpt2"), **kw})

        if family == "gpt2":
            ia3, ada = ["c_attn", "mlp.c_proj"], ["c_attn", "mlp.c_proj"]
            record("gpt2_lora", base, lora("c_attn"))
            record("gpt2_rslora_all", base, lora(target_modules="all-linear", use_rslora=True))
            record("gpt2_dora", base, lora("c_attn", "mlp.c_fc", use_dora=True))
            record("gpt2_pissa", base, lora("c_attn", init_lora_weights="pissa"), draw=False)
            record("gpt2_ranks", base, lora("c_attn", "c_proj", alpha_pattern={"attn.c_proj": 3},
                                            rank_pattern={"mlp.c_proj": 2, "h.1.attn.c_attn": 5}))
        else:
            ia3, ada = ["k_proj", "v_proj", "down_proj"], ["q_proj", "down_proj"]
            record("llama_lora", base, lora("q_proj", "v_proj"))
            record("llama_dora", base, lora("k_proj", "gate_proj", use_dora=True))
            record("llama_pissa", base, lora("q_proj", "down_proj", init_lora_weights="pissa"), draw=False)
            record("llama_head", base, lora("lm_head", "o_proj"))
        both = dict(task_type="CAUSAL_LM", fan_in_fan_out=family == "gpt2")
        record(f"{family}_ia3", base, IA3Config(**both, target_modules=ia3, feedforward_modules=ia3[-1:]))
        record(f"{family}_adalora", base, AdaLoraConfig(**both, target_modules=ada, **ADALORA))


if __name__ == "__main__":
    main()
