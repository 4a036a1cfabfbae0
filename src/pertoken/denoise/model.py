"""A bidirectional model over a canvas: computes chosen positions against kept keys, values and outputs of the rest."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from pertoken.core.errors import BadRequest
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.canvas_model import CanvasModel
from pertoken.denoise.rules import Guess
from pertoken.denoise.watch import Watch
from pertoken.models.adapter import Adapter
from pertoken.models.slots import SlotCache, mask
from pertoken.models.stack import stack_of


@dataclass(frozen=True)
class Block:
    """Positions that run together: columns, real, slots `[row, query]`; rows of the canvas, None for all; the additive
    mask of each window size."""

    columns: Tensor
    real: Tensor
    slots: Tensor
    positions: Tensor
    rows: Tensor | None
    masks: dict[int | None, Tensor]


class DiffusionModel(CanvasModel):
    """Keys, values and outputs of every position as last computed.

    shift: the output at column c - shift predicts the token at c; states `[layer, row, column, width]`: un-normed
    outputs, of the last layer or, with a watch, of every layer (one column more than the canvas takes padding). Of the
    last forward: work `[row]`, positions computed times layers, whole `[row]`, layers computed at every position.
    """

    def __init__(self, adapter: Adapter, canvas: Canvas, shift: int):
        self.stack, self.shift = stack_of(adapter.model), shift
        self.cache = SlotCache(adapter, canvas.rows, canvas.width)
        self.known = torch.zeros_like(canvas.valid)
        self.states: Tensor | None = None
        self.watch: Watch | None = None
        self.work = self.whole = torch.zeros(0)

    def watched_by(self, watch: Watch | None) -> None:
        """Show every forward to this watch; to be said before the first one."""
        self.watch = watch
        if watch is not None:
            self.cache.keep_queries(self.stack.adapter.heads)

    @property
    def depth(self) -> int:
        return self.stack.adapter.depth

    def forward(self, canvas: Canvas, planned: Tensor) -> Tensor:
        """Compute the planned positions and those whose outputs predict them; `[row, column]` of what was computed.

        A position that was never computed is computed whatever the plan says.
        """
        wanted = planned | (canvas.valid & ~self.known)
        if self.shift:
            wanted = wanted | torch.nn.functional.pad(wanted[:, self.shift :], (0, self.shift))
        if self.watch is not None:
            wanted = wanted | self.watch.wanted(canvas)
        wanted &= canvas.valid
        read = int(canvas.valid.any(0).nonzero().max()) + 1
        full = (wanted == canvas.valid).all(-1)
        if self.watch is None:
            self._run(canvas, self._open(canvas, wanted, read), 0, self.depth)
            self.work, self.whole = self.depth * wanted.sum(-1), self.depth * full
        else:
            wanted = self._watched(self.watch, canvas, wanted, full, read)
        self.known |= wanted
        return wanted

    def _watched(self, watch: Watch, canvas: Canvas, wanted: Tensor, full: Tensor, read: int) -> Tensor:
        """As `forward`, with the rows widened that the watch asks for."""
        depth, first = self.depth, 0
        level = torch.full_like(full, depth, dtype=torch.long).masked_fill_(full, 0)
        if bool(full.all()):
            self._run(canvas, self._open(canvas, wanted, read), 0, depth)
        else:
            block, hidden, size = self._open(canvas, wanted, read), None, watch.group(self, canvas)
            while first < depth and (first == 0 or bool((level > first).any())):
                last = min(first + size, depth)
                watch.before(self, canvas, first, last)
                hidden = self._run(canvas, block, first, last, hidden)
                level = torch.minimum(level, watch.after(self, canvas, first, last))
                first = last
            wide = level.masked_fill(full, first)
            if bool((wide < depth).any()):
                self._widen(canvas, wide.tolist(), read)
        watch.finish(self, canvas)
        every = canvas.valid.sum(-1)
        self.work = torch.where(full, depth * every, first * wanted.sum(-1) + (depth - level) * every)
        self.whole = depth - level
        return torch.where((level < depth)[:, None], canvas.valid, wanted)

    def _widen(self, canvas: Canvas, levels: list[int], read: int) -> None:
        """Compute every position of each row from layer `levels[row]` on."""
        rows: list[int] = []
        hidden: Tensor | None = None
        for first, last in pairwise([*sorted({level for level in levels if level < self.depth}), self.depth]):
            entering = [row for row, level in enumerate(levels) if level == first]
            rows += entering
            index = torch.tensor(rows, device=canvas.ids.device)
            every = rows == list(range(canvas.rows))
            block = self._open(canvas, canvas.valid, read, None if every else index, dense=True)
            if first > 0:
                assert self.states is not None
                new = self.states[first - 1, index[-len(entering) :], :read]
                hidden = new if hidden is None else torch.cat([hidden, new])
            hidden = self._run(canvas, block, first, last, hidden)

    def _open(
        self, canvas: Canvas, wanted: Tensor, read: int, rows: Tensor | None = None, dense: bool = False
    ) -> Block:
        """The wanted positions `[row, column]` of the canvas, or of some of its rows, and the cache directed at them.
        dense: the block has a place for every column that is read."""
        valid, positions = canvas.valid, canvas.positions
        if rows is not None:
            wanted, valid, positions = wanted[rows], valid[rows], positions[rows]
        count = wanted.sum(-1)
        width = read if dense else int(count.max())
        if width == read:
            columns = canvas.columns[:read].expand(len(wanted), -1)
            real = wanted[:, :read]
        else:
            columns = wanted.int().argsort(dim=-1, descending=True, stable=True)[:, :width]
            real = torch.arange(width, device=columns.device) < count[:, None]
        own = positions.gather(1, columns).masked_fill(~real, 0)
        self.cache.open(columns, real, read, rows)
        self.stack.announce(real)
        dtype = self.stack.adapter.dtype
        masks = {w: mask(valid, positions, own, read, w, dtype) for w in set(self.stack.windows)}
        return Block(columns, real, columns.masked_fill(~real, canvas.width), own, rows, masks)

    def _run(self, canvas: Canvas, block: Block, first: int, last: int, hidden: Tensor | None = None) -> Tensor:
        """Hidden states of the block after layers `first..last`, which are kept; hidden: what enters layer `first`."""
        if hidden is None:
            ids = canvas.ids if block.rows is None else canvas.ids[block.rows]
            hidden = self.stack.embed(ids.gather(1, block.columns), block.positions)
        kept: list[Tensor] | None = None if self.watch is None else []
        hidden = self.stack.run(hidden, block.positions, self.cache, block.masks, first, last, kept)
        if self.states is None:
            layers = 1 if self.watch is None else self.depth
            self.states = hidden.new_zeros(layers, canvas.rows, canvas.width + 1, hidden.shape[-1])
        target, new = (self.states, [hidden]) if kept is None else (self.states[first:last], kept)
        if self.cache.whole:
            for layer, outputs in zip(target, new, strict=True):
                layer[:, : self.cache.read] = outputs
        else:
            rows = torch.arange(canvas.rows, device=hidden.device) if block.rows is None else block.rows
            target[:, rows[:, None], block.slots] = torch.stack(new)
        return hidden

    def attention(self, canvas: Canvas, columns: Tensor, first: int, last: int) -> tuple[Tensor, Tensor]:
        """How the kept queries at `columns` `[row, query]` read the kept keys in layers `first..last`, with a watch.

        float32 weights `[layer, row, head, query, column]`, and which columns each query may see, bool `[layer or 1,
        row, query, column]`.
        """
        cache, adapter = self.cache, self.stack.adapter
        if missing := [layer for layer in range(first, last) if layer not in cache.observed]:
            raise BadRequest(
                f"the attention of layer {missing[0]} of this {adapter.config.model_type} model showed no queries: it "
                "did not run, or not through transformers' attention interface. Use a refresh rule that does not look "
                "at attention (dkv_cache, dual_cache, recompute), or take off the policy that passes over layers"
            )
        assert cache.queries is not None
        places = canvas.positions
        own, windows = places.gather(1, columns), self.stack.windows[first:last]
        masks = {w: mask(canvas.valid, places, own, cache.read, w, torch.float32) for w in set(windows)}
        added = torch.stack([masks[w] for w in (windows if len(masks) > 1 else windows[:1])])
        index = columns[None, :, None, :, None].expand(last - first, -1, adapter.heads, -1, adapter.head_dim)
        queries = cache.queries[first:last].gather(3, index)
        grouped = queries.unflatten(2, (adapter.kv_heads, -1)).flatten(3, 4)
        keys = cache.buffer[first:last, 0, :, :, : cache.read]
        # layer by layer, because the keys of several layers would be copied to be multiplied together
        products = [q.float() @ k.float().transpose(-1, -2) for q, k in zip(grouped, keys, strict=True)]
        scores = torch.stack(products).view(*queries.shape[:-1], cache.read)
        if cache.cap is not None:
            scores = torch.tanh(scores / cache.cap) * cache.cap
        return scores.add_(added).softmax(-1), added[:, :, 0] == 0

    def logits(self, places: Tensor) -> Tensor:
        """Logits `[row, place, vocabulary]` for the tokens at columns `places` `[row, place]`."""
        assert self.states is not None
        outputs, sources = self.states[-1], (places - self.shift).clamp(min=0)
        return self.stack.logits(outputs.gather(1, sources[..., None].expand(-1, -1, outputs.shape[-1])))

    def logits_at(self, row: Tensor, column: Tensor) -> Tensor:
        """Logits `[position, vocabulary]` for the tokens at these rows and columns."""
        assert self.states is not None
        return self.stack.logits(self.states[-1][row, (column - self.shift).clamp(min=0)])

    def settle(self, canvas: Canvas, guess: Guess, chosen: Tensor) -> tuple[Tensor, Tensor]:
        return chosen, guess.tokens

    def select(self, rows: Tensor) -> None:
        """Keep only these rows."""
        self.cache.select_rows(rows)
        self.known = self.known[rows]
        if self.states is not None:
            self.states = self.states[:, rows]
        if self.watch is not None:
            self.watch.select(rows)
