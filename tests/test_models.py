"""What every model of ours keeps to, in anomalib's engine: fit, test, checkpoints, exports, half precision, help."""

import inspect
import os
import shutil
import subprocess
import sys
from typing import NamedTuple

import numpy as np
import pytest
import torch
from anomalib import LearningType
from anomalib.engine import Engine
from anomalib.models.components import AnomalibModule

from anomalib_mvfa import AprilGan, Bgad, BMADFewShot, Clip, Dra, MedClip, Mkd, Mvfa, WinClipBaseline
from anomalib_mvfa.baselines import mkd
from recipe import TINY, WINDOWS, images, vgg_features, write_config

SIZE = TINY.image_size
TINY_CLIP, WINDOW_CLIP = "tiny.json", "windows.json"
MODELS = {
    Mvfa: {"backbone": TINY_CLIP, "pretrained": None, "image_size": SIZE, "max_epochs": 1},
    AprilGan: {"backbone": TINY_CLIP, "pretrained": None, "image_size": SIZE, "max_epochs": 1},
    Clip: {"backbone": TINY_CLIP, "pretrained": None, "image_size": SIZE},
    MedClip: {"backbone": "resnet18", "pretrained": None, "image_size": SIZE},
    WinClipBaseline: {"backbone": WINDOW_CLIP, "pretrained": None, "k_shot": 1},
    Mkd: {"backbone": "vgg11", "pre_trained": False, "image_size": 64, "max_epochs": 1},
    Dra: {"pre_trained": False, "image_size": 128, "max_epochs": 1},
    Bgad: {
        "backbone": "resnet18",
        "layers": ["layer2", "layer3"],
        "pre_trained": False,
        "image_size": 64,
        "coupling_blocks": 2,
        "warmup_epochs": 0,
        "max_epochs": 1,
    },
}
IMAGE_SIZES = {kind: arguments.get("image_size", 240) for kind, arguments in MODELS.items()}


class Fitted(NamedTuple):
    engine: Engine
    model: AnomalibModule
    checkpoint: str
    figures: dict[str, float]


@pytest.fixture(scope="module", autouse=True)
def _small_teacher():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mkd, "_features", vgg_features)
        yield


@pytest.fixture(scope="module")
def build(tmp_path_factory):
    """Build a small model of a kind."""
    folder = tmp_path_factory.mktemp("configs")
    files = {name: str(write_config(folder / name, clip)) for name, clip in ((TINY_CLIP, TINY), (WINDOW_CLIP, WINDOWS))}

    def run(kind, **more):
        arguments = {"visualizer": False, **MODELS[kind], **more}
        return kind(**{name: files.get(str(value), value) for name, value in arguments.items()})

    return run


@pytest.fixture(scope="module")
def categories(phantom_root, tmp_path_factory):
    """Return a root with the same images as Brain, with masks, and as Chest, without."""
    root = tmp_path_factory.mktemp("categories")
    for category in ("Brain", "Chest"):
        shutil.copytree(phantom_root / "Brain", root / category)
    return root


@pytest.fixture(scope="module")
def data(categories):
    """Build the few-shot datamodule of a category."""
    return lambda category="Brain", train_batch_size=22: BMADFewShot(
        categories, category, k_shot=1, train_batch_size=train_batch_size, num_workers=0
    )


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """Build an engine that says little."""

    def run(**arguments):
        quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False, "accelerator": "cpu"}
        return Engine(default_root_dir=tmp_path_factory.mktemp("results"), **{**quiet, **arguments})

    return run


@pytest.fixture(scope="module", params=MODELS, ids=lambda kind: kind.__name__)
def fitted(request, build, data, engine, tmp_path_factory):
    """Return an engine and a fitted model of each kind, its checkpoint and its figures."""
    runner, model = engine(), build(request.param)
    runner.fit(model, datamodule=data())
    checkpoint = runner.best_model_path
    if request.param is WinClipBaseline:  # the engine only validates it
        checkpoint = str(tmp_path_factory.mktemp("winclip") / "model.ckpt")
        runner.trainer.save_checkpoint(checkpoint)
    return Fitted(runner, model, checkpoint, runner.test(model, datamodule=data(), verbose=False)[0])


@torch.no_grad()
def scores(model, image):
    return model.eval()(image)


# ---------------------------------------------------------------------- fitted models


def test_a_fit_gives_all_figures(fitted):
    assert {"image_AUROC", "image_F1Score", "pixel_AUROC", "pixel_F1Score"} <= set(fitted.figures)
    assert all(0 <= value <= 1 for value in fitted.figures.values())


def test_a_checkpoint_gives_the_same_figures_and_scores(fitted, data, engine):
    loaded = type(fitted.model).load_from_checkpoint(fitted.checkpoint, visualizer=False)
    assert dict(loaded.hparams) == dict(fitted.model.hparams)
    again = engine().test(loaded, datamodule=data(), verbose=False)[0]
    assert again == pytest.approx(fitted.figures, abs=1e-6)
    image = images("films", 2, 80)
    torch.testing.assert_close(scores(loaded, image).anomaly_map, scores(fitted.model, image).anomaly_map)


def test_checkpoints_hold_plain_types_and_no_frozen_clip(fitted):
    def check(value):
        if isinstance(value, dict):
            value = [*value, *value.values()]
        if isinstance(value, list | tuple):
            for item in value:
                check(item)
        else:
            assert type(value) in {str, int, float, bool, type(None)}

    saved = torch.load(fitted.checkpoint, weights_only=True)
    check(saved["hyper_parameters"])
    frozen = [key for key in saved["state_dict"] if key.startswith("model.backbone.")]
    assert bool(frozen) == (type(fitted.model) in {Dra, Bgad})  # others find it where they found it before


def test_a_score_depends_on_no_other_image(fitted):
    image = images("query", 3, IMAGE_SIZES[type(fitted.model)])
    together, alone = scores(fitted.model, image), scores(fitted.model, image[1:2])
    assert together.anomaly_map.std() > 0
    torch.testing.assert_close(together.pred_score[1:2], alone.pred_score)
    torch.testing.assert_close(together.anomaly_map[1:2], alone.anomaly_map)


def test_exports_give_the_same_scores_and_hold_no_images(fitted, data, tmp_path, monkeypatch):
    onnxruntime = pytest.importorskip("onnxruntime")
    openvino = pytest.importorskip("openvino")
    runner, model = fitted.engine, fitted.model
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    image = images("films", 2, 80)
    expected = scores(model, image)

    monkeypatch.setenv("TRUST_REMOTE_CODE", "1")
    path = runner.export(model, "torch", export_root=tmp_path)
    loaded = torch.load(path, weights_only=False)["model"]
    assert not any(parameter.requires_grad for parameter in loaded.parameters()) or type(model) is WinClipBaseline
    assert learning == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    torch.testing.assert_close(scores(loaded, image).anomaly_map, expected.anomaly_map)
    source = data()
    source.setup()
    content = path.read_bytes()
    for row in range(len(source.support.samples)):
        view = source.support[row].image
        for pixels in (view, model.pre_processor.transform(view)):
            assert pixels.numpy().tobytes()[:400] not in content

    onnx = runner.export(model, "onnx", export_root=tmp_path)
    session = onnxruntime.InferenceSession(str(onnx))
    names = [output.name for output in session.get_outputs()]
    wanted = {"pred_score"} if type(model) is Mkd else {"pred_score", "anomaly_map"}  # a graph cannot differentiate
    assert wanted == {"pred_score", "anomaly_map"} & set(names)
    # Some processors compute in bfloat16 by OpenVINO's own choice.
    compiled = openvino.Core().compile_model(openvino.convert_model(onnx), "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for found in (dict(zip(names, session.run(None, {"input": image.numpy()}), strict=True)), compiled(image.numpy())):
        for name in wanted:
            values = getattr(expected, name).numpy()
            np.testing.assert_allclose(np.asarray(found[name]).reshape(values.shape), values, atol=1e-4)


def test_anomalib_is_told_the_same(fitted):
    kind, model = type(fitted.model), fitted.model
    if kind is WinClipBaseline:
        assert model.learning_type == LearningType.FEW_SHOT
    else:
        assert model.learning_type == LearningType.ONE_CLASS
        assert AnomalibModule in kind.__bases__  # or anomalib would not list it
        assert model.trainer_arguments["num_sanity_val_steps"] == 0
        assert ("max_epochs" in model.trainer_arguments) == (kind in {Clip, MedClip})
        assert fitted.engine.trainer.max_epochs == 1
        assert kind.configure_pre_processor((40, 40)).transform.size == [40, 40]
        default = inspect.signature(kind).parameters["image_size"].default
        assert kind.configure_pre_processor().transform.size == [default, default]
        assert model.pre_processor.transform.size == [IMAGE_SIZES[kind], IMAGE_SIZES[kind]]


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_half_precision_of_data_without_masks(build, data, engine, kind):
    category = "Brain" if kind is Bgad else "Chest"  # it learns from masks
    runner, model = engine(precision="bf16-mixed", limit_train_batches=1, limit_val_batches=1), build(kind)
    runner.fit(model, datamodule=data(category, train_batch_size=2))
    figures = runner.test(model, datamodule=data(category), verbose=False)[0]
    assert ("pixel_AUROC" in figures) == (category == "Brain")
    assert all(0 <= value <= 1 for value in figures.values())
    floats = [value for value in model.state_dict().values() if value.is_floating_point()]
    assert all(value.dtype == torch.float32 for value in floats)


@pytest.mark.parametrize("kind", [AprilGan, Dra, Bgad], ids=lambda kind: kind.__name__)
def test_a_seed_decides_everything(build, data, engine, kind):
    def fitted(seed, noise):
        torch.manual_seed(noise)  # whatever was drawn before
        model = build(kind, seed=seed)
        engine().fit(model, datamodule=data())
        return torch.cat([parameter.flatten() for parameter in model.model.parameters() if parameter.requires_grad])

    one, same, other = fitted(3, 0), fitted(3, 1), fitted(4, 0)
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize("kind", MODELS, ids=lambda kind: kind.__name__)
def test_every_argument_is_documented(kind):
    undocumented = [name for name in inspect.signature(kind).parameters if f"\n    {name}: " not in kind.__doc__]
    assert undocumented == []
    assert "\n    pre_processor: Anomalib's component, or whether to use the default one.\n" in kind.__doc__


def test_the_environment_sets_the_defaults(build):
    code = """
    from anomalib_mvfa import AprilGan, Clip, Dra, MedClip, Mvfa
    for kind in (AprilGan, Clip, Dra, MedClip, Mvfa):
        arguments = kind().hparams
        print(arguments.get("pretrained", arguments.get("pre_trained")))
    """
    environment = {"ANOMALIB_MVFA_BACKBONE": build(Clip).hparams["backbone"], "ANOMALIB_MVFA_PRETRAINED": "null"}
    done = subprocess.run(
        [sys.executable, "-c", inspect.cleandoc(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.stdout.split() == ["None", "None", "False", "None", "None"], done.stderr[-3000:]


@pytest.mark.parametrize(
    ("kind", "arguments", "message"),
    [
        (Mvfa, {"image_score": "mean"}, "map_max, det_mean, det_max"),
        (AprilGan, {"calibration": "train"}, "support, none, test"),
        (AprilGan, {"learning_rate": -1.0}, r"learning_rate=-1\.0 must be at least 0\."),
        (AprilGan, {"max_epochs": 0}, r"max_epochs=0 must be at least 1\."),
        (Clip, {"calibration": "train"}, "support, none, test"),
        (Clip, {"bank_images": 0}, r"bank_images=0 must be at least 1\."),
        (MedClip, {"calibration": "train"}, "support, none, test"),
        (WinClipBaseline, {"k_shot": -1}, r"k_shot=-1 must be at least 0\."),
        (Mkd, {"backbone": "resnet18"}, r"backbone='resnet18' is unknown; choose one of: vgg11, vgg13, vgg16, vgg19"),
        (Mkd, {"image_size": 31}, r"image_size=31 must be at least 32"),
        (Mkd, {"value_weight": -1.0}, r"value_weight=-1\.0 must be at least 0"),
        (Mkd, {"learning_rate": -1.0}, r"learning_rate=-1\.0 must be at least 0"),
        (Dra, {"image_size": 96}, r"image_size=96 must be at least 128"),
        (Dra, {"references": 0}, r"references=0 must be at least 1\."),
        (Dra, {"top_share": 1.5}, r"top_share=1.5 must be between 0 and 1\."),
        (Dra, {"max_epochs": 0}, r"max_epochs=0 must be at least 1\."),
        (Bgad, {"condition_vector": 30}, r"condition_vector=30 must be a multiple of 4"),
        (Bgad, {"boundary_share": 0.6}, r"boundary_share=0.6 must be between 0 and 0.5\."),
        (Bgad, {"margin": -0.1}, r"margin=-0.1 must be at least 0\."),
        (Bgad, {"fiber_batch_size": 0}, r"fiber_batch_size=0 must be at least 1\."),
        (Bgad, {"warmup_epochs": -1}, r"warmup_epochs=-1 must be at least 0\."),
    ],
)
def test_unknown_values_are_refused_before_weights_load(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**{"backbone": "no such backbone", **arguments})


# ---------------------------------------------------------------------- several processes


DISTRIBUTED = """
import os, sys, torch
from anomalib.engine import Engine
from anomalib_mvfa import AprilGan, BMADFewShot, Clip, Mvfa, Phantom

config, root, out = sys.argv[1:4]
processes = int(sys.argv[4])
torch.set_num_threads(1)
options = dict(image_size=56, visualizer=False)
brain = lambda name: BMADFewShot(root, name, k_shot=1, num_workers=0, train_batch_size=2 // processes)
phantom = lambda: Phantom(root + "/phantom", size=32, num_workers=0)
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
