"""BGAD (Yao et al., CVPR 2023): a normalizing flow that pulls normal features over a boundary, abnormal ones below.

Axes: B images, D channels, H = W image size, h = w positions of features, N positions of any images, P width of
positional encodings, l level.
"""

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data import ImageBatch, InferenceBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule, TimmFeatureExtractor
from anomalib.models.image.cflow.utils import cflow_head, get_logp, positional_encoding_2d
from anomalib.visualization import Visualizer
from torch import nn
from torch.nn.functional import interpolate, logsigmoid

from ..arguments import DEFAULT_PRETRAINED, check_arguments, documented
from .base import TrainedBaseline, drawn_from, standardise, timm_features

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

NORMALIZER = 10.0  # the authors' unit of log-likelihoods per channel, in which margins are measured
META_EPOCHS, WARM_META_EPOCHS = 25, 2  # of the learning rate's schedule: parts of the training, and the first of them


def likelihood_loss(log_likelihood: torch.Tensor, abnormal: torch.Tensor) -> torch.Tensor:
    """Mean of -log(sigmoid) of log-likelihoods per channel ``(N,)`` over normal positions, 0 where there are none."""
    normal = log_likelihood[~abnormal]
    return -logsigmoid(normal).sum() / max(len(normal), 1)


def boundary_loss(log_likelihood: torch.Tensor, abnormal: torch.Tensor, share: float, margin: float) -> torch.Tensor:
    """Semi-push-pull loss: mean distances to the boundary of positions ``(N,)`` on it or on the wrong side.

    A share of the normal positions is below the boundary, which is their wrong side; the right side of abnormal ones
    begins a margin below it. Distances are in units of `NORMALIZER`. There must be positions of each kind.
    """
    value = log_likelihood / NORMALIZER
    normal, odd = value[~abnormal], value[abnormal]
    boundary = normal.detach().sort().values[int(share * len(normal))]
    wrong = [distance[distance >= 0] for distance in (boundary - normal, odd - (boundary - margin))]
    return sum((distance.sum() / max(len(distance), 1) for distance in wrong), value.new_zeros(()))


def rate_share(epoch: int, batch_idx: int, epochs: int) -> float:
    """Return the share of the learning rate that a batch has: a warm-up along a line, then a cosine in steps."""

    def cosine(part: int) -> float:
        return 1e-3 + (1 - 1e-3) * (1 + math.cos(math.pi * part / META_EPOCHS)) / 2

    part = epoch * META_EPOCHS // epochs
    if part >= WARM_META_EPOCHS:
        return cosine(part)
    # The authors take every epoch for two batches: they count their data loaders, which are two.
    warmed = min(1.0, (epoch + batch_idx / 2) * META_EPOCHS / (WARM_META_EPOCHS * epochs))
    return 0.1 + warmed * (cosine(WARM_META_EPOCHS) - 0.1)


class BgadModel(nn.Module):
    """A flow for each level of a frozen backbone, conditioned on where in the image a position is.

    Its arguments are those of `Bgad`. Buffer ``top``: highest log-likelihood ``(l,)`` of normal positions in the last
    epoch of training.
    """

    top: torch.Tensor

    def __init__(
        self, backbone: TimmFeatureExtractor, condition_vector: int, coupling_blocks: int, clamp_alpha: float
    ) -> None:
        super().__init__()
        self.condition_vector = condition_vector
        self.backbone = backbone.requires_grad_(False)
        settings = condition_vector, coupling_blocks, clamp_alpha
        self.flows = nn.ModuleList([cflow_head(*settings, width, permute_soft=True) for width in backbone.out_dims])
        self.register_buffer("top", torch.zeros(len(self.flows)))

    def forward(self, image: torch.Tensor) -> InferenceBatch:
        """Score RGB images in [0, 1], ``(B, 3, H, W)``.

        Returns:
            ``anomaly_map`` ``(B, H, W)``: sum over levels of 1 less the likelihood, relative to the most likely normal
            position in training. ``pred_score`` ``(B,)``: its maximum.
        """
        maps = []
        for level, x in enumerate(self.features(image)):
            rows, condition = self.positions(x)
            value = self.log_likelihood(level, rows, condition).reshape(len(x), 1, *x.shape[-2:])
            likelihood = (value - self.top[level]).exp()
            maps.append(interpolate(1 - likelihood, size=image.shape[-2:], mode="bilinear", align_corners=True))
        anomaly_map = torch.cat(maps, dim=1).sum(dim=1)
        return InferenceBatch(pred_score=anomaly_map.amax(dim=(1, 2)), anomaly_map=anomaly_map)

    def features(self, image: torch.Tensor) -> list[torch.Tensor]:
        """Return per level features ``(B, D, h, w)`` of images in [0, 1]."""
        return list(self.backbone(standardise(image)).values())

    def positions(self, features: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return rows ``(N, D)`` of features ``(B, D, h, w)``, and where each comes from ``(N, P)``."""
        encoding = positional_encoding_2d(self.condition_vector, *features.shape[-2:]).to(features.device)
        condition = encoding.flatten(1).T.repeat(len(features), 1)
        return features.flatten(2).transpose(1, 2).flatten(0, 1), condition

    def log_likelihood(self, level: int, rows: torch.Tensor, condition: torch.Tensor) -> torch.Tensor:
        """Return log-likelihoods per channel ``(N,)`` of features ``(N, D)`` at places ``(N, P)``."""
        with torch.autocast(rows.device.type, enabled=False):  # sums over channels need all their digits
            latent, log_determinant = self.flows[level](rows.float(), [condition.float()])
            width = rows.shape[1]
            return get_logp(width, latent, log_determinant) / width


@documented
class Bgad(TrainedBaseline, AnomalibModule):
    """BGAD: a flow learns the likelihood of normal features, and from masks what has to be unlikely.

    It trains on one device. Normal images alone teach it the likelihood, and nothing else.

    Args:
        backbone: Timm's name of a convolutional network, with the tag of its weights; it is frozen.
        layers: Layers of the backbone, by timm's names.
        condition_vector: P, the width of positional encodings, a multiple of 4.
        coupling_blocks: Number of coupling blocks of each flow.
        clamp_alpha: Bound of the couplings' scales.
        fiber_batch_size: Number of a level's positions in a step; fewer are left out, unless a batch has no more.
        boundary_share: Share of normal positions below the boundary.
        margin: Distance of abnormal positions from the boundary; 0.1 is a log-likelihood of 1 per channel.
        boundary_weight: Weight of the loss at the boundary.
        warmup_epochs: First epochs, in which the likelihood of normal images is all that counts.
        learning_rate: Learning rate of Adam, see :func:`~anomalib_mvfa.baselines.bgad.rate_share`.

    Raises:
        ValueError: An argument has no such value, abnormal training images have no masks, or devices are several.
        RuntimeError: There is no such backbone, or its weights could not be loaded.
    """

    IMAGE_SIZE = 256
    BATCH_SIZE = 32
    normal_only_warning = "BGAD learns no boundary. Use a FewShot datamodule on data with masks."
    model: BgadModel

    def __init__(
        self,
        backbone: str = "tf_efficientnet_b6.aa_in1k",
        layers: Sequence[str] = ("blocks.1", "blocks.2", "blocks.4"),
        pre_trained: bool | str = DEFAULT_PRETRAINED is not None,
        image_size: int = IMAGE_SIZE,
        condition_vector: int = 128,
        coupling_blocks: int = 8,
        clamp_alpha: float = 1.9,
        fiber_batch_size: int = 4096,
        boundary_share: float = 0.05,
        margin: float = 0.1,
        boundary_weight: float = 1.0,
        warmup_epochs: int = 8,
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
        if condition_vector < 4 or condition_vector % 4:
            msg = f"condition_vector={condition_vector} must be a multiple of 4: sine and cosine of two coordinates."
            raise ValueError(msg)
        super().__init__(image_size, pre_processor, post_processor, evaluator, visualizer, threshold)
        self.automatic_optimization = False  # several steps a batch
        with drawn_from(seed):
            features = timm_features(backbone, layers, pre_trained)
            self.model = BgadModel(features, condition_vector, coupling_blocks, clamp_alpha)
        self.fiber_batch_size = fiber_batch_size
        self.boundary_share = boundary_share
        self.margin = margin
        self.boundary_weight = boundary_weight
        self.warmup_epochs = warmup_epochs
        self.learning_rate = learning_rate
        self.max_epochs = max_epochs
        self.seed = seed

    def setup(self, stage: str) -> None:
        """Choose how long to train, and refuse several devices."""
        super().setup(stage)
        if stage == "fit" and self.epochs <= self.warmup_epochs:
            logger.warning(
                "warmup_epochs=%d leave none of %d epochs to learn from masks. Lower it, or train longer.",
                self.warmup_epochs,
                self.epochs,
            )
        if stage == "fit" and self.trainer.world_size > 1:
            msg = f"Bgad trains on one device, and there are {self.trainer.world_size}. Set devices to 1."
            raise ValueError(msg)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Return Adam over the flows."""
        return torch.optim.Adam(self.model.flows.parameters(), lr=self.learning_rate)

    def on_train_epoch_start(self) -> None:
        """Forget the highest likelihood: the flows have changed since."""
        self.model.top.fill_(-torch.inf)

    def training_step(self, batch: ImageBatch, batch_idx: int, *args, **kwargs) -> None:  # noqa: ANN002, ANN003
        """Take the steps of a batch, over the positions of each level in random order."""
        del args, kwargs
        image, label = torch.as_tensor(batch.image), torch.as_tensor(batch.gt_label).bool()
        if batch.gt_mask is None and label.any():
            msg = (
                f"Bgad learns abnormal positions from masks, and the data of {self.facts.class_name} have none. Choose "
                "data with masks (of BMAD: Brain, Liver or Retina_RESC), abnormal_shots=0, or Dra, AprilGan or Mvfa."
            )
            raise ValueError(msg)
        mask = image.new_zeros(len(image), *image.shape[-2:]) if batch.gt_mask is None else batch.gt_mask
        if self.current_epoch < self.warmup_epochs:
            image, mask = image[~label], mask[~label]
        if not len(image):
            return
        optimizer: Any = self.optimizers()
        share = rate_share(self.current_epoch, batch_idx, self.epochs)
        optimizer.param_groups[0]["lr"] = share * self.learning_rate
        order = self.step_rng(batch_idx)
        losses = []
        for level, x in enumerate(self.model.features(image)):
            rows, condition = self.model.positions(x)
            abnormal = interpolate(mask.unsqueeze(1).float(), size=x.shape[-2:], mode="nearest").flatten() > 0
            shuffled = torch.from_numpy(order.permutation(len(rows))).to(x.device)
            full = len(rows) // self.fiber_batch_size * self.fiber_batch_size
            for chosen in shuffled[: full or None].split(self.fiber_batch_size):
                value = self.model.log_likelihood(level, rows[chosen], condition[chosen])
                losses.append(self._take_step(level, value, abnormal[chosen]))
        self.log_loss(torch.stack(losses).mean(), batch)

    def _take_step(self, level: int, value: torch.Tensor, abnormal: torch.Tensor) -> torch.Tensor:
        """Take one step by the likelihoods of a level's positions, and return their loss."""
        loss = likelihood_loss(value, abnormal)
        if abnormal.any() and not abnormal.all():
            loss = loss + self.boundary_weight * boundary_loss(value, abnormal, self.boundary_share, self.margin)
        optimizer: Any = self.optimizers()
        optimizer.zero_grad(set_to_none=False)  # as in the authors' torch: other levels move on by momentum
        self.manual_backward(loss)
        optimizer.step()
        normal = value.detach()[~abnormal]
        if len(normal):
            self.model.top[level] = torch.maximum(self.model.top[level], normal.max())
        return loss.detach()
