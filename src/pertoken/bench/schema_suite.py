"""The official JSON Schema test suite against the grammars of `json_schema`, with a ratchet.

    python -m pertoken.bench.schema_suite FOLDER [--ratchet FILE] [--update]

FOLDER is a checkout of JSON-Schema-Test-Suite (`tests/`, `remotes/`). An instance counts as accepted if its compact
text is in the language. Outcomes, best first: right; refused (for a keyword that is named); rejects a valid instance;
accepts an invalid one. The ratchet file lists all that are not right; a case may get better, and fails if it gets
worse. `format` is asserted in the optional tests of formats and a note elsewhere, as the suite has it.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.engine import Engine
from pertoken.decode.grammar.json_schema import json_schema
from pertoken.decode.grammar.json_text import compact
from pertoken.decode.grammar.schema_documents import Unsupported
from pertoken.decode.grammar.vocabulary import Vocabulary

DRAFTS = {"draft2020-12": 2020, "draft7": 7}
RANKS = ("right", "refused", "rejects valid", "accepts invalid")


def run(folder: Path) -> dict[str, str]:
    """Outcome of every case."""
    found: dict[str, str] = {}
    vocabulary = Vocabulary([bytes([b]) for b in range(256)])
    others = dict(remotes(folder))
    for name, draft in DRAFTS.items():
        for path in sorted((folder / "tests" / name).rglob("*.json")):
            place = path.relative_to(folder / "tests").as_posix()
            formats = "/format/" in place or path.stem == "format-assertion"
            for group in json.loads(path.read_text("utf-8")):
                title = f"{place}: {group['description']}"
                for test, outcome in _group(group, draft, formats, others, vocabulary):
                    found[f"{title}: {test}"] = outcome
    if not found:
        raise BadRequest(f"{folder} holds no tests; give a folder with tests/draft2020-12 and tests/draft7 in it")
    return found


def remotes(folder: Path) -> Iterator[tuple[str, Any]]:
    """Documents that the suite's references lead to, by address."""
    root = folder / "remotes"
    for path in sorted(root.rglob("*.json")):
        if not path.relative_to(root).parts[0].startswith("draft") or path.relative_to(root).parts[0] in DRAFTS:
            yield f"http://localhost:1234/{path.relative_to(root).as_posix()}", json.loads(path.read_text("utf-8"))


def _group(
    group: dict[str, Any], draft: int, formats: bool, others: dict[str, Any], vocabulary: Vocabulary
) -> Iterator[tuple[str, str]]:
    engine, refusal = None, ""
    try:
        grammar = json_schema(group["schema"], formats=formats, draft=draft, documents=others)
        engine = Engine(grammar, vocabulary)
    except Unsupported as error:
        refusal = f"refused: {error.keyword}"
    except BadRequest as error:
        if "allows no value" not in str(error):
            refusal = f"refused: {str(error)[:60]}"
    for test in group["tests"]:
        if refusal:
            yield test["description"], refusal
            continue
        accepted = False
        if engine is not None:
            parse, _ = engine.read_bytes(engine.start, compact(test["data"]).encode("utf-8", "surrogatepass"))
            accepted = parse >= 0 and engine.ends(parse)
        wrong = "accepts invalid" if accepted else "rejects valid"
        yield test["description"], "right" if accepted == test["valid"] else wrong


def worse(found: dict[str, str], known: dict[str, str]) -> list[str]:
    """Cases whose outcome is worse than the ratchet file allows; a case that it does not list must be right."""
    return [f"{case}: {outcome}, was {known.get(case, 'right')}" for case, outcome in found.items()
            if _rank(outcome) > _rank(known.get(case, "right"))]  # fmt: skip


def _rank(outcome: str) -> int:
    return RANKS.index(outcome.partition(":")[0])


def summary(found: dict[str, str]) -> str:
    """Counts, and how many cases each refused keyword costs."""
    kinds = Counter(outcome.partition(":")[0] for outcome in found.values())
    costs = Counter(outcome.partition(": ")[2] for outcome in found.values() if outcome.startswith("refused"))
    lines = [f"{len(found)} cases: " + ", ".join(f"{kinds[kind]} {kind}" for kind in RANKS)]
    lines += [f"  refused for {keyword}: {count} cases" for keyword, count in costs.most_common()]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m pertoken.bench.schema_suite", description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--ratchet", type=Path, help="file with the outcomes that are known not to be right")
    parser.add_argument("--update", action="store_true", help="write the ratchet file anew")
    given = parser.parse_args(arguments)
    try:
        found = run(given.folder)
    except BadRequest as error:
        print(error, file=sys.stderr)
        return 2
    print(summary(found))
    if given.ratchet is None:
        return 0
    if given.update:
        wrong = {case: outcome for case, outcome in sorted(found.items()) if outcome != "right"}
        given.ratchet.write_text(json.dumps(wrong, indent=0, ensure_ascii=False) + "\n", "utf-8")
        return 0
    failures = worse(found, json.loads(given.ratchet.read_text("utf-8")))
    print(*failures, sep="\n", file=sys.stderr)
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
