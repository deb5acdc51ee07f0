"""Few-shot and leave-one-out over any anomalib datamodule: who gets which image."""

import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import yaml
from anomalib.cli.cli import AnomalibCLI
from anomalib.data import Folder, MVTecAD, Visa, get_datamodule
from PIL import Image
from torchvision.transforms.v2 import Compose, RandomHorizontalFlip, Resize

from anomalib_mvfa.contract import FEW_SHOT, LEAVE_ONE_OUT, class_name_of, describe
from anomalib_mvfa.data import (
    BMADFewShot,
    BMADLeaveOneOut,
    BMADOneClass,
    BrainPhantom,
    FewShot,
    FullNormal,
    LeaveOneOut,
)
from anomalib_mvfa.data.bmad import CATEGORIES
from anomalib_mvfa.data.folder import NamedFolder
from anomalib_mvfa.data.support import group_of

PATIENT = r"/p(\d)_"
RESIZE = Resize((32, 32))


def ready(datamodule):
    datamodule.setup()
    return datamodule


def few_shot(source, **arguments):
    return ready(FewShot(source, **{"k_shot": 2, "num_workers": 0, **arguments}))


def paths(dataset):
    return list(dataset.samples.image_path)


def groups(dataset, pattern=PATIENT):
    return {group_of(path, pattern) for path in paths(dataset)}


def parts(data):
    return data.support, data.val_data, data.test_data


def assert_disjoint(data, contents):
    hashes = [contents(paths(part)) for part in parts(data)]
    assert [len(found) for found in hashes] == [len(part.samples) for part in parts(data)]
    assert len(set.union(*hashes)) == sum(map(len, hashes))


# ------------------------------------------------------------------------------------------------- FewShot, any source


@pytest.fixture(params=["phantom", "mvtec", "own", "visa"])
def any_source(request, phantom_root, mvtec_root, own_folder, visa_root):
    """A source with its name, category, class name, and whether it has validation images of its own."""
    return {
        "phantom": (BMADOneClass(phantom_root, "Brain"), "BMAD", "Brain", "Brain", True),
        "mvtec": (MVTecAD(mvtec_root, "metal_nut"), "MVTecAD", "metal_nut", "metal nut", False),
        "own": (Folder(**own_folder["init_args"]), "own", "", "object", False),
        "visa": (Visa(visa_root, "candle"), "Visa", "candle", "candle", False),
    }[request.param]


def test_support_validation_and_test_share_no_image(any_source, contents):
    source, name, category, class_name, has_validation = any_source
    data = few_shot(source, k_shot=1)
    assert_disjoint(data, contents)
    assert (data.name, data.category, describe(data).class_name) == (name, category, class_name)
    assert data.protocol is FEW_SHOT
    assert data.support.samples.label_index.value_counts().to_dict() == {0: 1, 1: 1}
    assert data.train_data is data.support
    assert len(data.train_data) == 22
    if has_validation:
        own = ready(BMADOneClass(source.root, "Brain"))
        assert paths(data.test_data) == paths(own.test_data)
        assert sorted(paths(data.support) + paths(data.val_data)) == sorted(paths(own.val_data))
    else:
        assert len(data.test_data) - len(data.val_data) - 2 in {0, 1}
    assert set(data.test_data.samples.label_index) == {0, 1}
    assert data.task == "segmentation"
    item = data.test_data[len(data.test_data) - 1]
    assert item.gt_mask.any() == bool(item.gt_label)


def test_the_split_is_the_same_in_every_process_and_follows_the_seed(own_folder):
    splits = []
    for state, seed in enumerate((0, 0, 1)):
        torch.manual_seed(state)  # whatever the global state
        splits.append([paths(part) for part in parts(few_shot(own_folder, k_shot=1, seed=seed))])
    assert splits[0] == splits[1] != splits[2]


def test_no_patient_is_in_two_of_support_validation_and_test(own_folder, contents):
    for seed in range(2):
        data = few_shot(own_folder, k_shot=1, group_by=PATIENT, seed=seed)
        assert_disjoint(data, contents)
        found = [groups(part) for part in parts(data)]
        assert sum(map(len, found)) == len(set.union(*found))
        assert found[2]
        assert len(data.test_data) == 4 * len(found[2])  # all images of its patients


@pytest.fixture
def patients(phantom_root, tmp_path):
    """A category whose files name patients: valid has patients 0 to 2, test 2 to 3."""
    brain = shutil.copytree(phantom_root / "Brain", tmp_path / "Brain")
    for split, first in (("valid", 0), ("test", 2)):
        for path in sorted((brain / split).rglob("*.png")):
            path.rename(path.with_name(f"p{first + int(path.stem) // 2}_{path.name}"))
    return tmp_path


def test_patients_of_a_source_with_validation_images(patients, contents, caplog):
    data = BMADFewShot(patients, k_shot=1, group_by=PATIENT, num_workers=0)
    with caplog.at_level(logging.INFO):
        data.setup()
    assert_disjoint(data, contents)
    assert len(data.test_data) == 8  # as they are
    assert groups(data.test_data) == {"2", "3"}
    assert not groups(data.support) & (groups(data.val_data) | {"2", "3"})
    assert groups(data.val_data) <= {"0", "1"}
    table = [line.split() for line in caplog.text.splitlines()]
    left = 12 - 2 - len(data.val_data)  # valid's images of the support's patients and of those that are tested
    (row,) = [row for row in table if row[:1] == ["validation"]]
    (rest,) = [row for row in table if row[:2] == ["left", "out"]]
    assert (sum(map(int, row[1:3])), sum(map(int, rest[2:4]))) == (len(data.val_data), left)


def test_a_named_support_of_tested_patients_is_refused(patients, tmp_path):
    lists = tmp_path / "list.txt"
    lists.write_text("n-0: p2_004.png\na-0: p0_000.png")
    with pytest.raises(ValueError, match=r"names images of \['2'\], which are tested too \(group_by='/p.*'\)\. Name"):
        BMADFewShot(patients, k_shot=1, support_list=lists, group_by=PATIENT).setup()


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("patient", r"='patient' matches nothing in .*\.png\. It must"),
        ("(p", r"='\(p' is no regular expression \(.*\)"),
    ],
)
def test_what_is_no_pattern_of_groups_is_refused(own_folder, pattern, message):
    with pytest.raises(ValueError, match=f"group_by{message}"):
        few_shot(own_folder, group_by=pattern)


def test_nothing_left_to_test_is_refused(own_folder, tmp_path):
    own_folder["init_args"]["val_split_ratio"] = 1.0
    with pytest.raises(ValueError, match="own has no test image left beside 4 support and 16 validation images"):
        few_shot(own_folder)
    own_folder["init_args"]["val_split_ratio"] = 0.5
    lists = tmp_path / "list.txt"
    lists.write_text("n-0: " + " ".join(f"p{i}_n{2 * i}.png" for i in range(5)) + "\na-0: p0_a0.png")
    with pytest.raises(ValueError, match="own has no test image left beside 6 support and 0 validation images"):
        few_shot(own_folder, k_shot=5, abnormal_shots=1, support_list=lists, group_by=PATIENT)


def test_duplicates_by_content_are_refused(phantom_root, tmp_path):
    brain = shutil.copytree(phantom_root / "Brain", tmp_path / "Brain")
    for split in ("test", "valid"):
        copies = [brain / split / "good" / "img" / f"copy{i}.png" for i in range(6)]
        for i, path in enumerate(copies):
            shutil.copyfile(brain / "valid" / "good" / "img" / f"{i:03d}.png", path)
        with pytest.raises(
            ValueError, match=r"support images appear in validation or test again: .*copy\d\.png.*Remov"
        ):
            BMADFewShot(tmp_path, k_shot=1).setup()
        for path in copies:
            path.unlink()
    BMADFewShot(tmp_path, k_shot=1).setup()


# -------------------------------------------------------------------------------------------------------------------- K


def test_too_many_images_are_refused(phantom_root, own_folder):
    with pytest.raises(ValueError, match=r"k_shot=7 is too large: Brain has 6 normal validation images\. Choose at mo"):
        ready(BMADFewShot(phantom_root, k_shot=7))
    with pytest.raises(ValueError, match=r"abnormal_shots=9 is too large: Brain has 6 abnormal validation images\."):
        ready(BMADFewShot(phantom_root, k_shot=1, abnormal_shots=9))
    with pytest.raises(ValueError, match=r"own has 4 normal validation images in groups of their own \(group_by="):
        few_shot(own_folder, k_shot=5, group_by=PATIENT)


def test_all_images_leave_none_to_validate_and_labels_may_differ_in_number(phantom_root):
    data = ready(BMADFewShot(phantom_root, k_shot=6, abnormal_shots=6, num_workers=0))
    assert (len(data.val_data), data.val_dataloader(), len(data.test_data)) == (0, [], 8)
    data = ready(BMADFewShot(phantom_root, k_shot=3, abnormal_shots=1))
    assert data.support.samples.label_index.value_counts().to_dict() == {0: 3, 1: 1}


def test_no_abnormal_image_gives_k_normal_ones_as_they_are(phantom_root):
    data = ready(BMADFewShot(phantom_root, k_shot=3, abnormal_shots=0, train_batch_size=3, num_workers=0))
    assert data.train_data.samples.label_index.tolist() == [0, 0, 0]
    assert len(data.train_data) == 3
    assert len(data.support) == 33
    assert describe(data).normal_only
    (batch,) = data.train_dataloader()
    assert batch.gt_label.tolist() == [False] * 3
    assert paths(data.support) == paths(data.train_data)
    with_views = ready(BMADFewShot(phantom_root, k_shot=3, abnormal_shots=0, views=True, num_workers=0))
    assert len(with_views.train_data) == 33
    assert describe(with_views).normal_only


def test_numbers_out_of_bounds_are_refused(phantom_root):
    lowest = {"k_shot": 1, "abnormal_shots": 0, "train_batch_size": 1, "eval_batch_size": 1, "seed": 0}
    for argument, low in lowest.items():
        with pytest.raises(ValueError, match=rf"{argument}={low - 1} must be at least {low}\."):
            BMADFewShot(phantom_root, **{argument: low - 1})


# --------------------------------------------------------------------------------------------------------------- Lists


def test_a_published_list_names_the_support(phantom_root, support_lists, contents, tmp_path):
    for lists in (support_lists, support_lists / "Brain" / "2-shot.txt"):
        data = ready(BMADFewShot(phantom_root, k_shot=2, support_list=lists))
        names = sorted(Path(path).parts[-3] + "/" + Path(path).name for path in paths(data.support))
        assert names == ["Ungood/000.png", "Ungood/005.png", "good/001.png", "good/004.png"]
        assert_disjoint(data, contents)
    (tmp_path / "list.txt").write_text("n-0: 001.png 123.png\na-0: 000.png 001.png")
    message = r"support_list='.*list\.txt' \(normal\) names \['123\.png'\], not among the 6 images to pick from"
    with pytest.raises(ValueError, match=message):
        ready(BMADFewShot(phantom_root, k_shot=2, support_list=tmp_path / "list.txt"))


def test_a_list_may_name_any_labelled_image_of_own_folders(own_folder, tmp_path, contents):
    (tmp_path / "list.txt").write_text("n-0: p0_n0.png p1_n3.png\na-0: p0_a1.png p1_a2.png")
    for seed in range(2):  # whatever is held out
        data = few_shot(own_folder, support_list=tmp_path / "list.txt", seed=seed)
        assert {Path(path).name for path in paths(data.support)} == {"p0_n0.png", "p1_n3.png", "p0_a1.png", "p1_a2.png"}
        assert_disjoint(data, contents)
        grouped = few_shot(own_folder, support_list=tmp_path / "list.txt", seed=seed, group_by=PATIENT)
        assert not (groups(grouped.val_data) | groups(grouped.test_data)) & {"0", "1"}
        assert not groups(grouped.val_data) & groups(grouped.test_data)


def test_a_list_over_folders_of_defects(mvtec_root, tmp_path):
    lists = tmp_path / "metal_nut" / "1-shot.txt"
    lists.parent.mkdir()
    lists.write_text("n-0: 000.png\na-0: bad1/000.png")
    data = few_shot(MVTecAD(mvtec_root, "metal_nut"), k_shot=1, support_list=tmp_path)
    assert paths(data.support)[0].endswith("bad1/000.png")
    lists.write_text("n-0: 000.png\na-0: 000.png")
    with pytest.raises(ValueError, match=r"names files that exist several times: .*bad1/000\.png"):
        few_shot(MVTecAD(mvtec_root, "metal_nut"), k_shot=1, support_list=tmp_path)


# ------------------------------------------------------------------------------------------------- From configurations


def test_own_folders_from_mappings_and_from_the_command_line(tmp_path, own_root, own_folder, tiny_config, contents):
    init_args = {"source": own_folder, "k_shot": 1, "group_by": PATIENT, "num_workers": 0}
    data = ready(get_datamodule({"class_path": "FewShot", "init_args": init_args}))
    assert_disjoint(data, contents)
    assert (type(data.source), data.name) == (NamedFolder, "own")
    arguments = ["train", "--model", "Mvfa", "--model.backbone", str(tiny_config), "--model.pretrained", "null"]
    arguments += ["--data", "FewShot", "--data.source", "Folder", "--data.source.root", str(own_root)]
    arguments += ["--data.source.name", "own", "--data.source.normal_dir", "train", "--data.k_shot", "1"]
    arguments += ["--data.source.abnormal_dir", "abnormal", "--data.source.normal_test_dir", "normal"]
    arguments += ["--data.source.mask_dir", "null", "--default_root_dir", str(tmp_path)]
    data = ready(AnomalibCLI(arguments, run=False).datamodule)
    assert_disjoint(data, contents)
    assert data.task == "classification"
    assert data.test_data[0].gt_mask is None


def test_leave_one_out_from_yaml(tmp_path, mvtec_root, own_folder, tiny_config):
    mvtec = {"class_path": "MVTecAD", "init_args": {"root": str(mvtec_root), "category": "metal_nut"}}
    config = {"class_path": "LeaveOneOut", "init_args": {"sources": [own_folder, mvtec], "held_out": "own"}}
    model = {"class_path": "Mvfa", "init_args": {"backbone": str(tiny_config), "pretrained": None}}
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump({"model": model, "data": config, "default_root_dir": str(tmp_path)}))
    data = ready(AnomalibCLI(["train", "--config", str(file)], run=False).datamodule)
    assert (data.category, [source.category for source in data.training]) == ("own", ["metal_nut"])


def test_what_is_no_source_is_refused():
    with pytest.raises(ValueError, match=r"source='Folder' must be an anomalib datamodule, or a mapping with class_pa"):
        FewShot("Folder")


def test_the_source_downloads_its_data(tmp_path):
    loo = LeaveOneOut([BrainPhantom(tmp_path, size=32, seed=1), MVTecAD(tmp_path, "bottle")], "bottle")
    loo.target.prepare_data = lambda: (tmp_path / "target").mkdir()
    loo.prepare_data()
    assert (tmp_path / "target").exists()
    data = ready(FewShot(loo.training[0], k_shot=1))
    assert (data.name, data.category, data.class_name) == ("Phantom", "Brain", "Brain")
    assert (tmp_path / "size32-seed1" / "Brain").exists()


# ------------------------------------------------------------------------------------------------------------- Loading


def test_augmentations_go_where_they_belong(phantom_root):
    flip = Compose([RandomHorizontalFlip(p=1), RESIZE])
    data = BMADFewShot(phantom_root, k_shot=1, train_augmentations=flip, augmentations=RESIZE, num_workers=0)
    data.setup()
    assert data.support.augmentations is data.train_data.augmentations is flip
    assert data.val_data.augmentations is data.test_data.augmentations is RESIZE
    for loader in (data.train_dataloader(), data.val_dataloader(), data.test_dataloader(), data.predict_dataloader()):
        assert next(iter(loader)).image.shape[-2:] == (32, 32)
    data = ready(BMADFewShot(phantom_root, k_shot=1, abnormal_shots=0, augmentations=RESIZE))
    assert data.support.augmentations is RESIZE


def test_training_shows_every_view_once_an_epoch(phantom_root):
    data = ready(BMADFewShot(phantom_root, k_shot=1, augmentations=RESIZE, num_workers=0, seed=5))
    loader = data.train_dataloader()
    assert loader.batch_size == 1
    data.trainer = SimpleNamespace(lightning_module=SimpleNamespace(BATCH_SIZE=8))
    assert data.train_dataloader().batch_size == 8  # the model's own
    orders = []
    for epoch in range(2):
        loader.sampler.set_epoch(epoch)
        orders.append(list(loader.sampler))
        assert sorted(orders[-1]) == list(range(22))
    assert orders[0] != orders[1]


# ------------------------------------------------------------------------------------------------------- LeaveOneOut


def full_normal(source, **arguments):
    return ready(FullNormal(source, **{"k_shot": 1, "num_workers": 0, **arguments}))


def test_all_normal_images_are_learnt_from_and_the_same_ones_tested(any_source, contents):
    source, *_ = any_source
    few, full = few_shot(source, k_shot=1), full_normal(source)
    assert full.train_data.samples.label_index.eq(0).all()
    assert paths(full.train_data) == paths(full.source.train_data)
    assert contents(paths(full.train_data)).isdisjoint(contents([*paths(full.test_data), *paths(full.val_data)]))
    for part in ("val_data", "test_data"):
        assert paths(getattr(full, part)) == paths(getattr(few, part))
    seen = [path for batch in full.train_dataloader() for path in batch.image_path]
    assert sorted(seen) == sorted(paths(full.train_data))
    with pytest.raises(ValueError, match="views=True is not possible here: training images are as they are"):
        FullNormal(full.source, views=True)


def test_no_patient_is_trained_on_and_tested(patients):
    for path in sorted((patients / "Brain" / "train").rglob("*.png")):
        path.rename(path.with_name(f"p{int(path.stem) % 4}_{path.name}"))  # 2 and 3 are tested
    full = full_normal(BMADOneClass(patients, "Brain"), group_by=PATIENT)
    assert groups(full.source.train_data) >= {"1", "2"}
    assert groups(full.train_data) == groups(full.source.train_data) - {"2", "3"}


def test_copies_of_tested_images_are_not_trained_on(phantom_root, tmp_path, caplog):
    brain = shutil.copytree(phantom_root / "Brain", tmp_path / "Brain")
    shutil.copyfile(brain / "test/good/img/001.png", brain / "train/good/img/copy.png")
    full = full_normal(BMADOneClass(tmp_path, "Brain"))
    assert not [path for path in paths(full.train_data) if "copy" in path]
    assert len(full.train_data) == 4
    shutil.copytree(phantom_root / "Brain", tmp_path / "Liver")
    for path in (tmp_path / "Brain/test").rglob("00[1-3].png"):
        with Image.open(path) as image:
            image.rotate(90).save(path)
    loo = ready(BMADLeaveOneOut(tmp_path, "Brain", train_categories=["Liver"]))
    assert len(loo.train_data) == 6
    assert [message for message in caplog.messages if "2 images are tested too, and are not learnt from" in message]


def test_a_support_image_that_is_tested_in_another_encoding_is_named(phantom_root, tmp_path, caplog):
    brain = shutil.copytree(phantom_root / "Brain", tmp_path / "Brain")
    for path in sorted((brain / "valid/good/img").iterdir()):
        with Image.open(path) as image:
            image.save(brain / "test/good/img" / f"{path.stem}.jpg")
    (support,) = [path for path in paths(ready(BMADFewShot(tmp_path, k_shot=1)).support) if "/good/" in path]
    (message,) = [message for message in caplog.messages if "look as if they were both" in message]
    twin = brain / "test/good/img" / Path(support).with_suffix(".jpg").name
    assert message == f"1 images look as if they were both learnt from and tested: {support} and {twin}."


def test_abnormal_images_of_a_list_are_not_tested_even_if_not_learnt_from(own_folder, tmp_path):
    pool = few_shot(own_folder, k_shot=1).source.test_data.samples
    normal, abnormal = (Path(pool.image_path[pool.label_index == label].iloc[0]).name for label in (0, 1))
    (tmp_path / "1-shot.txt").write_text(f"n-0: {normal}\na-0: {abnormal}\n")
    listed = {"k_shot": 1, "support_list": tmp_path / "1-shot.txt"}
    few, few_normal = few_shot(own_folder, **listed), few_shot(own_folder, abnormal_shots=0, **listed)
    assert [Path(path).name for path in paths(few_normal.train_data)] == [normal]
    assert paths(few_normal.test_data) == paths(few.test_data)


def loo(root, category, **arguments):
    augmentations = Resize((16, 16))
    return ready(BMADLeaveOneOut(root, category, augmentations=augmentations, num_workers=0, **arguments))


def test_leave_one_out_learns_from_the_others_test_images(bmad_root):
    data = loo(bmad_root, "Chest", train_categories=["Brain", "Retina_RESC", "Retina_OCT2017"], train_batch_size=3)
    others = [
        ready(BMADFewShot(bmad_root, name, k_shot=1)).source for name in ("Brain", "Retina_RESC", "Retina_OCT2017")
    ]
    assert paths(data.train_data) == [path for other in others for path in paths(other.test_data)]
    assert paths(data.val_data) == [path for other in others for path in paths(other.val_data)]
    assert {Path(path).parts[-5] for path in paths(data.test_data)} == {"Chest"}
    assert len(data.test_data) == 8
    assert (data.name, data.category, data.class_name) == ("BMAD", "Chest", "Chest X-ray film")
    assert data.protocol is LEAVE_ONE_OUT
    assert data.support is None
    assert not describe(data).has_masks
    for loader in (data.train_dataloader(), data.val_dataloader()):
        seen = set()
        for batch in loader:
            (category,) = {Path(path).parts[-5].removesuffix("_AD") for path in batch.image_path}
            class_name = "Brain" if category == "Brain" else "retinal OCT"
            assert class_name_of(batch) == class_name
            assert (batch.gt_mask is None) == (category == "Retina_OCT2017")
            seen.update(batch.image_path)
        assert seen == set(paths(loader.dataset))
    assert {class_name_of(batch) for batch in data.test_dataloader()} == {"Chest X-ray film"}


def test_leave_one_out_defaults_to_all_others_and_says_what_is_missing(bmad_root):
    data = BMADLeaveOneOut(bmad_root, "Brain")
    assert [source.category for source in data.training] == [name for name in CATEGORIES if name != "Brain"]
    with pytest.raises(
        FileNotFoundError, match=r"holds neither Liver nor Liver_AD; categories found there: Brain, Ret"
    ):
        data.prepare_data()


def test_the_sibling_set_is_left_out_on_request():
    names = ["Brain", "Retina_OCT2017", "Chest"]
    for exclude, left in ((True, ["Brain", "Chest"]), (False, names)):
        data = BMADLeaveOneOut("datasets", "Retina_RESC", train_categories=names, exclude_modality=exclude)
        assert [source.category for source in data.training] == left


@pytest.mark.parametrize(
    ("categories", "message"),
    [
        (
            ["Brain", "Chest"],
            r"train_categories=\['Brain', 'Chest'\] must name at least one category, and not category=",
        ),
        ([], r"train_categories=\[\] must name at least one category"),
        (["chest"], r"BMAD has no category 'chest'\. Choose from: Brain"),
        (["Liver"], r"train_categories=\[\] must name at least one"),  # a sibling alone
    ],
)
def test_wrong_training_categories_are_refused(categories, message, monkeypatch):
    monkeypatch.setitem(CATEGORIES, "Liver", CATEGORIES["Liver"]._replace(modality="MRI"))
    with pytest.raises(ValueError, match=message):
        BMADLeaveOneOut(category="Brain", train_categories=categories, exclude_modality=categories == ["Liver"])


def test_the_held_out_category_needs_test_images_alone(bmad_root):
    shutil.rmtree(bmad_root / "Retina_RESC_AD" / "valid")
    assert len(loo(bmad_root, "Retina_RESC", train_categories=["Brain"]).test_data) == 8


def test_leave_one_out_over_any_sources(own_folder, mvtec_root, visa_root, contents):
    sources = [Folder(**own_folder["init_args"]), MVTecAD(mvtec_root, "metal_nut"), Visa(visa_root, "candle")]
    data = LeaveOneOut(sources, "metal_nut", train_batch_size=4, augmentations=Resize((16, 16)), num_workers=0)
    data.setup()
    assert (data.name, data.category, data.class_name) == ("MVTecAD", "metal_nut", "metal nut")
    assert len(data.test_data) == 20  # nothing is held out of what is tested
    assert len(data.train_data) == len(data.val_data) == 20  # half of the others' is
    assert not set(paths(data.train_data)) & set(paths(data.val_data))
    assert set(data.val_data.samples.label_index) == {0, 1}
    assert {class_name_of(batch) for batch in data.train_dataloader()} == {"own", "candle"}
    again = LeaveOneOut([MVTecAD(mvtec_root, "metal_nut"), Folder(**own_folder["init_args"])])
    assert (again.category, again.class_name) == ("metal_nut", "metal nut")


@pytest.mark.parametrize("named", ["by the protocol", "by the source"])
def test_leave_one_out_learns_from_no_patient_that_it_validates_on(own_folder, mvtec_root, patients, named):
    own = Folder(**own_folder["init_args"])
    sources, group_by = [MVTecAD(mvtec_root, "metal_nut"), own, BMADOneClass(patients, "Brain")], PATIENT
    if named == "by the source":
        own.group_by, group_by, sources = PATIENT, None, sources[:2]
    data = ready(LeaveOneOut(sources, "metal_nut", group_by=group_by))
    for learnt, validating in zip(data.train_data.parts, data.val_data.parts, strict=True):
        assert len(validating)
        assert not groups(learnt) & groups(validating)


@pytest.mark.parametrize("held_out", ["bottle", "", None])
def test_held_out_must_be_one_of_two_or_more(mvtec_root, own_folder, held_out):
    sources = [MVTecAD(mvtec_root, "metal_nut"), own_folder] if held_out == "bottle" else [own_folder]
    message = r"held_out='.*' must be the category of one of at least two sources; the sources' are \[.*'own'\]"
    with pytest.raises(ValueError, match=message):
        LeaveOneOut(sources, held_out)
    with pytest.raises(ValueError, match=r"held_out='' must .* are \[\]"):
        LeaveOneOut([])
