"""Few-shot on the user's own images: folders, or a table, of which every image is used once."""

import logging
import os
import warnings
from pathlib import Path

import numpy as np
import pandas as pd
from anomalib.data import AnomalibDataModule
from anomalib.data.utils import LabelName, Split, ValSplitMode
from pandas import DataFrame, Series

from ..arguments import check_bounds, optional_text
from .dataset import SampleDataset
from .few_shot import FewShot
from .folder import NamedFolder
from .reading import files_below

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

FOLDERS = {"normal": "normal", "abnormal": "abnormal", "masks": "masks"}
"""Default names of folders by the arguments that name them."""
LABELS = {"normal": LabelName.NORMAL, "0": LabelName.NORMAL, "abnormal": LabelName.ABNORMAL, "1": LabelName.ABNORMAL}
"""What a table may call the labels."""
SPLITS = (Split.TRAIN.value, Split.TEST.value)
"""What a table may call its own split."""
COLUMNS = ("image", "label", "mask", "group", "split")
"""Columns of a table; the last three may be missing."""


class OwnImages(NamedFolder):
    """The images of :class:`FewShotFolder`, which the protocol at hand divides: all are test images to begin with.

    A table may divide them itself: the support is then drawn from its images to train on.
    """

    partial_masks = True
    group_by: str | None = None

    def __init__(
        self, root: Path | str | None, folders: dict[str, str | None], table: Path | str | None, name: str | None
    ) -> None:
        given = optional_text(table) or optional_text(root)
        if given is None or (optional_text(table) and optional_text(root)):
            msg = (
                f"root={root!r}, table={table!r}: give one of the two: root, the folder that holds the folders of "
                "images, or table, a CSV file."
            )
            raise ValueError(msg)
        self.place = Path(given).expanduser().resolve()
        self.is_table = optional_text(root) is None
        self.folders = {argument: optional_text(name) for argument, name in folders.items()}
        name = name or (self.place.stem if self.is_table else self.place.name)
        super().__init__(name, "", self.place, val_split_mode=ValSplitMode.NONE)

    def _setup(self, _stage: str | None = None) -> None:
        samples = self._listed() if self.is_table else self._found()
        if twice := samples.image_path[samples.image_path.duplicated()].tolist():
            msg = f"{self.place}: {len(twice)} images are in two folders: {twice[:5]}. Give each one label."
            raise ValueError(msg)
        is_normal = samples.label_index == LabelName.NORMAL
        if not is_normal.any():
            msg = f"{self.place} has no normal image, and at least one is needed. Add some."
            raise ValueError(msg)
        samples.attrs["task"] = "segmentation" if samples.mask_path.any() else "classification"
        is_tested = samples.split == Split.TEST.value
        self.val_split_mode = ValSplitMode.NONE if is_tested.all() else ValSplitMode.FROM_DIR
        self.train_data = SampleDataset(samples[is_normal & (~is_tested | self.undivided)])
        self.val_data, self.test_data = SampleDataset(samples[~is_tested]), SampleDataset(samples[is_tested])

    def _create_test_split(self) -> None:
        """Leave all images where they are."""

    @property
    def undivided(self) -> bool:
        """Whether nothing but the protocol divides the images; known once they are set up."""
        return self.val_split_mode == ValSplitMode.NONE

    def _found(self) -> DataFrame:
        """Return the samples table of the folders; without a folder of a default name, there are none of its kind."""
        there = sorted(path.name for path in self.place.glob("[!.]*") if path.is_dir())
        found = {}
        for argument, name in self.folders.items():
            found[argument] = name if name and any(files_below(self.place / name)) else None
            if found[argument] is None and (argument == "normal" or name not in {None, FOLDERS[argument]}):
                msg = (
                    f"{argument}={name!r}: {self.place} has no folder of this name with images in it; its folders are "
                    f"{', '.join(there) or 'none'}. Give another root, or the folder's name as {argument}."
                )
                raise FileNotFoundError(msg)
        if unread := sorted(set(there) - {Path(name).parts[0] for name in found.values() if name}):
            logger.warning("%s: the folders %s are not read, or empty.", self.place, ", ".join(unread))
        self.normal_dir, self.abnormal_dir, self.mask_dir = str(found["normal"]), found["abnormal"], found["masks"]
        return self._find_samples().assign(split=Split.TEST.value)

    def _listed(self) -> DataFrame:
        """Return the samples table of the CSV file."""
        table = self._read_table()
        folder, empty = self.place.parent, Series("", table.index)
        files = {
            name: table.get(name, empty).map(lambda value: os.path.normpath(folder / value) if value else "")
            for name in ("image", "mask")
        }
        labels = table.label.str.lower().map(LABELS)
        masked, grouped = files["mask"] != "", table.get("group", empty) != ""
        split = table.get("split", empty).str.lower()
        self._refuse(labels.isna(), table.label, f"have another label than {', '.join(LABELS)}")
        for name, paths in files.items():
            is_there = paths.map(os.path.isfile) | ((paths == "") & (name == "mask"))
            self._refuse(~is_there, paths, f"name {'no' if name == 'image' else 'a mask that is no'} file")
        self._refuse(files["image"].duplicated(keep=False), files["image"], "name an image twice")
        self._refuse(masked & files["mask"].duplicated(keep=False), files["mask"], "name a mask twice")
        self._refuse(masked & (labels == LabelName.NORMAL), files["mask"], "give a normal image a mask")
        if grouped.any():
            self._refuse(~grouped, files["image"], "have no group, where others have one")
        if (split != "").any():
            self._refuse(~split.isin(SPLITS), split, f"have another split than {' and '.join(SPLITS)}")
        samples = DataFrame({"image_path": files["image"], "mask_path": files["mask"], "label_index": labels})
        samples["label"] = np.where(labels == LabelName.NORMAL, "normal", "abnormal")
        samples["split"] = split.replace("", Split.TEST.value)
        return samples.assign(group=table.group) if grouped.any() else samples

    def _read_table(self) -> DataFrame:
        """Return the CSV file as text, with the columns that are known."""
        if not self.place.is_file():
            msg = f"table='{self.place}': there is no such file. Give a CSV file with the columns {', '.join(COLUMNS)}."
            raise FileNotFoundError(msg)
        try:
            with self.place.open(encoding="utf-8-sig") as file:
                separator = max(",;\t", key=file.readline().count)
            with warnings.catch_warnings():
                warnings.simplefilter("error", pd.errors.ParserWarning)  # of rows that are longer than the first
                table = pd.read_csv(self.place, sep=separator, dtype=str, index_col=False, encoding="utf-8-sig")
        except (ValueError, pd.errors.ParserWarning) as error:  # pandas' own are ValueErrors
            msg = f"table='{self.place}' cannot be read as CSV in UTF-8 ({' '.join(str(error).split())}). Correct it."
            raise ValueError(msg) from error
        table = table.fillna("").rename(columns=lambda name: str(name).strip().lower())
        table = table.apply(lambda column: column.str.strip())
        if missing := {"image", "label"} - {*table.columns}:
            msg = (
                f"table='{self.place}' has no column {' and '.join(sorted(missing))}; its columns are "
                f"{', '.join(table.columns)}. Name them in its first line: {', '.join(COLUMNS)}."
            )
            raise ValueError(msg)
        if unread := [name for name in table.columns if name not in COLUMNS]:
            known = ", ".join(COLUMNS)
            logger.warning("%s: the columns %s are not read; %s are.", self.place, ", ".join(unread), known)
        return table

    def _refuse(self, rows: Series, values: Series, what: str) -> None:
        """Raise ValueError if there are such rows in the table."""
        if rows.any():
            shown = "; ".join(f"row {row + 1} ({values[row]!r})" for row in rows.index[rows][:5])
            msg = f"table='{self.place}': {rows.sum()} rows {what}: {shown}. Correct or remove them."
            raise ValueError(msg)


class FewShotFolder(FewShot):
    """Few-shot on the user's own images, each of which is used once: it is learnt from, validated or tested on.

    K images of each kind are drawn as the support, those with masks first, and the others are divided for validation
    and test. Where there are fewer than K, all are the support, and a warning says so. The log has a table of what the
    images are for. Abnormal images may lack masks. As a source of another protocol, all images are as if undivided.

    Args:
        root: Folder that the others are in.
        normal: Folder of normal images.
        abnormal: Folder of abnormal images; without it, only a memory bank of the normal ones is built.
        masks: Folder of masks of the abnormal images, under their names; there may be none.
        table: In place of root, a CSV file with the columns image, label (normal and abnormal, or 0 and 1) and, if
            wanted, mask, group and split. Paths are relative to its folder. A group, such as a patient, is never
            divided. With split (train and test), the test images are those, and the support is drawn from the others.
        name: Name under which results are filed, that of the root or table by default.
        test_split_ratio: Share of the images beside the support that are tested on; the others validate. A table's own
            split goes before it.
        kwargs: Arguments of :class:`~anomalib_mvfa.data.few_shot.FewShot` other than the source. With ``k_shot`` None,
            all images are the support, to predict on others. Support groups are whole ones, of K images or more.

    Raises:
        FileNotFoundError: The root, a folder or the table does not exist, or has no images.
        ValueError: There is no normal image; masks do not match; rows of the table are wrong; FewShot raises it.
    """

    needs_test = False

    def __init__(
        self,
        root: Path | str | None = None,
        normal: str = FOLDERS["normal"],
        abnormal: str | None = FOLDERS["abnormal"],
        masks: str | None = FOLDERS["masks"],
        table: Path | str | None = None,
        name: str | None = None,
        test_split_ratio: float = 0.5,
        **kwargs,  # noqa: ANN003
    ) -> None:
        check_bounds("test_split_ratio", test_split_ratio, 0, 1)
        images = OwnImages(root, {"normal": normal, "abnormal": abnormal, "masks": masks}, table, name)
        super().__init__(images, partial_masks=True, **kwargs)
        images.group_by, images.val_split_ratio = self.group_by, round(1 - test_split_ratio, 9)

    @property
    def as_source(self) -> AnomalibDataModule:
        """All images, which another protocol divides in its own way."""
        return self.source
