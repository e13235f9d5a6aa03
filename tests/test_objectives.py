"""Objectives: the attention mask, the targets, the corruption; and the runs that use them."""
import math
import shutil

import numpy as np
import pytest
import torch

import train
from data.batches import batching, objectives
from data.batches import examples as examples_module
from data.results import evaluate
from data.batches.examples import Feed, Text, targets
from data.checkpoints.safetensors import read_tensors
from data.runtime.files import UserError, read_json
from data.batches.objectives import Example, collate, corrupt, special_tokens, stride
from data.results.next_token import walk
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig, generate
from tiny import stopped, write

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>", "<|start|>")
TOKENIZER = Tokenizer.train(["a b"], 256 + len(SPECIAL), SPECIAL)
M = special_tokens(TOKENIZER, "glm")
SHAPE = GPTConfig(TOKENIZER.vocab_size, 64, 2, 2, 16, eos=TOKENIZER.eos)
FAMILY = pytest.mark.parametrize("family", ["gpt2", "llama"])
EVERY = pytest.mark.parametrize("objective", objectives.OBJECTIVES)


def make(family, seed=0):
    torch.manual_seed(seed)
    model = GPT(SHAPE if family == "gpt2" else SHAPE.as_family("llama")).double()
    for p in model.parameters():
        p.data.mul_(10 if p.dim() > 1 else 1)
    return model.eval()


def window(n, seed=3):
    return np.random.default_rng(seed).integers(97, 123, n).tolist()


def example(objective, n=14, seed=5):
    return corrupt(objective, window(n), np.random.default_rng(seed), M)


def ctx(model, objective="causal"):
    attention = objectives.OBJECTIVE_ATTENTION[objective]
    return evaluate.ModelContext(model, Text(TOKENIZER, "plain", attention=attention, objective=objective),
                        torch.device("cpu"), next(model.parameters()).dtype)


# ------------------------------------------------------------------------------------------ attention masks

def attention_matrix(objective, e):
    """The full matrix by the definitions: may input j influence the logit at i?"""
    T = len(e[0]) - (not isinstance(e, Example))
    source = {"causal": 0, "mlm": T}.get(objective)
    if objective == "prefix":
        source = e[1].index(True)
    if objective == "glm":
        source = e.ids.index(M.start)                   # A ends where the first span starts
    return [[j <= i or i < source and j < source for j in range(T)] for i in range(T)]


@FAMILY
@EVERY
@pytest.mark.parametrize("P", [0, 3])
def test_exactly_the_positions_that_may_influence_a_logit_do(objective, family, P):
    model, e = make(family), example(objective)
    x, _, view = collate([e], objectives.OBJECTIVE_ATTENTION[objective])
    past = model.hidden_states(torch.tensor([window(P)]))[1] if P else None
    with torch.no_grad():
        whole = model.logits(model.hidden_states(x, past, **view)[0])[0]
        for j in range(x.size(1)):
            other = x.clone()
            other[0, j] = (other[0, j] + 7) % 97
            gap = (model.logits(model.hidden_states(other, past, **view)[0])[0] - whole).abs().amax(-1)
            want = [row[j] for row in attention_matrix(objective, e)]
            assert [g > 1e-9 for g in gap.tolist()] == want, j


@FAMILY
def test_no_prefix_is_causal_and_causal_is_untouched(family):
    model, x = make(family), torch.tensor([window(9), window(9, 4)])
    with torch.no_grad():
        causal = model.hidden_states(x)[0]
        assert (model.hidden_states(x, bidirectional_len=torch.tensor([0, 1]))[0] - causal).abs().max() < 1e-12
        assert collate([([1, 2, 3], [False, True, True])])[2] == {}         # causal attention needs no argument
        glm_positions = torch.stack([torch.arange(9).expand(2, 9), torch.zeros(2, 9, dtype=torch.long)])
        assert torch.equal(model.hidden_states(x, glm_positions=glm_positions)[0], causal)


@FAMILY
@EVERY
def test_a_padded_row_is_the_lone_row(objective, family):
    model = make(family)
    some = [example(objective, n, n) for n in (14, 5, 22, 9)]
    k = ctx(model, objective)
    alone = [evaluate.summed_loss(k, [e], None).item() for e in some]
    assert evaluate.summed_loss(k, some, None).item() == pytest.approx(sum(alone), rel=1e-6)


@FAMILY
def test_generation_behind_a_prefix_is_the_whole_forward(family):
    model, rows = make(family), [window(4), window(9, 8)]
    got = generate(model, rows, 6, temperature=0, bidirectional_prompt=True)
    assert got != generate(model, rows, 6, temperature=0)
    for row, new in zip(rows, got):
        ids = list(row)
        for token in new:
            with torch.no_grad():
                hidden, _ = model.hidden_states(torch.tensor([ids]), bidirectional_len=torch.tensor([len(row)]))
            assert model.logits(hidden[0, -1]).argmax() == token
            ids.append(token)


# ------------------------------------------------------------------------------- an answer that fills a blank

CHAT = {"messages": [{"role": "user", "content": "Where?"}, {"role": "assistant", "content": "there"}]}


@FAMILY
def test_an_answer_is_glms_one_span(family):
    """A fine-tuning example has the form of a pre-training example: text, mask, start, span, end."""
    model, k = make(family), ctx(make(family), "glm")
    (e,), _ = k.text.encode([CHAT], 64)
    source = TOKENIZER.encode("Where?")
    n, reply = len(source) + 1, TOKENIZER.encode(" there")       # plain text begins with a start of its own
    assert e.ids == [TOKENIZER.eos, *source, M.mask, M.start, *reply] and e.bidirectional_len == n + 1
    assert e.y == [-1] * (n + 1) + reply + [M.end]
    assert e.glm_positions == ([*range(n + 1), *[n] * (len(reply) + 1)], [0] * (n + 1) + [*range(1, len(reply) + 2)])
    assert k.text.prompt_ids(CHAT) == e.ids[:n + 2]
    assert k.text.prompt_ids(CHAT, limit=6) == [e.ids[0], *e.ids[n - 3:n + 2]]       # cut behind the first id
    x, _, view = collate([e], "prefix")
    for j in range(x.size(1)):                                  # a start token is unseen by the text
        other = x.clone()
        other[0, j] = (other[0, j] + 7) % 97
        gap = (model.hidden_states(other, **view)[0] - model.hidden_states(x, **view)[0])[0].abs().amax(-1)
        assert [g > 1e-9 for g in gap.tolist()] == [j <= i or i <= n and j <= n for i in range(x.size(1))], j


@FAMILY
@pytest.mark.parametrize("P", [0, 3])
def test_generation_of_a_glm_equals_the_whole_forward(family, P):
    """Generation, a walk of --task show and the scores of labels, all with a cache, against no cache."""
    model, k = make(family), ctx(make(family), "glm")
    past = model.hidden_states(torch.tensor([window(P)]))[1] if P else None
    rows = [[*window(n, n), M.mask, M.start] for n in (4, 9)]
    got = generate(model, rows, 6, temperature=0, past=past, bidirectional_prompt=True, infill_suffix=True)
    for row, new in zip(rows, got):
        if not P:
            assert walk(model, row, None, 6, None, (), 0, bidirectional_prompt=True, infill_suffix=True)[1] == \
                [(token, 1.0) for token in new]
        n = len(row) - 1
        for i, token in enumerate(new):
            ids = row + new[:i]
            x, _, view = collate([Example(ids, [-1] * len(ids), n, objectives.glm_single_span(len(ids), n))])
            with torch.no_grad():
                assert model.logits(model.hidden_states(x, past, **view)[0][0, -1]).argmax() == token
    k.model, k.text.labels = model, ("there", "no", "nowhere")
    k.prompt = torch.nn.Module()
    k.prompt.forward, k.prompt.template = lambda model: past, None
    scores = evaluate.word_scores(k, [k.text.prompt_ids(CHAT), rows[0]])
    for j, label in enumerate(k.text.labels):
        row = {"messages": [CHAT["messages"][0], {"role": "assistant", "content": label}]}
        loss = evaluate.summed_loss(k, k.text.encode([row], 64)[0], past).item()
        assert scores[0, j].item() == pytest.approx(loss, rel=1e-5)


# ---------------------------------------------------------------------------------------- what is counted

@FAMILY
@EVERY
def test_the_loss_counts_what_the_objective_says_and_no_more(objective, family):
    """By hand: each target read at its position, in one row's full matrix of log-probabilities."""
    model, e = make(family), example(objective)
    x, _, view = collate([e], objectives.OBJECTIVE_ATTENTION[objective])
    with torch.no_grad():
        logp = model.logits(model.hidden_states(x, **view)[0])[0].log_softmax(-1)
    if isinstance(e, Example):
        supervised = [(i, t) for i, t in enumerate(e.y) if t >= 0]
    else:
        supervised = [(i - 1, t) for i, (t, on) in enumerate(zip(*e)) if on and i]
    assert len(supervised) == targets(e)
    got = evaluate.summed_loss(ctx(model, objective), [e], None).item()
    assert got == pytest.approx(-sum(logp[i, t].item() for i, t in supervised), rel=1e-5)
    count = {"causal": 13, "mlm": 2}.get(objective)
    assert count in (None, len(supervised))
    if objective == "prefix":
        assert supervised == [(i, e[0][i + 1]) for i in range(e[1].index(True) - 1, 13)]
    if objective == "glm":
        assert all(i >= e.bidirectional_len for i, _ in supervised) and len(supervised) == len(e.ids) - e.bidirectional_len


TURNS = {"messages": [{"role": role, "content": content} for role, content in
                      (("user", "Hi"), ("assistant", "Ho"), ("user", "And"), ("assistant", "so on"))]}


@pytest.mark.parametrize("limit", [100, 8])
@pytest.mark.parametrize("attention, objective, soft, answers", [
    ("causal", "causal", ([], []), 2), ("causal", "causal", ([3, 4], []), 2), ("causal", "causal", ([3], [4, 5]), 1),
    ("prefix", "causal", ([], []), 1), ("prefix", "glm", ([], []), 1)])
def test_the_last_answer_is_trained_as_it_is_generated(attention, objective, soft, answers, limit):
    """The same tokens and the same attention stand before it; earlier answers, which have others, are no targets."""
    text = Text(TOKENIZER, "plain", attention=attention, objective=objective, soft_prompt_ids=soft)
    (example,), _ = text.encode([TURNS], limit)
    _, y, view = collate([example], attention)
    ids = example.ids if isinstance(example, Example) else example[0]
    begins = [i for i in range(y.size(1)) if y[0, i] >= 0 and (i == 0 or y[0, i - 1] < 0)]
    prompt = text.prompt_ids(TURNS, limit=None if limit == 100 else begins[-1] + 1)
    if limit == 100:
        assert len(begins) == answers
    if answers == 1:
        assert len(begins) == 1 and ids[:begins[-1] + 1] == prompt
        assert list(view.get("bidirectional_len", [0])) == [text.attention_args(prompt)[0]]


def test_a_source_is_what_stands_before_the_first_target():
    rows = [([1, 2, 3, 4, 5], [False, False, True, False, True]), ([1, 2, 3], [True, True, True])]
    assert collate(rows, "prefix")[2]["bidirectional_len"].tolist() == [2, 0]
    assert collate(rows, "bidirectional")[2] == {} == collate(rows)[2]


# -------------------------------------------------------------------------------------- what is corrupted

def test_mlm_masks_15_percent_80_10_10():
    ids = window(200) + [TOKENIZER.eos] * 20
    kept = masked = other = chosen = 0
    for seed in range(300):
        e = objectives.mlm(ids, np.random.default_rng(seed), M)
        at = [i for i, t in enumerate(e.y) if t >= 0]
        assert len(at) == 30 and max(at) < 200 and all(e.y[i] == ids[i] for i in at)    # no end is hidden
        assert all(e.ids[i] == ids[i] for i in range(220) if i not in at) and e.bidirectional_len == 220
        chosen += 30
        masked += sum(e.ids[i] == M.mask for i in at)
        kept += sum(e.ids[i] == ids[i] for i in at)
        other += sum(e.ids[i] not in (ids[i], M.mask) for i in at)
        assert not {e.ids[i] for i in at} & set(TOKENIZER.special.values()) - {M.mask}
    assert masked / chosen == pytest.approx(0.8, abs=0.015)         # sd of 9,000 draws: 0.0042
    assert other / chosen == pytest.approx(0.1, abs=0.012) and kept / chosen == pytest.approx(0.1, abs=0.012)


def restored(e):
    """GLM's text out of an example: each span back to the place that its start token names."""
    a, spans = e.ids[:e.bidirectional_len], {}
    for token, place, within in zip(e.ids[e.bidirectional_len:], *(p[e.bidirectional_len:] for p in e.glm_positions)):
        if within == 1:
            assert token == M.start and a[place] == M.mask and place not in spans
            spans[place] = []
        else:
            assert within == len(spans[place]) + 2
            spans[place].append(token)
    return [t for i, token in enumerate(a) for t in spans.get(i, [token])], spans


def test_glm_spans():
    lengths, hidden, first, ids = [], 0, set(), window(400)
    for seed in range(200):
        e = objectives.glm(ids, np.random.default_rng(seed), M)
        text, spans = restored(e)
        assert text == ids and all(spans.values())
        hidden += sum(map(len, spans.values()))
        lengths += [len(s) for s in spans.values()][:-1]            # the last is cut to the budget
        first.add(sorted(spans).index(next(iter(spans))))
        assert e.glm_positions[0][:e.bidirectional_len] == list(range(e.bidirectional_len)) and not any(e.glm_positions[1][:e.bidirectional_len])
        assert e.y[:e.bidirectional_len] == [-1] * e.bidirectional_len and e.y.count(M.end) == len(spans)
        for i in range(e.bidirectional_len, len(e.ids)):                         # says the next of its span, or the end
            last = i + 1 == len(e.ids) or e.glm_positions[1][i + 1] == 1
            assert e.y[i] == (M.end if last else e.ids[i + 1])
    assert hidden == 200 * 60                                       # 15 % of 400
    assert np.mean(lengths) == pytest.approx(3 + math.exp(-3), abs=0.12)    # Poisson(3), 0 counted as 1
    assert len(first) > 10                                          # any span may come first


@EVERY
def test_windows_fit_the_block_and_depend_on_the_seed_alone(objective):
    text = Text(TOKENIZER, "plain", objective=objective)
    for block in (4, 5, 17, 64):
        step, ids = stride(objective, block), window(400)
        some = text.windows(ids, range(0, 300, step), step, 1, 2)
        assert all(len(e[0]) - (not isinstance(e, Example)) <= block for e in some)
        assert some == text.windows(ids, range(0, 300, step), step, 1, 2)
    feed = [Feed(window(900), 3, 10 ** 6, 1, 32, text) for _ in range(2)]
    straight = [feed[0](step) for step in range(20)]
    assert [feed[1](step) for step in (13, 4)] == [straight[13], straight[4]]
    if objective != "causal":
        assert text.windows(ids, [0], 16, 1, 2) != text.windows(ids, [0], 16, 1, 3)


def test_what_has_no_room_or_no_mask_is_refused():
    with pytest.raises(UserError, match="--block_size 3 is too small for --objective glm; it needs at least 4"):
        stride("glm", 3)
    plain = Tokenizer.train(["a"], 257)
    for objective, token in (("mlm", "mask"), ("glm", "mask")):
        with pytest.raises(UserError, match=rf"--objective {objective} needs a <\|{token}\|> token"):
            special_tokens(plain, objective)
    with pytest.raises(UserError, match=r"glm needs a <\|start\|> token"):
        special_tokens(Tokenizer.train(["a"], 258, ("<|endoftext|>", "<|mask|>")), "glm")
    special_tokens(plain, "prefix")


# ------------------------------------------------------------------------------------------------ learning

@FAMILY
@EVERY
def test_a_fixed_batch_is_overfit(objective, family):
    torch.manual_seed(0)
    model = GPT(SHAPE if family == "gpt2" else SHAPE.as_family("llama"))
    k, some = ctx(model, objective), [example(objective, n, n) for n in (20, 16, 12, 9)]
    optimiser, count = torch.optim.AdamW(model.parameters(), 1e-2), sum(map(targets, some))
    for _ in range(150):
        loss = evaluate.summed_loss(k, some, None) / count
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert loss.item() < 0.15


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    torch.manual_seed(0)
    GPT(SHAPE).save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    letters = "abcdefgh"
    rows = {"text": [{"text": f"{a * 3}{b * 3} " * 6} for a in letters for b in letters],
            "label": [{"text": a + b, "label": "x" if a < "e" else "y"} for a in letters for b in letters],
            "chat": [{"prompt": a + b, "completion": a} for a in letters for b in letters],
            "pairs": [{"prompt": a + b, "chosen": a, "rejected": b} for a in letters for b in letters if a != b]}
    write(folder, rows)
    return folder


def run(world, out, data, *flags, code=0):
    init = [] if "--init" in flags else ["--init", world / "base"]
    args = [*init, "--data", world / data, "--out", out, *flags]
    assert train.main(list(map(str, args))) == code
    return read_json(out / "result.json") if code == 0 else None


PRETRAIN = ["--task", "pretrain", "--batch", "8", "--block_size", "32", "--epochs", "100", "--eval_every", "1000"]


@pytest.mark.parametrize("objective", ["prefix", "mlm", "glm"])
def test_a_run_of_each_objective(objective, world, tmp_path, monkeypatch, capsys):
    """It learns, resumes to the same bits, evaluates to the same number, and hands its attention on."""
    flags = [*PRETRAIN, "--objective", objective, "--steps", "12", "--save_every", "5", "--lr", "1e-2"]
    r = run(world, tmp_path / "whole", "text", *flags)
    assert r["metrics"]["loss"] < r["baseline_metrics"]["loss"] - 0.5 and r["skipped"] == 0
    stopped(monkeypatch, 8, lambda: run(world, tmp_path / "cut", "text", *flags))
    run(world, tmp_path / "cut", "text", *flags)
    a, b = (read_tensors(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    attention = objectives.OBJECTIVE_ATTENTION[objective]
    stored = read_json(tmp_path / "whole" / "model" / "run.json")
    assert (stored["objective"], stored["attention"]) == (objective, attention)
    after = ["--init", tmp_path / "whole"]
    again = run(world, tmp_path / "eval", "text", "--task", "eval", "--block_size", "32", *after)
    assert again["metrics"]["loss"] == pytest.approx(r["metrics"]["loss"], rel=1e-5)
    assert again["metrics"]["targets"] == r["metrics"]["targets"]
    seen, hidden_states = [], GPT.hidden_states
    monkeypatch.setattr(GPT, "hidden_states", lambda self, x, past=None, *a, bidirectional_len=None, **k: (
        seen.append(None if bidirectional_len is None else (bidirectional_len == x.size(1) - (objective == "glm")).any().item()),
        hidden_states(self, x, past, *a, bidirectional_len=bidirectional_len, **k))[1])
    run(world, tmp_path / "head", "label", "--task", "classify", "--classifier", "head", "--method", "full",
        "--steps", "2", "--forgetting_data", "none", *after)
    assert all(s or s is None and objective != "mlm" for s in seen) and True in seen    # None: the baseline
    assert read_json(tmp_path / "head" / "model" / "run.json")["attention"] == attention
    monkeypatch.undo()
    talk = ["--task", "chat", "--prompt", "ab", "--max_new_tokens", "2", "--init"]
    assert train.main([*talk, str(tmp_path / "whole")]) == (2 if objective == "mlm" else 0)
    assert ("cannot generate" in capsys.readouterr().err) == (objective == "mlm")
    answer = ["--method", "full", "--steps", "20", "--lr", "1e-2", "--forgetting_data", "none", "--max_new_tokens", "4"]
    r = run(world, tmp_path / "sft", "chat", *answer, *after)
    assert r["metrics"]["loss"] < r["baseline_metrics"]["loss"] - 2
    again = run(world, tmp_path / "again", "chat", "--task", "eval", "--init", tmp_path / "sft")
    assert again["metrics"]["loss"] == pytest.approx(r["metrics"]["loss"], rel=1e-5)
    assert read_json(tmp_path / "sft" / "model" / "run.json")["attention"] == "prefix"
    assert train.main([*talk, str(tmp_path / "sft")]) == 0 and capsys.readouterr().out
    run(world, tmp_path / "dpo", "pairs", "--task", "dpo", *after, code=2)
    assert f"dpo needs a causal model, and --init was trained with --objective {objective}" in capsys.readouterr().err


@pytest.mark.parametrize("method", ["lora", "prompt_tuning", "p_tuning_v2"])
def test_other_methods_learn_every_objective(method, world, tmp_path):
    for objective in ("prefix", "mlm", "glm"):
        more = [] if method == "lora" else ["--num_virtual_tokens", "4"]
        r = run(world, tmp_path / objective, "text", *PRETRAIN, "--objective", objective, "--method", method,
                "--steps", "8", *more)
        assert r["skipped"] == 0 and r["metrics"]["loss"] < r["baseline_metrics"]["loss"]
        base = ["--init", tmp_path / objective, "--method", method, "--steps", "2", "--forgetting_data", "none"]
        if method != "lora":                            # a soft prompt has no soft prompt on top
            base = [*base[2:], *more]
        run(world, tmp_path / f"{objective}-sft", "chat", *base)


def test_classify_both_ways_or_causal(world, tmp_path, capsys):
    head = ["--task", "classify", "--classifier", "head", "--method", "full", "--steps", "120", "--lr", "3e-3",
            "--batch", "32", "--forgetting_data", "none"]
    r = run(world, tmp_path / "both", "label", *head, "--attention", "bidirectional")
    assert r["metrics"]["accuracy"] > 0.9 and r["metrics"]["loss"] < 0.6
    again = run(world, tmp_path / "eval", "label", "--task", "eval", "--init", tmp_path / "both")
    assert again["metrics"]["loss"] == pytest.approx(r["metrics"]["loss"], rel=1e-4)
    run(world, tmp_path / "lora", "label", *head[:4], "--steps", "2", "--forgetting_data", "none", "--attention",
        "bidirectional")
    merged = ["--task", "merge", "--init", str(tmp_path / "lora"), "--out", str(tmp_path / "merged")]
    assert train.main(merged) == 0
    assert read_json(tmp_path / "merged" / "run.json")["attention"] == "bidirectional"
    run(world, tmp_path / "words", "label", "--task", "classify", "--attention", "bidirectional", code=2)
    assert "--classifier head" in capsys.readouterr().err


def test_a_model_without_a_mask_is_refused_in_one_sentence(world, tmp_path, capsys):
    shutil.copytree(world / "base", tmp_path / "base")
    few = ("<|endoftext|>", *(f"<|{i}|>" for i in range(4)))
    Tokenizer.train(["a b"], 256 + len(few), few).save_pretrained(tmp_path / "base")
    run(world, tmp_path / "r", "text", *PRETRAIN, "--objective", "mlm", "--init", tmp_path / "base", code=2)
    assert capsys.readouterr().err.splitlines()[-1].startswith("train.py: --objective mlm needs a <|mask|>")


def test_the_plain_stream_is_what_it_was():
    """Causal pre-training sees the windows of data/batches/batching.py, untouched, in their order."""
    ids, text = window(500), Text(TOKENIZER, "plain")
    feed = Feed(ids, 4, 10 ** 6, 7, 16, text)
    starts = batching.blocks(500, 16, 7, 0)[:4]
    assert feed(0) == [[(ids[s:s + 17], [True] * 17) for s in starts]]


def test_the_windows_of_each_step_are_corrupted_anew():
    text = Text(TOKENIZER, "plain", objective="mlm")
    feed = Feed([97] * 900, 3, 10 ** 6, 1, 32, text)            # one letter: windows differ in their corruption alone
    assert [e.y for e in feed.step_examples(0)] != [e.y for e in feed.step_examples(1)]


def test_valid_text_is_measured_in_part_and_test_text_as_a_whole(monkeypatch):
    monkeypatch.setattr(examples_module, "MAX_VALID_TOKENS", 64)
    text = Text(TOKENIZER, "plain")
    rows = [{"text": "ab" * 100}]
    found = text.encode_splits({"valid": rows, "test": rows}, 32)
    counts = {split: sum(map(targets, some)) for split, some in found.items()}
    assert counts == {"valid": 63, "test": len(text.stream(rows)) - 1}
