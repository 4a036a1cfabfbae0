"""Results: one JSON file per method, with what it was measured on.

    {"method", "date", "duration", "versions", "machine", "claims": [record + {"date", "duration"}]}

Durations are in seconds. The head describes the newest run. A claim that was not measured in it keeps its own date, and
its own versions and machine where they differ from the head's.
"""

from __future__ import annotations

import datetime
import json
import os
import platform
import tempfile
from pathlib import Path
from typing import Any

CACHE = Path("~/.cache/pertoken/results")


def repository(start: Path | None = None) -> Path | None:
    """The nearest directory from `start` (default: here) upward whose pyproject.toml is this project's."""
    start = (start or Path.cwd()).resolve()
    for folder in (start, *start.parents):
        project = folder / "pyproject.toml"
        if project.is_file() and 'name = "pertoken"' in project.read_text(encoding="utf-8"):
            return folder
    return None


def results_dir(given: Path | None = None) -> Path:
    """Where results lie: as given, else ./results, else that of the checkout around it, else in the user's cache."""
    if given is not None:
        return given
    if Path("results").is_dir():
        return Path("results")
    root = repository()
    return root / "results" if root is not None else CACHE.expanduser()


def versions() -> dict[str, str]:
    """Versions of what the numbers depend on."""
    import torch
    import transformers

    import pertoken

    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "pertoken": pertoken.__version__,
    }


def machine() -> dict[str, Any]:
    """Processor, cores, threads torch uses, memory in bytes, and the GPU if there is one (else null)."""
    import torch

    try:
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        memory = None
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def path_of(name: str, directory: Path) -> Path:
    return directory / f"{name}.json"


def read(name: str, directory: Path) -> dict[str, Any] | None:
    """The kept results of a method, None if there are none. Raises `ValueError` for a file that is something else."""
    path = path_of(name, directory)
    if not path.is_file():
        return None
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
        kept["claims"][0:0]
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} does not hold results ({error}); mend it, or delete it and run the bench again"
        ) from error
    return kept


def merge(kept: dict[str, Any] | None, new: dict[str, Any], current: list[str]) -> dict[str, Any]:
    """`new` with the claims of `kept` that it did not measure, in the order of `current`, its claims' sentences.

    A kept claim that the method no longer makes is dropped.
    """
    claims = {record["claim"]: record for record in new["claims"]}
    for record in (kept or {}).get("claims", []):
        if record["claim"] in claims:
            continue
        own = {k: (kept or {}).get(k) for k in ("versions", "machine") if (kept or {}).get(k) != new[k]}
        claims[record["claim"]] = own | record
    return new | {"claims": [claims[sentence] for sentence in current if sentence in claims]}


def write(name: str, document: dict[str, Any], directory: Path) -> Path:
    """Replace the method's file in one move, so that a reader or an interrupt never sees half of it."""
    directory.mkdir(parents=True, exist_ok=True)
    path = path_of(name, directory)
    text = json.dumps(document, indent=1, allow_nan=False, default=str) + "\n"
    handle, half = tempfile.mkstemp(prefix=f".{name}.", suffix=".tmp", dir=directory)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        os.chmod(half, 0o644)
        os.replace(half, path)
    except BaseException:
        Path(half).unlink(missing_ok=True)
        raise
    return path


def now() -> str:
    """Date and time in UTC, to the second."""
    return datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
