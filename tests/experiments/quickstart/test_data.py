"""Problems and choices: correct, disjoint, deterministic, and without giveaways."""

import re

import pytest

from experiments.quickstart import library, problems

_ANSWER = re.compile(r" (\d+(?: [-+*] \d+)+) = (\d+)\. The answer is (\d+)\.")


@pytest.mark.parametrize("kind", problems.KINDS)
def test_responses_are_right(kind: str):
    for problem in problems.problems(kind, "train", 300, seed=1):
        found = _ANSWER.fullmatch(problem.response)
        assert found, problem.response
        calculation, result, answer = found.groups()
        assert result == answer and int(result) == eval(calculation) >= 0
        assert sorted(re.findall(r"\d+", problem.question)) == sorted(map(str, problem.numbers))
        assert len(problem.signs) == {"one_step": 1, "two_steps": 2}[kind]


@pytest.mark.parametrize("kind", problems.KINDS)
def test_no_held_out_numbers_are_trained_on(kind: str):
    train, held_out = (
        {(one.signs, *sorted(one.numbers)) for one in problems.problems(kind, part, count, seed=0)}
        for part, count in (("train", 6000), ("eval", 240))
    )
    assert len(held_out) > 50
    assert not train & held_out


def test_problems_are_distinct_and_the_same_for_a_seed():
    rows = list(problems.problems("two_steps", "train", 500, seed=3))
    assert rows == list(problems.problems("two_steps", "train", 500, seed=3))
    assert rows != list(problems.problems("two_steps", "train", 500, seed=4))
    assert len({row.question for row in rows}) == 500


def test_one_calculation_answers_the_problem():
    golds = []
    for item in problems.choices(200, seed=0):
        right = item["choices"][item["gold"]]
        a, first, b, second, c, _ = right.split()
        assert sorted((a, b, c)) == sorted(re.findall(r"\d+", item["query"]))
        assert problems.is_held_out(first + second, (int(a), int(b), int(c)))
        assert len(set(item["choices"])) == 4
        signs = [re.sub(r"[^-+*]", "", choice) for choice in item["choices"]]
        assert signs.count(first + second) == 2 and len(set(signs)) == 3
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
