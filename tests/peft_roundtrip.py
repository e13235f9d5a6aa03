"""Exchange adapter folders with peft, both ways; run by test_lora.py in an interpreter that has peft.

    python tests/peft_roundtrip.py FOLDER          prints "all equal" and exits 0, or fails
"""
import copy
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import torch
from peft import AdaLoraConfig, IA3Config, LoraConfig, PeftModel, get_peft_model
from transformers import (AutoModelForCausalLM, AutoModelForSequenceClassification, Glm4Config, Glm4ForCausalLM,
                          GPT2Config, GPT2LMHeadModel, GPTNeoXConfig, GPTNeoXForCausalLM, LlamaConfig,
                          LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM, logging)

import lora
from model import GPT

OUT = pathlib.Path(sys.argv[1])
IDS = torch.arange(30).view(3, 10) * 7 % 64
KINDS = {"lora": dict(), "rslora": dict(rslora=True), "dora": dict(variant="dora"),
         "pissa": dict(variant="pissa"), "adalora": dict(variant="adalora"), "folded": dict(variant="adalora"),
         "ia3": dict(variant="ia3")}
small = dict(vocab_size=64, max_position_embeddings=32, num_hidden_layers=2, hidden_size=32,
             num_attention_heads=4, num_key_value_heads=2, intermediate_size=48, bos_token_id=None,
             eos_token_id=None)
BASES = {"gpt2": GPT2LMHeadModel(GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=64, n_positions=32,
                                            bos_token_id=None, eos_token_id=None)),
         "llama": LlamaForCausalLM(LlamaConfig(**small, tie_word_embeddings=False)),
         "qwen2": Qwen2ForCausalLM(Qwen2Config(**small, tie_word_embeddings=True)),
         "glm4": Glm4ForCausalLM(Glm4Config(**small, head_dim=16, pad_token_id=None)),
         "gpt_neox": GPTNeoXForCausalLM(GPTNeoXConfig(**{k: v for k, v in small.items() if k != "num_key_value_heads"}))}
NO_DEFAULT = {"glm4": ["q_proj"]}                       # families for which peft knows no default
# Modules of peft's side: attention, MLP without its gate, and the names of the output and the head.
SPLIT = (["q_proj", "v_proj"], ["down_proj"], "o_proj", "lm_head")
PARTS = {"gpt2": (["c_attn"], ["mlp.c_proj"], "c_proj", "lm_head"), "llama": SPLIT, "qwen2": SPLIT,
         "glm4": (["q_proj", "v_proj", "gate_up_proj"], *SPLIT[1:]),
         "gpt_neox": (["query_key_value"], ["dense_4h_to_h"], "attention.dense", "lm_head")}
torch.manual_seed(0)
logging.disable_progress_bar()


def randomise(params, std=0.1):
    with torch.no_grad():
        for p in params:
            p.add_(std * torch.randn(p.shape))


def compare(what, ours, theirs):
    with torch.no_grad():
        gap = (ours.eval()(IDS)[0] - theirs.eval()(input_ids=IDS).logits).abs().max().item()
    print(f"{what:40s} {gap:.1e}")
    assert gap < 2e-5, what
    return gap


for family, base in BASES.items():
    randomise(base.parameters())
    base.save_pretrained(OUT / family)
    hf = lambda: AutoModelForCausalLM.from_pretrained(OUT / family)                 # noqa: E731
    base_logits = hf().eval()(input_ids=IDS).logits
    words = ["q", "k", "v", "o", "up", "down", "head"] + ["gate"] * (family not in ("gpt2", "gpt_neox"))
    for kind, kw in KINDS.items():
        for targets in (["q", "v"], words):
            if kind == "ia3":
                targets = ["k", "v", "down"] if len(targets) == 2 else words
            model = GPT.from_pretrained(OUT / family)
            ranks = {"q": 3, "blocks.1.attn.o": 2} if len(targets) > 2 and kind != "ia3" else None
            lora.inject(model, targets, **{"rank": 4, "rank_pattern": ranks, **kw} if kind != "ia3" else kw)
            randomise(lora.adapter_parameters(model).values())
            if kind in ("adalora", "folded"):                       # prune one module wholly, one in part
                some = list(lora.adapters(model).values())
                some[0].lora_E.data.zero_()
                some[1].lora_E.data[1:3].zero_()
            folder = OUT / f"{family}-{kind}-{len(targets)}"
            lora.save_adapter(model, folder, base=str(OUT / family), fold=kind == "folded")
            theirs = PeftModel.from_pretrained(hf(), folder)
            assert (theirs.eval()(input_ids=IDS).logits - base_logits).abs().max() > 1e-2, "no effect"
            compare(f"{family} {kind} {len(targets)} targets -> peft", model, theirs)
    fused = family == "gpt2"
    both = dict(task_type="CAUSAL_LM", fan_in_fan_out=fused)
    attention, mlp, output, head = PARTS[family]
    for name, config in {
            "lora": LoraConfig(**both, target_modules=attention),
            "lora default targets": LoraConfig(task_type="CAUSAL_LM", target_modules=NO_DEFAULT.get(family)),
            "lora all": LoraConfig(**both, target_modules="all-linear", r=3, lora_alpha=7, use_rslora=True),
            "lora regex": LoraConfig(**both, target_modules=rf".*\.1\..*{output}", r=2),
            "lora one layer": LoraConfig(**both, target_modules=attention, layers_to_transform=[1]),
            "lora patterns": LoraConfig(**both, target_modules=attention + mlp, rank_pattern={mlp[0]: 2},
                                        alpha_pattern={r".*\.0\..*": 5}),
            "lora orthogonal": LoraConfig(**both, target_modules=attention, init_lora_weights="orthogonal"),
            "lora mica": LoraConfig(**both, target_modules=attention, init_lora_weights="mica"),
            "lora head": LoraConfig(**both, target_modules=attention + [head]),
            "dora": LoraConfig(**both, target_modules=attention + mlp, use_dora=True),
            "ia3": IA3Config(**both, target_modules=attention + mlp, feedforward_modules=mlp),
            "adalora": AdaLoraConfig(**both, target_modules=attention + mlp, init_r=4, total_step=9)}.items():
        theirs = get_peft_model(hf(), copy.deepcopy(config))
        randomise(p for p in theirs.parameters() if p.requires_grad)
        theirs.save_pretrained(OUT / "theirs" / f"{family} {name}")
        model = GPT.from_pretrained(OUT / family)
        lora.load_adapter(model, OUT / "theirs" / f"{family} {name}")
        compare(f"{family} {name} <- peft", model, theirs)
    theirs = AutoModelForSequenceClassification.from_pretrained(OUT / family, num_labels=3, pad_token_id=0)
    theirs = get_peft_model(theirs, LoraConfig(task_type="SEQ_CLS", fan_in_fan_out=fused, target_modules=attention))
    randomise(p for p in theirs.parameters() if p.requires_grad)
    theirs.save_pretrained(OUT / "theirs" / f"{family} classifier")
    model = GPT.from_pretrained(OUT / family)
    score = lora.load_adapter(model, OUT / "theirs" / f"{family} classifier")["score.weight"]
    with torch.no_grad():
        labels = model.eval().hidden_states(IDS)[0][:, -1] @ score.T
        assert (labels - theirs.eval()(input_ids=IDS).logits).abs().max() < 2e-5, "classifier"
print("all equal")
