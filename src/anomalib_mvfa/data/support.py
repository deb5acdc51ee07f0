"""Which images are the support, drawn from a seed or named in a published list, and how groups are kept apart."""

import logging
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import LabelName
from pandas import DataFrame
from torch.utils.data import Dataset

from ..io import file_digest
from .dataset import SampleDataset, SupportViews

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

KINDS = {LabelName.NORMAL: ("normal", "n"), LabelName.ABNORMAL: ("abnormal", "a")}


def draw(samples: DataFrame, count: int, seed: int) -> DataFrame:
    """Return ``count`` of the samples, drawn without replacement; the draw depends on the seed and the file paths."""
    ordered = samples.sort_values("image_path", ignore_index=True)
    chosen = np.random.default_rng(seed).permutation(len(ordered))[:count]
    return ordered.iloc[np.sort(chosen)].reset_index(drop=True)


def read_support_list(path: str | Path, category: str, k_shot: int) -> dict[LabelName, list[str]]:
    """Read the names of support images.

    The published form has one line a kind: ``n-0: a.png b.png`` and ``a-0: c.png d.png``.

    Args:
        path: The list, or a folder that holds ``<category>/<K>-shot.txt``.
        category: Of the data set.
        k_shot: K.

    Returns:
        File names, normal and abnormal.

    Raises:
        FileNotFoundError: There is no such list.
        ValueError: It is not of this form.
    """
    path = Path(path).expanduser()
    file = path / category / f"{k_shot}-shot.txt" if path.is_dir() else path
    if not file.is_file():
        there = sorted(str(found.relative_to(path)) for found in path.glob("*/*-shot.txt")) if path.is_dir() else []
        msg = f"support_list={str(path)!r}: {file} does not exist. Lists found there: {there or 'none'}."
        raise FileNotFoundError(msg)
    lines = dict(line.split(":", 1) for line in file.read_text("utf-8", "replace").splitlines() if ":" in line)
    names = {}
    for kind, (word, letter) in KINDS.items():
        if f"{letter}-0" not in lines:
            msg = f"{file} has no line '{letter}-0: <file names>' of {word} support images."
            raise ValueError(msg)
        names[kind] = lines[f"{letter}-0"].split()
    return names


def pick(pool: DataFrame, names: list[str], count: int, where: str) -> DataFrame:
    """Return the samples with these file names.

    Args:
        pool: Samples to pick from, of one kind.
        names: File names, or as much of the end of the paths as tells files of the same name apart.
        count: How many there should be.
        where: What names them, for errors.

    Raises:
        ValueError: A name is not in the pool or fits several files, or their number is another.
    """
    paths = ["/" + Path(path).as_posix() for path in pool.image_path]
    rows = {name: [row for row, path in enumerate(paths) if path.endswith(f"/{name}")] for name in names}
    missing = [name for name, found in rows.items() if not found]
    if missing:
        msg = f"{where} names {missing}, not among the {len(pool)} images to pick from. Correct the list."
        raise ValueError(msg)
    unclear = {name: [pool.image_path.iloc[row] for row in found] for name, found in rows.items() if len(found) > 1}
    if unclear:
        msg = f"{where} names files that exist several times: {unclear}. Put the folder before the name: folder/name."
        raise ValueError(msg)
    if len(rows) != count:
        msg = f"{where} names {len(rows)} different images where {count} are asked for. Change k_shot or the list."
        raise ValueError(msg)
    return pool.iloc[[row for (row,) in rows.values()]].reset_index(drop=True)


def set_aside(samples: DataFrame, share: float, seed: int, group_by: str | None) -> tuple[DataFrame, DataFrame]:
    """Split samples in two by whole groups, drawn from the seed.

    Args:
        samples: The samples.
        share: Of the groups of every kind (all normal, all abnormal, mixed) that is set aside.
        seed: Of the draw.
        group_by: See :func:`group_of`.

    Returns:
        What stays, and what is set aside.
    """
    groups = samples.image_path.map(lambda path: group_of(path, group_by))
    kinds = samples.groupby(groups).label_index.agg(lambda labels: labels.min() + labels.max())
    rng = np.random.default_rng(seed)
    aside: set[str] = set()
    for _, names in sorted(kinds.groupby(kinds).groups.items()):
        aside.update(rng.permutation(sorted(names))[: int(share * len(names))])
    is_aside = groups.isin(aside)
    return samples[~is_aside], samples[is_aside]


def group_of(path: str, group_by: str | None) -> str:
    """Return the group (a patient, say) of an image: what the pattern's first group, or else the pattern, matches.

    Without a pattern, every image is a group of its own.

    Raises:
        ValueError: The pattern matches nowhere in the path.
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


def same_content(support: Iterable[str], others: Iterable[str]) -> list[tuple[str, str]]:
    """Return pairs of a support file and another file with the same bytes."""
    by_size: dict[int, dict[str, str]] = {}
    for path in support:
        by_size.setdefault(Path(path).stat().st_size, {})[file_digest(path)] = path
    pairs = []
    for path in others:
        twins = by_size.get(Path(path).stat().st_size)  # only files of the same size need be read
        if twins and (digest := file_digest(path)) in twins:
            pairs.append((twins[digest], path))
    return pairs


def support_of(
    datamodule: AnomalibDataModule | None,
    train_data: Any,  # noqa: ANN401  # any dataset of anomalib items
    bank_images: int,
    seed: int,
) -> Dataset | None:
    """Return the dataset of support views: the datamodule's own, or views of some normal training images.

    Args:
        datamodule: Where the data come from, if there is one.
        train_data: Training dataset of a run without datamodule.
        bank_images: How many normal images to draw where the datamodule has no support of its own.
        seed: Of that draw.
    """
    if datamodule is not None and hasattr(datamodule, "support"):
        return datamodule.support
    train_data = getattr(datamodule, "train_data", train_data)
    if train_data is None or not hasattr(train_data, "samples"):
        return None
    samples = train_data.samples
    normal = samples[samples.label_index == LabelName.NORMAL]
    if not len(normal):
        return None
    chosen = draw(normal, min(bank_images, len(normal)), seed)
    logger.info("Memory bank: %d of %d normal training images, drawn with seed %d.", len(chosen), len(normal), seed)
    return SupportViews(SampleDataset.of(train_data, chosen))
