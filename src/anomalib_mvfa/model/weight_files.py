"""Weights of frozen backbones: read from files, fitted to networks, and told apart."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..io import file_digest
from .torchscript import is_torchscript, read_torchscript

RANDOM_SEED = 0
"""Of the weights that ``pretrained=None`` draws, so that a backbone is a function of its arguments."""
SAMPLES = 64
"""Values of a parameter that make up its part of a fingerprint."""

FLOATS = {torch.float16, torch.bfloat16, torch.float32, torch.float64}

State = dict[str, torch.Tensor]


def read_state(path: Path) -> State:
    """Read a state dict, whichever of the usual forms its file has: .pt, TorchScript archive or safetensors.

    Args:
        path: The file.

    Raises:
        ValueError: It cannot be read, or holds something else.
    """
    try:
        if path.suffix.lower() == ".safetensors":
            from safetensors.torch import load_file

            state: Any = load_file(path)
        elif is_torchscript(path):
            state = read_torchscript(path)
        else:
            state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        msg = (
            f"pretrained={str(path)!r} cannot be read ({first_line(error)}). It must be a state dict (.pt), a "
            "TorchScript archive or a .safetensors file, and whole: compare its size with the source's."
        )
        raise ValueError(msg) from error
    if isinstance(state, dict) and "state_dict" in state:
        state = state["state_dict"]
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        msg = f"pretrained={str(path)!r} holds no state dict: a mapping from parameter names to tensors is expected."
        raise ValueError(msg)
    return {str(key).removeprefix("module."): value for key, value in state.items()}


def load_state(network: nn.Module, state: Mapping[str, torch.Tensor], backbone: str, pretrained: str | None) -> None:
    """Load a state dict, which must fit.

    Args:
        network: Receives it.
        state: All of its parameters and buffers, and no others.
        backbone: What errors call the network.
        pretrained: What they call the state.

    Raises:
        ValueError: It does not fit; the network is unchanged.
    """
    expected = network.state_dict()
    missing, unexpected = sorted(set(expected) - set(state)), sorted(set(state) - set(expected))
    misshaped = [key for key in expected if key in state and state[key].shape != expected[key].shape]
    if missing or unexpected or misshaped:
        msg = (
            f"The weights {pretrained!r} do not fit backbone={backbone!r}: {len(missing)} parameters missing "
            f"{missing[:3]}, {len(unexpected)} unknown {unexpected[:3]}, {len(misshaped)} of another shape "
            f"{misshaped[:3]}. Name the backbone that the file was made for."
        )
        raise ValueError(msg)
    network.load_state_dict(checked_values(state, expected, f"The weights {pretrained!r}"))


def checked_values(state: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor], name: str) -> State:
    """Return weights in the number formats that are expected.

    Args:
        state: The weights.
        expected: Weights of the same names.
        name: What errors call the weights.

    Raises:
        ValueError: Values are of another kind, such as the whole numbers of a quantised file, or not finite.
    """
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
    if spoilt := [key for key, value in cast.items() if not torch.isfinite(value).all()]:
        msg = f"{name} have values that are not finite, in {spoilt[:3]}. The file is spoilt."
        raise ValueError(msg)
    return cast


@torch.no_grad()
def fingerprint(state: Mapping[str, torch.Tensor], note: str = "") -> str:
    """Hash some values of every weight: models differ everywhere.

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
    """Return the path of a download, if its content is the published one as far as its name tells.

    The cache of Hugging Face names a file by the SHA-256 of its content; open_clip checks what it downloads elsewhere.

    Raises:
        ValueError: The file is another one, for instance cut short.
    """
    file = path.resolve()
    if re.fullmatch("[0-9a-f]{64}", file.name) and file_digest(str(file)) != file.name:
        msg = f"{file} is not what its name says: its content has the SHA-256 {file_digest(str(file))}. Remove it"
        raise ValueError(msg)
    return path


def first_line(error: Exception) -> str:
    """Return an error's kind, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().splitlines()[0] if str(error).strip() else 'no message'}"
