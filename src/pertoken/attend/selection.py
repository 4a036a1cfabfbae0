"""Selection attention: each run of queries reads only the keys that a policy chooses; no others are touched.

The mechanism of this folder. While a policy is attached, the model's full-attention layers run one attention function
under a private name, which is set on this model's configuration only. It sees queries, keys and a `Sight` of what the
mask allows, asks the policy for a `Select`, and attends over the chosen keys. Layers with a sliding window are left as
they are, and so is a forward in which nothing would be left out: it runs the model's own attention.

Queries of a prefill share keys in runs, which begin at each row's first real token; a token that is being decoded, and
every node of a decoder's token tree, chooses for itself. What is chosen is a function of the row alone, however it is
padded; chunks of a prefill give what the whole gives if they are multiples of the run.

Positions: with `compact`, keys are cached as they are before rotation, and are turned, with the queries, by their
places among the keys that are read. Distances are then never longer than what is read, so that a model reads contexts
longer than any it was trained on. Otherwise keys keep the positions that the model gave them.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pertoken.attend.sight import Causal, Kept, Masked, Runs, Sight
from pertoken.core.attach import Attachment
from pertoken.core.budget import Budget
from pertoken.core.decision import Select
from pertoken.core.errors import BadRequest
from pertoken.core.policy import Policy, View
from pertoken.models.adapter import Adapter, adapter_for
from pertoken.models.attention import attention_configs, own_attention
from pertoken.models.kind import kind_of
from pertoken.models.rotary import Rotary
from pertoken.ops.selected_attention import selected_attention

SITE = "attend.keys"
_numbers = itertools.count()


@dataclass(frozen=True)
class KeyView(View):
    """What a policy sees at one layer of one forward.

    queries `[batch, heads, run, query, dim]`, zeros where there is no query; keys and values `[batch, kv_heads, key,
    dim]`; runs and kept: see `attend.sight`; scale: of the scores; state: what the policy keeps for this layer and
    request; rotary: turns queries and keys, which are not turned yet; None where they are.
    """

    layer: int = 0
    queries: Tensor = field(default_factory=lambda: torch.empty(0))
    keys: Tensor = field(default_factory=lambda: torch.empty(0))
    values: Tensor = field(default_factory=lambda: torch.empty(0))
    runs: Runs = field(default=None)  # type: ignore[assignment]
    kept: Kept = field(default=None)  # type: ignore[assignment]
    scale: float = 1.0
    state: dict[str, Any] = field(default_factory=dict)
    rotary: Rotary | None = None


@dataclass(frozen=True)
class KeyPolicy(Policy):
    """Base of the policies that choose which keys are read.

    budget: keys chosen for each run, in tokens or as a share of those to choose from, besides the first `sinks` and the
    last `recent` that it sees, which are always read, as is all of a run by itself; run: queries of a prefill that
    share their keys.
    """

    budget: Budget = Budget(tokens=2048)
    sinks: int = 128
    recent: int = 512
    run: int = 512
    reads: ClassVar[frozenset[str]] = frozenset({"queries", "keys"})
    writes: ClassVar[frozenset[str]] = frozenset({"keys read"})
    compact: ClassVar[bool] = False
    small: ClassVar[dict[str, Any]] = {"budget": Budget(fraction=0.5), "sinks": 1, "recent": 2, "run": 2}

    def __post_init__(self) -> None:
        if wrong := set(self.budget.units()) - {"tokens", "fraction"}:
            raise BadRequest(
                f"{type(self).__name__} chooses keys: budget {wrong.pop()}={self.budget} means nothing to it; give "
                "Budget(tokens=...) or Budget(fraction=...)"
            )
        for name, least in (("sinks", 0), ("recent", 0), ("run", 1)):
            if getattr(self, name) < least:
                raise BadRequest(f"{name}={getattr(self, name)} is too small; give {least} or more tokens")

    @abstractmethod
    def weigh(self, view: KeyView, index: Tensor) -> tuple[Tensor | None, Tensor | None]:
        """Of the chosen columns `index` `[batch, group, run, chosen]`: which each query reads, besides what the mask
        says, `[batch, group, run, query, chosen]` bool, and what is added to its scores, of that shape or with one
        query for all; None for all of them, and for nothing."""

    @abstractmethod
    def choose(self, view: KeyView, most: int, limits: Tensor) -> Tensor:
        """`[batch, group, run, most]` columns out of `view.kept.candidates`, the best first and so many of them as
        `limits` `[batch, run]` says; what stands behind is not looked at."""

    def decide(self, view: View) -> Select:
        assert isinstance(view, KeyView)
        kept, runs = view.kept, view.runs
        limits = self.limits(kept)
        most = min(self.budget.count(kept.most), kept.most)
        base = kept.index[:, None]
        if most:
            best = self.choose(view, most, limits)
            slots = torch.arange(most, device=best.device)
            best = torch.where(slots < limits[:, None, :, None], best, -1)
            base = torch.cat([base.expand(-1, best.shape[1], -1, -1), best], -1)
        if self.compact:
            beyond = runs.sight.keys
            ordered = torch.where(base < 0, beyond, base).sort(-1).values
            base = torch.where(ordered == beyond, -1, ordered)
        return Select(view.valid, base, torch.full((len(base),), runs.length, device=base.device))

    def limits(self, kept: Kept) -> Tensor:
        """`[batch, run]` how many of the candidates are read."""
        if self.budget.fraction is not None:
            return torch.ceil(kept.counts * self.budget.fraction - 1e-6).long()
        return kept.counts.clamp(max=self.budget.count(kept.most))

    def leaves_out(self, kept: Kept) -> bool:
        """Whether any run would read less than it sees."""
        return self.budget.count(kept.most) < kept.most

    def install(self, model: Any, attachment: Attachment) -> None:
        if kind_of(model) != "causal":
            raise BadRequest(
                f"{type(self).__name__} chooses among the keys before a token, and {type(model).__name__} reads in "
                "both directions; attach it to a causal language model"
            )
        adapter = adapter_for(model)
        if all(adapter.window(layer) is not None for layer in range(adapter.depth)):
            raise BadRequest(
                f"every layer of {type(model).__name__} reads a sliding window of {adapter.window(0)} tokens, and such "
                "layers are left as they are; attach a policy that chooses keys to a model with full attention"
            )
        if not self.budget.is_full or attachment.taped:
            Reading(adapter, self, attachment).install()


@dataclass(frozen=True)
class Selection(KeyPolicy):
    """Base of policies that score every key and read the best."""

    @abstractmethod
    def score(self, view: KeyView) -> Tensor:
        """`[batch, group, run, key]` finite; one group for all heads or one per key head, one run for all or each."""

    def choose(self, view: KeyView, most: int, limits: Tensor) -> Tensor:
        scores = self.score(view)
        return scores.masked_fill(~view.kept.candidates[:, None], -torch.inf).topk(most, -1).indices

    def weigh(self, view: KeyView, index: Tensor) -> tuple[None, None]:
        return None, None


class Reading:
    """One policy's attention function on one model, and the mask function beside it."""

    def __init__(self, adapter: Adapter, policy: KeyPolicy, attachment: Attachment):
        self.adapter, self.policy, self.attachment = adapter, policy, attachment
        self.usual = adapter.config._attn_implementation
        self.name = f"pertoken_selection_{next(_numbers)}"
        self.layers = {i for i in range(adapter.depth) if adapter.window(i) is None}
        self.rotary = Rotary(adapter) if policy.compact else None
        self.tree, self.real, self.sights = False, None, {}

    def install(self) -> None:
        from transformers.masking_utils import AttentionMaskInterface
        from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

        attachment = self.attachment
        attachment.set_item(ALL_ATTENTION_FUNCTIONS, self.name, self.attention)
        attachment.set_item(AttentionMaskInterface._global_mapping, self.name, self.mask)
        for config in attention_configs(self.adapter):
            attachment.set_attribute(config, "_attn_implementation_internal", self.name)
        attachment.on_forward(self.begin)
        attachment.announce(self.adapter.base, self.adapter.depth)
        if self.rotary is not None:
            for index in self.layers:
                attachment.wrap(self.adapter.attention(index), self.rotary.unturned)

    def begin(self, view: View) -> None:
        self.tree, self.real, self.sights = view.tree, view.valid, {}

    def mask(self, **given: Any) -> Any:
        """In place of the model's mask function: a `Sight` where queries see what is before them, else its mask."""
        from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, causal_mask_function, prepare_padding_mask

        plain = lambda: ALL_MASK_ATTENTION_FUNCTIONS[self.usual](**given)  # noqa: E731
        if not self.attachment.enabled or given["mask_function"] is not causal_mask_function or given["kv_offset"]:
            return plain()
        keys, queries, first = given["kv_length"], given["q_length"], int(given["q_offset"])
        valid = prepare_padding_mask(given["attention_mask"], keys, 0)
        if valid is None:
            valid = torch.ones(given["batch_size"], keys, dtype=torch.bool, device=given["device"])
        return Causal(valid[:, :keys].bool(), first, queries, plain)

    def sight(self, mask: Any, query: Tensor, key: Tensor) -> Sight:
        """What this forward may read; one object for all of its layers, as what is worked out is kept in it."""
        if isinstance(mask, Sight):
            return mask
        if id(mask) not in self.sights:
            rows, queries, keys = query.shape[0], query.shape[2], key.shape[2]
            if mask is None:
                made = torch.ones(rows, 1, queries, keys, dtype=torch.bool, device=key.device)
            else:
                made = mask[..., :keys].expand(rows, -1, -1, -1)
            real = self.real if self.real is not None and self.real.shape == (rows, queries) else None
            sight = Masked(made, real)
            sight._plain = lambda: mask
            self.sights[id(mask)] = sight
        return self.sights[id(mask)]

    def attention(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, **given: Any
    ) -> tuple[Tensor, Any]:
        """As every attention function of transformers: output `[batch, query, heads, dim]` and no weights."""
        layer, own = module.layer_idx, own_attention(module, self.usual)
        if not self.attachment.enabled or layer not in self.layers:
            return own(module, query, key, value, mask.plain if isinstance(mask, Sight) else mask, **given)
        sight = self.sight(mask, query, key)
        runs = sight.runs(1 if self.tree else self.policy.run)
        kept = runs.kept(self.policy.sinks, self.policy.recent)
        whole = not self.attachment.taped and not self.policy.leaves_out(kept)
        if whole and self.rotary is None:
            return own(module, query, key, value, sight.plain, **given)
        if whole and self.rotary is not None and isinstance(sight, Causal):
            query, key = self.turned(self.rotary, query, key, sight)
            return own(module, query, key, value, sight.plain, **given)
        scale = given.get("scaling")
        view = KeyView(
            valid=sight.real,
            layers=self.adapter.depth,
            layer=layer,
            queries=runs.split(query),
            keys=key,
            values=value,
            runs=runs,
            kept=kept,
            scale=query.shape[-1] ** -0.5 if scale is None else scale,
            state=self.state(layer, sight),
            rotary=self.rotary,
        )
        decision = self.attachment.decide(f"{SITE}.{layer}", view)
        assert isinstance(decision, Select)
        out = self.read(view, decision, given.get("softcap") if self.usual == "eager" else None)
        return runs.join(out).transpose(1, 2).contiguous(), None

    @staticmethod
    def turned(rotary: Rotary, query: Tensor, key: Tensor, sight: Causal) -> tuple[Tensor, Tensor]:
        """Queries and keys `[batch, heads, token, dim]` turned by their places among the real keys of their row."""
        places = (sight.valid.int().cumsum(-1) - 1).clamp(min=0)[:, None]
        return rotary.turn(query, places[..., sight.first : sight.first + sight.queries]), rotary.turn(key, places)

    def state(self, layer: int, sight: Sight) -> dict[str, Any]:
        """This layer's part of the attachment's state, emptied when a forward has nothing before it."""
        states = self.attachment.state.setdefault(SITE, {})
        if sight.keys == sight.queries or (isinstance(sight, Causal) and sight.first == 0):
            states[layer] = {}
        return states.setdefault(layer, {})

    def read(self, view: KeyView, decision: Select, softcap: float | None) -> Tensor:
        """`[batch, heads, run, query, dim]` attention over the decided keys."""
        runs, index = view.runs, decision.index
        reads = runs.sight.reads(runs.slots, index)
        more, bias = self.policy.weigh(view, index)
        queries, turned = view.queries, None
        if self.rotary is not None:
            queries = self.rotary.turn(queries, (reads.sum(-1) - 1).clamp(min=0))
            turned = self.rotary.table(index.shape[-1])
        if more is not None:
            reads = reads & more
        return selected_attention(
            queries, view.keys, view.values, index.clamp(min=0), reads, view.scale, bias, softcap, turned
        )
