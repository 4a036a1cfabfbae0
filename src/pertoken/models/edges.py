"""Edges of a grid (see `grid`) that some tokens take and others do not: transformer stages and patch embeddings made of
transformers' PVTv2 modules, and the gates that say who takes them.

Each runs in three ways, with the same result: for all tokens, as PVTv2 does; for those that take it, gathered, computed
and put back; or for all, multiplied by what the gates say, through which gates learn. A patch embedding that reaches
most places of the next row is computed at all of them: to gather their receptive fields would take longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PvtV2Config
from transformers.models.pvt_v2.modeling_pvt_v2 import PvtV2BlockLayer, PvtV2OverlapPatchEmbeddings

from pertoken.core.packing import buckets

AT_ONCE = 2**18  # numbers of a map that are convolved at once
MOST = 0.75  # share of a row's places above which a patch embedding is cheaper for all than for those reached
OPEN = 3.0  # log-odds of an untrained gate, which lets 95 % of the tokens through


@dataclass(frozen=True)
class Map:
    """The tokens of one row. hidden `[image, token, width]`, 0 where there is none; live `[image, token]` bool: which
    are there; size: height and width of the map; whole: whether all are there."""

    hidden: Tensor
    live: Tensor
    size: tuple[int, int]
    whole: bool

    def plus(self, other: Map) -> Map:
        """With what arrives from another row."""
        return Map(self.hidden + other.hidden, self.live | other.live, self.size, self.whole or other.whole)


@dataclass(frozen=True)
class Ways:
    """Which tokens of a node take its edges: `[image, token]` bool, or 0 and 1 as floats with the gates' gradient, in
    which case everything is computed and multiplied by them."""

    transform: Tensor
    down: Tensor


class Gate(nn.Module):
    """Two logits of each token, to take an edge and not to: linear in its normed features. While training the weights
    used are a moving average of the trained ones, through which the gradient passes straight."""

    def __init__(self, width: int, ema: float | None):
        super().__init__()
        self.ema = ema
        self.weight = nn.Parameter(torch.zeros(2, width))
        self.bias = nn.Parameter(torch.tensor([OPEN / 2, -OPEN / 2]))
        if ema is not None:
            self.register_buffer("mean_weight", self.weight.detach().clone())
            self.register_buffer("mean_bias", self.bias.detach().clone())

    def forward(self, normed: Tensor) -> Tensor:
        """`[image, token, width]`, normed -> `[image, token, 2]`."""
        weight, bias = self.weight, self.bias
        if self.ema is not None:
            weight, bias = (
                self._averaged(own, mean) for own, mean in ((weight, self.mean_weight), (bias, self.mean_bias))
            )
        return F.linear(normed, weight, bias)

    def _averaged(self, own: Tensor, mean: Any) -> Tensor:
        if not self.training:
            return mean
        assert self.ema is not None
        with torch.no_grad():
            mean.mul_(self.ema).add_(own, alpha=1 - self.ema)
        return mean.clone() + own - own.detach()


class Down(nn.Module):
    """A patch embedding from a row to the next, after the norm with which PVTv2 ends a stage."""

    def __init__(self, base: PvtV2Config, row: int):
        super().__init__()
        self.norm = nn.LayerNorm(base.hidden_sizes[row], eps=base.layer_norm_eps)
        self.embed = PvtV2OverlapPatchEmbeddings(base, row + 1)

    def forward(self, here: Map, taken: Tensor | None) -> tuple[Map | None, Tensor]:
        """What arrives, None for nothing; and how many tokens of the next row get something, `[image]`, with the gates'
        gradient if there is one."""
        conv: Any = self.embed.proj
        if taken is None or (taken.dtype == torch.bool and here.whole and bool(taken.all())):
            hidden, high, wide = self.embed(as_map(self.norm(here.hidden), here.size))
            live = hidden.new_ones(hidden.shape[:2], dtype=torch.bool)
            return Map(hidden, live, (high, wide), True), live.sum(-1).float()
        gate = as_map(taken[..., None].to(here.hidden.dtype), here.size)
        reached = F.max_pool2d(gate, conv.kernel_size, conv.stride, conv.padding).flatten(1)
        live, spent = reached.detach() > 0.5, reached.float().sum(-1)
        if taken.dtype == torch.bool and live.float().mean() < MOST:
            return self._ragged(here, taken, live), spent
        hidden, high, wide = self.embed(as_map(self.norm(here.hidden) * taken[..., None], here.size))
        return Map(hidden * live[..., None], live, (high, wide), bool(live.all())), spent

    def _ragged(self, here: Map, taken: Tensor, reached: Tensor) -> Map | None:
        conv: Any = self.embed.proj
        images, count = taken.shape
        window, size = windows(*here.size, conv.kernel_size[0], conv.stride[0], conv.padding[0])
        window = window.to(taken.device)
        normed = self.norm(here.hidden[taken])
        if not len(normed):
            return None
        slot = torch.full((images, count + 1), len(normed), device=taken.device)
        slot[:, :count][taken] = torch.arange(len(normed), device=taken.device)
        outputs, weight = reached.nonzero(), conv.weight.permute(0, 2, 3, 1).flatten(1)
        read, normed, made = slot[outputs[:, :1], window[outputs[:, 1]]], F.pad(normed, (0, 0, 0, 1)), []
        for some in read.split(max(AT_ONCE // weight.shape[1], 1)):
            patches = normed.index_select(0, some.flatten()).view(len(some), -1)
            made.append(F.linear(patches, weight, conv.bias))
        hidden = self.embed.layer_norm(torch.cat(made))
        where = outputs[:, 0] * reached.shape[1] + outputs[:, 1]
        hidden = hidden.new_zeros(reached.numel(), hidden.shape[-1]).index_copy(0, where, hidden)
        return Map(hidden.unflatten(0, reached.shape), reached, size, False)


@lru_cache(maxsize=32)
def windows(height: int, width: int, kernel: int, stride: int, padding: int) -> tuple[Tensor, tuple[int, int]]:
    """Places `[output, kernel * kernel]` that a convolution reads on a map, height * width for what is outside; and the
    size of its output."""
    number = torch.arange(1, height * width + 1, dtype=torch.float64).view(1, 1, height, width)
    read = F.unfold(number, kernel, padding=padding, stride=stride)[0].T.long()
    size = tuple((length + 2 * padding - kernel) // stride + 1 for length in (height, width))
    return torch.where(read > 0, read - 1, height * width), (size[0], size[1])


def as_map(hidden: Tensor, size: tuple[int, int]) -> Tensor:
    """`[image, token, width]` as `[image, width, height, width]`, as convolutions take it, without a copy."""
    return hidden.transpose(1, 2).unflatten(-1, size)


def seen(attention: Any, normed: Tensor, here: Map) -> tuple[Tensor, Tensor, Tensor | None]:
    """Keys and values `[image, heads, key, dim]` of all tokens that are there, and which keys are real, `[image, 1, 1,
    key]` bool or None: those that stand for at least one of them."""
    live = None if here.whole else here.live
    read, real = (normed if live is None else normed * live[..., None]), live
    alive = None if live is None else as_map(live[..., None].to(normed.dtype), here.size)
    if attention.linear_attention:
        pooled = attention.pool(as_map(read, here.size))
        if alive is not None:
            share = attention.pool(alive)
            pooled, real = pooled / share.clamp(min=torch.finfo(share.dtype).tiny), share.flatten(1) > 0
        read = attention.act(attention.layer_norm(attention.spatial_reduction(pooled).flatten(2).transpose(1, 2)))
    elif attention.spatial_reduction_ratio > 1:
        read = attention.layer_norm(attention.spatial_reduction(as_map(read, here.size)).flatten(2).transpose(1, 2))
        if alive is not None:
            real = F.max_pool2d(alive, attention.spatial_reduction_ratio).flatten(1) > 0
    keys, values = (attention.transpose_for_scores(project(read)) for project in (attention.key, attention.value))
    if real is not None:
        real = (real | ~real.any(-1, keepdim=True))[:, None, None]
    return keys, values, real


def attended(attention: Any, queries: Tensor, keys: Tensor, values: Tensor, real: Any) -> Tensor:
    """`[image, query, width]` of queries `[image, query, width]`."""
    dropout = attention.attn_drop.p if attention.training else 0.0
    out = F.scaled_dot_product_attention(attention.transpose_for_scores(queries), keys, values, real, dropout)
    return out.transpose(1, 2).flatten(2)


def widened(block: Any, hidden: Tensor) -> Tensor:
    """What the feed-forward block's depth-wise convolution reads of tokens."""
    return block.mlp.relu(block.mlp.dense1(block.layer_norm_2(hidden)))


def narrowed(block: Any, inner: Tensor) -> Tensor:
    """What the feed-forward block adds to tokens, of what its convolution made."""
    mlp = block.mlp
    return block.drop_path(mlp.dropout(mlp.dense2(mlp.dropout(mlp.intermediate_act_fn(inner)))))


@dataclass(frozen=True)
class Part:
    """Rows of one image's map, or the maps of some images, to be convolved at once, with a row above and one below.
    read: tokens that are there, of all in order; places: theirs on these maps; outputs: places of those that are not
    above or below, on maps without these rows; shape: how many maps, their height and width with them."""

    read: slice
    places: Tensor
    outputs: Tensor
    shape: tuple[int, int, int]

    def convolved(self, conv: nn.Conv2d, tokens: Tensor) -> Tensor:
        """`[token, width]`: what a convolution of 3 x 3 makes of tokens among zeros, for those of `outputs`."""
        spread = tokens.new_zeros(math.prod(self.shape), tokens.shape[-1])
        spread = spread.index_copy(0, self.places, tokens[self.read]).unflatten(0, self.shape)
        made = F.conv2d(spread.permute(0, 3, 1, 2), conv.weight, conv.bias, padding=(0, 1), groups=conv.groups)
        return made.permute(0, 2, 3, 1).flatten(0, 2).index_select(0, self.outputs)


def parts(taken: Tensor, size: tuple[int, int], width: int) -> list[Part]:
    """The parts in which there are tokens, each small enough for a core's cache; in the tokens' order. taken `[image,
    token]` bool; width: numbers of a token."""
    (high, wide), found = size, []
    rows = max(AT_ONCE // (wide * width), 1)
    if rows < high:
        bounds = [(i, i + 1, top, min(top + rows, high)) for i in range(len(taken)) for top in range(0, high, rows)]
    else:
        bounds = [(i, min(i + rows // high, len(taken)), 0, high) for i in range(0, len(taken), rows // high)]
    where = taken.flatten().nonzero()[:, 0]
    before = [0, *taken.view(-1, wide).sum(-1).cumsum(0).tolist()]
    for first, end, top, bottom in bounds:
        own = slice(before[first * high + top], before[(end - 1) * high + bottom])
        if own.start == own.stop:
            continue
        read = slice(before[first * high + max(top - 1, 0)], before[(end - 1) * high + min(bottom + 1, high)])
        over = bottom - top - high  # rows of an image here, less those of its map
        places = where[read] + ((where[read] // (high * wide) - first) * (over + 2) + 1 - top - first * high) * wide
        outputs = where[own] + ((where[own] // (high * wide) - first) * over - top - first * high) * wide
        found.append(Part(read, places, outputs, (end - first, bottom - top + 2, wide)))
    return found


class Stage(nn.Module):
    """The blocks between two nodes of a row."""

    def __init__(self, base: PvtV2Config, row: int):
        super().__init__()
        rates = torch.linspace(0, base.drop_path_rate, sum(base.depths)).tolist()
        first = sum(base.depths[:row])
        self.blocks: Any = nn.ModuleList(
            [PvtV2BlockLayer(base, row, rates[first + depth]) for depth in range(base.depths[row])]
        )

    def forward(self, here: Map, taken: Tensor | None) -> Map:
        if taken is None or (taken.dtype == torch.bool and here.whole and bool(taken.all())):
            hidden = here.hidden
            for block in self.blocks:
                hidden = block(hidden, *here.size)[0]
        elif taken.dtype == torch.bool:
            hidden = self._ragged(here, taken)
        else:
            hidden = self._masked(here, taken)
        return replace(here, hidden=hidden)

    def _masked(self, here: Map, taken: Tensor) -> Tensor:
        gate, hidden = taken[..., None], here.hidden
        for block in self.blocks:
            attention = block.attention
            normed = block.layer_norm_1(hidden)
            out = attended(attention, attention.query(normed), *seen(attention, normed, here))
            hidden = hidden + gate * block.drop_path(attention.proj_drop(attention.proj(out)))
            inner = block.mlp.dwconv(widened(block, hidden) * gate, *here.size)
            hidden = hidden + gate * narrowed(block, inner)
        return hidden

    def _ragged(self, here: Map, taken: Tensor) -> Tensor:
        """The tokens that take the stage, one after the other; images with none are left out."""
        rows = taken.any(-1).nonzero()[:, 0]
        if not len(rows):
            return here.hidden
        some = here
        if len(rows) < len(taken):
            some, taken = Map(here.hidden[rows], here.live[rows], here.size, here.whole), taken[rows]
        where = taken.flatten().nonzero()[:, 0]
        groups = buckets(taken.sum(-1).tolist(), taken.device)
        maps = parts(taken, here.size, self.blocks[0].mlp.dense1.out_features)
        every = some.hidden.flatten(0, 1)
        mine, shape = every.index_select(0, where), some.hidden.shape
        for block in self.blocks:
            attention = block.attention
            normed = block.layer_norm_1(every).view(shape)
            keys, values, real = seen(attention, normed, some)
            queries, outs, places = attention.query(normed.flatten(0, 1).index_select(0, where)), [], []
            for bucket in groups:
                mask = None if real is None else real[bucket.rows]
                out = attended(attention, queries[bucket.index], keys[bucket.rows], values[bucket.rows], mask)
                for found, one in zip((outs, places), bucket.gathered(out), strict=True):
                    found.append(one)
            order = torch.cat(places).argsort()
            mine = mine + block.drop_path(attention.proj_drop(attention.proj(torch.cat(outs)[order])))
            inner, conv = widened(block, mine), block.mlp.dwconv.dwconv
            mine = mine + torch.cat([narrowed(block, part.convolved(conv, inner)) for part in maps])
            every = every.index_copy(0, where, mine)
        hidden = every.view(shape)
        return hidden if some is here else here.hidden.index_copy(0, rows, hidden)
