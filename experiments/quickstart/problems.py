"""Generated arithmetic word problems: the target task, which the base model has never seen.

Held-out problems have number pairs that no training problem has, so they do not measure recall.
"""

import hashlib
import random
from collections.abc import Iterator

HELD_OUT_SHARE = 0.1

_NAMES = ("Ada", "Ben", "Cleo", "Dan", "Eva", "Finn", "Gita", "Hugo", "Ines", "Jon")
_THINGS = ("apples", "books", "coins", "stamps", "shells", "cards", "pens", "stones")
# (sign, most each number may be, question)
_TEMPLATES = (
    ("+", 60, "{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have now?"),
    ("+", 60, "There are {a} {thing} in a box and {b} in a bag. How many {thing} are there?"),
    ("-", 60, "{name} had {a} {thing} and lost {b}. How many {thing} are left?"),
    ("-", 60, "Of {a} {thing}, {name} gives away {b}. How many {thing} remain?"),
    ("*", 12, "{name} fills {a} boxes with {b} {thing} each. How many {thing} is that?"),
)
_COMPUTE = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}


def problems(part: str, count: int, seed: int) -> Iterator[dict[str, str]]:
    """Yield `count` different rows {prompt, response} of "train" or "eval", fixed by the seed."""
    rng = random.Random(f"{seed}-{part}")
    seen: set[str] = set()
    while len(seen) < count:
        sign, question, a, b = _draw(rng)
        if is_held_out(sign, a, b) != (part == "eval") or question in seen:
            continue
        seen.add(question)
        yield {"prompt": _prompt(question), "response": _response(sign, a, b, _result(sign, a, b))}


def choices(count: int, seed: int) -> Iterator[dict[str, object]]:
    """Yield questions about which calculation answers a held-out problem: {query, choices, gold}.

    The wrong choices have the two other signs, or the right sign with one number changed. Results
    are left out, because a million parameters learn to read a problem but not to multiply.
    """
    rng = random.Random(f"{seed}-choices")
    seen: set[str] = set()
    while len(seen) < count:
        sign, question, a, b = _draw(rng)
        if not is_held_out(sign, a, b) or question in seen:
            continue
        seen.add(question)
        others = [(other, a, b) for other in _COMPUTE if other != sign]
        step = rng.choice((-2, -1, 1, 2))
        others.append((sign, a + step, b) if rng.random() < 0.5 else (sign, a, max(b + step, 1)))
        options = [(sign, a, b), *others]
        rng.shuffle(options)
        yield {
            "query": _prompt(question),
            "choices": [f"{left} {op} {right} =" for op, left, right in options],
            "gold": options.index((sign, a, b)),
        }


def is_held_out(sign: str, a: int, b: int) -> bool:
    """Return whether a problem is held out, by its numbers: 3 + 5 and 5 + 3 belong together."""
    low, high = sorted((a, b))
    digest = hashlib.sha256(f"{sign}{low},{high}".encode()).digest()
    return int.from_bytes(digest[:4], "big") < HELD_OUT_SHARE * 2**32


def _draw(rng: random.Random) -> tuple[str, str, int, int]:
    sign, most, template = rng.choice(_TEMPLATES)
    a, b = rng.randint(2, most), rng.randint(2, most)
    if sign == "-":
        a, b = max(a, b), min(a, b)
    name, thing = rng.choice(_NAMES), rng.choice(_THINGS)
    return sign, template.format(name=name, thing=thing, a=a, b=b), a, b


def _result(sign: str, a: int, b: int) -> int:
    return _COMPUTE[sign](a, b)


def _prompt(question: str) -> str:
    return f"Question: {question}\nAnswer:"


def _response(sign: str, a: int, b: int, result: int) -> str:
    return f" {a} {sign} {b} = {result}. The answer is {result}."
