"""Make tests/fixtures/prompts: what `peft` computes for every prompt method on two tiny models. Needs peft.

    python tests/make_prompts_fixtures.py                             write the fixtures again
    python tests/make_prompts_fixtures.py logits BASE IDS ADAPTER...  write peft's ADAPTER/logits.npy

Per model (gpt2; llama with grouped heads): base/ is a Hugging Face folder, <case>/ the adapter folder by
peft, and <case>.npz holds, in float64: in/* a ragged right-padded batch with labels (-100: none; one row has
them from its very first token), param/* what is trainable, by peft's names, out/* logits and loss, grad/*,
sgd/* and adamw/* after ONE step of SGD(0.1) and AdamW(1e-2, no decay), gen/* eight greedy tokens. All of it
is drawn as float32 and widened.
"""
import os
import pathlib
import sys

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from peft import PeftModel, PrefixTuningConfig, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRMSNorm

# transformers rounds to float32 inside this norm, whatever the model's dtype: a float64 record must not
LlamaRMSNorm.forward = lambda self, h: self.weight * h / (h.pow(2).mean(-1, keepdim=True)
                                                          + self.variance_epsilon).sqrt()
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.logging.disable_progress_bar()
HERE = pathlib.Path(__file__).parent / "fixtures" / "prompts"
V, C, L, P = 40, 16, 2, 3
BASES = {
    "gpt2": GPT2Config(n_layer=L, n_embd=C, n_head=2, vocab_size=V, n_positions=32, bos_token_id=None,
                       eos_token_id=None),
    "llama": LlamaConfig(num_hidden_layers=L, hidden_size=C, intermediate_size=24, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=V, max_position_embeddings=32,
                         rope_theta=16.0,       # frequencies 1 and 1/4: exact in the float32 of both sides
                         tie_word_embeddings=True, bos_token_id=None, eos_token_id=None, pad_token_id=None),
}
common = dict(task_type="CAUSAL_LM", num_virtual_tokens=P)
CASES = {
    "prompt_tuning": lambda: PromptTuningConfig(**common),
    "ptuning_mlp": lambda: PromptEncoderConfig(encoder_hidden_size=12, **common),
    "ptuning_lstm": lambda: PromptEncoderConfig(encoder_hidden_size=4, encoder_reparameterization_type="LSTM",
                                                **common),
    "prefix": lambda: PrefixTuningConfig(**common),
    "prefix_mlp": lambda: PrefixTuningConfig(prefix_projection=True, encoder_hidden_size=12, **common),
}


def loss_of(logits, labels):                    # transformers' own loss casts to float32
    labels = F.pad(labels, (logits.shape[1] - labels.shape[1], 0), value=-100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


def draw(model, std, generator):
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if p.requires_grad:
                norm = "ln_" in name or "norm" in name
                centre = 1.0 if norm and name.endswith("weight") else 0.0
                p.copy_(torch.randn(p.shape, generator=generator) * std + centre)


def make():
    os.chdir(HERE)                              # adapters record the path of their base: a relative one
    g = torch.Generator().manual_seed(0)
    x, lens, prompt = torch.randint(1, V, (3, 8), generator=g), (8, 5, 7), (3, 0, 2)
    mask = torch.tensor([[int(t < n) for t in range(8)] for n in lens])
    labels = torch.tensor([[int(x[b, t]) if prompt[b] <= t < lens[b] else -100 for t in range(8)]
                           for b in range(3)])
    start = torch.randint(1, V, (1, 5), generator=g)
    for family, config in BASES.items():
        base = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        draw(base, 0.2, g)
        base.save_pretrained(f"{family}/base")
        for case, peft_config in CASES.items():
            if family == "llama" and case in ("prefix_mlp", "ptuning_lstm"):
                continue                        # peft's E is as narrow as the key heads; one LSTM will do
            fresh = AutoModelForCausalLM.from_pretrained(f"{family}/base", attn_implementation="sdpa")
            model = get_peft_model(fresh, peft_config())
            draw(model, 0.4, g)
            model.save_pretrained(f"{family}/{case}")
            os.remove(f"{family}/{case}/README.md")
            model = model.double().eval()
            train = {n.removeprefix("prompt_encoder.default."): p
                     for n, p in model.named_parameters() if p.requires_grad}
            z = {"in/input_ids": x * mask, "in/attention_mask": mask, "in/labels": labels,
                 "gen/input_ids": start}
            z.update({"param/" + n: p.detach().clone() for n, p in train.items()})
            logits = model(input_ids=x * mask, attention_mask=mask).logits
            z["out/logits"], z["out/loss"] = logits, loss_of(logits, labels)
            z["out/loss"].backward()
            z.update({"grad/" + n: p.grad.clone() for n, p in train.items()})
            for name, opt in (("sgd", torch.optim.SGD(train.values(), lr=0.1)),
                              ("adamw", torch.optim.AdamW(train.values(), lr=1e-2, weight_decay=0.0))):
                opt.step()
                z.update({f"{name}/{n}": p.detach().clone() for n, p in train.items()})
                with torch.no_grad():
                    for n, p in train.items():
                        p.copy_(z["param/" + n])
            z["gen/output_ids"] = model.generate(
                input_ids=start, attention_mask=torch.ones_like(start), max_new_tokens=8, do_sample=False,
                use_cache=True, pad_token_id=0)
            np.savez_compressed(f"{family}/{case}.npz", **{k: v.detach().numpy() for k, v in z.items()})


def logits(base, ids, *adapters):
    x = torch.from_numpy(np.load(ids))
    for folder in adapters:
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        with torch.no_grad():
            out = PeftModel.from_pretrained(model, folder).eval()(input_ids=x).logits
        np.save(pathlib.Path(folder) / "logits.npy", out.numpy())


if __name__ == "__main__":
    make() if len(sys.argv) == 1 else logits(*sys.argv[2:])
