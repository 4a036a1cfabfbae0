"""Tiny random image encoders of every family, and images that differ in how much there is to see."""

from __future__ import annotations

import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    DeiTConfig,
    DeiTModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextVideoConfig,
    LlavaNextVideoForConditionalGeneration,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
    SiglipVisionConfig,
    SiglipVisionModel,
    ViTConfig,
    ViTModel,
)

from pertoken.models.segmenter import PlainSegmenter, SegmenterConfig
from pertoken.models.signature import signature
from pertoken.reduce.expert import Expert, Setting

SIZE, PATCH, LAYERS = 32, 4, 4
COMMON = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "image_size": SIZE,
    "patch_size": PATCH,
    "initializer_range": 0.3,
}
FAMILIES = {
    "vit": lambda: ViTModel(ViTConfig(**COMMON)),
    "deit": lambda: DeiTModel(DeiTConfig(**COMMON)),
    "dinov2": lambda: Dinov2Model(Dinov2Config(**COMMON, mlp_ratio=2)),
    "registers": lambda: Dinov2WithRegistersModel(Dinov2WithRegistersConfig(**COMMON, mlp_ratio=2)),
    "clip": lambda: CLIPVisionModel(CLIPVisionConfig(**COMMON)),
    "siglip": lambda: SiglipVisionModel(SiglipVisionConfig(**COMMON)),
}


def encoder(family, attention="sdpa", dtype=torch.float32, seed=1):
    torch.manual_seed(seed)
    model = FAMILIES[family]()
    with torch.no_grad():  # some families begin with layers that do nothing, or with the same position everywhere
        for name, weight in model.named_parameters():
            if "lambda" in name:
                weight.fill_(1.0)
            if "position_embedding" in name:
                weight.normal_(0, 0.3)
    model.set_attn_implementation(attention)
    return model.to(dtype).eval()


def images(count=4, size=SIZE, seed=5):
    """From one of a single colour to one of noise: `[count, 3, size, size]`."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, size, size, generator=generator)
    flat = torch.randn(count, 3, 1, 1, generator=generator).expand(-1, -1, size, size)
    columns = torch.arange(size).expand(size, size)
    share = torch.linspace(0, 1, count)[:, None, None, None]
    return torch.where(columns < share * size, noise, flat)


IMAGE = 60
PATCHES = (SIZE // PATCH) ** 2
TEXT = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "max_position_embeddings": 512,
}
TEXTS = {
    "llama": LlamaConfig,
    "qwen2": Qwen2Config,
    "qwen3": Qwen3Config,
    "mistral": lambda **given: MistralConfig(**given, sliding_window=None),
}


def llava(text="llama", tower="clip", layers=3, **settings):
    """A tiny random LLaVA."""
    torch.manual_seed(4)
    made = {
        "clip": (CLIPVisionConfig, "default"),
        "siglip": (SiglipVisionConfig, "full"),
    }[tower]
    config = LlavaConfig(
        vision_config=made[0](**COMMON),
        text_config=TEXTS[text](**TEXT | {"num_hidden_layers": layers}),
        vision_feature_select_strategy=made[1],
        image_token_id=IMAGE,
        **settings,
    )
    return LlavaForConditionalGeneration(config).eval()


def prompts(side="left"):
    """Two ragged rows with one and two images: keyword arguments of a LLaVA."""
    picture = [IMAGE] * PATCHES
    rows = [[1, 5, *picture, 7, 8, 9], [1, *picture, 4, *picture, 3]]
    width = max(map(len, rows))
    ids, mask = torch.zeros(2, width, dtype=torch.long), torch.zeros(2, width, dtype=torch.long)
    for row, given in enumerate(rows):
        where = slice(width - len(given), width) if side == "left" else slice(0, len(given))
        ids[row, where], mask[row, where] = torch.tensor(given), 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values": images(3)}


VIDEO = 59
FRAMES = 6
PLACES = FRAMES * PATCHES // 4


def watcher(text="llama", tower="vit", layers=3):
    """A tiny random LLaVA-NeXT-Video whose pooling leaves 16 of 64 patches a frame."""
    torch.manual_seed(4)
    config = LlavaNextVideoConfig(
        vision_config={"vit": ViTConfig, "clip": CLIPVisionConfig}[tower](**COMMON),
        text_config=TEXTS[text](**TEXT | {"num_hidden_layers": layers}),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=[[SIZE, SIZE]],
    )
    return LlavaNextVideoForConditionalGeneration(config).eval()


def clips(count=3, frames=FRAMES, seed=7):
    """`[clip, frame, 3, size, size]`, from clips of one colour to clips of noise."""
    return torch.stack([images(count, seed=seed + frame) for frame in range(frames)], 1)


def clip_prompts(side="left", frames=FRAMES):
    """Three ragged rows with a clip each: keyword arguments of a LLaVA-NeXT-Video."""
    clip = [VIDEO] * (PLACES // FRAMES * frames)
    rows = [[1, 5, *clip, 7, 8, 9], [1, *clip, 4], [1, 9, 6, 2, *clip, 11, 3]]
    width = max(map(len, rows))
    ids, mask = torch.zeros(3, width, dtype=torch.long), torch.zeros(3, width, dtype=torch.long)
    for row, given in enumerate(rows):
        where = slice(width - len(given), width) if side == "left" else slice(0, len(given))
        ids[row, where], mask[row, where] = torch.tensor(given), 1
    return {"input_ids": ids, "attention_mask": mask, "pixel_values_videos": clips(frames=frames)}


def expert(host, layer=1, seed=8, **settings):
    """A tiny random expert for this host, whose descriptions end after a few words or not at all."""
    torch.manual_seed(seed)
    config = LlamaConfig(**TEXT | {"vocab_size": 16, "hidden_size": 24, "num_hidden_layers": 2, "head_dim": 6})
    known = {"prompt": (4, 5), "end": 3, "layer": layer, "span": 3, "pool": 2, "base": 1, "host": signature(host)}
    made = Expert(LlamaForCausalLM(config), Setting(**known | settings), COMMON["hidden_size"], TEXT["hidden_size"])
    with torch.no_grad():
        for weight in made.project.parameters():
            weight.normal_(0, 0.5)
    return made.eval()


def segmenter(family="vit", head="atm", classes=5):
    """A tiny random segmenter with three stages around an encoder of this family."""
    inner = encoder(family)
    config = SegmenterConfig(inner.config, ends=(1, 2, 3), classes=classes, head=head, head_width=24, head_heads=4)
    torch.manual_seed(6)
    model = PlainSegmenter(config).eval()
    model.encoder.load_state_dict(inner.state_dict())
    with torch.no_grad():
        for weight in model.heads.parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.3)
    return model
