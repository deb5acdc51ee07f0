"""Distances to the bank; axes as in the module."""

import pytest
import torch

import by_hand
from anomalib_mvfa.model import memory_bank
from anomalib_mvfa.model.memory_bank import MemoryBank, nearest_distance

LEVELS, VIEWS, LENGTH, WIDTH = 2, 3, 10, 8


def features(seed: int, count: int = VIEWS) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [2 * torch.randn(count, LENGTH, WIDTH, generator=generator) for _ in range(LEVELS)]


@pytest.fixture
def bank():
    bank = MemoryBank()
    bank.store("seg", features(0))
    return bank


def test_distance_is_the_mean_over_levels(bank):
    query = features(1, count=2)
    expected = [by_hand.distances(one, rows) for one, rows in zip(query, features(0), strict=True)]
    for level, one in zip(bank.level_distances("seg", query), expected, strict=True):
        assert (level - one).abs().max() < 1e-6
    found = bank.distance("seg", query)
    assert found.shape == (2, LENGTH - 1)
    assert found.dtype == torch.float32
    assert (found - sum(expected) / LEVELS).abs().max() < 1e-6


def test_own_rows_are_at_distance_zero(bank):
    assert bank.distance("seg", features(0)).abs().max() < 1e-6
    assert bank.distance("seg", features(1)).min() > 1e-2


def test_class_tokens_count_in_the_bank_but_not_in_the_query(bank):
    """A query whose patch is another image's class token is found; its own class token is never compared."""
    query = features(1, count=1)
    far = bank.distance("seg", query)
    for level, stored in zip(query, features(0), strict=True):
        level[0, 4] = stored[2, 0]
    near = bank.distance("seg", query)
    assert near[0, 3].abs() < 1e-6 < far[0, 3]
    for level in query:
        level[0, 0] = 100.0
    assert torch.equal(bank.distance("seg", query), near)


@pytest.mark.parametrize("keep", [[True, False, True], [False, True, False]])
def test_views_can_be_left_out(bank, keep):
    keep = torch.tensor(keep)
    smaller = MemoryBank()
    smaller.store("seg", [level[keep] for level in features(0)])
    query = features(1)
    assert torch.equal(bank.distance("seg", query, keep), smaller.distance("seg", query))
    own = bank.distance("seg", features(0), keep).amax(dim=1)
    assert torch.equal(own > 1e-3, ~keep), "an image that was left out found itself"


@pytest.mark.parametrize(("queries", "rows"), [(1, 1), (4, 7), (26, 29), (100, 31)])
def test_tiles_change_nothing(bank, monkeypatch, queries, rows):
    query = features(1)
    whole = bank.distance("seg", query)
    monkeypatch.setattr(memory_bank, "QUERIES", queries)
    monkeypatch.setattr(memory_bank, "ROWS", rows)
    assert torch.allclose(bank.distance("seg", query), whole, atol=1e-6)


def test_half_precision_around_it_changes_nothing(bank):
    query = features(1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = bank.distance("seg", query)
    assert torch.equal(found, bank.distance("seg", query))


def test_near_neighbours_are_told_apart():
    """Distances of 1e-5, below the resolution of bfloat16, keep their order."""
    row = torch.nn.functional.normalize(torch.ones(1, WIDTH), dim=1)
    query = row.repeat(20, 1)
    query[:, 0] += torch.linspace(0.002, 0.01, 20)
    assert (nearest_distance(query, row).diff() > 0).all()


def test_distances_lie_between_zero_and_two():
    """Whatever the length of a feature."""
    rows = torch.nn.functional.normalize(torch.randn(500, 768, generator=torch.Generator().manual_seed(0)), dim=1)
    assert nearest_distance(rows, rows).min() >= 0
    assert nearest_distance(-3 * rows[:1], rows[:1]).item() == pytest.approx(2, abs=1e-6)
    assert torch.allclose(nearest_distance(7 * rows[:9], rows[9:]), nearest_distance(rows[:9], rows[9:]), atol=1e-6)


def test_an_empty_bank_is_an_error(bank):
    bank.clear()
    assert bank.filled == set()
    for branch in ("seg", "det"):
        with pytest.raises(RuntimeError, match=f"memory bank of the {branch} branch is empty.*few_shot_weight to 0"):
            bank.distance(branch, features(1))


def test_a_coreset_is_a_seeded_share_of_the_rows(bank):
    smaller = [MemoryBank(coreset=0.5, seed=seed) for seed in (0, 0, 1)]
    for one in smaller:
        one.store("seg", features(0))
        assert one.seg.shape == (LEVELS, VIEWS * LENGTH // 2, WIDTH)
        assert (torch.cdist(one.seg, bank.seg).amin(dim=-1) < 1e-3).all()
    assert torch.equal(smaller[0].seg, smaller[1].seg)
    assert not torch.equal(smaller[0].seg, smaller[2].seg)


def test_rows_are_saved_and_loaded(bank):
    other = MemoryBank()
    other.load_state_dict(bank.state_dict())
    assert torch.equal(other.seg, bank.seg)
    assert other.seg.shape == (LEVELS, VIEWS * LENGTH, WIDTH)
    assert torch.allclose(other.seg.norm(dim=-1), torch.ones(LEVELS, VIEWS * LENGTH))
    assert other.det.numel() == 0
