"""What every model adds to anomalib's callbacks: finite numbers, how a run ends, and where checkpoints come from."""

import logging
import math
import os
import signal
from multiprocessing import get_context
from types import SimpleNamespace

import pytest
import torch
from anomalib.cli.cli import AnomalibCLI
from anomalib.engine import Engine

from anomalib_mvfa import AprilGan, BMADFewShot, Dra, Mkd, Mvfa
from anomalib_mvfa.callbacks import ADVICE, TERMINATED, is_out_of_memory
from anomalib_mvfa.io import commit, dataset_digest, versions


@pytest.fixture
def build(tiny_config, small_teacher):
    """Return a function that builds a small model."""
    arguments = {
        Mvfa: {"backbone": str(tiny_config), "pretrained": None, "image_size": 56},
        Mkd: {"backbone": "vgg11", "pre_trained": False, "image_size": 32},
        AprilGan: {"backbone": str(tiny_config), "pretrained": None, "image_size": 56},
        Dra: {"backbone": "test_resnet", "pre_trained": False, "image_size": 128},
    }
    return lambda kind: kind(**arguments[kind], max_epochs=1, visualizer=False)


@pytest.fixture
def engine(tmp_path):
    """Return a function that builds an engine."""
    arguments = {"accelerator": "cpu", "devices": 1, "enable_progress_bar": False}
    return lambda: Engine(default_root_dir=tmp_path, **arguments)


@pytest.fixture
def data(phantom_root):
    """Return a small datamodule."""
    return BMADFewShot(phantom_root, k_shot=1, eval_batch_size=7, num_workers=0)


@pytest.mark.parametrize("kind", [Mvfa, Mkd])
def test_training_that_diverges_is_refused_and_leaves_no_checkpoint(monkeypatch, build, engine, data, tmp_path, kind):
    model, step = build(kind), kind.training_step
    monkeypatch.setattr(model, "training_step", lambda *args, **kwargs: step(model, *args, **kwargs) * float("inf"))
    with pytest.raises(ValueError, match=f"The training loss of {kind.__name__} is not finite: training has diverged"):
        engine().train(model, datamodule=data)
    assert not [*tmp_path.rglob("*.ckpt")]


@pytest.mark.parametrize(("kind", "command"), [(Mvfa, "test"), (Mkd, "predict"), (Dra, "test")])
def test_weights_that_are_not_finite_are_refused(build, engine, data, kind, command):
    model = build(kind)
    name, weight = next((name, weight) for name, weight in model.named_parameters() if weight.requires_grad)
    weight.data[..., 0] = torch.nan
    with pytest.raises(ValueError, match=f"{name} of {kind.__name__} is not finite: training has diverged"):
        getattr(engine(), command)(model, datamodule=data)


@pytest.mark.parametrize(
    ("command", "field"), [("validate", "anomaly_map"), ("test", "pred_score"), ("predict", "anomaly_map")]
)
def test_scores_that_are_not_finite_are_refused(monkeypatch, build, engine, data, command, field):
    model = build(Mkd)
    score = model.model.forward

    def forward(image):
        found = score(image)
        getattr(found, field)[1] = torch.inf
        return found

    monkeypatch.setattr(model.model, "forward", forward)
    with pytest.raises(ValueError, match=rf"The {field} that Mkd gives /.*/001\.png is not finite\. Look at the image"):
        getattr(engine(), command)(model, datamodule=data)


def test_a_run_that_is_told_to_end_does_not_look_finished(monkeypatch, tiny_config, phantom_root, tmp_path):
    monkeypatch.setattr(Mvfa, "on_train_batch_end", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    arguments = ["--model", "Mvfa", "--model.backbone", str(tiny_config), "--model.pretrained", "null"]
    arguments += ["--data", "BMADFewShot", "--data.root", str(phantom_root), "--data.num_workers", "0"]
    command = ["train", *arguments, "--trainer.accelerator", "cpu", "--default_root_dir", str(tmp_path)]
    run = get_context("fork").Process(target=AnomalibCLI, args=(command,))
    run.start()
    run.join()
    assert run.exitcode == TERMINATED == 128 + signal.SIGTERM


@pytest.mark.parametrize(
    ("kind", "step", "batch_size"),
    [(Mvfa, "training_step", 1), (Mkd, "training_step", 64), (AprilGan, "test_step", 8)],
)
def test_advice_names_what_is_in_use(monkeypatch, build, engine, data, caplog, kind, step, batch_size):
    model = build(kind)

    def fail(*_, **__):
        msg = "CUDA out of memory. Tried to allocate 2.00 GiB."
        raise torch.OutOfMemoryError(msg)

    monkeypatch.setattr(model, step, fail)
    with caplog.at_level(logging.ERROR, "anomalib.mvfa"), pytest.raises(torch.OutOfMemoryError, match="CUDA out of"):
        engine().train(model, datamodule=data)
    assert f"{ADVICE} (Now: cpu, train_batch_size={batch_size}, eval_batch_size=7.)" in caplog.text


@pytest.mark.parametrize(("kind", "by_loader"), [(Mvfa, True), (Mkd, False)])
def test_a_checkpoint_says_where_it_comes_from(build, engine, data, tmp_path, kind, by_loader):
    data.prepare_data()
    data.setup()
    trained = engine()
    trained.fit(build(kind), **{"train_dataloaders": data.train_dataloader()} if by_loader else {"datamodule": data})
    expected = {"commit": commit(), "versions": versions(), "train_set": dataset_digest(data.train_data)}
    assert len(expected["train_set"]) == 64
    assert torch.load(trained.best_model_path, weights_only=False)["provenance"] == expected

    later = engine()
    later.test(build(kind), datamodule=data, ckpt_path=trained.best_model_path)
    later.trainer.save_checkpoint(tmp_path / "again.ckpt")
    assert torch.load(tmp_path / "again.ckpt", weights_only=False)["provenance"] == expected


@pytest.mark.parametrize("command", ["test", "predict", "validate"])
def test_memory_of_a_batch_is_given_back(monkeypatch, build, engine, data, command):
    given_back = []
    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(malloc_trim=given_back.append))
    getattr(engine(), command)(build(Mkd), datamodule=data)
    images = len(data.val_data if command == "validate" else data.test_data)
    assert given_back == [0] * math.ceil(images / data.eval_batch_size)


def test_a_system_without_that_library_does_as_well(monkeypatch, build, engine, data):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert engine().test(build(Mkd), datamodule=data)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), True),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate"), True),
        (MemoryError(), True),
        (RuntimeError("shape mismatch"), False),
        (KeyboardInterrupt(), False),
    ],
)
def test_out_of_memory_is_told_from_other_errors(error, expected):
    assert is_out_of_memory(error) is expected
    with pytest.raises(RuntimeError) as error:  # the processor's own
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
