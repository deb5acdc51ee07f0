"""MVFA as a torch module: backbone with adapters -> text alignment + memory bank -> anomaly maps -> fusion.

It imports neither Lightning nor anomalib. :func:`~anomalib_mvfa.model.build.build_mvfa` puts its parts together,
:mod:`~anomalib_mvfa.model.calibration` fills its bank and sets its value ranges.

Axes: B images, N support views, L tokens (class token first), P = G*G patches, E joint width, l level.
"""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from ..arguments import check_arguments, documented
from .adapters import BRANCHES, BranchAdapters, add_to_stream
from .anomaly_map import map_score, state_probabilities, to_grid, upsample
from .frozen_cache import FrozenCache
from .fusion import Weights, fuse
from .memory_bank import MemoryBank
from .network import BlockNetwork
from .prompts import Prompts
from .text_alignment import patch_logits, pool_patches

if TYPE_CHECKING:
    from anomalib.data import InferenceBatch


@dataclass(frozen=True)
class Scoring:
    """How branches become an anomaly map and an image score.

    Args:
        map_branch: Branch whose map is shown: "seg" for data with masks, "det" for others, where seg is untrained.
        image_score: "map_max", the maximum of the fused map; "map_top", the mean of its highest 5 %; "det_mean", the
            fused mean of the det branch; "det_max", the same with maxima over patches.
        weights: Weights of the zero-shot and the few-shot branch.
        normalised: Whether values are min-max normalised by the calibrated ranges before fusion.
    """

    map_branch: str = "seg"
    image_score: str = "map_max"
    weights: Weights = field(default_factory=lambda: Weights(0.5, 0.5))
    normalised: bool = True

    @property
    def branches(self) -> list[str]:
        """Branches that scoring reads; only their banks are kept."""
        return [b for b in BRANCHES if b == self.map_branch or (b == "det" and not self.scores_the_map)]

    @property
    def scores_the_map(self) -> bool:
        """Whether the image score comes from the anomaly map."""
        return self.image_score.startswith("map_")


class TrainingOutput(NamedTuple):
    """What the loss needs: per level, maps ``(B, 2, H, W)`` of the seg branch and scores ``(B,)`` of the det branch."""

    seg_maps: list[torch.Tensor]
    det_scores: list[torch.Tensor]


class Tokens(NamedTuple):
    """Features of both branches: per level ``(B, L, E)``."""

    seg: list[torch.Tensor]
    det: list[torch.Tensor]

    def of(self, branch: str) -> list[torch.Tensor]:
        """Return the features of a branch."""
        return self.seg if branch == "seg" else self.det


class BranchScores(NamedTuple):
    """Unfused scores at patch resolution: all that calibration needs to keep of an image.

    ``logits`` is ``(B, l, P, 2)``, ``distance`` ``(B, P)``, ``zero`` and ``few`` ``(B,)``; each is None when not in
    use.
    """

    logits: torch.Tensor | None
    distance: torch.Tensor | None
    zero: torch.Tensor | None
    few: torch.Tensor | None


class _FromNames(type):
    """Lets the constructor build a model from names, as in version 0.1; it goes in 0.3."""

    def __call__(cls, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401  # of both constructors
        if cls is not MvfaModel or (args and isinstance(args[0], nn.Module)):
            return super().__call__(*args, **kwargs)
        from .build import build_mvfa

        warnings.warn(
            "MvfaModel takes ready parts now; build_mvfa takes the arguments given here.",
            DeprecationWarning,
            stacklevel=2,
        )
        return build_mvfa(*args, **kwargs)


@documented
class MvfaModel(nn.Module, metaclass=_FromNames):
    """Multi-level visual feature adaptation of CLIP (Huang et al., CVPR 2024), in its published numerics.

    In train mode ``forward`` returns a :class:`TrainingOutput`, in eval mode anomalib's ``InferenceBatch``.

    Args:
        backbone: The frozen network, of :func:`~anomalib_mvfa.model.build.load_backbone`.
        seg_adapters: Adapters of the pixel branch, one per level.
        det_adapters: Adapters of the image branch.
        bank: Empty memory bank.
        levels: Blocks (from 1) after which adapters sit, increasing.
        prompts: States and templates of the text prompts.

    Attributes:
        scoring: How scores are formed.
        cache: Keeps the frozen part of training images from epoch to epoch; None, by default, computes it each time.
        text_features: Unit columns ``(E, 2)``, normal and abnormal, of the class that is scored; NaN until set.
        ranges: Lowest and highest value ``(2, 2, 2)``: of map and image score, of the zero- and few-shot branch; NaN
            until set.

    Raises:
        ValueError: A level is not a block of the backbone, or an option has no such value.
    """

    bank_of_views = True
    """Whether the bank holds all views of a normal support image, or the unchanged one alone."""

    text_features: torch.Tensor
    ranges: torch.Tensor

    def __init__(
        self,
        backbone: BlockNetwork,
        seg_adapters: BranchAdapters,
        det_adapters: BranchAdapters,
        bank: MemoryBank,
        levels: Sequence[int],
        *,
        train_levels: Sequence[int] | None = None,
        score_levels: Sequence[int] | None = None,
        prompts: Prompts | None = None,
        residual_ratio: float = 0.1,
        residual: str = "pair",
        normalize: bool = False,
        pooling: str = "mean",
        upsample: str = "logits",
    ) -> None:
        check_arguments(locals())
        super().__init__()
        self.backbone = backbone
        self.seg_adapters = seg_adapters
        self.det_adapters = det_adapters
        self.bank = bank
        self.levels = list(levels)
        self.prompts = prompts or Prompts()
        self.residual_ratio = residual_ratio
        self.residual = residual
        self.normalize = normalize or backbone.normalizes
        self.pooling = pooling
        self.upsample = upsample
        self.scoring = Scoring()
        self.cache: FrozenCache | None = None
        self._trained = _positions("train_levels", train_levels, self.levels)
        self._scored = _positions("score_levels", score_levels, self.levels)
        for adapters in (seg_adapters, det_adapters):
            adapters.train_only(self._trained)
        self.register_buffer("text_features", torch.full((backbone.joint_width, 2), torch.nan))
        self.register_buffer("ranges", torch.full((2, 2, 2), torch.nan))

    # ------------------------------------------------------------------ the pipeline

    def forward(
        self,
        image: torch.Tensor,
        text_features: torch.Tensor | None = None,
        with_seg: bool = True,
    ) -> "TrainingOutput | InferenceBatch":
        """Score images.

        Args:
            image: RGB in [0, 1], ``(B, 3, image_size, image_size)``.
            text_features: ``(E, 2)``, the model's own by default.
            with_seg: In training, whether the seg branch learns: not from data without masks.

        Returns:
            In train mode, what the loss needs; in eval mode ``pred_score`` ``(B,)`` and ``anomaly_map`` ``(B, H, W)``.
        """
        text_features = self.text_features if text_features is None else text_features
        tokens = self.tokens(image, learn_seg=with_seg)
        if self.training:
            return self._training_output(tokens, text_features, with_seg)
        return self.fuse(self.branch_scores(tokens, text_features))

    def tokens(self, image: torch.Tensor, learn_seg: bool = True) -> Tokens:
        """Run the backbone with its adapters, up to the last level that is trained or, in eval mode, scored.

        Args:
            image: RGB in [0, 1], ``(B, 3, image_size, image_size)``; overshoots of the resize are clamped.
            learn_seg: Whether gradients reach the seg adapters; the stream passes through them all the same.

        Returns:
            Features of every level up to there.

        Raises:
            ValueError: The images have another size.
        """
        last = self._last_level()
        adapted = self.seg_adapters.adapt_the_stream
        frozen = self.frozen_tokens(image, first_only=adapted)
        tokens = Tokens([], [])
        for position in range(last + 1):
            seg_adapter: Any = self.seg_adapters[position]
            det_adapter: Any = self.det_adapters[position]
            if position < len(frozen):
                x = frozen[position]
            else:
                x = self.backbone.blocks(x, self.levels[position - 1], self.levels[position])
            # Out of autocast: features differ in their last digits, which half precision does not keep.
            with torch.autocast(x.device.type, enabled=False), _frozen(seg_adapter, not learn_seg):
                seg, det = seg_adapter(x), det_adapter(x)
                tokens.seg.append(self.backbone.without_registers(seg))
                tokens.det.append(self.backbone.without_registers(det))
                if adapted and position < last:
                    to_stream = seg_adapter.to_stream(seg), det_adapter.to_stream(det)
                    x = add_to_stream(x, *to_stream, self.residual_ratio, self.residual)
        return tokens

    def branch_scores(
        self,
        tokens: Tokens,
        text_features: torch.Tensor,
        keep: torch.Tensor | None = None,
    ) -> BranchScores:
        """Compare features with text features ``(E, 2)`` and with the bank, of which support views ``keep`` count.

        By default all ``(N,)`` do.
        """
        compared = {
            branch: (self.logits(tokens, branch, text_features), self._distance(tokens, branch, keep))
            for branch in self.scoring.branches
        }
        logits, distance = compared[self.scoring.map_branch]
        if self.scoring.scores_the_map:
            return BranchScores(logits, distance, zero=None, few=None)
        det_logits, det_distance = compared["det"]
        pooling = self.scoring.image_score.removeprefix("det_")
        zero = few = None
        if det_logits is not None:
            zero = pool_patches(det_logits.softmax(dim=-1)[..., 1], pooling).mean(dim=1)
        if det_distance is not None:
            few = pool_patches(self._upsampled(det_distance).flatten(1), pooling)
        return BranchScores(logits, distance, zero, few)

    def maps(self, scores: BranchScores) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Return the zero-shot and the few-shot map ``(B, H, W)`` before fusion; None when not in use."""
        zero = few = None
        if scores.logits is not None:
            levels = [
                state_probabilities(level, self.image_size, self.upsample)[:, 1] for level in scores.logits.unbind(1)
            ]
            zero = torch.stack(levels).mean(dim=0)
        if scores.distance is not None:
            few = self._upsampled(scores.distance)
        return zero, few

    def fuse(self, scores: BranchScores) -> "InferenceBatch":
        """Fuse the branches into ``anomaly_map`` ``(B, H, W)`` and ``pred_score`` ``(B,)``, both inside [0, 1]."""
        from anomalib.data import InferenceBatch  # here, since it loads Lightning

        map_ranges, score_ranges = self.ranges if self.scoring.normalised else (None, None)
        anomaly_map = fuse(*self.maps(scores), self.scoring.weights, map_ranges)
        if self.scoring.scores_the_map:
            pred_score = map_score(anomaly_map, self.scoring.image_score)
        else:
            pred_score = fuse(scores.zero, scores.few, self.scoring.weights, score_ranges)
        return InferenceBatch(pred_score=pred_score, anomaly_map=anomaly_map)

    # ------------------------------------------------------------------ parts of it

    @property
    def image_size(self) -> int:
        """Height and width of images in pixels."""
        return self.backbone.image_size

    @property
    def scored_levels(self) -> list[int]:
        """Blocks (from 1) of the levels that are scored."""
        return [self.levels[position] for position in self._scored]

    def frozen_tokens(self, image: torch.Tensor, first_only: bool = False) -> list[torch.Tensor]:
        """Return per level the stream ``(B, L, D)`` of the backbone alone, as far as :meth:`tokens` goes.

        In training, it is computed once for an image that ``cache`` keeps. With ``first_only`` it ends at the first
        level, behind which adapters change the stream.
        """
        ends = self.levels[: 1 if first_only else self._last_level() + 1]

        def compute(new: torch.Tensor) -> list[torch.Tensor]:
            new = _checked(new, self.image_size)
            if self.normalize:
                new = (new - self.backbone.mean) / self.backbone.std
            return self.backbone.streams(new, ends)

        if not self.training or self.cache is None:
            return compute(image)
        device = image.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        return list(self.cache.tokens(image, lambda new: torch.stack(compute(new)), (half, len(ends))))

    def encode_states(self, class_name: str) -> torch.Tensor:
        """Return the text features ``(E, 2)`` of a class: unit columns, normal and abnormal."""
        return self.backbone.encode_states(self.prompts.compose(class_name))

    def scored_tokens(self, tokens: Tokens, branch: str) -> list[torch.Tensor]:
        """Return per scored level the features ``(B, L, E)`` of a branch that the bank holds or is compared with."""
        return [tokens.of(branch)[position] for position in self._scored]

    def _training_output(self, tokens: Tokens, text_features: torch.Tensor, with_seg: bool) -> TrainingOutput:
        seg_maps, det_scores = [], []
        for position in self._trained:
            if with_seg:
                logits = self._patch_logits(tokens, "seg", position, text_features)
                seg_maps.append(state_probabilities(logits, self.image_size, self.upsample))
            logits = self._patch_logits(tokens, "det", position, text_features)
            det_scores.append(pool_patches(logits.softmax(dim=-1)[..., 1], self.pooling))
        return TrainingOutput(seg_maps, det_scores)

    def _last_level(self) -> int:
        return max(self._trained if self.training else self._scored)

    def _patch_logits(self, tokens: Tokens, branch: str, position: int, text_features: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, P, 2)`` of the patches of a level."""
        return patch_logits(tokens.of(branch)[position], text_features)

    def logits(self, tokens: Tokens, branch: str, text_features: torch.Tensor) -> torch.Tensor | None:
        """Return patch logits ``(B, l, P, 2)`` of the scored levels; None from a model without text features."""
        return torch.stack(
            [self._patch_logits(tokens, branch, position, text_features) for position in self._scored],
            dim=1,
        )

    def _distance(self, tokens: Tokens, branch: str, keep: torch.Tensor | None) -> torch.Tensor | None:
        """Distances ``(B, P)`` of patches to the bank, mean over scored levels; None without weight."""
        if self.scoring.weights.few == 0:
            return None
        return self.bank.distance(branch, self.scored_tokens(tokens, branch), keep)

    def _upsampled(self, patches: torch.Tensor) -> torch.Tensor:
        """Maps ``(B, H, W)`` of values of patches ``(B, P)``."""
        return upsample(to_grid(patches.unsqueeze(-1)), self.image_size).squeeze(1)


def _checked(image: torch.Tensor, size: int) -> torch.Tensor:
    """Images in [0, 1], if they have the right size."""
    if image.shape[-2] != size or image.shape[-1] != size:
        msg = (
            f"Images of {image.shape[-2]}x{image.shape[-1]} pixels reached a model of image_size={size}. Give that of "
            "the checkpoint, if one was loaded; else leave pre_processor at its default, or let it resize to "
            "image_size."
        )
        raise ValueError(msg)
    return image.clamp(0, 1)


def _positions(name: str, chosen: Sequence[int] | None, levels: Sequence[int]) -> list[int]:
    """Positions, within the levels, of chosen ones."""
    chosen = levels if chosen is None else [int(level) for level in chosen]
    if not chosen or not set(chosen) <= set(levels):
        msg = f"{name}={chosen} must name some of the levels {levels}."
        raise ValueError(msg)
    return sorted({levels.index(level) for level in chosen})


@contextmanager
def _frozen(module: nn.Module, frozen: bool) -> Iterator[None]:
    """Keep gradients from a module's weights, while they still pass through it."""
    if not frozen:
        yield
        return
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    for parameter in learning:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
