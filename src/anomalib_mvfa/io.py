"""Files that are written completely or not at all, and where results come from: digests, commit, versions, device."""

import errno
import hashlib
import platform
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from pandas import DataFrame

PACKAGES = ("anomalib-mvfa", "anomalib", "torch", "torchvision", "lightning", "open_clip_torch", "timm")
"""Packages that results depend on."""
UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
"""What the system says where a file cannot be written."""
FORMULA = ("=", "+", "-", "@", "\t", "\r")
"""What a cell begins with that spreadsheets take for a formula."""


@contextmanager
def explain_failed_write(path: Path) -> Iterator[None]:
    """Name the file that could not be written, where there is no room or no right to."""
    try:
        yield
    except Exception as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch hides the reason behind its own
        if not isinstance(cause, OSError) or cause.errno not in UNWRITABLE:
            raise
        refused = Path(cause.filename or path)  # which may also be a file that was to be read
        if not (path.is_relative_to(refused) or refused.is_relative_to(path.parent)):
            raise
        remedy = "Make room, give the right to write, or write elsewhere."
        msg = f"{path} was not written ({cause.strerror}), and what was there is kept. {remedy}"
        raise OSError(msg) from error


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path, which replaces ``path`` once it is written and is removed if writing fails."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        with explain_failed_write(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield partial
            partial.replace(path)
    finally:
        with suppress(OSError):  # the folder may be read-only
            partial.unlink(missing_ok=True)


def save_atomically(content: Any, path: Path) -> None:  # noqa: ANN401  # whatever torch saves
    """Write a file with ``torch.save``; an existing file is replaced only by a complete one."""
    import torch

    with atomic_write(path) as partial, partial.open("wb") as file:  # given a name, torch does not say why it failed
        torch.save(content, file)


def to_csv(table: "DataFrame") -> str:
    """Return a table as CSV, whose cells of text spreadsheets take for no formula."""
    texts = table.select_dtypes(exclude=["number", "bool"])
    safe = texts.map(lambda cell: f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA) else cell)
    return table.assign(**safe).to_csv(index=False, lineterminator="\n")


def dataset_digest(dataset: Any) -> str | None:  # noqa: ANN401  # any dataset of anomalib items
    """Return a SHA-256 in hexadecimal of a dataset's images, labels and masks, None if it keeps no ``samples``.

    Order and file names do not matter.
    """
    samples = getattr(dataset, "samples", None)
    if samples is None:
        return None
    masks = samples.mask_path if "mask_path" in samples else [None] * len(samples)
    items = zip(samples.image_path, samples.label_index, masks, strict=True)
    lines = [f"{file_digest(image)} {label} {file_digest(mask) if mask else None}" for image, label, mask in items]
    return hashlib.sha256("\n".join(sorted(lines)).encode()).hexdigest()


def file_digest(path: str) -> str:
    """Return the SHA-256 of a file in hexadecimal; a file that has not changed is not read again."""
    state = Path(path).stat()
    return _file_digest(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=2**16)
def _file_digest(path: str, _size: int, _changed: int) -> str:
    digest = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


@cache
def commit() -> str | None:
    """Return the commit of the checkout that is running, with a ``+`` if files have changed since; None outside of one.

    It is looked up once: a checkout may move on while a long run still uses the code that it has loaded.
    """
    status = _git("status", "--porcelain", "--untracked-files=no", ".")
    head = _git("rev-parse", "HEAD")
    return head + ("+" if status else "") if head else None


def _git(*command: str) -> str | None:
    with suppress(OSError, subprocess.CalledProcessError):  # there is no git, or no checkout
        words = ["git", "-C", str(Path(__file__).parent), *command]
        return subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603
    return None


def versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that results depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def device_name(device: "torch.device") -> str:
    """Return the name of a GPU, or the processor's name with the number of threads."""
    import torch

    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"CPU {name}, {torch.get_num_threads()} threads"
