"""Callbacks that every model adds to anomalib's: finite numbers, ends of runs, origins of checkpoints, and results."""

import ctypes
import logging
import signal
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from .contract import dataset_of
from .io import commit, dataset_digest, versions
from .results import Results

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

TERMINATED = 128 + signal.SIGTERM
"""Exit code after SIGTERM, as shells have it."""
ADVICE = (
    "Out of memory. These options help, those without effect on scores first: a smaller eval_batch_size or "
    "train_batch_size of the data; trainer.precision=bf16-mixed; a smaller k_shot or bank_images, or a coreset of the "
    "memory bank; a smaller image_size or backbone; another device (trainer.accelerator)."
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of a device, or of the computer, did not suffice."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)


class FreedMemory(Callback):
    """Gives freed memory back to the system after each batch of images that is scored.

    The GNU C library before 2.38 seldom finds a place for torch's next tensors in what the last ones have left: without
    this, a test grew by 0.6 MB with each image of 238 px, 12 GB for 20,000. It takes less than a millisecond.
    """

    def _give_back(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        del args, kwargs
        with suppress(OSError, AttributeError, TypeError):  # of other systems
            ctypes.CDLL(None).malloc_trim(0)

    on_test_batch_end = on_validation_batch_end = on_predict_batch_end = _give_back


class FiniteNumbers(Callback):
    """Ends training and scoring with a ValueError where losses, weights or scores are NaN or infinite.

    Metrics would make numbers of them: NaN scores are ranked by the order of the files. Losses are added up on the
    device and looked at once an epoch, so that steps of training do not wait for it.
    """

    _losses: Any = 0.0

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *args: Any) -> None:  # noqa: ANN401
        """Add the loss of a step."""
        del trainer, pl_module, args
        loss = outputs.get("loss") if isinstance(outputs, Mapping) else outputs
        if isinstance(loss, torch.Tensor):
            self._losses = self._losses + loss.detach().sum()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Look at losses and trained weights, before anything is scored with them or saved."""
        del trainer
        losses, self._losses = self._losses, 0.0
        trained = {name: weight for name, weight in pl_module.named_parameters() if weight.requires_grad}
        for name, values in {"The training loss": torch.as_tensor(losses), **trained}.items():
            if not values.isfinite().all():
                msg = (
                    f"{name} of {type(pl_module).__name__} is not finite: training has diverged. Train anew, with a "
                    "lower learning rate."
                )
                raise ValueError(msg)

    on_train_epoch_end = on_test_start = on_predict_start = on_validation_start

    def on_validation_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,  # noqa: ANN401
        batch: Any,  # noqa: ANN401
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Look at the scores of a batch."""
        del trainer, outputs, batch_idx, dataloader_idx
        for name in ("pred_score", "anomaly_map"):
            if (values := getattr(batch, name, None)) is None:
                continue
            finite = torch.as_tensor(values).isfinite().reshape(batch.batch_size, -1).all(dim=1)  # (B)
            if not finite.all():
                path = batch.image_path[int(finite.int().argmin())] if batch.image_path else "an image"
                msg = (
                    f"The {name} that {type(pl_module).__name__} gives {path} is not finite. Look at the image, or "
                    "train anew, with a lower learning rate."
                )
                raise ValueError(msg)

    on_test_batch_end = on_predict_batch_end = on_validation_batch_end


class RunEnd(Callback):
    """Gives advice when memory runs out, and runs that SIGTERM ends an exit code of their own."""

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Log the advice, with the batch sizes in use; Lightning leaves with 0 after SIGTERM, as if it had finished."""
        if isinstance(exception, SIGTERMException):
            exception.code = TERMINATED
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
    """Return a model's callbacks, those of this module, and what writes results."""
    theirs = callbacks if isinstance(callbacks, Sequence) else [callbacks]
    # The first before metrics and thresholds take a number, the last once scores have met the thresholds.
    return [FiniteNumbers(), FreedMemory(), *theirs, RunEnd(), Provenance(), Results()]
