"""--task show: the bars are the softmax, the cuts are the sampler's, the walk is the generator's."""
import json
import math
import re

import pytest
import torch

import train
from data.results.next_token import print_columns, table, walk
from data.text.formats import load_splits
from data.text.tokenizer import Tokenizer
from model import GPT, GPTConfig, filter_logits, generate, sample

SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|mask|>", "<|start|>")
TOKENIZER = Tokenizer.train(["a b"], 256 + len(SPECIAL), SPECIAL)


def make():
    torch.manual_seed(0)
    model = GPT(GPTConfig(TOKENIZER.vocab_size, 24, 2, 2, 32, eos=TOKENIZER.eos)).eval()
    for p in model.parameters():
        p.data.mul_(8 if p.dim() > 1 else 1)
    return model


def logits_of(*p):
    """Logits over the vocabulary whose softmax is p on the letters a, b, c, ..., and nothing elsewhere."""
    out = torch.full((TOKENIZER.vocab_size,), -60.0)
    for i, value in enumerate(p):
        out[97 + i] = math.log(value)
    return out


@pytest.mark.parametrize("how, kept, cuts", [
    ({}, 261, {}), ({"top_k": 2}, 2, {2: "top_k 2"}), ({"top_p": 0.6}, 2, {2: "top_p 0.6"}),
    ({"top_k": 3, "top_p": 0.5}, 1, {1: "top_p 0.5", 3: "top_k 3"}),        # 0.5 / 0.9 of what is left
    ({"temperature": 0.0}, 1, {1: "greedy takes the first"}), ({"top_p": 1.0}, 261, {}),
])
def test_a_table_by_hand(how, kept, cuts):
    lines = table(logits_of(0.5, 0.25, 0.15, 0.1), TOKENIZER, **how)
    assert lines[-1].startswith(f"{kept} of 261 can be sampled; entropy 1.21 nats")
    rows = [line for line in lines[:-1] if not line.startswith("---")]
    assert rows[0].split() == ["0.5000", '"a"', "█" * 16] and rows[1].split() == ["0.2500", '"b"', "█" * 8]
    at = {sum(not line.startswith("-") for line in lines[:i]): line.split("  ")[1]
          for i, line in enumerate(lines) if line.startswith("---")}
    assert at == cuts


def test_what_a_temperature_does():
    lines = table(logits_of(0.8, 0.2), TOKENIZER, temperature=2.0)          # to the power of a half: 2 to 1
    assert [line.split()[0] for line in lines[:2]] == ["0.6667", "0.3333"]


def test_allowed_is_what_sample_draws():
    logits = torch.randn(1, 30, generator=torch.Generator().manual_seed(1)) * 2
    for how in ({}, {"top_k": 4}, {"top_p": 0.7}, {"temperature": 0.5, "top_k": 6, "top_p": 0.8},
                {"temperature": 0}):
        p = filter_logits(logits, **how).softmax(-1)[0]
        drawn = sample(logits.expand(4000, 30), **how, generator=torch.Generator().manual_seed(2))
        share = torch.bincount(drawn, minlength=30) / 4000
        assert not share[p == 0].any() and (share - p).abs().max() < 0.03


@pytest.mark.parametrize("both_ways", [False, True])
def test_a_walk_is_the_generators_and_its_numbers_are_right(both_ways):
    model, ids = make(), [97, 98, 99]
    first, chosen = walk(model, ids, None, 6, None, (), temperature=0, bidirectional_prompt=both_ways)
    assert [t for t, _ in chosen] == generate(model, [ids], 6, temperature=0, bidirectional_prompt=both_ways)[0]
    assert all(p == 1 for _, p in chosen)
    dice = torch.Generator().manual_seed(3)
    first, chosen = walk(model, ids, None, 6, dice, (), temperature=1.5, top_k=5, bidirectional_prompt=both_ways)
    view = {"bidirectional_len": torch.tensor([3])} if both_ways else {}
    for n, (token, p) in enumerate(chosen):
        x = torch.tensor([ids + [t for t, _ in chosen[:n]]])
        with torch.no_grad():
            logits = model.logits(model.hidden_states(x, **view)[0][:, -1])
        assert n or torch.allclose(first, logits[0], atol=1e-4)
        assert p == pytest.approx(filter_logits(logits, 1.5, 5).softmax(-1)[0, token].item(), rel=1e-3)
    long = walk(model, ids, None, 99, dice, ())[1]
    assert len(long) == 24 - 3 + 1                                  # until the context is full
    assert len(walk(model, ids, None, 99, None, {chosen[0][0]}, temperature=0)[1]) <= 22


def test_columns(capsys):
    print_columns([["a", "b"], ["c"]])
    assert capsys.readouterr().out == "a" + " " * 45 + "c\nb\n"


@pytest.mark.parametrize("width", [46, 60, 80, 200])
def test_columns_never_touch_and_fit_the_terminal(width, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(width))
    left = ["50257 of 50257 can be sampled; entropy 10.21 nats", "0.5000  " + "x" * 18]
    print_columns([left, ["RIGHT", "RIGHT"]])
    lines = capsys.readouterr().out.splitlines()
    starts = {line.index("RIGHT") for line in lines if "RIGHT" in line}
    assert len(starts) == 1 and all(line[start - 2:start] == "  " for line in lines for start in starts if line[start:])
    text = "".join(line[:start] for line in lines for start in starts).replace(" ", "")
    assert text == "".join(left).replace(" ", "")
    assert all(len(line) <= max(width, 61) for line in lines)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make().save_pretrained(folder / "base")
    TOKENIZER.save_pretrained(folder / "base")
    rows = [{"prompt": c, "completion": c} for c in "abcdefghij"]
    (folder / "d.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def shown(capsys, init, template="plain"):
    capsys.readouterr()
    assert train.main(["--task", "show", "--init", str(init), "--prompt", "ab", "--max_new_tokens", "4",
                       "--template", template]) == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("method, more", [
    ("lora", []), ("p_tuning_v2", ["--num_virtual_tokens", "3"]),
    ("prompt_tuning", ["--num_virtual_tokens", "2", "--prompt_template", "{p:2} {prompt}"]),
])
def test_base_and_tuned_side_by_side(method, more, world, tmp_path, capsys):
    learn = ["--init", str(world / "base"), "--data", str(world / "d.jsonl"), "--out", str(tmp_path / "r"),
             "--method", method, "--steps", "3", "--max_new_tokens", "2", "--forgetting_data", "none", *more]
    assert train.main(learn) == 0
    if method == "prompt_tuning":
        virtual_tokens_are_described_once(tmp_path / "r", capsys)
    if method == "lora":
        the_first_test_row_is_the_default(world, tmp_path / "r", capsys)
    alone, both = shown(capsys, world / "base"), shown(capsys, tmp_path / "r")
    assert alone[0] == both[0] == "The next token, by probability:" and re.match(r"base +tuned$", both[1])
    left, right = [[line[46 * k:46 * k + 46].rstrip() for line in both[2:15]] for k in (0, 1)]
    without_bars = [[line.rstrip("█ ") for line in lines] for lines in (left, alone[1:14])]
    assert without_bars[0] == without_bars[1] and right != left     # the base is the base, behind the adapter
    bars = {float(line.split()[0]): line.count("█") for line in left[:12] + right[:12]}
    assert max(bars.values()) == 16                                 # one scale for both sides
    assert all(abs(16 * p / max(bars) - bar) <= 0.51 for p, bar in bars.items())
    second = both.index("A continuation, sampled with --seed 1; the probability that each token was chosen with:")
    assert both[second - 1] == "" and re.match(r"base +tuned$", both[second + 1])
    assert both[-2].startswith("base: ab") and both[-1].startswith("tuned: ab")
    assert shown(capsys, tmp_path / "r") == both                    # the same dice


def virtual_tokens_are_described_once(run, capsys):
    capsys.readouterr()
    assert train.main(["--task", "show", "--init", str(run), "--device", "cpu"]) == 0
    out, err = capsys.readouterr()
    assert "virtual tokens: nearest words" in out and "unknown" not in out
    assert err.count("cpu (") == err.count("(requested)") == 1


def the_first_test_row_is_the_default(world, run, capsys):
    capsys.readouterr()
    assert train.main(["--task", "show", "--init", str(run), "--max_new_tokens", "4"]) == 0
    by_default, said = capsys.readouterr()
    assert f"without --prompt, the first test row of {world / 'd.jsonl'} is continued" in said
    first = load_splits(str(world / "d.jsonl"))["test"].rows[0]["messages"][0]["content"]
    assert train.main(["--task", "show", "--init", str(run), "--max_new_tokens", "4", "--prompt", first]) == 0
    assert capsys.readouterr().out == by_default


def test_a_full_model_has_one_side_and_its_own_template_unless_another_is_asked_for(world, capsys):
    plain = shown(capsys, world / "base")
    own = shown(capsys, world / "base", "auto")
    assert not any("tuned" in line for line in plain) and plain[:12] != own[:12]
    assert own == shown(capsys, world / "base", "chatml")


def test_what_makes_no_sense_is_refused(world, tmp_path, capsys):
    base = ["--task", "show", "--init", str(world / "base")]
    assert train.main(base) == 2 and "--task show needs the text" in capsys.readouterr().err
    for flags, says in ((["--top_k", "0"], "--top_k 0"), (["--lr", "1"], "belongs to")):
        assert train.main([*base, "--prompt", "a", *flags]) == 2 and says in capsys.readouterr().err
