"""data/batches/objectives.py: pre-training objectives: inputs, targets and attention mask of raw text.

    objective   input                                targets                        attention
    causal      x_1 .. x_n                           each next token                causal
    prefix      x_1 .. x_n                           the next tokens from x_s on    x_1 .. x_s-1 bidirectional
    mlm         x with 15 % of its tokens corrupted  those 15 %, where they are     bidirectional
    glm         A: x, each span replaced by a mask   none                           A bidirectional
                B: start, span; start, span; ...     each span, then its end        causal in B, and all of A

prefix: Raffel et al. 2020 (arXiv 1910.10683), section 3.2.1; Dong et al. 2019 (1905.03197); s is uniform.
mlm: Devlin et al. 2019 (1810.04805), section 3.1: of the chosen tokens 80 % become a mask, 10 % a random
token, 10 % stay. glm: Du et al. 2022 (2103.10360), section 2.1: spans of Poisson(3) tokens, 15 % of the
text in all, generated in random order.

GLM has two positions for a token: in the corrupted text (for a token of a span: that of its mask), and
inside its span (1 for the start token, then 2, 3, ...; 0 in A). Learned positions: the paper has a table
for each; here the second counts down from the end of the one table, which A does not reach, so that the
model stays an ordinary GPT-2. Rotary positions: both rotate by the same angles, so a token is rotated by
their sum, as if its span were written out from its mask on; distances within a span and to its mask are
exact.

Fine-tuning. A GLM answers by filling a mask behind the question (2103.10360, section 2.3): its prompt ends
with a mask and a start token. An mlm model has no next-token prediction; with --task sft it learns one,
with the question as a bidirectional prefix.

Deviations: mlm leaves the ends of documents uncorrupted; a Poisson draw of 0 counts as 1; the last span is
cut to make 15 %; a span ends with the end-of-text token. Under glm a block holds less text, because spans
occur twice.

A corruption is a pure function of (ids, rng). An example is a pair (ids, mask) as in examples.py, or an
Example.

Public: OBJECTIVES, OBJECTIVE_ATTENTION, ATTENTION, Objective, Example, SpecialTokens, special_tokens,
resolve_objective, stride, corrupt, glm_single_span, collate
"""
import typing
from dataclasses import dataclass

import numpy as np
import torch

from data.batches import batching
from data.runtime.files import UserError
from data.runtime.flags import flag


@dataclass(frozen=True)
class ObjectiveFlags:
    """objective"""
    objective: str = flag(None, "what raw text is trained on; default: as --init, or causal", type=str,
                          choices=lambda: OBJECTIVES)


@dataclass(frozen=True)
class RawTextFlags:
    """objective"""
    parse_special: bool = flag(False, "raw text names special tokens (<|im_end|>): read them as such")


@dataclass(frozen=True)
class AttentionFlags:
    """objective"""
    attention: str = flag(None, "the attention mask; default: as --init, or causal", type=str,
                          choices=lambda: ATTENTION)


CORRUPTION_RATE = 0.15
MEAN_SPAN = 3                                           # tokens, of the Poisson distribution


class Example(typing.NamedTuple):
    """An example with other targets than the next token, or with bidirectional attention."""
    ids: list                       # (T,) input
    y: list                         # (T,) target of each position; -1: none
    bidirectional_len: int = 0      # the first so many tokens attend to each other in both directions
    glm_positions: tuple = None     # two lists (T,): position in the text, in the span; None: 0, 1, ...
    head: bool = False              # y holds class numbers for a classifier head, not ids


class SpecialTokens(typing.NamedTuple):
    """The ids that corruption needs (None where the tokenizer has none)."""
    mask: int
    start: int                      # start of a span
    end: int                        # end of text
    words: np.ndarray               # all ids that are not special


# ---- corruption --------------------------------------------------------------------------------------------
def causal(ids, rng, special):
    return ids, [True] * len(ids)


def prefix(ids, rng, special=None):
    source_len = int(rng.integers(1, len(ids)))
    return ids, [False] * source_len + [True] * (len(ids) - source_len)


def mlm(ids, rng, special):
    inputs = list(ids)
    y = [-1] * len(ids)
    candidates = np.flatnonzero(np.isin(ids, special.words))
    count = max(1, round(CORRUPTION_RATE * len(candidates)))
    for i in rng.permutation(candidates)[:count]:
        y[i] = ids[i]
        u = rng.random()
        if u < 0.8:
            inputs[i] = special.mask
        elif u < 0.9:
            inputs[i] = int(rng.choice(special.words))
    return Example(inputs, y, len(ids))


def _span_lengths(total, rng):
    """Poisson lengths of at least 1 that sum to `total`; the last one is cut."""
    lengths = []
    while sum(lengths) < total:
        length = max(1, int(rng.poisson(MEAN_SPAN)))
        lengths.append(min(length, total - sum(lengths)))
    return lengths


def glm(ids, rng, special):
    hidden = max(1, round(CORRUPTION_RATE * len(ids)))
    lengths = _span_lengths(hidden, rng)
    a_len = len(ids) - hidden + len(lengths)
    mask_positions = set(rng.choice(a_len, len(lengths), replace=False).tolist())
    a = []
    spans = []                                                          # (position of its mask, tokens)
    i = 0                                                               # position in the original text
    for position in range(a_len):
        if position in mask_positions:
            length = lengths[len(spans)]
            spans.append((position, ids[i:i + length]))
            a.append(special.mask)
            i += length
        else:
            a.append(ids[i])
            i += 1
    b = []
    y = [-1] * a_len
    text_positions = list(range(a_len))
    span_positions = [0] * a_len
    for k in rng.permutation(len(spans)):
        position, span = spans[k]
        b += [special.start, *span]
        y += [*span, special.end]
        text_positions += [position] * (len(span) + 1)
        span_positions += range(1, len(span) + 2)
    return Example(a + b, y, a_len, (text_positions, span_positions))


def glm_single_span(n, start):
    """The two GLM positions of n tokens of which those from `start` on, a start token first, are one span
    that fills the mask at start - 1. Returns two lists (n,).
    """
    text_positions = [min(i, start - 1) for i in range(n)]
    span_positions = [max(0, i - start + 1) for i in range(n)]
    return text_positions, span_positions


# ---- the records -------------------------------------------------------------------------------------------
class Objective(typing.NamedTuple):
    name: str
    attention: str                  # "causal", "bidirectional", "prefix" (bidirectional up to a target)
    needs: tuple                    # names of the special tokens that the tokenizer must have
    corrupt: typing.Callable        # (ids, rng, special tokens) -> an example
    stride: typing.Callable         # block size -> tokens from one window of text to the next


RECORDS = {objective.name: objective for objective in (
    Objective("causal", "causal", (), causal, lambda block: block),
    Objective("prefix", "prefix", (), prefix, lambda block: block),
    Objective("mlm", "bidirectional", ("mask",), mlm, lambda block: block - 1),
    # A holds 85 % of the text and one mask a span, B 15 % and one start a span: 1.3 tokens per token of text
    Objective("glm", "prefix", ("mask", "start"), glm, lambda block: (block - 1) * 10 // 13 - 1),
)}
OBJECTIVES = tuple(RECORDS)
OBJECTIVE_ATTENTION = {objective.name: objective.attention for objective in RECORDS.values()}
ATTENTION = ("causal", "bidirectional")                 # the values of --attention


def special_tokens(tokenizer, objective):
    """The SpecialTokens of a tokenizer. Raises UserError when it lacks one that the objective needs."""
    found = {}
    for name in ("mask", "start"):
        spellings = (f"<|{name}|>", f"<{name}>", f"[{name.upper()}]")
        found[name] = next((tokenizer.special[text] for text in spellings if text in tokenizer.special), None)
    for name in RECORDS[objective].needs:
        if found[name] is None:
            raise UserError(f"--objective {objective} needs a <|{name}|> token, which this model's tokenizer "
                            "lacks; use --objective prefix, or a new model (--init new)")
    if objective == "glm" and tokenizer.eos is None:
        raise UserError("--objective glm ends a span with the end-of-text token, and this model's tokenizer "
                        "names none; use another --init")
    words = sorted(set(range(tokenizer.vocab_size)) - set(tokenizer.special.values()))
    return SpecialTokens(found["mask"], found["start"], tokenizer.eos, np.array(words))


def resolve_objective(task, attention, objective, settings):
    """(attention, objective) of a command.

    task: its record (raw_text, next_tokens, needs_causal). attention, objective: the flags, None where not
    given. settings: what the run behind --init has saved (run.json), or {}. Raises UserError for a task that
    needs a causal model.
    """
    if objective is None:
        objective = settings.get("objective", "causal")
    if task.raw_text:
        inherited = OBJECTIVE_ATTENTION[objective]
    else:
        inherited = settings.get("attention", "causal")
    if task.next_tokens and inherited == "bidirectional":  # an mlm model learns next tokens behind a prefix
        inherited = "prefix"
    if task.needs_causal and (inherited, objective) != ("causal", "causal"):
        raise UserError(f"--task {task.name} needs a causal model, and --init was trained with --objective "
                        f"{objective} and {inherited} attention; start from a causal model")
    return attention or inherited, objective


def stride(objective, block):
    """Tokens from one window of text to the next: a window makes one example of at most `block` tokens.

    Raises UserError for a block that is too small.
    """
    step = RECORDS[objective].stride(block)
    if step < 1:
        raise UserError(f"--block_size {block} is too small for --objective {objective}; it needs at least 4")
    return step


def corrupt(objective, ids, rng, special):
    """A window of text (ids) as an example of the objective; rng: a numpy Generator."""
    return RECORDS[objective].corrupt(ids, rng, special)


# ---- batches -----------------------------------------------------------------------------------------------
def _padded(lists, T, fill):
    """(B, T) int64, right-padded."""
    return torch.tensor([[*values, *[fill] * (T - len(values))] for values in lists])


def collate(examples, attention="causal"):
    """x, y (B, T), and the keyword arguments of hidden_states that describe the attention mask.

    The arguments are {} for causal attention, else bidirectional_len (B,) and, for GLM, glm_positions
    (2, B, T). With attention "prefix", what precedes the first target of an (ids, mask) example is
    bidirectional.
    """
    if not isinstance(examples[0], Example):
        x, y = batching.collate(examples)
        if attention != "prefix":
            return x, y, {}
        lengths = [mask.index(True) if True in mask else 0 for _, mask in examples]
        return x, y, {"bidirectional_len": torch.tensor(lengths)} if any(lengths) else {}
    T = max(len(e.ids) for e in examples)
    x = _padded([e.ids for e in examples], T, 0)
    y = _padded([e.y for e in examples], T, -1)
    model_args = {}
    lengths = [e.bidirectional_len for e in examples]
    if any(lengths):
        model_args["bidirectional_len"] = torch.tensor(lengths)
    if examples[0].glm_positions:
        text_positions = _padded([e.glm_positions[0] for e in examples], T, 0)
        span_positions = _padded([e.glm_positions[1] for e in examples], T, 0)
        model_args["glm_positions"] = torch.stack([text_positions, span_positions])
    return x, y, model_args
