"""Images per second in training and test, beside the published loop in the same run.

ViT-L/14-336 at 240 px with random weights, which are as fast as others. A GPU computes ours in bfloat16 and the
published loop in float16, as it was published; a CPU both in float32.
"""

import argparse
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from common import (
    arguments,
    batch,
    build_model,
    fill_bank,
    matmul_rate,
    peak_memory_mb,
    precision,
    published_loop,
    seconds,
    training_step,
    write,
)
from goals import SHARE, SPEEDUP
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

TRAINED, TESTED, SHOTS = (1, 16), (1, 32), (4, 16)
FEW = (1, 4)
"""Batches where a CPU has all of ViT-L to do, and an image takes seconds."""
VIEWS, EPOCHS, IMAGES = 2 * 4 * 11, 50, 3715
"""BMAD's Brain with K = 4: images of an epoch, epochs, and test images."""

Figures = dict[str, Any]


def _operations(x_shape: tuple[int, ...], weight_shape: tuple[int, ...], *_: Any, **__: Any) -> int:  # noqa: ANN401
    return 2 * math.prod(x_shape) * weight_shape[0]


if hasattr(torch.ops.mkldnn, "_linear_pointwise"):  # by which linear.py multiplies, where torch has it
    register_flop_formula(torch.ops.mkldnn._linear_pointwise)(_operations)  # noqa: SLF001


def main() -> None:
    """Measure and write."""
    options = arguments(__doc__)
    figures: Figures = {}
    measure(options, figures)
    training, test = (figures[f"published loop, {name}: images/s"] for name in ("training", "K = 4"))
    published = _hours(training, test, tests=EPOCHS)
    training, test = (figures[f"{name}: images/s"] for name in ("training, batch 1", "test, batch 1, K = 4"))
    ours = _hours(training, test, tests=1)
    figures["published loop, fit and test of BMAD's Brain, hours"] = published
    figures["fit and test of BMAD's Brain, hours"] = ours
    figures["fit and test of BMAD's Brain: times faster"] = published / ours
    write("speed", options, figures)


def _hours(training: float, test: float, tests: int) -> float:
    """Return the time of a fit with batches of one image; the published code tests after every epoch."""
    return (EPOCHS * VIEWS / training + tests * IMAGES / test) / 3600


@cache
def random_model(device: str, tiny: bool) -> Any:  # noqa: ANN401  # the model, built once since ViT-L takes a while
    """Return the model that is measured."""
    return build_model(device, tiny)


def measure(options: argparse.Namespace, figures: Figures) -> None:
    """Measure images per second, memory and share of the matmul rate, beside the published loop."""
    device, model = options.device, random_model(options.device, options.tiny)
    rate = matmul_rate(options)
    baseline = _published_speed(options)
    figures["bf16 matmul rate, TFLOP/s" if options.bf16 else "float32 matmul rate, TFLOP/s"] = rate / 1e12
    figures.update({f"published loop, {name}: images/s": value for name, value in baseline.items()})

    def one(name: str, run: Callable[[], Any], count: int, compared: float) -> None:
        run()  # fills caches
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with FlopCounterMode(display=False) as operations:
            run()
        images = _images_per_second(run, count, options)
        figures[f"{name}: images/s"] = images
        figures[f"{name}: {SPEEDUP}"] = images / compared
        figures[f"{name}: {SHARE}"] = operations.get_total_flops() * images / count / rate
        figures[f"{name}: peak memory, MiB"] = peak_memory_mb(device)

    trained, tested = (FEW, FEW) if device == "cpu" and not options.tiny else (TRAINED, TESTED)
    for count in trained:
        step = training_step(model, count, options)
        one(f"training, batch {count}", step, count, baseline["training"])
    model.cache = None
    for k_shot in SHOTS:
        fill_bank(model, k_shot)
        for count in tested:
            one(f"test, batch {count}, K = {k_shot}", scoring(model, count, options), count, baseline[f"K = {k_shot}"])


def _published_speed(options: argparse.Namespace) -> dict[str, float]:
    device, model = options.device, random_model(options.device, options.tiny)
    loop = published_loop(model, options.tiny, torch.float16 if options.bf16 else torch.float32)
    image, mask, label = batch(1, device, model.image_size)
    speeds = {"training": _images_per_second(lambda: loop.train(image, mask, label), 1, options)}
    for k_shot in SHOTS:
        rows = fill_bank(model, k_shot)
        speeds[f"K = {k_shot}"] = _images_per_second(partial(loop.test, image, rows), 1, options)
    return speeds


def _images_per_second(run: Callable[[], Any], count: int, options: argparse.Namespace) -> float:
    run()
    return count / seconds(run, options.device, options.steps)


def scoring(model: Any, count: int, options: argparse.Namespace) -> Callable[[], Any]:  # noqa: ANN401
    """Return a function that scores a batch, always the same one, and leaves the predictions on the device."""
    image, *_ = batch(count, options.device, model.eval().image_size)

    def run() -> Any:  # noqa: ANN401
        with torch.no_grad(), precision(options):
            return model(image)

    return run


if __name__ == "__main__":
    main()
