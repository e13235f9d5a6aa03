"""data/results/evaluate.py: loss, answers and label choice of a model on examples.

    loss              sum over targets of -log p(target | before), divided by the number of targets
    classifier lm     argmin over labels of -sum log p(label tokens, end token | question); no length
    correction
    classifier head   argmax of a linear map of the last token's hidden state (of a word's tag: its first
    token's)

Logits are computed at the target positions only. Rows run in batches of similar length under a token budget;
no number depends on how they were batched, because attention does not reach the padding behind a row. Several
processes share the rows, and all of them get all results.

B batch  T tokens  C width  V vocabulary  N target positions
Public: ModelContext, summed_loss, mean_loss, continuations, by_row, sample, answer, evaluate_rows,
item_correct
"""
import contextlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.batches import batching
from data.batches.examples import Text, targets
from data.batches.few_shot import fit_shots
from data.batches.objectives import Example, collate
from data.results import metrics
from data.runtime.device import MICRO
from data.runtime.distributed import gather, gather_rows, local_rows
from data.runtime.files import UserError
from data.runtime.flags import flag
from data.runtime.progress import track
from data.text import entities
from model import GPT, KVCache, generate, glm_position_ids, past_length, token_logprobs


@dataclass(frozen=True)
class EvalFlags:
    """text"""
    eval_items: int = flag(0, "measure on the first N test items, sample N of each split; 0: all", low=0)


@dataclass(frozen=True)
class AnswerFlags:
    """text"""
    max_new_tokens: int = flag(64, "longest generated answer, in tokens", low=1)


@dataclass(frozen=True)
class MicroBatchFlags:
    """training"""
    micro_batch_tokens: int = flag(MICRO, "padded tokens per forward: memory, not mathematics", low=1)


@dataclass
class ModelContext:
    """A model and all that belongs to it, for the functions below and the training loop."""
    model: GPT
    text: Text
    device: torch.device
    dtype: torch.dtype                      # compute dtype
    head: nn.Module = None                  # a classification or reward head, fp32
    prompt: nn.Module = None                # a soft prompt: prompt(model) -> past
    micro_batch_tokens: int = MICRO         # padded tokens of a micro-batch
    max_new_tokens: int = 64                # longest answer
    gradient_checkpointing: bool = False
    compile: bool = False
    extra: object = None                    # what a task needs beside the model: a teacher, say
    trunk: object = None                    # a Trunk of data/results/trunk.py, or None

    def autocast(self):
        """Autocast where fp32 weights compute in half precision; frozen ones are stored as they compute."""
        if self.dtype == self.model.wte.weight.dtype:
            return contextlib.nullcontext()
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()     # a cache would keep the casts
        return torch.autocast(self.device.type, self.dtype, cache_enabled=not recompute)

    def head_logits(self, hidden):
        """A classifier head's logits in fp32, where autocast would round the product."""
        with torch.autocast(self.device.type, enabled=False):
            return self.head(hidden.float())

    def past(self):
        """The soft prompt's past, None without one."""
        return self.prompt(self.model) if self.prompt is not None else None

    def end_tokens(self):
        """The ids at which generation stops: the template's end token, and those that the model's folder names, as
        in transformers."""
        own = self.model.config.eos
        own = own if isinstance(own, (list, tuple)) else [own]
        return {self.text.end_token, *(i for i in (*own, self.text.tokenizer.eos) if i is not None)}

    def max_text_len(self):
        """The longest text, in tokens: what the context leaves behind the virtual tokens."""
        return self.model.config.block_size - (self.prompt.prefix_len if self.prompt is not None else 0)

    def block_size(self, requested=None):
        """The longest example: --block_size, or what there is room for, 1024 at most. Raises UserError."""
        room = self.max_text_len()
        if requested is not None and requested > room:
            raise UserError(f"--block_size {requested} does not fit: the context of "
                            f"{self.model.config.block_size} leaves {room} tokens for text")
        return requested or min(room, 1024)

    def max_prompt_len(self):
        """The longest prompt, in tokens, that leaves room for an answer."""
        virtual_tokens = sum(map(len, self.text.soft_prompt_ids))       # those of a template always stay
        room = self.max_text_len() - virtual_tokens
        return virtual_tokens + max(room - self.max_new_tokens, room // 2, 1)

    def prompt_ids(self, row):
        """ids of a row up to where its answer begins; a longer prompt loses its beginning."""
        return self.text.prompt_ids(row, limit=self.max_prompt_len())

    def embed(self, ids):
        """Embeddings in place of ids, where virtual tokens stand inside the text."""
        in_template = self.prompt is not None and self.prompt.template
        return self.prompt.embed(self.model, ids) if in_template else ids

    def hidden_states(self, ids, past=None, **attention):
        """model.hidden_states as the flags want it: recomputed in backward, compiled."""
        return self.model.hidden_states(self.embed(ids), past,
                                        gradient_checkpointing=self.gradient_checkpointing,
                                        compile=self.compile, **attention)

    def as_model(self):
        """The model, with this hidden_states in place of its own, for ppo.py."""
        return ContextModel(self)

    def run_examples(self, examples, past, select_targets=False):
        """(hidden (B, T, C), targets (B, T), past) of examples; select_targets: (N, C), (N,)."""
        x, y, attention = collate(examples, self.text.attention)
        y = y.to(self.device)
        attention = {name: t.to(self.device) for name, t in attention.items()}
        select = (y >= 0).nonzero(as_tuple=True) if select_targets else None
        shared = self.trunk.find(examples) if self.has_trunk() else None
        if shared is None:
            hidden, past = self.hidden_states(x.to(self.device), past, select=select, **attention)
        else:
            hidden, past = self.hidden_states(shared, past, select=select, start_layer=self.trunk.layer,
                                              **attention)
        return hidden, y if select is None else y[select], past

    def find_trunk(self, prompts, answers):
        """What is known of answers behind their prompts, lists of ids, as ppo.collate_rollout takes it."""
        return self.trunk.find_answers(prompts, answers) if self.has_trunk() else None

    def has_trunk(self):
        """Whether something is known that this very model has computed."""
        return self.trunk is not None and self.trunk.model is self.model

    def run_prompts(self, prompts, past):
        """Lists of ids -> (hidden states at their last tokens (B, C), past)."""
        examples = [Example(ids, [-1] * (len(ids) - 1) + [0], *self.text.attention_args(ids))
                    for ids in prompts]
        hidden, _, past = self.run_examples(examples, past, select_targets=True)
        return hidden, past

    def require_causal(self):
        """Raises UserError for a model that has no next-token prediction."""
        if self.text.attention == "bidirectional":
            raise UserError("a model with --attention bidirectional (so also of --objective mlm) cannot "
                            "generate or score words; use --task tag, or --task classify --classifier head")

    def train(self, on=True):
        for module in (self.model, self.prompt):
            if module is not None:
                module.train(on)


class ContextModel:
    """A model whose hidden_states is its context's; all else is the model's own."""

    def __init__(self, ctx):
        self.ctx = ctx

    def __getattr__(self, name):
        return getattr(self.ctx.model, name)

    def hidden_states(self, ids, past=None, **attention):
        return self.ctx.hidden_states(ids, past, **attention)


def summed_loss(ctx, examples, past):
    """Sum of -log p over the targets of these examples: a scalar, fp32."""
    hidden, target_ids, _ = ctx.run_examples(examples, past, select_targets=True)       # (N, C), (N,)
    if isinstance(examples[0], Example) and examples[0].head:
        return F.cross_entropy(ctx.head_logits(hidden), target_ids, reduction="sum")
    return -token_logprobs(ctx.model.logits, hidden, target_ids).sum()


def length_batches(ctx, lengths, what, extra=0, times=2):
    """Indices in batches of similar length, this process's share; without gradients twice the budget fits.

    what: the name under which progress is shown.
    """
    order = sorted(local_rows(range(len(lengths)), lengths), key=lengths.__getitem__)
    lengths = [n + extra for n in lengths]
    return track(batching.split_by_token_budget(order, lengths, times * ctx.micro_batch_tokens), what)


def by_row(ctx, items, lengths, compute, what, extra=0, times=2):
    """compute(some of the items, past) -> a result each; the results of all items, on every process."""
    results = {}
    with ctx.autocast():
        past = ctx.past()
        for index in length_batches(ctx, lengths, what, extra, times):
            results.update(zip(index, compute([items[i] for i in index], past)))
    return gather_rows(results)


@torch.no_grad()
def mean_loss(ctx, examples):
    """(mean -log p over all targets, their number)."""
    total = 0.0
    count = sum(map(targets, examples))
    with ctx.autocast():
        past = ctx.past()
        for rows in length_batches(ctx, [len(e[0]) for e in examples], "loss"):
            total += summed_loss(ctx, [examples[i] for i in rows], past).item()
    return sum(gather(total)) / max(count, 1), count


def continuations(ctx, prompts, past, **sampling):
    """generate with what the context knows of the model: ids to ids."""
    return generate(ctx.model, prompts, ctx.max_new_tokens, eos=ctx.end_tokens(), past=past,
                    embed=ctx.embed, bidirectional_prompt=ctx.text.attention == "prefix",
                    infill_suffix=bool(ctx.text.infill_suffix), **sampling)


@torch.no_grad()
def sample(ctx, prompts, **sampling):
    """The model's answer to each prompt, ids to ids; greedy unless `sampling` says otherwise."""
    ctx.require_causal()
    sampling = {"temperature": 0, **sampling}

    def answers(some, past):
        return continuations(ctx, some, past, **sampling)
    # a cache is small, so more rows fit
    return by_row(ctx, prompts, list(map(len, prompts)), answers, "answers", ctx.max_new_tokens, times=8)


def answer(ctx, prompts, **sampling):
    """The same as text."""
    return [ctx.text.decode_answer(ids) for ids in sample(ctx, prompts, **sampling)]


@torch.no_grad()
def word_scores(ctx, prompts):
    """-log p of every label word behind every prompt: (N, labels).

    A prompt runs once; each label then uses the same cache columns behind it.
    """
    ctx.require_causal()
    words = ctx.text.label_answers()
    longest = max(map(len, words))

    def scores(some, past):
        first, cache = fill_cache(ctx, some, past, longest)
        return torch.stack([word_nll(ctx, word, first, past, cache) for word in words], 1).tolist()
    return torch.tensor(by_row(ctx, prompts, list(map(len, prompts)), scores, "labels", longest))


def fill_cache(ctx, rows, past, longest):
    """(logits behind each prompt (B, 1, V), a KVCache with room for a word)."""
    hidden, filled = ctx.run_prompts(rows, past)
    first = ctx.model.logits(hidden)[:, None]                                       # (B, 1, V)
    lengths = torch.tensor([len(r) for r in rows], device=ctx.device) + past_length(past)
    return first, KVCache.extend(filled, lengths, longest - 1)


def word_nll(ctx, word, first, past, cache):
    """-log p of a word's tokens behind each prompt, (B,)."""
    tokens = torch.tensor([word] * len(first), device=ctx.device)                   # (B, tokens)
    logits = first
    if len(word) > 1:
        prompt_lengths = cache.lengths - past_length(past)
        columns = prompt_lengths[:, None] + torch.arange(len(word) - 1, device=ctx.device)
        glm_positions = glm_position_ids(columns, prompt_lengths) if ctx.text.infill_suffix else None
        hidden, _ = ctx.model.hidden_states(tokens[:, :-1], past, cache=cache, glm_positions=glm_positions)
        logits = torch.cat((first, ctx.model.logits(hidden)), 1)
    return F.cross_entropy(logits.float().transpose(1, 2), tokens, reduction="none").sum(1)


@torch.no_grad()
def head_scores(ctx, prompts):
    """-log p of every label by the head: (N, labels).

    Before there is a head, all labels are equally likely.
    """
    if ctx.head is None:
        return torch.full((len(prompts), len(ctx.text.labels)), math.log(len(ctx.text.labels)))

    def scores(some, past):
        hidden, _ = ctx.run_prompts(some, past)
        return (-ctx.head_logits(hidden).log_softmax(-1)).tolist()
    return torch.tensor(by_row(ctx, prompts, list(map(len, prompts)), scores, "labels"))


def word_tags(ctx, examples):
    """The tag of every word by the head, a list per example. Before there is a head, all are the first: O."""
    if ctx.head is None:
        return [[ctx.text.labels[0]] * targets(e) for e in examples]

    def tags(some, past):
        hidden, _, _ = ctx.run_examples(some, past)
        found = []
        for example, h in zip(some, hidden):
            at_words = [j for j, tag in enumerate(example.y) if tag >= 0]
            found.append([ctx.text.labels[k] for k in ctx.head_logits(h[at_words]).argmax(-1).tolist()])
        return found
    return by_row(ctx, examples, [len(e.ids) for e in examples], tags, "tags")


@torch.no_grad()
def evaluate_rows(ctx, rows, examples, shots=()):
    """(metrics, answers as text) of the model on rows; what is measured depends on their row type.

    examples: the same rows encoded. shots: solved rows in front of each prompt.
    """
    if "text" in rows[0] and "label" not in rows[0]:
        return language_metrics(ctx, examples), []
    if "tags" in rows[0] and ctx.text.classifier == "head":
        return evaluate_tags(ctx, rows, examples)
    prompts, used = zip(*(fit_shots(ctx, row, shots) for row in rows))
    counts = {"shots_used": sum(used) / len(used), "shots_used_max": max(used)} if shots else {}
    if "label" in rows[0]:
        values, labels = evaluate_labels(ctx, rows, prompts)
        return {**values, **counts}, labels
    values, answers = evaluate_texts(ctx, rows, prompts, [] if shots else examples)
    return {**values, **counts}, answers


def language_metrics(ctx, examples):
    loss, count = mean_loss(ctx, examples)
    return {"loss": loss, "perplexity": metrics.perplexity(loss * count, count), "targets": count}


def entity_scores(predicted, gold):
    return dict(zip(("precision", "recall", "f1"), metrics.span_scores(predicted, gold)))


def evaluate_tags(ctx, rows, examples):
    """A tag per word by the head; words that were cut off count as O."""
    gold = [row["tags"] for row in rows]
    tags = [t + ["O"] * (len(g) - len(t)) for t, g in zip(word_tags(ctx, examples), gold)]
    loss = mean_loss(ctx, examples)[0] if ctx.head is not None else math.log(len(ctx.text.labels))
    accuracy = metrics.accuracy(sum(tags, []), sum(gold, []))
    answers = [entities.format_entities(row["tokens"], t) for row, t in zip(rows, tags)]
    return {**entity_scores(tags, gold), "accuracy": accuracy, "loss": loss}, answers


def label_scores(ctx, prompts):
    """-log p of every label, by the head or by the label words: (N, labels)."""
    # generates no words
    untrained_head = ctx.text.classifier == "head" and ctx.text.attention == "bidirectional"
    by_head = ctx.head is not None or untrained_head
    return head_scores(ctx, prompts) if by_head else word_scores(ctx, prompts)


def evaluate_labels(ctx, rows, prompts):
    """A label per row, by the head or by the likeliest label word."""
    scores = label_scores(ctx, prompts)
    predicted = [ctx.text.labels[j] for j in scores.argmin(1).tolist()]
    gold = [ctx.text.references(row)[0] for row in rows]
    gold_index = torch.tensor([ctx.text.labels.index(label) for label in gold])
    values = {"accuracy": metrics.accuracy(predicted, gold), "macro_f1": metrics.macro_f1(predicted, gold),
              "loss": scores.gather(1, gold_index[:, None]).mean().item(),
              "labels_used": len(set(predicted))}
    return values, predicted


def evaluate_texts(ctx, rows, prompts, examples):
    """Generated answers against references.

    No examples (few-shot): no loss, theirs would be without shots.
    """
    answers = answer(ctx, prompts)
    references = [ctx.text.references(row) for row in rows]
    values = {"exact_match": sum(map(metrics.exact_match, answers, references)) / len(answers)}
    if examples:
        values.update(language_metrics(ctx, examples))
    if "tags" in rows[0]:
        predicted = [entities.parse_entities(text, row["tokens"]) for text, row in zip(answers, rows)]
        values.update(entity_scores(predicted, [row["tags"] for row in rows]))
    values["rouge_l"] = metrics.rouge_l(answers, references)
    values["bleu"] = metrics.bleu(answers, references)
    return values, answers


def item_correct(ctx, rows, answers):
    """"1" or "0" for each row, whether its answer is correct, for paired comparisons.

    Empty where rows have no correct answer (raw text, preferences).
    """
    if not {"messages", "label"} & rows[0].keys() or "completion" in rows[0]:
        return ""
    correct = [metrics.exact_match(a, ctx.text.references(row)) for a, row in zip(answers, rows)]
    return "".join("1" if one else "0" for one in correct)
