"""data/results/next_token.py: what a model is about to say, and how sure it is of each word it then says.

    p        softmax(logits / temperature) over the vocabulary, likeliest first, as bars
    cut      where top_k, then top_p, end: what is above can be drawn, by p / (the sum of what is left)
    choice   each token of a continuation, with the probability it was drawn with

The prompt is continued as plain text (--template plain), or answered in the model's own template (auto). With
an adapter or a soft prompt, the base and the tuned model stand side by side, with the same dice.

Public: show, table, walk
"""
import dataclasses
import itertools
import json

import torch

from data.runtime.files import UserError
from data.runtime.run_folder import say
from model import allowed, span

ROWS, BAR, WIDE = 12, 16, 46


def name(token, tokenizer):
    text = json.dumps(tokenizer.decode([token], special=True), ensure_ascii=False)
    return text if len(text) <= 16 else text[:14] + '.."'


def table(logits, tokenizer, temperature=1.0, top_k=None, top_p=None, rows=ROWS):
    """The likeliest tokens after one row of logits (V,), as lines of text."""
    p = (logits.float() / (temperature or 1)).softmax(-1)
    left = int(allowed(logits[None], temperature, top_k, top_p).isfinite().sum())
    ranked = p.sort(descending=True, stable=True)
    cuts = {1: "greedy takes the first"} if temperature == 0 else {}
    if temperature and top_k is not None and top_k < len(p):
        cuts[top_k] = f"top_k {top_k}"
    if temperature and top_p is not None and left < min(top_k or len(p), len(p)):
        cuts[left] = f"top_p {top_p:g}"
    out = []
    for n, (value, token) in enumerate(zip(ranked.values[:rows].tolist(), ranked.indices[:rows].tolist()), 1):
        bar = "█" * round(BAR * value / ranked.values[0].item())
        out.append(f"{value:7.4f}  {name(token, tokenizer):16}  {bar}".rstrip())
        if n in cuts:
            out.append(f"-------  {cuts[n]}")
    entropy = -(p * p.clamp(min=1e-30).log()).sum().item()
    return [*out, f"{left} of {len(p)} can be drawn; entropy {entropy:.2f} nats"]


@torch.no_grad()
def walk(model, ids, past, max_new, generator, end, temperature=1.0, top_k=None, top_p=None, both_ways=False,
         embed=None, blank=False):
    """(logits of the first choice (V,), [(token, the probability it was drawn with)]) of a continuation."""
    x, chosen, first = torch.tensor([ids], device=model.wte.weight.device), [], None
    column, n = torch.arange(len(ids), device=x.device), torch.tensor([len(ids)], device=x.device)
    sees, places = n - int(blank) if both_ways else None, span(column, n) if blank else None
    hidden, past = model.trunk(embed(model, x) if embed else x, past, sees=sees, places=places)
    for step in itertools.count():
        logits = model.head(hidden[:, -1]).float()                              # (1, V)
        first = logits[0] if first is None else first
        p = allowed(logits, temperature, top_k, top_p).softmax(-1)
        token = torch.multinomial(p, 1, generator=generator)                    # (1, 1)
        chosen.append((token.item(), p[0, token].item()))
        full = past[0][0].size(2) == model.config.block_size
        if len(chosen) == max_new or token.item() == end or full:
            return first, chosen
        n = n * 0 - step                                        # where the prompt ended, seen from the token
        hidden, past = model.trunk(token, past, places=span(column[:1], n) if blank else None)


def beside(columns):
    """Blocks of lines, next to each other."""
    for lines in itertools.zip_longest(*columns, fillvalue=""):
        say("".join(line.ljust(WIDE) for line in lines).rstrip())


def show(kit, sides, cfg):
    """--task show. sides: {name: what to enter for (model, past)}, the base first."""
    if not cfg.prompt:
        raise UserError('--task show needs the text to go on from, as in --prompt "The cat is on the"')
    kit.speaks()
    text, tables, steps, ends = kit.text, [], [], []
    how = dict(temperature=cfg.temperature, top_k=cfg.top_k, top_p=cfg.top_p)
    row = {"messages": [{"role": "user", "content": cfg.prompt}, {"role": "assistant", "content": ""}]}
    for side, enter in sides.items():
        framed = side == "tuned" and kit.prompt is not None and kit.prompt.template
        asked = (text if framed else dataclasses.replace(text, frame=([], []))).asked(row, (), kit.room() - 1)
        with enter() as (model, past):
            first, chosen = walk(model, asked, past, cfg.max_new,
                                 torch.Generator(kit.device).manual_seed(cfg.seed), text.end, **how,
                                 both_ways=text.attention == "prefix", blank=bool(text.blank),
                                 embed=kit.prompt.embed if framed else None)
        head = [side] * (len(sides) > 1)
        tables.append(head + table(first, text.tokenizer, **how))
        steps.append(head + [f"{p:7.4f}  {name(token, text.tokenizer)}" for token, p in chosen])
        ends.append((side, text.tokenizer.decode([token for token, _ in chosen if token != text.end])))
    beside(tables)
    say()
    beside(steps)
    say()
    for side, said in ends:
        say(f"{side}: " * (len(sides) > 1) + cfg.prompt + said)
    return 0
