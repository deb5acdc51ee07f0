"""A stranger's mistakes: each ends in one clear error that names the value and the remedy, or in the right thing."""

import logging
import shutil

import numpy as np
import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import Folder
from anomalib.engine import Engine
from PIL import Image

from anomalib_mvfa import BMADFewShot, BrainPhantom, FewShot, Mvfa


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


# ------------------------------------------------------------------------------------------- What is done to the images


def images(root, part):
    """Return the files of a part such as "valid/good/img"."""
    return sorted((root / "Brain" / part).iterdir())


def nothing(root):
    """Leave all as it is."""


def empty(split):
    def spoil(root):
        for kind in ("good", "Ungood"):
            shutil.rmtree(root / "Brain" / split / kind)
            (root / "Brain" / split / kind / "img").mkdir(parents=True)

    return spoil


def remove(part, index):
    return lambda root: images(root, part)[index].unlink()


def change(part, changed):
    """Put changed arrays in the place of all images of a part."""

    def spoil(root):
        for path in images(root, part):
            with Image.open(path) as image:
                array = np.asarray(image)
            Image.fromarray(changed(array)).save(path)

    return spoil


DEEP = r"\.png has more than 8 bits a channel, .* Convert it to 8 bits with that window"
UNREADABLE = r"test.good.img.001\.png cannot be read as an image \(.*Restore the file or take"
NO_IMAGES = r"Brain.{} has no images in good/ or Ungood/ \(\.bmp, "
MISTAKES = {
    "category that is not there": (
        nothing,
        {"category": "Chest"},
        r"holds neither Chest nor Chest_AD; categories found there: Brain\. Give the folder",
    ),
    "empty valid": (empty("valid"), {}, NO_IMAGES.format("valid")),
    "empty test": (empty("test"), {}, NO_IMAGES.format("test")),
    "no shots": (nothing, {"k_shot": 0}, r"k_shot=0 must be at least 1\."),
    "too many shots": (
        nothing,
        {"k_shot": 99},
        r"k_shot=99 is too large: Brain has 6 normal validation images\. Choose at most 6, or give a",
    ),
    "negative shots": (nothing, {"abnormal_shots": -1}, r"abnormal_shots=-1 must be at least 0\."),
    "group that matches nothing": (
        nothing,
        {"group_by": r"patient\d+"},
        r"group_by='patient.*' matches nothing in .*png\. It must match the path of every",
    ),
    "one group": (
        nothing,
        {"group_by": "Brain"},
        r"k_shot=1 is too large: Brain has 0 normal validation images in groups of their own",
    ),
    "missing mask": (
        remove("valid/Ungood/label", 2),
        {},
        r"1 images have no mask \['002'\], 0 masks have no image \[\]\. A mask lies in label or anomaly_mask under",
    ),
    "mask of another size": (
        change("valid/Ungood/label", lambda mask: mask[:48, :32]),
        {},
        r"Mask .*\.png is 32x48 pixels, its image 64x64\. They must agree\.",
    ),
    "mask of zero and one": (
        change("valid/Ungood/label", lambda mask: mask // 255),
        {},
        r"Mask .* has grey values such as \[1\], of 1 up to 127 that would not count.*masks with 0 and 255",
    ),
    "16-bit support": (change("valid/Ungood/img", lambda image: image.astype(np.uint16) * 16), {}, DEEP),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_in_data_are_named(root, run, mistake):
    spoil, arguments, message = MISTAKES[mistake]
    spoil(root)
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        run(few_shot(root, **arguments))


def test_wrong_root(root, run):
    message = r"root='.*valid' holds neither Brain nor Brain_AD; .* the folder that c"
    with pytest.raises(FileNotFoundError, match=message):
        run(few_shot(root / "Brain" / "valid"))


def test_no_root_and_no_network(tmp_path, run, monkeypatch):
    def urlretrieve(*args, **kwargs):
        msg = "<urlopen error [Errno -3] Temporary failure in name resolution>"
        raise OSError(msg)

    monkeypatch.setattr("anomalib.data.utils.download.urlretrieve", urlretrieve)
    message = r"BMAD could not be downloaded to it \(.*name resolution.*\)\. Run once with"
    with pytest.raises(RuntimeError, match=message):
        run(few_shot(tmp_path / "nowhere"))
    assert not (tmp_path / "nowhere").exists()


def test_empty_own_folder(tmp_path, run):
    (tmp_path / "good").mkdir()
    source = Folder("own", normal_dir="good", root=tmp_path)
    with pytest.raises(FileNotFoundError, match=r"good does not exist or holds no image \(\.jpg, .*Correct the folder"):
        run(FewShot(source))


def test_support_list_that_does_not_fit(root, run, support_lists):
    message = r"4-shot\.txt does not exist\. Lists found there: \['Brain.2-shot\.txt'\]"
    with pytest.raises(FileNotFoundError, match=message):
        run(few_shot(root, k_shot=4, support_list=support_lists))
    remove("valid/good/img", 4)(root)
    with pytest.raises(ValueError, match=r"support_list='.*' \(normal\) names \['004\.png'\], not among the 5 images"):
        run(few_shot(root, k_shot=2, support_list=support_lists))


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
    for path in images(root, f"valid/{other}/img")[1:]:
        path.unlink()
        (path.parent.parent / "label" / path.name).unlink(missing_ok=True)
    with caplog.at_level(logging.INFO, "anomalib.mvfa"):
        assert 0 <= run(few_shot(root))["image_F1Score"] <= 1
    assert "Thresholds come from the 2 support images: validation did not show both labels." in caplog.text
    assert caplog.text.count("are optimistic: the adapters have learnt from these very images") == 1


def test_validation_of_no_image_works(root, run, caplog):
    with caplog.at_level(logging.INFO, "anomalib.mvfa"):
        assert 0 <= run(few_shot(root, k_shot=6, train_batch_size=22))["image_F1Score"] <= 1
    assert "Thresholds come from the 12 support images" in caplog.text


def test_normal_images_alone_build_the_bank_and_say_so(tmp_path, run, caplog):
    data = BrainPhantom(tmp_path, size=32, eval_batch_size=16, num_workers=0)
    with caplog.at_level(logging.INFO, "anomalib.mvfa"):
        assert 0 <= run(data)["image_AUROC"] <= 1
    assert "The training data hold no abnormal image" in caplog.text
    assert "Memory bank: 16 of 16 normal training images" in caplog.text
    assert "zero_shot_weight=0.0, few_shot_weight=0.5" in caplog.text  # of adapters that have not learnt


# ------------------------------------------------------------------------------------------------- On the command line


@pytest.mark.parametrize(
    ("category", "message"),
    [
        ("brain", r"BMAD has no category 'brain'\. Choose from: Brain, Liver, Retina_RESC, .*Hist"),
        ("Brain", UNREADABLE),  # by a worker
    ],
)
def test_mistakes_on_the_command_line(tmp_path, root, tiny_config, category, message):
    images(root, "test/good/img")[1].write_bytes(b"not an image")
    model = {"class_path": "Mvfa", "init_args": {"backbone": str(tiny_config), "pretrained": None, "image_size": 56}}
    data = {"root": str(root), "category": category, "k_shot": 1, "num_workers": 2}
    trainer = {"accelerator": "cpu", "devices": 1, "max_epochs": 1}
    config = {"model": model, "data": {"class_path": "BMADFewShot", "init_args": data}, "trainer": trainer}
    (tmp_path / "config.yaml").write_text(yaml.safe_dump({**config, "default_root_dir": str(tmp_path)}))
    with pytest.raises(ValueError, match=message):
        AnomalibCLI(["train", "--config", str(tmp_path / "config.yaml")])
