"""``anomalib-mvfa repeat``: train and test with several seeds, and say how far to trust the mean."""

import json
import re
from argparse import ArgumentParser, ArgumentTypeError, BooleanOptionalAction
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from anomalib.callbacks import ModelCheckpoint
from lightning.pytorch import Trainer
from rich.console import Console
from rich.table import Table

from ..io import atomic_write, commit, dataset_digest, device_name, versions
from .bootstrap import METRICS, ScoreRecorder, Scores, bootstrap


class EveryEpoch(ModelCheckpoint):
    """Keeps the checkpoint of every epoch, in addition to those that the user asks for."""

    def __init__(self) -> None:
        super().__init__(save_top_k=-1, filename="every_epoch/{epoch}")


def main(arguments: Sequence[str]) -> None:
    """Run ``anomalib train`` once per seed, and print and save means, spreads and intervals.

    Args:
        arguments: Options of this command, and those of ``anomalib train``.
    """
    parser = ArgumentParser(
        prog="anomalib-mvfa repeat",
        description="Train and test once per seed. All further options are those of `anomalib train`.",
    )
    parser.add_argument("--seeds", type=_seeds, default=[0, 1, 2], help="comma-separated; model.seed and data.seed")
    parser.add_argument(
        "--resamples", type=int, default=1000, help="number of resamples of the bootstrap over test images"
    )
    parser.add_argument("--output", type=Path, default=Path("results/repeat.json"))
    parser.add_argument(
        "--select_epoch_on_test",
        action=BooleanOptionalAction,
        default=False,
        help="also test every epoch and report the best, as the published numbers do; optimistic",
    )
    own, train = parser.parse_known_args(arguments)
    if own.resamples < 1:
        parser.error(f"--resamples {own.resamples} must be at least 1")
    if own.output.is_dir() or any(parent.exists() and not parent.is_dir() for parent in own.output.parents):
        parser.error(f"--output {own.output} must be a file that can be written, such as results/repeat.json")

    runs, scores = [], []
    for seed in own.seeds:
        run, tested, group_by = _run(seed, train, own.select_epoch_on_test)
        runs.append(run)
        scores.append(tested)
        # Written after each seed, so that a run cut short loses nothing.
        report = _report(train, runs, bootstrap(scores, group_by, own.resamples), group_by, own.resamples)
        with atomic_write(own.output) as partial:
            partial.write_text(json.dumps(report, indent=2))
    _show(report, own.output)


def _seeds(text: str) -> list[int]:
    seeds = [int(seed) for seed in text.split(",")] if re.fullmatch(r"\d+(,\d+)*", text) else []
    if not seeds or len(set(seeds)) < len(seeds):
        msg = f"{text!r} must be different whole numbers with commas between, such as 0,1,2"
        raise ArgumentTypeError(msg)
    return seeds


def _run(seed: int, train: Sequence[str], every_epoch: bool) -> tuple[dict[str, Any], Scores, str | None]:
    """Train and test with one seed."""
    from anomalib.cli.cli import AnomalibCLI

    options = [*train, f"--model.seed={seed}", f"--data.seed={seed}"]
    options += [f"--trainer.callbacks+={ScoreRecorder.__module__}.{ScoreRecorder.__name__}"]
    if every_epoch:
        options += [f"--trainer.callbacks+={EveryEpoch.__module__}.{EveryEpoch.__name__}"]
    cli = AnomalibCLI(["train", *options])
    trainer: Any = cli.engine.trainer  # Lightning sets its `callbacks` where type checkers do not see it
    recorder = next(callback for callback in trainer.callbacks if isinstance(callback, ScoreRecorder))
    run = {
        "seed": seed,
        "device": device_name(trainer.strategy.root_device),
        "train_set": dataset_digest(getattr(cli.datamodule, "train_data", None)),
        "test_set": dataset_digest(getattr(cli.datamodule, "test_data", None)),
        "epochs": trainer.current_epoch,
        "config": yaml.safe_load(cli.parser.dump(cli.config))["train"],
        "settings": asdict(cli.model.settings) if hasattr(cli.model, "settings") else None,
        "last_epoch": _figures(trainer),
    }
    scores = recorder.scores  # of the last epoch; further tests begin anew
    if every_epoch:
        run["selected_on_test"] = _best_epoch(cli)
    return run, scores, getattr(cli.datamodule, "group_by", None)


def _best_epoch(cli: Any) -> dict[str, Any]:  # noqa: ANN401  # AnomalibCLI, whose import is slow
    """Test every epoch's checkpoint; the published criterion is image plus pixel AUROC."""
    callback = next(c for c in cli.engine.trainer.checkpoint_callbacks if isinstance(c, EveryEpoch))
    checkpoints = Path(callback.dirpath or ".").glob("every_epoch/epoch=*.ckpt")
    tested = []
    for epoch, path in sorted((int(path.stem.split("=")[1]) + 1, path) for path in checkpoints):
        cli.engine.test(model=cli.model, datamodule=cli.datamodule, ckpt_path=path, verbose=False)
        tested.append({"epoch": epoch, **_figures(cli.engine.trainer)})
    return max(tested, key=lambda row: sum(row.get(name, 0.0) for name in METRICS), default={})


def _figures(trainer: Trainer) -> dict[str, float]:
    names = [name for name in trainer.callback_metrics if name.startswith(("image_", "pixel_"))]
    return {name: float(trainer.callback_metrics[name]) for name in names}


def _report(
    train: Sequence[str],
    runs: list[dict[str, Any]],
    intervals: dict[str, list[float]],
    group_by: str | None,
    resamples: int,
) -> dict[str, Any]:
    def summary(which: str) -> dict[str, dict[str, Any]]:
        values = {name: [run[which][name] for run in runs] for name in runs[0][which] if name != "epoch"}
        return {name: {"mean": float(np.mean(row)), "min": min(row), "max": max(row)} for name, row in values.items()}

    last = summary("last_epoch")
    for name, interval in intervals.items():
        last[name]["interval_95"] = interval
    report = {
        "commit": commit(),
        "versions": versions(),
        "command": ["anomalib", "train", *train],
        "calibration": (runs[0]["settings"] or {}).get("calibration"),
        "bootstrap": {"over": group_by or "images", "resamples": resamples},
        "last_epoch": last,
        "runs": runs,
    }
    if "selected_on_test" in runs[0]:
        report["selected_on_test"] = {
            "note": "Epochs chosen by the test images' own labels: optimistic, to compare with published numbers only.",
            **summary("selected_on_test"),
        }
    return report


def _show(report: dict[str, Any], output: Path) -> None:
    seeds = ", ".join(str(run["seed"]) for run in report["runs"])
    table = Table(title=f"Last epoch, seeds {seeds}, calibration {report['calibration']}")
    for column in ("metric", "mean", "min", "max", f"95 % interval over {report['bootstrap']['over']}"):
        table.add_column(column)
    for name, row in report["last_epoch"].items():
        low, high = row.get("interval_95", (None, None))
        numbers = [f"{row[key]:.4f}" for key in ("mean", "min", "max")]
        table.add_row(name, *numbers, f"{low:.4f} to {high:.4f}" if low is not None else "")
    console = Console()
    console.print(table)
    if "selected_on_test" in report:
        chosen = report["selected_on_test"]
        means = ", ".join(f"{name} {row['mean']:.4f}" for name, row in chosen.items() if name in METRICS)
        console.print(f"Epoch selected on the test images (optimistic): {means}")
    console.print(f"Saved as {output}")
