"""The support is a function of seed and names, and lists are read in the published form."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from anomalib.data.utils import LabelName
from PIL import Image

from anomalib_mvfa.data.bmad import BMADFewShot
from anomalib_mvfa.data.support import (
    draw,
    duplicates,
    group_of,
    hold_out,
    pick,
    read_support_list,
    warn_of_lookalikes,
    without_copies,
)


def table(*paths, label=0):
    return pd.DataFrame({"image_path": paths, "label_index": label})


POOL = table(*(f"root/good/{i:02d}.png" for i in range(20)))


# ----------------------------------------------------------------------------------------------------------- The draw


def test_a_draw_depends_on_the_seed_alone():
    drawn = draw(POOL, 4, seed=0)
    assert len(set(drawn.image_path)) == 4
    assert len({tuple(draw(POOL, 4, seed).image_path) for seed in range(10)}) > 5
    assert drawn.equals(draw(POOL.sample(frac=1, random_state=1), 4, seed=0))
    moved = table(*POOL.image_path.str.replace("root", "elsewhere/deeper"))
    assert [Path(path).name for path in draw(moved, 4, seed=0).image_path] == [Path(p).name for p in drawn.image_path]


def test_every_image_may_be_drawn():
    counts = np.zeros(20)
    for seed in range(300):
        counts[[int(Path(path).stem) for path in draw(POOL, 4, seed).image_path]] += 1
    assert 30 < counts.min() <= counts.max() < 95


def test_the_support_does_not_depend_on_the_order_of_the_file_system(phantom_root, monkeypatch):
    names, iterdir = [], Path.iterdir
    for backwards in (False, True):
        monkeypatch.setattr(Path, "iterdir", lambda path, backwards=backwards: sorted(iterdir(path), reverse=backwards))
        data = BMADFewShot(phantom_root, k_shot=2, seed=3)
        data.setup()
        names.append(data.support.samples.image_path.tolist())
    assert names[0] == names[1]


# -------------------------------------------------------------------------------------------------------------- Lists


def write_list(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_lists_are_read_in_the_published_form(tmp_path):
    path = write_list(tmp_path / "Brain" / "2-shot.txt", "n-0: a.png b.png\na-0: c.png  d.png \n")
    expected = {LabelName.NORMAL: ["a.png", "b.png"], LabelName.ABNORMAL: ["c.png", "d.png"]}
    assert read_support_list(path, "Brain", 2) == read_support_list(str(tmp_path), "Brain", 2) == expected
    write_list(tmp_path / "2-shot.txt", path.read_text())
    assert read_support_list(tmp_path, "", 2) == expected  # own folders have no category
    with pytest.raises(FileNotFoundError, match=r"4-shot\.txt does not exist\. .*there: \['Brain.2-shot\.txt'\]"):
        read_support_list(tmp_path, "Brain", 4)
    with pytest.raises(FileNotFoundError, match=r"support_list='.*nowhere': .*nowhere does not exist\..* none"):
        read_support_list(tmp_path / "nowhere", "Brain", 2)


@pytest.mark.parametrize(
    ("content", "line", "word"),
    [
        (b"a-0: a.png", "no line 'n-0", "normal"),
        (b"n-0: a.png", "no line 'a-0", "abnormal"),
        (b"\x89PNG\r\n\x1a\n\xff", "no line 'n-0", "normal"),
        (b"n-0: a.png\na-0: b.png\nn-0: c.png", "2 lines 'n-0", "normal"),
    ],
)
def test_a_file_that_is_no_list_is_refused(tmp_path, content, line, word):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(ValueError, match=rf"list\.txt has {line}: <file names>' of {word} support images\. Give one"):
        read_support_list(tmp_path / "list.txt", "Brain", 1)


def test_images_are_picked_by_name():
    picked = pick(POOL, ["07.png", "01.png"], 2, "list")
    assert [Path(path).name for path in picked.image_path] == ["07.png", "01.png"]
    with pytest.raises(ValueError, match=r"list names \['99\.png', '7\.png'\], not among the 20 images to pick from"):
        pick(POOL, ["99.png", "01.png", "7.png"], 3, "list")
    for names in (["01.png"], ["01.png", "02.png", "03.png"], ["01.png", "01.png"]):
        message = rf"list names {len(set(names))} different images where 2 are asked for\. Change k_shot or the list"
        with pytest.raises(ValueError, match=message):
            pick(POOL, names, 2, "list")
    pool = table("x/hole/000.png", "x/cut/000.png", "x/cut/1000.png")
    with pytest.raises(ValueError, match=r"exist several times: .*hole/000\.png.*Put the folder before the name"):
        pick(pool, ["000.png"], 1, "list")
    assert pick(pool, ["cut/000.png"], 1, "list").image_path.tolist() == ["x/cut/000.png"]


# ------------------------------------------------------------------------------------------------------------- Groups


def test_a_group_is_the_first_group_or_the_match():
    assert group_of("a/patient07_1.png", r"patient(\d+)") == "07"
    assert group_of("a/patient07_1.png", r"patient\d+") == "patient07"
    assert group_of("a/patient07_1.png", None) == "a/patient07_1.png"
    for pattern in ("scan", "(scan)?b", "s*"):
        with pytest.raises(ValueError, match=r"group_by='.*' matches nothing in a/b\.png\. It must match the path"):
            group_of("a/b.png", pattern)


def test_images_held_out_are_a_share_of_every_kind():
    samples = pd.concat([POOL, table(*(f"root/bad/{i}.png" for i in range(10)), label=1)], ignore_index=True)
    stay, held_out = hold_out(samples, 0.3, 4, None)
    assert sorted([*stay.image_path, *held_out.image_path]) == sorted(samples.image_path)
    assert held_out.label_index.value_counts().to_dict() == {0: 6, 1: 3}
    shuffled = samples.sample(frac=1, random_state=0)
    assert set(hold_out(shuffled, 0.3, 4, None)[1].image_path) == set(held_out.image_path)
    assert set(hold_out(samples, 0.3, 5, None)[1].image_path) != set(held_out.image_path)


def test_groups_are_held_out_whole():
    healthy = table(*(f"h{i // 2}/{i}.png" for i in range(12)))  # 6 patients
    mixed = table(*(f"m{i // 5}/{i}.png" for i in range(20)), label=[0, 1, 1, 1, 0] * 4)  # 4 patients
    stay, held_out = hold_out(pd.concat([healthy, mixed], ignore_index=True), 0.5, 0, r"[hm]\d")
    patients = {path[:2] for path in held_out.image_path}
    assert not {path[:2] for path in stay.image_path} & patients
    assert sorted(patient[0] for patient in patients) == ["h", "h", "h", "m", "m"]
    assert len(held_out) == 3 * 2 + 2 * 5
    stay, held_out = hold_out(table("p/1.png", "p/2.png"), 0.5, 0, "^p")
    assert (len(stay), len(held_out)) == (2, 0)  # one group cannot be split


def test_files_of_the_same_bytes_are_found_under_any_name(tmp_path):
    files = {}
    for name, content in {"a": b"one", "b": b"two", "c": b"one", "d": b"three", "e": b"two"}.items():
        files[name] = str(tmp_path / name)
        Path(files[name]).write_bytes(content)
    (tmp_path / "link").symlink_to(files["a"])
    others = [files["c"], files["d"], files["e"], str(tmp_path / "link")]
    found = duplicates([files["a"], files["b"]], others)
    assert found == [(files["a"], files["c"]), (files["b"], files["e"]), (files["a"], str(tmp_path / "link"))]
    assert duplicates([files["d"]], [files["a"]]) == []


@pytest.fixture
def scans(phantom_root, tmp_path):
    """Paths of four slices; of these as JPEG of low quality, and as PNG with other bytes; and of a file of no image."""
    slices = sorted((phantom_root / "Brain" / "valid" / "good" / "img").iterdir())[:4]
    with Image.open(slices[0]) as one, Image.open(slices[1]) as other:
        one.save(tmp_path / "one.jpg", quality=40)
        other.save(tmp_path / "other.png", compress_level=0)
    (tmp_path / "text.png").write_text("no image")
    return [str(path) for path in slices], [str(tmp_path / name) for name in ("one.jpg", "other.png", "text.png")]


def test_the_same_picture_in_another_file_is_named_once(scans, caplog):
    slices, encoded = scans
    with caplog.at_level(logging.WARNING):
        warn_of_lookalikes(slices, encoded)
        warn_of_lookalikes(slices[:2], slices[2:])
        warn_of_lookalikes([], encoded)
    pairs = "; ".join(f"{one} and {other}" for one, other in zip(slices[:2], encoded[:2], strict=True))
    assert caplog.messages == [f"2 images look as if they were both learnt from and tested: {pairs}."]


def test_copies_of_tested_files_are_not_learnt_from(scans, caplog):
    slices, encoded = scans
    with caplog.at_level(logging.WARNING):
        left = without_copies(table(*slices), pd.Series([slices[0], *encoded[1:]]))
    assert left.image_path.tolist() == slices[1:]
    assert [message.split(":")[0] for message in caplog.messages] == [
        "1 images are tested too, and are not learnt from",
        "1 images look as if they were both learnt from and tested",
    ]
    with pytest.raises(ValueError, match="None of the 4 images is left to learn from: all are tested too"):
        without_copies(table(*slices), pd.Series(slices))
