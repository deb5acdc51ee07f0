"""Files that are written completely or not at all; commit, versions and device."""

import errno
import os
import subprocess
import sys

import pytest
import torch

from anomalib_mvfa import io

# ---------------------------------------------------------------------------------------------------------------- files


@pytest.fixture
def path(tmp_path):
    """A file with content, alone in its folder after the test."""
    path = tmp_path / "folder" / "file.txt"
    path.parent.mkdir()
    path.write_text("old")
    yield path
    assert [file.name for file in path.parent.iterdir()] == ["file.txt"]


def write(path, text="half", error=None):
    with io.atomic_write(path) as partial:
        partial.write_text(text)
        if error:
            raise error


def test_a_complete_file_replaces_the_old_one(path, tmp_path):
    for target in (path, tmp_path / "new" / "file.txt"):
        write(target, "new")
        assert target.read_text() == "new"
        assert [file.name for file in target.parent.iterdir()] == ["file.txt"]


@pytest.mark.parametrize("error", [OSError("no space left on device"), KeyboardInterrupt()])
def test_a_failure_keeps_the_old_file(path, error):
    with pytest.raises(type(error)):
        write(path, error=error)
    assert path.read_text() == "old"


def test_a_kill_keeps_the_old_file(path):
    code = (
        "import os, pathlib, signal; from anomalib_mvfa.io import atomic_write\n"
        f"with atomic_write(pathlib.Path({str(path)!r})) as partial:\n"
        "    partial.write_text('half'); os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == -9
    assert path.read_text() == "old"
    write(path, "new")
    assert path.read_text() == "new"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has a disk that is always full")  # noqa: PTH110
@pytest.mark.parametrize("fill", [write, lambda path: io.save_atomically({"weight": torch.zeros(10**5)}, path)])
def test_a_full_disk_keeps_the_old_file(path, fill):
    path.with_name(".file.txt.partial").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"/file\.txt was not written \(No space left on device\), and .* is kept\."):
        fill(path)
    assert path.read_text() == "old"


@pytest.mark.parametrize(
    ("number", "name"), [(errno.EROFS, "out/file.txt"), (errno.EACCES, "out/.file.txt.partial"), (errno.EACCES, ".")]
)
def test_a_path_that_must_not_be_written_is_named(tmp_path, number, name):
    path, error = tmp_path / "out" / "file.txt", OSError(number, os.strerror(number), str(tmp_path / name))
    with pytest.raises(OSError, match=r"/out/file\.txt was not written \(.*\), .*write elsewhere\."):
        write(path, error=error)
    write(path, "new")
    assert path.read_text() == "new"


@pytest.mark.parametrize("error", [PermissionError(errno.EACCES, "Permission denied", "x"), RuntimeError("no")])
def test_other_errors_are_unchanged(tmp_path, error):
    with pytest.raises(type(error)) as raised, io.explain_failed_write(tmp_path):
        raise error
    assert raised.value is error


# ---------------------------------------------------------------------------------------------------------- provenance


def git(folder, *command):
    settings = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *settings, *command], cwd=folder, capture_output=True, text=True, check=True)  # noqa: S607
    return done.stdout.strip()


def test_a_commit_is_marked_once_files_have_changed(tmp_path, monkeypatch):
    commit = io.commit.__wrapped__  # looked up anew
    module = tmp_path / "module.py"
    module.write_text("")
    monkeypatch.setattr(io, "__file__", str(module))
    assert commit() is None
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    (tmp_path / "new.txt").write_text("not part of the package")
    assert commit() == head
    before = io.commit()
    module.write_text("changed = True")
    assert io.commit() == before  # the code that is loaded is still that
    assert commit() == head + "+"
    monkeypatch.setenv("PATH", "")  # without git
    assert commit() is None
    io.commit.cache_clear()


def test_versions_are_the_installed_ones():
    versions = io.versions()
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] == torch.__version__
    assert versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert "anomalib" in versions


def test_the_processor_is_named_with_its_threads():
    assert io.device_name(torch.device("cpu")).endswith(f", {torch.get_num_threads()} threads")
    assert io.device_name(torch.device("meta")) == "meta"


def test_it_imports_neither_torch_nor_lightning():
    code = "import anomalib_mvfa.io, sys; assert not {'torch', 'lightning', 'anomalib'} & {*sys.modules}"
    subprocess.run([sys.executable, "-c", code], check=True)
