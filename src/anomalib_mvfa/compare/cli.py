"""The commands ``compare``, ``report`` and ``repeat`` of ``anomalib-mvfa``."""

import argparse
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser
from rich.console import Console

from ..callbacks import TERMINATED
from ..plugin import COMMANDS
from .config import Comparison, Method
from .job import Job, finished_result, identify, jobs_of
from .report import report
from .runner import compare, duration

INTERRUPTED = 128 + signal.SIGINT
"""Exit code after Ctrl-C, as shells have it."""

LISTS = {"categories": str, "k_shots": int, "seeds": int}
"""Lists of a comparison that the command line may give in place of the file, and the type of their values."""
OTHERS = {"weights": dict[str, str | None], "reference": str, "accelerator": str}
"""Other arguments that it may give."""


def main(command: str, arguments: Sequence[str]) -> int:
    """Run a command.

    Args:
        command: "compare", "report" or "repeat".
        arguments: What follows it on the command line.

    Returns:
        Exit code: 0 if every job has finished, 1 if one has not, 130 after Ctrl-C, 143 after SIGTERM.
    """
    kind = argparse.ArgumentParser if command == "repeat" else ArgumentParser  # jsonargparse's takes no unknown options
    parser: Any = kind(prog=f"anomalib-mvfa {command}", description=COMMANDS[command])
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    try:
        return {"compare": _compare, "report": _report, "repeat": _repeat}[command](parser, [*arguments])
    except (ValueError, OSError, RuntimeError) as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        code = INTERRUPTED
    except SystemExit as stop:
        if stop.code != TERMINATED:
            raise
        code = TERMINATED
    finally:
        signal.signal(signal.SIGTERM, before)
    sys.stderr.write("Interrupted. The same command goes on with the jobs that are missing.\n")
    return code


def _compare(parser: ArgumentParser, arguments: list[str]) -> int:
    parser.add_argument("--config", type=Path, required=True, help="YAML file of a comparison, see configs/compare.")
    for name in LISTS:
        parser.add_argument(f"--{name}", type=str | None, help="Replaces the file's; commas between several.")
    for name, kind in OTHERS.items():
        parser.add_argument(f"--{name}", type=kind, default=None, help="Replaces the value in the file.")
    parser.add_argument("--output", type=Path | None, help="Folder of the results; by default named by the file.")
    parser.add_argument("--workers", type=int | None, help="Jobs at a time; by default one for each GPU.")
    parser.add_argument("--dry_run", action="store_true", help="List the jobs, and which of them have finished.")
    options = parser.parse_args(arguments)
    output = options.output or Path("results/compare", options.config.stem)
    given = {name: options[name] for name in (*LISTS, *OTHERS) if options[name] is not None}
    overrides = {name: _several(value, LISTS[name]) if name in LISTS else value for name, value in given.items()}
    comparison = Comparison.load(options.config, **overrides)
    return _list(jobs_of(comparison), output) if options.dry_run else _run(comparison, output, options.workers)


def _several(text: str, kind: type) -> list[Any]:
    """Return values with commas between, in brackets or not; what is no number stays, for the error to name."""
    parts = [part.strip(" '\"") for part in text.strip("[] ").split(",")]
    return [kind(part) if part.lstrip("-").isdigit() else part for part in parts]


def _report(parser: ArgumentParser, arguments: list[str]) -> int:
    parser.add_argument("run", type=Path, help="Folder that `compare` or `repeat` wrote.")
    parser.add_argument("--resamples", type=int, default=1000, help="Number of resamples of the bootstrap.")
    options = parser.parse_args(arguments)
    sys.stdout.write(f"Report: {report(options.run, options.resamples)}\n")
    return 0


def _repeat(parser: Any, arguments: list[str]) -> int:  # noqa: ANN401  # argparse's
    parser.add_argument("--seeds", default="0,1,2", help="Seeds of the model and the datamodule, with commas between.")
    parser.add_argument("--output", type=Path, default=Path("results/repeat"), help="Folder of the results.")
    parser.add_argument("--workers", type=int, help="Jobs at a time; by default one for each GPU.")
    parser.add_argument(
        "--select_epoch_on_test",
        action="store_true",
        help="Report the best epoch on the test images, as the published figures do; optimistic.",
    )
    parser.epilog = "All further options are those of `anomalib train`."
    options, train = parser.parse_known_args(arguments)
    model, data, trainer = _train_configuration(train)
    accelerator = trainer.pop("accelerator", "auto")
    name, seeds = model["class_path"].rpartition(".")[2], _several(options.seeds, int)
    comparison = Comparison(
        methods={name: Method("own_split", model, trainer=trainer)},
        data=data,
        seeds=seeds,
        group_by=data["init_args"].get("group_by"),
        select_epoch_on_test=options.select_epoch_on_test,
        accelerator=accelerator,
        title=f"{name} with {len(seeds)} seeds",
    )
    return _run(comparison, options.output, options.workers)


def _train_configuration(arguments: list[str]) -> list[dict[str, Any]]:
    """Return the model, the data and the trainer that options of ``anomalib train`` ask for."""
    from anomalib.cli.cli import AnomalibCLI

    class Parsed(AnomalibCLI):
        """Parses, and builds nothing."""

        def instantiate_classes(self) -> None:
            """Leave that to the jobs."""

    cli = Parsed(["train", *arguments], run=False)
    config = yaml.safe_load(cli.parser.dump(cli.config, skip_none=False, skip_link_targets=False))["train"]
    defaults = cli.subcommand_parsers["train"].get_defaults().trainer
    by_job = {"callbacks", "logger", "default_root_dir"}
    trainer = {
        name: value for name, value in config["trainer"].items() if name not in by_job and value != defaults.get(name)
    }
    for part in ("model", "data"):
        config[part]["init_args"].pop("seed", None)  # each job has its own
    return [config["model"], config["data"], trainer]


def _run(comparison: Comparison, output: Path, workers: int | None) -> int:
    """Run a comparison and report; return 1 if a job has not finished."""
    results = compare(comparison, output, workers)
    for result in results:
        if not result.finished:
            Console().print(f"{result.status}: {result.job}: {result.error or ''}", style="red", markup=False)
    if any(result.finished for result in results):
        sys.stdout.write(f"Report: {report(output)}\n")
    return 0 if all(result.finished for result in results) else 1


def _list(jobs: list[Job], output: Path) -> int:
    """Print the jobs, one per line, and which of them have finished, as far as the data are there."""
    try:
        digests = identify(jobs)
    except FileNotFoundError as error:
        digests = {}
        sys.stderr.write(f"The data are not there yet, so that finished jobs are not known: {error}\n")
    width = max(len(job.folder) for job in jobs)
    for job in jobs:
        result = finished_result(output, job.folder, digests[job.folder]) if digests else None
        status = f"finished, took {duration(result.seconds['job'])}" if result else "to run"
        sys.stdout.write(f"{job.folder:{width}}  {job.method.protocol:13}  {status}\n")
    sys.stdout.write(f"{len(jobs)} jobs.\n")
    return 0
