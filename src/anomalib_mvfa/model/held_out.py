"""Scores of support images by models that have not learnt from them, for thresholds where no image validates.

For each part of the support, training begins anew without it (cross-validation).
"""

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from sklearn.model_selection import StratifiedGroupKFold

from ..data.dataset import SampleDataset, SupportViewDataset
from . import calibration
from .adapters import BRANCHES, BranchAdapters
from .torch_model import MvfaModel

if TYPE_CHECKING:
    from anomalib.data import ImageItem, InferenceBatch

PARTS = 4
"""Parts of the support; fewer where there are fewer images, or patients, of a kind."""


def split(labels: Sequence[int], groups: Sequence[Any], seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return rows to learn from and rows that are held out, part by part; whole groups are held out.

    Every image is held out once. There are no parts where not every kind can be learnt without each of them.
    """
    kinds, owners = np.asarray(labels), np.asarray(groups)
    count = min(PARTS, *(len(set(owners[kinds == kind])) for kind in (0, 1)))
    if count < 2:
        return []
    parts = [*StratifiedGroupKFold(count, shuffle=True, random_state=seed).split(kinds, kinds, owners)]
    return parts if all(len(set(kinds[rest])) == 2 for rest, _ in parts) else []


def held_out_scores(
    model: MvfaModel,
    start: Sequence[BranchAdapters],
    support: SupportViewDataset,
    parts: Sequence[tuple[np.ndarray, np.ndarray]],
    train: Callable[[MvfaModel, SupportViewDataset], None],
    preprocess: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[tuple["InferenceBatch", "ImageItem"]]:
    """Yield prediction and item of every support image, by a model whose adapters and bank are without its part.

    Args:
        model: The trained model, which is left as it is.
        start: Adapters that its training began with, seg and det.
        support: Support views.
        parts: Rows of the support to learn from, and to hold out, by :func:`split`.
        train: Trains a model on support views.
        preprocess: The model's pre-processing.
    """
    for rest, held_out in parts:
        known = SupportViewDataset(SampleDataset.of(support, support.samples.iloc[rest], support.class_name))
        twin = _twin(model, start)
        with torch.inference_mode(False), torch.enable_grad():
            train(twin.train(), known)
        twin.eval()
        with torch.no_grad():
            scored = calibration.score_support(twin, known, preprocess)
            if twin.scoring.normalised:
                calibration.set_ranges(twin, (scores for scores, _ in scored))
            images = SampleDataset.of(support, support.samples.iloc[held_out], support.class_name)
            for item in map(images.__getitem__, range(len(images))):
                tokens = twin.tokens(preprocess(torch.as_tensor(item.image)[None]))
                yield twin.fuse(twin.branch_scores(tokens, twin.text_features)), item


def _twin(model: MvfaModel, start: Sequence[BranchAdapters]) -> MvfaModel:
    """Return a model with the same frozen network, whose adapters, bank and ranges are its own."""
    twin = copy.copy(model)
    twin._modules = dict(model._modules)  # noqa: SLF001  # torch has no public way to share a part of a module
    twin._buffers = {name: None if one is None else one.clone() for name, one in model._buffers.items()}  # noqa: SLF001
    for branch, adapters in zip(BRANCHES, start, strict=True):
        setattr(twin, f"{branch}_adapters", copy.deepcopy(adapters))
    twin.bank = copy.deepcopy(model.bank)
    return twin
