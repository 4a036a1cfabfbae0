"""transformers' DiffusionGemma under the denoising loop: noise in the place of a mask token.

Source: `transformers.models.diffusion_gemma`. A causal encoder reads the prompt and every finished block once, exactly;
a decoder of the same weights reads that and, in all directions, the canvas: one block of `config.canvas_length`
positions. Undecided positions hold tokens drawn uniformly from the vocabulary, anew at every step, and the decoder is
also given its own last outputs (self-conditioning): their softmax times the embedding table. At the step with n of N
steps to go the outputs are divided by t_min + (t_max - t_min) n / N before anything looks at them.

What a rule commits is final, as with other models (and as in diffusers' BlockRefinementScheduler). With
`Denoise(revise=True)` the loop does as transformers' own sampler does: what the rule picks holds until the next step
only, where everything is decided anew; the block is done when its argmax has not changed for `stability_threshold`
steps and its mean entropy is below `confidence_threshold` nats, or after `max_denoising_steps`, and what is committed
is that argmax. `EntropyBound(gamma)` is then its sampler with entropy_bound = gamma.

What differs from its `generate`: rows go on to their next block at their own pace; positions do not count padding;
noise is a function of seed, block, step and place, so that a greedy row does not depend on its batch; the request's
logits processors come after the temperature. Only text. Nothing but the block is computed at a step, so refresh rules
other than `Recompute` have nothing to decide.

Its `generate` passes over `custom_generate` without a word: call `Denoise(...)(model, **inputs,
generation_config=...)`, which samples unless that configuration has do_sample=False.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from pertoken.core.errors import BadRequest
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.canvas_model import CanvasModel
from pertoken.denoise.noise import noise
from pertoken.denoise.rules import Guess
from pertoken.models.encoded import EncoderCache

ATTENTION = ("sdpa", "eager")


@dataclass(frozen=True)
class Annealing:
    """transformers' `DiffusionGemmaGenerationConfig` and its defaults: steps per block, temperatures at the last and
    the first of them, and when a block is done."""

    max_denoising_steps: int = 48
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int = 1
    confidence_threshold: float = 0.005

    @classmethod
    def of(cls, *configs: Any) -> Annealing:
        """Each field from the first configuration that says anything."""
        found = {}
        for field in fields(cls):
            said = [value for config in configs if (value := getattr(config, field.name, None)) is not None]
            found[field.name] = said[0] if said else field.default
        return cls(**found)


@dataclass(frozen=True)
class Site:
    """What the rest of the loop reads of a model that has no adapter."""

    model: Any
    annealing: Annealing
    revise: bool
    seed: int | None  # None: the same noise for every row

    @property
    def text(self) -> Any:
        return self.model.config.get_text_config()

    @property
    def positions(self) -> int:
        return self.text.max_position_embeddings

    @property
    def vocabulary(self) -> int:
        return self.text.vocab_size

    @property
    def dtype(self) -> torch.dtype:
        return self.model.lm_head.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.model.lm_head.weight.device

    @classmethod
    def of(cls, rules: Any, model: Any, ids: Tensor, config: Any, block: int, steps: int, sampling: bool) -> Site:
        """Raises `BadRequest` for what has no meaning for this model. block, steps: positions and steps per block."""
        from pertoken.denoise.recompute import Recompute

        about, name = model.config, type(model).__name__
        if not isinstance(rules.refresh, Recompute):
            raise BadRequest(
                f"{type(rules.refresh).__name__} has nothing to refresh in {name}: it keeps what lies before the block "
                "exactly and computes only the block. Leave out the refresh rule"
            )
        if rules.sliding is not None:
            raise BadRequest(f"{name} fills fixed blocks of {about.canvas_length} positions; leave out sliding")
        if block != about.canvas_length:
            raise BadRequest(
                f"{name} fills blocks of {about.canvas_length} positions, not {block}; give "
                f"block={about.canvas_length} and a multiple of it as max_new_tokens"
            )
        if rules.canvas is not None and rules.canvas.reads_all:
            raise BadRequest(
                f"{type(rules.canvas).__name__} reads outputs of all blocks; {name} computes one at a time"
            )
        if rules.revise and rules.constraint is not None:
            raise BadRequest("a constraint needs tokens that stay; leave out revise=True")
        if rules.shift or rules.mask_token is not None:
            raise BadRequest(f"{name} has no mask token and no shift; leave out mask_token and shift")
        if about.get_text_config().use_bidirectional_attention == "all":
            raise BadRequest(f"the encoder of this {name} reads both ways, so that what it has read cannot be kept")
        if (used := about.get_text_config()._attn_implementation) not in ATTENTION:
            raise BadRequest(
                f"attention {used!r} takes no mask per row; load the model with attn_implementation='sdpa' or 'eager'"
            )
        if about.image_token_id is not None and bool((ids == about.image_token_id).any()):
            raise BadRequest("the prompt holds image tokens; only text is read here")
        seed = int(torch.randint(2**62, ())) if sampling else None
        annealing = Annealing.of(config, model.generation_config)
        if rules.steps:
            annealing = replace(annealing, max_denoising_steps=steps)
        return cls(model, annealing, rules.revise, seed)


class DiffusionGemma(CanvasModel):
    """held `[row, place]`: tokens that the decoder is shown, -1 for noise; signal `[row, place, vocabulary]`: its last
    outputs; past `[row, step, place]`: its last argmaxes."""

    reads_decided = True

    def __init__(self, site: Site, canvas: Canvas):
        self.site, self.cache = site, EncoderCache(site.text, canvas.rows, canvas.width, site.dtype, site.device)
        self.known = torch.zeros_like(canvas.valid)
        self.held = torch.full((canvas.rows, canvas.size), -1, device=canvas.ids.device)
        self.past = self.held[:, None].repeat(1, site.annealing.stability_threshold, 1)
        self.signal: Tensor | None = None
        self.outputs = self.first = self.work = self.whole = torch.zeros(0)

    def forward(self, canvas: Canvas, planned: Tensor) -> Tensor:
        """Encode what lies before the block and is not encoded yet, and decode the block; the plan says nothing."""
        self.first = canvas.block_columns[:, 0]
        read = canvas.start + int(canvas.block.max()) * canvas.size
        new = canvas.valid & (canvas.columns < self.first[:, None]) & ~self.known
        if bool(new.any()):
            self._encode(canvas, new, read)
            self.known |= new
        fresh = canvas.block_step == 0
        self.held.masked_fill_(fresh[:, None], -1)
        self.past.masked_fill_(fresh[:, None, None], -1)
        self.cache.show(read)
        places = canvas.block_columns
        steps, n = self.site.annealing, (self.site.annealing.max_denoising_steps - canvas.block_step).clamp(min=1)
        temperature = steps.t_min + (steps.t_max - steps.t_min) * n / steps.max_denoising_steps
        out = self.site.model(
            decoder_input_ids=torch.where(
                self.held < 0, noise(canvas, self.site.vocabulary, self.site.seed), self.held
            ),
            past_key_values=self.cache,
            self_conditioning_logits=self.signal,
            self_conditioning_mask=None if self.signal is None else ~fresh,
            decoder_attention_mask=self._masks(self._decoder_sees(canvas, places, read)),
            decoder_position_ids=canvas.positions.gather(1, places),
        )
        self.outputs = out.logits / temperature[:, None, None]
        computed = new | (canvas.in_block & canvas.valid)
        depth = self.site.text.num_hidden_layers
        self.work, self.whole = depth * computed.sum(-1), depth * (computed == canvas.valid).all(-1)
        return computed

    def _encode(self, canvas: Canvas, new: Tensor, read: int) -> None:
        rows = new.any(-1).nonzero().flatten()
        wanted, valid, positions = new[rows], canvas.valid[rows], canvas.positions[rows]
        count = wanted.sum(-1)
        columns = wanted.int().argsort(dim=-1, descending=True, stable=True)[:, : int(count.max())]
        real = torch.arange(columns.shape[1], device=columns.device) < count[:, None]
        own = positions.gather(1, columns)
        before = valid[:, None, :read] & (canvas.columns[:read] <= columns[..., None])
        near = own[..., None] - positions[:, None, :read] < self.site.text.sliding_window
        self.cache.write_at(rows, columns, real, read)
        self.site.model.model.encoder(
            input_ids=canvas.ids[rows].gather(1, columns),
            attention_mask=self._masks({"full_attention": before, "sliding_attention": before & near}),
            past_key_values=self.cache,
            position_ids=own.masked_fill(~real, 0),
        )

    def _decoder_sees(self, canvas: Canvas, places: Tensor, read: int) -> dict[str, Tensor]:
        """bool `[row, place, encoded column and place]` per kind of layer: a sliding one keeps of what is encoded the
        last positions that fit into its window together with one more."""
        before = canvas.valid[:, :read] & (canvas.columns[:read] < self.first[:, None])
        start = canvas.positions.gather(1, self.first[:, None])
        near = before & (start - canvas.positions[:, :read] < self.site.text.sliding_window)
        block = canvas.valid.gather(1, places)
        return {
            kind: torch.cat([seen, block], 1)[:, None].expand(-1, places.shape[1], -1)
            for kind, seen in (("full_attention", before), ("sliding_attention", near))
        }

    def _masks(self, seen: Mapping[str, Tensor]) -> dict[str, Tensor]:
        dtype = self.site.dtype
        return {
            kind: torch.zeros(allow.shape, dtype=dtype, device=allow.device).masked_fill_(
                ~allow, torch.finfo(dtype).min
            )[:, None]
            for kind, allow in seen.items()
        }

    def logits(self, places: Tensor) -> Tensor:
        return self.outputs

    def logits_at(self, row: Tensor, column: Tensor) -> Tensor:
        """Only for columns of the present blocks."""
        return self.outputs[row, column - self.first[row]]

    def settle(self, canvas: Canvas, guess: Guess, chosen: Tensor) -> tuple[Tensor, Tensor]:
        self.signal = guess.scores.to(self.site.dtype)
        if not self.site.revise:
            self.held = torch.where(chosen, guess.tokens, self.held)
            return chosen, guess.tokens
        self.held = torch.where(chosen, guess.tokens, -1)
        best, rules = guess.scores.argmax(-1), self.site.annealing
        stable = (self.past == best[:, None]).all(-1).all(-1)
        self.past = torch.cat([self.past, best[:, None]], 1)[:, 1:]
        done = stable & (guess.entropy.mean(-1) < rules.confidence_threshold)
        done |= canvas.block_step + 1 >= rules.max_denoising_steps
        return guess.masked & done[:, None], best

    def select(self, rows: Tensor) -> None:
        self.cache.select(rows)
        self.known, self.held, self.past = self.known[rows], self.held[rows], self.past[rows]
        self.signal = None if self.signal is None else self.signal[rows]
