"""Everything that is generated about methods, as plain data: cards, claims and their newest results."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pertoken.bench import results
from pertoken.bench.claims import BENCHES, claims_of
from pertoken.bench.settings import dial_of
from pertoken.core.card import Card, card, cards
from pertoken.methods import load_methods
from pertoken.models.kind import kind_needed

GENERATING = ("policy", "decoder")


def entries(directory: Path | None = None) -> list[dict[str, Any]]:
    """One entry per registered method, in the order of the nine questions; results are read from `directory`."""
    load_methods()
    where = results.results_dir(directory)
    return [entry(name, where) for name in cards()]


def entry(name: str, directory: Path) -> dict[str, Any]:
    """The entry of one method: its card, the kind and families of models it runs on, and each claim with its newest
    record or null."""
    one = card(name)
    return {
        "name": one.name,
        "question": one.question,
        "shape": one.shape,
        "summary": one.summary,
        "paper": {"title": one.paper.title, "arxiv": one.paper.arxiv},
        "exactness": one.exactness,
        "reads": sorted(one.reads),
        "writes": sorted(one.writes),
        "needs": sorted(one.needs),
        "model": kind_needed(one.needs) if one.shape in GENERATING else None,
        "families": _families(one),
        "baseline": one.baseline,
        "baselines": list(one.baselines),
        "dial": dial_name(one),
    } | measured(name, directory)


def measured(name: str, directory: Path) -> dict[str, Any]:
    """Claims of a method, or of a bench of many, each with its newest record or null; and on what they were measured,
    null if they were not."""
    kept = results.read(name, directory) or {"claims": []}
    newest = {record["claim"]: record for record in kept["claims"]}
    return {
        "claims": [
            {
                "claim": c.claim,
                "metric": c.metric,
                "expected": c.expected,
                "shown": c.shown,
                "result": newest.get(c.claim),
            }
            for c in claims_of(name)
        ],
        "measured": {key: kept.get(key) for key in ("date", "versions", "machine")} if newest else None,
    }


def benches(directory: Path | None = None) -> list[dict[str, Any]]:
    """One entry per bench of many methods that was measured."""
    where = results.results_dir(directory)
    there = [name for name in BENCHES if results.read(name, where) is not None]
    return [{"name": name, "baseline": False} | measured(name, where) for name in there]


def _families(one: Card) -> list[str]:
    if one.shape not in GENERATING:
        return []
    from pertoken.models import families

    return list(families())


def dial_name(one: Card) -> str | None:
    """The setting that `pertoken tune` sweeps, None where there is none."""
    try:
        return dial_of(one).name
    except ValueError:
        return None


def headline(one: dict[str, Any]) -> str:
    """One line on the newest results of an entry: how many claims hold, and the first of them in figures."""
    found = [claim["result"] for claim in one["claims"] if claim["result"]]
    if not found:
        return "a baseline" if one["baseline"] else "not measured here"
    first, holding = found[0], sum(bool(record["holds"]) for record in found)
    return f"{holding}/{len(one['claims'])} claims hold; {first['metric']} {figure(first)}"


def figure(record: dict[str, Any]) -> str:
    """A record's numbers in words: value, baseline, ratio."""
    if record["value"] is None:
        return record.get("detail", {}).get("error", "not a number")
    text = number(record["value"])
    if record["baseline_value"] is not None and record["baseline"]:
        text += f" against {number(record['baseline_value'])} ({record['baseline']})"
    return text


def number(value: float | None) -> str:
    """Four significant digits, whole numbers as they are."""
    if value is None:
        return "-"
    return f"{value:.0f}" if float(value).is_integer() and abs(value) < 1e6 else f"{value:.4g}"


def recipe(name: str) -> Any:
    """The recipe of a zoo model, filter or tuning; an unknown name raises `ValueError` naming the nearest ones."""
    import difflib

    from pertoken.zoo.pausing import PAUSES
    from pertoken.zoo.recipe import FILTERS, RECIPES
    from pertoken.zoo.scenes_models import SCENE_RECIPES
    from pertoken.zoo.tunings import TUNINGS

    known = RECIPES | FILTERS | TUNINGS | PAUSES | SCENE_RECIPES
    if name in known:
        return known[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    hint = f"did you mean {near[0]}?" if near else f"choose one of {', '.join(known)}"
    raise ValueError(f"zoo model {name!r} is unknown; {hint}")


def zoo_entries() -> list[dict[str, Any]]:
    """One entry per zoo model, filter or tuning; bytes of its weights, 0 where they are not installed."""
    from pertoken.zoo import WEIGHTS
    from pertoken.zoo.pausing import PAUSES
    from pertoken.zoo.recipe import FILTERS, RECIPES
    from pertoken.zoo.scenes_models import SCENE_RECIPES
    from pertoken.zoo.tunings import TUNINGS

    sizes = {name: (one.shape.layers, one.shape.width, one.shape.vocab) for name, one in RECIPES.items()}
    sizes |= {name: (max(one.layers), one.block, None) for name, one in FILTERS.items()}
    sizes |= dict.fromkeys(TUNINGS | PAUSES, (None, None, None))
    sizes |= {name: (one.layers, one.width, None) for name, one in SCENE_RECIPES.items()}
    teachers = {name: one.teacher for name, one in RECIPES.items()}
    teachers |= {name: one.model for name, one in (FILTERS | TUNINGS | PAUSES).items()}
    teachers |= {name: one.start for name, one in SCENE_RECIPES.items()}
    found = []
    for name, (layers, width, vocabulary) in sizes.items():
        files = list((WEIGHTS / name).glob("*.safetensors"))
        if name in PAUSES and PAUSES[name].kept.is_file():
            files = [PAUSES[name].kept]
        found.append(
            {
                "name": name,
                "layers": layers,
                "width": width,
                "vocabulary": vocabulary,
                "steps": recipe(name).steps,
                "teacher": teachers[name],
                "path": str(files[0].parent) if files else None,
                "bytes": sum(path.stat().st_size for path in files),
            }
        )
    return found
