"""What a study of decoders keeps: settings, counts and verdicts, with their uncertainty; as tables, JSON and charts."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from pertoken.core.errors import BadRequest
from pertoken.core.estimates import interval, pass_at
from pertoken.denoise.study_charts import charts

PASSED = "passed"


@dataclass(frozen=True)
class Setting:
    """Knobs of a decoder. canvas: positions, or the most new tokens of the autoregressive model, which knows only this
    and how to sample; block: positions (None: the canvas is one); steps: over the canvas (None: one per position);
    rule, refresh: names of `dllm_code_study.RULES` and `REFRESHES`; temperature 0 is greedy."""

    canvas: int = 128
    block: int | None = 32
    steps: int | None = None
    rule: str = "low_confidence"
    pace: str = "even"
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    alg_temp: float = 0.0
    refresh: str = "recompute"
    autoregressive: bool = False

    @property
    def share(self) -> float:
        """Steps per position of the canvas."""
        return (self.steps or self.canvas) / self.canvas

    @property
    def random(self) -> bool:
        """Whether another seed may give another answer."""
        chance = not self.autoregressive and (self.alg_temp > 0 or self.rule in ("random", "origin"))
        return chance or self.temperature > 0

    @property
    def twin(self) -> Setting:
        """The autoregressive setting that it is compared with."""
        return Setting(self.canvas, None, None, "", "", self.temperature, self.top_p, self.top_k, 0.0, "", True)


@dataclass(frozen=True)
class Outcome:
    """What a setting did, over `prompts x samples` answers.

    verdicts: for each measure of the judge, values `[prompt][sample]`; lengths `[prompt][sample]`: tokens before the
    end of text; texts likewise; row_steps: forwards (NFE); token_forwards: positions computed; flops: an estimate of
    operations; seconds: wall clock, all four summed over answers.
    """

    setting: Setting
    verdicts: dict[str, list[list[float]]]
    lengths: list[list[int]]
    texts: list[list[str]]
    row_steps: int
    token_forwards: int
    flops: float
    seconds: float

    @property
    def answers(self) -> int:
        return sum(map(len, self.lengths))

    def means(self, measure: str = PASSED) -> list[float]:
        """One mean over samples per prompt."""
        return [float(np.mean(values)) for values in self.verdicts[measure]]

    def mean(self, measure: str = PASSED) -> float:
        return float(np.mean(self.means(measure)))

    def interval(self, measure: str = PASSED) -> tuple[float, float]:
        """95 % bootstrap interval of the mean, over prompts."""
        return interval(self.means(measure))

    @property
    def samples(self) -> int:
        """Answers to each prompt."""
        return min(map(len, self.lengths))

    def pass_at(self, k: int, measure: str = PASSED) -> float:
        """Chance that one of k answers has a measure of 1, a mean over prompts; for measures that are 0 or 1."""
        return float(np.mean([pass_at(k, round(sum(row)), len(row)) for row in self.verdicts[measure]]))

    @property
    def distinct(self) -> float:
        """Different answers to a prompt, as a share of its samples; 1 for one sample."""
        return float(np.mean([len(set(row)) / len(row) for row in self.texts]))

    @property
    def tokens(self) -> int:
        return sum(map(sum, self.lengths))

    def row(self) -> dict[str, float]:
        """Every figure of the study: of each measure the mean, its interval and, if it is 0 or 1, the chance that one
        of all samples has it; and costs per answer."""
        each, found = 1 / self.answers, {}
        for measure, values in self.verdicts.items():
            low, high = self.interval(measure)
            found |= {measure: self.mean(measure), f"{measure}_low": low, f"{measure}_high": high}
            if all(value in (0, 1) for row in values for value in row):
                found[f"{measure}@k"] = self.pass_at(self.samples, measure)
        return found | {
            "prompts": len(self.lengths),
            "samples": self.samples,
            "distinct": self.distinct,
            "nfe": self.row_steps * each,
            "tokens_per_nfe": self.tokens / self.row_steps,
            "token_forwards": self.token_forwards * each,
            "flops": self.flops * each,
            "seconds": self.seconds * each,
            "length": self.tokens * each,
            "end_share": 1 - self.tokens * each / self.setting.canvas,
        }


@dataclass
class Study:
    """Settings by sweep and their outcomes; a setting that several sweeps share was run once."""

    sweeps: dict[str, list[Setting]]
    outcomes: dict[Setting, Outcome]
    about: dict[str, Any] = field(default_factory=dict)

    def of(self, setting: Setting) -> Outcome:
        """Raises `BadRequest` for a setting that was not run."""
        if setting not in self.outcomes:
            raise BadRequest(f"{setting} was not run; it is in none of the sweeps {', '.join(self.sweeps)}")
        return self.outcomes[setting]

    def rows(self, sweep: str) -> list[dict[str, Any]]:
        """Knobs and figures of each setting of a sweep."""
        return [asdict(s) | {"share": s.share} | self.of(s).row() for s in self.sweeps[sweep]]

    def save(self, path: str | Path) -> Path:
        """Write settings, counts, verdicts and texts as JSON."""
        path, order = Path(path), list(self.outcomes)
        document = {
            "about": self.about,
            "sweeps": {name: [order.index(setting) for setting in found] for name, found in self.sweeps.items()},
            "outcomes": [asdict(outcome) for outcome in self.outcomes.values()],
        }
        path.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Study:
        """Read what `save` wrote."""
        kept = json.loads(Path(path).read_text(encoding="utf-8"))
        found = [Outcome(**(one | {"setting": Setting(**one["setting"])})) for one in kept["outcomes"]]
        sweeps = {name: [found[i].setting for i in indices] for name, indices in kept["sweeps"].items()}
        return cls(sweeps, {one.setting: one for one in found}, kept["about"])

    def plot(self, directory: str | Path, measure: str = PASSED, prefix: str = "dllm_code_study") -> list[Path]:
        """Write a chart of a measure per sweep, and against operations and seconds; returns the SVG files."""
        prompts = len(next(iter(self.outcomes.values())).lengths)
        note = f"{self.about.get('tasks', 'prompts')}, n = {prompts}; bands: 95 % bootstrap over them"
        found = charts({name: self.rows(name) for name in self.sweeps}, note, measure)
        return [chart.save(Path(directory) / f"{prefix}_{name}.svg") for name, chart in found.items()]
