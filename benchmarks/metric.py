"""Pixel AUROC of 4,000 maps of 240 x 240: time, memory, and distance from the exact value on a part of them."""

import time
from typing import Any

import torch
from common import arguments, peak_memory_mb, write
from sklearn.metrics import roc_auc_score

from anomalib_mvfa.metrics.pixel_metrics import BinnedAUROC

MAPS, BATCH = 4000, 32


def main() -> None:
    """Measure and write."""
    options = arguments(__doc__)
    generator = torch.Generator().manual_seed(0)
    mask = (torch.rand(BATCH, 240, 240, generator=generator) > 0.97).to(options.device)
    scores = (0.004 + 0.002 * torch.randn(BATCH, 240, 240, generator=generator)).to(options.device) + 0.002 * mask
    scores = scores.clamp(0, 1)
    metric = BinnedAUROC().to(options.device)
    before = peak_memory_mb("cpu")
    took = 0.0
    for _ in range(MAPS // BATCH):
        start = time.perf_counter()
        metric.update(scores, mask)
        took += time.perf_counter() - start
    start = time.perf_counter()
    metric.compute()
    figures: dict[str, Any] = {
        "seconds": took + time.perf_counter() - start,
        "memory_above_base_mb": peak_memory_mb("cpu") - before,
    }
    metric.reset()
    metric.update(scores, mask)
    exact = roc_auc_score(mask.flatten().cpu(), scores.flatten().double().cpu())
    figures["distance_from_exact"] = abs(metric.compute().item() - exact)
    write("metric", options, figures)


if __name__ == "__main__":
    main()
