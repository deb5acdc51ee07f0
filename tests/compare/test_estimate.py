"""How long jobs may take."""

from dataclasses import replace

import pytest

from anomalib_mvfa.compare.estimate import Estimate, duration


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.2, "0 s"), (99, "99 s"), (100, "2 min"), (5940, "99 min"), (6000, "1 h 40 min"), (86400, "24 h 00 min")],
)
def test_durations_are_in_words(seconds, text):
    assert duration(seconds) == text


def took(job, seconds, **changes):
    return replace(job.row(), seconds={"job": seconds}, **changes)


def test_estimates_follow_the_same_method_and_category_first(comparison, tmp_path):
    brain, mvfa_brain, chest, mvfa_chest = comparison().jobs()
    estimate = Estimate([brain], tmp_path)
    assert estimate.seconds(brain) is None
    assert estimate.left([brain, chest]) == 0
    estimate.learn(took(chest, 10))
    assert estimate.seconds(brain) == 10
    estimate.learn(took(brain, 20))
    estimate.learn(took(brain, 40))
    estimate.learn(took(brain, 1, error="ValueError"))
    assert estimate.seconds(brain) == 30
    assert estimate.seconds(chest) == 10
    assert estimate.seconds(mvfa_brain) is None
    assert estimate.left([brain, mvfa_chest]) == pytest.approx(30 + 70 / 3)


def test_a_probe_counts_images_and_epochs(comparison, tmp_path, monkeypatch):
    monkeypatch.setattr("anomalib_mvfa.compare.estimate._pass", lambda *_: 0.5)
    plan = comparison(categories=["Brain"])
    plan.methods["MVFA"].model["init_args"]["max_epochs"] = 7
    patchcore, mvfa = plan.jobs()
    estimate = Estimate(plan.jobs(), tmp_path, probe=True)
    assert estimate.seconds(patchcore) == 0.5 * (6 + 2)
    assert estimate.seconds(mvfa) == 0.5 * (6 + 3 * 7 * 44)


@pytest.mark.parametrize("name", ["Patchcore", "Mvfa", "WinClipBaseline", "Dra"])
def test_models_are_timed_without_downloads(comparison, tiny_config, tmp_path, name):
    arguments = {"backbone": str(tiny_config), "pretrained": "openai", "image_size": 56}
    if name == "Patchcore":
        arguments = {"backbone": "resnet18"}
    if name == "Dra":  # scores nothing before it is fitted
        arguments = {"image_size": 128, "pre_trained": True}
    if name == "WinClipBaseline":
        del arguments["image_size"]
    method = {"protocol": "few_normal", "model": {"class_path": name, "init_args": arguments}}
    (job,) = comparison(methods={name: method}, categories=["Chest"]).jobs()
    assert 0 < Estimate([job], tmp_path, probe=True).seconds(job) < 600


def test_of_a_model_that_takes_no_weights_nothing_is_known(comparison, tmp_path):
    method = {"protocol": "full_normal", "model": {"class_path": "EfficientAd"}}
    (job,) = comparison(methods={"EfficientAd": method}, categories=["Chest"]).jobs()
    assert Estimate([job], tmp_path, probe=True).seconds(job) is None
