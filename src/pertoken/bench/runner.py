"""Run claims in order, keeping every finished one on disk at once."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pertoken.bench import results
from pertoken.bench.claims import Bench, Claim, claims_of, stem


@dataclass
class Outcome:
    """What a run produced: records in order, files written, and whether it was stopped before its end."""

    records: list[dict[str, Any]] = field(default_factory=list)
    saved: list[Path] = field(default_factory=list)
    interrupted: bool = False

    @property
    def fine(self) -> bool:
        """Every claim was measured and holds."""
        return not self.interrupted and all(record["holds"] for record in self.records)


def run(
    names: Iterable[str],
    quick: bool = False,
    on_record: Callable[[dict[str, Any]], None] = lambda record: None,
    *,
    seed: int = 0,
    directory: Path | None = None,
    status: Callable[[str], None] = lambda text: None,
    only: str = "",
) -> Outcome:
    """Measure every claim of the named methods whose sentence contains `only`, in any case of letters.

    After each claim `on_record` is called with its record and, unless `quick`, `directory`/NAME.json is brought up to
    date. A claim that raises is recorded with its error as not holding, and the run goes on. Ctrl-C ends the run and
    keeps what was finished. Raises `ValueError`, before anything runs, for an unknown method, one without claims, or an
    `only` that none of them contains.
    """
    plan = {name: claims_of(name) for name in dict.fromkeys(names)}
    if empty := [name for name, claims in plan.items() if not claims]:
        raise ValueError(f"{empty[0]} has no claims to measure; write them in pertoken/bench/{stem(empty[0])}.py")
    if not any(only.lower() in claim.claim.lower() for claims in plan.values() for claim in claims):
        every = "; ".join(claim.claim for claims in plan.values() for claim in claims)
        raise ValueError(f"no claim of {', '.join(plan)} contains {only!r}; the claims are: {every}")
    directory = results.results_dir(directory)
    bench, outcome = Bench(quick, seed, status), Outcome()
    try:
        for name, claims in plan.items():
            done: list[dict[str, Any]] = []
            for number, claim in enumerate(claims, 1):
                if only.lower() not in claim.claim.lower():
                    continue
                status(f"{name} {number}/{len(claims)}: {claim.claim}")
                record, seconds = _measure(claim, bench)
                outcome.records.append(record)
                done.append(record | {"date": results.now(), "duration": round(seconds, 3)})
                if not quick:
                    path = _keep(name, done, [c.claim for c in claims], directory)
                    outcome.saved = [*dict.fromkeys([*outcome.saved, path])]
                on_record(record)
    except KeyboardInterrupt:
        outcome.interrupted = True
    return outcome


def _measure(claim: Claim, bench: Bench) -> tuple[dict[str, Any], float]:
    random.seed(bench.seed)
    np.random.seed(bench.seed % 2**32)
    torch.manual_seed(bench.seed)
    start = time.perf_counter()
    try:
        record = claim.record(claim.measure(bench), bench.seed)
    except Exception as error:
        record = claim.failed(error, bench.seed)
    return record, time.perf_counter() - start


def _keep(name: str, done: list[dict[str, Any]], current: list[str], directory: Path) -> Path:
    document = {
        "method": name,
        "date": done[-1]["date"],
        "duration": round(sum(record["duration"] for record in done), 3),
        "versions": results.versions(),
        "machine": results.machine(),
        "claims": done,
    }
    return results.write(name, results.merge(results.read(name, directory), document, current), directory)
