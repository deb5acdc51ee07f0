"""Models of a comparison, and where the weights of their backbones come from."""

import inspect
import pickle

import anomalib.models
import pytest
import timm
import torch
from anomalib.models import list_models
from safetensors.torch import save_file

from anomalib_mvfa.compare.config import MODEL_DEFAULT
from anomalib_mvfa.compare.models import Origin, build_model, find_model

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


def assert_taken(network, state):
    """Assert that a network's tensors, but for a classifier, are those of a state dict, by name."""
    taken = {name: value for name, value in network.state_dict().items() if name in state and "head" not in name}
    assert len(taken) > len(network.state_dict()) / 2
    assert all(torch.equal(value, state[name]) for name, value in taken.items())


@pytest.mark.parametrize("backbone", LAYERS)
def test_file_reaches_timm(save, backbone):
    state = state_of(backbone)
    model, origin = build_model(patchcore(backbone), save(state), visualizer=False)
    assert origin == Origin("weights.pt", False)
    assert_taken(model.model.feature_extractor.feature_extractor, state)


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


def test_file_reaches_an_argument(mini_clip):
    spec = {"class_path": "Mvfa", "init_args": {"backbone": str(mini_clip.config), "pretrained": None}}
    model, origin = build_model(spec, str(mini_clip.weights), visualizer=False, image_size=70)
    assert origin == Origin("clip.pt", False)
    weight = torch.load(mini_clip.weights, weights_only=True)["visual.conv1.weight"]
    assert torch.equal(model.model.backbone.clip.visual.conv1.weight, weight)


@pytest.mark.parametrize("spec", [patchcore(), patchcore("test_vit")])
def test_random_weights_are_the_same_for_every_seed(spec):
    states = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        model, origin = build_model(spec, None)
        states.append(model.model.feature_extractor.feature_extractor.state_dict())
        assert origin == RANDOM
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())


def test_where_weights_come_from_is_named(tiny_config, mini_clip, monkeypatch):
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

    create_model = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained=False, **rest: create_model(name, **rest))
    assert build_model(patchcore("resnet18"))[1] == Origin("resnet18.a1_in1k", False)  # as if it were downloaded


def test_arguments_and_components(save):
    processor = {"class_path": "anomalib.post_processing.PostProcessor", "init_args": {"enable_normalization": False}}
    spec = patchcore(num_neighbors=5, post_processor=processor)
    model, _ = build_model(spec, None, num_neighbors=3, visualizer=False, k_shot=4)
    assert model.model.num_neighbors == 5  # the mapping's, not the default
    assert model.visualizer is None  # a default that it has, while it has no k_shot
    assert model.post_processor.enable_normalization is False  # built as `anomalib train` builds it


OWN = """
from anomalib.models import Patchcore

class Own(Patchcore):
    def __init__(self, gain: float = 1.0) -> None:
        super().__init__(backbone="test_resnet", layers=["layer2"], pre_trained=False)
        self.gain = gain
"""


def test_a_model_of_ones_own_is_found_where_the_command_is_run(tmp_path, monkeypatch):
    (tmp_path / "own_patchcore.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    model, origin = build_model({"class_path": "own_patchcore.Own", "init_args": {"gain": 2}})
    assert (type(model).__name__, model.gain, origin) == ("Own", 2, Origin(None, False))
    with pytest.raises(ValueError, match=r"class_path='own_patchcroe\.Own': own_patchcroe cannot be imported"):
        build_model({"class_path": "own_patchcroe.Own"})


class Code:
    def __reduce__(self):
        return pytest.fail, ("code of a weight file was run",)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (state_of("test_efficientnet"), r"weights '.*x\.pt' do not fit the backbone test_resnet \(.*Error"),
        (state_of("test_resnet") | {"layer5.weight": torch.ones(1)}, r"do not fit the backbone"),
        (state_of("test_resnet") | {"bn1.weight": torch.ones(1)}, r"do not fit the backbone"),
        ({"epoch": 1}, r"x\.pt' holds no state dict: a mapping from parameter names to tensors"),
        (torch.ones(3), r"x\.pt' holds no state dict"),
        (Code(), r"x\.pt' cannot be read"),
    ],
)
def test_wrong_files(save, content, message):
    with pytest.raises(ValueError, match=message) as raised:
        build_model(patchcore(), save(content, "x.pt"))
    assert len(str(raised.value)) < 600
    assert "\n" not in str(raised.value)


def test_pickle(tmp_path):
    path = tmp_path / "old.pt"
    path.write_bytes(pickle.dumps(Code(), protocol=2))
    with pytest.raises(ValueError, match=r"old\.pt' cannot be read"):
        build_model(patchcore(), str(path))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"class_path": "Patchcor"}, r"class_path='Patchcor' is no model\. Choose from .*Mvfa, .*Patchcore, "),
        ({"class_path": "os.system"}, r"class_path='os\.system' is no model"),
        ({"init_args": {}}, r"class_path='None' is no model"),
        (patchcore(bakbone="x"), r"Patchcore has no argument bakbone; it has backbone, layers"),
        (patchcore(num_neighbors="x"), r"do not suit Patchcore \(.*num_neighbors"),
        (
            patchcore(layers=["layer2", "layer9"]),
            r"layers=\['layer2', 'layer9'\] are not .*, which has .*layer1, layer2",
        ),
        (patchcore(pre_trained=False), r"weights=None cannot be given to Patchcore.*`pre_trained: false` out of"),
        *(
            ({"class_path": name}, rf"weights=None cannot be given to {name}.*Take the method out of `weights`")
            for name in ("Ganomaly", "WinClip", "AnomalyDINO", "Fastflow")
        ),
    ],
)
def test_wrong_models(spec, message):
    with pytest.raises(ValueError, match=message):
        build_model(spec, None)


def test_absent_file(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"weights='.*w\.pt': there is no such file\. Give the path of a state"):
        build_model(patchcore(), str(tmp_path / "w.pt"))


def test_a_models_own_error_stays_its_own(monkeypatch):
    def broken(*args, **kwargs):
        msg = "of the model itself"
        raise AttributeError(msg)

    monkeypatch.setattr("anomalib.models.image.patchcore.lightning_model.PatchcoreModel", broken)
    with pytest.raises(AttributeError, match="of the model itself"):
        build_model(patchcore(), None)


def test_only_models_that_take_a_file_have_an_argument_pretrained():
    names = {
        name
        for name in list_models(case="pascal")
        if hasattr(anomalib.models, name)  # other tests define models of their own
        and "pretrained" in inspect.signature(find_model(name)).parameters
    }
    assert names == {"AprilGan", "Clip", "MedClip", "Mvfa", "MvfaPlus"}
