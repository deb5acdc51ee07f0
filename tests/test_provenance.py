"""Commit, versions and device."""

import subprocess
import sys

import pytest
import torch

from anomalib_mvfa import provenance


def git(folder, *command):
    settings = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *settings, *command], cwd=folder, capture_output=True, text=True, check=True)  # noqa: S607
    return done.stdout.strip()


@pytest.fixture(autouse=True)
def _fresh():
    """Forget commits that were looked up."""
    provenance.commit.cache_clear()
    yield
    provenance.commit.cache_clear()


def test_a_commit_is_marked_once_files_have_changed(tmp_path, monkeypatch):
    module = tmp_path / "module.py"
    module.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(module))
    assert provenance.commit() is None
    provenance.commit.cache_clear()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "first")
    head = git(tmp_path, "rev-parse", "HEAD")
    assert provenance.commit() == head
    (tmp_path / "new.txt").write_text("not part of the package")
    provenance.commit.cache_clear()
    assert provenance.commit() == head
    module.write_text("changed = True")
    assert provenance.commit() == head  # what is loaded is still that
    provenance.commit.cache_clear()
    assert provenance.commit() == head + "+"


def test_without_git_there_is_no_commit(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert provenance.commit() is None


def test_versions_are_those_that_are_installed():
    versions = provenance.versions()
    assert versions["torch"] == torch.__version__.split("+")[0] or versions["torch"] == torch.__version__
    assert versions["python"].startswith(f"{sys.version_info.major}.{sys.version_info.minor}.")
    assert "anomalib" in versions


def test_the_processor_is_named_with_its_threads():
    assert provenance.device_name(torch.device("cpu")).endswith(f", {torch.get_num_threads()} threads")
    assert provenance.device_name(torch.device("meta")) == "meta"
