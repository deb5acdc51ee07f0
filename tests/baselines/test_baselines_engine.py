"""What users do with any model of anomalib, done with the baselines: export, and several processes."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from anomalib_mvfa import AprilGan, Clip
from recipe import TINY, images

SIZE = TINY.image_size


@pytest.mark.parametrize("kind", [Clip, AprilGan])
def test_exports_give_the_same_scores(kind, tiny_config, few_shot, engine, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    openvino = pytest.importorskip("openvino")
    arguments = {} if kind is Clip else {"max_epochs": 1}
    model, runner = kind(str(tiny_config), None, SIZE, visualizer=False, **arguments), engine()
    runner.fit(model, datamodule=few_shot())
    image = images("films", 2, 80)
    with torch.no_grad():
        expected = model.eval()(image)

    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    loaded = torch.load(runner.export(model, "torch", export_root=tmp_path), weights_only=False)["model"]
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(image).anomaly_map, expected.anomaly_map)
    onnx = runner.export(model, "onnx", export_root=tmp_path)
    session = onnxruntime.InferenceSession(str(onnx))
    names = [output.name for output in session.get_outputs()]
    compiled = openvino.Core().compile_model(openvino.convert_model(onnx), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for found in (dict(zip(names, session.run(None, {"input": image.numpy()}), strict=True)), compiled(image.numpy())):
        for name in ("anomaly_map", "pred_score"):
            wanted = getattr(expected, name).numpy()
            np.testing.assert_allclose(np.asarray(found[name]).reshape(wanted.shape), wanted, atol=1e-5)


DISTRIBUTED = """
import os, sys, torch
from anomalib.engine import Engine
from anomalib_mvfa import AprilGan, BMADFewShot, Clip, Mvfa, BrainPhantom

config, root, out = sys.argv[1:4]
processes = int(sys.argv[4])
torch.set_num_threads(1)
options = dict(image_size=56, visualizer=False)
brain = lambda name: BMADFewShot(root, name, k_shot=1, num_workers=0, train_batch_size=2 // processes)
phantom = lambda: BrainPhantom(root + "/phantom", size=32, num_workers=0)
strategy = {"strategy": "ddp"} if processes > 1 else {}
results = {}
for name, kind, data in (
    ("clip", Clip, brain("Brain")),
    ("april_gan", AprilGan, brain("Brain")),
    ("april_gan without masks", AprilGan, brain("Chest")),
    ("mvfa of normal images", Mvfa, phantom()),
):
    model = kind(config, None, **options, **({} if kind is Clip else {"max_epochs": 1}))
    runs = f"{out}-{name}-{os.environ.get('RANK')}"  # anomalib numbers these in every process, which race
    engine = Engine(default_root_dir=runs, accelerator="cpu", devices=processes, logger=False,
                    enable_progress_bar=False, enable_model_summary=False, **strategy)
    engine.fit(model, datamodule=data)
    figures = engine.test(model, datamodule=data, verbose=False)[0]
    state = {key: value for key, value in model.state_dict().items() if "backbone" not in key}
    results[name] = figures, state
torch.save(results, f"{out}-{engine.trainer.global_rank}.pt")
"""


def test_two_processes_equal_one(tiny_config, categories, tmp_path):
    script = tmp_path / "run.py"
    script.write_text(DISTRIBUTED)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    for launcher, name, processes in (([sys.executable], "one", 1), (torchrun, "two", 2)):
        command = [*launcher, str(script), str(tiny_config), str(categories), str(tmp_path / name), str(processes)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr[-3000:]
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("one-0", "two-0", "two-1"))
    for name, (figures, state) in one.items():
        assert first[name][0] == pytest.approx(figures, abs=1e-5), name
        for key, value in state.items():
            assert torch.equal(first[name][1][key].nan_to_num(), second[name][1][key].nan_to_num()), (name, key)
            torch.testing.assert_close(
                first[name][1][key], value, atol=1e-4, rtol=0, equal_nan=True, msg=f"{name} {key}"
            )
