"""One generation request as transformers hands it over: its rows, when they stop, and what is given back.

Tokens are committed one at a time per row, in the order plain generation would commit them, so that logits processors,
stopping criteria and streamers see exactly what they would see there.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    UnbatchedClassifierFreeGuidanceLogitsProcessor,
)
from transformers.generation.stopping_criteria import EosTokenCriteria, MaxLengthCriteria, StoppingCriteriaList
from transformers.generation.utils import GenerateDecoderOnlyOutput

from pertoken.core.errors import BadRequest
from pertoken.decode.grammar.processor import GrammarProcessor
from pertoken.models.adapter import Adapter

WARPERS = (TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper, MinPLogitsWarper)


def callers_streamer() -> Any:
    """The streamer given to the running `model.generate`, if any.

    transformers 5.x shows the prompt to the streamer and then does not pass it on to a callable `custom_generate`; it
    is a local of `generate`'s frame.
    """
    frame = sys._getframe(1)
    while frame is not None:
        if frame.f_code.co_name == "generate" and frame.f_globals.get("__name__", "").startswith(
            "transformers.generation"
        ):
            return frame.f_locals.get("streamer")
        frame = frame.f_back
    return None


@dataclass
class Row:
    """One sequence. tokens: its real ids (no padding), prompt and output; generated: how many of them are output."""

    number: int
    tokens: list[int]
    generated: int = 0
    done: bool = False
    scores: list[Tensor] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)

    @property
    def output(self) -> list[int]:
        return self.tokens[len(self.tokens) - self.generated :]


class Request:
    """Rows of one call, with the ways to score, commit, stop, stream and return. Ids `[batch, token]`."""

    def __init__(
        self,
        adapter: Adapter,
        input_ids: Tensor,
        attention_mask: Tensor | None,
        config: GenerationConfig,
        processors: LogitsProcessorList | None,
        criteria: StoppingCriteriaList | None,
        streamer: Any = None,
    ):
        self.adapter, self.config, self.input_ids, self.streamer = adapter, config, input_ids, streamer
        self.processors = list(processors or ())
        self.guide = next((p for p in self.processors if isinstance(p, GrammarProcessor)), None)
        self.sampling = bool(config.do_sample)
        self.width, self.device = input_ids.shape[1], input_ids.device
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        self._check(input_ids, mask)
        kept = mask.bool().cpu()
        self.rows = [
            Row(i, ids[keep].tolist()) for i, (ids, keep) in enumerate(zip(input_ids.cpu(), kept, strict=True))
        ]
        self.active = list(self.rows)
        criteria_list = list(criteria or ())
        lengths = [c.max_length for c in criteria_list if isinstance(c, MaxLengthCriteria)]
        self.max_new = min([*lengths, config.max_length or sys.maxsize]) - self.width
        ending: list[Any] = [c.eos_token_id for c in criteria_list if isinstance(c, EosTokenCriteria)]
        ends = [int(token) for tokens in ending for token in tokens.flatten()]
        self.first_end, self.ends = (ends[0] if ends else None), set(ends)
        self.criteria = [c for c in criteria_list if not isinstance(c, (MaxLengthCriteria, EosTokenCriteria))]
        self._check_room()
        self.pad = self._pad_token()
        self.keep_scores = bool(config.return_dict_in_generate and config.output_scores)
        self.keep_logits = bool(config.return_dict_in_generate and config.output_logits)
        self._streamed = 0

    def _check(self, ids: Tensor, mask: Tensor) -> None:
        if ids.ndim != 2 or ids.shape[1] == 0 or ids.shape[0] == 0:
            raise BadRequest(
                f"the prompt is empty (input_ids {list(ids.shape)}); give at least one token per row, such as the "
                "beginning-of-text token"
            )
        if mask.shape != ids.shape:
            raise BadRequest(f"attention_mask is {list(mask.shape)}, input_ids {list(ids.shape)}; give both one shape")
        empty = (~mask.bool().any(-1)).nonzero().flatten().tolist()
        if empty:
            raise BadRequest(f"row(s) {empty} of the batch are all padding; drop them, or give each at least one token")
        top, low = int(ids.max()), int(ids.min())
        if top >= self.adapter.vocabulary or low < 0:
            raise BadRequest(
                f"token id {low if low < 0 else top} is outside the model's vocabulary of {self.adapter.vocabulary}; "
                "tokenize with the model's own tokenizer"
            )
        if self.config.num_beams not in (None, 1):
            raise BadRequest(
                f"num_beams={self.config.num_beams} is not supported by a speculative decoder; use num_beams=1"
            )
        if len(ids) > 1 and any(isinstance(p, UnbatchedClassifierFreeGuidanceLogitsProcessor) for p in self.processors):
            raise BadRequest(
                f"guidance_scale={self.config.guidance_scale} with {len(ids)} rows is not supported by a speculative "
                "decoder: rows go on at different speeds. Give one row at a time"
            )
        for name in ("output_attentions", "output_hidden_states"):
            if getattr(self.config, name, False):
                raise BadRequest(
                    f"{name}=True is not given by a speculative decoder; run the model on its output instead"
                )

    def _check_room(self) -> None:
        if self.max_new < 1:
            raise BadRequest(f"max_new_tokens={self.max_new} leaves nothing to generate; give at least 1")
        longest, limit = max(len(row.tokens) for row in self.rows), self.adapter.positions
        if longest + self.max_new > limit:
            raise BadRequest(
                f"the prompt has {longest} tokens and {self.max_new} may be generated, "
                f"{longest + self.max_new} in all; the model has {limit} positions. Shorten the prompt or lower "
                f"max_new_tokens to {max(limit - longest, 0)}"
            )

    def _pad_token(self) -> int:
        pad = self.config.pad_token_id
        if pad is None:
            pad = self.first_end if self.first_end is not None else 0
        return int(pad[0] if isinstance(pad, (list, tuple)) else pad)

    def room(self, row: Row) -> int:
        """How many more tokens this row may get."""
        return self.max_new - row.generated

    def warp(self, logits: Tensor) -> Tensor:
        """Temperature, top-k, top-p and min-p of the request, for a drafter that wants to draw alike."""
        for processor in self.processors:
            if isinstance(processor, WARPERS):
                logits = processor(None, logits)  # type: ignore[arg-type]
        return logits

    def _ids(self, length: int, rows: list[Row]) -> Tensor:
        """`[batch, width + length]` ids of the whole batch as plain generation would hold them after `length` tokens.

        Always the whole batch: processors and criteria may count on its size and order. A row that has not come so far
        is filled up with padding; what is computed for it is not used. `rows` may stand in for the batch's own.
        """
        every = self.rows.copy()
        for row in rows:
            every[row.number] = row
        outputs = [row.output[:length] + [self.pad] * (length - row.generated) for row in every]
        return torch.cat([self.input_ids, torch.tensor(outputs, dtype=torch.long, device=self.device)], 1)

    def _by_length(self, rows: list[Row]) -> dict[int, list[int]]:
        groups: dict[int, list[int]] = {}
        for index, row in enumerate(rows):
            groups.setdefault(row.generated, []).append(index)
        return groups

    def scored(self, rows: list[Row], logits: Tensor) -> Tensor:
        """Scores `[row, vocabulary]` float32 after all logits processors, each row at its own length.

        The rows are the batch's own, or stand in for them (see `supposed`), none of them twice.
        """
        scores = logits.float()
        if self.processors:
            scores = scores.clone()
            for length, indices in self._by_length(rows).items():
                numbers = [rows[i].number for i in indices]
                part = scores.new_zeros(len(self.rows), scores.shape[-1])
                part[numbers] = scores[indices]
                ids = self._ids(length, [rows[i] for i in indices])
                for processor in self.processors:
                    part = processor(ids, part)
                scores[indices] = part[numbers]
        return scores

    @staticmethod
    def supposed(row: Row, tokens: list[int]) -> Row:
        """What stands in for a row if it went on with these tokens: nothing is committed."""
        return Row(row.number, row.tokens + tokens, row.generated + len(tokens))

    def stops(self, rows: list[Row]) -> list[bool]:
        """Whether each of these rows (its own, or standing in, none twice) stops with its last token."""
        found = [row.tokens[-1] in self.ends or row.generated >= self.max_new for row in rows]
        if self.criteria:
            for length, indices in self._by_length(rows).items():
                ids, scores = self._ids(length, [rows[i] for i in indices]), None
                if self.keep_scores:
                    scores = self._stacked([row.scores for row in self.rows], length)
                for criterion in self.criteria:
                    stop = torch.as_tensor(criterion(ids, scores)).expand(len(self.rows)).tolist()
                    for i in indices:
                        found[i] = found[i] or stop[rows[i].number]
        return found

    def process(self, rows: list[Row], logits: Tensor) -> Tensor:
        """As `scored`, for the rows' next tokens; scores and logits are kept if the call wants them back."""
        scores = self.scored(rows, logits)
        if self.keep_scores:
            for row, score in zip(rows, scores, strict=True):
                row.scores.append(score)
        if self.keep_logits:
            for row, raw in zip(rows, logits.float(), strict=True):
                row.logits.append(raw.clone())
        return scores

    def commit(self, rows: list[Row], tokens: list[int]) -> None:
        """Append one token to each of these rows and mark the rows that stop with it."""
        for row, token in zip(rows, tokens, strict=True):
            row.tokens.append(token)
            row.generated += 1
        for row, stop in zip(rows, self.stops(rows), strict=True):
            row.done = stop

    def stream(self) -> None:
        """Give the streamer every column that all rows have reached; a finished row shows padding."""
        if self.streamer is None:
            return
        reached = min((row.generated for row in self.rows if not row.done), default=max(r.generated for r in self.rows))
        while self._streamed < reached:
            column = [row.output[self._streamed] if self._streamed < row.generated else self.pad for row in self.rows]
            self.streamer.put(torch.tensor(column))
            self._streamed += 1

    def drop_finished(self) -> list[int] | None:
        """Remove finished rows; indices (into the old active list) of those that stay, None if all do."""
        stay = [i for i, row in enumerate(self.active) if not row.done]
        if len(stay) == len(self.active):
            return None
        self.active = [self.active[i] for i in stay]
        return stay

    def result(self) -> Any:
        """What `generate` returns: ids, or transformers' output object if the configuration asks for it."""
        if self.streamer is not None:
            self.streamer.end()
        longest = max(row.generated for row in self.rows)
        outputs = [row.output + [self.pad] * (longest - row.generated) for row in self.rows]
        new = torch.tensor(outputs, dtype=torch.long, device=self.device)
        sequences = torch.cat([self.input_ids, new], 1)
        if not self.config.return_dict_in_generate:
            return sequences
        steps: dict[str, Any] = {
            "scores": self._stacked([row.scores for row in self.rows], longest) if self.keep_scores else None,
            "logits": self._stacked([row.logits for row in self.rows], longest) if self.keep_logits else None,
        }
        return GenerateDecoderOnlyOutput(sequences=sequences, **steps)  # type: ignore[arg-type]

    @staticmethod
    def _stacked(rows: list[list[Tensor]], longest: int) -> tuple[Tensor, ...]:
        """Per step `[batch, vocabulary]`; a row that stopped earlier repeats its last."""
        return tuple(torch.stack([row[min(step, len(row) - 1)] for row in rows]) for step in range(longest))
