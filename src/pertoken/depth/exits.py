"""Leaving early: after a layer a token may go straight to the head, as the hidden state that it has there tells.

The other way into ragged depth (see `ragged`): decided between the layers and not before the forward. Where a token
left travels with it, as one more channel of its hidden state, so that nothing is kept beside the tensors that a decoder
cuts, joins and reorders: 0 while it goes on, l once it has left with l layers run, -l if the text stops with it. The
channel is there from the first layer to the head, which reads it: a token that stops gets all probability on the end of
text, and a token that left may have a head of its own. transformers' `output_hidden_states` shows the channel.

Keys are "carried": a layer holds, for a token that left before it, the keys and values of the state that it left with.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from pertoken.core.attach import Attachment
from pertoken.core.budget import Budget
from pertoken.core.decision import Exit
from pertoken.core.errors import BadRequest
from pertoken.core.policy import Policy, View
from pertoken.depth.ragged import CARRIED, RaggedLayer, Runs
from pertoken.models.adapter import Adapter, adapter_for

SITE = "depth.exits"


@dataclass(frozen=True)
class ExitView(View):
    """What is seen after `ran` layers. states `[batch, token, width]`, un-normed; left `[batch, token]`: the channel;
    free `[batch, token]` bool: which tokens may leave."""

    ran: int = 0
    states: Tensor | None = None
    left: Tensor | None = None
    free: Tensor | None = None


@dataclass(frozen=True)
class ExitPolicy(Policy):
    """Base of policies that let tokens leave early.

    budget: the most layers that any token runs; the full budget switches the method off. prompt: whether the tokens of
    a prompt may leave too; else they run all layers, and so does the first token that is generated, which the prompt
    gives.
    """

    budget: Budget = field(default=Budget(fraction=1.0), kw_only=True)
    prompt: bool = field(default=False, kw_only=True)
    reads: ClassVar[frozenset[str]] = frozenset({"states"})
    writes: ClassVar[frozenset[str]] = frozenset({"layers"})
    small: ClassVar[dict[str, Any]] = {"budget": Budget(fraction=0.5), "prompt": True}

    @abstractmethod
    def asks(self, ran: int, layers: int) -> bool:
        """Whether tokens may leave of themselves with `ran` of `layers` layers run."""

    @abstractmethod
    def after(self, view: ExitView) -> Tensor:
        """`[batch, token]` int: 1 for tokens that leave now, -1 where the text stops, 0 for those that go on."""

    def check(self, model: Any) -> None:
        """Raise `BadRequest` if this cannot run on the model."""
        return None

    def heads(self) -> dict[int, nn.Module]:
        """Heads of their own for tokens that leave, by the layers they ran: un-normed states to logits. The others go
        through the model's own norm and head."""
        return {}

    @property
    def stops(self) -> bool:
        """Whether it may stop a text."""
        return False

    def most(self, layers: int) -> int:
        """The most layers that a token runs."""
        return max(self.budget.count(layers), 1)

    def decide(self, view: View) -> Exit:
        assert isinstance(view, ExitView) and view.left is not None and view.free is not None
        leaves = torch.zeros_like(view.left)
        if self.asks(view.ran, view.layers):
            leaves = self.after(view)
        if view.ran >= self.most(view.layers):
            leaves = torch.where(leaves == 0, torch.ones_like(leaves), leaves)
        new = torch.where(view.free & (leaves != 0), leaves * view.ran, view.layers)
        return Exit(valid=view.valid, left=torch.where(view.left != 0, view.left, new))

    def install(self, model: Any, attachment: Attachment) -> None:
        adapter = adapter_for(model)
        self.check(model)
        Exits(self, adapter, attachment).install()


class Exits:
    """An exit policy at work on one model."""

    def __init__(self, policy: ExitPolicy, adapter: Adapter, attachment: Attachment):
        self.policy, self.adapter, self.attachment = policy, adapter, attachment
        self.depth, self.width = adapter.depth, adapter.config.hidden_size
        most = self.depth if policy.budget.is_full else policy.most(self.depth)
        asked = {ran for ran in range(1, most) if policy.asks(ran, self.depth)} if not policy.budget.is_full else set()
        self.asked = asked | ({most} if most < self.depth else set())
        self.heads = policy.heads()
        self.end = end_of_text(adapter.model) if policy.stops else None

    def install(self) -> None:
        attachment, adapter = self.attachment, self.adapter
        if not self.asked and not attachment.replaying:
            return
        attachment.on_forward(self.begin)
        attachment.announce(adapter.base, self.depth)
        for index, layer in enumerate(adapter.layers):
            attachment.set_attribute(layer, "forward", self.around_layer(index, layer.forward))
        if adapter.entry is not None:
            attachment.wrap(adapter.entry, self.around_entry)
        attachment.wrap(adapter.final_norm, self.around_norm)
        attachment.wrap(adapter.model.lm_head, self.around_head)

    def begin(self, view: View) -> None:
        self.attachment.state[SITE] = view

    def around_entry(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """Gives states their channel where the first layer would be too late for it."""
        out = forward(hidden)
        return torch.cat([out, out.new_zeros(*out.shape[:-1], 1)], -1) if SITE in self.attachment.state else out

    def around_layer(self, index: int, forward: Callable[..., Any]) -> Callable[..., Any]:
        layer, attachment = RaggedLayer(self.adapter, index, forward, CARRIED), self.attachment

        def run(hidden: Tensor, *args: Any, **kwargs: Any) -> Any:
            view = attachment.state.get(SITE)
            if not attachment.enabled or view is None:
                return forward(hidden, *args, **kwargs)
            if hidden.shape[-1] == self.width:
                left, out = hidden.new_zeros(hidden.shape[:-1]), forward(hidden, *args, **kwargs)
            else:
                left = hidden[..., -1]
                out = layer(still(left == 0, view.valid), view, hidden[..., :-1].contiguous(), args, kwargs)
            if self.asks(index + 1):
                left = self.leave(index + 1, out, left, view)
            return torch.cat([out, left[..., None]], -1)

        return run

    def asks(self, ran: int) -> bool:
        """Whether a decision is made after so many layers: a recording says where one was."""
        return self.attachment.coming == f"{SITE}.{ran}" if self.attachment.replaying else ran in self.asked

    def leave(self, ran: int, out: Tensor, left: Tensor, view: View) -> Tensor:
        """The channel after a decision."""
        free = view.valid
        if not self.policy.prompt and view.prompt is not None and view.positions is not None:
            free = free & (view.positions >= view.prompt[:, None])
        seen = ExitView(view.valid, self.depth, {}, view.tree, view.positions, view.prompt, ran, out, left.long(), free)
        decision = self.attachment.decide(f"{SITE}.{ran}", seen)
        assert isinstance(decision, Exit)
        gone = (decision.left.abs() <= ran) & view.valid
        return torch.where(gone, decision.left, 0).to(left.dtype)

    def around_norm(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        """The final norm leaves alone the channel, and the states of tokens that have a head of their own."""
        if hidden.shape[-1] == self.width:
            return forward(hidden)
        states, left = hidden[..., :-1], hidden[..., -1:]
        normed = forward(states.contiguous())
        for ran in self.heads:
            normed = torch.where(left == ran, states, normed)
        return torch.cat([normed, left], -1)

    def around_head(self, forward: Callable[[Tensor], Tensor], hidden: Tensor) -> Tensor:
        if hidden.shape[-1] == self.width:
            return forward(hidden)
        states, left = hidden[..., :-1].contiguous(), hidden[..., -1]
        own = {ran: left == ran for ran in self.heads}
        own = {ran: which for ran, which in own.items() if bool(which.any())}
        if own:
            logits = self._by_head(forward, states, own)
        else:
            logits = forward(states)
        if self.end is not None:
            stopped = (left < 0)[..., None]
            certain = torch.full_like(logits[..., :1, :] if logits.ndim > 1 else logits, torch.finfo(logits.dtype).min)
            certain[..., self.end] = 0
            logits = torch.where(stopped, certain, logits)
        return logits

    def _by_head(self, forward: Callable[[Tensor], Tensor], states: Tensor, own: dict[int, Tensor]) -> Tensor:
        """Logits of tokens of which some have heads of their own; each is computed by one head alone."""
        rest = ~torch.stack(list(own.values())).any(0)
        parts = {ran: self.heads[ran](states[which].to(weight_of(self.heads[ran]))) for ran, which in own.items()}
        if bool(rest.any()):
            parts[0], own = forward(states[rest]), own | {0: rest}
        some = next(iter(parts.values()))
        logits = states.new_zeros(*states.shape[:-1], some.shape[-1])
        for ran, part in parts.items():
            logits[own[ran]] = part.to(logits.dtype)
        return logits


def still(going: Tensor, valid: Tensor) -> Runs:
    """Which tokens of a block go on."""
    runs = going & valid
    if torch.equal(runs, valid):
        return True
    return bool(runs.any()) and runs


def weight_of(module: nn.Module) -> torch.dtype:
    return next(module.parameters()).dtype


def end_of_text(model: Any) -> int:
    """The token that ends a text; raises `BadRequest` where there is none."""
    for config in (getattr(model, "generation_config", None), model.config):
        end = getattr(config, "eos_token_id", None)
        if end is not None:
            return int(end[0] if isinstance(end, (list, tuple)) else end)
    raise BadRequest(
        f"{type(model).__name__} has no end-of-text token, so no text can be stopped; set "
        "generation_config.eos_token_id, or switch stopping off"
    )
