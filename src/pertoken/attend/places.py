"""Columns and places: the place of a token is its number among the tokens that its run sees, whatever the padding."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from pertoken.attend.history import ends
from pertoken.attend.key_view import KeyView
from pertoken.attend.sight import packed


@dataclass(frozen=True)
class Places:
    """Of one forward, for all of its layers.

    order `[batch, 1 or run, place]`: the column at each place, -1 behind the last one; own `[batch, run]`: place of the
    run's first query; end `[batch, run]`: the place behind the last candidate; extends: the queries are of a prompt;
    generated: an upper bound of the places from the prompt's end to `own`; fresh: of those that this forward adds.
    """

    order: Tensor
    own: Tensor
    end: Tensor
    extends: bool
    generated: int
    fresh: int

    @classmethod
    def of(cls, view: KeyView, sinks: int) -> Places:
        kept = view.kept.worked_out
        if "places" not in kept:
            kept["places"] = cls.made(view, sinks)
        return kept["places"]

    @classmethod
    def made(cls, view: KeyView, sinks: int) -> Places:
        runs, sight = view.runs, view.runs.sight
        extends = not view.tree and (sight.queries > 1 or sight.begins)
        order = packed(runs.some) if view.tree else packed(sight.filled[:, None])
        total = view.kept.rank[..., -1]
        own = total - runs.real.sum(-1)
        beyond = (own - view.prompt[:, None]).amax() if not extends else 0
        fresh = (view.prompt - view.prompt_before).amax() if extends else 0
        return cls(order, own, own.minimum(sinks + view.kept.counts), extends, int(beyond), int(fresh))

    def columns(self, places: Tensor) -> Tensor:
        """The columns `[batch, group, run, n]` at these places, which may lie beyond the last one; one run for what all
        runs see."""
        order = self.order[:, None, : places.shape[2]].expand(-1, places.shape[1], places.shape[2], -1)
        return order.gather(-1, places.clamp(0, order.shape[-1] - 1)).clamp(min=0)

    def ends(self, prompt: Tensor) -> Tensor:
        """The columns `[batch, n]` of the last tokens of prompts of so many tokens `[batch]`."""
        return self.columns(ends(prompt)[:, None, None])[:, 0, 0]
