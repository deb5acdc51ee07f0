"""What the benchmarks share: models, inputs, steps, times, the device's rate of matrix products, and the JSON output.

Axes: B images, H = W image size.
"""

import argparse
import json
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import open_clip
import torch
from published_loop import PublishedLoop, PublishedModel
from torch.autograd import DeviceType
from torch.nn.functional import normalize
from torch.profiler import ProfilerActivity, profile

from anomalib_mvfa import MvfaModel, build_mvfa
from anomalib_mvfa.io import commit, device_name, versions
from anomalib_mvfa.model.frozen_cache import FrozenCache
from anomalib_mvfa.model.fusion import Weights
from anomalib_mvfa.model.lightning_model import BETAS
from anomalib_mvfa.model.losses import MvfaLoss
from anomalib_mvfa.model.torch_model import Scoring

CONFIGS = Path(__file__).parents[1] / "configs"


def arguments(
    description: str | None, output: Path = Path("results/benchmarks"), words: Sequence[str] | None = None
) -> argparse.Namespace:
    """Parse the command line of a benchmark."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="tiny random CLIP and few steps: to try the script")
    parser.add_argument("--output", type=Path, default=output, metavar="FOLDER")
    options = parser.parse_args(words)
    options.bf16 = options.device == "cuda"  # which many processors do hundreds of times slower than float32
    options.steps = 1 if options.tiny else 10 if options.device == "cuda" else 2
    return options


def seconds(run: Callable[[], Any], device: str, repeats: int = 3) -> float:
    """Return the time of the fastest of several runs."""
    took = []
    for _ in range(repeats):
        wait_for(device)
        start = time.perf_counter()
        run()
        wait_for(device)
        took.append(time.perf_counter() - start)
    return min(took)


def wait_for(device: str) -> None:
    """Wait until a GPU has done what it was told."""
    if device.startswith("cuda"):
        torch.cuda.synchronize()


def profiled(run: Callable[[], Any], steps: int, device: str) -> tuple[float, float, list[tuple[str, float]]]:
    """Profile steps of a GPU, or as a rehearsal the operators of a CPU.

    Returns:
        Copies between host and device per step, share of time without a kernel, and all kernels with their seconds
        per step, the longest first.
    """
    for _ in range(3):
        run()
    wait_for(device)
    on_gpu = device.startswith("cuda")
    # On a GPU, its events alone: recording the host's would widen the gaps.
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        for _ in range(steps):
            run()
        wait_for(device)
    kind = DeviceType.CUDA if on_gpu else DeviceType.CPU
    found = [e for e in profiler.events() or [] if e.device_type == kind and not e.is_user_annotation]
    events = sorted((e for e in found if "Sync" not in e.name), key=lambda e: e.time_range.start)
    if not events:
        msg = f"The profiler has seen nothing on {device}."
        raise RuntimeError(msg)
    copies = sum(bool(re.search("Memcpy.*(HtoD|DtoH)", e.name)) for e in events)
    start = end = events[0].time_range.start
    busy, lasted = 0.0, Counter[str]()
    for event in events:
        lasted[event.name] += event.time_range.elapsed_us()
        busy += max(0.0, event.time_range.end - max(event.time_range.start, end))
        end = max(end, event.time_range.end)
    kernels = [(name, duration / 1e6 / steps) for name, duration in lasted.most_common()]
    return copies / steps, 1 - busy / (end - start), kernels


def precision(options: argparse.Namespace) -> torch.autocast:
    """Return the context to compute in."""
    return torch.autocast(torch.device(options.device).type, torch.bfloat16, enabled=options.bf16)


def matmul_rate(options: argparse.Namespace) -> float:
    """Return the operations a second of a square matrix product, in the precision of the benchmark."""
    size = 8192 if options.device.startswith("cuda") else 2048
    dtype = torch.bfloat16 if options.bf16 else torch.float32
    a, b = (torch.randn(size, size, device=options.device, dtype=dtype) for _ in range(2))
    return 2 * size**3 / seconds(lambda: a @ b, options.device, repeats=8)


def build_model(device: str, tiny: bool = False) -> MvfaModel:
    """Return MVFA with random weights and text features, which are as fast as others.

    Args:
        device: Device of the model.
        tiny: The tiny random CLIP of the demo in place of ViT-L/14-336.
    """
    arguments: dict[str, Any] = {"backbone": str(CONFIGS / "demo_clip.json"), "image_size": 112} if tiny else {}
    model = build_mvfa(pretrained=None, **arguments)
    generator = torch.Generator().manual_seed(0)
    model.text_features.copy_(normalize(torch.randn(model.text_features.shape, generator=generator), dim=0))
    model.scoring = Scoring(weights=Weights(0.5, 0.5), normalised=False)
    return model.to(device)


def published_loop(model: MvfaModel, tiny: bool = False, dtype: torch.dtype = torch.float16) -> PublishedLoop:
    """Return the published loop with the weights of a model that :func:`build_model` made."""
    config = (
        json.loads((CONFIGS / "demo_clip.json").read_text()) if tiny else open_clip.get_model_config("ViT-L-14-336")
    )
    with model.text_features.device:
        published = PublishedModel(config, model.image_size)
    published.load_ours(model.state_dict())
    return PublishedLoop(published, model.text_features, dtype)


def fill_bank(model: MvfaModel, k_shot: int) -> torch.Tensor:
    """Fill the bank as K normal images in 11 views do, and return its rows ``(l, M, E)``."""
    generator = torch.Generator().manual_seed(1)
    tokens = model.backbone.grid**2 + 1
    views = torch.randn(len(model.levels), 11 * k_shot, tokens, model.backbone.joint_width, generator=generator)
    model.bank.store("seg", views.to(model.text_features.device))
    return model.bank.seg


def batch(count: int, device: str, size: int = 240) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return images ``(B, 3, H, W)``, masks ``(B, H, W)`` and labels ``(B,)``."""
    generator = torch.Generator().manual_seed(2)
    image = torch.rand(count, 3, size, size, generator=generator)
    label = torch.arange(count) % 2
    mask = (torch.rand(count, size, size, generator=generator) > 0.95) & label.bool().view(-1, 1, 1)
    return image.to(device), mask.long().to(device), label.to(device)


def training_step(model: MvfaModel, count: int, options: argparse.Namespace) -> Callable[[], float]:
    """Return a function that makes a training step on a batch, always the same one, and returns the loss.

    As in every epoch but the first, what is frozen of the images is kept from the first call on.
    """
    image, mask, label = batch(count, options.device, model.image_size)
    branches = [model.train().seg_adapters, model.det_adapters]
    optimizer = torch.optim.Adam(
        [{"params": [p for p in branch.parameters() if p.requires_grad]} for branch in branches], lr=1e-3, betas=BETAS
    )
    loss_of = MvfaLoss()
    model.cache = FrozenCache()

    def step() -> float:
        with precision(options):
            seg_maps, det_scores = model(image)
            loss = loss_of(seg_maps, det_scores, mask, label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def peak_memory_mb(device: str) -> float:
    """Return the largest memory so far in 2**20 bytes: tensors of a GPU, or else the process (0 if not known)."""
    if device.startswith("cuda"):
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) / 2**10 if status.is_file() else 0.0


def write(name: str, options: argparse.Namespace, figures: dict[str, Any]) -> None:
    """Print figures, and write them with where they come from."""
    device = torch.device(options.device)
    origin = {"commit": commit(), "device": device_name(device), "versions": versions()}
    options.output.mkdir(parents=True, exist_ok=True)
    path = options.output / f"{name}.json"
    path.write_text(json.dumps({**figures, **origin}, indent=2) + "\n")
    for key, value in figures.items():
        sys.stdout.write(f"{key:52} {value:.4g}\n" if isinstance(value, float) else f"{key:52} {value}\n")
    sys.stdout.write(f"Saved as {path}\n")
