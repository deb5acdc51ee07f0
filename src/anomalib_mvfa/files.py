"""Files that are complete or not there."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

NO_ROOM = {errno.ENOSPC, errno.EDQUOT}


@contextmanager
def room_for(path: Path) -> Iterator[None]:
    """Say what could not be written where a disk is full, or a quota used up."""
    try:
        yield
    except Exception as error:
        cause = error.__context__ if isinstance(error, RuntimeError) else error  # torch hides the reason behind its own
        if not isinstance(cause, OSError) or cause.errno not in NO_ROOM:
            raise
        msg = f"{path} was not written ({cause.strerror}), and what was there is kept. Make room, or write elsewhere."
        raise OSError(msg) from error


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Give a path to write to; what is written there takes the file's place once it is complete, or else is removed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial")
    try:
        with room_for(path):
            yield partial
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def read_arrays(path: Path) -> dict[str, Any]:
    """Read the arrays of an ``.npz`` file of ours.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is none.
    """
    try:
        with np.load(path, allow_pickle=False) as saved:
            return dict(saved)
    except FileNotFoundError:
        raise
    except Exception as error:  # whatever NumPy and zipfile raise on a broken file
        msg = f"{path} cannot be read; it may be cut short. Remove its folder, and run again what wrote it."
        raise ValueError(msg) from error


def save_whole(content: Any, path: Path) -> None:  # noqa: ANN401  # whatever torch saves
    """Write a file of torch that is complete or not there."""
    with written_whole(path) as partial, partial.open("wb") as file:  # by name, torch does not say why it failed
        torch.save(content, file)
