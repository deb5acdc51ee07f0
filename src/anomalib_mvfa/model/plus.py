"""MvfaPlus: the method's branches on the frozen stream, in a training that is stable and short."""

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from anomalib import TaskType
from anomalib.data import ImageBatch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from torch import nn

from ..arguments import DEFAULT_BACKBONE, DEFAULT_PRETRAINED, check_arguments, documented, optional_text
from ..data.dataset import SupportViewDataset
from ..data.random_views import RandomViewDataset
from .build import check_levels, load_backbone, new_adapters
from .frozen_stream import PatchBank, StreamModel
from .lightning_model import AdapterTrainingMixin
from .losses import MvfaLoss
from .state import Settings
from .text_alignment import full_precision
from .torch_model import MvfaModel, Tokens

ZERO_SHOT_WEIGHT = 0.75
QUARTERS = (2, 3, 4)
"""Quarters of the depth at whose ends the levels are by default: the last ones of the published four."""
PROCESSES = 2**16
"""More than there are processes or seeds."""


class MvfaPlusModel(StreamModel):
    """Two layers (adaptation "patch") per level and branch, from the frozen stream to text features.

    Logits are products of features and text features, over the root of E: where MVFA's cosines times 100 are all but 0
    and 1, these become only as sure as training makes them.
    """

    def _patch_logits(self, tokens: Tokens, branch: str, position: int, text_features: torch.Tensor) -> torch.Tensor:
        patches = tokens.of(branch)[position][:, 1:]  # (B, P, D)
        adapter = self.adapter(branch, position)
        with full_precision(patches.device):
            features = adapter(patches.to(next(adapter.parameters()).dtype))  # (B, P, E)
            return features.float() @ text_features.float() / math.sqrt(len(text_features))


@documented
class MvfaPlus(AdapterTrainingMixin, AnomalibModule):
    """MVFA without feedback: what learns reads the frozen features, and the memory bank holds them as they are.

    It is no method of the paper. Losses, prompts and the bank's views are those of
    :class:`~anomalib_mvfa.model.lightning_model.Mvfa`. Other than there, few-shot training with masks sees
    :class:`random views <anomalib_mvfa.data.random_views.RandomViewDataset>`, into which lesions are pasted. Adapters
    are two layers behind a normalisation, read each patch beside the mean of its neighbourhood, and do not change the
    stream, so that the backbone sees a view once; they learn in batches of 8, at a rate that rises and falls. The text
    branch has weight 0.75, the bank 0.25; the image score is the mean of the map's top 5 %. What is None follows the
    data's protocol; the values in use are logged and saved with checkpoints.

    Args:
        levels: Blocks (from 1) whose output is read; the last three quarter points by default: 12, 18, 24 for ViT-L.
        image_score: "map_max", "map_top", "det_mean" or "det_max"; by default map_top in few-shot on data with masks,
            and det_mean elsewhere.
        zero_shot_weight: Weight of the text branch in scores; by default 0.75, or 0 where there is no abnormal image to
            learn from.
        few_shot_weight: Weight of the memory bank in scores; by default 0.25 in few-shot, 0 in leave-one-out.
        warmup_epochs: Epochs in which the learning rate rises; after them it falls to 0, as half a cosine. With 0 it
            does neither.

    Raises:
        ValueError: An argument has no such value, or weights do not fit.
        FileNotFoundError: A file that an argument names does not exist.
        RuntimeError: The weights of a tag could not be loaded.
    """

    BATCH_SIZE = 8
    checkpoint_key = "mvfa_plus"

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        pretrained: str | None = DEFAULT_PRETRAINED,
        image_size: int = 240,
        levels: Sequence[int] | None = None,
        class_name: str | None = None,
        quick_gelu: bool = False,
        normalize: bool = True,
        image_score: str | None = None,
        zero_shot_weight: float | None = None,
        few_shot_weight: float | None = None,
        calibration: str = "support",
        learning_rate: float | None = None,
        warmup_epochs: int = 1,
        max_epochs: int = 8,
        bank_images: int = 16,
        coreset: float | None = None,
        seed: int = 0,
        threshold: float | str | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_arguments(locals())
        super().__init__(image_size, pre_processor, post_processor, evaluator, visualizer, threshold)
        network = load_backbone(str(backbone), optional_text(pretrained), image_size, quick_gelu)
        levels = check_levels(levels, network.depth, QUARTERS)
        seg, det = new_adapters(len(levels), network, "patch", seed)
        model = MvfaPlusModel(network, seg, det, PatchBank(coreset, seed), levels, normalize=normalize)
        asked = Settings(class_name, image_score, zero_shot_weight, few_shot_weight, learning_rate, calibration)
        self._init_state(model, asked, seed, bank_images, max_epochs)
        self.loss = MvfaLoss()
        self.warmup_epochs = warmup_epochs

    def training_views(self, support: SupportViewDataset) -> SupportViewDataset:
        """Return the views that this model learns from: random ones, where masks say whether they show a lesion."""
        return RandomViewDataset(support, self.seed) if support.task == TaskType.SEGMENTATION else support

    def _loss_of(self, model: MvfaModel, batch: ImageBatch, number: int) -> torch.Tensor:
        """Return the loss of a batch; what is dropped follows the seed, the batch's number and the process alone."""
        with torch.random.fork_rng(devices=[self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(PROCESSES * (self.seed + PROCESSES * number) + self.global_rank)
            return super()._loss_of(model, batch, number)

    def _settings_for_data(self) -> Settings:
        """Return what this model does where arguments leave it open: other weights, where both branches have any."""
        of_data = super()._settings_for_data()
        if of_data.image_score == "map_max":
            of_data = replace(of_data, image_score="map_top")
        if of_data.zero_shot_weight and of_data.few_shot_weight:
            of_data = replace(of_data, zero_shot_weight=ZERO_SHOT_WEIGHT, few_shot_weight=1 - ZERO_SHOT_WEIGHT)
        return of_data
