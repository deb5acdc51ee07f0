"""TorchScript archives: the tensors that torch reads, and none of the code that torch would run."""

import pickle
import zipfile
from pathlib import Path

import pytest
import torch
from torch import nn

from anomalib_mvfa.model.torchscript import LARGEST_TEXT, read_torchscript


class Net(nn.Module):
    """Modules in modules, other types, buffers, shared and empty tensors, and attributes that are no weights."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(2, 3).half(), nn.LayerNorm(3).bfloat16(), nn.Linear(3, 2, bias=False)])
        self.norm = nn.BatchNorm1d(2)
        self.tied = self.layers[2].weight
        self.seen = nn.Buffer(torch.arange(6).view(2, 3).T)
        self.none = nn.Buffer(torch.empty(0, 3))
        self.flags = nn.Buffer(torch.tensor([True, False]))
        self.plain = torch.ones(4)
        self.sizes = [1, 2]
        self.named = {"a": 1}

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(x) + self.plain.sum() + len(self.sizes) + self.named["a"]


class WritesAFile(nn.Module):
    """A module whose code writes a file when torch loads it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.training = False

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x

    @torch.jit.export
    def __getstate__(self) -> tuple[torch.Tensor, bool]:
        return self.weight, self.training

    @torch.jit.export
    def __setstate__(self, state: tuple[torch.Tensor, bool]) -> None:
        torch.save(state[0], "it_ran.pt")
        self.weight = state[0]
        self.training = state[1]


@pytest.fixture
def archive(tmp_path):
    path = tmp_path / "net.pt"
    torch.jit.save(torch.jit.script(Net().eval()), str(path))
    return path


def changed(path: Path, change) -> Path:
    """Write an archive anew; ``change`` gets a record's name and content, and returns content and compression."""
    other = path.with_name("changed.pt")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(other, "w") as new:
        for name in old.namelist():
            content, compression = change(name.partition("/")[2], old.read(name)) or (old.read(name), None)
            new.writestr(name, content, compression)
    return other


@pytest.mark.parametrize("make", [torch.jit.script, lambda net: torch.jit.trace(net, torch.ones(2, 2))])
def test_tensors_are_those_that_torch_reads(make, tmp_path):
    path = tmp_path / "net.pt"
    torch.jit.save(make(Net().eval()), str(path))
    expected = torch.jit.load(str(path)).state_dict()
    found = read_torchscript(path)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert found[name].shape == value.shape
        assert torch.equal(found[name], value), name


def test_code_is_not_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(WritesAFile()), "evil.pt")
    with pytest.raises(pickle.UnpicklingError, match=r"WritesAFile would be restored by code of its own"):
        read_torchscript(Path("evil.pt"))
    assert not Path("it_ran.pt").exists()
    torch.jit.load("evil.pt")
    assert Path("it_ran.pt").exists()


@pytest.mark.parametrize(
    "name", [b"os\nsystem", b"builtins\neval", b"torch._utils\n_rebuild_parameter", b"torch\nload"]
)
def test_the_pickle_gets_modules_and_tensors_only(archive, name):
    evil = b"\x80\x02c" + name + b"\nX\x04\x00\x00\x00true\x85R."
    path = changed(archive, lambda record, _: (evil, None) if record == "data.pkl" else None)
    with pytest.raises(pickle.UnpicklingError, match="has no place in an archive of weights"):
        read_torchscript(path)


@pytest.mark.parametrize(
    ("record", "content", "compression", "error"),
    [
        ("data/0", b"\0" * 4, None, RuntimeError),  # torch: out of bounds for storage
        ("data/0", b"\0" * 2**20, zipfile.ZIP_DEFLATED, ValueError),
        ("data.pkl", b"\0" * (LARGEST_TEXT + 1), zipfile.ZIP_DEFLATED, ValueError),
        ("data.pkl", pickle.dumps([1]), None, pickle.UnpicklingError),
        ("code/__torch__.py", b"class Other(Module):\n", None, KeyError),
    ],
)
def test_spoilt_archives_are_refused(archive, record, content, compression, error):
    hits = []

    def change(name, _):
        # The tests' own module names are part of the path.
        if name == record or (record.endswith(".py") and name.endswith("test_torchscript.py")):
            hits.append(name)
            return content, compression
        return None

    path = changed(archive, change)
    assert hits
    with pytest.raises(error):
        read_torchscript(path)


def test_a_file_cut_short_is_refused(archive):
    whole = archive.read_bytes()
    with pytest.raises(zipfile.BadZipFile):
        read_torchscript_of(whole[: len(whole) // 2], archive)


def read_torchscript_of(content, path):
    path.write_bytes(content)
    return read_torchscript(path)
