"""data/results/next_token.py: the next-token distribution, and a sampled continuation with its probabilities.

    p        softmax(logits / temperature) over the vocabulary, likeliest first, as bars; both sides have one
             scale, on which the longest bar is the largest p of all
    cut      where top_k, then top_p, end: tokens above it are sampled, with p / (their sum)
    token    each token of the continuation, with the probability it was sampled with

The prompt is answered in the model's own template, or continued as plain text (--template plain). With
an adapter or a soft prompt, the base and the tuned model stand side by side, with the same seed.

Public: GenerationFlags, show, table, steps, walk, sampling_of, generator_of, attention_of
"""
import dataclasses
import itertools
import json
import textwrap
from dataclasses import dataclass

import torch

from data.results.layout import print_wrapped, terminal_width
from data.results.predict import open_row
from data.runtime.files import UserError
from data.runtime.flags import flag
from data.runtime.run_folder import log_progress, print_result
from model import KVCache, filter_logits, glm_position_ids, past_length, prompt_view


@dataclass(frozen=True)
class GenerationFlags:
    """generation"""
    prompt: str = flag(None, "answer this and stop, or a conversation; show: continue this", type=str)
    temperature: float = flag(None, "0 is greedy; default: 0, but 1 with --top_k or --top_p", type=float,
                              low=0)
    top_k: int = flag(None, "sample from the k likeliest", type=int, low=1)
    top_p: float = flag(None, "sample from the likeliest of this mass", type=float, low=0, high=1)

    @staticmethod
    def check(cfg):
        """Raises UserError for flags of sampling beside greedy answers."""
        for name in ("top_k", "top_p"):
            if cfg.temperature == 0 and name in cfg.given:
                raise UserError(f"--{name} means nothing to --temperature 0, which takes the likeliest token; leave "
                                "one out")


ROWS = 12                               # of the table
BAR = 16                                # characters of the longest bar, where the terminal has room for it
BEFORE_BAR = 27                         # characters of a probability and a token
COLUMN = 44                             # characters of one model's column
GAP = 2                                 # blanks between columns


def sampling_of(cfg):
    """The arguments with which a command draws tokens: greedy, unless a flag asks for sampling."""
    temperature = cfg.temperature
    if temperature is None:
        temperature = 0.0 if cfg.top_k is None and cfg.top_p is None else 1.0
    return dict(temperature=temperature, top_k=cfg.top_k, top_p=cfg.top_p)


def generator_of(ctx, cfg):
    return torch.Generator(ctx.device).manual_seed(cfg.seed)


def attention_of(text):
    """The arguments of `steps` for a prompt of a Text."""
    return dict(bidirectional_prompt=text.attention == "prefix", infill_suffix=bool(text.infill_suffix))


def token_text(token, tokenizer):
    """A token as a quoted string of at most 16 characters."""
    text = json.dumps(tokenizer.decode([token], special=True), ensure_ascii=False)
    return text if len(text) <= 16 else text[:14] + '.."'


def probabilities(logits, temperature):
    """logits (V,) -> p (V,); a temperature of 0, greedy, shows those at 1."""
    return (logits.float() / (temperature or 1)).softmax(-1)


def table(logits, tokenizer, temperature=1.0, top_k=None, top_p=None, rows=ROWS, scale=None, bar=BAR):
    """The likeliest tokens after one row of logits (V,), as lines of text.

    scale: the probability of the longest bar, which has `bar` characters; None: the largest here.
    """
    p = probabilities(logits, temperature)
    kept = int(filter_logits(logits[None], temperature, top_k, top_p).isfinite().sum())
    cuts = {}                                           # {row: what ends there}
    if temperature == 0:
        cuts[1] = "greedy takes the first"
    else:
        if top_k is not None and top_k < len(p):
            cuts[top_k] = f"top_k {top_k}"
        if top_p is not None and kept < min(top_k or len(p), len(p)):
            cuts[kept] = f"top_p {top_p:g}"
    ranked = p.sort(descending=True, stable=True)
    scale = scale or ranked.values[0].item()
    lines = []
    for n, (value, token) in enumerate(zip(ranked.values[:rows].tolist(), ranked.indices[:rows].tolist()), 1):
        blocks = "█" * round(bar * value / scale)
        lines.append(f"{value:7.4f}  {token_text(token, tokenizer):16}  {blocks}".rstrip())
        if n in cuts:
            lines.append(f"-------  {cuts[n]}")
    entropy = -(p * p.clamp(min=1e-30).log()).sum().item()
    return [*lines, f"{kept} of {len(p)} can be sampled; entropy {entropy:.2f} nats"]


# Sampling's parameters stay flat, under the names that generate gives them.
@torch.no_grad()
def steps(model, ids, past, max_new_tokens, generator, ends, temperature=1.0, top_k=None, top_p=None,
          bidirectional_prompt=False, embed=None, infill_suffix=False):
    """Yields (token, the probability it was sampled with, logits (V,)) of a continuation, token by token.

    ends: the ids that end it.
    """
    x = torch.tensor([ids], device=model.wte.weight.device)                         # (1, T)
    n = torch.tensor([len(ids)], device=x.device)
    view = prompt_view(len(ids), n, bidirectional_prompt, infill_suffix)
    P = past_length(past)
    hidden, filled = model.hidden_states(embed(x) if embed else x, past, **view)
    limit = min(max_new_tokens, model.config.block_size - P - len(ids) + 1)  # the last token needs no column
    cache = KVCache.extend(filled, n + P, limit - 1)
    for count in range(1, limit + 1):
        logits = model.logits(hidden[:, -1]).float()                                # (1, V)
        p = filter_logits(logits, temperature, top_k, top_p).softmax(-1)
        token = torch.multinomial(p, 1, generator=generator)                        # (1, 1)
        yield token.item(), p[0, token].item(), logits[0]
        if count == limit or token.item() in ends:
            return
        column = (cache.lengths - P)[:, None]                                       # (1, 1), of this token
        glm_positions = glm_position_ids(column, n) if infill_suffix else None
        hidden, _ = model.hidden_states(token, past, cache=cache, glm_positions=glm_positions)
        cache = cache._replace(lengths=cache.lengths + 1)


def walk(*args, **kwargs):
    """(logits (V,) of the first token, [(token, the probability it was sampled with)]), all `steps`."""
    found = list(steps(*args, **kwargs))
    return found[0][2], [(token, p) for token, p, _ in found]


def column_width(count):
    """Characters of each of so many columns: COLUMN, or what a narrow terminal has room for."""
    room = (terminal_width() - (count - 1) * GAP) // count
    return max(BEFORE_BAR, min(COLUMN, room))


def print_columns(columns):
    """Blocks of lines, next to each other; a longer line goes on below itself."""
    width = column_width(len(columns))
    wrapped = [[part for line in lines for part in textwrap.wrap(line, width, drop_whitespace=False) or [""]]
               if max(map(len, lines)) > width else lines for lines in columns]
    for lines in itertools.zip_longest(*wrapped, fillvalue=""):
        print_result("".join(line.ljust(width + GAP) for line in lines).rstrip())


def show(ctx, sides, cfg):
    """--task show. sides: {name: function that gives a context of (model, past)}, the base first. Returns 0.

    Raises UserError without a prompt.
    """
    if not cfg.prompt:
        raise UserError('--task show needs the text to continue, as in --prompt "The cat is on the"')
    ctx.require_causal()
    sampling = sampling_of(cfg)
    tokenizer = ctx.text.tokenizer
    walks = {side: continue_prompt(ctx, side, role, cfg, sampling) for side, role in sides.items()}
    scale = max(probabilities(first, cfg.temperature).max().item() for first, _ in walks.values())
    bar = min(BAR, column_width(len(sides)) - BEFORE_BAR)
    tables = []
    steps = []
    for side, (first, tokens) in walks.items():
        title = [side] if len(sides) > 1 else []
        tables.append(title + table(first, tokenizer, **sampling, scale=scale, bar=bar))
        steps.append(title + [f"{p:7.4f}  {token_text(token, tokenizer)}" for token, p in tokens])
    print_result("The next token, by probability:")
    print_columns(tables)
    how = "the likeliest token each time" if cfg.temperature == 0 else f"sampled with --seed {cfg.seed}"
    print_result()
    print_wrapped(f"A continuation, {how}; the probability that each token was chosen with:")
    print_columns(steps)
    print_result()
    ends = ctx.end_tokens()
    for side, (_, tokens) in walks.items():
        text = tokenizer.decode([token for token, _ in tokens if token not in ends])
        label = f"{side}: " if len(sides) > 1 else ""
        between = "" if ctx.text.template == "plain" else "\n"
        print_wrapped(label + cfg.prompt + between + text)
    return 0


def continue_prompt(ctx, side, role, cfg, sampling):
    """`walk` of one side; virtual tokens inside the text belong to the tuned side only."""
    text = ctx.text
    in_template = side == "tuned" and ctx.prompt is not None and ctx.prompt.template
    if not in_template:
        text = dataclasses.replace(text, soft_prompt_ids=([], []))
    row = open_row([{"role": "user", "content": cfg.prompt}])
    ids = text.prompt_ids(row, limit=ctx.max_text_len() - 1)
    if len(ids) < len(text.prompt_ids(row)):
        log_progress(f"the prompt is longer than the context of {ctx.model.config.block_size} tokens: its beginning is "
                     "cut, and little room is left to continue it")
    with role() as (model, past):
        return walk(model, ids, past, cfg.max_new_tokens, generator_of(ctx, cfg), ctx.end_tokens(), **sampling,
                    **attention_of(text), embed=ctx.embed if in_template else None)
