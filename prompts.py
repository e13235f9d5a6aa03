"""prompts.py: train virtual tokens in front of (or inside) the text; the model is frozen.

A soft prompt is a module whose forward(model) returns a `past`: one entry per layer, None or Past(k, v,
gate), k and v (1, nkv, P, hs): what a KV cache would hold after P real tokens. Training, scoring and sampling
take a past anyway, so they need no code for prompts.

              prompt tuning        P-tuning             prefix tuning        P-tuning v2
paper         Lester et al. 2021   Liu et al. 2021      Li & Liang 2021      Liu et al. 2022
arXiv         2104.08691           2103.10385           2101.00190           2110.07602
trainable     E (P, C)             E, MLP or bi-LSTM    E, MLP               E (P, 2 L nkv hs)
table         E                    encoder(E)           MLP(E)               E
it holds      input embeddings     input embeddings     k, v of all layers   k, v of all layers
position      before the text, or in a template         before the text      before the text
starts as     words, labels        words, labels        k, v of a text       k, v of a text
dropout       none                 none                 none                 on k, v, one draw a call

    prompt, P-tuning      past = hidden_states(table)     through all frozen layers, at positions 0 .. P-1
    prefix, P-tuning v2   past[l] = table[:, l, 0 | 1]    behind the projections: no W_k, norm or rotation
    all four              text token t has position P + t and attends to P + t + 1 columns; P + T <= context. In a
                          template virtual tokens are tokens of the text, P is 0; gated prefixes take no positions

The table is stored; drop_encoder() removes what made it. The past is computed once per step at batch 1, and
attention expands it: P tokens instead of B P. A virtual token does not attend to the text, so logits and
gradients are those of writing the prompt before every row. Modules keep nothing between calls; parameters are
always fp32.

A soft prompt is one class here and one PromptMethod in METHODS at the end: flags, training, saving, loading
and the tables follow from the record.

Deviations. Encoders reach their start by least squares on the last, linear layer; the papers start anywhere,
or train 500 steps towards it. Prefix dropout is shared by the rows of a batch. Random soft tokens have the
standard deviation of the vocabulary, not 1. A zero prefix changes the output, because a zero key takes its
share of the softmax; init="gated" does not: (1 - g) attn + g attn(prefix), g = 0 per head, no positions
(cf. Zhang et al. 2023, 2303.16199).

B batch  T tokens  C width  V vocabulary  L layers  nkv kv heads  hs head size  P virtual tokens
Public: PromptTuning, PTuning, PrefixTuning, PTuningV2, parse_template, detach_for_accumulation,
nearest_tokens, save_prompt, load_prompt, METHODS
"""
import pathlib
import re
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from numbers import Integral

import torch
import torch.nn as nn
import torch.nn.functional as F

from data.checkpoints.hf import from_stored, key_order, to_stored
from data.checkpoints.peft import base_fingerprint, read_adapter_config, require_base
from data.checkpoints.safetensors import read_tensors, write_tensors
from data.runtime.files import DataError, UserError, write_json
from data.runtime.flags import flag

COMMON = 5000       # byte-pair ids grow with rarity: below this are words that were seen often (Lester, 3.2)


# ------------------------------------------------------------------------------------------ the four methods

class PromptTuning(nn.Module):
    """P embeddings in front of the text, or inside it by a template.

    init: vocab (sampled from `ids`, or from common ids), text (`ids`), labels (a list of ids each), random.
    Its class attributes are the record that every soft prompt has.
    """
    holds = "embeddings"                                # or "keys_values"
    peft_type = "PROMPT_TUNING"                         # None: a file of its own, see save_prompt
    options = None                                      # a group of flags, which are keywords of __init__

    def __init__(self, model, num_virtual_tokens=20, init="vocab", ids=None, template=None, seed=0):
        super().__init__()
        self.config = model.config
        self.template = template
        self.num_virtual_tokens = num_virtual_tokens
        self.prefix_len = check_prefix_len(model, num_virtual_tokens, init, template)
        with seeded(seed):
            self.embedding = nn.Parameter(soft_start(model, num_virtual_tokens, init, ids))

    def prompt_embeddings(self):                                            # (P, C)
        return self.embedding

    def run(self, model):
        """hidden (1, P, C), past.

        logits(hidden[:, -1]) is what a prompt predicts: every row's first token.
        """
        return model.hidden_states(self.prompt_embeddings()[None])

    def forward(self, model):           # with a template nothing stands in front, and None is a past too
        return None if self.template else self.run(model)[1]

    def embed(self, model, ids):
        """ids (B, T), -1 - j meaning virtual token j -> embeddings (B, T, C) for hidden_states."""
        soft = self.prompt_embeddings()[(-1 - ids).clamp(min=0)]            # (B, T, C)
        return torch.where((ids < 0)[..., None], soft, model.embed(ids.clamp(min=0)))

    def template_ids(self, encode):
        """ids before and ids after a prompt, by the template; see parse_template."""
        return parse_template(self.template, encode)

    def drop_encoder(self):
        """Keep the numbers that the prompt amounts to, drop what made them. Returns the prompt."""
        return self


@dataclass(frozen=True)
class PTuningFlags:
    """virtual tokens"""
    encoder: str = flag("mlp", "what the embeddings go through", choices=("mlp", "lstm"))
    encoder_hidden: int = flag(None, "the encoder's width; default: the model's", type=int, low=1,
                               high=2 ** 16)


class PTuning(nn.Module):
    """Embeddings out of an encoder, which ties the virtual tokens to each other. init: as for PromptTuning.

    encoder: mlp (C -> h -> h -> C, relu) or lstm (two layers, h each way, then 2h -> 2h -> C), h =
    encoder_hidden, None: C.
    """
    holds = "embeddings"
    peft_type = "P_TUNING"
    options = PTuningFlags

    def __init__(self, model, num_virtual_tokens=20, init="vocab", ids=None, template=None, seed=0,
                 encoder="mlp",
                 encoder_hidden=None):
        super().__init__()
        self.config = model.config
        self.template = template
        self.num_virtual_tokens = num_virtual_tokens
        self.prefix_len = check_prefix_len(model, num_virtual_tokens, init, template)
        C = model.config.n_embd
        h = encoder_hidden or C
        with seeded(seed):
            self.embedding = nn.Parameter(torch.randn(num_virtual_tokens, C))
            self.lstm_head = None
            if encoder == "mlp":
                layers = nn.Linear(C, h), nn.ReLU(), nn.Linear(h, h), nn.ReLU(), nn.Linear(h, C)
            elif encoder == "lstm":
                self.lstm_head = nn.LSTM(C, h, 2, bidirectional=True, batch_first=True)
                layers = nn.Linear(2 * h, 2 * h), nn.ReLU(), nn.Linear(2 * h, C)
            else:
                raise UserError(f"encoder {encoder!r} is unknown; it is mlp or lstm")
            self.mlp_head = nn.Sequential(*layers)
            self.to(model.wte.weight.device)
            start = soft_start(model, num_virtual_tokens, init, ids)
        if init != "random":
            start_at(self.mlp_head, self.encoder_states(), start)

    def encoder_states(self):                                               # (P, C), or (P, 2h) after an LSTM
        return self.embedding if self.lstm_head is None else self.lstm_head(self.embedding[None])[0][0]

    def prompt_embeddings(self):                                            # (P, C)
        if self.mlp_head is None:
            return self.embedding
        with torch.autocast(self.embedding.device.type, enabled=False):     # an encoder is never rounded
            return self.mlp_head(self.encoder_states())

    run = PromptTuning.run
    forward = PromptTuning.forward
    embed = PromptTuning.embed
    template_ids = PromptTuning.template_ids

    def drop_encoder(self):
        self.embedding = nn.Parameter(self.prompt_embeddings().detach())
        self.lstm_head = None
        self.mlp_head = None
        return self


@dataclass(frozen=True)
class PrefixFlags:
    """virtual tokens"""
    encoder_hidden: int = flag(512, "the encoder's width", low=1, high=2 ** 16)


class PrefixTuning(nn.Module):
    """Keys and values of every layer out of one MLP: C -> encoder_hidden -> 2 L nkv hs, tanh.

    init: text (the k, v of `ids`, or of sampled common tokens), zero, random (the MLP as it is), gated.
    """
    holds = "keys_values"
    peft_type = "PREFIX_TUNING"
    options = PrefixFlags

    def __init__(self, model, num_virtual_tokens=20, init="text", ids=None, seed=0, encoder_hidden=512):
        super().__init__()
        self.config = model.config
        self.template = None
        self.num_virtual_tokens = num_virtual_tokens
        self.prefix_len = check_prefix_len(model, num_virtual_tokens, init)
        C = model.config.n_embd
        with seeded(seed):
            self.embedding = nn.Parameter(torch.randn(num_virtual_tokens, C))
            self.transform = nn.Sequential(nn.Linear(C, encoder_hidden), nn.Tanh(),
                                           nn.Linear(encoder_hidden, kv_width(model.config)))
            self.to(model.wte.weight.device)
            start, self.gate = kv_start(model, num_virtual_tokens, init, ids)
        if init != "random":
            start_at(self.transform, self.embedding, start)

    def prompt_embeddings(self):                                            # (P, 2 L nkv hs)
        if self.transform is None:
            return self.embedding
        with torch.autocast(self.embedding.device.type, enabled=False):
            return self.transform(self.embedding)

    def forward(self, model):
        return as_past(self.prompt_embeddings(), model, self.gate)

    def drop_encoder(self):
        self.embedding = nn.Parameter(self.prompt_embeddings().detach())
        self.transform = None
        return self


@dataclass(frozen=True)
class PTuningV2Flags:
    """virtual tokens"""
    prefix_dropout: float = flag(0.0, "on keys and values", low=0, below=1)


class PTuningV2(nn.Module):
    """Keys and values of every layer, each number its own parameter. init: as above, random being N(0, 1)."""
    holds = "keys_values"
    peft_type = "PREFIX_TUNING"
    options = PTuningV2Flags

    def __init__(self, model, num_virtual_tokens=20, init="text", ids=None, seed=0, prefix_dropout=0.1):
        super().__init__()
        self.config = model.config
        self.template = None
        self.dropout = prefix_dropout
        self.num_virtual_tokens = num_virtual_tokens
        self.prefix_len = check_prefix_len(model, num_virtual_tokens, init)
        with seeded(seed):
            start, self.gate = kv_start(model, num_virtual_tokens, init, ids)
        self.embedding = nn.Parameter(start)

    def prompt_embeddings(self):                                            # (P, 2 L nkv hs)
        return self.embedding

    def forward(self, model):
        return as_past(F.dropout(self.embedding, self.dropout, self.training), model, self.gate)

    def drop_encoder(self):
        return self


# ------------------------------------------------------------------------------------------ where they stand

def as_past(table, model, gate=None):
    """(P, 2 L nkv hs) -> past. A virtual token's row holds k of layer 0, v of layer 0, k of layer 1, ..."""
    c = model.config
    kv = table.view(-1, c.n_layer, 2, c.n_kv_head, c.head_size)                     # (P, L, 2, nkv, hs)
    kv = kv.permute(1, 2, 3, 0, 4)[:, :, None]                                      # (L, 2, 1, nkv, P, hs)
    return [model.Past(k, v, None if gate is None else gate[i]) for i, (k, v) in enumerate(kv)]


def parse_template(template, encode):
    """A template like "{p:3} {prompt} {p:3}" -> ids before, ids after the prompt; virtual token j is -1 - j.

    A row is before + prompt + after + answer, embedded by prompt.embed. Words between the slots are encoded
    as they stand; white space alone only separates. Virtual tokens are text here: they count in T, not in P.
    Raises UserError for a template without {prompt} or without a slot.
    """
    sides = [[]]
    count = 0
    for piece in re.split(r"(\{p:\d+\}|\{prompt\})", template):
        if piece == "{prompt}":
            sides.append([])
        elif piece.startswith("{p:"):
            n = int(piece[3:-1])
            sides[-1] += [-1 - j for j in range(count, count + n)]
            count += n
        elif piece.strip():
            sides[-1] += encode(piece)
    if len(sides) != 2 or not count:
        raise UserError(f"template {template!r} must hold {{prompt}} once and a slot for virtual tokens, "
                        'as in "{p:3} {prompt} {p:3}"')
    return sides


def detach_for_accumulation(past):
    """For several backward passes in one step (micro-batches): leaves to use as the past, and finish().

    Gradients add up on the leaves; finish(), called last, sends their sum through the prompt. So a step still
    runs the P tokens once, and draws its dropout once.
    """
    def leaf(t):
        return None if t is None else t.detach().requires_grad_()

    leaves = [entry and entry._make(map(leaf, entry)) for entry in past]

    def finish():
        tensors = []
        gradients = []
        for made, used in zip(past, leaves):
            for t, copy in zip(made or (), used or ()):
                if t is not None and copy.grad is not None:
                    tensors.append(t)
                    gradients.append(copy.grad)
        torch.autograd.backward(tensors, gradients)

    return leaves, finish


# ------------------------------------------------------------------------------------------ where they start

@contextmanager
def seeded(seed):
    """Draw from `seed` alone: making a prompt must not shift anybody else's random numbers."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)       # the CPU's only; torch.manual_seed reaches CUDA too
        yield


def check_prefix_len(model, n, init, template=None):
    """The positions that a prompt takes in front of the text.

    Raises UserError if the context is too short.
    """
    if not isinstance(n, Integral) or not isinstance(template, (str, type(None))):
        raise UserError(f"num_virtual_tokens is {n!r} and template {template!r}; they must be a whole number, "
                        "and a string or None")
    slots = sum(map(int, re.findall(r"\{p:(\d+)\}", template or "")))
    context = model.config.block_size
    if template and slots != n:
        remedy = f"say {slots}" if slots else "add {p}, where they stand"
        raise UserError(f"template {template!r} has {slots} virtual tokens and num_virtual_tokens is {n}; "
                        f"{remedy}")
    if not 1 <= n < context:
        raise UserError(f"num_virtual_tokens is {n}; text shares the context of {context}: say 1 to "
                        f"{context - 1}")
    return 0 if template or init == "gated" else n


def repeated(ids, n):
    return (list(ids) * -(-n // len(ids)))[:n]


def sampled(n, pool):                                               # all different while the pool lasts
    return repeated([pool[i] for i in torch.randperm(len(pool)).tolist()], n)


def check_ids(ids, model):
    """UserError unless ids, if there are any, are a list of token ids of this model."""
    vocab_size = model.config.vocab_size
    known = ids is None or isinstance(ids, (list, tuple, range)) and all(
        isinstance(i, Integral) and 0 <= i < vocab_size for i in ids)
    if not known:
        raise UserError(f"a soft prompt cannot start from the ids {ids!r:.80}; this model's go from 0 to "
                        f"{vocab_size - 1}")


@torch.no_grad()
def soft_start(model, n, init, ids):
    """The embeddings (P, C), fp32, that virtual tokens start from. Raises UserError for an unknown init."""
    wte = model.wte.weight.float()
    for label in ids or () if init == "labels" else [ids]:
        check_ids(label, model)
    common = range(min(COMMON, model.config.vocab_size))
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
        raise UserError(f"num_virtual_tokens is {n}, but each of the {len(ids)} labels needs one; raise it")
    labels = torch.stack([wte[label].mean(0) for label in ids])             # a label may be several tokens
    return torch.cat((labels, wte[sampled(n - len(ids), common)]))


@torch.no_grad()
def kv_start(model, n, init, ids):
    """The keys and values (P, 2 L nkv hs), fp32, that a prefix starts from, and its gate or None.

    Raises UserError for an unknown init.
    """
    device = model.wte.weight.device
    c = model.config
    check_ids(ids, model)
    if init == "zero":
        return torch.zeros(n, kv_width(c)).to(device), None
    if init == "random":
        return torch.randn(n, kv_width(c)).to(device), None
    if init not in ("text", "gated"):
        raise UserError(f"init {init!r} is unknown; a prefix starts from text, zero, random or gated")
    ids = repeated(ids, n) if ids else sampled(n, range(min(COMMON, c.vocab_size)))
    _, past = model.hidden_states(torch.tensor([ids], device=device))
    kv = torch.stack([torch.stack((entry.k, entry.v)) for entry in past])   # (L, 2, 1, nkv, P, hs)
    gate = nn.Parameter(torch.zeros(c.n_layer, c.n_head, 1, 1, device=device)) if init == "gated" else None
    return kv[:, :, 0].permute(3, 0, 1, 2, 4).flatten(1).float(), gate


def reorder_keys(table, c, order):
    """A table of keys and values (P, 2 L nkv hs) with its keys as families store heads; order: to_stored or
    from_stored."""
    kv = table.detach().view(len(table), c.n_layer, 2, c.n_kv_head, c.head_size)
    keys = order(kv[:, :, 0].movedim(-1, 0), key_order(c)).movedim(0, -1)
    return torch.stack((keys, kv[:, :, 1]), 2).flatten(1)


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

    A prefix has no embeddings: its values in layer 0 are compared with those that each token would have
    there. `start`: the numbers before training (the constructor makes them again); "moved" is a row's
    distance.
    """
    table = prompt.prompt_embeddings().float()
    block = model.blocks[0]
    vocabulary = model.embed(torch.arange(model.config.vocab_size, device=table.device))    # (V, C)
    soft = prompt.holds == "embeddings"
    rows = table if soft else as_past(table, model)[0].v[0].transpose(0, 1).flatten(1)
    nearest = []
    for j, row in enumerate(rows):
        words = vocabulary
        if not soft:
            placed = vocabulary if model.wpe is None else vocabulary + model.wpe.weight[j]
            words = block.attn.v(block.ln_1(placed))                                        # (V, nkv hs)
        words = words.float()
        scores = {"cosine": F.cosine_similarity(words, row[None]), "dot": words @ row}
        near = {name: [(int(i), float(s[i])) for i in s.topk(min(k, len(s))).indices] for name, s in scores.items()}
        moved = None if start is None else float((table[j] - start[j]).norm())
        nearest.append({**near, "moved": moved})
    return nearest


def prompt_type_of(prompt_class):
    """The peft_type of a soft prompt's folder; one that peft does not have gets a name that peft refuses."""
    return prompt_class.peft_type or "PLAINTUNE_" + prompt_class.__name__.upper()


def save_prompt(prompt, folder, base=""):
    """Write the virtual tokens as peft does, in fp32; an encoder is not in the file (to train on, keep
    state_dict()).

    peft ignores a prompt without task_type, so it is always there. Templates and gates it does not know: they
    get a peft_type of their own, which it refuses, not one that it would run as something else. A soft prompt
    with peft_type None is written as its state dict and the arguments that it was built with.
    """
    config = dict(peft_type=prompt_type_of(type(prompt)), task_type="CAUSAL_LM",
                  base_model_name_or_path=str(base), inference_mode=True,
                  num_virtual_tokens=prompt.num_virtual_tokens)
    if prompt.peft_type is None:
        config["settings"] = prompt.settings
        tensors = prompt.state_dict()
    else:
        tensors = {"prompt_embeddings": prompt.prompt_embeddings()}
        c = prompt.config
        soft = prompt.holds == "embeddings"
        if not soft:
            tensors["prompt_embeddings"] = reorder_keys(tensors["prompt_embeddings"], c, to_stored)
        config.update(num_transformer_submodules=1, num_layers=c.n_layer,
                      num_attention_heads=c.n_head if soft else c.n_kv_head,
                      token_dim=c.n_embd if soft else c.n_kv_head * c.head_size)
        if prompt.peft_type == "P_TUNING":
            config["encoder_hidden_size"] = c.n_embd                # peft builds an encoder and never uses it
        if prompt.template:
            config.update(peft_type="TEMPLATE_PROMPT", template=prompt.template)
        if not soft and prompt.gate is not None:
            config["peft_type"] = "GATED_PREFIX"
            tensors["gate"] = prompt.gate
    folder = pathlib.Path(folder)
    write_tensors(folder / "adapter_model.safetensors", {n: t.detach().float() for n, t in tensors.items()})
    write_json(folder / "adapter_config.json", config)


def load_prompt(model, folder):
    """A folder that save_prompt or peft wrote -> a soft prompt without encoder and dropout, in eval mode.

    Embeddings come back as PromptTuning, keys and values as PTuningV2, a class that peft does not have as
    itself. Raises DataError.
    """
    path = pathlib.Path(folder) / "adapter_config.json"
    file = pathlib.Path(folder) / "adapter_model.safetensors"
    config = read_adapter_config(folder)
    tensors = read_tensors(file)
    if not all(t.is_floating_point() and t.isfinite().all() for t in tensors.values()):
        raise DataError(f"{file}: some numbers are not finite floats; train this prompt again")
    for method in METHODS:
        if method.prompt_class.peft_type is None and config.get("peft_type") in method.peft_types:
            return load_own_prompt(model, method.prompt_class, config, tensors, file)
    return load_peft_prompt(model, config, tensors, path, file)


def load_own_prompt(model, prompt_class, config, tensors, file):
    try:
        prompt = prompt_class(model, **config["settings"])
        prompt.settings = config["settings"]
        prompt.load_state_dict(tensors)
    except (KeyError, TypeError, ValueError, RuntimeError) as e:
        raise DataError(f"{file} does not fit {prompt_class.__name__}: {' '.join(str(e).split())}") from None
    return prompt.eval()


def load_peft_prompt(model, config, tensors, path, file):
    c = model.config
    known = ("PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "TEMPLATE_PROMPT", "GATED_PREFIX")
    peft_type = config.get("peft_type")
    n = config.get("num_virtual_tokens")
    template = config.get("template")
    if peft_type not in known:
        raise DataError(f"{path}: peft_type {peft_type!r} is not read as a soft prompt; {', '.join(known)} "
                        "are")
    if (template is not None) != (peft_type == "TEMPLATE_PROMPT"):
        raise DataError(f"{path}: peft_type is {peft_type} and template {template!r}; TEMPLATE_PROMPT, and "
                        "no other soft prompt, has a template")
    if config.get("task_type", "CAUSAL_LM") != "CAUSAL_LM":
        raise DataError(f"{path}: a soft prompt of task_type {config['task_type']} is not read here; that of "
                        "a language model, CAUSAL_LM, is")
    soft = "PREFIX" not in peft_type
    want = {"prompt_embeddings": [n, c.n_embd if soft else kv_width(c)]}
    if peft_type == "GATED_PREFIX":
        want["gate"] = [c.n_layer, c.n_head, 1, 1]
    have = {name: list(t.shape) for name, t in tensors.items()}
    if have != want:
        raise DataError(f"{file}: the tensors are {have}; {peft_type} over this model has {want}")
    try:
        if soft:
            prompt = PromptTuning(model, n, "random", template=template)
        else:
            prompt = PTuningV2(model, n, "gated" if "gate" in want else "zero", prefix_dropout=0.0)
        if template is not None:
            parse_template(template, lambda words: [])
    except UserError as e:
        raise DataError(f"{path}: {e}") from None
    tensors["embedding"] = tensors.pop("prompt_embeddings")
    if not soft:
        tensors["embedding"] = reorder_keys(tensors["embedding"], c, from_stored)
    prompt.load_state_dict(tensors)
    return prompt.eval()


# ---------------------------------------------------------------------------------------- flags and records

def check_init_text(cfg):
    if cfg.prompt_init_text and cfg.prompt_init in ("random", "zero", "labels"):
        raise UserError(f"--prompt_init_text is not read by --prompt_init {cfg.prompt_init}")


@dataclass(frozen=True)
class EmbeddingFlags:
    """virtual tokens"""
    num_virtual_tokens: int = flag(20, "how many", low=1)
    prompt_init: str = flag("vocab", "what the embeddings start from",
                            choices=("vocab", "text", "labels", "random"))
    prompt_init_text: str = flag(None, "the words for --prompt_init text or vocab; default: common tokens",
                                 type=str)
    check = staticmethod(check_init_text)


@dataclass(frozen=True)
class KeyValueFlags:
    """virtual tokens"""
    num_virtual_tokens: int = flag(20, "how many", low=1)
    prompt_init: str = flag("text", "what keys and values start from",
                            choices=("text", "zero", "random", "gated"))
    prompt_init_text: str = flag(None, "the words for --prompt_init text; default: common tokens", type=str)
    check = staticmethod(check_init_text)


@dataclass(frozen=True)
class TemplateFlags:
    """virtual tokens"""
    prompt_template: str = flag(None, 'front, or a template: "{prompt} {p}", "{p:3} {prompt} {p:3}"',
                                type=str)


def method_name(prompt):
    """The --method that trains a soft prompt of this class."""
    return next(method.name for method in METHODS if method.prompt_class is type(prompt))


@dataclass(frozen=True)
class PromptMethod:
    """A --method that trains a soft prompt over a frozen model."""
    name: str
    help: str
    prompt_class: type
    flags: tuple                                    # groups of flags that every task reads
    defaults: dict  # of flags, where this method's first run needs another value
    loop_flags: tuple = ()                          # groups that only the supervised loop reads
    template_flags: tuple = ()                      # groups that only tasks with a text to stand in read
    rate_falls: bool = False                        # the default rate falls with the model's width
    refuses: dict = field(default_factory=dict)     # {task: why this method does not do it}
    critic_lr: float = 5e-3                         # of PPO's critic, a LoRA: --lr suits virtual tokens
    allocator = None
    selected_by = "method"
    trains = True
    trains_base = False
    mergeable = False

    @property
    def peft_types(self):
        extra = {"PROMPT_TUNING": ("TEMPLATE_PROMPT",), "PREFIX_TUNING": ("GATED_PREFIX",)}
        peft_type = prompt_type_of(self.prompt_class)
        return (peft_type, *extra.get(peft_type, ()))

    def apply(self, ctx, cfg, log):
        """Freeze the model, make (or go on with) the soft prompt. Returns {name: trainable parameter}.

        Raises UserError if ctx.prompt is a prompt of another class.
        """
        ctx.model.requires_grad_(False)
        if ctx.prompt is None:
            ctx.prompt = self.make_prompt(ctx, cfg).to(ctx.device).eval()       # the loop switches dropout on
        else:
            self.check_continued(ctx.prompt, cfg)
        for p in ctx.prompt.parameters():
            p.requires_grad_()
        return {f"prompt.{name}": p for name, p in ctx.prompt.named_parameters()}

    def check_continued(self, prompt, cfg):
        if type(prompt) is not self.prompt_class:
            raise UserError(f"--init {cfg.init} is a soft prompt, which only --method {method_name(prompt)} "
                            "can continue")
        given = [name for name in ("num_virtual_tokens", "prompt_init", "prompt_init_text", "prompt_template")
                 if name in cfg.given]
        if given and (given != ["num_virtual_tokens"] or cfg.num_virtual_tokens != prompt.num_virtual_tokens):
            raise UserError(f"--{' and --'.join(given)} would shape a new soft prompt; --init {cfg.init} brings its "
                            f"own, of {prompt.num_virtual_tokens} virtual tokens")
        if "prefix_dropout" in cfg:                     # no part of what is stored
            prompt.dropout = cfg.prefix_dropout

    def make_prompt(self, ctx, cfg):
        settings = dict(num_virtual_tokens=cfg.num_virtual_tokens, seed=cfg.seed)
        if "prompt_init" in cfg:                        # a soft prompt may have one start only
            settings["init"] = cfg.prompt_init
        if self.prompt_class.options:
            settings.update({f.name: cfg.get(f.name, f.default) for f in fields(self.prompt_class.options)})
        template = cfg.get("prompt_template")
        if template not in (None, "front"):
            settings["template"] = template.replace("{p}", f"{{p:{cfg.num_virtual_tokens}}}")
        ids = None
        if cfg.get("prompt_init") == "labels":
            ids = [ctx.text.tokenizer.encode(label) for label in ctx.text.labels]
        elif cfg.get("prompt_init_text"):
            ids = ctx.text.tokenizer.encode(cfg.prompt_init_text)
        prompt = self.prompt_class(ctx.model, ids=ids, **settings)
        prompt.settings = settings
        if prompt.template:
            ctx.text.soft_prompt_ids = prompt.template_ids(ctx.text.tokenizer.encode)
        return prompt

    def param_groups(self, ctx, cfg, trainable):
        """One group: virtual tokens do not decay."""
        return [dict(params=list(trainable.values()), lr=cfg.lr, weight_decay=0.0)]

    def detach_past(self, past):
        return detach_for_accumulation(past)

    def save(self, ctx, folder, base):
        save_prompt(ctx.prompt, folder, base=base)

    def load(self, model, folder, settings):
        """The soft prompt of an adapter folder. Raises DataError on another base than it was trained on."""
        require_base(model, folder, settings)
        return load_prompt(model, folder)

    def run_settings(self, ctx, cfg):
        return {"base_fingerprint": base_fingerprint(ctx.model)}

    def cost(self, cfg, n_layer):
        """What data/results/cost_model.py needs to know."""
        return dict(kind="prompt")


METHODS = (
    PromptMethod("prompt_tuning", "input embeddings", PromptTuning, flags=(EmbeddingFlags,),
                 template_flags=(TemplateFlags,),
                 defaults=dict(lr=0.1, beta2=0.95, epochs=9.0, batch=8, num_virtual_tokens=40,
                               prompt_template="{prompt} {p}")),
    PromptMethod("p_tuning", "input embeddings through an encoder", PTuning,
                 flags=(EmbeddingFlags, PTuningFlags), template_flags=(TemplateFlags,),
                 defaults=dict(lr=6e-3, beta2=0.95, epochs=12.0, num_virtual_tokens=40,
                               prompt_template="{prompt} {p}")),
    PromptMethod("prefix_tuning", "per-layer keys and values through an MLP", PrefixTuning,
                 flags=(KeyValueFlags, PrefixFlags),
                 defaults=dict(lr=1e-3, beta2=0.95, epochs=10.0), rate_falls=True),
    PromptMethod("p_tuning_v2", "per-layer keys and values, direct", PTuningV2, flags=(KeyValueFlags,),
                 loop_flags=(PTuningV2Flags,),
                 defaults=dict(lr=3e-2, beta2=0.95, epochs=10.0)),
)
