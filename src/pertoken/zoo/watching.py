"""The small models of clips: LangDC's expert that describes them, and its host that answers questions about them.

- describer: the expert, which begins as the scenes' answerer's language model, behind the answerer's encoder, which is
  kept; the host is so small that its expert is no smaller. It learns condensed descriptions of segments, whose length
  is how much there is to tell (`scenes.Clip.description`).
- watcher: the host, a LLaVA-NeXT-Video that begins as the answerer. In two of five batches frames are pooled to one of
  `GRIDS`, so that every fixed ratio is one that it knows; in the others it is shown a coarse grid and the expert's
  states, of one of a few layers with a projection for each. Descriptions are the given ones, read in one forward, or in
  half of those batches the expert's own, as when it is used.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import (
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    ViTConfig,
)

from pertoken.core.attach import attach
from pertoken.core.budget import Budget
from pertoken.models.llava import VIDEO as SHOWN
from pertoken.models.llava import Llava
from pertoken.models.signature import signature
from pertoken.reduce.clips import pooled_to
from pertoken.reduce.expert import Expert, Setting
from pertoken.reduce.fixed_pooling import FixedPooling
from pertoken.reduce.langdc import LangDC
from pertoken.zoo import words
from pertoken.zoo.scene_recipe import DESCRIBES, HELD, SceneRecipe
from pertoken.zoo.scenes import Clip, as_input, balanced, clip, clip_questions, kind_of_question
from pertoken.zoo.seeing import DESCRIBE, prompts, said, text_config
from pertoken.zoo.turns import UNLEARNT, Turn, turns
from pertoken.zoo.words import END, IMAGE, NUMBER, VIDEO

SEEN: dict[tuple[str, int], tuple[list[Clip], Tensor]] = {}  # what an encoder that is not trained made of clips
GRIDS = ((4, 4), (2, 4), (2, 2), (1, 2), (1, 1))
FRAMES, SPAN, POOL, BASE = 8, 4, 4, 2
PARTS, LAYERS = "langdc", "layers.safetensors"


def watcher(recipe: SceneRecipe, vision: ViTConfig) -> LlavaNextVideoForConditionalGeneration:
    side = recipe.size // recipe.patch
    config: Any = LlavaNextVideoConfig(
        vision_config=vision,
        text_config=text_config(recipe),
        vision_feature_layer=-2,
        image_token_index=NUMBER[IMAGE],
        video_token_index=NUMBER[VIDEO],
        image_grid_pinpoints=[[recipe.size, recipe.size]],
        spatial_pool_stride=2,
        image_seq_length=side**2,
        video_seq_length=FRAMES * (side // 2) ** 2,
        tie_word_embeddings=True,
    )
    return LlavaNextVideoForConditionalGeneration(config)


class Both(nn.Module):
    """A host that is shown clips and the experts that describe them for it: one for each of a few layers, which differ
    in their projection only; the first is the one that is used."""

    def __init__(self, recipe: SceneRecipe, vision: ViTConfig):
        super().__init__()
        self.recipe = recipe
        self.host = watcher(recipe, vision)
        layers = recipe.text_layers
        setting = Setting(tuple(words.encoded(DESCRIBE)), NUMBER[END], round(15 / 24 * layers), SPAN, POOL, BASE)
        language = LlamaForCausalLM(text_config(recipe))
        used = Expert(language, setting, recipe.width, recipe.text_width)
        others = [Expert(language, replace(setting, layer=i), recipe.width, recipe.text_width) for i in (0, layers)]
        for other in others:
            other.project = used.project
        self.experts = nn.ModuleList([used, *others])
        self.host.model.vision_tower.requires_grad_(False)
        if recipe.task == DESCRIBES:
            self.host.requires_grad_(False)
        else:
            language.requires_grad_(False)
            used.project.requires_grad_(False)

    @property
    def expert(self) -> Expert:
        found = self.experts[0]
        assert isinstance(found, Expert)
        return found

    def save_pretrained(self, directory: Path) -> None:
        """The host in `directory`, and in `langdc` within it LangDC's parts, with those for other layers."""
        self.host.save_pretrained(directory)
        self.expert.save(directory / PARTS, self.host)
        others: Any = list(self.experts)[1:]
        parts = {
            f"{one.setting.layer}.{name}": weight.contiguous().clone()
            for one in others
            for name, weight in one.state_dict().items()
            if name.startswith(("norm.", "post."))
        }
        save_file(parts, directory / PARTS / LAYERS)
        words.save(directory / PARTS)


def at_layer(expert: Expert, directory: Path, layer: int) -> Expert:
    """The expert whose states of another layer were made tokens too."""
    parts = {k.split(".", 1)[1]: v for k, v in load_file(directory / LAYERS).items() if k.startswith(f"{layer}.")}
    made = Expert(expert.language, replace(expert.setting, layer=layer), *widths(expert))
    made.project = expert.project
    made.load_state_dict(parts, strict=False)
    return made.eval()


def widths(expert: Expert) -> tuple[int, int]:
    """Of the encoder's states and of the host."""
    first: Any = expert.project[0]
    return first.in_features, expert.post.out_features


def begun(both: Both, paths: list[str]) -> None:
    """A run's first weights: the answerer's at the first path, and if there is another the describer's."""
    start: Any = LlavaForConditionalGeneration.from_pretrained(paths[0], dtype=torch.float32)
    weights = start.state_dict()
    both.host.load_state_dict(weights, strict=False)
    if len(paths) == 1:
        own = {k.replace("model.language_model.", "model."): v for k, v in weights.items() if "language_model" in k}
        kept = both.expert.language.state_dict()
        both.expert.language.load_state_dict({k: own.get(k, v) for k, v in kept.items()})
        both.expert.language.tie_weights()
        first, second = start.model.multi_modal_projector.linear_1, start.model.multi_modal_projector.linear_2
        both.expert.project[0].load_state_dict(first.state_dict())
        both.expert.project[2].load_state_dict(second.state_dict())
        return
    expert = Expert.load(Path(paths[1]) / PARTS)
    both.expert.language.load_state_dict(expert.language.state_dict())
    both.expert.project.load_state_dict(expert.project.state_dict())


def clips(first: int, count: int, size: int) -> tuple[list[Clip], Tensor]:
    """Clips of seeds from `first` on, and what models take, `[clip, frame, 3, size, size]`."""
    made = [clip(seed, FRAMES, size) for seed in range(first, first + count)]
    return made, as_input([frame for one in made for frame in one.frames]).unflatten(0, (count, FRAMES))


def watched(both: Both, recipe: SceneRecipe, first: int) -> tuple[list[Clip], Tensor]:
    """A batch of the recipe's clips, of their frames the first only, and the encoder's states of all; made once."""
    start = recipe.seed + (first - recipe.seed) % recipe.clips
    key = (signature(both.host.model.vision_tower), start)
    if key not in SEEN:
        made, pixels = clips(start, recipe.batch, recipe.size)
        with torch.no_grad():
            states = Llava(both.host, SHOWN).frames(pixels).half()
        SEEN[key] = [replace(one, frames=one.frames[:1]) for one in made], states
    made, states = SEEN[key]
    return made, states.float()


def loss(both: Both, recipe: SceneRecipe, first: int) -> Tensor:
    """Of the task of a recipe, on the clips from seed `first` on."""
    rng = np.random.default_rng(first)
    made, states = watched(both, recipe, first)
    if recipe.task == DESCRIBES:
        return describing(both.expert, states, made)
    rows = [balanced(clip_questions(one), recipe.questions, rng) for one in made]
    if rng.random() < 0.4:
        shown = pooled_to(states, *GRIDS[rng.integers(len(GRIDS))])
        tokens = both.host.model.multi_modal_projector(shown)
        return answering(both.host, tokens, tokens.new_ones(tokens.shape[:2], dtype=torch.bool), rows)
    expert: Any = both.experts[int(rng.integers(len(both.experts)))]
    return answering(both.host, *soft(both.host, expert, states, made, own=bool(rng.random() < 0.5)), rows)


def descriptions(made: list[Clip]) -> tuple[Tensor, Tensor]:
    """Ids `[segment, step]` of the descriptions of all segments, filled up with the end, and their lengths."""
    texts = [one.description(segment).split() for one in made for segment in range(len(one.ways))]
    rows = [words.encoded(" ".join(text)) for text in texts]
    width = max(map(len, rows))
    filled = torch.tensor([row + [NUMBER[END]] * (width - len(row)) for row in rows])
    return filled, torch.tensor([len(row) for row in rows])


def describing(expert: Expert, states: Tensor, made: list[Clip]) -> Tensor:
    """Nats per word of the descriptions and their ends."""
    ids, lengths = descriptions(made)
    logits = expert.read(expert.segments(states), ids).logits.float()
    wanted = F.pad(ids, (0, 1), value=NUMBER[END])
    wanted = wanted.masked_fill(torch.arange(wanted.shape[1]) > lengths[:, None], UNLEARNT)
    return F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=UNLEARNT)


def soft(host: Any, expert: Expert, states: Tensor, made: list[Clip], own: bool) -> tuple[Tensor, Tensor]:
    """What LangDC shows the host, `[clip, place, width]`, and which places hold something; own: with the expert's own
    descriptions instead of the given ones."""
    segments = expert.segments(states)
    with torch.no_grad():
        if own:
            found = expert.describe(segments, 32)
            hidden, there = found.hidden, found.written.clone()
            there[:, 0] = True
        else:
            ids, lengths = descriptions(made)
            hidden = expert.carried(expert.read(segments, ids), ids.shape[1])
            there = torch.arange(ids.shape[1]) < lengths[:, None]
    each = len(segments) // len(states)
    tokens = expert.soft(hidden).unflatten(0, (-1, each)).flatten(1, 2)
    there = there.unflatten(0, (-1, each)).flatten(1, 2)
    coarse = host.model.multi_modal_projector(pooled_to(states, BASE, BASE))
    return torch.cat([coarse, tokens], 1), torch.cat([there.new_ones(coarse.shape[:2]), there], 1)


def answering(host: Any, tokens: Tensor, there: Tensor, rows: list[list[Turn]]) -> Tensor:
    """Nats per word of the answers behind what is shown."""
    given = turns(rows, there)
    embeds = torch.cat([tokens, host.get_input_embeddings()(given.ids)], 1)
    out = host.model.language_model(
        inputs_embeds=embeds,
        attention_mask=given.allowed,
        position_ids=given.positions,
        use_cache=False,
    )
    return given.loss(host.lm_head(out.last_hidden_state[:, tokens.shape[1] :]))


def asked(count: int, size: int = 48, first: int = HELD) -> tuple[list[Clip], Tensor, list[Turn]]:
    """Clips that no model was trained on, and a question with its answer about each; of all kinds alike."""
    made, pixels = clips(first, count, size)
    rng = np.random.default_rng(first)
    return made, pixels, [balanced(clip_questions(one), 1, rng)[0] for one in made]


@torch.no_grad()
def right(host: Any, pixels: Tensor, pairs: list[Turn], batch: int = 32) -> list[bool]:
    """For each clip, whether the host's answer to its question is right; with whatever is attached to the host."""
    found = []
    for start in range(0, len(pairs), batch):
        some = pairs[start : start + batch]
        given = prompts([question for question, _ in some], VIDEO, host.config.video_seq_length)
        written = said(host, given | {"pixel_values_videos": pixels[start : start + batch]})
        found += [own == answer for (_, answer), own in zip(some, written, strict=True)]
    return found


@torch.no_grad()
def quality(both: Both, recipe: SceneRecipe, count: int = 128) -> dict[str, float]:
    """Held-out figures: share of right answers with all of the host's tokens and with LangDC's, or of descriptions."""
    both.eval()
    made, pixels, pairs = asked(count, recipe.size)
    if recipe.task == DESCRIBES:
        states = Llava(both.host, SHOWN).frames(pixels)
        ids, lengths = descriptions(made)
        found = both.expert.describe(both.expert.segments(states), ids.shape[1] + 1, whole=True)
        own = found.written.sum(-1)
        exact = (found.ids[:, : ids.shape[1]] == ids).all(-1) & (own == lengths)
        return {"exact": float(exact.float().mean()), "length": float((own == lengths).float().mean())}
    figures = {"full": share(right(both.host, pixels, pairs))}
    with attach(both.host, FixedPooling(Budget(tokens=FRAMES * BASE**2))):
        figures["coarse"] = share(right(both.host, pixels, pairs))
    both.expert.setting = replace(both.expert.setting, host=signature(both.host))
    with attach(both.host, LangDC(expert=both.expert)):
        answers = right(both.host, pixels, pairs)
    figures["langdc"] = share(answers)
    for kind in sorted({kind_of_question(question) for question, _ in pairs}):
        own = [one for one, (question, _) in zip(answers, pairs, strict=True) if kind_of_question(question) == kind]
        figures[f"langdc, {kind}"] = share(own)
    return figures


def share(found: list[bool]) -> float:
    return sum(found) / len(found)
