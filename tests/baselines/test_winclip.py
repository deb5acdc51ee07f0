import inspect

import pytest
import torch
from anomalib.models import WinClip, list_models
from torch.nn.functional import cosine_similarity, linear

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


def attention(block, x):
    """Textbook attention of tokens (L, D) to each other."""
    heads = block.attn.num_heads
    projected = linear(x, block.attn.in_proj_weight, block.attn.in_proj_bias)
    q, k, v = (part.unflatten(-1, (heads, -1)).transpose(0, 1) for part in projected.chunk(3, dim=-1))
    shares = (q @ k.transpose(1, 2) * q.shape[-1] ** -0.5).softmax(dim=-1)
    return block.attn.out_proj((shares @ v).transpose(0, 1).flatten(1))


def embed(tower, tokens):
    """Embedding (E,) of the class token among tokens (L, D) that see each other and nothing else."""
    x = tower.ln_pre(tokens)
    for block in tower.transformer.resblocks:
        x = x + attention(block, block.ln_1(x))
        x = x + block.mlp(block.ln_2(x))
    return tower.ln_post(x)[0] @ tower.proj


@torch.no_grad()
def test_windows_by_plain_computation(build):
    model = build().model
    tower, batch = model.clip.visual, images("windows", 2, 240)
    patches = tower.conv1(batch).flatten(2).transpose(1, 2) + tower.positional_embedding[1:]  # (B, 16, D)
    class_token = tower.class_embedding + tower.positional_embedding[0]
    _, windows, _ = model.encode_image(batch)
    for side, found in zip((2, 3), windows, strict=True):
        grid = patches.unflatten(1, (4, 4))
        starts = [(row, column) for row in range(5 - side) for column in range(5 - side)]
        expected = torch.stack([
            torch.stack([
                embed(tower, torch.cat([class_token[None], image[r : r + side, c : c + side].flatten(0, 1)]))
                for r, c in starts
            ])
            for image in grid
        ])  # fmt: skip
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
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
    engine().validate(model, datamodule=data)
    references = model.model.reference_images
    unchanged = [data.support[row] for row in range(len(data.support.samples))]
    batch = data.support.collate_fn([item for item in unchanged if not item.gt_label])
    model.pre_processor.on_test_batch_start(None, model, batch, 0)
    assert references.min() < -1  # normalised
    assert torch.equal(references, batch.image)


def test_references_of_data_without_a_support(build, engine, tmp_path):
    data = BrainPhantom(tmp_path / "phantom", size=32, eval_batch_size=16, num_workers=0)
    model = build(k_shot=3)
    engine().validate(model, datamodule=data)
    again = build(k_shot=3)
    torch.manual_seed(5)
    engine().validate(again, datamodule=data)
    assert model.model.k_shot == 3
    assert torch.equal(model.model.reference_images, again.model.reference_images)


def test_class_name_of_the_data(build, engine, few_shot):
    model = build()
    engine().validate(model, datamodule=few_shot("Chest"))
    assert model.class_name == "Chest X-ray film"  # not the category's name


def test_too_few_references(build, engine, phantom_root):
    data = BMADFewShot(phantom_root, k_shot=1, abnormal_shots=0, num_workers=0)
    message = r"k_shot=2 is too large: the data have 1 normal images to refer to\. Choose at most as many"
    with pytest.raises(ValueError, match=message):
        engine().validate(build(k_shot=2), datamodule=data)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"k_shot": -1}, ValueError, r"k_shot=-1 must be at least 0\."),
        ({"scales": [2, 5]}, ValueError, r"scales=\[2, 5\] must be from 1 to 4: .* sees an image as 4 x 4 patches"),
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
