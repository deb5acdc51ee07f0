"""Frozen CLIP with a memory bank: the few-shot branch of MVFA without adapters (paper, Table 1).

Axes: B images, L tokens (class token first), D width of the image tower, E joint width, l level.
"""

from collections.abc import Sequence
from typing import Any

import torch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from torch import nn

from ..model.adapters import BranchAdapters
from ..model.fusion import Weights
from ..model.lightning_mixin import (
    CALIBRATIONS,
    DEFAULT_BACKBONE,
    DEFAULT_PRETRAINED,
    LightningMixin,
    check_numbers,
    int_list,
    optional_text,
)
from ..model.torch_model import MvfaModel, Scoring, Tokens, check_choice


class ClipModel(MvfaModel):
    """Distance of a patch to those of normal images, in the stream of the frozen image tower; there are no texts.

    Args:
        backbone: See :class:`~anomalib_mvfa.model.torch_model.MvfaModel`, as for the others.
        pretrained: Tag, file, or None for random weights.
        image_size: Height and width of images in pixels.
        levels: Blocks (from 1) after which the stream is compared; the quarter points by default.
        quick_gelu: QuickGELU in place of GELU in the backbone.
        normalize: Normalise images by CLIP's mean and standard deviation.

    Raises:
        ValueError: A level is not a block of the backbone.
    """

    def __init__(
        self,
        backbone: str = "ViT-L-14-336",
        pretrained: str | None = "openai",
        image_size: int = 240,
        levels: Sequence[int] | None = None,
        quick_gelu: bool = False,
        normalize: bool = False,
    ) -> None:
        super().__init__(backbone, pretrained, image_size, levels, quick_gelu=quick_gelu, normalize=normalize)
        self.text_features = self.text_features[:, :0]  # no texts to wait for
        self.scoring = Scoring(weights=Weights(0.0, 1.0))
        self.train(False)

    def train(self, mode: bool = True) -> "ClipModel":
        """Stay in eval mode: there is nothing to train."""
        del mode
        return super().train(False)

    def tokens(self, image: torch.Tensor, learn_seg: bool = True) -> Tokens:
        """Return the stream of the frozen tower, per level ``(B, L, D)``, as features of both branches."""
        del learn_seg
        frozen = self.frozen_tokens(image)
        return Tokens(frozen, frozen)

    def encode_states(self, *args, **kwargs) -> torch.Tensor:  # noqa: ANN002, ANN003
        """Return no columns ``(E, 0)``, and encode nothing."""
        del args, kwargs
        return self.text_features

    def _new_adapters(self, adaptation: str) -> BranchAdapters:
        del adaptation
        return BranchAdapters(0, self.backbone.width, self.backbone.joint_width)

    def _logits(self, tokens: Tokens, branch: str, text_features: torch.Tensor) -> None:
        del tokens, branch, text_features


class FrozenMixin(LightningMixin):
    """Of models that train nothing and have no texts; to be named before ``AnomalibModule``."""

    def _defaults(self) -> dict[str, Any]:
        """Return what the data imply.

        Raises:
            ValueError: They have no normal images of what is tested.
        """
        defaults = super()._defaults()
        if defaults["few_shot_weight"] == 0:
            msg = (
                f"{type(self).__name__} needs normal images of what is tested, and the data's protocol "
                f"{defaults['protocol']} has none. Give a FewShot datamodule or one with normal training images."
            )
            raise ValueError(msg)
        del defaults["learning_rate"]
        return {**defaults, "zero_shot_weight": 0.0, "few_shot_weight": 1.0}

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """One epoch, after which the bank is built, of one batch: steps do nothing."""
        return {**super().trainer_arguments, "max_epochs": 1, "limit_train_batches": 1}


class Clip(FrozenMixin, AnomalibModule):
    """CLIP as it is: nothing is trained, and images are compared with normal ones of their kind.

    Abnormal support images serve calibration and thresholds only.

    Args:
        backbone: Name of an open_clip model with a plain vision transformer, or path of a model config in open_clip's
            JSON form. The environment variable ``ANOMALIB_MVFA_BACKBONE`` sets the default.
        pretrained: Tag of open_clip; or path of a weight file in OpenAI's or open_clip's form (.pt state dict,
            safetensors); or None for seeded random weights. ``ANOMALIB_MVFA_PRETRAINED`` sets the
            default ("null" for None).
        image_size: Height and width in pixels to which images are squashed.
        levels: Blocks (from 1) whose output is compared; the quarter points by default.
        quick_gelu: QuickGELU in place of GELU in the backbone.
        normalize: Normalise images by CLIP's mean and standard deviation.
        calibration: What sets the range by which distances are scaled: the "support" images, "none", or the whole
            "test" set, which `predict` and export refuse.
        bank_images: Most normal images in the bank where the datamodule has no support of its own.
        seed: Of the draw of ``bank_images``.
        pre_processor: Anomalib's component, or whether to use the default one.
        post_processor: Anomalib's component, or whether to use the default one.
        evaluator: Anomalib's component, or whether to use the default one.
        visualizer: Anomalib's component, or whether to use the default one.

    Raises:
        ValueError: An argument has no such value, or weights do not fit.
        FileNotFoundError: A file that an argument names does not exist.
        RuntimeError: The weights of a tag could not be had.
    """

    _checkpoint_key = "clip"
    _bank_arguments = ("levels", "normalize")

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
        seed: int = 0,  # noqa: ARG002  # read from the saved hyper-parameters
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # Anomalib saves these locals as hyper-parameters, and reads back plain types only.
        backbone, pretrained, levels = str(backbone), optional_text(pretrained), int_list(levels)
        check_choice("calibration", calibration, CALIBRATIONS)
        check_numbers(bank_images=bank_images)
        super().__init__(self._sized(pre_processor, image_size), post_processor, evaluator, visualizer)
        self._adopt(ClipModel(backbone, pretrained, image_size, levels, quick_gelu, normalize))
        # Distributed training refuses a module without a weight that learns.
        self.unused = nn.Parameter(torch.zeros(1))
