"""data/results/reward_models.py: give a reward model the tokens that it was trained on, and check its scores.

    policy's ids ---------------------------------------> reward model      same tokens, template and system
    row, text of the answer --Text of the reward model--> reward model      another of them: rendered anew

A reward here is (prompts, answers, rows, batch) -> scores (B,): lists of ids, the rows that the prompts are
from, and the rollout (ppo.model_reward). A reward model that reads other tokens than the policy has no use for
the rollout. Where prompt and answer do not fit the context, they are cut as in training (row_types.py): the
answer on the right, down to half of the context, then the prompt on the left behind its first token.

Public: same_tokens, in_own_tokens, within, checked
"""
from data.runtime.files import UserError
from data.text import chat
from data.text.messages import as_text

PROBES = 50                                             # rows of each split whose tokens are compared


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
