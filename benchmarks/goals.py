"""The goals of the GPU check, and its table."""

from typing import Any

SHARE = "share of the matmul rate"
SPEEDUP = "times the published images/s"
COPIES = "copies between host and device per step"
GOALS = {
    ("tests", "failed"): ("<=", 0),
    ("speed", f"training, batch 16: {SPEEDUP}"): (">=", 20),
    ("speed", f"training, batch 16: {SHARE}"): (">=", 0.6),
    ("speed", f"test, batch 32, K = 4: {SPEEDUP}"): (">=", 10),
    ("speed", f"test, batch 32, K = 4: {SHARE}"): (">=", 0.6),
    ("speed", f"test, batch 32, K = 16: {SPEEDUP}"): (">=", 10),
    ("profile", f"training step: {COPIES}"): ("<=", 1),  # the logged loss
    ("profile", f"test batch: {COPIES}"): ("<=", 0),
}
"""Part and name of a figure: what it should be."""


def judged(figures: dict[str, dict[str, Any]], judge_all: bool) -> list[dict[str, str]]:
    """Compare figures with their goals.

    Args:
        figures: Figures of every part.
        judge_all: Whether speed and copies count: those of a GPU with ViT-L do.
    """
    goals = []
    for (part, name), (sign, bound) in GOALS.items():
        value = figures.get(part, {}).get(name)
        status = "not measured"
        if value is not None and (judge_all or part == "tests"):
            status = "met" if (value >= bound if sign == ">=" else value <= bound) else "missed"
        goals.append({"part": part, "figure": name, "goal": f"{sign} {bound:g}", "status": status})
    return goals


def table(report: dict[str, Any]) -> str:
    """Return figures, goals and errors of a report as a Markdown table."""
    goals = {(goal["part"], goal["figure"]): (goal["goal"], goal["status"]) for goal in report["goals"]}
    values = {(part, name): value for part, found in report["figures"].items() for name, value in found.items()}
    rows = [(*key, value, *goals.get(key, ("", ""))) for key, value in values.items()]
    rows += [(*key, None, *goal) for key, goal in goals.items() if key not in values]
    rows += [(part, "error", message, "", "failed") for part, message in report["errors"].items()]
    lines = ["| part | figure | value | goal | status |", "| --- | --- | --- | --- | --- |"]
    return "\n".join([*lines, *(f"| {' | '.join(map(_cell, row))} |" for row in rows)]) + "\n"


def _cell(value: Any) -> str:  # noqa: ANN401  # a figure or a text
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value).replace("|", "\\|")
