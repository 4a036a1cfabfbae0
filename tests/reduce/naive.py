"""ToMe, DyMU and attention pruning as their papers say it, one image and one token at a time. Slow and plain."""

from __future__ import annotations

import math

import torch


def cosine(a, b):
    return float((a * b).sum() / (a.norm() * b.norm()))


def proposals(keys, prefix):
    """keys `[token, dim]`: for every even token that is a patch, its best odd patch and the score."""
    found = []
    for a in range(0, len(keys), 2):
        partners = [b for b in range(1, len(keys), 2) if b >= prefix]
        if a < prefix or not partners:
            continue
        best = max(partners, key=lambda b: cosine(keys[a], keys[b]))
        found.append((cosine(keys[a], keys[best]), a, best))
    return sorted(found, reverse=True)


def merge(tokens, accepted, prefix):
    """tokens: list of (state, members). Returns the next list: the prefix, what is left of A, then B."""
    if not accepted:
        return tokens
    gone = {a for _, a, _ in accepted}
    order = list(range(prefix))
    order += [i for i in range(prefix, len(tokens)) if i % 2 == 0 and i not in gone]
    order += [i for i in range(prefix, len(tokens)) if i % 2 == 1]
    out = []
    for i in order:
        state, members = tokens[i]
        total = state * len(members)
        members = list(members)
        for _, a, b in accepted:
            if b == i:
                total = total + tokens[a][0] * len(tokens[a][1])
                members = members + tokens[a][1]
        out.append((total / len(members), members))
    return out


class Naive:
    """A ViT run layer by layer on one image; attention is written out over copies of merged tokens."""

    def __init__(self, model, heads=4):
        self.model, self.heads = model, heads

    def attention(self, layer, tokens):
        """States after attention and its residual, and the keys `[token, dim]` as a mean over heads."""
        x = torch.stack([state for state, _ in tokens])
        normed = layer.layernorm_before(x)
        att = layer.attention
        q, k, v = att.q_proj(normed), att.k_proj(normed), att.v_proj(normed)
        dim = q.shape[-1] // self.heads
        copies = [i for i, (_, members) in enumerate(tokens) for _ in members]
        out = torch.zeros_like(q)
        for head in range(self.heads):
            part = slice(head * dim, (head + 1) * dim)
            for i in range(len(tokens)):
                scores = torch.stack([(q[i, part] * k[j, part]).sum() / math.sqrt(dim) for j in copies])
                law = scores.softmax(0)
                out[i, part] = sum(law[n] * v[j, part] for n, j in enumerate(copies))
        keys = k.view(len(tokens), self.heads, dim).mean(1)
        self.queries_keys = (q, k)
        return x + att.o_proj(out), keys

    def run(self, pixels, choose, prefix=1):
        """choose(layer, keys, tokens) -> proposals to accept. Returns the grid `[token, width]` after the final norm,
        and the groups of original tokens."""
        first = self.model.embeddings(pixels[None])[0]
        tokens = [(state, [i]) for i, state in enumerate(first)]
        for index, layer in enumerate(self.model.layers):
            states, keys = self.attention(layer, tokens)
            tokens = [(state, members) for state, (_, members) in zip(states, tokens, strict=True)]
            tokens = choose(index, keys, tokens)
            tokens = [(s + layer.mlp(layer.layernorm_after(s[None]))[0], members) for s, members in tokens]
        grid = {m: state for state, members in tokens for m in members}
        width = first.shape[-1]
        full = torch.stack([grid.get(i, torch.full((width,), torch.nan)) for i in range(len(first))])
        return self.model.layernorm(full), [members for _, members in tokens]


def tome(r):
    """The accepted proposals of ToMe at r tokens per layer."""

    def choose(index, keys, tokens):
        count = min(r, (len(tokens) - 1) // 2)
        return merge(tokens, proposals(keys, 1)[:count], 1)

    return choose


def dymu(taus):
    """Those of DyMU at these thresholds."""

    def choose(index, keys, tokens):
        wanted = [one for one in proposals(keys, 1) if one[0] > taus[index]]
        return merge(tokens, wanted[: (len(tokens) - 1) // 2], 1)

    return choose


def attention_pruning(naive, r):
    """Drop the r patches with the least attention of the class token."""

    def choose(index, keys, tokens):
        q, k = naive.queries_keys
        dim = q.shape[-1] // naive.heads
        received = torch.zeros(len(tokens))
        for head in range(naive.heads):
            part = slice(head * dim, (head + 1) * dim)
            received += (k[:, part] @ q[0, part] / math.sqrt(dim)).softmax(0) / naive.heads
        lowest = sorted(range(1, len(tokens)), key=lambda i: float(received[i]))[: min(r, len(tokens) - 2)]
        return [one for i, one in enumerate(tokens) if i not in lowest]

    return choose
