"""`pertoken run NAME --input CLIP --prompt QUESTION`: methods that compress clips, beside the host with all tokens."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pertoken.core.attach import attach
from pertoken.core.card import card
from pertoken.core.cost import count_flops, timed
from pertoken.core.errors import BadRequest
from pertoken.methods import load_methods
from pertoken.models.images import ImageModel, read_clip
from pertoken.models.kind import WATCHING, kind_needed
from pertoken.models.llava import VIDEO, Llava
from pertoken.models.load import resolve
from pertoken.reduce.langdc import SAID
from pertoken.reduce.language import REPORT

FULL, REPEATS, FRAMES = "full", 3, 8
PARTS, QUESTION = "langdc", "how many things ?"


@dataclass(frozen=True)
class Side:
    """One side's figures. tokens: of the clip; seconds: median to the end of the answer; flops: of reading the clip and
    the question; said: description of each segment, where there is one."""

    name: str
    tokens: int
    seconds: float
    flops: int
    speedup: float
    answer: str
    said: list[str]


@dataclass
class Watched:
    """The sides in order, and a strip of the clip for those that describe it."""

    model: str
    clip: str
    question: str
    frames: int
    sides: list[Side] = field(default_factory=list)
    drawn: list[tuple[str, str, Any]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return {"model": self.model, "clip": self.clip, "question": self.question, "frames": self.frames} | {
            "runs": [asdict(side) for side in self.sides]
        }


def is_watcher(name: str) -> bool:
    """Whether a model of this name is one that clips are shown to."""
    from transformers import PretrainedConfig

    try:
        path = resolve(name)
        about, _ = PretrainedConfig.get_config_dict(path, local_files_only=Path(path).is_dir())
    except (OSError, ValueError):
        return False
    return about.get("model_type") in WATCHING


def watch(
    names: list[str],
    model_name: str,
    source: Path,
    question: str | None = None,
    dtype: str = "auto",
    device: str = "cpu",
    longest: int = 16,
    status: Callable[[str], None] = lambda text: None,
) -> Watched:
    """Ask about the clip at `source` (an animation, or a folder of frames) with all tokens and with every named method.

    question: with `<video>` where the clip belongs, or without, which is behind the clip. LangDC's parts are looked for
    in a folder `langdc` beside the model.
    """
    from transformers import AutoTokenizer

    load_methods()
    for name in names:
        if kind_needed(card(name).needs) != "video":
            fitting = "fixed_pooling, langdc, random_places"
            raise BadRequest(f"{name} does not compress clips, and {model_name} watches them; choose from {fitting}")
    clip = read_clip(source, FRAMES)
    status(f"loading {model_name}")
    host = ImageModel(model_name, dtype, "cuda" if device == "auto" and torch.cuda.is_available() else "cpu")
    tokenizer = AutoTokenizer.from_pretrained(host.path)
    frames = [host.sized(frame) for frame in clip]
    pixels = host.inputs(frames)[None]
    asked = question or QUESTION
    ids = prompt(host, tokenizer, asked, pixels)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values_videos": pixels}
    found = Watched(model_name, str(source), asked, len(frames))
    for name in [FULL, *names]:
        status(f"running {name}")
        policy = None if name == FULL else made(name, host)
        spent, out = [], None
        with torch.inference_mode(), ExitStack() as stack:
            attached = None if policy is None else stack.enter_context(attach(host.model, policy))
            for _ in range(REPEATS):
                with timed(pixels.device) as cost:
                    out = host.model.generate(**given, max_new_tokens=longest, do_sample=False)
                spent.append(cost.seconds)
            flops = count_flops(lambda: host.model(**given))
            report = {} if attached is None else dict(attached.state)
        assert out is not None
        answer = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True).strip()
        tokens = report[REPORT]["kept"][0] if report else places(host, pixels)
        seconds = statistics.median(spent)
        base = found.sides[0].seconds if found.sides else seconds
        said = [tokenizer.decode(words) for words in report.get(SAID, [[]])[0]]
        found.sides.append(Side(name, tokens, seconds, flops, base / seconds, answer, said))
        if policy is not None:
            text = f"{tokens} tokens of {found.sides[0].tokens}; {asked} {answer}"
            found.drawn.append((name, text, drawing(frames, said, getattr(policy, "expert", None))))
    return found


def made(name: str, host: ImageModel) -> Any:
    """The policy of this name for this host."""
    build: Any = card(name).build
    if "expert" not in card(name).needs:
        return build()
    from pertoken.reduce.expert import Expert

    parts = host.path / PARTS
    if not parts.is_dir():
        raise BadRequest(
            f"{name} needs its parts in {parts}, and there are none; write them there with Expert.save, or use "
            "zoo:clips-langdc"
        )
    return build(expert=Expert.load(parts))


def places(host: ImageModel, pixels: torch.Tensor) -> int:
    """Tokens that the host's own pooling makes of a clip."""
    llava = Llava(host.model, VIDEO)
    with torch.inference_mode():
        return llava.pooled(llava.frames(pixels[:, :1])).shape[1] * pixels.shape[1]


def prompt(host: ImageModel, tokenizer: Any, question: str, pixels: torch.Tensor) -> torch.Tensor:
    """`[1, token]`: the question with the clip's places in it."""
    before, mark, after = question.partition("<video>")
    if not mark:
        before, after = "", question
    parts = [tokenizer(part, add_special_tokens=False)["input_ids"] if part.strip() else [] for part in (before, after)]
    known = tokenizer.unk_token_id
    if known is not None and known in [*parts[0], *parts[1]]:
        strange = [word for word in question.split() if tokenizer.convert_tokens_to_ids(word) == known]
        raise BadRequest(f"the model does not know {', '.join(map(repr, strange))}; ask, for example, {QUESTION!r}")
    shown = [host.model.config.video_token_id] * places(host, pixels)
    return torch.tensor([[*parts[0], *shown, *parts[1]]], device=pixels.device)


def drawing(frames: list[np.ndarray], said: list[str], expert: Any) -> Any:
    """The frames, and what is said of each segment below them."""
    from PIL import Image

    from pertoken.view.strip import strip

    shown = [Image.fromarray(frame).resize((144, 144), Image.Resampling.NEAREST) for frame in frames]
    span = expert.setting.span if expert is not None else len(frames)
    runs = [
        (start, min(span, len(frames) - start), f"{len(text.split())} tokens: {text}")
        for start, text in zip(range(0, len(frames), span), said, strict=False)
    ]
    return strip([shown], runs)
