"""Adapters against their formulas; axes as in the module."""

import pytest
import torch

from anomalib_mvfa.model.adapters import Adapter, BranchAdapters, Projector, add_to_stream

WIDTH, JOINT = 6, 4
X = torch.randn(2, 5, WIDTH, generator=torch.Generator().manual_seed(0))


def leaky(x):
    return torch.where(x > 0, x, 0.01 * x)


def test_adapter_returns_its_middle_and_then_its_end():
    torch.manual_seed(0)
    adapter = Adapter(WIDTH, JOINT)
    weights = adapter.state_dict()
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    assert shapes == {"fc1.0.weight": (JOINT, WIDTH), "fc2.0.weight": (WIDTH, JOINT)}
    feature = adapter(X)
    expected = leaky(X @ weights["fc1.0.weight"].T)
    assert torch.allclose(feature, expected, atol=1e-6)
    assert torch.allclose(adapter.to_stream(feature), leaky(expected @ weights["fc2.0.weight"].T), atol=1e-6)
    assert (feature < 0).any(), "a ReLU would have passed"


def test_projector_is_linear_and_has_nothing_for_the_stream():
    torch.manual_seed(0)
    projector = Projector(WIDTH, JOINT)
    feature = projector(X)
    assert list(projector.state_dict()) == ["fc1.0.weight"]
    assert torch.allclose(feature, X @ projector.state_dict()["fc1.0.weight"].T, atol=1e-6)
    assert not hasattr(projector, "to_stream")


def test_linear_layers_have_a_bias():
    adapters = BranchAdapters(2, WIDTH, JOINT, "linear")
    shapes = {name: tuple(weight.shape) for name, weight in adapters[0].state_dict().items()}
    assert shapes == {"weight": (JOINT, WIDTH), "bias": (JOINT,)}
    adapters.train_only([1])
    assert [name for name, weight in adapters.named_parameters() if weight.requires_grad] == ["1.weight", "1.bias"]


def test_both_branches_share_the_weight_of_adapters():
    seg, det = torch.full_like(X, 10.0), torch.full_like(X, 100.0)
    assert torch.allclose(add_to_stream(X, seg, det, 0.1), 0.8 * X + 1 + 10)
    assert torch.allclose(add_to_stream(X, seg, det, 0.1, "single"), 0.9 * X + 0.5 + 5)
    assert torch.equal(add_to_stream(X, seg, det, 0.0), X)


@pytest.mark.parametrize(
    ("adaptation", "trained", "learning"),
    [
        ("adapter", [0, 1, 2], {"0.fc1", "0.fc2", "1.fc1", "1.fc2", "2.fc1"}),
        ("adapter", [1], {"1.fc1"}),
        ("adapter", [0, 2], {"0.fc1", "0.fc2", "2.fc1"}),
        ("adapter", [0], {"0.fc1"}),
        ("projector", [0, 1, 2], {"0.fc1", "1.fc1", "2.fc1"}),
        ("projector", [2], {"2.fc1"}),
    ],
)
def test_only_weights_that_a_loss_depends_on_learn(adaptation, trained, learning):
    adapters = BranchAdapters(3, WIDTH, JOINT, adaptation)
    adapters.train_only([0])  # a later choice replaces an earlier one
    adapters.train_only(trained)
    found = {name.removesuffix(".0.weight") for name, weight in adapters.named_parameters() if weight.requires_grad}
    assert found == learning
