"""prompts.py against peft (fixtures: make_prompts_fixtures.py), textbook concatenation, and real text."""
import copy
import json
import os
import pathlib
import subprocess

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import prompts
from data.checkpoints.safetensors import read_tensors, write_tensors
from data.runtime.files import DataError, UserError
from model import GPT, GPTConfig, Past, generate
from prompts import (PrefixTuning, PromptTuning, PTuning, PTuningV2, detach_for_accumulation, load_prompt, nearest_tokens, parse_template,
                     save_prompt)

HERE = pathlib.Path(__file__).parent
FIXTURES = HERE / "fixtures" / "prompts"
CASES = [FIXTURES / f for f in (
    "gpt2/prompt_tuning", "gpt2/ptuning_mlp", "gpt2/ptuning_lstm", "gpt2/prefix", "gpt2/prefix_mlp",
    "llama/prompt_tuning", "llama/ptuning_mlp", "llama/prefix")]
if "ORACLE" in os.environ:          # more folders of the same make, e.g. a larger model: ORACLE=DIR1:DIR2
    CASES += [pathlib.Path(d) / c.name for d in os.environ["ORACLE"].split(":") for c in CASES[:5]]
SMALL = GPTConfig(vocab_size=40, block_size=32, n_layer=2, n_head=4, n_embd=16)
SOFT, DEEP = (PromptTuning, PTuning), (PrefixTuning, PTuningV2)
ALL = SOFT + DEEP
KINDS = [(PromptTuning, {}), (PTuning, {}), (PTuning, {"encoder": "lstm"}), (PrefixTuning, {}),
         (PTuningV2, {}), (PrefixTuning, {"init": "gated"}), (PTuningV2, {"init": "gated"}),
         (PTuningV2, {"init": "zero"})]
each_kind = pytest.mark.parametrize("cls, kw", KINDS, ids=lambda k: k.__name__ if isinstance(k, type) else
                                    "-".join(k.values()))
each_class = pytest.mark.parametrize("cls", ALL)
each_family = pytest.mark.parametrize("family", ["gpt2", "llama"])


def small(family="gpt2", dtype=torch.float32, std=0.3):
    """A frozen random model (llama: two heads per key head), with biases and norms that are not trivial."""
    torch.manual_seed(1)
    model = GPT(SMALL if family == "gpt2" else SMALL.as_family("llama", n_kv_head=2))
    with torch.no_grad():
        for name, p in model.named_parameters():
            p.copy_(torch.randn(p.shape) * std + (1.0 if p.dim() == 1 and "bias" not in name else 0.0))
    return model.to(dtype).requires_grad_(False).eval()


def make(cls, model, n=3, **kw):
    """A prompt whose encoder is small, in float64 over a float64 model, else in its own float32."""
    if cls in (PTuning, PrefixTuning):
        kw = {"encoder_hidden": 8, **kw}
    prompt = cls(model, n, **kw)
    return prompt.double() if model.wte.weight.dtype == torch.float64 else prompt


def far(got, want):
    """Largest difference, relative to the largest number."""
    got, want = got.detach().double(), want.detach().double()
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-6))


def ids_of(B=3, T=6, seed=5):
    return torch.randint(0, SMALL.vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


def loss_of(logits, x):
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), x[:, 1:].flatten())


def grads(prompt):
    return [p.grad.clone() for p in prompt.parameters()]


# ------------------------------------------------------------------------------------------------------- peft

def rebuilt(z, case, model, dtype):
    """The class that a peft case belongs to, carrying its parameters."""
    param = {k.removeprefix("param/").removeprefix("prompt_encoder."): torch.from_numpy(v)
             for k, v in z.items() if k.startswith("param/")}
    n = len(param["embedding.weight"])
    if case == "prompt_tuning":
        prompt = PromptTuning(model, n)
    elif case == "ptuning_mlp":
        prompt = PTuning(model, n, encoder_hidden=len(param["mlp_head.0.bias"]))
    elif case == "ptuning_lstm":
        prompt = PTuning(model, n, encoder="lstm", encoder_hidden=param["lstm_head.weight_hh_l0"].size(1))
    elif case == "prefix":
        prompt = PTuningV2(model, n)                                    # dropout 0.1, off in eval mode
    else:
        prompt = PrefixTuning(model, n, encoder_hidden=len(param["transform.0.bias"]))
    ours = {("embedding" if k == "embedding.weight" else k): v for k, v in param.items()}
    prompt.load_state_dict(ours)                                        # strict: the names are peft's
    return prompt.to(dtype).eval(), {v: k for k, v in zip(param, ours)}


@pytest.mark.parametrize("dtype, tol", [(torch.float64, 1e-9), (torch.float32, 1e-4)], ids=["fp64", "fp32"])
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c.parent.name}-{c.name}")
def test_peft_computes_the_same(case, dtype, tol):
    z = dict(np.load(f"{case}.npz"))
    if dtype == torch.float64 and z["out/logits"].dtype != np.float64:
        pytest.skip("recorded in float32")
    model = GPT.from_pretrained(case.parent / "base").to(dtype).requires_grad_(False)
    prompt, peft_name = rebuilt(z, case.name, model, dtype)
    x, labels = torch.from_numpy(z["in/input_ids"]), torch.from_numpy(z["in/labels"])
    lens = torch.from_numpy(z["in/attention_mask"]).sum(1)

    def run():
        """Logits of the P virtual positions, where there are any, and of the text, as peft returns them."""
        if isinstance(prompt, (PromptTuning, PTuning)):
            hidden, past = prompt.run(model)
            return torch.cat((model.logits(hidden).expand(len(x), -1, -1), model(x, past=past)[0]), 1)
        return model(x, past=prompt(model))[0]

    def masked_loss(logits):
        y = F.pad(labels, (logits.size(1) - labels.size(1), 0), value=-100)
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), y[:, 1:].flatten())

    def check(kind):
        for name, p in prompt.named_parameters():
            key = peft_name[name]
            key = key if f"{kind}/{key}" in z else f"prompt_encoder.{key}"
            want = torch.from_numpy(z[f"{kind}/{key}"])
            got = p.grad if kind == "grad" else p.detach()
            if kind == "adamw":                 # step one divides by |grad|: float noise becomes a number
                sure = torch.from_numpy(z[f"grad/{key}"]).abs() > (1e-6 if dtype == torch.float32 else 1e-12)
                got, want = got[sure], want[sure]
            assert far(got, want) < tol, (kind, name)

    logits = run()
    want = torch.from_numpy(z["out/logits"])
    P = want.size(1) - x.size(1)
    for b, n in enumerate(lens):                                        # behind a row there is only padding
        assert far(logits[b, :P + n], want[b, :P + n]) < tol
    loss = masked_loss(logits)
    assert abs(loss.item() / z["out/loss"] - 1) < tol
    loss.backward()
    check("grad")
    start = copy.deepcopy(prompt.state_dict())
    for kind, opt in (("sgd", torch.optim.SGD(prompt.parameters(), lr=0.1)),
                      ("adamw", torch.optim.AdamW(prompt.parameters(), lr=1e-2, weight_decay=0.0))):
        opt.step()
        check(kind)
        prompt.load_state_dict(start)
    ids = z["gen/input_ids"][0].tolist()
    want = z["gen/output_ids"][0][len(ids):].tolist()
    with torch.no_grad():
        assert generate(model, [ids], len(want), temperature=0, past=prompt(model)) == [want]


@pytest.mark.parametrize("case", CASES[:8], ids=lambda c: f"{c.parent.name}-{c.name}")
def test_folders_written_by_peft_load_and_go_back_as_they_came(case, tmp_path):
    z = dict(np.load(f"{case}.npz"))
    model = GPT.from_pretrained(case.parent / "base")
    prompt = load_prompt(model, case)
    x = torch.from_numpy(z["in/input_ids"])
    with torch.no_grad():
        got = model(x, past=prompt(model))[0]
    want = torch.from_numpy(z["out/logits"])[:, -x.size(1):]
    assert far(got[0], want[0]) < 1e-5                                  # the only row without padding
    save_prompt(prompt, tmp_path)
    ours, theirs = (json.loads((d / "adapter_config.json").read_text()) for d in (tmp_path, case))
    differ = {key for key, value in ours.items() if theirs.get(key, value) != value}
    assert differ <= {"base_model_name_or_path", "peft_type"}
    assert "peft_type" not in differ or theirs["peft_type"] == "P_TUNING"
    ours, theirs = (read_tensors(d / "adapter_model.safetensors") for d in (tmp_path, case))
    assert ours.keys() == theirs.keys() and all(torch.equal(t, theirs[n]) for n, t in ours.items())


@pytest.mark.slow
@each_family
def test_peft_loads_our_folders(family, tmp_path):
    if "PEERS" not in os.environ:
        pytest.skip("PEERS names no Python that has peft, so loading our folders there is not tested")
    base, x = FIXTURES / family / "base", ids_of()
    model = GPT.from_pretrained(base)
    np.save(tmp_path / "ids.npy", x.numpy())
    ours = {}
    for cls in ALL:
        prompt = make(cls, model, seed=3).eval()
        with torch.no_grad():
            for p in prompt.parameters():
                p += 0.1 * torch.randn(p.shape)
            ours[tmp_path / cls.__name__] = model(x, past=prompt(model))[0]
        save_prompt(prompt, tmp_path / cls.__name__, base=base)
    templated = make(PTuning, model, template="{p:3}{prompt}")
    save_prompt(templated, tmp_path / "template", base=base)
    script = [os.environ["PEERS"], HERE / "make_prompts_fixtures.py", "logits", base, tmp_path / "ids.npy"]
    subprocess.run(script + list(ours), check=True)
    for folder, logits in ours.items():
        assert far(logits, torch.from_numpy(np.load(folder / "logits.npy"))[:, -x.size(1):]) < 1e-5, folder
    refused = subprocess.run(script + [tmp_path / "template"], capture_output=True, text=True)
    assert refused.returncode != 0 and "TEMPLATE_PROMPT" in refused.stderr


# ----------------------------------------------------------------------------- a prompt is something in front

@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@each_family
def test_soft_tokens_that_are_embeddings_of_a_text_are_that_text(family, dtype, tol):
    model, x, text = small(family, dtype, std=0.1), ids_of(), [7, 3, 30, 12]
    prompt = make(PromptTuning, model, 4, init="text", ids=text)
    want = model(torch.cat((torch.tensor([text] * 3), x), 1))[0]
    hidden, past = prompt.run(model)
    assert far(model(x, past=past)[0], want[:, 4:]) < tol
    assert far(model.logits(hidden), want[:1, :4]) < tol


@pytest.mark.parametrize("dtype, tol", [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=["fp32", "fp64"])
@each_family
def test_a_prefix_that_is_the_cache_of_a_text_is_that_text(family, dtype, tol):
    model, x, text = small(family, dtype, std=0.1), ids_of(), [7, 3, 30, 12]
    prompt = make(PTuningV2, model, 4, init="text", ids=text).eval()
    if dtype == torch.float64:                  # a prompt starts in float32: let this one be the exact cache
        _, cache = model.hidden_states(torch.tensor([text]))
        prompt.embedding.data = torch.cat([t.transpose(1, 2).flatten(2) for kv in cache for t in kv[:2]], 2)[0]
    want = model(torch.cat((torch.tensor([text] * 3), x), 1))[0]
    assert far(model(x, past=prompt(model))[0], want[:, 4:]) < tol
    rows = [row.tolist() for row in x]
    assert (generate(model, rows, 6, temperature=0, past=prompt(model))
            == generate(model, [text + row for row in rows], 6, temperature=0))


@pytest.mark.parametrize("encoder", ["mlp", "lstm"])
def test_encoders_start_where_the_plain_methods_start(encoder):
    model = small("llama")
    for n, kw in ((3, {"ids": [5, 6, 7, 8], "init": "text"}), (8, {"seed": 4})):
        plain, encoded = make(PromptTuning, model, n, **kw), make(PTuning, model, n, encoder=encoder, **kw)
        if kw.get("init"):                      # sampled words come after the encoder's own draws
            assert far(encoded.prompt_embeddings(), plain.prompt_embeddings()) < 1e-5
        else:
            assert float(word_of(encoded.prompt_embeddings(), model)[1].max()) < 1e-4
    for init in ("text", "zero", "gated"):
        plain, encoded = (make(c, model, 5, init=init, ids=[5, 6, 7]) for c in (PTuningV2, PrefixTuning))
        assert float((encoded.prompt_embeddings() - plain.prompt_embeddings()).abs().max()) < 1e-5


def textbook(prompt, model, x):
    """The same logits by writing the prompt before every row, B times."""
    if isinstance(prompt, SOFT):
        rows = torch.cat((prompt.prompt_embeddings().expand(len(x), -1, -1), model.embed(x)), 1)
        return model(rows)[0][:, prompt.num_virtual_tokens:]
    return model(x, past=[Past(*(t.repeat(len(x), 1, 1, 1) for t in kv[:2])) for kv in prompt(model)])[0]


@each_family
@pytest.mark.parametrize("cls, kw", KINDS[:5])
def test_batch_one_equals_textbook_concatenation(cls, kw, family):
    model, x = small(family, torch.float64), ids_of()
    prompt = make(cls, model, **kw).eval()
    seen, per_row = [], make(cls, model, **kw).eval()
    per_row.load_state_dict(prompt.state_dict())
    block = model.blocks[0].register_forward_hook(lambda _, args, out: seen.append(tuple(args[0].shape[:2])))
    got = model(x, past=prompt(model))[0]
    block.remove()
    assert seen == ([(1, 3)] if cls in SOFT else []) + [(3, 6)]         # P tokens at batch 1, then the text
    want = textbook(per_row, model, x)
    assert far(got, want) < 1e-12
    loss_of(got, x).backward()
    loss_of(want, x).backward()
    assert all(far(a, b) < 1e-12 for a, b in zip(grads(prompt), grads(per_row)))


@each_class
def test_micro_batches_share_one_pass_through_the_prompt(cls):
    model, x = small(dtype=torch.float64), ids_of(4)
    prompt = make(cls, model)                                           # in training mode: PTuningV2 drops
    whole, parts = copy.deepcopy(prompt), copy.deepcopy(prompt)
    torch.manual_seed(3)
    (loss_of(model(x, past=whole(model))[0], x) * 4).backward()
    torch.manual_seed(3)
    leaves, finish = detach_for_accumulation(parts(model))
    for rows in (x[:1], x[1:]):
        (loss_of(model(rows, past=leaves)[0], rows) * len(rows)).backward()
    assert all(p.grad is None for p in parts.parameters())
    finish()
    assert all(far(a, b) < 1e-12 for a, b in zip(grads(parts), grads(whole)))


@each_class
@each_family
def test_checkpointing_changes_no_gradient(cls, family):
    model, x = small(family, torch.float64), ids_of()
    prompt = make(cls, model).eval()
    found = []
    for checkpoint in (False, True):
        prompt.zero_grad()
        hidden, _ = model.hidden_states(x, prompt(model), gradient_checkpointing=checkpoint)
        loss_of(model.logits(hidden), x).backward()
        found.append(grads(prompt))
    assert all(far(a, b) < 1e-12 for a, b in zip(*found))


@each_family
@each_kind
def test_decoding_with_a_cache_equals_reading_again(cls, kw, family):
    model = small(family)
    prompt = make(cls, model, **kw).eval()
    with torch.no_grad():
        for p in prompt.parameters():
            p += 0.5 * torch.randn(p.shape, generator=torch.Generator().manual_seed(0))     # opens gates too
    rows = [[3, 9, 1, 22], [5], [17, 2]]
    got = generate(model, rows, 7, temperature=0, past=prompt(model))
    for row, new in zip(rows, got):
        for i, token in enumerate(new):
            with torch.no_grad():
                assert int(model(torch.tensor([row + new[:i]]), past=prompt(model))[0][0, -1].argmax()) == token


# --------------------------------------------------------------------------------------------------- training

@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@each_family
@each_kind
def test_everything_moves_every_step_even_after_an_evaluation(cls, kw, family, dtype):
    model, x = small(family, dtype), ids_of()
    prompt, frozen = make(cls, model, **kw), copy.deepcopy(model.state_dict())
    assert all(p.dtype == torch.float32 for p in prompt.parameters())
    with torch.no_grad():
        model(x, past=prompt(model))                                         # a cache kept here would never learn
    opt = torch.optim.AdamW(prompt.parameters(), lr=1e-2, weight_decay=0.0)
    for step in range(3):
        before = copy.deepcopy(prompt.state_dict())
        loss_of(model(x, past=prompt(model))[0].float(), x).backward()
        opt.step()
        still = {n for n, p in prompt.state_dict().items() if torch.equal(p, before[n])}
        if kw.get("init") == "gated" and step == 0:                     # behind a closed gate nothing learns
            assert still == {n for n in before if n != "gate"}
        else:
            assert not still
        opt.zero_grad()
        with torch.no_grad():
            model(x, past=prompt(model))
    assert all(torch.equal(p, frozen[n]) for n, p in model.state_dict().items())
    assert set(vars(prompt)) == set(vars(make(cls, model, **kw)))       # and nothing was left on the module


@each_kind
def test_a_fixed_batch_is_overfit(cls, kw):
    model = small(std=0.4)
    x = torch.cat((ids_of(3, 3), torch.full((3, 1), 20)), 1)            # whatever was asked, say 20
    prompt = make(cls, model, 8, **kw).eval()
    opt = torch.optim.AdamW(prompt.parameters(), lr=2e-2, weight_decay=0.0)
    losses = []
    for _ in range(200):
        loss = F.cross_entropy(model(x, past=prompt(model))[0][:, 2], x[:, 3])
        losses.append(loss.item())
        loss.backward()
        opt.step()
        opt.zero_grad()
    assert losses[-1] < 0.25 * losses[0], (losses[0], losses[-1])


def test_prefix_dropout_is_one_draw_a_call_and_only_in_training():
    model, x = small(), ids_of(1).repeat(2, 1)
    prompt = make(PTuningV2, model, prefix_dropout=0.5)
    k = prompt(model)[0].k
    ratio = torch.cat([t.flatten() for kv in prompt(model) for t in kv[:2]]) / torch.cat(
        [t.flatten() for kv in prompt.eval()(model) for t in kv[:2]])
    assert set(ratio.round(decimals=4).tolist()) == {0.0, 2.0}          # dropped, or scaled to keep the mean
    prompt.train()
    assert not torch.equal(prompt(model)[0][0], k)
    logits = model(x, past=prompt(model))[0]
    assert torch.equal(logits[0], logits[1])                            # rows of a batch share the draw
    prompt.eval()
    assert torch.equal(model(x, past=prompt(model))[0], model(x, past=prompt(model))[0])


@pytest.mark.parametrize("cls", [PTuning, PrefixTuning])
def test_encoders_are_not_rounded_under_autocast(cls):
    model = small()
    prompt = make(cls, model)
    with torch.autocast("cpu", torch.bfloat16):
        table = prompt.prompt_embeddings()
    assert table.dtype == torch.float32 and torch.equal(table, prompt.prompt_embeddings())


# -------------------------------------------------------------------------------------------------- the start

@each_family
@pytest.mark.parametrize("cls", DEEP)
def test_a_gated_prefix_starts_as_no_op_and_a_zero_one_does_not(cls, family):
    model, x = small(family), ids_of(1, 32)                     # a gated one takes no positions: T = context
    with torch.no_grad():
        plain = model(x)[0]
        gated = make(cls, model, init="gated")
        assert gated.prefix_len == 0 and torch.equal(model(x, past=gated(model))[0], plain)
        zero = make(cls, model, init="zero").eval()
        assert far(model(x[:, :29], past=zero(model))[0], plain[:, :29]) > 1e-2
    loss_of(model(x, past=gated(model))[0], x).backward()
    assert float(gated.gate.grad.abs().min()) > 0               # one gate per head of each layer, all live


def word_of(rows, model):
    """For each embedding the nearest token, and how far it is."""
    distance = (rows[:, None] - model.wte.weight).norm(dim=2)           # cdist would round
    return distance.argmin(1), distance.min(1).values.detach()


def test_soft_tokens_start_from_words():
    model = small()
    wte = model.wte.weight
    rows = make(PromptTuning, model, 30).embedding                      # sampled without replacement
    words, distance = word_of(rows, model)
    assert float(distance.max()) == 0 and len(set(words.tolist())) == 30
    rows = make(PromptTuning, model, 5, ids=[8, 9]).embedding
    assert sorted(word_of(rows, model)[0].tolist()) in ([8, 8, 8, 9, 9], [8, 8, 9, 9, 9])
    rows = make(PromptTuning, model, 5, init="text", ids=[4, 6]).embedding
    assert torch.equal(rows, wte[[4, 6, 4, 6, 4]])
    rows = make(PromptTuning, model, 4, init="labels", ids=[[1], [2, 3]]).embedding
    assert torch.equal(rows[0], wte[1]) and torch.allclose(rows[1], (wte[2] + wte[3]) / 2)
    assert float(word_of(rows[2:], model)[1].max()) == 0
    rows = PromptTuning(model, 31, init="random").embedding
    assert 0.8 < float(rows.std() / wte.std()) < 1.25


@each_kind
def test_the_seed_decides_and_disturbs_nobody(cls, kw):
    model = small()
    torch.manual_seed(0)
    before = torch.get_rng_state()
    one, same, other = (make(cls, model, seed=s, **kw) for s in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters()))
    equal = [torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters())]
    assert all(equal) == (kw.get("init") == "zero")


@pytest.mark.parametrize("call, says", [
    (lambda m: PromptTuning(m, 32), "1 to 31"), (lambda m: PTuningV2(m, 0), "1 to 31"),
    (lambda m: PromptTuning(m, 3, init="text"), "with ids"),
    (lambda m: PromptTuning(m, 3, init="zero", ids=[1]), "zero"),
    (lambda m: PrefixTuning(m, 3, init="vocab"), "vocab"), (lambda m: PTuning(m, 3, encoder="rnn"), "rnn"),
    (lambda m: PromptTuning(m, 1, init="labels", ids=[[1], [2]]), "2 labels"),
    (lambda m: PTuning(m, 4, template="{p:3} {prompt}"), "3 virtual tokens"),
    (lambda m: PTuningV2(m, "3"), "num_virtual_tokens is '3'"), (lambda m: PTuning(m, 3.0), "tokens is 3.0"),
    (lambda m: PromptTuning(m, 3, template=5), "template 5"),
    (lambda m: PromptTuning(m, 3, init="text", ids=[10 ** 6]), "start from the ids .1000000."),
    (lambda m: PromptTuning(m, 3, init="text", ids=[-1]), "start from the ids .-1."),
    (lambda m: PrefixTuning(m, 3, ids="abc"), "start from the ids 'abc'"),
    (lambda m: PromptTuning(m, 3, init="labels", ids=[1, 2]), "start from the ids 1"),
    (lambda m: PromptTuning(m, 3, init="labels", ids=[[1], [-2]]), "start from the ids"),
    (lambda m: m(ids_of(1, 28), past=PTuningV2(m, 5)(m)), "context of 32"),
    (lambda m: m(ids_of(1, 28), past=PromptTuning(m, 5)(m)), "context of 32")])
def test_mistakes_get_one_sentence(call, says):
    with pytest.raises(UserError, match=says) as error:
        call(small())
    assert "\n" not in str(error.value)


# -------------------------------------------------------------------------------------------------- templates

def test_a_template_places_virtual_tokens_and_words():
    assert parse_template("{p:3} {prompt} {p:2}", None) == [[-1, -2, -3], [-4, -5]]
    assert parse_template("Review:{p:1}{prompt} It was {p:1}", lambda s: [len(s)]) == [[7, -1], [8, -2]]
    assert parse_template("{prompt}{p:1}", None) == [[], [-1]]
    for wrong in ("{p:3}", "{prompt}", "{prompt} {p:1} {prompt}", "{p:0}{prompt}"):
        with pytest.raises(UserError, match="template"):
            parse_template(wrong, lambda s: [1])


@each_family
@pytest.mark.parametrize("cls", SOFT)
def test_virtual_tokens_inside_the_text(cls, family):
    model, template = small(family, torch.float64), "{p:2} {prompt} {p:1}"
    prompt = make(cls, model, template=template, init="text", ids=[11, 12, 13]).eval()
    before, after = parse_template(template, None)
    rows = [before + ask + after + print_result for ask, print_result in (([5, 6, 7], [8, 9]), ([4], [1, 2, 3]))]
    x = torch.tensor([row + [0] * (8 - len(row)) for row in rows])
    real = torch.tensor([[11, 12, 5, 6, 7, 13, 8, 9], [11, 12, 4, 13, 1, 2, 3, 0]])
    assert prompt(model) is None and prompt.prefix_len == 0
    prompt.drop_encoder().embedding.data = model.wte.weight[[11, 12, 13]].clone()       # exactly those words
    assert far(model(prompt.embed(model, x))[0], model(real)[0]) < 1e-12
    (model(prompt.embed(model, x))[0][1, :7] ** 2).sum().backward()
    assert (prompt.embedding.grad.abs().sum(1) > 0).all()


@each_family
def test_a_template_decodes_with_the_cache(family):
    model = small(family)
    prompt = make(PTuning, model, template="{p:2} {prompt} {p:1}")
    before, after = parse_template(prompt.template, None)
    rows = [before + ask + after for ask in ([5, 6, 7], [4])]
    got = generate(model, rows, 6, temperature=0, embed=lambda ids: prompt.embed(model, ids))
    for row, new in zip(rows, got):
        for i, token in enumerate(new):
            with torch.no_grad():
                logits = model(prompt.embed(model, torch.tensor([row + new[:i]])))[0]
            assert int(logits[0, -1].argmax()) == token


# ---------------------------------------------------------------------------------------- folding and storing

@each_family
@each_kind
def test_folding_and_storing_keep_the_prompt(cls, kw, family, tmp_path):
    model = small(family)
    prompt = make(cls, model, **kw).eval()
    with torch.no_grad():
        for p in prompt.parameters():
            p += 0.3
    past = [t.detach() for entry in prompt(model) for t in entry if t is not None]
    save_prompt(prompt, tmp_path / "a" / "b", base="some/base")
    again = load_prompt(model, tmp_path / "a" / "b")
    size = prompt.prompt_embeddings().numel() + (prompt.gate.numel() if "gated" in kw.values() else 0)
    for other in (again, prompt.drop_encoder()):
        again_past = [t for entry in other(model) for t in entry if t is not None]
        assert len(past) == len(again_past) and all(map(torch.equal, past, again_past))
        assert sum(p.numel() for p in other.parameters()) == size and other.num_virtual_tokens == 3
        assert all(p.requires_grad for p in other.parameters())
    assert again.prefix_len == prompt.prefix_len and not again.training
    stored = json.loads((tmp_path / "a" / "b" / "adapter_config.json").read_text())
    assert stored["task_type"] == "CAUSAL_LM" and stored["base_model_name_or_path"] == "some/base"


def test_a_template_is_stored_and_peft_must_refuse_it(tmp_path):
    model = small()
    prompt = make(PTuning, model, template="{p:1}{prompt}{p:2}")
    save_prompt(prompt, tmp_path)
    again = load_prompt(model, tmp_path)
    assert again.template == prompt.template and again(model) is None
    ids = torch.tensor([[-3, 4]])
    assert torch.equal(again.embed(model, ids), prompt.embed(model, ids))
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "TEMPLATE_PROMPT"


@pytest.mark.parametrize("damage, says", [
    ({"config": {"peft_type": "LOHA"}}, "'LOHA' is not read as a soft prompt; PROMPT_TUNING"),
    ({"config": {"num_virtual_tokens": 4}}, "4"), ({"config": {"num_virtual_tokens": "3"}}, "a whole number"),
    ({"config": {"task_type": "SEQ_CLS"}}, "task_type SEQ_CLS is not read here; .* CAUSAL_LM, is"),
    ({"config": {"peft_type": "TEMPLATE_PROMPT", "template": "{p:3}"}}, "adapter_config.json: template"),
    ({"config": {"peft_type": "TEMPLATE_PROMPT", "template": "{prompt}{p:9}"}}, "json: .* 9 virtual tokens"),
    ({"config": {"num_virtual_tokens": None}}, "None"),
    ({"config": {"template": "{prompt}{p:3}"}}, "template"),
    ({"config": {"peft_type": "PREFIX_TUNING"}}, "PREFIX"), ({"tensors": {}}, "prompt_embeddings"),
    ({"tensors": {"prompt_embeddings": torch.zeros(3, 16), "more": torch.zeros(1)}}, "more"),
    ({"tensors": {"prompt_embeddings": torch.zeros(3, 15)}}, "15"),
    ({"tensors": {"prompt_embeddings": torch.zeros(3, 16, dtype=torch.long)}}, "finite"),
    ({"tensors": {"prompt_embeddings": torch.full((3, 16), torch.nan)}}, "finite")])
def test_loading_is_strict(damage, says, tmp_path):
    model = small()
    save_prompt(make(PromptTuning, model), tmp_path)
    load_prompt(model, tmp_path)
    if "config" in damage:
        config = json.loads((tmp_path / "adapter_config.json").read_text())
        (tmp_path / "adapter_config.json").write_text(json.dumps({**config, **damage["config"]}))
    else:
        write_tensors(tmp_path / "adapter_model.safetensors", damage["tensors"])
    with pytest.raises(DataError, match=says):
        load_prompt(model, tmp_path)


@each_family
@each_class
def test_nearest_tokens_names_the_words_it_started_from(cls, family):
    model = small(family)
    words = [11, 30, 5]
    prompt = make(cls, model, init="text", ids=words)
    start = prompt.prompt_embeddings().detach().clone()
    found = nearest_tokens(prompt, model, k=2, start=start)
    assert [row["cosine"][0][0] for row in found] == words and all(row["moved"] == 0 for row in found)
    assert all(row["cosine"][0][1] > 0.999 and len(row["dot"]) == 2 for row in found)
    prompt.drop_encoder().embedding.data[1] += 1.0
    moved = [row["moved"] for row in nearest_tokens(prompt, model, start=start)]
    assert moved[0] < 1e-5 and moved[1] == pytest.approx(start.size(1) ** 0.5, rel=1e-4)
    assert nearest_tokens(prompt, model)[0]["moved"] is None


def test_soft_tokens_start_from_the_first_five_thousand_words():
    model = GPT(GPTConfig(6000, 16, 1, 1, 4))
    model.wte.weight.data[:, 0] = torch.arange(6000.0)
    ids = prompts.soft_start(model, 400, "vocab", None)[:, 0].long()
    assert len(set(ids.tolist())) == 400 and 4000 < ids.max() < 5000
