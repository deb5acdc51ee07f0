"""What a model is built from: levels and adapters."""

import pytest
import torch

from anomalib_mvfa import MvfaModel, build_mvfa
from anomalib_mvfa.model.build import check_levels


@pytest.mark.parametrize(
    ("levels", "depth", "expected"),
    [(None, 24, [6, 12, 18, 24]), (None, 4, [1, 2, 3, 4]), (None, 2, [1, 2]), (None, 1, [1]), ((2, 4.0), 4, [2, 4])],
)
def test_levels_are_quarter_points_by_default(levels, depth, expected):
    assert check_levels(levels, depth) == expected


@pytest.mark.parametrize("levels", [[], [2, 1], [1, 1], [0, 1], [1, 5]])
def test_levels_must_be_blocks_in_order(build, levels):
    with pytest.raises(ValueError, match=r"levels=\[.*\] must be increasing block numbers between 1 and 4"):
        build(levels=levels)


@pytest.mark.parametrize("name", ["adaptation", "residual", "pooling", "upsample"])
def test_unknown_choice_is_refused_before_weights_load(name):
    with pytest.raises(ValueError, match=f"{name}='both' is unknown; choose one of: "):
        build_mvfa("no such backbone", **{name: "both"})


def test_adapters_start_from_the_seed_as_linear_layers_do(build):
    torch.manual_seed(5)  # the global generator has no say
    one, same, other = build(), build(), build(seed=1)
    for branch in ("seg_adapters", "det_adapters"):
        weights = zip(*(getattr(model, branch).parameters() for model in (one, same, other)), strict=True)
        for weight, again, stranger in weights:
            assert torch.equal(weight, again)
            assert not torch.equal(weight, stranger)
            bound = weight.shape[1] ** -0.5  # uniform in [-bound, bound]
            assert 0.97 * bound < weight.abs().max() <= bound
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not torch.equal(one.seg_adapters[0].fc1[0].weight, one.det_adapters[0].fc1[0].weight)


def test_a_model_of_names_is_still_built(tiny_config):
    with pytest.warns(DeprecationWarning, match="build_mvfa takes the arguments given here"):
        model = MvfaModel(str(tiny_config), None, image_size=28, levels=[2])
    assert isinstance(model, MvfaModel)
    assert (model.image_size, model.levels) == (28, [2])
