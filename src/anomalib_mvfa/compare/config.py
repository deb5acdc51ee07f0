"""What a comparison consists of: methods, data, shots and seeds."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, field
from inspect import signature
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry
from pydantic import AfterValidator, ConfigDict, Field, StrictBool, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from ..arguments import check_choice
from ..data import FewShot
from ..data.base import SplitDataModule
from ..data.support import check_pattern
from ..io import atomic_write
from .paper import paper_table

Protocol = Literal["full_normal", "few_normal", "few_shot", "leave_one_out", "zero_shot", "own_split"]
SET_BY_JOB = {
    "data": ("source", "sources", "held_out", "k_shot", "abnormal_shots", "support_list", "group_by", "seed", "kwargs"),
    "trainer": ("accelerator", "devices", "num_nodes", "strategy", "logger", "callbacks", "default_root_dir"),
}
"""Arguments that the comparison sets, not a method."""
MODEL_DEFAULT = "default"
"""Stands for the weights that a model loads by itself, in methods that `weights` does not name."""


def _different(values: Sequence) -> Sequence:
    if len(set(values)) < len(values):
        msg = f"{list(values)} must name none twice"
        raise ValueError(msg)
    return values


def _in_words(error: Mapping[str, Any]) -> str:
    """Return one of pydantic's errors in a line: the argument, its value unless it is long, and what it must be."""
    place, value = ".".join(map(str, error["loc"])), repr(error["input"])
    shown = f"={value}" if place and len(value) < 80 and error["type"] != "missing" else ""
    message = error["msg"].removeprefix("Value error, ").removesuffix(".")
    return f"{place}{shown}: {message}" if place else message


def _check_names(where: str, mapping: Mapping[str, Any], accepted: set[str]) -> None:
    if unknown := sorted(map(str, set(mapping) - accepted)):
        msg = f"{where} names {unknown}, to choose from are: {', '.join(sorted(accepted))}."
        raise ValueError(msg)


def _class_mapping(mapping: dict[str, Any]) -> dict[str, Any]:
    """Check anomalib's mapping of a class."""
    _check_names("the mapping", mapping, {"class_path", "init_args"})
    if not isinstance(mapping.get("class_path"), str) or not isinstance(mapping.get("init_args", {}), dict):
        msg = "must be a mapping with class_path and init_args"
        raise ValueError(msg)  # noqa: TRY004  # the file's value is at fault
    return mapping


ClassMapping = Annotated[dict[str, Any], AfterValidator(_class_mapping)]
Seeds = Annotated[list[Annotated[int, Field(strict=True, ge=0)]], Field(min_length=1), AfterValidator(_different)]
Shots = Annotated[list[Annotated[int, Field(strict=True, ge=1)]], Field(min_length=1), AfterValidator(_different)]
Names = Annotated[list[str], Field(min_length=1), AfterValidator(_different)]
KNOWN_ARGUMENTS_ONLY = ConfigDict(extra="forbid")


@dataclass(config=KNOWN_ARGUMENTS_ONLY)
class Method:
    """A method and what it learns from.

    Args:
        protocol: "full_normal", all normal training images; "few_normal", K normal ones; "few_shot", K normal and K
            abnormal ones; "leave_one_out", the labelled images of the other categories; "zero_shot", nothing;
            "own_split", what the datamodule itself gives for training.
        model: Anomalib's mapping of any :class:`~anomalib.models.AnomalibModule`: ``class_path`` and ``init_args``. The
            job sets the arguments ``k_shot``, ``seed`` and ``class_name`` that the model has and that are not given.
        data: Arguments of the protocol's datamodule, such as ``train_batch_size``.
        trainer: Arguments of Lightning's trainer, such as ``max_epochs``.
        categories: Those of the comparison's categories that it is for, all by default: a method that learns from masks
            is for those that have some.
    """

    protocol: Protocol
    model: ClassMapping
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    categories: Names | None = None

    def __post_init__(self) -> None:
        """Refuse arguments that are unknown or the comparison's."""
        accepted = {
            "data": {*signature(FewShot).parameters, *signature(SplitDataModule).parameters},
            "trainer": {*signature(Trainer).parameters},
        }
        for name, names in accepted.items():
            _check_names(name, getattr(self, name), names - set(SET_BY_JOB[name]))


@dataclass(config=KNOWN_ARGUMENTS_ONLY)
class Comparison:
    """Methods to compare, each under its own protocol, on the same test images.

    Args:
        methods: Methods by the name that tables give them.
        data: Anomalib's mapping of a datamodule, ``class_path`` and ``init_args``, or a list of such. Its
            ``eval_batch_size`` and ``num_workers`` hold for every protocol.
        categories: What is tested: of one mapping, a copy with each ``category``; of a list, those with these names or
            categories.
        k_shots: Numbers of support images K for the protocols that have them.
        seeds: Seeds of draws, orders and initial weights; one job per seed.
        weights: A file for a method's frozen backbone, or None for seeded random weights. Methods that are not named
            load what their model loads by itself.
        reference: Method that the others are compared with; by default the best of each column.
        support_list: Support in the published form, see :class:`~anomalib_mvfa.data.few_shot.FewShot`.
        group_by: Regular expression that names a patient, say, see the same.
        select_epoch_on_test: Report the epoch with the best image plus pixel AUROC on the test images, as the published
            figures do. The figures are then optimistic.
        title: Heading of the report.
        paper: Table of the paper whose figures stand beside: "table1" to "table5" or "figure3".
        accelerator: Lightning's.
        timeout_min: Minutes after which a job is ended and counts as failed.
        cluster: Run on a cluster by submitit: its ``cluster`` ("slurm" or "local") and parameters of its executor.

    Raises:
        pydantic.ValidationError: A value is missing, unknown, doubled or of another type; this is a ValueError.
    """

    methods: Annotated[dict[str, Method], Field(min_length=1)]
    data: ClassMapping | list[ClassMapping]
    categories: Names | None = None
    k_shots: Shots = field(default_factory=lambda: [4])
    seeds: Seeds = field(default_factory=lambda: [0])
    weights: dict[str, str | None] = field(default_factory=dict)
    reference: str | None = None
    support_list: str | None = None
    group_by: str | None = None
    select_epoch_on_test: StrictBool = False
    title: str = "Comparison"
    paper: str | None = None
    accelerator: str = "auto"
    timeout_min: Annotated[int, Field(strict=True, ge=1)] | None = None
    cluster: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without reading data."""
        check_pattern("group_by", self.group_by)
        check_choice("accelerator", self.accelerator, ["auto", "gpu", *AcceleratorRegistry.available_accelerators()])
        for argument, names in (("weights", self.weights), ("reference", filter(None, [self.reference]))):
            for name in names:
                check_choice(argument, name, [*self.methods])
        if self.paper is not None:
            paper_table(self.paper)

    @classmethod
    def load(cls, path: Path, **overrides: Any) -> "Comparison":  # noqa: ANN401  # whatever an argument is
        """Read a YAML file.

        Args:
            path: The file.
            overrides: Arguments in place of the file's.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no YAML, or an argument is unknown, missing or wrong.
        """
        if not path.is_file():
            msg = f"config={str(path)!r}: there is no such file. Give the path of a comparison's YAML file."
            raise FileNotFoundError(msg)
        try:
            read = yaml.safe_load(path.read_text("utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            msg = f"config={str(path)!r} is no YAML file ({' '.join(str(error).split())})."
            raise ValueError(msg) from error
        try:
            return TypeAdapter(cls).validate_python({**(read if isinstance(read, dict) else {}), **overrides})
        except ValidationError as error:
            wrong = "; ".join(_in_words(one) for one in error.errors())
            msg = f"config={str(path)!r}: {wrong}. Its arguments are: {', '.join(cls.__annotations__)}."
            raise ValueError(msg) from None

    def save(self, path: Path) -> None:
        """Write a YAML file, complete or not at all."""
        with atomic_write(path) as partial:
            partial.write_text(yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True), "utf-8")

    def sources(self) -> dict[str, dict[str, Any]]:
        """Return the mapping of every category's datamodule, by the category's name; no data are read.

        Raises:
            ValueError: Two have one name, or one of a list is asked for that is not in it.
        """
        chosen: Sequence[str] | None = None
        if isinstance(self.data, list):
            mappings, chosen = self.data, self.categories
        elif self.categories is None:
            mappings = [self.data]
        else:
            arguments = self.data.get("init_args", {})
            mappings = [{**self.data, "init_args": {**arguments, "category": name}} for name in self.categories]
        found: dict[str, dict[str, Any]] = {}
        for mapping in mappings:
            arguments = mapping.get("init_args", {})
            name = arguments.get("category") or arguments.get("name") or mapping["class_path"].rpartition(".")[2]
            if name in found:
                msg = f"data has two data sets called {name!r}; give one of them another name or category."
                raise ValueError(msg)
            found[name] = {**mapping, "init_args": arguments}
        if chosen is None:
            return found
        for name in chosen:
            check_choice("categories", name, [*found])
        return {name: found[name] for name in chosen}
