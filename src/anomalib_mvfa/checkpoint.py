"""Adapters in and out, in the form of the published ``.pth`` files."""

from pathlib import Path
from typing import Any

import torch

from .io import save_atomically
from .model.adapters import BRANCHES
from .model.torch_model import MvfaModel
from .model.weight_files import checked_values


def load_adapters(model: MvfaModel, path: str | Path) -> None:
    """Load adapters of a published ``.pth`` file: ``seg_adapters`` and ``det_adapters`` state dicts.

    Args:
        model: Receives them.
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not of this form, or does not fit the model; the model is unchanged.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        msg = f"adapters={str(path)!r}: there is no such file. Give the path of a published .pth file."
        raise FileNotFoundError(msg)
    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        msg = f"adapters={str(path)!r} cannot be read as a .pth file; it may be cut short."
        raise ValueError(msg) from error
    keys = [f"{branch}_adapters" for branch in BRANCHES]
    if not isinstance(saved, dict) or not all(_is_state_dict(saved.get(key)) for key in keys):
        found = sorted(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__
        msg = f"adapters={str(path)!r} must hold {' and '.join(keys)}, found {found}."
        raise ValueError(msg)
    for key in keys:
        expected = {name: tuple(weight.shape) for name, weight in getattr(model, key).state_dict().items()}
        shapes = {name: tuple(weight.shape) for name, weight in saved[key].items()}
        wrong = sorted(name for name in {*expected, *shapes} if expected.get(name) != shapes.get(name))
        if wrong:
            name = wrong[0]
            msg = (
                f"adapters={str(path)!r} do not fit the model: {key}.{name} is {shapes.get(name, 'missing')} in the "
                f"file and {expected.get(name, 'missing')} in the model. Check backbone, levels and adaptation."
            )
            raise ValueError(msg)
    own = {key: getattr(model, key) for key in keys}
    checked = {
        key: checked_values(saved[key], adapters.state_dict(), f"adapters={str(path)!r}")
        for key, adapters in own.items()
    }
    for key, adapters in own.items():
        adapters.load_state_dict(checked[key])


def _is_state_dict(value: Any) -> bool:  # noqa: ANN401  # whatever a file holds
    return isinstance(value, dict) and all(isinstance(weight, torch.Tensor) for weight in value.values())


def save_adapters(model: MvfaModel, path: str | Path) -> None:
    """Save a model's adapters in the published form; a file that was there stays whole until the new one is."""
    path = Path(path).expanduser()
    state = {f"{branch}_adapters": getattr(model, f"{branch}_adapters").state_dict() for branch in BRANCHES}
    save_atomically(state, path)
