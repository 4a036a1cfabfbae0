"""Depth by its definition: one row, one token, one layer after the other, with keys in plain lists."""

from __future__ import annotations

import torch

from pertoken.models.adapter import adapter_for


class ListCache:
    """Keys and values of one row: a list per layer. What it gives back ends with what was just written."""

    is_compileable = False

    def __init__(self, adapter):
        self.windows = [adapter.window(index) for index in range(adapter.depth)]
        self.kept = [[] for _ in self.windows]

    def update(self, keys, values, layer_idx, *args, **kwargs):
        self.kept[layer_idx].append((keys, values))
        seen = self.kept[layer_idx][-(self.windows[layer_idx] or len(self.kept[layer_idx])) :]
        return torch.cat([k for k, _ in seen], 2), torch.cat([v for _, v in seen], 2)

    def get_seq_length(self, layer_idx=0):
        return len(self.kept[layer_idx])


@torch.inference_mode()
def step(model, cache, token, position, runs, carried):
    """Logits `[vocabulary]` after one token that runs the layers for which `runs(layer, hidden)`.

    carried: a layer that it passes over holds the keys of the hidden state that passes by, and else none.
    """
    adapter = adapter_for(model)
    ids, positions = torch.tensor([[token]]), torch.tensor([[position]])
    hidden = adapter.embed(ids, positions)
    rotary = adapter.rotary(hidden, positions)
    for layer in range(adapter.depth):
        if runs(layer, hidden):
            hidden = adapter.run_layer(layer, hidden, None, positions, rotary, cache)
        elif carried:
            adapter.run_layer(layer, hidden, None, positions, rotary, cache)  # for what it writes
    return adapter.head(adapter.norm(hidden))[0, 0]


def decode(model, prompt, new, runs, carried=False):
    """Greedy tokens and their logits `[new, vocabulary]`; runs(position, prompt length, layer, hidden) -> bool."""
    cache, tokens, found = ListCache(adapter_for(model)), list(prompt), []
    for position in range(len(prompt) + new - 1):
        logits = step(
            model,
            cache,
            tokens[position],
            position,
            lambda layer, hidden, position=position: runs(position, len(prompt), layer, hidden),
            carried,
        )
        if position >= len(prompt) - 1:
            found.append(logits)
            tokens.append(int(logits.argmax()))
    return tokens[len(prompt) :], torch.stack(found)


def read(model, tokens, runs, carried=False):
    """Logits `[token, vocabulary]` of a text; runs(position, layer) -> bool."""
    cache = ListCache(adapter_for(model))
    return torch.stack(
        [
            step(model, cache, token, position, lambda layer, hidden, p=position: runs(p, layer), carried)
            for position, token in enumerate(tokens)
        ]
    )
