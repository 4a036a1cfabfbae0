"""Low-rank additions to a model's linear layers (Hu et al., arXiv 2106.09685), for chosen tokens or merged for good.

    y = W x + gate * (alpha / rank) * B A x        A [rank, in], B [out, rank], B starts at zero

Unlike adapters that are switched on and off for a whole forward, the gate is a number per token, so that tokens with
and without the addition go through one forward together.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pertoken.core.attach import Attachment
from pertoken.core.errors import BadRequest
from pertoken.models.adapter import adapter_for
from pertoken.models.load import resolve
from pertoken.models.signature import signature

FILE = "lora.safetensors"


def linears(model: Any) -> dict[str, nn.Module]:
    """The linear modules of a model's layers by name: `torch.nn.Linear`, and GPT-2's with its weight `[in, out]`."""
    layers = adapter_for(model).layers
    return {name: one for name, one in layers.named_modules() if getattr(getattr(one, "weight", None), "ndim", 0) == 2}


def sizes(module: nn.Module) -> tuple[int, int]:
    """(in, out) of a linear module."""
    first, second = module.get_parameter("weight").shape
    return (second, first) if isinstance(module, nn.Linear) else (first, second)


class Lora(nn.Module):
    """Low-rank additions for every linear module of a model's layers.

    about: what it was trained for, its `signature` of the model among it. gate: number, or tensor `[batch, token, 1]`,
    that the addition is multiplied by in the forwards to come. dropout: share of what it reads that is dropped while it
    is trained.
    """

    def __init__(
        self, shapes: dict[str, tuple[int, int]], rank: int, alpha: float, about: dict[str, Any], dropout: float = 0.0
    ):
        super().__init__()
        if rank < 1:
            raise BadRequest(f"rank={rank} adds nothing; give at least 1")
        self.shapes, self.rank, self.alpha, self.about, self.dropout = shapes, rank, alpha, about, dropout
        self.gate: Tensor | float = 1.0
        self.down = nn.ParameterList([nn.Parameter(torch.empty(rank, into)) for into, _ in shapes.values()])
        self.up = nn.ParameterList([nn.Parameter(torch.zeros(out, rank)) for _, out in shapes.values()])
        for weight in self.down:
            nn.init.kaiming_uniform_(weight, a=5**0.5)

    @classmethod
    def for_model(cls, model: Any, rank: int = 8, alpha: float = 16.0, dropout: float = 0.0) -> Lora:
        """An untrained one, which changes nothing."""
        shapes = {name: sizes(module) for name, module in linears(model).items()}
        return cls(shapes, rank, alpha, {"model": signature(model)}, dropout)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def check(self, model: Any) -> None:
        """Raise `BadRequest` unless this was trained for the model."""
        trained, here = self.about.get("model"), signature(model)
        if trained != here:
            raise BadRequest(
                f"these low-rank weights were trained for the model with signature {trained}, this one has {here}; "
                "give the model they were trained for, or train others"
            )

    def install(self, model: Any, attachment: Attachment) -> None:
        """Add to the model's linear modules while attached."""
        modules = linears(model)
        for name, down, up in zip(self.shapes, self.down, self.up, strict=True):

            def around(forward: Any, x: Tensor, down: Tensor = down, up: Tensor = up) -> Tensor:
                if isinstance(self.gate, float) and not self.gate:
                    return forward(x)
                read = torch.nn.functional.dropout(x.to(down.dtype), self.dropout, self.training)
                low = torch.nn.functional.linear(read, down)
                return forward(x) + (self.gate * self.scale * torch.nn.functional.linear(low, up)).to(x.dtype)

            attachment.wrap(modules[name], around)

    @torch.no_grad()
    def merge(self, model: Any) -> None:
        """Write the addition into the model's own weights, for good."""
        self.check(model)
        modules = linears(model)
        for name, down, up in zip(self.shapes, self.down, self.up, strict=True):
            added, module = self.scale * (up.float() @ down.float()), modules[name]
            added = added if isinstance(module, nn.Linear) else added.T
            module.weight += added.to(module.weight)

    def save(self, directory: str | Path) -> None:
        """Write weights (bf16) and what they are for into a directory."""
        about = {"shapes": self.shapes, "rank": self.rank, "alpha": self.alpha, "about": self.about}
        weights = {name: value.to(torch.bfloat16).contiguous() for name, value in self.state_dict().items()}
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_file(weights, str(Path(directory) / FILE), {"lora": json.dumps(about)})

    @classmethod
    def load(cls, directory: str | Path) -> Lora:
        """Read what `save` wrote, from a directory or zoo:NAME; raises `BadRequest` where there is nothing."""
        path = Path(resolve(str(directory))) / FILE
        if not path.is_file():
            raise BadRequest(f"no low-rank weights at {path}; train them with `pertoken zoo train`")
        with safe_open(str(path), "pt") as file:
            kept = json.loads((file.metadata() or {})["lora"])
            shapes = {name: (int(into), int(out)) for name, (into, out) in kept["shapes"].items()}
            found = cls(shapes, kept["rank"], kept["alpha"], kept["about"])
            found.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        return found.eval()
