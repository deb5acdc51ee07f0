"""Where numbers come from: commit, versions, device and data."""

import hashlib
import platform
import subprocess
from contextlib import suppress
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("anomalib-mvfa", "anomalib", "torch", "torchvision", "lightning", "open_clip_torch", "timm")
"""Those that numbers depend on."""


@cache
def commit() -> str | None:
    """Return the commit of the checkout that runs, with a ``+`` if files have changed since; None if it is none.

    It is looked up once: a checkout may move on while a long run still works with what it has loaded.
    """
    status = _git("status", "--porcelain", "--untracked-files=no", ".")
    head = _git("rev-parse", "HEAD")
    return head + ("+" if status else "") if head else None


def _git(*command: str) -> str | None:
    try:
        done = subprocess.run(  # noqa: S603  # fixed arguments
            ["git", "-C", str(Path(__file__).parent), *command],  # noqa: S607
            capture_output=True,
            text=True,
            check=False,
        )
    except OSError:  # there is no git
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that are installed."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def device_name(device: torch.device) -> str:
    """Return the name of a GPU, or the processor's and the number of threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    return f"CPU {_processor()}, {torch.get_num_threads()} threads"


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def fingerprint(dataset: Any) -> str | None:  # noqa: ANN401  # any dataset of anomalib items
    """Return a digest of a data set's images, labels and masks, whatever their order and names; None without samples.

    Args:
        dataset: An anomalib dataset, read by its table ``samples``.
    """
    samples = getattr(dataset, "samples", None)
    if samples is None:
        return None
    masks = samples.mask_path if "mask_path" in samples else [None] * len(samples)
    items = zip(samples.image_path, samples.label_index, masks, strict=True)
    lines = sorted(f"{content_of(image)} {label} {content_of(mask) if mask else None}" for image, label, mask in items)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def content_of(path: str) -> str:
    """Return the SHA-256 of a file's content; a file that has not changed is not read again."""
    state = Path(path).stat()
    return _content(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=2**16)
def _content(path: str, _size: int, _changed: int) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()
