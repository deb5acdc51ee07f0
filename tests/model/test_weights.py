"""Adapters in and out, in the published form; and TorchScript archives, of which only trusted ones are loaded."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from anomalib_mvfa.io import file_digest
from anomalib_mvfa.model.backbone import ClipBackbone, _openai_digests
from anomalib_mvfa.model.build import build_mvfa
from anomalib_mvfa.model.weights import load_adapters, read_state, save_adapters
from recipe import TINY, adapter_weights

BRANCHES = ("seg_adapters", "det_adapters")


# ------------------------------------------------------------------------------------------------------------- adapters


@pytest.fixture
def published():
    """Adapters that fit ``tiny_model``."""
    return adapter_weights(TINY)


@pytest.fixture
def untouched(tiny_model):
    """The tiny model, which a failing test must leave as it was."""
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    yield tiny_model
    for name, value in tiny_model.state_dict().items():
        assert torch.equal(value, before[name]) or value.isnan().any(), f"{name} has changed"


def test_published_form_is_loaded(tiny_model, published, tmp_path):
    torch.save(published, tmp_path / "adapters.pth")
    load_adapters(tiny_model, str(tmp_path / "adapters.pth"))
    for branch in BRANCHES:
        state = getattr(tiny_model, branch).state_dict()
        assert list(state) == [f"{level}.fc{layer}.0.weight" for level in range(4) for layer in (1, 2)]
        assert all(torch.equal(state[name], published[branch][name]) for name in state)


def test_saved_adapters_come_back(tiny_model, tmp_path):
    path = tmp_path / "new" / "folder" / "adapters.pth"
    save_adapters(tiny_model, path)
    assert [file.name for file in path.parent.iterdir()] == ["adapters.pth"]
    saved = torch.load(path, weights_only=True)
    assert set(saved) == set(BRANCHES)
    expected = {branch: {name: w.clone() for name, w in saved[branch].items()} for branch in BRANCHES}
    for parameter in (*tiny_model.seg_adapters.parameters(), *tiny_model.det_adapters.parameters()):
        parameter.data.zero_()
    load_adapters(tiny_model, path)
    for branch in BRANCHES:
        assert all(torch.equal(w, expected[branch][n]) for n, w in getattr(tiny_model, branch).state_dict().items())
        assert all(w.any() for w in expected[branch].values())


def test_loading_keeps_what_learns(tiny_config, published, tmp_path):
    model = build_mvfa(str(tiny_config), None, TINY.image_size, train_levels=[2])
    torch.save(published, tmp_path / "adapters.pth")
    load_adapters(model, tmp_path / "adapters.pth")
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning == ["seg_adapters.1.fc1.0.weight", "det_adapters.1.fc1.0.weight"]


def test_failed_save_leaves_the_old_file(tiny_model, tmp_path, monkeypatch):
    path = tmp_path / "adapters.pth"
    save_adapters(tiny_model, path)
    old = path.read_bytes()

    def cut_short(state, file):
        file.write(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr("torch.save", cut_short)
    with pytest.raises(KeyboardInterrupt):
        save_adapters(tiny_model, path)
    assert path.read_bytes() == old


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda value: (100 * value).to(torch.int8), "have values of int8 in "),
        (lambda value: value.double() * 1e300, "have values that are not finite"),
        (lambda value: value * torch.nan, "have values that are not finite"),
        (lambda value: value / 0, "have values that are not finite"),
    ],
)
def test_values_of_another_kind(untouched, published, tmp_path, damage, message):
    before = {name: value.clone() for name, value in untouched.state_dict().items()}
    name = next(iter(published["det_adapters"]))
    published["det_adapters"] = {**published["det_adapters"], name: damage(published["det_adapters"][name])}
    torch.save(published, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=rf"odd\.pth' {message}"):
        load_adapters(untouched, tmp_path / "odd.pth")
    assert all(torch.equal(value, before[name]) for name, value in untouched.state_dict().items() if "adapters" in name)


def test_missing_file(untouched, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.pth'.*no such file\. Give the path of a published"):
        load_adapters(untouched, tmp_path / "nothing.pth")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"no pickle"])
def test_corrupt_file(untouched, tmp_path, content):
    path = tmp_path / "adapters.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"adapters\.pth' cannot be read as a \.pth file; it may be cut short"):
        load_adapters(untouched, path)


@pytest.mark.parametrize(
    "content",
    [{"seg_adapters": {}, "optimizer": {}}, {"state_dict": {}}, [1], torch.zeros(2)],
    ids=["one branch", "CLIP", "list", "tensor"],
)
def test_file_of_another_kind(untouched, tmp_path, content):
    torch.save(content, tmp_path / "other.pth")
    found = str(sorted(content)) if isinstance(content, dict) else type(content).__name__
    with pytest.raises(ValueError, match="must hold seg_adapters and det_adapters") as error:
        load_adapters(untouched, tmp_path / "other.pth")
    assert str(error.value).endswith(f"found {found}.")


@pytest.mark.parametrize("branch", [3, {"0.fc1.0.weight": 3}], ids=["number", "numbers"])
def test_file_whose_branches_are_no_state_dicts(untouched, tmp_path, branch):
    torch.save(dict.fromkeys(BRANCHES, branch), tmp_path / "other.pth")
    with pytest.raises(ValueError, match=r"other\.pth"):
        load_adapters(untouched, tmp_path / "other.pth")


@pytest.mark.parametrize(
    ("dropped", "added", "message"),
    [
        (
            "3.fc2.0.weight",
            {},
            r"1 parameters missing \['3\.fc2\.0\.weight'\], 0 unknown \[\], 0 of another shape \[\]",
        ),
        (None, {"4.fc1.0.weight": (24, 128)}, r"0 parameters missing \[\], 1 unknown \['4\.fc1\.0\.weight'\]"),
        (
            None,
            {"1.fc1.0.weight": (24, 64)},
            r"1 of another shape \['1\.fc1\.0\.weight'\] \(it is \(24, 64\), not \(24, 128\)\)",
        ),
    ],
    ids=["missing", "unknown", "misshaped"],
)
def test_adapters_of_another_model(untouched, published, tmp_path, dropped, added, message):
    """Not even the branch that fits is loaded."""
    state = {name: weight for name, weight in published["det_adapters"].items() if name != dropped}
    published["det_adapters"] = {**state, **{name: torch.zeros(shape) for name, shape in added.items()}}
    torch.save(published, tmp_path / "adapters.pth")
    message = rf"adapters\.pth' do not fit the model's det_adapters: .*{message}.*Check backbone, levels and adaptation"
    with pytest.raises(ValueError, match=message):
        load_adapters(untouched, tmp_path / "adapters.pth")


def test_adapters_do_not_fit_projectors(tiny_config, published, tmp_path):
    torch.save(published, tmp_path / "adapters.pth")
    model = build_mvfa(str(tiny_config), None, TINY.image_size, adaptation="projector")
    with pytest.raises(ValueError, match=r"unknown \['0\.fc2\.0\.weight'"):
        load_adapters(model, tmp_path / "adapters.pth")


# ---------------------------------------------------------------------------------------------------------- TorchScript


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
def archive(tmp_path, monkeypatch):
    """An archive in the working folder, whose code writes a file."""
    monkeypatch.chdir(tmp_path)
    torch.jit.save(torch.jit.script(WritesAFile()), "archive.pt")
    yield Path("archive.pt")
    Path("it_ran.pt").unlink(missing_ok=True)


def test_an_archive_is_refused_and_its_code_not_run(archive, tiny_config):
    for read in (read_state, lambda path: ClipBackbone(str(tiny_config), str(path), 56)):
        with pytest.raises(
            ValueError, match=r"archive\.pt' is a TorchScript archive that is not trusted.*Give a state"
        ):
            read(archive)
    assert not Path("it_ran.pt").exists()
    torch.jit.load(archive)
    assert Path("it_ran.pt").exists()


def test_an_archive_cut_short_is_refused(archive):
    complete = archive.read_bytes()
    archive.write_bytes(complete[: len(complete) // 2])
    with pytest.raises(ValueError, match=r"archive\.pt' cannot be read .*compare its size"):
        read_state(archive, {file_digest(str(archive))})
    assert not Path("it_ran.pt").exists()


def test_a_trusted_archive_is_loaded(archive):
    state = read_state(archive, {file_digest(str(archive))})
    assert list(state) == ["weight"]
    assert torch.equal(state["weight"], torch.ones(2))


def test_the_command_in_the_error_converts_an_archive(archive, monkeypatch):
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)
    with pytest.raises(ValueError, match="this saves its state dict: ") as error:
        read_state(archive)
    subprocess.run(str(error.value).split("this saves its state dict: ")[1], shell=True, check=True)  # noqa: S602
    assert torch.equal(read_state(Path("state_dict.pt"))["weight"], torch.ones(2))


def test_openais_archives_are_known():
    digests = _openai_digests()
    assert "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02" in digests  # of ViT-L-14-336px.pt
    assert len(digests) == 9
