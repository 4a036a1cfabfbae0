"""The denoising loop: forward, commit, trim, until every position of every row is decided.

Source: Nie et al., "Large Language Diffusion Models" (LLaDA), arXiv 2502.09992, whose sampler is this loop with the
`Schedule` rule and no cache. Blocks are decoded left to right, each row at its own pace; a row that is done leaves the
batch. A position's guess is the argmax or, if the call samples, Gumbel-max in float64, of the scores after the
request's processors (temperature, top-k, top-p); its confidence is the probability before them. Committed tokens are
final.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from pertoken.core.decision import Keep
from pertoken.core.errors import BadRequest
from pertoken.core.trace import Player, Recorded, TraceMismatch
from pertoken.denoise import COMMIT, REFRESH
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.canvas_model import CanvasModel
from pertoken.denoise.diffusion_gemma import DiffusionGemma, Site
from pertoken.denoise.model import DiffusionModel
from pertoken.denoise.recompute import Recompute
from pertoken.denoise.rules import CanvasRule, CommitRule, Constraint, Guess, RefreshRule
from pertoken.denoise.schedule import Schedule
from pertoken.denoise.settings import Settings


class DenoisingInterrupted(KeyboardInterrupt):
    """Ctrl-C during a call. sequences: what `generate` would have returned, with the mask token where undecided."""

    def __init__(self, sequences: Any):
        super().__init__("interrupted; .sequences holds what was committed")
        self.sequences = sequences


@dataclass
class Stats:
    """Counts of the last call. steps: forwards (NFE); row_steps: the same, summed over rows; token_forwards: positions
    computed, summed over forwards and rows; attended: of these, positions that each read; token_layers: positions
    computed times layers; whole_layers: layers computed at every position of a row, summed over row steps; tokens:
    returned up to and with the first end of text; seconds: wall clock."""

    steps: int = 0
    row_steps: int = 0
    token_forwards: int = 0
    attended: int = 0
    token_layers: int = 0
    whole_layers: int = 0
    tokens: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Denoise(Recorded):
    """Decoder of masked-diffusion models, for `model.generate(..., custom_generate=Denoise(...))`.

    commit, refresh, canvas, constraint: the rules; block: positions per block (None: the whole canvas is one block);
    sliding: instead, the block is always the first so many undecided positions (None: as the refresh rule says);
    steps: steps over the canvas (None: one per position) and pace: how they share out the commits, see `denoise.pace`;
    shift: 1 if the output at i - 1 predicts token i (Dream's alignment), 0 if the output at i does (LLaDA's), None: as
    the model's configuration says (`prediction_shift`, 0 if it says nothing); mask_token: None for the configuration's
    `mask_token_id`.
    revise: what the commit rule picks holds for one step only, as in DiffusionGemma's own sampler (see there; other
    models' commits are final). `max_new_tokens` is the length of the canvas.
    A recording holds two `Keep` per step, what was computed and what was committed; the tokens committed are in the
    note, row by row from left to right. Its replay needs no forward.
    """

    commit: CommitRule = field(default_factory=Schedule)
    refresh: RefreshRule = field(default_factory=Recompute)
    canvas: CanvasRule | None = None
    constraint: Constraint | None = None
    block: int | None = 32
    sliding: int | None = None
    steps: int | None = None
    pace: Literal["even", "dream"] = "even"
    shift: int | None = None
    mask_token: int | None = None
    revise: bool = False
    stats: Stats = field(default_factory=Stats, init=False, repr=False, compare=False)

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
        """Ids `[row, prompt + canvas]`, padded behind each row's end of text. Raises `BadRequest` before any work, and
        `DenoisingInterrupted` with what was committed on Ctrl-C."""
        for criterion in stopping_criteria or ():
            if not isinstance(criterion, (MaxLengthCriteria, EosTokenCriteria)):
                raise BadRequest(
                    f"{type(criterion).__name__} looks at a text that grows from the left; a diffusion model fills a "
                    "canvas in any order. Leave it out, and cut the finished text"
                )
        settings = Settings.of(self, model, input_ids, model_kwargs.get("attention_mask"), generation_config)
        with torch.inference_mode():
            run = _Run(self, settings, logits_processor or ())
            try:
                run.finish()
            except KeyboardInterrupt as stop:
                raise DenoisingInterrupted(run.result()) from stop
        return run.result()


class _Run:
    """One call at work."""

    def __init__(self, rules: Denoise, settings: Settings, processors: Any):
        self.settings, self.processors, self.stats = settings, list(processors), rules.stats
        self.trace, self.player = rules._tape.taken()
        self.stats.__init__()  # type: ignore[misc]
        self.commit: CommitRule = rules.commit.fitted(settings)
        self.refresh: RefreshRule = rules.refresh.fitted(settings)
        self.trim: CanvasRule | None = None if rules.canvas is None else rules.canvas.fitted(settings)
        self.constraint: Constraint | None = None if rules.constraint is None else rules.constraint.fitted(settings)
        self.canvas = Canvas.of(
            settings.ids,
            settings.attention_mask,
            settings.length,
            settings.block,
            settings.pad if settings.mask_token is None else settings.mask_token,
            settings.sliding,
        )
        self.model: CanvasModel
        if isinstance(settings.adapter, Site):
            self.model = DiffusionGemma(settings.adapter, self.canvas)
        else:
            self.model = DiffusionModel(settings.adapter, self.canvas, settings.shift)
            self.model.watched_by(self.refresh.watch())
        self.done: dict[int, Tensor] = {}

    def finish(self) -> None:
        started = time.perf_counter()
        self._leave()
        while self.canvas.rows:
            if self.player is None:
                self._step()
            else:
                self._repeat(self.player)
            self._leave()
        if self.player is not None and not self.player.finished:
            raise TraceMismatch("the recording goes on after every row is done; replay with the inputs recorded")
        self.stats.seconds = time.perf_counter() - started

    def _step(self) -> None:
        canvas = self.canvas
        upcoming = self.commit.upcoming(canvas, self._quota(canvas.masked & canvas.in_block))
        planned = self.refresh.plan(canvas, upcoming) & canvas.valid
        computed = self.model.forward(canvas, planned)
        work, whole = torch.stack([self.model.work.sum(), self.model.whole.sum()]).tolist()
        self.stats.token_layers += work
        self.stats.whole_layers += whole
        guess = self._guess(computed)
        chosen = self.commit.choose(guess, canvas) & guess.masked
        stuck = ~chosen.any(-1)
        if bool(stuck.any()):  # the most confident place moves on, as in every published rule
            best = guess.ranked.argmax(-1)
            chosen[stuck, best[stuck]] = True
        if self.constraint is not None:
            chosen = self.constraint.admit(chosen, guess, canvas) & chosen
        chosen, found = self.model.settle(canvas, guess, chosen)
        places = canvas.block_columns
        committed = torch.zeros_like(canvas.masked).scatter_(1, places, chosen)
        tokens = canvas.ids.scatter(1, places, found)
        guesses = self._all_guesses() if self.trim is not None and self.trim.reads_all else None
        canvas.commit(committed, tokens)
        ends = None
        if self.trim is not None and len(self.settings.eos):
            ends = self.trim.trim(canvas, self.settings.eos, committed, guesses)
        self._settle(computed, committed, tokens, ends)

    def _settle(self, computed: Tensor, committed: Tensor, tokens: Tensor, ends: Tensor | None) -> None:
        """Count and record a step whose tokens are committed, end rows before column `ends`, and go on to the next."""
        canvas = self.canvas
        self.stats.steps += 1
        self.stats.row_steps += canvas.rows
        queries = computed.sum(-1)
        self.stats.token_forwards += int(queries.sum())
        self.stats.attended += int((queries * canvas.valid.sum(-1)).sum())
        if self.trace is not None:
            rows = tuple(canvas.numbers)
            note = {
                "block": canvas.block.tolist(),
                "tokens": [row[kept].tolist() for row, kept in zip(tokens, committed, strict=True)],
                "ends": None if ends is None else ends.tolist(),
            }
            self.trace.record(REFRESH, Keep(canvas.valid, computed), rows)
            self.trace.record(COMMIT, Keep(canvas.valid, committed), rows, **note)
        if ends is not None:
            if self.trim is not None and self.trim.keeps:
                canvas.fill(ends, self.settings.pad)
            else:
                canvas.cut(ends, self.settings.eos[0])
        canvas.advance()

    def _repeat(self, player: Player) -> None:
        """One step as it was recorded."""
        canvas, rows = self.canvas, tuple(self.canvas.numbers)
        computed, committed = player.take(REFRESH, Keep), player.take(COMMIT, Keep)
        shape = committed.decision.valid.shape
        if committed.rows != rows or shape != canvas.valid.shape:
            raise TraceMismatch(
                f"the recording has rows {list(committed.rows)} and {shape[1]} columns at step {self.stats.steps + 1}, "
                f"the request rows {list(rows)} and {canvas.width}; replay with the inputs and canvas recorded"
            )
        assert isinstance(computed.decision, Keep) and isinstance(committed.decision, Keep)
        device, note = canvas.ids.device, committed.note
        kept = committed.decision.keep.to(device)
        tokens = canvas.ids.clone()
        tokens[kept] = torch.tensor([t for row in note["tokens"] for t in row], dtype=tokens.dtype, device=device)
        ends = None if note["ends"] is None else torch.tensor(note["ends"], device=device)
        canvas.commit(kept, tokens)
        self._settle(computed.decision.keep.to(device), kept, tokens, ends)

    def _guess(self, computed: Tensor) -> Guess:
        """What the outputs, new and kept, say about every row's present block."""
        canvas = self.canvas
        places = canvas.block_columns
        masked = canvas.masked.gather(1, places)
        looked = self._looked_at(masked)
        columns = places if looked is None else places.gather(1, looked)
        plain = self._plain(self.model.logits(columns))
        if self.constraint is not None:
            plain = self.constraint.limit(plain, canvas, columns)
        scores = self._processed(plain)
        tokens, confidence = self._chosen(plain, scores, self._drawn(scores, places.shape[1], looked))
        if looked is not None:
            tokens = canvas.ids.gather(1, places).scatter(1, looked, tokens)
            confidence = confidence.new_zeros(places.shape).scatter(1, looked, confidence)
            scores = spread(scores, looked, places.shape[1])
        if not bool(torch.isfinite(confidence[masked]).all()):
            self._refuse(scores, ~torch.isfinite(confidence) & masked, places)
        quota = self._quota(masked)
        fresh = masked & computed.gather(1, (places - self.settings.shift).clamp(min=0))
        masked = torch.where(fresh.any(-1, keepdim=True), fresh, masked)  # what was not computed now cannot be decided
        return Guess(scores, tokens, confidence, masked, quota)

    def _refuse(self, scores: Tensor, broken: Tensor, places: Tensor) -> None:
        """Say why places `broken` `[row, place]` have no confidence."""
        canvas = self.canvas
        row, place = broken.nonzero()[0].tolist()
        where = f"for row {canvas.numbers[row]} at step {int(canvas.step[row])}"
        if bool((scores[row, place] == -torch.inf).all()):
            column = int(places[row, place]) - canvas.start
            raise BadRequest(
                f"no token is allowed at position {column} of the canvas {where}: the constraint or the logits "
                "processors forbid all. Give another grammar, a longer canvas (max_new_tokens), or fewer processors"
            )
        raise BadRequest(
            f"the model gave logits that are not finite {where}. Check the weights and the dtype (fp16 overflows: try "
            "bf16 or fp32)"
        )

    def _plain(self, logits: Tensor) -> Tensor:
        scores = logits.float()
        if self.settings.mask_token is not None:
            scores[..., self.settings.mask_token] = -torch.inf
        return scores

    def _processed(self, plain: Tensor) -> Tensor:
        """Scores after the request's processors, which see no text: only those that look at scores alone fit."""
        if not self.processors:
            return plain
        flat = plain.flatten(0, -2).clone()
        for processor in self.processors:
            try:
                flat = processor(None, flat)
            except (AttributeError, TypeError) as error:
                raise BadRequest(
                    f"{type(processor).__name__} asks for the text so far ({error}); a diffusion model fills a canvas "
                    "in any order. Leave it out; temperature, top_k, top_p, min_p and suppress_tokens look at scores "
                    "alone"
                ) from error
        return flat.view_as(plain)

    def _looked_at(self, masked: Tensor) -> Tensor | None:
        """`[row, n]` places of the block that are guessed at, as many as any row has undecided; None for all."""
        if self.commit.reads_decided or self.model.reads_decided:
            return None
        most = int(masked.sum(-1).max())
        if most == masked.shape[1]:
            return None
        return masked.int().argsort(dim=-1, descending=True, stable=True)[:, :most]

    def _drawn(self, scores: Tensor, size: int, looked: Tensor | None) -> Tensor | None:
        """Uniform float64 numbers for scores `[..., place, vocabulary]`, if the call samples: drawn for whole blocks of
        `size` places, so that what is drawn for a place does not depend on which others are decided."""
        if not self.settings.sampling:
            return None
        drawn = torch.rand(*scores.shape[:-2], size, scores.shape[-1], dtype=torch.double, device=scores.device)
        return drawn if looked is None else drawn[torch.arange(len(looked), device=drawn.device)[:, None], looked]

    def _chosen(self, plain: Tensor, scores: Tensor, drawn: Tensor | None) -> tuple[Tensor, Tensor]:
        if drawn is not None:
            wide = scores.double()
            noise = drawn.clamp_(min=1e-300).log_().neg_()
            tokens = ((wide - wide.amax(-1, keepdim=True)).exp() / noise).argmax(-1)
        else:
            tokens = scores.argmax(-1)
        plain = plain.double()
        confidence = plain.gather(-1, tokens[..., None])[..., 0] - plain.logsumexp(-1)
        return tokens, confidence.exp()

    def _quota(self, masked: Tensor) -> Tensor:
        """How many places the pace commits at each row's present step of its block."""
        canvas, quotas = self.canvas, self.settings.quotas
        step = canvas.block_step.clamp(max=quotas.shape[1] - 1)
        return torch.minimum(quotas[canvas.block_places, step], masked.sum(-1))

    def _all_guesses(self) -> tuple[Tensor, Tensor]:
        """Tokens and confidences `[row, column]` at all undecided positions, zeros elsewhere."""
        canvas = self.canvas
        row, column = canvas.masked.nonzero(as_tuple=True)
        tokens = torch.full_like(canvas.ids, -1)
        confidence = torch.zeros(canvas.ids.shape, dtype=torch.float64, device=canvas.ids.device)
        if len(row):
            plain = self._plain(self.model.logits_at(row, column))
            scores = self._processed(plain)
            found, sure = self._chosen(plain, scores, self._drawn(scores, len(row), None))
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
        """What `generate` returns; rows that are not done yet as they are."""
        settings = self.settings
        rows = self.done | dict(zip(self.canvas.numbers, self.canvas.ids, strict=True))
        ids = torch.stack([rows[row] for row in range(len(settings.ids))])
        new = ids[:, settings.ids.shape[1] :]
        ends = torch.isin(new, settings.eos).long()
        behind = ends.cumsum(-1) > ends
        self.stats.tokens = int((~behind).sum())
        new = new.masked_fill(behind, settings.pad)
        sequences = torch.cat([settings.ids, new], 1)
        if settings.as_dict:
            from transformers.generation.utils import GenerateDecoderOnlyOutput

            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences


def spread(scores: Tensor, looked: Tensor, size: int) -> Tensor:
    """`[row, size, vocabulary]`: the scores of the places `looked` `[row, n]`, zeros elsewhere."""
    whole = scores.new_zeros(len(scores), size, scores.shape[-1])
    whole[torch.arange(len(scores), device=scores.device)[:, None], looked] = scores
    return whole
