"""data/toy/sums.py: sums whose answers a program checks, for RL with verifiable rewards.

    toy/sums         {"prompt": "3+5-2+1=?", "answer": "7"}: prompts for RL and for evaluation
    toy/sums_chat    demonstrations, for the SFT stage before it

Some demonstrations show their work, "3+5=8, 8-2=6, 6+1=7. The answer is 7."; others only state the answer,
which is hard for a model of this size without the steps. SFT imitates both kinds, so many of its answers are
guesses. RL with `right` as its reward has to find out that to show the work is what pays, and to make fewer
mistakes in it.

All results, on the way too, lie in 0 .. 9. A sum belongs to one split: those of test occur in no other.

Public: problem, demonstration, right
"""
import re

from data.toy.world import split_of

TERMS = (4, 5)                  # how many numbers a sum has
TOP = 9                         # the largest number and the largest result
DIRECT = 0.5                    # share of the demonstrations that only state the answer
ANSWER = re.compile(r"The answer is (\d+)\.")


def steps_of(numbers):
    """[3, 5, -2] -> ["3+5=8", "8-2=6"]."""
    steps = []
    result = numbers[0]
    for number in numbers[1:]:
        steps.append(f"{result}{number:+d}={result + number}")
        result += number
    return steps


def prompt_of(numbers):
    """[3, 5, -2] -> "3+5-2=?"."""
    return "".join([str(numbers[0]), *(f"{number:+d}" for number in numbers[1:]), "=?"])


def draw(rng, split):
    """The signed numbers of a sum that belongs to a split."""
    while True:
        numbers = [rng.randint(1, TOP)]
        for _ in range(rng.choice(TERMS) - 1):
            numbers.append(rng.randint(1, TOP) * rng.choice((1, -1)))
        results = [sum(numbers[:n]) for n in range(1, len(numbers) + 1)]
        if 0 <= min(results) and max(results) <= TOP and split_of(prompt_of(numbers)) == split:
            return numbers


def problem(rng, split):
    """A row of toy/sums."""
    numbers = draw(rng, split)
    return {"prompt": prompt_of(numbers), "answer": str(sum(numbers))}


def demonstration(rng, split):
    """A row of toy/sums_chat."""
    numbers = draw(rng, split)
    answer = f"The answer is {sum(numbers)}."
    if rng.random() >= DIRECT:
        answer = f"{', '.join(steps_of(numbers))}. {answer}"
    return {"prompt": prompt_of(numbers), "completion": answer}


def right(prompt, answer, row):
    """The reward of toy/sums: 1.0 if the last "The answer is N." has the N of row["answer"], else 0.0."""
    stated = ANSWER.findall(answer)
    return float(bool(stated) and stated[-1] == row["answer"])
