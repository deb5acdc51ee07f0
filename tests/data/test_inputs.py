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
from anomalib.data import AnomalibDataset, PredictDataset
from anomalib.deploy import CompressionType, ExportType, OpenVINOInferencer, TorchInferencer
from anomalib.engine import Engine
from lightning.pytorch import Callback
from PIL import Image
from torch.utils.data import DataLoader

from anomalib_mvfa import BMADFewShot, Mvfa, read_image
from anomalib_mvfa.data.dataset import SampleDataset
from anomalib_mvfa.data.phantom import write_phantom
from recipe import READS_YCBCR, images
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


def cielab(path):
    lightness = 255 * (GREY > 99).astype(np.uint8)
    Image.fromarray(np.stack([lightness, 0 * GREY, 0 * GREY], axis=-1), "LAB").save(path)


def link(path):
    target = path.parents[2] / "elsewhere.png"
    Image.fromarray(GREY).save(target)
    path.symlink_to(target)


def damaged(where, byte):
    """Return a writer of a PNG with one byte changed, counted from an end."""

    def write(path):
        picture(GREY)(path)
        data = bytearray(path.read_bytes())
        data[where] ^= byte
        path.write_bytes(data)

    return write


def with_tail(path):
    picture(GREY)(path)
    path.write_bytes(path.read_bytes() + b"written behind the picture")


def see_through_palette(path):
    image = Image.fromarray(GREY // 4, "P")
    image.putpalette([part for value in range(64) for part in (4 * value, 2 * value, 0)])
    image.save(path, transparency=0)


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
    "progressive JPEG": Row(picture(GREY, progressive=True, quality=100), RGB_OF_GREY, "odd.jpg", tolerance=2),
    "grey BMP": Row(picture(GREY), RGB_OF_GREY, "odd.bmp"),
    "colour BMP": Row(picture(RED), RED, "odd.bmp"),
    "one-bit BMP": Row(picture(GREY > 99), 255 * (RGB_OF_GREY > 99), "odd.bmp"),
    "WebP by another name": Row(picture(RED, "RGBA", format="WEBP", lossless=True), RED),
    "TIFF packed by LZW": Row(picture(RED, compression="tiff_lzw"), RED, "odd.tif"),
    "TIFF packed by JPEG": Row(picture(RGB_OF_GREY, compression="jpeg", quality=100), RGB_OF_GREY, "odd.tif", 3),
    "fax TIFF": Row(picture(GREY > 99, compression="group4"), 255 * (RGB_OF_GREY > 99), "odd.tiff"),
    "CIELAB TIFF": Row(cielab, 255 * (RGB_OF_GREY > 99), "odd.tif", tolerance=1),
    "YCbCr TIFF": Row(picture(RGB_OF_GREY, "YCbCr"), RGB_OF_GREY if READS_YCBCR else BROKEN, "odd.tif", tolerance=1),
    "palette with a see-through colour": Row(see_through_palette, RED),
    "EXIF of a PNG, unknown turn": Row(turned(9, RED), RED),
    "EXIF of a TIFF": Row(turned(3, RED[::-1, ::-1]), RED, "odd.tif"),
    "portrait of 3 to 1": Row(picture(np.repeat(GREY, 3, axis=0)), np.repeat(RGB_OF_GREY, 3, axis=0)),
    "a line of pixels": Row(picture(GREY[:1]), RGB_OF_GREY[:1]),
    "text behind the picture": Row(with_tail, RGB_OF_GREY),
    "space in the name": Row(picture(GREY), RGB_OF_GREY, "scan 1 (copy).png"),
    "percent and hash in the name": Row(picture(GREY), RGB_OF_GREY, "50%25 #1.png"),
    "float TIFF": Row(picture(GREY.astype(np.float32) / 255), HIGH_BIT_DEPTH, "odd.tif"),
    "16-bit big-endian TIFF": Row(lambda p: Image.fromarray(GREY.astype(">u2") * 100).save(p), HIGH_BIT_DEPTH, "o.tif"),
    "wrong sum of pixels": Row(damaged(-20, 1), BROKEN),
    "wrong head": Row(damaged(20, 1), BROKEN),
    "HTML in place of a picture": Row(content(b"<!DOCTYPE html><html>404</html>"), BROKEN, "odd.jpg"),
    "pointer of Git LFS": Row(content(b"version https://git-lfs.github.com/spec/v1\n"), BROKEN),
    "DICOM by another name": Row(content(bytes(128) + b"DICM" + bytes(64)), BROKEN),
    "only zeros": Row(content(bytes(4096)), BROKEN, "odd.bmp"),
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


class Kept(Callback):
    """Keeps the map (H, W) of every image, by its path."""

    def on_test_batch_end(self, trainer, pl_module, outputs, *args):
        self.maps.update(zip(outputs.image_path, outputs.anomaly_map, strict=True))

    on_predict_batch_end = on_test_batch_end


@pytest.fixture(scope="module")
def fitted(tiny_config, phantom_root, tmp_path_factory):
    """Return an engine that keeps maps, and a fitted model."""
    quiet = {"enable_progress_bar": False, "logger": False, "accelerator": "cpu", "devices": 1}
    engine = Engine(default_root_dir=tmp_path_factory.mktemp("fitted"), callbacks=[Kept()], **quiet)
    model = Mvfa(str(tiny_config), pretrained=None, image_size=56, levels=[1, 2], max_epochs=1, visualizer=False)
    engine.fit(model, datamodule=BMADFewShot(phantom_root, k_shot=1, train_batch_size=22, num_workers=0))
    return engine, model


@pytest.fixture(scope="module")
def graph(fitted, tmp_path_factory):
    """Return the path of the ONNX file, which OpenVINO reads."""
    for package in ("onnxruntime", "openvino"):
        pytest.importorskip(package)
    engine, model = fitted
    return engine.export(model, ExportType.ONNX, export_root=tmp_path_factory.mktemp("graph"))


def test_exported_graphs_give_the_same_maps_at_any_batch_and_size(fitted, graph):
    import onnxruntime
    import openvino

    model = fitted[1].eval()
    session = onnxruntime.InferenceSession(str(graph))
    names = [output.name for output in session.get_outputs()]
    # Some processors compute in bfloat16 by OpenVINO's own choice.
    compiled = openvino.Core().compile_model(openvino.convert_model(graph), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for batch in (torch.rand(3, 3, 300, 200, generator=torch.Generator().manual_seed(0)), images("films", 1, 512)):
        with torch.no_grad():
            resized = model.pre_processor.transform(batch)  # as in the engine
            expected = model.post_processor(model.model(resized)).anomaly_map.numpy()
        by_onnx = dict(zip(names, session.run(None, {"input": batch.numpy()}), strict=True))
        for found in (by_onnx, compiled(batch.numpy())):
            np.testing.assert_allclose(found["anomaly_map"].reshape(expected.shape), expected, atol=1e-5)


def test_int8_takes_the_support_and_stays_near(fitted, graph, phantom_root, monkeypatch):
    pytest.importorskip("nncf")
    import openvino

    model = fitted[1].eval()
    data = BMADFewShot(phantom_root, k_shot=1, num_workers=0)
    for held_out in ("val_dataloader", "test_dataloader"):
        monkeypatch.setattr(data, held_out, lambda: pytest.fail("looked at images that the model is judged by"))
    with pytest.raises(ValueError, match="compression_type=INT8_PTQ needs images: give --data"):
        model._compress_ov_model(None, CompressionType.INT8_PTQ)
    quantized = model._compress_ov_model(openvino.convert_model(graph), CompressionType.INT8_PTQ, data)
    batch = images("films", 2, 56)
    with torch.no_grad():
        expected = model(batch).anomaly_map.numpy()
    found = openvino.Core().compile_model(quantized, "CPU")(batch.numpy())["anomaly_map"]
    difference = np.abs(found.reshape(expected.shape) - expected)
    assert 0 < difference.mean() < 0.05 * np.ptp(expected)


def samples_of(paths):
    samples = pd.DataFrame({"image_path": [*map(str, paths)], "mask_path": "", "label_index": 0, "split": "test"})
    samples.attrs["task"] = "segmentation"
    return samples


@pytest.fixture(scope="module")
def ways(fitted, graph, tmp_path_factory):
    """Return every way to score a file, as a function from the name of a row to its map and that of its right pixels.

    A run scores all the files that can be read; the data sets of these runs read the others.
    """
    root = tmp_path_factory.mktemp("ways")
    files = {name: root / "files" / f"{at} {row.name}" for at, (name, row) in enumerate(TABLE.items())}
    plain = {name: root / "files" / f"{at}.png" for at, name in enumerate(TABLE)}
    fine = [name for name, row in TABLE.items() if not isinstance(row.expected, str)]
    (root / "files").mkdir()
    for name in fine:
        TABLE[name].write(files[name])
        Image.fromarray(TABLE[name].expected.astype(np.uint8)).save(plain[name])
    engine, model = fitted
    (kept,) = (callback for callback in engine.trainer.callbacks if isinstance(callback, Kept))

    def by_run(dataset, show, run):
        kept.maps = maps = {}
        run(dataset)

        def way(name):
            if name not in fine:
                show(dataset, [files[name]])
                next(iter(DataLoader(dataset, collate_fn=dataset.collate_fn)))
            return maps[str(files[name])], maps[str(plain[name])]

        return way

    def by_inferencer(inferencer):
        def way(name):
            maps = [inferencer.predict(read_image(path)).anomaly_map[0] for path in (files[name], plain[name])]
            return map(torch.as_tensor, maps)

        return way

    def show_samples(dataset, paths):
        dataset.samples = samples_of(paths)

    def show_files(dataset, paths):
        dataset.image_filenames = paths

    def test(dataset):
        dataset.augmentations = model.pre_processor.transform
        engine.test(model, DataLoader(dataset, batch_size=8, collate_fn=dataset.collate_fn), verbose=False)

    def predict(dataset):
        engine.predict(model, DataLoader(dataset, collate_fn=dataset.collate_fn))

    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.chdir(root)  # OpenVINO's cache
        patch.setenv("TRUST_REMOTE_CODE", "1")
        samples, theirs = samples_of([paths[name] for paths in (files, plain) for name in fine]), AnomalibDataset()
        theirs.samples = samples
        ways = {
            "test": by_run(SampleDataset(samples), show_samples, test),
            "test of anomalib's dataset": by_run(theirs, show_samples, test),
            "predict": by_run(PredictDataset(root / "files"), show_files, predict),
        }
        torched = TorchInferencer(engine.export(model, ExportType.TORCH, export_root=root), device="cpu")
        from_graph = OpenVINOInferencer(graph, config={"INFERENCE_PRECISION_HINT": "f32"})
        for name in set(TABLE) - set(fine):
            TABLE[name].write(files[name])
        yield {**ways, "torch": by_inferencer(torched), "OpenVINO": by_inferencer(from_graph)}


@pytest.mark.parametrize("name", TABLE)
@pytest.mark.filterwarnings("ignore")
def test_every_way_scores_alike_or_refuses(name, ways):
    row = TABLE[name]
    for kind, way in ways.items():
        if isinstance(row.expected, str):
            with pytest.raises((ValueError, FileNotFoundError), match=f"(?s){row.name}|missing file path"):
                way(name)
        else:
            found, expected = way(name)
            assert (found - expected).abs().max() < 0.02 + row.tolerance / 255, kind


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
