"""The GPU check, rehearsed on the CPU: every part runs, failures are told, and the published loop is what it says."""

import argparse
import json
import re
import sys
from pathlib import Path

import pytest
import torch

from anomalib_mvfa import plugin

BENCHMARKS = Path(__file__).parents[1] / "benchmarks"


@pytest.fixture(scope="module")
def modules():
    """The scripts ``gpu_check`` and ``common``, which find each other in their own folder."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        import common
        import gpu_check

        yield gpu_check, common
    finally:
        sys.path.remove(str(BENCHMARKS))


def check(gpu_check, output):
    code = gpu_check.main(["--device", "cpu", "--tiny", "--output", str(output)])
    return code, json.loads((output / "gpu_check.json").read_text()), (output / "gpu_check.md").read_text()


@pytest.mark.slow
def test_all_parts_run_on_the_cpu(modules, tmp_path, monkeypatch):
    run = modules[0]._run

    def here(command, log, limit):
        """Run the command line in this process, which has imported anomalib; the tests in one of their own."""
        if "train" not in command:
            return run(command, log, limit)
        monkeypatch.setattr(sys, "argv", ["anomalib-mvfa", *command[3:]])
        return "", plugin.main() or 0

    monkeypatch.setattr(modules[0], "_run", here)
    code, report, table = check(modules[0], tmp_path)
    assert report["errors"] == {}
    assert code == 0
    figures = report["figures"]
    assert list(figures) == ["device", "tests", "speed", "profile", "few-shot run"]
    assert figures["device"]["device"].startswith("CPU")
    assert figures["tests"]["passed"] >= 3
    assert figures["tests"]["failed"] == figures["tests"]["skipped"] == 0
    for name in (
        "training, batch 1",
        "training, batch 16",
        *(f"test, batch {b}, K = {k}" for b in (1, 32) for k in (4, 16)),
    ):
        speed, ratio = (figures["speed"][f"{name}: {what}"] for what in ("images/s", "times the published images/s"))
        compared = figures["speed"][f"published loop, {name.split(', ')[-1] if 'K' in name else 'training'}: images/s"]
        assert ratio == pytest.approx(speed / compared)
        assert 0 < figures["speed"][f"{name}: share of the matmul rate"] < 1
    for name in ("training step", "test batch"):
        assert 0 <= figures["profile"][f"{name}: share of time without a kernel"] < 1
        assert figures["profile"][f"{name}: kernel 10, ms per step"]
    assert 0 < figures["few-shot run"]["pixel_AUROC"] <= 1
    assert {goal["status"] for goal in report["goals"]} == {"met", "not measured"}  # of the tests, and of the rest
    rows = re.findall(r"^\| (?!part|---)", table, re.MULTILINE)
    assert len(rows) == sum(map(len, figures.values()))


def test_a_part_that_fails_hides_no_other(modules, tmp_path, monkeypatch):
    gpu_check, _ = modules

    def fail(options, figures):
        figures["before"] = 1.5
        message = "out of\nmemory | all of it"
        raise RuntimeError(message)

    monkeypatch.setattr(gpu_check, "PARTS", {"speed": fail, "device": gpu_check.describe_device})
    code, report, table = check(gpu_check, tmp_path)
    assert code == 1
    assert report["errors"] == {"speed": "RuntimeError: out of memory | all of it"}
    assert report["figures"]["speed"] == {"before": 1.5}
    assert report["figures"]["device"]["torch"]
    assert "| speed | error | RuntimeError: out of memory \\| all of it |  | failed |" in table
    assert "| speed | training, batch 16: times the published images/s | - | >= 20 | not measured |" in table


@pytest.mark.parametrize(
    ("log", "message"),
    [
        ("FAILED tests/a.py::test_a - assert\n1 failed, 3 passed in 2.00s\n", "1 tests failed, 3 passed.*test_a"),
        ("ERROR tests/test_b.py - ImportError\n5 passed, 1 error in 2.00s\n", "1 tests failed, 5 passed.*test_b"),
        ("19 skipped, 1500 deselected in 2.00s\n", "0 tests failed, 0 passed"),
    ],
)
def test_failed_and_skipped_tests_are_no_success(modules, tmp_path, monkeypatch, log, message):
    gpu_check, _ = modules
    monkeypatch.setattr(gpu_check, "_run", lambda *_: (log, 1))
    options = argparse.Namespace(device="cuda", tiny=False, output=tmp_path)
    with pytest.raises(RuntimeError, match=message):
        gpu_check.run_tests(options, {})


def test_figures_that_are_not_numbers_are_no_success(modules, tmp_path, monkeypatch):
    def write(*_):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.csv").write_text("image_AUROC,pixel_AUROC\n0.9,nan\n")
        return "", 0

    monkeypatch.setattr(modules[0], "_run", write)
    options = argparse.Namespace(device="cpu", tiny=True, output=tmp_path)
    with pytest.raises(RuntimeError, match=r"exit code 0, figures .*nan"):
        modules[0].run_few_shot(options, {})


def test_goals_are_judged_on_a_gpu_alone(modules):
    from goals import judged

    speedup = "training, batch 16: times the published images/s"
    figures = {"speed": {speedup: 19.9}, "profile": {"test batch: copies between host and device per step": 0.0}}
    on_gpu, on_cpu = ({goal["figure"]: goal["status"] for goal in judged(figures, on_gpu)} for on_gpu in (True, False))
    assert (on_gpu[speedup], on_cpu[speedup]) == ("missed", "not measured")
    assert on_gpu["test batch: copies between host and device per step"] == "met"
    assert on_gpu["failed"] == "not measured"


def test_without_real_images_they_are_drawn(modules, tmp_path):
    data = modules[0]._data([tmp_path / "nothing"])
    assert data == {"--data": "FewShot", "--data.source": "Phantom"}
    assert modules[0]._data([tmp_path / "nothing", tmp_path])["--data.root"] == str(tmp_path)


def test_the_published_loop_trains_and_scores_as_we_do(modules):
    _, common = modules
    model = common.build_model("cpu", tiny=True)
    exact, half = (common.published_loop(model, tiny=True, dtype=dtype) for dtype in (torch.float32, torch.float16))
    image, mask, label = common.batch(1, "cpu", model.image_size)
    bank = common.fill_bank(model, 1)
    model.eval()
    with torch.no_grad():
        expected = model(image).anomaly_map[0].numpy()
    for loop, tolerance in ((exact, 1e-5), (half, 1e-2)):
        zero, few = loop.test(image, bank)
        assert (0.5 * zero + 0.5 * few) / (0.5 + 2 * 0.5) == pytest.approx(expected, abs=tolerance)
    step = common.training_step(model, 1, argparse.Namespace(device="cpu", bf16=False))
    ours = [step() for _ in range(3)]
    assert [exact.train(image, mask, label) for _ in ours] == pytest.approx(ours, rel=1e-4)
    assert half.train(image, mask, label) == pytest.approx(ours[0], rel=1e-2)
    assert all(parameter.grad is not None for parameter in exact.model.blocks.parameters())
