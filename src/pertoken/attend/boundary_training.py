"""Training of DHSA's boundary predictor on the attention of the model itself; no weight of the model changes.

With A the attention probabilities of a layer, mean over its heads, the future's attention to either side of place s is

    past[s]   = sum of A[i, j] over i >= s + w, s - w <= j < s        future[s] = the same over s <= j < s + w
    contrast[s] = log (max(past, future) + 1e-6) - log (min(past, future) + 1e-6)

and a chunk should start at s where contrast[s] >= log 2. The loss is the focal binary cross-entropy, mean over places
and layers. Differs from the paper: attention is worked out on the fly from queries and keys, for any model and batch;
layers with a sliding window are left out, as DHSA leaves them alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.attend.boundaries import Boundaries
from pertoken.core.errors import BadRequest
from pertoken.models.adapter import adapter_for
from pertoken.models.queries import queries_seen

TWICE = math.log(2.0)


def contrast(attention: Tensor, window: int) -> Tensor:
    """`[batch, place]` log ratio of the attention that later tokens pay to the `window` tokens on either side of a
    place, -inf where a side is not full or nothing comes later; attention `[batch, query, key]`."""
    rows, length, _ = attention.shape
    later = attention.double().flip(1).cumsum(1).flip(1)  # [batch, i, key]: of the queries from i on
    place = torch.arange(window, length - window, device=attention.device)
    if not len(place):
        return attention.new_full((rows, length), -torch.inf)
    columns = place[:, None] + torch.arange(-window, window, device=attention.device)
    sides = later[:, (place + window)[:, None], columns].unflatten(-1, (2, window)).sum(-1)
    ratio = (sides.amax(-1) + 1e-6).log() - (sides.amin(-1) + 1e-6).log()
    return F.pad(ratio.float(), (window, window), value=-torch.inf)


def focal(logits: Tensor, wanted: Tensor, counted: Tensor, gamma: float = 2.0, positive: float = 1.3) -> Tensor:
    """Mean focal cross-entropy over `counted` places; boundaries weigh `positive`, and a place of which the truth has
    probability p weighs (1 - p) ** gamma. All `[batch, place]`."""
    plain = F.binary_cross_entropy_with_logits(logits, wanted.to(logits.dtype), reduction="none")
    loss = plain * (1 - (-plain).exp()) ** gamma * torch.where(wanted, positive, 1.0)
    return (loss * counted).sum() / counted.sum().clamp(min=1)


@torch.no_grad()
def lessons(model: Any, ids: Tensor, window: int, layers: Sequence[int] | None = None) -> Iterator[tuple[Tensor, ...]]:
    """For each layer with full attention, or each of `layers`: keys `[batch, token, width]`, contrast and counted
    `[batch, place]`; ids `[batch, token]` without padding. The first and last 2 window places do not count."""
    adapter, queries, caps = adapter_for(model), {}, {}

    def sink(layer: int, query: Tensor, cap: float | None) -> None:
        queries[layer], caps[layer] = query, cap

    with queries_seen(adapter, sink):
        cache = model(ids, use_cache=True).past_key_values
    place = torch.arange(ids.shape[1], device=ids.device)
    counted = ((place >= 2 * window) & (place < ids.shape[1] - 2 * window)).expand(len(ids), -1)
    future = place[:, None] < place
    for layer in full_layers(model) if layers is None else layers:
        keys: Tensor = cache.layers[layer].keys.float()
        attention = keys.new_zeros(len(ids), ids.shape[1], ids.shape[1])
        for head, asked in enumerate(queries[layer].float().unflatten(1, (keys.shape[1], -1)).unbind(1)):
            scores = torch.matmul(asked, keys[:, head, None].transpose(-1, -2))
            if caps[layer] is not None:
                scores = caps[layer] * torch.tanh(scores / caps[layer])
            attention = attention + scores.masked_fill(future, -torch.inf).softmax(-1).sum(1)
        yield keys.transpose(1, 2).flatten(2), contrast(attention / adapter.heads, window), counted


def full_layers(model: Any) -> list[int]:
    """Layers without a sliding window."""
    adapter = adapter_for(model)
    return [layer for layer in range(adapter.depth) if adapter.window(layer) is None]


def _padded(net: Boundaries, keys: Tensor) -> Tensor:
    """Logits `[batch, token]`, -100 where a window is not full."""
    return F.pad(net(keys), (net.window, net.window - 1), value=-100.0)


@torch.no_grad()
def agreement(
    net: Boundaries, model: Any, batches: Sequence[Tensor], theta: float = 0.0, layers: Sequence[int] | None = None
) -> dict[str, float]:
    """How well logits above theta tell the boundaries of these ids: precision, recall and f1; rate and said: the share
    of places that are boundaries, and that are taken for one; chance: f1 of as many places taken at random; loss."""
    hits = said = true = count = loss = lots = 0.0
    for ids in batches:
        for keys, ratio, counted in lessons(model, ids, net.window, layers):
            logits = _padded(net, keys)
            guess, wanted = (logits > theta) & counted, (ratio >= TWICE) & counted
            loss, lots = loss + float(focal(logits, wanted, counted)), lots + 1
            hits += float((guess & wanted).sum())
            said, true, count = said + float(guess.sum()), true + float(wanted.sum()), count + float(counted.sum())
    rate, share = true / max(count, 1), said / max(count, 1)
    even = lambda one, other: 2 * one * other / max(one + other, 1e-9)  # noqa: E731
    precision, recall = hits / max(said, 1), hits / max(true, 1)
    return {
        "precision": precision, "recall": recall, "f1": even(precision, recall), "rate": rate, "said": share,
        "chance": even(rate, share), "loss": loss / max(lots, 1),
    }  # fmt: skip


def train_boundaries(
    model: Any,
    batches: Sequence[Tensor],
    *,
    window: int = 4,
    heads: int = 4,
    hidden: int = 256,
    layers: Sequence[int] | None = None,
    epochs: int = 2,
    lr: float = 1e-4,
    held: float = 0.2,
    theta: float = 0.0,
    seed: int = 0,
    steps: int | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Boundaries:
    """A predictor for models with keys as wide as this one's, trained on ids `[batch, token]` of `batches`, rows of
    one length without padding, in random order; the last `held` of them are kept to measure it (`about`).

    layers: those to learn from (all with full attention); steps: batches seen at most; progress: told the step and its
    loss. Raises `BadRequest` for batches with nothing to learn from.
    """
    adapter = adapter_for(model)
    apart = min(math.ceil(held * len(batches)), len(batches) - 1) if held > 0 else 0
    seen, kept = list(batches[: len(batches) - apart]), list(batches[len(batches) - apart :])
    layers = full_layers(model) if layers is None else list(layers)
    if not seen or not layers or any(ids.ndim != 2 or ids.shape[1] <= 4 * window for ids in batches):
        raise BadRequest(
            f"{len(batches)} batches and {len(layers)} layers to learn from; give batches [batch, token] of more than "
            f"{4 * window} tokens a row, and a model with full attention in some layer"
        )
    torch.manual_seed(seed)
    net = Boundaries(adapter.kv_heads * adapter.head_dim, window, heads, hidden).to(adapter.device)
    optimizer = torch.optim.Adam(net.parameters(), lr=lr)
    generator, step = torch.Generator().manual_seed(seed), 0
    total = min(epochs * len(seen), steps or epochs * len(seen))
    while step < total:
        for index in torch.randperm(len(seen), generator=generator).tolist()[: total - step]:
            told, step = 0.0, step + 1
            optimizer.zero_grad(set_to_none=True)
            for keys, ratio, counted in lessons(model, seen[index], window, layers):
                with torch.enable_grad():
                    loss = focal(_padded(net, keys), ratio >= TWICE, counted) / len(layers)
                    loss.backward()
                told += float(loss.detach())
            optimizer.step()
            if progress is not None:
                progress(step, told)
    net.eval()
    net.about |= {"layers": layers, "steps": step, "seed": seed, "theta": theta}
    if kept:
        net.about |= {name: round(value, 4) for name, value in agreement(net, model, kept, theta, layers).items()}
    return net
