"""The user's own images, in folders or in a table: which one is for what, and what is refused."""

import csv
import logging
import shutil

import pytest
from anomalib.data import get_datamodule
from anomalib.engine import Engine

from anomalib_mvfa import FewShot, FewShotFolder, FullNormal, LeaveOneOut, Mvfa
from anomalib_mvfa.data.support import group_of

PATIENT = r"/p(\d)_"  # five of them, each with two normal and two abnormal images


@pytest.fixture
def own(own_root, tmp_path):
    """Folders of the default names, with 10 normal and 10 abnormal images and their masks."""
    root = shutil.copytree(own_root, tmp_path / "own")
    shutil.rmtree(root / "train")
    (root / "mask").rename(root / "masks")
    return root


def keep(folder, count):
    """Keep the last files of a folder."""
    files = sorted(folder.iterdir())
    for path in files[: len(files) - count]:
        path.unlink()


def write_table(own, change=lambda rows: None):
    """Write a table of the folders: a row is a list of image, label, mask and group."""
    rows = [["image", "label", "mask", "group"]]
    for label in ("normal", "abnormal"):
        for path in sorted((own / label).iterdir()):
            mask = f"masks/{path.name}" if (own / "masks" / path.name).exists() else ""
            rows.append([f"{label}/{path.name}", label, mask, path.name[:2]])
    change(rows)
    with (own / "table.csv").open("w") as file:
        csv.writer(file).writerows(rows)
    return own / "table.csv"


def ready(data):
    data.setup()
    return data


def own_images(own, **arguments):
    return ready(FewShotFolder(**{"root": own, "k_shot": 3, "num_workers": 0, **arguments}))


def parts(data):
    return [data.support.samples, data.val_data.samples, data.test_data.samples]


def counts(data):
    return [tuple(int((part.label_index == label).sum()) for label in (0, 1)) for part in parts(data)]


def paths(data):
    return [path for part in parts(data) for path in part.image_path]


def add_split(first):
    """A change of a table that adds the column split: ``first`` of the first image, then every third one is tested."""

    def change(rows):
        for row, cells in enumerate(rows):
            cells.append("test" if row % 3 == 0 else "train")
        rows[0][-1], rows[1][-1] = "split", first

    return change


# ---------------------------------------------------------------------------------------------------- What is for what


def test_a_table_may_say_what_is_tested(own):
    table = write_table(own, lambda rows: [add_split("train")(rows), drop_groups(rows)])
    drawn = [own_images(None, table=table, seed=seed) for seed in (0, 1)]
    assert [counts(data) for data in drawn] == [[(3, 3), (4, 4), (3, 3)]] * 2
    first, second = [[{*part.image_path} for part in parts(data)] for data in drawn]
    assert first[2] == second[2]  # the same images are tested
    assert first[0] != second[0]
    full = ready(FullNormal(FewShotFolder(table=table, k_shot=3), k_shot=3))
    assert {*full.train_data.samples.image_path} == {path for path in first[0] if "/normal/" in path}


@pytest.mark.parametrize("masks", [0, 1, 6, 10])
@pytest.mark.parametrize("form", ["root", "table"])
def test_every_image_is_used_once_and_the_log_says_for_what(own, masks, form, caplog):
    keep(own / "masks", masks)
    keep(own / "normal", 9)
    place = {"root": own} if form == "root" else {"root": None, "table": write_table(own, drop_groups)}
    with caplog.at_level(logging.INFO):
        data = own_images(**{"own": own, **place})
    files = [str(path) for kind in ("normal", "abnormal") for path in (own / kind).iterdir()]
    assert sorted(paths(data)) == sorted(files)
    assert counts(data) == [(3, 3), (3, 3), (3, 4)]
    assert data.task == ("segmentation" if masks else "classification")
    table = [line.split() for line in caplog.messages[-1].splitlines()]
    assert [row[:-1] for row in table[2:]] == [["support", "3", "3"], ["validation", "3", "3"], ["test", "3", "4"]]
    with_mask = [int(row[-1]) for row in table[2:]]
    assert with_mask[0] == min(3, masks)  # those with masks are learnt from first
    assert sum(with_mask) == masks


def drop_groups(rows):
    for row in rows:
        del row[3]


@pytest.mark.parametrize("form", ["root", "table"])
@pytest.mark.parametrize("seed", range(3))
def test_no_patient_is_in_two_parts(own, form, seed):
    place = {"group_by": PATIENT} if form == "root" else {"root": None, "table": write_table(own)}
    data = own_images(own, k_shot=1, seed=seed, **place)
    assert sorted(paths(data)) == sorted(
        str(path) for kind in ("normal", "abnormal") for path in (own / kind).iterdir()
    )
    assert counts(data)[0] == (2, 2)  # a whole patient
    patients = [{group_of(path, PATIENT) for path in part.image_path} for part in parts(data)]
    assert all(patients)
    assert sum(map(len, patients)) == len(set.union(*patients)) == 5


@pytest.mark.parametrize(("share", "val"), [(0, 7), (0.2, 5), (0.9, 0), (1, 0)])
def test_the_share_that_is_tested(own, share, val):
    assert counts(own_images(own, test_split_ratio=share))[1:] == [(val, val), (7 - val, 7 - val)]


def test_abnormal_images_that_are_not_learnt_from_validate(own):
    few, normal = own_images(own), own_images(own, abnormal_shots=0)
    assert counts(normal) == [(3, 0), (3, 6), (4, 4)]
    assert list(normal.test_data.samples.image_path) == list(few.test_data.samples.image_path)


def test_fewer_images_than_k_are_all_learnt_from(own, caplog):
    keep(own / "abnormal", 1)
    keep(own / "masks", 1)
    data = own_images(own, k_shot=4)
    assert counts(data) == [(4, 1), (3, 0), (3, 0)]
    (warning,) = caplog.messages
    assert "own: k_shot=4 has become 1 abnormal image, all that there are; no abnormal image is left to test" in warning
    assert counts(own_images(own, k_shot=50)) == [(10, 1), (0, 0), (0, 0)]


@pytest.mark.parametrize("case", ["normal alone", "all"])
def test_a_run_without_abnormal_images_and_one_without_a_test(own, case, tiny_config, tmp_path, caplog):
    if case == "normal alone":
        shutil.rmtree(own / "abnormal")
        shutil.rmtree(own / "masks")
    data = own_images(own, k_shot=None if case == "all" else 4, train_batch_size=44)
    model = Mvfa(str(tiny_config), pretrained=None, image_size=56, max_epochs=1, visualizer=False)
    options = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    engine = Engine(default_root_dir=tmp_path / "results", **options)
    with caplog.at_level(logging.INFO):
        results = engine.train(model, datamodule=data)
    said = [message for message in caplog.messages if message.startswith("There is no test: own has no image left")]
    assert (len(results), len(said)) == ((0, 1) if case == "all" else (1, 0))
    assert len(data.support) == 11 * (20 if case == "all" else 4)
    assert len(data.train_data) == (220 if case == "all" else 4)
    assert model.model.bank.filled
    (batch,) = engine.predict(model, data_path=own / "normal" / "p0_n0.png")
    assert 0 <= batch.pred_score.item() <= 1


def test_other_protocols_over_the_same_images(own, mvtec_root):
    mapping = {"class_path": "FewShotFolder", "init_args": {"root": str(own), "group_by": PATIENT}}
    few, normal, full = (
        ready(protocol(mapping, k_shot=1, num_workers=0, **arguments))
        for protocol, arguments in ((FewShot, {}), (FewShot, {"abnormal_shots": 0}), (FullNormal, {}))
    )
    alone = ready(get_datamodule({**mapping, "init_args": {**mapping["init_args"], "k_shot": 1}}))
    assert len({tuple(data.test_data.samples.image_path) for data in (few, normal, full, alone)}) == 1
    assert counts(few)[0] == (2, 2)
    assert {*full.train_data.samples.image_path} == {*normal.support.samples.image_path}
    mvtec = {"class_path": "MVTecAD", "init_args": {"root": str(mvtec_root), "category": "metal_nut"}}
    for held_out, tested in (("own", 20), ("metal_nut", 20)):
        loo = ready(LeaveOneOut([mapping, mvtec], held_out, num_workers=0))
        assert len(loo.test_data) == tested


# ------------------------------------------------------------------------------------------------------------ Mistakes


def change(row, column, value):
    def spoil(rows):
        rows[row][column] = value

    return spoil


TABLES = {
    "missing file": (
        change(1, 0, "normal/x.png"),
        r"table='.*table\.csv': 1 rows name no file: row 1 \('.*normal.x\.p",
    ),
    "missing mask": (change(11, 2, "x.png"), r"1 rows name a mask that is no file: row 11"),
    "image twice": (
        lambda rows: rows.append(rows[1]),
        r"2 rows name an image twice: row 1 .*; row 21 .*Correct or rem",
    ),
    "mask twice": (lambda rows: change(11, 2, rows[12][2])(rows), r"2 rows name a mask twice: row 11 .*; row 12"),
    "mask of a normal image": (
        lambda rows: (change(1, 2, rows[11][2])(rows), change(11, 2, "")(rows)),
        r"1 rows give a normal image a mask: row 1",
    ),
    "unknown label": (change(2, 1, "ill"), r"1 rows have another label than normal, 0, abnormal, 1: row 2 \('ill'\)"),
    "split": (add_split("valid"), r"1 rows have another split than train and test: row 1 \('valid'\)"),
    "group of some": (change(3, 3, ""), r"1 rows have no group, where others have one: row 3"),
    "other columns": (
        change(0, 0, "file"),
        r"has no column image; its columns are file, label, mask, group\. Name them",
    ),
    "no row": (lambda rows: rows.clear(), r"cannot be read as CSV in UTF-8 \(No columns"),
}


@pytest.mark.parametrize(("spoil", "error"), TABLES.values(), ids=TABLES)
def test_what_is_wrong_in_a_table_is_named(own, spoil, error):
    table = write_table(own, spoil)
    with pytest.raises(ValueError, match=error):
        own_images(None, table=table)


FOLDERS = {
    "no root": ({"root": "nowhere"}, r"normal='normal': .*nowhere has no folder of this name with images in it; its"),
    "no such folder": (
        {"abnormal": "ill"},
        r"abnormal='ill': .*own has no folder of .*; its folders are abnormal, masks, normal\. Give another root",
    ),
    "no place": ({"root": None}, r"root=None, table=None: give one of the two: root"),
    "no table": ({"root": None, "table": "x.csv"}, r"table='.*x\.csv': there is no such file\. Give a CSV file with"),
    "two labels": ({"abnormal": "normal", "masks": None}, r"10 images are in two folders: .*Give each one label"),
    "share": ({"test_split_ratio": 1.5}, r"test_split_ratio=1\.5 must be between 0 and 1"),
}


@pytest.mark.parametrize(("arguments", "error"), FOLDERS.values(), ids=FOLDERS)
def test_what_is_wrong_with_folders_is_named(own, arguments, error):
    with pytest.raises((ValueError, FileNotFoundError), match=error):
        own_images(own, **arguments)


def test_what_is_not_read_is_named(own, caplog):
    own_images(None, table=write_table(own, change(0, 3, "patient")))
    assert "table.csv: the columns patient are not read; image, label, mask, group, split are." in caplog.text
    (own / "abnormal").rename(own / "ill")
    shutil.rmtree(own / "masks")
    own_images(own)
    assert "own: the folders ill are not read, or empty." in caplog.text
