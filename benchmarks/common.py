"""What the benchmarks share: the device's rate of matrix products, inputs, times, and the JSON that is written.

Axes: B images, H = W image size.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch.nn.functional import normalize

from anomalib_mvfa import MvfaModel
from anomalib_mvfa.io import commit, device_name, versions
from anomalib_mvfa.model.fusion import Weights
from anomalib_mvfa.model.torch_model import Scoring

FORWARD = 176e9
"""Operations of ViT-L/14 at 240 px for one image."""
BANK_OF_4 = 45.5e9
"""Operations of a search in the bank of K = 4, four levels, for one image."""
TRAINING = 300e9
"""Operations of a training image whose first quarter of blocks is kept: forward and backward, with adapters."""
PUBLISHED = 10.5 * 66e9
"""Time of a training image in the published code, in products of matrices: 10.5 s where these reach 66 GFLOP/s."""


def arguments(description: str | None) -> argparse.Namespace:
    """Parse the command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bf16", action="store_true", help="under autocast, beside the rate of bfloat16 products")
    parser.add_argument("--output", type=Path, default=Path("results/benchmarks"))
    return parser.parse_args()


def seconds(run: Callable[[], Any], device: str, repeats: int = 3) -> float:
    """Return the time of the fastest of several runs."""
    took = []
    for _ in range(repeats):
        _wait(device)
        start = time.perf_counter()
        run()
        _wait(device)
        took.append(time.perf_counter() - start)
    return min(took)


def _wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def precision(options: argparse.Namespace) -> torch.autocast:
    """Return the context to compute in."""
    return torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.bf16)


def matmul_rate(options: argparse.Namespace) -> float:
    """Return the operations a second of a square matrix product, in the precision of the benchmark."""
    size = 8192 if options.device.startswith("cuda") else 2048
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    a, b = (torch.randn(size, size, device=options.device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, options.device, repeats=8)


def vit_l(device: str) -> MvfaModel:
    """Return MVFA on ViT-L/14-336 with random weights and random text features: as fast as with others."""
    model = MvfaModel(pretrained=None)
    generator = torch.Generator().manual_seed(0)
    model.text_features.copy_(normalize(torch.randn(model.text_features.shape, generator=generator), dim=0))
    model.scoring = Scoring(weights=Weights(0.5, 0.5), ranged=False)
    return model.to(device)


def fill_bank(model: MvfaModel, k_shot: int) -> None:
    """Fill the bank as K normal images in 11 views do."""
    generator = torch.Generator().manual_seed(1)
    tokens = model.backbone.grid**2 + 1
    views = torch.randn(len(model.levels), 11 * k_shot, tokens, model.backbone.joint_width, generator=generator)
    model.bank.store("seg", views.to(model.text_features.device))


def batch(count: int, device: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return images ``(B, 3, 240, 240)``, masks ``(B, 240, 240)`` and labels ``(B,)``."""
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(count, 3, 240, 240, generator=generator)
    label = torch.arange(count) % 2
    mask = (torch.rand(count, 240, 240, generator=generator) > 0.95) & label.bool().view(-1, 1, 1)
    return image.to(device), mask.long().to(device), label.to(device)


def write(name: str, options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Print figures, and write them with where they come from."""
    device = torch.device(options.device)
    origin = {"bf16": options.bf16, "commit": commit(), "device": device_name(device), "versions": versions()}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{name}.json"
    path.write_text(json.dumps({**figures, **origin}, indent=2) + "\n")
    for key, value in figures.items():
        sys.stdout.write(f"{key:42} {value:.4g}\n" if isinstance(value, float) else f"{key:42} {value}\n")
    sys.stdout.write(f"Saved as {path}\n")
