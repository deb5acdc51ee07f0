"""Files that are damaged at random: what reads them gives the right thing or one error of its own, and nothing else."""

import copy
import os
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save_file

from anomalib_mvfa import FewShotFolder, load_adapters
from anomalib_mvfa.compare.config import Comparison
from anomalib_mvfa.compare.job import jobs_of
from anomalib_mvfa.compare.results import read_result
from anomalib_mvfa.data.reading import read_image
from anomalib_mvfa.data.scan_files import check_window, read_scan, to_8_bit
from anomalib_mvfa.data.support import read_support_list
from anomalib_mvfa.model.weights import read_state
from recipe import TINY, adapter_weights
from scan_recipe import write_dicom, write_nifti

EXAMPLES = int(os.environ.get("ANOMALIB_MVFA_FUZZ_EXAMPLES", "40"))
"""Damaged files of each kind; the same ones in every run."""
IMAGES = {"a.png": {}, "a.jpg": {"quality": 90}, "a.tif": {"compression": "tiff_lzw"}, "a.bmp": {}, "a.gif": {}}
SCANS = ("a.dcm", "a.nii", "a.nii.gz", "deep.tif", "deep.png")
WEIGHTS = ("a.pt", "a.safetensors", "old.pt")

fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)


@pytest.fixture(autouse=True)
def _quiet():
    """Readers warn of much that is odd."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


@st.composite
def damage(draw):
    """Return a function that cuts, changes, repeats or inserts some bytes."""
    how = draw(st.sampled_from(["cut", "change", "zero", "repeat", "insert"]))
    place, extent = draw(st.floats(0, 1)), draw(st.integers(1, 64))
    made = draw(st.binary(min_size=1, max_size=8))

    def apply(whole):
        at = int(place * len(whole))
        if how == "cut":
            return whole[:at]
        if how == "change":
            return whole[:at] + made + whole[at + len(made) :]
        if how == "zero":
            return whole[:at] + bytes(extent) + whole[at + extent :]
        if how == "repeat":
            return whole[: at + extent] + whole[at:]
        return whole[:at] + made + whole[at:]

    return apply


damages = st.lists(damage(), min_size=1, max_size=3)


def damaged(path, changes):
    """Write a damaged copy of a file beside it."""
    other = path.with_name(f"damaged_{path.name}")
    content = path.read_bytes()
    for change in changes:
        content = change(content)
    other.write_bytes(content)
    return other


@pytest.fixture(scope="session")
def whole(tmp_path_factory):
    """A folder of whole files of every kind."""
    folder = tmp_path_factory.mktemp("whole")
    values = np.random.default_rng(0).integers(0, 256, (24, 20, 3), np.uint8)
    for name, options in IMAGES.items():
        Image.fromarray(values).save(folder / name, **options)
    deep = values[..., 0].astype(np.uint16) * 200
    write_dicom(folder / "a.dcm", deep, RescaleSlope=1, RescaleIntercept=-1024, WindowCenter=40, WindowWidth=400)
    for name in ("a.nii", "a.nii.gz"):
        write_nifti(folder / name, deep[..., None].astype(np.int16))
    for name in ("deep.tif", "deep.png"):
        Image.fromarray(deep).save(folder / name)
    state = torch.nn.Linear(3, 4).state_dict()
    torch.save(state, folder / "a.pt")
    torch.save(state, folder / "old.pt", _use_new_zipfile_serialization=False)
    save_file(state, folder / "a.safetensors")
    torch.save(adapter_weights(TINY), folder / "adapters.pth")
    (folder / "own.csv").write_text("image,label,mask,group\n" + "".join(f"{name},normal,,p1\n" for name in IMAGES))
    (folder / "2-shot.txt").write_text("n-0: 004.png 001.png\na-0: 000.png 005.png\n")
    return folder


def shown(path):
    """Return the 8-bit slices of a scan."""
    return to_8_bit(read_scan(path), check_window([0, 1000]), path)


def listed(path):
    """Return the labels in a table of own images."""
    data = FewShotFolder(table=path)
    data.source.setup()
    return data.source.test_data.samples.label_index


READERS = {
    **dict.fromkeys(IMAGES, (read_image, lambda image: image.mode == "RGB")),
    **dict.fromkeys(SCANS, (shown, lambda slices: all(one.mode in {"L", "RGB"} for one in slices))),
    **dict.fromkeys(WEIGHTS, (read_state, lambda state: all(map(torch.is_tensor, state.values())))),
    "own.csv": (listed, lambda labels: set(labels) <= {0, 1}),
    "2-shot.txt": (lambda path: read_support_list(path, "Brain", 2), lambda names: len(names) == 2),
}
"""Files of each kind, what reads them, and whether a result is one of its kind."""


@pytest.mark.parametrize("name", READERS)
@fuzzed
@given(changes=damages)
def test_files_are_read_or_named(whole, name, changes):
    read, is_right = READERS[name]
    path = damaged(whole / name, changes)
    try:
        result = read(path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017  # either outcome is right
    else:
        assert is_right(result)


@fuzzed
@given(changes=damages)
def test_adapters(whole, tiny_model, changes):
    path = damaged(whole / "adapters.pth", changes)
    before = {name: value.clone() for name, value in tiny_model.state_dict().items()}
    try:
        load_adapters(tiny_model, path)
    except ValueError as error:
        assert str(path) in str(error)  # noqa: PT017
        for name, value in tiny_model.state_dict().items():
            assert torch.equal(value, before[name]) or value.isnan().any(), name
    else:
        assert all(value.isfinite().all() for value in tiny_model.seg_adapters.state_dict().values())


CONFIG = {
    "title": "Fuzzed",
    "data": {"class_path": "BMADOneClass", "init_args": {"root": "data", "num_workers": 0}},
    "categories": ["Brain", "Chest"],
    "k_shots": [2, 4],
    "seeds": [0],
    "weights": {"MVFA": None},
    "group_by": "patient[0-9]+",
    "cluster": None,
    "methods": {
        "MVFA": {"protocol": "few_shot", "model": {"class_path": "Mvfa", "init_args": {"max_epochs": 1}}},
        "PatchCore": {
            "protocol": "few_normal",
            "model": {"class_path": "Patchcore"},
            "data": {"train_batch_size": 4},
            "trainer": {"max_epochs": 1},
            "categories": ["Brain"],
        },
    },
}
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**40), 2**40),
    st.floats(),
    st.text(max_size=6),
    st.lists(st.one_of(st.none(), st.integers(), st.text(max_size=3)), max_size=2),
    st.dictionaries(st.one_of(st.text(max_size=6), st.integers()), st.none(), max_size=2),
)


def places(tree, path=()):
    """Yield the path of every value in a tree of mappings and lists."""
    yield path
    for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ():
        yield from places(value, (*path, key))


def plan(path):
    """Read a comparison and list its jobs, as far as that goes without data."""
    try:
        jobs = jobs_of(Comparison.load(path))
    except (ValueError, OSError) as error:
        assert str(error).strip()  # noqa: PT017
    else:
        assert all(job.folder for job in jobs)


def test_the_whole_config_is_right(whole):
    (whole / "compare.yaml").write_text(yaml.safe_dump(CONFIG))
    assert len(jobs_of(Comparison.load(whole / "compare.yaml"))) == 6


@fuzzed
@given(changes=damages)
def test_configs(whole, changes):
    (whole / "compare.yaml").write_text(yaml.safe_dump(CONFIG))
    plan(damaged(whole / "compare.yaml", changes))


@settings(fuzzed, max_examples=4 * EXAMPLES)
@given(place=st.sampled_from(list(places(CONFIG))[1:]), junk=JUNK)
def test_values_of_configs(whole, place, junk):
    config = copy.deepcopy(CONFIG)
    inner = config
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = junk
    (whole / "values.yaml").write_text(yaml.safe_dump(config, allow_unicode=True), "utf-8", "backslashreplace")
    plan(whole / "values.yaml")


@fuzzed
@given(changes=damages)
def test_results(whole, changes):
    folder = Path(whole, "run", "jobs", "job")
    folder.mkdir(parents=True, exist_ok=True)
    source = whole / "result.json"
    source.write_text('{"method": "MVFA", "protocol": "few_shot", "category": "Brain", "k_shot": 4, "seed": 0}')
    damaged(source, changes).replace(folder / "result.json")
    with pytest.raises(ValueError, match=r"result\.json is no result of a job .*Remove its folder"):
        read_result(whole / "run", "job")
