"""What a fitted model holds beside its tensors: settings, the data they are for, and the scored support images.

Memory bank, value ranges, text features and thresholds say by themselves whether they are there: see
:func:`~anomalib_mvfa.model.calibration.is_calibrated` and :func:`~anomalib_mvfa.model.calibration.thresholds_are_set`.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from anomalib.data import ImageItem

from ..arguments import differences
from ..contract import DataFacts
from .calibration import THRESHOLDS
from .fusion import Weights
from .torch_model import BranchScores, MvfaModel, Scoring

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

BACKBONE_PREFIX = "model.backbone."
BANK_PREFIX = "model.bank."


@dataclass(frozen=True)
class Settings:
    """What fitting and scoring follow; None leaves a decision to the data.

    :data:`~anomalib_mvfa.arguments.ARGUMENTS` describes the fields that are arguments.
    """

    class_name: str | None = None
    image_score: str | None = None
    zero_shot_weight: float | None = None
    few_shot_weight: float | None = None
    learning_rate: float | None = None
    calibration: str = "support"
    protocol: str | None = None
    map_branch: str | None = None

    @classmethod
    def for_data(cls, facts: DataFacts) -> "Settings":
        """Return what the data imply."""
        return cls(
            class_name=facts.class_name,
            image_score=facts.protocol.image_score or ("map_max" if facts.has_masks else "det_mean"),
            zero_shot_weight=0.0 if facts.normal_only else 0.5,  # adapters that learn nothing say nothing
            few_shot_weight=facts.protocol.few_shot_weight,
            learning_rate=facts.protocol.learning_rate,
            protocol=facts.protocol.name,
            map_branch="seg" if facts.has_masks else "det",
        )

    def completed(self, defaults: "Settings") -> "Settings":
        """Return these settings with defaults in place of None."""
        settings = replace(defaults, **{name: value for name, value in asdict(self).items() if value is not None})
        if settings.few_shot_weight == settings.zero_shot_weight == 0:
            settings = replace(settings, zero_shot_weight=0.5)
        if settings.few_shot_weight == 0 and settings.calibration == "support":
            return replace(settings, calibration="none")  # without a bank, there is no other scale to match
        return settings

    @property
    def scoring(self) -> Scoring:
        """How the torch model scores, by complete settings."""
        return Scoring(
            map_branch=str(self.map_branch),
            image_score=str(self.image_score),
            weights=Weights(self.zero_shot_weight or 0.0, self.few_shot_weight or 0.0),
            normalised=self.calibration != "none",
        )


@dataclass
class FitState:
    """What a model in anomalib has learnt about data.

    Args:
        settings: Complete settings in use; None before any data were seen.
        data: Class name, protocol and whether there are masks, of the data that the settings are for.
        is_fitted: Whether a fit has begun: from then on, the settings are those of the fit.
        support: Unfused scores and item of every support image of the last calibration; not saved.
        text_features: Text features ``(E, 2)`` by class name; not saved.
        differing: Options and settings that are not the loaded checkpoint's, for errors; not saved.
    """

    settings: Settings | None = None
    data: tuple[str, str, bool] | None = None
    is_fitted: bool = False
    support: list[tuple[BranchScores, ImageItem]] = field(default_factory=list)
    text_features: dict[str, torch.Tensor] = field(default_factory=dict)
    differing: str = ""

    def to_checkpoint(self, model: MvfaModel) -> dict[str, Any]:
        """Return what a checkpoint needs to know, in plain types."""
        return {
            "settings": asdict(self.settings) if self.settings else None,
            "data": self.data,
            "is_fitted": self.is_fitted,
            "options": scoring_options(model),
            "backbone_fingerprint": model.backbone.fingerprint,
        }

    @classmethod
    def from_checkpoint(cls, saved: Mapping[str, Any], model: MvfaModel, backbone: str) -> "FitState":
        """Return the state that :meth:`to_checkpoint` made; ``backbone`` is what errors call the model's.

        Raises:
            RuntimeError: The checkpoint was made with another backbone, or has adapters at other levels.
        """
        if saved["backbone_fingerprint"] != model.backbone.fingerprint:
            msg = (
                "The checkpoint was made with another backbone: its weights have the fingerprint "
                f"{saved['backbone_fingerprint']}, those of {backbone} have {model.backbone.fingerprint}. Give the "
                "same backbone and weights, for instance load_from_checkpoint(..., pretrained='path of the weight "
                "file')."
            )
            raise RuntimeError(msg)
        levels = saved["options"]["levels"]
        if len(model.seg_adapters) and levels != model.levels:
            msg = f"The checkpoint was made with levels={levels}, and levels={model.levels} are in use. Give the same."
            raise RuntimeError(msg)
        settings = Settings(**saved["settings"]) if saved["settings"] else None
        return cls(settings, tuple(saved["data"]) if saved["data"] else None, saved["is_fitted"])


def scoring_options(model: MvfaModel) -> dict[str, Any]:
    """Return the options that text features, bank and value ranges depend on, in plain types."""
    names = ("residual_ratio", "residual", "normalize", "upsample", "levels", "scored_levels")
    prompts = {name: list(texts) for name, texts in asdict(model.prompts).items()}
    return {**prompts, "coreset": model.bank.coreset, **{name: getattr(model, name) for name in names}}


def adapt_state_dict(
    state: dict[str, torch.Tensor],
    own: Mapping[str, torch.Tensor],
    saved: Mapping[str, Any],
    model: MvfaModel,
    settings: Settings,
) -> str:
    """Complete a checkpoint's state dict for strict loading by a module with the state dict ``own``.

    What other options than those in use now have made is emptied, to be computed anew from the support of the data at
    hand; a log line says so, and the differing options and settings are returned.
    """
    state.update({key: value for key, value in own.items() if key.startswith(BACKBONE_PREFIX)})
    changed = differences(scoring_options(model), saved["options"])
    rescored = differences(asdict(settings), saved["settings"] or {})
    if not changed and not rescored:
        return ""
    emptied = [f"post_processor.{name}" for name in THRESHOLDS]
    what = "thresholds"
    if changed or "class_name" in rescored:
        emptied += ["model.text_features", "model.ranges"]
        state.update({key: value.new_empty(0) for key, value in state.items() if key.startswith(BANK_PREFIX)})
        what = "thresholds, memory bank and value ranges"
    state.update({key: torch.full_like(own[key], torch.nan) for key in emptied if key in state})
    values = ", ".join([*changed.values(), *rescored.values()])
    logger.warning(
        "The checkpoint was made with other values, %s: %s are computed anew from the support of the data at hand, "
        "if there is any.",
        values,
        what,
    )
    return values
