"""Random views of support images to learn from, into which lesions of support images are pasted.

Axes: H height, W width.
"""

import copy
import math
from typing import Any

import numpy as np
import torch
from anomalib.data import ImageItem
from anomalib.data.utils import LabelName
from scipy.ndimage import label
from torch.nn.functional import max_pool2d
from torchvision.transforms.v2 import ColorJitter
from torchvision.transforms.v2.functional import gaussian_blur, resize
from torchvision.tv_tensors import Image, Mask

from .augmentation import warp
from .dataset import SupportViewDataset, lacks_mask

SCALE = 1.6
"""Images and lesions become up to so many times larger or smaller."""
SHIFT = 0.1
"""Share of an image's width and height by which it is shifted at most."""
TRIES = 10
"""Draws of how a view is moved, of which the first that keeps a lesion in sight is taken."""
PASTED = 0.5
"""Share of views that get a lesion."""
DARK = 0.1
"""Share of an image's highest grey value below which no lesion is centred: CT and MRI are black outside of the body."""
RING = 7
"""Pixels around a lesion whose mean colours, here and there, are compared."""
MATCH = 0.7
"""How much of their difference is taken from the lesion."""

JITTER = ColorJitter(brightness=0.2, contrast=0.2)


class RandomViewDataset(SupportViewDataset):
    """Random views of support images: turned, scaled, flipped, lighter or darker, and with pasted lesions.

    They come as those of the support do, first every image itself. A view follows the seed and its number alone, so it
    is the same in every process, and in every epoch unless augmentations are random. Of images with a mask, half of the
    views get a lesion of a random support image, perhaps of the same.

    Args:
        support: The support, whose items are read; of images with masks.
        seed: Seed of the views.
    """

    VIEWS = 22

    def __init__(self, support: SupportViewDataset, seed: int) -> None:
        super().__init__(support)
        self.seed = seed
        with_lesion = (self.samples.label_index == LabelName.ABNORMAL) & ~lacks_mask(self.samples)
        self._donors: list[int] = np.flatnonzero(with_lesion).tolist()

    def _view(self, item: Any, index: int) -> ImageItem:  # noqa: ANN401  # anomalib's items have None in every field
        seen, number = copy.copy(item), len(self) * self.seed + index
        if index < len(self.samples):
            return seen
        donor = self._donor(number) if item.gt_mask is not None else None  # read before, since reading may draw too
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(number)  # CUDA's are not touched
            theta, seen.gt_mask = move(item.gt_mask)
            seen.image = JITTER(warp(item.image, theta))
            if donor is not None:
                seen.image, seen.gt_mask = paste_lesion(seen.image, seen.gt_mask, donor.image, donor.gt_mask)
                seen.gt_label = torch.tensor(int(item.gt_label or seen.gt_mask.any()))
        return seen

    def _donor(self, number: int) -> Any:  # noqa: ANN401  # an item, as above
        """Return the support image whose lesion a view gets, None for half of the views and where there is none."""
        generator = torch.Generator().manual_seed(-1 - number)
        if not self._donors or torch.rand((), generator=generator) >= PASTED:
            return None
        return self._read(self._donors[int(torch.randint(len(self._donors), (), generator=generator))])


def move(mask: torch.Tensor | None) -> tuple[torch.Tensor, Mask | None]:
    """Return a random map ``(2, 3)`` for :func:`~anomalib_mvfa.data.augmentation.warp`, and a mask ``(H, W)`` after it.

    What the mask marks stays in sight, at least in part: after several tries, nothing is moved.
    """
    for _ in range(TRIES):
        theta = torch.cat([turn(), SHIFT * (4 * torch.rand(2, 1) - 2)], dim=1)
        if mask is None:
            return theta, None
        moved = Mask(warp(mask[None], theta)[0] > 0.5)
        if moved.any() or not mask.any():
            return theta, moved
    return torch.eye(2, 3), Mask(mask)


def turn() -> torch.Tensor:
    """Return a random matrix ``(2, 2)`` that turns, scales and perhaps mirrors."""
    angle, scale, mirrored = (torch.rand(3) * 2 - 1).tolist()
    cos, sin = math.cos(math.pi * angle), math.sin(math.pi * angle)
    return SCALE**scale * torch.tensor([[cos, -sin], [sin, cos]]) * torch.tensor([math.copysign(1, mirrored), 1.0])


def paste_lesion(
    image: torch.Tensor, mask: torch.Tensor, donor: torch.Tensor, lesions: torch.Tensor
) -> tuple[torch.Tensor, Mask]:
    """Put one of another image's lesions, turned and scaled, with its centre at a random place of an image.

    Args:
        image: Image ``(3, H, W)`` in [0, 1].
        mask: What is abnormal in it, bool ``(H, W)``.
        donor: Image with lesions; one of another size is resized.
        lesions: Their mask, of the donor's size; those that touch are one.

    Returns:
        The new image and its mask.
    """
    size = list(image.shape[-2:])
    donor, lesions = resize(Image(donor), size), resize(Mask(lesions[None]), size)
    numbers, count = label(lesions[0].numpy(), np.ones((3, 3)))
    if count == 0:  # other augmentations have cut them off
        return image, Mask(mask)
    lesion = torch.from_numpy(numbers == 1 + int(torch.randint(count, ())))[None].float()
    grey = image.mean(dim=0)
    places = torch.nonzero(grey >= DARK * grey.max())
    to, middle = places[int(torch.randint(len(places), ()))], torch.nonzero(lesion[0]).float().mean(dim=0)
    to, middle = (((2 * place + 1) / torch.tensor(size) - 1).flip(0) for place in (to, middle))  # as warp counts
    matrix = turn()
    theta = torch.cat([matrix, (middle - matrix @ to)[:, None]], dim=1)
    pasted, covered = warp(donor, theta, "border"), (warp(lesion, theta, "zeros") > 0.5).float()
    across = max_pool2d(covered, (1, 2 * RING + 1), stride=1, padding=(0, RING))
    ring = (max_pool2d(across, (2 * RING + 1, 1), stride=1, padding=(RING, 0)) > covered)[0]
    if ring.any():
        pasted = pasted + MATCH * (image[:, ring].mean(dim=1) - pasted[:, ring].mean(dim=1))[:, None, None]
    share = gaussian_blur(covered, [5, 5], [1.5, 1.5])  # a sharp edge could be learnt in place of the lesion
    share = share / share.amax().clamp(min=1e-6)  # small lesions are as visible as large ones
    return torch.lerp(image, pasted.clamp(0, 1), share), Mask(mask | (share[0] > 0.5))
