"""The shortest real use: ``python -m anomalib_mvfa.demo`` in the root of a checkout, as `make demo` does."""

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

CONFIG = Path("configs/demo.yaml")
METRICS = {"image_AUROC": "image AUROC", "pixel_AUROC": "pixel AUROC"}


def main(arguments: Sequence[str] | None = None) -> dict[str, dict[str, float]]:
    """Test an untrained model and train it by anomalib's command line, and print the scores side by side.

    Args:
        arguments: Arguments of the command line; those other than ``--seed`` are passed on to anomalib.

    Returns:
        Scores of the "untrained" and the "trained" model by metric.
    """
    parser = argparse.ArgumentParser(prog="python -m anomalib_mvfa.demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=0, help="seed of images, support and adapters")
    options, overrides = parser.parse_known_args(arguments)
    if not CONFIG.is_file():
        parser.error(f"{CONFIG} is not in {Path.cwd()}. Run the demo in the root of a checkout of anomalib-mvfa.")

    import torch
    from anomalib.cli.cli import AnomalibCLI, configure_logger

    configure_logger()
    torch.set_num_threads(1)  # more gain nothing with arrays this small, and on a busy machine wait for each other
    start = time.monotonic()
    seed = ("--data.source.init_args.seed", "--data.init_args.seed", "--model.init_args.seed", "--seed_everything")
    command = ["--config", str(CONFIG), *(f"{name}={options.seed}" for name in seed), *overrides]
    # A folder of its own: anomalib cannot train into one where a test has been without a training.
    runs = {
        "untrained": ["test", *command, "--default_root_dir=results/untrained", "--model.visualizer=false"],
        "trained": ["train", *command],
    }
    trainers = {name: AnomalibCLI(run).engine.trainer for name, run in runs.items()}
    scores = {
        name: {metric: float(trainer.callback_metrics[metric]) for metric in METRICS}
        for name, trainer in trainers.items()
    }
    rows = (f"{METRICS[m]:11}  {scores['untrained'][m]:9.3f}  {scores['trained'][m]:7.3f}\n" for m in METRICS)
    sys.stdout.write(f"""
{"":11}  untrained  trained
{"".join(rows)}
pictures  {Path(trainers["trained"].default_root_dir) / "images"}
seed      {options.seed}
device    {trainers["trained"].strategy.root_device}
time      {time.monotonic() - start:.0f} s

The backbone is a tiny CLIP with random weights, and the images are drawn by the package: these numbers show
that the software works. They mean nothing clinically.
""")
    return scores


if __name__ == "__main__":
    main()
