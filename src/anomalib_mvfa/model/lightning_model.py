"""MVFA in anomalib."""

import copy
import logging
import math
from collections.abc import Sequence
from itertools import count
from typing import Any, cast

import torch
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import Visualizer
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.data import DistributedSampler
from torchvision.transforms.v2 import Resize

from ..arguments import DEFAULT_BACKBONE, DEFAULT_PRETRAINED, check_arguments, documented, optional_text
from ..contract import class_name_of
from ..data.dataset import SupportViewDataset
from ..data.samplers import train_loader
from ..data.support import groups_of
from . import calibration
from .build import build_mvfa
from .frozen_cache import FrozenCache
from .held_out import held_out_scores, split
from .lightning_hooks import FusionMixin
from .losses import MvfaLoss
from .prompts import Prompts
from .state import Settings
from .torch_model import MvfaModel
from .weights import load_adapters

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

BETAS = (0.5, 0.999)
"""Betas of Adam, as published."""
HEAD_START = 0.01
"""Epochs by which the learning rate's rise is ahead, so that the first step learns something."""


class AdapterTrainingMixin(FusionMixin):
    """Training of adapters; to be named before ``AnomalibModule``.

    Attributes:
        loss: Loss of a batch.
        warmup_epochs: Epochs in which the learning rate rises, see :class:`Mvfa`.
    """

    loss: MvfaLoss
    warmup_epochs = 0
    _saw_masks = False
    _start: Any = None

    @property
    def learns(self) -> bool:
        """Whether a fit on the data at hand trains anything."""
        return not self._facts.normal_only and any(weight.requires_grad for weight in self.model.parameters())

    def setup(self, stage: str) -> None:
        """Choose what follows the data, and say so where there is nothing to learn."""
        super().setup(stage)
        if stage == "fit" and self._facts.normal_only:
            logger.warning(
                "The training data hold no abnormal image: the adapters are not trained, and only the memory bank is "
                "built. Use a FewShot datamodule to learn from labelled images.",
            )

    def configure_optimizers(self) -> Any:  # noqa: ANN401  # Lightning's
        """Return Adam over both branches: bit-equal to the two optimisers of the published code."""
        if not self.learns:
            return None
        optimizer = self._optimizer_of(self.model)
        if self.warmup_epochs == 0:
            return optimizer
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": self._schedule_of(optimizer), "interval": "step"}}

    def _optimizer_of(self, model: MvfaModel) -> torch.optim.Optimizer:
        groups = [
            {"params": [weight for weight in adapters.parameters() if weight.requires_grad]}
            for adapters in (model.seg_adapters, model.det_adapters)
        ]
        return torch.optim.Adam(groups, lr=self.settings.learning_rate or 0.0, betas=BETAS)

    def _schedule_of(self, optimizer: torch.optim.Optimizer, steps: int | None = None) -> LambdaLR:
        """Return learning rates of an optimizer, in as many epochs as this fit has, of so many steps or of its own."""
        self.trainer.fit_loop.setup_data()  # which counts the batches
        own_steps = math.ceil(self.trainer.num_training_batches / self.trainer.accumulate_grad_batches)
        epochs = self.trainer.estimated_stepping_batches / own_steps
        return LambdaLR(optimizer, lambda step: warmup_cosine(step / (steps or own_steps), self.warmup_epochs, epochs))

    def on_fit_start(self) -> None:
        """Keep the adapters as they are, and the frozen part of images that come again in every epoch."""
        super().on_fit_start()
        self._start = copy.deepcopy([self.model.seg_adapters, self.model.det_adapters])
        augmentations = getattr(self.dataset("train"), "augmentations", None)
        if isinstance(augmentations, Resize | None):  # others change an image from epoch to epoch
            self.model.cache = FrozenCache()

    def on_fit_end(self) -> None:
        """Give the memory back, and say what is wrong with the result."""
        self.model.cache = self._start = None
        self._warn_of_a_silent_text_branch()

    def training_step(self, batch: ImageBatch, *args, **kwargs) -> STEP_OUTPUT:  # noqa: ANN002, ANN003
        """Return the loss of a batch, from one data set, with its class name and its masks if it has any."""
        del args, kwargs
        if not self.learns:
            return _no_loss(self) if self.trainer.world_size > 1 else None
        with_seg = batch.gt_mask is not None
        self._saw_masks |= with_seg
        loss = self._loss_of(self.model, batch, self.trainer.fit_loop.total_batch_idx)
        if not with_seg and self.trainer.world_size > 1:
            loss = loss + _no_loss(self.model.seg_adapters)  # its gradients are dropped before the step
        self.log_loss(loss, batch)
        return loss

    def _loss_of(self, model: MvfaModel, batch: ImageBatch, number: int) -> torch.Tensor:
        """Return the loss of a batch, which is this one of the training."""
        del number
        text_features = self._text_features(class_name_of(batch))
        seg_maps, det_scores = model(batch.image, text_features, batch.gt_mask is not None)
        return self.loss(seg_maps, det_scores, batch.gt_mask, batch.gt_label)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the seg adapters out of a step without masks: a gradient of 0 would still move them by momentum."""
        del optimizer
        self._forget_calibration()  # the adapters are about to change
        if not self._saw_masks:
            for parameter in self.model.seg_adapters.parameters():
                parameter.grad = None
        self._saw_masks = False

    def training_views(self, support: SupportViewDataset) -> SupportViewDataset:
        """Return the views that this model learns from: those of the support, as published."""
        return support

    # ------------------------------------------------------------------ thresholds without validation images

    def _calibrate(self) -> None:
        """Compute all that scoring needs; thresholds from support images, if need be, as if these were unseen."""
        super()._calibrate()
        post_processor, datamodule = cast("Any", self.post_processor), cast("Any", self.datamodule)
        evidence, support = getattr(post_processor, "evidence", None), cast("Any", getattr(datamodule, "support", None))
        # Several processes would each train on a share of the images, and none of them on all.
        can_train = self.trainer.state.fn == TrainerFn.FITTING and self.trainer.world_size == 1 and support is not None
        if not can_train or evidence is None or not evidence.learnt or post_processor.rule[0] == "number":
            return
        groups = groups_of(support.samples, datamodule.group_by)
        if parts := split(support.samples.label_index.tolist(), groups.tolist(), self.seed):
            logger.info(
                "No images validate, so %d models learn from a part of the support each, and score the rest of it to "
                "set the threshold. Validation images, or a number as threshold, would save this time.",
                len(parts),
            )
            with self.trainer.precision_plugin.forward_context():
                scored = held_out_scores(self.model, self._start, support, parts, self._train_anew, self._preprocess)
                found = list(scored)
            calibration.reset_thresholds(post_processor)
            calibration.set_thresholds(post_processor, found, "held-out support")

    def _warn_of_a_silent_text_branch(self) -> None:
        """Say so where training has ended at calling every patch normal, even of the abnormal support images."""
        shown = [scores.logits for scores, item in self.state.support if item.gt_label == 1]
        abnormal = [logits.softmax(dim=-1)[..., 1].mean(dim=1).max() for logits in shown if logits is not None]
        if self.learns and abnormal and max(abnormal) < 0.5:
            logger.warning(
                "After training, the text branch calls every patch of the abnormal support images normal (at most "
                "%.2g abnormal): it tells nothing apart. Try a lower learning_rate, warmup_epochs=1, another seed, or "
                "MvfaPlus.",
                max(abnormal),
            )

    def _train_anew(self, model: MvfaModel, views: SupportViewDataset) -> None:
        """Train a model on support views as this one was, step by step."""
        datamodule: Any = self.datamodule
        own = self.training_views(views)
        if own is not views and model.cache is not None:
            model.cache.clear()  # it is full of views that do not come again
        loader = train_loader(own, datamodule.train_batch_size, datamodule.seed, num_workers=0)
        optimizer = self._optimizer_of(model)
        schedule = self._schedule_of(optimizer, len(loader))
        numbers = count()
        sampler: Any = loader.sampler if isinstance(loader.sampler, DistributedSampler) else loader.batch_sampler
        for epoch in range(self.trainer.fit_loop.epoch_progress.current.started):
            sampler.set_epoch(epoch)
            for batch in loader:
                moved = self.transfer_batch_to_device(batch, self.device, 0)
                if isinstance(self.pre_processor, PreProcessor):
                    self.pre_processor.on_train_batch_start(self.trainer, self, moved, 0)
                optimizer.zero_grad()
                self._loss_of(model, moved, next(numbers)).backward()
                optimizer.step()
                schedule.step()


def warmup_cosine(epoch: float, rise: int, epochs: float) -> float:
    """Return the share of the learning rate at a time of training: it rises to 1, and falls as half a cosine.

    Args:
        epoch: The time, in epochs.
        rise: Epochs in which it rises; with 0 it stays 1.
        epochs: Epochs in all; infinite where there is no end.
    """
    if rise == 0:
        return 1.0
    if epoch < rise:
        return (epoch + HEAD_START) / (rise + HEAD_START)
    return 0.5 * (1 + math.cos(math.pi * (epoch - rise) / max(epochs - rise, 1)))


def _no_loss(module: nn.Module) -> torch.Tensor:
    """Return 0, whose gradients of the module's weights are 0: distributed training waits for one of each."""
    return 0.0 * torch.stack([p.sum() for p in module.parameters() if p.requires_grad]).sum()


@documented
class Mvfa(AdapterTrainingMixin, AnomalibModule):
    """MVFA: multi-level adaptation of visual features of CLIP (Huang et al., CVPR 2024).

    What is None follows the data's protocol; the values in use are logged and saved with checkpoints.

    Args:
        levels: Blocks (from 1) with adapters; the quarter points by default: 6, 12, 18, 24 for ViT-L.
        normal_states: States of a normal object, each with one ``{}``; the published ones by default.
        abnormal_states: States of an abnormal object; the published ones by default.
        templates: Templates that states are set into; the published ones by default.
        image_score: "map_max", "map_top", "det_mean" or "det_max"; by default map_max in few-shot on data with masks,
            and det_mean elsewhere.
        adapters: Published adapters (.pth) to start from.
        warmup_epochs: Epochs in which the learning rate rises; after them it falls to 0, as half a cosine. With 0 it
            does neither, as published: the default for CLIP. The default for other backbones is 1: theirs are other
            features, and with a constant rate a training may end at calling every pixel normal.

    Raises:
        ValueError: An argument has no such value, or weights do not fit.
        FileNotFoundError: A file that an argument names does not exist.
        RuntimeError: The weights of a tag could not be loaded.
    """

    checkpoint_key = "mvfa"

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        pretrained: str | None = DEFAULT_PRETRAINED,
        image_size: int = 240,
        levels: Sequence[int] | None = None,
        residual_ratio: float = 0.1,
        class_name: str | None = None,
        normal_states: Sequence[str] | None = None,
        abnormal_states: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        quick_gelu: bool = False,
        normalize: bool = False,
        image_score: str | None = None,
        zero_shot_weight: float | None = None,
        few_shot_weight: float | None = None,
        calibration: str = "support",
        adapters: str | None = None,
        learning_rate: float | None = None,
        warmup_epochs: int | None = None,
        max_epochs: int = 50,
        bank_images: int = 16,
        coreset: float | None = None,
        adaptation: str = "adapter",
        residual: str = "pair",
        train_levels: Sequence[int] | None = None,
        score_levels: Sequence[int] | None = None,
        pooling: str = "mean",
        bce: str = "logits",
        upsample: str = "logits",
        seed: int = 0,
        threshold: float | str | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_arguments(locals())
        prompts = Prompts.given(normal_states=normal_states, abnormal_states=abnormal_states, templates=templates)
        super().__init__(image_size, pre_processor, post_processor, evaluator, visualizer, threshold)
        model = build_mvfa(
            str(backbone),
            optional_text(pretrained),
            image_size=image_size,
            levels=levels,
            residual_ratio=residual_ratio,
            quick_gelu=quick_gelu,
            normalize=normalize,
            adaptation=adaptation,
            residual=residual,
            train_levels=train_levels,
            score_levels=score_levels,
            pooling=pooling,
            upsample=upsample,
            coreset=coreset,
            seed=seed,
            prompts=prompts,
        )
        if adapters is not None:
            load_adapters(model, adapters)
            zero_shot_weight = 0.5 if zero_shot_weight is None else zero_shot_weight  # they have learnt before
        asked = Settings(class_name, image_score, zero_shot_weight, few_shot_weight, learning_rate, calibration)
        self._init_state(model, asked, seed, bank_images, max_epochs)
        self.loss = MvfaLoss(bce)
        self.warmup_epochs = (0 if model.backbone.has_texts else 1) if warmup_epochs is None else warmup_epochs
