"""Draw the charts of the dLLM code study from its results.

    python -m pertoken.bench.study_images [--results DIR] [--out DIR] [--measure passed|parses|likeness]

Every chart is drawn from the rows in the details of its claim; nothing is measured here.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pertoken.bench import results
from pertoken.bench.study_runs import NAME
from pertoken.core.chart import Chart
from pertoken.denoise.study_charts import COSTS, MEASURES, SWEEPS, cost, sweep

GOES_BY = {"remasking": "passed"}


def charts(document: dict[str, Any], measure: str | None = None) -> dict[str, Chart]:
    """By file name, from a document of results: every sweep in the claims' details, and quality against cost per
    task. measure: None for what the claims go by: valid answers for most knobs, passing ones for remasking and costs.
    """
    tasks: dict[str, dict[str, list[dict[str, Any]]]] = {}
    for record in document["claims"]:
        for task, sweeps in record.get("detail", {}).get("charts", {}).items():
            tasks.setdefault(task, {}).update(sweeps)
    found: dict[str, Chart] = {}
    for task, sweeps in tasks.items():
        stem = f"{NAME}_{task.replace(' ', '_')}"
        for name, rows in sweeps.items():
            if name in SWEEPS:
                found[f"{stem}_{name}.svg"] = sweep(
                    name, rows, _note(task, rows), measure or GOES_BY.get(name, "parses")
                )
        every = [row for name, rows in sweeps.items() for row in rows if name != "canvas"]  # it has fewer prompts
        for name in COSTS:
            found[f"{stem}_{name}.svg"] = cost(name, every, _note(task, every), measure or "passed")
    return found


def _note(task: str, rows: list[dict[str, Any]]) -> str:
    return f"{task}, n = {rows[0]['prompts']}; bands: 95 % bootstrap over prompts"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Draw the charts of the dLLM code study from its results.")
    parser.add_argument("--results", type=Path, help="directory of results; default: the checkout's")
    parser.add_argument("--out", type=Path, default=Path("docs/images"), help="directory of the SVG files")
    parser.add_argument("--measure", choices=MEASURES, help="draw this in every chart")
    given = parser.parse_args(arguments)
    document = results.read(NAME, results.results_dir(given.results))
    if document is None:
        parser.error(f"there are no results of {NAME}; run: pertoken bench {NAME}")
    for name, chart in charts(document, given.measure).items():
        print(chart.save(given.out / name))


if __name__ == "__main__":
    main()
