"""The router of R2R: what it reads of a small model, the network, and how its threshold is chosen."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pertoken.core.errors import BadRequest
from pertoken.models.load import resolve
from pertoken.models.signature import signature

FILE, TOP = "router.safetensors", 100


@dataclass(frozen=True)
class Seen:
    """What a small model saw where it chose its tokens. state `[token, width]`: after its final norm; logits `[token,
    vocabulary]` as it gave them, or their largest alone; tokens `[token]`: chosen."""

    state: Tensor
    logits: Tensor
    tokens: Tensor


class Block(nn.Module):
    """x + drop(W2 drop(gelu(W1 norm(x))))."""

    def __init__(self, width: int, dropout: float):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.drop(self.down(self.drop(F.gelu(self.up(self.norm(x))))))


class Router(nn.Module):
    """`Seen` of tokens -> logits `[token]` that they are divergent.

    width: of the small model's states; hidden and blocks: the network's (the paper's: 1024 and 6); top: how many of the
    largest logits are read; about: what it was trained for, with its `threshold`.
    """

    def __init__(
        self,
        small: Any,
        hidden: int = 1024,
        blocks: int = 6,
        top: int = TOP,
        dropout: float = 0.1,
        about: dict[str, Any] | None = None,
    ):
        super().__init__()
        width, vocabulary = small.config.hidden_size, small.config.vocab_size
        self.sizes = {"hidden": hidden, "blocks": blocks, "top": min(top, vocabulary), "dropout": dropout}
        self.about = {"model": signature(small), "threshold": 0.5} | dict(about or {})
        self.embedding = [small.get_input_embeddings()]  # in a list: the small model's own, not trained or saved here
        self.from_logits = nn.Linear(self.sizes["top"], width)
        self.join = nn.Linear(3 * width, hidden)
        self.first = nn.Linear(hidden, hidden)
        self.blocks = nn.ModuleList([Block(hidden, dropout) for _ in range(blocks)])
        self.norm, self.head = nn.LayerNorm(hidden), nn.Linear(hidden, 1)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)

    @property
    def threshold(self) -> float:
        """Probability from which a token is divergent, as chosen when it was trained."""
        return float(self.about["threshold"])

    def forward(self, seen: Seen) -> Tensor:
        dtype = self.join.weight.dtype
        best = self.from_logits(seen.logits.to(dtype).topk(self.sizes["top"], -1).values)
        word = self.embedding[0](seen.tokens).to(dtype)
        x = self.first(self.join(torch.cat([seen.state.to(dtype), word, best], -1)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))[..., 0]

    def check(self, small: Any) -> None:
        """Raise `BadRequest` unless it was trained for this small model."""
        trained, here = self.about["model"], signature(small)
        if trained != here:
            raise BadRequest(
                f"the router was trained for the small model with signature {trained}, this one has {here}; train one "
                "for this model with pertoken.decode.router_training.train_router"
            )

    def save(self, directory: str | Path) -> None:
        """Write weights (bf16) and what they are for into a directory."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        weights = {name: value.to(torch.bfloat16).contiguous() for name, value in self.state_dict().items()}
        about = json.dumps({"sizes": self.sizes, "about": self.about})
        save_file(weights, str(Path(directory) / FILE), {"router": about})

    @classmethod
    def load(cls, directory: str | Path, small: Any) -> Router:
        """Read what `save` wrote, from a directory or zoo:NAME, for this small model; raises `BadRequest` where there
        is none."""
        path = Path(resolve(str(directory))) / FILE
        if not path.is_file():
            raise BadRequest(f"no router at {path}; train one with pertoken.decode.router_training.train_router")
        with safe_open(str(path), "pt") as file:
            kept = json.loads((file.metadata() or {})["router"])
            found = cls(small, **kept["sizes"], about=kept["about"])
            found.check(small)
            found.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        return found.eval()


def threshold_for(chances: Tensor, divergent: Tensor, recall: float = 0.95) -> float:
    """Of 100 thresholds from 0.01 to 0.99 the one that questions fewest tokens while it finds at least this share of
    the divergent ones; where none does, the one that finds most. Both `[token]`."""
    levels = torch.linspace(0.01, 0.99, 100)
    asked = chances[:, None] >= levels
    found = (asked & divergent[:, None]).double().sum(0) / divergent.sum().clamp(min=1)
    rate = asked.double().mean(0)
    if bool((found >= recall).any()):
        rate = rate.masked_fill(found < recall, 2)
        return float(levels[int(rate.argmin())])
    return float(levels[int(found.argmax())])
