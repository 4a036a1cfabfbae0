"""Draw the charts of the dLLM code study from its results.

python -m pertoken.bench.study_images [--results DIR] [--out DIR]
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pertoken.bench import results
from pertoken.bench.study_runs import NAME
from pertoken.core.chart import Chart
from pertoken.denoise.study_charts import COSTS, SWEEPS, cost, sweep

MEASURES = ("passed", "parses")


def charts(document: dict[str, Any]) -> dict[str, Chart]:
    """By file name, from a document of results: every sweep in the claims' details, and quality against cost per
    task."""
    tasks: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in document["claims"]:
        for task, sweeps in record.get("detail", {}).get("charts", {}).items():
            tasks.setdefault(task, {}).update(sweeps)
    found: dict[str, Chart] = {}
    for task, sweeps in tasks.items():
        stem = f"{NAME}_{task.replace(' ', '_')}"
        for name, rows in sweeps.items():
            for measure in MEASURES if name in SWEEPS else ():
                found[f"{stem}_{name}_{measure}.svg"] = sweep(name, rows, _note(task, rows), measure)
        every = [row for name, rows in sweeps.items() for row in rows if name != "canvas"]  # it has fewer prompts
        for name in COSTS:
            found |= {f"{stem}_{name}_{m}.svg": cost(name, every, _note(task, every), m) for m in MEASURES}
    return found


def _note(task: str, rows: list[dict[str, Any]]) -> str:
    return f"{task}, n = {rows[0]['prompts']}; bands: 95 % bootstrap over prompts"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the charts of the dLLM code study from its results.")
    parser.add_argument("--results", type=Path, help="directory of results; default: the checkout's")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="directory of the SVG files")
    given = parser.parse_args(arguments)
    document = results.read(NAME, results.results_dir(given.results))
    if document is None:
        parser.error(f"there are no results of {NAME}; run: pertoken bench {NAME}")
    for name, chart in charts(document).items():
        print(chart.save(given.out / name))


if __name__ == "__main__":
    main()
