"""Where a text falls into chunks: the boundary predictor of DHSA (arXiv 2510.24606), and the choice among its guesses.

One network serves all layers. It reads keys x `[token, width]`, the key heads of a token side by side, width = kv_heads
* dim. A chunk may start at place s if the w tokens before s and the w from s on differ:

    y    = LayerNorm(SelfAttention(x[s-w .. s+w-1]))                [2w, width], no residual
    l, r = mean of the first and of the last w rows of y
    logit[s] = MLP([l, r, |l-r|, l*r, cos(l, r)])                   4 width + 1 -> hidden -> 1

Differs from the paper's code: queries, keys and values of the self-attention are worked out once per token and not once
per window; and boundaries are accepted block by block (`accepted`), not over the whole prompt, so that what was decided
about a text does not depend on what follows it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pertoken.core.errors import BadRequest
from pertoken.models.load import resolve

PIECE = 1024  # places looked at together, so that their windows stay in a CPU's cache


class Boundaries(nn.Module):
    """Keys `[batch, token, width]` -> logits `[batch, token - 2 window + 1]`, one for each place from `window` on.

    window: tokens looked at on either side; heads of the self-attention; hidden: width of the MLP; about: what it was
    trained on.
    """

    def __init__(
        self, width: int, window: int = 4, heads: int = 4, hidden: int = 256, about: dict[str, Any] | None = None
    ):
        super().__init__()
        if width % heads:
            raise BadRequest(f"heads={heads} does not divide the width of the keys, {width}; give a divisor of it")
        self.width, self.window, self.heads, self.hidden, self.about = width, window, heads, hidden, about or {}
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width)
        self.judge = nn.Sequential(nn.Linear(4 * width + 1, hidden), nn.ReLU(), nn.Linear(hidden, 1))

    def forward(self, keys: Tensor) -> Tensor:
        span, count = 2 * self.window, keys.shape[1] - 2 * self.window + 1
        if count <= 0:
            return keys.new_zeros(len(keys), 0, dtype=torch.float32)
        projected = self.qkv(keys.float())
        parts = [self._logits(projected[:, at : min(at + PIECE, count) + span - 1]) for at in range(0, count, PIECE)]
        return torch.cat(parts, 1)

    def _logits(self, projected: Tensor) -> Tensor:
        windows = projected.unfold(1, 2 * self.window, 1).unflatten(2, (3, self.heads, -1))
        query, key, value = windows.unbind(2)  # [batch, place, head, dim, token of the window]
        law = (torch.matmul(query.transpose(-1, -2), key) * query.shape[3] ** -0.5).softmax(-1)
        mixed = torch.matmul(law, value.transpose(-1, -2)).transpose(2, 3).flatten(3)
        mixed = self.norm(self.out(mixed))
        left, right = mixed[:, :, : self.window].mean(2), mixed[:, :, self.window :].mean(2)
        alike = F.cosine_similarity(left, right, dim=-1)[..., None]
        return self.judge(torch.cat([left, right, (left - right).abs(), left * right, alike], -1))[..., 0]

    def save(self, path: str | Path) -> None:
        """Write weights and what they were trained on as one safetensors file."""
        about = {"width": self.width, "window": self.window, "heads": self.heads, "hidden": self.hidden, **self.about}
        save_file(self.state_dict(), str(path), {"boundaries": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> Boundaries:
        """Read what `save` wrote, from a file, a directory with a boundaries.safetensors, or a zoo:NAME; raises
        `BadRequest` where there is none."""
        path = Path(resolve(str(path)))
        if path.is_dir():
            path = path / "boundaries.safetensors"
        if not path.is_file():
            raise BadRequest(
                f"no boundary predictor at {path}; train one with pertoken.attend.boundary_training.train_boundaries"
            )
        with safe_open(str(path), "pt") as file:
            about = (file.metadata() or {}).get("boundaries")
            if about is None:
                raise BadRequest(f"{path} is not a boundary predictor: its header says nothing about one")
            kept = json.loads(about)
            sizes = {name: kept.pop(name) for name in ("width", "window", "heads", "hidden")}
            found = cls(**sizes, about=kept)
            found.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return found.eval()

    def places(self, keys: Tensor, first: Tensor, count: Tensor) -> Tensor:
        """Logits `[batch, place]` of the places from `first` on, -inf where a window is not full.

        keys `[batch, place + 2 window - 1, width]`: of the tokens from `window` before `first` on; first `[batch]`;
        count `[batch]`: tokens that the row has.
        """
        logits = self(keys)
        place = first[:, None] + torch.arange(logits.shape[1], device=logits.device)
        full = (place >= self.window) & (place + self.window <= count[:, None])
        return logits.masked_fill(~full, -torch.inf)


def accepted(logits: Tensor, theta: float, spacing: int, most: int, block: int) -> Tensor:
    """`[batch, place]` bool: in each block of `block` places the best logits above theta, the highest first, each
    farther than `spacing` from those accepted before it in its block, and at most `most`; places a multiple of block.

    As many rounds as a block can hold boundaries, whatever the length: no loop over places, no synchronisation.
    """
    left = logits.unflatten(1, (-1, block))
    place = torch.arange(block, device=logits.device)
    chosen = torch.zeros_like(left, dtype=torch.bool)
    for _ in range(min(most, -(-block // (spacing + 1)))):
        best, at = left.max(-1, keepdim=True)
        fits = best > theta
        chosen |= (place == at) & fits
        left = left.masked_fill(((place - at).abs() <= spacing) & fits, -torch.inf)
    return chosen.flatten(1)


def no_longer(starts: Tensor, longest: int) -> Tensor:
    """`starts` `[batch, place]` bool with the first place and, in chunks longer than `longest`, every `longest`-th."""
    place = torch.arange(starts.shape[1], device=starts.device)
    latest = torch.where(starts, place, 0).cummax(-1).values
    return starts | ((place - latest) % longest == 0)
