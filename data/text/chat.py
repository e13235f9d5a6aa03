r"""data/text/chat.py: conversations -> token ids and loss mask; a model is asked with what it was trained on.

    chatml   <|im_start|>role \n content <|im_end|> \n                                    Qwen, SmolLM2
    llama3   <|begin_of_text|> <|start_header_id|>role<|end_header_id|> \n\n content <|eot_id|>
    alpaca   a preamble, then "### Instruction:" and "### Response:" in plain text        any base model
    plain    start, prompt, answer, end; prompt, answer, end; ...  nothing in between     completions

mask[i] is true where token i is *to be predicted*: an answer and its end token, unless its weight is 0.

- Text is encoded as text and marks are added by id: no text can forge a mark, and a start token comes once.
- An answer is encoded apart from what precedes it, so its first token is the same in training, where it is
  known, as in generation, where it is not: prompt(messages[:-1]) begins render(messages), token for token.
  All else between two marks is encoded as one string, which is what Jinja templates do.
- A default system text is read from the tokenizer's own chat_template (SmolLM2 and Qwen2.5 have one).
- plain and alpaca start with the tokenizer's BOS, or else its EOS: in pre-training it precedes a document,
  and without it nothing could predict the first token after an empty prompt. In plain, neighbouring texts of
  system and user are joined by a newline, and an answer brings a blank unless it begins with white space.
- llama3 strips contents, like the original; the dates in Llama 3.1's system turn are left out.

Public: TEMPLATES, guess, render, prompt, answer, end_token, fit
"""
import itertools
import re

from data.runtime.files import DataError, UserError

TEMPLATES = ("chatml", "llama3", "alpaca", "plain")
MARKS = {"chatml": ("<|im_start|>", "<|im_end|>"),
         "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}
PREAMBLE = ("Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.")


def guess(tokenizer):
    """The template whose marks the tokenizer has; plain for a base model."""
    return next((name for name, marks in MARKS.items() if tokenizer.special.keys() >= set(marks)), "plain")


def _marks(template, tokenizer):
    """The ids of a template's marks, as in MARKS; for those of plain text, start and end of a document."""
    if template not in TEMPLATES:
        raise UserError(f"{template!r} is no chat template; there are {', '.join(TEMPLATES)}")
    if template in MARKS:
        missing = [mark for mark in MARKS[template] if mark not in tokenizer.special]
        if missing:
            raise UserError(f"the template {template} needs the token {missing[0]}, not in this tokenizer; "
                            f"say --template {guess(tokenizer)}")
        return [tokenizer.special[mark] for mark in MARKS[template]]
    if tokenizer.eos is None:
        raise UserError(f"{template} text ends with an end-of-text token, and this tokenizer names none")
    turn = tokenizer.special.get("<|im_start|>")    # SmolLM2 calls it its BOS; it opens turns, not documents
    return [tokenizer.eos if tokenizer.bos in (None, turn) else tokenizer.bos, tokenizer.eos]


def end_token(template, tokenizer):
    """The token that ends an answer: supervised in training, where generation stops."""
    return _marks(template, tokenizer)[-1]


def _default_system(template, tokenizer):
    """What is said for a conversation without a system message."""
    if template == "alpaca":
        return PREAMBLE
    jinja = str(tokenizer.chat_template) if template == "chatml" else ""
    said = re.search(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}<]+)<\|im_end\|>", jinja)
    return said[1] if said else ""


def _turn(role, last, template, marks):
    """What precedes a turn's content, its end token, what follows: ids and texts. `last`: the role before."""
    if template == "chatml":
        return [marks[0], f"{role}\n"], [marks[1]], ["\n"]
    if template == "llama3":
        return [marks[1], role, marks[2], "\n\n"], [marks[3]], []
    end = [marks[1]] if role == "assistant" else []
    if template == "alpaca":
        heading = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}[role]
        return ["\n\n" * bool(last) + heading], end, []
    return ["\n" * (last in ("system", "user") and role != "assistant")], end, []


def _content(text, template, role):
    """A turn's text as it is encoded. A plain answer follows its prompt as a word follows a word."""
    if template == "plain" and role == "assistant" and not text[:1].isspace():
        return " " + text
    return text.strip() if template == "llama3" else text


def _compose(messages, template, tokenizer, system, speak):
    """ids and mask of the conversation and, to `speak`, of the opening of one more answer."""
    marks = _marks(template, tokenizer)
    system = _default_system(template, tokenizer) if system is None else system
    if system and (not messages or messages[0]["role"] != "system"):
        messages = [{"role": "system", "content": system}, *messages]
    pieces = [(marks[0], None)] if template != "chatml" else []     # (id or text, learn it?), None: no answer
    last = None
    for m in messages:
        learn = bool(m.get("weight", 1)) if m["role"] == "assistant" else None
        before, end, after = _turn(m["role"], last, template, marks)
        content = _content(m["content"], template, m["role"])
        pieces += [(piece, None) for piece in before]
        pieces += [(content, learn), *((mark, learn) for mark in end)]
        pieces += [(piece, None) for piece in after]
        last = m["role"]
    if speak:
        pieces += [(piece, None) for piece in _turn("assistant", last, template, marks)[0]]
    ids, mask = [], []
    for (kind, learn), run in itertools.groupby(pieces, lambda piece: (type(piece[0]), piece[1])):
        run = [piece for piece, _ in run]
        ids += tokenizer.encode("".join(run)) if kind is str else run
        mask += [bool(learn)] * (len(ids) - len(mask))
    return ids, mask


def render(messages, template, tokenizer, system=None):
    """ids, mask of a conversation. system: for those that bring none; None: the tokenizer's own; "": none."""
    return _compose(messages, template, tokenizer, system, speak=False)


def prompt(messages, template, tokenizer, system=None):
    """ids of the conversation so far, up to where the assistant's next content begins."""
    return _compose(messages, template, tokenizer, system, speak=True)[0]


def answer(text, template, tokenizer):
    """ids of an answer with its end token: what follows prompt(...)."""
    return [*tokenizer.encode(_content(text, template, "assistant")), end_token(template, tokenizer)]


def shorter(ids, limit):
    """The end of a prompt, behind its first token, which stays as it does in `fit`."""
    return ids if len(ids) <= limit else ids[:1] + ids[len(ids) - limit + 1:]


def fit(ids, mask, limit, too_long="truncate", at="an example"):
    """(ids, mask) of at most `limit` tokens; None for an example to drop.

    Truncation cuts the prompt (all before the first supervised token) from the left, the rest from the right.
    Each may count on half of the limit and has what the other leaves, so neither ever goes altogether. The
    first token stays: a model without its start token is another model. A cut answer has no end token.
    """
    if limit < 2:
        raise UserError(f"{limit} tokens are no room for an example; allow more, or fewer virtual ones")
    if len(ids) <= limit:
        return ids, mask
    if too_long == "error":
        raise DataError(f"{at} has {len(ids)} tokens, {limit} fit; shorten it, or say --too_long truncate")
    if too_long == "drop":
        return None
    asked = mask.index(True) if True in mask else len(ids)
    said = len(ids) - asked
    said = min(said, max(limit // 2, limit - asked))
    cut = max(0, asked + said - limit)                  # tokens to lose on the left, behind the first
    keep = [0, *range(cut + 1, asked + said)]
    return [ids[i] for i in keep], [mask[i] for i in keep]
