"""Inputs that are functions of their names: a tiny CLIP, adapters, images, masks, and the files that hold them.

The figures in ``figures/`` were measured on exactly these arrays, so a test rebuilds the inputs and needs no download.

Axes: B images, H = W image size, D width of the image tower, E joint width.
"""

import json
import zlib
from pathlib import Path
from typing import NamedTuple

import numpy as np
import open_clip
import PIL
import torch
from torch import nn
from torchvision.models.vgg import make_layers

SIDE = 14
"""Of a patch, in pixels."""
READS_YCBCR = int(PIL.__version__.split(".")[0]) >= 13  # the last for Python 3.10 is 12
"""Whether Pillow reads the YCbCr TIFF that it writes (its issue 9770)."""
TEXT = {"context_length": 77, "vocab_size": 49408}


class Clip(NamedTuple):
    """A CLIP and how it is used: config in open_clip's form, image size, and the blocks with adapters."""

    config: dict
    image_size: int
    levels: tuple[int, ...]


MINI = Clip(
    {
        "embed_dim": 96,
        "vision_cfg": {"image_size": 7 * SIDE, "layers": 8, "width": 128, "patch_size": SIDE},
        "text_cfg": {**TEXT, "width": 64, "heads": 2, "layers": 2},
    },
    image_size=5 * SIDE,
    levels=(2, 4, 6, 8),
)
"""The tiny CLIP behind ``mini.json``; its position grid is resized from 7x7 to 5x5."""

VITL = Clip(
    {
        "embed_dim": 768,
        "vision_cfg": {"image_size": 24 * SIDE, "layers": 24, "width": 1024, "patch_size": SIDE},
        "text_cfg": {**TEXT, "width": 768, "heads": 12, "layers": 12},
    },
    image_size=240,
    levels=(6, 12, 18, 24),
)
"""ViT-L/14-336 as MVFA uses it, behind ``vitl.json``."""

TINY = Clip(
    {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 3 * SIDE, "layers": 4, "width": 128, "patch_size": SIDE},
        "text_cfg": {**TEXT, "width": 16, "heads": 2, "layers": 1},
    },
    image_size=4 * SIDE,
    levels=(1, 2, 3, 4),
)
"""Smaller still, for tests that need no figures."""

WINDOWS = Clip(
    {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 240, "layers": 2, "width": 64, "head_width": 16, "patch_size": 60},
        "text_cfg": {**TEXT, "width": 16, "heads": 2, "layers": 1},
    },
    image_size=240,
    levels=(1, 2),
)
"""For WinCLIP: 4 x 4 patches, so 9 windows of 2 x 2, and 4 of 3 x 3."""


# ---------------------------------------------------------------------- arrays


def weight(name: str, shape: tuple[int, ...]) -> torch.Tensor:
    """Return a parameter: layer norms near one, small biases, matrices scaled by the root of their fan-in."""
    noise = _generator(name).standard_normal(shape)
    last = name.rsplit(".", 1)[-1]
    is_norm = any(part.startswith("ln_") for part in name.split("."))
    if last == "logit_scale":
        values = np.full(shape, np.log(1 / 0.07))
    elif is_norm:
        values = float(last == "weight") + 0.1 * noise
    elif last.endswith("bias"):
        values = 0.02 * noise
    elif last.endswith(("proj", "projection")):
        values = noise * shape[0] ** -0.5
    elif last.endswith("embedding") or name.endswith("token_embedding.weight"):
        values = 0.2 * noise
    else:
        values = noise * float(np.prod(shape[1:])) ** -0.5
    return torch.from_numpy(values.astype(np.float32))


def images(name: str, count: int, size: int) -> torch.Tensor:
    """Return smooth RGB images in [0, 1], ``(B, 3, H, W)``: 8x8 random colours, bilinearly upsampled."""
    colours = _generator(name).random((count, 3, 8, 8))
    position = np.linspace(0, 7, size)
    left = np.minimum(position.astype(int), 6)
    share = position - left
    tall = colours[:, :, left] * (1 - share)[:, None] + colours[:, :, left + 1] * share[:, None]
    full = tall[..., left] * (1 - share) + tall[..., left + 1] * share
    return torch.from_numpy(full.astype(np.float32))


def blobs(name: str, count: int, size: int) -> torch.Tensor:
    """Return masks of one ellipse each, ``(B, H, W)``."""
    generator = _generator(name)
    row, column = np.mgrid[0:size, 0:size] / size
    masks = []
    for _ in range(count):
        centre, radius = generator.uniform(0.3, 0.7, 2), generator.uniform(0.1, 0.25, 2)
        masks.append(((row - centre[0]) / radius[0]) ** 2 + ((column - centre[1]) / radius[1]) ** 2 <= 1)
    return torch.from_numpy(np.stack(masks).astype(np.float32))


def lesioned(name: str, count: int, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images ``(B, 3, H, W)`` brightened within masks ``(B, H, W)``, and the masks."""
    mask = blobs(f"{name}/mask", count, size)
    return (images(name, count, size) + 0.5 * mask.unsqueeze(1)).clamp(0, 1), mask


def clip_weights(clip: Clip) -> dict[str, torch.Tensor]:
    """Return the state dict of a CLIP, at the image size of its config."""
    with torch.device("meta"):
        parameters = open_clip.CLIP(**clip.config).state_dict()
    return {name: weight(name, tuple(value.shape)) for name, value in parameters.items()}


def vgg_features() -> nn.Sequential:
    """Return the layers of a small random VGG before its classifier."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        layers = make_layers([16, "M", 32, "M", 48, 48, "M", 64, 64, "M", 64, 64, "M"])
        for layer in layers:
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight)  # torch's own default fades from layer to layer
    return layers


def adapter_weights(clip: Clip) -> dict[str, dict[str, torch.Tensor]]:
    """Return adapters in the published form: ``seg_adapters`` and ``det_adapters`` state dicts."""
    width, joint = clip.config["vision_cfg"]["width"], clip.config["embed_dim"]
    shapes = {"fc1": (joint, width), "fc2": (width, joint)}
    return {
        branch: {
            f"{position}.{layer}.0.weight": weight(f"{branch}.{position}.{layer}.0.weight", shape)
            for position in range(len(clip.levels))
            for layer, shape in shapes.items()
        }
        for branch in ("seg_adapters", "det_adapters")
    }


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(zlib.crc32(name.encode()))


# ---------------------------------------------------------------------- files


class ClipFiles(NamedTuple):
    """Paths of a CLIP's config (.json), weights (.pt) and adapters (.pth)."""

    config: Path
    weights: Path
    adapters: Path


def write_config(path: Path, clip: Clip) -> Path:
    """Write a model config in open_clip's form."""
    path.write_text(json.dumps(clip.config))
    return path


def write_clip(folder: Path, clip: Clip) -> ClipFiles:
    """Write a CLIP and adapters, in the forms in which they are published."""
    files = ClipFiles(write_config(folder / "clip.json", clip), folder / "clip.pt", folder / "adapters.pth")
    torch.save(clip_weights(clip), files.weights)
    torch.save(adapter_weights(clip), files.adapters)
    return files


def write_support_list(folder: Path, category: str, normal: list[str], abnormal: list[str]) -> Path:
    """Write ``<category>/<K>-shot.txt`` below a folder, in the published form, and return the file's path."""
    path = folder / category / f"{len(normal)}-shot.txt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"a-0: {' '.join(abnormal)}\nn-0: {' '.join(normal)}\n")
    return path
