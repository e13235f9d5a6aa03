"""evaluate.py: what a model makes of examples: its loss, its answers, its choice of a label.

    loss          sum over targets of -log p(target | before), divided by the number of targets
    by words      argmin over labels of -sum log p(label tokens, end token | question); no length correction
    by a head     argmax of a linear map of the last token's hidden state

Logits are computed at the targets and nowhere else. Rows run in batches of similar length under a token
budget; no number depends on how they were batched (attention is causal: a pad cannot be seen).

Public: Kit, summed_loss, mean_loss, sample, answer, measure, right, fingerprint
"""
import contextlib
import hashlib
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import batches, chat, metrics
from data.examples import Text, targets
from data.files import UserError
from model import GPT, generate


@dataclass
class Kit:
    """A model and all that belongs to it, for the functions below and the training loop."""
    model: GPT
    text: Text
    device: torch.device
    dtype: torch.dtype                      # compute dtype
    head: nn.Module = None                  # a classification head (C -> labels), fp32
    prompt: nn.Module = None                # a prompt method: prompt(model) -> past
    micro: int = 4096                       # padded tokens of a micro-batch
    max_new: int = 64                       # longest answer
    checkpoint: bool = False

    def cast(self):
        """Autocast, where fp32 weights learn in half precision; frozen halves are stored as they compute."""
        mixed = self.dtype != self.model.wte.weight.dtype
        return torch.autocast(self.device.type, self.dtype) if mixed else contextlib.nullcontext()

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

    def embed(self, x):
        """A template's virtual tokens stand inside the text: then embeddings go in, in place of ids."""
        return self.prompt.embed(self.model, x) if self.prompt is not None and self.prompt.template else x

    def trunk(self, x, past):
        return self.model.trunk(self.embed(x), past, checkpoint=self.checkpoint)

    def train(self, on=True):
        for module in (self.model, self.prompt):
            if module is not None:
                module.train(on)


def pad(rows, device):
    """Lists of ids -> (B, T), right-padded."""
    T = max(map(len, rows))
    return torch.tensor([[*r, *[0] * (T - len(r))] for r in rows], device=device)


def at_last(hidden, rows):
    """(B, T, C) -> (B, C): the hidden state of each row's last real token."""
    last = torch.tensor([len(r) - 1 for r in rows], device=hidden.device)
    return hidden[torch.arange(len(rows), device=hidden.device), last]


def summed_loss(kit, examples, past):
    """Sum of -log p over the targets of these examples: a scalar, fp32."""
    if not isinstance(examples[0][1], list):                            # a label, for the head
        rows = [ids for ids, _ in examples]
        hidden, _ = kit.trunk(pad(rows, kit.device), past)
        label = torch.tensor([y for _, y in examples], device=kit.device)
        return F.cross_entropy(kit.head(at_last(hidden, rows).float()), label, reduction="sum")
    x, y = (t.to(kit.device) for t in batches.collate(examples))        # (B, T); y is -1 where no target is
    hidden, _ = kit.trunk(x, past)
    logits = kit.model.head(hidden[y >= 0]).float()                     # (targets, V)
    return F.cross_entropy(logits, y[y >= 0], reduction="sum")


def by_length(kit, lengths, extra=0):
    """Indices in batches of similar length. Without gradients twice the training budget fits."""
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    return batches.micro(order, [n + extra for n in lengths], 2 * kit.micro)


@torch.no_grad()
def mean_loss(kit, examples):
    """(mean -log p over all targets, their number)."""
    total, count = 0.0, sum(map(targets, examples))
    with kit.cast():
        past = kit.past()
        for rows in by_length(kit, [len(ids) for ids, _ in examples]):
            total += summed_loss(kit, [examples[i] for i in rows], past).item()
    return total / max(count, 1), count


@torch.no_grad()
def sample(kit, prompts, **sampling):
    """What the model answers to each prompt, ids to ids; greedy unless told otherwise."""
    out, end = [None] * len(prompts), kit.text.end
    sampling = {"temperature": 0, **sampling}
    with kit.cast():
        past = kit.past()
        for rows in by_length(kit, list(map(len, prompts)), kit.max_new):
            new = generate(kit.model, [prompts[i] for i in rows], kit.max_new, eos=end, past=past,
                           embed=kit.embed, **sampling)
            for i, ids in zip(rows, new):
                out[i] = ids
    return out


def answer(kit, prompts, **sampling):
    """The same as text."""
    return [kit.text.said(ids) for ids in sample(kit, prompts, **sampling)]


@torch.no_grad()
def word_scores(kit, prompts):
    """-log p of every label word behind every prompt: (N, labels). The prompt runs once; each label is
    then laid over the same cache columns behind it."""
    text = kit.text
    words = [chat.answer(label, text.template, text.tokenizer) for label in text.labels]    # end token last
    longest, out = max(map(len, words)), torch.zeros(len(prompts), len(words))
    with kit.cast():
        past = kit.past()
        for index in by_length(kit, list(map(len, prompts)), longest):
            rows = [prompts[i] for i in index]
            hidden, filled = kit.trunk(pad(rows, kit.device), past)
            first = kit.model.head(at_last(hidden, rows))[:, None]                  # (B, 1, V)
            used = torch.tensor([len(r) for r in rows], device=kit.device)
            used += filled[0][0].size(2) - hidden.size(1)                           # virtual tokens in front
            tail = (0, 0, 0, longest - 1)
            cache = [(F.pad(k, tail), F.pad(v, tail), *side) for k, v, *side in filled]
            for j, word in enumerate(words):
                w, logits = torch.tensor([word] * len(rows), device=kit.device), first      # w (B, tokens)
                if len(word) > 1:
                    hidden, _ = kit.model.trunk(w[:, :-1], cache, used)
                    logits = torch.cat((first, kit.model.head(hidden)), 1)
                nll = F.cross_entropy(logits.float().transpose(1, 2), w, reduction="none")
                out[index, j] = nll.sum(1).cpu()
    return out


@torch.no_grad()
def head_scores(kit, prompts):
    """-log p of every label by the head: (N, labels)."""
    out = torch.zeros(len(prompts), len(kit.text.labels))
    with kit.cast():
        past = kit.past()
        for index in by_length(kit, list(map(len, prompts))):
            rows = [prompts[i] for i in index]
            hidden, _ = kit.trunk(pad(rows, kit.device), past)
            out[index] = -kit.head(at_last(hidden, rows).float()).log_softmax(-1).cpu()
    return out


def measure(kit, rows, examples, shots=()):
    """(metrics, answers as text) of the model on rows; what can be measured depends on their kind."""
    if "text" in rows[0] and "label" not in rows[0]:
        loss, count = mean_loss(kit, examples)
        return {"loss": loss, "perplexity": metrics.perplexity(loss * count, count), "targets": count}, []
    prompts = [kit.text.asked(row, shots, kit.room() - 1) for row in rows]
    wanted = [kit.text.wanted(row) for row in rows]
    if "label" in rows[0]:
        scores = (word_scores if kit.head is None else head_scores)(kit, prompts)
        said, gold = [kit.text.labels[j] for j in scores.argmin(1).tolist()], [words[0] for words in wanted]
        right = torch.tensor([kit.text.labels.index(g) for g in gold])
        return {"accuracy": metrics.accuracy(said, gold), "macro_f1": metrics.macro_f1(said, gold),
                "loss": scores.gather(1, right[:, None]).mean().item()}, said
    said, found = answer(kit, prompts), {}
    if not shots:                                   # the examples hold no shots: theirs is another loss
        loss, count = mean_loss(kit, examples)
        found = {"loss": loss, "perplexity": metrics.perplexity(loss * count, count), "targets": count}
    exact = sum(map(metrics.exact_match, said, wanted)) / len(said)
    return {"exact_match": exact, **found, "rouge_l": metrics.rouge_l(said, wanted),
            "bleu": metrics.bleu(said, wanted)}, said


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
        h.update(p.detach().flatten()[::997].float().cpu().numpy().tobytes())
    return h.hexdigest()
