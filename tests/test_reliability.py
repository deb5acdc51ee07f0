"""docs/reliability.md names tests that exist, and figures that are theirs."""

import re
from pathlib import Path

import test_fuzz
from data.test_inputs import TABLE

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "reliability.md").read_text("utf-8")


def test_every_test_that_is_named_exists():
    names = re.findall(r"`(tests/[\w/]+\.py)`", TEXT)
    assert len(names) >= 10
    assert [name for name in names if not (ROOT / name).is_file()] == []


def test_figures_are_those_of_the_tests():
    assert f"a table of {len(TABLE)} kinds of files" in TEXT
    assert f"{test_fuzz.KINDS} readers" in TEXT
    assert '"ANOMALIB_MVFA_FUZZ_EXAMPLES", "200"' in (ROOT / "tests" / "test_fuzz.py").read_text("utf-8")
    assert "with 200 damaged" in TEXT


def test_lowest_versions_are_those_of_the_table():
    pins = dict(re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "tests" / "lowest.txt").read_text("utf-8"), re.MULTILINE))
    (row,) = re.findall(r"^\| `make lowest.*$", TEXT, re.MULTILINE)
    versions = [cell.strip() for cell in row.split("|")][3:6]
    names = ("anomalib", "torch", "open_clip_torch")
    assert all(version.startswith(pins[name]) for name, version in zip(names, versions, strict=True))
