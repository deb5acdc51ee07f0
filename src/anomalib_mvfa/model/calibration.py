"""Calibration of a torch model on the support: memory bank, value ranges and thresholds.

Axes: B images, N support views.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader

from ..progress import progress
from .fusion import NOISE, value_range
from .torch_model import BranchScores, MvfaModel, Tokens

if TYPE_CHECKING:
    from anomalib.data import ImageItem, InferenceBatch
    from anomalib.post_processing import PostProcessor

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

SUPPORT_BATCH = 16
"""Support views scored at once."""
VALUES = ("zero-shot map", "few-shot map", "zero-shot image score", "few-shot image score")
"""What has a value range, in the order of the model's buffer."""
THRESHOLDS = ("_image_threshold", "_pixel_threshold")
"""Buffers of anomalib's post-processor, NaN until set."""


class SupportBatch(NamedTuple):
    """A batch of support views: ``image`` ``(B, 3, H, W)``, ``label`` ``(B,)``, and which image each is a view of."""

    image: torch.Tensor
    label: torch.Tensor
    source: Sequence[str]


@torch.no_grad()
def fill_bank(model: MvfaModel, batches: Iterable[SupportBatch]) -> list[BranchScores]:
    """Fill the bank from the normal views, and score every support image as if it were unseen.

    The first view of an image stands for it; of a normal one, the bank rows of its own views are left out (with one
    normal image, those of the first view only).

    Args:
        model: Model in eval mode.
        batches: Support views, each image's unchanged view before its others.

    Returns:
        Scores of every support image, in order of appearance, for :func:`set_ranges`.

    Raises:
        ValueError: There is no normal view.
    """
    model.bank.clear()
    bank: dict[str, list[list[torch.Tensor]]] = {branch: [] for branch in model.scoring.branches}
    owners: list[str] = []
    firsts: dict[str, Tokens] = {}
    for batch in batches:
        normal = (batch.label == 0).tolist()
        new = [source not in firsts and source not in batch.source[:row] for row, source in enumerate(batch.source)]
        used = [row for row in range(len(normal)) if new[row] or (normal[row] and model.bank_of_views)]
        if not used:
            continue
        tokens = model.tokens(batch.image[used])
        in_bank = [position for position, row in enumerate(used) if normal[row]]
        for branch, stored in bank.items():
            stored.append([level[in_bank] for level in model.scored_tokens(tokens, branch)])
        owners += [batch.source[used[position]] for position in in_bank]
        for position, row in enumerate(used):
            if new[row]:
                one = slice(position, position + 1)
                firsts[batch.source[row]] = Tokens([t[one] for t in tokens.seg], [t[one] for t in tokens.det])
    if not owners:
        msg = "The support holds no normal image, and the memory bank needs at least one."
        raise ValueError(msg)
    for branch in list(bank):  # one after the other, since they may be large
        model.bank.store(branch, map(torch.cat, zip(*bank.pop(branch), strict=True)))
    return [
        model.branch_scores(tokens, model.text_features, _others(owners, source, tokens.seg[0].device))
        for source, tokens in firsts.items()
    ]


def _others(owners: Sequence[str], source: str, device: torch.device) -> torch.Tensor | None:
    """Which views ``(N,)`` an image is compared with as if it were unseen; None for all."""
    keep = [owner != source for owner in owners]
    if not any(keep):
        logger.warning(
            "One normal support image: its range is measured against its own other views, and may be narrow."
        )
        keep = [row > 0 or len(owners) == 1 for row in range(len(owners))]
    return None if all(keep) else torch.tensor(keep, device=device)


def score_support(
    model: MvfaModel,
    support: Any,  # noqa: ANN401  # any dataset of anomalib items
    preprocess: Callable[[torch.Tensor], torch.Tensor],
) -> list[tuple[BranchScores, "ImageItem"]]:
    """Fill the bank by :func:`fill_bank` from a dataset; return scores and item of every support image."""
    items: dict[str, ImageItem] = {}

    def views() -> Iterator[SupportBatch]:
        kinds = support.kinds() if hasattr(support, "kinds") else [np.arange(len(support))]
        batches = [
            kind[first : first + SUPPORT_BATCH].tolist()
            for kind in kinds
            for first in range(0, len(kind), SUPPORT_BATCH)
        ]
        loader = DataLoader(support, batch_sampler=batches, collate_fn=support.collate_fn)
        for batch in progress(loader, "Filling the memory bank", len(batches)):
            for item in batch.items:
                items.setdefault(item.image_path, item)
            image = preprocess(batch.image)
            yield SupportBatch(image, batch.gt_label.to(image.device), batch.image_path)

    return list(zip(fill_bank(model, views()), items.values(), strict=True))


@torch.no_grad()
def set_ranges(model: MvfaModel, scores: Iterable[BranchScores]) -> None:
    """Set a model's value ranges to the lowest and highest values that scores reach, by pixel and by image.

    Raises:
        ValueError: A value is not finite.
    """
    seen: list[torch.Tensor] = []
    for batch in scores:
        values = (*model.maps(batch), batch.zero, batch.few)
        missing = model.ranges.new_tensor([0.0, 1.0])
        seen.append(torch.stack([missing if value is None else value_range(value) for value in values]))
    if seen:
        extremes = torch.stack(seen)  # (batches, 4, 2)
        low, high = extremes[..., 0].amin(dim=0), extremes[..., 1].amax(dim=0)
        ranges = torch.stack([low, high], dim=-1)
        if not ranges.isfinite().all():
            msg = "Scores that set the value ranges are not finite: training has diverged. Lower the learning rate."
            raise ValueError(msg)
        if flat := [name for name, span in zip(VALUES, (high - low).tolist(), strict=True) if span <= NOISE]:
            logger.warning(
                "All images that set the value ranges have the same %s, but for rounding: it is not scaled. Give "
                "support images that differ, or calibration='none'.",
                " and ".join(flat),
            )
        model.ranges.copy_(ranges.view(2, 2, 2))


def is_calibrated(model: MvfaModel) -> bool:
    """Whether a model's bank and value ranges, where they are in use, are there."""
    scoring = model.scoring
    if scoring.weights.few == 0:
        return True
    has_ranges = not (scoring.normalised and bool(model.ranges.isnan().any()))
    return has_ranges and model.bank.filled.issuperset(scoring.branches)


def forget_calibration(model: MvfaModel) -> None:
    """Empty a model's bank and value ranges, which hold for the adapters as they were."""
    if model.bank.filled:
        model.bank.clear()
    model.ranges.fill_(torch.nan)


def thresholds_are_set(post_processor: Any) -> bool:  # noqa: ANN401  # anomalib's, another's or none
    """Whether a post-processor has its image threshold, or no place for one."""
    return not bool(torch.isnan(getattr(post_processor, THRESHOLDS[0], torch.zeros(()))))


def reset_thresholds(post_processor: Any) -> None:  # noqa: ANN401
    """Forget the thresholds of a post-processor."""
    for name in THRESHOLDS:
        if hasattr(post_processor, name):
            getattr(post_processor, name).fill_(torch.nan)
    if hasattr(post_processor, "forget"):
        post_processor.forget()


def set_thresholds(
    post_processor: "PostProcessor",
    scored: Sequence[tuple["InferenceBatch", "ImageItem"]],
    images: str,
    learnt: bool = False,
) -> None:
    """Find a post-processor's thresholds on images that do not validate.

    Args:
        post_processor: Of anomalib; what is asked for is in it.
        scored: Prediction and item of every image.
        images: What they are, in the words of the log.
        learnt: Whether the adapters have learnt from these images.
    """
    from anomalib.data import ImageBatch

    logger.info("Thresholds come from the %d %s images: validation did not show both labels.", len(scored), images)
    hosts: Any = (None, None)  # trainer and module, which it does not read
    for predictions, item in scored:
        device = torch.as_tensor(predictions.pred_score).device
        batch = ImageBatch(
            image=torch.as_tensor(item.image)[None].to(device),
            gt_label=torch.as_tensor(item.gt_label)[None].to(device),
            gt_mask=None if item.gt_mask is None else item.gt_mask[None].to(device),
            **{key: value for key, value in predictions._asdict().items() if value is not None},
        )
        post_processor.on_validation_batch_end(*hosts, batch)
    post_processor.on_validation_epoch_end(*hosts)
    evidence = getattr(post_processor, "evidence", None)
    if evidence is not None:
        evidence.images, evidence.learnt = images, learnt
