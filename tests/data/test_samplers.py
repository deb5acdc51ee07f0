"""Orders are functions of (seed, epoch) and batches the same whatever the number of processes."""

from itertools import chain, zip_longest

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from torch.utils.data import DistributedSampler

from anomalib_mvfa.data import dataset, samplers
from anomalib_mvfa.data.dataset import ConcatDataset, SampleDataset
from anomalib_mvfa.data.samplers import eval_loader, train_loader


class Numbers(SampleDataset):
    """A dataset of numbers in place of images."""

    def __init__(self, start, count):
        torch.utils.data.Dataset.__init__(self)
        self.start, self.count = start, count
        self.augmentations = None

    def __len__(self):
        return self.count

    def kinds(self):
        return [np.arange(self.count)]

    def __getitem__(self, index):
        return self.start + index

    @property
    def collate_fn(self):
        return list


@pytest.fixture
def whole(monkeypatch):
    """A concatenation of 7, 1 and 12 numbers."""
    monkeypatch.setattr(dataset, "collate", list)
    return ConcatDataset([Numbers(0, 7), Numbers(7, 1), Numbers(8, 12)])


def part_of(number):
    return "seven" if number < 7 else "one" if number == 7 else "twelve"


@pytest.fixture
def in_world(monkeypatch):
    """Return a function that lists every process's batches of an epoch."""

    def batches(world, loader_of, epoch=0):
        loaders = []
        for rank in range(world):
            monkeypatch.setattr(samplers, "_ranks", lambda rank=rank: (world, rank))
            loader = loader_of()
            loader.sampler.set_epoch(epoch)  # as Lightning does
            assert isinstance(loader.sampler, DistributedSampler)  # so Lightning leaves it in place
            found = list(loader)
            assert len(found) == len(loader)
            loaders.append(found)
        return loaders

    return batches


def merged(per_rank):
    """Global batches: what all processes see in a step."""
    return [sorted(chain(*step)) for step in zip(*per_rank, strict=True)]


# ------------------------------------------------------------------------------------------------------------ Training


def test_training_order_is_a_function_of_seed_and_epoch(whole, in_world):
    for data in (whole, Numbers(0, 22)):

        def order(seed, epoch, data=data):
            return in_world(1, lambda: train_loader(data, 4, seed, 0), epoch)[0]

        assert order(0, 0) == order(0, 0)
        assert len({str(order(seed, epoch)) for seed, epoch in ((0, 0), (0, 1), (0, 2), (1, 0), (5, 0))}) == 5
        assert sorted(chain(*order(0, 3))) == list(range(len(data)))


@pytest.mark.parametrize(("world", "batch"), [(2, 3), (3, 2)])
def test_processes_share_the_batches_of_one(in_world, world, batch):
    data = Numbers(0, 24)
    for epoch in range(2):
        alone = in_world(1, lambda: train_loader(data, world * batch, 0, 0), epoch)
        together = in_world(world, lambda: train_loader(data, batch, 0, 0), epoch)
        assert merged(together) == merged(alone)


@pytest.mark.parametrize(("world", "batch"), [(2, 2), (4, 1)])
def test_processes_share_the_batches_of_one_data_set(whole, in_world, world, batch):
    for epoch in range(3):
        alone = in_world(1, lambda: train_loader(whole, world * batch, 0, 0), epoch)
        together = in_world(world, lambda: train_loader(whole, batch, 0, 0), epoch)
        assert len({len(batches) for batches in together}) == 1  # every process takes every step
        assert all(batches for batches in chain(*together))
        assert [sorted(set(step)) for step in merged(together)] == merged(alone)


def test_a_batch_comes_from_one_data_set_and_data_sets_are_shuffled(whole, in_world):
    orders = set()
    for epoch in range(5):
        steps = merged(in_world(2, lambda: train_loader(whole, 2, 0, 0), epoch))
        assert all(len({part_of(number) for number in step}) == 1 for step in steps)
        assert [7, 7] in steps  # a lone image goes to every process
        (batches,) = in_world(1, lambda: train_loader(whole, 3, 0, 0), epoch)
        assert len(batches) == 3 + 1 + 4
        orders.add(tuple(part_of(batch[0]) for batch in batches))
    assert len(orders) > 3


# ---------------------------------------------------------------------------------------------------------- Evaluation


@pytest.mark.parametrize("world", [1, 2, 3])
def test_evaluation_shows_every_image_once(whole, in_world, world):
    for data in (whole, Numbers(0, 7)):
        per_rank = in_world(world, lambda data=data: eval_loader(data, 2, 0))
        numbers = list(chain(*chain(*per_rank)))
        assert sorted(numbers) == list(range(len(data)))
        assert world > 1 or numbers == sorted(numbers)  # in the order of the files
        for step in zip_longest(*per_rank, fillvalue=[]) if data is whole else ():
            assert all(len({part_of(number) for number in batch}) <= 1 for batch in step)


def test_items_are_loaded_by_workers_as_well(tmp_path):
    parts = []
    for class_name, label in (("Brain", 0), ("Liver", 1)):
        path = tmp_path / f"{class_name}.png"
        Image.new("L", (8, 8), 100 * label).save(path)
        samples = pd.DataFrame([{"image_path": str(path), "label_index": label, "mask_path": "", "split": "test"}])
        samples.attrs["task"] = "classification"
        parts.append(SampleDataset(samples, class_name))
    loader = train_loader(ConcatDataset(parts), 2, 0, num_workers=1)
    assert {batch.class_name: batch.gt_label.tolist() for batch in loader} == {"Brain": [0], "Liver": [1]}
