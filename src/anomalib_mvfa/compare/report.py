"""A report of a comparison: a self-contained HTML file, tables in Markdown, and a CSV file with one line per job."""

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from html import escape
from pathlib import Path

import pandas as pd
from jsonargparse import ArgumentParser

from ..io import atomic_write
from .page import facts, notices, percent, protocol, render
from .paper import PaperTable, paper_table
from .results import Row
from .summary import Cell, Outcome, Summary, Table, lacking, read_outcome, shots, summarise, tabulate_all

RANKED = {1: "**{}**", 2: "<u>{}</u>"}


def report(run: Path, resamples: int = 1000) -> Path:
    """Write index.html, results.md and results.csv to ``RUN/report``, each by an atomic write.

    Args:
        run: Folder of a comparison, see :mod:`anomalib_mvfa.compare.results`.
        resamples: Number of resamples of the bootstrap over test images.

    Returns:
        Path of the HTML report.

    Raises:
        FileNotFoundError: There is no such folder, or it holds no outcome.
        ValueError: No job has finished, ``resamples`` is below 1, or the config names a table that the paper does not
            have.
    """
    if resamples < 1:
        msg = f"resamples={resamples} must be at least 1."
        raise ValueError(msg)
    outcome = read_outcome(run)
    paper = paper_table(outcome.paper) if outcome.paper else None
    summaries = summarise(run, outcome.rows, outcome.group_by, resamples)
    files = {
        "results.csv": _csv(outcome.rows + outcome.failed),
        "results.md": _markdown(outcome, summaries, paper, resamples),
        "index.html": render(run, outcome, summaries, paper, resamples),
    }
    folder = run / "report"
    for name, text in files.items():
        with atomic_write(folder / name) as partial:
            partial.write_text(text, "utf-8", errors="backslashreplace")  # names of files may be no text
    return folder / "index.html"


def main(arguments: Sequence[str]) -> int:
    """Parse the command line, and write the report.

    Args:
        arguments: Arguments of the command line.

    Returns:
        Exit code.
    """
    parser = ArgumentParser(prog="anomalib-mvfa report", description="Write a comparison's report anew.")
    parser.add_argument("run", type=Path, help="Folder that `compare` wrote.")
    parser.add_argument(
        "--resamples", type=int, default=1000, help="Number of resamples of the bootstrap over test images."
    )
    options = parser.parse_args(list(arguments))
    try:
        page = report(options.run, options.resamples)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    sys.stdout.write(f"{page}\n")
    return 0


def _csv(rows: Sequence[Row]) -> str:
    table = pd.json_normalize([{**asdict(row), "config": json.dumps(row.config)} for row in rows])
    table["k_shot"] = table["k_shot"].astype("Int64")  # whole numbers, although some lack
    return table.to_csv(index=False, lineterminator="\n")


def _markdown(outcome: Outcome, summaries: Sequence[Summary], paper: PaperTable | None, resamples: int) -> str:
    over = f"groups of test images, {outcome.group_by}" if outcome.group_by else "test images"
    legend = (
        f"In percent: mean over seeds ± standard deviation [95 % interval over {resamples} resamples of {over}]; the "
        "best is bold, the second underlined."
    )
    if paper:
        legend += f" In parentheses: the paper's figure ({paper.title})."
    lines = [f"# {_plain(outcome.title)}", ""]
    for paragraph in (*notices(outcome, summaries).values(), legend, _origin(outcome)):
        lines += [_plain(paragraph), ""]
    for k_shot in shots(summaries):
        for title, table in tabulate_all(summaries, outcome, k_shot, paper).items():
            lines += [f"## {_plain(title)}" + (f", K = {k_shot}" if k_shot else ""), "", *_table(table), ""]
    if outcome.failed:
        lines += ["## Failed jobs", ""]
        lines += [f"- {_plain(_named(row))}: {_plain(row.error or '')}" for row in outcome.failed]
        lines += [""]
    if lacking(outcome):
        lines += [f"Not all jobs have ended: {sum(len(seeds) for *_, seeds in lacking(outcome))} lack.", ""]
    return "\n".join(lines)


def _origin(outcome: Outcome) -> str:
    """Return where the numbers come from."""
    known = facts(outcome)
    parts = {
        "Seeds": known["seeds"],
        "commit": known["commits"] or ["not from a checkout"],
        "device": known["devices"],
        "date": known["dates"],
        "versions": [f"{name} {' / '.join(found)}" for name, found in known["versions"].items()],
        "test images": [f"{name} {digest[:12]}" for name, found in known["test_sets"].items() for digest in found],
        "configuration": ["../config.yaml"],
    }
    return "; ".join(f"{name} {', '.join(map(str, values))}" for name, values in parts.items() if values) + "."


def _named(row: Row) -> str:
    shot = "" if row.k_shot is None else f", K = {row.k_shot}"
    return f"{row.method}, {row.category}{shot}, seed {row.seed}"


def _table(table: Table) -> list[str]:
    average = ["Average"] * (len(table.categories) > 1)
    header = ["Learns from", "Method"]
    header += [_plain(name) + " ‡" * (name in table.unlike) for name in table.categories] + average
    lines = [header, ["---"] * 2 + ["---:"] * (len(header) - 2)]
    for line in table.lines:
        cells = [*line.cells.values(), *([line.average] if average else [])]
        lines.append([protocol(line.protocol)[0], _plain(line.method) + " †" * line.random_weights, *map(_cell, cells)])
    return [f"| {' | '.join(line)} |" for line in lines]


def _cell(cell: Cell) -> str:
    text = "-"
    if cell.figure:
        text = RANKED.get(cell.rank or 0, "{}").format(percent(cell.figure.mean))
        if cell.figure.spread is not None:
            text += f" ± {percent(cell.figure.spread)}"
        if cell.figure.interval:
            low, high = map(percent, cell.figure.interval)
            text += f" [{low}, {high}]"
    return text if cell.paper is None else f"{text} ({percent(cell.paper)})"


def _plain(text: str) -> str:
    """Escape what Markdown, or the HTML in it, would take for markup."""
    text = " ".join(escape(text, quote=False).split())
    for mark in "\\`*_[]|":
        text = text.replace(mark, f"\\{mark}")
    return text
