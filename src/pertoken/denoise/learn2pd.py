"""Learn2PD: a small filter, trained on the model's own decodes, says which guesses are already right.

Source: Bao et al., "Learning to Parallel: Accelerating Diffusion Large Language Models via Learnable Parallel
Decoding", arXiv 2509.25188. The filter f reads the confidences of all `block` places of the block, decided ones too,
and gives one logit per place; a place is committed when sigmoid(f(c)) > tau, and so are the `quota` most confident
ones, which guarantees progress.

Training (`train_filter`) imitates an oracle: with y the model's own one-token-per-step decode, decode again and
commit every place whose argmax equals y. Each step of each block gives one record (confidences, correct), and f
minimises the binary cross-entropy over all places.

The filter's class was not released: two linear layers with a ReLU between them, no dropout, are a reconstruction.
What differs: a filter is made for one block size, any, and refused for another; tau can be set from a rate of false
positives (`calibrated`), counted on undecided places of held-out records, because the decided ones are easy and
flatter the rate. It loses where a fixed threshold is already calibrated: the filter can only know what the
confidences of one block tell.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pertoken.core.card import Dial, Paper, method
from pertoken.core.errors import BadRequest
from pertoken.denoise.canvas import Canvas
from pertoken.denoise.rules import CommitRule, Guess, top
from pertoken.models.load import resolve
from pertoken.models.signature import signature

if TYPE_CHECKING:
    from pertoken.denoise.settings import Settings


class Filter(nn.Module):
    """Confidences `[row, block]` -> logits `[row, block]` of being right. about: what it was trained on."""

    def __init__(self, block: int, layers: int = 2, about: dict[str, Any] | None = None):
        super().__init__()
        self.block, self.layers, self.about = block, layers, about or {}
        parts: list[nn.Module] = [nn.Linear(block, block)]
        for _ in range(layers - 1):
            parts += [nn.ReLU(), nn.Linear(block, block)]
        self.net = nn.Sequential(*parts)

    def forward(self, confidence: Tensor) -> Tensor:
        return self.net(confidence)

    def save(self, path: str | Path) -> None:
        """Write weights and what they were trained on as one safetensors file."""
        about = {"block": self.block, "layers": self.layers, **self.about}
        save_file(self.state_dict(), str(path), {"filter": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path, block: int | None = None) -> Filter:
        """Read what `save` wrote, from a file, or the one for this block from a directory or a zoo:NAME; raises
        `BadRequest` where there is none."""
        path = Path(resolve(str(path)))
        if path.is_dir():
            path = path / f"filter-{block}.safetensors"
        if not path.is_file():
            raise BadRequest(
                f"no filter at {path}; train one with `pertoken zoo train code-filter`, or for another model or block "
                "with pertoken.denoise.learn2pd.train_filter"
            )
        with safe_open(str(path), "pt") as file:
            about = (file.metadata() or {}).get("filter")
            if about is None:
                raise BadRequest(f"{path} is not a Learn2PD filter: its header says nothing about one")
            kept = json.loads(about)
            found = cls(kept.pop("block"), kept.pop("layers"), kept)
            found.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return found.eval()


@method(
    question="denoise",
    shape="decoder",
    exactness="approximate",
    paper=Paper("Learning to Parallel: Accelerating Diffusion LLMs via Learnable Parallel Decoding", "2509.25188"),
    reads={"logits"},
    writes={"commit"},
    needs={"diffusion", "filter"},
    baselines=("schedule", "threshold", "factor", "entropy_bound", "random_commit"),
    dial=Dial("tau", (0.1, 0.3, 0.5, 0.7, 0.8, 0.9, 0.96, 0.99)),
)
@dataclass(frozen=True)
class Learn2PD(CommitRule):
    """Commit what a trained filter takes for right.

    filter: a `Filter`, or the path of one, of a directory of them, or zoo:NAME; tau: probability above which a place is
    committed (1: only the schedule).
    """

    filter: Filter | str | Path | None = None
    tau: float = 0.96
    reads_decided = True

    def fitted(self, settings: Settings) -> Learn2PD:
        if self.filter is None:
            raise BadRequest("Learn2PD has no filter; train one with train_filter(...) and give Learn2PD(filter)")
        places = settings.sliding or settings.block
        found = self.filter if isinstance(self.filter, Filter) else Filter.load(self.filter, places)
        if found.block != places:
            raise BadRequest(
                f"the filter was trained for blocks of {found.block} places, this call has {places}; give "
                f"Denoise(block={found.block}) or train a filter for {places}"
            )
        trained, here = found.about.get("model"), signature(settings.adapter.model)
        if trained is not None and trained != here:
            raise BadRequest(
                f"the filter was trained for the model with signature {trained}, this one has {here}; train a filter "
                "for this model"
            )
        return replace(self, filter=found.to(settings.ids.device))

    def choose(self, guess: Guess, canvas: Canvas) -> Tensor:
        assert isinstance(self.filter, Filter)
        kept = canvas.valid.gather(1, canvas.block_columns)
        sure = self.filter(guess.confidence.masked_fill(~kept, 1).float()).sigmoid() > self.tau
        return sure | top(guess.ranked, guess.quota)


@dataclass(frozen=True)
class Oracle(CommitRule):
    """Commit every place whose guess equals the reference, `[row, canvas]` (extremely greedy parallel decoding).

    Where no guess is right the rest of the block gets the reference. records: (confidences, correct, undecided) of
    every step, each `[row, block]`.
    """

    reference: Tensor
    records: list[tuple[Tensor, Tensor, Tensor]] = field(default_factory=list, compare=False)
    reads_decided = True

    def choose(self, guess: Guess, canvas: Canvas) -> Tensor:
        wanted = self.reference[canvas.numbers].gather(1, canvas.block_columns - canvas.start)
        right = guess.tokens == wanted
        self.records.append((guess.confidence.float(), right, guess.masked.clone()))
        chosen = right & guess.masked
        stuck = ~chosen.any(-1, keepdim=True)
        guess.tokens = torch.where(stuck, wanted, guess.tokens)
        return chosen | (stuck & guess.masked)


Records = tuple[Tensor, Tensor, Tensor]


def records(model: Any, batches: list[dict[str, Tensor]], length: int, block: int) -> Records:
    """Confidences, correct and undecided `[record, block]` of the oracle's decodes of these batches (ids and masks)."""
    from pertoken.denoise.loop import Denoise

    kept: list[Records] = []
    for inputs in batches:
        start, options = inputs["input_ids"].shape[1], {"max_new_tokens": length, "do_sample": False}
        plain = Denoise(block=block)
        reference = model.generate(**inputs, **options, eos_token_id=None, custom_generate=plain)[:, start:]
        oracle = Oracle(reference)
        model.generate(**inputs, **options, eos_token_id=None, custom_generate=Denoise(oracle, block=block))
        kept += oracle.records
    confidence, right, undecided = (torch.cat(parts).cpu() for parts in zip(*kept, strict=True))
    return confidence, right, undecided


def train_filter(
    model: Any,
    batches: list[dict[str, Tensor]],
    length: int = 128,
    block: int = 32,
    *,
    layers: int = 2,
    steps: int = 40_000,
    lr: float = 3e-3,
    seed: int = 0,
    found: Records | None = None,
    progress: Callable[[int, float], None] | None = None,
) -> Filter:
    """A filter for this model and block size, trained on its own decodes of `batches`; `found` are their `records`.

    Full-batch AdamW on four fifths of the records in random order; the weights kept are those with the least loss on
    the rest, looked at every 100 steps.
    """
    confidence, right, _ = found or records(model, batches, length, block)
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(confidence), generator=generator)
    parts = order[: len(order) // 5], order[len(order) // 5 :]
    (held, held_right), (seen, seen_right) = ((confidence[part], right[part].float()) for part in parts)
    torch.manual_seed(seed)
    about = {"model": signature(model), "length": length, "records": len(confidence), "steps": steps, "seed": seed}
    net = Filter(block, layers, about)
    optimizer = torch.optim.AdamW(net.parameters(), lr=lr)
    best, kept = float("inf"), net.state_dict()
    with torch.enable_grad():
        for step in range(steps):
            loss = nn.functional.binary_cross_entropy_with_logits(net(seen), seen_right)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            optimizer.step()
            if step % 100 == 99 or step == steps - 1:
                with torch.no_grad():
                    judged = nn.functional.binary_cross_entropy_with_logits(net(held), held_right)
                if float(judged) < best:
                    best, kept = float(judged), {k: v.clone() for k, v in net.state_dict().items()}
                if progress is not None:
                    progress(step + 1, float(judged))
    net.load_state_dict(kept)
    net.about["loss"] = best
    return net.eval()


@torch.no_grad()
def calibrated(net: Filter, found: Records, rate: float) -> float:
    """The least tau at which at most `rate` of the undecided places that it would commit are wrong."""
    confidence, right, undecided = found
    chance = net(confidence).sigmoid()[undecided]
    order = chance.argsort(descending=True)
    wrong = (~right[undecided][order]).double().cumsum(0) / torch.arange(1, len(order) + 1)
    good = (wrong <= rate).nonzero()
    return float(chance[order[int(good[-1])]]) if len(good) else 1.0
