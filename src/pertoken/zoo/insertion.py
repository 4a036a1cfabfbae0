"""Insert missing tokens: the loss of insertion language models (ILM, arXiv 2505.05755).

Of a row's T open tokens n ~ UniformInt{0..T} are removed, a random subset D; the model reads what is left and scores
every pair (slot i, token v): "insert v right behind slot i". The target is the multiset of what is missing,

    q(i, v) = #{d in D : d = v, slot i is the last kept one before d} / n,
    loss = logsumexp over open (i, v) of s(i, v)  -  sum over D of s(i, v) / n,      0 where n = 0,

one softmax over all open slots and the vocabulary. It is gathered: the scores of the n listed pairs and one logsumexp
in fp32; no target `[slot, vocabulary]` is made. The removed tokens are really removed: the network reads `[row, slot]`
of the longest shortened row. Scores are `[open slot, vocabulary]` in fp32, at 20 rows of 192 tokens 31 MB on average
and 63 MB at most.

A row is `[CLS, given..., gap marker, open..., given...]`. CLS is the end of text, whose embedding opens every file of
the corpus; the gap marker (the paper's BOS) is the mask token and stands before each run of open tokens, so that a text
may have several, and given tokens behind them. The stop head is one row of the output matrix: the score of the stop
token (the end of text) at CLS, whose other scores are never used; P(stop) = sigmoid of it, and its loss is the binary
cross-entropy with [n = 0]. Thus an insertion model is a plain `LlamaForCausalLM` with three ids in its configuration.

`config.stop_at = "slots"` is another stop head, for models in whose CLS little is to be read: one that began as causal
has learnt to put nothing there, and after a short training that is still so. The stop token is then the gap
marker, left out of the softmax over pairs; its score at open slot i says whether nothing is missing right behind i and
learns that by binary cross-entropy (mean over the row's open slots); P(stop) is the product of their sigmoids.

What differs from the paper: that stop head (there: a feed-forward block and two classes); slots behind given tokens are
left out of the softmax, as they are in decoding; the output matrix is tied to the embedding; levels n / T are spread
evenly over a batch. n = 0 has a chance of only 1 / (T + 1), too rare for the stop head of long rows: in a share `few`
of the rows the level is taken to the power FEW, which makes that chance (T + 1)^(-1 / FEW); and texts are cut to a
random length, as little as SHORTEST of theirs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.denoise.insertion import CLS, SLOTS
from pertoken.zoo import corpus
from pertoken.zoo.masked import MASK, Bidirectional
from pertoken.zoo.objective import Objective
from pertoken.zoo.rows import Rows

WHOLE = 0.3  # share of text rows that are open from end to end; the others have one to three open spans
SPANS = (1.0, 0.35, 0.35)  # chance of each of them
MULTIPLE = 64  # rows are padded to a multiple of this, so that few shapes are compiled
FEW, SHORTEST = 4.0, 0.1
LEVELS = (0.1, 0.5, 0.9)  # shares of missing tokens at which held-out text is judged


@dataclass(frozen=True)
class Shortened:
    """Rows without their missing tokens, and what is missing.

    ids `[row, slot]`, valid, open `[row, slot]`: behind an open slot a token may be inserted; missing `[row]`: n; row,
    slot, token `[missing token]`: each missing token and the slot it belongs right behind, not necessarily next.
    """

    ids: Tensor
    valid: Tensor
    open: Tensor
    missing: Tensor
    row: Tensor
    slot: Tensor
    token: Tensor

    @property
    def bias(self) -> Tensor:
        """Additive attention mask `[row, 1, 1, slot]`."""
        return torch.zeros(self.valid.shape).masked_fill_(~self.valid, torch.finfo(torch.float32).min)[:, None, None]


def marked(ids: Tensor, valid: Tensor, open_: Tensor, marker: int) -> tuple[Tensor, Tensor, Tensor]:
    """ids, valid and open with a gap marker, itself open, before each run of open tokens."""
    first = open_ & ~F.pad(open_, (1, -1))
    shift = first.long().cumsum(-1)
    width = ids.shape[1] + int(shift[:, -1].max())
    columns = torch.arange(ids.shape[1]) + shift
    place = columns - first.long()  # where the marker goes, or the token itself
    marks = torch.zeros(len(ids), width, dtype=torch.bool).scatter_(1, place, first)
    spread = [x.new_zeros(len(ids), width).scatter_(1, columns, x) for x in (ids, valid, open_)]
    return spread[0].masked_fill(marks, marker), spread[1] | marks, spread[2] | marks


def shortened(
    ids: Tensor, valid: Tensor, open_: Tensor, marker: int, level: Tensor, generator: torch.Generator, multiple: int = 1
) -> Shortened:
    """Remove floor(level (T + 1)) of the T open tokens of each row; the gap markers stay. level `[row]` in [0, 1)."""
    removable = open_ & (ids != marker)
    total = removable.sum(-1)
    missing = torch.minimum((level * (total + 1)).long(), total)
    noise = torch.rand(ids.shape, generator=generator).masked_fill(~removable, 2.0)
    rank = torch.empty_like(ids).scatter_(1, noise.argsort(-1), torch.arange(ids.shape[1]).expand_as(ids))
    gone = rank < missing[:, None]
    kept = valid & ~gone
    length = kept.sum(-1)
    width = -(-int(length.max()) // multiple) * multiple
    order = F.pad((~kept).byte().argsort(dim=-1, stable=True), (0, max(width - ids.shape[1], 0)))[:, :width]
    real = torch.arange(width) < length[:, None]
    row, column = gone.nonzero(as_tuple=True)
    slot = (kept.long().cumsum(-1) - 1)[row, column]
    return Shortened(
        ids.gather(1, order).masked_fill(~real, 0),
        real,
        open_.gather(1, order) & real,
        missing,
        row,
        slot,
        ids[row, column],
    )


def insertion_losses(
    hidden: Tensor, head: Callable[[Tensor], Tensor], batch: Shortened, stop: int, stop_at: str = CLS
) -> tuple[Tensor, Tensor, Tensor]:
    """Of normed hidden states `[row, slot, width]`: cross-entropies `[row]` of what is missing, cross-entropies `[row]`
    of the stop head, and scores `[open slot, vocabulary]`; both losses in nats."""
    scores = head(hidden[batch.open]).float()
    floor = torch.finfo(scores.dtype).min
    if stop_at == SLOTS:
        lacks = torch.zeros_like(batch.open).index_put((batch.row, batch.slot), torch.tensor(True))
        said = F.binary_cross_entropy_with_logits(scores[:, stop], (~lacks[batch.open]).float(), reduction="none")
        stops = torch.zeros(batch.open.shape).masked_scatter(batch.open, said).sum(-1) / batch.open.sum(-1)
        scores = scores.index_fill(1, torch.tensor(stop), floor)
    else:
        done = (batch.missing == 0).float()
        said = head(hidden[:, 0])[:, stop].float()
        stops = F.binary_cross_entropy_with_logits(said, done, reduction="none")
    norms = scores.new_full(batch.open.shape, floor).masked_scatter(batch.open, scores.logsumexp(-1)).logsumexp(-1)
    number = (batch.open.flatten().long().cumsum(0) - 1).view_as(batch.open)
    listed = scores[number[batch.row, batch.slot], batch.token]
    right = listed.new_zeros(len(norms)).index_add(0, batch.row, listed) / batch.missing.clamp(min=1)
    losses = torch.where(batch.missing > 0, norms - right, 0.0)
    return losses, stops, scores


def spread_levels(rows: int, generator: torch.Generator, few: float = 0.0) -> Tensor:
    """`[row]` levels in [0, 1), evenly spread from a random start, in random order; low ones in a share `few`."""
    levels = (torch.rand(1, generator=generator) + torch.arange(rows) / rows) % 1.0
    levels = levels[torch.randperm(rows, generator=generator)]
    return torch.where(torch.arange(rows) < round(few * rows), levels**FEW, levels)


class Insertion(Objective):
    """Learns from `Rows` without their padding: whole texts, texts with open spans, and prompts with open answers."""

    def prepare(self, compile_model: bool) -> None:
        self.data = Rows(self.recipe, self.tokenizer)
        self.count = self.data.count
        self.mask: int = self.tokenizer.token_to_id(MASK)  # type: ignore[assignment]
        self.end: int = self.data.end  # type: ignore[assignment]
        config = self.model.config
        self.stop = self.mask if self.recipe.stop_at == SLOTS else self.end
        config.mask_token_id, config.stop_token_id, config.bos_token_id = self.mask, self.stop, self.end
        config.stop_at = self.recipe.stop_at
        plain = Bidirectional(self.model)
        self.forward = torch.compile(plain, dynamic=False) if compile_model else plain

    def rows(self, epoch: int) -> np.ndarray:
        return self.data.epoch(epoch)

    def opened(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """ids, valid and open `[row, token]` of rows `[row, 1 + token]` as of `Rows`, without their padding."""
        given, ids = rows[:, :1], rows[:, 1:].clone()
        ids[:, 0] = self.end
        width, place = ids.shape[1], torch.arange(ids.shape[1])
        padding = (ids == self.end).flip(-1).byte().cumprod(-1).sum(-1, keepdim=True)
        length = (width - padding).clamp(min=1)
        if self.recipe.few:  # were all texts of one length, a shorter row would be known to lack tokens
            share = SHORTEST + (1 - SHORTEST) * torch.rand(len(ids), 1, generator=generator)
            length = torch.where(given > 1, length, (share * length).long().clamp(min=1))
        valid, room = place < length, (length - 1).clamp(min=1)
        draws = torch.rand(3, len(SPANS), len(ids), 1, generator=generator)
        size = (room.double().log() * draws[0]).exp().long().clamp(min=1)  # log-uniform
        start = 1 + ((room - size + 1) * draws[1]).long()
        chosen = draws[2] < torch.tensor(SPANS)[:, None, None]
        spans = ((place >= start) & (place < start + size) & chosen).any(0)
        whole = torch.rand(len(ids), 1, generator=generator) < WHOLE
        open_ = torch.where((given > 1) | whole, place >= given.clamp(min=1), spans) & valid
        return marked(ids, valid, open_, self.mask)

    def parts(self, rows: Tensor, level: Tensor, generator: torch.Generator, groups: int = 2) -> list[Shortened]:
        """The batch in groups of equally many rows, the shorter ones first: less padding."""
        ids, valid, open_ = self.opened(rows, generator)
        left = valid.sum(-1) - level * open_.sum(-1)
        order = left.argsort()
        return [
            shortened(ids[part], valid[part], open_[part], self.mask, level[part], generator, MULTIPLE)
            for part in order.chunk(groups)
        ]

    def loss(self, batch: np.ndarray, step: int, generator: torch.Generator) -> tuple[Tensor, float]:
        rows = torch.from_numpy(batch.astype(np.int64))
        total, shown, count = torch.zeros(()), 0.0, 0
        for short in self.parts(rows, spread_levels(len(rows), generator, self.recipe.few), generator):
            losses, stops, _ = self.losses(self.forward(short.ids, short.bias), short)
            total = total + (losses.sum() + self.recipe.stop * stops.sum()) / len(rows)
            shown, count = shown + float(losses.detach().sum()), count + int((short.missing > 0).sum())
        return total, shown / max(count, 1)

    def losses(self, hidden: Tensor, short: Shortened) -> tuple[Tensor, Tensor, Tensor]:
        return insertion_losses(hidden, self.model.lm_head, short, self.stop, self.recipe.stop_at)

    @torch.inference_mode()
    def evaluate(self, batches: int = 6) -> dict[str, float]:
        """heldout: mean over levels of the cross-entropy in nats per insertion; excess: the same above the target's own
        entropy; stop: cross-entropy of the stop head; right_LEVEL: share of rows whose likeliest insertion is right."""
        generator = torch.Generator().manual_seed(1)
        windows = corpus.windows(self.data.heldout, self.recipe.length - 1, 0, 1)[: 16 * batches]
        rows = torch.from_numpy(np.concatenate([np.ones((len(windows), 1), np.int64), windows.astype(np.int64)], 1))
        plain, found = Bidirectional(self.model), {}
        sums: dict[str, list[Tensor]] = {"heldout": [], "excess": [], "stop": []}
        for level in LEVELS:
            hits = []
            for part in rows.split(16):
                (short,) = self.parts(part, torch.full((len(part),), level), generator, 1)
                with torch.autocast("cpu", dtype=torch.bfloat16):
                    hidden = plain(short.ids, short.bias)
                    losses, stops, scores = self.losses(hidden, short)
                some = short.missing > 0
                sums["heldout"].append(losses[some])
                sums["excess"].append((losses - target_entropy(short))[some])
                sums["stop"].append(stops)
                hits.append(best_is_right(scores, short)[some])
            found[f"right_{level}"] = float(torch.cat(hits).float().mean())
        return {name: float(torch.cat(parts).mean()) for name, parts in sums.items()} | found


def target_entropy(batch: Shortened) -> Tensor:
    """`[row]` entropy of the target in nats: what no model can go below."""
    pairs = torch.stack([batch.row, batch.slot, batch.token], 1)
    pairs, count = pairs.unique(dim=0, return_counts=True)
    q = count / batch.missing[pairs[:, 0]]
    return torch.zeros(len(batch.missing)).index_add(0, pairs[:, 0], -q * q.log())


def best_is_right(scores: Tensor, batch: Shortened) -> Tensor:
    """`[row]`: whether the pair of the highest score is one of those listed."""
    high, token = scores.max(-1)
    table = torch.full(batch.open.shape, -torch.inf).masked_scatter(batch.open, high)
    slot = table.argmax(-1)
    token = torch.zeros_like(batch.ids).masked_scatter(batch.open, token).gather(1, slot[:, None])[:, 0]
    same = (batch.slot == slot[batch.row]) & (batch.token == token[batch.row])
    return torch.zeros(len(slot)).index_add(0, batch.row, same.float()) > 0
