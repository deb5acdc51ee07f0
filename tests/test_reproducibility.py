"""The same seed on the same machine gives the same bits, and results say what they came of."""

import shutil

import pandas as pd
import pytest
import torch
from anomalib.engine import Engine

from anomalib_mvfa import BMADFewShot, BMADLeaveOneOut, Mvfa
from anomalib_mvfa.io import dataset_digest, file_digest

GPU_TOLERANCE = 2e-3
"""Two steps of Adam's learning rate: sums whose order differs can turn the sign of a gradient that is near 0."""


@pytest.fixture
def trained(phantom_root, tiny_config, tmp_path):
    """Return a function that trains for two epochs and returns adapters, bank and figures."""

    def run(model_seed=0, data_seed=0, trainer=None, **changes):
        model = Mvfa(
            str(tiny_config), pretrained=None, image_size=56, max_epochs=2, seed=model_seed, visualizer=False, **changes
        )
        data = BMADFewShot(phantom_root, k_shot=2, num_workers=0, train_batch_size=11, seed=data_seed)
        trainer = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False, **(trainer or {})}
        engine = Engine(default_root_dir=tmp_path, **trainer)
        (figures,) = engine.train(model, datamodule=data)
        state = model.model.state_dict()
        return {name: value for name, value in state.items() if not name.startswith("backbone.")}, figures

    return run


@pytest.mark.parametrize(
    ("accelerator", "deterministic", "tolerance"),
    [
        ("cpu", False, 0.0),
        pytest.param("gpu", True, 0.0, marks=pytest.mark.gpu),
        pytest.param("gpu", False, GPU_TOLERANCE, marks=pytest.mark.gpu),
    ],
)
def test_the_same_seed_gives_the_same_bits(trained, accelerator, deterministic, tolerance):
    trainer = {"accelerator": accelerator, "deterministic": deterministic}
    torch.manual_seed(1)  # what the caller has drawn before does not matter
    (first, figures), _ = trained(trainer=trainer), torch.rand(7)
    again, same_figures = trained(trainer=trainer)
    assert first.keys() == again.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            again[name], value, rtol=0, atol=tolerance, equal_nan=True, msg=lambda text, name=name: f"{name}: {text}"
        )
    assert same_figures == pytest.approx(figures, abs=tolerance)


def test_another_seed_gives_others(trained):
    states = [trained(**seeds)[0] for seeds in ({}, {"model_seed": 1}, {"data_seed": 1})]
    first, *others = (state["det_adapters.0.fc1.0.weight"] for state in states)
    assert not any(torch.equal(first, other) for other in others)


class Data:
    """A data set of files, labels and masks."""

    def __init__(self, rows):
        self.samples = pd.DataFrame(rows, columns=["image_path", "label_index", "mask_path"])


@pytest.fixture
def files(tmp_path):
    """Four files of different content."""
    for name in "abcd":
        (tmp_path / name).write_text(name)
    return {name: str(tmp_path / name) for name in "abcd"}


def test_a_fingerprint_is_of_contents_labels_and_masks(files, tmp_path):
    rows = [(files["a"], 0, ""), (files["b"], 1, files["c"])]
    first = dataset_digest(Data(rows))
    shutil.copy(files["a"], tmp_path / "z")
    assert dataset_digest(Data([rows[1], (str(tmp_path / "z"), 0, "")])) == first  # names and order do not matter
    others = {
        "image": [(files["d"], 0, ""), rows[1]],
        "label": [(files["a"], 1, ""), rows[1]],
        "mask": [rows[0], (files["b"], 1, files["d"])],
        "no mask": [rows[0], (files["b"], 1, "")],
        "one less": rows[:1],
        "one twice": [*rows, rows[0]],
    }
    digests = {name: dataset_digest(Data(changed)) for name, changed in others.items()}
    assert len({first, *digests.values()}) == 1 + len(others)


def test_a_file_that_changes_is_read_again(files):
    before = file_digest(files["a"])
    assert file_digest(files["a"]) == before
    with open(files["a"], "w") as file:  # noqa: PTH123
        file.write("changed")
    assert file_digest(files["a"]) != before


def test_every_kind_of_data_has_a_fingerprint(categories):
    few = BMADFewShot(categories, k_shot=2)
    out = BMADLeaveOneOut(categories, train_categories=["Chest"])
    for data in (few, out):
        data.setup()
    found = [dataset_digest(part) for data in (few, out) for part in (data.train_data, data.test_data)]
    assert None not in found
    assert found[1] == found[3]  # both test all of Brain
    assert dataset_digest(object()) is None
