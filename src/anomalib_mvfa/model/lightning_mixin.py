"""What MVFA and its baselines share in anomalib: settings, training, memory bank, calibration and checkpoints."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, ImageBatch, ImageItem
from anomalib.data.utils import LabelName
from anomalib.engine.plugins.checkpoint_io import AnomalibCheckpointIO
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import Resize

from ..callbacks import beside
from ..contract import DataFacts, class_name_of, dataset_of, describe, has_label
from ..data.reading import refuse_high_bit_depth
from ..data.support import support_of
from ..evaluation import metrics
from ..files import save_whole
from .frozen_cache import FrozenCache
from .fusion import Weights
from .processing import AntialiasedPreProcessor, ThresholdScaledPostProcessor
from .torch_model import BranchScores, MvfaModel, Scoring, SupportViews

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

CALIBRATIONS = ("support", "none", "test")
BETAS = (0.5, 0.999)
"""Of Adam, as published."""
LIGHTNING_MAX_EPOCHS = 1000
"""What Lightning trains for when it is told nothing."""
SUPPORT_BATCH = 16
ONNX_OPSET = 18
BACKBONE_PREFIX = "model.backbone."
BANK_PREFIX = "model.bank."


def optional_text(value: str | Path | None) -> str | None:
    """Return a value as plain text, or None, which environment variables and command lines spell as "null"."""
    return None if value is None or str(value) in {"null", "None", ""} else str(value)


def int_list(values: Sequence[int] | None) -> list[int] | None:
    """Return numbers as a plain list, or None."""
    return None if values is None else [int(value) for value in values]


def check_numbers(**values: float | None) -> None:
    """Raise ValueError for an argument outside its bounds."""
    bounds = {
        "residual_ratio": (0, 0.5),
        "zero_shot_weight": (0, None),
        "few_shot_weight": (0, None),
        "learning_rate": (0, None),
        "value_weight": (0, None),
        "max_epochs": (1, None),
        "bank_images": (1, None),
        "coreset": (0.001, 1),
        "references": (1, None),
        "top_share": (0, 1),
        "coupling_blocks": (1, None),
        "fiber_batch_size": (1, None),
        "boundary_share": (0, 0.5),
        "boundary_weight": (0, None),
        "margin": (0, None),
        "warmup_epochs": (0, None),
    }
    for name, value in values.items():
        low, high = bounds[name]
        if value is not None and not (value >= low and (high is None or value <= high)):
            allowed = f"at least {low}" if high is None else f"between {low} and {high}"
            msg = f"{name}={value} must be {allowed}."
            raise ValueError(msg)


class WholeCheckpointIO(AnomalibCheckpointIO):
    """Writes checkpoints beside their places, so that a killed run leaves the last one that is complete.

    Lightning writes them to the folder for temporary files. Where that is on another file system, what follows is a
    copy over the last checkpoint, which a kill cuts off.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:  # noqa: ANN401
        """Save a checkpoint; one that is not for this machine's disks is saved as Lightning does it."""
        if storage_options is not None or "://" in str(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        save_whole(checkpoint, Path(path))


def plan_epochs(trainer: Trainer, max_epochs: int) -> None:
    """Train for ``max_epochs`` unless the trainer is told otherwise, validate after the last, and save after each."""
    if type(trainer.strategy.checkpoint_io) is AnomalibCheckpointIO:
        trainer.strategy.checkpoint_io = WholeCheckpointIO(trainer.strategy.checkpoint_io.extra_safe_globals)
    loop = trainer.fit_loop
    if loop.max_epochs == LIGHTNING_MAX_EPOCHS:
        loop.max_epochs = max_epochs
    monitored = any(getattr(callback, "monitor", None) for callback in trainer.checkpoint_callbacks)
    if trainer.check_val_every_n_epoch == 1 and (loop.max_epochs or 0) > 1 and not monitored:
        trainer.check_val_every_n_epoch = loop.max_epochs
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.monitor is None:
            callback._save_on_train_epoch_end = True  # noqa: SLF001  # there is no public way to change it


DEFAULT_BACKBONE = os.environ.get("ANOMALIB_MVFA_BACKBONE", "ViT-L-14-336")
DEFAULT_PRETRAINED = optional_text(os.environ.get("ANOMALIB_MVFA_PRETRAINED", "openai"))

if TYPE_CHECKING:
    _Host = AnomalibModule
else:
    _Host = object  # anomalib finds direct subclasses of AnomalibModule only, and would list the mixin as a model


class LightningMixin(_Host):
    """All of a model in anomalib but its constructor, which anomalib reads; to be named before ``AnomalibModule``.

    Constructors call :meth:`_adopt`, and set ``loss`` where anything is trained. Of their arguments, ``backbone``,
    ``pretrained``, ``calibration``, ``bank_images`` and ``seed`` are read here, ``max_epochs`` where anything is
    trained, and those that settings are named after.

    Attributes:
        settings: What the data decided where arguments left it open; saved with checkpoints.
    """

    model: MvfaModel
    _checkpoint_key: str
    """Under which a checkpoint has what scoring needs to know."""
    _bank_arguments: tuple[str, ...]
    """Arguments other than settings that texts, bank or ranges are built with."""

    @classmethod
    def _sized(cls, pre_processor: nn.Module | bool, image_size: int) -> nn.Module | bool:
        """Return the default pre-processor for images of this size where the default one is asked for."""
        return cls.configure_pre_processor((image_size, image_size)) if pre_processor is True else pre_processor

    def _adopt(self, model: MvfaModel) -> None:
        """Take a torch model that has met no data yet."""
        self.model = model
        self.settings: dict[str, Any] = {}
        self._facts = DataFacts()
        self._settled_for: tuple[str, str, bool] | None = None
        self._is_fitted = False
        self._bank_is_fresh = False
        self._thresholds_are_set = False
        self._support: list[tuple[BranchScores, ImageItem]] = []
        self._texts: dict[str, torch.Tensor] = {}
        self._saw_masks = False
        self._test_scores: dict[tuple[int, int], BranchScores] = {}
        # Lightning hands these to DDP: every process builds the whole bank, so there is nothing to broadcast.
        self._ddp_params_and_buffers_to_ignore = ["model.bank.seg", "model.bank.det"]

    # ------------------------------------------------------------------ settings

    def setup(self, stage: str) -> None:
        """Settle what follows the data, and how long to train."""
        self._facts = describe(self._datamodule, self._dataset("train"), self._dataset("test") or self._dataset("val"))
        if stage == "fit" or not self.settings:
            self._begin()
        if stage == "fit":
            self._plan_epochs()

    def _begin(self) -> None:
        """Settle by the data at hand, and forget what came of other data."""
        self._is_fitted = self._bank_is_fresh = self._thresholds_are_set = False
        self._support, self._texts = [], {}
        with torch.no_grad():
            self.model.text_features.fill_(torch.nan)
        self._settle(self._defaults())
        self._settled_for = self._facts.identity

    def _log_settings(self) -> None:
        """Say what is in use, once a checkpoint has had its say."""
        settings = ", ".join(f"{key}={value}" for key, value in self.settings.items())
        logger.info("%s settings: %s", type(self).__name__, settings)

    def _defaults(self) -> dict[str, Any]:
        """Return what the data imply for settings that arguments leave open."""
        facts = self._facts
        protocol = facts.protocol
        return {
            "protocol": protocol.name,
            "class_name": facts.class_name,
            "map_branch": "seg" if facts.has_masks else "det",
            "image_score": protocol.image_score or ("map_max" if facts.has_masks else "det_mean"),
            "zero_shot_weight": 0.5,
            "few_shot_weight": protocol.few_shot_weight,
            "learning_rate": protocol.learning_rate,
        }

    def _match_data(self) -> None:
        """See that settings which an earlier run or a checkpoint brought suit the data at hand."""
        has_data = self._datamodule is not None or self._dataset("test") or self._dataset("val")
        if not has_data or self._facts.identity == self._settled_for:
            return
        if not self._is_fitted:
            self._begin()
        elif self.settings["few_shot_weight"] == 0:
            # Learnt from other data in any case: only the prompts and the map are those of what is tested.
            wanted = self._defaults()
            self._settle({**self.settings, **{key: wanted[key] for key in ("class_name", "map_branch")}})
            self.model.text_features.fill_(torch.nan)
            self._settled_for = self._facts.identity
        else:
            logger.warning(
                "The model was fitted on %s (protocol %s), and the data at hand show %s. They are scored as %s, by the "
                "bank of the fit. Fit anew to score them as what they are.",
                *(self._settled_for or ("other data", "unknown"))[:2],
                self._facts.class_name,
                self.settings["class_name"],
            )

    def _settle(self, defaults: dict[str, Any]) -> None:
        """Put arguments that are not None over defaults, and the result to use."""
        given = {key: self.hparams[key] for key in defaults if self.hparams.get(key) is not None}
        settings = {**defaults, **given, "calibration": self.hparams["calibration"]}
        if settings["few_shot_weight"] == 0 and settings["calibration"] == "support":
            settings["calibration"] = "none"  # without a bank, there is no other scale to bring probabilities to
        if settings["calibration"] == "test":
            logger.warning(
                "calibration=test: ranges come from the whole test set, as in the published numbers. The score of one "
                "image depends on the others, so these results are optimistic, and no use for a single image.",
            )
        self.settings = settings
        self.model.scoring = Scoring(
            map_branch=settings["map_branch"],
            image_score=settings["image_score"],
            weights=Weights(settings["zero_shot_weight"], settings["few_shot_weight"]),
            ranged=settings["calibration"] != "none",
        )

    def _plan_epochs(self) -> None:
        """Settle how long to train, and say so where there is nothing to learn."""
        plan_epochs(self.trainer, self.hparams["max_epochs"] if self._learns else 1)
        if self._trainable and not self._learns:
            logger.warning(
                "The training data hold no abnormal image: the adapters are not trained, and only the memory bank is "
                "built. Use a FewShot datamodule to learn from labelled images.",
            )

    def _dataset(self, kind: str) -> Any:  # noqa: ANN401  # any dataset of anomalib items
        """Dataset of the datamodule, or behind the trainer's loaders."""
        return dataset_of(self.trainer, kind)

    # ------------------------------------------------------------------ training

    @property
    def _trainable(self) -> bool:
        """Whether the model has anything to train."""
        return any(parameter.requires_grad for parameter in self.model.parameters())

    @property
    def _learns(self) -> bool:
        """Whether a fit on the data at hand trains it."""
        return self._trainable and not self._facts.normal_only

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """Return Adam over both branches; as bits go, the two optimisers of the published code."""
        if not self._learns:
            return None
        groups = [
            {"params": [p for p in adapters.parameters() if p.requires_grad]}
            for adapters in (self.model.seg_adapters, self.model.det_adapters)
        ]
        return torch.optim.Adam(groups, lr=self.settings["learning_rate"], betas=BETAS)

    def on_fit_start(self) -> None:
        """Note that from here on, settings are those of a fit, and keep what is frozen of images that come again."""
        self._is_fitted = True
        self._log_settings()
        augmentations = getattr(self._dataset("train"), "augmentations", None)
        if isinstance(augmentations, Resize | None):  # others change an image from epoch to epoch
            self.model.cache = FrozenCache()

    def on_fit_end(self) -> None:
        """Give the memory back."""
        self.model.cache = None

    def on_train_epoch_start(self) -> None:
        """Forget that the bank fits the data: a fit without training builds it anew as well."""
        self._bank_is_fresh = self._thresholds_are_set = False

    def training_step(self, batch: ImageBatch, *args, **kwargs) -> STEP_OUTPUT:  # noqa: ANN002, ANN003
        """Return the loss of a batch, from one data set, with its noun and its masks if it has any."""
        del args, kwargs
        if not self._learns:
            return self._no_loss(self) if self.trainer.world_size > 1 else None
        with_seg = batch.gt_mask is not None
        self._saw_masks |= with_seg
        seg_maps, det_scores = self.model(batch.image, self._text_features(class_name_of(batch)), with_seg)
        loss = self.loss(seg_maps, det_scores, batch.gt_mask, batch.gt_label)
        if not with_seg and self.trainer.world_size > 1:
            loss = loss + self._no_loss(self.model.seg_adapters)  # its gradients are dropped before the step
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=batch.batch_size)
        return loss

    @staticmethod
    def _no_loss(module: nn.Module) -> torch.Tensor:
        """Return 0, whose gradients of the module's weights are 0: distributed training waits for one of each."""
        return 0.0 * torch.stack([p.sum() for p in module.parameters() if p.requires_grad]).sum()

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Leave the seg adapters out of a step without masks: a gradient of 0 would still move them by momentum."""
        del optimizer
        self._bank_is_fresh = self._thresholds_are_set = False  # the adapters are about to change
        if not self._saw_masks:
            for parameter in self.model.seg_adapters.parameters():
                parameter.grad = None
        self._saw_masks = False

    def on_train_epoch_end(self) -> None:
        """After the last epoch, see that the checkpoint to be saved can score, whether or not there was validation."""
        trainer = self.trainer
        by_epochs = 0 < (trainer.max_epochs or 0) <= trainer.current_epoch + 1
        by_steps = 0 < trainer.max_steps <= trainer.global_step
        if by_epochs or by_steps or trainer.should_stop:
            self._finish()

    def on_train_end(self) -> None:
        """See to the same where a callback has stopped training after the epoch's end."""
        self._finish()

    def _finish(self) -> None:
        self._prepare_to_score()
        self._set_thresholds_from_support()

    # ------------------------------------------------------------------ evaluation

    def on_test_batch_start(self, batch: ImageBatch, *args, **kwargs) -> None:  # noqa: ANN002, ANN003
        """Refuse what anomalib's own data sets have read with most of its values cut off."""
        del args, kwargs
        refuse_high_bit_depth(batch.image_path or [])

    on_train_batch_start = on_validation_batch_start = on_predict_batch_start = on_test_batch_start

    def on_validation_start(self) -> None:
        """Build the bank from the adapters as they are now."""
        self._prepare_to_score()

    def validation_step(self, batch: ImageBatch, *args, **kwargs) -> STEP_OUTPUT:  # noqa: ANN002, ANN003
        """Score a batch, with the noun of its data set."""
        del args, kwargs
        predictions = self.model(batch.image, self._text_features(class_name_of(batch)))
        return batch.update(**predictions._asdict())

    def on_validation_epoch_end(self) -> None:
        """Take thresholds from the support where validation shows one kind only."""
        val_data = self._dataset("val")
        self._thresholds_are_set = all(has_label(val_data, label) for label in (LabelName.NORMAL, LabelName.ABNORMAL))
        self._set_thresholds_from_support()

    def on_test_start(self) -> None:
        """Build the bank where no fit has, and take the ranges of the test set if so asked."""
        if self.settings["calibration"] == "test":
            self._thresholds_are_set = False  # they were found with other ranges
        self._prepare_to_score()
        if self.settings["calibration"] == "test":
            self._calibrate_on_test()
        self._set_thresholds_from_support()
        self._log_settings()

    def test_step(self, batch: ImageBatch, batch_idx: int, *args, **kwargs) -> STEP_OUTPUT:  # noqa: ANN002, ANN003
        """Score a batch."""
        dataloader_idx = kwargs.get("dataloader_idx", args[0] if args else 0)
        scores = self._test_scores.pop((dataloader_idx, batch_idx), None)
        predictions = self.model(batch.image) if scores is None else self.model.fuse(scores)
        return batch.update(**predictions._asdict())

    def on_predict_start(self) -> None:
        """Refuse ranges of a test set, which a lone image does not have."""
        self._refuse_test_ranges("predict")
        self._finish()
        self._log_settings()

    @torch.no_grad()
    def _prepare_to_score(self) -> None:
        """See to text features, bank and ranges for the adapters as they are."""
        with torch.inference_mode(False):
            self._match_data()
            if self.model.text_features.isnan().any():
                self.model.text_features.copy_(self._text_features(None))
            if self.settings["few_shot_weight"] == 0:
                return
            if self._bank_is_fresh and (self._thresholds_are_set or self._support):
                return
            bank_images, seed = self.hparams["bank_images"], self.hparams["seed"]
            support = support_of(self._datamodule, self._dataset("train"), bank_images, seed)
            if self._bank_is_fresh and support is None:
                return
            self._support = self._score_support(support)
            if self.settings["calibration"] != "none":
                self.model.calibrate(scores for scores, _ in self._support)
            self._bank_is_fresh = True

    def _score_support(self, support: Any) -> list[tuple[BranchScores, ImageItem]]:  # noqa: ANN401  # a dataset or None
        """Build the bank; return scores and item of every support image, scored as if it were unseen."""
        if support is None:
            msg = (
                "There are no support images to build the memory bank from: no finished fit is loaded, and the data "
                "offer none. Load a checkpoint of a finished fit, or give a FewShot datamodule or one with normal "
                f"training images{self._or_no_bank}."
            )
            raise RuntimeError(msg)
        items: dict[str, ImageItem] = {}

        def views() -> Iterator[SupportViews]:
            for batch in DataLoader(support, SUPPORT_BATCH, collate_fn=support.collate_fn):
                for item in batch.items:
                    items.setdefault(item.image_path, item)
                image = self._preprocess(batch.image.to(self.device))
                yield SupportViews(image, batch.gt_label.to(self.device), batch.image_path)

        with self._scoring_context():
            scores = self.model.memorise(views())
        return list(zip(scores, items.values(), strict=True))

    def _set_thresholds_from_support(self) -> None:
        """Let the post-processor find its thresholds on the support, if validation has given it none."""
        labels = {item.gt_label.item() for _, item in self._support if item.gt_label is not None}
        if self._thresholds_are_set or len(labels) < 2 or not isinstance(self.post_processor, PostProcessor):
            return
        logger.info(
            "Thresholds come from the %d support images: validation did not show both kinds.", len(self._support)
        )
        for scores, item in self._support:
            predictions = self.model.fuse(scores)
            batch = ImageBatch(
                image=torch.as_tensor(item.image)[None].to(self.device),
                gt_label=torch.as_tensor(item.gt_label)[None].to(self.device),
                gt_mask=None if item.gt_mask is None else item.gt_mask[None].to(self.device),
                **{key: value for key, value in predictions._asdict().items() if value is not None},
            )
            self.post_processor.on_validation_batch_end(self.trainer, self, batch)
        self.post_processor.on_validation_epoch_end(self.trainer, self)
        self._thresholds_are_set = True

    @torch.no_grad()
    def _calibrate_on_test(self) -> None:
        """Take ranges from a first pass over the test set, and keep its scores, so that the backbone runs once."""
        loaders = self.trainer.test_dataloaders
        self._test_scores.clear()
        with self._scoring_context():
            for loader_idx, loader in enumerate(loaders if isinstance(loaders, list) else [loaders]):
                for batch_idx, batch in enumerate(islice(loader, int(self.trainer.num_test_batches[loader_idx]))):
                    tokens = self.model.tokens(self._preprocess(batch.image.to(self.device)))
                    scores = self.model.branch_scores(tokens, self.model.text_features)
                    self._test_scores[loader_idx, batch_idx] = scores
        self.model.calibrate(self._test_scores.values())
        if self.trainer.world_size > 1:
            ranges = torch.as_tensor(self.all_gather(self.model.ranges))  # (ranks, 2, 2, 2)
            self.model.ranges.copy_(torch.stack([ranges[..., 0].amin(dim=0), ranges[..., 1].amax(dim=0)], dim=-1))

    @contextmanager
    def _scoring_context(self) -> Iterator[None]:
        """Score outside of a step as inside of one: in eval mode, and in the trainer's precision."""
        was_training = self.model.training
        self.model.eval()
        try:
            with self.trainer.precision_plugin.forward_context():
                yield
        finally:
            self.model.train(was_training)

    def _preprocess(self, image: torch.Tensor) -> torch.Tensor:
        transform = getattr(self.pre_processor, "transform", None)
        return transform(image) if transform else image

    def _text_features(self, noun: str | None) -> torch.Tensor:
        """Text features ``(E, 2)`` of a batch with this noun; of what is tested, by default."""
        target = self.settings["class_name"]
        name = target if noun in {None, self._facts.class_name} else noun
        if name not in self._texts:
            with torch.inference_mode(False):  # training may use what a validation has encoded
                self._texts[name] = self._encode(name)
        return self._texts[name].to(self.device)

    def _encode(self, class_name: str) -> torch.Tensor:
        """Text features ``(E, 2)`` of an object."""
        return self.model.encode_states(class_name)

    @property
    def _datamodule(self) -> AnomalibDataModule | None:
        return getattr(self.trainer, "datamodule", None)

    # ------------------------------------------------------------------ checkpoints and export

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the frozen backbone, and a bank that does not fit the adapters; add what scoring needs to know."""
        if self.trainer.state.fn == TrainerFn.FITTING and self.trainer.should_stop and not self._bank_is_fresh:
            self._finish()
            checkpoint["state_dict"] = self.state_dict()
        super().on_save_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        for key in list(state):
            if key.startswith(BACKBONE_PREFIX):
                del state[key]
            elif key.startswith(BANK_PREFIX) and not self._bank_is_fresh:
                state[key] = state[key].new_empty(0)
        checkpoint[self._checkpoint_key] = {
            "settings": self.settings,
            "settled_for": self._settled_for,
            "arguments": {name: self.hparams[name] for name in self._bank_arguments},
            "is_fitted": self._is_fitted,
            "bank_is_fresh": self._bank_is_fresh,
            "thresholds_are_set": self._thresholds_are_set,
            "backbone_fingerprint": self.model.backbone.fingerprint,
            "levels": list(self.model.levels),
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the backbone is the one that was in use, and restore what scoring needs to know.

        Raises:
            RuntimeError: The checkpoint was made with another backbone, or is none of this model.
        """
        saved = checkpoint.get(self._checkpoint_key)
        if saved is None:
            hint = " Published adapters (.pth) are loaded by the argument `adapters`."
            msg = f"This is no checkpoint of {type(self).__name__}.{hint if 'adapters' in self.hparams else ''}"
            raise RuntimeError(msg)
        if saved["backbone_fingerprint"] != self.model.backbone.fingerprint:
            msg = (
                "The checkpoint was made with another backbone: its weights have the fingerprint "
                f"{saved['backbone_fingerprint']}, those of backbone={self.hparams['backbone']!r}, "
                f"pretrained={self.hparams['pretrained']!r} have {self.model.backbone.fingerprint}. Give the same "
                "backbone and weights, for instance load_from_checkpoint(..., pretrained='path of the weight file')."
            )
            raise RuntimeError(msg)
        levels = list(self.model.levels)
        if "levels" not in self._bank_arguments and saved.get("levels", levels) != levels:  # adapters are of levels
            msg = (
                f"The checkpoint was made with levels={saved['levels']}, and levels={levels} are in use. Give the same."
            )
            raise RuntimeError(msg)
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        own = self.state_dict()
        state.update({key: value for key, value in own.items() if key.startswith(BACKBONE_PREFIX)})
        self._is_fitted = saved["is_fitted"]
        self._settled_for = tuple(saved["settled_for"]) if saved["settled_for"] else None
        self._settle(saved["settings"] or self._defaults())
        self._support, self._texts = [], {}

        # What was built with other arguments than are given now is built anew, from the support of the data at hand.
        changed = [name for name in self._bank_arguments if saved["arguments"][name] != self.hparams[name]]
        rescored = [key for key, value in saved["settings"].items() if self.settings.get(key) != value]
        whole = all(state[f"{BANK_PREFIX}{branch}"].numel() for branch in self.model.scoring.branches)
        ranged = self.settings["calibration"] == "none" or not state["model.ranges"].isnan().any()
        same = not changed and "class_name" not in rescored
        if not same:
            state["model.text_features"] = torch.full_like(own["model.text_features"], torch.nan)
        self._bank_is_fresh = saved["bank_is_fresh"] and whole and ranged and same
        self._thresholds_are_set = saved["thresholds_are_set"] and same and not rescored
        if not self._thresholds_are_set:
            for name in ("_image_threshold", "_pixel_threshold"):
                if f"post_processor.{name}" in state:
                    state[f"post_processor.{name}"] = torch.full_like(own[f"post_processor.{name}"], torch.nan)
        if changed or rescored:
            logger.warning(
                "The checkpoint was made with other values of %s: thresholds%s are taken anew from the support of the "
                "data at hand, if there is any.",
                ", ".join([*changed, *rescored]),
                "" if self._bank_is_fresh else ", memory bank and ranges",
            )

    def to_torch(self, *args, **kwargs) -> Path:  # noqa: ANN002, ANN003
        """Export as anomalib does, with weights that ask for no gradient."""
        self._check_exportable()
        learning = [parameter for parameter in self.parameters() if parameter.requires_grad]
        support, self._support = self._support, []  # images of patients do not belong into an exported file
        try:
            self.requires_grad_(False)
            return super().to_torch(*args, **kwargs)
        finally:
            self._support = support
            for parameter in learning:
                parameter.requires_grad_(True)

    def to_onnx(self, *args, **kwargs) -> Path:  # noqa: ANN002, ANN003
        """Export as anomalib does, in the operator set that torch writes: converting it to an older one fails."""
        self._check_exportable()
        return super().to_onnx(*args, **{"opset_version": ONNX_OPSET, **kwargs})

    def to_openvino(self, *args, **kwargs) -> Path:  # noqa: ANN002, ANN003
        """Export as anomalib does."""
        self._check_exportable()
        return super().to_openvino(*args, **kwargs)

    @torch.no_grad()
    def _check_exportable(self) -> None:
        """Refuse to export a model that cannot score, which an exported file would not say."""
        self._refuse_test_ranges("export")
        if not self.settings:
            self._begin()
        scoring = self.model.scoring
        empty = [branch for branch in scoring.branches if getattr(self.model.bank, branch).numel() == 0]
        if scoring.weights.few > 0 and (empty or (scoring.ranged and self.model.ranges.isnan().any())):
            msg = (
                "The model cannot be exported: its memory bank or ranges are missing. Export after a fit, or from a "
                f"checkpoint of a finished one{self._or_no_bank}."
            )
            raise RuntimeError(msg)
        if self.model.text_features.isnan().any():
            self.model.text_features.copy_(self._text_features(None))

    @property
    def _or_no_bank(self) -> str:
        """The end of an error about the bank, from a model that can do without one."""
        return ", or set few_shot_weight to 0" if "few_shot_weight" in self.hparams else ""

    def _refuse_test_ranges(self, what: str) -> None:
        if self.hparams["calibration"] == "test":
            msg = (
                f"calibration='test' cannot {what}: its ranges need a whole test set. Use calibration='support' (the "
                "default), or 'none'."
            )
            raise ValueError(msg)

    # ------------------------------------------------------------------ anomalib's contract

    def configure_callbacks(self) -> list[Callback]:
        """Return anomalib's callbacks, and ours."""
        return beside(super().configure_callbacks())

    @property
    def trainer_arguments(self) -> dict[str, Any]:
        """No sanity check: before training, there is no bank to validate with."""
        return {"num_sanity_val_steps": 0}

    @property
    def learning_type(self) -> LearningType:
        """One-class, since anomalib's engine trains no model of its few-shot and zero-shot types."""
        return LearningType.ONE_CLASS

    @staticmethod
    def configure_pre_processor(image_size: tuple[int, int] | None = None) -> PreProcessor:
        """Return a pre-processor that squashes images to a square of ``image_size``, 240 by default."""
        return AntialiasedPreProcessor(image_size[0] if image_size else 240)

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Return a post-processor that moves thresholds to 0.5 and clamps nothing."""
        return ThresholdScaledPostProcessor()

    @staticmethod
    def configure_evaluator() -> Evaluator:
        """Return the metrics of :func:`anomalib_mvfa.evaluation.metrics`."""
        return metrics()

    @classmethod
    def configure_visualizer(cls) -> ImageVisualizer:
        """Return anomalib's visualizer, with colours that span each map: fused scores fill a small part of [0, 1]."""
        return ImageVisualizer(overlay_fields_config={"anomaly_map": {"colormap": True, "normalize": True}})
