"""AdaDec: decode greedily, but where the model is unsure pause, look ahead and take the candidate that goes on best.

Source: He et al., "Towards Better Code Generation: Adaptive Decoding with Uncertainty Guidance", arXiv 2506.08980; the
algorithm as the released code has it, re-implemented.

Decoding pauses where the Shannon entropy of the next token's law, H = -sum_v p_v log p_v (nats, all of the vocabulary,
temperature 1, before any logits processor), is at least H*; `lookahead.py` then chooses. H* is learnt once per model
from texts of the kind that it is to write: over their tokens, fit  P(the most likely token is the true one | H) =
sigmoid(a H + b)  on four fifths of the steps, thinned out to as many right as wrong ones; of p = 0.01 .. 0.99 take the
p* for which [P >= p] is most often true of the rest, as it is; then  H* = (log(p* / (1 - p*)) - b) / a.

What differs from the release: keys and values are kept (there every forward reads the whole text again); a continuation
that has ended adds nothing more to its sum (there it goes on adding, so that early ends lose); it ends where generation
does, by the request's own stopping rules (there: by the indentation of a Python function, and not at the longest
output); rows of a batch pause each for itself; the factor lambda on all scores is left out, as it cannot change their
order; of equally good p the smallest counts. H* is refused with another model than the one it was learnt on.

It loses where the right token is not among the candidates or not the one that is easiest to go on from, as in half of
the paper's own pauses, and in time where most rows of a batch must wait for the one that pauses.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from pertoken.core.card import Dial, Paper, method
from pertoken.core.errors import BadRequest
from pertoken.core.signals import entropy
from pertoken.decode.lookahead import Lookahead, Rule
from pertoken.decode.request import Row
from pertoken.models.context import Context
from pertoken.models.signature import signature

FILE = "adadec.json"
FORMAT = "pertoken-adadec-1"


@dataclass(frozen=True)
class Threshold:
    """What was learnt about one model. entropy: H* in nats; slope, intercept: of the regression; probability: p*;
    accuracy: share of held-back steps that it tells right; pauses: share of all steps at or above H*; steps: how many;
    model: the model's signature."""

    entropy: float
    slope: float
    intercept: float
    probability: float
    accuracy: float
    pauses: float
    steps: int
    model: str

    def save(self, path: str | Path) -> None:
        """Write JSON to a file, or to `adadec.json` in a directory, such as the model's own."""
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        path.write_text(json.dumps({"format": FORMAT} | asdict(self), indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, path: str | Path) -> Threshold:
        """Read what `save` wrote; raises `BadRequest` where there is none."""
        path = Path(path) / FILE if Path(path).is_dir() else Path(path)
        if not path.is_file():
            raise BadRequest(
                f"no threshold at {path}; learn one with learn_threshold(model, texts) and save it there, or give "
                "AdaDec(threshold=...) in nats"
            )
        try:
            kept = json.loads(path.read_text(encoding="utf-8"))
            if kept.pop("format") != FORMAT:
                raise ValueError("its format is another")
            return cls(**kept)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise BadRequest(f"{path} is not a threshold that learn_threshold made: {error}") from error


@dataclass(frozen=True)
class Unsure(Rule):
    """Pause from this entropy on."""

    entropy: float

    def pauses(self, rows: Sequence[Row], logits: Tensor) -> list[bool]:
        return [False] * len(rows) if self.entropy == math.inf else (entropy(logits) >= self.entropy).tolist()


@method(
    question="decode",
    shape="decoder",
    exactness="approximate",
    paper=Paper("Towards Better Code Generation: Adaptive Decoding with Uncertainty Guidance", "2506.08980"),
    reads={"logits"},
    writes={"tokens"},
    baselines=("full", "random_pause"),
    dial=Dial("threshold", (5.0, 4.0, 3.0, 2.5, 2.0, 1.5, 1.0)),
)
@dataclass(frozen=True)
class AdaDec(Lookahead):
    """Greedy decoding that pauses where the model is unsure and takes the candidate with the best continuation.

    threshold: entropy in nats from which it pauses (infinity: plain greedy decoding), a `Threshold`, the path of one,
    or None for `adadec.json` in the model's own directory. See `decode.lookahead` for beams, length and reuse.
    """

    threshold: float | Threshold | str | Path | None = None
    small: ClassVar[dict[str, Any]] = {"threshold": 2.5}

    def rule(self, target: Context) -> Rule:
        given, model = self.threshold, target.stack.adapter.model
        if isinstance(given, (int, float)):
            if math.isnan(given):
                raise BadRequest("threshold=nan pauses nowhere; give a number of nats, or infinity for plain decoding")
            return Unsure(float(given))
        if given is None:
            given = Path(getattr(model, "name_or_path", "") or ".") / FILE
        found = given if isinstance(given, Threshold) else Threshold.load(given)
        here = signature(model)
        if found.model != here:
            raise BadRequest(
                f"the threshold was learnt on the model with signature {found.model}, this one has {here}; learn one "
                "for this model with learn_threshold(model, texts), or give AdaDec(threshold=...) in nats"
            )
        return Unsure(found.entropy)


def learn_threshold(
    model: Any,
    texts: Sequence[str] | Sequence[Sequence[int]],
    tokenizer: Any = None,
    *,
    given: int | Sequence[int] = 1,
    batch: int = 8,
    seed: int = 42,
) -> Threshold:
    """The model's H*, from texts of the kind it is to write, as strings with their tokenizer or as ids.

    given: how many tokens at the start of every text (or of each) are the prompt's and not learnt from. Raises
    `BadRequest` where the entropy tells nothing about the model's errors.
    """
    entropies, right = teacher_forced(model, texts, tokenizer, given=given, batch=batch)
    slope, intercept, probability, accuracy = fitted(entropies, right, seed)
    value = (math.log(probability / (1 - probability)) - intercept) / slope
    pauses = float((entropies >= value).double().mean())
    return Threshold(value, slope, intercept, probability, accuracy, pauses, len(right), signature(model))


@torch.inference_mode()
def teacher_forced(
    model: Any,
    texts: Sequence[str] | Sequence[Sequence[int]],
    tokenizer: Any = None,
    *,
    given: int | Sequence[int] = 1,
    batch: int = 8,
) -> tuple[Tensor, Tensor]:
    """Entropy in nats before each token `[step]` and whether the most likely token was the true one, bool `[step]`.

    Texts beyond the model's positions are cut.
    """
    rows = [tokenizer(text)["input_ids"] if isinstance(text, str) else list(text) for text in texts]  # type: ignore
    starts = [given] * len(rows) if isinstance(given, int) else list(given)
    if len(starts) != len(rows) or min(starts, default=1) < 1:
        raise BadRequest(f"given={given} must be at least 1 token, or a number of tokens for each of {len(rows)} texts")
    limit = getattr(model.config, "max_position_embeddings", None)
    kept: list[tuple[Tensor, Tensor]] = []
    for at in range(0, len(rows), batch):
        part = [row[:limit] for row in rows[at : at + batch]]
        lengths = torch.tensor([len(row) for row in part], device=model.device)
        width = int(lengths.max())
        ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in part], device=model.device)
        columns = torch.arange(width, device=model.device)
        real = columns < lengths[:, None]
        logits = model(ids, attention_mask=real.long(), use_cache=False).logits[:, :-1]
        first = torch.tensor(starts[at : at + batch], device=model.device)
        counted = (real & (columns >= first[:, None]))[:, 1:]
        right = logits.argmax(-1) == ids[:, 1:]
        kept.append((entropy(logits)[counted].cpu(), right[counted].cpu()))
    if not kept:
        raise BadRequest("there are no texts to learn from; give some of the kind that the model is to write")
    entropies, right = (torch.cat(parts) for parts in zip(*kept, strict=True))
    return entropies, right


def fitted(entropies: Tensor, right: Tensor, seed: int = 42) -> tuple[float, float, float, float]:
    """Slope, intercept, p* and its accuracy on the fifth of the steps held back; entropies, right `[step]`."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(right), generator=generator)
    held, seen = order[: len(order) // 5], order[len(order) // 5 :]
    yes, no = seen[right[seen]], seen[~right[seen]]
    few = min(len(yes), len(no))
    if few < 2 or not len(held):
        raise BadRequest(
            f"of {len(right)} steps the model has {int(right.sum())} right: too few of one kind to learn from. Give "
            "more texts"
        )
    balanced = torch.cat([yes[:few], no[:few]])
    slope, intercept = logistic(entropies[balanced], right[balanced])
    if slope >= 0:
        raise BadRequest(
            f"on these texts the model is not more often wrong where it is less sure (slope {slope:.3g}); its entropy "
            "is no sign to pause at. Give texts of the kind that it was trained for"
        )
    chance = (slope * entropies[held].double() + intercept).sigmoid()
    levels = torch.arange(1, 100, dtype=torch.double) / 100
    hits = ((chance[:, None] >= levels) == right[held][:, None]).double().mean(0)
    best = int(hits.argmax())
    return slope, intercept, float(levels[best]), float(hits[best])


def logistic(x: Tensor, y: Tensor, steps: int = 100) -> tuple[float, float]:
    """Slope a and intercept b that minimise  a^2 / 2 - sum log P(y | x)  with P(1 | x) = sigmoid(a x + b), by Newton's
    method (scikit-learn's defaults); x `[step]`, y `[step]` bool."""
    features = torch.stack([x.double(), torch.ones(len(x), dtype=torch.double)], -1)
    ridge, weights = torch.tensor([1.0, 0.0], dtype=torch.double), torch.zeros(2, dtype=torch.double)

    def loss(w: Tensor) -> Tensor:
        z = features @ w
        return (ridge * w * w).sum() / 2 + torch.nn.functional.binary_cross_entropy_with_logits(
            z, y.double(), reduction="sum"
        )

    for _ in range(steps):
        chance = (features @ weights).sigmoid()
        gradient = features.T @ (chance - y.double()) + ridge * weights
        curvature = (features * (chance * (1 - chance))[:, None]).T @ features + torch.diag(ridge)
        step = torch.linalg.solve(curvature + 1e-12 * torch.eye(2, dtype=torch.double), gradient)
        scale, now = 1.0, loss(weights)
        while scale > 1e-6 and loss(weights - scale * step) > now:  # far from the minimum a whole step can overshoot
            scale /= 2
        weights = weights - scale * step
        if float(step.abs().max()) < 1e-10:
            break
    return float(weights[0]), float(weights[1])
