"""Masked denoising by the letter: batch 1, Python lists, one loop over positions, no line shared with the library.

Every function takes a Llama whose attention reads both ways and a prompt as a list of ids, and returns a `Run`: the
canvas and, step by step, which positions were computed and which were committed. `shift` is 0 where the output at i
predicts token i (LLaDA) and 1 where the output at i - 1 does (Dream). Sources: LLaDA 2502.09992, Fast-dLLM 2505.22618,
Learn2PD 2509.25188, dKV-Cache 2505.15781, Elastic-Cache 2510.14973; the entropy bound is EB-Sampler, 2505.24857.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch


@dataclass
class Step:
    computed: list[int]
    committed: list[int]
    block: int = 0
    refreshed: int = 0  # Elastic-Cache: layers run for all positions


@dataclass
class Run:
    canvas: list[int]
    steps: list[Step] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)  # Elastic-Cache: every drift test


@dataclass
class Seen:
    """What a commit rule may look at: probabilities, most probable ids and entropies by position, where computed."""

    block: list[int]
    masked: list[int]  # still masked positions of the block that have an output
    confidence: dict[int, float]
    best: dict[int, int]
    entropy: dict[int, float]
    number: int  # scheduled commits of this step


# ---- the model, position by position


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def project(model, layer, x, positions):
    """Queries `[n, heads, dim]`, keys and values `[n, kv_heads, dim]` of the rows `x` `[1, n, width]`, rotated."""
    attention, dim = layer.self_attn, layer.self_attn.head_dim
    cos, sin = model.model.rotary_emb(x, torch.tensor([positions], device=x.device))
    cos, sin = cos[0, :, None], sin[0, :, None]
    normed = layer.input_layernorm(x)[0]
    query = attention.q_proj(normed).view(len(positions), -1, dim)
    key = attention.k_proj(normed).view(len(positions), -1, dim)
    value = attention.v_proj(normed).view(len(positions), -1, dim)
    return rotate(query, cos, sin), rotate(key, cos, sin), value


def weights(query, keys):
    """Attention weights `[heads, n, S]` of queries `[n, heads, dim]` over keys `[S, kv_heads, dim]`."""
    keys = keys.repeat_interleave(query.shape[1] // keys.shape[1], 1)
    return (torch.einsum("nhd,shd->hns", query, keys) / math.sqrt(query.shape[-1])).softmax(-1)


def after_attention(layer, x, attention, values):
    """The layer's output for the rows `x`, given their attention weights over `values` `[S, kv_heads, dim]`."""
    values = values.repeat_interleave(attention.shape[0] // values.shape[1], 1)
    mixed = torch.einsum("hns,shd->nhd", attention, values).flatten(1)[None]
    x = x + layer.self_attn.o_proj(mixed)
    return x + layer.mlp(layer.post_attention_layernorm(x))


def forward(model, tokens, active, past=None):
    """Logits by position for the active positions, which read themselves and the `past`: per layer, keys and values by
    position. Also returns the new `past` of every position."""
    x = model.model.embed_tokens(torch.tensor([[tokens[p] for p in active]], device=model.device))
    slots = []
    for index, layer in enumerate(model.model.layers):
        query, key, value = project(model, layer, x, active)
        held = dict(past[index]) if past else {}
        for row, position in enumerate(active):
            held[position] = (key[row], value[row])
        assert sorted(held) == list(range(len(tokens))), "every position is read, and nothing else"
        keys = torch.stack([held[p][0] for p in range(len(tokens))])
        values = torch.stack([held[p][1] for p in range(len(tokens))])
        x = after_attention(layer, x, weights(query, keys), values)
        slots.append(held)
    logits = model.lm_head(model.model.norm(x))[0]
    return {p: logits[row] for row, p in enumerate(active)}, slots


# ---- which positions are computed: each gives the logits by row and the computed positions. t: step of the block that
# begins at `start`; number: commits scheduled now; last: positions committed at the step before


class Full:
    def step(self, model, tokens, t, start, end, shift, mask_id, number, last):
        active = list(range(len(tokens)))
        return forward(model, tokens, active)[0], active


class Prefix:
    """Fast-dLLM: everything at a block's start, then everything from the block on; the prefix keeps its keys."""

    def step(self, model, tokens, t, start, end, shift, mask_id, number, last):
        active = list(range(0 if t == 0 else start - shift, len(tokens)))
        logits, slots = forward(model, tokens, active, None if t == 0 else self.past)
        self.past = [{p: kv for p, kv in layer.items() if p < start - shift} for layer in slots]
        return logits, active


class Dual:
    """Fast-dLLM: everything at a block's start, then the block alone, whose keys are overwritten in place."""

    def step(self, model, tokens, t, start, end, shift, mask_id, number, last):
        active = list(range(len(tokens))) if t == 0 else list(range(start - shift, min(end, len(tokens))))
        past = None if t == 0 else [{p: kv for p, kv in layer.items() if p < len(tokens)} for layer in self.past]
        logits, self.past = forward(model, tokens, active, past)
        return logits, active


class DKVDecode:
    """dKV-Cache-Decode: what was decoded before the last commit is read from the cache; all anew every `interval`."""

    def __init__(self, interval):
        self.interval, self.past, self.before = interval, [], set()

    def cacheable(self, tokens, shift, mask_id):
        known = [token != mask_id for token in tokens] + [True]
        return {p for p in range(len(tokens)) if known[p] and (not shift or known[p + 1])}

    def step(self, model, tokens, t, start, end, shift, mask_id, number, last):
        everything = list(range(len(tokens)))
        now = self.cacheable(tokens, shift, mask_id)  # U_{t-1}
        if t <= 1 or t % self.interval == 0:
            active, past = everything, None
        else:
            active = [p for p in everything if p not in self.before]  # I \ U_{t-2}
            past = [{p: kv for p, kv in layer.items() if p < len(tokens)} for layer in self.past]
        logits, slots = forward(model, tokens, active, past)
        self.past = [{p: kv for p, kv in layer.items() if p in now} for layer in slots]
        self.before = now
        return logits, active


class DKVGreedy:
    """dKV-Cache-Greedy: only the positions decoded now, those decoded last, and `window` masked neighbours.

    `priority` is the pre-drawn order, highest first, and the window stands around the next positions, as in the
    released code. Without an order it stands around the last ones (those cut off since, too), within the block. The
    released code takes the neighbours of one position after the other; here they are the nearest to any.
    """

    def __init__(self, interval, window, priority=None):
        self.interval, self.window, self.priority = interval, window, priority

    def neighbours(self, centres, candidates, length):
        found = []
        for distance in range(1, length):
            for side in (-1, 1):
                for p in candidates:
                    near = any(p == centre + side * distance for centre in centres)
                    if near and p not in centres and p not in found and len(found) < self.window * len(centres):
                        found.append(p)
        return found

    def step(self, model, tokens, t, start, end, shift, mask_id, number, last):
        everything = list(range(len(tokens)))
        masked = [p for p in everything if tokens[p] == mask_id]
        here, following, order = [p for p in masked if start <= p < end], [], self.priority
        if order is not None:
            following = sorted(here, key=lambda p: (-order[p], p))[:number]
        window = self.neighbours(following or last, masked if following else here, len(tokens))
        if t % self.interval == 0:
            active, past = everything, None
        else:
            chosen = {*following, *window, *(p for p in last if p < len(tokens))}
            active = sorted(chosen | {p - shift for p in chosen})
            past = [{p: kv for p, kv in layer.items() if p < len(tokens)} for layer in self.past]
        logits, self.past = forward(model, tokens, active, past)
        return logits, active


# ---- which positions are committed


def most_confident(seen):
    return sorted(seen.masked, key=lambda p: (-seen.confidence[p], p))


def schedule(seen):
    return most_confident(seen)[: seen.number]


def threshold(tau):
    def commit(seen):
        return [p for p in seen.masked if seen.confidence[p] >= tau] or most_confident(seen)[:1]

    return commit


def factor(f):
    def commit(seen):
        order, kept = most_confident(seen), 0
        while kept < len(order) and (kept == 0 or seen.confidence[order[kept]] >= 1 - f / (kept + 2)):
            kept += 1  # the k-th from 1 must reach 1 - f / (k + 1)
        return order[:kept]

    return commit


def entropy_bound(gamma):
    def commit(seen):
        order = sorted(seen.masked, key=lambda p: (seen.entropy[p], p))
        kept, total, largest = 0, 0.0, 0.0
        for p in order:
            total, largest = total + seen.entropy[p], max(largest, seen.entropy[p])
            if kept and total - largest > gamma:
                break
            kept += 1
        return order[:kept]

    return commit


def in_order(priority):
    def commit(seen):
        return sorted(seen.masked, key=lambda p: (-priority[p], p))[: seen.number]

    return commit


def accepted(seen, network, width, tau):
    """Positions of the block that the filter lets through; a block narrower than the filter is filled up with 1."""
    inputs = [seen.confidence.get(p, 1.0) for p in seen.block]
    inputs += [1.0] * (width - len(inputs))
    passed = network(torch.tensor(inputs, dtype=torch.float32)).sigmoid() > tau
    return [p for p in seen.masked if passed[seen.block.index(p)]]


def learned(network, width, tau):
    def commit(seen):
        return sorted(set(accepted(seen, network, width, tau)) | set(most_confident(seen)[: seen.number]))

    return commit


# ---- where the canvas ends: the position of the last token kept, or None


def decoded_end(end):
    """Paper: cut behind the first end of text that is decoded."""

    def cut(tokens, committed, predicted, confidence, mask_id):
        hits = [p for p in committed if tokens[p] == end]
        return min(hits) if hits else None

    return cut


def predicted_end(end):
    """Code: else cut behind the most confident end of text predicted at any place still masked."""

    def cut(tokens, committed, predicted, confidence, mask_id):
        hits = [p for p in committed if tokens[p] == end]
        if hits:
            return min(hits)
        hits = [p for p in predicted if tokens[p] == mask_id and predicted[p] == end]
        return min(hits, key=lambda p: (-confidence[p], p)) if hits else None

    return cut


# ---- the loop


def read(logits, positions, shift, mask_id):
    """Confidence, most probable id and entropy in float64 of those positions whose output row was computed."""
    confidence, best, entropy = {}, {}, {}
    for p in positions:
        if p - shift in logits:
            row = logits[p - shift].double().clone()
            row[mask_id] = -math.inf
            probabilities = row.softmax(-1)
            best[p] = int(probabilities.argmax())
            confidence[p] = float(probabilities[best[p]])
            entropy[p] = -sum(q * math.log(q) for q in probabilities.tolist() if q > 0)
    return confidence, best, entropy


@torch.no_grad()
def decode(model, prompt, length, block, steps, shift, mask_id, commit=schedule, refresh=None, cut=None):
    """The sampler 5a-e at temperature 0 with its commit rule, its forward pass and its canvas exchanged."""
    assert length % block == 0 and steps % (length // block) == 0
    refresh, per_block, begin = refresh or Full(), steps // (length // block), len(prompt)
    tokens, run, outputs = list(prompt) + [mask_id] * length, Run([]), {}  # outputs: newest logits of every row
    for index in range(length // block):
        start, end = begin + index * block, begin + (index + 1) * block
        many = sum(token == mask_id for token in tokens[start:end])
        numbers = [many // per_block + (i < many % per_block) for i in range(per_block)]
        t, last = 0, []
        while mask_id in tokens[start:end]:
            number = min(max(numbers[t] if t < per_block else many // per_block, 1), tokens[start:end].count(mask_id))
            logits, computed = refresh.step(model, tokens, t, start, end, shift, mask_id, number, last)
            outputs |= logits
            confidence, best, entropy = read(outputs, range(begin, len(tokens)), shift, mask_id)
            inside = list(range(start, min(end, len(tokens))))
            masked = [p for p in inside if tokens[p] == mask_id]
            masked = [p for p in masked if p - shift in logits] or masked
            chosen = sorted(commit(Seen(inside, masked, confidence, best, entropy, number)))
            assert chosen and set(chosen) <= set(masked)
            for p in chosen:
                tokens[p] = best[p]
            run.steps.append(Step(computed, chosen, index))
            if cut and (final := cut(tokens, chosen, best, confidence, mask_id)) is not None:
                tokens = tokens[: final + 1]
            t, last = t + 1, chosen
    run.canvas = tokens[begin:]
    return run


def llada(model, prompt, length, block, steps, shift, mask_id):
    return decode(model, prompt, length, block, steps, shift, mask_id)


# ---- Elastic-Cache, a loop of its own: no blocks, a window over the masked set


def drift(old, now, axis):
    """sigma: mean cosine of weights `[heads, tracked, S]`, of the heads for each key or of the keys for each head."""
    values = []
    heads, tracked, size = now.shape
    if axis == "heads":
        pairs = [(old[:, t, k], now[:, t, k]) for t in range(tracked) for k in range(size)]
    else:
        pairs = [(old[h, t], now[h, t]) for t in range(tracked) for h in range(heads)]
    for a, b in pairs:
        values.append(float((a * b).sum() / (a.norm() * b.norm())))
    return sum(values) / len(values) if values else -math.inf


@torch.no_grad()
def elastic(
    model,
    prompt,
    length,
    shift,
    mask_id,
    window=16,
    gamma=0.9,
    epsilon=0.9,
    track=1,
    axis="heads",
    far=True,
    cut=None,
    commit=None,
):
    """Elastic-Cache, algorithm 1-7. `far` keeps the masks behind the window cached (block_caching). `commit` replaces
    step 6; `cut` takes positions away, where the released code leaves them in place as masks. Weights of the drift test
    are float64, so that none is so small that the cosine's own floor matters."""
    tokens = list(prompt) + [mask_id] * length
    layers = len(model.model.layers)
    masked, tracked, fresh = list(range(len(prompt), len(tokens))), [], []
    states, queries, keys, values = ([[torch.empty(0)] * len(tokens) for _ in range(layers)] for _ in range(4))
    run, first = Run([]), True

    while masked:
        size = len(tokens)
        near = masked[:window]
        asked = near if far else masked
        rows = list(dict.fromkeys([*tracked, *fresh, *asked, *(p - shift for p in asked)]))
        start = layers
        if first:
            rows, start = list(range(size)), -1
        computed = sorted(rows)
        x = model.model.embed_tokens(torch.tensor([[tokens[p] for p in rows]], device=model.device))
        voted = set()
        for b, layer in enumerate(model.model.layers):
            for row, p in enumerate(rows):
                states[b][p] = x[0, row]
            if b == start:
                rows = list(range(size))
                x = torch.stack(states[b])[None]
            q, k, v = project(model, layer, x, rows)
            old_queries, old_keys = [queries[b][p] for p in tracked], list(keys[b])
            for row, p in enumerate(rows):
                queries[b][p], keys[b][p], values[b][p] = q[row], k[row], v[row]
            attention = weights(q, torch.stack(keys[b]))
            x = after_attention(layer, x, attention, torch.stack(values[b]))
            if b < start:
                sigma = -math.inf
                if tracked:
                    old = weights(torch.stack(old_queries).double(), torch.stack(old_keys).double())
                    now = torch.stack([queries[b][p] for p in tracked]).double()
                    sigma = drift(old, weights(now, torch.stack(keys[b]).double()), axis)
                run.sigmas.append(sigma)
                if sigma < gamma:
                    start = b + 1
            score = attention[:, [rows.index(p - shift) for p in near]].sum((0, 1)).tolist()
            decided = [p for p in range(size) if p not in masked]
            voted |= set(sorted(decided, key=lambda p: (-score[p], p))[:track])
        logits = dict(zip(rows, model.lm_head(model.model.norm(x))[0], strict=True))
        confidence, best, entropy = read(logits, near, shift, mask_id)
        if commit is None:
            bar = min(epsilon, max(confidence.values()))
            chosen = [p for p in near if confidence[p] >= bar]
        else:
            chosen = sorted(commit(Seen(near, near, confidence, best, entropy, 1)))
        wide = layers if len(computed) == size else layers - start
        run.steps.append(Step(list(range(size)) if wide else computed, chosen, 0, wide))
        for p in chosen:
            tokens[p] = best[p]
        masked = [p for p in masked if p not in chosen]
        if cut and (last := cut(tokens, chosen, best, confidence, mask_id)) is not None:
            tokens = tokens[: last + 1]
            masked = [p for p in masked if p <= last]
            for kept in (*states, *queries, *keys, *values):
                del kept[last + 1 :]
        tracked = sorted(p for p in voted if p < len(tokens))
        fresh, first = [p for p in chosen if p < len(tokens)], False
    run.canvas = tokens[len(prompt) :]
    return run
