"""toy.py: a small consistent world in plain English, made from a seed, and the tasks that are asked about it.

    people (town, job, pet, food, hobby)     shops (kind, town, owner)     reviews, text messages, small talk
    corpus    documents that tell all of it in natural text: what a base model is pre-trained on
    tasks     sentiment, spam, entities, questions, chat, and `toy`, a mixture of the five as instructions
    ranked    four answers per prompt, ranked by gold(prompt, answer) / TAU plus Gumbel noise (Plackett-Luce), so that
              P(a before b) = sigmoid((gold_a - gold_b) / TAU): no judge can agree with more than BAYES of the pairs

The knowledge is in the corpus, the form is in the tasks: a base model can answer once it has learnt how it is asked.
Every combination (a person and a question, a shop and an opinion, the words of a message) belongs to one split, by hash:
what is asked in test is never asked in train, and the corpus holds no question, review or message of valid or test. Facts
are in the corpus for everybody. `gold` is the judge that RLHF tries to please through noisy comparisons; no model sees it.

Public: rows, gold, NAMES, World, BAYES
"""

import argparse
import collections
import json
import math
import os
import random
import re
import zlib

if __package__:
    from . import lexicon as lex
else:
    import lexicon as lex

NAMES = ("toy", "toy/sentiment", "toy/spam", "toy/entities", "toy/questions", "toy/chat", "toy/letters", "toy/preferences", "toy/prompts",
         "toy/corpus")
SIZES = {"toy": (3000, 200, 300), "toy/corpus": (15000, 300, 300), "toy/preferences": (2000, 200, 400)}    # others: SIZE
SIZE = (2000, 200, 300)
TAU = 0.5       # temperature of the noise on comparisons
SPLITS = ("train", "valid", "test")


def fold(*key):
    """The split that a combination belongs to: 70 % train, 10 % valid, 20 % test, the same in every run."""
    n = zlib.crc32("|".join(map(str, key)).encode()) % 20
    return SPLITS[(n >= 14) + (n >= 16)]


def say(rng, pattern, **slots):
    """Fill a pattern: choices first, then slots. `[a|b] {x}` with x=c gives `a c` or `b c`."""
    pattern = re.sub(r"\[([^]]*)]", lambda m: rng.choice(m[1].split("|")), pattern)
    return pattern.format(**slots)


def cap(text, end="."):
    """A sentence: first letter large, and an end mark unless it has one."""
    return text[0].upper() + text[1:] + ("" if text[-1] in ".?!:" else end)


def both(names):
    return " and ".join(filter(None, (", ".join(names[:-1]), names[-1]))) if names else "nobody"


class World:
    """Who lives where and does what. Everything follows from the seed; every method that draws takes an rng and a split."""

    def __init__(self, seed=0):
        rng = random.Random(seed)
        self.people = {}
        for name in sorted(lex.WOMEN + lex.MEN):
            self.people[name] = {"town": rng.choice(lex.TOWNS), "job": rng.choice(list(lex.JOBS)), "pet": rng.choice(lex.PETS),
                                 "food": rng.choice(lex.FOODS), "hobby": rng.choice(lex.HOBBIES), "called": rng.choice(lex.PET_NAMES)}
        self.shops = {shop: (kind, rng.choice(lex.TOWNS), rng.choice(list(self.people))) for shop, kind in lex.SHOPS.items()}
        self.names = list(self.people)
        rng.shuffle(self.names)
        self.known = [1 / (8 + i) for i in range(len(self.names))]      # some are the talk of the town, others are not

    def cast(self, rng, k):
        """k different people, well-known ones more often."""
        found = {}
        while len(found) < k:
            found[rng.choices(self.names, self.known)[0]] = None
        return list(found)

    def fill(self, rng):
        """A full set of slots: distinct people, towns and shops, and one each of the small words."""
        n1, n2, n3, m = self.cast(rng, 4)
        t1, t2 = rng.sample(lex.TOWNS, 2)
        return {"n": n1, "n1": n1, "n2": n2, "n3": n3, "m": m, "t1": t1, "t2": t2, "town": t1, "pet": rng.choice(lex.PETS),
                "s1": (shop := rng.choice(list(self.shops))), "shop": shop, "food": rng.choice(lex.FOODS), "day": rng.choice(lex.DAYS),
                "hour": rng.choice(lex.HOURS), "fun": rng.choice(("fishing", "sailing", "swimming", "hiking", "dancing")),
                "prize": rng.choice(lex.PRIZES), "number": str(rng.randrange(100, 1000))}

    # ------------------------------------------------------------------ what is told
    def fact(self, rng, name, relation, pronoun=False):
        who, she = self.people[name], name in lex.WOMEN
        n, o, p = (("she", "her", "her") if she else ("he", "him", "his")) if pronoun else (name, name, name + "'s")
        return cap(say(rng, rng.choice(lex.FACTS[relation]), n=n, o=o, p=p, p2="her" if she else "his", a=who[relation],
                       called=who["called"], does=lex.JOBS[who["job"]]))

    def profile(self, rng):
        (name,), told = self.cast(rng, 1), rng.sample(list(lex.FACTS), rng.randint(2, 5))
        return " ".join(self.fact(rng, name, r, pronoun=i > 0 and rng.random() < 0.6) for i, r in enumerate(told))

    def gossip(self, rng):
        return " ".join(self.fact(rng, self.cast(rng, 1)[0], rng.choice(list(lex.FACTS))) for _ in range(rng.randint(3, 5)))

    def scene(self, rng, split, **slots):
        while fold(text := cap(say(rng, rng.choice(lex.SCENES), **self.fill(rng) | slots))) != split:
            pass
        return text

    def found(self, text):
        """The names in a text, in order: [people], [towns], [shops]."""
        words, shops = re.findall(r"\w+", text), sorted((s for s in self.shops if s in text), key=text.find)
        keep = lambda known: list(dict.fromkeys(w for w in words if w in known))
        return keep(self.people), keep(lex.TOWNS), shops

    def notes(self, text):
        """The names in a text as (question, answer, the same told), for each sort that the text has."""
        return [(ask, *(cap(pattern.format(a=both(names))) for pattern in answers))
                for (ask, *answers), names in zip(lex.WHO, self.found(text)) if names]

    def story(self, rng):
        cast, told = self.fill(rng), []
        for _ in range(rng.randint(1, 3)):
            n1, n2, n3 = rng.sample([cast["n1"], cast["n2"], cast["n3"]], 3)        # the same people come back
            told.append(self.scene(rng, "train", n1=n1, n2=n2, n3=n3, t1=cast["t1"]))
        if rng.random() < 0.6:
            people = self.found(" ".join(told))[0]
            told.append(self.fact(rng, rng.choice(people), rng.choice(list(lex.FACTS))))
        if rng.random() < 0.5:
            told.append(say(rng, rng.choice(lex.ENDINGS), **self.fill(rng)))
        if rng.random() < 0.5:
            told.append(rng.choice(self.notes(" ".join(told)))[2])
        return " ".join(told)

    def opinion(self, rng, split, shop, good, item=None, other=""):
        """One clause about a thing in a shop. A negated word of the other side says the same."""
        items = lex.ITEMS[lex.SHOPS[shop]].split() + lex.CLASS["staff"].split()[:3]
        while True:
            thing, negated = item or rng.choice(items), rng.random() < 0.3
            kind = next(k for k, words in lex.CLASS.items() if thing in words.split())
            adj = rng.choice((lex.GOOD if good != negated else lex.BAD)[kind].split())
            text = say(rng, rng.choice(lex.NEGATED if negated else lex.CLAUSE), item=thing, adj=adj)
            if fold(text) == split and thing not in other:
                return text

    def review(self, rng, split, good):
        """What comes after "but" decides; otherwise all clauses agree."""
        slots = self.fill(rng)
        shop = slots["shop"]
        b = self.opinion(rng, split, shop, good)
        a, turn = (self.opinion(rng, split, shop, side, other=b) for side in (good, not good))
        end = rng.choice(lex.LIKED if good else lex.HATED)
        body = rng.choice((a, f"{a} and {b}", f"{cap(a)} {cap(b)}", f"{turn}, but {b}", f"{turn}, but {b}", f"{a}, {end}", f"{turn}, but {end}"))
        return (cap(say(rng, rng.choice(lex.VISIT), **slots | {"town": self.shops[shop][1]})) + " " if rng.random() < 0.7 else "") + cap(body)

    def message(self, rng, split, spam):
        while fold(text := say(rng, rng.choice(lex.SPAM if spam else lex.REAL), **self.fill(rng))) != split:
            pass
        return text

    def told_review(self, rng):
        good = rng.random() < 0.5
        return self.review(rng, "train", good) + (" " + rng.choice(lex.VERDICT[not good]) if rng.random() < 0.9 else "")

    def told_message(self, rng):
        spam, (m,) = rng.random() < 0.5, self.cast(rng, 1)
        text = cap(self.message(rng, "train", spam))
        intro = rng.choice((f'{m} got a text: "{text}"', f'"{text}" {m} read it twice.', f'There was a message for {m}. "{text}"'))
        return intro + (" " + say(rng, rng.choice(lex.AFTER[spam]), m=m) if rng.random() < 0.8 else "")

    def told_letter(self, rng):
        n, shop, item, _ = self.wish(rng, "train")
        return cap(self.letter(rng, "train", n, shop, item))

    def dialogue(self, rng):
        """Two people talk: about themselves, and about others. Questions are those of the train split only."""
        (a, b), lines = self.cast(rng, 2), []
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.5:
                heard, answer = self.talk(rng, "train", n=a, m=b)
                lines += [f'"{heard}"' if a in heard else f'"{heard}" said {a}.', f'"{answer}"' if rng.random() < .5 else f'"{answer[:-1]}," said {b}.' if answer[-1] == "." else f'"{answer}" asked {b}.']
            else:
                name, relation, _ = self.asked(rng, "train")
                slots = {"n": name, "a": self.people[name][relation]}
                lines += [f'"{cap(say(rng, rng.choice(lex.ASK[relation]), **slots), "?")}" asked {a}.', f'"{cap(say(rng, rng.choice(lex.REPLY[relation]), **slots))[:-1]}," said {b}.']
        return " ".join(lines)

    # ------------------------------------------------------------------ what is asked
    def asked(self, rng, split):
        while fold(name := rng.choice(self.names), relation := rng.choice(list(lex.FACTS))) != split:
            pass
        return name, relation, say(rng, rng.choice(lex.QUESTIONS[relation]), n=name)

    def talk(self, rng, split, **slots):
        while True:
            heard, answer = rng.choice(lex.TALK)
            filled = self.fill(rng) | slots
            if fold(heard := say(rng, heard, **filled)) == split:
                return cap(heard), cap(answer.format(**filled))

    # ------------------------------------------------------------------ the tasks, one row each
    def text(self, rng, split):
        if split != "train":                # held-out text is plain telling: nothing in it is a task
            return {"text": rng.choice((self.profile, self.gossip))(rng)}
        told = (self.profile, self.gossip, self.story, self.told_review, self.told_message, self.dialogue, self.told_letter)
        return {"text": " ".join(rng.choices(told, (6, 2, 3, 4, 2, 4, 1))[0](rng) for _ in range(rng.randint(1, 3)))}

    def sentiment(self, rng, split):
        good = rng.random() < 0.5
        return {"text": self.review(rng, split, good), "label": "good" if good else "bad"}

    def spam(self, rng, split):
        spam = rng.random() < 0.5
        return {"text": self.message(rng, split, spam), "label": "spam" if spam else "real"}

    def entities(self, rng, split):
        tokens, tags = re.findall(r"\w+|[^\w\s]", self.scene(rng, split)), []
        for i, word in enumerate(tokens):
            shop = [tokens[i - k:i - k + 2] for k in (0, 1) if " ".join(tokens[i - k:i - k + 2]) in self.shops]
            tags.append("B-PER" if word in self.people else "B-LOC" if word in lex.TOWNS else
                        "O" if not shop else "B-ORG" if shop[0][0] == word else "I-ORG")
        return {"tokens": tokens, "tags": tags}

    def questions(self, rng, split):
        name, relation, question = self.asked(rng, split)
        return {"prompt": question, "completion": cap(lex.REPLY[relation][0].format(a=self.people[name][relation]))}

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
        known = [("What is my name?", f"Your name is {n}.")] + [("Where am I from?", f"You are from {town}.") for town in towns]
        name, relation, question = self.asked(rng, split)
        asked, told = rng.choice(known * 2 + [(question, cap(lex.REPLY[relation][0].format(a=self.people[name][relation])))])
        return {"messages": [{"role": r, "content": c} for r, c in
                             (("user", heard), ("assistant", answer), ("user", asked), ("assistant", told))]}

    def wish(self, rng, split):
        """A prompt for RLHF: (name, shop, item, text)."""
        while True:
            n, shop = rng.choice(self.names), rng.choice(list(self.shops))
            item = rng.choice(lex.ITEMS[lex.SHOPS[shop]].split())
            if fold(n, shop, item) == split:
                return n, shop, item, f"Tell {n} about the {item} at the {shop}."

    def letter(self, rng, split, n, shop, item, odd=0.0):
        """An answer to a wish as people in this world write them: now kind, now cross, not always to the point."""
        kind, told = rng.choice((0.2, 0.5, 0.8)), []
        for i in range(rng.randint(1, 3)):
            told.append(self.opinion(rng, split, shop, rng.random() < kind, item if i == 0 and rng.random() < 0.7 else None))
        if rng.random() < 0.6:
            told[0] = told[0].replace(item, f"{item} at the {shop}", 1)
        if rng.random() < 0.3:
            told.append(rng.choice(lex.LIKED if rng.random() < kind else lex.HATED))
        if rng.random() < odd:
            told *= 2
        return rng.choice((f"Dear {n}, ", f"{n}, ", "")) + " ".join(cap(t) if i else t + "." for i, t in enumerate(told))

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
        return {"prompt": prompt, "responses": answers, "rank": [1 + sum(b > a for b in noisy) for a in noisy]}


MAKER = {"toy": "instruction", "toy/corpus": "text"}       # else the method is named after the task


def rows(name, split, seed=0):
    """The rows of one split of one task, as a list of dicts in the vocabulary of the data files; no row comes twice."""
    world, rng = World(seed), random.Random(f"{name} {split} {seed}")
    make, seen = getattr(world, MAKER.get(name, name[4:])), {}
    wanted, tries = SIZES.get(name, SIZE)[SPLITS.index(split)], 0
    while len(seen) < wanted and tries < 20 * wanted:       # some tasks have fewer different rows than wanted
        row, tries = make(rng, split), tries + 1
        seen.setdefault(json.dumps(row, sort_keys=True), row)
    return list(seen.values())


# ---------------------------------------------------------------------- the judge
CHEER = {w: 1 for words in lex.GOOD.values() for w in words.split()} | {w: -1 for words in lex.BAD.values() for w in words.split()}
NOT = {"not", "never", "hardly", "nobody"}


def gold(prompt, answer):
    """How good an answer to a wish is, about -3 to 3: cheerful, about what was asked, not too short or long, no repetition.

    cheer   good words minus bad words, a negated clause counted the other way, through 1.5 tanh(x / 1.5)
    asked   the share of (name, item, shop) that the answer mentions, from 0 to 1.5
    """
    text = answer.lower().replace("anything but", "not")
    words, cheer = re.findall(r"[a-z]+", text), 0
    for clause in re.split(r"[.,!?:;]| and | but ", text):
        said = re.findall(r"[a-z]+", clause)
        cheer += sum(CHEER.get(w, 0) for w in said) * (-1 if NOT & set(said) else 1)
    cheer += sum(t in answer for t in lex.LIKED) - sum(t in answer for t in lex.HATED)
    asked = re.fullmatch(r"Tell (\w+) about the (\w+) at the (.+)\.", prompt)
    found = sum(a.lower() in text for a in asked.groups()) / 2 if asked else 0
    triples = list(zip(words, words[1:], words[2:]))
    repeats = 1 - len(set(triples)) / max(len(triples), 1)
    return 1.5 * math.tanh(cheer / 1.5) + found - 2 * repeats - max(0, 8 - len(words)) / 4 - max(0, len(words) - 30) / 10


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


if __name__ == "__main__":
    main()
