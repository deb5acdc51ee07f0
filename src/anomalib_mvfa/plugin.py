"""Attaches MVFA and its datamodules to anomalib; nothing else touches anomalib's registries.

anomalib looks for models among the direct subclasses of ``AnomalibModule`` and for command-line classes among all
imported subclasses, so importing ours registers them there. Short names in configs are attributes of
``anomalib.models`` and ``anomalib.data``.
"""

import logging
import sys
from importlib import import_module
from types import ModuleType
from typing import Any

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

CLI_HOST = "anomalib.cli.cli"
HOSTS = {
    "anomalib.models": (".baselines.", ".model.lightning_model", ".model.plus"),
    "anomalib.data": (".data",),
    CLI_HOST: (),
}
"""Modules of anomalib, and ours whose public classes get short names there."""


def register() -> None:
    """Attach our names to anomalib now.

    Needed only where the start-up hook is not active: under ``python -S``, after ``pip install --target``, or with
    ``ANOMALIB_MVFA_PLUGIN=0``.
    """
    for host in HOSTS:
        attach(import_module(host))


def attach(host: ModuleType) -> None:
    """Attach our names to ``anomalib.models`` or ``anomalib.data``; names that it already has are left alone.

    The command line in ``anomalib.cli.cli`` becomes ours, which derives from it.
    """
    if host.__name__ == CLI_HOST:
        host.AnomalibCLI = import_module(".command_line", __package__).CheckpointCli  # type: ignore[attr-defined]
        return
    package = import_module("anomalib_mvfa")
    for name, module in package.MODULES.items():
        if not module.startswith(HOSTS[host.__name__]):
            continue
        ours = getattr(package, name)
        if not isinstance(ours, type):
            continue
        if getattr(host, name, ours) is ours:
            setattr(host, name, ours)
        else:
            logger.warning("%s has a %s of its own; ours is anomalib_mvfa.%s.", host.__name__, name, name)
    if host.__name__ == "anomalib.models":
        # get_model() imports class paths from these modules only.
        host.ALLOWED_MODULES.add(package.__name__)


COMMANDS = {
    "compare": "Train and test several methods on the same images, and report.",
    "report": "Write a comparison's report anew.",
    "repeat": "Train and test one model with several seeds, and report.",
}
"""Commands of this package beside anomalib's, which :mod:`anomalib_mvfa.compare.cli` runs."""


def main() -> int | None:
    """Run anomalib's command line with MVFA registered, or a command of our own; return the exit code, if any."""
    register()
    if sys.argv[1:2] and sys.argv[1] in COMMANDS:
        return import_module(".compare.cli", __package__).main(sys.argv[1], sys.argv[2:])
    from anomalib.loggers import configure_logger
    from jsonargparse import ArgumentParser

    from .command_line import CheckpointCli

    class Cli(CheckpointCli):
        """Anomalib's command line, whose help lists our commands too."""

        def _set_install_subcommand(self, action_subcommand: Any) -> None:  # noqa: ANN401  # jsonargparse's own class
            super()._set_install_subcommand(action_subcommand)
            for name, text in COMMANDS.items():
                action_subcommand.add_subcommand(name, ArgumentParser(), help=text)

    configure_logger()
    Cli()
    return None
