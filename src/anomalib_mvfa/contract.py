"""What a datamodule tells a model. A model knows no data set by name; it asks the datamodule for what is here.

A datamodule may offer ``protocol`` (:class:`ProtocolDefaults`), ``class_name`` (for prompts) and ``support`` (a dataset
of views of the support images, an image's unchanged view first, or None); a batch may carry ``class_name``. Any other
anomalib datamodule works too: what it does not offer is derived from its datasets.
"""

from dataclasses import dataclass
from typing import Any

from anomalib import TaskType
from anomalib.data import AnomalibDataModule, ImageBatch, ImageItem
from anomalib.data.utils import LabelName
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader

DEFAULT_CLASS_NAME = "object"


@dataclass(frozen=True)
class ProtocolDefaults:
    """What a protocol (few-shot, leave-one-out) implies for the model, where the user leaves it open.

    Args:
        name: Name for the log and the results.
        few_shot_weight: Weight of the few-shot branch; 0 means that there is no bank.
        learning_rate: Learning rate of Adam.
        image_score: How an image is scored; None means "map_max" where there are masks and "det_mean" elsewhere.
    """

    name: str
    few_shot_weight: float
    learning_rate: float
    image_score: str | None = None


FEW_SHOT = ProtocolDefaults("few_shot", few_shot_weight=0.5, learning_rate=1e-3)
LEAVE_ONE_OUT = ProtocolDefaults("leave_one_out", few_shot_weight=0.0, learning_rate=1e-4, image_score="det_mean")


@dataclass(frozen=True)
class DataFacts:
    """What a model needs to know of the data at hand.

    Args:
        protocol: The datamodule's protocol, few-shot by default.
        class_name: Class name of what is tested.
        has_masks: Whether tested images come with masks.
        normal_only: Whether the training images hold no abnormal one, so that there is nothing to learn from.
    """

    protocol: ProtocolDefaults = FEW_SHOT
    class_name: str = DEFAULT_CLASS_NAME
    has_masks: bool = True
    normal_only: bool = False

    @property
    def identity(self) -> tuple[str, str, bool]:
        """What tells these data from others, as far as the model is concerned."""
        return self.class_name, self.protocol.name, self.has_masks


def describe(datamodule: AnomalibDataModule | None, train_data: Any = None, test_data: Any = None) -> DataFacts:  # noqa: ANN401
    """Describe a datamodule, or datasets that came without one."""
    train_data = getattr(datamodule, "train_data", train_data)
    test_data = getattr(datamodule, "test_data", test_data)
    tables = [getattr(data, "samples", None) for data in (test_data, train_data)]
    tasks = [table.attrs["task"] for table in tables if table is not None and "task" in table.attrs]
    return DataFacts(
        protocol=getattr(datamodule, "protocol", FEW_SHOT),
        class_name=class_name_of_data(datamodule) or class_name_of_data(test_data) or DEFAULT_CLASS_NAME,
        has_masks=not tasks or TaskType(tasks[0]) == TaskType.SEGMENTATION,
        normal_only=train_data is not None and not has_label(train_data, LabelName.ABNORMAL),
    )


def class_name_of_data(source: Any) -> str | None:  # noqa: ANN401  # a datamodule, a dataset or nothing
    """Return the class name of a datamodule or dataset for prompts: its own, or else its category."""
    return getattr(source, "class_name", None) or (getattr(source, "category", None) or "").replace("_", " ") or None


def class_name_of(batch: ImageBatch | ImageItem) -> str | None:
    """Return the class name that a batch carries, if any."""
    return getattr(batch, "class_name", None)


def has_label(dataset: Any, label: LabelName) -> bool:  # noqa: ANN401  # any dataset of anomalib items
    """Whether a dataset holds images of a label; taken for granted where it keeps no samples."""
    samples = getattr(dataset, "samples", None)
    return samples is None or "label_index" not in samples or bool((samples.label_index == label).any())


def dataset_of(trainer: Any, kind: str) -> Any:  # noqa: ANN401  # Lightning's trainer; any dataset of anomalib items
    """Return the dataset "train", "val" or "test" of a trainer's datamodule or loaders, None if there is none."""
    if (dataset := getattr(getattr(trainer, "datamodule", None), f"{kind}_data", None)) is not None:
        return dataset
    loops = {"train": trainer.fit_loop, "val": trainer.validate_loop, "test": trainer.test_loop}
    loader = getattr(getattr(loops[kind], "_data_source", None), "instance", None)
    loader = loader[0] if isinstance(loader, list) and loader else loader
    return getattr(loader, "dataset", None) if isinstance(loader, DataLoader) else None


def datasets_of(trainer: Any) -> list[Any]:  # noqa: ANN401  # Lightning's trainer
    """Return all datasets of a trainer's datamodule and loaders."""
    loops = (trainer.fit_loop, trainer.fit_loop.epoch_loop.val_loop, trainer.validate_loop, trainer.test_loop)
    sources = [getattr(loop._data_source, "instance", None) for loop in (*loops, trainer.predict_loop)]  # noqa: SLF001
    loaders = [loader for source in sources for loader in CombinedLoader(source).flattened]
    own = [getattr(trainer.datamodule, f"{kind}_data", None) for kind in ("train", "val", "test")]
    return own + [loader.dataset for loader in loaders if isinstance(loader, DataLoader)]
