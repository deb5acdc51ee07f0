import inspect

import numpy as np
import pytest
import torch
from anomalib.models import WinClip, list_models
from torch.nn.functional import cosine_similarity, unfold

import by_hand
from anomalib_mvfa import BMADFewShot, BrainPhantom
from anomalib_mvfa.baselines.winclip import WinClipBaseline
from recipe import WINDOWS, images, write_clip


@pytest.fixture(scope="module")
def small_clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("small_clip"), WINDOWS)


@pytest.fixture
def build(small_clip):
    """Return a function that builds WinCLIP on the small CLIP."""
    arguments = {"backbone": str(small_clip.config), "pretrained": str(small_clip.weights), "visualizer": False}
    return lambda **more: WinClipBaseline(**{**arguments, **more}).eval()


@torch.no_grad()
def test_windows_by_plain_computation(build):
    model, batch = build().model, images("windows", 2, 240)
    w = by_hand.weights_of(model.clip)
    kernel = w["visual.conv1.weight"].flatten(1)
    patches = unfold(batch.double(), 60, stride=60).transpose(1, 2) @ kernel.T  # (B, 16, D)
    first = w["visual.class_embedding"].expand(2, 1, -1)
    tokens = torch.cat([first, patches], dim=1) + w["visual.positional_embedding"]
    grid = torch.arange(1, 17).view(4, 4)
    _, windows, _ = model.encode_image(batch)
    for side, found in zip((2, 3), windows, strict=True):
        for number, corner in enumerate(np.ndindex(5 - side, 5 - side)):
            inside = [0, *grid[corner[0] : corner[0] + side, corner[1] : corner[1] + side].flatten()]
            x = by_hand.layer_norm(tokens[:, inside], w, "visual.ln_pre")  # these tokens see each other alone
            for block in range(2):
                x = by_hand.block(x, w, f"visual.transformer.resblocks.{block}", heads=4)
            expected = by_hand.layer_norm(x[:, 0], w, "visual.ln_post") @ w["visual.proj"]
            torch.testing.assert_close(found[:, number].double(), expected, atol=1e-5, rtol=1e-4)
        assert cosine_similarity(found[0, 0], found[0, 1], dim=0) < 0.999  # windows differ, as they should


def test_references_compared_with_themselves_are_normal(build):
    model = build().model
    references = images("references", 2, 240)
    model.setup("brain", references)
    _, windows, patches = model.encode_image(references)
    assert model._compute_few_shot_scores(patches, windows).abs().max() < 1e-5


@pytest.mark.parametrize("abnormal_shots", [0, None])
def test_references_are_processed_as_scored_images(build, engine, phantom_root, abnormal_shots):
    data = BMADFewShot(phantom_root, k_shot=2, abnormal_shots=abnormal_shots, eval_batch_size=4, num_workers=0)
    model = build(k_shot=2)
    engine(limit_val_batches=1).validate(model, datamodule=data)
    references = model.model.reference_images
    unchanged = [data.support[row] for row in range(len(data.support.samples))]
    batch = data.support.collate_fn([item for item in unchanged if not item.gt_label])
    model.pre_processor.on_test_batch_start(None, model, batch, 0)
    assert references.min() < -1  # normalised
    assert torch.equal(references, batch.image)


def test_references_of_data_without_a_support(build, engine, tmp_path):
    data = BrainPhantom(tmp_path / "phantom", size=32, eval_batch_size=16, num_workers=0)
    model, again = build(k_shot=3), build(k_shot=3)
    for noise, one in enumerate((model, again)):
        torch.manual_seed(noise)
        engine(limit_val_batches=1).validate(one, datamodule=data)
    assert model.model.k_shot == 3
    assert torch.equal(model.model.reference_images, again.model.reference_images)


def test_class_name_of_the_data(build, engine, few_shot):
    model = build()
    engine(limit_val_batches=1).validate(model, datamodule=few_shot("Chest"))
    assert model.class_name == "Chest X-ray film"  # not the category's name


def test_too_few_references(build, engine, phantom_root):
    data = BMADFewShot(phantom_root, k_shot=1, abnormal_shots=0, num_workers=0)
    message = r"k_shot=2 is too large: the data have 1 normal images to refer to\. Choose at most as many"
    with pytest.raises(ValueError, match=message):
        engine().validate(build(k_shot=2), datamodule=data)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scales": [2, 5]}, ValueError, r"scales=\[2, 5\] must be from 1 to 4: .* has 4 x 4 patches"),
        ({"backbone": "ViT-X"}, ValueError, r"backbone='ViT-X' is unknown"),
        ({"pretrained": "absent/w.pt"}, FileNotFoundError, r"pretrained='absent/w\.pt' is neither a file nor a tag"),
    ],
)
def test_mistakes(build, arguments, error, message):
    with pytest.raises(error, match=message):
        build(**arguments)


def test_a_file_is_used_and_null_draws(build, small_clip):
    weight = torch.load(small_clip.weights, weights_only=True)["visual.proj"]
    assert torch.equal(build().model.clip.visual.proj, weight)
    drawn = build(pretrained=None).model.clip.visual.proj
    assert not torch.equal(drawn, weight)
    assert torch.equal(drawn, build(pretrained=None).model.clip.visual.proj)


def test_is_anomalibs_and_takes_no_name_of_it():
    assert issubclass(WinClipBaseline, WinClip)
    assert "WinClipBaseline" not in list_models(case="pascal")  # of models to train by themselves
    defaults = {name: value.default for name, value in inspect.signature(WinClipBaseline).parameters.items()}
    assert (defaults["backbone"], defaults["pretrained"]) == ("ViT-B-16-plus-240", "laion400m_e31")
