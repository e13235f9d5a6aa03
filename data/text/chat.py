r"""data/text/chat.py: conversations -> token ids and loss mask, for training, scoring and generation.

    chatml   <|im_start|>ROLE \n CONTENT <|im_end|> \n                                    Qwen2, SmolLM2
    qwen3    chatml, and <think> \n\n </think> \n\n before the last answer                Qwen3
    llama3   <|begin_of_text|> <|start_header_id|>ROLE<|end_header_id|> \n\n CONTENT <|eot_id|>
    glm4     [gMASK] <sop> <|ROLE|> \n CONTENT, an answer ends where <|user|> would follow  GLM-4, GLM-Edge
    alpaca   a preamble, then "### Instruction:" and "### Response:" as plain text        any base model
    plain    start, prompt, answer, end; prompt, answer, end; ... with nothing between    completions
    raw      plain with the start that the tokenizer itself adds to a text, often none    SEQ_CLS adapters

    messages [{"role", "content", "weight"?}]  ->  ids [int], mask [bool]

mask[i] is true where token i is a *target*: an assistant's content and the end token behind it, unless the
message has weight 0.

- Content is encoded as text, and special tokens are added by id. Text that looks like a special token stays
  text, and a start token appears once.
- An answer is encoded separately from what precedes it, so that its first token is the same in training,
  where the answer is known, and in generation, where it is not: prompt(messages[:-1]) is a prefix of
  render(messages), token for token. All other text between two special tokens is encoded as one string, which
  is what the Jinja templates of `transformers` do.
- A model's own chat_template (jinja.py renders it) decides what differs between models of one template: a
  default system message, text before the first one (the dates of Llama 3.1), BOS first (Hermes), no
  newline behind <|im_end|>. Where its texts still differ from ours, `note` says how.
- plain and alpaca start with the tokenizer's BOS, or else its EOS: in pre-training that token precedes a
  document, and without it the first token after an empty prompt would have no context. In plain, adjacent
  system and user texts are joined by a newline, and an answer gets a leading space unless it begins with
  white space.
- llama3 strips contents, as the original does. qwen3 answers without reasoning (enable_thinking=False) and
  drops the reasoning of earlier answers, as the original does.
- glm4 has no end token: what ends an answer is the <|user|> that opens the next question. It is a target, it
  stands behind the last answer, too, and a chat_template does not write it there.
- `export` writes what a model was trained with for `transformers`: apply_chat_template gives the ids of
  `prompt`, and tokenizer(text) begins with the same start token.

Public: ChatTemplate, TEMPLATES, PREAMBLE, guess_template, fits, note, export, render, prompt, answer,
end_token, start_length, truncate_left, fit_to_length
"""
import functools
import itertools
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from data.runtime.files import DataError, UserError
from data.runtime.records import find_record
from data.text import jinja

PREAMBLE = ("Below is an instruction that describes a task. "
            "Write a response that appropriately completes the request.")


# ---- templates ---------------------------------------------------------------------------------------------
@dataclass(frozen=True)
class ChatTemplate:
    """One way to write conversations. A message is before(...), its content(...), and its ending."""
    selected_by = "template"
    name: str                       # the value of --template
    tokens: tuple                   # the special tokens it needs, the one that ends an answer last
    before: Callable                # (role, previous role or None, is last) -> texts and tokens
    content: Callable               # (text, role, is last) -> the text that is encoded
    jinja: str                      # the same for transformers; knows start, system, prefix, separator, end
    start: tuple = ()               # the tokens that stand first
    system: str = ""                # the system text of conversations without a system message
    separator: str = ""             # what stands behind an end token
    document: bool = False          # plain text that starts and ends as a document; only answers have an end
    own_start: bool = False         # a document starts as the tokenizer starts a text
    opens_user: bool = False        # only answers have an end token, and it opens the user's next turn


class Style(NamedTuple):
    """What differs between models of one ChatTemplate, as texts."""
    start: str                      # the tokens that stand first, or ""
    end: str                        # the end token
    system: str                     # the system text of conversations without a system message
    separator: str                  # what stands behind an end token
    prefix: str = ""                # stands before the first system text, and makes one where there is none


def _chatml_before(role, previous, last):
    return ["<|im_start|>", f"{role}\n"]


def _qwen3_before(role, previous, last):
    thought = ["<think>", "\n\n", "</think>", "\n\n"] if role == "assistant" and last else []
    return ["<|im_start|>", f"{role}\n", *thought]


def _llama3_before(role, previous, last):
    return ["<|start_header_id|>", role, "<|end_header_id|>", "\n\n"]


def _glm4_before(role, previous, last):
    if role == "assistant":
        return ["<|assistant|>"]                        # the newline is the first token of an answer
    return ["\n"] if previous == "assistant" and role == "user" else [f"<|{role}|>", "\n"]


def _alpaca_before(role, previous, last):
    heading = {"system": "", "user": "### Instruction:\n", "assistant": "### Response:\n"}[role]
    return [heading if previous is None else "\n\n" + heading]


def _plain_before(role, previous, last):
    joined = previous in ("system", "user") and role != "assistant"
    return ["\n" if joined else ""]


def _unchanged(text, role, last):
    return text


def _qwen3_content(text, role, last):
    if role != "assistant":
        return text
    if "</think>" in text and last:
        raise DataError('an answer holds "</think>", and --template qwen3 writes an empty thought before it; '
                        "use --template chatml to train on reasoning")
    if "</think>" in text:
        return text.rpartition("</think>")[2].lstrip("\n")
    return text.lstrip("\n") if last else text


def _stripped(text, role, last):
    return text.strip()


def _glm4_content(text, role, last):
    return "\n" + text if role == "assistant" else text


def _plain_content(text, role, last):
    return " " + text if role == "assistant" and not text[:1].isspace() else text


# The templates for transformers. `export` puts the assignments of a Style in front: start, end, system, ...
FIRST_LINES = """\
{%- if (system or prefix) and (not messages or messages[0]['role'] != 'system') %}
    {%- set messages = [{'role': 'system', 'content': system}] + messages %}
{%- endif %}
{{- start }}
{%- for message in messages %}
    {%- set role = message['role'] %}
    {%- set content = message['content'] %}
"""
CHATML = FIRST_LINES + r"""
    {{- '<|im_start|>' + role + '\n' }}
    {{- prefix if role == 'system' and loop.first else '' }}
    {{- content + end + separator }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""
QWEN3 = FIRST_LINES + r"""
    {%- if role == 'assistant' and '</think>' in content %}
        {%- set content = content.split('</think>')[-1].lstrip('\n') %}
    {%- endif %}
    {%- if role == 'assistant' and loop.last and not add_generation_prompt %}
        {%- set content = '<think>\n\n</think>\n\n' + content.lstrip('\n') %}
    {%- endif %}
    {{- '<|im_start|>' + role + '\n' }}
    {{- prefix if role == 'system' and loop.first else '' }}
    {{- content + end + separator }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}
{%- endif %}"""
LLAMA3 = FIRST_LINES + r"""
    {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' }}
    {{- prefix if role == 'system' and loop.first else '' }}
    {{- content | trim + end + separator }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}
{%- endif %}"""
GLM4 = FIRST_LINES + r"""
    {{- '<|' + role + '|>\n' }}
    {{- prefix if role == 'system' and loop.first else '' }}
    {{- content }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>' }}
{%- endif %}"""
ALPACA = FIRST_LINES + r"""
    {{- '' if loop.first else '\n\n' }}
    {%- if role == 'user' %}
        {{- '### Instruction:\n' + content }}
    {%- elif role == 'assistant' %}
        {{- '### Response:\n' + content + end }}
    {%- else %}
        {{- content }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- ('\n\n' if messages else '') + '### Response:\n' }}
{%- endif %}"""
PLAIN = FIRST_LINES + r"""
    {%- if role == 'assistant' %}
        {{- (' ' if content[:1] == content[:1] | trim else '') + content + end }}
    {%- else %}
        {%- if not loop.first and messages[loop.index0 - 1]['role'] != 'assistant' %}
            {{- '\n' }}
        {%- endif %}
        {{- content }}
    {%- endif %}
{%- endfor %}"""

IM = ("<|im_start|>", "<|im_end|>")
TEMPLATES = (
    ChatTemplate("chatml", IM, _chatml_before, _unchanged, CHATML, separator="\n"),
    ChatTemplate("qwen3", ("<think>", "</think>", *IM), _qwen3_before, _qwen3_content, QWEN3, separator="\n"),
    ChatTemplate("llama3", ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
                 _llama3_before, _stripped, LLAMA3, start=("<|begin_of_text|>",)),
    ChatTemplate("glm4", ("[gMASK]", "<sop>", "<|system|>", "<|assistant|>", "<|user|>"), _glm4_before,
                 _glm4_content, GLM4, start=("[gMASK]", "<sop>"), opens_user=True),
    ChatTemplate("alpaca", (), _alpaca_before, _unchanged, ALPACA, system=PREAMBLE, document=True),
    ChatTemplate("plain", (), _plain_before, _plain_content, PLAIN, document=True),
    ChatTemplate("raw", (), _plain_before, _plain_content, PLAIN, document=True, own_start=True),
)


# ---- the template of a model -------------------------------------------------------------------------------
def guess_template(tokenizer):
    """The name of the template that the tokenizer's own chat_template equals, or whose tokens they have.

    "plain" for a base model.
    """
    own = tokenizer.chat_template
    fitting = [record for record in TEMPLATES if not _missing(record, tokenizer)]
    if own:
        for record in fitting:
            if not _style(record, tokenizer)[1]:
                return record.name
    with_tokens = [record for record in fitting if record.tokens]
    named = [record for record in with_tokens if record.tokens[-1] in own]
    return next((record.name for record in named + with_tokens), "plain")


def fits(template, tokenizer):
    """Whether the tokenizer has the tokens of a template. Raises UserError for an unknown one."""
    return _missing(find_record(TEMPLATES, template), tokenizer) is None


def note(template, tokenizer):
    """How the tokenizer's own chat_template differs from a template, as a sentence; "" if it does not."""
    difference = _style(_fitting(template, tokenizer), tokenizer)[1]
    if not difference:
        return ""
    return (f"the model's own chat template is not --template {template}: {difference}; "
            f"--template {template} accepts that, another --template or --system changes it")


def _missing(record, tokenizer):
    """The first token of a template that a tokenizer lacks; None if it has them all."""
    if record.document and tokenizer.eos is None:
        return "end-of-text"
    if record.own_start and (tokenizer.start_ids is None or len(tokenizer.start_ids) > 1):
        return "a start token"
    return next((token for token in record.tokens if token not in tokenizer.special), None)


def _fitting(template, tokenizer):
    """The record of a template. Raises UserError if there is none, or if the tokenizer lacks its tokens."""
    record = find_record(TEMPLATES, template)
    missing = _missing(record, tokenizer)
    if missing == "end-of-text":
        raise UserError(f"the template {template} ends answers with the end-of-text token, and this "
                        "tokenizer names none")
    if missing and record.own_start:
        raise UserError(f"the template {template} takes a text as the tokenizer gives it, and this one adds "
                        "more than a start token; use another --template")
    if missing:
        raise UserError(f"the template {template} needs the token {missing}, which this tokenizer lacks; use "
                        f"--template {guess_template(tokenizer)}")
    return record


def end_token(template, tokenizer):
    """The id of the token that ends an answer: a target in training, and where generation stops."""
    record = _fitting(template, tokenizer)
    return tokenizer.special[_style(record, tokenizer)[0].end]


def _style(record, tokenizer):
    """(Style, how the tokenizer's own chat_template differs, or "") of a template that fits."""
    names = {i: text for text, i in tokenizer.special.items()}
    bos = names.get(tokenizer.bos, "")
    if record.own_start:
        bos = "".join(names[i] for i in tokenizer.start_ids)
    return _read_style(record, tokenizer.chat_template, bos, names.get(tokenizer.eos, ""))


def _turns(*contents):
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant") * 2, contents)]


SYSTEM = {"role": "system", "content": "Be brief."}
PROBES = (                                              # (conversation, whether an answer is opened)
    (_turns("Hi."), True), ([SYSTEM, *_turns("Hi.")], True), (_turns("Hi.", "Yes?"), False),
    ([SYSTEM, *_turns(" 2 + 2?\n", "4", "5 + 5?", "10")], False), (_turns("Hi.", "Yes?", "2 + 2?"), True))


@functools.lru_cache
def _read_style(record, source, bos, eos):
    """(Style, difference) of a template under a chat_template (Jinja, or ""). bos, eos: texts, or ""."""
    # SmolLM2 names it so; it starts a turn, not a document
    if bos == "<|im_start|>" and not record.own_start:
        bos = ""
    if record.document:
        style = Style(bos if record.own_start else bos or eos, eos, record.system, record.separator)
    else:
        style = Style("".join(record.start), record.tokens[-1], record.system, record.separator)
    if not source:
        return style, ""
    values = dict(bos_token=bos, eos_token=eos, enable_thinking=False)
    try:
        if not record.document:
            asked, instructed = (_own_text(source, *probe, values) for probe in PROBES[:2])
            style = _style_of_text(record, style, asked, instructed, bos)
        for messages, open_answer in PROBES:
            difference = _difference(_own_text(source, messages, open_answer, values),
                                     _text(messages, record, style, open_answer), record.name)
            if difference:
                return style, difference
    except jinja.JinjaError as e:
        return style, f"it is not read here ({e})"
    return style, ""


def _own_text(source, messages, open_answer, values):
    """A conversation as a chat_template writes it. Raises JinjaError."""
    return jinja.render(source, dict(messages=messages, add_generation_prompt=open_answer, tools=None,
                                     documents=None, **values))


def _style_of_text(record, style, asked, instructed, bos):
    """The Style of a model that writes PROBES[0] as `asked`, and PROBES[1] as `instructed`."""
    if "".join(record.before("user", None, False)) not in asked:        # another template altogether
        return style
    if not asked.startswith(style.start):
        style = style._replace(start="")
    if bos and not style.start and asked.startswith(bos):
        style = style._replace(start=bos)
    opening = style.start + "".join(record.before("system", None, False))
    system = _between(instructed, opening, style.end)
    found = {}
    if system.endswith(SYSTEM["content"]):
        found["prefix"] = system.removesuffix(SYSTEM["content"])
    found["system"] = _between(asked, opening, style.end).removeprefix(found.get("prefix", ""))
    behind = asked.partition("Hi." + style.end)[2]
    opening = "".join(record.before("assistant", "user", True))
    if behind.endswith(opening):
        found["separator"] = behind.removesuffix(opening)
    return style._replace(**{name: text for name, text in found.items()
                             if not any(token in text for token in record.tokens)})


def _between(text, opening, end):
    """What stands between an opening at the start of a text and the first `end`; "" without the opening."""
    return text.removeprefix(opening).partition(end)[0] if text.startswith(opening) else ""


def _difference(theirs, ours, name):
    """Where two texts part, in words; "" where they are equal."""
    if theirs == ours:
        return ""
    same = len(os.path.commonprefix([theirs, ours]))
    begin = max(0, same - 20)
    return f"it writes {theirs[begin:same + 40]!r} where {name} writes {ours[begin:same + 40]!r}"


# ---- rendering ---------------------------------------------------------------------------------------------
class Piece(NamedTuple):
    text: str
    token: bool                     # a special token; else text that is encoded
    target: bool                    # True or False inside an answer, None elsewhere: an answer of weight 0 is
                                    # not joined with the text before it


def _opening(record, role, previous, last):
    """What stands before a content, as Pieces."""
    return [Piece(text, text in record.tokens, None) for text in record.before(role, previous, last)]


def _pieces(messages, record, style, open_answer):
    """A conversation as Pieces. open_answer: end with the opening of one more assistant message."""
    pieces = [Piece(token, True, None) for token in _start_tokens(record, style)]
    has_system = messages and messages[0]["role"] == "system"
    if (style.system or style.prefix) and not has_system:
        messages = [{"role": "system", "content": style.system}, *messages]
    previous = None
    for i, message in enumerate(messages):
        role = message["role"]
        last = i + 1 == len(messages) and not open_answer
        target = bool(message.get("weight", 1)) if role == "assistant" else None
        pieces += _opening(record, role, previous, last)
        prefix = style.prefix if role == "system" and previous is None else ""
        pieces.append(Piece(prefix + record.content(message["content"], role, last), False, target))
        has_end = role == "assistant" or not record.document
        if record.opens_user:
            following = "assistant" if open_answer else "user"          # of the last message
            if i + 1 < len(messages):
                following = messages[i + 1]["role"]
            has_end = role == "assistant" and following == "user"
        if has_end:
            pieces.append(Piece(style.end, True, target))
            pieces.append(Piece(style.separator, False, None))
        previous = role
    if open_answer:
        pieces += _opening(record, "assistant", previous, True)
    return pieces


def _start_tokens(record, style):
    """The start text of a style as its tokens: a record's own may be several."""
    if style.start == "".join(record.start):
        return record.start
    return (style.start,) if style.start else ()


def _text(messages, record, style, open_answer):
    """A conversation as a chat_template writes it."""
    pieces = _pieces(messages, record, style, open_answer)
    if record.opens_user and not open_answer and messages[-1]["role"] == "assistant":
        pieces = pieces[:-2]                            # the end token and its separator
    return "".join(piece.text for piece in pieces)


def _encode(messages, template, tokenizer, system, open_answer):
    """(ids, mask) of a conversation."""
    record = _fitting(template, tokenizer)
    style, _ = _style(record, tokenizer)
    if system is not None:
        style = style._replace(system=system)
    ids = []
    mask = []
    pieces = _pieces(messages, record, style, open_answer)
    # Neighbouring texts are encoded as one string; an answer is never joined with what is around it.
    for (is_token, target), run in itertools.groupby(pieces, lambda piece: (piece.token, piece.target)):
        texts = [piece.text for piece in run]
        if is_token:
            new_ids = [tokenizer.special[text] for text in texts]
        else:
            new_ids = tokenizer.encode("".join(texts))
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
    content = _fitting(template, tokenizer).content(text, "assistant", True)
    return [*tokenizer.encode(content), end_token(template, tokenizer)]


def asks_otherwise_later(template, tokenizer):
    """Whether an answer that others follow stands behind other tokens than when it is asked for: qwen3 writes an
    empty thought before the last one alone."""
    record = _fitting(template, tokenizer)
    return record.before("assistant", "user", True) != record.before("assistant", "user", False)


def export(template, tokenizer, system=None):
    """The tokenizer of a model that was trained with a template, as `transformers` should read it.

    Its chat_template gives the ids of `prompt` and `render`; the model's own is kept where it does. What it
    encodes begins with the start token, as prompts do. Raises as render does.
    """
    record = _fitting(template, tokenizer)
    style, _ = _style(record, tokenizer)
    if system is not None:
        style = style._replace(system=system)
    own = tokenizer.chat_template
    if not own or not _writes(own, record, style, tokenizer):
        own = "".join(f"{{%- set {name} = {json.dumps(text, ensure_ascii=False)} %}}\n"
                      for name, text in style._asdict().items()) + record.jinja
    return tokenizer.with_template(own, _start_tokens(record, style))


def _writes(source, record, style, tokenizer):
    """Whether a chat_template writes the texts of a style without being asked to, on every day."""
    names = {i: text for text, i in tokenizer.special.items()}
    values = dict(bos_token=names.get(tokenizer.bos, ""), eos_token=names.get(tokenizer.eos, ""))
    try:
        return "strftime_now" not in source and all(
            _own_text(source, *probe, values) == _text(probe[0], record, style, probe[1]) for probe in PROBES)
    except jinja.JinjaError:
        return False


# ---- length ------------------------------------------------------------------------------------------------
def start_length(template, tokenizer):
    """How many ids at the start of a prompt are kept when it is cut: its start tokens, and at least one."""
    record = _fitting(template, tokenizer)
    return max(1, len(_start_tokens(record, _style(record, tokenizer)[0])))


def truncate_left(ids, limit, start=1):
    """The last `limit` ids, except that the first `start` ids (the start tokens) are kept."""
    if len(ids) <= limit:
        return ids
    start = min(start, limit)
    return ids[:start] + ids[len(ids) - limit + start:]


def require_room(limit):
    """`limit`, how many tokens an example may have beside its virtual tokens. Raises UserError below 2."""
    if limit < 2:
        raise UserError(f"only {limit} tokens are left for an example, at least 2 are needed; use a larger "
                        "--block_size or fewer virtual tokens")
    return limit


def fit_to_length(ids, mask, limit, too_long="truncate", location="an example", start=1):
    """(ids, mask) of at most `limit` tokens; None for an example to drop.

    too_long   "truncate", "drop" (returns None) or "error" (raises DataError) Truncation cuts the prompt
    (everything before the first target) on the left and the rest on the right. Each is guaranteed half of
    the limit and may use what the other does not need, so that both keep some tokens. The first `start`
    tokens are kept, because a model is trained with its start tokens. A cut answer has no end token. Raises
    UserError for a limit below 2.
    """
    require_room(limit)
    if len(ids) <= limit:
        return ids, mask
    if too_long == "error":
        raise DataError(f"{location} has {len(ids)} tokens, and {limit} fit; shorten it, or use "
                        "--too_long truncate")
    if too_long == "drop":
        return None
    prompt_len = mask.index(True) if True in mask else len(ids)
    rest_len = min(len(ids) - prompt_len, max(limit // 2, limit - prompt_len))
    cut = max(0, prompt_len + rest_len - limit)         # tokens to remove from the prompt, behind the start
    start = min(start, prompt_len - cut)
    kept = [*range(start), *range(cut + start, prompt_len + rest_len)]
    return [ids[i] for i in kept], [mask[i] for i in kept]
