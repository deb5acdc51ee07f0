"""What a comparison consists of: methods, data, shots and seeds."""

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry

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
_Built = TypeVar("_Built")


@dataclass
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
    model: dict[str, Any]
    data: dict[str, Any] = field(default_factory=dict)
    trainer: dict[str, Any] = field(default_factory=dict)
    categories: list[str] | None = None

    def check(self, where: str) -> None:
        """Check what can be checked without data.

        Args:
            where: What errors put before an argument's name.

        Raises:
            ValueError: An argument is unknown, has a wrong type, or is one that the comparison sets.
        """
        _check_types(self, where)
        check_mapping(f"{where}model", self.model)
        if self.categories == []:
            msg = f"{where}categories=[] must be a list with at least one category."
            raise ValueError(msg)
        accepted = {
            "data": {*signature(FewShot).parameters, *signature(SplitDataModule).parameters},
            "trainer": {*signature(Trainer).parameters},
        }
        for name, names in accepted.items():
            _check_names(f"{where}{name}", getattr(self, name), names - set(SET_BY_JOB[name]))


@dataclass
class Comparison:
    """Methods to compare, each under its own protocol, on the same test images.

    Args:
        methods: Methods by the name that tables give them.
        data: Anomalib's mapping of a datamodule, ``class_path`` and ``init_args``, or a list of such. Its
            ``eval_batch_size`` and ``num_workers`` hold for every protocol.
        categories: Categories of these data to test; every one is a copy of the mapping with this ``category``.
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
        ValueError: There is nothing to compare, or a name is unknown or doubled.
    """

    methods: dict[str, Method]
    data: dict[str, Any] | list[dict[str, Any]]
    categories: list[str] | None = None
    k_shots: list[int] = field(default_factory=lambda: [4])
    seeds: list[int] = field(default_factory=lambda: [0])
    weights: dict[str, str | None] = field(default_factory=dict)
    reference: str | None = None
    support_list: str | None = None
    group_by: str | None = None
    select_epoch_on_test: bool = False
    title: str = "Comparison"
    paper: str | None = None
    accelerator: str = "auto"
    timeout_min: int | None = None
    cluster: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without reading data."""
        for name, least in (("k_shots", 1), ("seeds", 0)):
            values = getattr(self, name)
            if not isinstance(values, list) or not all(type(value) is int and value >= least for value in values):
                msg = f"{name}={values!r} must be a list of whole numbers from {least} on, such as [{least}, 4]."
                raise ValueError(msg)
        _check_types(self)
        self.methods = {
            name: method if isinstance(method, Method) else _build(Method, method, f"methods.{name}")
            for name, method in self.methods.items()
        }
        for name, method in self.methods.items():
            method.check(f"methods.{name}.")
        for name, values in (("methods", self.methods), ("k_shots", self.k_shots), ("seeds", self.seeds)):
            if not values or len(set(values)) != len(values):
                msg = f"{name}={list(values)} must name at least one, and none twice."
                raise ValueError(msg)
        check_pattern("group_by", self.group_by)
        check_choice("accelerator", self.accelerator, ["auto", "gpu", *AcceleratorRegistry.available_accelerators()])
        for argument, names in (("weights", self.weights), ("reference", filter(None, [self.reference]))):
            for name in names:
                check_choice(argument, name, [*self.methods])
        if self.timeout_min is not None and self.timeout_min < 1:
            msg = f"timeout_min={self.timeout_min} must be at least 1, or null for no limit."
            raise ValueError(msg)
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
        return _build(cls, {**(read if isinstance(read, dict) else {}), **overrides}, str(path))

    def save(self, path: Path) -> None:
        """Write a YAML file, complete or not at all."""
        with atomic_write(path) as partial:
            partial.write_text(yaml.safe_dump(asdict(self), sort_keys=False, allow_unicode=True), "utf-8")

    def sources(self) -> dict[str, dict[str, Any]]:
        """Return the mapping of every category's datamodule, by the category's name; no data are read.

        Raises:
            ValueError: Two have one name, or a mapping is none of a datamodule.
        """
        mappings = self.data if isinstance(self.data, list) else [self.data]
        found: dict[str, dict[str, Any]] = {}
        for mapping in mappings:
            check_mapping("data", mapping)
            for category in self.categories or [None]:
                arguments = {**mapping.get("init_args", {}), **({"category": category} if category else {})}
                name = arguments.get("category") or arguments.get("name") or mapping["class_path"].rpartition(".")[2]
                if name in found:
                    msg = f"data has two data sets called {name!r}; give one of them another name or category."
                    raise ValueError(msg)
                found[name] = {**mapping, "init_args": arguments}
        return found


def check_mapping(where: str, mapping: Mapping[str, Any]) -> None:
    """Raise ValueError unless this is anomalib's mapping of a class: ``class_path`` and ``init_args``."""
    _check_names(where, mapping, {"class_path", "init_args"})
    if not isinstance(mapping.get("class_path"), str) or not isinstance(mapping.get("init_args", {}), Mapping):
        msg = f"{where}={dict(mapping)!r} must be a mapping with class_path and init_args."
        raise ValueError(msg)  # noqa: TRY004  # the file's value is at fault


def _check_names(where: str, mapping: Mapping[str, Any], accepted: set[str]) -> None:
    if unknown := sorted(map(str, set(mapping) - accepted)):
        msg = f"{where} names {unknown}, to choose from are: {', '.join(sorted(accepted))}."
        raise ValueError(msg)


def _build(cls: type[_Built], arguments: Any, where: str) -> _Built:  # noqa: ANN401  # whatever a file holds
    """Build a dataclass from a mapping; say which of its arguments are missing or unknown."""
    known = {entry.name: entry.default is MISSING and entry.default_factory is MISSING for entry in fields(cls)}  # type: ignore[arg-type]
    given = set(arguments) if isinstance(arguments, Mapping) else set()
    missing, unknown = {name for name, needed in known.items() if needed} - given, given - set(known)
    if missing or unknown:
        msg = (
            f"{where}: missing {sorted(missing) or 'nothing'}, unknown {sorted(map(str, unknown)) or 'nothing'}. Its "
            f"arguments are: {', '.join(known)}."
        )
        raise ValueError(msg)
    return cls(**arguments)


def _check_types(built: Any, where: str = "") -> None:  # noqa: ANN401  # a dataclass
    """Raise ValueError for an argument that is not of its type."""
    for name, kind in get_type_hints(type(built)).items():
        if not _is_a(getattr(built, name), kind):
            msg = f"{where}{name}={getattr(built, name)!r} must be {_form(kind)}."
            raise ValueError(msg)


def _form(kind: Any) -> str:  # noqa: ANN401  # any annotation
    """Say what values of a type look like in a file."""
    parts, origin = get_args(kind), get_origin(kind)
    if origin is Literal:
        return f"one of: {', '.join(parts)}"
    if origin is list:
        return f"a list, each {_form(parts[0])}"
    if origin is dict:
        return "a mapping" if parts[1] is Any else f"a mapping from names, each to {_form(parts[1])}"
    if parts:
        return " or ".join(map(_form, parts))
    return {str: "text", type(None): "null", int: "a whole number", bool: "true or false"}.get(kind, "a mapping")


def _is_a(value: Any, kind: Any) -> bool:  # noqa: ANN401  # any value, any annotation
    """Whether a value is of a type, inside of lists and mappings too; mappings stand for dataclasses."""
    parts, origin = get_args(kind), get_origin(kind)
    if kind is Any:
        return True
    if origin is Literal:
        return value in parts
    if origin is list:
        return isinstance(value, list) and all(_is_a(item, parts[0]) for item in value)
    if origin is dict:
        return isinstance(value, dict) and all(_is_a(k, parts[0]) and _is_a(v, parts[1]) for k, v in value.items())
    if parts:  # a union
        return any(_is_a(value, part) for part in parts)
    return isinstance(value, dict | kind) if is_dataclass(kind) else type(value) is kind
