"""Running again: when a block has run all layers, some of its tokens run them once more, on what they would have said.

The third way into ragged depth (see `ragged`): decided behind the last layer. Tokens that go on are gathered into a
packed block, so that another pass costs what they cost and nothing for the others. In pass d + 1 a token's input is the
embedding that it expects, the mean of those of its `top` likeliest next tokens by the sum of its logits so far, and it
stands where it stood: positions are those of the token in every pass.

A query sees the keys of its own pass and of those before it; `pass_keys` says which tokens', and where they are kept.

What a token says is the sum of its passes' logits. It travels with the hidden state, as more channels of it, from
behind the last layer to the head, which gives it back; decoders cut, join and reorder it like any state. So all logits
of a block are computed, of a prompt too. transformers' `output_hidden_states` shows the channels.
"""

from __future__ import annotations

import inspect
from abc import abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from pertoken.core.attach import Attachment, swapped
from pertoken.core.budget import Budget
from pertoken.core.decision import Depth
from pertoken.core.errors import BadRequest
from pertoken.core.policy import Policy, View
from pertoken.depth.lora import Lora
from pertoken.depth.pass_keys import BOTH, FIRST, OWN, SEES, Notes, Owned, PassCache, Witness, widened
from pertoken.depth.ragged import Part
from pertoken.models.adapter import Adapter, adapter_for
from pertoken.models.kind import kind_of

SITE = "depth.passes"
AT_ONCE = 4096  # embeddings that are mixed at once


@dataclass(frozen=True)
class PassView(View):
    """What is seen after pass `passed`. passes `[batch, token]` int: passes run; asked `[batch, token]` bool: tokens
    that may run another one, n in all; states: by layers run, un-normed hidden states of this pass `[n, width]`; logits
    `[n, vocabulary]`: the sum of all passes."""

    passed: int = 1
    passes: Tensor | None = None
    asked: Tensor | None = None
    states: dict[int, Tensor] = field(default_factory=dict)
    logits: Tensor | None = None


@dataclass(frozen=True)
class PassPolicy(Policy):
    """Base of policies that let tokens run all layers again.

    budget: share of the tokens that one pass is enough for; the full budget switches the method off. passes: the most
    that any token runs. top: likeliest tokens whose embeddings are mixed. lora: low-rank weights that act in every pass
    but the first, None for none. prompt: whether the tokens of a prompt may run again too; else only the last one,
    whose guess is the first new token. sees: the passes whose keys another pass reads: "both" the first and those
    behind it, or for ablations the "first" alone (and the token's own) or its "own" alone.
    """

    budget: Budget = field(default=Budget(fraction=0.93), kw_only=True)
    passes: int = field(default=2, kw_only=True)
    top: int = field(default=100, kw_only=True)
    lora: Lora | str | None = field(default=None, kw_only=True)
    prompt: bool = field(default=True, kw_only=True)
    sees: str = field(default=BOTH, kw_only=True)
    reads: ClassVar[frozenset[str]] = frozenset({"states", "logits"})
    writes: ClassVar[frozenset[str]] = frozenset({"layers", "passes", "keys read"})
    saves: ClassVar[str] = "nothing"
    small: ClassVar[dict[str, Any]] = {"budget": Budget(fraction=0.5)}

    def __post_init__(self) -> None:
        if self.passes < 1 or self.top < 1:
            raise BadRequest(f"passes={self.passes} and top={self.top} must be at least 1")
        if self.sees not in SEES:
            raise BadRequest(f"sees={self.sees!r} is unknown; choose one of {', '.join(map(repr, SEES))}")
        if self.budget.units() not in ([], ["fraction"]):
            raise BadRequest(
                f"a budget of {self.budget} says nothing about passes; give Budget(fraction=...), the share of tokens "
                "that one pass is enough for, or Budget.full()"
            )
        if isinstance(self.lora, str):
            object.__setattr__(self, "lora", Lora.load(self.lora))

    @property
    def weights(self) -> Lora | None:
        """The low-rank weights, once they are loaded."""
        assert not isinstance(self.lora, str)
        return self.lora

    @property
    def watched(self) -> tuple[int, ...]:
        """Numbers of layers run after which hidden states are shown to `again`; 0 for the input."""
        return ()

    @abstractmethod
    def again(self, view: PassView) -> Tensor:
        """`[n]` bool: which of the tokens asked run another pass."""

    def check(self, model: Any) -> None:
        """Raise `BadRequest` if this cannot run on the model."""
        return None

    def decide(self, view: View) -> Depth:
        assert isinstance(view, PassView) and view.passes is not None and view.asked is not None
        passes = view.passes.clone()
        if bool(view.asked.any()):
            passes[view.asked] += self.again(view).to(passes.dtype)
        unrolled = torch.arange(self.passes * view.layers, device=passes.device)
        return Depth(valid=view.valid, layers=unrolled < passes[..., None] * view.layers)

    def install(self, model: Any, attachment: Attachment) -> None:
        adapter = adapter_for(model)
        if kind_of(model) != "causal":
            raise BadRequest(
                f"{type(self).__name__} thinks again about the next token, and this model reads in both directions and "
                "fills in a canvas; give a causal model"
            )
        if self.weights is not None:
            self.weights.check(model)
        self.check(model)
        Passes(self, adapter, attachment).install()


@dataclass
class Running:
    """A forward under way. given: by layer, what it was given beside its input; read: the keys and values that it read;
    inputs: hidden states by layers run, those that are watched."""

    view: View
    given: dict[int, dict[str, Any]] = field(default_factory=dict)
    read: dict[int, tuple[Tensor, Tensor]] = field(default_factory=dict)
    inputs: dict[int, Tensor] = field(default_factory=dict)


class Passes:
    """A policy of passes at work on one model."""

    def __init__(self, policy: PassPolicy, adapter: Adapter, attachment: Attachment):
        self.policy, self.adapter, self.attachment = policy, adapter, attachment
        self.depth, self.width = adapter.depth, adapter.config.hidden_size
        self.layers = [layer.forward for layer in adapter.layers]
        self.names = [list(inspect.signature(forward).parameters)[1:] for forward in self.layers]
        self.norm, self.head = adapter.final_norm.forward, adapter.model.lm_head.forward

    def install(self) -> None:
        attachment, adapter, lora = self.attachment, self.adapter, self.policy.weights
        if self.policy.budget.is_full and not attachment.replaying:
            return
        if lora is not None:
            lora.to(adapter.device)
            lora.install(adapter.model, attachment)
            attachment.set_attribute(lora, "gate", 0.0)
        attachment.on_forward(self.begin)
        attachment.announce(adapter.base, self.depth)
        for index, layer in enumerate(adapter.layers):
            attachment.set_attribute(layer, "forward", self.around_layer(index))
        if adapter.entry is not None:
            attachment.wrap(adapter.entry, self.around_entry)
        attachment.wrap(adapter.final_norm, self.around_norm)
        attachment.wrap(adapter.model.lm_head, self.around_head)

    def begin(self, view: View) -> None:
        self.attachment.state[SITE] = Running(view)

    def around_entry(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Gives states their channels where the last layer would be too late for it."""
        out = forward(hidden)
        more = out.new_zeros(*out.shape[:-1], self.adapter.vocabulary)
        return torch.cat([out, more], -1) if SITE in self.attachment.state else out

    def around_layer(self, index: int) -> Callable[..., Any]:
        forward, names, attachment = self.layers[index], self.names[index], self.attachment

        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            now: Running | None = attachment.state.get(SITE)
            if not attachment.enabled or now is None:
                return forward(hidden, *args, **kwargs)
            hidden = hidden[..., : self.width].contiguous()
            kwargs = dict(zip(names, args, strict=False)) | kwargs
            witness = Witness(kwargs.get("past_key_values"))
            if index in self.policy.watched:
                now.inputs[index] = hidden
            out = forward(hidden, **(kwargs | {"past_key_values": witness}))
            now.given[index], now.read[index] = kwargs, (witness.keys, witness.values)
            return self.think(now, out) if index == self.depth - 1 else out

        return run

    def around_norm(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        if hidden.shape[-1] == self.width:
            return forward(hidden)
        return torch.cat([forward(hidden[..., : self.width].contiguous()), hidden[..., self.width :]], -1)

    def around_head(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        return forward(hidden) if hidden.shape[-1] == self.width else hidden[..., self.width :]

    def think(self, now: Running, out: Tensor) -> Tensor:
        """The last layer's output `[batch, token, width]` after all passes, and the sum of their logits."""
        view, policy = now.view, self.policy
        logits = self.head(self.norm(out))
        cache, state = now.given[self.depth - 1].get("past_key_values"), self.attachment.state
        notes = Notes(cache, state, now.read, out, self.depth, policy.passes)
        passes, asked = torch.ones_like(view.valid, dtype=torch.long), view.valid
        if not policy.prompt and view.prompt is not None and view.positions is not None:
            asked = asked & (view.positions >= view.prompt[:, None] - 1)
        states = dict(now.inputs) | ({self.depth: out} if self.depth in policy.watched else {})
        for passed in range(1, policy.passes):
            shown = {ran: chosen_of(state, asked) for ran, state in states.items()}
            seen = PassView(
                *(view.valid, self.depth, {}, view.tree, view.positions, view.prompt),
                *(passed, passes, asked, shown, chosen_of(logits, asked)),
            )
            decision = self.attachment.decide(f"{SITE}.{passed}", seen)
            assert isinstance(decision, Depth)
            passes = decision.layers.sum(-1) // self.depth
            asked = (passes > passed) & view.valid
            if not bool(asked.any()):
                break
            part = Part.of(asked)
            before = part.take(logits)
            hidden, states = self.again(now, part, before, notes, passed)
            total = (before.float() + self.head(self.norm(hidden)).float()).to(logits.dtype)
            real = part.real[..., None]
            logits = part.put(logits, torch.where(real, total, before))
            out = part.put(out, torch.where(real, hidden, part.take(out)))
            states = {ran: part.put(out.new_zeros(out.shape), state) for ran, state in states.items()}
        notes.write()
        for kept in (now.given, now.read, now.inputs):  # or they would outlive the cache's own
            kept.clear()
        return torch.cat([out, logits], -1)

    def again(
        self, now: Running, part: Part, logits: Tensor, notes: Notes, passed: int
    ) -> tuple[Tensor, dict[int, Tensor]]:
        """Another pass of a part: its last hidden states `[row, slot, width]`, and those that are watched."""
        sees = self.policy.sees
        of = {BOTH: slice(0, passed), FIRST: slice(0, 0), OWN: slice(passed - 1, passed)}[sees]
        owned = Owned.of(part.rows_of(notes.all)[..., of])
        columns = notes.start + part.columns
        total = notes.start + part.shape[1]
        masks: dict[Any, Tensor | None] = {}
        hidden, states, new = self.expected(logits, now, part), {}, []
        with self.low_rank():
            for index, forward in enumerate(self.layers):
                if index in self.policy.watched:
                    states[index] = hidden
                given, cut = self.given(now, index)
                keys = [part.rows_of(x) for x in notes.first(index)]
                key = (id(given.get("attention_mask")), cut, keys[0].shape[2])
                if key not in masks:
                    mask = given.get("attention_mask")
                    if cut is not None:
                        mask = notes.within(mask, given["position_ids"], cut)
                    seen = (columns, part.real), (owned.columns, owned.real)
                    masks[key] = widened(part, mask, hidden, keys[0].shape[2], total, seen, sees)
                first = [] if sees == OWN else [(keys[0], keys[1])]
                cache = PassCache([*first, *notes.pooled(owned, index)])
                rest = {name: value for name, value in given.items() if name != "attention_mask"}
                mine = part.given(rest) | {"attention_mask": masks[key], "past_key_values": cache}
                hidden = forward(hidden, **mine)
                new.append(torch.stack(cache.new))
        if self.depth in self.policy.watched:
            states[self.depth] = hidden
        notes.add(part, torch.stack(new), passed)
        return hidden, states

    def given(self, now: Running, index: int) -> tuple[dict[str, Any], int | None]:
        """What layer `index` was given in this forward. Where it ran in an earlier one (drafts through the first
        layers): what a layer of the same window was given, or one without, and the window to cut its mask to."""
        if index in now.given:
            return now.given[index], None
        window = self.adapter.window(index)
        for other, given in now.given.items():
            if self.adapter.window(other) == window:
                return given, None
        for other, given in now.given.items():
            if self.adapter.window(other) is None:
                return given, window
        raise BadRequest(
            f"layer {index} reads a window of {window} tokens and did not run in this forward, and no other layer that "
            "did tells what it may read; give a decoder that does not draft through the model's first layers"
        )

    def expected(self, logits: Tensor, now: Running, part: Part) -> Tensor:
        """Mean embedding `[row, slot, width]` of the likeliest tokens, logits `[row, slot, vocabulary]`."""
        best, tokens = logits.float().topk(min(self.policy.top, logits.shape[-1]), -1)
        weights, view = best.softmax(-1), now.view
        positions = torch.zeros_like(part.columns) if view.positions is None else part.take(view.positions)
        found, step = None, max(AT_ONCE // part.columns.numel(), 1)
        for ids, share in zip(tokens.split(step, -1), weights.split(step, -1), strict=True):
            places = positions[..., None].expand_as(ids).flatten(1)
            rows = self.adapter.embed(ids.flatten(1), places)[..., : self.width].unflatten(1, ids.shape[1:])
            mixed = (share[..., None] * rows.float()).sum(-2)
            found = mixed if found is None else found + mixed
        assert found is not None
        return found.to(logits.dtype)

    @contextmanager
    def low_rank(self) -> Iterator[None]:
        """The low-rank weights act inside the block."""
        if self.policy.weights is None:
            yield
            return
        with swapped(self.policy.weights, "gate", 1.0):
            yield


def chosen_of(x: Tensor, chosen: Tensor) -> Tensor:
    """`[batch, token, ...]` -> `[n, ...]`, without a copy if all are chosen."""
    return x.flatten(0, 1) if bool(chosen.all()) else x[chosen]
