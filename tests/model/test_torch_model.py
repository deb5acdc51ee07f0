"""The model against formulas by hand: each option changes what it says, and nothing else.

Axes: B images, N support views, L tokens, P patches, E joint width, H = W image size, l level.
"""

import pytest
import torch
from anomalib.data import InferenceBatch

import by_hand
from anomalib_mvfa.model.calibration import fill_bank, set_ranges
from anomalib_mvfa.model.fusion import Weights
from anomalib_mvfa.model.level_maps import level_maps
from anomalib_mvfa.model.losses import MvfaLoss
from anomalib_mvfa.model.prompts import Prompts
from anomalib_mvfa.model.torch_model import Scoring, TrainingOutput
from recipe import TINY, images

SIZE = TINY.image_size
IMAGES = images("model", 3, SIZE)
MASKS = (images("masks", 3, SIZE)[:, 0] > 0.6).float()
LABELS = torch.tensor([0, 1, 1])
FEW_ONLY, ZERO_ONLY, BOTH, UNEQUAL = Weights(0.0, 1.0), Weights(1.0, 0.0), Weights(0.5, 0.5), Weights(1.0, 3.0)


def difference(found, expected) -> float:
    """Largest difference, relative to the largest expected value."""
    pairs = zip(found, expected, strict=True)
    return max(float((one - other).abs().max() / other.abs().max()) for one, other in pairs)


# ---------------------------------------------------------------------- tokens


@pytest.mark.parametrize(
    ("options", "formula"),
    [
        ({}, {}),
        ({"residual_ratio": 0.3}, {"ratio": 0.3}),
        ({"residual": "single"}, {"residual": "single"}),
        ({"adaptation": "projector"}, {"adaptation": "projector"}),
        ({"quick_gelu": True}, {"activation": by_hand.quick_gelu}),
        ({"normalize": True}, {"normalize": True}),
    ],
    ids=["default", "ratio", "single", "projector", "quick_gelu", "normalize"],
)
@torch.no_grad()
@pytest.mark.parametrize("levels", [[1, 2, 3, 4], [1, 3]], ids=["all", "some"])
def test_tokens(build, options, formula, levels):
    model = build(levels=levels, **options)
    found = model.tokens(IMAGES)
    for branch, expected in zip(found, by_hand.tokens(model, IMAGES, **formula), strict=True):
        assert len(branch) == len(model.seg_adapters) == len(levels)
        assert difference(branch, expected) < 1e-5
    if options:  # which change something
        assert difference(found.seg[1:], build(levels=levels).tokens(IMAGES).seg[1:]) > 1e-3


@torch.no_grad()
@pytest.mark.parametrize("run", ["tokens", "frozen_tokens"])
def test_blocks_behind_the_last_level_are_not_run(build, monkeypatch, run):
    model = build(levels=[1, 2])
    ran = []
    block = model.backbone.block
    monkeypatch.setattr(model.backbone, "block", lambda index, x: ran.append(index) or block(index, x))
    getattr(model, run)(IMAGES)
    assert ran == [0, 1]


@torch.no_grad()
def test_frozen_tokens_are_the_stream_without_adapters(build):
    model, projectors = build(levels=[1, 3]), build(levels=[1, 3], adaptation="projector")
    frozen = model.frozen_tokens(IMAGES)
    features = by_hand.tokens(projectors, IMAGES, adaptation="projector")[0]
    for position, (x, expected) in enumerate(zip(frozen, features, strict=True)):
        assert x.shape == (3, 17, TINY.config["vision_cfg"]["width"])
        assert difference([projectors.seg_adapters[position](x)], [expected]) < 1e-5


@torch.no_grad()
def test_overshoots_of_the_resize_are_clamped(build):
    model = build()
    image = IMAGES.clone()
    image[:, :, :20] = 1.2
    image[:, :, -20:] = -0.2
    assert torch.equal(model.tokens(image).det[-1], model.tokens(image.clamp(0, 1)).det[-1])
    assert difference(model.tokens(image).det, by_hand.tokens(model, image)[1]) < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("size", [57, 69])
def test_size_that_is_no_multiple_of_a_patch(build, size):
    model = build(image_size=size)
    image = images("odd", 2, size)
    assert model.backbone.grid == 4
    assert difference(model.tokens(image).seg, by_hand.tokens(model, image)[0]) < 1e-5
    model.scoring = Scoring(weights=ZERO_ONLY, normalised=False)
    assert model(image).anomaly_map.shape == (2, size, size)


def test_an_abnormal_patch_shows_where_it_is(build):
    """With blocks that do nothing and one abnormal patch, the map peaks there: rows are rows, columns columns."""
    model = build(levels=[4])
    clip = model.backbone.clip
    with torch.no_grad():
        for block in clip.visual.transformer.resblocks:
            for layer in (block.attn.out_proj, block.mlp.c_proj):
                layer.weight.zero_()
                layer.bias.zero_()
        clip.visual.positional_embedding.zero_()
        tissue, lesion = images("tissue", 1, 14), images("lesion", 1, 14)
        image = tissue.repeat(1, 1, 4, 4)
        image[:, :, 14:28, 28:42] = lesion  # second row, third column of patches
        tokens = model.tokens(image).seg[0][0]
        model.text_features.copy_(torch.nn.functional.normalize(tokens[[1, 1 + 1 * 4 + 2]], dim=1).T)
        model.scoring = Scoring(weights=ZERO_ONLY, normalised=False)
        heat = model(image).anomaly_map[0]
    spot = (heat > 0.5).nonzero().double()
    # Corners are aligned: patch i of G lies at pixel i (H - 1) / (G - 1).
    assert spot.mean(dim=0).tolist() == pytest.approx([1 * (SIZE - 1) / 3, 2 * (SIZE - 1) / 3], abs=0.5)
    assert 100 < len(spot) < 400


@pytest.mark.parametrize(("height", "width"), [(SIZE, SIZE + 14), (SIZE + 14, SIZE)])
def test_image_of_another_size_is_refused(build, height, width):
    with pytest.raises(ValueError, match=f"Images of {height}x{width} pixels .* image_size={SIZE}.* resize"):
        build()(torch.zeros(1, 3, height, width))


@pytest.mark.parametrize("name", ["train_levels", "score_levels"])
@pytest.mark.parametrize("chosen", [[], [1], [2, 5]])
def test_chosen_levels_must_be_levels(build, name, chosen):
    with pytest.raises(ValueError, match=rf"{name}=\[.*\] must name some of the levels \[2, 4\]"):
        build(levels=[2, 4], **{name: chosen})


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize(("pooling", "upsample"), [("mean", "logits"), ("max", "probabilities")])
def test_training_output(build, text, pooling, upsample):
    model = build(pooling=pooling, upsample=upsample).train()
    output = model(IMAGES)
    assert isinstance(output, TrainingOutput)
    seg, det = by_hand.tokens(model, IMAGES)
    for found, feature in zip(output.seg_maps, seg, strict=True):
        logits = by_hand.logits(feature, text)
        maps = {order: by_hand.seg_map(logits, SIZE, order) for order in ("logits", "probabilities")}
        assert (found[:, 1] - maps[upsample]).abs().max() < 1e-4
        assert (found.sum(dim=1) - 1).abs().max() < 1e-6
        assert (maps["logits"] - maps["probabilities"]).abs().max() > 1e-3
    for found, feature in zip(output.det_scores, det, strict=True):
        probability = by_hand.det_probability(feature, text)
        expected = probability.mean(dim=1) if pooling == "mean" else probability.max(dim=1).values
        assert (found - expected).abs().max() < 1e-4
    swapped = model(IMAGES, text_features=text.flip(1)).det_scores  # those of the call come first
    if pooling == "mean":
        assert all(torch.allclose(one, 1 - own, atol=1e-5) for one, own in zip(swapped, output.det_scores, strict=True))


def test_single_level_training(build, text):
    model = build(train_levels=[3]).train()
    seg_maps, det_scores = model(IMAGES)
    assert len(seg_maps) == len(det_scores) == 1
    seg, det = by_hand.tokens(model, IMAGES)
    assert (seg_maps[0][:, 1] - by_hand.seg_map(by_hand.logits(seg[2], text), SIZE)).abs().max() < 1e-4
    assert (det_scores[0] - by_hand.det_probability(det[2], text).mean(dim=1)).abs().max() < 1e-4


@pytest.mark.parametrize(("train_levels", "trained"), [(None, 7), ([2, 3], 3), ([1], 1)])
def test_every_weight_that_learns_gets_a_gradient(build, train_levels, trained):
    model = build(train_levels=train_levels).train()
    MvfaLoss()(*model(IMAGES), MASKS, LABELS).backward()
    for adapters in (model.seg_adapters, model.det_adapters):
        learning = [p for p in adapters.parameters() if p.requires_grad]
        assert len(learning) == trained
        assert all(p.grad is not None and p.grad.any() for p in learning)
        assert all(p.grad is None for p in adapters.parameters() if not p.requires_grad)
    assert all(p.grad is None and not p.requires_grad for p in model.backbone.parameters())


def test_batches_without_masks_leave_seg_alone(build):
    """Not a bit of the seg adapters moves, momentum or not, and the det gradients are those of the whole stream."""
    model = build().train()
    groups = [[p for p in a.parameters() if p.requires_grad] for a in (model.seg_adapters, model.det_adapters)]
    adam = torch.optim.Adam([{"params": group} for group in groups], lr=1e-2, betas=(0.5, 0.999))
    MvfaLoss()(*model(IMAGES), MASKS, LABELS).backward()
    adam.step()  # from here on there is momentum

    adam.zero_grad()
    MvfaLoss()([], model(IMAGES).det_scores, None, LABELS).backward()
    through_seg = [p.grad.clone() for p in groups[1]]
    assert any(p.grad is not None and p.grad.any() for p in groups[0]), "seg acts on the det loss"

    adam.zero_grad()
    seg = [p.detach().clone() for p in groups[0]]
    det = [p.detach().clone() for p in groups[1]]
    output = model(IMAGES, with_seg=False)
    assert output.seg_maps == []
    MvfaLoss()(*output, None, LABELS).backward()
    assert all(p.grad is None for p in groups[0])
    assert all(p.requires_grad for p in groups[0])
    for parameter, gradient in zip(groups[1], through_seg, strict=True):
        assert torch.allclose(parameter.grad, gradient, rtol=1e-5, atol=1e-9)
    adam.step()
    assert all(torch.equal(p, old) for p, old in zip(groups[0], seg, strict=True))
    assert not any(torch.equal(p, old) for p, old in zip(groups[1], det, strict=True))


# ---------------------------------------------------------------------- prompts


def test_states_are_encoded_by_the_formula(build):
    normal, abnormal = ["{}", "flawless {}"], ["broken {}", "{} with a flaw", "damaged {}"]
    templates = ["a photo of a {}.", "there is the {} in the scene."]
    model = build(prompts=Prompts(normal, abnormal, templates))
    found = model.encode_states("liver")

    weights = by_hand.weights_of(model.backbone.clip)
    for column, states in enumerate((normal, abnormal)):
        prompts = [template.replace("{}", state.replace("{}", "liver")) for state in states for template in templates]
        embedding = by_hand.text_embedding(model.backbone.tokenizer(prompts), weights, 2)
        assert (found[:, column] - by_hand.unit(embedding.mean(dim=0))).abs().max() < 1e-6


# ---------------------------------------------------------------------- scores


SCORES = ("map_max", "det_mean", "det_max")


@pytest.mark.parametrize(
    ("map_branch", "image_score"), [("seg", "map_max"), ("det", "map_max"), ("seg", "det_mean"), ("det", "det_max")]
)
@pytest.mark.parametrize(
    ("options", "weights"),
    [
        ({}, ZERO_ONLY),
        ({}, FEW_ONLY),
        ({}, UNEQUAL),
        ({"score_levels": [2, 4]}, UNEQUAL),
        ({"upsample": "probabilities"}, UNEQUAL),
        ({"pooling": "max"}, UNEQUAL),  # of the loss: scores stay as they are
    ],
    ids=["zero", "few", "both", "score_levels", "upsample", "pooling"],
)
def test_scores(build, views, text, options, weights, map_branch, image_score):
    """The whole of scoring, without ranges: by the paper's Eq. 6."""
    model = build(**options)
    model.scoring = Scoring(map_branch, image_score, weights, normalised=False)
    if weights.few:
        fill_bank(model, views())
    with torch.no_grad():
        found = model(IMAGES)
    assert isinstance(found, InferenceBatch)

    scored = [1, 3] if "score_levels" in options else [0, 1, 2, 3]
    stored = torch.cat([batch.image for batch in views(abnormal=False)])
    query, bank = by_hand.tokens(model, IMAGES), by_hand.tokens(model, stored)
    query, bank = ([[branch[level] for level in scored] for branch in both] for both in (query, bank))
    branch, upsample = {"seg": 0, "det": 1}[map_branch], options.get("upsample", "logits")
    maps = [by_hand.seg_map(by_hand.logits(feature, text), SIZE, upsample) for feature in query[branch]]
    zero, few = sum(maps) / len(maps), by_hand.few_map(query[branch], bank[branch], SIZE)
    expected = by_hand.fused(zero, few, weights, None)
    assert (found.anomaly_map - expected).abs().max() < 2e-5

    if image_score == "map_max":
        score = expected.flatten(1).max(dim=1).values
    else:
        pool = (lambda x: x.mean(dim=1)) if image_score == "det_mean" else (lambda x: x.max(dim=1).values)
        zero = sum(pool(by_hand.det_probability(feature, text)) for feature in query[1]) / len(scored)
        score = by_hand.fused(zero, pool(by_hand.few_map(query[1], bank[1], SIZE).flatten(1)), weights, None)
    assert found.pred_score.shape == (len(IMAGES),)
    assert (found.pred_score - score).abs().max() < 2e-5


@pytest.mark.parametrize("weights", [ZERO_ONLY, FEW_ONLY, UNEQUAL], ids=["zero", "few", "both"])
@pytest.mark.parametrize("map_branch", ["seg", "det"])
def test_level_maps(build, views, text, weights, map_branch):
    """Those of the scored levels, each by itself, brought to one scale by the ranges of all."""
    model = build(score_levels=[1, 2, 4])
    model.scoring = Scoring(map_branch, "map_max", weights)
    set_ranges(model, fill_bank(model, views()))
    found = level_maps(model, IMAGES)
    assert found.shape == (3, 3, SIZE, SIZE)

    branch, ranges = {"seg": 0, "det": 1}[map_branch], model.ranges[0].double()
    stored = torch.cat([batch.image for batch in views(abnormal=False)])
    query, bank = by_hand.tokens(model, IMAGES), by_hand.tokens(model, stored)
    for row, level in enumerate([0, 1, 3]):
        zero = by_hand.seg_map(by_hand.logits(query[branch][level], text), SIZE)
        few = by_hand.few_map([query[branch][level]], [bank[branch][level]], SIZE)
        for image, y, x in ((0, 0, 0), (1, 17, 40), (2, 55, 3)):
            pair = float(zero[image, y, x]), float(few[image, y, x])
            expected = by_hand.fused(*pair, weights, ranges.tolist())
            assert found[image, row, y, x].item() == pytest.approx(expected, abs=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("image_score", SCORES)
def test_one_image_scores_as_in_a_batch(build, views, image_score):
    model = build()
    model.scoring = Scoring("seg", image_score, BOTH)
    set_ranges(model, fill_bank(model, views()))
    together = model(IMAGES)
    for row in range(len(IMAGES)):
        alone = model(IMAGES[row : row + 1])
        assert torch.allclose(alone.pred_score[0], together.pred_score[row], atol=1e-6)
        assert torch.allclose(alone.anomaly_map[0], together.anomaly_map[row], atol=1e-6)


def test_compiled_model_equals_eager_at_any_batch_without_recompiling(build, views, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "__init__", torch.nn.Module.__init__)  # which compiling replaces for good
    model = build(levels=[1, 2])
    set_ranges(model, fill_bank(model, views(abnormal=False)))
    # The graphs are what is compared; generating code for them would take a minute.
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for batch in (1, 3, 8):
        image = torch.rand(batch, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(batch))
        torch._dynamo.decorators.mark_unbacked(image, 0)
        with torch.no_grad(), torch.compiler.set_stance("default" if batch == 1 else "fail_on_recompile"):
            result = compiled(image)
        expected = model(image)
        torch.testing.assert_close(result.anomaly_map, expected.anomaly_map, atol=1e-5, rtol=0)
        torch.testing.assert_close(result.pred_score, expected.pred_score, atol=1e-5, rtol=0)
