"""Frozen CLIP with a memory bank: the few-shot branch of MVFA without adapters (paper, Table 1).

Axes: B images, L tokens (class token first), D width of the image tower, E joint width, l level.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn

from ..arguments import DEFAULT_BACKBONE, DEFAULT_PRETRAINED, check_arguments, documented, optional_text
from ..model.adapters import BranchAdapters
from ..model.build import check_levels, load_backbone
from ..model.frozen_stream import StreamModel
from ..model.fusion import Weights
from ..model.lightning_hooks import FusionMixin
from ..model.memory_bank import MemoryBank
from ..model.state import Settings
from ..model.torch_model import Scoring, Tokens


class FrozenModel(StreamModel):
    """Distance of a patch to those of normal images, in the stream of a frozen backbone; there are no text features.

    Its arguments are those of :class:`~anomalib_mvfa.model.torch_model.MvfaModel`.
    """

    def __init__(self, backbone: Any, bank: MemoryBank, levels: Sequence[int], normalize: bool) -> None:  # noqa: ANN401
        none = BranchAdapters(0, backbone.width, backbone.joint_width)
        super().__init__(backbone, none, none, bank, levels, normalize=normalize)
        self.text_features = self.text_features[:, :0]
        self.scoring = Scoring(weights=Weights(0.0, 1.0))
        self.train(False)

    def train(self, mode: bool = True) -> "FrozenModel":
        """Stay in eval mode: there is nothing to train."""
        del mode
        return super().train(False)

    def encode_states(self, class_name: str) -> torch.Tensor:
        """Return no columns ``(E, 0)``, and encode nothing."""
        del class_name
        return self.text_features

    def logits(self, tokens: Tokens, branch: str, text_features: torch.Tensor) -> None:
        """Return None: there are no text features to compare with."""
        del tokens, branch, text_features


class FrozenMixin(FusionMixin):
    """A model that trains nothing and has no text features; to be named before ``AnomalibModule``."""

    def _init_frozen(self, model: FrozenModel, calibration: str, seed: int, bank_images: int) -> None:
        """Take a torch model, and the arguments that say how to fit and to score."""
        settings = Settings(zero_shot_weight=0.0, few_shot_weight=1.0, calibration=calibration)
        self._init_state(model, settings, seed, bank_images)
        self.unused = nn.Parameter(torch.zeros(1))  # distributed training refuses a module without a weight that learns

    def _begin(self) -> None:
        """Choose settings by the data at hand, which must have normal images of what is tested."""
        if self._facts.protocol.few_shot_weight == 0:
            msg = (
                f"{type(self).__name__} needs normal images of what is tested, and the data's protocol "
                f"{self._facts.protocol.name} has none. Give a FewShot datamodule or one with normal training images."
            )
            raise ValueError(msg)
        super()._begin()

    def _apply_settings(self, defaults: Settings) -> None:
        super()._apply_settings(replace(defaults, learning_rate=None))

    def configure_optimizers(self) -> None:
        """Return nothing: there is nothing to train."""

    def training_step(self, *args, **kwargs) -> STEP_OUTPUT:  # noqa: ANN002, ANN003
        """Return no loss, but for several processes, which wait for each other's gradients."""
        del args, kwargs
        return 0.0 * self.unused.sum() if self.trainer.world_size > 1 else None

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One epoch, after which the bank is built, of one batch: steps do nothing."""
        return {**super().trainer_arguments, "max_epochs": 1, "limit_train_batches": 1}


@documented
class Clip(FrozenMixin, AnomalibModule):
    """CLIP as it is: nothing is trained, and images are compared with normal ones of their kind.

    Abnormal support images serve calibration and thresholds only. Errors are those of
    :class:`~anomalib_mvfa.model.lightning_model.Mvfa`.
    """

    checkpoint_key = "clip"

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        pretrained: str | None = DEFAULT_PRETRAINED,
        image_size: int = 240,
        levels: Sequence[int] | None = None,
        quick_gelu: bool = False,
        normalize: bool = False,
        calibration: str = "support",
        bank_images: int = 16,
        seed: int = 0,
        threshold: float | str | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        check_arguments(locals())
        backbone, pretrained = str(backbone), optional_text(pretrained)
        super().__init__(image_size, pre_processor, post_processor, evaluator, visualizer, threshold)
        clip = load_backbone(backbone, pretrained, image_size, quick_gelu)
        model = FrozenModel(clip, MemoryBank(), check_levels(levels, clip.depth), normalize)
        self._init_frozen(model, calibration, seed, bank_images)
