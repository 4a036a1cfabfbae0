"""The small model that answers questions about a scene: a LLaVA whose encoder begins as the scenes' segmenter's.

It reads the encoder's last layer but one, as LLaVA does. A row of a batch is a scene with several questions, each of
which sees the scene and itself only (`turns`), and a request to describe it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlavaConfig, LlavaForConditionalGeneration, PretrainedConfig, ViTConfig

from pertoken.models.segmenter import PlainSegmenter
from pertoken.zoo import words
from pertoken.zoo.scene_recipe import HELD, SceneRecipe
from pertoken.zoo.scenes import as_input, balanced, description, kind_of_question, questions, scene
from pertoken.zoo.turns import Turn, turns
from pertoken.zoo.words import END, IMAGE, NUMBER, PAD

DESCRIBE = "describe ?"


def text_config(recipe: SceneRecipe) -> LlamaConfig:
    """Of a language model over the words of scenes and clips."""
    return LlamaConfig(
        vocab_size=len(words.WORDS),
        hidden_size=recipe.text_width,
        intermediate_size=8 * recipe.text_width // 3,
        num_hidden_layers=recipe.text_layers,
        num_attention_heads=recipe.heads,
        num_key_value_heads=recipe.heads,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        pad_token_id=NUMBER[PAD],
        bos_token_id=NUMBER[END],
        eos_token_id=NUMBER[END],
    )


def made(recipe: SceneRecipe, vision: ViTConfig) -> LlavaForConditionalGeneration:
    config: Any = LlavaConfig(
        vision_config=vision,
        text_config=text_config(recipe),
        vision_feature_layer=-2,
        image_token_index=NUMBER[IMAGE],
        image_seq_length=(recipe.size // recipe.patch) ** 2,
        tie_word_embeddings=True,
    )
    return LlavaForConditionalGeneration(config)


def begun(model: Any, path: str) -> None:
    """Give it the weights of the answerer, or the encoder of the segmenter, at `path`."""
    about, _ = PretrainedConfig.get_config_dict(path)
    if about["model_type"] == "llava":
        model.load_state_dict(type(model).from_pretrained(path, dtype=torch.float32).state_dict())
        return
    segmenter = PlainSegmenter.from_pretrained(path)
    model.model.vision_tower.load_state_dict(segmenter.encoder.state_dict())  # type: ignore[arg-type]


def loss(model: Any, recipe: SceneRecipe, first: int) -> torch.Tensor:
    """Of the answers about the scenes from seed `first` on."""
    scenes = [scene(seed, recipe.size) for seed in range(first, first + recipe.batch)]
    rng = np.random.default_rng(first)
    rows = [[*balanced(questions(one), recipe.questions, rng), (DESCRIBE, description(one))] for one in scenes]
    logits, given = read(model, as_input(scenes), rows)
    return given.loss(logits)


def read(model: Any, pixels: torch.Tensor, rows: list[list[Turn]]) -> tuple[torch.Tensor, Any]:
    """Logits of the rows' texts, each behind its scene, and the texts."""
    patches = model.config.image_seq_length
    given = turns(rows, torch.ones(len(rows), patches, dtype=torch.bool))
    ids = torch.cat([torch.full((len(rows), patches), NUMBER[IMAGE]), given.ids], 1)
    out = model(
        input_ids=ids,
        pixel_values=pixels,
        attention_mask=given.allowed,
        position_ids=given.positions,
        logits_to_keep=given.ids.shape[1],
        use_cache=False,
    )
    return out.logits, given


def asked(count: int, size: int = 48) -> tuple[torch.Tensor, list[Turn]]:
    """Scenes that no model was trained on, and a question with its answer about each; of all kinds alike."""
    scenes = [scene(seed, size) for seed in range(HELD, HELD + count)]
    rng = np.random.default_rng(HELD)
    return as_input(scenes), [balanced(questions(one), 1, rng)[0] for one in scenes]


def prompts(asked: list[str], shown: str, places: int) -> dict[str, torch.Tensor]:
    """Questions behind `places` of the token of what is shown, left-padded, as `generate` takes them."""
    rows = [[NUMBER[shown]] * places + words.encoded(question) for question in asked]
    width = max(map(len, rows))
    ids = torch.tensor([[NUMBER[PAD]] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
def said(model: Any, given: dict[str, torch.Tensor], longest: int = 2) -> list[str]:
    """What a model writes behind prompts, greedily, up to the end."""
    out = model.generate(**given, max_new_tokens=longest, do_sample=False)
    found = []
    for row in out[:, given["input_ids"].shape[1] :].tolist():
        row = row[: row.index(NUMBER[END])] if NUMBER[END] in row else row
        found.append(" ".join(words.WORDS[number] for number in row))
    return found


@torch.no_grad()
def quality(model: Any, recipe: SceneRecipe, count: int = 256) -> dict[str, float]:
    """Share of right answers to one question about each of `count` held-out scenes, all and by kind; with whatever is
    attached to the model."""
    model.eval()
    pixels, pairs = asked(count, recipe.size)
    right: dict[str, list[bool]] = {}
    for start in range(0, count, 64):
        some = pairs[start : start + 64]
        given = prompts([question for question, _ in some], IMAGE, model.config.image_seq_length)
        written = said(model, given | {"pixel_values": pixels[start : start + 64]})
        for (question, answer), own in zip(some, written, strict=True):
            right.setdefault(kind_of_question(question), []).append(own == answer)
    every = [one for own in right.values() for one in own]
    return {"all": sum(every) / len(every)} | {kind: sum(own) / len(own) for kind, own in sorted(right.items())}
