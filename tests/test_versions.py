"""The lowest versions that are tested are the lowest that the package declares."""

import re
from pathlib import Path

TESTS = Path(__file__).parent


def test_lowest_versions_are_the_floors():
    project = (TESTS.parent / "pyproject.toml").read_text("utf-8")  # Python 3.10 has no tomllib
    floors = set(re.findall(r'^ +"([\w-]+)>=([\d.]+)', project, re.MULTILINE))
    lowest = (TESTS / "lowest.txt").read_text("utf-8")
    pins = re.findall(r"^([\w-]+)==([\d.]+)$", lowest, re.MULTILINE)
    assert {("anomalib", "2.7"), ("torch", "2.10")} <= floors
    assert sorted(pins) == sorted(floors)
