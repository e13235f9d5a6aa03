"""data/results/reward_models.py: what scores answers: functions of texts, reward models in their own tokens.

    row, text of the answer ----------------------------> module:function
    policy's ids ---------------------------------------> reward model      same tokens, template and system
    row, text of the answer --Text of the reward model--> reward model      another of them: rendered anew

A reward here is (prompts, answers, rows, batch) -> scores (B,): lists of ids, the rows that the prompts are
from, and the rollout (ppo.model_reward). A reward model that reads other tokens than the policy has no use for
the rollout. Where prompt and answer do not fit the context, they are cut as in training (row_types.py): the
answer on the right, down to half of the context, then the prompt on the left behind its first token.

Several rewards make one score: the sum of each times its weight, and each is logged under a name of its own.

Public: parse_weights, reward_names, reward_function, same_tokens, in_own_tokens, within, checked
"""
import math
import os
import re

import torch

from data.runtime import distributed
from data.runtime.files import UserError
from data.runtime.user_functions import is_function, load_reward, target
from data.text import chat
from data.text.messages import as_text

PROBES = 50                                             # rows of each split whose tokens are compared


def parse_weights(text, words):
    """--reward_weights "1,0.5" -> [1.0, 0.5], a weight for each word of --reward. Raises UserError."""
    if text is None:
        return [1.0] * len(words)
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if not weights or not all(map(math.isfinite, weights)):
        raise UserError(f"--reward_weights {text} cannot be read; give a finite number for each --reward: "
                        "1,0.5")
    if len(weights) != len(words):
        named = ",".join(words) or "(none)"
        raise UserError(f"--reward_weights {text} has {len(weights)} numbers, and --reward {named} names "
                        f"{len(words)} rewards; give one for each")
    if not any(weights):
        raise UserError(f"--reward_weights {text} gives every answer the score 0; give one that is not 0")
    return weights


def reward_names(words):
    """The names under which rewards are logged: of their functions or folders; two equal ones are f, f_2."""
    names = []
    for word in words:
        last = target(word).rpartition(":")[2] if is_function(word) else os.path.basename(word.rstrip("/"))
        name = re.sub(r"\W", "_", last)
        while name in names:
            name += "_2"
        names.append(name)
    return names


def reward_function(flag_name, word, text):
    """module:function -> a reward for ppo.py, of ids and of rows as open_data returns them."""
    score_texts = load_reward(flag_name, word)

    def score(prompt_ids, answers, rows, batch=None):
        def call():                                     # it may draw random numbers, or ask another program
            asked_texts = [as_text(text.turns(row)[:-1]) for row in rows]
            answer_texts = [text.decode_answer(y) for y in answers]
            return torch.tensor(score_texts(asked_texts, answer_texts, [row["record"] for row in rows]))
        return distributed.broadcast(call)
    return score


def same_tokens(text, own, rows):
    """Whether two Texts (data/batches/examples.py) give one meaning to the ids of prompts and answers.

    rows: {split: rows}, of which some are rendered by both. Equal settings alone are not enough, because a
    model's own chat template decides part of its style.
    """
    if (text.template, text.system, text.end_token) != (own.template, own.system, own.end_token):
        return False
    if not text.tokenizer.same_vocabulary(own.tokenizer):
        return False
    some = [row for part in rows.values() for row in part[:PROBES]]
    return all(text.prompt_ids(row) == own.prompt_ids(row) for row in some)


def in_own_tokens(reward, text, own, room):
    """A reward of the policy's ids, for a reward model that reads those of `own`, `room` at most."""
    def rendered(prompts, answers, rows, batch=None):       # the batch has the policy's tokens
        mine = [own.prompt_ids(row) for row in rows]
        theirs = [_answer(text, own, answer) for answer in answers]
        return within(reward, room)(mine, theirs, rows)
    return rendered


def _answer(text, own, answer):
    """An answer of the policy in the tokens of the reward model, without an end token where it has none."""
    ids = chat.answer(text.decode_answer(answer), own.template, own.tokenizer)
    return ids if answer[-1] == text.end_token else ids[:-1] or ids


def within(reward, room):
    """A reward of ids, of a reward model whose context holds `room` tokens of text."""
    def cut(prompts, answers, rows=None, batch=None):
        if batch is not None and batch.tokens.size(1) <= room:
            return reward(prompts, answers, rows, batch)
        answers = [answer[:max(room // 2, room - len(prompt))] for prompt, answer in zip(prompts, answers)]
        prompts = [chat.truncate_left(prompt, room - len(answer)) for prompt, answer in zip(prompts, answers)]
        return reward(prompts, answers, rows)
    return cut


def checked(reward, word, text):
    """A reward whose scores are finite: raises UserError that names --reward `word`, prompt and answer."""
    def finite(prompts, answers, rows=None, batch=None):
        scores = reward(prompts, answers, rows, batch)
        bad = (~scores.isfinite()).nonzero().flatten().tolist()
        if bad:
            i = bad[0]
            row = rows[i] if rows else None
            prompt = as_text(text.turns(row)[:-1]) if row else text.tokenizer.decode(prompts[i])
            answer = text.decode_answer(answers[i])
            raise UserError(f"--reward {word} gave {scores[i].item()} for the prompt {prompt[:40]!r} and the "
                            f"answer {answer[:40]!r}; a score must be finite: the reward model is damaged, "
                            "or --dtype is too narrow for it")
        return scores
    return finite
