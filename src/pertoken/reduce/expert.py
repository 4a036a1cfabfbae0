"""The language expert of LangDC: a small causal language model that looks at a few frames and describes them.

For a segment of frames with states `[frame, patch, c]` of the host's encoder, pooled to p x p cells a frame:
    v = project(pooled) in R^{frame p p x d},   x = [v; embed(prompt)]
    y_1, y_2, ... = greedy continuation of x, up to the end token
    h_j = state of layer l at the position that holds y_j;   z_j = post(norm(h_j)) in the host's width
The states of a description are those at the positions that carry its tokens, in decoding and when a given description
is read in one forward alike, so that the two agree.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pertoken.core.errors import BadRequest
from pertoken.models.signature import signature
from pertoken.reduce.clips import pooled_to

FORMAT, PARTS, ABOUT = "pertoken-langdc-1", "parts.safetensors", "langdc.json"


@dataclass(frozen=True)
class Setting:
    """prompt: ids of the request to describe; end: id that ends a description; layer: whose states stand for a clip,
    0 for embeddings; span: frames of a segment; pool: cells a side that the expert sees of a frame; base: cells a side
    of each frame that the host sees besides, 0 for none; host: signature of the model that these parts were trained
    for."""

    prompt: tuple[int, ...]
    end: int
    layer: int
    span: int = 4
    pool: int = 12
    base: int = 6
    host: str = ""


@dataclass(frozen=True)
class Description:
    """ids, written `[segment, step]`: tokens, and which are a description's, before its end; hidden `[segment, step,
    d]`: states that carry them."""

    ids: Tensor
    written: Tensor
    hidden: Tensor


class Expert(nn.Module):
    """language: a causal language model; seen, host: widths of the encoder's states and of the host."""

    def __init__(self, language: Any, setting: Setting, seen: int, host: int):
        super().__init__()
        config = language.config
        if not 0 <= setting.layer <= config.num_hidden_layers:
            raise BadRequest(
                f"layer={setting.layer} is outside 0 to {config.num_hidden_layers}, the layers of this expert"
            )
        if min(setting.span, setting.pool) < 1 or setting.base < 0 or not setting.prompt:
            raise BadRequest(
                f"span={setting.span} and pool={setting.pool} must be 1 or more, base={setting.base} 0 or more, and "
                f"the prompt must have tokens, got {len(setting.prompt)}"
            )
        self.language, self.setting = language, setting
        width = config.hidden_size
        self.project = nn.Sequential(nn.Linear(seen, width), nn.GELU(), nn.Linear(width, width))
        self.norm, self.post = nn.LayerNorm(width), nn.Linear(width, host)

    def segments(self, states: Tensor) -> Tensor:
        """`[clip * segment, frame, patch, c]` of `[clip, frame, patch, c]`; the last frame is repeated to fill the last
        segment."""
        span = self.setting.span
        short = -states.shape[1] % span
        if short:
            states = torch.cat([states, states[:, -1:].expand(-1, short, -1, -1)], 1)
        return states.unflatten(1, (-1, span)).flatten(0, 1)

    def given(self, segments: Tensor) -> Tensor:
        """`[segment, position, d]` what stands before a description."""
        cells = pooled_to(self.project(segments.to(self.post.weight.dtype)), self.setting.pool, self.setting.pool)
        prompt = torch.tensor(self.setting.prompt, device=cells.device)
        asked = self.language.get_input_embeddings()(prompt).expand(len(cells), -1, -1)
        return torch.cat([cells, asked.to(cells.dtype)], 1)

    @torch.no_grad()
    def describe(self, segments: Tensor, steps: int, whole: bool = False, end_bias: float = 0.0) -> Description:
        """Greedy descriptions of up to `steps` tokens. whole: run all the steps although every description has ended;
        end_bias: added to the end token's logit, to make them shorter or, below 0, longer."""
        from transformers.cache_utils import DynamicCache

        cache, end = DynamicCache(), self.setting.end

        def following(out: Any) -> Tensor:
            logits = out.logits[:, -1].float()
            logits[:, end] += end_bias
            return logits.argmax(-1)

        out = self.language(inputs_embeds=self.given(segments), past_key_values=cache, use_cache=True, logits_to_keep=1)
        ids, written, hidden = [], [], []
        token = following(out)
        open_ = token != end
        for step in range(steps):
            if step and not whole and not bool(open_.any()):
                break
            out = self.language(
                input_ids=token[:, None],
                past_key_values=cache,
                use_cache=True,
                output_hidden_states=True,
            )
            ids.append(token)
            written.append(open_)
            hidden.append(out.hidden_states[self.setting.layer][:, -1])
            token = torch.where(open_, following(out), end)
            open_ = open_ & (token != end)
        return Description(torch.stack(ids, 1), torch.stack(written, 1), torch.stack(hidden, 1))

    def read(self, segments: Tensor, ids: Tensor) -> Any:
        """One forward over given descriptions `[segment, step]`: the language model's output with all hidden states, of
        everything from the prompt's last token on."""
        given = self.given(segments)
        embeds = torch.cat([given, self.language.get_input_embeddings()(ids).to(given.dtype)], 1)
        return self.language(
            inputs_embeds=embeds, use_cache=False, output_hidden_states=True, logits_to_keep=ids.shape[1] + 1
        )

    def carried(self, out: Any, steps: int) -> Tensor:
        """`[segment, step, d]` states that carry the `steps` tokens that `read` got."""
        return out.hidden_states[self.setting.layer][:, -steps:] if steps else out.hidden_states[0][:, :0]

    def soft(self, hidden: Tensor) -> Tensor:
        """Tokens of the host's width for states `[..., d]`."""
        return self.post(self.norm(hidden.to(self.post.weight.dtype)))

    def check(self, host: Any) -> None:
        """Raise `BadRequest` unless these parts were trained for this host."""
        if (own := signature(host)) != self.setting.host:
            raise BadRequest(
                f"these parts were trained for a model with signature {self.setting.host or '(none)'}, and this one "
                f"has {own}; give the model that they were trained with, or train them for this one"
            )

    def save(self, directory: str | Path, host: Any) -> None:
        """Write the expert in Hugging Face format and, beside it, what makes its states tokens of this host."""
        place = Path(directory)
        place.mkdir(parents=True, exist_ok=True)
        self.language.save_pretrained(place)
        parts = {k: v.contiguous().clone() for k, v in self.state_dict().items() if not k.startswith("language.")}
        save_file(parts, place / PARTS)
        kept = {"format": FORMAT, **asdict(replace(self.setting, host=signature(host)))}
        (place / ABOUT).write_text(json.dumps(kept, indent=1) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, directory: str | Path, dtype: Any = torch.float32) -> Expert:
        """Read what `save` wrote: a directory, or zoo:NAME. Raises `BadRequest` if it holds something else."""
        from transformers import AutoModelForCausalLM

        from pertoken.models.load import resolve

        place = Path(resolve(str(directory)))
        try:
            kept = json.loads((place / ABOUT).read_text(encoding="utf-8"))
            if kept.pop("format") != FORMAT:
                raise KeyError("format")
            setting = Setting(**kept | {"prompt": tuple(kept["prompt"])})
            parts = load_file(place / PARTS)
            language = AutoModelForCausalLM.from_pretrained(place, local_files_only=True)
            made = cls(language, setting, parts["project.0.weight"].shape[1], len(parts["post.weight"]))
            missing = made.load_state_dict(parts, strict=False)
            if missing.unexpected_keys or any(not name.startswith("language.") for name in missing.missing_keys):
                raise KeyError(str(missing))
        except (OSError, KeyError, TypeError, AttributeError, json.JSONDecodeError, RuntimeError) as error:
            raise BadRequest(
                f"{place} holds no parts of LangDC ({str(error).splitlines()[0]}); give a directory that Expert.save "
                "wrote, or zoo:clips-langdc/langdc"
            ) from error
        return made.to(dtype).eval()
