"""What a fitted model knows of its data, and how a checkpoint brings it back."""

import pytest
import torch

from anomalib_mvfa.contract import LEAVE_ONE_OUT, DataFacts
from anomalib_mvfa.model.fusion import Weights
from anomalib_mvfa.model.state import BANK_PREFIX, FitState, Settings, adapt_state_dict
from anomalib_mvfa.model.torch_model import Scoring

FEW_SHOT = Settings.for_data(DataFacts(class_name="liver"))
STATE = FitState(FEW_SHOT, ("liver", "few_shot", True), is_fitted=True)


def test_arguments_come_before_what_data_imply():
    asked = Settings(class_name="head", few_shot_weight=0.2, calibration="none")
    assert asked.completed(FEW_SHOT) == Settings("head", "map_max", 0.5, 0.2, 1e-3, "none", "few_shot", "seg")
    assert asked.completed(FEW_SHOT).scoring == Scoring("seg", "map_max", Weights(0.5, 0.2), normalised=False)


def test_adapters_that_learn_nothing_have_no_weight():
    nothing = Settings.for_data(DataFacts(normal_only=True))
    assert nothing.scoring.weights == Weights(0.0, 0.5)
    assert Settings(zero_shot_weight=0.3).completed(nothing).scoring.weights == Weights(0.3, 0.5)
    assert Settings(few_shot_weight=0.0).completed(nothing).scoring.weights == Weights(0.5, 0.0)  # one must have weight


@pytest.mark.parametrize(("calibration", "used"), [("support", "none"), ("test", "test")])
def test_without_a_bank_there_are_no_ranges_of_the_support(calibration, used):
    left_out = Settings.for_data(DataFacts(LEAVE_ONE_OUT, has_masks=False))
    settings = Settings(calibration=calibration).completed(left_out)
    assert (settings.few_shot_weight, settings.calibration) == (0, used)
    assert (settings.map_branch, settings.image_score) == ("det", "det_mean")


@pytest.mark.parametrize("state", [STATE, FitState()], ids=["fitted", "new"])
def test_a_checkpoint_brings_the_state_back(build, state):
    model = build()
    assert FitState.from_checkpoint(state.to_checkpoint(model), model, "backbone='x'") == state


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quick_gelu": True}, "another backbone: .* those of backbone='x' have .* Give the same backbone and weights"),
        ({"levels": [1, 2]}, r"made with levels=\[1, 2, 3, 4\], and levels=\[1, 2\] are in use\. Give the same\."),
    ],
)
def test_a_checkpoint_of_another_network_is_refused(build, options, message):
    with pytest.raises(RuntimeError, match=message):
        FitState.from_checkpoint(STATE.to_checkpoint(build()), build(**options), "backbone='x'")


BANK = {f"{BANK_PREFIX}seg", "model.text_features", "model.ranges"}
THRESHOLDS = {"post_processor._image_threshold", "post_processor._pixel_threshold"}


@pytest.mark.parametrize(
    ("options", "settings", "emptied"),
    [
        ({}, {}, set()),
        ({"residual_ratio": 0.3}, {}, BANK | THRESHOLDS),
        ({"residual": "single"}, {}, BANK | THRESHOLDS),
        ({"normalize": True}, {}, BANK | THRESHOLDS),
        ({"upsample": "probabilities"}, {}, BANK | THRESHOLDS),
        ({"score_levels": [4]}, {}, BANK | THRESHOLDS),
        ({"coreset": 0.5}, {}, BANK | THRESHOLDS),
        ({}, {"class_name": "head"}, BANK | THRESHOLDS),
        ({}, {"image_score": "det_mean"}, THRESHOLDS),
        ({}, {"few_shot_weight": 0.1}, THRESHOLDS),
        ({"pooling": "max"}, {}, set()),  # of training alone
    ],
)
def test_other_options_empty_what_they_made(build, options, settings, emptied, caplog):
    own = {name: torch.zeros(2) for name in (*BANK, *THRESHOLDS, "model.backbone.clip.proj")}
    state = {name: torch.ones(2) for name in own if "backbone" not in name}
    used = Settings(**settings).completed(FEW_SHOT)
    adapt_state_dict(state, own, STATE.to_checkpoint(build()), build(**options), used)
    assert set(state) == set(own)
    assert torch.equal(state["model.backbone.clip.proj"], own["model.backbone.clip.proj"])
    assert {name for name, value in state.items() if value.isnan().any() or not value.numel()} == emptied
    assert all(name in caplog.text for name in settings)
    assert ("bank" in caplog.text) == (emptied > THRESHOLDS)
