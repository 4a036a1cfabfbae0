"""Attach a policy to a model, and undo it exactly. This is the only code that changes a model.

A mechanism changes a model through three tools, each of which knows how to take its change back: `wrap` (an
instance-level `forward` around a module's own), `set_attribute` and, for transformers' tables, `set_item`. A
fingerprint of the model taken before and after proves the undo.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Callable, Iterator, MutableMapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from pertoken.core.decision import Decision
from pertoken.core.fingerprint import changed, fingerprint
from pertoken.core.policy import Policy, View
from pertoken.core.trace import Player, Trace

_ACTIVE: weakref.WeakKeyDictionary[nn.Module, list[Attachment]] = weakref.WeakKeyDictionary()
_ABSENT = object()
_PROMPT = "prompt length"


def active(model: nn.Module) -> tuple[Attachment, ...]:
    """Attachments now on the model, innermost (first attached) first."""
    return tuple(_ACTIVE.get(model, ()))


class UndoError(RuntimeError):
    """After an attachment ended the model was not what it had been."""


class Attachment:
    """One policy on one model: its tools, its per-request state, and its trace.

    state: whatever the mechanism keeps for the request that runs now; `reset()` starts a new request.
    """

    def __init__(self, model: nn.Module, policy: Policy, trace: Trace | None = None, replay: Trace | None = None):
        self.model, self.policy, self.trace = model, policy, trace
        self.enabled = True
        self.state: dict[str, Any] = {}
        self._owner: weakref.ref[Any] = weakref.ref(self)
        self._states: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
        self._player: Player | None = replay.player() if replay is not None else None
        self._undo: list[Callable[[], None]] = []
        self._observers: list[Callable[[View], None]] = []

    def wrap(self, module: nn.Module, around: Callable[..., Any]) -> None:
        """Run `around(forward, *args, **kwargs)` in place of `module.forward` while attached and enabled."""
        inner = module.forward

        @functools.wraps(inner)
        def forward(*args: Any, **kwargs: Any) -> Any:
            return around(inner, *args, **kwargs) if self.enabled else inner(*args, **kwargs)

        self.set_attribute(module, "forward", forward)

    def set_attribute(self, owner: Any, name: str, value: Any) -> None:
        """Set an attribute, remembering whether the owner had one of its own."""
        own = vars(owner)
        before = own.get(name, _ABSENT)

        def undo() -> None:
            own.pop(name, None) if before is _ABSENT else own.__setitem__(name, before)

        own[name] = value
        self._undo.append(undo)

    def set_item(self, table: MutableMapping[str, Any], key: str, value: Any) -> None:
        """Set an entry of a table, remembering whether it had one."""
        before = table.get(key, _ABSENT)

        def undo() -> None:
            table.pop(key) if before is _ABSENT else table.__setitem__(key, before)

        table[key] = value
        self._undo.append(undo)

    def on_forward(self, observer: Callable[[View], None]) -> None:
        """Call `observer` with the view of each forward before its first layer runs."""
        self._observers.append(observer)

    def announce(self, base: nn.Module, layers: int) -> None:
        """Begin a forward whenever `base` runs, the module of a transformers model that runs its `layers` layers."""

        def around(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            ids = kwargs.get("input_ids", args[0] if args else None)
            if ids is None:
                ids = kwargs["inputs_embeds"][..., 0]
            mask, cache = kwargs.get("attention_mask"), kwargs.get("past_key_values")
            past = 0 if cache is None else int(cache.get_seq_length())
            if torch.is_tensor(mask) and mask.ndim == 2:
                valid = mask[:, -ids.shape[1] :].bool()
                positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            else:
                valid = torch.ones(ids.shape[:2], dtype=torch.bool, device=ids.device)
                positions = kwargs.get("position_ids")
                if positions is None:
                    positions = torch.arange(past, past + ids.shape[1], device=ids.device)[None]
                positions = positions.expand(len(ids), -1)
            self.enter(None)
            prompt = self._prompt(valid, positions, past)
            self.begin(View(valid=valid, layers=layers, positions=positions, prompt=prompt))
            return forward(*args, **kwargs)

        self.wrap(base, around)

    def _prompt(self, valid: Tensor, positions: Tensor, past: int) -> Tensor:
        """`[batch]` tokens that were given: those of the first forward, and of more than one token that follow it
        before anything was generated (a prompt in chunks); of one that began before the attachment, all so far."""
        known, read = self.state.get(_PROMPT), positions.masked_fill(~valid, -1).amax(-1) + 1
        if not past:
            known = read
        elif known is None or len(known) != len(valid):
            known = positions[:, 0]
        elif valid.shape[1] > 1 and torch.equal(known, positions[:, 0]):
            known = read
        self.state[_PROMPT] = known
        return known

    def begin(self, view: View, cache: Any = None) -> None:
        """Announce a forward; called by whatever runs the model. cache: what the forward goes on from, where several
        requests take turns on the model; each has its own state."""
        self.enter(cache)
        if self.enabled:
            for observer in self._observers:
                observer(view)

    def decide(self, site: str, view: View) -> Decision:
        """The policy's decision at this site: replayed if replaying, recorded if recording."""
        if self._player is not None:
            device = view.valid.device
            step = self._player.take(site, Decision)
            decision = type(step.decision)(**{k: v.to(device) for k, v in step.decision.tensors().items()})
        else:
            decision = self.policy.decide(view)
        if self.trace is not None:
            self.trace.record(site, decision)
        return decision

    @property
    def taped(self) -> bool:
        """Whether decisions are recorded or replayed, so that each must be asked for."""
        return self.trace is not None or self._player is not None

    @property
    def coming(self) -> str | None:
        """The site of the decision that a replay serves next; None where nothing is replayed, or no more is left."""
        return None if self._player is None else self._player.coming

    @property
    def replaying(self) -> bool:
        """Whether decisions come from a recording."""
        return self._player is not None

    def reset(self) -> None:
        """Forget the state of the last request."""
        self.state.clear()

    def enter(self, cache: Any) -> None:
        """Go on with the state that belongs to this cache, or to no cache in particular."""
        owner, before = self if cache is None else cache, self._owner()
        if owner is before:
            return
        if before is not None:
            self._states[before] = self.state
        self.state, self._owner = self._states.pop(owner, {}), weakref.ref(owner)

    def select(self, rows: Tensor, of: int, cache: Any = None) -> None:
        """Keep these of the `of` rows of a request: in every tensor of its state that has one entry for each."""
        self.enter(cache)
        kept: dict[int, Tensor] = {}

        def part(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: part(one) for name, one in value.items()}
            if not torch.is_tensor(value) or not value.ndim or len(value) != of:
                return value
            if id(value) not in kept:
                kept[id(value)] = value[rows.to(value.device)]
            return kept[id(value)]

        self.state = part(self.state)

    @contextmanager
    def disabled(self) -> Iterator[None]:
        """The model as it was before, for the length of the block, without taking anything off."""
        before, self.enabled = self.enabled, False
        try:
            yield
        finally:
            self.enabled = before

    def undo(self) -> None:
        """Take every change back, last first."""
        while self._undo:
            self._undo.pop()()


@contextmanager
def swapped(owner: Any, name: str, value: Any) -> Iterator[None]:
    """`owner`'s own attribute `name` is `value` inside the block, and afterwards what it was or gone."""
    own = vars(owner)
    before = own.get(name, _ABSENT)
    own[name] = value
    try:
        yield
    finally:
        own.pop(name, None) if before is _ABSENT else own.__setitem__(name, before)


def check_pair(policies: list[Policy]) -> None:
    """Raise `ValueError` if two policies write the same thing."""
    for i, policy in enumerate(policies):
        for other in policies[:i]:
            if both := policy.writes & other.writes:
                raise ValueError(
                    f"{type(other).__name__} and {type(policy).__name__} both decide {', '.join(sorted(both))}; "
                    "attach one of them, or make one policy that decides it"
                )


@contextmanager
def attach(
    model: nn.Module,
    policy: Policy,
    *,
    trace: Trace | None = None,
    replay: Trace | None = None,
    training: bool = False,
) -> Iterator[Attachment]:
    """Attach `policy` to `model` for the length of the block; attachments nest.

    trace: record every decision into it; replay: serve the decisions of this trace and do not ask the policy; training:
    an optimizer may write the model's weights inside the block. Raises `ValueError` for a policy that conflicts with
    one already attached, `UndoError` if the model did not come back as it was.
    """
    if not isinstance(policy, Policy):
        raise TypeError(
            f"attach needs a policy, got {type(policy).__name__}; decoders go to generate(custom_generate=...)"
        )
    check_pair([a.policy for a in active(model)] + [policy])
    before = fingerprint(model)
    attachment = Attachment(model, policy, trace, replay)
    stack = _ACTIVE.setdefault(model, [])
    stack.append(attachment)
    try:
        policy.install(model, attachment)
        yield attachment
    finally:
        if stack and stack[-1] is not attachment:
            inner = type(stack[-1].policy).__name__
            raise UndoError(
                f"{type(policy).__name__} ended before {inner}, which was attached after it; end that first"
            )
        attachment.undo()
        stack.pop()
        if not stack:
            _ACTIVE.pop(model, None)
        left = changed(before, fingerprint(model))
        if training:
            left = [name for name in left if not name.startswith("weight ")]
        if left:
            raise UndoError(f"{type(policy).__name__} left {len(left)} change(s) on the model: {', '.join(left[:3])}")
