"""Problems made by program: their originals pass, what is wrong fails, and nothing is executed in this process."""

from __future__ import annotations

import pytest

from pertoken.bench.code_tasks import Judge, assertions, bodies, body_of


@pytest.fixture(scope="module")
def problems():
    return [*bodies(40), *assertions(20)]


def test_originals_pass_and_problems_differ(problems):
    assert len({p.prompt for p in problems}) == 60
    verdicts = Judge(problems)(range(60), [p.original for p in problems])
    assert all(v["passed"] == v["parses"] == v["likeness"] == 1.0 for v in verdicts)
    assert [v["lines"] for v in verdicts[40:]] == [1.0] * 20


def test_wrong_answers_fail_each_in_its_way(problems):
    body, test = problems[0], problems[-1]
    other = next(p for p in bodies(40) if p.original != body.original)
    name = test.prompt.removeprefix("def ").split("(")[0]
    answers = [
        other.original,
        "    return None\n",
        "    return (\n",
        "    while True:\n        pass\n",
        "",
        "    import os\n",
    ]
    said = Judge(problems)([0] * len(answers), answers)
    assert [v["passed"] for v in said] == [0.0] * len(answers)
    assert [v["parses"] for v in said] == [1.0, 1.0, 0.0, 1.0, 0.0, 1.0]
    lines = [
        f"assert {name}(1, 2, 3, 4) == 5\n",
        "assert True\n",
        test.original.rstrip(),
        "",
        test.original + "x = 1\n",
    ]
    assert [v["passed"] for v in Judge(problems)([59] * 5, lines)] == [0.0] * 5


def test_what_follows_the_function_does_not_count_and_other_ways_to_write_it_do(problems):
    body = problems[0]
    longer = body.original + "\n\n\n# tests\nassert False\n"
    local = body.original.replace("    return ", "    found = ") + "    return found\n"
    assert [v["passed"] for v in Judge(problems)([0, 0], [longer, local])] == [1.0, 1.0]
    assert body_of(longer) == body.original


def test_a_body_that_ends_the_program_early_does_not_pass(problems):
    escape = "    import sys\n    sys.exit(0)\n"
    assert Judge(problems)([0], [escape])[0]["passed"] == 0.0


def test_the_same_seed_makes_the_same_problems():
    assert bodies(5) == bodies(5) and assertions(5) == assertions(5) and bodies(5) != bodies(5, seed=3 * 10**6)
