"""The tokens of a batch of images between two layers: how many each image has left, what each stands for, and where the
original ones went.

Images keep different numbers of tokens. Where the numbers are equal, hidden states are `[image, token, width]` as ever;
where they differ, all tokens stand one after the other, `[1, total, width]`, so that layers are computed for tokens
that are there and for nothing else. Both are the same flat sequence, by which everything here is indexed. Attention
runs in buckets of images of like length.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from pertoken.core.decision import Assign
from pertoken.core.errors import BadRequest
from pertoken.core.packing import Bucket, buckets


@dataclass(frozen=True)
class Tokens:
    """counts: tokens of each image now; place `[image, original token]`: its token now, -1 where it left; prefix:
    tokens that are no patches and come first; sizes `[total]` float32: original tokens in each token, None where all
    are 1.

    left: for tokens that left and keep their last state, flat original places and their hidden states.
    """

    counts: tuple[int, ...]
    place: Tensor
    prefix: int
    sizes: Tensor | None = None
    left: tuple[tuple[Tensor, Tensor], ...] = field(default=(), repr=False)

    @classmethod
    def of(cls, hidden: Tensor, prefix: int) -> Tokens:
        """Of hidden states `[image, token, width]` before the first layer."""
        images, count = hidden.shape[:2]
        place = torch.arange(count, device=hidden.device).expand(images, -1)
        return cls((count,) * images, place, prefix)

    @property
    def total(self) -> int:
        return sum(self.counts)

    @property
    def longest(self) -> int:
        return max(self.counts)

    @property
    def uniform(self) -> bool:
        """Whether every image has as many tokens."""
        return len(set(self.counts)) == 1

    @cached_property
    def starts(self) -> Tensor:
        """`[image]` flat place of the first token of each image."""
        return torch.tensor([0, *itertools.accumulate(self.counts)][:-1], device=self.place.device)

    @cached_property
    def valid(self) -> Tensor:
        """`[image, token]` bool on the padded view: which tokens are there."""
        counts = torch.tensor(self.counts, device=self.place.device)
        return torch.arange(self.longest, device=self.place.device) < counts[:, None]

    @cached_property
    def rows(self) -> Tensor:
        """`[total]` the image of each token."""
        counts = torch.tensor(self.counts, device=self.place.device)
        return torch.arange(len(self.counts), device=self.place.device).repeat_interleave(counts)

    @cached_property
    def index(self) -> Tensor:
        """`[image, token]` flat places on the padded view; the image's first one where there is no token."""
        inside = torch.arange(self.longest, device=self.place.device)
        return self.starts[:, None] + torch.where(self.valid, inside, 0)

    def shaped(self, flat: Tensor) -> Tensor:
        """`[total, ...]` as layers take it."""
        return flat.unflatten(0, (len(self.counts), -1)) if self.uniform else flat[None]

    def padded(self, flat: Tensor) -> Tensor:
        """`[total, ...]` as `[image, token, ...]`; what stands where `valid` is False means nothing."""
        return flat.unflatten(0, (len(self.counts), -1)) if self.uniform else flat[self.index]

    @cached_property
    def padded_sizes(self) -> Tensor:
        """`[image, token]` float32, 0 where there is no token."""
        if self.sizes is None:
            return self.valid.float()
        return self.padded(self.sizes).masked_fill(~self.valid, 0)

    @cached_property
    def buckets(self) -> tuple[Bucket, ...]:
        """Images in groups of like length, each padded to its longest."""
        return buckets(self.counts, self.place.device)

    def masks(self, dtype: torch.dtype) -> list[Tensor | None]:
        """Per bucket, or once where the images are uniform: what is added to scores, `[image, 1, 1, key]` or None."""
        if self.uniform:
            return [None if self.sizes is None else self.shaped(self.sizes).log()[:, None, None].to(dtype)]
        made: list[Tensor | None] = []
        for bucket in self.buckets:
            mask = None
            if self.sizes is not None:
                mask = self.sizes[bucket.index].log()
            if bucket.valid is not None:
                mask = bucket.valid.float().log() if mask is None else mask.masked_fill(~bucket.valid, -torch.inf)
            made.append(None if mask is None else mask[:, None, None].to(dtype))
        return made

    def attended(self, run: Callable[..., Tensor], *qkv: Tensor) -> Tensor:
        """Attention within each image. qkv: queries, keys, values as layers make them, `[1 or image, heads, token,
        dim]`; run: attention of a bucket, `[image, token, heads, dim]`. Returns `[1 or image, token, heads, dim]`."""
        masks = self.masks(qkv[0].dtype)
        if self.uniform:
            return run(*qkv, masks[0])
        flat = [x[0].transpose(0, 1) for x in qkv]
        parts, places = [], []
        for bucket, mask in zip(self.buckets, masks, strict=True):
            part, place = bucket.gathered(run(*(x[bucket.index].transpose(1, 2) for x in flat), mask))
            parts.append(part)
            places.append(place)
        return torch.cat(parts)[torch.cat(places).argsort()][None]

    def reduced(self, hidden: Tensor, decision: Assign, keep_left: bool) -> tuple[Tensor, Tokens]:
        """Hidden states and tokens after `decision`, whose groups are the next tokens of each image in order.

        A group is the mean of its members, weighted by size. keep_left: tokens that leave keep their state for `grid`.
        """
        flat = hidden.reshape(self.total, -1)
        group = self._checked(decision)
        counts = tuple((decision.group.masked_fill(~self.valid, -1).amax(-1) + 1).tolist())
        starts = torch.tensor([0, *itertools.accumulate(counts)][:-1], device=flat.device)
        total, own = sum(counts), torch.arange(self.total, device=flat.device)
        stays = group >= 0
        slot, member = (starts[self.rows] + group)[stays], own[stays]
        head = torch.full((total,), self.total, device=flat.device).scatter_reduce_(0, slot, member, "amin")
        if bool((head == self.total).any()):
            raise BadRequest("a group of a decision has no member; number the groups of each image from 0 without gaps")
        sizes, states, merges = self.sizes, flat[head], len(member) > total
        if merges:
            each = flat.new_ones(self.total, dtype=torch.float32) if sizes is None else sizes
            sizes = each.new_zeros(total).index_add_(0, slot, each[stays])
            share = each[stays] / sizes[slot]
            extra = head[slot] != member
            wide = torch.promote_types(flat.dtype, torch.float32)
            mean = states.to(wide) * (each[head] / sizes)[:, None].to(wide)
            mean = mean.index_add(0, slot[extra], flat[member[extra]].to(wide) * share[extra][:, None].to(wide))
            states = mean.to(flat.dtype)
        elif sizes is not None:
            sizes = sizes[head]
        moved = torch.where(self.place >= 0, decision.group.gather(1, self.place.clamp(min=0)), -1)
        left = self.left
        if keep_left and not bool(stays.all()):
            gone = ((self.place >= 0) & (moved < 0)).flatten().nonzero()[:, 0]
            now = (self.starts[:, None] + self.place).flatten()[gone]
            left = (*left, (gone, flat[now]))
        after = Tokens(counts, moved, self.prefix, sizes, left)
        return after.shaped(states), after

    def _checked(self, decision: Assign) -> Tensor:
        """`[total]` groups of a decision that fits these tokens."""
        if decision.group.shape != self.valid.shape or not torch.equal(decision.valid, self.valid):
            raise BadRequest(
                f"the decision is about tokens {list(decision.group.shape)} and there are {list(self.valid.shape)} "
                "here; replay with the model and the images that were recorded"
            )
        first = torch.arange(self.prefix, device=self.place.device)
        if self.prefix and not bool((decision.group[:, : self.prefix] == first).all()):
            raise BadRequest(f"a decision must leave the first {self.prefix} token(s), which are no patches, in place")
        return decision.group.reshape(-1) if self.uniform else decision.group[self.valid]

    def grid(self, hidden: Tensor) -> Tensor:
        """`[image, original token, width]`: every original token with the state of the one it went into, or that with
        which it left."""
        flat = hidden.reshape(self.total, -1)
        images, count = self.place.shape
        source = (self.starts[:, None] + self.place).flatten()
        pool, used = [flat], self.total
        for gone, states in self.left:
            source = source.index_put((gone,), torch.arange(used, used + len(gone), device=flat.device))
            pool.append(states)
            used += len(gone)
        return (torch.cat(pool) if self.left else flat)[source].view(images, count, -1)

    def kept(self, hidden: Tensor) -> Tensor:
        """`[image, token, width]` the tokens that are left; images with fewer are filled up with the mean of their
        patches, which changes no mean over patches."""
        if self.uniform:
            return hidden
        flat = hidden.reshape(self.total, -1)
        padded = self.padded(flat)
        patches = self.valid.clone()
        patches[:, : self.prefix] = False
        weight = patches[..., None].to(flat.dtype)
        mean = (padded * weight).sum(1, keepdim=True) / weight.sum(1, keepdim=True).clamp(min=1)
        return torch.where(self.valid[..., None], padded, mean)
