"""One job of a comparison, a method on a category with one K and one seed, and what its numbers depend on."""

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from anomalib.data import AnomalibDataModule, UnknownDatamoduleError, get_datamodule

from ..data import FewShot, FullNormal, LeaveOneOut
from ..io import dataset_digest, file_digest
from .config import MODEL_DEFAULT, Comparison, Method
from .models import model_arguments
from .results import JobResult, read_result

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

PARTS = {"train": "train_data", "validate": "val_data", "test": "test_data"}
"""Attributes of a datamodule, by what its images are for."""
WITH_SHOTS = ("few_normal", "few_shot")
LONGEST = 200
"""Bytes of a folder's name; disks take 255."""
WITHOUT_EFFECT = {
    "data": ("eval_batch_size", "num_workers", "root"),
    "trainer": ("enable_progress_bar", "enable_model_summary", "log_every_n_steps", "profiler", "barebones"),
}
"""Arguments that change no number; of the images under ``root``, the contents count."""


@dataclass(frozen=True)
class Job:
    """One method on one category, with one K and one seed.

    Args:
        comparison: What it is part of.
        name: Name of the method.
        category: What is tested.
        k_shot: K, None where the protocol has no shots.
        split_shots: K of the support that is left out of validation and test.
        seed: Seed of draws, orders and initial weights.
    """

    comparison: Comparison
    name: str
    category: str
    k_shot: int | None
    split_shots: int
    seed: int

    @property
    def method(self) -> Method:
        """The method."""
        return self.comparison.methods[self.name]

    @property
    def weights(self) -> str | None:
        """File of the backbone's weights, None for random ones, or `MODEL_DEFAULT`."""
        return self.comparison.weights.get(self.name, MODEL_DEFAULT)

    @property
    def folder(self) -> str:
        """Name of the job's folder: plain, short enough for disks, and the same for no other job."""
        shots = f"-k{self.k_shot}" if self.k_shot is not None else ""
        name = f"{self.name}-{self.category}{shots}-s{self.seed}"
        safe = "".join(letter if letter.isalnum() or letter in "-_." else "_" for letter in name).lstrip(".")
        short = safe.encode()[:LONGEST].decode(errors="ignore")
        return short if short == name else f"{short}-{_digest(name)[:6]}"

    def result(self, **values: Any) -> JobResult:  # noqa: ANN401  # of a result's fields
        """Return a result of this job."""
        facts = (self.name, self.method.protocol, self.category, self.k_shot, self.seed, self.folder)
        return JobResult(*facts, **values)

    def datamodule(self) -> AnomalibDataModule:
        """Return the data to learn from and to test on; the tested images are the same for every protocol.

        Raises:
            ValueError: The mapping names no datamodule, or does not suit it.
        """
        sources = self.comparison.sources()
        mapping = sources[self.category]
        if self.method.protocol == "own_split":
            return build_datamodule(mapping, seed=self.seed)
        source = build_datamodule(mapping)
        split: dict[str, Any] = {
            "k_shot": self.split_shots,
            "support_list": self.comparison.support_list,
            "group_by": self.comparison.group_by,
        }
        loading = {"eval_batch_size": source.eval_batch_size, "num_workers": source.num_workers}
        arguments = {"seed": self.seed, **loading, **self.method.data}
        if self.method.protocol == "full_normal":
            return FullNormal(source, **split, **arguments)
        if self.method.protocol == "leave_one_out":
            others = [other for category, other in sources.items() if category != self.category]
            target = FewShot(source, **split, seed=self.seed)
            return LeaveOneOut([target, *others], group_by=self.comparison.group_by, **arguments)
        if self.method.protocol == "few_shot":
            return FewShot(source, **split, **arguments)
        return FewShot(source, abnormal_shots=0, **split, **{"train_batch_size": self.split_shots, **arguments})

    def model_defaults(self, class_name: str | None) -> dict[str, Any]:
        """Return the arguments that the job sets where its model has them and the method does not give them."""
        if self.method.protocol == "own_split":
            return {"seed": self.seed}
        return {"seed": self.seed, "k_shot": self.k_shot or 0, "class_name": class_name}

    def depends_on(self, images: Mapping[str, Any]) -> dict[str, Any]:
        """Return all that the job's numbers depend on, in plain values; files count by their contents.

        Args:
            images: Digests of its images, see :func:`image_digests`.

        Raises:
            ValueError: There is no such model, or it lacks an argument.
        """
        sources = self.comparison.sources()
        if self.method.protocol != "leave_one_out":
            sources = {self.category: sources[self.category]}
        return _plain(
            {
                "protocol": self.method.protocol,
                "model": model_arguments(self.method.model, self.weights, self.model_defaults(self.category)),
                "data": _effective("data", self.method.data),
                "sources": [
                    {**source, "init_args": _effective("data", source["init_args"])} for source in sources.values()
                ],
                "trainer": _effective("trainer", self.method.trainer),
                "weights": self.weights,
                "seed": self.seed,
                "select_epoch_on_test": self.comparison.select_epoch_on_test,
                "images": images,
            }
        )


def jobs_of(comparison: Comparison) -> list[Job]:
    """Return all jobs of a comparison, the first seed's first; no data are read.

    Raises:
        ValueError: Two data sets have one name, or leave-one-out has no other category to learn from.
    """
    sources = comparison.sources()
    alone = [name for name, method in comparison.methods.items() if method.protocol == "leave_one_out"]
    if alone and len(sources) < 2:
        msg = f"leave_one_out ({', '.join(alone)}) needs at least two categories; there is {', '.join(sources)}."
        raise ValueError(msg)
    for name, method in comparison.methods.items():
        if unknown := sorted(set(method.categories or ()) - set(sources)):
            logger.warning("methods.%s.categories: %s not compared; %s are.", name, unknown, ", ".join(sources))
    return [
        Job(comparison, name, category, k_shot if method.protocol in WITH_SHOTS else None, k_shot, seed)
        for seed in comparison.seeds
        for position, k_shot in enumerate(comparison.k_shots)
        for category in sources
        for name, method in comparison.methods.items()
        if (position == 0 or method.protocol in WITH_SHOTS) and category in (method.categories or sources)
    ]


def identify(jobs: list[Job]) -> dict[str, str]:
    """Return the digest of what each job's numbers depend on, by its folder; jobs with the same data read them once."""
    known: dict[str, dict[str, Any]] = {}
    found = {}
    for job in jobs:
        protocol = "few_normal" if job.method.protocol == "zero_shot" else job.method.protocol
        data = json.dumps([protocol, job.method.data, job.category, job.split_shots, job.seed], default=str)
        if data not in known:
            known[data] = image_digests(job.datamodule())
        found[job.folder] = digest_of(job.depends_on(known[data]))
    return found


def image_digests(datamodule: Any) -> dict[str, str | None]:  # noqa: ANN401  # of a protocol
    """Return digests of the images, labels and masks to learn from, to validate and to test on."""
    datamodule.setup()
    return {name: dataset_digest(getattr(datamodule, part, None)) for name, part in PARTS.items()}


def digest_of(depends_on: Mapping[str, Any]) -> str:
    """Return the SHA-256 of what a job depends on."""
    return _digest(json.dumps(depends_on, sort_keys=True))


def finished_result(run: Path, job: str, digest: str) -> JobResult | None:
    """Return the result that a job has left in a run, if it has finished and depends on the same things."""
    result = read_result(run, job)
    return result if result is not None and result.finished and result.digest == digest else None


def build_datamodule(mapping: Mapping[str, Any], **defaults: Any) -> AnomalibDataModule:  # noqa: ANN401  # any datamodule's
    """Build a datamodule from anomalib's mapping.

    Raises:
        ValueError: There is no such datamodule, or it does not take these arguments.
    """
    try:
        return get_datamodule({**mapping, "init_args": {**mapping.get("init_args", {}), **defaults}})
    except UnknownDatamoduleError as error:
        msg = f"data.class_path={mapping['class_path']!r} is no datamodule of anomalib or this package ({error})"
        raise ValueError(msg) from error
    except (TypeError, AttributeError) as error:
        msg = f"data.init_args={mapping.get('init_args')!r} do not suit {mapping['class_path']} ({error})."
        raise ValueError(msg) from error


def _effective(kind: str, arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name not in WITHOUT_EFFECT[kind]}


def _plain(value: Any) -> Any:  # noqa: ANN401  # anything in a configuration
    """Return plain values; a path of a file becomes the digest of its contents."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, bool | int | float | None):
        return value
    path = Path(str(value)).expanduser()
    return f"sha256:{file_digest(str(path))}" if path.is_file() else str(value)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
