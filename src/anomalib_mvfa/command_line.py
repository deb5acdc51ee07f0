"""Anomalib's command line, on which a checkpoint says the arguments of a model of ours."""

import inspect
import pkgutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from anomalib.cli.cli import AnomalibCLI
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO

SCORING = {"validate", "test", "predict", "export"}
"""Commands that take what is not given of a model from its checkpoint; `fit` may go on with other arguments."""


class CheckpointCli(AnomalibCLI):
    """Anomalib's command line, where ``--ckpt_path`` sets the defaults of ``--model``.

    What is given beside it, in a configuration file or by an option, comes before it.
    """

    _exported: dict[str, Any] | None = None  # the checkpoint to be exported, of a model of ours

    def __init__(self, args: Sequence[str] | None = None, run: bool = True) -> None:
        self._args = args
        super().__init__(args, run)

    def before_instantiate_classes(self) -> None:
        """Read the checkpoint, and the command line once more with its defaults."""
        model, path = self._get(self.config, "model"), self._get(self.config, "ckpt_path")
        if self.subcommand in SCORING and path and Path(path).is_file() and _is_ours(model.class_path):
            checkpoint = AnomalibCheckpointIO().load_checkpoint(path, map_location="cpu")
            self._exported = checkpoint if self.subcommand == "export" else None
            known = inspect.signature(pkgutil.resolve_name(model.class_path)).parameters
            saved = {name: value for name, value in checkpoint.get("hyper_parameters", {}).items() if name in known}
            defaults = {"class_path": model.class_path, "init_args": saved}
            self.subcommand_parsers[self.subcommand].set_defaults(model=defaults)
            self.config = self.parser.parse_args(self._args)
        super().before_instantiate_classes()

    def _prepare_subcommand_kwargs(self, subcommand: str) -> dict[str, Any]:
        """Load the checkpoint to be exported here: anomalib would build a second model, by the checkpoint alone."""
        kwargs = super()._prepare_subcommand_kwargs(subcommand)
        if self._exported:
            self.model.on_load_checkpoint(self._exported)
            self.model.load_state_dict(self._exported["state_dict"])
            kwargs["ckpt_path"] = None
        return kwargs


def _is_ours(class_path: str) -> bool:
    return any(base.__module__.startswith(f"{__package__}.") for base in pkgutil.resolve_name(class_path).__mro__)
