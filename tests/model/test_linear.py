"""Products by other kernels: the same values and gradients as torch's own linear layer, up to rounding."""

import pytest
import torch
from torch.nn import functional

from anomalib_mvfa.model import linear as module
from anomalib_mvfa.model.linear import Linear, linear


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(len(shape)), dtype=torch.float32)


@pytest.mark.parametrize("shape", [(5, 7), (2, 3, 7), (1, 1, 1, 7), (0, 7)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_values_and_gradients(shape, with_bias):
    x, weight = drawn(*shape), drawn(4, 7)
    bias = drawn(4) if with_bias else None
    ours, theirs = ([t.clone().requires_grad_() for t in (x, weight, bias) if t is not None] for _ in range(2))
    found, expected = linear(*ours), functional.linear(*theirs)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    upstream = drawn(*expected.shape)
    found.backward(upstream)
    expected.backward(upstream)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one.grad, other.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("learns", ["x", "weight", "bias"])
def test_only_what_learns_has_a_gradient(learns):
    parts = {"x": drawn(3, 7), "weight": drawn(4, 7), "bias": drawn(4)}
    parts[learns].requires_grad_()
    linear(**parts).sum().backward()
    assert [name for name, part in parts.items() if part.grad is not None] == [learns]


def test_views_and_slices():
    x, weight = drawn(7, 6, 5).transpose(0, 2), drawn(9, 14)[::2, ::2]
    torch.testing.assert_close(linear(x, weight), functional.linear(x, weight), atol=1e-5, rtol=1e-5)


def test_other_precisions_and_autocast_are_torchs():
    x, weight = drawn(3, 7), drawn(4, 7)
    for dtype in (torch.float64, torch.bfloat16):
        assert torch.equal(linear(x.to(dtype), weight.to(dtype)), functional.linear(x.to(dtype), weight.to(dtype)))
    with torch.autocast("cpu", torch.bfloat16):
        assert linear(x, weight).dtype == torch.bfloat16


def test_a_layer_has_the_names_and_weights_of_torchs(monkeypatch):
    layer = Linear(7, 4)
    assert list(layer.state_dict()) == ["weight", "bias"]
    before = layer(drawn(3, 7))
    monkeypatch.setattr(module, "_HAS_ONEDNN", False)
    torch.testing.assert_close(layer(drawn(3, 7)), before, atol=1e-5, rtol=1e-5)
