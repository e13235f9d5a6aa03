"""data/results/generations.py: --task eval --num_generations n: n sampled answers to each prompt, and pass@k.

Beside the greedy answers, whose metrics stay, each prompt gets n answers drawn at --temperature. An answer is
right if exact match says so: it equals one of the row's references.

Answer j to prompt i is drawn from uniforms that are a function of (--seed, i, j). So neither batches,
processes, --eval_items nor a larger n change it, and every device draws with the same numbers.

Public: GenerationsFlags, require_answers, sample_generations, evaluate_generations
"""
import random
from dataclasses import dataclass

import torch

from data.batches.few_shot import fit_shots
from data.results.evaluate import by_row, continuations
from data.results.metrics import exact_match
from data.results.pass_at_k import generations_of, metrics_of
from data.runtime.files import UserError
from data.runtime.flags import flag


@dataclass(frozen=True)
class GenerationsFlags:
    """sampling"""
    num_generations: int = flag(1, "sample so many answers per prompt, for pass@k; 1: greedy answers only",
                                low=1, high=2 ** 16)
    temperature: float = flag(1.0, "of the sampled answers", low=0)
    top_k: int = flag(None, "sample from the k likeliest tokens", type=int, low=1)
    top_p: float = flag(None, "sample from the likeliest tokens of this mass", type=float, low=0, high=1)

    @staticmethod
    def check(cfg):
        """Raises UserError for flags of sampling without samples, a temperature of 0, several --shots."""
        for name in ("temperature", "top_k", "top_p"):
            if cfg.num_generations == 1 and name in cfg.given:
                raise UserError(f"--{name} is for sampled answers; --num_generations 2 or more samples them")
        if cfg.num_generations > 1 and cfg.temperature <= 0:
            raise UserError(f"--temperature {cfg.temperature:g} gives --num_generations "
                            f"{cfg.num_generations} equal answers; it must be above 0")
        if cfg.num_generations > 1 and "," in cfg.shots:
            raise UserError(f"--num_generations {cfg.num_generations} samples behind one number of --shots, "
                            f"not behind each of {cfg.shots}; give one")


def require_answers(ctx, row_type, flag_name):
    """Raises UserError unless the model answers rows of this type in words of its own."""
    if row_type == "chat" or row_type == "tags" and ctx.text.classifier != "head":
        return
    reasons = {"label": "labels are chosen by their probability", "tags": "a head chooses the tags",
               "text": "the loss of raw text is measured", "pairs": "a reward model scores preferences",
               "ranked": "a reward model scores preferences"}
    raise UserError(f"{flag_name} samples answers to prompt/completion or messages rows, but these are "
                    f"{row_type} rows: {reasons[row_type]}; leave it out")


@torch.no_grad()
def sample_generations(ctx, prompts, n, seed, **sampling):
    """n sampled answers to each prompt: for each prompt a list of n lists of ids.

    prompts: lists of ids; sampling: temperature, top_k and top_p of model.generate.
    """
    ctx.require_causal()
    pairs = [(i, j) for i in range(len(prompts)) for j in range(n)]

    def answers(some, past):
        uniforms = torch.stack([answer_uniforms(seed, i, j, ctx.max_new_tokens) for i, j in some])
        asked = [prompts[i] for i, _ in some]
        return continuations(ctx, asked, past, uniforms=uniforms.to(ctx.device), **sampling)
    lengths = [len(prompts[i]) for i, _ in pairs]
    flat = by_row(ctx, pairs, lengths, answers, "sampled answers", ctx.max_new_tokens, times=8)
    return [flat[i * n:(i + 1) * n] for i in range(len(prompts))]


def answer_uniforms(seed, prompt, number, count):
    """(count,) uniforms of one answer, on the CPU: equal on every device."""
    key = random.Random(repr((seed, prompt, number))).getrandbits(32)      # torch keeps 32 bits of a CPU seed
    return torch.rand(count, generator=torch.Generator().manual_seed(key))


def evaluate_generations(ctx, cfg, rows, shots=()):
    """(metrics, "generations" of result.json) of --num_generations sampled answers to each row."""
    prompts = [fit_shots(ctx, row, shots)[0] for row in rows]
    answers = sample_generations(ctx, prompts, cfg.num_generations, cfg.seed, temperature=cfg.temperature,
                                 top_k=cfg.top_k, top_p=cfg.top_p)
    texts = [[ctx.text.decode_answer(ids) for ids in some] for some in answers]
    right = [[int(exact_match(text, ctx.text.references(row))) for text in some]
             for some, row in zip(texts, rows)]
    generations = generations_of(texts, right)
    return metrics_of(generations), generations
