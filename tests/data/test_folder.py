"""Own folders in our protocols: files found and paired by name, whatever the folders are called."""

import shutil

import pytest
import torch
from anomalib.data import Folder, PredictDataset
from anomalib.engine import Engine
from lightning.pytorch import Callback

from anomalib_mvfa import FewShot, Mvfa, PredictScans
from anomalib_mvfa.data.dataset import lacks_mask, read_strictly


@pytest.fixture
def own(own_root, tmp_path):
    """A copy of `own_root`, in a folder that is no ASCII."""
    return shutil.copytree(own_root, tmp_path / "眼底 Müller")


def few_shot(root, **arguments):
    source = Folder(
        "own", normal_dir="train", root=root, abnormal_dir="abnormal", normal_test_dir="normal", mask_dir="mask"
    )
    data = FewShot(source, **{"k_shot": 2, "num_workers": 0, **arguments})
    data.setup()
    return data


def masks_of(data):
    samples = data.test_data.samples
    return {
        path.rsplit("/")[-1]: mask.rsplit("/")[-1]
        for path, mask in zip(samples.image_path, samples.mask_path, strict=True)
    }


@pytest.mark.parametrize("name", ["{}", "{}_mask", "mask_{}", "{}m"])
def test_folders_of_any_name_and_masks_by_name(own, name):
    for path in (own / "mask").iterdir():
        path.rename(path.with_name(f"{name.format(path.stem)}.png"))
    for folder in ("normal", "abnormal", "mask"):
        (own / folder / "._0.png").write_bytes(b"hidden")
    found = masks_of(few_shot(own))
    assert len(found) > 6
    for image, mask in found.items():
        assert mask == (f"{name.format(image[:-4])}.png" if "_a" in image else "")


def test_a_name_within_another_is_no_addition(own):
    for folder in ("abnormal", "mask"):
        for index, path in enumerate(sorted((own / folder).iterdir())):
            path.rename(path.with_name(f"{index + 1}.png"))
    (own / "mask/1.png").unlink()  # 10.png is not its mask
    with pytest.raises(
        ValueError, match=r"^1 abnormal images of own have no mask: \['[^']*/1\.png'\]\. Add masks, or set p"
    ):
        few_shot(own)


SPARE = r"Masks of the abnormal images do not match the images: {} images have no mask .*, 1 masks have no image .*{}"
MISTAKES = {
    "missing": (
        lambda own: (own / "mask/p0_a0.png").unlink(),
        r"1 abnormal images of own have no mask: \[.*p0_a0\.png",
    ),
    "spare": (lambda own: (own / "abnormal/p0_a0.png").unlink(), SPARE.format(0, "p0_a0")),
    "of another name": (lambda own: (own / "mask/p0_a0.png").rename(own / "mask/new.png"), SPARE.format(1, "new")),
    "doubled": (
        lambda own: shutil.copy(own / "mask/p0_a0.png", own / "mask/p0_a0.tif"),
        r"p0_a0\.png and .*p0_a0\.tif have the same name",
    ),
    "no folder": (lambda own: shutil.rmtree(own / "mask"), r"mask does not exist or holds no image \(\.jpg, .*Correct"),
}


@pytest.mark.parametrize(("spoil", "error"), MISTAKES.values(), ids=MISTAKES)
def test_masks_that_do_not_match_are_named(own, spoil, error):
    spoil(own)
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        few_shot(own)


class Seen(Callback):
    """Keeps what batches of training and test hold."""

    def __init__(self):
        self.trained, self.tested = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, *args):
        self.trained.append(batch)

    def on_test_batch_end(self, trainer, pl_module, outputs, batch, *args):
        self.tested.append(batch)


def test_partial_masks_by_an_explicit_setting(own, tiny_config, tmp_path):
    for path in sorted((own / "mask").iterdir())[1::2]:
        path.unlink()
    data = few_shot(own, partial_masks=True, train_batch_size=4, eval_batch_size=4, seed=3)
    lacking = set(data.test_data.samples.image_path[lacks_mask(data.test_data.samples)])
    support = lacks_mask(data.support.samples)
    assert lacking
    assert support.sum() == 1
    seen = Seen()
    model = Mvfa(str(tiny_config), pretrained=None, image_size=56, max_epochs=1, visualizer=False)
    engine = Engine(
        default_root_dir=tmp_path / "run", callbacks=[seen], accelerator="cpu", devices=1, enable_progress_bar=False
    )
    engine.fit(model, datamodule=data)
    (results,) = engine.test(model, datamodule=data)
    assert 0 < results["pixel_AUROC"] < 1
    assert {len(batch.image_path) for batch in seen.trained} >= {3, 4}
    assert sum(len(batch.image_path) for batch in seen.trained if batch.gt_mask is None) == 11  # one image's views
    tested = [(path, batch.gt_mask is None) for batch in seen.tested for path in batch.image_path]
    assert {path for path, without in tested if without} == lacking
    assert len(tested) == len(data.test_data)


def test_a_support_of_no_mask_at_all_is_refused(own):
    for path in sorted((own / "mask").iterdir())[1:]:
        path.unlink()
    with pytest.raises(
        ValueError, match=r"No abnormal support image of own has a mask to learn from: \[.*Choose another"
    ):
        few_shot(own, partial_masks=True, support_list=None, seed=0)


def test_prediction_leaves_hidden_files_out(own):
    (own / "abnormal/.cache").mkdir()
    for name in ("._0.png", ".cache/1.png"):
        (own / "abnormal" / name).write_bytes(b"hidden")
    images = own.rename(own.with_name("own")) / "abnormal"
    dataset, alone = PredictDataset(images), PredictDataset(images / "._0.png")
    assert len(dataset) == 12
    for one in (dataset, alone):
        read_strictly(one)
    assert (len(dataset), len(alone)) == (10, 1)
    with pytest.raises(ValueError, match=r"\._0\.png cannot be read as an image"):
        alone.__getitems__([0])


def test_folders_of_any_name_are_predicted_by_their_scans(own, own_root, tmp_path):
    items = []
    for folder in (own, own_root):
        dataset = PredictScans(folder / "abnormal", pictures=tmp_path / "pictures")
        read_strictly(dataset)
        items.append(dataset.__getitems__([0])[0].image)
    assert torch.equal(*items)
