"""Test images a second, the bank's search included, and how much memory a large bank takes."""

from typing import Any

import torch
from common import (
    BANK_OF_4,
    FORWARD,
    arguments,
    batch,
    build_model,
    fill_bank,
    matmul_rate,
    peak_memory_mb,
    precision,
    seconds,
    write,
)

BATCH = 4


@torch.no_grad()
def main() -> None:
    """Measure and write."""
    options = arguments(__doc__)
    rate = matmul_rate(options)
    model = build_model(options.device).eval()
    image, *_ = batch(BATCH, options.device)
    figures: dict[str, Any] = {"matmul_gflops": rate / 1e9}
    for k_shot in (4, 16):
        fill_bank(model, k_shot)
        with precision(options):
            figures[f"k{k_shot}_seconds"] = seconds(lambda: model(image), options.device) / BATCH
    floor = (FORWARD + BANK_OF_4) / rate
    figures["k4_over_floor"] = figures["k4_seconds"] / floor
    figures["k4_gflops"] = (FORWARD + BANK_OF_4) / figures["k4_seconds"] / 1e9
    figures["peak_memory_mb"] = peak_memory_mb(options.device)
    write("test", options, figures)


if __name__ == "__main__":
    main()
