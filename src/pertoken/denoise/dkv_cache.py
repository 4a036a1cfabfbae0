"""dKV-Cache: keep the keys and values of decided tokens, one step late, and renew them now and then.

Source: Ma et al., "dKV-Cache: The Cache for Diffusion Language Models", arXiv 2505.15781. A token's keys and values
jump most at the step at which it is decided, so they are kept only from the step after. Let U_t be what is decided
after step t of the block (prompts included).

- `DKVCache`, dKV-Cache-Decode: steps 0 and 1 of a block and every `interval`-th one compute everything; the others
  compute A_t = everything but U_{t-2}: what is undecided and what was decided at the step before.
- `DKVCacheGreedy`: only A_t = D_t + D_{t-1} + W_t: what is decided now, what was decided at the step before, and a
  window of the nearest undecided neighbours, `window` for each position of D_t; every `interval`-th step of a block,
  the first included, computes everything, undecided positions are cached too. D_t must be known before the forward, so
  the commit rule must be one that knows its order, as `RandomCommit`; with another rule the window stands around
  D_{t-1} (which the paper's ablation favours), within the block, and only what was computed can be committed, so that
  such a rule is refused without a window.

What differs: rows of a batch keep their own step counts and caches. Where the output at i - 1 predicts token i, a
position stays active until both it and the token it predicts are decided (the released code's "un_right"). It loses
on canvases much longer than the text, where the undecided positions of later blocks are most of the work.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from pertoken.core.card import Dial, Paper, method
from pertoken.core.errors import BadRequest
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.rules import RefreshRule, top

PAPER = Paper("dKV-Cache: The Cache for Diffusion Language Models", "2505.15781")


@method(
    question="denoise",
    shape="decoder",
    exactness="approximate",
    paper=PAPER,
    writes={"refresh"},
    needs={"diffusion"},
    baselines=("recompute", "prefix_cache", "dual_cache"),
    dial=Dial("interval", (32, 16, 8, 4, 2)),
)
@dataclass(frozen=True)
class DKVCache(RefreshRule):
    """Keep decided tokens one step late; renew all every `interval` steps of a block (1: no cache)."""

    interval: int = 8
    full: ClassVar[dict[str, Any]] = {"interval": 1}

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise BadRequest(f"interval={self.interval} is too short; give 1 to recompute always, or more")

    def plan(self, canvas: Canvas, upcoming: Tensor | None) -> Tensor:
        step = canvas.block_step[:, None]  # at step 0 nothing was decided before the last commit: step 1 is not late
        return (step < 2) | (step % self.interval == 0) | canvas.masked | canvas.decided_last


@method(
    question="denoise",
    shape="decoder",
    exactness="approximate",
    paper=PAPER,
    name="dkv_cache_greedy",
    writes={"refresh"},
    needs={"diffusion"},
    baselines=("recompute", "dkv_cache", "dual_cache"),
    dial=Dial("interval", (32, 16, 8, 4, 2)),
)
@dataclass(frozen=True)
class DKVCacheGreedy(RefreshRule):
    """Compute only what is decided now or was just now, and `window` undecided neighbours of each."""

    interval: int = 2
    window: int = 4
    full: ClassVar[dict[str, Any]] = {"interval": 1}

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise BadRequest(f"interval={self.interval} is too short; give 1 to recompute always, or more")
        if self.window < 0:
            raise BadRequest(f"window={self.window} is no number of neighbours; give 0 for none, or more")

    def plan(self, canvas: Canvas, upcoming: Tensor | None) -> Tensor:
        last = canvas.decided_last
        if upcoming is None and not self.window and self.interval > 1:
            raise BadRequest(
                "dkv_cache_greedy with window=0 computes only what is about to be committed, and this commit rule does "
                "not know that before the forward: it would commit from old outputs. Give a window of 1 or more, or a "
                "rule with a known order such as random_commit"
            )
        if upcoming is None:
            near = self._near(canvas, last, canvas.masked & canvas.in_block)
        else:
            near = upcoming | self._near(canvas, upcoming, canvas.masked)
        return (canvas.block_step % self.interval == 0)[:, None] | last | near

    def _near(self, canvas: Canvas, centre: Tensor, candidates: Tensor) -> Tensor:
        """bool `[row, column]`: the candidates nearest to any centre, `window` for each, left before right."""
        columns, far = canvas.columns, 2 * canvas.width
        before = torch.where(centre, columns, -far).cummax(-1).values
        after = torch.where(centre, columns, far).flip(-1).cummin(-1).values.flip(-1)
        distance = torch.minimum(2 * (after - columns), 2 * (columns - before) + 1)
        ranked = -distance.double().masked_fill(~candidates | centre, torch.inf)
        return top(ranked, self.window * centre.sum(-1))
