"""Training images a second, beside the published loop in the same precision."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from common import (
    PUBLISHED,
    TRAINING,
    arguments,
    batch,
    build_model,
    matmul_rate,
    published_loop,
    seconds,
    training_step,
    write,
)

BATCHES = (1, 16)


def main() -> None:
    """Measure and write."""
    options = arguments(__doc__)
    device = options.device
    rate = matmul_rate(options)

    model = build_model(device)
    plain = published_loop(model, dtype=torch.bfloat16 if options.bf16 else torch.float32)
    plain_seconds, plain_losses = _timed(partial(plain.train, *batch(1, device)), device)
    figures: dict[str, Any] = {
        "matmul_gflops": rate / 1e9,
        "plain_seconds": plain_seconds,
        "plain_over_published": plain_seconds * rate / PUBLISHED,
    }
    del plain, model

    for count in BATCHES:
        model = build_model(device)
        took, losses = _timed(training_step(model, count, options), device)
        took /= count
        figures[f"batch_{count}_seconds"] = took
        figures[f"batch_{count}_gflops"] = TRAINING / took / 1e9
        figures[f"batch_{count}_times_faster"] = plain_seconds / took
        if count == 1:
            pairs = zip(plain_losses, losses, strict=True)
            figures["largest_loss_difference"] = max(abs(one - other) for one, other in pairs)
        del model
    figures["matmul_gflops_after"] = matmul_rate(options) / 1e9
    write("train", options, figures)


def _timed(step: Callable[[], float], device: str) -> tuple[float, list[float]]:
    """Return seconds of the fastest of several steps, and the losses of all."""
    losses: list[float] = []
    return seconds(lambda: losses.append(step()), device), losses


if __name__ == "__main__":
    main()
