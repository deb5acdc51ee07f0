"""MVFA, few-shot and zero-shot anomaly detection in medical images, as a plugin of anomalib."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .baselines.april_gan import AprilGan
    from .baselines.bgad import Bgad
    from .baselines.clip import Clip
    from .baselines.dra import Dra
    from .baselines.med_clip import MedClip
    from .baselines.mkd import Mkd
    from .baselines.winclip import WinClipBaseline
    from .checkpoint import load_adapters, save_adapters
    from .data import (
        BMADFewShot,
        BMADLeaveOneOut,
        BMADOneClass,
        BrainPhantom,
        FewShot,
        FullNormal,
        LeaveOneOut,
        Phantom,
        PredictScans,
        Scans,
    )
    from .model.lightning_model import Mvfa
    from .model.torch_model import MvfaModel
    from .plugin import register

    __version__: str

__all__ = [
    "AprilGan",
    "BMADFewShot",
    "BMADLeaveOneOut",
    "BMADOneClass",
    "Bgad",
    "BrainPhantom",
    "Clip",
    "Dra",
    "FewShot",
    "FullNormal",
    "LeaveOneOut",
    "MedClip",
    "Mkd",
    "Mvfa",
    "MvfaModel",
    "Phantom",
    "PredictScans",
    "Scans",
    "WinClipBaseline",
    "__version__",
    "load_adapters",
    "register",
    "save_adapters",
]

# Imported on first use: importing this package must not import anomalib, whose import imports this package.
_HOMES = {
    "AprilGan": ".baselines.april_gan",
    "BMADFewShot": ".data",
    "BMADLeaveOneOut": ".data",
    "BMADOneClass": ".data",
    "Bgad": ".baselines.bgad",
    "BrainPhantom": ".data",
    "Clip": ".baselines.clip",
    "Dra": ".baselines.dra",
    "FewShot": ".data",
    "FullNormal": ".data",
    "LeaveOneOut": ".data",
    "MedClip": ".baselines.med_clip",
    "Mkd": ".baselines.mkd",
    "Mvfa": ".model.lightning_model",
    "MvfaModel": ".model.torch_model",
    "Phantom": ".data",
    "PredictScans": ".data",
    "Scans": ".data",
    "WinClipBaseline": ".baselines.winclip",
    "load_adapters": ".checkpoint",
    "register": ".plugin",
    "save_adapters": ".checkpoint",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 (a public name may be a class, a function or a string)
    if name == "__version__":
        value: Any = import_module("importlib.metadata").version("anomalib-mvfa")
    elif name in _HOMES:
        value = getattr(import_module(_HOMES[name], __name__), name)
    else:
        msg = f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}."
        raise AttributeError(msg)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
