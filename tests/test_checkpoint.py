"""Adapters in and out, in the published form."""

import pytest
import torch

from anomalib_mvfa.checkpoint import load_adapters, save_adapters
from anomalib_mvfa.model.build import build_mvfa
from recipe import TINY, adapter_weights

BRANCHES = ("seg_adapters", "det_adapters")


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
    ("spoil", "message"),
    [
        (lambda value: (100 * value).to(torch.int8), "have values of int8 in "),
        (lambda value: value.double() * 1e300, "have values that are not finite"),
    ],
)
def test_values_of_another_kind(untouched, published, tmp_path, spoil, message):
    before = {name: value.clone() for name, value in untouched.state_dict().items()}
    name = next(iter(published["det_adapters"]))
    published["det_adapters"] = {**published["det_adapters"], name: spoil(published["det_adapters"][name])}
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


def spoil(published, how: str) -> str:
    """Make the last-looked-at branch wrong in some way, and return what the error must name."""
    state = published["det_adapters"]
    if how == "missing":
        del state["3.fc2.0.weight"]
        return r"det_adapters\.3\.fc2\.0\.weight is missing in the file and \(128, 24\) in the model"
    if how == "unknown":
        state["4.fc1.0.weight"] = state["3.fc1.0.weight"]
        return r"det_adapters\.4\.fc1\.0\.weight is \(24, 128\) in the file and missing in the model"
    state["1.fc1.0.weight"] = torch.zeros(24, 64)
    return r"det_adapters\.1\.fc1\.0\.weight is \(24, 64\) in the file and \(24, 128\) in the model"


@pytest.mark.parametrize("how", ["missing", "unknown", "misshaped"])
def test_adapters_of_another_model(untouched, published, tmp_path, how):
    """Not even the branch that fits is loaded."""
    message = spoil(published, how)
    torch.save(published, tmp_path / "adapters.pth")
    with pytest.raises(ValueError, match=f"{message}.*Check backbone, levels and adaptation"):
        load_adapters(untouched, tmp_path / "adapters.pth")


def test_adapters_do_not_fit_projectors(tiny_config, published, tmp_path):
    torch.save(published, tmp_path / "adapters.pth")
    model = build_mvfa(str(tiny_config), None, TINY.image_size, adaptation="projector")
    with pytest.raises(ValueError, match=r"0\.fc2\.0\.weight is .* missing in the model"):
        load_adapters(model, tmp_path / "adapters.pth")
