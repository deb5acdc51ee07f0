"""Callbacks that every model adds to anomalib's: advice when memory runs out, and where checkpoints come from."""

import logging
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from .contract import dataset_of
from .io import commit, dataset_digest, versions

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

ADVICE = (
    "Out of memory. These options help, those without effect on scores first: a smaller eval_batch_size or "
    "train_batch_size of the data; trainer.precision=bf16-mixed; a smaller k_shot or bank_images, or a coreset of the "
    "memory bank; a smaller image_size or backbone; another device (trainer.accelerator)."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device, or of the computer, did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class MemoryAdvice(Callback):
    """Logs what to do when a run ends out of memory, beside the error itself."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log the advice, with the batch sizes in use."""
        if not is_out_of_memory(exception):
            return
        datamodule = getattr(trainer, "datamodule", None)
        sizes = {name: getattr(datamodule, name, None) for name in ("train_batch_size", "eval_batch_size")}
        in_use = ", ".join(f"{name}={size}" for name, size in sizes.items() if size)
        logger.error("%s (Now: %s.)", ADVICE, ", ".join(filter(None, (str(pl_module.device), in_use))))


class Provenance(Callback):
    """Writes the commit, versions and a digest of the training data into checkpoints, under "provenance".

    Lightning itself writes the model's arguments.
    """

    _of_fit: dict[str, Any] | None = None

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Keep a checkpoint's provenance, for checkpoints that are saved without another fit."""
        del trainer, pl_module
        self._of_fit = checkpoint.get("provenance")

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read the data once, and not at every checkpoint."""
        del pl_module
        train_set = dataset_digest(dataset_of(trainer, "train"))
        self._of_fit = {"commit": commit(), "versions": versions(), "train_set": train_set}

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Add the provenance."""
        del trainer, pl_module
        checkpoint["provenance"] = self._of_fit


def default_callbacks(callbacks: Sequence[Callback] | Callback) -> list[Callback]:
    """Return a model's callbacks, and those of this module."""
    return [*(callbacks if isinstance(callbacks, Sequence) else [callbacks]), MemoryAdvice(), Provenance()]
