"""Files that are complete or not there."""

import errno
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from anomalib_mvfa.files import read_arrays, room_for, save_whole, written_whole


def test_what_is_written_takes_the_files_place(tmp_path):
    path = tmp_path / "new" / "file.txt"
    for text in ("first", "second"):
        with written_whole(path) as partial:
            partial.write_text(text)
        assert path.read_text() == text
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_failure_leaves_what_was_there(tmp_path, error):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def fail():
        with written_whole(path) as partial:
            partial.write_text("half")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert path.read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


def test_a_kill_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    code = (
        "import os, pathlib, signal; from anomalib_mvfa.files import written_whole\n"
        f"with written_whole(pathlib.Path({str(path)!r})) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert path.read_text() == "old"
    with written_whole(path) as partial:
        partial.write_text("new")
    assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")  # noqa: PTH110
def test_a_full_disk_leaves_what_was_there(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def text():
        with written_whole(path) as partial:
            partial.write_text("half")

    for fill in (text, lambda: save_whole({"weight": torch.zeros(10**5)}, path)):
        (tmp_path / ".file.txt.partial").symlink_to("/dev/full")
        with pytest.raises(OSError, match=r"/file\.txt was not written \(No space left on device\), and .* is kept\."):
            fill()
        assert path.read_text() == "old"
        assert [file.name for file in tmp_path.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied", "x"), RuntimeError("no")])
def test_other_errors_are_as_they_are(tmp_path, error):
    with pytest.raises(type(error)) as raised, room_for(tmp_path):
        raise error
    assert raised.value is error


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 and no more", b"no archive"])
def test_spoilt_arrays_are_named(tmp_path, content):
    np.savez(tmp_path / "whole.npz", a=[1, 2])
    assert read_arrays(tmp_path / "whole.npz")["a"].tolist() == [1, 2]
    (tmp_path / "scores.npz").write_bytes(content)
    with pytest.raises(ValueError, match=r"/scores\.npz cannot be read; it may be cut short\. Remove its folder"):
        read_arrays(tmp_path / "scores.npz")
