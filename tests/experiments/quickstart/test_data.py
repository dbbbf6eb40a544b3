"""Problems and choices: correct, disjoint, deterministic, and without giveaways."""

import re

import pytest

from experiments.quickstart import library, problems

_EQUATION = re.compile(r"(\d+) ([-+*]) (\d+) = (\d+)\. The answer is (\d+)\.")


def equation(text: str) -> tuple[str, int, int, int]:
    found = _EQUATION.search(text)
    assert found, text
    a, sign, b, result, answer = found.groups()
    assert result == answer
    return sign, int(a), int(b), int(result)


def test_responses_are_right():
    for row in problems.problems("train", 300, seed=1):
        sign, a, b, result = equation(row["response"])
        assert result == {"+": a + b, "-": a - b, "*": a * b}[sign] >= 0
        assert {str(a), str(b)} <= set(re.findall(r"\d+", row["prompt"]))


def test_no_held_out_numbers_are_trained_on():
    def pairs(part: str, count: int) -> set:
        rows = problems.problems(part, count, seed=0)
        return {
            (sign, *sorted((a, b))) for sign, a, b, _ in (equation(row["response"]) for row in rows)
        }

    train, held_out = pairs("train", 6000), pairs("eval", 240)
    assert len(held_out) > 50
    assert not train & held_out


def test_problems_are_distinct_and_the_same_for_a_seed():
    rows = list(problems.problems("train", 500, seed=3))
    assert rows == list(problems.problems("train", 500, seed=3))
    assert rows != list(problems.problems("train", 500, seed=4))
    assert len({row["prompt"] for row in rows}) == 500


def test_one_calculation_answers_the_problem():
    golds = []
    for item in problems.choices(200, seed=0):
        right = item["choices"][item["gold"]]
        a, sign, b, _ = right.split()
        assert {a, b} <= set(re.findall(r"\d+", item["query"]))
        assert problems.is_held_out(sign, int(a), int(b))
        assert len(set(item["choices"])) == 4
        others = [choice.split() for choice in item["choices"] if choice != right]
        assert sorted(other[1] for other in others) == sorted("+-*")
        golds.append(item["gold"])
    assert min(golds.count(place) for place in range(4)) > 25, "the right one is found by its place"


@pytest.fixture(scope="module")
def source():
    return library.standard_library()


def test_library_parts_share_no_file(source):
    train, held_out = ({row["path"] for row in source[part]} for part in ("train", "eval"))
    assert len(train) > 300 and len(held_out) > 10
    assert not train & held_out


def test_the_right_line_follows_and_its_words_tell_nothing(source):
    lines = [line.rstrip() for row in source["eval"] for line in row["text"].splitlines()]
    texts = "\n".join(lines)
    for item in library.choices(source["eval"], 60, seed=0):
        context = "\n".join(line.rstrip() for line in item["query"].splitlines())
        assert f"{context}\n {item['choices'][item['gold']]}\n" in texts
        assert len({tuple(sorted(choice.split())) for choice in item["choices"]}) == 1
        assert len(set(item["choices"])) == 4
