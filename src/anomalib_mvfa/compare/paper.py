"""The paper's figures, beside which a comparison can be put.

``paper.csv`` has them as published, AUROC in percent: Huang et al., "Adapting Visual-Language Models for Generalizable
Anomaly Detection in Medical Images", CVPR 2024. Columns "bmad" and "mvtec" are averages. MVFA's 98.07 in Table 3 is
98.67 in Table 5, which is also the average of Table 1. An alias is a method's name in anomalib or in a comparison.
"""

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from anomalib.data.datasets.image.mvtecad import CATEGORIES as MVTEC

from ..data.bmad import CATEGORIES as BMAD

FILE = Path(__file__).with_name("paper.csv")
TITLES = {f"table{number}": f"Table {number}" for number in range(1, 6)} | {"figure3": "Figure 3"}
NOTE = """As published ({title}), on the paper's own test images. The paper took the epoch that is best on the test set,
and scaled scores by their range over the whole test set."""
NOT_PRINTED = " The paper prints no numbers here: these are a follow-up work's. At K = 4 they agree with Table 1."
SETS = {
    "bmad": {"image": {*BMAD}, "pixel": {name for name, category in BMAD.items() if category.has_masks}},
    "mvtec": {"image": {*MVTEC}, "pixel": {*MVTEC}},
}
"""Categories that the printed averages are over."""


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables: a note of where it comes from, and its lines of ``paper.csv``."""

    note: str
    figures: pd.DataFrame

    def figure(self, metric: str, method: str, protocol: str, k_shot: int | None, categories: Collection[str]) -> float:
        """Return "image_AUROC" or "pixel_AUROC" in [0, 1], NaN where the paper has none for this protocol and K.

        Of several categories it is their average, the printed one if there is one. Letter case and punctuation of the
        method's name do not matter, nor does K where the protocol has no shots.
        """
        table, level = self.figures, metric.removesuffix("_AUROC")
        has_shots = table.k_shot.isna() | (table.k_shot == k_shot)
        found = table[has_shots & (table.level == level) & (table.protocol == protocol)]
        found = found[(found[["method", "alias"]].map(_plain) == _plain(method)).any(axis=1)]
        printed = [name for name, levels in SETS.items() if levels.get(level) == {*categories}]
        for names in (printed, [*categories]):
            figures = found.reindex(columns=names).to_numpy(float)
            if figures.size and np.isfinite(figures).all():
                return float(figures.mean() / 100)
        return np.nan


def paper_table(name: str) -> PaperTable:
    """Return one of the paper's tables; ValueError if there is none of this name."""
    if name not in TITLES:
        msg = f"paper={name!r} is not a table of the paper. Choose from: {', '.join(TITLES)}, or null."
        raise ValueError(msg)
    figures = pd.read_csv(FILE, dtype={"k_shot": "Int64"}).fillna({"alias": ""})
    note = NOTE.format(title=TITLES[name]) + NOT_PRINTED * (name == "figure3")
    return PaperTable(note, figures[figures.table == name])


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()
