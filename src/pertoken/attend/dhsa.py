"""DHSA: tokens are read by the relevance of their chunk, and where chunks begin is predicted from the keys
(arXiv 2510.24606, version 1).

A prefill goes in runs of `run` queries. Means over heads, of queries and of keys, stand for all of them; k_j is the
mean key at place j of the row, q_b the mean query of run b, in decoding the query itself. With chunks C_c of n_c
places,

    K_c    = sum over j in C_c of k_j / sqrt(n_c)              length-normalised: sqrt(n) * mean, from fp64 prefix sums
    S[b,c] = q_b . K_c                                         `[batch, group, run, chunk]`
    score of a token = score of its chunk

and the `budget` tokens of the best chunks are read, the last of these chunks from its beginning as far as they go, with
the first `sinks` and the last `recent`, and the run itself. Cost per layer: O(token) for the chunks, O(run * chunk) for
scores and choice; nothing of the size run * token is made.

Chunks: `predictor` gives logits for every place (`attend.boundaries`); a chunk starts where they are above `theta`, at
most `most` times per run and farther than `spacing` apart, and after `longest` places at the latest. `starts` gives
them instead. Without either, chunks are blocks of `chunk` tokens: block-sparse attention, the baseline of the paper.
With `share` all layers have the chunks of the first. In decoding the prompt's chunks stay; what was generated is the
next chunk, cut every `longest` places.

Differs from the paper and its code:
- What a run reads does not depend on what follows it, so that chunks of a prefill which are multiples of `run` give
  what the whole gives: boundaries are accepted run by run, and a chunk that the run's beginning cuts is averaged up to
  there (in the code boundaries compete over the whole prompt, and means hold future keys).
- Decoding is sparse, as in the paper's text; in its code it is dense. No key is read twice: the code's overwriting and
  padding of indices counts some keys many times in the first and last blocks.
- The last 64 queries of a prompt, its instruction, are no exception (dense in the code), as a prefill in chunks does
  not know that they are the last. `budget` comes on top of `sinks` and `recent`: 1792 + 256 are the paper's 2048.
- Batches with boundaries of their own in each row; `longest`, without which a text with no boundary is one chunk whose
  tokens all score the same; `groups`, a choice per key head, as means over heads cancel what is special to one.

It loses where one token in an unrelated chunk matters (a needle in a long chunk), where heads need different chunks,
and without a predictor wherever texts do not fall into blocks. A mask of each query and key is followed in what is
read; means of chunks hold keys that it hides. After a prefill by a tree decoder, which holds the last
token of a prompt back, generated chunks begin one place earlier."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.attend.boundaries import Boundaries, accepted, no_longer
from pertoken.attend.history import still, taken
from pertoken.attend.key_view import KeyView
from pertoken.attend.places import Places
from pertoken.attend.selection import KeyPolicy
from pertoken.core.budget import Budget
from pertoken.core.card import Paper, method
from pertoken.core.errors import BadRequest

GATHERED = 2**22  # numbers of generated keys gathered at once


@method(
    question="attend",
    shape="policy",
    exactness="approximate",
    paper=Paper(
        "Long-Context Modeling with Dynamic Hierarchical Sparse Attention for On-Device LLMs",
        "2510.24606",
    ),
    reads={"queries", "keys", "prompt"},
    writes={"keys read"},
    baselines=("full", "random_keys", "sink_window", "tokenselect"),
)
@dataclass(frozen=True)
class DHSA(KeyPolicy):
    """Read the tokens of the best chunks, which begin where the keys say so.

    predictor: a `Boundaries`, or the path of one, or zoo:NAME; starts: `[token]`, `[batch, token]` or `[layer, batch,
    token]` bool in place of it; chunk: tokens of a chunk where there is neither; groups: one choice for all heads, or
    one per key head; scaled: sqrt(n) * mean, else the plain mean.
    """

    budget: Budget = Budget(tokens=1792)
    sinks: int = 128
    recent: int = 128
    run: int = 64
    predictor: Boundaries | str | Path | None = None
    starts: Tensor | None = field(default=None, compare=False, repr=False)
    chunk: int = 32
    longest: int = 64
    theta: float = 1.1
    spacing: int = 8
    most: int = 8
    share: bool = False
    groups: bool = False
    scaled: bool = True
    reads: ClassVar[frozenset[str]] = frozenset({"queries", "keys", "prompt"})
    small: ClassVar[dict[str, Any]] = {**KeyPolicy.small, "chunk": 2}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("chunk", "longest", "most"):
            if getattr(self, name) < 1:
                raise BadRequest(f"{name}={getattr(self, name)} is too small; give 1 or more")
        if self.predictor is not None and self.starts is not None:
            raise BadRequest("DHSA was given both a predictor and starts; give one of them, or neither for blocks")

    @cached_property
    def net(self) -> Boundaries | None:
        """The predictor, loaded where a path was given."""
        found = self.predictor
        return found if found is None or isinstance(found, Boundaries) else Boundaries.load(found)

    @property
    def blocks(self) -> bool:
        """Whether chunks are blocks, which go on in what is generated."""
        return self.predictor is None and self.starts is None

    def weigh(self, view: KeyView, index: Tensor) -> tuple[None, None]:
        return None, None

    def choose(self, view: KeyView, most: int, limits: Tensor) -> Tensor:
        places = Places.of(view, self.sinks)
        score, low, count = self.chunks(view, places)
        score, count = torch.broadcast_tensors(score.masked_fill(count[:, None] == 0, -torch.inf), count[:, None])
        order = score.argsort(dim=-1, descending=True, stable=True)
        count, low = count.gather(-1, order), low[:, None].expand_as(order).gather(-1, order)
        upto = count.cumsum(-1)
        slots = torch.arange(most, device=order.device).expand(*order.shape[:-1], -1).contiguous()
        at = torch.searchsorted(upto, slots, right=True).clamp(max=order.shape[-1] - 1)
        chosen = places.columns(low.gather(-1, at) + slots - (upto - count).gather(-1, at))
        real = view.kept.candidates[:, None].expand(-1, chosen.shape[1], -1, -1)
        return torch.where(real.gather(-1, chosen), chosen, -1)  # a mask that skips keys leaves gaps

    def chunks(self, view: KeyView, places: Places) -> tuple[Tensor, Tensor, Tensor]:
        """Every run's chunks: score `[batch, group, run, chunk]`; first candidate in it and number of candidates
        `[batch, run, chunk]`."""
        asked = view.mean_queries(self.recent)
        asked = asked.unflatten(1, (view.keys.shape[1] if self.groups else 1, -1)).mean(2)
        known, own = view.prompt, places.own
        if self.blocks:
            known = known - known % self.chunk
        table = self.table(view, places, known)
        begin, stop = table["begin"][:, None], table["stop"][:, None]
        found = [(torch.matmul(asked, table["key"].transpose(-1, -2)), begin, stop.expand(-1, own.shape[1], -1))]
        if places.extends:
            last = (torch.searchsorted(table["begin"], own) - 1).clamp(min=0)
            cut, whole = table["begin"].gather(1, last), table["stop"].gather(1, last) <= own
            index = lambda place: place[:, None, :, None].expand(-1, asked.shape[1], -1, asked.shape[-1])  # noqa: E731
            sums = table["sums"].gather(2, index(own)) - table["sums"].gather(2, index(cut))
            mean = self.weighed(sums, (own - cut)[:, None, :, None]).to(asked.dtype)
            found[0] = (found[0][0], begin, torch.where(stop > own[..., None], begin, stop))
            until = torch.where(whole, cut, own)
            found.append(((asked * mean).sum(-1, keepdim=True), cut[..., None], until[..., None]))
        else:
            found += self.generated(view, places, asked, known)
        parts = []
        for score, one, other in found:
            one, other = one.clamp(min=self.sinks), other.minimum(places.end[..., None])
            parts.append((score, one.expand_as(other), (other - one).clamp(min=0)))
        score, low, count = (torch.cat(part, -1) for part in zip(*parts, strict=True))
        return score, low, count

    def weighed(self, sums: Tensor, count: Tensor) -> Tensor:
        """What stands for a chunk, of the sum of its keys and their number."""
        count = count.clamp(min=1)
        return sums / (count.sqrt() if self.scaled else count)

    def generated(
        self, view: KeyView, places: Places, asked: Tensor, known: Tensor
    ) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Score, begin and end of the chunks behind the first `known` `[batch]` places; see `chunks`."""
        size, heads = self.chunk if self.blocks else self.longest, view.keys.shape[1]
        spread = places.generated + (self.chunk if self.blocks else 0)
        total = -(-spread // size)
        runs, own, dim = asked.shape[2], places.own, view.keys.shape[-1]
        each = max(GATHERED // (len(own) * heads * runs * size * dim), 1)
        found = []
        for at in range(0, total, each):
            number = torch.arange(at, min(at + each, total), device=own.device)
            begin = (known[:, None] + number * size)[:, None].expand(-1, runs, -1)
            stop = torch.minimum(begin + size, own[..., None]).maximum(begin)
            place = (begin[..., None] + torch.arange(size, device=own.device)).flatten(2)
            columns = places.columns(place[:, None])[:, 0].flatten(1)
            keys = view.keys.gather(2, columns[:, None, :, None].expand(-1, heads, -1, dim)).float()
            keys = keys if self.groups else keys.mean(1, keepdim=True)
            keys = keys.unflatten(2, (runs, -1)) * (place < own[..., None])[:, None, :, :, None]
            mean = self.weighed(keys.unflatten(3, (-1, size)).sum(4), (stop - begin)[:, None, ..., None])
            found.append(((asked[:, :, :, None] * mean).sum(-1), begin, stop))
        return found

    def table(self, view: KeyView, places: Places, known: Tensor) -> dict[str, Tensor]:
        """Chunks of the prompt: begin and stop `[batch, chunk]`, key `[batch, group, chunk, dim]`; in a forward that
        extends it sums `[batch, group, place + 1, dim]` too. Those of the first `known` places `[batch]` are kept."""
        state = view.state
        if not places.extends and self.knows(view, places, view.prompt):
            return state["table"]
        length = places.order.shape[-1]
        begin = self.begins(view, places, length)
        stop = F.pad(begin[:, 1:], (0, 1), value=length).minimum(view.prompt[:, None]).maximum(begin)
        columns = places.order[:, :1].clamp(min=0)[..., None]
        if self.groups:
            keys = view.keys.gather(2, columns.expand(-1, view.keys.shape[1], -1, view.keys.shape[-1]))
        else:
            keys = view.keys.float().mean(1, keepdim=True).gather(2, columns.expand(-1, -1, -1, view.keys.shape[-1]))
        sums = F.pad(keys.double().cumsum(2), (0, 0, 1, 0))
        index = lambda place: place.clamp(max=length)[:, None, :, None].expand(-1, sums.shape[1], -1, sums.shape[-1])  # noqa: E731
        total = sums.gather(2, index(stop)) - sums.gather(2, index(begin))
        key = self.weighed(total, (stop - begin)[:, None, :, None]).float()
        kept = stop.minimum(known[:, None]).maximum(begin)
        state["prompt"], state["table"] = view.prompt, {"begin": begin, "stop": kept, "key": key}
        state["last"] = taken(view.keys, places.ends(view.prompt))
        return {"begin": begin, "stop": stop, "key": key, "sums": sums} if places.extends else state["table"]

    @staticmethod
    def knows(view: KeyView, places: Places, prompt: Tensor) -> bool:
        """Whether what is kept of this layer is of this prompt, and the rows still hold its keys."""
        state = view.state
        if state.get("prompt") is not prompt:
            return False
        return bool((still(view.keys, places.ends(prompt), state["last"]) | (prompt == 0)).all())

    def begins(self, view: KeyView, places: Places, length: int) -> Tensor:
        """`[batch, chunk]` where the prompt's chunks begin, ascending; `length` behind the last one."""
        shared = view.kept.worked_out
        name = "begins" if self.share or self.predictor is None else f"begins {view.layer}"
        if self.starts is not None and self.starts.ndim == 3:
            name = f"begins {view.layer}"
        if name not in shared:
            place = torch.arange(length, device=view.keys.device)
            if self.blocks:
                shared[name] = place[:: self.chunk].expand(len(view.prompt), -1).contiguous()
            else:
                starts = self.predicted(view, places, length) if self.starts is None else self.given(view, length)
                starts = no_longer(starts, self.longest) & (place < view.prompt[:, None])
                most = length if self.starts is not None else -(-length // self.run) * self.most
                most = min(most + -(-length // self.longest), length)
                number = torch.where(starts, starts.cumsum(-1) - 1, most)
                begin = torch.full((len(starts), most + 1), length, device=place.device)
                shared[name] = begin.scatter_(1, number, place.expand_as(number))[:, :most].contiguous()
        return shared[name]

    def given(self, view: KeyView, length: int) -> Tensor:
        """The given starts of this layer, `[batch, length]`; none behind their end."""
        assert self.starts is not None
        starts = self.starts.to(view.keys.device)
        starts = starts[view.layer] if starts.ndim == 3 else starts
        starts = starts.expand(len(view.prompt), -1)[:, :length]
        return F.pad(starts, (0, length - starts.shape[1]))

    def predicted(self, view: KeyView, places: Places, length: int) -> Tensor:
        """`[batch, length]` bool: the accepted places of the prompt. Kept from forward to forward: only the runs that
        new tokens can have changed are looked at again."""
        net, state = self.net, view.state
        assert net is not None
        width = view.keys.shape[1] * view.keys.shape[3]
        if net.width != width:
            raise BadRequest(
                f"the predictor reads keys of width {net.width}, this model's are {width} wide (key heads * head size)"
                "; train one for this model with pertoken.attend.boundary_training.train_boundaries"
            )
        net.to(view.keys.device)
        old = state.get("starts")
        if old is None or not self.knows(view, places, view.prompt_before):
            old, before, new = view.valid.new_zeros(len(view.prompt), 0), torch.zeros_like(view.prompt), length
        else:
            before, new = view.prompt_before, min(places.fresh, length)
        first = (before - net.window).clamp(min=0) // self.run * self.run
        count = -(-(new + net.window + self.run) // self.run) * self.run
        place = first[:, None] + torch.arange(-net.window, count + net.window - 1, device=first.device)
        columns = places.columns(place[:, None, None].clamp(min=0))[:, 0, 0]
        keys = view.keys.gather(2, columns[:, None, :, None].expand(-1, view.keys.shape[1], -1, view.keys.shape[3]))
        with torch.no_grad():
            logits = net.places(keys.transpose(1, 2).flatten(2), first, view.prompt)
        found = accepted(logits, self.theta, self.spacing, self.most, self.run)
        wide = F.pad(old, (0, max(length + count - old.shape[1], 0)))
        place = first[:, None] + torch.arange(count, device=first.device)
        starts = wide.scatter(1, place.clamp(max=wide.shape[1] - 1), found)[:, :length]
        state["starts"] = starts
        return starts
