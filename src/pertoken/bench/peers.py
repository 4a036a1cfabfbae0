"""Other people's samplers on our models, made as fast as they can be, to be measured against.

diffusers' `LLaDA2Pipeline` fills blocks left to right. Each of its steps calls the model on everything up to the end of
the present block, without a cache and without the blocks that follow, and commits what is surer than a threshold, or
else the surest positions, as many as an even schedule says. What is done here in its favour, beyond what a user gets:
prompts are padded on the left to whole blocks (its blocks are counted from column 0, so that otherwise the first block
holds prompt and the last one positions that nobody asked for), logits are computed for the present block only, a mask
token is never predicted (it would take a step and stay masked), and a prompt that holds the end of text does not keep
it from stopping at a later one. What stays as it is: the step after the one that decides the last position of a block
before its time still calls the model, and a row that is done stays in the batch.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from pertoken.core.cost import synchronize
from pertoken.core.errors import BadRequest
from pertoken.models.adapter import adapter_for


@dataclass(frozen=True)
class PeerRun:
    """tokens `[row, token]`, the end-of-text token behind a row's first; counted: tokens up to and with that first one,
    over all rows; seconds: wall clock of the sampler alone; forwards: calls of the model."""

    tokens: Tensor
    counted: int
    seconds: float
    forwards: int


class BlockLogits(nn.Module):
    """A bidirectional model as the pipeline calls it: logits `[row, place, vocabulary]` of the last block of its input.

    prompt, mask `[row, token]`: what really stands in the first columns; total: columns of prompt and canvas, if the
    model is to see undecided positions up to there, else 0.
    """

    def __init__(self, model: Any, block: int, shift: int, mask_token: int):
        super().__init__()
        self.model, self.block, self.shift, self.mask_token = model, block, shift, mask_token
        self.adapter, self.calls, self.total = adapter_for(model), 0, 0
        self.prompt = self.mask = torch.zeros(0, 0, dtype=torch.long)

    @property
    def device(self) -> torch.device:
        return self.adapter.device

    @property
    def dtype(self) -> torch.dtype:
        return self.adapter.dtype

    def forward(self, ids: Tensor, attention_mask: Tensor, position_ids: Tensor) -> SimpleNamespace:
        self.calls += 1
        end, start = ids.shape[1], self.prompt.shape[1]
        ids = torch.cat([self.prompt, ids[:, start:]], 1)
        if self.total > end:
            ids = nn.functional.pad(ids, (0, self.total - end), value=self.mask_token)
        mask = nn.functional.pad(self.mask, (0, ids.shape[1] - start), value=1)
        hidden = self.adapter.base(
            input_ids=ids,
            attention_mask=None if bool(mask.all()) else mask,
            position_ids=(mask.cumsum(-1) - 1).clamp(min=0),
            use_cache=False,
        ).last_hidden_state
        logits = self.adapter.head(hidden[:, end - self.block - self.shift : end - self.shift])
        logits[..., self.mask_token] = -torch.inf
        return SimpleNamespace(logits=logits)


def llada2(
    model: Any,
    block: int = 32,
    steps: int | None = None,
    threshold: float = 0.9,
    whole: bool = False,
    editing: float | None = None,
    temperature: float = 0.0,
) -> Callable[..., PeerRun]:
    """`run(inputs, length, end=None)`: diffusers' LLaDA2Pipeline on tokenized, left-padded inputs.

    block: positions per block; steps: most of them per block (None: one per position); threshold: commits what is
    surer, above 1 as many per step as the schedule says; whole: let the model see the undecided positions of the blocks
    that follow, as our loop does; editing: confidence above which a committed token is replaced (None: never);
    temperature: above 0 it samples.
    """
    try:
        from diffusers import BlockRefinementScheduler, LLaDA2Pipeline
    except ImportError as error:
        raise BadRequest("diffusers is not installed; pip install 'pertoken[vision]'") from error
    config = model.config
    if getattr(config, "is_causal", True) is not False or getattr(config, "mask_token_id", None) is None:
        raise BadRequest(
            f"{type(model).__name__} is no masked-diffusion model: config.is_causal must be False and "
            "config.mask_token_id be set, as in zoo:code-diffusion"
        )
    wrapped = BlockLogits(model, block, getattr(config, "prediction_shift", 0), config.mask_token_id).eval()
    pipeline: Any = LLaDA2Pipeline(wrapped, BlockRefinementScheduler(block_length=block))
    pipeline.set_progress_bar_config(disable=True)

    def run(inputs: dict[str, Tensor], length: int, end: int | None = None) -> PeerRun:
        if length % block:
            raise BadRequest(f"block={block} does not divide {length} new tokens; give a multiple")
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        filler = next(token for token in range(3) if token not in (end, config.mask_token_id))
        ragged = (-ids.shape[1] % block, 0)
        wrapped.prompt = nn.functional.pad(ids, ragged, value=filler)
        wrapped.mask = nn.functional.pad(mask, ragged)
        wrapped.calls, wrapped.total = 0, wrapped.prompt.shape[1] + length if whole else 0
        synchronize(ids.device)
        started = time.perf_counter()
        found = pipeline(
            input_ids=torch.full_like(wrapped.prompt, filler),  # the model is shown the real one
            attention_mask=wrapped.mask,
            gen_length=length,
            block_length=block,
            num_inference_steps=steps or block,
            threshold=threshold,
            editing_threshold=editing,
            temperature=temperature,
            eos_token_id=end,
            eos_early_stop=end is not None,
            mask_token_id=config.mask_token_id,
            output_type="seq",
        ).sequences
        synchronize(ids.device)
        seconds = time.perf_counter() - started
        behind = torch.zeros_like(found, dtype=torch.bool)
        if end is not None:
            behind = (found == end).long().cumsum(-1) - (found == end).long() > 0
            found = found.masked_fill(behind, end)
        return PeerRun(found, int((~behind).sum()), seconds, wrapped.calls)

    return run
