"""The paper's figures, beside which a comparison can be put.

``paper.csv`` has them as published: AUROC in percent, one line per table, method and level. Its columns "bmad" and
"mvtec" are averages over these sets. Huang et al., "Adapting Visual-Language Models for Generalizable Anomaly Detection
in Medical Images", CVPR 2024. MVFA's 98.07 of Table 3 is 98.67 in Table 5, which is also the average of Table 1.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

FILE = Path(__file__).with_name("paper.csv")
NOTES = {
    "figure3": "The paper prints no numbers here: these are a follow-up work's. At K = 4 they agree with Table 1.",
}
BMAD = {"Brain", "Liver", "Retina_RESC", "Retina_OCT2017", "Chest", "Histopathology"}
MVTEC = set(
    "bottle cable capsule carpet grid hazelnut leather metal_nut pill screw tile toothbrush transistor wood "
    "zipper".split()
)
ALIASES = {
    "cflow": {"cflowad"},
    "reversedistillation": {"rd4ad"},
    "mvfa": {"mvfa", "adapters", "alllevels"},
    "mvfaprojectors": {"projectors"},
}
"""The paper's names of methods that anomalib or a comparison may call otherwise."""


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables.

    Args:
        title: Its name in the paper.
        note: Where the figures come from, if not from the paper itself.
        figures: The lines of ``paper.csv``.
    """

    title: str
    note: str | None
    figures: pd.DataFrame

    def figure(self, level: str, method: str, protocol: str, k_shot: int | None, category: str) -> float:
        """Return an AUROC in [0, 1], NaN where the paper has none for this method, protocol and K.

        Args:
            level: "image" or "pixel".
            method: Letter case and punctuation do not matter.
            protocol: See :class:`~anomalib_mvfa.compare.results.JobResult`.
            k_shot: K, or None where the protocol has no shots.
            category: Name of a category, or a set's column.
        """
        table, plain = self.figures, _plain(method)
        names = table.method.map(_plain).isin(ALIASES.get(plain, set()) | {plain})
        fits = names & (table.level == level) & (table.protocol == protocol) & (table.k_shot.fillna(0) == (k_shot or 0))
        return float(table.loc[fits, category].iloc[0]) / 100 if fits.any() and category in table else np.nan

    def average(
        self, level: str, method: str, protocol: str, k_shot: int | None, categories: Sequence[str], tested: Iterable[str]
    ) -> float:
        """Return the average over categories, printed or computed from what is printed; NaN where there is none.

        Args:
            level: As in :meth:`figure`.
            method: As in :meth:`figure`.
            protocol: As in :meth:`figure`.
            k_shot: As in :meth:`figure`.
            categories: That have this level.
            tested: All categories of the comparison: a printed average is over all that the paper tests.
        """
        printed = {"bmad": BMAD, "mvtec": MVTEC}
        whole = [column for column, members in printed.items() if members == {*tested}]
        values = [self.figure(level, method, protocol, k_shot, column) for column in whole]
        if values and not np.isnan(values[0]):
            return values[0]
        return float(np.mean([self.figure(level, method, protocol, k_shot, name) for name in categories]))


def paper_table(name: str) -> PaperTable:
    """Return one of the paper's tables.

    Raises:
        ValueError: There is none of this name.
    """
    figures = pd.read_csv(FILE)
    names = list(figures.table.unique())
    if name not in names:
        msg = f"paper={name!r} is not a table of the paper. Choose from: {', '.join(names)}, or null."
        raise ValueError(msg)
    title = re.sub(r"(\d)", r" \1", name).capitalize()
    return PaperTable(title, NOTES.get(name), figures[figures.table == name])


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()
