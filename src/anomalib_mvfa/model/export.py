"""Anomalib's pre- and post-processor in the forms that our models need, and exports that score as the model does."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib.data import AnomalibDataModule, Batch
from anomalib.metrics import F1AdaptiveThreshold
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from torch import Tensor, nn
from torch.utils.data import DataLoader
from torchmetrics.utilities.data import dim_zero_cat
from torchvision.transforms.v2 import InterpolationMode, Resize

from .thresholds import BEST_F1, RATES, Evidence, parse_threshold, threshold_of_rate

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule as _Host
else:
    _Host = object

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

ONNX_OPSET = 18
"""The operator set that torch writes; converting it to an older one fails."""
CUBIC = -0.5
"""Coefficient of the cubic kernel, as Pillow and torch's antialiased resize have it."""


class ExportMixin(_Host):
    """Anomalib's exports as our models need them; to be named before ``AnomalibModule``."""

    def check_exportable(self) -> None:
        """Raise an error for a model that cannot score, which an exported file would not say."""

    def to_torch(self, *args, **kwargs) -> Path:  # noqa: ANN002, ANN003
        """Export as anomalib does, without metrics (100 MB of bins) and with weights that ask for no gradient."""
        self.check_exportable()
        evaluator, self.evaluator = self.evaluator, None
        try:
            with _without_gradients(self):
                return super().to_torch(*args, **kwargs)
        finally:
            self.evaluator = evaluator

    def to_onnx(self, *args, **kwargs) -> Path:  # noqa: ANN002, ANN003
        """Export as anomalib does, in the operator set that torch writes; OpenVINO's export passes through here too."""
        self.check_exportable()
        return super().to_onnx(*args, **{"opset_version": ONNX_OPSET, **kwargs})

    @staticmethod
    def _post_training_quantization_ov(model: Any, datamodule: AnomalibDataModule | None = None) -> Any:  # noqa: ANN401
        """Quantize a graph to int8, as a transformer, with the ranges that values have on the images to learn from.

        Anomalib takes the validation's images, which may be those of the test, and a convolutional network's way,
        which moves maps five times as far.
        """
        if datamodule is None:
            msg = "compression_type=INT8_PTQ needs images: give --data, and it takes those that the model learns from."
            raise ValueError(msg)
        import nncf  # an optional package

        datamodule.setup("fit")
        images = DataLoader(
            datamodule.train_data,
            shuffle=True,  # of many, the first would all be of one kind
            generator=torch.Generator().manual_seed(0),
            collate_fn=lambda items: items[0].image.unsqueeze(0).numpy(),
        )
        return nncf.quantize(model, nncf.Dataset(images), model_type=nncf.ModelType.TRANSFORMER)


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)


class AntialiasedPreProcessor(PreProcessor):
    """Resizes images to a square, whatever their aspect ratio, antialiased, in exported models too.

    Anomalib drops the antialiasing on export; on a 512 px film that moved the anomaly map by 0.2.

    Args:
        image_size: Height and width in pixels.
        interpolation: Bicubic or bilinear.
    """

    def __init__(self, image_size: int, interpolation: InterpolationMode = InterpolationMode.BICUBIC) -> None:
        super().__init__(Resize((image_size, image_size), interpolation=interpolation, antialias=True))
        self.export_transform = AntialiasedResize(image_size, interpolation)

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore the transform of a checkpoint, antialiased on export as well."""
        super().load_checkpoint_config(config)
        if isinstance(self.transform, Resize):  # another pre-processor's transform exports as anomalib does it
            self.export_transform = AntialiasedResize(self.transform.size[0], self.transform.interpolation)


class AntialiasedResize(nn.Module):
    """The pre-processor's resize, as products with matrices: OpenVINO's own cubic resize ignores antialiasing.

    Args:
        size: Height and width of the result in pixels.
        interpolation: Bicubic or bilinear.
    """

    def __init__(self, size: int, interpolation: InterpolationMode = InterpolationMode.BICUBIC) -> None:
        super().__init__()
        self.size, self.cubic = size, interpolation == InterpolationMode.BICUBIC

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        """Resize images ``(B, C, H, W)`` to ``(B, C, size, size)``."""
        rows, columns = (_resize_matrix(length, self.size, image, self.cubic) for length in image.shape[-2:])
        return rows @ image @ columns.T


def _resize_matrix(length: int, size: int, like: torch.Tensor, cubic: bool) -> torch.Tensor:
    """Return weights ``(size, length)`` of input pixels in output pixels: a kernel, widened when shrinking."""
    pixel = torch.arange(length, device=like.device, dtype=like.dtype) + 0.5
    step = (pixel[-1] + 0.5) / size  # of tensors, so that exported models do not fix whether images shrink
    centre = (torch.arange(size, device=like.device, dtype=like.dtype) + 0.5) * step
    x = (pixel - centre.unsqueeze(1)).abs() / step.clamp(min=1)
    if not cubic:
        weights = (1 - x).clamp(min=0)
        return weights / weights.sum(dim=1, keepdim=True)
    near = ((CUBIC + 2) * x - (CUBIC + 3)) * x * x + 1
    far = CUBIC * (((x - 5) * x + 8) * x - 4)
    weights = torch.where(x < 1, near, torch.where(x < 2, far, torch.zeros_like(x)))
    return weights / weights.sum(dim=1, keepdim=True)


class _RememberingThreshold(F1AdaptiveThreshold):
    """The threshold of best F1, or the highest score of normal images where there are no others.

    Anomalib finds the lowest score that is still to be called abnormal, and calls abnormal what is above the threshold;
    so it lies midway between that score and the next lower one.

    Attributes:
        seen: Scores and labels that it was found on.
    """

    seen: tuple[Tensor, Tensor]

    def compute(self) -> Tensor:
        """Return the threshold."""
        scores, labels = self.seen = dim_zero_cat(self.preds), dim_zero_cat(self.target)  # of all processes
        if not labels.any():
            return scores.max()
        lowest = super().compute()
        below = scores[scores < lowest]
        return (lowest + below.max()) / 2 if len(below) else torch.nextafter(lowest, lowest - 1)


class ChoicePostProcessor(PostProcessor):
    """Anomalib's post-processor, with a choice of the image threshold.

    Beside the threshold of best F1 it keeps the scores that this was found on, in checkpoints too, so that another
    choice needs no images. Masks are made by the threshold of best F1 over pixels.

    Args:
        threshold: What is asked for, see :func:`~anomalib_mvfa.model.thresholds.parse_threshold`; by default what a
            checkpoint asks for, and else best F1.
        kwargs: Arguments of anomalib's post-processor.

    Attributes:
        evidence: The images that thresholds come from, None before there are any.
    """

    _chosen: Tensor
    _told = ""

    def __init__(self, threshold: float | str | None = None, **kwargs) -> None:  # noqa: ANN003  # anomalib's
        super().__init__(**kwargs)
        self._image_threshold_metric = _RememberingThreshold(fields=["pred_score", "gt_label"], strict=False)
        self.register_buffer("_chosen", torch.tensor(math.nan), persistent=False)
        self.evidence: Evidence | None = None
        self.threshold = threshold
        self.choose()

    def choose(self) -> None:
        """Find the threshold that is asked for, among what is known."""
        name, value = self.rule
        if name in RATES:
            known = self.evidence or Evidence([], [])
            value = threshold_of_rate(name, value, known.scores, known.labels)
        self._chosen.fill_(value)

    @property
    def rule(self) -> tuple[str, float]:
        """What is asked for: a name and a value."""
        return parse_threshold(BEST_F1 if self.threshold is None else self.threshold)

    @property
    def image_threshold(self) -> Tensor:
        """The threshold in use, in the scale of the model's own scores; NaN if there is none."""
        return torch.where(self._chosen.isnan(), super().image_threshold, self._chosen)

    def tell(self) -> None:
        """Log what the image threshold is, where it comes from, and what is to be doubted about it, unless it has."""
        threshold = float(self.image_threshold)
        text, doubts = (self.evidence or Evidence([], [])).describe(*self.rule, threshold)
        if text != self._told:
            self._told = text
            logger.info("%s", text)
            for doubt in doubts:
                logger.warning("%s", doubt)

    def on_validation_epoch_end(self, *args, **kwargs) -> None:  # noqa: ANN002, ANN003
        """Find thresholds as anomalib does, and keep the scores that they were found on."""
        metric: Any = self._image_threshold_metric
        was_updated = self.enable_thresholding and metric.update_called
        super().on_validation_epoch_end(*args, **kwargs)
        if was_updated:
            scores, labels = metric.seen
            self.evidence = Evidence(scores.float().tolist(), labels.int().tolist())
            self.choose()

    def forget(self) -> None:
        """Forget the images that thresholds came from."""
        self.evidence = None
        self.choose()

    def normalize_batch(self, batch: Batch) -> None:
        """Move scores and maps so that thresholds are at 0.5; the batch keeps the model's own as ``raw_score``."""
        batch.raw_score = batch.pred_score  # type: ignore[attr-defined]  # no field of anomalib's
        super().normalize_batch(batch)

    def checkpoint_config(self) -> dict[str, Any]:
        """Return anomalib's configuration, what is asked for, and the scores that thresholds come from."""
        evidence = asdict(self.evidence) if self.evidence else None
        return {**super().checkpoint_config(), "threshold": self.threshold, "evidence": evidence}

    def load_checkpoint_config(self, config: dict[str, Any]) -> None:
        """Restore them; what this post-processor was asked for itself goes first."""
        super().load_checkpoint_config(config)
        self.threshold = config.get("threshold") if self.threshold is None else self.threshold
        self.evidence = Evidence(**config["evidence"]) if config.get("evidence") else None
        self.choose()


def ask_for_threshold(post_processor: Any, threshold: float | str | None) -> None:  # noqa: ANN401  # any, or none
    """Ask a model's post-processor for a threshold, unless it is None.

    Raises:
        ValueError: It is no threshold, or a post-processor that offers no choice.
    """
    if threshold is None:
        return
    if not isinstance(post_processor, ChoicePostProcessor):
        msg = f"threshold={threshold!r} needs the default post-processor: leave post_processor at true."
        raise ValueError(msg)  # noqa: TRY004  # of the argument
    post_processor.threshold = threshold
    post_processor.choose()


class ThresholdScaledPostProcessor(ChoicePostProcessor):
    """Maps scores linearly so that the threshold becomes 0.5: [0, t] to [0, 0.5] and [t, 1] to [0.5, 1].

    Scores of MVFA lie inside [0, 1] already. Anomalib's own scaling by the validation's extremes would clamp scores
    beyond them, and ties spoil AUROC.
    """

    @staticmethod
    def _normalize(preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor) -> Tensor | None:
        del norm_min, norm_max
        if preds is None:
            return None
        # Inside (0, 1), so that neither side is empty; without a threshold scores stay as they are.
        threshold = threshold.nan_to_num(nan=0.5).clamp(1e-6, 1 - 1e-6).to(preds)
        below, above = 0.5 * preds / threshold, 0.5 + 0.5 * (preds - threshold) / (1 - threshold)
        return torch.where(preds < threshold, below, above)


class OrderKeepingPostProcessor(ChoicePostProcessor):
    """Maps scores of any range into (0, 1), strictly increasing, with the threshold at 0.5.

    Anomalib's own post-processor scales by the validation's extremes and clamps what lies beyond them; the resulting
    ties change AUROC, for one method more than for another. With this one, AUROC is that of the raw scores.
    """

    @staticmethod
    def _normalize(preds: Tensor | None, norm_min: Tensor, norm_max: Tensor, threshold: Tensor) -> Tensor | None:
        if preds is None:
            return None
        threshold = torch.where(threshold.isnan(), (norm_max + norm_min) / 2, threshold).nan_to_num(nan=0.0)
        span = (norm_max - norm_min).nan_to_num(nan=1.0)
        span = torch.where(span > 0, span, torch.ones_like(span))
        distance = (preds - threshold.to(preds)) / span.to(preds)  # from the threshold, in ranges of the validation
        return 0.5 + 0.5 * distance / (1 + distance.abs())
