"""What a comparison consists of: methods, data, shots and seeds, and the jobs that they make together."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, field, fields, is_dataclass
from inspect import signature
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

import yaml
from anomalib.data import AnomalibDataModule, UnknownDatamoduleError, get_datamodule
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import AcceleratorRegistry

from ..data.protocols import FewShot, FullNormal, LeaveOneOut, _Protocol, checked_pattern
from ..io import atomic_write, file_digest
from .paper import paper_table
from .results import Row, read_row

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

Protocol = Literal["full_normal", "few_normal", "few_shot", "leave_one_out", "zero_shot"]
WITH_SHOTS = ("few_normal", "few_shot")
SET_BY_JOB = {
    "data": ("source", "sources", "held_out", "k_shot", "abnormal_shots", "support_list", "group_by", "seed", "kwargs"),
    "trainer": ("accelerator", "devices", "num_nodes", "strategy", "logger", "callbacks", "default_root_dir"),
}
"""Arguments that a method does not have a say in: the comparison sets them."""
MAPPING = {"class_path", "init_args"}
"""Keys of anomalib's mapping of a class."""
Built = TypeVar("Built")
LONGEST = 200
"""Bytes of a folder's name; disks take 255."""
MODEL_DEFAULT = "default"
"""Stands for the weights that a model loads by itself, in methods that `weights` does not name."""


@dataclass
class Method:
    """A method and what it learns from.

    Args:
        protocol: "full_normal", all normal training images; "few_normal", K normal ones; "few_shot", K normal and K
            abnormal ones; "leave_one_out", the labelled images of the other categories; "zero_shot", nothing.
        model: Anomalib's mapping of a model: ``class_path`` and ``init_args``. Where the model has arguments
            ``k_shot``, ``seed`` or ``class_name``, the job sets those that are not given here.
        data: Arguments of the protocol's datamodule, such as ``train_batch_size``.
        trainer: Arguments of Lightning's trainer, such as ``max_epochs``.
        categories: Those of the comparison's categories that it is for, all by default: one that learns from masks is
            for those that have some.
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
            ValueError: An argument is unknown, or none of the method's.
        """
        if not isinstance(self.model.get("class_path"), str):
            msg = f"{where}model={self.model!r} must be a mapping with class_path and init_args."
            raise ValueError(msg)  # noqa: TRY004  # the file's value is at fault
        _check_names(f"{where}model", self.model, MAPPING)
        if self.categories == []:
            msg = f"{where}categories=[] must be a list with at least one category."
            raise ValueError(msg)
        protocol = LeaveOneOut if self.protocol == "leave_one_out" else FewShot
        accepted = {"data": {*signature(protocol).parameters, *signature(_Protocol).parameters}}
        accepted["trainer"] = set(signature(Trainer).parameters)
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
        weights: A file for a method's frozen backbone, or null for seeded random weights. Methods that are not named
            load what their model loads by itself.
        support_list: Support in the published form, see :class:`~anomalib_mvfa.data.protocols.FewShot`.
        group_by: Regular expression that names a patient, say; see the same class.
        title: Heading of the report.
        paper: Table of the paper whose figures stand beside: "table1" to "table5" or "figure3".
        accelerator: Lightning's.
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
    support_list: str | None = None
    group_by: str | None = None
    title: str = "Comparison"
    paper: str | None = None
    accelerator: str = "auto"
    cluster: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Check what can be checked without reading data."""
        for name, least in (("k_shots", 1), ("seeds", 0)):
            values = getattr(self, name)
            if not isinstance(values, list) or not all(type(value) is int and value >= least for value in values):
                msg = f"{name}={values!r} must be a list of whole numbers from {least} on, such as [{least}, 4]."
                raise ValueError(msg)
        _check_types(Comparison, vars(self))
        self.methods = {
            name: method if isinstance(method, Method) else _build(Method, method, f"methods.{name}")
            for name, method in self.methods.items()
        }
        for name, method in self.methods.items():
            _check_types(Method, vars(method), f"methods.{name}.")
            method.check(f"methods.{name}.")
        for name, values in (("methods", self.methods), ("k_shots", self.k_shots), ("seeds", self.seeds)):
            if not values or len(set(values)) != len(values):
                msg = f"{name}={list(values)} must name at least one, and none twice."
                raise ValueError(msg)
        checked_pattern("group_by", self.group_by)
        accelerators = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
        if self.accelerator not in accelerators:
            msg = f"accelerator={self.accelerator!r} must be one of: {', '.join(accelerators)}."
            raise ValueError(msg)
        if self.paper is not None:
            paper_table(self.paper)
        unknown = sorted(set(self.weights) - set(self.methods))
        if unknown:
            msg = f"weights names {unknown}, which are no methods of this comparison: {', '.join(self.methods)}."
            raise ValueError(msg)

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
        """Return the mapping of every category's datamodule, by the category's name.

        Raises:
            ValueError: Two are of one name, or there is no such datamodule or category.
        """
        mappings = self.data if isinstance(self.data, list) else [self.data]
        if self.categories is not None:
            mappings = [_with_category(mapping, category) for mapping in mappings for category in self.categories]
        found: dict[str, dict[str, Any]] = {}
        for mapping in mappings:
            source = _datamodule(mapping)
            name = source.category or source.name
            if name in found:
                msg = f"data has two data sets called {name!r}; give one of them another name or category."
                raise ValueError(msg)
            found[name] = mapping
        return found

    def jobs(self) -> list["Job"]:
        """Return all jobs, the first seed's first."""
        sources = self.sources()
        alone = [name for name, method in self.methods.items() if method.protocol == "leave_one_out"]
        if alone and len(sources) < 2:
            msg = f"leave_one_out ({', '.join(alone)}) needs at least two categories; there is {', '.join(sources)}."
            raise ValueError(msg)
        for name, method in self.methods.items():
            if unknown := sorted(set(method.categories or ()) - set(sources)):
                logger.warning("methods.%s.categories: %s not compared; %s are.", name, unknown, ", ".join(sources))
        return [
            Job(
                name=name,
                method=method,
                category=category,
                sources=sources,
                k_shot=k_shot if method.protocol in WITH_SHOTS else None,
                split_shots=k_shot,
                seed=seed,
                weights=self.weights.get(name, MODEL_DEFAULT),
                support_list=self.support_list,
                group_by=self.group_by,
                accelerator=self.accelerator,
                is_first=seed == self.seeds[0],
            )
            for seed in self.seeds
            for position, k_shot in enumerate(self.k_shots)
            for category in sources
            for name, method in self.methods.items()
            if (position == 0 or method.protocol in WITH_SHOTS) and category in (method.categories or sources)
        ]


@dataclass
class Job:
    """One method on one category, with one K and one seed.

    Args:
        name: Name of the method.
        method: The method.
        category: What is tested.
        sources: Mappings of all categories' datamodules; leave-one-out learns from the others.
        k_shot: K, None where the protocol has no shots.
        split_shots: K of the support that is left out of validation and test.
        seed: Seed of draws, orders and initial weights.
        weights: File of the backbone's weights, None for random ones, or `MODEL_DEFAULT`.
        support_list: As of the comparison, like the next two.
        group_by: Names a patient, say.
        accelerator: Lightning's.
        is_first: Whether its seed is the comparison's first, whose jobs keep features too.
    """

    name: str
    method: Method
    category: str
    sources: dict[str, dict[str, Any]]
    k_shot: int | None
    split_shots: int
    seed: int
    weights: str | None
    support_list: str | None
    group_by: str | None
    accelerator: str
    is_first: bool

    @property
    def folder(self) -> str:
        """Name of the job's folder."""
        shots = f"-k{self.k_shot}" if self.k_shot is not None else ""
        name = f"{self.name}-{self.category}{shots}-s{self.seed}"
        safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name).lstrip(".")
        # So that no two names become one, nor one too long for a file.
        short = safe.encode()[:LONGEST].decode(errors="ignore")
        return short if short == name else f"{short}-{_digest(name)[:6]}"

    @property
    def asked(self) -> dict[str, Any]:
        """All that decides the job's result, as far as it is asked for: plain values."""
        asked = asdict(self)
        asked["sources"] = asked["sources"] if self.method.protocol == "leave_one_out" else self.sources[self.category]
        for name in ("is_first", "accelerator"):
            del asked[name]
        del asked["method"]["categories"]  # of which this job is one
        if self.weights not in {None, MODEL_DEFAULT} and (file := Path(str(self.weights))).is_file():
            asked["weights_content"] = file_digest(str(file))
        return json.loads(json.dumps(asked, default=str))

    @property
    def digest(self) -> str:
        """Digest of what is asked for."""
        return _digest(json.dumps(self.asked, sort_keys=True))

    def row(self) -> Row:
        """Return the job's row, still empty."""
        return Row(
            method=self.name,
            protocol=self.method.protocol,
            category=self.category,
            k_shot=self.k_shot,
            seed=self.seed,
            job=self.folder,
            digest=self.digest,
            config=self.asked,
        )

    def finished(self, run: Path) -> Row | None:
        """Return the row that the job has left in a run, if it has finished: this very job, and not another version."""
        row = read_row(run, self.folder)
        return row if row is not None and row.error is None and row.digest == self.digest else None

    def datamodule(self) -> AnomalibDataModule:
        """Return the data to learn from and to test on; the tested images are the same for every protocol."""
        source = _datamodule(self.sources[self.category])
        loading: dict[str, Any] = {"eval_batch_size": source.eval_batch_size, "num_workers": source.num_workers}
        split: dict[str, Any] = {
            "k_shot": self.split_shots,
            "support_list": self.support_list,
            "group_by": self.group_by,
        }
        arguments = {"seed": self.seed, **loading, **self.method.data}
        if self.method.protocol == "full_normal":
            return FullNormal(source, **split, **arguments)
        if self.method.protocol == "leave_one_out":
            held_out = FewShot(source, **split, seed=self.seed)
            others = [mapping for category, mapping in self.sources.items() if category != self.category]
            return LeaveOneOut([held_out, *others], **arguments)
        if self.method.protocol == "few_shot":
            return FewShot(source, **split, **arguments)
        return FewShot(source, abnormal_shots=0, **split, **{"train_batch_size": self.split_shots, **arguments})


def _check_names(where: str, mapping: Mapping[str, Any], accepted: set[str]) -> None:
    if unknown := sorted(map(str, set(mapping) - accepted)):
        msg = f"{where} names {unknown}, to choose from are: {', '.join(sorted(accepted))}."
        raise ValueError(msg)


def _with_category(mapping: dict[str, Any], category: str) -> dict[str, Any]:
    arguments = mapping.get("init_args", {})
    return {**mapping, "init_args": {**arguments, "category": category}} if isinstance(arguments, Mapping) else mapping


def _datamodule(mapping: Mapping[str, Any]) -> AnomalibDataModule:
    arguments = mapping.get("init_args", {})
    if not isinstance(mapping.get("class_path"), str) or not isinstance(arguments, Mapping):
        msg = f"data={dict(mapping)!r} must be a mapping with class_path and init_args, or a list of such."
        raise ValueError(msg)  # noqa: TRY004  # the file's value is at fault
    _check_names("data", mapping, MAPPING)
    try:
        return get_datamodule(dict(mapping))
    except UnknownDatamoduleError as error:
        msg = f"data.class_path={mapping['class_path']!r} is no datamodule of anomalib or this package ({error})"
        raise ValueError(msg) from error
    except (TypeError, AttributeError) as error:
        msg = f"data.init_args={arguments!r} do not suit {mapping['class_path']} ({error})."
        raise ValueError(msg) from error


def _build(cls: type[Built], arguments: Any, where: str) -> Built:  # noqa: ANN401  # whatever a file holds
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


def _check_types(cls: type, arguments: Mapping[str, Any], where: str = "") -> None:
    """Raise ValueError for an argument that is not of its type."""
    for name, kind in get_type_hints(cls).items():
        if not _is_a(arguments[name], kind):
            msg = f"{where}{name}={arguments[name]!r} must be {_form(kind)}."
            raise ValueError(msg)


def _form(kind: Any) -> str:  # noqa: ANN401  # any annotation
    """Say what values of a type look like in a file."""
    parts = get_args(kind)
    if get_origin(kind) is Literal:
        return f"one of: {', '.join(parts)}"
    if get_origin(kind) is list:
        return {str: "a list of names", int: "a list of whole numbers"}.get(parts[0], f"a list, each {_form(parts[0])}")
    if get_origin(kind) is dict:
        return "a mapping" if parts[1] is Any else f"a mapping from names, each to {_form(parts[1])}"
    if parts:
        return " or ".join(map(_form, parts))
    return {str: "text", type(None): "null"}.get(kind, "a mapping")


def _is_a(value: Any, kind: Any) -> bool:  # noqa: ANN401  # any value, any annotation
    """Whether a value is of a type, inside of lists and mappings too; mappings stand for dataclasses."""
    parts = get_args(kind)
    if kind is Any:
        return True
    if get_origin(kind) is list:
        return isinstance(value, list) and all(_is_a(item, parts[0]) for item in value)
    if get_origin(kind) is dict:
        items = value.items() if isinstance(value, dict) else [(None, None)]
        return all(_is_a(key, parts[0]) and _is_a(item, parts[1]) for key, item in items)
    if get_origin(kind) is Literal:
        return value in parts
    if parts:  # a union
        return any(_is_a(value, part) for part in parts)
    return isinstance(value, kind) or (is_dataclass(kind) and isinstance(value, dict))


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
