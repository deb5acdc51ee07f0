"""MVFA, few-shot and zero-shot anomaly detection in medical images, as a plugin of anomalib."""

import ast
from importlib import import_module
from pathlib import Path
from typing import Any

# Names are imported on first use: importing this package must not import anomalib, whose import imports this package.
MODULES = {
    alias.name: f".{node.module}"
    for node in ast.parse(Path(__file__).with_suffix(".pyi").read_text("utf-8")).body
    if isinstance(node, ast.ImportFrom)
    for alias in node.names
}
__all__ = ["__version__", *MODULES]


def __getattr__(name: str) -> Any:  # noqa: ANN401  # a public name may be a class, a function or a string
    if name == "__version__":
        value: Any = import_module("importlib.metadata").version("anomalib-mvfa")
    elif name in MODULES:
        value = getattr(import_module(MODULES[name], __name__), name)
    else:
        msg = f"module {__name__!r} has no attribute {name!r}; its public names are {', '.join(__all__)}."
        raise AttributeError(msg)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
