"""How far slow work is, where anomalib's own progress bar does not tell."""

import logging
from collections.abc import Iterable, Sequence
from typing import TypeVar

from rich import get_console
from rich.progress import track

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

_Item = TypeVar("_Item")


def progress(items: Iterable[_Item], what: str, total: int | None = None) -> Iterable[_Item]:
    """Return items that show on a terminal how many have been taken, and the time left; a log has one line.

    Args:
        items: What is worked on.
        what: What is done with them.
        total: How many there are, where ``items`` has no length.
    """
    console = get_console()  # Lightning's, whose bar may be on display
    logger.info("%s: %d steps.", what, len(items) if total is None and isinstance(items, Sequence) else total)
    return track(items, what, total, console=console, transient=True, disable=not console.is_terminal)
