"""What insertion works on: a request, the rows with their positions, and the model that scores them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pertoken.core.errors import BadRequest
from pertoken.models.adapter import Adapter, adapter_for
from pertoken.models.cache import WORTH_PACKING, Packing
from pertoken.models.stack import stack_of

CLS, SLOTS = "cls", "slots"  # where a model's stop head is read, see `zoo.insertion`


@dataclass(frozen=True)
class Request:
    """What a call asks for. ids, attention_mask `[row, token]`: left-padded prompts; length: most insertions per row;
    marker, cls, stop: the gap marker, the token before every row, the stop head's row of the output matrix;
    stop_at: where that is read; specials: tokens that are never inserted."""

    adapter: Adapter
    ids: Tensor
    attention_mask: Tensor
    length: int
    marker: int
    cls: int
    stop: int
    stop_at: str
    specials: list[int]
    pad: int
    sampling: bool
    as_dict: bool

    @classmethod
    def of(cls, model: Any, ids: Tensor, mask: Tensor | None, config: Any, marker: int | None) -> Request:
        """Raises `BadRequest` for a model that cannot insert, and for prompts that leave no room."""
        config, about = config or model.generation_config, model.config
        if getattr(about, "is_causal", True) is not False:
            raise BadRequest(
                f"{type(model).__name__} is causal (config.is_causal is not False): it does not see what follows a "
                "gap. Give an insertion model such as zoo:code-insertion"
            )
        stop = getattr(about, "stop_token_id", None)
        if stop is None or not 0 <= stop < about.vocab_size:
            raise BadRequest(
                f"config.stop_token_id={stop}: {type(model).__name__} has no stop head, so it is no insertion model; "
                "give one such as zoo:code-insertion (a masked-diffusion model is decoded with Denoise)"
            )
        marker = getattr(about, "mask_token_id", None) if marker is None else marker
        begin = about.bos_token_id
        for name, token in (("mask token (gap marker)", marker), ("bos_token_id (CLS)", begin)):
            if token is None or not 0 <= token < about.vocab_size:
                raise BadRequest(
                    f"{name} {token} is not in the vocabulary of {about.vocab_size} tokens; set it in the config"
                )
        assert marker is not None
        mask = torch.ones_like(ids) if mask is None else mask
        if ids.ndim != 2 or mask.shape != ids.shape:
            raise BadRequest(
                f"input_ids {list(ids.shape)} and attention_mask {list(mask.shape)} must both be [row, token]"
            )
        falls = (mask.diff(dim=-1) < 0).any(-1)
        if bool(falls.any()):
            row = int(falls.nonzero()[0])
            raise BadRequest(f"row {row} is padded on the right or inside; pad on the left (padding_side='left')")
        length = config.max_new_tokens
        length = (config.max_length or 0) - ids.shape[1] if length is None else length
        if length < 1:
            raise BadRequest(f"max_new_tokens={length} leaves no room for an insertion; give at least 1")
        adapter = adapter_for(model)
        longest = int(mask.sum(-1).max()) + 2 if len(ids) else 0  # with CLS and a gap marker
        if longest + length > adapter.positions:
            raise BadRequest(
                f"a prompt of {longest - 2} tokens and {length} insertions need {longest + length} positions with "
                f"CLS and gap marker, the model has {adapter.positions}; shorten the prompt or lower max_new_tokens to "
                f"{max(adapter.positions - longest, 0)}"
            )
        named = [marker, begin, stop, about.pad_token_id, config.pad_token_id, about.eos_token_id, config.eos_token_id]
        flat = [t for token in named for t in (token if isinstance(token, (list, tuple)) else [token])]
        specials = sorted({int(t) for t in flat if t is not None and 0 <= int(t) < about.vocab_size})
        pad = config.pad_token_id if config.pad_token_id is not None else begin
        sampling, as_dict = bool(config.do_sample), bool(config.return_dict_in_generate)
        where = getattr(about, "stop_at", CLS)
        if where not in (CLS, SLOTS):
            raise BadRequest(f"config.stop_at={where!r} is unknown; a stop head is read at {CLS!r} or at {SLOTS!r}")
        return cls(
            adapter, ids, mask.bool(), int(length), marker, begin, stop, where, specials, int(pad), sampling, as_dict
        )

    def returned(self, rows: dict[int, Tensor]) -> Any:
        """Ids `[row, token]` of the finished rows, behind the padding that each prompt had."""
        kept = [
            torch.cat([ids[~mask], rows[number]])
            for number, (ids, mask) in enumerate(zip(self.ids, self.attention_mask, strict=True))
        ]
        sequences = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True, padding_value=self.pad)
        if self.as_dict:
            from transformers.generation.utils import GenerateDecoderOnlyOutput

            return GenerateDecoderOnlyOutput(sequences=sequences)  # type: ignore[arg-type]
        return sequences


@dataclass
class Slots:
    """The active rows. What is given and what is open are stored apart, each in the order in which it came.

    given, given_positions, given_valid `[row, given]`: CLS and the prompt without its gap markers; shown: what of it is
    returned; ids, positions `[row, length + markers + 1]`: gap markers and inserted tokens, `count[row]` of them (the
    last column takes what is written nowhere); markers: gap markers of each row; numbers: the rows' places in the
    batch.
    """

    given: Tensor
    given_positions: Tensor
    given_valid: Tensor
    shown: Tensor
    ids: Tensor
    positions: Tensor
    count: Tensor
    markers: Tensor
    numbers: list[int]

    @classmethod
    def of(cls, request: Request) -> Slots:
        ids, real = request.ids, request.attention_mask
        rows, width = ids.shape
        begun = torch.zeros(rows, dtype=torch.bool, device=ids.device)
        first = real & (real.long().cumsum(-1) == 1)
        begun = (first & (ids == request.cls)).any(-1)
        real = real & ~(first & begun[:, None])  # CLS has a column of its own
        column = lambda token: torch.full((rows, 1), token, dtype=ids.dtype, device=ids.device)  # noqa: E731
        gap = real & (ids == request.marker)
        ids = torch.cat([column(request.cls), ids, column(request.marker)], 1)
        unmarked = ~gap.any(-1, keepdim=True)
        yes, no = torch.ones_like(unmarked), torch.zeros_like(unmarked)
        valid = torch.cat([yes, real, unmarked], 1)
        gap = torch.cat([no, gap, unmarked], 1)
        positions = (valid.long().cumsum(-1) - 1).clamp_(min=0)
        markers = gap.sum(-1)
        most = int(markers.max()) if rows else 0
        order = (~gap).byte().argsort(dim=-1, stable=True)[:, :most]
        pad = (0, request.length + 1)
        given = (valid & ~gap)[:, :-1]
        return cls(
            ids[:, :-1],
            positions[:, :-1],
            given,
            given & torch.cat([begun[:, None], yes.expand(rows, width)], 1),
            torch.nn.functional.pad(torch.full_like(order, request.marker), pad, value=request.pad),
            torch.nn.functional.pad(positions.gather(1, order), pad),
            markers.clone(),
            markers,
            list(range(rows)),
        )

    @property
    def rows(self) -> int:
        return len(self.numbers)

    @property
    def inserted(self) -> Tensor:
        """`[row]`"""
        return self.count - self.markers

    @property
    def size(self) -> Tensor:
        """`[row]` tokens of each row, CLS and markers among them."""
        return self.given_valid.sum(-1) + self.count

    @property
    def length(self) -> int:
        """No position is this large."""
        return self.given.shape[1] + self.ids.shape[1]

    @property
    def width(self) -> int:
        """Columns of the open part in use."""
        return int(self.count.max())

    @property
    def open(self) -> Tensor:
        """bool `[row, open slot]` over the columns in use."""
        return torch.arange(self.width, device=self.ids.device) < self.count[:, None]

    @property
    def open_positions(self) -> Tensor:
        """`[row, open slot]`, 0 where there is none."""
        return self.positions[:, : self.width].masked_fill(~self.open, 0)

    def insert(self, chosen: Tensor, tokens: Tensor) -> None:
        """Put a token behind each of the slots `chosen`, both `[row, open slot]`, all at once."""
        places = self.open_positions.masked_fill(~chosen, self.length)
        marks = torch.zeros(self.rows, self.length + 1, dtype=torch.long, device=places.device).scatter_(1, places, 1)
        before = marks.cumsum(-1) - marks  # how many insertions are behind smaller positions
        new = (places + before.gather(1, places) + 1).masked_fill(~chosen, 0)
        self.given_positions = self.given_positions + before.gather(1, self.given_positions)
        self.positions = self.positions + before.gather(1, self.positions)
        last = self.ids.shape[1] - 1
        column = (self.count[:, None] + chosen.cumsum(-1) - 1).masked_fill(~chosen, last)
        self.ids = self.ids.scatter(1, column, tokens)
        self.positions = self.positions.scatter(1, column, new)
        self.count = self.count + chosen.sum(-1)

    def in_order(self, chosen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """bool `[row, position]`: which positions are open, and which of these are `chosen` (bool `[row, open slot]`);
        and `[row, open slot]`: the slots in the order of their positions."""
        open_, places = self.open, self.open_positions
        width = int(self.size.max())
        none = torch.zeros(self.rows, width, dtype=torch.bool, device=places.device)
        valid, keep = (none.scatter_reduce(1, places, kind, "amax") for kind in (open_, chosen & open_))
        return valid, keep, places.masked_fill(~open_, self.length).argsort(-1)

    def sequences(self, which: Tensor) -> dict[int, Tensor]:
        """Tokens of the rows `which` (bool `[row]`) in the order of their positions, without CLS and markers."""
        kept = self.open & (torch.arange(self.width, device=self.ids.device) >= self.markers[:, None])
        ids = torch.cat([self.given, self.ids[:, : self.width]], 1)
        shown = torch.cat([self.shown, kept], 1)
        places = torch.cat([self.given_positions, self.open_positions], 1).masked_fill(~shown, self.length)
        ordered = ids.gather(1, places.argsort(-1))
        return {
            self.numbers[row]: ordered[row, :length]
            for row, length in zip(which.nonzero().flatten().tolist(), shown.sum(-1)[which].tolist(), strict=True)
        }

    def select(self, rows: Tensor) -> None:
        """Keep only these rows, in this order."""
        for name in ("given", "given_positions", "given_valid", "shown", "ids", "positions", "count", "markers"):
            setattr(self, name, getattr(self, name)[rows])
        self.numbers = [self.numbers[row] for row in rows.tolist()]


class Uncached:
    """A cache, as transformers' layers and the fused stack ask for one, that keeps nothing."""

    is_compileable = False

    def __init__(self, valid: Tensor, capacity: int):
        sparse = len(valid) > 1 and int(valid.sum()) < WORTH_PACKING * valid.numel()
        self.packing, self.capacity = Packing(valid) if sparse else None, capacity

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class SlotsModel:
    """Scores of every open slot; every token reads every other of its row, whatever the order they are stored in."""

    def __init__(self, request: Request):
        self.request, self.stack = request, stack_of(request.adapter.model)

    def forward(self, slots: Slots) -> tuple[Tensor, Tensor]:
        """float32 scores `[row, open slot, token]`, -inf for special tokens, and P(stop) `[row]`."""
        start, width = slots.given.shape[1], slots.width
        ids = torch.cat([slots.given, slots.ids[:, :width]], 1)
        valid = torch.cat([slots.given_valid, slots.open], 1)
        positions = torch.cat([slots.given_positions, slots.open_positions], 1).masked_fill(~valid, 0)
        self.stack.announce(valid)
        hidden = self.stack.embed(ids, positions)
        masks = {window: self._mask(valid, positions, window, hidden.dtype) for window in set(self.stack.windows)}
        cache: Any = Uncached(valid, slots.length)
        hidden = self.stack.run(hidden, positions, cache, masks, 0, self.stack.adapter.depth)
        scores = self.stack.logits(hidden[:, start:]).float()
        if self.request.stop_at == SLOTS:
            whole = F.logsigmoid(scores[..., self.request.stop]).masked_fill(~slots.open, 0.0)
            stop = whole.sum(-1).exp()
        else:
            stop = self.stack.logits(hidden[:, :1])[:, 0, self.request.stop].float().sigmoid()
        scores[..., self.request.specials] = -torch.inf
        return scores, stop

    def _mask(self, valid: Tensor, positions: Tensor, window: int | None, dtype: torch.dtype) -> Tensor:
        """Additive mask `[row, 1, query, key]`."""
        seen = valid[:, None].expand(-1, valid.shape[1], -1)
        if window is not None:
            seen = seen & ((positions[..., None] - positions[:, None]).abs() < window)
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[:, None]
