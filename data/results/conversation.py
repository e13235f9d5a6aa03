"""data/results/conversation.py: --task chat: a question, its answer as it is generated, the next question.

    /quit, Ctrl-D    leave            /clear    forget the conversation            /help    this
    Ctrl-C           stops an answer; at the prompt it drops the line, and leaves the second time

A model is asked as it was trained (run.json): one that labels texts answers with a label and the probability
of each label, one that was trained on single questions gets each question alone. Answers are greedy, as in
the evaluation on test, unless a flag asks for sampling. On a terminal a paste of several lines is one
question. stdout has the answers alone; notes about them go to stderr.

Public: chat, without_outer_blanks
"""
import contextlib
import re
import select
import signal
import sys

import torch

from data.results import next_token, predict
from data.runtime.run_folder import Interrupted, defer_signals, log_progress, print_result

COMMANDS = "/quit or Ctrl-D leaves, /clear forgets the conversation, Ctrl-C stops an answer"
PASTE = 0.05                                        # seconds in which the next line of a paste arrives


def chat(ctx, cfg, stored):
    """Answer --prompt, or questions until the input ends. Returns the exit code.

    stored: the settings of --init (run.json), {} for a model of another tool. Raises UserError.
    """
    conversation = Conversation(ctx, cfg, predict.row_type_of_model(ctx, stored), stored.get("turns") == 1)
    if cfg.prompt is not None:
        conversation.answer(cfg.prompt)
        return 0
    with contextlib.suppress(AttributeError):       # input that has been replaced
        sys.stdin.reconfigure(errors="replace")
    if is_terminal():
        with contextlib.suppress(ImportError):      # absent on Windows
            import readline                         # noqa: F401    line editing, and a paste as one question
        log_progress(f"{COMMANDS}.")
    for line in opening_lines(ctx, cfg, conversation, stored):
        log_progress(line)
    while True:
        question = read_question()
        if question is None or question.strip() == "/quit":
            return 0
        if question.strip() == "/clear":
            conversation.turns = []
            log_progress("the conversation is forgotten")
        elif question.strip() == "/help":
            log_progress(f"{COMMANDS}.")
        elif re.fullmatch(r"/[a-z]+", question.strip()):
            log_progress(f"{question.strip()} is no command: {COMMANDS}.")
        elif question.strip():
            try:
                conversation.answer(question)
            except Interrupted:
                forgive_ctrl_c()
                log_progress("\nstopped; this question is not part of the conversation")


def opening_lines(ctx, cfg, conversation, stored):
    """What a user should know before the first question, as lines."""
    if conversation.row_type == "label":
        by = "a classifier head" if ctx.head is not None else "label words"
        question = ctx.text.turns(predict.question_row(ctx, "label", "TEXT"))[0]["content"]
        return [f"It labels texts, by {by}. A text is asked as: {' '.join(question.split())}"]
    if conversation.row_type == "tags":
        return ["It names the entities of a text."]
    greedy = conversation.sampling["temperature"] == 0
    way = "Answers are greedy (--temperature 0.7 samples)" if greedy else "Answers are sampled"
    lines = [f"{way} and have at most {cfg.max_new_tokens} tokens (--max_new_tokens)."]
    if ctx.text.system:
        lines.append(f"System message (--system overrules it): {ctx.text.system}")
    elif ctx.text.system is None and stored.get("systems", 0) > 1:
        lines.append(f"Its training rows had {stored['systems']} different system messages; --system gives "
                     "one.")
    if conversation.single:
        lines.append("It was trained on single questions: each is asked alone, without those before it.")
    return lines


# ------------------------------------------------------------------------------------------------- the input

def is_terminal():
    return sys.stdin is not None and sys.stdin.isatty()


def read_question():
    """The next question, on a terminal with all lines of a paste; None at the end of the input."""
    try:
        return read_lines()
    except Interrupted:
        forgive_ctrl_c()
        log_progress("\n/quit, Ctrl-D or Ctrl-C again leaves")
    return read_lines()


def forgive_ctrl_c():
    """Called while Interrupted is handled: somebody sits at a terminal and goes on, or it is raised again."""
    if defer_signals.pending != signal.SIGINT or not is_terminal():
        raise
    defer_signals.pending = None


def read_lines():
    if sys.stdin is None:                           # closed by whoever started the program
        return None
    try:
        lines = [read_line("> ")]
        while is_terminal() and more_is_waiting():
            lines.append(read_line(""))
    except EOFError:
        if is_terminal():
            log_progress("")
        return None
    if any("\ufffd" in line for line in lines):
        log_progress("what is not UTF-8 in the question became \ufffd")
    return "\n".join(lines)


def read_line(prompt):
    if not is_terminal():
        return input("")
    if not sys.stdout.isatty():                     # answers go to a file, the prompt does not
        print(prompt, end="", file=sys.stderr, flush=True)
        prompt = ""
    return input(prompt)


def more_is_waiting():
    with contextlib.suppress(OSError, ValueError):  # no file that can be waited for
        return bool(select.select([sys.stdin], [], [], PASTE)[0])
    return False


# ------------------------------------------------------------------------------------------------ the answers

class Conversation:
    """The turns so far, and how the model is asked.

    row_type   of the rows that the model was trained on: chat, label or tags
    single     each question is asked alone
    """

    def __init__(self, ctx, cfg, row_type, single):
        self.ctx = ctx
        self.row_type = row_type
        self.single = single
        self.sampling = next_token.sampling_of(cfg)
        self.generator = next_token.generator_of(ctx, cfg)
        self.turns = []
        predict.refuse_unread(cfg, row_type)
        if row_type == "chat" and ctx.head is None:
            ctx.require_causal()

    def answer(self, question):
        """Print the answer to a question."""
        if self.row_type != "chat":
            row = predict.question_row(self.ctx, self.row_type, question)
            print_result(predict.prediction_text(predict.predict_rows(self.ctx, self.row_type, [row])[0]))
            return
        turns = [] if self.single else self.turns
        turns = self.fit([*turns, {"role": "user", "content": question}])
        text = self.stream(turns)
        self.turns = [*turns, {"role": "assistant", "content": text}]

    def fit(self, turns):
        """Turns without the oldest exchanges, as many as do not fit the context."""
        limit = self.ctx.max_prompt_len()
        left_out = 0
        while self.length(turns) > limit and len(turns) > 2:
            turns = turns[2:]
            left_out += 1
        if left_out:
            log_progress(f"the context of {self.ctx.model.config.block_size} tokens is full: the oldest of "
                         "the conversation is left out from here on")
        if self.length(turns) > limit:
            log_progress(f"the question is longer than the {limit} tokens that leave room for an answer: its "
                         "beginning is cut")
        return turns

    def length(self, turns):
        return len(self.ctx.text.prompt_ids(predict.open_row(turns)))

    def stream(self, turns):
        """Print the answer to the last turn while it is generated; returns its text."""
        ctx = self.ctx
        ids = ctx.prompt_ids(predict.open_row(turns))
        tokens = []
        text = ""
        for piece in without_outer_blanks(self.pieces(ids, tokens)):
            print_result(piece, end="")
            text += piece
        print_result()
        if tokens[-1] not in ctx.end_tokens():
            limit = f"--max_new_tokens {ctx.max_new_tokens} is reached"
            if len(tokens) < ctx.max_new_tokens:
                limit = f"the context of {ctx.model.config.block_size} tokens is full"
            log_progress(f"the answer is cut here: {limit}")
        return text

    @torch.no_grad()
    def pieces(self, ids, tokens):
        """The text of an answer as it comes, whole characters only; its ids are appended to `tokens`."""
        ctx = self.ctx
        decoder = ctx.text.tokenizer.decoder()
        ends = ctx.end_tokens()
        with ctx.autocast():
            for token, _, _ in next_token.steps(
                    ctx.model, ids, ctx.past(), ctx.max_new_tokens, self.generator, ends,
                    **self.sampling, **next_token.attention_of(ctx.text), embed=ctx.embed):
                tokens.append(token)
                if token not in ends:
                    yield decoder.push(token)
        yield decoder.flush()


def without_outer_blanks(pieces):
    """Pieces of a text, without the white space at both of its ends."""
    held = ""                                       # white space that may turn out to be the end
    begun = False
    for piece in pieces:
        text = held + piece
        shown = text.rstrip() if begun else text.strip()
        held = text[len(text.rstrip()):]
        begun = begun or bool(shown)
        yield shown
