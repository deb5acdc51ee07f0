"""Every comparison in configs/compare, run as it is but for small data, small backbones and one epoch."""

import math
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

from anomalib_mvfa.compare import runner
from anomalib_mvfa.compare.config import Comparison
from anomalib_mvfa.compare.execute import execute
from anomalib_mvfa.compare.job import WITH_SHOTS
from anomalib_mvfa.compare.paper import paper_table
from anomalib_mvfa.compare.report import report
from workspace import FROM_CACHE, small_comparison, write_workspace

CONFIGS = sorted(Path(__file__).parents[2].joinpath("configs", "compare").glob("*.yaml"))


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """Return a folder with data where the configs look for them."""
    root = tmp_path_factory.mktemp("workspace")
    write_workspace(root)
    return root


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Return a cache of Hugging Face with a random network in place of DINOv2's small one."""
    network = timm.create_model("vit_small_patch14_dinov2")
    hub = tmp_path_factory.mktemp("hub")
    model = hub / f"models--{network.pretrained_cfg['hf_hub_id'].replace('/', '--')}"
    (model / "refs").mkdir(parents=True)
    (model / "refs" / "main").write_text("0" * 40)
    (model / "snapshots" / ("0" * 40)).mkdir(parents=True)
    save_file(network.state_dict(), model / "snapshots" / ("0" * 40) / "model.safetensors")
    return hub


QUICK = {"own_data", "table2"}
"""Comparisons of few methods, by either way of leaving categories out or in; the others are slow."""


@pytest.mark.usefixtures("small_teacher")
@pytest.mark.parametrize(
    "path",
    [pytest.param(path, marks=[pytest.mark.slow] * (path.stem not in QUICK), id=path.stem) for path in CONFIGS],
)
def test_every_comparison_runs(path, workspace, tmp_path, monkeypatch, cache):
    monkeypatch.chdir(workspace)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr(runner, "_on_this_machine", lambda jobs, output, *_: (execute(job, output) for job in jobs))
    plan = Comparison(**small_comparison(path))
    rows = runner.compare(plan, tmp_path)
    assert {row.job: row.error for row in rows if row.error} == {}
    assert {row.method for row in rows} == set(plan.methods)
    for row in rows:
        has_masks = row.category not in {"Chest", "Histopathology", "Retina_OCT2017"}
        assert ("pixel_AUROC" in row.metrics) == has_masks
        assert row.random_weights == (plan.methods[row.method].model["class_path"] not in FROM_CACHE)
    by_category = {(row.category, row.k_shot if plan.group_by else None): set() for row in rows}
    for row in rows:
        by_category[row.category, row.k_shot if plan.group_by else None].add(row.test_set)
    assert all(len(test_sets) == 1 for test_sets in by_category.values())
    page = report(tmp_path).read_text()
    assert plan.title in page or plan.title.replace("&", "&amp;") in page


def test_a_papers_methods_are_called_as_in_the_paper():
    named = 0
    for path in CONFIGS:
        plan = Comparison.load(path)
        if plan.paper is None:
            continue
        table = paper_table(plan.paper)
        for name, method in plan.methods.items():
            for k_shot in plan.k_shots if method.protocol in WITH_SHOTS else [None]:
                figure = table.figure(
                    "image_AUROC", name, method.protocol, k_shot, method.categories or plan.categories
                )
                known = not math.isnan(figure)
                assert known or (plan.paper, name) == ("figure3", "APRIL-GAN"), (path.stem, name)
                named += known
    assert named == 11 + 3 + 3 + 2 + 9 + 4
