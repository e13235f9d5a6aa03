"""data/toy/tasks.py: the tasks that are asked about the toy world, and the judge of its letters.

    corpus    documents that tell all of it in natural text: what a base model is pre-trained on
    tasks     sentiment, spam, entities, questions, chat, and `toy`, a mixture of the five as instructions
    ranked    four answers per prompt, ranked by gold(prompt, answer) / TAU plus Gumbel noise (Plackett-Luce):
              P(a before b) = sigmoid((gold_a - gold_b) / TAU), so not even the judge agrees with every pair

The knowledge is in the corpus, the form is in the tasks: a base model can answer once it has learnt how it is
asked. The corpus holds no question, review or message of valid or test. `gold` is the judge that RLHF tries
to please through noisy comparisons; no model sees it. `python -m data.toy --out DIR` writes it all.

Public: rows, gold, NAMES
"""
import argparse
import json
import math
import os
import random
import re

from data.toy import lexicon as lex
from data.toy.world import SPLITS, World, cap

NAMES = ("toy", "toy/sentiment", "toy/spam", "toy/entities", "toy/questions", "toy/chat", "toy/letters",
         "toy/preferences", "toy/prompts", "toy/corpus")
SIZES = {"toy": (3000, 200, 300), "toy/corpus": (15000, 300, 300), "toy/preferences": (10000, 200, 1200)}
SIZE = (2000, 200, 300)     # of all others; fewer where a task has fewer different rows
TAU = 0.5       # temperature of the noise on comparisons


class Tasks(World):
    """A world and its tasks: each method makes one row of a split."""

    def text(self, rng, split):
        if split != "train":                # held-out text is plain telling: nothing in it is a task
            return {"text": rng.choice((self.profile, self.gossip))(rng)}
        told = (self.profile, self.gossip, self.story, self.told_review, self.told_message, self.dialogue,
                self.told_letter)
        return {"text": " ".join(rng.choices(told, (6, 2, 3, 4, 2, 4, 1))[0](rng)
                                 for _ in range(rng.randint(1, 3)))}

    def sentiment(self, rng, split):
        good = rng.random() < 0.5
        return {"text": self.review(rng, split, good), "label": "good" if good else "bad"}

    def spam(self, rng, split):
        spam = rng.random() < 0.5
        return {"text": self.message(rng, split, spam), "label": "spam" if spam else "real"}

    def entities(self, rng, split):
        tokens, tags = re.findall(r"\w+|[^\w\s]", self.scene(rng, split)), []
        for i, word in enumerate(tokens):
            shop = [tokens[i - k:i - k + 2] for k in (0, 1)
                    if " ".join(tokens[i - k:i - k + 2]) in self.shops]
            tags.append("B-PER" if word in self.people else "B-LOC" if word in lex.TOWNS else
                        "O" if not shop else "B-ORG" if shop[0][0] == word else "I-ORG")
        return {"tokens": tokens, "tags": tags}

    def questions(self, rng, split):
        name, relation, question = self.asked(rng, split)
        return {"prompt": question, "completion": self.reply(name, relation)}

    def reply(self, name, relation):
        return cap(lex.REPLY[relation][0].format(a=self.people[name][relation]))

    def extraction(self, rng, split):
        text = self.scene(rng, split)
        ask, answer, _ = rng.choice(self.notes(text))
        return {"prompt": f"{ask} {text}", "completion": answer}

    def instruction(self, rng, split):
        kind = rng.randrange(5)
        if kind == 0:
            row = self.sentiment(rng, split)
            return {"prompt": f"Good or bad? {row['text']}", "completion": row["label"]}
        if kind == 1:
            row = self.spam(rng, split)
            return {"prompt": f"Spam or real? {cap(row['text'])}", "completion": row["label"]}
        if kind == 4:
            return dict(zip(("prompt", "completion"), self.talk(rng, split)))
        return (self.extraction if kind == 2 else self.questions)(rng, split)

    def chat(self, rng, split):
        """Two turns: small talk first, then a question about what was said, or about the world."""
        heard, answer = self.talk(rng, split)
        (n, *_), towns, _ = self.found(heard)
        known = [("What is my name?", f"Your name is {n}.")]
        known += [("Where am I from?", f"You are from {town}.") for town in towns]
        name, relation, question = self.asked(rng, split)
        asked, told = rng.choice(known * 2 + [(question, self.reply(name, relation))])
        return {"messages": [{"role": r, "content": c} for r, c in
                             (("user", heard), ("assistant", answer), ("user", asked), ("assistant", told))]}

    def prompts(self, rng, split):
        return {"prompt": self.wish(rng, split)[-1]}

    def letters(self, rng, split):
        n, shop, item, prompt = self.wish(rng, split)
        return {"prompt": prompt, "completion": cap(self.letter(rng, split, n, shop, item))}

    def preferences(self, rng, split):
        n, shop, item, prompt = self.wish(rng, split)
        answers = [cap(self.letter(rng, split, n, shop, item, odd=0.15)) for _ in range(4)]
        if rng.random() < 0.3:              # one answer to another wish
            answers[0] = cap(self.letter(rng, split, *self.wish(rng, split)[:3]))
        noisy = [gold(prompt, a) / TAU - math.log(-math.log(rng.random())) for a in answers]
        rank = [1 + sum(b > a for b in noisy) for a in noisy]
        return {"prompt": prompt, "responses": answers, "rank": rank}


MAKER = {"toy": "instruction", "toy/corpus": "text"}    # else the method is named after the task


def rows(name, split, seed=0):
    """The rows of one split of one task, dicts in the vocabulary of the data files; no row comes twice."""
    world, rng = Tasks(seed), random.Random(f"{name} {split} {seed}")
    make, seen = getattr(world, MAKER.get(name, name[4:])), {}
    wanted, tries = SIZES.get(name, SIZE)[SPLITS.index(split)], 0
    while len(seen) < wanted and tries < 20 * wanted:       # some tasks have fewer different rows than wanted
        row, tries = make(rng, split), tries + 1
        seen.setdefault(json.dumps(row, sort_keys=True), row)
    return list(seen.values())


# ---------------------------------------------------------------------- the judge
CHEER = {word: sign for sign, side in ((1, lex.GOOD), (-1, lex.BAD)) for words in side.values()
         for word in words.split()}
SHOP = re.compile("|".join(re.escape(shop.lower()) for shop in lex.SHOPS))
NOT = {"not", "never", "hardly", "nobody"}


def gold(prompt, answer):
    """How good an answer to a wish is, about -3 to 3: cheerful, to the point, of some length, no repeats.

    cheer   good words and endings minus bad ones over all of them, a negated clause counted the other way; a
            mean, for that is what attention can take: a sum over clauses is beyond a model of this size
    asked   does it name the person and the shop that the wish names: half a point each
    """
    text = answer.lower().replace("anything but", "not")
    words, cheer = re.findall(r"[a-z]+", text), []
    for clause in re.split(r"[.,!?:;]| and | but ", SHOP.sub("", text)):     # "the Quiet Corner" is no praise
        said = re.findall(r"[a-z]+", clause)
        cheer += [CHEER[w] * (-1 if NOT & set(said) else 1) for w in said if w in CHEER]
    cheer += [sign for sign, ends in ((1, lex.LIKED), (-1, lex.HATED)) for end in ends if end.lower() in text]
    asked = re.fullmatch(r"Tell (\w+) about the \w+ at the (.+)\.", prompt)
    found = sum(a.lower() in text for a in asked.groups()) / 2 if asked else 0
    triples = list(zip(words, words[1:], words[2:]))
    repeats = 1 - len(set(triples)) / max(len(triples), 1)
    short, long = max(0, 8 - len(words)) / 4, max(0, len(words) - 30) / 10
    return 1.5 * sum(cheer) / max(len(cheer), 1) + found - 2 * repeats - short - long


def main():
    args = argparse.ArgumentParser(description="write the toy world as JSONL files, one folder per task")
    args.add_argument("--out", required=True, help="folder to write to")
    args.add_argument("--seed", type=int, default=0)
    args = args.parse_args()
    for name in NAMES:
        folder = os.path.join(args.out, name)
        os.makedirs(folder, exist_ok=True)
        for split in SPLITS:
            with open(os.path.join(folder, split + ".jsonl"), "w", encoding="utf-8") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows(name, split, args.seed))

