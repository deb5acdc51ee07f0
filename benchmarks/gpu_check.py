"""What a GPU does with MVFA, in one table: ``make gpu-check``. See docs/gpu.md.

Four parts, of which each is measured even if another fails: the tests that need a GPU, speed beside the published
loop, a profile of training and test steps, and a few-shot run by the command line.
"""

import argparse
import csv
import json
import math
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from common import CONFIGS, arguments, fill_bank, profiled, training_step
from goals import COPIES, judged, table
from speed import SHOTS, TESTED, TRAINED, Figures, measure, random_model, scoring

from anomalib_mvfa.io import commit, device_name, versions

ROOT = CONFIGS.parent
REAL_IMAGES = [folder / "shared" / "data" / "bmad_mini" for folder in (ROOT.parent, ROOT)]
KERNELS = 10
TEST_LIMIT, RUN_LIMIT = 150, 120
"""Most seconds of the tests and of the few-shot run."""


def main(words: Sequence[str] | None = None) -> int:
    """Run all parts, write ``gpu_check.json`` and ``gpu_check.md``, and return 1 if a part has failed."""
    options = arguments(__doc__, Path("results/gpu_check"), words)
    options.output = options.output.resolve()  # commands run in the root of the checkout
    options.output.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"tiny": options.tiny, "figures": {}, "errors": {}, "seconds": {}}
    for name, part in PARTS.items():
        sys.stdout.write(f"{name} ...\n")
        sys.stdout.flush()
        start = time.monotonic()
        figures = report["figures"][name] = {}
        try:
            part(options, figures)
        except Exception as error:  # noqa: BLE001  # whatever it is, the other parts are still measured
            report["errors"][name] = " ".join(f"{type(error).__name__}: {error}".split())
        report["seconds"][name] = round(time.monotonic() - start, 1)
        report["goals"] = judged(report["figures"], judge_all=options.device == "cuda" and not options.tiny)
        (options.output / "gpu_check.json").write_text(json.dumps(report, indent=2) + "\n")  # after every part
        (options.output / "gpu_check.md").write_text(table(report))
    sys.stdout.write(table(report))
    return 1 if report["errors"] else 0


def describe_device(options: argparse.Namespace, figures: Figures) -> None:
    """Say what the figures were measured on."""
    figures.update({"commit": commit(), **versions(), "CUDA": torch.version.cuda, "driver": None})
    figures["device"] = device_name(torch.device(options.device))
    if options.device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        figures["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip()  # noqa: S603


def run_tests(options: argparse.Namespace, figures: Figures) -> None:
    """Run the tests that need a GPU; on a CPU, the same bodies there."""
    command = [sys.executable, "-m", "pytest", "-q", "-rfEs", "--continue-on-collection-errors"]
    if options.device == "cuda":
        command += ["-m", "gpu"]
    if options.tiny:
        command += ["tests/test_gpu.py", "-k", "distances or full_precision"]
    log, _ = _run(command, options.output / "tests.log", TEST_LIMIT)
    counts = {kind: int(count) for count, kind in re.findall(r"(\d+) (passed|failed|skipped|error)", log[-300:])}
    figures["passed"], figures["skipped"] = counts.get("passed", 0), counts.get("skipped", 0)
    figures["failed"] = counts.get("failed", 0) + counts.get("error", 0)
    if figures["failed"] or not figures["passed"]:
        failures = re.findall(r"^(?:FAILED|ERROR) (\S+)", log, re.MULTILINE)
        msg = f"{figures['failed']} tests failed, {figures['passed']} passed; see tests.log. {', '.join(failures)}"
        raise RuntimeError(msg)


def profile_steps(options: argparse.Namespace, figures: Figures) -> None:
    """Profile training steps and test batches: copies, gaps between kernels, the longest kernels."""
    model = random_model(options.device, options.tiny)
    _profile("training step", training_step(model, TRAINED[-1], options), options, figures)
    fill_bank(model, SHOTS[0])
    _profile("test batch", scoring(model, TESTED[-1], options), options, figures)


def _profile(name: str, run: Callable[[], Any], options: argparse.Namespace, figures: Figures) -> None:
    copies, idle, kernels = profiled(run, options.steps, options.device)
    figures[f"{name}: {COPIES}"] = copies
    figures[f"{name}: share of time without a kernel"] = idle
    for place, (kernel, duration) in enumerate(kernels[:KERNELS], 1):
        figures[f"{name}: kernel {place}, ms per step"] = f"{1000 * duration:.3g}: {kernel[:90]}"


def run_few_shot(options: argparse.Namespace, figures: Figures) -> None:
    """Train and test by the command line, on real images if there are any, else on drawn ones."""
    settings = {
        **_data(REAL_IMAGES),
        "--data.k_shot": 2 if options.tiny else 4,
        "--data.train_batch_size": 16,
        "--data.num_workers": 0 if options.tiny else 8,
        "--model": "Mvfa",
        "--model.max_epochs": 1 if options.tiny else 50,
        "--model.visualizer": "false",
        "--trainer.accelerator": options.device,
        "--trainer.precision": "bf16-mixed",
        "--trainer.enable_progress_bar": "false",
        "--trainer.logger": "lightning.pytorch.loggers.CSVLogger",
        "--trainer.logger.save_dir": options.output / "run",
        "--default_root_dir": options.output / "run",
    }
    if options.tiny:
        settings |= {"--model.backbone": CONFIGS / "demo_clip.json", "--model.image_size": 112}
    if options.tiny or "ANOMALIB_MVFA_PRETRAINED" not in os.environ:
        settings["--model.pretrained"] = "null"
    figures["images"] = settings.get("--data.root", "drawn")
    figures["weights"] = "random" if "--model.pretrained" in settings else os.environ["ANOMALIB_MVFA_PRETRAINED"]
    # As `anomalib train` does, but also where the start-up hook is not installed.
    start = "import sys; from anomalib_mvfa.plugin import main; sys.exit(main())"
    command = [sys.executable, "-c", start, "train", *(str(part) for setting in settings.items() for part in setting)]
    began, clock = time.time(), time.monotonic()
    log, code = _run(command, options.output / "run.log", RUN_LIMIT)
    figures["wall time, s"] = time.monotonic() - clock
    tables = [path for path in (options.output / "run").rglob("metrics.csv") if path.stat().st_mtime >= began]
    rows = [row for path in tables for row in csv.DictReader(path.open())]
    found = {name: float(row[name]) for row in rows for name in ("image_AUROC", "pixel_AUROC") if row.get(name)}
    if code or not found or not all(map(math.isfinite, found.values())):
        errors = re.findall(r"^(?:\w+\.)*\w*Error.*", log, re.MULTILINE)
        msg = f"exit code {code}, figures {found}; see run.log. {' '.join(errors[-1:])}"
        raise RuntimeError(msg)
    figures.update(found)


def _data(folders: Sequence[Path]) -> dict[str, Any]:
    """Return settings for Brain in the first folder that exists, else for drawn images."""
    for folder in folders:
        if folder.is_dir():
            return {"--data": "BMADFewShot", "--data.root": str(folder), "--data.category": "Brain"}
    return {"--data": "FewShot", "--data.source": "Phantom"}


def _run(command: Sequence[str], log: Path, limit: float) -> tuple[str, int]:
    """Run a command in the checkout, which gets no input; return what it printed and its exit code."""
    streams: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stderr": subprocess.STDOUT}
    with log.open("w") as file:
        done = subprocess.run(command, cwd=ROOT, stdout=file, timeout=limit, check=False, **streams)  # noqa: S603
    return log.read_text(errors="replace"), done.returncode


PARTS: dict[str, Callable[[argparse.Namespace, Figures], None]] = {
    "device": describe_device,
    "tests": run_tests,
    "speed": measure,
    "profile": profile_steps,
    "few-shot run": run_few_shot,
}


if __name__ == "__main__":
    sys.exit(main())
