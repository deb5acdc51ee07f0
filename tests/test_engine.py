"""What users do with any model of anomalib: predict, export, several processes, compile."""

from pathlib import Path

import numpy as np
import pytest
import torch
from anomalib.engine import Engine
from PIL import Image

from anomalib_mvfa import BMADFewShot, Mvfa
from anomalib_mvfa.model.build import build_mvfa
from anomalib_mvfa.model.calibration import SupportBatch, fill_bank, set_ranges

IMAGE_SIZE = 56


@pytest.fixture(scope="module")
def fitted(mini_clip, phantom_root, tmp_path_factory):
    """Return an engine and a fitted model."""
    root = tmp_path_factory.mktemp("fitted")
    model = Mvfa(
        backbone=str(mini_clip.config),
        pretrained=str(mini_clip.weights),
        image_size=IMAGE_SIZE,
        max_epochs=1,
        visualizer=False,
    )
    engine = Engine(
        default_root_dir=root,
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        accelerator="cpu",
    )
    engine.fit(model, datamodule=BMADFewShot(phantom_root, "Brain", k_shot=2, num_workers=0))
    return engine, model


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Return three image files of 512 pixels."""
    folder = tmp_path_factory.mktemp("films")
    rng = np.random.default_rng(0)
    for index in range(3):
        coarse = Image.fromarray(rng.integers(0, 255, (24, 24, 3), dtype=np.uint8))
        coarse.resize((512, 512), Image.Resampling.BICUBIC).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


@pytest.fixture(scope="module")
def maps(fitted, files):
    """Return what the engine predicts for the files."""
    engine, model = fitted
    predictions = engine.predict(model, data_path=files[0].parent)
    assert [Path(path) for batch in predictions for path in batch.image_path] == files
    return np.stack([batch.anomaly_map.squeeze().numpy() for batch in predictions])


def test_a_folder_and_a_file_predict_alike(fitted, files, maps):
    engine, model = fitted
    alone = engine.predict(model, data_path=files[1])[0]
    assert alone.anomaly_map.shape[-2:] == (IMAGE_SIZE, IMAGE_SIZE)
    np.testing.assert_allclose(alone.anomaly_map.squeeze().numpy(), maps[1], atol=1e-6)


def test_torch_export_gives_the_same_map(fitted, files, maps, tmp_path, monkeypatch):
    from anomalib.deploy import TorchInferencer

    engine, model = fitted
    path = engine.export(model, "torch", export_root=tmp_path)
    assert any(parameter.requires_grad for parameter in model.parameters())
    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    prediction = TorchInferencer(path).predict(files[0])
    np.testing.assert_allclose(prediction.anomaly_map.squeeze().numpy(), maps[0], atol=1e-5)


def test_onnx_and_openvino_exports_give_the_same_maps_at_any_batch(fitted, files, maps, tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    openvino = pytest.importorskip("openvino")
    engine, model = fitted
    onnx = engine.export(model, "onnx", export_root=tmp_path)
    session = onnxruntime.InferenceSession(str(onnx))
    names = [output.name for output in session.get_outputs()]
    # Some processors compute in bfloat16 by OpenVINO's own choice.
    compiled = openvino.Core().compile_model(openvino.convert_model(onnx), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    images = np.stack([np.asarray(Image.open(file), dtype=np.float32).transpose(2, 0, 1) / 255 for file in files])
    for batch, expected in ((images, maps), (images[2:], maps[2:])):
        from_onnx = dict(zip(names, session.run(None, {"input": batch}), strict=True))
        np.testing.assert_allclose(from_onnx["anomaly_map"].reshape(expected.shape), expected, atol=1e-5)
        from_openvino = np.asarray(compiled(batch)["anomaly_map"])
        np.testing.assert_allclose(from_openvino.reshape(expected.shape), expected, atol=1e-5)


def test_compiled_model_equals_eager_at_any_batch_without_recompiling(mini_clip):
    model = build_mvfa(str(mini_clip.config), str(mini_clip.weights), IMAGE_SIZE).eval()
    model.text_features.copy_(model.encode_states("Brain"))
    generator = torch.Generator().manual_seed(0)
    support = torch.rand(2, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
    set_ranges(model, fill_bank(model, [SupportBatch(support, torch.tensor([0, 0]), ["a", "b"])]))
    # The graphs are what is compared; generating code for them would take a minute.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        for batch in (1, 3, 8):
            image = torch.rand(batch, 3, IMAGE_SIZE, IMAGE_SIZE, generator=generator)
            torch._dynamo.decorators.mark_unbacked(image, 0)
            with torch.compiler.set_stance("default" if batch == 1 else "fail_on_recompile"):
                result = compiled(image)
            expected = model(image)
            torch.testing.assert_close(result.anomaly_map, expected.anomaly_map, atol=1e-5, rtol=0)
            torch.testing.assert_close(result.pred_score, expected.pred_score, atol=1e-5, rtol=0)
