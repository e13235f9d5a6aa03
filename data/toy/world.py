"""data/toy/world.py: a small consistent world in plain English, made from a seed, and the texts about it.

    people    town, job, pet, food, hobby; some people are mentioned more often than others
    shops     type, town, owner; reviews, in which the clause behind "but" decides and "never cold" is praise
    messages  real ones and spam; small talk; letters about an item in a shop

Every combination (a person and a relation, an opinion and its words, the words of a message) belongs to one
split, by hash: a question of test never occurs in train. Facts about everybody are in the corpus. The order
of random draws is part of the world: another order gives other texts, and data/base would have to be
trained again.

Public: World, cap, join_names, expand, split_of, SPLITS
"""
import random
import re
import zlib

from data.toy import lexicon as lex

SPLITS = ("train", "valid", "test")
FUN = ("fishing", "sailing", "swimming", "hiking", "dancing")


def split_of(*key):
    """The split that a combination belongs to: 70 % train, 10 % valid, 20 % test, the same in every run."""
    n = zlib.crc32("|".join(map(str, key)).encode()) % 20
    if n < 14:
        return "train"
    return "valid" if n < 16 else "test"


def expand(rng, pattern, **slots):
    """Fill a pattern: choices first, then slots. `[a|b] {x}` with x=c gives `a c` or `b c`."""
    pattern = re.sub(r"\[([^]]*)]", lambda match: rng.choice(match[1].split("|")), pattern)
    return pattern.format(**slots)


def cap(text, end="."):
    """A sentence: first letter upper case, and an end mark unless it has one."""
    if text[-1] not in ".?!:":
        text += end
    return text[0].upper() + text[1:]


def join_names(names):
    """["a", "b", "c"] -> "a, b and c"; [] -> "nobody"."""
    if not names:
        return "nobody"
    if len(names) == 1:
        return names[0]
    return ", ".join(names[:-1]) + " and " + names[-1]


class World:
    """People and shops, all of them a function of the seed. Methods draw from an rng (random.Random) and,
    where they take a split, return only what belongs to it.
    """

    def __init__(self, seed=0):
        rng = random.Random(seed)
        self.people = {}
        for name in sorted(lex.WOMEN + lex.MEN):
            self.people[name] = {"town": rng.choice(lex.TOWNS), "job": rng.choice(list(lex.JOBS)),
                                 "pet": rng.choice(lex.PETS), "food": rng.choice(lex.FOODS),
                                 "hobby": rng.choice(lex.HOBBIES), "called": rng.choice(lex.PET_NAMES)}
        self.shops = {shop: (shop_type, rng.choice(lex.TOWNS), rng.choice(list(self.people)))
                      for shop, shop_type in lex.SHOPS.items()}
        self.names = list(self.people)
        rng.shuffle(self.names)
        self.frequencies = [1 / (8 + i) for i in range(len(self.names))]    # how often a name is mentioned

    # ---- random choices ------------------------------------------------------------------------------------
    def cast(self, rng, k):
        """k different people, frequent ones more often."""
        names = []
        while len(names) < k:
            name = rng.choices(self.names, self.frequencies)[0]
            if name not in names:
                names.append(name)
        return names

    def fill(self, rng):
        """A value for every slot: different people, towns and shops, and one each of the other words."""
        n1, n2, n3, m = self.cast(rng, 4)
        t1, t2 = rng.sample(lex.TOWNS, 2)
        slots = {"n": n1, "n1": n1, "n2": n2, "n3": n3, "m": m, "t1": t1, "t2": t2, "town": t1}
        slots["pet"] = rng.choice(lex.PETS)
        slots["shop"] = slots["s1"] = rng.choice(list(self.shops))
        slots["food"] = rng.choice(lex.FOODS)
        slots["day"] = rng.choice(lex.DAYS)
        slots["hour"] = rng.choice(lex.HOURS)
        slots["fun"] = rng.choice(FUN)
        slots["prize"] = rng.choice(lex.PRIZES)
        slots["number"] = str(rng.randrange(100, 1000))
        return slots

    # ---- facts and stories ---------------------------------------------------------------------------------
    def fact(self, rng, name, relation, pronoun=False):
        """A sentence that states one fact about a person."""
        person = self.people[name]
        is_woman = name in lex.WOMEN
        names = (name, name, name + "'s")
        if pronoun:
            names = ("she", "her", "her") if is_woman else ("he", "him", "his")
        subject, object_, possessive = names
        pattern = rng.choice(lex.FACTS[relation])
        return cap(expand(rng, pattern, n=subject, o=object_, p=possessive, p2="her" if is_woman else "his",
                          a=person[relation], called=person["called"], does=lex.JOBS[person["job"]]))

    def profile(self, rng):
        """Two to five facts about one person."""
        name, = self.cast(rng, 1)
        relations = rng.sample(list(lex.FACTS), rng.randint(2, 5))
        sentences = []
        for i, relation in enumerate(relations):
            pronoun = i > 0 and rng.random() < 0.6
            sentences.append(self.fact(rng, name, relation, pronoun))
        return " ".join(sentences)

    def gossip(self, rng):
        """Three to five facts about different people."""
        sentences = []
        for _ in range(rng.randint(3, 5)):
            name, = self.cast(rng, 1)
            relation = rng.choice(list(lex.FACTS))
            sentences.append(self.fact(rng, name, relation))
        return " ".join(sentences)

    def scene(self, rng, split, **slots):
        """One sentence of a story."""
        while True:
            pattern = rng.choice(lex.SCENES)
            text = cap(expand(rng, pattern, **self.fill(rng) | slots))
            if split_of(text) == split:
                return text

    def names_in(self, text):
        """(people, towns, shops): the names in a text, in order."""
        words = re.findall(r"\w+", text)
        people = list(dict.fromkeys(word for word in words if word in self.people))
        towns = list(dict.fromkeys(word for word in words if word in lex.TOWNS))
        shops = sorted((shop for shop in self.shops if shop in text), key=text.find)
        return people, towns, shops

    def name_questions(self, text):
        """[(question, answer, the answer as a statement)] for people, towns and shops, if the text has any.
        """
        result = []
        for (question, answer, statement), names in zip(lex.WHO, self.names_in(text)):
            if names:
                joined = join_names(names)
                result.append((question, cap(answer.format(a=joined)), cap(statement.format(a=joined))))
        return result

    def story(self, rng):
        slots = self.fill(rng)
        sentences = []
        for _ in range(rng.randint(1, 3)):                      # the same people in every scene
            n1, n2, n3 = rng.sample([slots["n1"], slots["n2"], slots["n3"]], 3)
            sentences.append(self.scene(rng, "train", n1=n1, n2=n2, n3=n3, t1=slots["t1"]))
        if rng.random() < 0.6:
            people, _, _ = self.names_in(" ".join(sentences))
            name = rng.choice(people)
            sentences.append(self.fact(rng, name, rng.choice(list(lex.FACTS))))
        if rng.random() < 0.5:
            pattern = rng.choice(lex.ENDINGS)
            sentences.append(expand(rng, pattern, **self.fill(rng)))
        if rng.random() < 0.5:
            _, _, statement = rng.choice(self.name_questions(" ".join(sentences)))
            sentences.append(statement)
        return " ".join(sentences)

    # ---- reviews and messages ------------------------------------------------------------------------------
    def opinion(self, rng, split, shop, good, item=None, other=""):
        """One clause about an item of a shop, good or bad. item: which one; other: a clause on another item.

        A negated word of the other side has the same meaning.
        """
        items = lex.ITEMS[lex.SHOPS[shop]].split() + lex.CLASS["staff"].split()[:3]
        while True:
            thing = item or rng.choice(items)
            negated = rng.random() < 0.3
            item_class = next(name for name, words in lex.CLASS.items() if thing in words.split())
            adjectives = lex.GOOD if good != negated else lex.BAD
            adjective = rng.choice(adjectives[item_class].split())
            pattern = rng.choice(lex.NEGATED if negated else lex.CLAUSE)
            text = expand(rng, pattern, item=thing, adj=adjective)
            if split_of(text) == split and thing not in other:
                return text

    def review(self, rng, split, good):
        """A review. The clause behind "but" decides; otherwise all clauses agree."""
        slots = self.fill(rng)
        shop = slots["shop"]
        main = self.opinion(rng, split, shop, good)
        same = self.opinion(rng, split, shop, good, other=main)
        opposite = self.opinion(rng, split, shop, not good, other=main)
        ending = rng.choice(lex.LIKED if good else lex.HATED)
        body = rng.choice((same, f"{same} and {main}", f"{cap(same)} {cap(main)}", f"{opposite}, but {main}",
                           f"{opposite}, but {main}", f"{same}, {ending}", f"{opposite}, but {ending}"))
        if rng.random() >= 0.7:
            return cap(body)
        slots["town"] = self.shops[shop][1]
        opening = cap(expand(rng, rng.choice(lex.VISIT), **slots))
        return opening + " " + cap(body)

    def message(self, rng, split, spam):
        while True:
            pattern = rng.choice(lex.SPAM if spam else lex.REAL)
            text = expand(rng, pattern, **self.fill(rng))
            if split_of(text) == split:
                return text

    # ---- documents of the corpus: what the tasks are about, as running text --------------------------------
    def review_document(self, rng):
        good = rng.random() < 0.5
        text = self.review(rng, "train", good)
        if rng.random() < 0.9:
            text += " " + rng.choice(lex.VERDICT[0 if good else 1])
        return text

    def message_document(self, rng):
        spam = rng.random() < 0.5
        receiver, = self.cast(rng, 1)
        text = cap(self.message(rng, "train", spam))
        text = rng.choice((f'{receiver} got a text: "{text}"', f'"{text}" {receiver} read it twice.',
                           f'There was a message for {receiver}. "{text}"'))
        if rng.random() < 0.8:
            pattern = rng.choice(lex.AFTER[1 if spam else 0])
            text += " " + expand(rng, pattern, m=receiver)
        return text

    def letter_document(self, rng):
        name, shop, item, _ = self.wish(rng, "train")
        return cap(self.letter(rng, "train", name, shop, item))

    def dialogue(self, rng):
        """Two people talk about themselves and about others, with questions of the train split."""
        a, b = self.cast(rng, 2)
        lines = []
        for _ in range(rng.randint(1, 3)):
            if rng.random() < 0.5:
                lines += self._small_talk_lines(rng, a, b)
            else:
                lines += self._question_lines(rng, a, b)
        return " ".join(lines)

    def _small_talk_lines(self, rng, a, b):
        remark, answer = self.talk(rng, "train", n=a, m=b)
        first = f'"{remark}"' if a in remark else f'"{remark}" said {a}.'
        if rng.random() < .5:
            return [first, f'"{answer}"']
        if answer[-1] == ".":
            return [first, f'"{answer[:-1]}," said {b}.']
        return [first, f'"{answer}" asked {b}.']

    def _question_lines(self, rng, a, b):
        name, relation, _ = self.question(rng, "train")
        slots = {"n": name, "a": self.people[name][relation]}
        question = cap(expand(rng, rng.choice(lex.ASK[relation]), **slots), "?")
        reply = cap(expand(rng, rng.choice(lex.REPLY[relation]), **slots))
        return [f'"{question}" asked {a}.', f'"{reply[:-1]}," said {b}.']

    def document(self, rng):
        """One of all these, facts and reviews more often than others."""
        documents = (self.profile, self.gossip, self.story, self.review_document, self.message_document,
                     self.dialogue, self.letter_document)
        make, = rng.choices(documents, weights=(6, 2, 3, 4, 2, 4, 1))
        return make(rng)

    # ---- prompts and answers -------------------------------------------------------------------------------
    def question(self, rng, split):
        """(name, relation, question)."""
        while True:
            name = rng.choice(self.names)
            relation = rng.choice(list(lex.FACTS))
            if split_of(name, relation) == split:
                return name, relation, expand(rng, rng.choice(lex.QUESTIONS[relation]), n=name)

    def talk(self, rng, split, **slots):
        """(remark, answer) of small talk."""
        while True:
            pattern, answer = rng.choice(lex.TALK)
            filled = self.fill(rng) | slots
            remark = expand(rng, pattern, **filled)
            if split_of(remark) == split:
                return cap(remark), cap(answer.format(**filled))

    def wish(self, rng, split):
        """(name, shop, item, prompt): a prompt for RLHF that asks for a letter."""
        while True:
            name = rng.choice(self.names)
            shop = rng.choice(list(self.shops))
            item = rng.choice(lex.ITEMS[lex.SHOPS[shop]].split())
            if split_of(name, shop, item) == split:
                return name, shop, item, f"Tell {name} about the {item} at the {shop}."

    def letter(self, rng, split, name, shop, item, repeat=0.0):
        """An answer to a wish, of varying quality: kind or cross, not always about the item.

        repeat: the probability that everything is written twice.
        """
        kindness = rng.choice((0.2, 0.5, 0.8))
        sentences = []
        for i in range(rng.randint(1, 3)):
            good = rng.random() < kindness
            about_item = i == 0 and rng.random() < 0.7
            sentences.append(self.opinion(rng, split, shop, good, item if about_item else None))
        if rng.random() < 0.6:
            sentences[0] = sentences[0].replace(item, f"{item} at the {shop}", 1)
        if rng.random() < 0.3:
            sentences.append(rng.choice(lex.LIKED if rng.random() < kindness else lex.HATED))
        if rng.random() < repeat:
            sentences = sentences + sentences
        opening = rng.choice((f"Dear {name}, ", f"{name}, ", ""))
        first, *others = sentences
        return opening + " ".join([first + ".", *map(cap, others)])
