"""data/results/evaluate.py: what a model makes of examples: its loss, its answers, its choice of a label.

    loss          sum over targets of -log p(target | before), divided by the number of targets
    by words      argmin over labels of -sum log p(label tokens, end token | question); no length correction
    by a head     argmax of a linear map of the last token's hidden state (a word's tag: of its first token's)

Logits are computed at the targets and nowhere else. Rows run in batches of similar length under a token
budget; no number depends on how they were batched (a pad cannot be seen: it stands behind its row). Several
processes share the rows, and all of them get all that was found.

Public: Kit, summed_loss, mean_loss, sample, answer, measure, right, fingerprint
"""
import contextlib
import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.batches import batching
from data.text import chat, entities
from data.results import metrics
from data.runtime.distributed import full, gather, merged, share
from data.batches.examples import Text, targets
from data.runtime.files import UserError
from data.runtime.device import MICRO
from data.batches.objectives import Example, collate
from data.batches.few_shot import fitted
from model import GPT, generate, logprob, span


@dataclass
class Kit:
    """A model and all that belongs to it, for the functions below and the training loop."""
    model: GPT
    text: Text
    device: torch.device
    dtype: torch.dtype                      # compute dtype
    head: nn.Module = None                  # a classification head (C -> labels), fp32
    prompt: nn.Module = None                # a prompt method: prompt(model) -> past
    micro: int = MICRO                      # padded tokens of a micro-batch
    max_new: int = 64                       # longest answer
    checkpoint: bool = False
    compile: bool = False

    def cast(self):
        """Autocast, where fp32 weights learn in half precision; frozen halves are stored as they compute."""
        mixed = self.dtype != self.model.wte.weight.dtype
        again = self.checkpoint and torch.is_grad_enabled()     # a cache would hold what is to be let go
        return torch.autocast(self.device.type, self.dtype, cache_enabled=not again) if mixed else \
            contextlib.nullcontext()

    def past(self):
        return self.prompt(self.model) if self.prompt is not None else None

    def room(self):
        """The longest text, in tokens: what the context leaves behind the virtual tokens."""
        return self.model.config.block_size - (self.prompt.front if self.prompt is not None else 0)

    def block(self, asked=None):
        """The longest example: what was asked for, or what there is room for, 1024 at most."""
        if asked is not None and asked > self.room():
            raise UserError(f"--block {asked} does not fit: the context of {self.model.config.block_size} "
                            f"leaves {self.room()} tokens for text")
        return asked or min(self.room(), 1024)

    def asking(self):
        """The longest question, in tokens, behind which an answer has its room."""
        frame = sum(map(len, self.text.frame))              # a template's virtual tokens always stay
        room = self.room() - frame
        return frame + max(room - self.max_new, room // 2, 1)

    def asked(self, row):
        """Ids up to where the answer begins; a longer question loses its beginning."""
        return self.text.asked(row, limit=self.asking())

    def embed(self, x):
        """A template's virtual tokens stand inside the text: then embeddings go in, in place of ids."""
        return self.prompt.embed(self.model, x) if self.prompt is not None and self.prompt.template else x

    def trunk(self, x, past, **view):
        return self.model.trunk(self.embed(x), past, checkpoint=self.checkpoint, compile=self.compile, **view)

    def role(self, past):
        """The model as ppo.py takes it: something to enter, which gives (model, past)."""
        return lambda: contextlib.nullcontext((Trained(self), past))

    def read(self, examples, past, asked=False):
        """The trunk over examples: (hidden (B, T, C), what each position is to say (B, T), past); `asked`:
        only where there is something to say, hidden (N, C) and targets (N,)."""
        x, y, view = collate(examples, self.text.attention)
        y, view = y.to(self.device), {name: t.to(self.device) for name, t in view.items()}
        at = (y >= 0).nonzero(as_tuple=True) if asked else None
        hidden, past = self.trunk(x.to(self.device), past, at=at, **view)
        return hidden, y if at is None else y[at], past

    def ask(self, rows, past):
        """The trunk over questions, lists of ids: (hidden at their last tokens (B, C), past)."""
        rows = [Example(ids, [-1] * (len(ids) - 1) + [0], *self.text.view(ids)) for ids in rows]
        hidden, _, past = self.read(rows, past, asked=True)
        return hidden, past

    def speaks(self):
        """A model that has only ever seen both ways has no next word to say."""
        if self.text.attention == "bidirectional":
            raise UserError("a model with --attention bidirectional (so also of --objective mlm) cannot "
                            "generate or score words; use --task tag, or --task classify --by head")

    def train(self, on=True):
        for module in (self.model, self.prompt):
            if module is not None:
                module.train(on)


class Trained:
    """The model, but for its trunk, which is the kit's: as the flags want it."""

    def __init__(self, kit):
        self.kit = kit

    def __getattr__(self, name):                            # head, config, wte: the model's own
        return getattr(self.kit.model, name)

    def trunk(self, x, past=None, **view):
        return self.kit.trunk(x, past, **view)


def summed_loss(kit, examples, past):
    """Sum of -log p over the targets of these examples: a scalar, fp32."""
    said, wanted, _ = kit.read(examples, past, asked=True)              # (targets, C), (targets,)
    if isinstance(examples[0], Example) and examples[0].head:
        return F.cross_entropy(kit.head(said.float()), wanted, reduction="sum")
    return -logprob(kit.model.head, said, wanted).sum()


def by_length(kit, lengths, extra=0, times=2):
    """Indices in batches of similar length, this process's share; twice the budget fits without gradients."""
    order = sorted(share(range(len(lengths)), lengths), key=lengths.__getitem__)
    return batching.micro(order, [n + extra for n in lengths], times * kit.micro)


@torch.no_grad()
def mean_loss(kit, examples):
    """(mean -log p over all targets, their number)."""
    total, count = 0.0, sum(map(targets, examples))
    with kit.cast():
        past = kit.past()
        for rows in by_length(kit, [len(e[0]) for e in examples]):
            total += summed_loss(kit, [examples[i] for i in rows], past).item()
    return sum(gather(total)) / max(count, 1), count


@torch.no_grad()
def sample(kit, prompts, **sampling):
    """What the model answers to each prompt, ids to ids; greedy unless told otherwise."""
    kit.speaks()
    out, end = {}, kit.text.end
    sampling = {"temperature": 0, **sampling}
    with kit.cast():
        past = kit.past()
        for rows in by_length(kit, list(map(len, prompts)), kit.max_new, times=8):   # a cache is small
            new = generate(kit.model, [prompts[i] for i in rows], kit.max_new, eos=end, past=past,
                           embed=kit.embed, both_ways=kit.text.attention == "prefix",
                           blank=bool(kit.text.blank), **sampling)
            for i, ids in zip(rows, new):
                out[i] = ids
    return merged(out)


def answer(kit, prompts, **sampling):
    """The same as text."""
    return [kit.text.said(ids) for ids in sample(kit, prompts, **sampling)]


@torch.no_grad()
def word_scores(kit, prompts):
    """-log p of every label word behind every prompt: (N, labels). The prompt runs once; each label is
    then laid over the same cache columns behind it."""
    kit.speaks()
    text = kit.text
    words = [chat.answer(label, text.template, text.tokenizer) for label in text.labels]    # end token last
    longest, out = max(map(len, words)), {}
    with kit.cast():
        past = kit.past()
        for index in by_length(kit, list(map(len, prompts)), longest):
            rows = [prompts[i] for i in index]
            hidden, filled = kit.ask(rows, past)
            first = kit.model.head(hidden)[:, None]                                 # (B, 1, V)
            used = torch.tensor([len(r) for r in rows], device=kit.device)
            used += filled[0][0].size(2) - max(map(len, rows))                      # virtual tokens in front
            columns = used[:, None] + torch.arange(longest - 1, device=kit.device)
            tail = (0, 0, 0, longest - 1)
            cache = [(F.pad(k, tail), F.pad(v, tail), *side) for k, v, *side in filled]
            nll = []
            for word in words:
                w, logits = torch.tensor([word] * len(rows), device=kit.device), first      # w (B, tokens)
                if len(word) > 1:
                    places = span(columns[:, :len(word) - 1], used) if text.blank else None
                    hidden, _ = kit.model.trunk(w[:, :-1], cache, used, places=places)
                    logits = torch.cat((first, kit.model.head(hidden)), 1)
                nll.append(F.cross_entropy(logits.float().transpose(1, 2), w, reduction="none").sum(1))
            out.update(zip(index, torch.stack(nll, 1).tolist()))
    return torch.tensor(merged(out))


@torch.no_grad()
def head_scores(kit, prompts):
    """-log p of every label by the head: (N, labels). Before there is a head, all are alike."""
    if kit.head is None:
        return torch.full((len(prompts), len(kit.text.labels)), math.log(len(kit.text.labels)))
    out = {}
    with kit.cast():
        past = kit.past()
        for index in by_length(kit, list(map(len, prompts))):
            hidden, _ = kit.ask([prompts[i] for i in index], past)
            out.update(zip(index, (-kit.head(hidden.float()).log_softmax(-1)).tolist()))
    return torch.tensor(merged(out))


def word_tags(kit, examples):
    """The tag of every word by the head, a list per example. Before there is a head, all are the first: O."""
    if kit.head is None:
        return [[kit.text.labels[0]] * targets(e) for e in examples]
    out = {}
    with kit.cast():
        past = kit.past()
        for index in by_length(kit, [len(e.ids) for e in examples]):
            hidden, _, _ = kit.read([examples[i] for i in index], past)
            for i, h in zip(index, hidden):
                at = [j for j, tag in enumerate(examples[i].y) if tag >= 0]
                out[i] = [kit.text.labels[k] for k in kit.head(h[at].float()).argmax(-1).tolist()]
    return merged(out)


def entity_scores(said, gold):
    return dict(zip(("precision", "recall", "f1"), metrics.span_scores(said, gold)))


@torch.no_grad()
def measure(kit, rows, examples, shots=()):
    """(metrics, answers as text) of the model on rows; what can be measured depends on their kind."""
    if "text" in rows[0] and "label" not in rows[0]:
        loss, count = mean_loss(kit, examples)
        return {"loss": loss, "perplexity": metrics.perplexity(loss * count, count), "targets": count}, []
    gold = [row.get("tags") for row in rows]
    if gold[0] and kit.text.by == "head":
        found = [t + ["O"] * (len(g) - len(t)) for t, g in zip(word_tags(kit, examples), gold)]
        loss = mean_loss(kit, examples)[0] if kit.head is not None else math.log(len(kit.text.labels))
        right = metrics.accuracy(sum(found, []), sum(gold, []))
        return {**entity_scores(found, gold), "accuracy": right, "loss": loss}, \
            [entities.told(row["tokens"], t) for row, t in zip(rows, found)]
    prompts, held = zip(*(fitted(kit, row, shots) for row in rows))
    shown = {"held": sum(held) / len(held), "most": max(held)} if shots else {}
    wanted = [kit.text.wanted(row) for row in rows]
    if "label" in rows[0]:
        mute = kit.text.by == "head" and kit.text.attention == "bidirectional"      # no words to start from
        scores = (head_scores if kit.head is not None or mute else word_scores)(kit, prompts)
        said, names = [kit.text.labels[j] for j in scores.argmin(1).tolist()], [words[0] for words in wanted]
        right = torch.tensor([kit.text.labels.index(g) for g in names])
        return {"accuracy": metrics.accuracy(said, names), "macro_f1": metrics.macro_f1(said, names),
                "loss": scores.gather(1, right[:, None]).mean().item(), **shown}, said
    said, found = answer(kit, prompts), {}
    if not shots:                                   # the examples hold no shots: theirs is another loss
        loss, count = mean_loss(kit, examples)
        found = {"loss": loss, "perplexity": metrics.perplexity(loss * count, count), "targets": count}
    if gold[0]:
        found.update(entity_scores([entities.heard(s, row["tokens"]) for s, row in zip(said, rows)], gold))
    exact = sum(map(metrics.exact_match, said, wanted)) / len(said)
    return {"exact_match": exact, **found, "rouge_l": metrics.rouge_l(said, wanted),
            "bleu": metrics.bleu(said, wanted), **shown}, said


def right(kit, rows, said):
    """"1" or "0" for each row, whether the answer is the wanted one: what a paired comparison needs. Empty
    where rows have no right answer (raw text, preferences)."""
    if not {"messages", "label"} & rows[0].keys():
        return ""
    return "".join(str(int(metrics.exact_match(s, kit.text.wanted(row)))) for s, row in zip(said, rows))


def fingerprint(model):
    """A hash over the shape of a model and a thin sample of every weight."""
    h = hashlib.sha256(str(model.config).encode())
    for p in model.parameters():
        h.update(full(p.detach()).flatten()[::997].float().cpu().numpy().tobytes())
    return h.hexdigest()
