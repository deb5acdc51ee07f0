"""MVFA as a torch module: backbone with adapters -> text alignment + memory bank -> anomaly maps -> fusion.

Axes: B images, N support views, L tokens (class token first), P = G*G patches, E joint width, l level.
"""

import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from anomalib.data import InferenceBatch
from torch import nn
from torch.nn.functional import normalize

from .adapters import BRANCHES, BranchAdapters, add_to_stream
from .anomaly_map import state_probabilities, to_grid, upsample
from .backbone import ClipBackbone
from .frozen_cache import FrozenCache
from .fusion import Weights, fuse, value_range
from .memory_bank import MemoryBank
from .prompts import ABNORMAL_STATES, NORMAL_STATES, TEMPLATES, compose
from .text_alignment import patch_logits, pool_patches

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares


@dataclass(frozen=True)
class Scoring:
    """How branches become an anomaly map and an image score.

    Args:
        map_branch: Whose map is shown: "seg" for data with masks, "det" for others, where seg is untrained.
        image_score: "map_max", the maximum of the fused map; "det_mean", the fused mean of the det branch;
            "det_max", the same with maxima over patches.
        weights: Weights of the zero-shot and the few-shot branch.
        ranged: Whether values are scaled by calibrated ranges before fusion.
    """

    map_branch: str = "seg"
    image_score: str = "map_max"
    weights: Weights = field(default_factory=lambda: Weights(0.5, 0.5))
    ranged: bool = True

    @property
    def branches(self) -> list[str]:
        """Branches that scoring reads; only their banks are kept."""
        return [b for b in BRANCHES if b == self.map_branch or (b == "det" and self.image_score != "map_max")]


class TrainingOutput(NamedTuple):
    """What the loss needs: per level, maps ``(B, 2, H, W)`` of the seg branch and scores ``(B,)`` of the det branch."""

    seg_maps: list[torch.Tensor]
    det_scores: list[torch.Tensor]


class Tokens(NamedTuple):
    """Features of both branches: per level ``(B, L, E)``."""

    seg: list[torch.Tensor]
    det: list[torch.Tensor]


class BranchScores(NamedTuple):
    """Unfused scores at patch resolution: all that calibration needs to keep of an image.

    ``logits`` is ``(B, l, P, 2)``, ``distance`` ``(B, P)``, ``zero`` and ``few`` ``(B,)``; each is None when not in
    use.
    """

    logits: torch.Tensor | None
    distance: torch.Tensor | None
    zero: torch.Tensor | None
    few: torch.Tensor | None


class SupportViews(NamedTuple):
    """A batch of support views: ``image`` ``(B, 3, H, W)``, ``label`` ``(B,)``, and which image each is a view of."""

    image: torch.Tensor
    label: torch.Tensor
    source: Sequence[str]


class MvfaModel(nn.Module):
    """Multi-level visual feature adaptation of CLIP (Huang et al., CVPR 2024), in its published numerics.

    In train mode ``forward`` returns a :class:`TrainingOutput`, in eval mode anomalib's ``InferenceBatch``.

    Args:
        backbone: See :class:`~anomalib_mvfa.model.backbone.ClipBackbone`, as for the next two.
        pretrained: Tag, file, or None for random weights.
        image_size: Height and width of images in pixels.
        levels: Blocks (from 1) after which adapters sit; the quarter points by default.
        residual_ratio: g, the weight of an adapter in the stream.
        quick_gelu: QuickGELU in place of GELU in the backbone.
        normalize: Normalise images by CLIP's mean and standard deviation, which the published code does not.
        adaptation: "adapter", or "projector" (paper, Table 4): linear layers that leave the stream alone.
        residual: "pair" (published) or "single" (paper, Eq. 2), see
            :func:`~anomalib_mvfa.model.adapters.add_to_stream`.
        train_levels: Levels (blocks) that have a loss and learn; all by default (paper, Table 5).
        score_levels: Levels that are scored; all by default.
        pooling: "mean" (published) or "max" (paper) over patches in the det loss.
        upsample: "logits" (published) or "probabilities" (paper) are upsampled to the seg map.
        coreset: See :class:`~anomalib_mvfa.model.memory_bank.MemoryBank`.
        seed: Of the adapters' initial weights and of the coreset.

    Attributes:
        scoring: How scores are formed.
        bank: Features of the normal support.
        cache: Keeps what is frozen of training images from epoch to epoch; None, by default, computes it each time.
        text_features: Unit columns ``(E, 2)``, normal and abnormal, of the object that is scored.
        ranges: Lowest and highest value ``(2, 2, 2)``: of map and image score, of the zero- and few-shot branch.

    Raises:
        ValueError: A level is not a block of the backbone, or an option has no such value.
    """

    text_features: torch.Tensor
    ranges: torch.Tensor

    def __init__(
        self,
        backbone: str = "ViT-L-14-336",
        pretrained: str | None = "openai",
        image_size: int = 240,
        levels: Sequence[int] | None = None,
        residual_ratio: float = 0.1,
        quick_gelu: bool = False,
        normalize: bool = False,
        adaptation: str = "adapter",
        residual: str = "pair",
        train_levels: Sequence[int] | None = None,
        score_levels: Sequence[int] | None = None,
        pooling: str = "mean",
        upsample: str = "logits",
        coreset: float | None = None,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_choice("adaptation", adaptation, ("adapter", "projector"))
        check_choice("residual", residual, ("pair", "single"))
        check_choice("pooling", pooling, ("mean", "max"))
        check_choice("upsample", upsample, ("logits", "probabilities"))
        self.image_size = image_size
        self.residual_ratio = residual_ratio
        self.normalize = normalize
        self.residual = residual
        self._adapts_stream = adaptation == "adapter"
        self.pooling = pooling
        self.upsample = upsample

        self.backbone = self._new_backbone(backbone, pretrained, image_size, quick_gelu)
        self.levels = _check_levels("levels", levels, self.backbone.depth)
        self._trained = self._positions("train_levels", train_levels)
        self._scored = self._positions("score_levels", score_levels)

        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.seg_adapters, self.det_adapters = (self._new_adapters(adaptation) for _ in BRANCHES)
        self.seg_adapters.train_only(self._trained)
        self.det_adapters.train_only(self._trained)

        self.scoring = Scoring()
        self.bank = MemoryBank(coreset, seed)
        self.cache: FrozenCache | None = None
        self.register_buffer("text_features", torch.full((self.backbone.joint_width, 2), torch.nan))
        self.register_buffer("ranges", torch.full((2, 2, 2), torch.nan))

    def forward(
        self,
        image: torch.Tensor,
        text_features: torch.Tensor | None = None,
        with_seg: bool = True,
    ) -> TrainingOutput | InferenceBatch:
        """Score images.

        Args:
            image: RGB in [0, 1], ``(B, 3, image_size, image_size)``.
            text_features: ``(E, 2)``, the model's own by default.
            with_seg: In training, whether the seg branch learns: not from data without masks.

        Returns:
            In train mode, what the loss needs; in eval mode ``pred_score`` ``(B,)`` and ``anomaly_map`` ``(B, H, W)``.
        """
        text_features = self.text_features if text_features is None else text_features
        if self.training:
            return self._training_output(self.tokens(image, learn_seg=with_seg), text_features, with_seg)
        return self.fuse(self.branch_scores(self.tokens(image), text_features))

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
        last = self._last_in_use
        frozen = self.frozen_tokens(image, first_only=self._adapts_stream)
        tokens = Tokens([], [])
        for position in range(last + 1):
            seg_adapter: Any = self.seg_adapters[position]
            det_adapter: Any = self.det_adapters[position]
            if position < len(frozen):
                x = frozen[position]
            else:
                x = self._blocks(x, self.levels[position - 1], self.levels[position])
            # Out of autocast: features differ in their last digits, which half precision does not keep.
            with torch.autocast(x.device.type, enabled=False), _frozen(seg_adapter, not learn_seg):
                tokens.seg.append(seg_adapter(x))
                tokens.det.append(det_adapter(x))
                if self._adapts_stream and position < last:
                    to_stream = seg_adapter.to_stream(tokens.seg[-1]), det_adapter.to_stream(tokens.det[-1])
                    x = add_to_stream(x, *to_stream, self.residual_ratio, self.residual)
        return tokens

    @property
    def scored_levels(self) -> list[int]:
        """Blocks (from 1) of the levels that are scored."""
        return [self.levels[position] for position in self._scored]

    def frozen_tokens(self, image: torch.Tensor, first_only: bool = False) -> list[torch.Tensor]:
        """Run the backbone alone, as far as :meth:`tokens` does; in training, once for an image that ``cache`` keeps.

        Args:
            image: As for :meth:`tokens`.
            first_only: Stop at the first level, behind which adapters change the stream.

        Returns:
            Per level, the stream ``(B, L, D)`` that no adapter has touched.
        """
        ends = self.levels[: 1 if first_only else self._last_in_use + 1]
        if not self.training or self.cache is None:
            return self._frozen_stream(image, ends)
        device = image.device.type
        half = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        kept = self.cache.tokens(image, lambda new: torch.stack(self._frozen_stream(new, ends)), (half, len(ends)))
        return list(kept)

    def branch_scores(
        self,
        tokens: Tokens,
        text_features: torch.Tensor,
        keep: torch.Tensor | None = None,
    ) -> BranchScores:
        """Compare features with the texts and the bank.

        Args:
            tokens: Features of images.
            text_features: ``(E, 2)``.
            keep: Which support views ``(N,)`` of the bank count, all by default.
        """
        scoring = self.scoring
        logits = self._logits(tokens, scoring.map_branch, text_features)
        distance = zero = few = None
        if scoring.weights.few > 0:
            distance = self.bank.distance(scoring.map_branch, self._scored_tokens(tokens, scoring.map_branch), keep)
        if scoring.image_score != "map_max":
            pooling = scoring.image_score.removeprefix("det_")
            of_det = logits if scoring.map_branch == "det" else self._logits(tokens, "det", text_features)
            if of_det is not None:
                scores = [pool_patches(level.softmax(-1)[..., 1], pooling) for level in of_det.unbind(1)]
                zero = torch.stack(scores).mean(dim=0)
            if distance is not None:
                far = distance
                if scoring.map_branch != "det":
                    far = self.bank.distance("det", self._scored_tokens(tokens, "det"), keep)
                far = upsample(to_grid(far.unsqueeze(-1)), self.image_size).flatten(1)
                few = pool_patches(far, pooling)
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
            few = upsample(to_grid(scores.distance.unsqueeze(-1)), self.image_size).squeeze(1)
        return zero, few

    def fuse(self, scores: BranchScores) -> InferenceBatch:
        """Fuse the branches into ``anomaly_map`` ``(B, H, W)`` and ``pred_score`` ``(B,)``, both inside [0, 1]."""
        map_ranges, score_ranges = self.ranges if self.scoring.ranged else (None, None)
        anomaly_map = fuse(*self.maps(scores), self.scoring.weights, map_ranges)
        if self.scoring.image_score == "map_max":
            pred_score = anomaly_map.amax(dim=(-2, -1))
        else:
            pred_score = fuse(scores.zero, scores.few, self.scoring.weights, score_ranges)
        return InferenceBatch(pred_score=pred_score, anomaly_map=anomaly_map)

    @torch.no_grad()
    def level_maps(self, image: torch.Tensor) -> torch.Tensor:
        """Score images by each level alone (paper, Figure 4).

        Args:
            image: As for :meth:`forward`.

        Returns:
            Anomaly maps ``(B, l, H, W)`` of the scored levels, each fused with the weights and ranges of the whole.
        """
        scoring, tokens, distances = self.scoring, self.tokens(image), None
        logits = self._logits(tokens, scoring.map_branch, self.text_features)
        if scoring.weights.few > 0:
            of_map = self._scored_tokens(tokens, scoring.map_branch)
            distances = self.bank.level_distances(scoring.map_branch, of_map)
        ranges = self.ranges[0] if scoring.ranged else None
        maps = []
        for level in range(len(self._scored)):
            of_texts = logits[:, [level]] if logits is not None else None
            of_bank = distances[level] if distances is not None else None
            branches = self.maps(BranchScores(of_texts, of_bank, zero=None, few=None))
            maps.append(fuse(*branches, scoring.weights, ranges))
        return torch.stack(maps, dim=1)

    def encode_states(
        self,
        class_name: str,
        normal_states: Sequence[str] = NORMAL_STATES,
        abnormal_states: Sequence[str] = ABNORMAL_STATES,
        templates: Sequence[str] = TEMPLATES,
    ) -> torch.Tensor:
        """Return the text features ``(E, 2)`` of an object: unit mean of unit embeddings, normal and abnormal."""
        columns = []
        for states in (normal_states, abnormal_states):
            embeddings = self.backbone.encode_text(compose(class_name, states, templates))
            columns.append(normalize(embeddings.mean(dim=0), dim=0))
        return torch.stack(columns, dim=1)

    @torch.no_grad()
    def memorise(self, views: Iterable[SupportViews]) -> list[BranchScores]:
        """Build the bank from the normal views, and score every support image as if it were unseen.

        The first view of an image stands for it; of a normal one, the bank rows of its own views are left out (with
        one normal image, those of the first view only).

        Args:
            views: Batches of support views, each image's unchanged view before its others.

        Returns:
            Scores of every support image, in order of appearance, for :meth:`calibrate`.

        Raises:
            ValueError: There is no normal view.
        """
        self.bank.clear()
        bank: dict[str, list[list[torch.Tensor]]] = {branch: [] for branch in self.scoring.branches}
        owners: list[str] = []
        firsts: dict[str, Tokens] = {}
        for batch in views:
            normal = (batch.label == 0).tolist()
            new = [source not in firsts and source not in batch.source[:row] for row, source in enumerate(batch.source)]
            used = [row for row in range(len(normal)) if normal[row] or new[row]]
            if not used:
                continue
            tokens = self.tokens(batch.image[used])
            in_bank = [position for position, row in enumerate(used) if normal[row]]
            for branch, stored in bank.items():
                stored.append([level[in_bank] for level in self._scored_tokens(tokens, branch)])
            owners += [batch.source[used[position]] for position in in_bank]
            for position, row in enumerate(used):
                if new[row]:
                    one = slice(position, position + 1)
                    firsts[batch.source[row]] = Tokens([t[one] for t in tokens.seg], [t[one] for t in tokens.det])
        if not owners:
            msg = "The support holds no normal image, and the memory bank needs at least one."
            raise ValueError(msg)
        for branch in list(bank):  # one after the other, since they may be large
            self.bank.store(branch, map(torch.cat, zip(*bank.pop(branch), strict=True)))

        scores = []
        for source, tokens in firsts.items():
            keep = torch.tensor([owner != source for owner in owners], device=tokens.seg[0].device)
            if not keep.any():
                logger.warning(
                    "One normal support image: its range is measured against its own other views, and may be narrow.",
                )
                keep = torch.tensor([row > 0 for row in range(len(owners))], device=keep.device)
            whole = bool(keep.all()) or not keep.any()
            scores.append(self.branch_scores(tokens, self.text_features, None if whole else keep))
        return scores

    @torch.no_grad()
    def calibrate(self, scores: Iterable[BranchScores]) -> None:
        """Set the ranges to the lowest and highest values that these scores reach, pixel by pixel and image by image.

        Args:
            scores: Of the images that set the ranges.
        """
        seen: list[list[torch.Tensor]] = []
        for batch in scores:
            zero_map, few_map = self.maps(batch)
            values = (zero_map, few_map, batch.zero, batch.few)
            missing = self.ranges.new_tensor([0.0, 1.0])
            seen.append([missing if value is None else value_range(value) for value in values])
        if seen:
            extremes = torch.stack([torch.stack(row) for row in seen])  # (batches, 4, 2)
            low, high = extremes[..., 0].amin(dim=0), extremes[..., 1].amax(dim=0)
            self.ranges.copy_(torch.stack([low, high], dim=-1).view(2, 2, 2))

    def _training_output(self, tokens: Tokens, text_features: torch.Tensor, with_seg: bool) -> TrainingOutput:
        seg_maps, det_scores = [], []
        for position in self._trained:
            if with_seg:
                logits = patch_logits(self._joint_tokens(tokens, "seg", position), text_features)
                seg_maps.append(state_probabilities(logits, self.image_size, self.upsample))
            logits = patch_logits(self._joint_tokens(tokens, "det", position), text_features)
            det_scores.append(pool_patches(logits.softmax(dim=-1)[..., 1], self.pooling))
        return TrainingOutput(seg_maps, det_scores)

    def _new_backbone(self, backbone: str, pretrained: str | None, image_size: int, quick_gelu: bool) -> ClipBackbone:
        """The frozen network."""
        return ClipBackbone(backbone, pretrained, image_size, quick_gelu)

    def _new_adapters(self, adaptation: str) -> BranchAdapters:
        """Adapters of one branch."""
        return BranchAdapters(len(self.levels), self.backbone.width, self.backbone.joint_width, adaptation)

    def _embed(self, image: torch.Tensor) -> torch.Tensor:
        """Tokens ``(B, L, D)`` that enter the first block."""
        return self.backbone.embed(self._checked(image))

    def _checked(self, image: torch.Tensor) -> torch.Tensor:
        """Images of the right size, as the backbone wants them."""
        if image.shape[-2] != self.image_size or image.shape[-1] != self.image_size:
            msg = (
                f"Images of {image.shape[-2]}x{image.shape[-1]} pixels reached a model of "
                f"image_size={self.image_size}. Give that of the checkpoint, if one was loaded; else leave "
                "pre_processor at its default, or let it resize to image_size."
            )
            raise ValueError(msg)
        image = image.clamp(0, 1)
        if self.normalize:
            image = (image - self.backbone.mean) / self.backbone.std
        return image

    @property
    def _last_in_use(self) -> int:
        """Position of the last level that is trained or, in eval mode, scored."""
        return max(self._trained if self.training else self._scored)

    def _frozen_stream(self, image: torch.Tensor, ends: Sequence[int]) -> list[torch.Tensor]:
        """Stream ``(B, L, D)`` after each of these blocks."""
        streams = []
        x, start = self._embed(image), 0  # (B, L, D)
        for end in ends:
            x = self._blocks(x, start, end)
            start = end
            streams.append(x)
        return streams

    def _blocks(self, x: torch.Tensor, start: int, end: int) -> torch.Tensor:
        """Run blocks, counted from 1, behind ``start`` up to ``end`` on tokens ``(B, L, D)``."""
        for index in range(start, end):
            x = self.backbone.block(index, x)
        return x

    def _joint_tokens(self, tokens: Tokens, branch: str, position: int) -> torch.Tensor:
        """Features ``(B, L, E)`` of a level that are compared with texts: those that the bank holds, too."""
        return getattr(tokens, branch)[position]

    def _logits(self, tokens: Tokens, branch: str, text_features: torch.Tensor) -> torch.Tensor | None:
        """Patch logits ``(B, l, P, 2)`` of the scored levels; None from a model without texts."""
        return torch.stack(
            [patch_logits(self._joint_tokens(tokens, branch, position), text_features) for position in self._scored],
            dim=1,
        )

    def _scored_tokens(self, tokens: Tokens, branch: str) -> list[torch.Tensor]:
        """Per scored level, the features that the bank holds or is compared with."""
        levels = getattr(tokens, branch)
        return [levels[position] for position in self._scored]

    def _positions(self, name: str, chosen: Sequence[int] | None) -> list[int]:
        """Positions, within ``levels``, of chosen levels."""
        chosen = self.levels if chosen is None else [int(level) for level in chosen]
        unknown = [level for level in chosen if level not in self.levels]
        if unknown or not chosen:
            msg = f"{name}={chosen} must name some of the levels {self.levels}."
            raise ValueError(msg)
        return sorted({self.levels.index(level) for level in chosen})


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


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise ValueError unless the value is one of the choices."""
    if value not in choices:
        msg = f"{name}={value!r} is unknown; choose one of: {', '.join(choices)}."
        raise ValueError(msg)


def _check_levels(name: str, levels: Sequence[int] | None, depth: int) -> list[int]:
    if levels is None:
        return sorted({max(1, round(depth * quarter / 4)) for quarter in (1, 2, 3, 4)})
    checked = [int(level) for level in levels]
    if not checked or checked != sorted(set(checked)) or checked[0] < 1 or checked[-1] > depth:
        msg = f"{name}={checked} must be increasing block numbers between 1 and {depth}, the backbone's depth."
        raise ValueError(msg)
    return checked
