"""Adapters in and out, in the published form; and TorchScript archives, of which only trusted ones are loaded."""

import shlex
from pathlib import Path

import pytest
import torch
from torch import nn

from anomalib_mvfa.io import file_digest
from anomalib_mvfa.model.backbone import ClipBackbone, _openai_digests
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
        assert torch.allclose(value, before[name], atol=0, rtol=0, equal_nan=True), f"{name} has changed"


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
    for branch in BRANCHES:
        adapters = getattr(tiny_model, branch)
        expected = {name: weight.clone() for name, weight in adapters.state_dict().items()}
        assert all(torch.equal(saved[branch][name], weight) for name, weight in expected.items())
        adapters.load_state_dict({name: torch.zeros_like(weight) for name, weight in expected.items()})
        load_adapters(tiny_model, path)
        assert all(torch.equal(weight, expected[name]) for name, weight in adapters.state_dict().items())


def test_loading_keeps_what_learns(build, published, tmp_path):
    model = build(train_levels=[2])
    torch.save(published, tmp_path / "adapters.pth")
    load_adapters(model, tmp_path / "adapters.pth")
    learning = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert learning == ["seg_adapters.1.fc1.0.weight", "det_adapters.1.fc1.0.weight"]


def test_failed_save_leaves_the_old_file(tiny_model, tmp_path, monkeypatch):
    path = tmp_path / "adapters.pth"
    path.write_bytes(b"old")
    monkeypatch.setattr("torch.save", lambda state, file: file.write(b"half") / 0)
    with pytest.raises(ZeroDivisionError):
        save_adapters(tiny_model, path)
    assert path.read_bytes() == b"old"


def test_values_of_another_kind(untouched, published, tmp_path):
    """Other kinds are shown in test_backbone."""
    name = next(iter(published["det_adapters"]))
    published["det_adapters"][name] = published["det_adapters"][name] * torch.nan
    torch.save(published, tmp_path / "odd.pth")
    with pytest.raises(ValueError, match=r"odd\.pth' have values that are not finite"):
        load_adapters(untouched, tmp_path / "odd.pth")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"no pickle"])
def test_missing_and_corrupt_file(untouched, tmp_path, content):
    path = tmp_path / "adapters.pth"
    with pytest.raises(FileNotFoundError, match=r"adapters\.pth'.*no such file\. Give the path of a published"):
        load_adapters(untouched, path)
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"adapters\.pth' cannot be read as a \.pth file; it may be cut short"):
        load_adapters(untouched, path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"seg_adapters": {}, "optimizer": {}}, r"must hold .* found \['optimizer', 'seg_adapters'\]\.$"),
        ({"state_dict": {}}, r"must hold seg_adapters and det_adapters.* found \['state_dict'\]\.$"),
        ([1], r"must hold seg_adapters and det_adapters.* found list\.$"),
        (dict.fromkeys(BRANCHES, 3), r"other\.pth"),
        ({branch: {"0.fc1.0.weight": 3} for branch in BRANCHES}, r"other\.pth"),
    ],
    ids=["one branch", "CLIP", "list", "number", "numbers"],
)
def test_file_of_another_kind(untouched, tmp_path, content, message):
    torch.save(content, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=message):
        load_adapters(untouched, tmp_path / "other.pth")


def test_adapters_of_another_model(untouched, published, tmp_path):
    """Not even the branch that fits is loaded."""
    state = published["det_adapters"]
    del state["3.fc2.0.weight"]
    state.update({"4.fc1.0.weight": torch.zeros(24, 128), "1.fc1.0.weight": torch.zeros(24, 64)})
    torch.save(published, tmp_path / "adapters.pth")
    found = (
        r"1 parameters missing \['3\.fc2\.0\.weight'\], 1 unknown \['4\.fc1\.0\.weight'\], 1 of another shape "
        r"\['1\.fc1\.0\.weight'\] \(it is \(24, 64\), not \(24, 128\)\)"
    )
    message = rf"adapters\.pth' do not fit the model's det_adapters: .*{found}.*Check backbone, levels and adaptation"
    with pytest.raises(ValueError, match=message):
        load_adapters(untouched, tmp_path / "adapters.pth")


def test_adapters_do_not_fit_projectors(build, published, tmp_path):
    torch.save(published, tmp_path / "adapters.pth")
    with pytest.raises(ValueError, match=r"unknown \['0\.fc2\.0\.weight'"):
        load_adapters(build(adaptation="projector"), tmp_path / "adapters.pth")


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


def test_the_command_in_the_error_converts_an_archive(archive):
    with pytest.raises(ValueError, match="this saves its state dict: ") as error:
        read_state(archive)
    python, option, code = shlex.split(str(error.value).partition("this saves its state dict: ")[2])
    assert (python, option) == ("python", "-c")
    exec(code)  # noqa: S102
    assert torch.equal(read_state(Path("state_dict.pt"))["weight"], torch.ones(2))


def test_openais_archives_are_known():
    digests = _openai_digests()
    assert "3035c92b350959924f9f00213499208652fc7ea050643e8b385c2dac08641f02" in digests  # of ViT-L-14-336px.pt
    assert len(digests) == 9
