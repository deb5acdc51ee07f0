"""WinCLIP of anomalib, with any backbone, and with two things put right that a comparison depends on.

1. anomalib's windows assume transformer blocks that run sequence-first, as those of open_clip did up to 2.24. With
   later ones attention goes across windows, not across the tokens of a window: every window gets the same embedding,
   whatever the image shows.
2. anomalib takes reference images before they are normalised, and compares them with normalised ones.

Axes: B images, W windows, P patches of a window, D width of the image tower, E joint width.
"""

from collections.abc import Sequence
from typing import Any

import torch
from anomalib.data.utils import LabelName
from anomalib.metrics import Evaluator
from anomalib.models import WinClip
from anomalib.models.image.winclip.torch_model import TEMPERATURE, WinClipModel
from anomalib.visualization import Visualizer
from lightning.pytorch import Callback
from torch import nn
from torch.utils.data import DataLoader

from ..arguments import check_bounds, documented, optional_text
from ..callbacks import default_callbacks
from ..contract import DEFAULT_CLASS_NAME, class_name_of_data
from ..data.support import support_of
from ..metrics.evaluator import default_evaluator
from ..model.backbone import ClipBackbone
from ..model.export import ExportMixin, OrderKeepingPostProcessor, ask_for_threshold
from ..model.vit_backbone import is_vit
from ..results import ScoreVisualizer

IMAGE_SIZE = 240  # height and width that anomalib's pre-processor for WinCLIP makes


@documented
class WinClipBaseline(ExportMixin, WinClip):
    """WinCLIP (Jeong et al., CVPR 2023): windows of an image, compared with prompts and with normal images.

    Prompts, scores and their fusion are anomalib's. Reference images are the datamodule's support, or else normal
    training images drawn with the datamodule's seed.

    Args:
        k_shot: Number of normal reference images; 0 compares with prompts alone.
        scales: Sides of the windows in patches.
        backbone: Name of an open_clip model with a plain vision transformer, or path of a model config in open_clip's
            JSON form. The default one takes some 10 s for an image on a CPU.
        pretrained: Tag of open_clip; or path of a weight file; or None for seeded random weights.

    Raises:
        ValueError: An argument has no such value, weights do not fit, or there are too few reference images.
        FileNotFoundError, RuntimeError: Weights could not be found, or not be loaded.
    """

    def __init__(
        self,
        class_name: str | None = None,
        k_shot: int = 0,
        scales: Sequence[int] = (2, 3),
        backbone: str = "ViT-B-16-plus-240",
        pretrained: str | None = "laion400m_e31",
        threshold: float | str | None = None,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # Anomalib saves these locals as hyper-parameters, and reads back plain types only.
        scales = [int(scale) for scale in scales]
        backbone, pretrained = str(backbone), optional_text(pretrained)
        check_bounds("k_shot", k_shot, 0)
        super(WinClip, self).__init__(pre_processor, post_processor, evaluator, visualizer)  # WinClip's own downloads
        ask_for_threshold(self.post_processor, threshold)
        self.model = WindowModel(backbone, pretrained, scales)
        self.class_name = class_name
        self.k_shot = k_shot
        self.few_shot_source = None
        self.is_setup = False

    def configure_callbacks(self) -> list[Callback]:
        """Return anomalib's callbacks, and ours."""
        return default_callbacks(super().configure_callbacks())

    configure_evaluator = staticmethod(default_evaluator)
    configure_post_processor = staticmethod(OrderKeepingPostProcessor)
    configure_visualizer = staticmethod(ScoreVisualizer)

    def _get_class_name(self) -> str:
        return self.class_name or class_name_of_data(getattr(self._trainer, "datamodule", None)) or DEFAULT_CLASS_NAME

    def collect_reference_images(self, dataloader: DataLoader) -> torch.Tensor:
        """Return reference images ``(K, 3, H, W)``, processed as images to be scored."""
        del dataloader  # in an order of its own, and with abnormal images where the data have some to learn from
        data = getattr(self._trainer, "datamodule", None)
        views: Any = support_of(data, None, self.k_shot, getattr(data, "seed", None) or 0)
        # The first views are the images themselves.
        items = [views[row] for row in range(len(views.samples))] if views is not None else []
        normal = [item.image for item in items if item.gt_label == LabelName.NORMAL]
        if len(normal) < self.k_shot:
            msg = (
                f"k_shot={self.k_shot} is too large: the data have {len(normal)} normal images to refer to. Choose at "
                "most as many; 0 needs none."
            )
            raise ValueError(msg)
        transform = getattr(self.pre_processor, "transform", None) or nn.Identity()
        return torch.stack([transform(image) for image in normal[: self.k_shot]])


class WindowModel(WinClipModel):
    """Anomalib's torch model, on a backbone of ours; its arguments are those of `WinClipBaseline`."""

    def __init__(self, backbone: str, pretrained: str | None, scales: Sequence[int]) -> None:
        super(WinClipModel, self).__init__()  # WinClipModel's own downloads
        if is_vit(backbone):
            msg = f"backbone={backbone!r} has no texts, which WinCLIP compares images with. Give a model of open_clip."
            raise ValueError(msg)
        self.tower = ClipBackbone(backbone, pretrained, IMAGE_SIZE)
        grid = self.tower.grid
        if not 1 <= min(scales) <= max(scales) <= grid:
            msg = f"scales={list(scales)} must be from 1 to {grid}: {backbone} has {grid} x {grid} patches."
            raise ValueError(msg)
        self.clip.visual.output_tokens = True
        self.grid_size = (grid, grid)
        self.temperature = TEMPERATURE
        self.class_name = None
        self.reference_images = None
        self.scales = tuple(scales)
        self.apply_transform = False
        self.k_shot = 0
        self.register_buffer_list("masks", self._generate_masks(), persistent=False)
        self.register_buffer("_text_embeddings", torch.empty(0))
        self.register_buffer_list("_visual_embeddings", [torch.empty(0) for _ in scales])
        self.register_buffer("_patch_embeddings", torch.empty(0))

    @property
    def clip(self) -> Any:  # noqa: ANN401  # open_clip ships no types
        """The CLIP inside of the backbone."""
        return self.tower.clip

    def _get_window_embeddings(self, feature_map: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
        """Return embeddings ``(B, W, E)`` of windows, from an image's tokens and the patches ``(P, W)`` of windows."""
        tower = self.clip.visual
        class_token = torch.zeros_like(masks[:1])
        tokens = feature_map[:, torch.cat([class_token, masks + 1]).T.long()]  # (B, W, 1 + P, D)
        tokens = tower.ln_pre(tokens.flatten(0, 1))  # (B * W, 1 + P, D)
        for index in range(self.tower.depth):
            tokens = self.tower.block(index, tokens)
        pooled, _ = tower._global_pool(tower.ln_post(tokens))  # noqa: SLF001  # as anomalib does it
        if tower.proj is not None:
            pooled = pooled @ tower.proj
        return pooled.unflatten(0, (len(feature_map), -1))
