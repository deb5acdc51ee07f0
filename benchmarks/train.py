"""Training images a second, beside a plain loop that does what the published code does.

The plain loop keeps nothing, runs open_clip's own blocks one image at a time, and takes gradients of the whole
backbone.
"""

from argparse import Namespace
from types import MethodType
from typing import Any

import torch
from common import PUBLISHED, TRAINING, arguments, batch, matmul_rate, precision, seconds, vit_l, write

from anomalib_mvfa import MvfaModel
from anomalib_mvfa.model.backbone import ClipBackbone
from anomalib_mvfa.model.frozen_cache import FrozenCache
from anomalib_mvfa.model.lightning_mixin import BETAS
from anomalib_mvfa.model.losses import MvfaLoss

BATCHES = (1, 16)


def main() -> None:
    """Measure and write."""
    options = arguments(__doc__)
    device = options.device
    rate = matmul_rate(options)

    plain = vit_l(device)
    plain.backbone.requires_grad_(True)
    plain.backbone.block = MethodType(_open_clips_block, plain.backbone)  # type: ignore[method-assign]
    plain_seconds, plain_losses = _timed(plain, 1, options)
    figures: dict[str, Any] = {
        "matmul_gflops": rate / 1e9,
        "plain_seconds": plain_seconds,
        "plain_over_published": plain_seconds * rate / PUBLISHED,
    }
    del plain

    for count in BATCHES:
        model = vit_l(device)
        model.cache = FrozenCache()
        took, losses = _timed(model, count, options)
        figures[f"batch_{count}_seconds"] = took
        figures[f"batch_{count}_gflops"] = TRAINING / took / 1e9
        figures[f"batch_{count}_times_faster"] = plain_seconds / took
        if count == 1:
            pairs = zip(plain_losses, losses, strict=True)
            figures["largest_loss_difference"] = max(abs(one - other) for one, other in pairs)
        del model
    figures["matmul_gflops_after"] = matmul_rate(options) / 1e9
    write("train", options, figures)


def _open_clips_block(backbone: ClipBackbone, index: int, x: torch.Tensor) -> torch.Tensor:
    return backbone.clip.visual.transformer.resblocks[index](x)


def _timed(model: MvfaModel, count: int, options: Namespace) -> tuple[float, list[float]]:
    """Train on a batch again and again; return seconds of an image in the fastest step, and the losses."""
    image, mask, label = batch(count, options.device)
    branches = [model.train().seg_adapters, model.det_adapters]
    optimizer = torch.optim.Adam(
        [{"params": [p for p in branch.parameters() if p.requires_grad]} for branch in branches], lr=1e-3, betas=BETAS
    )
    loss_of = MvfaLoss()
    losses = []

    def step() -> None:
        with precision(options):
            seg_maps, det_scores = model(image)
            loss = loss_of(seg_maps, det_scores, mask, label)
        model.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())

    return seconds(step, options.device) / count, losses


if __name__ == "__main__":
    main()
