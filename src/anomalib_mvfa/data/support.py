"""Which images are the support, drawn from a seed or named in a published list, and how groups are kept apart."""

import logging
import re
from collections import Counter
from collections.abc import Collection, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import LabelName
from pandas import DataFrame, Series
from PIL import Image
from scipy.spatial import KDTree
from torch.utils.data import Dataset

from ..io import file_digest
from .dataset import SampleDataset, SupportViewDataset, lacks_mask
from .reading import read_image

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

LABELS = {LabelName.NORMAL: ("normal", "n"), LabelName.ABNORMAL: ("abnormal", "a")}
"""How errors and published lists name the labels."""
THUMBNAIL = 16
"""Height and width in pixels at which pictures are compared."""
SAME = 6
"""Grey levels of 255 by which thumbnails of one picture may differ: JPEG of quality 40 changes them by up to 5, and
different slices of BMAD's Brain by 13 or more."""
MOST_LOOKED_AT = 2000
"""Files whose thumbnails are compared; decoding them takes seconds."""


def draw(samples: DataFrame, count: int, seed: int) -> DataFrame:
    """Return ``count`` of the samples, drawn without replacement; the draw depends on the seed and the file paths."""
    ordered = samples.sort_values("image_path", ignore_index=True)
    chosen = np.random.default_rng(seed).permutation(len(ordered))[:count]
    return ordered.iloc[np.sort(chosen)].reset_index(drop=True)


def draw_groups(
    samples: DataFrame, counts: Mapping[LabelName, int | None], seed: int, group_by: str | None
) -> DataFrame:
    """Return whole groups, drawn until there are as many samples of each label as asked for, all if that is None.

    The groups come in an order that depends on the seed, those of abnormal images without any mask last.
    """
    groups, lacking = groups_of(samples, group_by), lacks_mask(samples)
    without_mask = set(groups[lacking]) - set(groups[~lacking & (samples.label_index == LabelName.ABNORMAL)])
    order = sorted(np.random.default_rng(seed).permutation(sorted(set(groups))), key=without_mask.__contains__)
    sizes = Counter(zip(groups, samples.label_index, strict=True))
    chosen: set[str] = set()
    drawn = Counter[LabelName]()
    for label, count in counts.items():
        for group in order:
            if group not in chosen and sizes[group, label] and (count is None or drawn[label] < count):
                chosen.add(group)
                drawn.update({one: sizes[group, one] for one in counts})
    return samples[groups.isin(chosen)].sort_values(["label_index", "image_path"], ignore_index=True)


def read_support_list(path: str | Path, category: str, k_shot: int | None) -> dict[LabelName, list[str]]:
    """Return the file names, normal and abnormal, in a list of the published form, or a folder of such lists.

    A folder holds ``<category>/<K>-shot.txt``, and a list has one line per label: ``n-0: a.png b.png`` and
    ``a-0: c.png d.png``. FileNotFoundError if there is no such list, ValueError if it is not of this form.
    """
    path = Path(path).expanduser()
    file = path / category / f"{k_shot}-shot.txt" if path.is_dir() else path
    if not file.is_file():
        there = sorted(str(found.relative_to(path)) for found in path.glob("*/*-shot.txt"))
        msg = f"support_list={str(path)!r}: {file} does not exist. Lists found there: {there or 'none'}."
        raise FileNotFoundError(msg)
    lines = [line.split(":", 1) for line in file.read_text("utf-8", "replace").splitlines() if ":" in line]
    names = {}
    for label, (word, letter) in LABELS.items():
        found = [listed for key, listed in lines if key == f"{letter}-0"]
        if len(found) != 1:
            msg = (
                f"{file} has {len(found) or 'no'} line{'s' * (len(found) > 1)} '{letter}-0: <file names>' of {word} "
                "support images. Give one."
            )
            raise ValueError(msg)
        names[label] = found[0].split()
    return names


def pick(pool: DataFrame, names: list[str], count: int | None, where: str) -> DataFrame:
    """Return the samples with these file names, or ends of paths that tell files of the same name apart.

    ValueError, which begins with ``where``, if a name is not in the pool or fits several files, or if there are not
    ``count`` of them, where that is given.
    """
    paths = ["/" + Path(path).as_posix() for path in pool.image_path]
    rows = {name: [row for row, path in enumerate(paths) if path.endswith(f"/{name}")] for name in names}
    if missing := [name for name, found in rows.items() if not found]:
        msg = f"{where} names {missing}, not among the {len(pool)} images to pick from. Correct the list."
        raise ValueError(msg)
    if unclear := {name: list(pool.image_path.iloc[found]) for name, found in rows.items() if len(found) > 1}:
        msg = f"{where} names files that exist several times: {unclear}. Put the folder before the name: folder/name."
        raise ValueError(msg)
    if count is not None and len(rows) != count:
        msg = f"{where} names {len(rows)} different images where {count} are asked for. Change k_shot or the list."
        raise ValueError(msg)
    return pool.iloc[[row for (row,) in rows.values()]].reset_index(drop=True)


def hold_out(samples: DataFrame, share: float, seed: int, group_by: str | None) -> tuple[DataFrame, DataFrame]:
    """Split samples by whole groups, drawn from the seed, and return what stays and what is held out.

    The share is of the groups of every kind: all normal, all abnormal, mixed.
    """
    groups = groups_of(samples, group_by)
    kinds = samples.groupby(groups).label_index.agg(lambda labels: labels.min() + labels.max())
    rng = np.random.default_rng(seed)
    chosen: set[str] = set()
    for _, names in sorted(kinds.groupby(kinds).groups.items()):
        chosen.update(rng.permutation(sorted(names))[: int(share * len(names))])
    is_held_out = groups.isin(chosen)
    return samples[~is_held_out], samples[is_held_out]


def check_pattern(name: str, pattern: str | None) -> None:
    """Raise ValueError for a pattern that is no regular expression."""
    try:
        re.compile(pattern or "")
    except re.error as error:
        msg = f"{name}={pattern!r} is no regular expression ({error}). An example is 'patient[0-9]+'."
        raise ValueError(msg) from error


def group_of(path: str, group_by: str | None) -> str:
    """Return the group (a patient, say) of an image: what the pattern's first group, or else the pattern, matches.

    Without a pattern, every image is a group of its own; ValueError if the pattern matches nowhere in the path.
    """
    posix = Path(path).as_posix()
    if group_by is None:
        return posix
    match = re.search(group_by, posix)
    group = match and match.group(1 if match.re.groups else 0)
    if not group:
        msg = f"group_by={group_by!r} matches nothing in {posix}. It must match the path of every image."
        raise ValueError(msg)
    return group


def groups_of(samples: DataFrame, group_by: str | None) -> Series:
    """Return the group of every sample: by the expression, or else as a table of the user's own says."""
    if group_by is None and "group" in samples:
        return samples.group
    return samples.image_path.map(lambda path: group_of(path, group_by))


def without_groups(samples: DataFrame, others: DataFrame, group_by: str | None) -> DataFrame:
    """Return the samples that share no group with others."""
    return samples[~groups_of(samples, group_by).isin(groups_of(others, group_by))]


def without_copies(samples: DataFrame, tested: Series) -> DataFrame:
    """Return the samples to learn from that are no byte copies of tested files; the log names what is left out.

    ValueError if nothing is left.
    """
    found = duplicates(tested, samples.image_path)
    left = samples[~samples.image_path.isin([copy for _, copy in found])]
    if found:
        shown = "; ".join(f"{copy} = {one}" for one, copy in found[:3])
        logger.warning("%d images are tested too, and are not learnt from: %s.", len(found), shown)
    if not len(left):
        msg = f"None of the {len(samples)} images is left to learn from: all are tested too. Give other images."
        raise ValueError(msg)
    warn_of_lookalikes(left.image_path, tested)
    return left


def warn_of_lookalikes(learnt: Collection[str], tested: Collection[str]) -> None:
    """Log which files to learn from show the same picture as a tested one, whatever the encoding.

    Of many files, it looks at evenly spaced ones, since each has to be decoded.
    """
    known, others = (_thumbnails(sorted(paths)[:: 1 + len(paths) // MOST_LOOKED_AT]) for paths in (learnt, tested))
    if not known or not others:
        return
    distance, which = KDTree([*known.values()]).query([*others.values()], p=np.inf, distance_upper_bound=SAME + 1)
    pairs = [([*known][row], path) for path, row, far in zip(others, which, distance, strict=True) if far <= SAME]
    if pairs:
        shown = "; ".join(f"{one} and {other}" for one, other in pairs[:3])
        logger.warning("%d images look as if they were both learnt from and tested: %s.", len(pairs), shown)


def _thumbnails(paths: Iterable[str]) -> dict[str, np.ndarray]:
    """Return the thumbnails of the files that can be read; the others are for their reader to refuse."""
    with ThreadPoolExecutor() as pool:
        found = {path: pool.submit(_thumbnail, path) for path in paths}
    return {path: one for path, future in found.items() if (one := future.result()) is not None}


@lru_cache(maxsize=2**16)
def _thumbnail(path: str) -> np.ndarray | None:
    """Return an image in grey ``(THUMBNAIL * THUMBNAIL)``, None if it cannot be read."""
    with suppress(ValueError):
        image = read_image(path).convert("L").resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BOX)
        return np.asarray(image, np.float32).flatten()
    return None


def duplicates(support: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of a support file and another file with the same bytes."""
    known = {file_digest(path): path for path in support}
    sizes = {Path(path).stat().st_size for path in known.values()}  # only files of these sizes need be read
    return [(known[file_digest(p)], p) for p in others if Path(p).stat().st_size in sizes and file_digest(p) in known]


def support_of(datamodule: AnomalibDataModule | None, train_data: Any, bank_images: int, seed: int) -> Dataset | None:  # noqa: ANN401
    """Return the dataset of support views: the datamodule's own, or views of ``bank_images`` normal training images.

    These are drawn with the seed, from ``train_data`` in a run without datamodule; None where there are none.
    """
    if datamodule is not None and hasattr(datamodule, "support"):
        return datamodule.support
    train_data = getattr(datamodule, "train_data", train_data)
    samples = getattr(train_data, "samples", None)
    if samples is None or not (is_normal := samples.label_index == LabelName.NORMAL).any():
        return None
    normal = samples[is_normal]
    chosen = draw(normal, min(bank_images, len(normal)), seed)
    logger.info("Memory bank: %d of %d normal training images, drawn with seed %d.", len(chosen), len(normal), seed)
    return SupportViewDataset(SampleDataset.of(train_data, chosen))
