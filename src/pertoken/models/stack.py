"""Running a stack of decoder layers over a tree cache: through the model's own modules, or fused.

Both give the same hidden states. `ModuleStack` calls the model's layers, so hooks and attached policies act.
`FusedStack` runs Llama-type layers with joined projections and far fewer operations per layer: on short inputs the
operations, not the arithmetic, are the time. `best_stack` picks it when nothing is hooked onto the model and it agrees
with the modules on a probe.
"""

from __future__ import annotations

import weakref
from abc import ABC, abstractmethod
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.core.attach import active
from pertoken.core.policy import View
from pertoken.models.adapter import Adapter, LlamaLike, adapter_for
from pertoken.models.cache import Packing, TreeCache
from pertoken.models.queries import queries_seen
from pertoken.models.slots import SlotCache


class Stack(ABC):
    """Layers `first..last` of one model. Inputs and outputs as `Adapter`. padding: what a padding token of a
    block costs, in real ones."""

    padding = 1.0

    def __init__(self, adapter: Adapter):
        self.adapter = adapter
        self.windows = [adapter.window(i) for i in range(adapter.depth)]

    def fresh(self) -> bool:
        """Whether what this stack has copied of the model is still what the model holds."""
        return True

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return self.adapter.embed(ids, positions)

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states that the last layer run left un-normed."""
        return self.adapter.head(self.adapter.norm(hidden))

    def masks(self, cache: TreeCache, allow: Tensor | None) -> dict[int | None, Tensor | None]:
        """The additive mask of each window size in use."""
        return {window: cache.mask(allow, window) for window in set(self.windows)}

    def forward(
        self,
        ids: Tensor,
        positions: Tensor,
        cache: TreeCache,
        start: int,
        allow: Tensor | None,
        valid: Tensor | None = None,
        last: int | None = None,
        states: list[Tensor] | None = None,
        text: bool = False,
    ) -> Tensor:
        """Un-normed hidden states `[row, token, width]` after layer `last` (exclusive; default all).

        start: first cache column to write; allow: see `TreeCache.mask`; valid `[row, token]`: which tokens are real;
        states: collects the output of every layer run; text: the tokens follow each other, as in a prompt, and are not
        the nodes of a tree.
        """
        cache.open(start, positions, valid)
        if valid is None:
            valid = positions >= 0
        self.announce(valid, cache, tree=not text, positions=positions)
        hidden = self.embed(ids, positions)
        return self.run(hidden, positions, cache, self.masks(cache, allow), 0, last or self.adapter.depth, states)

    def announce(self, valid: Tensor, cache: Any = None, tree: bool = False, positions: Tensor | None = None) -> None:
        """Tell attached policies that a forward begins, and what it goes on from."""
        prompt = cache.prompt if isinstance(cache, TreeCache) else None
        for attachment in active(self.adapter.model):
            attachment.begin(View(valid, self.adapter.depth, tree=tree, positions=positions, prompt=prompt), cache)

    @abstractmethod
    def run(
        self,
        hidden: Tensor,
        positions: Tensor,
        cache: TreeCache | SlotCache,
        masks: Mapping[int | None, Tensor | None],
        first: int,
        last: int,
        states: list[Tensor] | None = None,
    ) -> Tensor:
        """Hidden states after layers `first..last` (last exclusive), written to the cache's open columns."""


class ModuleStack(Stack):
    """The model's own layers, one call each."""

    def run(self, hidden, positions, cache, masks, first, last, states=None):
        rotary = self.adapter.rotary(hidden, positions)
        observe = cache.observe if isinstance(cache, SlotCache) and cache.queries is not None else None
        with nullcontext() if observe is None else queries_seen(self.adapter, observe):
            for index in range(first, last):
                hidden = self.adapter.run_layer(index, hidden, masks[self.windows[index]], positions, rotary, cache)
                if states is not None:
                    states.append(hidden)
        return hidden


STEADY_ROPE = ("default", "linear", "llama3", "yarn")  # the others change with the length of the context


class FusedLayer:
    """Joined weights of one Llama-type layer, sharing storage with nothing (a copy, made once)."""

    def __init__(self, layer: Any, heads: int, kv_heads: int, dim: int):
        attention, mlp = layer.self_attn, layer.mlp
        projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        with torch.no_grad():
            self.qkv = torch.cat([p.weight for p in projections])
            biases = [p.bias for p in projections]
            self.qkv_bias = None if biases[0] is None else torch.cat(biases)
            self.gate_up = torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight])
        self.out, self.out_bias, self.down = attention.o_proj.weight, attention.o_proj.bias, mlp.down_proj.weight
        self.norm_in, self.norm_mid = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
        self.eps = layer.input_layernorm.variance_epsilon
        self.q_norm = getattr(attention, "q_norm", None)
        self.k_norm = getattr(attention, "k_norm", None)
        self.heads, self.kv_heads, self.dim = heads, kv_heads, dim
        self.groups, self.scale = heads // kv_heads, attention.scaling

    def fresh(self, layer: Any) -> bool:
        """Whether the joined weights are still those of the layer: writes through `.data` leave no other trace."""
        attention, mlp = layer.self_attn, layer.mlp
        parts = zip(
            (self.qkv, self.gate_up),
            ((attention.q_proj, attention.k_proj, attention.v_proj), (mlp.gate_proj, mlp.up_proj)),
            strict=True,
        )
        return all(
            torch.equal(piece, p.weight)
            for joined, modules in parts
            for piece, p in zip(joined.split([p.weight.shape[0] for p in modules]), modules, strict=True)
        )

    def __call__(
        self,
        hidden: Tensor,
        cos: Tensor,
        sin: Tensor,
        mask: Tensor | None,
        cache: Any,
        index: int,
    ) -> Tensor:
        """Layer `index` on `[row, token, width]`, or on `[1, real token, width]` if the cache's block is packed."""
        packing: Packing | None = cache.packing
        width = hidden.shape[-1]
        heads, kv_heads, dim = self.heads, self.kv_heads, self.dim
        normed = F.rms_norm(hidden, (width,), self.norm_in, self.eps)
        qkv = F.linear(normed, self.qkv, self.qkv_bias)
        if packing is not None:
            qkv = packing.unpack(qkv)
        rows, tokens = qkv.shape[:2]
        qkv = qkv.view(rows, tokens, heads + 2 * kv_heads, dim)
        turned = qkv[:, :, : heads + kv_heads]
        if self.q_norm is not None and self.k_norm is not None:
            turned = torch.cat([self.q_norm(turned[:, :, :heads]), self.k_norm(turned[:, :, heads:])], 2)
        half = dim // 2
        turned = torch.addcmul(turned * cos, torch.cat((turned[..., half:], turned[..., :half]), -1), sin)
        new_keys, new_values = turned[:, :, heads:].transpose(1, 2), qkv[:, :, heads + kv_heads :].transpose(1, 2)
        query = turned[:, :, :heads].transpose(1, 2)
        seen_keys, seen_values = cache.update(new_keys, new_values, index, queries=query, scaling=self.scale)
        query = query.reshape(rows, kv_heads, self.groups * tokens, dim)
        scores = torch.matmul(query, seen_keys.transpose(-1, -2)).mul_(self.scale)
        if mask is not None:
            scores += mask
        mixed = torch.matmul(scores.softmax(-1), seen_values)
        mixed = mixed.view(rows, heads, tokens, dim).transpose(1, 2).reshape(rows, tokens, heads * dim)
        if packing is not None:
            mixed = packing.pack(mixed)
        hidden = hidden + F.linear(mixed, self.out, self.out_bias)
        normed = F.rms_norm(hidden, (width,), self.norm_mid, self.eps)
        gate_up = F.linear(normed, self.gate_up)
        gate, up = gate_up.chunk(2, -1)
        return hidden + F.linear(F.silu(gate) * up, self.down)


class FusedStack(Stack):
    """Llama, Mistral, Qwen2 and Qwen3 layers with joined projections; same cache, same masks."""

    padding = 0.25  # only attention runs on it; measured
    model_types = ("llama", "mistral", "qwen2", "qwen3")

    def __init__(self, adapter: Adapter):
        super().__init__(adapter)
        heads = adapter.config.num_attention_heads
        self.layers = [FusedLayer(layer, heads, adapter.kv_heads, adapter.head_dim) for layer in adapter.layers]
        self.groups = heads // adapter.kv_heads
        self.norm_weight, self.eps = adapter.model.model.norm.weight, adapter.model.model.norm.variance_epsilon
        self.table = adapter.model.model.embed_tokens.weight
        self.head_weight = adapter.model.lm_head.weight
        self.cos, self.sin = self._rotary_tables(0)

    def fresh(self) -> bool:
        return all(mine.fresh(layer) for mine, layer in zip(self.layers, self.adapter.layers, strict=True))

    def _rotary_tables(self, length: int) -> tuple[Tensor, Tensor]:
        """`[position, 1, head_dim]` tables; the sine carries the sign of the rotated half."""
        adapter = self.adapter
        positions = torch.arange(length, device=adapter.device)[None]
        probe = torch.zeros(1, 1, adapter.config.hidden_size, dtype=adapter.dtype, device=adapter.device)
        cos, sin = adapter.model.model.rotary_emb(probe, positions)
        half = cos.shape[-1] // 2
        return cos[0, :, None], torch.cat((-sin[0, :, None, :half], sin[0, :, None, half:]), -1)

    def embed(self, ids: Tensor, positions: Tensor) -> Tensor:
        return F.embedding(ids, self.table)

    def logits(self, hidden: Tensor) -> Tensor:
        normed = F.rms_norm(hidden, (hidden.shape[-1],), self.norm_weight, self.eps)
        return F.linear(normed, self.head_weight)

    def run(self, hidden, positions, cache, masks, first, last, states=None):
        if len(self.cos) < cache.capacity:  # a position is never larger than its column
            self.cos, self.sin = self._rotary_tables(cache.capacity)
        cos, sin = self.cos[positions], self.sin[positions]
        if self.groups > 1:
            masks = {w: m if m is None else m.repeat(1, 1, self.groups, 1) for w, m in masks.items()}
        packing = cache.packing
        if packing is not None:
            hidden = packing.pack(hidden)
        for index in range(first, last):
            hidden = self.layers[index](hidden, cos, sin, masks[self.windows[index]], cache, index)
            if states is not None:
                states.append(hidden if packing is None else packing.unpack(hidden))
        return hidden if packing is None else packing.unpack(hidden)


def weights_version(model: torch.nn.Module) -> tuple[object, ...]:
    """Changes whenever a weight is written or replaced."""
    weights = tuple((p.data_ptr(), -1 if p.is_inference() else p._version) for p in model.parameters())
    return (*weights, *map(type, model.modules()))


def is_plain(model: torch.nn.Module) -> bool:
    """No hook, no instance-level forward, no attachment anywhere on the model."""
    if active(model):
        return False
    return not any(m._forward_hooks or m._forward_pre_hooks or "forward" in vars(m) for m in model.modules())


def _fusable(adapter: Adapter) -> bool:
    config = adapter.config
    return (
        isinstance(adapter, LlamaLike)
        and config.model_type in FusedStack.model_types
        and getattr(config, "hidden_act", "silu") == "silu"
        and not getattr(config, "mlp_bias", False)
        and all(type(m) is torch.nn.Linear for m in adapter.layers.modules() if hasattr(m, "in_features"))
        and type(adapter.model.lm_head) is torch.nn.Linear
        and adapter.model.lm_head.bias is None
        and getattr(adapter.model.model.rotary_emb, "rope_type", "default") in STEADY_ROPE
    )


@torch.inference_mode()
def _agree(one: Stack, other: Stack) -> bool:
    """Whether two stacks give the same logits on a short probe, to the precision of the dtype."""
    adapter = one.adapter
    ids = (torch.arange(10, device=adapter.device).view(2, 5) * 7 + 1) % adapter.vocabulary
    positions = torch.arange(5, device=adapter.device).expand(2, 5).contiguous()
    allow = torch.ones(5, 5, dtype=torch.bool, device=adapter.device).tril().expand(2, 5, 5)
    both = []
    for stack in (one, other):
        hidden = stack.forward(ids, positions, TreeCache(adapter, 2, 8), 0, allow)
        both.append(stack.logits(hidden).float())
    scale = both[0].abs().max().clamp(min=1e-6)
    tolerance = 1e-4 if adapter.dtype == torch.float32 else 5e-2
    return bool(((both[0] - both[1]).abs().max() / scale) < tolerance)


def best_stack(adapter: Adapter) -> Stack:
    """The fused stack where it applies and agrees with the modules, else the modules."""
    modules = ModuleStack(adapter)
    if not (_fusable(adapter) and is_plain(adapter.model)):
        return modules
    fused = FusedStack(adapter)
    return fused if _agree(modules, fused) else modules


_STACKS: weakref.WeakKeyDictionary[torch.nn.Module, dict[bool, tuple[Any, Stack]]] = weakref.WeakKeyDictionary()


def stack_of(model: torch.nn.Module) -> Stack:
    """The best stack for the model as it is now; kept until its weights change, for the hooked and the plain model."""
    version, kept = weights_version(model), _STACKS.setdefault(model, {})
    plain = is_plain(model)
    if plain not in kept or kept[plain][0] != version or not kept[plain][1].fresh():
        kept[plain] = (version, best_stack(adapter_for(model)))
    return kept[plain][1]
