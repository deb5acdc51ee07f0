"""Weights of a TorchScript archive, read as data: ``torch.jit.load`` runs code of the archive when it loads it."""

import re
from collections import OrderedDict
from collections.abc import Callable, Iterator
from io import BytesIO
from pathlib import Path
from pickle import Unpickler, UnpicklingError
from typing import Any
from zipfile import ZIP_STORED, ZipFile, is_zipfile

import torch

LARGEST_TEXT = 2**26
"""Of code and of the pickled structure, in bytes: they may be compressed, and a small file could fill the memory."""

_DTYPES = {
    "BFloat16Storage": torch.bfloat16,
    "BoolStorage": torch.bool,
    "ByteStorage": torch.uint8,
    "CharStorage": torch.int8,
    "DoubleStorage": torch.float64,
    "FloatStorage": torch.float32,
    "HalfStorage": torch.float16,
    "IntStorage": torch.int32,
    "LongStorage": torch.int64,
    "ShortStorage": torch.int16,
}
_CLASS = re.compile(r"^class (\w+)\(Module\):$(.*?)(?=^\S|\Z)", re.DOTALL | re.MULTILINE)
_REGISTERED = re.compile(r"^  __(?:parameters|buffers)__ = \[(.*)\]$", re.MULTILINE)


def is_torchscript(path: Path) -> bool:
    """Whether a file is a TorchScript archive: it has a record of constants, which other files of torch lack."""
    if not is_zipfile(path):
        return False
    with ZipFile(path) as file:
        return any(name.endswith("/constants.pkl") for name in file.namelist())


def read_torchscript(path: Path) -> dict[str, torch.Tensor]:
    """Return parameters and buffers of a TorchScript archive, on the CPU; none of its code is run.

    Raises:
        UnpicklingError: The archive asks for more than modules and tensors.
        ValueError, KeyError: It is not of this form, or cut short.
    """
    with ZipFile(path) as file:
        archive = _Archive(file)
        root = _Structure(BytesIO(archive.text("data.pkl")), archive).load()
        if not isinstance(root, _Module):
            msg = f"holds a {type(root).__name__} in place of a module"
            raise UnpicklingError(msg)
        return dict(_weights(root, archive))


class _Archive:
    """The records of an archive."""

    def __init__(self, file: ZipFile) -> None:
        self._file = file
        (self._root,) = {name.partition("/")[0] for name in file.namelist()}

    def text(self, name: str) -> bytes:
        info = self._file.getinfo(f"{self._root}/{name}")
        if info.file_size > LARGEST_TEXT:
            msg = f"{name} has {info.file_size} bytes, more than any structure needs"
            raise ValueError(msg)
        return self._file.read(info)

    def storage(self, key: str) -> bytearray:
        info = self._file.getinfo(f"{self._root}/data/{key}")
        if info.compress_type != ZIP_STORED:
            msg = f"data/{key} is compressed, which PyTorch never does"
            raise ValueError(msg)
        return bytearray(self._file.read(info))

    def registered(self, kind: str) -> set[str]:
        """Return the names of parameters and buffers of a class, which its source lists."""
        module, _, name = kind.rpartition(".")
        source = self.text(f"code/{module.replace('.', '/')}.py").decode()
        bodies = dict(_CLASS.findall(source))
        return {found for names in _REGISTERED.findall(bodies[name]) for found in re.findall(r'"([^"]*)"', names)}


class _Module:
    """Stands in for a module: its attributes, whatever its class."""

    kind: str
    attributes: dict[str, Any]

    def __setstate__(self, state: object) -> None:
        if not isinstance(state, dict):
            msg = f"{self.kind} would be restored by code of its own, which is not run"
            raise UnpicklingError(msg)
        self.attributes = state


class _Structure(Unpickler):
    """Unpickles modules and tensors; whatever else a pickle names, it gets an error."""

    def __init__(self, file: BytesIO, archive: _Archive) -> None:
        super().__init__(file)
        self._archive = archive
        self._storages: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def find_class(self, module: str, name: str) -> type | torch.dtype | Callable[..., Any]:
        if module.partition(".")[0] == "__torch__":
            return type("_Module", (_Module,), {"kind": f"{module}.{name}"})
        if module == "torch" and name in _DTYPES:
            return _DTYPES[name]
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return self._tensor
        if (module, name) == ("collections", "OrderedDict"):  # of hooks, and always empty
            return OrderedDict
        if module == "torch.jit._pickle":  # gives lists and dictionaries their types
            return _first
        msg = f"{module}.{name} has no place in an archive of weights"
        raise UnpicklingError(msg)

    def persistent_load(self, identifier: Any) -> torch.Tensor:  # noqa: ANN401  # whatever a file holds
        _, dtype, key, _, _ = identifier
        if (key, dtype) not in self._storages:
            content = self._archive.storage(key)
            self._storages[key, dtype] = torch.frombuffer(content, dtype=dtype) if content else torch.empty(0).to(dtype)
        return self._storages[key, dtype]

    @staticmethod
    def _tensor(
        storage: torch.Tensor,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
        *_autograd: object,
    ) -> torch.Tensor:
        return torch.as_strided(storage, size, stride, offset)  # torch checks the bounds


def _first(value: object, *_type: object) -> object:
    return value


def _weights(module: _Module, archive: _Archive, prefix: str = "") -> Iterator[tuple[str, torch.Tensor]]:
    registered = archive.registered(module.kind)
    for name, value in module.attributes.items():
        if isinstance(value, _Module):
            yield from _weights(value, archive, f"{prefix}{name}.")
        elif isinstance(value, torch.Tensor) and name in registered:
            yield prefix + name, value
