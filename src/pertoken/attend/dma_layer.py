"""An attention layer with DMA built in, for models that are made new: see `attend.dma` for what it computes."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from pertoken.attend.dma import DMA
from pertoken.attend.dynamic_mask import DynamicMask
from pertoken.attend.key_view import KeyView
from pertoken.attend.selection import attended
from pertoken.attend.sight import Causal
from pertoken.core.budget import Budget
from pertoken.core.errors import BadRequest
from pertoken.core.rotation import rotated


@dataclass(frozen=True)
class Past:
    """What later tokens need: keys (turned) and values `[batch, kv_heads, key, dim]`, valid `[batch, key]` bool; state:
    what the choice keeps."""

    keys: Tensor
    values: Tensor
    valid: Tensor
    state: dict[str, Any] = field(default_factory=dict)


class DynamicMaskAttention(nn.Module):
    """Causal attention over the keys that DMA reads; q and k normed by head and turned by RoPE, as in the paper.

    width: of the hidden states; kv_heads: as many as heads unless given; head_dim: width // heads unless given; budget,
    sinks, recent, run: see `DMA`; form, clamp, noise: see `DynamicMask`; base: of RoPE.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        budget: Budget = Budget(tokens=2048),
        sinks: int = 0,
        recent: int = 0,
        run: int = 128,
        form: str = "softplus",
        clamp: float = 4.0,
        noise: float = 0.02,
        base: float = 10_000.0,
    ):
        super().__init__()
        kv_heads, dim = kv_heads or heads, head_dim or width // heads
        if heads % kv_heads or dim % 2 or not dim:
            raise BadRequest(
                f"heads={heads}, kv_heads={kv_heads}, head_dim={dim}: heads must be a multiple of kv_heads, and "
                "head_dim even (it is width // heads unless given)"
            )
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.q_proj, self.o_proj = nn.Linear(width, heads * dim, bias=False), nn.Linear(heads * dim, width, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(width, kv_heads * dim, bias=False) for _ in range(2))
        self.q_norm, self.k_norm = nn.RMSNorm(dim, eps=1e-6), nn.RMSNorm(dim, eps=1e-6)
        self.mask = DynamicMask([0], kv_heads, dim, form=form, clamp=clamp, noise=noise)
        self.policy = DMA(budget, sinks, recent, run, mask=self.mask)
        self.rates: Tensor
        self.register_buffer("rates", base ** -(torch.arange(0, dim, 2) / dim), persistent=False)

    def forward(self, hidden: Tensor, valid: Tensor | None = None, past: Past | None = None) -> tuple[Tensor, Past]:
        """Output `[batch, token, width]`, zeros at padding, and what the next call takes as `past`.

        hidden `[batch, token, width]`; valid `[batch, token]` bool: which tokens are real, all unless given. A row's
        positions count its real tokens only.
        """
        rows, tokens = hidden.shape[:2]
        valid = torch.ones(rows, tokens, dtype=torch.bool, device=hidden.device) if valid is None else valid.bool()
        query, key, value = (
            made.view(rows, tokens, -1, self.dim).transpose(1, 2)
            for made in (self.q_proj(hidden), self.k_proj(hidden), self.v_proj(hidden))
        )
        everyone = valid if past is None else torch.cat([past.valid, valid], 1)
        places = (everyone.int().cumsum(-1) - 1).clamp(min=0)[:, -tokens:]
        query, key = (self.turned(part, places) for part in (self.q_norm(query), self.k_norm(key)))
        state: dict[str, Any] = {}
        if past is not None:
            key, value = torch.cat([past.keys, key], 2), torch.cat([past.values, value], 2)
            state = dict(past.state)
        sight = Causal(everyone, key.shape[2] - tokens, tokens, lambda: None)
        runs = sight.runs(self.policy.run)
        view = KeyView(
            valid=valid,
            layers=1,
            queries=runs.split(query),
            keys=key,
            values=value,
            runs=runs,
            kept=runs.kept(self.policy.sinks, self.policy.recent, self.policy.each),
            scale=self.dim**-0.5,
            state=state,
        )
        out = runs.join(attended(self.policy, view, self.policy.decide(view), view.queries))
        out = out.masked_fill(~valid[:, None, :, None], 0)
        return self.o_proj(out.transpose(1, 2).flatten(2)), Past(key, value, everyone, state)

    def turned(self, x: Tensor, places: Tensor) -> Tensor:
        """`x` `[batch, heads, token, dim]` turned by RoPE to `places` `[batch, token]`."""
        angles = torch.cat([places[:, None, :, None] * self.rates] * 2, -1)
        return rotated(x, angles.cos().to(x.dtype), angles.sin().to(x.dtype))
