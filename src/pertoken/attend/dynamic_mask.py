"""What DMA trains: per layer and key head, how much the values of a key make it worth reading (see `attend.dma`)."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from pertoken.attend.reader import readable
from pertoken.core.errors import BadRequest
from pertoken.models.adapter import Adapter
from pertoken.models.load import resolve

FORMS = ("softplus", "exp")


class KeyScorer(nn.Module):
    """Values of one layer -> z `[batch, kv_heads, key]` fp32. weight `[kv_heads, kv_heads * dim]`, A `[kv_heads]`."""

    def __init__(self, kv_heads: int, dim: int, noise: float = 0.0, generator: torch.Generator | None = None):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(kv_heads, kv_heads * dim, generator=generator) * 0.02)
        self.A = nn.Parameter(torch.randn(kv_heads, generator=generator) * noise)
        self._zero: tuple[Any, bool] = (None, False)

    def forward(self, values: Tensor) -> Tensor:
        with torch.autocast(values.device.type, enabled=False):
            weight, scale = (p.to(values.device, torch.float32) for p in (self.weight, self.A))
            dt = F.linear(values.transpose(1, 2).flatten(2).float(), weight)
            return (F.softplus(dt) * scale).transpose(1, 2)

    @property
    def silent(self) -> bool:
        """Whether A is 0, and no gradient is wanted: then all keys are even. Looked up once per change of A."""
        if torch.is_grad_enabled():
            return False
        version = (self.A.data_ptr(), -1 if self.A.is_inference() else self.A._version)
        if self._zero[0] != version:
            self._zero = version, not bool(self.A.any())
        return self._zero[1]


class DynamicMask(nn.Module):
    """What DMA trains: a `KeyScorer` for each of these layers. form: "softplus" or "exp", with `clamp`
    the largest exponent of the latter; noise: deviation of A at the start, 0 for none."""

    def __init__(
        self,
        layers: Iterable[int],
        kv_heads: int,
        dim: int,
        *,
        form: str = "softplus",
        clamp: float = 4.0,
        noise: float = 0.0,
        seed: int = 0,
    ):
        super().__init__()
        if form not in FORMS:
            raise BadRequest(f"form={form!r} is unknown; choose {' or '.join(map(repr, FORMS))}")
        self.kv_heads, self.dim, self.form, self.clamp = kv_heads, dim, form, clamp
        generator = torch.Generator().manual_seed(seed)
        self.scorers = nn.ModuleDict({str(i): KeyScorer(kv_heads, dim, noise, generator) for i in layers})

    @classmethod
    def for_model(cls, model: Any, **settings: Any) -> DynamicMask:
        """An untrained one for the full-attention layers of a causal language model, on its device, in fp32."""
        adapter = readable("DMA", model)
        return cls(full_layers(adapter), adapter.kv_heads, adapter.head_dim, **settings).to(adapter.device)

    @property
    def layers(self) -> list[int]:
        return [int(name) for name in self.scorers]

    def scorer(self, layer: int) -> KeyScorer:
        found = self.scorers[str(layer)]
        assert isinstance(found, KeyScorer)
        return found

    def delta(self, z: Tensor) -> Tensor:
        """What is added to the scores of keys with these z."""
        return z if self.form == "softplus" else z.clamp(max=self.clamp).exp()

    def save(self, path: str | Path) -> None:
        """Write the weights and their shape as one safetensors file."""
        about = {name: getattr(self, name) for name in ("layers", "kv_heads", "dim", "form", "clamp")}
        state = {name: tensor.contiguous() for name, tensor in self.state_dict().items()}
        save_file(state, str(path), {"dynamic_mask": json.dumps(about)})

    @classmethod
    def load(cls, path: str | Path) -> DynamicMask:
        """Read what `save` wrote, from a file, a directory with `dynamic_mask.safetensors`, or a zoo:NAME."""
        path = Path(resolve(str(path)))
        path = path / "dynamic_mask.safetensors" if path.is_dir() else path
        if not path.is_file():
            raise BadRequest(f"no dynamic mask at {path}; train one (see DMA.parameters) and write it with .save(path)")
        with safe_open(str(path), "pt") as file:
            about = (file.metadata() or {}).get("dynamic_mask")
            if about is None:
                raise BadRequest(f"{path} is no dynamic mask: its header says nothing about one; write it with .save")
            made = cls(**json.loads(about))
            made.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
        return made


def full_layers(adapter: Adapter) -> list[int]:
    """Numbers of the layers without a sliding window."""
    return [layer for layer in range(adapter.depth) if adapter.window(layer) is None]
