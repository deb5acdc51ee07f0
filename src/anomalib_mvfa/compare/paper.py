"""The paper's figures, beside which a comparison can be put."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

FILE = Path(__file__).with_name("paper.yaml")


@dataclass(frozen=True)
class PaperTable:
    """One of the paper's tables.

    Args:
        title: Its name in the paper.
        note: Where the figures come from, if not from the paper itself.
        figures: Entries with "method", "protocol", "k_shot", "image" and "pixel", AUROC in percent by category.
        sets: Categories that an average is over, by the average's name.
        aliases: Other names of methods.
    """

    title: str
    note: str | None
    figures: list[dict[str, Any]]
    sets: Mapping[str, list[str]]
    aliases: Mapping[str, list[str]]

    def figure(self, level: str, method: str, protocol: str, k_shot: int | None, category: str) -> float | None:
        """Return an AUROC in percent, or None where the paper has none for this method, protocol and K.

        Args:
            level: "image" or "pixel".
            method: Letter case and punctuation do not matter.
            protocol: See :class:`~anomalib_mvfa.compare.results.Row`.
            k_shot: K, or None where the protocol has no shots.
            category: Name of a category.
        """
        return self._values(level, method, protocol, k_shot).get(category)

    def average(
        self,
        level: str,
        method: str,
        protocol: str,
        k_shot: int | None,
        categories: Sequence[str],
        tested: Iterable[str],
    ) -> float | None:
        """Return the average over categories, printed or computed from what is printed.

        Args:
            level: "image" or "pixel".
            method: As in :meth:`figure`.
            protocol: As in :meth:`figure`.
            k_shot: As in :meth:`figure`.
            categories: That have this level; averaged over if the paper prints each of them.
            tested: All categories of the comparison: a printed average is one over all that the paper tests.
        """
        values = self._values(level, method, protocol, k_shot)
        printed = [values[name] for name, members in self.sets.items() if name in values and set(members) == {*tested}]
        if printed:
            return printed[0]
        return float(np.mean([values[name] for name in categories])) if {*categories} <= {*values} else None

    def _values(self, level: str, method: str, protocol: str, k_shot: int | None) -> dict[str, float]:
        for entry in self.figures:
            names = {_plain(name) for name in (entry["method"], *self.aliases.get(entry["method"], []))}
            if _plain(method) in names and (entry["protocol"], entry["k_shot"]) == (protocol, k_shot):
                return entry[level]
        return {}


def paper_table(name: str) -> PaperTable:
    """Return one of the paper's tables.

    Raises:
        ValueError: There is none of this name.
    """
    paper = yaml.safe_load(FILE.read_text("utf-8"))
    if name not in paper["tables"]:
        msg = f"paper={name!r} is not a table of the paper. Choose from: {', '.join(paper['tables'])}, or null."
        raise ValueError(msg)
    table = paper["tables"][name]
    return PaperTable(table["title"], table.get("note"), table["figures"], paper["sets"], paper["aliases"])


def _plain(name: str) -> str:
    return re.sub(r"[\W_]", "", name).casefold()
