"""April-GAN (Chen et al., CVPR 2023 VAND workshop), trained on the data that MVFA is (paper, Tables 1 to 3).

Axes: B images, L tokens (class token first), D width of the image tower, E joint width, l level.
"""

from collections.abc import Sequence

import torch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from torch import nn

from ..arguments import DEFAULT_BACKBONE, DEFAULT_PRETRAINED, check_arguments, documented, optional_text
from ..model.build import check_levels, load_backbone, new_adapters
from ..model.frozen_stream import PatchBank, StreamModel
from ..model.lightning_model import AdapterTrainingMixin
from ..model.losses import MvfaLoss
from ..model.state import Settings
from ..model.text_alignment import patch_logits
from ..model.torch_model import Tokens


class AprilGanModel(StreamModel):
    """One linear layer (adaptation "linear") per level and branch, from the frozen stream to text features."""

    bank_of_views = False

    def _patch_logits(self, tokens: Tokens, branch: str, position: int, text_features: torch.Tensor) -> torch.Tensor:
        x = tokens.of(branch)[position]  # (B, L, D)
        with torch.autocast(x.device.type, enabled=False):  # as MVFA's adapters
            return patch_logits(self.adapter(branch, position)(x), text_features)


@documented
class AprilGan(AdapterTrainingMixin, AnomalibModule):
    """April-GAN: linear layers fit frozen features of CLIP to prompts; a memory bank holds the features as they are.

    The maps of both branches are added as they are. What is None follows the data's protocol; the values in use are
    logged and saved with checkpoints. Errors are those of :class:`~anomalib_mvfa.model.lightning_model.Mvfa`.

    Args:
        learning_rate: Learning rate of Adam.
    """

    IMAGE_SIZE = 518
    BATCH_SIZE = 8
    checkpoint_key = "april_gan"

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        pretrained: str | None = DEFAULT_PRETRAINED,
        image_size: int = IMAGE_SIZE,
        levels: Sequence[int] | None = None,
        class_name: str | None = None,
        quick_gelu: bool = False,
        normalize: bool = True,
        calibration: str = "none",
        learning_rate: float = 1e-3,
        max_epochs: int = 50,
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
        levels = check_levels(levels, clip.depth)
        seg, det = new_adapters(len(levels), clip, "linear", seed)
        model = AprilGanModel(clip, seg, det, PatchBank(), levels, normalize=normalize)
        settings = Settings(class_name=class_name, learning_rate=learning_rate, calibration=calibration)
        self._init_state(model, settings, seed, bank_images, max_epochs)
        self.loss = MvfaLoss()
