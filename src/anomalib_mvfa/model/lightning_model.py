"""MVFA in anomalib."""

from collections.abc import Sequence

import torch
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.visualization import Visualizer
from torch import nn

from .lightning_mixin import (
    CALIBRATIONS,
    DEFAULT_BACKBONE,
    DEFAULT_PRETRAINED,
    LightningMixin,
    check_numbers,
    int_list,
    optional_text,
)
from .losses import MvfaLoss
from .prompts import ABNORMAL_STATES, NORMAL_STATES, TEMPLATES, check_slots
from .torch_model import MvfaModel, check_choice
from .weights import load_adapters

IMAGE_SCORES = ("map_max", "det_mean", "det_max")


class Mvfa(LightningMixin, AnomalibModule):
    """MVFA: multi-level adaptation of visual features of CLIP (Huang et al., CVPR 2024).

    What is None follows the data's protocol; the values in use are logged and saved with checkpoints.

    Args:
        backbone: Name of an open_clip model with a plain vision transformer, or path of a model config in open_clip's
            JSON form. The environment variable ``ANOMALIB_MVFA_BACKBONE`` sets the default.
        pretrained: Tag of open_clip; or path of a weight file in OpenAI's or open_clip's form (.pt state dict,
            safetensors); or None for seeded random weights. ``ANOMALIB_MVFA_PRETRAINED`` sets the
            default ("null" for None).
        image_size: Height and width in pixels to which images are squashed.
        levels: Blocks (from 1) with adapters; the quarter points by default: 6, 12, 18, 24 for ViT-L.
        residual_ratio: Weight of an adapter in the stream (paper, Eq. 2).
        class_name: Noun for prompts; the datamodule's by default, then "object".
        normal_states: States of a normal object, each with one ``{}``; the published ones by default.
        abnormal_states: States of an abnormal object; the published ones by default.
        templates: Templates that states are set into; the published ones by default.
        quick_gelu: QuickGELU in place of GELU in the backbone.
        normalize: Normalise images by CLIP's mean and standard deviation.
        image_score: "map_max", "det_mean" or "det_max"; by default map_max in few-shot on data with masks, and det_mean
            elsewhere.
        zero_shot_weight: Weight of the text branch in scores.
        few_shot_weight: Weight of the memory bank; by default 0.5 in few-shot, 0 in leave-one-out.
        calibration: What sets the ranges by which branches are scaled before they are fused: the "support" images,
            "none", or the whole "test" set as in the published numbers, which `predict` and export refuse.
        adapters: Published adapters (.pth) to start from.
        learning_rate: Of Adam; by default 1e-3 in few-shot, 1e-4 in leave-one-out.
        max_epochs: Epochs to train, unless the trainer is told otherwise.
        bank_images: Most normal images in the bank where the datamodule has no support of its own.
        coreset: Share of the memory bank's rows to keep, chosen to lie far apart as in PatchCore; all by default.
        adaptation: "adapter" or "projector" (paper, Table 4).
        residual: "pair" (published) or "single" (paper, Eq. 2).
        train_levels: Levels that learn; all by default (paper, Table 5).
        score_levels: Levels that are scored; all by default.
        pooling: "mean" (published) or "max" (paper) over patches in the image loss.
        bce: "logits" (published) or "plain" (paper) cross-entropy in the image loss.
        upsample: "logits" (published) or "probabilities" (paper) are upsampled to maps.
        seed: Of the adapters' initial weights, of the draw of ``bank_images`` and of the coreset.
        pre_processor: Anomalib's component, or whether to use the default one.
        post_processor: Anomalib's component, or whether to use the default one.
        evaluator: Anomalib's component, or whether to use the default one.
        visualizer: Anomalib's component, or whether to use the default one.

    Raises:
        ValueError: An argument has no such value, or weights do not fit.
        FileNotFoundError: A file that an argument names does not exist.
        RuntimeError: The weights of a tag could not be had.
    """

    _checkpoint_key = "mvfa"
    _bank_arguments = (
        "normal_states",
        "abnormal_states",
        "templates",
        "normalize",
        "residual",
        "residual_ratio",
        "score_levels",
        "upsample",
        "coreset",
    )

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        pretrained: str | None = DEFAULT_PRETRAINED,
        image_size: int = 240,
        levels: Sequence[int] | None = None,
        residual_ratio: float = 0.1,
        class_name: str | None = None,  # noqa: ARG002  # read from the saved hyper-parameters
        normal_states: Sequence[str] | None = None,
        abnormal_states: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        quick_gelu: bool = False,
        normalize: bool = False,
        image_score: str | None = None,
        zero_shot_weight: float = 0.5,
        few_shot_weight: float | None = None,
        calibration: str = "support",
        adapters: str | None = None,
        learning_rate: float | None = None,
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
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # Anomalib saves these locals as hyper-parameters, and reads back plain types only.
        backbone, pretrained = str(backbone), optional_text(pretrained)
        levels, train_levels, score_levels = map(int_list, (levels, train_levels, score_levels))
        normal_states = check_slots("normal_states", NORMAL_STATES if normal_states is None else normal_states)
        abnormal_states = check_slots(
            "abnormal_states", ABNORMAL_STATES if abnormal_states is None else abnormal_states
        )
        templates = check_slots("templates", TEMPLATES if templates is None else templates)
        if image_score is not None:
            check_choice("image_score", image_score, IMAGE_SCORES)
        adapters = str(adapters) if adapters is not None else None
        check_choice("calibration", calibration, CALIBRATIONS)
        check_choice("bce", bce, ("logits", "plain"))
        if zero_shot_weight == 0 and few_shot_weight == 0:
            msg = "zero_shot_weight and few_shot_weight are both 0; one branch at least must have weight."
            raise ValueError(msg)
        check_numbers(
            residual_ratio=residual_ratio,
            zero_shot_weight=zero_shot_weight,
            few_shot_weight=few_shot_weight,
            learning_rate=learning_rate,
            max_epochs=max_epochs,
            bank_images=bank_images,
            coreset=coreset,
        )
        super().__init__(self._sized(pre_processor, image_size), post_processor, evaluator, visualizer)
        model = MvfaModel(
            backbone=backbone,
            pretrained=pretrained,
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
        )
        if adapters is not None:
            load_adapters(model, adapters)
        self._adopt(model)
        self.loss = MvfaLoss(bce)

    def _encode(self, class_name: str) -> torch.Tensor:
        """Text features ``(E, 2)`` of an object, in the states and templates of the arguments."""
        states = (self.hparams[name] for name in ("normal_states", "abnormal_states", "templates"))
        return self.model.encode_states(class_name, *states)
