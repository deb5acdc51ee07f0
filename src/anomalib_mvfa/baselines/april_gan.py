"""April-GAN (Chen et al., CVPR 2023 VAND workshop), trained on the data that MVFA is (paper, Tables 1 to 3).

Axes: B images, L tokens (class token first), D width of the image tower, E joint width, l level.
"""

from collections.abc import Sequence

import torch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from torch import nn

from ..model.adapters import BranchAdapters
from ..model.lightning_mixin import (
    CALIBRATIONS,
    DEFAULT_BACKBONE,
    DEFAULT_PRETRAINED,
    LightningMixin,
    check_numbers,
    int_list,
    optional_text,
)
from ..model.losses import MvfaLoss
from ..model.torch_model import MvfaModel, Tokens, check_choice


class AprilGanModel(MvfaModel):
    """One linear layer per level and branch, from the frozen stream to texts; the bank holds the stream.

    Args:
        backbone: See :class:`~anomalib_mvfa.model.torch_model.MvfaModel`, as for the others.
        pretrained: Tag, file, or None for random weights.
        image_size: Height and width of images in pixels.
        levels: Blocks (from 1) with linear layers; the quarter points by default.
        quick_gelu: QuickGELU in place of GELU in the backbone.
        normalize: Normalise images by CLIP's mean and standard deviation.
        seed: Of the linear layers' initial weights.

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
        seed: int = 0,
    ) -> None:
        super().__init__(
            backbone, pretrained, image_size, levels, quick_gelu=quick_gelu, normalize=normalize, seed=seed
        )

    def tokens(self, image: torch.Tensor, learn_seg: bool = True) -> Tokens:
        """Return the stream of the frozen tower, per level ``(B, L, D)``, as features of both branches."""
        del learn_seg
        frozen = self.frozen_tokens(image)
        return Tokens(frozen, frozen)

    def _new_adapters(self, adaptation: str) -> BranchAdapters:
        del adaptation
        return BranchAdapters(len(self.levels), self.backbone.width, self.backbone.joint_width, "linear")

    def _joint_tokens(self, tokens: Tokens, branch: str, position: int) -> torch.Tensor:
        x = getattr(tokens, branch)[position]  # (B, L, D)
        linear = (self.seg_adapters if branch == "seg" else self.det_adapters)[position]
        with torch.autocast(x.device.type, enabled=False):  # as MVFA's adapters
            return linear(x)  # (B, L, E)


class AprilGan(LightningMixin, AnomalibModule):
    """April-GAN: linear layers fit frozen features of CLIP to texts; a memory bank holds the features as they are.

    What is None follows the data's protocol; the values in use are logged and saved with checkpoints.

    Args:
        backbone: Name of an open_clip model with a plain vision transformer, or path of a model config in open_clip's
            JSON form. The environment variable ``ANOMALIB_MVFA_BACKBONE`` sets the default.
        pretrained: Tag of open_clip; or path of a weight file in OpenAI's or open_clip's form (.pt state dict,
            safetensors); or None for seeded random weights. ``ANOMALIB_MVFA_PRETRAINED`` sets the
            default ("null" for None).
        image_size: Height and width in pixels to which images are squashed.
        levels: Blocks (from 1) with linear layers; the quarter points by default.
        class_name: Noun for prompts; the datamodule's by default, then "object".
        quick_gelu: QuickGELU in place of GELU in the backbone.
        normalize: Normalise images by CLIP's mean and standard deviation.
        calibration: What sets the ranges by which branches are scaled before they are fused: the "support" images,
            "none", or the whole "test" set, which `predict` and export refuse.
        learning_rate: Of Adam; by default 1e-3 in few-shot, 1e-4 in leave-one-out.
        max_epochs: Epochs to train, unless the trainer is told otherwise.
        bank_images: Most normal images in the bank where the datamodule has no support of its own.
        seed: Of the linear layers' initial weights and of the draw of ``bank_images``.
        pre_processor: Anomalib's component, or whether to use the default one.
        post_processor: Anomalib's component, or whether to use the default one.
        evaluator: Anomalib's component, or whether to use the default one.
        visualizer: Anomalib's component, or whether to use the default one.

    Raises:
        ValueError: An argument has no such value, or weights do not fit.
        FileNotFoundError: A file that an argument names does not exist.
        RuntimeError: The weights of a tag could not be had.
    """

    _checkpoint_key = "april_gan"
    _bank_arguments = ("levels", "normalize")

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        pretrained: str | None = DEFAULT_PRETRAINED,
        image_size: int = 240,
        levels: Sequence[int] | None = None,
        class_name: str | None = None,  # noqa: ARG002  # read from the saved hyper-parameters
        quick_gelu: bool = False,
        normalize: bool = False,
        calibration: str = "support",
        learning_rate: float | None = None,
        max_epochs: int = 50,
        bank_images: int = 16,
        seed: int = 0,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # Anomalib saves these locals as hyper-parameters, and reads back plain types only.
        backbone, pretrained, levels = str(backbone), optional_text(pretrained), int_list(levels)
        check_choice("calibration", calibration, CALIBRATIONS)
        check_numbers(learning_rate=learning_rate, max_epochs=max_epochs, bank_images=bank_images)
        super().__init__(self._sized(pre_processor, image_size), post_processor, evaluator, visualizer)
        self._adopt(AprilGanModel(backbone, pretrained, image_size, levels, quick_gelu, normalize, seed))
        self.loss = MvfaLoss()
