"""Builds MVFA's torch model from names and numbers: backbone, adapters and memory bank, put together."""

from collections.abc import Sequence

import torch

from ..arguments import check_arguments, documented
from .adapters import BRANCHES, BranchAdapters
from .backbone import ClipBackbone
from .memory_bank import MemoryBank
from .network import BlockNetwork
from .prompts import Prompts
from .torch_model import MvfaModel
from .vit_backbone import VitBackbone, is_vit


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
        prompts: States and templates of the text prompts; the published ones by default.

    Raises:
        ValueError: An argument has no such value, or weights do not fit.
        FileNotFoundError: A file that an argument names does not exist.
        RuntimeError: The weights of a tag could not be loaded.
    """
    check_arguments(locals())
    network = load_backbone(backbone, pretrained, image_size, quick_gelu)
    if prompts not in (None, Prompts()) and not network.has_texts:
        msg = f"backbone={backbone!r} has no texts: states and templates of prompts have no effect. Leave them out."
        raise ValueError(msg)
    levels = check_levels(levels, network.depth)
    seg_adapters, det_adapters = new_adapters(len(levels), network, adaptation, seed)
    return MvfaModel(
        network,
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


def load_backbone(backbone: str, pretrained: str | None, image_size: int, quick_gelu: bool = False) -> BlockNetwork:
    """Return the frozen network of a name: CLIP by open_clip, or a vision transformer by timm.

    Raises:
        ValueError: There is none of that name, weights do not fit, or it cannot have QuickGELU.
        FileNotFoundError: A file that an argument names does not exist.
        RuntimeError: The weights of a tag could not be loaded.
    """
    if not is_vit(backbone):
        return ClipBackbone(backbone, pretrained, image_size, quick_gelu)
    if quick_gelu:
        msg = f"quick_gelu=True is for CLIP, and backbone={backbone!r} is none. Leave it out."
        raise ValueError(msg)
    return VitBackbone(backbone, pretrained, image_size)


def new_adapters(levels: int, backbone: BlockNetwork, adaptation: str, seed: int = 0) -> list[BranchAdapters]:
    """Return adapters of both branches, seg and det, drawn from the seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return [BranchAdapters(levels, backbone.width, backbone.joint_width, adaptation) for _ in BRANCHES]


def check_levels(levels: Sequence[int] | None, depth: int, quarters: Sequence[int] = (1, 2, 3, 4)) -> list[int]:
    """Return levels as a plain list, by default the ends of quarters of the depth; ValueError for other than blocks."""
    if levels is None:
        return sorted({max(1, round(depth * quarter / 4)) for quarter in quarters})
    checked = [int(level) for level in levels]
    if not checked or checked != sorted(set(checked)) or checked[0] < 1 or checked[-1] > depth:
        msg = f"levels={checked} must be increasing block numbers between 1 and {depth}, the backbone's depth."
        raise ValueError(msg)
    return checked
