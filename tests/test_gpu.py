"""A GPU gives what the CPU gives. By default, the same tests run on the CPU, whose autocast has both half precisions.

The same seed on a GPU: test_reproducibility.py.
"""

import json
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
import yaml
from anomalib.engine import Engine
from lightning.pytorch import Callback
from lightning.pytorch.plugins import MixedPrecision
from PIL import Image

import by_hand
from anomalib_mvfa import BMADFewShot, BMADOneClass, Mvfa, plugin
from anomalib_mvfa.model.memory_bank import nearest_distance
from anomalib_mvfa.model.text_alignment import full_precision, patch_logits

IMAGE_SIZE = 56
STEPS = 20


class Precision(NamedTuple):
    """A precision and how far its results may lie from float32 on the CPU.

    About five times what half precision was measured to do on a CPU; TF32 has the digits of float16, and is in more
    products.
    """

    mixed: str | None  # Lightning's name
    matmul: str  # torch's name of the precision of float32 products
    loss: float  # relative
    maps: float  # absolute, of maps and scores in [0, 1]
    auroc: float


PRECISIONS = {
    "float32": Precision(None, "highest", loss=2e-4, maps=1e-3, auroc=1e-3),
    "TF32": Precision(None, "high", loss=2e-3, maps=5e-3, auroc=3e-3),
    "bf16-mixed": Precision("bf16-mixed", "highest", loss=2e-3, maps=1e-2, auroc=3e-3),
    "16-mixed": Precision("16-mixed", "highest", loss=2e-3, maps=2e-3, auroc=1e-3),
}
ON_CUDA = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]
CUDA = pytest.param("cuda", marks=ON_CUDA)
in_every_precision = pytest.mark.parametrize(
    ("device", "precision"),
    [
        *(pytest.param("cpu", name, marks=pytest.mark.slow) for name in ("bf16-mixed", "16-mixed")),
        *(pytest.param("cuda", precision, marks=ON_CUDA) for precision in PRECISIONS),
    ],
    indirect=True,
)
also_on_the_cpu_if_slow = pytest.mark.parametrize(
    "device", [pytest.param("cpu", marks=pytest.mark.slow), CUDA], indirect=True
)


class Fit(NamedTuple):
    """A trained model, the losses of its steps and its checkpoint."""

    engine: Engine
    model: Mvfa
    losses: list[float]
    checkpoint: str


class Result(NamedTuple):
    """What a checkpoint says of the test images: maps ``(B, H, W)``, scores ``(B,)`` and figures."""

    maps: np.ndarray
    scores: np.ndarray
    figures: dict[str, float]


class Losses(Callback):
    """Keeps the loss of every step."""

    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(outputs["loss"].item())


@pytest.fixture(scope="module", params=["cpu", CUDA])
def device(request):
    """The device that is compared with the CPU."""
    return request.param


@pytest.fixture
def precision(request, monkeypatch):
    """A precision, whose settings of torch are in force."""
    chosen = PRECISIONS[request.param]
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(chosen.matmul)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", chosen.matmul != "highest")
    yield chosen
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def new(tiny_config, tmp_path_factory):
    """Return a function that makes an engine for a device, and a model."""

    def make(device, mixed=None, **trainer):
        engine = Engine(
            default_root_dir=tmp_path_factory.mktemp("engine"),
            accelerator=device,
            devices=1,
            plugins=[MixedPrecision(mixed, device)] if mixed else None,  # by name, the CPU would not do float16
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            **trainer,
        )
        return engine, Mvfa(str(tiny_config), None, image_size=IMAGE_SIZE, max_epochs=2, visualizer=False)

    return make


@pytest.fixture(scope="module")
def new_data(phantom_root):
    """Return a function that makes few-shot data of 11 steps an epoch."""
    return lambda: BMADFewShot(phantom_root, k_shot=2, train_batch_size=4, num_workers=0)


@pytest.fixture(scope="module")
def fit(new, new_data):
    """Return a function that trains a model."""

    def run(device, mixed=None):
        losses = Losses()
        engine, model = new(device, mixed, callbacks=[losses])
        engine.fit(model, datamodule=new_data())
        return Fit(engine, model, losses.values, engine.best_model_path)

    return run


@pytest.fixture(scope="module")
def score(new, new_data):
    """Return a function that scores the test images with a checkpoint."""

    def run(checkpoint, device, mixed=None):
        engine, model = new(device, mixed)
        predictions = engine.predict(model, datamodule=new_data(), ckpt_path=checkpoint)
        (figures,) = engine.test(model, datamodule=new_data(), ckpt_path=checkpoint, verbose=False)
        maps = torch.cat([batch.anomaly_map for batch in predictions]).float().cpu().numpy()
        scores = torch.cat([batch.pred_score for batch in predictions]).float().cpu().numpy()
        return Result(maps, scores, figures)

    return run


@pytest.fixture(scope="module")
def on_cpu(fit):
    """A fit on the CPU in float32."""
    return fit("cpu")


@pytest.fixture(scope="module")
def on_device(fit, device, on_cpu):
    """A fit on the device in float32, whose products in convolutions may be TF32 by torch's default."""
    return on_cpu if device == "cpu" else fit(device)


@pytest.fixture(scope="module")
def expected(on_cpu, score):
    """What the CPU says, in float32, of the model that the CPU has trained."""
    return score(on_cpu.checkpoint, "cpu")


def assert_close(result, other, tolerance):
    np.testing.assert_allclose(result.maps, other.maps, rtol=0, atol=tolerance.maps)
    np.testing.assert_allclose(result.scores, other.scores, rtol=0, atol=tolerance.maps)
    for name in ("pixel_AUROC", "image_AUROC"):
        assert result.figures[name] == pytest.approx(other.figures[name], abs=tolerance.auroc), name


@in_every_precision
def test_losses_of_20_steps(on_cpu, fit, device, precision):
    losses = fit(device, precision.mixed).losses
    assert len(losses) >= STEPS
    assert losses[:STEPS] == pytest.approx(on_cpu.losses[:STEPS], rel=precision.loss)


@in_every_precision
def test_maps_scores_and_auroc_of_a_checkpoint_of_the_cpu(on_cpu, expected, score, device, precision):
    assert expected.maps.std() > 10 * PRECISIONS["float32"].maps  # there is something to differ
    assert_close(score(on_cpu.checkpoint, device, precision.mixed), expected, precision)


@pytest.mark.parametrize("device", [CUDA], indirect=True)
def test_checkpoint_of_the_device_on_the_cpu(on_device, score, device):
    tolerance = PRECISIONS["TF32"]  # of torch's default in convolutions
    assert_close(score(on_device.checkpoint, "cpu"), score(on_device.checkpoint, device), tolerance)


def test_full_precision_switches_tf32_and_autocast_off_and_back_on(device):
    generator = torch.Generator().manual_seed(0)
    tokens = 3 * torch.randn(128, 10, 128, generator=generator)
    text = torch.nn.functional.normalize(torch.randn(128, 2, generator=generator), dim=0)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with torch.autocast(device, dtype=torch.bfloat16):
            found = patch_logits(tokens.to(device), text.to(device))
            with full_precision(torch.device(device)):
                assert (text.T @ text).dtype == torch.float32
            assert (text.to(device).T @ text.to(device)).dtype == torch.bfloat16
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert (found.cpu() - by_hand.logits(tokens, text)).abs().max() < 1e-3


@in_every_precision
def test_distances_to_the_bank_are_float32_in_every_precision(device, precision):
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 50, 96, generator=generator)
    bank = torch.nn.functional.normalize(torch.randn(5000, 96, generator=generator), dim=-1)
    keep = torch.arange(5000) % 3 > 0
    for kept in (None, keep):
        expected = nearest_distance(query, bank, kept)
        with torch.autocast(device, torch.bfloat16, enabled=precision.mixed is not None):
            found = nearest_distance(query.to(device), bank.to(device), None if kept is None else kept.to(device))
        torch.testing.assert_close(found.cpu(), expected, rtol=0, atol=1e-5)
    assert nearest_distance(bank.to(device), bank.to(device)).max() < 1e-5  # each row finds itself


def test_memory_bank_of_a_normal_only_fit(new, phantom_root, device):
    banks = []
    for trained_on in ("cpu", device):
        engine, model = new(trained_on)
        engine.fit(model, datamodule=BMADOneClass(phantom_root, num_workers=0))
        banks.append({name: value.cpu() for name, value in model.state_dict().items() if "bank" in name})
    assert any(value.numel() for value in banks[0].values())
    for name, value in banks[0].items():
        torch.testing.assert_close(banks[1][name], value, rtol=0, atol=PRECISIONS["TF32"].maps, msg=f"{name} differs")


@pytest.fixture(scope="module")
def film(phantom_root):
    """An image file."""
    return next((phantom_root / "Brain" / "test" / "Ungood" / "img").iterdir())


@pytest.fixture(scope="module")
def predicted(on_device, film):
    """The map ``(H, W)`` of the film, by the model on the device."""
    (batch,) = on_device.engine.predict(on_device.model, data_path=film)
    return batch.anomaly_map.squeeze().float().cpu().numpy()


def test_torch_export(on_device, film, predicted, device, tmp_path, monkeypatch):
    from anomalib.deploy import TorchInferencer

    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = on_device.engine.export(on_device.model, "torch", export_root=tmp_path)
    for runs_on in {"cpu", device}:
        prediction = TorchInferencer(path, device=runs_on).predict(film)
        found = prediction.anomaly_map.squeeze().float().cpu().numpy()
        np.testing.assert_allclose(found, predicted, rtol=0, atol=PRECISIONS["TF32"].maps)


@also_on_the_cpu_if_slow
def test_onnx_export(on_device, film, predicted, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    path = on_device.engine.export(on_device.model, "onnx", export_root=tmp_path)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    image = np.asarray(Image.open(film).convert("RGB"), dtype=np.float32).transpose(2, 0, 1) / 255
    found = dict(zip(names, session.run(None, {"input": image[None]}), strict=True))["anomaly_map"].squeeze()
    np.testing.assert_allclose(found, predicted, rtol=0, atol=PRECISIONS["TF32"].maps)


@also_on_the_cpu_if_slow
def test_compare_with_one_job(tiny_config, phantom_root, device, tmp_path, monkeypatch):
    model = {"backbone": str(tiny_config), "pretrained": None, "image_size": IMAGE_SIZE, "max_epochs": 1}
    comparison = {
        "data": {"class_path": "BMADOneClass", "init_args": {"root": str(phantom_root), "num_workers": 0}},
        "categories": ["Brain"],
        "k_shots": [2],
        "methods": {"MVFA": {"protocol": "few_shot", "model": {"class_path": "Mvfa", "init_args": model}}},
        "accelerator": device,
    }
    (tmp_path / "one_job.yaml").write_text(yaml.safe_dump(comparison))
    command = ["compare", "--config", tmp_path / "one_job.yaml", "--output", tmp_path / "run"]
    monkeypatch.setattr(sys, "argv", ["anomalib-mvfa", *map(str, command)])
    assert plugin.main() == 0
    (row,) = tmp_path.glob("run/jobs/*/row.json")
    assert json.loads(row.read_text())["metrics"]["pixel_AUROC"] > 0
