"""What a call asks for, checked before any work is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from pertoken.core.errors import BadRequest
from pertoken.denoise.diffusion_gemma import Site
from pertoken.denoise.pace import quotas
from pertoken.models.adapter import Adapter, adapter_for

if TYPE_CHECKING:
    from pertoken.denoise.loop import Denoise


@dataclass(frozen=True)
class Settings:
    """ids, attention_mask `[row, token]`: the left-padded prompts; length, block, steps_per_block: of the canvas;
    quotas `[place, step]`: commits of a block that begins with so many undecided places; sampling: do_sample, whose
    temperature is the processors'; eos `[token]`: the tokens that end a text, none where the model has no end; pad:
    what a text is filled up with."""

    adapter: Adapter | Site
    ids: Tensor
    attention_mask: Tensor
    length: int
    block: int
    sliding: int | None
    steps_per_block: int
    quotas: Tensor
    mask_token: int | None
    shift: int
    sampling: bool
    eos: Tensor
    pad: int
    as_dict: bool

    @classmethod
    def of(cls, rules: Denoise, model: Any, ids: Tensor, attention_mask: Tensor | None, config: Any) -> Settings:
        """Raises `BadRequest` for a causal model, a canvas that does not fit, blocks that do not divide."""
        config, about = config or model.generation_config, model.config
        noisy = getattr(about, "model_type", None) == "diffusion_gemma"
        if not noisy and getattr(about, "is_causal", True) is not False:
            raise BadRequest(
                f"{type(model).__name__} is causal (config.is_causal is not False): it cannot fill in a canvas. Give a "
                "masked-diffusion model such as zoo:code-diffusion; if this one is bidirectional, say so with "
                "model.config.is_causal = False"
            )
        mask_token = rules.mask_token if rules.mask_token is not None else getattr(about, "mask_token_id", None)
        if not noisy and (mask_token is None or not 0 <= mask_token < about.vocab_size):
            raise BadRequest(
                f"mask token {mask_token} is not in the vocabulary of {about.vocab_size} tokens; set "
                "config.mask_token_id or give Denoise(mask_token=...)"
            )
        shift = rules.shift if rules.shift is not None else getattr(about, "prediction_shift", 0)
        if shift not in (0, 1):
            raise BadRequest(
                f"shift={shift} is unknown; 0: the output at i predicts token i, 1: the output at i - 1 does"
            )
        attention_mask = torch.ones_like(ids) if attention_mask is None else attention_mask
        length = cls._length(config, ids)
        sliding = rules.refresh.sliding if rules.sliding is None else rules.sliding
        if sliding is not None and sliding < 1:
            raise BadRequest(f"a sliding block of {sliding} positions is empty; give 1 or more, or None for blocks")
        block = min(rules.block or length, length) if sliding is None else length
        if block < 1 or length % block:
            divisors = [d for d in range(1, length + 1) if length % d == 0]
            raise BadRequest(
                f"block={block} does not divide the canvas of {length} positions; give one of "
                f"{', '.join(map(str, divisors))} or another max_new_tokens"
            )
        blocks = length // block
        steps = rules.steps or length
        if steps < 1 or steps % blocks:
            raise BadRequest(f"steps={steps} do not divide over {blocks} blocks; give a multiple of {blocks}")
        sampling = bool(getattr(config, "do_sample", True))
        if noisy:
            adapter = Site.of(rules, model, ids, config, block, steps // blocks, sampling)
            steps = blocks * adapter.annealing.max_denoising_steps if rules.revise else steps
        elif rules.revise:
            raise BadRequest(f"what is committed to {type(model).__name__} is final; leave out revise=True")
        else:
            adapter = adapter_for(model)
        counts = quotas(rules.pace, block, steps // blocks).to(ids.device)
        cls._check_rows(ids, attention_mask, shift)
        need = int(attention_mask.sum(-1).max()) + length
        if need > adapter.positions:
            raise BadRequest(
                f"prompt and canvas need {need} positions, the model has {adapter.positions}; shorten the prompt or "
                f"lower max_new_tokens to {max(adapter.positions - need + length, 0)}"
            )
        ends = [] if config.eos_token_id is None else torch.as_tensor(config.eos_token_id).flatten().tolist()
        pad = config.pad_token_id if config.pad_token_id is not None else next(iter(ends), 0)
        return cls(
            adapter,
            ids,
            attention_mask,
            length,
            block,
            None if sliding is None else min(sliding, length),
            steps // blocks,
            counts.cumsum(-1) if rules.revise else counts,
            mask_token,
            shift,
            sampling,
            torch.tensor(ends, dtype=torch.long, device=ids.device),
            int(pad),
            bool(config.return_dict_in_generate),
        )

    @staticmethod
    def _length(config: Any, ids: Tensor) -> int:
        length = config.max_new_tokens
        if length is None:
            length = (config.max_length or 0) - ids.shape[1]
        if length < 1:
            raise BadRequest(f"max_new_tokens={length} leaves no canvas; give at least 1")
        return int(length)

    @staticmethod
    def _check_rows(ids: Tensor, attention_mask: Tensor, shift: int) -> None:
        if ids.ndim != 2 or attention_mask.shape != ids.shape:
            raise BadRequest(
                f"input_ids {list(ids.shape)} and attention_mask {list(attention_mask.shape)} must both be [row, token]"
            )
        lengths = attention_mask.sum(-1)
        if bool((lengths < shift).any()):
            row = int((lengths < shift).nonzero()[0])
            raise BadRequest(
                f"row {row} has an empty prompt, and this model predicts a token from the output before it; start the "
                "row with the end-of-text token"
            )
        if ids.shape[1] and bool((attention_mask.diff(dim=-1) < 0).any()):
            row = int((attention_mask.diff(dim=-1) < 0).any(-1).nonzero()[0])
            raise BadRequest(f"row {row} is padded on the right or inside; pad on the left (padding_side='left')")
