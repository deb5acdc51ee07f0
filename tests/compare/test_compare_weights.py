import inspect
import pickle

import pytest
import timm
import torch
import torchvision
from anomalib.models import list_models
from safetensors.torch import save_file

from anomalib_mvfa.compare import weights
from anomalib_mvfa.compare.plan import MODEL_DEFAULT
from anomalib_mvfa.compare.weights import Origin, build_model

LAYERS = {"test_resnet": ["layer2", "layer3"], "test_efficientnet": ["blocks.1", "blocks.2"], "test_vit": ["blocks.1"]}
"""timm's networks for tests, of each kind that it loads in a way of its own."""
RANDOM = Origin("random", True)


def patchcore(backbone="test_resnet", **arguments):
    return {
        "class_path": "Patchcore",
        "init_args": {"backbone": backbone, "layers": LAYERS.get(backbone, ["layer2"]), **arguments},
    }


def state_of(name, seed=7):
    """Return the state dict of a network with weights that nothing else draws."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return timm.create_model(name).state_dict()


@pytest.fixture
def save(tmp_path):
    """Return a function that saves a state dict and returns its path as a user would write it."""

    def save(state, name="weights.pt"):
        path = tmp_path / name
        save_file(state, path) if path.suffix == ".safetensors" else torch.save(state, path)
        return str(path)

    return save


@pytest.fixture(autouse=True)
def globals_are_as_they_were():
    """See after each test, also after those with an error, that nothing is left patched."""
    before = timm.create_model, torchvision.models.WeightsEnum.get_state_dict
    yield
    assert (timm.create_model, torchvision.models.WeightsEnum.get_state_dict) == before


def assert_taken(network, state):
    """Assert that a network's tensors are those of a state dict, by name."""
    taken = {name: value for name, value in network.state_dict().items() if name in state}
    assert len(taken) > len(network.state_dict()) / 2
    assert all(torch.equal(value, state[name]) for name, value in taken.items())


# ------------------------------------------------------------------------------------------------------------ From file


@pytest.mark.parametrize("backbone", LAYERS)
def test_file_reaches_timm(save, backbone):
    state = state_of(backbone)
    model, origin = build_model(patchcore(backbone), save(state), visualizer=False)
    network = model.model.feature_extractor.feature_extractor
    assert origin == Origin("weights.pt", False)
    assert_taken(network, state)
    assert not any("state_dict" in getattr(module, "pretrained_cfg", {}) for module in network.modules())


def with_another_head(state):
    return {**state, "fc.weight": torch.zeros(2, state["fc.weight"].shape[1]), "fc.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    ("form", "name"),
    [
        (lambda state: {key: value for key, value in state.items() if not key.startswith("fc.")}, "no_head.pt"),
        (with_another_head, "other_head.pth"),
        (lambda state: {"model": {f"module.{key}": value for key, value in state.items()}}, "wrapped.pt"),
        (lambda state: {"state_dict": state, "epoch": 3}, "checkpoint.pth"),
        (lambda state: state, "weights.safetensors"),
    ],
)
def test_forms_of_files(save, form, name):
    state = state_of("test_resnet")
    model, origin = build_model(patchcore(), save(form(state), name))
    assert origin.name == name
    assert_taken(model.model.feature_extractor.feature_extractor, state)


def test_file_reaches_the_teacher_alone(save):
    spec = {"class_path": "Stfpm", "init_args": {"backbone": "test_resnet", "layers": ["layer1", "layer2"]}}
    state = state_of("test_resnet")
    model, _ = build_model(spec, save(state))
    assert_taken(model.model.teacher_model.feature_extractor, state)
    weight = model.model.student_model.feature_extractor.state_dict()["conv1.0.weight"]
    assert not torch.equal(weight, state["conv1.0.weight"])


def test_file_reaches_torchvision(save):
    torch.manual_seed(7)
    state = torchvision.models.resnet18().state_dict()
    model, origin = build_model({"class_path": "Cfa", "init_args": {"backbone": "resnet18"}}, save(state))
    assert origin == Origin("weights.pt", False)
    assert_taken(model.model.feature_extractor, state)


def test_file_reaches_an_argument(mini_clip):
    spec = {"class_path": "Mvfa", "init_args": {"backbone": str(mini_clip.config), "pretrained": None}}
    model, origin = build_model(spec, str(mini_clip.weights), visualizer=False, image_size=70)
    assert origin == Origin("clip.pt", False)
    weight = torch.load(mini_clip.weights, weights_only=True)["visual.conv1.weight"]
    assert torch.equal(model.model.backbone.clip.visual.conv1.weight, weight)


# --------------------------------------------------------------------------------------------------------------- Random


@pytest.mark.parametrize(
    ("spec", "network"),
    [
        (patchcore(), "feature_extractor.feature_extractor"),
        (patchcore("test_vit"), "feature_extractor.feature_extractor"),
        ({"class_path": "Cfa", "init_args": {"backbone": "resnet18"}}, "feature_extractor"),
    ],
)
def test_random_weights_are_the_same_for_every_seed(spec, network):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model, origin = build_model(spec, None)
        states.append(model.model.get_submodule(network).state_dict())
        assert origin == RANDOM
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_what_a_model_trains_follows_the_seed():
    spec = {"class_path": "Stfpm", "init_args": {"backbone": "test_resnet", "layers": ["layer1", "layer2"]}}
    states = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        states.append(build_model(spec, None)[0].model.student_model.feature_extractor.state_dict())
    first, again, other = (state["conv1.0.weight"] for state in states)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


# ------------------------------------------------------------------------------------------------ What models do anyway


def test_where_weights_come_from_is_named(tiny_config, mini_clip):
    tiny = {"backbone": str(tiny_config), "image_size": 56}
    mini = {"backbone": str(mini_clip.config), "image_size": 70, "pretrained": str(mini_clip.weights)}
    for arguments, given, origin in (
        ({**tiny, "pretrained": "openai"}, None, RANDOM),
        ({**tiny, "pretrained": None}, MODEL_DEFAULT, RANDOM),
        (mini, MODEL_DEFAULT, Origin("clip.pt", False)),
    ):
        assert build_model({"class_path": "Mvfa", "init_args": arguments}, given)[1] == origin
    assert build_model(patchcore(pre_trained=False))[1] == RANDOM
    assert build_model({"class_path": "Ganomaly"})[1] == Origin(None, False)


def test_downloaded_weights_are_named(monkeypatch):
    create_model = timm.create_model
    asked = []

    def offline(name, pretrained=False, **arguments):
        asked.append(pretrained)
        return create_model(name, **arguments)

    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", offline)
        assert build_model(patchcore("resnet18"))[1] == Origin("resnet18.a1_in1k", False)
    assert asked == [False, True]


def test_failed_download(monkeypatch):
    def offline(name, pretrained=False, **arguments):
        msg = "[Errno -3] Temporary failure in name resolution\nand a long trace"
        raise OSError(msg)

    with monkeypatch.context() as patch:
        patch.setattr(timm, "create_model", offline)
        message = r"The weights of test_vit could not be loaded \(OSError.*resolution.*\)\. Name a file for this"
        with pytest.raises(RuntimeError, match=message):
            build_model(patchcore("test_vit"))


def test_arguments(save):
    model, _ = build_model(patchcore(num_neighbors=5), None, num_neighbors=3, visualizer=False, k_shot=4)
    assert model.model.num_neighbors == 5  # the mapping's, not the default
    assert model.visualizer is None  # a default that it has, while it has no k_shot


# ------------------------------------------------------------------------------------------------------------- Mistakes


class Code:
    def __reduce__(self):
        return pytest.fail, ("code of a weight file was run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            state_of("test_efficientnet"),
            r"weights='.*x\.pt' does not fit the backbone test_resnet \(.*Missing key.*\)\.",
        ),
        (
            state_of("test_resnet") | {"layer5.weight": torch.ones(1)},
            r"does not fit .*Unexpected key.*\"layer5\.weight",
        ),
        (state_of("test_resnet") | {"bn1.weight": torch.ones(1)}, r"does not fit .*size mismatch for bn1\.weight"),
        ({"epoch": 1}, r"x\.pt' holds no state dict: a mapping from parameter names to tensors"),
        (torch.ones(3), r"x\.pt' cannot be read .* It must be a state dict"),
        (Code(), r"x\.pt' cannot be read .* without code"),
    ],
)
def test_wrong_files(save, content, message):
    with pytest.raises(ValueError, match=message) as raised:
        build_model(patchcore(), save(content, "x.pt"))
    assert len(str(raised.value)) < 500
    assert "\n" not in str(raised.value)


def test_wrong_file_for_torchvision(save):
    with pytest.raises(ValueError, match=r"does not fit the backbone ResNet18_Weights\.IMAGENET1K_V1 \(.*Missing key"):
        build_model({"class_path": "Cfa", "init_args": {"backbone": "resnet18"}}, save(state_of("test_resnet")))


def test_pickle(tmp_path):
    path = tmp_path / "old.pt"
    path.write_bytes(pickle.dumps(Code(), protocol=2))
    with pytest.raises(ValueError, match=r"old\.pt' cannot be read"):
        build_model(patchcore(), str(path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class_path": "Patchcor"}, r"class_path='Patchcor' is no model\. Choose from .*Patchcore, .*anomalib_mvfa"),
        ({"class_path": "os.system"}, r"class_path='os\.system' is no model"),
        ({"init_args": {}}, r"class_path='None' is no model"),
        (patchcore(bakbone="x"), r"Patchcore has no argument bakbone; it has backbone, layers"),
        (patchcore("test_resnett"), r"backbone='test_resnett' is no model of timm.* nearest names are \['test_resnet'"),
        (
            patchcore(layers=["layer2", "layer9"]),
            r"layers=\['layer2', 'layer9'\] are not .*, which has .*layer1, layer2",
        ),
        (
            patchcore(pre_trained=False),
            r"weights=None was not asked for: Patchcore with .*Take the method out of `weig",
        ),
        ({"class_path": "Ganomaly"}, r"weights=None was not asked for: Ganomaly"),
        ({"class_path": "WinClip"}, r"weights=None cannot be given to WinClip: .*anomalib_mvfa\.WinClipBaseline"),
    ],
)
def test_wrong_models(spec, message):
    with pytest.raises(ValueError, match=message):
        build_model(spec, None)


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights='.*w\.pt': there is no such file\. Give the path of a state"):
        build_model(patchcore(), str(tmp_path / "w.pt"))


def test_a_models_own_error_is_not_called_an_unknown_model(monkeypatch):
    def broken(*args, **kwargs):
        msg = "of the model itself"
        raise AttributeError(msg)

    monkeypatch.setattr("anomalib.models.image.patchcore.lightning_model.PatchcoreModel", broken)
    with pytest.raises(AttributeError, match="of the model itself"):
        build_model(patchcore(), None)


def test_models_that_load_from_elsewhere_exist():
    assert set(list_models(case="pascal")) >= set(weights.ELSEWHERE)


def test_only_models_that_take_a_file_have_an_argument_pretrained():
    names = {
        name
        for name in list_models(case="pascal")
        if "pretrained" in inspect.signature(weights._model_class({"class_path": name})).parameters
    }
    assert names == {"AprilGan", "Clip", "MedClip", "Mvfa"}
