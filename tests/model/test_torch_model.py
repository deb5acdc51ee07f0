"""The model against formulas by hand: each option changes what it says, and nothing else.

Axes: B images, N support views, L tokens, P patches, E joint width, H = W image size, l level.
"""

import logging

import pytest
import torch
from anomalib.data import InferenceBatch

import by_hand
from anomalib_mvfa.compare.level_maps import level_maps
from anomalib_mvfa.model.build import build_mvfa
from anomalib_mvfa.model.calibration import SupportBatch, fill_bank, set_ranges
from anomalib_mvfa.model.fusion import Weights
from anomalib_mvfa.model.losses import MvfaLoss
from anomalib_mvfa.model.prompts import Prompts
from anomalib_mvfa.model.torch_model import MvfaModel, Scoring, TrainingOutput
from recipe import TINY, images

SIZE = TINY.image_size
IMAGES = images("model", 3, SIZE)
MASKS = (images("masks", 3, SIZE)[:, 0] > 0.6).float()
LABELS = torch.tensor([0, 1, 1])
FEW_ONLY, ZERO_ONLY, BOTH, UNEQUAL = Weights(0.0, 1.0), Weights(1.0, 0.0), Weights(0.5, 0.5), Weights(1.0, 3.0)


@pytest.fixture(scope="module")
def text():
    """Unit text features that stand apart."""
    features = torch.randn(TINY.config["embed_dim"], 2, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(features, dim=0)


@pytest.fixture
def build(tiny_config, text):
    """Build a model in eval mode with options of choice."""

    def _build(**options) -> MvfaModel:
        model = build_mvfa(str(tiny_config), None, **{"image_size": SIZE, **options}).eval()
        model.text_features.copy_(text)
        return model

    return _build


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
def test_tokens(build, options, formula):
    model = build(**options)
    found = model.tokens(IMAGES)
    for branch, expected in zip(found, by_hand.tokens(model, IMAGES, **formula), strict=True):
        assert len(branch) == 4
        assert difference(branch, expected) < 1e-5
    if options:
        assert difference(found.seg[1:], build().tokens(IMAGES).seg[1:]) > 1e-3, "the option changes nothing"


@torch.no_grad()
def test_levels_in_between(build):
    model = build(levels=[1, 3])
    assert len(model.seg_adapters) == len(model.det_adapters) == 2
    for branch, expected in zip(model.tokens(IMAGES), by_hand.tokens(model, IMAGES), strict=True):
        assert difference(branch, expected) < 1e-5


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
@pytest.mark.parametrize("size", [57, 62, 69])
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


@pytest.mark.parametrize("shape", [(3, SIZE, SIZE + 14), (3, SIZE + 14, SIZE), (3, 240, 240)])
def test_image_of_another_size_is_refused(build, shape):
    with pytest.raises(ValueError, match=f"Images of {shape[1]}x{shape[2]} pixels .* image_size={SIZE}.* resize"):
        build()(torch.zeros(1, *shape))


# ---------------------------------------------------------------------- arguments


@pytest.mark.parametrize(("depth", "quarters"), [(4, [1, 2, 3, 4]), (2, [1, 2]), (1, [1])])
def test_levels_are_quarter_points_by_default(tmp_path, depth, quarters):
    from recipe import write_config

    vision = {**TINY.config["vision_cfg"], "layers": depth}
    config = write_config(tmp_path / "clip.json", TINY._replace(config={**TINY.config, "vision_cfg": vision}))
    assert build_mvfa(str(config), None, SIZE).levels == quarters


@pytest.mark.parametrize("levels", [[], [2, 1], [1, 1], [0, 1], [1, 5]])
def test_levels_must_be_blocks_in_order(build, levels):
    with pytest.raises(ValueError, match=r"levels=\[.*\] must be increasing block numbers between 1 and 4"):
        build(levels=levels)


@pytest.mark.parametrize("name", ["train_levels", "score_levels"])
@pytest.mark.parametrize("chosen", [[], [1], [2, 5]])
def test_chosen_levels_must_be_levels(build, name, chosen):
    with pytest.raises(ValueError, match=rf"{name}=\[.*\] must name some of the levels \[2, 4\]"):
        build(levels=[2, 4], **{name: chosen})


@pytest.mark.parametrize(
    ("name", "choices"),
    [
        ("adaptation", "adapter, projector"),
        ("residual", "pair, single"),
        ("pooling", "mean, max"),
        ("upsample", "logits, probabilities"),
    ],
)
def test_unknown_choice_is_refused(build, name, choices):
    with pytest.raises(ValueError, match=f"{name}='both' is unknown; choose one of: {choices}"):
        build(**{name: "both"})


def test_adapters_start_from_the_seed_as_linear_layers_do(build):
    torch.manual_seed(5)  # the global generator has no say
    one, same, other = build(), build(), build(seed=1)
    for branch in ("seg_adapters", "det_adapters"):
        for (name, weight), twin, stranger in zip(
            getattr(one, branch).named_parameters(),
            getattr(same, branch).parameters(),
            getattr(other, branch).parameters(),
            strict=True,
        ):
            assert torch.equal(weight, twin)
            assert not torch.equal(weight, stranger)
            bound = weight.shape[1] ** -0.5  # uniform in [-bound, bound]
            assert 0.97 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / 3**0.5, rel=0.05)
    assert not torch.equal(one.seg_adapters[0].fc1[0].weight, one.det_adapters[0].fc1[0].weight)


# ---------------------------------------------------------------------- training


@pytest.mark.parametrize("pooling", ["mean", "max"])
@pytest.mark.parametrize("upsample", ["logits", "probabilities"])
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


def test_text_features_of_the_call_come_first(build, text):
    model = build().train()
    swapped = model(IMAGES, text_features=text.flip(1)).det_scores
    for found, own in zip(swapped, model(IMAGES).det_scores, strict=True):
        assert torch.allclose(found, 1 - own, atol=1e-5)


def test_single_level_training(build, text):
    """That level has a loss and learns; the others stay as they are, and in the stream."""
    model = build(train_levels=[3]).train()
    seg_maps, det_scores = output = model(IMAGES)
    assert len(output.seg_maps) == len(output.det_scores) == 1
    seg, det = by_hand.tokens(model, IMAGES)
    assert (seg_maps[0][:, 1] - by_hand.seg_map(by_hand.logits(seg[2], text), SIZE)).abs().max() < 1e-4
    assert (det_scores[0] - by_hand.det_probability(det[2], text).mean(dim=1)).abs().max() < 1e-4

    MvfaLoss()(*output, MASKS, LABELS).backward()
    learning = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
    assert learning == ["seg_adapters.2.fc1.0.weight", "det_adapters.2.fc1.0.weight"]


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


def test_backbone_stays_in_eval_mode(build):
    model = build().train()
    assert model.training
    assert not any(module.training for module in model.backbone.modules())
    assert all(module.training for module in model.seg_adapters.modules())


# ---------------------------------------------------------------------- texts


@pytest.mark.parametrize("quick", [False, True])
def test_states_are_encoded_by_the_formula(build, quick):
    normal, abnormal = ["{}", "flawless {}"], ["broken {}", "{} with a flaw", "damaged {}"]
    templates = ["a photo of a {}.", "there is the {} in the scene."]
    model = build(quick_gelu=quick, prompts=Prompts(normal, abnormal, templates))
    found = model.encode_states("liver")

    weights = by_hand.weights_of(model.backbone.clip)
    for column, states in enumerate((normal, abnormal)):
        prompts = [template.replace("{}", state.replace("{}", "liver")) for state in states for template in templates]
        activation = by_hand.quick_gelu if quick else by_hand.gelu
        embedding = by_hand.text_embedding(model.backbone.tokenizer(prompts), weights, 2, activation)
        assert (found[:, column] - by_hand.unit(embedding.mean(dim=0))).abs().max() < 1e-6
        wrong = by_hand.quick_gelu if not quick else by_hand.gelu
        other = by_hand.text_embedding(model.backbone.tokenizer(prompts), weights, 2, wrong)
        assert (by_hand.unit(other.mean(dim=0)) - found[:, column]).abs().max() > 1e-5


# ---------------------------------------------------------------------- scores


def views(normal: torch.Tensor, abnormal: torch.Tensor | None = None, per_image: int = 2) -> list[SupportBatch]:
    """Batches of one view of every image: the images, then their mirror images."""
    image = normal if abnormal is None else torch.cat([normal, abnormal])
    label = torch.tensor([0] * len(normal) + [1] * (len(image) - len(normal)))
    source = [f"{row}.png" for row in range(len(image))]
    return [SupportBatch(image.flip(-1) if index else image, label, source) for index in range(per_image)]


NORMAL, ABNORMAL = images("bank/normal", 2, SIZE), images("bank/abnormal", 2, SIZE)
SCORES = ("map_max", "det_mean", "det_max")


@pytest.mark.parametrize("image_score", SCORES)
@pytest.mark.parametrize("map_branch", ["seg", "det"])
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
def test_scores(build, text, options, weights, map_branch, image_score):
    """The whole of scoring, without ranges: by the paper's Eq. 6."""
    model = build(**options)
    model.scoring = Scoring(map_branch, image_score, weights, normalised=False)
    if weights.few:
        fill_bank(model, views(NORMAL, ABNORMAL))
    with torch.no_grad():
        found = model(IMAGES)
    assert isinstance(found, InferenceBatch)

    scored = [1, 3] if "score_levels" in options else [0, 1, 2, 3]
    query, bank = by_hand.tokens(model, IMAGES), by_hand.tokens(model, torch.cat([NORMAL, NORMAL.flip(-1)]))
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
def test_level_maps(build, text, weights, map_branch):
    """Those of the scored levels, each by itself, brought to one scale by the ranges of all."""
    model = build(score_levels=[1, 2, 4])
    model.scoring = Scoring(map_branch, "map_max", weights)
    set_ranges(model, fill_bank(model, views(NORMAL, ABNORMAL)))
    found = level_maps(model, IMAGES)
    assert found.shape == (3, 3, SIZE, SIZE)

    branch, ranges = {"seg": 0, "det": 1}[map_branch], model.ranges[0].double()
    query, bank = by_hand.tokens(model, IMAGES), by_hand.tokens(model, torch.cat([NORMAL, NORMAL.flip(-1)]))
    for row, level in enumerate([0, 1, 3]):
        zero = by_hand.seg_map(by_hand.logits(query[branch][level], text), SIZE)
        few = by_hand.few_map([query[branch][level]], [bank[branch][level]], SIZE)
        for image, y, x in ((0, 0, 0), (1, 17, 40), (2, 55, 3)):
            pair = float(zero[image, y, x]), float(few[image, y, x])
            expected = by_hand.fused(*pair, weights, ranges.tolist())
            assert found[image, row, y, x].item() == pytest.approx(expected, abs=1e-4)


def test_the_map_of_one_level_is_the_map(build):
    model = build(score_levels=[3])
    set_ranges(model, fill_bank(model, views(NORMAL, ABNORMAL)))
    with torch.no_grad():
        assert torch.equal(level_maps(model, IMAGES)[:, 0], model(IMAGES).anomaly_map)


def test_image_scores_are_three_different_things(build):
    model, found = build(), []
    for image_score in SCORES:
        model.scoring = Scoring("seg", image_score, BOTH, normalised=False)
        fill_bank(model, views(NORMAL))
        with torch.no_grad():
            found.append(model(IMAGES).pred_score)
    assert all((found[one] - found[other]).abs().min() > 1e-3 for one, other in ((0, 1), (0, 2), (1, 2)))


@torch.no_grad()
@pytest.mark.parametrize("image_score", SCORES)
def test_one_image_scores_as_in_a_batch(build, image_score):
    model = build()
    model.scoring = Scoring("seg", image_score, BOTH)
    set_ranges(model, fill_bank(model, views(NORMAL, ABNORMAL)))
    together = model(IMAGES)
    for row in range(len(IMAGES)):
        alone = model(IMAGES[row : row + 1])
        assert torch.allclose(alone.pred_score[0], together.pred_score[row], atol=1e-6)
        assert torch.allclose(alone.anomaly_map[0], together.anomaly_map[row], atol=1e-6)


# ---------------------------------------------------------------------- bank and ranges


@pytest.fixture
def support(build):
    """A model that scores by all it has, and hand-made features of its support views, as (branch, view, level)."""
    model = build()
    model.scoring = Scoring("seg", "det_mean", BOTH)
    both = torch.cat([NORMAL, ABNORMAL])
    return model, [by_hand.tokens(model, image) for image in (both, both.flip(-1))]


def test_own_views_are_left_out(support, text):
    """A normal support image is compared with the other's views, an abnormal one with all normal ones."""
    model, ((seg, det), (seg_flipped, det_flipped)) = support
    scores = fill_bank(model, views(NORMAL, ABNORMAL))
    assert len(scores) == 4
    for image, others in enumerate([[1], [0], [0, 1], [0, 1]]):
        one = slice(image, image + 1)
        rows = [torch.cat([a[others], b[others]]) for a, b in zip(seg, seg_flipped, strict=True)]
        expected = sum(by_hand.distances(a[one], b) for a, b in zip(seg, rows, strict=True)) / 4
        assert (scores[image].distance - expected).abs().max() < 1e-6
        rows = [torch.cat([a[others], b[others]]) for a, b in zip(det, det_flipped, strict=True)]
        few = by_hand.few_map([a[one] for a in det], rows, SIZE).mean()
        assert scores[image].few.item() == pytest.approx(few.item(), abs=1e-6)
        zero = sum(by_hand.det_probability(a[one], text).mean() for a in det) / 4
        assert scores[image].zero.item() == pytest.approx(zero.item(), abs=1e-5)
    assert scores[0].distance.min() > 1e-4, "an image found itself"


def test_one_normal_image_is_compared_with_its_other_views(support, caplog):
    model, ((seg, _), (flipped, _)) = support
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        scores = fill_bank(model, views(NORMAL[:1], ABNORMAL[:1]))
    assert "One normal support image" in caplog.text
    own = sum(by_hand.distances(a[:1], b[:1]) for a, b in zip(seg, flipped, strict=True)) / 4
    assert (scores[0].distance - own).abs().max() < 1e-6
    rows = [torch.cat([a[:1], b[:1]]) for a, b in zip(seg, flipped, strict=True)]
    abnormal = sum(by_hand.distances(a[2:3], b) for a, b in zip(seg, rows, strict=True)) / 4
    assert (scores[1].distance - abnormal).abs().max() < 1e-6


def test_two_normal_images_draw_no_warning(support, caplog):
    model, _ = support
    with caplog.at_level(logging.WARNING, logger="anomalib.mvfa"):
        fill_bank(model, views(NORMAL, ABNORMAL))
    assert caplog.text == ""


def test_batches_of_views_may_be_cut_anywhere(support):
    model, _ = support
    whole = fill_bank(model, views(NORMAL, ABNORMAL))
    bank = model.bank.seg.clone()
    singles = [
        SupportBatch(batch.image[row : row + 1], batch.label[row : row + 1], batch.source[row : row + 1])
        for batch in views(NORMAL, ABNORMAL)
        for row in range(4)
    ]
    cut = fill_bank(model, singles)
    assert torch.allclose(model.bank.seg, bank, atol=1e-6)
    for one, other in zip(whole, cut, strict=True):
        assert torch.allclose(one.distance, other.distance, atol=1e-6)


@pytest.mark.parametrize(
    ("map_branch", "image_score", "stored"),
    [("seg", "map_max", (1, 0)), ("seg", "det_mean", (1, 1)), ("det", "map_max", (0, 1)), ("det", "det_max", (0, 1))],
)
def test_bank_holds_normal_tokens_of_branches_in_use(build, map_branch, image_score, stored):
    model = build(score_levels=[2, 3, 4])
    model.scoring = Scoring(map_branch, image_score, BOTH)
    fill_bank(model, views(NORMAL, ABNORMAL))
    rows = (3, 4 * 17, TINY.config["embed_dim"])  # levels, tokens of views of normal images
    for bank, is_stored in zip((model.bank.seg, model.bank.det), stored, strict=True):
        assert bank.shape == (rows if is_stored else (0,))
    fill_bank(model, views(NORMAL[:1], per_image=3))
    rows = getattr(model.bank, map_branch)
    assert rows.shape == (3, 3 * 17, TINY.config["embed_dim"]), "the old rows are still there"


def test_support_without_normal_image_is_refused(build):
    with pytest.raises(ValueError, match="holds no normal image"):
        fill_bank(build(), [SupportBatch(ABNORMAL, torch.ones(2), ["a", "b"])])


def test_empty_bank_is_refused(build):
    with pytest.raises(RuntimeError, match=r"memory bank of the seg branch is empty.*few_shot_weight to 0"):
        build()(IMAGES)


def test_ranges_are_the_extremes(build):
    model = build()
    model.scoring = Scoring("seg", "det_mean", BOTH)
    scores = fill_bank(model, views(NORMAL, ABNORMAL))
    assert model.ranges.isnan().all()
    set_ranges(model, scores)
    maps = [torch.cat(each) for each in zip(*(model.maps(one) for one in scores), strict=True)]
    zero, few = torch.cat([one.zero for one in scores]), torch.cat([one.few for one in scores])
    for of, (one, other) in enumerate([maps, (zero, few)]):
        assert model.ranges[of, 0].tolist() == [one.min(), one.max()]
        assert model.ranges[of, 1].tolist() == [other.min(), other.max()]
    assert (model.ranges[..., 1] > model.ranges[..., 0]).all()


def test_ranges_of_map_max_do_not_need_det(build):
    model = build()
    set_ranges(model, fill_bank(model, views(NORMAL, ABNORMAL)))
    assert model.bank.det.numel() == 0
    with torch.no_grad():
        found = model(IMAGES)
    assert torch.equal(found.pred_score, found.anomaly_map.amax(dim=(1, 2)))


@pytest.mark.parametrize("image_score", SCORES)
def test_calibrated_fusion(build, image_score):
    """Map and image score are fused by their own ranges."""
    model = build()
    model.scoring = Scoring("seg", image_score, UNEQUAL)
    set_ranges(model, fill_bank(model, views(NORMAL, ABNORMAL)))
    with torch.no_grad():
        scores = model.branch_scores(model.tokens(IMAGES), model.text_features)
        found = model(IMAGES)
    zero, few = model.maps(scores)
    of_map, of_score = model.ranges.double().tolist()
    for row, y, x in ((0, 0, 0), (1, 17, 40), (2, 55, 3)):
        pair = float(zero[row, y, x]), float(few[row, y, x])
        assert found.anomaly_map[row, y, x].item() == pytest.approx(by_hand.fused(*pair, (1, 3), of_map), abs=1e-5)
    if image_score != "map_max":
        for row in range(3):
            pair = float(scores.zero[row]), float(scores.few[row])
            assert found.pred_score[row].item() == pytest.approx(by_hand.fused(*pair, (1, 3), of_score), abs=1e-4)
    assert 0 < found.anomaly_map.min() < found.anomaly_map.max() < 1


def test_model_without_ranges_scores_nothing(build):
    """A forgotten calibration shows: scores are NaN, not wrong."""
    model = build()
    fill_bank(model, views(NORMAL))
    with torch.no_grad():
        assert model(IMAGES).pred_score.isnan().all()


def test_state_dict_brings_bank_ranges_and_texts(build):
    """What one model learnt, another with the same options scores alike."""
    one, other = build(), build(seed=1)
    for model in (one, other):
        model.scoring = Scoring("seg", "det_mean", BOTH)
    set_ranges(one, fill_bank(one, views(NORMAL, ABNORMAL)))
    other.load_state_dict(one.state_dict())
    with torch.no_grad():
        assert torch.equal(one(IMAGES).anomaly_map, other(IMAGES).anomaly_map)
        assert torch.equal(one(IMAGES).pred_score, other(IMAGES).pred_score)
