"""Builds MVFA's torch model from names and numbers: backbone, adapters and memory bank, put together."""

from collections.abc import Sequence

import torch

from ..arguments import check_arguments, documented
from .adapters import BRANCHES, BranchAdapters
from .backbone import ClipBackbone
from .memory_bank import MemoryBank
from .prompts import Prompts
from .torch_model import MvfaModel


@documented
def build_mvfa(  # noqa: D417  # `documented` adds the others
    backbone: str = "ViT-L-14-336",
    pretrained: str | None = "openai",
    image_size: int = 240,
    levels: Sequence[int] | None = None,
    residual_ratio: float = 0.1,
    quick_gelu: bool = False,
    normalize: bool = False,
    adaptation: str = "adapter",
    residual: str = "pair",
    train_levels: Sequence[int] | None = None,
    score_levels: Sequence[int] | None = None,
    pooling: str = "mean",
    upsample: str = "logits",
    coreset: float | None = None,
    seed: int = 0,
    prompts: Prompts | None = None,
) -> MvfaModel:
    """Return MVFA's torch model with new adapters and an empty memory bank.

    Args:
        backbone: Name of an open_clip model, or path of a model config.
        prompts: States and templates of the text prompts; the published ones by default.

    Raises:
        ValueError: An argument has no such value, or weights do not fit.
        FileNotFoundError: A file that an argument names does not exist.
        RuntimeError: The weights of a tag could not be loaded.
    """
    check_arguments(locals())
    clip = ClipBackbone(backbone, pretrained, image_size, quick_gelu)
    levels = check_levels(levels, clip.depth)
    seg_adapters, det_adapters = new_adapters(len(levels), clip, adaptation, seed)
    return MvfaModel(
        clip,
        seg_adapters,
        det_adapters,
        MemoryBank(coreset, seed),
        levels,
        train_levels=train_levels,
        score_levels=score_levels,
        prompts=prompts,
        residual_ratio=residual_ratio,
        residual=residual,
        normalize=normalize,
        pooling=pooling,
        upsample=upsample,
    )


def new_adapters(levels: int, backbone: ClipBackbone, adaptation: str, seed: int = 0) -> list[BranchAdapters]:
    """Return adapters of both branches, seg and det, drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [BranchAdapters(levels, backbone.width, backbone.joint_width, adaptation) for _ in BRANCHES]


def check_levels(levels: Sequence[int] | None, depth: int) -> list[int]:
    """Return levels as a plain list, the quarter points of the depth by default; ValueError for other than blocks."""
    if levels is None:
        return sorted({max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4)})
    checked = [int(level) for level in levels]
    if not checked or checked != sorted(set(checked)) or checked[0] < 1 or checked[-1] > depth:
        msg = f"levels={checked} must be increasing block numbers between 1 and {depth}, the backbone's depth."
        raise ValueError(msg)
    return checked
