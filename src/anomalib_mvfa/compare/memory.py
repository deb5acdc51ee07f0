"""What keeps memory from growing from job to job."""

import ctypes
import gc
from contextlib import suppress

M_MMAP_THRESHOLD = -3
"""The C library's number of the parameter that says which blocks are large."""
LARGE = 16 * 2**20
"""Size of a large block in bytes."""


def return_large_blocks() -> None:
    """Let the C library return large blocks to the system as soon as they are freed.

    By default it raises the threshold up to 32 MiB and keeps smaller blocks in a heap, which grew to 18 GB in a coreset
    whose every step takes and frees a block of 31 MB.
    """
    with suppress(OSError, AttributeError):  # of other systems
        ctypes.CDLL("libc.so.6").mallopt(M_MMAP_THRESHOLD, LARGE)


def return_freed_memory() -> None:
    """Return to the system what a job has freed.

    The C library keeps it in its heap, where later jobs fit badly: of 6 GB after the jobs of twelve methods, 1.2 GB
    were in use.
    """
    gc.collect()  # models and trainers refer to each other
    with suppress(OSError, AttributeError):  # of other systems
        ctypes.CDLL("libc.so.6").malloc_trim(0)
