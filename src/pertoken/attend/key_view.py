"""What a policy that chooses keys sees."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pertoken.attend.sight import Kept, Runs
from pertoken.core.policy import View
from pertoken.models.rotary import Rotary


@dataclass(frozen=True)
class KeyView(View):
    """What a policy sees at one layer of one forward.

    queries `[batch, heads, run, query, dim]`, zeros where there is no query; keys and values `[batch, kv_heads, key,
    dim]`; runs and kept: see `attend.sight`; scale: of the scores; state: what the policy keeps for this layer and
    request; rotary: turns queries and keys, which are not turned yet; None where they are; prompt and prompt_before
    `[batch]`: tokens of each row up to the end of the last forward of a text of several tokens, and at the one before
    it, for a policy that reads them; what follows was generated; memo: what a policy has worked out from this view, for
    its own use.
    """

    layer: int = 0
    queries: Tensor = field(default_factory=lambda: torch.empty(0))
    keys: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    runs: Runs = field(default=None)  # type: ignore[assignment]
    kept: Kept = field(default=None)  # type: ignore[assignment]
    scale: float = 1.0
    state: dict[str, Any] = field(default_factory=dict)
    rotary: Rotary | None = None
    prompt: Tensor = field(default_factory=lambda: torch.empty(0))
    prompt_before: Tensor = field(default_factory=lambda: torch.empty(0))
    memo: dict[str, Any] = field(default_factory=dict)

    def mean_queries(self, distance: int) -> Tensor:
        """`[batch, heads, run, dim]` the mean query of each run, fp32; zeros where there is none.

        Where keys are not turned yet, as if they all stood `distance` tokens before the run's first query."""
        queries, runs = self.queries.detach(), self.runs
        if self.rotary is not None:
            places = torch.arange(runs.length, device=queries.device) + distance
            queries = self.rotary.turn(queries, places, distance + runs.length)
        if runs.length == 1:
            return queries[:, :, :, 0].float()
        return queries.float().sum(3) / runs.real.sum(-1).clamp(min=1)[:, None, :, None]
