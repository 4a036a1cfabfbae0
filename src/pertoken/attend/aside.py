"""The keys that a decoding step reads, set aside: the next step, which reads nearly the same ones, gathers what is new.

Gathering thousands of single keys from a long context costs more time on a CPU than attending over them. So their
copies stay, in slots without order; keys that are no longer read make place for those that are now. Where the keys lie
in host memory the copies are all that is on the model's device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from pertoken.attend.history import Mark
from pertoken.attend.key_view import KeyView
from pertoken.ops.selected_attention.torch import rows_of

WORTH = 2**21  # numbers of keys and values from which it saves time: for a window, half of a step at 5 * 2**20
SLACK = 8  # an eighth more slots than are needed, as budgets that are a share of the text grow with it


@dataclass(frozen=True)
class Aside:
    """keys and values `[batch, kv_heads, slot, dim]`; columns `[batch, groups, slot]`: where each was copied from, -1
    for none; read `[batch, groups, key]` bool; mark: of the step that read them; fetched: columns copied so far, of all
    rows and groups."""

    keys: Tensor
    values: Tensor
    columns: Tensor
    read: Tensor
    mark: Mark
    fetched: int = 0

    @classmethod
    def of(cls, view: KeyView, index: Tensor, device: torch.device | None = None) -> Aside | None:
        """What the next token of each row reads, which are the columns `index` `[batch, groups, 1, chosen]`, each once
        and -1 for none. None where they are better gathered: elsewhere than in decoding on a CPU, or if few. device: of
        the model, if the keys are offloaded from it: then what is decoded always reads from here."""
        last: Aside | None = view.state.pop("aside", None)
        fetched = 0 if last is None else last.fetched
        keys, values = view.keys, view.values
        if not view.runs.decoding or (device is None and not worthwhile(keys, values, index)):
            return None
        index = index[:, :, 0]
        width, count = index.shape[-1], keys.shape[2]
        read = marked(index, index >= 0, count)
        frozen = last is not None and last.keys.is_inference() and not torch.is_inference_mode_enabled()
        if last is None or frozen or not last.fits(index):
            slots = width + width // SLACK
            last = cls(
                keys.new_zeros(*keys.shape[:2], slots, keys.shape[3], device=device),
                values.new_zeros(*values.shape[:2], slots, values.shape[3], device=device),
                index.new_full((*index.shape[:2], slots), -1),
                read,
                Mark.now(view),
            )
        columns = torch.where(last.mark.holds(view)[:, None, None], last.columns, -1)
        stays = read.gather(2, columns.clamp(min=0)) & (columns >= 0)
        held = marked(columns, stays, count)
        made = cls(last.keys, last.values, torch.where(stays, columns, -1), read, Mark.now(view))
        new = made.fetch(view, index, ~stays, (index >= 0) & ~held.gather(2, index.clamp(min=0)))
        view.state["aside"] = replace(made, fetched=fetched + new)
        return made

    @property
    def bytes(self) -> int:
        """Of the copies."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values))

    def fits(self, index: Tensor) -> bool:
        """Whether the columns `[batch, groups, chosen]` have place here, and do not leave most of it empty."""
        return (
            index.shape[:2] == self.columns.shape[:2] and index.shape[2] <= self.columns.shape[2] <= 2 * index.shape[2]
        )

    def fetch(self, view: KeyView, index: Tensor, free: Tensor, new: Tensor) -> int:
        """Copy the columns of `index` that are `new` into slots that are `free`, all `[batch, groups, slot]`; returns
        how many."""
        free = free & (free.cumsum(-1) <= new.sum(-1, keepdim=True))  # as many as there are new ones, in each group
        (row, group, slot), column = free.nonzero().unbind(1), index[new]
        self.columns[row, group, slot] = column
        heads, row, slot, column = group[:, None], row[:, None], slot[:, None], column[:, None]
        if index.shape[1] == 1:
            heads = torch.arange(view.keys.shape[1], device=index.device)
        for aside, all_of in ((self.keys, view.keys), (self.values, view.values)):
            where = ((row * aside.shape[1] + heads) * aside.shape[2] + slot).flatten().to(aside.device)
            aside.view(-1, aside.shape[3])[where] = rows_of(all_of, row, heads, column).flatten(0, 1).to(aside.device)
        return len(column)

    def places(self) -> Tensor:
        """`[batch, groups, slot]` the place of each among those that are read, in the order of the text."""
        return (self.read.cumsum(-1).gather(2, self.columns.clamp(min=0)) - 1).clamp(min=0)


def worthwhile(keys: Tensor, values: Tensor, index: Tensor) -> bool:
    """Whether keys and values that are not offloaded are better set aside than gathered anew."""
    numbers = len(keys) * keys.shape[1] * index.shape[-1] * (keys.shape[3] + values.shape[3])
    tracked = torch.is_grad_enabled() and (keys.requires_grad or values.requires_grad)
    return keys.device.type == "cpu" and not tracked and numbers >= WORTH


def marked(columns: Tensor, those: Tensor, count: int) -> Tensor:
    """`[batch, groups, count]` bool: which columns stand in `columns` `[batch, groups, slot]` where `those` is true."""
    found = those.new_zeros(*columns.shape[:2], count + 1)
    return found.scatter_(2, torch.where(those, columns, count), True)[:, :, :count]
