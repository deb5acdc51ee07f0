"""DRA (Ding et al., CVPR 2022): one head for what is normal, and three for anomalies seen, made up and residual.

Axes: B images, D channels, H = W image size, h = w positions of features, s scale.
"""

from typing import Any

import numpy as np
import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.data.utils import LabelName
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, DynamicBufferMixin, TimmFeatureExtractor
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT, OptimizerLRScheduler
from torch import nn
from torch.nn.functional import interpolate
from torchvision.transforms.v2 import ColorJitter, InterpolationMode
from torchvision.transforms.v2.functional import rotate

from ..arguments import DEFAULT_PRETRAINED, check_arguments, check_bounds, documented
from ..data.dataset import read_items
from .base import TrainedBaseline, drawn_from, standardise, timm_features

MARGIN = 5.0  # least deviation of anomalies, in standard deviations of the prior
NORMAL, SEEN, PSEUDO = 0, 1, 2  # kinds of training images; the first two are anomalib's labels
SCALES = 2  # of an image: as it is, and halved
MIN_SIZE = 128  # smallest height and width of images, which halved give 2 x 2 positions with a stride of 32
HIDDEN = 256  # width of the normality head
AREA, ASPECT = (0.02, 0.15), (0.3, 1 / 0.3)  # bounds of a pasted patch's share of the image, and of its height by width
JITTER = ColorJitter(0.1, 0.1, 0.1, 0.1)  # of its colours
LARGEST_GRADIENT = 1.0  # norm to which gradients are cut


def deviation_loss(score: torch.Tensor, abnormal: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    """Deviation loss, a mean over the counted ones of a head's scores ``(B,)``, 0 where there are none.

    Scores are drawn to 0, the mean of a standard normal prior, and those to be abnormal ``(B,)`` beyond the margin.
    """
    loss = torch.where(abnormal, (MARGIN - score).clamp(min=0), score.abs())
    return (loss * counted).sum() / counted.sum().clamp(min=1)


def top_mean(patches: torch.Tensor, share: float) -> torch.Tensor:
    """Return means ``(B,)`` of the highest ``share``, at least one, of scores ``(B, h, w)``."""
    flat = patches.flatten(1)
    return flat.topk(max(1, int(share * flat.shape[1])), dim=1).values.mean(dim=1)


def cut_mix(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Return a pseudo anomaly of each image ``(B, 3, H, W)``: a patch in other colours, pasted to another place."""
    pasted = image.clone()
    height, width = image.shape[-2:]
    for row, source in enumerate(image):
        area, aspect = rng.uniform(*AREA) * height * width, np.exp(rng.uniform(*np.log(ASPECT)))
        h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
        (top, left), (y, x) = rng.integers(0, (height - h, width - w), size=(2, 2))
        with drawn_from(int(rng.integers(2**31))):
            pasted[row, :, y : y + h, x : x + w] = JITTER(source[:, top : top + h, left : left + w])
    return pasted


def turned(image: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Return images ``(B, 3, H, W)``, each turned by any angle; what lies beyond is black."""
    angles = rng.uniform(-180, 180, len(image)).tolist()
    return torch.stack([rotate(one, angle) for one, angle in zip(image, angles, strict=True)])


class Head(nn.Sequential):
    """Layers that end in one channel, whose absolute value is a score."""

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Score features ``(B, D)`` of images or ``(B, D, h, w)`` of positions: ``(B,)`` or ``(B, h, w)``."""
        return super().forward(features).squeeze(1).abs()


class DraModel(DynamicBufferMixin):
    """Four heads on the last features of a backbone, at two scales of the image; its arguments are those of `Dra`.

    Buffers ``reference_0`` and ``reference_1``: mean features ``(D, h, w)`` of normal images, per scale; empty until
    set.
    """

    reference_0: torch.Tensor
    reference_1: torch.Tensor

    def __init__(self, backbone: TimmFeatureExtractor, top_share: float) -> None:
        super().__init__()
        self.top_share = top_share
        self.backbone = backbone
        (width,) = backbone.out_dims
        self.normality_head = Head(nn.Linear(width, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, 1))
        self.seen_head = Head(nn.Conv2d(width, 1, 1))
        self.pseudo_head = Head(nn.Conv2d(width, 1, 1))
        look = nn.Conv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()
        self.residual_head = Head(*look, nn.Conv2d(width, 1, 1))
        self.register_buffer("reference_0", torch.empty(0))
        self.register_buffer("reference_1", torch.empty(0))

    def forward(self, image: torch.Tensor) -> InferenceBatch:
        """Score RGB images in [0, 1], ``(B, 3, H, W)``; RuntimeError without references.

        Returns:
            ``pred_score`` ``(B,)``: scores of the anomaly heads, less that of the normality head. ``anomaly_map``
            ``(B, H, W)``: positions' scores of the anomaly heads, upsampled.
        """
        if not self.reference_0.numel():
            msg = "The model has no reference features yet. Fit it, or load a checkpoint of a finished fit."
            raise RuntimeError(msg)
        normality, *heads = self.head_scores(self.features(image), [self.reference_0, self.reference_1])
        pred_score = sum(map(self.image_score, heads)) - normality
        patches = [scale.unsqueeze(1) for head in heads for scale in head]
        maps = torch.stack([interpolate(scale, size=image.shape[-2:], mode="bilinear") for scale in patches])
        return InferenceBatch(pred_score=pred_score, anomaly_map=maps.sum(dim=0).squeeze(1) / SCALES)

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Return per scale features ``(B, D, h, w)`` of images in [0, 1]."""
        image = standardise(image)
        scales = [image[..., :: 2**scale, :: 2**scale] for scale in range(SCALES)]
        return [next(iter(self.backbone(scale).values())) for scale in scales]

    def head_scores(self, features: list[torch.Tensor], references: list[torch.Tensor]) -> tuple[Any, ...]:
        """Return normality ``(B,)`` by features and references per scale, and anomalies per scale ``(B, h, w)``."""
        return (
            torch.stack([self.normality_head(x.mean(dim=(2, 3))) for x in features]).mean(dim=0),
            [self.seen_head(x) for x in features],
            [self.pseudo_head(x) for x in features],
            [self.residual_head(reference - x) for x, reference in zip(features, references, strict=True)],
        )

    def image_score(self, patches: list[torch.Tensor]) -> torch.Tensor:
        """Return the scores ``(B,)`` of images by a head's scores of positions, per scale ``(B, h, w)``."""
        return torch.stack([top_mean(scale, self.top_share) for scale in patches]).mean(dim=0)

    def loss(self, image: torch.Tensor, kind: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
        """Return the sum of the heads' losses on images ``(B, 3, H, W)`` of a kind ``(B,)``, by normal references."""
        both = self.features(torch.cat([reference, image]))  # in one pass, so that batch norm treats them alike
        references = [x[: len(reference)].mean(dim=0) for x in both]
        normality, *heads = self.head_scores([x[len(reference) :] for x in both], references)
        seen, pseudo, residual = map(self.image_score, heads)
        everything = torch.ones_like(kind, dtype=torch.bool)
        return (
            deviation_loss(normality, kind == NORMAL, everything)
            + deviation_loss(seen, kind == SEEN, kind != PSEUDO)
            + deviation_loss(pseudo, kind == PSEUDO, kind != SEEN)
            + deviation_loss(residual, kind != NORMAL, everything)
        )

    @torch.no_grad()
    def set_references(self, reference: torch.Tensor) -> None:
        """Keep the mean features of normal images ``(N, 3, H, W)`` in [0, 1], by the weights as they are."""
        was_training = self.training
        with torch.inference_mode(False):  # training may go on after a validation
            self.reference_0, self.reference_1 = (x.mean(dim=0) for x in self.eval().features(reference.clone()))
        self.train(was_training)


@documented
class Dra(TrainedBaseline, AnomalibModule):
    """DRA: learns from labelled anomalies, pseudo anomalies made of normal images, and differences from normal images.

    Args:
        backbone: Timm's name, with the tag of its weights, of a convolutional network with stride 32; it is trained.
        image_size: Height and width in pixels to which images are resized, at least 128.
        references: Largest number of normal images that the residual head compares with. Those of training are drawn
            anew for each step, and half of them are pseudo anomalies; those of scores stay the same.
        top_share: Share of the positions, the highest, whose mean is an image's score.
        learning_rate: Learning rate of Adam, a tenth after 9, 19 and 29 of 30 parts of the training.

    Raises:
        ValueError: An argument has no such value, or the data have no normal training image.
        RuntimeError: There is no such backbone, or its weights could not be loaded.
    """

    IMAGE_SIZE = 448
    INTERPOLATION = InterpolationMode.BILINEAR
    BATCH_SIZE = 32  # with as many pseudo anomalies as normal images, the authors' 48
    normal_only_warning = "DRA's head of seen anomalies learns nothing. Use a FewShot datamodule."
    model: DraModel

    def __init__(
        self,
        backbone: str = "resnet18.tv_in1k",
        pre_trained: bool | str = DEFAULT_PRETRAINED is not None,
        image_size: int = IMAGE_SIZE,
        references: int = 5,
        top_share: float = 0.1,
        learning_rate: float = 2e-4,
        max_epochs: int = 200,
        seed: int = 0,
        threshold: float | str | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_arguments(locals())
        check_bounds("image_size", image_size, MIN_SIZE)
        super().__init__(image_size, pre_processor, post_processor, evaluator, visualizer, threshold)
        with drawn_from(seed):
            self.model = DraModel(timm_features(backbone, [-1], pre_trained, requires_grad=True), top_share)
        self.references = references
        self.learning_rate = learning_rate
        self.max_epochs = max_epochs
        self.seed = seed
        self._reference_images, self._normal = torch.empty(0), np.empty(0, int)

    def configure_optimizers(self) -> OptimizerLRScheduler:
        """Return Adam over everything, and a schedule of three steps."""
        optimizer = torch.optim.Adam(self.model.parameters(), lr=self.learning_rate, weight_decay=1e-5)
        epochs = self.epochs
        fall = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda at: 0.1 ** ((30 * at + epochs) // (10 * epochs)))
        return [optimizer], [fall]

    def configure_gradient_clipping(self, *args, **kwargs) -> None:  # noqa: ANN002, ANN003
        """Cut gradients to the authors' norm, whatever the trainer's."""
        del args, kwargs
        nn.utils.clip_grad_norm_(self.model.parameters(), LARGEST_GRADIENT)

    def on_train_start(self) -> None:
        """Draw the references of scores, and process them as images to be scored."""
        data = self.dataset("train")
        samples = getattr(data, "samples", None)
        normal = np.flatnonzero([] if samples is None else samples.label_index == LabelName.NORMAL)
        if not len(normal):
            msg = (
                f"Dra needs normal training images to compare with, and {type(data).__name__} lists none. Give a "
                "FewShot datamodule, or another one of anomalib's."
            )
            raise ValueError(msg)
        self._normal = normal
        self._reference_images = self._drawn(np.random.default_rng(self.seed))

    def _drawn(self, rng: np.random.Generator) -> torch.Tensor:
        """Return normal training images ``(N, 3, H, W)``, processed as images to be scored."""
        rows = sorted(rng.permutation(self._normal)[: self.references])
        data, transform = self.dataset("train"), getattr(self.pre_processor, "transform", None) or nn.Identity()
        return torch.stack([transform(item.image) for item in read_items(data, rows)]).to(self.device)

    def training_step(self, batch: ImageBatch, batch_idx: int, *args, **kwargs) -> STEP_OUTPUT:  # noqa: ANN002, ANN003
        """Return the loss of a batch with its pseudo anomalies."""
        del args, kwargs
        rng = self.step_rng(batch_idx)
        image, label = torch.as_tensor(batch.image), torch.as_tensor(batch.gt_label).long()
        pseudo = cut_mix(image[label == LabelName.NORMAL], rng)
        kind = torch.cat([label, label.new_full((len(pseudo),), PSEUDO)])
        reference = self._drawn(rng)
        odd = torch.from_numpy(rng.random(len(reference)) < 0.5)
        reference[odd] = cut_mix(reference[odd], rng)
        loss = self.model.loss(turned(torch.cat([image, pseudo]), rng), kind, turned(reference, rng))
        self.log_loss(loss, batch)
        return loss

    def on_validation_start(self) -> None:
        """Compare with features of the weights as they are now."""
        if len(self._reference_images):
            self.model.set_references(self._reference_images)

    def on_train_epoch_end(self) -> None:
        """See that the checkpoint to be saved can score, whether or not there is validation."""
        self.model.set_references(self._reference_images)

    def on_train_end(self) -> None:
        """Forget the reference images: they do not belong into an exported file."""
        self._reference_images = torch.empty(0)
