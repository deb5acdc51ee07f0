"""A run folder as a comparison leaves it, made of drawn scores."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml

from anomalib_mvfa.compare.bootstrap import Scores, image_aurocs, pixel_aurocs
from anomalib_mvfa.compare.results import Features, Pictures, Row, job_folder, write_row

EVIL = 'R&D <script>alert("x")</script>'
"""A name of a method that must reach the page as text."""
METHODS = {"PatchCore": "full_normal", "WinCLIP": "few_normal", EVIL: "few_shot", "MVFA": "few_shot"}
MASKED = ("Brain",)
SIDE = 24


def make_row(method: str, protocol: str, category: str, k_shot: int | None, seed: int, **others) -> Row:
    """Return a finished job's row; image and pixel AUROC are ``image`` and ``pixel`` if given."""
    metrics = {f"{level}_AUROC": others.pop(level) for level in ("image", "pixel") if level in others}
    job = f"{method}-{category}-k{k_shot}-s{seed}"
    row = Row(
        method=method,
        protocol=protocol,
        category=category,
        k_shot=k_shot,
        seed=seed,
        job="".join(letter if letter.isalnum() or letter == "-" else "_" for letter in job),
        digest="0",
        metrics=metrics,
        images={"train": 2 * (k_shot or 8), "validate": 6, "test": 16},
        test_set=f"digest of {category}",
        weights="clip.pt",
        seconds={"fit": 75.0, "image": 0.0123, "job": 80.0},
        parameters={"all": 427_000_000, "trained": 12_600_000},
        memory_mb=1843.0,
        device="cpu",
        commit="0123456789abcdef",
        versions={"anomalib": "2.7.0", "torch": "2.14.1"},
        date=f"2026-11-2{seed}T10:00:00+00:00",
    )
    return replace(row, **others)


def write_job(run: Path, row: Row, scores: Scores | None = None) -> Path:
    """Write a job's row and scores; return its folder."""
    folder = job_folder(run, row.job)
    folder.mkdir(parents=True)
    if scores is not None:
        scores.save(folder / "scores.npz")
    write_row(folder, row)
    return folder


def write_config(run: Path, methods: list[str], **others) -> None:
    """Write the comparison as it was asked for."""
    config = {
        "title": "A comparison",
        "paper": None,
        "methods": {name: {} for name in methods},
        "categories": None,
        "k_shots": [2, 4],
        "seeds": [0, 1],
        "group_by": None,
    }
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.yaml").write_text(yaml.safe_dump(config | others, sort_keys=False))


def write_run(run: Path, **config) -> None:
    """Write a run of several methods, categories, shots and seeds: one job failed, one method with random weights."""
    write_config(run, [*METHODS], **{"title": "Brain & <b>chest</b>", **config})
    for method, protocol in METHODS.items():
        for category in ("Brain", "Chest"):
            for k_shot in (2, 4) if protocol.startswith("few") else (None,):
                for seed in (0, 1):
                    _write_drawn(run, method, protocol, category, k_shot, seed)
    broken = make_row("MVFA", "few_shot", "Chest", 4, 1, error="OutOfMemoryError: <b>no</b> memory", metrics={})
    write_row(job_folder(run, broken.job), broken)


def _write_drawn(run: Path, method: str, protocol: str, category: str, k_shot: int | None, seed: int) -> None:
    rng = np.random.default_rng([[*METHODS].index(method), category in MASKED, k_shot or 0, seed])
    labels = np.arange(16) % 2
    paths = [f"data/{category}/patient{index // 2}/{index:03d}.png" for index in range(16)]
    scores = Scores(paths, labels.tolist(), (rng.random(16) + 0.4 * labels).tolist())
    once = np.ones((1, 16))
    figures = {"image": image_aurocs(np.array(scores.values), labels, once).item()}
    if category in MASKED:
        scores.pixels = [*(rng.integers(1, 9, (16, 2, 5)) * [[5, 4, 3, 2, 1], [1, 2, 3, 4, 5]])]
        figures["pixel"] = pixel_aurocs(np.stack(scores.pixels), once).item()
    row = make_row(method, protocol, category, k_shot, seed, random_weights=method == "WinCLIP", **figures)
    row.metrics["image_F1Score"] = 0.5
    folder = write_job(run, row, scores)
    shown = 3
    masks = np.zeros((shown, SIDE, SIDE), np.uint8)
    masks[1, 5:12, 6:14] = 255
    Pictures(
        paths=paths[:shown],
        labels=labels[:shown].tolist(),
        images=rng.integers(0, 255, (shown, SIDE, SIDE, 3), np.uint8),
        masks=masks if category in MASKED else None,
        maps=rng.random((shown, SIDE, SIDE), np.float32),
        levels=[6, 12] if method == "MVFA" else [],
        level_maps=rng.random((shown, 2, SIDE, SIDE), np.float32) if method == "MVFA" else np.zeros(0),
    ).save(folder / "pictures.npz")
    if method == "MVFA":
        frozen = rng.normal(size=(16, 8))
        Features(labels, frozen, frozen + 3 * labels[:, None]).save(folder / "features.npz")
