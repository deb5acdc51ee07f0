"""Export of models: in the operator set that torch writes, without gradients, and never of one that cannot score."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from anomalib.models.components import AnomalibModule as _Host
else:
    _Host = object

ONNX_OPSET = 18
"""The operator set that torch writes; converting it to an older one fails."""


class ExportMixin(_Host):
    """Anomalib's exports as our models need them; to be named before ``AnomalibModule``."""

    def check_exportable(self) -> None:
        """Raise an error for a model that cannot score, which an exported file would not say."""

    def to_torch(self, *args, **kwargs) -> Path:  # noqa: ANN002, ANN003
        """Export as anomalib does, with weights that ask for no gradient."""
        self.check_exportable()
        with _without_gradients(self):
            return super().to_torch(*args, **kwargs)

    def to_onnx(self, *args, **kwargs) -> Path:  # noqa: ANN002, ANN003
        """Export as anomalib does, in the operator set that torch writes; OpenVINO's export passes through here too."""
        self.check_exportable()
        return super().to_onnx(*args, **{"opset_version": ONNX_OPSET, **kwargs})


@contextmanager
def _without_gradients(module: nn.Module) -> Iterator[None]:
    learning = [parameter for parameter in module.parameters() if parameter.requires_grad]
    module.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in learning:
            parameter.requires_grad_(True)
