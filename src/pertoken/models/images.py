"""Image models and pictures from files: loading, reading and sizing, with clear errors for what cannot be read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pertoken.core.errors import BadRequest
from pertoken.models.load import DTYPES, resolve
from pertoken.models.vision import vision_adapter_for

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
SCENES = (110.0 / 255, 60.0 / 255)  # mean and spread of pixels that the zoo's models were trained with


def pictures_in(path: Path) -> list[Path]:
    """The picture at `path`, or all those of a folder in order of their names; raises `BadRequest` if there is none."""
    found = sorted(p for p in path.iterdir() if p.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
    if not found or not found[0].is_file():
        raise BadRequest(f"no picture at {path}; give a file, or a folder of files, ending in {', '.join(SUFFIXES)}")
    return found


def read_picture(path: Path) -> np.ndarray:
    """`[height, width, 3]` uint8: turned upright, grey made RGB, what is transparent on white; of an animation the
    first frame."""
    return read_frames(path, 1)[0]


def read_frames(path: Path, most: int = 0) -> list[np.ndarray]:
    """Each frame of an animated picture, or the one of a still, as `read_picture` gives it; `most`: up to so many."""
    try:
        from PIL import Image, ImageOps, ImageSequence, UnidentifiedImageError
    except ImportError as error:
        raise BadRequest("reading pictures needs pillow; install pertoken[vision]") from error
    found = []
    try:
        with Image.open(path) as opened:
            for frame in ImageSequence.Iterator(opened):
                upright = ImageOps.exif_transpose(frame).convert("RGBA")
                white = Image.new("RGBA", upright.size, (255, 255, 255, 255))
                found.append(np.asarray(Image.alpha_composite(white, upright).convert("RGB")))
                if len(found) == most:
                    break
    except (UnidentifiedImageError, OSError, ValueError, SyntaxError) as error:
        raise BadRequest(f"{path} cannot be read as a picture ({error}); give another file") from error
    return found


def read_clip(path: Path, frames: int) -> list[np.ndarray]:
    """Up to `frames` frames of a clip, at equal distances: an animated picture, or a folder of pictures of one size in
    the order of their names."""
    found = [frame for one in pictures_in(path) for frame in read_frames(one)]
    if len({frame.shape for frame in found}) > 1:
        sizes = sorted({f"{frame.shape[1]} x {frame.shape[0]}" for frame in found})
        raise BadRequest(f"the frames at {path} have several sizes ({', '.join(sizes[:3])}); give those of one clip")
    count = min(frames, len(found))
    return [found[round(i * (len(found) - 1) / max(count - 1, 1))] for i in range(count)]


class ImageModel:
    """A model with an image encoder, loaded from a directory, a hub id or `zoo:NAME`, and how it takes pictures."""

    def __init__(self, name: str, dtype: str = "auto", device: str = "cpu"):
        import transformers
        from transformers import AutoConfig

        from pertoken.models.grid import GridClassifier
        from pertoken.models.segmenter import PlainSegmenter

        path, own = resolve(name), {"pertoken_segmenter": PlainSegmenter, "pertoken_grid": GridClassifier}
        try:
            about, _ = transformers.PretrainedConfig.get_config_dict(path, local_files_only=Path(path).is_dir())
            cls: Any = own.get(about.get("model_type", ""))
            if cls is None:
                AutoConfig.for_model(about["model_type"])
                cls = getattr(transformers, (about.get("architectures") or ["AutoModel"])[0], transformers.AutoModel)
            self.model: Any = cls.from_pretrained(path, dtype=DTYPES[dtype]).eval().to(device)
        except (OSError, ValueError, KeyError) as error:
            raise BadRequest(
                f"cannot load an image model from {name!r} ({str(error).splitlines()[0]}); give a directory written by "
                "save_pretrained, a hub id, or zoo:scenes-segmenter or zoo:scenes-grid-routed"
            ) from error
        self.name, self.path = name, Path(path)
        size: Any
        if isinstance(self.model, GridClassifier):
            size, patch = self.model.config.image_size, self.model.config.base_config.strides[0]
        else:
            config = vision_adapter_for(self.model).config
            size, patch = config.image_size, config.patch_size
        self.size = tuple(size) if isinstance(size, (list, tuple)) else (size, size)
        self.patch = patch if isinstance(patch, int) else patch[0]
        self.mean, self.spread = self._pixels()

    def _pixels(self) -> tuple[Any, Any]:
        """Mean and spread of pixels in [0, 1], as the directory says, or of the zoo, or 0.5 each."""
        import json

        told = self.path / "preprocessor_config.json"
        if told.is_file():
            kept = json.loads(told.read_text(encoding="utf-8"))
            return np.array(kept.get("image_mean", 0.5)), np.array(kept.get("image_std", 0.5))
        trained_on_scenes = (self.path / "training.json").is_file()
        return SCENES if trained_on_scenes else (0.5, 0.5)

    @property
    def grid(self) -> tuple[int, int]:
        """Patches down and across."""
        return self.size[0] // self.patch, self.size[1] // self.patch

    def sized(self, pixels: np.ndarray) -> np.ndarray:
        """A picture at the model's size; raises `BadRequest` for one smaller than two patches."""
        from PIL import Image

        if min(pixels.shape[:2]) < 2 * self.patch:
            raise BadRequest(
                f"a picture of {pixels.shape[1]} x {pixels.shape[0]} pixels is smaller than two patches of "
                f"{self.patch}; give a larger one"
            )
        resized = Image.fromarray(pixels).resize(self.size[::-1], Image.Resampling.BICUBIC)
        return np.asarray(resized)

    def inputs(self, pictures: list[np.ndarray]) -> Tensor:
        """`[image, 3, height, width]` of pictures at the model's size."""
        stacked = (np.stack(pictures).astype(np.float32) / 255 - self.mean) / self.spread
        made = torch.from_numpy(stacked.astype(np.float32)).movedim(-1, 1).contiguous()
        return made.to(self.model.device, self.model.dtype)
