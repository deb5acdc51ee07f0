"""A stranger's mistakes: each ends in one clear error that names the value and the remedy, or in the right thing."""

import logging
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image

from anomalib_mvfa import BMADFewShot, BrainPhantom, FewShot, Mvfa

GROUPS = {"valid": ("valid", "good"), "support": ("valid", "Ungood"), "test": ("test", "good")}


@pytest.fixture
def root(phantom_root, tmp_path):
    """A copy of the small data set, to spoil."""
    shutil.copytree(phantom_root / "Brain", tmp_path / "data" / "Brain")
    return tmp_path / "data"


@pytest.fixture
def run(tmp_path, tiny_config):
    """Return a function that trains an epoch on a datamodule, tests, and returns the results."""

    def run(data):
        model = Mvfa(str(tiny_config), pretrained=None, image_size=56, max_epochs=1, visualizer=False)
        options = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
        engine = Engine(default_root_dir=tmp_path / "results", **options)
        engine.fit(model, datamodule=data)
        (results,) = engine.test(model, datamodule=data)
        return results

    return run


def few_shot(root, **arguments):
    return BMADFewShot(root, **{"k_shot": 1, "num_workers": 0, **arguments})


def every_image(root, split, kind):
    return sorted((root / "Brain" / split / kind / "img").iterdir())


def every_mask(root, split):
    return sorted((root / "Brain" / split / "Ungood" / "label").iterdir())


# --------------------------------------------------------------------------------------------------- Where the data are


def test_wrong_root(root, run):
    with pytest.raises(
        FileNotFoundError, match=r"root='.*valid' holds neither Brain nor Brain_AD; .* the folder that c"
    ):
        run(few_shot(root / "Brain" / "valid"))


def test_category_that_is_not_there(root, run):
    message = r"holds neither Chest nor Chest_AD; categories found there: Brain\. Give the folder"
    with pytest.raises(FileNotFoundError, match=message):
        run(few_shot(root, category="Chest"))


def test_no_root_and_no_network(tmp_path, run, monkeypatch):
    def urlretrieve(*args, **kwargs):
        msg = "<urlopen error [Errno -3] Temporary failure in name resolution>"
        raise OSError(msg)

    monkeypatch.setattr("anomalib.data.utils.download.urlretrieve", urlretrieve)
    with pytest.raises(
        RuntimeError, match=r"BMAD could not be downloaded to it \(.*name resolution.*\)\. Run once with"
    ):
        run(few_shot(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("emptied", ["valid", "test"])
def test_empty_folder(root, run, emptied):
    for kind in ("good", "Ungood"):
        shutil.rmtree(root / "Brain" / emptied / kind)
        (root / "Brain" / emptied / kind / "img").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=rf"Brain.{emptied} has no images in good/ or Ungood/ \(\.bmp, "):
        run(few_shot(root))


def test_empty_own_folder(tmp_path, run):
    (tmp_path / "good").mkdir()
    source = Folder("own", normal_dir="good", root=tmp_path)
    with pytest.raises(RuntimeError, match=r"Found 0 .*images in .*good"):  # anomalib's
        run(FewShot(source))


# --------------------------------------------------------------------------------------------------- Which images are K


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"k_shot": 0}, r"k_shot=0 must be at least 1\."),
        ({"k_shot": 99}, r"k_shot=99 is too large: Brain has 6 normal validation images\. Choose at most 6, or give a"),
        ({"abnormal_shots": -1}, r"abnormal_shots=-1 must be at least 0\."),
        (
            {"group_by": r"patient\d+"},
            r"group_by='patient.*' matches nothing in .*png\. It must match the path of every",
        ),
        ({"group_by": "Brain"}, r"k_shot=1 is too large: Brain has 0 normal validation images in groups of their own"),
    ],
)
def test_impossible_support(root, run, arguments, message):
    with pytest.raises(ValueError, match=message):
        run(few_shot(root, **arguments))


def test_support_list_that_names_absent_files(root, run, support_lists):
    every_image(root, "valid", "good")[4].unlink()
    with pytest.raises(ValueError, match=r"support_list='.*' \(normal\) names \['004\.png'\], not among the 5 images"):
        run(few_shot(root, k_shot=2, support_list=support_lists))


def test_support_list_for_another_k(root, run, support_lists):
    with pytest.raises(
        FileNotFoundError, match=r"4-shot\.txt does not exist\. Lists found there: \['Brain.2-shot\.txt'\]"
    ):
        run(few_shot(root, k_shot=4, support_list=support_lists))


# ---------------------------------------------------------------------------------------------------------------- Masks


def test_missing_masks(root, run):
    every_mask(root, "valid")[2].unlink()
    message = (
        r"1 images have no mask \['002'\], 0 masks have no image \[\]\. A mask lies in label or anomaly_mask under"
    )
    with pytest.raises(ValueError, match=message):
        run(few_shot(root))


def test_mask_of_another_size(root, run):
    for path in every_mask(root, "valid"):
        with Image.open(path) as mask:
            mask.resize((32, 48)).save(path)
    with pytest.raises(ValueError, match=r"Mask .*\.png is 32x48 pixels, its image 64x64\. They must agree\."):
        run(few_shot(root))


def test_masks_of_zero_and_one(root, run):
    for path in every_mask(root, "valid"):
        with Image.open(path) as mask:
            Image.fromarray(np.asarray(mask) // 255).save(path)
    with pytest.raises(
        ValueError, match=r"Mask .* has values up to 1, and only those above 127 .*masks with 0 and 255"
    ):
        run(few_shot(root))


# --------------------------------------------------------------------------------------------------------------- Images


@pytest.mark.parametrize(("split", "kind"), GROUPS.values(), ids=GROUPS)
def test_16_bit_image(root, run, split, kind):
    for path in every_image(root, split, kind):
        with Image.open(path) as image:
            Image.fromarray(np.asarray(image).astype(np.uint16) * 16).save(path)
    with pytest.raises(
        ValueError, match=r"\.png has more than 8 bits a channel, .* Convert it to 8 bits with that window"
    ):
        run(few_shot(root))


def test_cmyk_and_other_modes_work(root, run):
    for mode, suffix, split in (("CMYK", ".jpg", "valid"), ("P", ".png", "test"), ("CMYK", ".tif", "test")):
        path = every_image(root, split, "good")[0]
        with Image.open(path) as image:
            converted = image.convert(mode)
        path.unlink()
        converted.save(path.with_suffix(suffix))
    assert 0 <= run(few_shot(root, k_shot=2))["image_AUROC"] <= 1


@pytest.mark.parametrize(("state", "workers"), [("empty", 0), ("corrupt", 0), ("truncated", 0), ("corrupt", 2)])
def test_unreadable_file(root, run, state, workers):
    path = every_image(root, "test", "good")[1]
    path.write_bytes({"empty": b"", "corrupt": b"not an image", "truncated": path.read_bytes()[:1000]}[state])
    with pytest.raises(
        ValueError, match=r"test.good.img.001\.png cannot be read as an image \(.*Restore the file or take"
    ):
        run(few_shot(root, num_workers=workers))


# -------------------------------------------------------------------------------------------------------------- Weights


def test_no_weight_file(tiny_config, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"pretrained='.*ViT\.pt' is neither a file nor a tag of .*null"):
        Mvfa(str(tiny_config), pretrained=str(tmp_path / "ViT.pt"))


def test_weights_without_a_network(monkeypatch):
    def download(*args, **kwargs):
        msg = "[Errno -3] Temporary failure in name resolution\nand a long trace"
        raise OSError(msg)

    monkeypatch.setattr("open_clip.download_pretrained", download)
    message = r"The weights 'openai' of ViT-B-32 could not be loaded \(.*name resolution\)\. .*null"
    with pytest.raises(RuntimeError, match=message):
        Mvfa("ViT-B-32", pretrained="openai")


# --------------------------------------------------------------------------------------------------- What is no mistake


@pytest.mark.parametrize("kind", ["good", "Ungood"])
def test_validation_of_one_kind_takes_thresholds_from_the_support(root, run, kind, caplog):
    other = {"good": "Ungood", "Ungood": "good"}[kind]
    for path in every_image(root, "valid", other)[1:]:
        path.unlink()
        (path.parent.parent / "label" / path.name).unlink(missing_ok=True)
    with caplog.at_level(logging.INFO, "anomalib.mvfa"):
        assert 0 <= run(few_shot(root))["image_F1Score"] <= 1
    assert "Thresholds come from the 2 support images: validation did not show both kinds." in caplog.text


def test_validation_of_no_image_works(root, run, caplog):
    with caplog.at_level(logging.INFO, "anomalib.mvfa"):
        assert 0 <= run(few_shot(root, k_shot=6))["image_F1Score"] <= 1
    assert "Thresholds come from the 12 support images" in caplog.text


def test_normal_images_alone_build_the_bank_and_say_so(tmp_path, run, caplog):
    data = BrainPhantom(tmp_path, size=32, eval_batch_size=16, num_workers=0)
    with caplog.at_level(logging.INFO, "anomalib.mvfa"):
        assert 0 <= run(data)["image_AUROC"] <= 1
    assert "The training data hold no abnormal image" in caplog.text
    assert "Memory bank: 16 of 16 normal training images" in caplog.text


# ------------------------------------------------------------------------------------------------ On the command line


def command(tmp_path, tiny_config, **data):
    """Return the arguments of `anomalib train` on a data set."""
    model = {"class_path": "Mvfa", "init_args": {"backbone": str(tiny_config), "pretrained": None, "image_size": 56}}
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 1}
    config = {"model": model, "data": {"class_path": "BMADFewShot", "init_args": data}, "trainer": trainer}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "default_root_dir": str(tmp_path)}))
    return ["train", "--config", str(tmp_path / "config.yaml")]


def test_category_typo_on_the_command_line(tmp_path, root, tiny_config):
    arguments = command(tmp_path, tiny_config, root=str(root), category="brain")
    with pytest.raises(
        ValueError, match=r"BMAD has no category 'brain'\. Choose from: Brain, Liver, Retina_RESC, .*Hist"
    ):
        AnomalibCLI(arguments)


def test_corrupt_image_in_a_worker_on_the_command_line(tmp_path, root, tiny_config):
    path = every_image(root, "test", "Ungood")[0]
    path.write_bytes(b"not an image")
    arguments = command(tmp_path, tiny_config, root=str(root), category="Brain", k_shot=1, num_workers=2)
    done = subprocess.run(
        [sys.executable, "-m", "anomalib.cli.cli", *arguments],
        env={**os.environ, "COLUMNS": "400"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode != 0
    words = " ".join(done.stderr[-3000:].split())
    assert f"{path} cannot be read as an image" in words
    assert "Restore the file or take it out of the data set." in words
