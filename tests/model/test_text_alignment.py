"""Patch logits and pooling; axes as in the module."""

import pytest
import torch

import by_hand
from anomalib_mvfa.model.text_alignment import full_precision, patch_logits, pool_patches

GENERATOR = torch.Generator().manual_seed(0)
TOKENS = 3 * torch.randn(2, 10, 8, generator=GENERATOR)
TEXT = torch.nn.functional.normalize(torch.randn(8, 2, generator=GENERATOR), dim=0)


def test_logits_are_scaled_cosines_without_the_class_token():
    found = patch_logits(TOKENS, TEXT)
    for image in range(2):
        for patch in range(9):
            for state in range(2):
                vector, column = TOKENS[image, 1 + patch].double(), TEXT[:, state].double()
                cosine = vector @ column / vector.norm() / column.norm()
                assert found[image, patch, state].item() == pytest.approx(100 * cosine.item(), abs=1e-4)
    assert found.shape == (2, 9, 2)


def test_half_precision_around_it_changes_nothing():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (TOKENS[:, 1:] @ TEXT).dtype == torch.bfloat16
        found = patch_logits(TOKENS, TEXT)
    assert found.dtype == torch.float32
    assert torch.equal(found, patch_logits(TOKENS, TEXT))


def test_half_precision_features_are_compared_in_float32():
    half = TOKENS.bfloat16()
    expected = by_hand.logits(half, TEXT)
    assert (patch_logits(half, TEXT) - expected).abs().max() < 1e-4
    assert (by_hand.logits(TOKENS, TEXT) - expected).abs().max() > 1e-2


def test_full_precision_switches_autocast_off_and_back_on():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        with full_precision(torch.device("cpu")):
            assert (TEXT.T @ TEXT).dtype == torch.float32
        assert (TEXT.T @ TEXT).dtype == torch.bfloat16


def test_pooling():
    probability = torch.tensor([[0.1, 0.2, 0.6], [0.9, 0.0, 0.0]])
    assert pool_patches(probability, "mean").tolist() == pytest.approx([0.3, 0.3])
    assert pool_patches(probability, "max").tolist() == pytest.approx([0.6, 0.9])
