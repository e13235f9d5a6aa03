"""prompts.py: leave the model alone and learn what stands in front of it.

A prompt is a module whose forward(model) returns a `past`: per-layer (k, v), each (1, nkv, P, hs), what a KV
cache would hold after P real tokens. Training, scoring and sampling take a past anyway, whoever made it.

              prompt tuning        P-tuning             prefix tuning        P-tuning v2
paper         Lester et al. 2021   Liu et al. 2021      Li & Liang 2021      Liu et al. 2022
arXiv         2104.08691           2103.10385           2101.00190           2110.07602
learned       E (P, C)             E, MLP or bi-LSTM    E, MLP               E (P, 2 L nkv hs)
table         E                    encoder(E)           MLP(E)               E
which holds   input embeddings     input embeddings     k, v of all layers   k, v of all layers
it stands     before the text      or in a template     before the text      before the text
it predicts   the first token      the next token       nothing              nothing
starts as     words, labels        words, labels        k, v of a text       k, v of a text
dropout       none                 none                 none                 on k, v, one draw a call

    prompt, P-tuning      past = trunk(table)             through all frozen layers, at positions 0 .. P-1
    prefix, P-tuning v2   past[l] = table[:, l, 0 | 1]    past the projections: no W_k, norm or rotation
    all four              text token t sits at P + t, sees P + t + 1 columns; P + T must fit the context

The table is what is stored; fold() drops what made it. The past is made once per step, at batch 1, and the
model expands it: P tokens instead of B P. A virtual token never sees the text, so logits and gradients are
those of writing the prompt before every row. Modules keep nothing between calls; parameters are always fp32.

Deviations. Encoders reach their start by least squares on the last, linear layer; the papers start anywhere,
or regress 500 steps. Prefix dropout is shared by the rows of a batch. Random soft tokens have the spread of
the vocabulary, not N(0, 1). A zero prefix is not a no-op, for a zero key takes its share of the softmax;
init="gated" is one: (1 - g) attn + g attn(prefix), g = 0 per head, no positions (cf. 2303.16199).

B batch  T tokens  C width  V vocabulary  L layers  nkv key/value heads  hs head size  P virtual tokens
Public: PromptTuning, PTuning, PrefixTuning, PTuningV2, place, cut, nearest_tokens, save_prompt, load_prompt
"""
import pathlib
import re
from contextlib import contextmanager

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.checkpoints.safetensors import read_tensors, write_tensors
from data.runtime.files import DataError, UserError, read_json, write_json

COMMON = 5000       # byte-pair ids grow with rarity: below this are words that were seen often (Lester, 3.2)


# ------------------------------------------------------------------------------------------ the four methods

class PromptTuning(nn.Module):
    """P embeddings. init: vocab (sampled from `ids` or common ids), text (`ids`), labels (lists), random."""

    def __init__(self, model, n_virtual=20, init="vocab", ids=None, template=None, seed=0):
        super().__init__()
        self.config, self.template = model.config, template
        self.n_virtual, self.front = n_virtual, room(model, n_virtual, init, template)
        with seeded(seed):
            self.embedding = nn.Parameter(soft_start(model, n_virtual, init, ids))

    def table(self):                                                        # (P, C)
        return self.embedding

    def run(self, model):
        """hidden (1, P, C), past. head(hidden[:, -1]) is what a prompt predicts: every row's first token."""
        return model.trunk(self.table()[None])

    def forward(self, model):           # with a template nothing stands in front, and None is a past too
        return None if self.template else self.run(model)[1]

    def embed(self, model, ids):
        """ids (B, T), -1 - j meaning virtual token j -> embeddings (B, T, C), which trunk takes instead."""
        soft = self.table()[(-1 - ids).clamp(min=0)]                        # (B, T, C)
        return torch.where((ids < 0)[..., None], soft, model.wte(ids.clamp(min=0)))

    def fold(self):
        return self                                                         # nothing to drop


class PTuning(nn.Module):
    """Embeddings out of an encoder, which ties the virtual tokens to each other. init: as for PromptTuning.

    encoder: mlp (C -> h -> h -> C, relu) or lstm (two layers, h each way, then 2h -> 2h -> C), h = `hidden`.
    """

    def __init__(self, model, n_virtual=20, init="vocab", ids=None, template=None, seed=0, encoder="mlp",
                 hidden=None):
        super().__init__()
        self.config, self.template = model.config, template
        self.n_virtual, self.front = n_virtual, room(model, n_virtual, init, template)
        C, h = model.config.n_embd, hidden or model.config.n_embd
        with seeded(seed):
            self.embedding, self.lstm_head = nn.Parameter(torch.randn(n_virtual, C)), None
            if encoder == "mlp":
                layers = nn.Linear(C, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, C)
            elif encoder == "lstm":
                self.lstm_head = nn.LSTM(C, h, 2, bidirectional=True, batch_first=True)
                layers = nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, C)
            else:
                raise UserError(f"encoder {encoder!r} is unknown; it is mlp or lstm")
            self.mlp_head = nn.Sequential(*layers)
            self.to(model.wte.weight.device)
            start = soft_start(model, n_virtual, init, ids)
        if init != "random":
            start_at(self.mlp_head, self.states(), start)

    def states(self):                                                       # (P, C), or (P, 2h) after an LSTM
        return self.embedding if self.lstm_head is None else self.lstm_head(self.embedding[None])[0][0]

    def table(self):                                                        # (P, C)
        with torch.autocast(self.embedding.device.type, enabled=False):     # an encoder is never rounded
            return self.embedding if self.mlp_head is None else self.mlp_head(self.states())

    run, forward, embed = PromptTuning.run, PromptTuning.forward, PromptTuning.embed

    def fold(self):
        self.embedding = nn.Parameter(self.table().detach())
        self.lstm_head = self.mlp_head = None
        return self


class PrefixTuning(nn.Module):
    """Keys and values of every layer out of one MLP: C -> hidden -> 2 L nkv hs, tanh.

    init: text (the k, v of `ids`, or of sampled common tokens), zero, random (the MLP as it is), gated.
    """

    def __init__(self, model, n_virtual=20, init="text", ids=None, seed=0, hidden=512):
        super().__init__()
        self.config, self.template = model.config, None
        self.n_virtual, self.front = n_virtual, room(model, n_virtual, init)
        C, width = model.config.n_embd, kv_width(model.config)
        with seeded(seed):
            self.embedding = nn.Parameter(torch.randn(n_virtual, C))
            self.transform = nn.Sequential(nn.Linear(C, hidden), nn.Tanh(), nn.Linear(hidden, width))
            self.to(model.wte.weight.device)
            start, self.gate = kv_start(model, n_virtual, init, ids)
        if init != "random":
            start_at(self.transform, self.embedding, start)

    def table(self):                                                        # (P, 2 L nkv hs)
        with torch.autocast(self.embedding.device.type, enabled=False):
            return self.embedding if self.transform is None else self.transform(self.embedding)

    def forward(self, model):
        return as_past(self.table(), self.config, self.gate)

    def fold(self):
        self.embedding, self.transform = nn.Parameter(self.table().detach()), None
        return self


class PTuningV2(nn.Module):
    """Keys and values of every layer, each number its own parameter. init: as above, random being N(0, 1)."""

    def __init__(self, model, n_virtual=20, init="text", ids=None, seed=0, dropout=0.1):
        super().__init__()
        self.config, self.template, self.dropout = model.config, None, dropout
        self.n_virtual, self.front = n_virtual, room(model, n_virtual, init)
        with seeded(seed):
            start, self.gate = kv_start(model, n_virtual, init, ids)
        self.embedding = nn.Parameter(start)

    table, fold = PromptTuning.table, PromptTuning.fold                     # (P, 2 L nkv hs); nothing to drop

    def forward(self, model):
        return as_past(F.dropout(self.embedding, self.dropout, self.training), self.config, self.gate)


# ------------------------------------------------------------------------------------------ where they stand

def as_past(table, config, gate=None):
    """(P, 2 L nkv hs) -> past. A virtual token's row reads k of layer 0, v of layer 0, k of layer 1, ..."""
    kv = table.view(-1, config.n_layer, 2, config.n_kv_head, config.head_size)      # (P, L, 2, nkv, hs)
    kv = kv.permute(1, 2, 3, 0, 4)[:, :, None]                                      # (L, 2, 1, nkv, P, hs)
    return [(k, v) if gate is None else (k, v, gate[i]) for i, (k, v) in enumerate(kv)]


def place(template, encode):
    """A template like "{p:3} {prompt} {p:3}" -> ids before, ids after the prompt; virtual token j is -1 - j.

    A row is before + prompt + after + answer, read through prompt.embed. Words between the slots are encoded
    as they stand, blanks alone only separate. Virtual tokens are text here: they count in T, not in P.
    """
    sides, j = [[]], 0
    for piece in re.split(r"(\{p:\d+\}|\{prompt\})", template):
        if piece == "{prompt}":
            sides.append([])
        elif piece.startswith("{p:"):
            first, j = j, j + int(piece[3:-1])
            sides[-1] += [-1 - i for i in range(first, j)]
        elif piece.strip():
            sides[-1] += encode(piece)
    if len(sides) != 2 or not j:
        raise UserError(f"template {template!r} must hold {{prompt}} once and a slot for virtual tokens, "
                        'as in "{p:3} {prompt} {p:3}"')
    return sides


def cut(past):
    """For several backward passes in one step (micro-batches): leaves to use as the past, and finish().

    Gradients meet on the leaves; finish(), called last, sends their sum through the prompt. So a step still
    runs the P tokens once, and draws its dropout once.
    """
    leaves = [tuple(t.detach().requires_grad_() for t in entry) for entry in past]

    def finish():
        pairs = [(t, leaf.grad) for made, used in zip(past, leaves) for t, leaf in zip(made, used)]
        torch.autograd.backward(*zip(*(pair for pair in pairs if pair[1] is not None)))

    return leaves, finish


# ------------------------------------------------------------------------------------------ where they start

@contextmanager
def seeded(seed):
    """Draw from `seed` alone: making a prompt must not shift anybody else's random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)       # the CPU's only; torch.manual_seed reaches CUDA too
        yield


def room(model, n, init, template=None):
    """The positions that a prompt takes in front of the text; the rest of the context is the text's."""
    slots, context = sum(map(int, re.findall(r"\{p:(\d+)\}", template or ""))), model.config.block_size
    if template and slots != n:
        raise UserError(f"template {template!r} has {slots} virtual tokens and n_virtual is {n}; "
                        + (f"say {slots}" if slots else "add {p}, where they stand"))
    if not 1 <= n < context:
        raise UserError(f"n_virtual is {n}; text shares the context of {context}: say 1 to {context - 1}")
    return 0 if template or init == "gated" else n


def repeated(ids, n):
    return (list(ids) * -(-n // len(ids)))[:n]


def sampled(n, pool):                                               # all different while the pool lasts
    return repeated([pool[i] for i in torch.randperm(len(pool)).tolist()], n)


@torch.no_grad()
def soft_start(model, n, init, ids):
    """The embeddings (P, C), fp32, that virtual tokens start from."""
    wte, common = model.wte.weight.float(), range(min(COMMON, model.config.vocab_size))
    if init == "random":
        return torch.randn(n, wte.size(1)).to(wte.device) * wte.std()
    if init == "vocab":
        return wte[sampled(n, ids or common)]
    if init not in ("text", "labels") or not ids:
        raise UserError(f"init {init!r} with ids {ids!r}: soft tokens start from vocab or random, "
                        "or with ids from text or labels")
    if init == "text":
        return wte[repeated(ids, n)]
    if len(ids) > n:
        raise UserError(f"n_virtual is {n}, but each of the {len(ids)} labels needs one; raise n_virtual")
    labels = torch.stack([wte[label].mean(0) for label in ids])             # a label may be several tokens
    return torch.cat((labels, wte[sampled(n - len(ids), common)]))


@torch.no_grad()
def kv_start(model, n, init, ids):
    """The keys and values (P, 2 L nkv hs), fp32, that a prefix starts from, and its gate or None."""
    device, c = model.wte.weight.device, model.config
    if init in ("zero", "random"):
        return (torch.zeros if init == "zero" else torch.randn)(n, kv_width(c)).to(device), None
    if init not in ("text", "gated"):
        raise UserError(f"init {init!r} is unknown; a prefix starts from text, zero, random or gated")
    ids = repeated(ids, n) if ids else sampled(n, range(min(COMMON, c.vocab_size)))
    _, past = model.trunk(torch.tensor([ids], device=device))
    kv = torch.stack([torch.stack(entry) for entry in past])                # (L, 2, 1, nkv, P, hs)
    gate = nn.Parameter(torch.zeros(c.n_layer, c.n_head, 1, 1, device=device)) if init == "gated" else None
    return kv[:, :, 0].permute(3, 0, 1, 2, 4).flatten(1).float(), gate


def kv_width(c):
    return 2 * c.n_layer * c.n_kv_head * c.head_size


@torch.no_grad()
def start_at(stack, x, target):
    """Move the last Linear, as little as possible, to stack(x) = target; exact if P is at most its inputs."""
    stack[-1].weight += (torch.linalg.pinv(stack[:-1](x)) @ (target - stack(x))).T


# --------------------------------------------------------------------------------------- reading and storing

@torch.no_grad()
def nearest_tokens(prompt, model, k=5, start=None):
    """Virtual tokens in words: for each, the k nearest tokens by cosine and by dot product, as (id, value).

    A prefix has no embeddings: its values in layer 0 are held against those that each token would have there.
    `start`: the table before training (the constructor makes it again); "moved" is a row's distance from it.
    """
    table, wte, block = prompt.table().float(), model.wte.weight, model.blocks[0]
    soft, out = isinstance(prompt, (PromptTuning, PTuning)), []
    rows = table if soft else as_past(table, prompt.config)[0][1][0].transpose(0, 1).flatten(1)
    for j, row in enumerate(rows):
        at = wte if soft or model.wpe is None else wte + model.wpe.weight[j]
        words = (wte if soft else block.attn.v(block.ln_1(at))).float()             # (V, C) or (V, nkv hs)
        scores = {"cosine": F.cosine_similarity(words, row[None]), "dot": words @ row}
        near = {name: [(int(i), float(s[i])) for i in s.topk(k).indices] for name, s in scores.items()}
        out.append({**near, "moved": None if start is None else float((table[j] - start[j]).norm())})
    return out


def save_prompt(prompt, folder, base="", task_type="CAUSAL_LM"):
    """Write the table as peft does, in fp32; an encoder is not in the file (to train on, keep state_dict()).

    peft ignores a prompt without task_type, so it is always there. Templates and gates it does not know: they
    get a peft_type of their own, which it refuses, not one that it would run as something else.
    """
    c, soft = prompt.config, isinstance(prompt, (PromptTuning, PTuning))
    kind = "P_TUNING" if isinstance(prompt, PTuning) else "PROMPT_TUNING" if soft else "PREFIX_TUNING"
    heads, width = (c.n_head, c.n_embd) if soft else (c.n_kv_head, c.n_kv_head * c.head_size)
    config = dict(peft_type=kind, task_type=task_type, base_model_name_or_path=str(base), inference_mode=True,
                  num_virtual_tokens=prompt.n_virtual, num_transformer_submodules=1,
                  num_layers=c.n_layer, num_attention_heads=heads, token_dim=width)
    tensors = {"prompt_embeddings": prompt.table()}
    if kind == "P_TUNING":
        config["encoder_hidden_size"] = c.n_embd                    # peft builds an encoder and never uses it
    if prompt.template:
        config.update(peft_type="TEMPLATE_PROMPT", template=prompt.template)
    if not soft and prompt.gate is not None:
        config["peft_type"], tensors["gate"] = "GATED_PREFIX", prompt.gate
    folder = pathlib.Path(folder)
    write_tensors(folder / "adapter_model.safetensors", {n: t.detach().float() for n, t in tensors.items()})
    write_json(folder / "adapter_config.json", config)


def load_prompt(model, folder):
    """A folder that save_prompt or peft wrote -> PromptTuning or PTuningV2 (no dropout), in eval mode."""
    path, file = (pathlib.Path(folder) / f for f in ("adapter_config.json", "adapter_model.safetensors"))
    config, tensors, c = read_json(path), read_tensors(file), model.config
    known = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "TEMPLATE_PROMPT", "GATED_PREFIX")
    kind, n, template = (config.get(key) for key in ("peft_type", "num_virtual_tokens", "template"))
    if kind not in known or (template is not None) != (kind == "TEMPLATE_PROMPT"):
        raise DataError(f"{path}: peft_type is {kind!r} and template {template!r}; a prompt is one of "
                        f"{', '.join(known)}, and only TEMPLATE_PROMPT has a template")
    soft, gate = "PREFIX" not in kind, {"gate": [c.n_layer, c.n_head, 1, 1]} if kind == "GATED_PREFIX" else {}
    want = {"prompt_embeddings": [n, c.n_embd if soft else kv_width(c)], **gate}
    have = {name: list(t.shape) for name, t in tensors.items()}
    if have != want:
        raise DataError(f"{file}: the tensors are {have}; {kind} over this model has {want}")
    if not all(t.is_floating_point() and t.isfinite().all() for t in tensors.values()):
        raise DataError(f"{file}: some numbers are not finite floats; train this prompt again")
    prompt = (PromptTuning(model, n, "random", template=template) if soft else
              PTuningV2(model, n, "gated" if gate else "zero", dropout=0.0))
    tensors["embedding"] = tensors.pop("prompt_embeddings")
    prompt.load_state_dict(tensors)
    return prompt.eval()
