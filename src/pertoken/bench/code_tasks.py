"""Code to be written whose correctness a program can tell: rests of lines, bodies of functions, and unit tests.

*Rests of lines*: held-out code that stops within a line. *Bodies*: the first line of a function of `zoo.unit_tests`,
under a name that says what it computes; an answer passes if the function, run in a process of its own, gives the right
results on random arguments. *Assertions*: such a function with its body; an answer passes if it consists of true tests
of that function, the last line ended. Seeds are beyond those of training, but the kinds of functions are those trained
on: what is asked is to recall and apply, not to invent.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

from pertoken.bench.answers import likeness, parses, passes, true_lines
from pertoken.bench.execute import Limits, execute
from pertoken.zoo.unit_tests import MAKERS, TEMPLATES, Template, unit_tests

# unit tests with seeds from 10**6 on are in no training data; those from there to here were looked at when the claims'
# measures were chosen
UNSEEN = 2 * 10**6
CHECKS = 12


@dataclass(frozen=True)
class Problem:
    """prompt: what the model is given; original: an answer that passes; checks: a program that, put behind prompt and
    answer, fails if the answer is wrong (none for unit tests, which are read, not run)."""

    prompt: str
    original: str
    checks: str | None = None


def bodies(count: int, seed: int = UNSEEN) -> list[Problem]:
    """Different functions to be written from their first line."""
    rng, found = random.Random(seed), {}
    for source, _ in unit_tests(40 * count, seed, ("python",)):
        line, body = source.splitlines(keepends=True)[:2]
        if line not in found:
            found[line] = Problem(line, body, _checks(line, _template(line, body), rng))
        if len(found) == count:
            break
    return list(found.values())


def assertions(count: int, seed: int = UNSEEN) -> list[Problem]:
    """Different functions whose unit tests are to be written."""
    pairs = dict.fromkeys(unit_tests(4 * count, seed, ("python",)))
    return [Problem(source, lines) for source, lines in list(pairs)[:count]]


def rests_of_lines(count: int | None = None) -> list[Problem]:
    """Excerpts of held-out files that stop within a line; the original is the rest of that line."""
    from pertoken.zoo import corpus
    from pertoken.zoo.evaluate import prompts

    texts, found = list(corpus.split_texts("heldout").values()), []
    for prompt in prompts():
        rests = (text.partition(prompt)[2].split("\n", 1)[0] for text in texts if prompt in text)
        if (rest := next(rests, "")).strip() and not prompt.endswith("\n"):
            found.append(Problem(prompt, rest.rstrip()))
    return found[:count]


def _template(line: str, body: str) -> Template:
    name = line.removeprefix("def ").split("(")[0]
    known = [t for t in TEMPLATES if f"return {t.python}\n" == body.strip() + "\n" and t.name in name]
    return max(known, key=lambda t: len(t.name))


def _checks(line: str, template: Template, rng: random.Random) -> str:
    name, lines = line.removeprefix("def ").split("(")[0], []
    compute = eval(f"lambda {', '.join(template.parameters)}: {template.python}")
    for _ in range(CHECKS):
        given = [MAKERS[kind](rng) for kind in template.parameters.values()]
        lines.append(f"assert {name}({', '.join(map(repr, given))}) == {compute(*given)!r}\n")
    return "".join(lines)


def line_of(answer: str) -> str:
    """The part of an answer that belongs to the line begun in the prompt."""
    return answer.split("\n", 1)[0].rstrip()


def body_of(answer: str) -> str:
    """The part of an answer that belongs to the function begun in the prompt: to the first line that is neither empty
    nor indented."""
    kept = []
    for line in answer.splitlines(keepends=True):
        if line.strip() and not line.startswith((" ", "\t")):
            break
        kept.append(line)
    return "".join(kept).rstrip() + "\n"


class Judge:
    """Verdicts on answers to problems: passed; parses: prompt and answer are Python; likeness to the original, 0 to 1;
    lines: share of the lines of unit tests that are true."""

    def __init__(self, problems: Sequence[Problem], limits: Limits | None = None):
        self.problems, self.limits = list(problems), limits or Limits(seconds=1.0)

    def __call__(self, where: Sequence[int], answers: Sequence[str]) -> list[dict[str, float]]:
        """where: the problem of each answer."""
        pairs = [(self.problems[i], answer) for i, answer in zip(where, answers, strict=True)]
        programs = {p.prompt + body_of(a) + p.checks for p, a in pairs if p.checks is not None}
        ordered = sorted(programs)
        right = {text: end.passed for text, end in zip(ordered, execute(ordered, self.limits), strict=True)}
        return [self._verdict(problem, answer, right) for problem, answer in pairs]

    def _verdict(self, problem: Problem, answer: str, right: dict[str, bool]) -> dict[str, float]:
        if problem.checks is not None:
            body = body_of(answer)
            passed, share = right[problem.prompt + body + problem.checks], 0.0
            found = {
                "passed": passed,
                "parses": parses(problem.prompt + body),
                "likeness": likeness(body, problem.original),
            }
        else:
            true, total = true_lines(problem.prompt, answer)
            passed, share = passes(problem.prompt, answer), true / max(total, 1)
            whole = bool(answer.strip()) and parses(problem.prompt + answer)
            found = {"passed": passed, "parses": whole, "likeness": likeness(answer, problem.original)}
        return {name: float(value) for name, value in (found | {"lines": share}).items()}
