"""Files as they turn up in data sets, one row each: the right pixels, or one error that names the file."""

import os
import warnings
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
import torch
from anomalib.data import AnomalibDataset
from anomalib.deploy import ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from lightning.pytorch import Callback
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_mvfa import BMADFewShot, Mvfa, read_image
from anomalib_mvfa.data.dataset import SampleDataset
from anomalib_mvfa.data.phantom import write_phantom
from scan_recipe import write_rgb_16_bit

GREY = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
RED = np.stack([GREY, GREY // 2, np.zeros_like(GREY)], axis=-1)
RGB_OF_GREY = np.stack([GREY] * 3, axis=-1)
BROKEN = r"cannot be read as an image \(.*Restore the file or take it out of the data set"
HIGH_BIT_DEPTH = r"has more than 8 bits a channel, and only its origin tells which intensity window to show\. Conv"
PAGES = r"has 2 pages, of which one would be read"
NO_FILE = r"is no file: a folder, or a link to nothing"


class Row(NamedTuple):
    """What writes a file at a path; its pixels as RGB, or what the error says after its name; tolerance of pixels."""

    write: Callable
    expected: np.ndarray | str
    name: str = "odd.png"
    tolerance: int = 0


def picture(values, mode=None, **options):
    """Return a writer of a picture of values, converted to a mode."""

    def write(path):
        image = Image.fromarray(values)
        (image.convert(mode) if mode else image).save(path, **options)

    return write


def content(made):
    return lambda path: path.write_bytes(made)


def cut(share):
    def write(path):
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])

    return write


def palette(path):
    image = Image.fromarray(GREY // 4, "P")
    image.putpalette([part for value in range(64) for part in (4 * value, 2 * value, 0)])
    image.save(path)


def turned(orientation, values):
    """Return a writer of a picture that is upright once it is turned as its EXIF data say."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    return picture(values, exif=exif)


def pages(path, **options):
    Image.fromarray(GREY).save(path, save_all=True, append_images=[Image.fromarray(GREY[::-1])], **options)


def photo_with_preview(path):
    Image.fromarray(RGB_OF_GREY).save(
        path, "MPO", save_all=True, append_images=[Image.fromarray(RGB_OF_GREY[:4, :4])], quality=100, subsampling=0
    )


def link(path):
    target = path.parents[2] / "elsewhere.png"
    Image.fromarray(GREY).save(target)
    path.symlink_to(target)


TABLE = {
    "grey": Row(picture(GREY), RGB_OF_GREY),
    "colour": Row(picture(RED), RED),
    "alpha is left out": Row(picture(RED, "RGBA"), RED),
    "grey with alpha": Row(picture(GREY, "LA"), RGB_OF_GREY),
    "palette": Row(palette, RED),
    "palette of a GIF by another name": Row(picture(GREY, format="GIF"), RGB_OF_GREY),
    "one bit": Row(picture(GREY > 99), 255 * (RGB_OF_GREY > 99)),
    "CMYK": Row(picture(RED, "CMYK"), RED, "odd.tif"),
    "CMYK JPEG": Row(picture(RED, "CMYK", quality=100, subsampling=0), RED, "odd.jpg", tolerance=24),
    "upper case": Row(picture(GREY), RGB_OF_GREY, "ODD.PNG"),
    "JPEG by another name": Row(picture(GREY, format="JPEG", quality=100), RGB_OF_GREY, tolerance=8),
    "EXIF, upright": Row(turned(1, RED), RED),
    "EXIF, mirrored": Row(turned(2, RED[:, ::-1]), RED),
    "EXIF, upside down": Row(turned(3, RED[::-1, ::-1]), RED),
    "EXIF, upside down and mirrored": Row(turned(4, RED[::-1]), RED),
    "EXIF, transposed": Row(turned(5, RED.swapaxes(0, 1)), RED),
    "EXIF, to the left": Row(turned(6, RED.swapaxes(0, 1)[::-1]), RED),
    "EXIF, transposed and upside down": Row(turned(7, RED.swapaxes(0, 1)[::-1, ::-1]), RED),
    "EXIF, to the right": Row(turned(8, RED[::-1].swapaxes(0, 1)), RED),
    "colour profile": Row(picture(RGB_OF_GREY, icc_profile=b"any", quality=100), RGB_OF_GREY, "odd.jpg", tolerance=8),
    "photo with a preview": Row(photo_with_preview, RGB_OF_GREY, "odd.jpg", tolerance=8),
    "one pixel": Row(picture(GREY[7:, 7:]), RGB_OF_GREY[7:, 7:]),
    "link to elsewhere": Row(link, RGB_OF_GREY),
    "name of no text": Row(picture(GREY), RGB_OF_GREY, os.fsdecode(b"\xff\xfe.png")),
    "name of two lines": Row(picture(GREY), RGB_OF_GREY, "a\nb.png"),
    "name in Chinese": Row(picture(GREY), RGB_OF_GREY, "肝.png"),
    "16-bit grey PNG": Row(picture(GREY.astype(np.uint16) * 100), HIGH_BIT_DEPTH),
    "16-bit grey TIFF": Row(picture(GREY.astype(np.uint16) * 100), HIGH_BIT_DEPTH, "odd.tif"),
    "32-bit TIFF": Row(picture(GREY.astype(np.int32)), HIGH_BIT_DEPTH, "odd.tif"),
    "float TIFF of NaN": Row(picture(np.full((8, 8), np.nan, np.float32)), HIGH_BIT_DEPTH, "odd.tif"),
    "16-bit colour PNG": Row(write_rgb_16_bit, HIGH_BIT_DEPTH),
    "several pages": Row(pages, PAGES, "odd.tif"),
    "film": Row(pages, PAGES),
    "film of a GIF": Row(partial(pages, format="GIF"), PAGES),
    "film of WebP": Row(partial(pages, format="WEBP"), PAGES),
    "bomb": Row(lambda path: Image.new("1", (14_000, 14_000)).save(path), r"is too large an image .*Scale it down or"),
    "empty": Row(content(b""), BROKEN),
    "text": Row(content(b"not an image"), BROKEN),
    "head of a PNG": Row(content(b"\x89PNG\r\n\x1a\n"), BROKEN),
    "PNG cut short": Row(cut(0.5), BROKEN),
    "JPEG cut short": Row(cut(0.5), BROKEN, "odd.jpg"),
    "TIFF cut short": Row(cut(0.5), BROKEN, "odd.tif"),
    "folder": Row(lambda path: path.mkdir(), NO_FILE),
    "link to nothing": Row(lambda path: path.symlink_to(path.with_name("gone.png")), NO_FILE),
    "link to itself": Row(lambda path: path.symlink_to(path), NO_FILE),
    "pipe": Row(lambda path: os.mkfifo(path), NO_FILE),
}


@pytest.fixture
def folder(tmp_path):
    """A data set's folder of normal test images, of which there are two."""
    write_phantom(tmp_path / "data", size=32, train=0, valid=1, test=2)
    return tmp_path / "data/Brain/test/good/img"


def few_shot(folder):
    data = BMADFewShot(folder.parents[3], k_shot=1, num_workers=0)
    data.setup()
    return data


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
def test_every_file_is_read_right_or_named(row, folder):
    path = folder / row.name
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of large images
        row.write(path)
        if isinstance(row.expected, str):
            with pytest.raises(ValueError, match=f"(?s){path.name}.* ?{row.expected}"):
                list(few_shot(folder).test_data)
            return
        items = {item.image_path: item for item in few_shot(folder).test_data}
    found = 255 * np.moveaxis(items[str(path)].image.numpy(), 0, -1)
    assert len(items) == 5
    assert found.shape == row.expected.shape
    assert np.abs(found - row.expected).max() <= row.tolerance + 0.01


# ------------------------------------------------------------------------------------------- Every way to score a file


@pytest.fixture(scope="module")
def model(tiny_config):
    return Mvfa(str(tiny_config), pretrained=None, image_size=56, few_shot_weight=0, visualizer=False)


class Kept(Callback):
    """Keeps the maps of a test."""

    def on_test_batch_end(self, trainer, pl_module, outputs, *args):
        self.maps = outputs.anomaly_map


@pytest.fixture(scope="module")
def ways(model, tmp_path_factory):
    """Return functions from the path of a file, alone in its folder, to its map (H, W): every way there is."""
    root = tmp_path_factory.mktemp("ways")
    kept = Kept()
    quiet = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu", "devices": 1}
    engine = Engine(default_root_dir=root, callbacks=[kept], **quiet)

    def test(path, form=SampleDataset):
        samples = pd.DataFrame({"image_path": [str(path)], "mask_path": "", "label_index": 0, "split": "test"})
        samples.attrs["task"] = "segmentation"
        dataset = SampleDataset(samples) if form is SampleDataset else form()
        dataset.samples, dataset.augmentations = samples, model.pre_processor.transform
        engine.test(model, DataLoader(dataset, collate_fn=dataset.collate_fn), verbose=False)
        return kept.maps[0]

    def predict(path):
        (batch,) = engine.predict(model, data_path=path.parent)
        return batch.anomaly_map[0]

    picture(RED)(root / "first.png")
    predict(root / "first.png")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # OpenVINO's cache
        patch.setenv("TRUST_REMOTE_CODE", "1")
        torched = TorchInferencer(engine.export(model, ExportType.TORCH, export_root=root), device="cpu")
        openvino = OpenVINOInferencer(
            engine.export(model, ExportType.OPENVINO, export_root=root), config={"INFERENCE_PRECISION_HINT": "f32"}
        )
        yield {
            "test": test,
            "test of anomalib's dataset": lambda path: test(path, AnomalibDataset),
            "predict": predict,
            "torch": lambda path: torched.predict(read_image(path)).anomaly_map[0].detach(),
            "OpenVINO": lambda path: torch.from_numpy(openvino.predict(read_image(path)).anomaly_map[0]),
        }


@pytest.mark.parametrize("row", TABLE.values(), ids=TABLE)
@pytest.mark.filterwarnings("ignore")
def test_every_way_scores_alike_or_refuses(row, ways, tmp_path):
    (tmp_path / "films").mkdir()
    path, plain = tmp_path / "films" / row.name, tmp_path / "plain.png"
    row.write(path)
    if isinstance(row.expected, str):
        for way in ways.values():
            with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){path.name}|missing file path"):
                way(path)
        return
    Image.fromarray(row.expected.astype(np.uint8)).save(plain)
    expected = ways["test"](plain)
    for name, way in ways.items():
        assert (way(path) - expected).abs().max() < 0.02 + row.tolerance / 255, name


def test_names_of_no_text_pass_through_a_whole_run(folder, tiny_config, tmp_path):
    name = os.fsdecode(b"\xff\xfe.png")
    picture(GREY)(folder / name)
    data = BMADFewShot(folder.parents[3], k_shot=1, train_batch_size=22, num_workers=0)
    model = Mvfa(str(tiny_config), pretrained=None, image_size=56, max_epochs=1)
    engine = Engine(default_root_dir=tmp_path / "run", accelerator="cpu", devices=1, enable_progress_bar=False)
    engine.train(model, datamodule=data)
    assert name in {path.name for path in (tmp_path / "run").rglob("*.png")}


def test_files_that_are_left_out_are_named(folder, caplog):
    for name in ("001.jp2", "001", "Thumbs.db", ".hidden.png"):
        (folder / name).write_bytes(b"")
    assert len(few_shot(folder).test_data) == 4
    assert "3 files are no images by their names and left out: ['001', '001.jp2', 'Thumbs.db']" in caplog.text


def test_images_in_two_places_are_refused(folder):
    picture(GREY)(folder.parent / "beside.png")
    with pytest.raises(ValueError, match=r"good has images both in img/ and beside it, such as beside\.png\. "):
        few_shot(folder)


@pytest.mark.parametrize("place", ["img/000.jpg", "label/000.jpg", "anomaly_mask/000.png"])
def test_two_files_of_one_name_are_refused(folder, place):
    path = folder.parents[1] / "Ungood" / place
    path.parent.mkdir(exist_ok=True)
    picture(GREY)(path)
    with pytest.raises(ValueError, match=r"000\.\w+ and .*000\.\w+ have the same name, but for the suffix\. Rename"):
        few_shot(folder)


@pytest.mark.skipif(os.geteuid() == 0, reason="the superuser reads every file")
def test_files_of_others_are_named(folder):
    (folder / "000.png").chmod(0)
    with pytest.raises(ValueError, match=rf"000\.png {BROKEN}"):
        list(few_shot(folder).test_data)
