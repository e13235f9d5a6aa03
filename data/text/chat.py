r"""data/text/chat.py: conversations -> token ids and loss mask, for training, scoring and generation.

    chatml   <|im_start|>ROLE \n CONTENT <|im_end|> \n                                    Qwen, SmolLM2
    llama3   <|begin_of_text|> <|start_header_id|>ROLE<|end_header_id|> \n\n CONTENT <|eot_id|>
    alpaca   a preamble, then "### Instruction:" and "### Response:" as plain text        any base model
    plain    start, prompt, answer, end; prompt, answer, end; ... with nothing between    completions

    messages [{"role", "content", "weight"?}]  ->  ids [int], mask [bool]

mask[i] is true where token i is a *target*: an assistant's content and the end token behind it, unless the
message has weight 0.

- Content is encoded as text, and special tokens are added by id. Text that looks like a special token stays
  text, and a start token appears once.
- An answer is encoded separately from what precedes it, so that its first token is the same in training,
  where the answer is known, and in generation, where it is not: prompt(messages[:-1]) is a prefix of
  render(messages), token for token. All other text between two special tokens is encoded as one string, which
  is what the Jinja templates of `transformers` do.
- The default system message is read from the tokenizer's own chat_template (SmolLM2 and Qwen2.5 have one).
- plain and alpaca start with the tokenizer's BOS, or else its EOS: in pre-training that token precedes a
  document, and without it the first token after an empty prompt would have no context. In plain, adjacent
  system and user texts are joined by a newline, and an answer gets a leading space unless it begins with
  white space.
- llama3 strips contents, as the original does. Deviation: Llama 3.1's system message has no dates here.

Public: TEMPLATES, SPECIAL_TOKENS, PREAMBLE, guess_template, render, prompt, answer, end_token, truncate_left,
fit_to_length
"""
import itertools
import re

from data.runtime.files import DataError, UserError

TEMPLATES = ("chatml", "llama3", "alpaca", "plain")
SPECIAL_TOKENS = {"chatml": ("<|im_start|>", "<|im_end|>"),
                  "llama3": ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")}
PREAMBLE = ("Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.")
ALPACA_HEADINGS = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}


# ---- templates ---------------------------------------------------------------------------------------------
def guess_template(tokenizer):
    """The name of the template whose special tokens the tokenizer has; "plain" for a base model."""
    for template, tokens in SPECIAL_TOKENS.items():
        if all(token in tokenizer.special for token in tokens):
            return template
    return "plain"


def _special_ids(template, tokenizer):
    """The ids of SPECIAL_TOKENS[template]; for alpaca and plain the ids that start and end a document.

    Raises UserError for an unknown template, or one whose tokens the tokenizer lacks.
    """
    if template not in TEMPLATES:
        raise UserError(f"unknown chat template {template!r}; known are {', '.join(TEMPLATES)}")
    if template in SPECIAL_TOKENS:
        for token in SPECIAL_TOKENS[template]:
            if token not in tokenizer.special:
                raise UserError(f"the template {template} needs the token {token}, which this tokenizer "
                                f"lacks; use --template {guess_template(tokenizer)}")
        return [tokenizer.special[token] for token in SPECIAL_TOKENS[template]]
    if tokenizer.eos is None:
        raise UserError(f"the template {template} ends answers with the end-of-text token, and this "
                        "tokenizer names none")
    # SmolLM2 names <|im_start|> as its BOS; it starts a turn, not a document.
    if tokenizer.bos in (None, tokenizer.special.get("<|im_start|>")):
        return [tokenizer.eos, tokenizer.eos]
    return [tokenizer.bos, tokenizer.eos]


def end_token(template, tokenizer):
    """The id of the token that ends an answer: a target in training, and where generation stops."""
    return _special_ids(template, tokenizer)[-1]


def _default_system(template, tokenizer):
    """The system text of a conversation without a system message; "" for none."""
    if template == "alpaca":
        return PREAMBLE
    if template != "chatml":
        return ""
    system_text = r"<\|im_start\|>system(?:\n|\\n)([^'\"{}<]+)<\|im_end\|>"
    match = re.search(system_text, str(tokenizer.chat_template))
    return match[1] if match else ""


# One function per template: (role, previous role or None, special ids) -> what stands before the content, the
# end token, what follows it. Each is a list of ids (int) and texts (str).
def _chatml_turn(role, previous, special):
    start, end = special
    return [start, f"{role}\n"], [end], ["\n"]


def _llama3_turn(role, previous, special):
    _, start_header, end_header, end = special
    return [start_header, role, end_header, "\n\n"], [end], []


def _alpaca_turn(role, previous, special):
    separator = "" if previous is None else "\n\n"
    end = [special[1]] if role == "assistant" else []
    return [separator + ALPACA_HEADINGS[role]], end, []


def _plain_turn(role, previous, special):
    joined = previous in ("system", "user") and role != "assistant"
    end = [special[1]] if role == "assistant" else []
    return ["\n" if joined else ""], end, []


TURNS = {"chatml": _chatml_turn, "llama3": _llama3_turn, "alpaca": _alpaca_turn, "plain": _plain_turn}


def _content(text, template, role):
    """A message's content as it is encoded."""
    if template == "llama3":
        return text.strip()
    if template == "plain" and role == "assistant" and not text[:1].isspace():
        return " " + text
    return text


# ---- rendering ---------------------------------------------------------------------------------------------
def _pieces(messages, template, special, open_answer):
    """[(id or text, target)]: target is True or False inside an answer, None elsewhere.

    The difference between False and None keeps an answer of weight 0 separate from the text before it.
    open_answer: end with the opening of one more assistant message.
    """
    turn = TURNS[template]
    pieces = []
    if template != "chatml":
        pieces.append((special[0], None))
    previous = None
    for message in messages:
        role = message["role"]
        target = bool(message.get("weight", 1)) if role == "assistant" else None
        before, end, after = turn(role, previous, special)
        pieces += [(piece, None) for piece in before]
        pieces.append((_content(message["content"], template, role), target))
        pieces += [(piece, target) for piece in end]
        pieces += [(piece, None) for piece in after]
        previous = role
    if open_answer:
        before, _, _ = turn("assistant", previous, special)
        pieces += [(piece, None) for piece in before]
    return pieces


def _encode(messages, template, tokenizer, system, open_answer):
    """(ids, mask) of a conversation."""
    special = _special_ids(template, tokenizer)
    if system is None:
        system = _default_system(template, tokenizer)
    has_system = messages and messages[0]["role"] == "system"
    if system and not has_system:
        messages = [{"role": "system", "content": system}, *messages]
    ids = []
    mask = []
    pieces = _pieces(messages, template, special, open_answer)
    # Neighbouring texts are encoded as one string; an answer is never joined with what is around it.
    for (piece_type, target), run in itertools.groupby(pieces, lambda piece: (type(piece[0]), piece[1])):
        values = [value for value, _ in run]
        new_ids = tokenizer.encode("".join(values)) if piece_type is str else values
        ids += new_ids
        mask += [bool(target)] * len(new_ids)
    return ids, mask


def render(messages, template, tokenizer, system=None):
    """(ids, mask) of a whole conversation.

    system: the text for conversations without a system message. None: the tokenizer's default; "": none.
    Raises UserError for a template that is unknown or does not fit the tokenizer.
    """
    return _encode(messages, template, tokenizer, system, open_answer=False)


def prompt(messages, template, tokenizer, system=None):
    """ids of a conversation up to where the assistant's next content begins. Raises as render does."""
    ids, _ = _encode(messages, template, tokenizer, system, open_answer=True)
    return ids


def answer(text, template, tokenizer):
    """ids of an answer and its end token: what follows prompt(...)."""
    return [*tokenizer.encode(_content(text, template, "assistant")), end_token(template, tokenizer)]


# ---- length ------------------------------------------------------------------------------------------------
def truncate_left(ids, limit):
    """The last `limit` ids, except that the first id (the start token) is kept."""
    if len(ids) <= limit:
        return ids
    return ids[:1] + ids[len(ids) - limit + 1:]


def fit_to_length(ids, mask, limit, too_long="truncate", location="an example"):
    """(ids, mask) of at most `limit` tokens; None for an example to drop.

    too_long   "truncate", "drop" (returns None) or "error" (raises DataError) Truncation cuts the prompt
    (everything before the first target) on the left and the rest on the right. Each is guaranteed half of
    the limit and may use what the other does not need, so that both keep some tokens. The first token is
    kept, because a model is trained with its start token. A cut answer has no end token. Raises UserError
    for a limit below 2.
    """
    if limit < 2:
        raise UserError(f"only {limit} tokens are left for an example, at least 2 are needed; use a larger "
                        "--block_size or fewer virtual tokens")
    if len(ids) <= limit:
        return ids, mask
    if too_long == "error":
        raise DataError(f"{location} has {len(ids)} tokens, and {limit} fit; shorten it, or use "
                        "--too_long truncate")
    if too_long == "drop":
        return None
    prompt_len = mask.index(True) if True in mask else len(ids)
    rest_len = min(len(ids) - prompt_len, max(limit // 2, limit - prompt_len))
    cut = max(0, prompt_len + rest_len - limit)         # tokens to remove from the prompt, behind the first
    kept = [0, *range(cut + 1, prompt_len + rest_len)]
    return [ids[i] for i in kept], [mask[i] for i in kept]
