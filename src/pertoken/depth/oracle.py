"""The best routes in hindsight: every route through big and small modules is tried, each token keeps its best one.

What no router knows: r*(t) = argmin_r CE(x_{t+1} | route r), over all routes or those of k big blocks (arXiv
2410.10846). The paper does not say which routes the tokens before t took, so both readings are here:

- `uniform`: all tokens of a text on one route, for each of the routes. Cheap, because routes share their first layers;
  but the best of one token and of another come from texts on different routes, so that no policy can reach it.
- `consistent`: from left to right, each token tries all routes on the keys of the routes that were chosen before it. A
  router that knew the next token would get just this.

A minimum over routes is taken over noisy numbers and falls with their number, whether or not any of them is better.
`Search` therefore says two things beside it: what as many routes drawn at random give (`least_of`), and, with labels
drawn from the all-big model's own distribution (`resampled`), what the search finds where there is nothing to be found:
no route predicts those better than all-big in the mean (Gibbs), so that all of its gain there is selection.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from pertoken.core.attach import attach
from pertoken.core.errors import BadRequest
from pertoken.core.policy import View
from pertoken.depth.duo import BIG, SKIP, SMALL, Duo
from pertoken.depth.modules import GivenModules
from pertoken.models.adapter import Adapter, adapter_for
from pertoken.models.cache import TreeCache
from pertoken.models.stack import ModuleStack

TOKENS = 8192  # of all routes together in one forward
NODES = 128  # routes of a row in one forward of `consistent`: each looks over all of them
MOST = 2**14  # routes that `all_routes` gives


@dataclass(frozen=True)
class Search:
    """Losses of routes. routes `[route, layer]`; losses `[route, label, row, place]` in nats, label 0 is the true one;
    valid `[row, place]`: which places have a next token."""

    routes: Tensor
    losses: Tensor
    valid: Tensor

    @property
    def big(self) -> Tensor:
        """`[route]` big blocks."""
        return (self.routes == BIG).sum(-1)

    def of(self, chosen: Tensor) -> Search:
        """Some of the routes, by a `[route]` bool or index."""
        return replace(self, routes=self.routes[chosen], losses=self.losses[chosen])

    def with_big(self, count: int) -> Search:
        """The routes of so many big blocks."""
        return self.of(self.big == count)

    def mean(self, losses: Tensor) -> Tensor:
        """`[..., row, place]` -> `[...]`, over places that have a next token."""
        return losses[..., self.valid].double().mean(-1)

    def best(self, label: int = 0) -> Tensor:
        """`[row, place]` index of each token's route of least loss."""
        return self.losses[:, label].argmin(0)

    def oracle(self, label: int = 0) -> Tensor:
        """`[row, place]` loss of each token's best route."""
        return self.losses[:, label].amin(0)

    def best_fixed(self) -> int:
        """Index of the route that is best for all tokens together."""
        return int(self.mean(self.losses[:, 0]).argmin())

    def least_of(self, drawn: int, label: int = 0) -> Tensor:
        """`[row, place]` mean of the least loss over all ways to draw so many of the routes."""
        total = len(self.routes)
        if not 1 <= drawn <= total:
            raise BadRequest(f"{drawn} of {total} routes cannot be drawn; give 1 to {total}")
        ways = [math.comb(total - 1 - rank, drawn - 1) / math.comb(total, drawn) for rank in range(total)]
        ordered = self.losses[:, label].sort(0).values.double()
        return torch.einsum("r,rnp->np", torch.tensor(ways, dtype=torch.double, device=ordered.device), ordered)


def all_routes(layers: int, options: int = 2) -> Tensor:
    """`[route, layer]` every choice of big and small, with 3 options none too; raises `BadRequest` for too many."""
    if options**layers > MOST:
        raise BadRequest(
            f"{options} options in {layers} layers are {options**layers} routes, of which at most {MOST} are tried; "
            "draw some with `drawn_routes`"
        )
    return torch.tensor(list(itertools.product((BIG, SMALL, SKIP)[:options], repeat=layers)))


def drawn_routes(layers: int, big: int, count: int, seed: int = 0) -> Tensor:
    """`[route, layer]` at most `count` different random routes of `big` big blocks and small ones."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.rand(4 * count, layers, generator=generator).argsort(-1).argsort(-1)
    seen = dict.fromkeys(map(tuple, torch.where(order < big, BIG, SMALL).tolist()))
    return torch.tensor(list(seen)[:count])


def read(model: Any, duo: Duo, ids: Tensor, mask: Tensor, route: Tensor) -> Tensor:
    """Logits `[row, token, vocabulary]` with the route `[row or 1, token or 1, layer]`; ids and mask `[row, token]`."""
    with torch.no_grad(), attach(model, GivenModules(modules=duo, route=route)):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        return model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits


def resampled(model: Any, duo: Duo, ids: Tensor, mask: Tensor, seed: int = 0) -> Tensor:
    """Labels `[row, place]` drawn from the distribution that all big blocks give."""
    whole = torch.full((1, 1, adapter_for(model).depth), BIG)
    chances = read(model, duo, ids, mask, whole)[:, :-1].float().softmax(-1)
    generator = torch.Generator(chances.device).manual_seed(seed)
    drawn = chances.flatten(0, 1).multinomial(1, generator=generator)
    return drawn.view(chances.shape[:2])


def losses_of(adapter: Adapter, states: Tensor, labels: Tensor) -> Tensor:
    """Nats `[route, label, row, place]` of un-normed states `[route, row, place, width]`; labels `[label, row,
    place]`."""
    chances = adapter.head(adapter.norm(states)).float().log_softmax(-1)
    index = labels.permute(1, 2, 0).expand(len(states), -1, -1, -1)
    return -chances.gather(-1, index).permute(0, 3, 1, 2)


@torch.no_grad()
def uniform(
    model: Any, duo: Duo, ids: Tensor, mask: Tensor, routes: Tensor | None = None, drawn: Tensor | None = None
) -> Search:
    """Losses of each route with all tokens on it; ids and mask `[row, token]`.

    routes: all of the router's options unless given, different from each other; drawn `[row, place]`: other labels to
    measure too (see `resampled`).
    """
    adapter = adapter_for(model)
    every = all_routes(adapter.depth, len(duo.options)) if routes is None else routes
    tried = every.unique(dim=0)  # in order: routes with the same first layers are neighbours
    labels = ids[None, :, 1:] if drawn is None else torch.stack([ids[:, 1:], drawn])
    ids, seen, valid = ids[:, :-1], mask[:, :-1].bool(), (mask[:, :-1] * mask[:, 1:]).bool()
    rows, tokens = ids.shape
    positions = (seen.long().cumsum(-1) - 1).clamp(min=0)
    found = torch.empty(len(tried), len(labels), rows, tokens)
    room, taken = max(TOKENS // ids.numel(), 1), [BIG]

    def pick(layer: int) -> Callable[..., Tensor]:
        def block(forward: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
            if taken[0] == BIG:
                return forward(x)
            return duo.small[layer](x) if taken[0] == SMALL else torch.zeros_like(x)

        return block

    def run(layer: int, states: Tensor) -> Tensor:
        times = len(states)
        own = [part.repeat(times, 1, 1) for part in rotary] if rotary is not None else None
        given = positions.repeat(times, 1), own and tuple(own)
        out = adapter.run_layer(layer, states.flatten(0, 1), masks[layer].repeat(times, 1, 1, 1), *given, None)
        return out.view_as(states)

    def walk(layer: int, states: Tensor, spans: list[tuple[int, int]]) -> None:
        """On from the states `[node, row, token, width]` before a layer; spans: the routes that share each node."""
        for start in range(0, len(spans), room):
            here, own = states[start : start + room], spans[start : start + room]
            if layer == adapter.depth:
                found[[first for first, _ in own]] = losses_of(adapter, here, labels).to(found)
                continue
            below, after = [], []
            for option in tried[:, layer].unique().tolist():
                parts = [split(tried[first:last, layer], option, first) for first, last in own]
                kept = [node for node, part in enumerate(parts) if part is not None]
                if kept:
                    taken[0] = option
                    below.append(run(layer, here[kept]))
                    after += [part for part in parts if part is not None]
            walk(layer + 1, torch.cat(below), after)

    whole = torch.full((1, 1, adapter.depth), BIG)
    with attach(model, GivenModules(modules=duo, route=whole)) as attachment:
        for layer in range(adapter.depth):
            attachment.wrap(adapter.feed_forward(layer), pick(layer))
        hidden = adapter.embed(ids, positions)
        rotary = adapter.rotary(hidden, positions)
        masks = [causal(seen, positions, adapter.window(layer), hidden.dtype) for layer in range(adapter.depth)]
        walk(0, hidden[None], [(0, len(tried))])
    return Search(tried, found, valid.cpu())


def split(column: Tensor, option: int, first: int) -> tuple[int, int] | None:
    """The routes, numbered from `first`, whose entry in a sorted column is the option; None if there are none."""
    places = (column == option).nonzero().flatten()
    return (first + int(places[0]), first + int(places[-1]) + 1) if len(places) else None


def causal(seen: Tensor, positions: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
    """Additive mask `[row, 1, query, key]` of a text."""
    distance = positions[:, :, None] - positions[:, None]
    order = torch.ones(distance.shape[1:], dtype=torch.bool, device=seen.device).tril()
    allowed = seen[:, None] & order & (distance < (window or distance.shape[1] + 1))
    return torch.zeros(allowed.shape, dtype=dtype, device=seen.device).masked_fill_(~allowed, torch.finfo(dtype).min)[
        :, None
    ]


@torch.no_grad()
def consistent(model: Any, duo: Duo, ids: Tensor, mask: Tensor, routes: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Each token's best route `[row, place, layer]` and its loss `[row, place]`, on the keys of those before it; ids
    and mask `[row, token]`, left-padded; routes: all of the router's options unless given."""
    adapter = adapter_for(model)
    routes = all_routes(adapter.depth, len(duo.options)) if routes is None else routes
    rows, places = ids.shape[0], ids.shape[1] - 1
    stack, cache = ModuleStack(adapter), TreeCache(adapter, rows, places + NODES)
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    chosen, least = torch.zeros(rows, places, adapter.depth, dtype=torch.long), torch.zeros(rows, places)
    room, given = max(min(TOKENS // rows, NODES), 1), [routes[None]]

    def step(place: int, route: Tensor) -> Tensor:
        """Losses `[row, node]` of the token at a place on each of the routes `[row or 1, node, layer]`."""
        given[0], nodes = route, route.shape[1]
        spread = [x[:, place, None].expand(-1, nodes) for x in (ids, positions, mask.bool())]
        own = torch.eye(nodes, dtype=torch.bool, device=ids.device).expand(rows, -1, -1)
        states = stack.forward(spread[0], spread[1], cache, cache.base, own, spread[2])
        return losses_of(adapter, states[None], ids[:, place + 1, None].expand(-1, nodes)[None])[0, 0]

    def route_of(view: View) -> Tensor:
        return given[0]

    with attach(model, GivenModules(modules=duo, route=route_of)):
        for place in range(places):
            real = mask[:, place].bool()
            if not bool(real.any()):
                continue
            losses = torch.cat([step(place, part[None]) for part in routes.split(room)], 1)
            best = losses.argmin(1)
            step(place, routes[best.cpu()][:, None])
            cache.commit(torch.full((rows, 1), cache.base, device=ids.device), real.long(), 1)
            chosen[:, place], least[:, place] = routes[best.cpu()], losses.amin(1).cpu()
    return chosen, least
