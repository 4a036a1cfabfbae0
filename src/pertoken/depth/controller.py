"""The controller of StopExit: one linear classifier for all layers, and its heads, if it has any."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pertoken.core.errors import BadRequest
from pertoken.models.load import resolve
from pertoken.models.signature import signature

STOP, EXIT, GO_ON = 0, 1, 2
FILE = "controller.safetensors"


class Controller(nn.Module):
    """States `[..., width]` -> logits of {stop, exit, go on} `[..., 3]`, without a bias, the same for all layers.

    layers: after how many layers it is asked; heads: for each of them a linear map from un-normed states to logits over
    `vocabulary` (None: tokens leave through the model's own norm and head); about: what it was trained on, the
    `signature` of its model among it.
    """

    def __init__(self, width: int, layers: tuple[int, ...], vocabulary: int | None = None, about: dict | None = None):
        super().__init__()
        if not layers or sorted(set(layers)) != list(layers) or layers[0] < 1:
            raise BadRequest(f"layers={layers} must be numbers of layers run, rising from at least 1")
        self.width, self.layers, self.vocabulary, self.about = width, tuple(layers), vocabulary, dict(about or {})
        self.judge = nn.Linear(width, 3, bias=False)
        nn.init.zeros_(self.judge.weight)
        self.heads = nn.ModuleDict(
            {} if vocabulary is None else {str(at): nn.Linear(width, vocabulary, bias=False) for at in layers}
        )

    def forward(self, states: Tensor) -> Tensor:
        return self.judge(states.to(self.judge.weight.dtype))

    def logits(self, model: Any, ran: int, states: Tensor) -> Tensor:
        """What a token that leaves after `ran` layers says."""
        from pertoken.models.adapter import adapter_for

        if self.heads:
            return self.heads[str(ran)](states.to(self.judge.weight.dtype))
        adapter = adapter_for(model)
        return adapter.head(adapter.norm(states))

    def check(self, model: Any) -> None:
        """Raise `BadRequest` unless this was trained for the model."""
        trained, here = self.about.get("model"), signature(model)
        if trained is not None and trained != here:
            raise BadRequest(
                f"the controller was trained for the model with signature {trained}, this one has {here}; train one "
                "for this model"
            )
        width, depth = model.config.hidden_size, model.config.num_hidden_layers
        if self.width != width or self.layers[-1] >= depth:
            raise BadRequest(
                f"the controller reads states of width {self.width} after {self.layers} layers; the model has width "
                f"{width} and {depth} layers, and the last of them is left by all. Train one for this model"
            )

    def save(self, directory: str | Path) -> None:
        """Write it (bf16) into a directory."""
        about = {"width": self.width, "layers": self.layers, "vocabulary": self.vocabulary, "about": self.about}
        weights = {name: value.to(torch.bfloat16).contiguous() for name, value in self.state_dict().items()}
        Path(directory).mkdir(parents=True, exist_ok=True)
        save_file(weights, str(Path(directory) / FILE), {"controller": json.dumps(about)})

    @classmethod
    def load(cls, directory: str | Path) -> Controller:
        """Read what `save` wrote, from a directory or zoo:NAME; raises `BadRequest` where there is none."""
        path = Path(resolve(str(directory))) / FILE
        if not path.is_file():
            raise BadRequest(
                f"no controller at {path}; train one with `pertoken zoo train code-stop`, or for another model with "
                "pertoken.zoo.stopping"
            )
        with safe_open(str(path), "pt") as file:
            kept = json.loads((file.metadata() or {})["controller"])
            found = cls(kept["width"], tuple(kept["layers"]), kept["vocabulary"], kept["about"])
            found.load_state_dict({name: file.get_tensor(name).float() for name in file.keys()})  # noqa: SIM118
        return found.eval()
