"""Small comparisons: two categories, with masks and without, and methods that take less than a second."""

import shutil
from pathlib import Path

import pytest

from anomalib_mvfa.compare import runner
from anomalib_mvfa.compare.config import Comparison
from anomalib_mvfa.compare.execute import execute
from anomalib_mvfa.data.phantom import write_phantom

PATCHCORE = {"class_path": "Patchcore", "init_args": {"backbone": "test_resnet", "pre_trained": False}}


@pytest.fixture(scope="session")
def two_categories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a root in BMAD's layout with Brain and Chest, the latter without masks."""
    root = tmp_path_factory.mktemp("two_categories")
    write_phantom(root, size=32, train=3, valid=4, test=3)
    write_phantom(root / "other", seed=1, size=32, train=3, valid=4, test=3)
    chest = (root / "other" / "Brain").rename(root / "Chest")
    (root / "other").rmdir()
    for masks in [*chest.rglob("label")]:
        shutil.rmtree(masks)
    return root


@pytest.fixture
def comparison(two_categories: Path, tiny_config: Path):
    """Return a function that makes a comparison of PatchCore and MVFA, with changed arguments."""

    def make(**changes: object) -> Comparison:
        mvfa = {"backbone": str(tiny_config), "pretrained": None, "image_size": 56, "max_epochs": 1}
        arguments = {
            "data": {"class_path": "BMADOneClass", "init_args": {"root": str(two_categories), "num_workers": 0}},
            "categories": ["Brain", "Chest"],
            "k_shots": [2],
            "methods": {
                "PatchCore": {"protocol": "few_normal", "model": PATCHCORE},
                "MVFA": {
                    "protocol": "few_shot",
                    "model": {"class_path": "Mvfa", "init_args": mvfa},
                    "data": {"train_batch_size": 44},  # all views of K = 2 in one step
                },
            },
            "accelerator": "cpu",
        }
        return Comparison(**{**arguments, **changes})

    return make


@pytest.fixture
def done(monkeypatch):
    """Run jobs in this process, and return the list of those that were run."""
    jobs = []

    def one_after_the_other(missing, output, *_args):
        for job in missing:
            jobs.append(job.folder)
            yield execute(job, output)

    monkeypatch.setattr(runner, "_on_this_machine", one_after_the_other)
    return jobs
