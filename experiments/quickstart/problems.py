"""Generated arithmetic word problems: of one step for the base model, of two steps as the target.

The base model learns problems of one step beside the standard library's source. Fine-tuning teaches
problems of two steps, with the same names, things and form of answer:

    Question: Ada has 12 coins, buys 7 more and then loses 3. How many coins are left?
    Answer: 12 + 7 - 3 = 16. The answer is 16.

Held-out problems have numbers that no training problem of their kind has together, so they do not
measure recall.
"""

import hashlib
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import reduce

HELD_OUT_SHARE = 0.1

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Ines", "Jon")
_THINGS = ("apples", "books", "coins", "stamps", "shells", "cards", "pens", "stones")
_COMPUTE = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
_MOST, _MOST_FACTOR = 60, 12

# (signs, question); {a}, {b}, {c} stand for the numbers in the order of the calculation.
_ONE_STEP = (
    ("+", "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?"),
    ("+", "There are {a} {thing} in a box and {b} in a bag. How many {thing} are there?"),
    ("-", "{name} had {a} {thing} and lost {b}. How many {thing} are left?"),
    ("-", "Of {a} {thing}, {name} gives away {b}. How many {thing} remain?"),
    ("*", "{name} fills {a} boxes with {b} {thing} each. How many {thing} is that?"),
)
_TWO_STEPS = (
    ("+-", "{name} has {a} {thing}, buys {b} more and then loses {c}. How many {thing} are left?"),
    ("++", "{a} {thing} are in a box, {b} in a bag and {c} on a table. How many {thing} is that?"),
    ("-+", "{name} lost {b} of {a} {thing} and then finds {c}. How many {thing} are there now?"),
    ("--", "Of {a} {thing}, {name} gives away {b} and sells {c}. How many {thing} remain?"),
    ("*+", "{name} fills {a} boxes with {b} {thing} each and keeps {c} more. How many is that?"),
)
KINDS = {"one_step": _ONE_STEP, "two_steps": _TWO_STEPS}


@dataclass(frozen=True)
class Problem:
    """A question, and the calculation that answers it: n numbers and n - 1 signs."""

    question: str
    signs: str
    numbers: tuple[int, ...]

    @property
    def prompt(self) -> str:
        return f"Question: {self.question}\nAnswer:"

    @property
    def response(self) -> str:
        result = self.result
        return f" {calculation(self.signs, self.numbers)} = {result}. The answer is {result}."

    @property
    def result(self) -> int:
        """The value from left to right; a product stands first, so this is the usual order."""
        steps = zip(self.signs, self.numbers[1:], strict=True)
        return reduce(lambda value, step: _COMPUTE[step[0]](value, step[1]), steps, self.numbers[0])


def calculation(signs: str, numbers: Sequence[int]) -> str:
    """Return e.g. "12 + 7 - 3"."""
    steps = [f" {sign} {number}" for sign, number in zip(signs, numbers[1:], strict=True)]
    return f"{numbers[0]}{''.join(steps)}"


def problems(kind: str, part: str, count: int, seed: int) -> Iterator[Problem]:
    """Yield `count` different problems of "one_step" or "two_steps", fixed by the seed.

    Args:
        kind: one of KINDS.
        part: "train" or "eval", which share no numbers.
        count: how many.
        seed: of the draws.
    """
    rng = random.Random(f"{seed}-{kind}-{part}")
    seen: set[str] = set()
    while len(seen) < count:
        problem = _draw(rng, kind)
        is_eval = is_held_out(problem.signs, problem.numbers)
        if is_eval == (part == "eval") and problem.question not in seen:
            seen.add(problem.question)
            yield problem


def choices(count: int, seed: int) -> Iterator[dict[str, object]]:
    """Yield questions about which calculation answers a held-out problem: {query, choices, gold}.

    Two wrong choices have other signs; the third has the right signs and one number changed.
    Results are left out, because a million parameters learn to read a problem but not to multiply.
    """
    rng = random.Random(f"{seed}-choices")
    for problem in problems("two_steps", "eval", count, seed=seed + 1):
        others = sorted({signs for signs, _ in _TWO_STEPS if signs != problem.signs})
        options = [(problem.signs, problem.numbers)]
        options += [(signs, problem.numbers) for signs in rng.sample(others, 2)]
        changed, place = list(problem.numbers), rng.randrange(len(problem.numbers))
        changed[place] = max(changed[place] + rng.choice((-2, -1, 1, 2)), 1)
        options.append((problem.signs, tuple(changed)))
        rng.shuffle(options)
        yield {
            "query": problem.prompt,
            "choices": [f"{calculation(*option)} =" for option in options],
            "gold": options.index((problem.signs, problem.numbers)),
        }


def is_held_out(signs: str, numbers: Sequence[int]) -> bool:
    """Return whether a problem is held out, by its numbers: 3 + 5 and 5 + 3 belong together."""
    digest = hashlib.sha256(f"{signs}{','.join(map(str, sorted(numbers)))}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def _draw(rng: random.Random, kind: str) -> Problem:
    """Return a random problem none of whose steps goes below 0."""
    signs, template = rng.choice(KINDS[kind])
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    while True:
        most = [_MOST_FACTOR, _MOST_FACTOR, _MOST] if signs[0] == "*" else [_MOST] * 3
        numbers = tuple(rng.randint(2, limit) for limit in most[: len(signs) + 1])
        ends = [Problem("", signs[:n], numbers[: n + 1]).result for n in range(1, len(numbers))]
        if min(ends) >= 0:
            break
    letters = dict(zip("abc", numbers, strict=False))
    return Problem(template.format(name=name, thing=thing, **letters), signs, numbers)
