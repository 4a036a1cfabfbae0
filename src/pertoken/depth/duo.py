"""Small feed-forward blocks beside a model's own, with the routers that choose between them: what is trained, saved and
checked against the model it was trained for."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.activations import ACT2FN

from pertoken.core.attach import Attachment
from pertoken.core.errors import BadRequest
from pertoken.depth.lora import Lora, linears, sizes
from pertoken.models.adapter import adapter_for
from pertoken.models.load import resolve
from pertoken.models.signature import signature

BIG, SMALL, SKIP = 0, 1, 2
OPTIONS = ("big", "small", "skip")
FILE = "duo.safetensors"
SHARES = 64  # steps of the table of margins


class FeedForward(nn.Module):
    """x `[..., width]` -> `down(act(gate x) * up x)`, or `down(act(up x))` without a gate; no biases."""

    def __init__(self, width: int, inner: int, activation: str, gated: bool):
        super().__init__()
        self.gate = nn.Linear(width, inner, bias=False) if gated else None
        self.up = nn.Linear(width, inner, bias=False)
        self.down = nn.Linear(inner, width, bias=False)
        self.act = ACT2FN[activation]

    def forward(self, x: Tensor) -> Tensor:
        mine = x.to(self.up.weight.dtype)
        inner = self.act(self.up(mine)) if self.gate is None else self.act(self.gate(mine)) * self.up(mine)
        return self.down(inner).to(x.dtype)


def projections(block: nn.Module) -> tuple[Tensor | None, Tensor, Tensor]:
    """Gate (None without), up `[inner, width]` and down `[width, inner]` of a model's feed-forward block."""
    found = []
    for one in block.modules():
        weight = getattr(one, "weight", None)
        if isinstance(weight, Tensor) and weight.ndim == 2:
            found.append(weight if isinstance(one, nn.Linear) else weight.T)
    *into, down = found
    if len(into) == 1 and len(into[0]) == 2 * down.shape[1]:  # joined
        into = list(into[0].chunk(2))
    if not 1 <= len(into) <= 2:
        raise BadRequest(
            f"{type(block).__name__} has {len(found)} projections; a feed-forward block of two, or three with a gate, "
            "can have a small one beside it"
        )
    return (into[0] if len(into) == 2 else None), into[-1], down


class Duo(nn.Module):
    """For every layer of a model a small feed-forward block and a linear router.

    options: what routers choose from, in the order of their logits: ("big", "small") and maybe "skip". about: what this
    was trained for, its `signature` of the model among it. lora: low-rank changes of the big blocks that were trained
    with the small ones, in force while attached. routers `[layer, option, width]`; margins `[share]`: over the text it
    was trained on, the logit of "big" less the largest other one, by the share of tokens and layers above it.
    """

    routers: nn.Parameter
    margins: Tensor

    def __init__(
        self,
        layers: int,
        width: int,
        inner: int,
        activation: str,
        gated: bool,
        options: Sequence[str] = OPTIONS[:2],
        lora: Lora | None = None,
        about: dict[str, Any] | None = None,
    ):
        super().__init__()
        if tuple(options) not in (OPTIONS[:2], OPTIONS):
            raise BadRequest(f"options={tuple(options)} is unknown; give {OPTIONS[:2]} or {OPTIONS}")
        if inner < 1:
            raise BadRequest(f"inner={inner} is no width of a small module; give at least 1")
        self.width, self.inner, self.activation, self.gated = width, inner, activation, gated
        self.options, self.about = tuple(options), dict(about or {})
        self.small = nn.ModuleList([FeedForward(width, inner, activation, gated) for _ in range(layers)])
        self.routers = nn.Parameter(torch.zeros(layers, len(options), width))
        self.register_buffer("margins", torch.zeros(SHARES + 1))
        self.lora = lora

    @property
    def layers(self) -> int:
        return len(self.small)

    @classmethod
    def for_model(
        cls, model: Any, inner: int | None = None, options: Sequence[str] = OPTIONS[:2], rank: int = 0
    ) -> Duo:
        """An untrained one: of each big block the `inner` neurons with the largest weights, a 16th of them unless
        given; routers that know nothing. rank: of the low-rank changes of the big blocks, 0 for none."""
        adapter, config = adapter_for(model), model.config
        blocks = [projections(adapter.feed_forward(index)) for index in range(adapter.depth)]
        names = ("hidden_activation", "hidden_act", "activation_function")
        activation = next(found for name in names if (found := getattr(config, name, None)) is not None)
        inner = max(blocks[0][1].shape[0] // 16, 1) if inner is None else inner
        gated, about, lora = blocks[0][0] is not None, {"model": signature(model)}, None
        if rank:
            inside = {id(one) for index in range(adapter.depth) for one in adapter.feed_forward(index).modules()}
            shapes = {name: sizes(one) for name, one in linears(model).items() if id(one) in inside}
            lora = Lora(shapes, rank, 2.0 * rank, about)
        found = cls(adapter.depth, config.hidden_size, inner, activation, gated, options, lora, about)
        with torch.no_grad():
            for mine, (gate, up, down) in zip(found.small, blocks, strict=True):
                assert isinstance(mine, FeedForward)
                weight = up.float().norm(dim=1) * down.float().norm(dim=0)
                weight = weight if gate is None else weight * gate.float().norm(dim=1)
                best = weight.topk(min(inner, len(weight))).indices
                mine.up.weight[: len(best)] = up[best].float()
                mine.down.weight[:, : len(best)] = down[:, best].float()
                if mine.gate is not None and gate is not None:
                    mine.gate.weight[: len(best)] = gate[best].float()
        return found

    def logits(self, layer: int, states: Tensor) -> Tensor:
        """What the router of `layer` thinks of each option `[..., option]`; states `[..., width]` as its blocks read
        them."""
        return nn.functional.linear(states.to(self.routers.dtype), self.routers[layer]).float()

    def margin(self, logits: Tensor) -> Tensor:
        """Of "big" before the best of the others."""
        return logits[..., 0] - logits[..., 1:].amax(-1)

    def threshold(self, share: float) -> float:
        """The margin above which `share` of the tokens and layers chose "big" in training."""
        at = min(max(share, 0.0), 1.0) * SHARES
        low = min(int(at), SHARES - 1)
        below, above = self.margins[low : low + 2].tolist()
        return below + (above - below) * (at - low)

    def choose(self, layer: int, states: Tensor, threshold: float = 0.0) -> Tensor:
        """`[...]` of `BIG`, `SMALL`, `SKIP`: big where its margin passes the threshold, else the best of the others."""
        logits = self.logits(layer, states)
        others = logits[..., 1:].argmax(-1) + 1 if len(self.options) > 2 else SMALL
        return torch.where(self.margin(logits) > threshold, BIG, others)

    def check(self, model: Any) -> None:
        """Raise `BadRequest` unless this was trained for the model."""
        trained, here = self.about.get("model"), signature(model)
        if trained != here:
            raise BadRequest(
                f"the small modules were trained for the model with signature {trained}, this one has {here}; train "
                "some for this model (pertoken.zoo.duo), or give the model they were trained for"
            )

    def install(self, model: Any, attachment: Attachment) -> None:
        """The low-rank changes of the big blocks, while attached."""
        if self.lora is not None:
            self.lora.install(model, attachment)

    @torch.no_grad()
    def merged(self, model: Any) -> Duo:
        """The same for the model with the low-rank changes written into its weights, which this does for good."""
        self.check(model)
        if self.lora is not None:
            self.lora.merge(model)
        about = self.about | {"model": signature(model)}
        other = Duo(self.layers, self.width, self.inner, self.activation, self.gated, self.options, about=about).to(
            self.routers.device
        )
        other.load_state_dict({name: x for name, x in self.state_dict().items() if not name.startswith("lora.")})
        return other.eval()

    def save(self, directory: str | Path) -> None:
        """Write weights (bf16) and what they are for into a directory."""
        low = self.lora
        lora = None if low is None else {"shapes": low.shapes, "rank": low.rank, "alpha": low.alpha}
        kept = {"layers": self.layers, "width": self.width, "inner": self.inner, "activation": self.activation}
        kept |= {"gated": self.gated, "options": self.options, "lora": lora, "about": self.about}
        weights = {
            name: (value if name == "margins" else value.to(torch.bfloat16)).contiguous()
            for name, value in self.state_dict().items()
        }
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_file(weights, str(Path(directory) / FILE), {"duo": json.dumps(kept)})

    @classmethod
    def load(cls, directory: str | Path) -> Duo:
        """Read what `save` wrote, from a directory or zoo:NAME; raises `BadRequest` where there is nothing."""
        path = Path(resolve(str(directory))) / FILE
        if not path.is_file():
            raise BadRequest(
                f"no small modules at {path}; train some with `pertoken zoo train code-duo`, or for another model with "
                "pertoken.zoo.duo"
            )
        with safe_open(str(path), "pt") as file:
            kept = json.loads((file.metadata() or {})["duo"])
            low = kept.pop("lora")
            if low is not None:
                shapes = {name: (int(into), int(out)) for name, (into, out) in low["shapes"].items()}
                low = Lora(shapes, low["rank"], low["alpha"], {"model": kept["about"]["model"]})
            found = cls(**kept, lora=low)
            found.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        return found.eval()
