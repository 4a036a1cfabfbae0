"""ILM: start from what is given and insert one token per step, at any place, until the stop head says enough.

Source: Patel et al., "Insertion Language Models: Sequence Generation with Arbitrary-Position Insertions", arXiv
2505.05755. A row is `[CLS, given..., gap marker, inserted..., given...]`; the output at slot i scores "insert v right
behind slot i", s(i, v). One step of every row that has not stopped:

    p_stop = sigmoid(s(CLS, stop));    the row ends if p_stop >= threshold (for good), or if it is full
    joint:      (i, v) ~ softmax over all open slots and tokens of s
    two_stage:  i ~ softmax over open slots of logsumexp_v s(i, v),  then v ~ softmax_v s(i, v)
    positions > position(i) move up by one; v is stored behind everything and gets position(i) + 1.

Open slots are the gap markers and whatever was inserted behind them; given tokens never move relative to each other.
Special tokens are taken out before any normalisation, so that no place is chosen for a token that cannot stand there.
Greedy unless the call samples; temperature, top-k and top-p then act on the pairs (joint) or on the tokens (two_stage).
What is given and what is inserted are stored apart and in no order, with their positions beside them. An insertion
moves the positions of what follows, and its rotary keys with them: none could be kept from step to step, so every step
is a forward over the whole row. A row that ended leaves the batch.

The gap marker is the model's mask token. Written into a prompt it says where text is missing, in one place or several;
a prompt without one gets it at its end (continuation). CLS, the token `bos_token_id`, is put before a prompt that does
not begin with it. The stop head is the score of `config.stop_token_id` at CLS (see `zoo.insertion`), so an insertion
model is any bidirectional model with a `stop_token_id`.

`parallel` (ours): besides the step's choice also insert, at every gap that is not next to a better one, the best token
v of slot i if p(v | i) >= parallel and p(i, v) >= parallel x that of the best pair. The model's target spreads 1 / n
over n missing tokens, so one that is as sure as the best pair is as good a choice as that.

It loses on speed: n tokens are n forwards of growing length, without a cache; and on long texts the stop head has seen
few complete examples.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria

from pertoken.core.card import Paper, method
from pertoken.core.decision import Keep
from pertoken.core.errors import BadRequest
from pertoken.core.trace import Player, Recorded, TraceMismatch
from pertoken.denoise import INSERT
from pertoken.denoise.insertion import Request, Slots, SlotsModel
from pertoken.denoise.loop import Stats
from pertoken.denoise.rules import top

WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)
Choice = Literal["joint", "two_stage", "random"]


@method(
    question="denoise",
    shape="decoder",
    exactness="approximate",
    paper=Paper("Insertion Language Models: Sequence Generation with Arbitrary-Position Insertions", "2505.05755"),
    reads={"logits"},
    writes={"insert"},
    needs={"insertion"},
    baselines=("schedule", "random_commit"),
)
@dataclass(frozen=True)
class ILM(Recorded):
    """Decoder of insertion models, for `model.generate(..., custom_generate=ILM())`.

    threshold: P(stop) from which a row ends (the paper: 0.9 for text, 0.8 for infilling, 0.5 for planning); choice:
    "joint" or "two_stage", or the control "random", any open slot alike and then its token; greedy_gap: in two stages,
    the likeliest slot even if tokens are sampled; force_first: insert at least one token whatever the stop head says;
    parallel: None, or the probability from which further gaps are filled in the same step; mask_token: the gap marker,
    None for the configuration's `mask_token_id`. `max_new_tokens` bounds what is inserted into each row, all gaps
    together.
    A recording holds one `Keep` per step: which positions are open, and behind which a token was inserted. The note has
    the tokens, row by row from left to right, and P(stop) of every row; a row of no insertion stopped at this step; and
    how many of each row's tokens were given, CLS among them. Its replay needs no forward.
    """

    threshold: float = 0.9
    choice: Choice = "joint"
    greedy_gap: bool = False
    force_first: bool = False
    parallel: float | None = None
    mask_token: int | None = None
    stats: Stats = field(default_factory=Stats, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.choice not in get_args(Choice):
            raise BadRequest(f"choice={self.choice!r} is unknown; choose one of {', '.join(get_args(Choice))}")
        if self.parallel is not None and not 0 < self.parallel <= 1:
            raise BadRequest(
                f"parallel={self.parallel} is no probability; give one in (0, 1], or None for one per step"
            )

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
        """Ids `[row, token]`: each prompt with what was inserted in place of its gap markers, padded behind. Raises
        `BadRequest` before any work."""
        for criterion in stopping_criteria or ():
            if not isinstance(criterion, (MaxLengthCriteria, EosTokenCriteria)):
                raise BadRequest(
                    f"{type(criterion).__name__} looks at a text that grows from the left; an insertion model writes "
                    "in any order. Leave it out, and cut the finished text"
                )
        request = Request.of(model, input_ids, model_kwargs.get("attention_mask"), generation_config, self.mask_token)
        with torch.inference_mode():
            run = _Run(self, request, logits_processor or ())
            run.finish()
        return request.returned(run.done)


class _Run:
    """One call at work."""

    def __init__(self, rules: ILM, request: Request, processors: Any):
        self.rules, self.request, self.stats = rules, request, rules.stats
        self.trace, self.player = rules._tape.taken()
        self.stats.__init__()  # type: ignore[misc]
        self.warpers = [p for p in processors if isinstance(p, WARPERS)]
        self.processors = [p for p in processors if not isinstance(p, WARPERS)]
        self.slots, self.model = Slots.of(request), SlotsModel(request)
        self.done: dict[int, Tensor] = {}

    def finish(self) -> None:
        started = time.perf_counter()
        while self.slots.rows:
            if self.player is None:
                self._step()
            else:
                self._repeat(self.player)
        if self.player is not None and not self.player.finished:
            raise TraceMismatch("the recording goes on after every row is done; replay with the inputs recorded")
        self.stats.seconds = time.perf_counter() - started

    def _step(self) -> None:
        slots, rules = self.slots, self.rules
        scores, stop = self.model.forward(slots)
        ends = stop >= rules.threshold
        if rules.force_first:
            ends &= slots.inserted > 0
        chosen, tokens = self._choose(self._processed(scores))
        self.stats.token_forwards += int(slots.size.sum())
        self._settle(chosen & ~ends[:, None], tokens, stop)

    def _settle(self, chosen: Tensor, tokens: Tensor, stop: Tensor) -> None:
        """Count, record and carry out a step that inserts `tokens` behind the slots `chosen`, both `[row, open slot]`;
        rows that get none, or are full now, are done."""
        slots = self.slots
        self.stats.steps += 1
        self.stats.row_steps += slots.rows
        if self.trace is not None:
            valid, keep, order = slots.in_order(chosen)
            found = tokens.gather(1, order)
            note = {
                "tokens": [row[kept].tolist() for row, kept in zip(found, chosen.gather(1, order), strict=True)],
                "stop": stop.tolist(),
                "given": slots.given_valid.sum(-1).tolist(),
            }
            self.trace.record(INSERT, Keep(valid, keep), tuple(slots.numbers), **note)
        slots.insert(chosen, tokens)
        self.stats.tokens += int(chosen.sum())
        ended = ~chosen.any(-1) | (slots.inserted >= self.request.length)
        if bool(ended.any()):
            self.done |= slots.sequences(ended)
            slots.select((~ended).nonzero().flatten())

    def _repeat(self, player: Player) -> None:
        """One step as it was recorded."""
        slots, step = self.slots, player.take(INSERT, Keep)
        decision = step.decision
        assert isinstance(decision, Keep)
        valid, _, order = slots.in_order(torch.zeros_like(slots.open))
        if step.rows != tuple(slots.numbers) or not decision.valid.equal(valid.cpu()):
            raise TraceMismatch(
                f"the recording has rows {list(step.rows)} with other open places at step {self.stats.steps + 1} than "
                f"the request's rows {slots.numbers}; replay with the inputs recorded"
            )
        device = valid.device
        chosen = decision.keep.to(device).gather(1, slots.open_positions) & slots.open
        in_order = chosen.gather(1, order)
        found = torch.zeros_like(order)
        found[in_order] = torch.tensor(
            [t for row in step.note["tokens"] for t in row], dtype=found.dtype, device=device
        )
        tokens = torch.zeros_like(order).scatter_(1, order, found)
        self._settle(chosen, tokens, torch.tensor(step.note["stop"], device=device))

    def _processed(self, scores: Tensor) -> Tensor:
        """Scores `[row, open slot, token]` after the processors that look at the vocabulary; they see no text."""
        flat = scores.flatten(0, 1)
        for processor in self.processors:
            try:
                flat = processor(None, flat)
            except (AttributeError, TypeError) as error:
                raise BadRequest(
                    f"{type(processor).__name__} asks for the text so far ({error}); an insertion model writes in any "
                    "order. Leave it out; temperature, top_k, top_p, min_p and suppress_tokens look at scores alone"
                ) from error
        scores = flat.view_as(scores).masked_fill(~self.slots.open[..., None], -torch.inf)
        total = scores.flatten(1).logsumexp(-1)
        if not bool(total.isfinite().all()):
            row = int((~total.isfinite()).nonzero()[0])
            raise BadRequest(
                f"row {self.slots.numbers[row]} has no finite scores after {int(self.slots.inserted[row])} insertions: "
                "the processors forbid every token, or the model's logits are not finite (fp16 overflows: try bf16)"
            )
        return scores

    def _choose(self, scores: Tensor) -> tuple[Tensor, Tensor]:
        """bool and tokens `[row, open slot]`: behind which slots to insert what."""
        rows, width, vocabulary = scores.shape
        if self.rules.choice == "joint":
            pair = self._pick(self._warped(scores.flatten(1)))
            slot, token = pair // vocabulary, pair % vocabulary
        else:
            slot = self._slot(scores)
            token = self._pick(self._warped(scores[torch.arange(rows, device=slot.device), slot]))
        chosen = torch.zeros(rows, width, dtype=torch.bool, device=scores.device).scatter_(1, slot[:, None], True)
        if self.rules.parallel is None:
            return chosen, token[:, None].expand(rows, width)
        tokens = self._pick(self._warped(scores.flatten(0, 1).masked_fill(~self.slots.open.flatten()[:, None], 0)))
        tokens = tokens.view(rows, width).scatter(1, slot[:, None], token[:, None])
        return self._several(scores, tokens, slot, self.rules.parallel), tokens

    def _several(self, scores: Tensor, tokens: Tensor, slot: Tensor, bound: float) -> Tensor:
        """bool `[row, open slot]`: the chosen slot, and every other that is as sure and has no better one beside it."""
        slots = self.slots
        value = scores.gather(-1, tokens[..., None])[..., 0]
        best = value.gather(1, slot[:, None])
        sure = (value - scores.logsumexp(-1) >= math.log(bound)) & (value >= best + math.log(bound)) & slots.open
        ranked = value.masked_fill(~sure, -torch.inf).scatter(1, slot[:, None], torch.inf)
        line = ranked.new_full((slots.rows, slots.length + 2), -torch.inf)
        places = (slots.open_positions + 1).masked_fill(~slots.open, 0)
        line.scatter_reduce_(1, places, ranked, "amax")
        line[:, 0] = -torch.inf
        peak = (ranked > line.gather(1, (places - 1).clamp(min=0))) & (ranked >= line.gather(1, places + 1))
        finite = ranked.clamp(max=torch.finfo(ranked.dtype).max).masked_fill(~peak, -torch.inf)
        return top(finite, self.request.length - slots.inserted)

    def _slot(self, scores: Tensor) -> Tensor:
        """`[row]` the slot of a choice in two stages, or of the control."""
        if self.rules.choice == "random":
            return (torch.rand(scores.shape[:2], device=scores.device) * self.slots.open).argmax(-1)
        marginal = scores.logsumexp(-1)
        return marginal.argmax(-1) if self.rules.greedy_gap else self._pick(marginal)

    def _pick(self, scores: Tensor) -> Tensor:
        """The argmax of the last axis or, if the call samples, a draw from its softmax."""
        if not self.request.sampling:
            return scores.argmax(-1)
        return (scores.double().softmax(-1) / torch.empty_like(scores, dtype=torch.double).exponential_()).argmax(-1)

    def _warped(self, scores: Tensor) -> Tensor:
        for warper in self.warpers:
            scores = warper(None, scores)  # type: ignore[arg-type]
        return scores
