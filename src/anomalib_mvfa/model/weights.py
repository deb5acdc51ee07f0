"""Weights in and out: state dicts of frozen backbones, published adapters, and what tells backbones apart."""

import hashlib
import re
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any
from zipfile import ZipFile

import torch
from torch import nn

from ..io import file_digest, save_atomically
from .adapters import BRANCHES

if TYPE_CHECKING:
    from .torch_model import MvfaModel

RANDOM_SEED = 0
"""Seed of the weights that ``pretrained=None`` draws, so that a backbone is a function of its arguments."""
SAMPLES = 64
"""How many values of a parameter go into a fingerprint."""
FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

State = dict[str, torch.Tensor]


def read_state(path: Path, trusted_archives: Collection[str] = ()) -> State:
    """Read a state dict from a ``.pt`` or ``.safetensors`` file, or from a trusted TorchScript archive.

    Args:
        path: The file.
        trusted_archives: SHA-256 of TorchScript archives that may be loaded, which runs code that they contain.

    Raises:
        ValueError: The file cannot be read, holds something else, or is another TorchScript archive.
    """
    is_archive = _is_torchscript(path)
    if is_archive and file_digest(str(path)) not in trusted_archives:
        msg = (
            f"pretrained={str(path)!r} is a TorchScript archive that is not trusted: loading it may run any code. Give "
            "a state dict (.pt) or a .safetensors file. If you trust the archive, this saves its state dict: python -c "
            f"\"import torch; torch.save(torch.jit.load({str(path)!r}, 'cpu').state_dict(), 'state_dict.pt')\""
        )
        raise ValueError(msg)
    try:
        if is_archive:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch advises against new archives
                state: Any = torch.jit.load(path, map_location="cpu").state_dict()
        elif path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            state = load_file(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        msg = (
            f"pretrained={str(path)!r} cannot be read ({first_line(error)}). It must be a state dict (.pt) or a "
            ".safetensors file, and complete: compare its size with the source's."
        )
        raise ValueError(msg) from error
    for key in ("state_dict", "model"):  # in checkpoints of Lightning and timm
        if isinstance(state, dict) and isinstance(state.get(key), dict):
            state = state[key]
    if not _is_state_dict(state):
        msg = f"pretrained={str(path)!r} holds no state dict: a mapping from parameter names to tensors is expected."
        raise ValueError(msg)
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def _is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: it has a record of constants, which other files of torch lack."""
    try:
        with ZipFile(path) as file:
            return any(name.endswith("/constants.pkl") for name in file.namelist())
    except Exception:  # noqa: BLE001  # whatever zipfile raises on other files and corrupt ones
        return False


def load_state(network: nn.Module, state: Mapping[str, torch.Tensor], backbone: str, pretrained: str | None) -> None:
    """Load a state dict, or raise ValueError where it does not fit and leave the network unchanged.

    ``backbone`` and ``pretrained`` are what errors call the network and the state.
    """
    fit = f"backbone={backbone!r}", "Name the backbone that the file was made for."
    network.load_state_dict(_fitted(state, network, f"The weights {pretrained!r}", *fit))


def load_adapters(model: "MvfaModel", path: str | Path) -> None:
    """Load adapters from a published ``.pth`` file: ``seg_adapters`` and ``det_adapters`` state dicts.

    Args:
        model: Model that receives them.
        path: The file.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It is not of this form, or does not fit the model; the model is unchanged.
    """
    path = Path(path).expanduser()
    name = f"adapters={str(path)!r}"
    if not path.is_file():
        msg = f"{name}: there is no such file. Give the path of a published .pth file."
        raise FileNotFoundError(msg)
    try:
        saved: Any = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        msg = f"{name} cannot be read as a .pth file; it may be cut short."
        raise ValueError(msg) from error
    keys = [f"{branch}_adapters" for branch in BRANCHES]
    if not isinstance(saved, dict) or not all(_is_state_dict(saved.get(key)) for key in keys):
        found = sorted(map(str, saved)) if isinstance(saved, dict) else type(saved).__name__
        msg = f"{name} must hold {' and '.join(keys)}, found {found}."
        raise ValueError(msg)
    remedy = "Check backbone, levels and adaptation."
    fitted = {key: _fitted(saved[key], getattr(model, key), name, f"the model's {key}", remedy) for key in keys}
    for key, state in fitted.items():
        getattr(model, key).load_state_dict(state)


def _is_state_dict(value: Any) -> bool:  # noqa: ANN401  # whatever a file holds
    return isinstance(value, dict) and all(isinstance(weight, torch.Tensor) for weight in value.values())


def save_adapters(model: "MvfaModel", path: str | Path) -> None:
    """Save a model's adapters in the published form; an existing file is replaced only by a complete one."""
    state = {f"{branch}_adapters": getattr(model, f"{branch}_adapters").state_dict() for branch in BRANCHES}
    save_atomically(state, Path(path).expanduser())


def _fitted(state: Mapping[str, torch.Tensor], network: nn.Module, name: str, target: str, remedy: str) -> State:
    """Return a state dict in a network's number formats, once names, shapes and values are checked.

    Values must be finite floats: a quantised file has whole numbers, for instance.
    """
    expected = network.state_dict()
    missing, unknown = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    misshaped = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if missing or unknown or misshaped:
        shapes = [f" (it is {tuple(state[key].shape)}, not {tuple(expected[key].shape)})" for key in misshaped[:1]]
        msg = (
            f"{name} do not fit {target}: {len(missing)} parameters missing {missing[:3]}, {len(unknown)} unknown "
            f"{unknown[:3]}, {len(misshaped)} of another shape {misshaped[:3]}{''.join(shapes)}. {remedy}"
        )
        raise ValueError(msg)
    for key, value in state.items():
        kind = str(value.dtype).removeprefix("torch.")
        plain = value.layout == torch.strided and value.device.type != "meta"
        if not plain or (expected[key].is_floating_point() and value.dtype not in FLOATS):
            msg = (
                f"{name} have values of {kind}{'' if plain else ', not all of them stored,'} in {key}; float16, "
                "bfloat16, float32 or float64 is expected. Give the file that is not quantised or compressed."
            )
            raise ValueError(msg)
    cast = {key: value.to(expected[key].dtype) for key, value in state.items()}
    if corrupt := [key for key, value in cast.items() if not torch.isfinite(value).all()]:
        msg = f"{name} have values that are not finite, in {corrupt[:3]}. The file is corrupt."
        raise ValueError(msg)
    return cast


@torch.no_grad()
def fingerprint(state: Mapping[str, torch.Tensor], note: str = "") -> str:
    """Hash some values of every weight, which suffices to tell models apart.

    Args:
        state: The weights.
        note: What else tells backbones apart.
    """
    digest = hashlib.sha256(note.encode())
    for name, weight in sorted(state.items()):
        flat = weight.detach().float().flatten()
        sample = flat[:: max(1, flat.numel() // SAMPLES)]
        digest.update(f"{name}{tuple(weight.shape)}".encode())
        digest.update(sample.cpu().numpy().tobytes())
    return digest.hexdigest()[:32]


def checked_download(path: Path) -> Path:
    """Return the path of a download once its content matches its name.

    The cache of Hugging Face names a file by the SHA-256 of its content; open_clip checks what it downloads elsewhere.

    Raises:
        ValueError: The content is another, for instance cut short.
    """
    file = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", file.name) and file_digest(str(file)) != file.name:
        msg = f"{file} is not what its name says: its content has the SHA-256 {file_digest(str(file))}. Remove it"
        raise ValueError(msg)
    return path


def first_line(error: Exception) -> str:
    """Return an error's type, and the first line of its message."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
