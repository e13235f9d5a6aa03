"""data/toy/world.py: a small consistent world in plain English, made from a seed, and the ways it is told.

    people    town, job, pet, food, hobby; some are talked of more than others, as in life
    shops     kind, town, owner; reviews, in which what follows "but" decides and "never cold" is praise
    messages  wanted and unwanted ones; small talk; letters about a thing in a shop

Every combination (a person and a question, an opinion and its words, the words of a message) belongs to one
split, by hash: what is asked in test is never asked in train. Facts are told of everybody. The order of the
draws is part of the world: another order is another corpus, and the base model would know other facts.

Public: World, cap, both, say, fold, SPLITS
"""
import random
import re
import zlib

from data.toy import lexicon as lex

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
    """Who lives where and does what. All of it follows from the seed; what draws takes an rng and a split."""

    def __init__(self, seed=0):
        rng = random.Random(seed)
        self.people = {}
        for name in sorted(lex.WOMEN + lex.MEN):
            self.people[name] = {"town": rng.choice(lex.TOWNS), "job": rng.choice(list(lex.JOBS)),
                                 "pet": rng.choice(lex.PETS), "food": rng.choice(lex.FOODS),
                                 "hobby": rng.choice(lex.HOBBIES), "called": rng.choice(lex.PET_NAMES)}
        self.shops = {shop: (kind, rng.choice(lex.TOWNS), rng.choice(list(self.people)))
                      for shop, kind in lex.SHOPS.items()}
        self.names = list(self.people)
        rng.shuffle(self.names)
        self.known = [1 / (8 + i) for i in range(len(self.names))]      # some are the talk of the town

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
        return {"n": n1, "n1": n1, "n2": n2, "n3": n3, "m": m, "t1": t1, "t2": t2, "town": t1,
                "pet": rng.choice(lex.PETS), "s1": (shop := rng.choice(list(self.shops))), "shop": shop,
                "food": rng.choice(lex.FOODS), "day": rng.choice(lex.DAYS), "hour": rng.choice(lex.HOURS),
                "fun": rng.choice(("fishing", "sailing", "swimming", "hiking", "dancing")),
                "prize": rng.choice(lex.PRIZES), "number": str(rng.randrange(100, 1000))}

    # ------------------------------------------------------------------------------------------- what is told
    def fact(self, rng, name, relation, pronoun=False):
        who, she = self.people[name], name in lex.WOMEN
        n, o, p = name, name, name + "'s"
        if pronoun:
            n, o, p = ("she", "her", "her") if she else ("he", "him", "his")
        return cap(say(rng, rng.choice(lex.FACTS[relation]), n=n, o=o, p=p, p2="her" if she else "his",
                       a=who[relation], called=who["called"], does=lex.JOBS[who["job"]]))

    def profile(self, rng):
        (name,), told = self.cast(rng, 1), rng.sample(list(lex.FACTS), rng.randint(2, 5))
        return " ".join(self.fact(rng, name, r, pronoun=i > 0 and rng.random() < 0.6)
                        for i, r in enumerate(told))

    def gossip(self, rng):
        return " ".join(self.fact(rng, self.cast(rng, 1)[0], rng.choice(list(lex.FACTS)))
                        for _ in range(rng.randint(3, 5)))

    def scene(self, rng, split, **slots):
        while fold(text := cap(say(rng, rng.choice(lex.SCENES), **self.fill(rng) | slots))) != split:
            pass
        return text

    def found(self, text):
        """The names in a text, in order: [people], [towns], [shops]."""
        words, shops = re.findall(r"\w+", text), sorted((s for s in self.shops if s in text), key=text.find)
        people, towns = (list(dict.fromkeys(w for w in words if w in known))
                         for known in (self.people, lex.TOWNS))
        return people, towns, shops

    def notes(self, text):
        """The names in a text as (question, answer, the same told), for each sort that the text has."""
        return [(ask, *(cap(pattern.format(a=both(names))) for pattern in answers))
                for (ask, *answers), names in zip(lex.WHO, self.found(text)) if names]

    def story(self, rng):
        cast, told = self.fill(rng), []
        for _ in range(rng.randint(1, 3)):
            n1, n2, n3 = rng.sample([cast["n1"], cast["n2"], cast["n3"]], 3)    # the same people come back
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
        body = rng.choice((a, f"{a} and {b}", f"{cap(a)} {cap(b)}", f"{turn}, but {b}", f"{turn}, but {b}",
                           f"{a}, {end}", f"{turn}, but {end}"))
        if rng.random() >= 0.7:
            return cap(body)
        return cap(say(rng, rng.choice(lex.VISIT), **slots | {"town": self.shops[shop][1]})) + " " + cap(body)

    def message(self, rng, split, spam):
        while fold(text := say(rng, rng.choice(lex.SPAM if spam else lex.REAL), **self.fill(rng))) != split:
            pass
        return text

    def told_review(self, rng):
        good = rng.random() < 0.5
        review = self.review(rng, "train", good)
        return review + (" " + rng.choice(lex.VERDICT[not good]) if rng.random() < 0.9 else "")

    def told_message(self, rng):
        spam, (m,) = rng.random() < 0.5, self.cast(rng, 1)
        text = cap(self.message(rng, "train", spam))
        intro = rng.choice((f'{m} got a text: "{text}"', f'"{text}" {m} read it twice.',
                            f'There was a message for {m}. "{text}"'))
        return intro + (" " + say(rng, rng.choice(lex.AFTER[spam]), m=m) if rng.random() < 0.8 else "")

    def told_letter(self, rng):
        n, shop, item, _ = self.wish(rng, "train")
        return cap(self.letter(rng, "train", n, shop, item))

    def dialogue(self, rng):
        """Two people talk about themselves and about others; the questions are those of the train split."""
        (a, b), lines = self.cast(rng, 2), []
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.5:
                heard, answer = self.talk(rng, "train", n=a, m=b)
                lines.append(f'"{heard}"' if a in heard else f'"{heard}" said {a}.')
                lines.append(f'"{answer}"' if rng.random() < .5 else f'"{answer[:-1]}," said {b}.'
                             if answer[-1] == "." else f'"{answer}" asked {b}.')
            else:
                name, relation, _ = self.asked(rng, "train")
                slots = {"n": name, "a": self.people[name][relation]}
                lines.append(f'"{cap(say(rng, rng.choice(lex.ASK[relation]), **slots), "?")}" asked {a}.')
                lines.append(f'"{cap(say(rng, rng.choice(lex.REPLY[relation]), **slots))[:-1]}," said {b}.')
        return " ".join(lines)

    # ------------------------------------------------------------------------------------------ what is asked
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

    def wish(self, rng, split):
        """A prompt for RLHF: (name, shop, item, text)."""
        while True:
            n, shop = rng.choice(self.names), rng.choice(list(self.shops))
            item = rng.choice(lex.ITEMS[lex.SHOPS[shop]].split())
            if fold(n, shop, item) == split:
                return n, shop, item, f"Tell {n} about the {item} at the {shop}."

    def letter(self, rng, split, n, shop, item, odd=0.0):
        """An answer to a wish as people here write them: now kind, now cross, not always to the point."""
        kind, told = rng.choice((0.2, 0.5, 0.8)), []
        for i in range(rng.randint(1, 3)):
            good = rng.random() < kind
            told.append(self.opinion(rng, split, shop, good, item if i == 0 and rng.random() < 0.7 else None))
        if rng.random() < 0.6:
            told[0] = told[0].replace(item, f"{item} at the {shop}", 1)
        if rng.random() < 0.3:
            told.append(rng.choice(lex.LIKED if rng.random() < kind else lex.HATED))
        if rng.random() < odd:
            told *= 2
        opening = rng.choice((f"Dear {n}, ", f"{n}, ", ""))
        return opening + " ".join(cap(t) if i else t + "." for i, t in enumerate(told))
