"""Many questions about one picture or clip in one row: each sees what is shown and itself, as if it were alone."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.zoo.words import END, NUMBER, PAD, encoded

UNLEARNT = -100
Turn = tuple[str, str]


@dataclass(frozen=True)
class Turns:
    """ids `[row, token]` of the texts behind what is shown; labels, of that shape: the token after each where it is an
    answer's, else `UNLEARNT`; positions `[row, all]`, allowed `[row, 1, all, all]` bool: of what is shown and the
    texts."""

    ids: Tensor
    labels: Tensor
    positions: Tensor
    allowed: Tensor

    def loss(self, logits: Tensor) -> Tensor:
        """Mean nats per token of the answers. logits `[row, token or all, word]`."""
        own = logits[:, -self.ids.shape[1] :]
        return F.cross_entropy(own.flatten(0, 1).float(), self.labels.flatten(), ignore_index=UNLEARNT)


def turns(rows: list[list[Turn]], shown: Tensor) -> Turns:
    """shown `[row, place]` bool: places before the texts that hold something, those of a row in order."""
    texts, labels, groups, inside = [], [], [], []
    for row in rows:
        ids, learnt, group, place = [], [], [], []
        for number, (question, answer) in enumerate(row, 1):
            asked, said = encoded(question), [*encoded(answer), NUMBER[END]]
            own = [*asked, *said[:-1]]
            ids += own
            learnt += [UNLEARNT] * (len(asked) - 1) + said
            group += [number] * len(own)
            place += range(len(own))
        texts.append(ids)
        labels.append(learnt)
        groups.append(group)
        inside.append(place)
    width = max(map(len, texts))

    def filled(values: list[list[int]], value: int) -> Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in values])

    group = torch.cat([torch.where(shown, 0, -1), filled(groups, -2)], 1)
    count = shown.sum(-1, keepdim=True)
    positions = torch.cat([(shown.cumsum(-1) - 1).clamp(min=0), count + filled(inside, 0)], 1)
    here = torch.arange(group.shape[1])
    same = (group[:, None, :] == 0) | (group[:, None, :] == group[:, :, None])
    allowed = same & (here[None, :] <= here[:, None]) | (here[None, :] == here[:, None])
    return Turns(filled(texts, NUMBER[PAD]), filled(labels, UNLEARNT), positions, allowed[:, None])


def answered(logits: Tensor, labels: Tensor) -> Tensor:
    """`[row]` bool: whether the likeliest token is right at every place that has a label."""
    right = (logits.argmax(-1) == labels) | (labels == UNLEARNT)
    return right.all(-1)
