"""The paper's figures, beside which a comparison can be put.

``paper.csv`` has them as published, AUROC in percent: Huang et al., "Adapting Visual-Language Models for Generalizable
Anomaly Detection in Medical Images", CVPR 2024. Columns "bmad" and "mvtec" are averages. MVFA's 98.07 in Table 3 is
98.67 in Table 5, which is also the average of Table 1.
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
NOTES = {"figure3": "The paper prints no numbers here: these are a follow-up work's. At K = 4 they agree with Table 1."}
SETS = {"bmad": {*BMAD}, "mvtec": {*MVTEC}}
ALIASES = {
    "CFlowAD": "Cflow",
    "RD4AD": "ReverseDistillation",
    "adapters": "MVFA",
    "projectors": "MVFA projectors",
    "all levels": "MVFA",
}
"""Other names of the paper's methods, as anomalib or a comparison may call them."""


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables.

    Args:
        title: Its name in the paper.
        note: Where the figures come from, if not from the paper itself.
        figures: Its lines of ``paper.csv``.
    """

    title: str
    note: str | None
    figures: pd.DataFrame

    def figure(self, level: str, method: str, protocol: str, k_shot: int | None, category: str) -> float:
        """Return an "image" or "pixel" AUROC in [0, 1], NaN where the paper has none for this protocol and K.

        Letter case and punctuation of the method's name do not matter, nor does K where the protocol has no shots.
        """
        table, plain = self.figures, _plain(method)
        named = np.array([plain in {_plain(name), _plain(ALIASES.get(name, name))} for name in table.method])
        has_shots = table.k_shot.isna() | (table.k_shot == k_shot)
        found = table[named & has_shots & (table.level == level) & (table.protocol == protocol)]
        return found[category].iloc[0] / 100 if len(found) and category in {*BMAD, *SETS} else np.nan

    def average(
        self,
        level: str,
        method: str,
        protocol: str,
        k_shot: int | None,
        categories: Collection[str],
        tested: Collection[str],
    ) -> float:
        """Return the printed average over all that is ``tested``, or else the mean over the level's ``categories``."""
        printed = [self.figure(level, method, protocol, k_shot, name) for name in SETS if SETS[name] == {*tested}]
        if np.isfinite(printed).any():
            return printed[0]
        return float(np.mean([self.figure(level, method, protocol, k_shot, name) for name in categories]))


def paper_table(name: str) -> PaperTable:
    """Return one of the paper's tables.

    Raises:
        ValueError: There is none of this name.
    """
    if name not in TITLES:
        msg = f"paper={name!r} is not a table of the paper. Choose from: {', '.join(TITLES)}, or null."
        raise ValueError(msg)
    figures = pd.read_csv(FILE)
    return PaperTable(TITLES[name], NOTES.get(name), figures[figures.table == name])


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()
