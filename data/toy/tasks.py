"""data/toy/tasks.py: the data sets about the toy world, and the gold reward of its letters.

    toy/corpus        documents that state all facts in running text, for pre-training
    toy               instructions of five kinds: reviews, messages, names in a text, facts, small talk
    toy/sentiment, toy/spam, toy/entities, toy/questions, toy/chat        one task each
    toy/letters       prompts with one letter each
    toy/preferences   four letters per prompt, ranked by gold(prompt, letter) / TAU plus Gumbel noise
                      (Plackett-Luce): P(a before b) = sigmoid((gold_a - gold_b) / TAU)
    toy/prompts       prompts alone, for RL
    toy/sums          sums whose answers a program checks, for RL; toy/sums_chat: demonstrations (sums.py)

The corpus holds the knowledge, the tasks the form: a base model knows the facts and has seen no question in
the form of a task. No question, review or message of valid or test is in the corpus. The gold reward ranks
the letters; neither the policy nor the reward model sees it. `python -m data.toy --out DIR` writes
everything.

Public: rows, gold, NAMES, SIZES, SIZE, TAU, SPLITS, Stages, RL
"""
import argparse
import json
import math
import os
import random
import re
from typing import NamedTuple

from data.toy import lexicon as lex
from data.toy import sums, symbols
from data.toy.world import SPLITS, World, cap

NAMES = ("toy", "toy/sentiment", "toy/spam", "toy/entities", "toy/questions", "toy/chat", "toy/letters",
         "toy/preferences", "toy/prompts", "toy/sums", "toy/sums_chat", "toy/corpus")
SIZES = {"toy": (3000, 200, 300), "toy/corpus": (18000, 300, 300), "toy/preferences": (9500, 200, 1200),
         "toy/sums_chat": (3000, 200, 300)}
SIZE = (2000, 200, 300)         # rows of train, valid, test of all others; fewer where fewer are possible
SYMBOLS = 1 / 6                 # share of the corpus that is lists, JSON, code, conversations (symbols.py)
TAU = 0.5                       # temperature of the noise on comparisons
ASTRAY = 0.25                   # probability of another person, and of another shop, in a ranked letter


class Tasks(World):
    """The world and its data sets: each method makes one row of a split."""

    def text(self, rng, split):
        """A document of the corpus. Valid and test hold facts only, because all other texts belong to
        train.
        """
        if split != "train":
            document = rng.choice((self.profile, self.gossip))
            return {"text": document(rng)}
        if rng.random() < SYMBOLS:
            return {"text": symbols.document(self, rng)}
        return {"text": " ".join(self.document(rng) for _ in range(rng.randint(1, 3)))}

    def sentiment(self, rng, split):
        good = rng.random() < 0.5
        return {"text": self.review(rng, split, good), "label": "good" if good else "bad"}

    def spam(self, rng, split):
        spam = rng.random() < 0.5
        return {"text": self.message(rng, split, spam), "label": "spam" if spam else "real"}

    def entities(self, rng, split):
        tokens = re.findall(r"\w+|[^\w\s]", self.scene(rng, split))
        return {"tokens": tokens, "tags": [self._tag(tokens, i) for i in range(len(tokens))]}

    def _tag(self, tokens, i):
        """The BIO tag of token i. A shop has two words."""
        if tokens[i] in self.people:
            return "B-PER"
        if tokens[i] in lex.TOWNS:
            return "B-LOC"
        if " ".join(tokens[i:i + 2]) in self.shops:
            return "B-ORG"
        if i > 0 and " ".join(tokens[i - 1:i + 1]) in self.shops:
            return "I-ORG"
        return "O"

    def questions(self, rng, split):
        name, relation, question = self.question(rng, split)
        return {"prompt": question, "completion": self.reply(name, relation)}

    def reply(self, name, relation):
        return cap(lex.REPLY[relation][0].format(a=self.people[name][relation]))

    def extraction(self, rng, split):
        text = self.scene(rng, split)
        question, answer, _ = rng.choice(self.name_questions(text))
        return {"prompt": f"{question} {text}", "completion": answer}

    def instruction(self, rng, split):
        """A row of `toy`: one of five tasks as an instruction."""
        task = rng.choice(("sentiment", "spam", "extraction", "questions", "talk"))
        if task == "sentiment":
            row = self.sentiment(rng, split)
            return {"prompt": f"Good or bad? {row['text']}", "completion": row["label"]}
        if task == "spam":
            row = self.spam(rng, split)
            return {"prompt": f"Spam or real? {cap(row['text'])}", "completion": row["label"]}
        if task == "talk":
            remark, answer = self.talk(rng, split)
            return {"prompt": remark, "completion": answer}
        return self.extraction(rng, split) if task == "extraction" else self.questions(rng, split)

    def chat(self, rng, split):
        """Two turns: small talk, then a question about that talk or about the world."""
        remark, answer = self.talk(rng, split)
        people, towns, _ = self.names_in(remark)
        about_talk = [("What is my name?", f"Your name is {people[0]}.")]
        about_talk += [("Where am I from?", f"You are from {town}.") for town in towns]
        name, relation, question = self.question(rng, split)
        about_world = (question, self.reply(name, relation))
        second_question, second_answer = rng.choice([*about_talk, *about_talk, about_world])
        return {"messages": [{"role": "user", "content": remark}, {"role": "assistant", "content": answer},
                             {"role": "user", "content": second_question},
                             {"role": "assistant", "content": second_answer}]}

    def prompts(self, rng, split):
        _, _, _, prompt = self.wish(rng, split)
        return {"prompt": prompt}

    def letters(self, rng, split):
        name, shop, item, prompt = self.wish(rng, split)
        return {"prompt": prompt, "completion": cap(self.letter(rng, split, name, shop, item))}

    def preferences(self, rng, split):
        name, shop, item, prompt = self.wish(rng, split)
        answers = []
        for _ in range(4):
            other_name, other_shop, other_item, _ = self.wish(rng, split)
            asked = [name, shop, item]
            if rng.random() < ASTRAY:                           # a letter to somebody else
                asked[0] = other_name
            if rng.random() < ASTRAY:                           # about another shop, and what that one has
                asked[1:] = other_shop, other_item
            answers.append(cap(self.letter(rng, split, *asked, repeat=0.15)))
        scores = []
        for answer in answers:
            gumbel = -math.log(-math.log(rng.random()))
            scores.append(gold(prompt, answer) / TAU + gumbel)
        rank = [1 + sum(other > score for other in scores) for score in scores]
        return {"prompt": prompt, "responses": answers, "rank": rank}

    def sums(self, rng, split):
        return sums.problem(rng, split)

    def sums_chat(self, rng, split):
        return sums.demonstration(rng, split)


class Stages(NamedTuple):
    """What --task ppo does with prompts of the toy world before RL from the base model, and its rewards."""
    demonstrations: tuple                                       # flags of the SFT stage
    reward: str = None                                          # None: a reward model, trained on rankings
    gold_reward: str = None                                     # only measured


RL = {
    "toy/prompts": Stages(("--data", "toy/letters", "--epochs", "3"), gold_reward="data.toy:gold"),
    "toy/sums": Stages(("--data", "toy/sums_chat", "--method", "full", "--epochs", "4"),
                       reward="data.toy:right"),
}

METHOD_NAMES = {"toy": "instruction", "toy/corpus": "text"}     # all others: the name behind "toy/"


def rows(name, split, seed=0):
    """The rows of one split of a data set, in the formats of data/text/formats.py; no row occurs twice."""
    world = Tasks(seed)
    rng = random.Random(f"{name} {split} {seed}")
    make_row = getattr(world, METHOD_NAMES.get(name, name.removeprefix("toy/")))
    size = SIZES.get(name, SIZE)[SPLITS.index(split)]
    unique = {}
    for _ in range(20 * size):                                  # there may be fewer different rows than size
        if len(unique) == size:
            break
        row = make_row(rng, split)
        unique.setdefault(json.dumps(row, sort_keys=True), row)
    return list(unique.values())


# ---- the gold reward ---------------------------------------------------------------------------------------
def _signs(words_by_class, sign):
    return {word: sign for words in words_by_class.values() for word in words.split()}


SENTIMENT = _signs(lex.GOOD, 1) | _signs(lex.BAD, -1)
ENDINGS = {**dict.fromkeys(lex.LIKED, 1), **dict.fromkeys(lex.HATED, -1)}
SHOP_NAMES = re.compile("|".join(re.escape(shop.lower()) for shop in lex.SHOPS))
PEOPLE = {name.lower() for name in lex.WOMEN + lex.MEN}
NEGATIONS = {"not", "never", "hardly", "nobody"}
WISH = r"Tell (\w+) about the (\w+) at the (.+)\."


def gold(prompt, answer):
    """The quality of an answer to a wish, about -4 to 3.

        1.5 sentiment + person + shop + thing - 2 repeats - short - long

    sentiment   mean sign of good and bad words and endings; a negated clause counts with the opposite sign. A
                mean, because a sum over clauses is beyond a model of this size
    person      half a point if the person of the wish is named, minus half a point if anybody else is
    shop        likewise
    thing       half a point if what the wish is about is mentioned
    repeats     the fraction of word triples that repeat an earlier one
    short, long a quarter point per word below 8, a tenth per word above 30
    """
    text = answer.lower().replace("anything but", "not")
    signs = []
    for clause in re.split(r"[.,!?:;]| and | but ", SHOP_NAMES.sub("", text)):  # "Quiet Corner" is no praise
        clause_words = re.findall(r"[a-z]+", clause)
        direction = -1 if NEGATIONS.intersection(clause_words) else 1
        signs += [direction * SENTIMENT[word] for word in clause_words if word in SENTIMENT]
    signs += [sign for ending, sign in ENDINGS.items() if ending.lower() in text]
    words = re.findall(r"[a-z]+", text)
    triples = list(zip(words, words[1:], words[2:]))
    repeats = 1 - len(set(triples)) / max(len(triples), 1)
    short = max(0, 8 - len(words)) / 4
    long = max(0, len(words) - 30) / 10
    return 1.5 * sum(signs) / max(len(signs), 1) + mentions(prompt, text) / 2 - 2 * repeats - short - long


def mentions(prompt, text):
    """How well a text in lower case keeps to the person, the thing and the shop of a wish: -2 to 3."""
    wish = re.fullmatch(WISH, prompt)
    if not wish:
        return 0
    person, thing, shop = (word.lower() for word in wish.groups())
    words = set(re.findall(r"\w+", text))
    people = PEOPLE & words
    shops = set(SHOP_NAMES.findall(text))
    named = [person in people, shop in shops, thing in words]
    return sum(named) - bool(people - {person}) - bool(shops - {shop})


def main():
    parser = argparse.ArgumentParser(description="write the toy world as JSONL files, a folder per data set")
    parser.add_argument("--out", required=True, help="folder to write to")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    for name in NAMES:
        folder = os.path.join(args.out, name)
        os.makedirs(folder, exist_ok=True)
        for split in SPLITS:
            with open(os.path.join(folder, split + ".jsonl"), "w", encoding="utf-8") as f:
                f.writelines(json.dumps(row) + "\n" for row in rows(name, split, args.seed))
