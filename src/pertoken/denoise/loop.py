"""The denoising loop: forward, commit, trim, until every position of every row is decided.

Source: Nie et al., "Large Language Diffusion Models" (LLaDA), arXiv 2502.09992, whose sampler is this loop with the
`Schedule` rule and no cache. Blocks are decoded left to right, each row at its own pace; a row that is done leaves the
batch. At temperature 0 a position's guess is the argmax; above it is Gumbel-max in float64, and its confidence is the
probability without noise. Committed tokens are final.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from pertoken.core.decision import Keep
from pertoken.core.errors import BadRequest
from pertoken.core.trace import Trace
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.model import DiffusionModel
from pertoken.denoise.recompute import Recompute
from pertoken.denoise.rules import CanvasRule, CommitRule, Guess, RefreshRule
from pertoken.denoise.schedule import Schedule
from pertoken.denoise.settings import Settings

COMMIT, REFRESH = "denoise.commit", "denoise.refresh"


@dataclass
class Stats:
    """Counts of the last call. steps: forwards (NFE); row_steps: the same, summed over rows; token_forwards: positions
    computed, summed over forwards and rows; tokens: returned up to and with the first end of text; seconds: wall
    clock."""

    steps: int = 0
    row_steps: int = 0
    token_forwards: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Denoise:
    """Decoder of masked-diffusion models, for `model.generate(..., custom_generate=Denoise(...))`.

    commit, refresh, canvas: the rules; block: positions per block (None: the whole canvas is one block); steps: steps
    of the even schedule over the canvas (None: one per position); shift: 1 if the output at i - 1 predicts token i
    (Dream's alignment), 0 if the output at i does (LLaDA's), None: as the model's configuration says
    (`prediction_shift`, 0 if it says nothing); mask_token: None for the configuration's `mask_token_id`.
    `max_new_tokens` is the length of the canvas.
    """

    commit: CommitRule = field(default_factory=Schedule)
    refresh: RefreshRule = field(default_factory=Recompute)
    canvas: CanvasRule | None = None
    block: int | None = 32
    steps: int | None = None
    shift: int | None = None
    mask_token: int | None = None
    stats: Stats = field(default_factory=Stats, init=False, repr=False, compare=False)
    _tape: dict[str, Any] = field(default_factory=dict, init=False, repr=False, compare=False)

    @contextmanager
    def record(self) -> Iterator[Trace]:
        """Record the commits and refreshes of the next call made inside the block, one `Keep` each per step."""
        trace = Trace({"method": type(self).__name__})
        self._tape["record"] = trace
        try:
            yield trace
        finally:
            self._tape.pop("record", None)

    def __call__(
        self,
        model: Any,
        input_ids: Tensor,
        logits_processor: Any = None,
        stopping_criteria: Any = None,
        generation_config: Any = None,
        synced_gpus: bool = False,
        streamer: Any = None,
        **model_kwargs: Any,
    ) -> Any:
        """Ids `[row, prompt + canvas]`, padded behind each row's end of text. Raises `BadRequest` before any work."""
        for criterion in stopping_criteria or ():
            if not isinstance(criterion, (MaxLengthCriteria, EosTokenCriteria)):
                raise BadRequest(
                    f"{type(criterion).__name__} looks at a text that grows from the left; a diffusion model fills a "
                    "canvas in any order. Leave it out, and cut the finished text"
                )
        settings = Settings.of(self, model, input_ids, model_kwargs.get("attention_mask"), generation_config)
        with torch.inference_mode():
            run = _Run(self, settings, logits_processor or (), self._tape.pop("record", None))
            run.finish()
        return run.result()


class _Run:
    """One call at work."""

    def __init__(self, rules: Denoise, settings: Settings, processors: Any, trace: Trace | None):
        self.settings, self.processors, self.trace, self.stats = settings, list(processors), trace, rules.stats
        self.stats.__init__()  # type: ignore[misc]
        self.commit: CommitRule = rules.commit.fitted(settings)
        self.refresh: RefreshRule = rules.refresh.fitted(settings)
        self.trim: CanvasRule | None = None if rules.canvas is None else rules.canvas.fitted(settings)
        self.canvas = Canvas.of(
            settings.ids, settings.attention_mask, settings.length, settings.block, settings.mask_token
        )
        self.model = DiffusionModel(settings.adapter, self.canvas, settings.shift)
        self.done: dict[int, Tensor] = {}

    def finish(self) -> None:
        started = time.perf_counter()
        self._leave()
        while self.canvas.rows:
            self._step()
            self._leave()
        self.stats.seconds = time.perf_counter() - started

    def _step(self) -> None:
        canvas = self.canvas
        upcoming = self.commit.upcoming(canvas, self._quota(canvas.masked & canvas.in_block))
        planned = self.refresh.plan(canvas, upcoming) & canvas.valid
        computed = self.model.forward(canvas, planned)
        guess = self._guess(computed)
        chosen = self.commit.choose(guess, canvas) & guess.masked
        stuck = ~chosen.any(-1)
        if bool(stuck.any()):  # the most confident place moves on, as in every published rule
            best = guess.ranked.argmax(-1)
            chosen[stuck, best[stuck]] = True
        places = canvas.block_columns
        committed = torch.zeros_like(canvas.masked).scatter_(1, places, chosen)
        tokens = canvas.ids.scatter(1, places, guess.tokens)
        self.stats.steps += 1
        self.stats.row_steps += canvas.rows
        self.stats.token_forwards += int(computed.sum())
        if self.trace is not None:
            rows = tuple(canvas.numbers)
            self.trace.record(REFRESH, Keep(canvas.valid, computed), rows)
            self.trace.record(COMMIT, Keep(canvas.valid, committed), rows, block=canvas.block.tolist())
        guesses = self._all_guesses() if self.trim is not None and self.trim.reads_all else None
        canvas.commit(committed, tokens)
        if self.trim is not None and self.settings.end is not None:
            ends = self.trim.trim(canvas, self.settings.end, committed, guesses)
            canvas.cut(ends, self.settings.end)
        canvas.advance()

    def _guess(self, computed: Tensor) -> Guess:
        """What the outputs, new and kept, say about every row's present block."""
        canvas = self.canvas
        places = canvas.block_columns
        scores = self._processed(self.model.logits(places))
        tokens, confidence = self._chosen(scores)
        masked = canvas.masked.gather(1, places)
        if not bool(torch.isfinite(confidence[masked]).all()):
            row = int((~torch.isfinite(confidence) & masked).any(-1).nonzero()[0])
            raise BadRequest(
                f"the model gave logits that are not finite for row {canvas.numbers[row]} at step "
                f"{int(canvas.step[row])}. Check the weights and the dtype (fp16 overflows: try bf16 or fp32)"
            )
        quota = self._quota(masked)
        fresh = masked & computed.gather(1, (places - self.settings.shift).clamp(min=0))
        masked = torch.where(fresh.any(-1, keepdim=True), fresh, masked)  # what was not computed now cannot be decided
        return Guess(scores, tokens, confidence, masked, quota)

    def _processed(self, logits: Tensor) -> Tensor:
        """Scores after the request's processors, which see no text: only those that look at scores alone fit."""
        scores = logits.float()
        scores[..., self.settings.mask_token] = -torch.inf
        flat = scores.flatten(0, -2)
        for processor in self.processors:
            flat = processor(None, flat)
        return flat.view_as(scores)

    def _chosen(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        wide = scores.double()
        if self.settings.temperature > 0:
            noise = torch.rand_like(wide).clamp_(min=1e-300).log_().neg_().pow_(self.settings.temperature)
            tokens = ((wide - wide.amax(-1, keepdim=True)).exp() / noise).argmax(-1)
        else:
            tokens = scores.argmax(-1)
        confidence = wide.gather(-1, tokens[..., None])[..., 0] - wide.logsumexp(-1)
        return tokens, confidence.exp()

    def _quota(self, masked: Tensor) -> Tensor:
        """How many places the even schedule commits at each row's present step of its block (LLaDA, step 5b)."""
        steps, size = self.settings.steps_per_block, self.settings.block
        done = self.canvas.block_step
        share = size // steps + (done < size % steps)
        return torch.minimum(share.clamp(min=1), masked.sum(-1))

    def _all_guesses(self) -> tuple[Tensor, Tensor]:
        """Tokens and confidences `[row, column]` at all undecided positions, zeros elsewhere."""
        canvas = self.canvas
        row, column = canvas.masked.nonzero(as_tuple=True)
        tokens = torch.full_like(canvas.ids, -1)
        confidence = torch.zeros(canvas.ids.shape, dtype=torch.float64, device=canvas.ids.device)
        if len(row):
            found, sure = self._chosen(self._processed(self.model.logits_at(row, column)))
            tokens[row, column], confidence[row, column] = found, sure
        return tokens, confidence

    def _leave(self) -> None:
        """Let decided rows go."""
        canvas = self.canvas
        left = canvas.masked.any(-1)
        if bool(left.all()):
            return
        for row in (~left).nonzero().flatten().tolist():
            self.done[canvas.numbers[row]] = canvas.ids[row].clone()
        stay = left.nonzero().flatten()
        canvas.select(stay)
        self.model.select(stay)

    def result(self) -> Any:
        settings = self.settings
        ids = torch.stack([self.done[row] for row in range(len(settings.ids))])
        new = ids[:, settings.ids.shape[1] :]
        if settings.end is not None:
            ended = (new == settings.end).long().cumsum(-1)
            behind = (ended - (new == settings.end).long()) > 0
            self.stats.tokens = int((~behind).sum())
            new = new.masked_fill(behind, settings.pad)
        else:
            self.stats.tokens = new.numel()
        sequences = torch.cat([settings.ids, new], 1)
        if settings.as_dict:
            from transformers.generation.utils import GenerateDecoderOnlyOutput

            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences
