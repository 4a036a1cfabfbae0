"""Who decides that a token needs another pass: a trained network, the entropy, chance, or what is known already."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pertoken.core.errors import BadRequest
from pertoken.core.signals import entropy
from pertoken.depth.passes import PassView
from pertoken.depth.random_exit import uniform
from pertoken.models.load import resolve
from pertoken.models.signature import signature

FILE = "decider.safetensors"
BLOCKS, DROPOUT = 6, 0.1
SHARES = 1000  # places at which a decider knows what share of a text it lets go on


class Decider(ABC):
    """layers: numbers of layers run after which it looks at a token's state."""

    layers: tuple[int, ...] = ()

    @abstractmethod
    def chances(self, view: PassView) -> Tensor:
        """`[n]` in [0, 1] for the tokens asked: how likely each needs another pass."""

    def check(self, model: Any) -> None:
        """Raise `BadRequest` if it cannot judge this model."""
        return None


@dataclass(frozen=True)
class ByEntropy(Decider):
    """Tokens whose next-token entropy is above `nats`. The baseline of a trained one."""

    nats: float

    def chances(self, view: PassView) -> Tensor:
        assert view.logits is not None
        return (entropy(view.logits) > self.nats).float()


@dataclass(frozen=True)
class ByChance(Decider):
    """A share of all places, told by a hash of the place, so that a row is in a batch what it is alone. The control."""

    share: float
    seed: int = 0

    def chances(self, view: PassView) -> Tensor:
        assert view.positions is not None and view.asked is not None
        places = view.positions.expand_as(view.asked)[view.asked]
        return (uniform(places, self.seed + 1009 * view.passed) < self.share).float()


@dataclass(frozen=True)
class AsGiven(Decider):
    """Passes that are known, `[row, place]` int: an oracle's. For texts read at once or token by token."""

    passes: Tensor

    def chances(self, view: PassView) -> Tensor:
        assert view.positions is not None and view.asked is not None
        wanted = self.passes.to(view.valid.device).gather(1, view.positions.expand_as(view.asked))
        return (wanted > view.passed)[view.asked].float()


class NeuralDecider(nn.Module, Decider):
    """The paper's network: states of some layers and the largest logits of a token -> a chance.

    `[n, layer * width]` states as they are, beside the `top` largest logits in order through a linear map to `width`;
    two linear maps to `inner`; six residual blocks x + W2 gelu(W1 norm(x)) with `4 * inner` within; a norm; one output.
    about: what it was trained for: the `signature` of its model, and "shares", chances above which each thousandth of
    a held-out text lies.
    """

    def __init__(
        self, width: int, layers: tuple[int, ...], inner: int = 256, top: int = 100, about: dict[str, Any] | None = None
    ):
        super().__init__()
        if not layers or sorted(set(layers)) != list(layers) or layers[0] < 0 or min(inner, top) < 1:
            raise BadRequest(
                f"layers={layers} must be rising numbers of layers run, from 0 for the input; inner={inner} and "
                f"top={top} at least 1"
            )
        self.width, self.layers, self.inner, self.top = width, tuple(layers), inner, top
        self.about = dict(about or {})
        self.from_logits = nn.Linear(top, width)
        self.first = nn.Linear((len(layers) + 1) * width, inner)
        self.second = nn.Linear(inner, inner)
        self.blocks = nn.ModuleList([_block(inner) for _ in range(BLOCKS)])
        self.norm, self.last = nn.LayerNorm(inner), nn.Linear(inner, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    @classmethod
    def for_model(cls, model: Any, inner: int = 256, count: int = 5) -> NeuralDecider:
        """An untrained one, which looks at `count` layers, spread evenly from the input to the last but one."""
        depth = model.config.num_hidden_layers
        spread = (torch.linspace(0, max(depth - 2, 0), min(count, max(depth - 1, 1))) + 0.5).int().unique()
        top = min(100, model.config.vocab_size)
        about = {"model": signature(model)}
        return cls(model.config.hidden_size, tuple(spread.tolist()), inner, top, about)

    def forward(self, states: list[Tensor], logits: Tensor) -> Tensor:
        """Log-odds `[n]`; states `[n, width]` of each of `layers`, logits `[n, vocabulary]`."""
        dtype = self.last.weight.dtype
        best = self.from_logits(logits.topk(self.top, -1).values.to(dtype))
        x = self.second(self.first(torch.cat([*(state.to(dtype) for state in states), best], -1)))
        for block in self.blocks:
            x = x + block(x)
        return self.last(self.norm(x))[..., 0]

    def chances(self, view: PassView) -> Tensor:
        assert view.logits is not None
        missing = [at for at in self.layers if at not in view.states]
        if missing:
            raise BadRequest(
                f"the decider looks at states after {self.layers} layers, and this forward did not run them all "
                f"(missing: {missing}); give a decoder that does not draft through the model's first layers"
            )
        return self([view.states[at] for at in self.layers], view.logits).float().sigmoid()

    def threshold(self, share: float) -> float:
        """The chance above which `share` of a held-out text lies; raises `BadRequest` for a decider that was never
        shown one."""
        shares = self.about.get("shares")
        if not shares:
            raise BadRequest(
                "this decider does not know what share of a text it lets go on; give threshold=..., or train it with "
                "pertoken.zoo.thinking"
            )
        return float(shares[min(round(share * SHARES), SHARES)])

    def check(self, model: Any) -> None:
        """Raise `BadRequest` unless this was trained for the model."""
        trained, here = self.about.get("model"), signature(model)
        if trained != here:
            raise BadRequest(
                f"the decider was trained for the model with signature {trained}, this one has {here}; train one for "
                "this model"
            )
        self.to(next(model.parameters()).device)

    def save(self, directory: str | Path) -> None:
        """Write it (bf16) into a directory."""
        about = {"width": self.width, "layers": self.layers, "inner": self.inner, "top": self.top, "about": self.about}
        weights = {name: value.to(torch.bfloat16).contiguous() for name, value in self.state_dict().items()}
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_file(weights, str(Path(directory) / FILE), {"decider": json.dumps(about)})

    @classmethod
    def load(cls, directory: str | Path) -> NeuralDecider:
        """Read what `save` wrote, from a directory or zoo:NAME; raises `BadRequest` where there is none."""
        path = Path(resolve(str(directory))) / FILE
        if not path.is_file():
            raise BadRequest(
                f"no decider at {path}; train one with `pertoken zoo train reasoning-think`, or for another model with "
                "pertoken.zoo.thinking"
            )
        with safe_open(str(path), "pt") as file:
            kept = json.loads((file.metadata() or {})["decider"])
            found = cls(kept["width"], tuple(kept["layers"]), kept["inner"], kept["top"], kept["about"])
            found.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        return found.eval()


def _block(inner: int) -> nn.Module:
    return nn.Sequential(
        nn.LayerNorm(inner),
        nn.Linear(inner, 4 * inner),
        nn.GELU(),
        nn.Dropout(DROPOUT),
        nn.Linear(4 * inner, inner),
        nn.Dropout(DROPOUT),
    )
