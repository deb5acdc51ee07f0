"""A run folder as a comparison leaves it, made of drawn scores."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd

from anomalib_mvfa.compare.config import Comparison
from anomalib_mvfa.compare.job import Job
from anomalib_mvfa.compare.results import JobResult, job_folder
from anomalib_mvfa.compare.statistics import f1, image_auroc, pixel_auroc

EVIL = 'R&D <script>alert("x")</script>'
"""A name of a method that must reach the page as text."""
METHODS = {"PatchCore": "full_normal", "WinCLIP": "few_normal", EVIL: "few_shot", "MVFA": "few_shot"}
MASKED = ("Brain",)
SIDE = 24


def make_result(method: str, protocol: str, category: str, k_shot: int | None, seed: int, **others) -> JobResult:
    """Return a finished job's result; image and pixel AUROC are ``image`` and ``pixel`` if given."""
    metrics = {f"{level}_AUROC": others.pop(level) for level in ("image", "pixel") if level in others}
    result = JobResult(
        method=method,
        protocol=protocol,
        category=category,
        k_shot=k_shot,
        seed=seed,
        job=Job(None, method, category, k_shot, k_shot, seed).folder,
        digest="0",
        metrics=metrics,
        images={"train": 2 * (k_shot or 8), "validate": 6, "test": 16},
        test_set=f"digest of {category}",
        epochs=50,
        weights="clip.pt",
        seconds={"fit": 75.0, "image": 0.0123, "job": 80.0},
        parameters={"all": 427_000_000, "trained": 12_600_000},
        memory_mb=1843.0,
        device="cpu",
        commit="0123456789abcdef",
        versions={"anomalib": "2.7.0", "torch": "2.14.1"},
        date=f"2026-11-2{seed}T10:00:00+00:00",
    )
    return replace(result, **others)


def write_job(run: Path, result: JobResult, scores: pd.DataFrame | None = None, pixels=None) -> Path:
    """Write a job's result, scores (image, label, score, predicted) and counts of pixels; return its folder."""
    folder = job_folder(run, result.job)
    folder.mkdir(parents=True, exist_ok=True)
    scores = drawn_scores(np.random.default_rng(0)) if scores is None else scores
    scores.to_csv(folder / "scores.csv", index=False)
    if pixels is not None:
        np.savez_compressed(folder / "pixels.npz", counts=pixels)
    result.write(folder)
    return folder


def write_config(run: Path, methods: dict[str, str] | list[str], categories=("Brain", "Chest"), **others) -> None:
    """Write a comparison of methods, each with its protocol, few-shot for a list of names, or all its arguments."""
    protocols = methods if isinstance(methods, dict) else dict.fromkeys(methods, "few_shot")
    given = {name: {"protocol": value} if isinstance(value, str) else value for name, value in protocols.items()}
    model = {"class_path": "Mvfa", "init_args": {"image_size": 240}}
    config = {
        "methods": {name: {"model": model, **arguments} for name, arguments in given.items()},
        "data": {"class_path": "BMADOneClass"},
        "categories": list(categories),
        "k_shots": [4],
        "seeds": [0, 1],
    }
    run.mkdir(parents=True, exist_ok=True)
    Comparison(**config | others).save(run / "config.yaml")


def write_run(run: Path, **config) -> None:
    """Write a run of several methods, categories, shots and seeds: one job failed, one method with random weights."""
    write_config(run, METHODS, k_shots=[2, 4], title="Brain & <b>chest</b>", **config)
    for name, protocol in METHODS.items():
        for category in ("Brain", "Chest"):
            for k_shot in (2, 4) if protocol.startswith("few") else (None,):
                for seed in (0, 1):
                    _write_drawn(run, name, protocol, category, k_shot, seed)
    broken = {"status": "failed", "error": "OutOfMemoryError: <b>no</b> memory", "metrics": {}}
    write_job(run, make_result("MVFA", "few_shot", "Chest", 4, 1, **broken))


def drawn_scores(rng: np.random.Generator, count: int = 16, shift: float = 0.4, category: str = "Brain"):
    """Return drawn scores of images, half of them abnormal and two of each patient, as a table of a job."""
    labels = np.arange(count) % 2
    scores = rng.random(count) + shift * labels
    paths = [f"data/{category}/patient{index // 2}/{index:03d}.png" for index in range(count)]
    return pd.DataFrame({"image": paths, "label": labels, "score": scores, "predicted": (scores > 0.6).astype(int)})


def _write_drawn(run: Path, method: str, protocol: str, category: str, k_shot: int | None, seed: int) -> None:
    rng = np.random.default_rng([[*METHODS].index(method), category in MASKED, k_shot or 0, seed])
    scores = drawn_scores(rng, category=category)
    labels, predicted = scores.label.to_numpy(), scores.predicted.to_numpy()
    once = np.ones((1, len(scores)))
    metrics = {
        "image_AUROC": image_auroc(scores.score.to_numpy(), labels, once).item(),
        "image_F1Score": f1(predicted, labels, once).item(),
    }
    pixels = None
    if category in MASKED:
        pixels = rng.integers(1, 9, (16, 2, 5)) * [[5, 4, 3, 2, 1], [1, 2, 3, 4, 5]]
        metrics |= {"pixel_AUROC": pixel_auroc(pixels, once).item(), "pixel_F1Score": 0.5}
    result = make_result(method, protocol, category, k_shot, seed, random_weights=method == "WinCLIP", metrics=metrics)
    folder = write_job(run, result, scores, pixels)
    shown = 3
    masks = np.zeros((shown, SIDE, SIDE), np.uint8)
    masks[1, 5:12, 6:14] = 255
    pictures = {
        "paths": scores.image[:shown].to_numpy(str),
        "labels": labels[:shown],
        "images": rng.integers(0, 255, (shown, SIDE, SIDE, 3), np.uint8),
        "maps": rng.random((shown, SIDE, SIDE), np.float32),
    }
    pictures |= {"masks": masks} if category in MASKED else {}
    if method == "MVFA":
        pictures |= {"levels": np.array([6, 12]), "level_maps": rng.random((shown, 2, SIDE, SIDE), np.float32)}
        frozen = rng.normal(size=(16, 8))
        adapted = frozen + 3 * labels[:, None]
        np.savez_compressed(folder / "features.npz", labels=labels, frozen=frozen, adapted=adapted)
    np.savez_compressed(folder / "pictures.npz", **pictures)
