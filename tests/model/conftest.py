"""A tiny model of choice, and support views for it."""

import pytest
import torch

from anomalib_mvfa.model.build import build_mvfa
from anomalib_mvfa.model.calibration import SupportBatch
from anomalib_mvfa.model.torch_model import MvfaModel
from recipe import TINY, images

NORMAL, ABNORMAL = (images(f"bank/{label}", 2, TINY.image_size) for label in ("normal", "abnormal"))


@pytest.fixture(scope="session")
def text():
    """Unit text features ``(E, 2)`` that stand apart."""
    features = torch.randn(TINY.config["embed_dim"], 2, generator=torch.Generator().manual_seed(1))
    return torch.nn.functional.normalize(features, dim=0)


@pytest.fixture
def build(tiny_config, text):
    """Build a model in eval mode with options of choice."""

    def _build(**options) -> MvfaModel:
        model = build_mvfa(str(tiny_config), None, **{"image_size": TINY.image_size, **options}).eval()
        model.text_features.copy_(text)
        return model

    return _build


@pytest.fixture
def views():
    """Build batches of one view of every image: of some normal and as many abnormal images, then mirrored ones."""

    def _views(count: int = 2, abnormal: bool = True, per_image: int = 2) -> list[SupportBatch]:
        image = torch.cat([NORMAL[:count], ABNORMAL[:count]]) if abnormal else NORMAL[:count]
        label = torch.tensor([0] * count + [1] * (len(image) - count))
        source = [f"{row}.png" for row in range(len(image))]
        return [SupportBatch(image.flip(-1) if index else image, label, source) for index in range(per_image)]

    return _views
