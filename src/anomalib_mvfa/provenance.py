"""Where numbers come from: commit, versions and device."""

import platform
import subprocess
from contextlib import suppress
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
