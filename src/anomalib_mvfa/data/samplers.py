"""Orders of images that are functions of (seed, epoch), the same whatever the number of processes.

Both samplers are distributed samplers, so that Lightning leaves them in place.
"""

from collections.abc import Iterator

import numpy as np
import torch.distributed as dist
from anomalib.data import AnomalibDataset
from lightning.pytorch.overrides.distributed import UnrepeatedDistributedSampler
from torch.utils.data import DataLoader, DistributedSampler

from .dataset import ConcatDataset, SampleDataset

EPOCHS_APART = 1_000_000


def _ranks() -> tuple[int, int]:
    """Return the number of processes, and which of them this is."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0


class OneDatasetBatches(DistributedSampler):
    """Yields lists of indices: every batch of one kind of a concatenation, in all processes of the same kind.

    Args:
        dataset: The concatenation.
        batch_size: Images in a batch of one process.
        seed: With the epoch it determines the order; None keeps the order of the files, and repeats no image.
    """

    dataset: ConcatDataset

    def __init__(self, dataset: ConcatDataset, batch_size: int, seed: int | None) -> None:
        world, rank = _ranks()
        super().__init__(dataset, num_replicas=world, rank=rank)
        self.batch_size = batch_size
        self.order_seed = seed

    def __iter__(self) -> Iterator[list[int]]:
        """Yield this process's share of every batch."""
        rng = None if self.order_seed is None else np.random.default_rng([self.order_seed, self.epoch])
        batches, step = [], self.batch_size * self.num_replicas
        for kind in self.dataset.kinds():
            order = kind if rng is None else rng.permutation(kind)
            for first in range(0, len(order), step):
                batch = order[first : first + step]
                if rng is not None:  # every process must take part in every training step
                    batch = np.resize(batch, -(-len(batch) // self.num_replicas) * self.num_replicas)
                batches.append(batch[self.rank :: self.num_replicas].tolist())
        if rng is not None:
            batches = [batches[i] for i in rng.permutation(len(batches))]
        return iter([batch for batch in batches if batch])

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(list(iter(self)))


def train_loader(dataset: AnomalibDataset, batch_size: int, seed: int, num_workers: int) -> DataLoader:
    """Return a loader that is reshuffled every epoch, as a function of (seed, epoch)."""
    dataset = _by_kind(dataset)
    if isinstance(dataset, ConcatDataset):
        return _loader(dataset, OneDatasetBatches(dataset, batch_size, seed), None, num_workers)
    # This sampler shuffles by seed + epoch; spread out, no two runs share an order.
    sampler: DistributedSampler = DistributedSampler(dataset, *_ranks(), shuffle=True, seed=EPOCHS_APART * seed)
    return _loader(dataset, sampler, batch_size, num_workers)


def eval_loader(dataset: AnomalibDataset, batch_size: int, num_workers: int) -> DataLoader:
    """Return a loader that shows every image once, over all processes."""
    dataset = _by_kind(dataset)
    if isinstance(dataset, ConcatDataset):
        return _loader(dataset, OneDatasetBatches(dataset, batch_size, seed=None), None, num_workers)
    return _loader(dataset, UnrepeatedDistributedSampler(dataset, *_ranks(), shuffle=False), batch_size, num_workers)


def _by_kind(dataset: AnomalibDataset) -> AnomalibDataset:
    """Return a dataset whose batches are of one kind: a batch has masks for all of its images, or for none."""
    return ConcatDataset([dataset]) if isinstance(dataset, SampleDataset) and len(dataset.kinds()) > 1 else dataset


def _loader(dataset: AnomalibDataset, sampler: DistributedSampler, batch_size: int | None, workers: int) -> DataLoader:
    # Lightning rebuilds loaders by keyword, so nothing but the dataset is given by position.
    collate_fn = dataset.collate_fn
    return DataLoader(dataset, batch_size=batch_size, sampler=sampler, collate_fn=collate_fn, num_workers=workers)
