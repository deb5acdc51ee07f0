"""MVFA in anomalib: settings that follow the data, training, memory bank, calibration and checkpoints."""

import logging
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from anomalib import LearningType
from anomalib.data import AnomalibDataModule, ImageBatch, ImageItem
from anomalib.data.utils import LabelName
from anomalib.metrics import Evaluator
from anomalib.models.components import AnomalibModule
from anomalib.post_processing import PostProcessor
from anomalib.pre_processing import PreProcessor
from anomalib.visualization import ImageVisualizer, Visualizer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import nn
from torch.utils.data import DataLoader

from ..contract import DataFacts, class_name_of, describe, has_label
from ..data.support import support_of
from ..evaluation import metrics
from .fusion import Weights
from .losses import MvfaLoss
from .processing import AntialiasedPreProcessor, ThresholdScaledPostProcessor
from .prompts import ABNORMAL_STATES, NORMAL_STATES, TEMPLATES, check_slots
from .torch_model import BranchScores, MvfaModel, Scoring, SupportViews, check_choice

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares

IMAGE_SCORES = ("map_max", "det_mean", "det_max")
CALIBRATIONS = ("support", "none", "test")
BETAS = (0.5, 0.999)
"""Of Adam, as published."""
LIGHTNING_MAX_EPOCHS = 1000
"""What Lightning trains for when it is told nothing."""
SUPPORT_BATCH = 16
ONNX_OPSET = 18
BACKBONE_PREFIX = "model.backbone."
BANK_PREFIX = "model.bank."
BANK_ARGUMENTS = (
    "normal_states",
    "abnormal_states",
    "templates",
    "normalize",
    "residual",
    "residual_ratio",
    "score_levels",
    "upsample",
)
"""Arguments other than settings that texts, bank or ranges were built with."""


def _null(value: str | None) -> str | None:
    return None if value in {None, "null", "None", ""} else value


DEFAULT_BACKBONE = os.environ.get("ANOMALIB_MVFA_BACKBONE", "ViT-L-14-336")
DEFAULT_PRETRAINED = _null(os.environ.get("ANOMALIB_MVFA_PRETRAINED", "openai"))


class Mvfa(AnomalibModule):
    """MVFA: multi-level adaptation of visual features of CLIP (Huang et al., CVPR 2024).

    What is None follows the data's protocol; the values in use are logged and saved with checkpoints.

    Args:
        backbone: Name of an open_clip model with a plain vision transformer, or path of a model config in open_clip's
            JSON form. The environment variable ``ANOMALIB_MVFA_BACKBONE`` sets the default.
        pretrained: Tag of open_clip; or path of a weight file in OpenAI's or open_clip's form (.pt state dict,
            TorchScript archive, safetensors); or None for seeded random weights. ``ANOMALIB_MVFA_PRETRAINED`` sets the
            default ("null" for None).
        image_size: Height and width in pixels to which images are squashed.
        levels: Blocks (from 1) with adapters; the quarter points by default: 6, 12, 18, 24 for ViT-L.
        residual_ratio: Weight of an adapter in the stream (paper, Eq. 2).
        class_name: Noun for prompts; the datamodule's by default, then "object".
        normal_states: States of a normal object, each with one ``{}``; the published ones by default.
        abnormal_states: States of an abnormal object; the published ones by default.
        templates: Templates that states are set into; the published ones by default.
        quick_gelu: QuickGELU in place of GELU in the backbone.
        normalize: Normalise images by CLIP's mean and standard deviation.
        image_score: "map_max", "det_mean" or "det_max"; by default map_max in few-shot on data with masks, and det_mean
            elsewhere.
        zero_shot_weight: Weight of the text branch in scores.
        few_shot_weight: Weight of the memory bank; by default 0.5 in few-shot, 0 in leave-one-out.
        calibration: What sets the ranges by which branches are scaled before they are fused: the "support" images,
            "none", or the whole "test" set as in the published numbers, which `predict` and export refuse.
        adapters: Published adapters (.pth) to start from.
        learning_rate: Of Adam; by default 1e-3 in few-shot, 1e-4 in leave-one-out.
        max_epochs: Epochs to train, unless the trainer is told otherwise.
        bank_images: Most normal images in the bank where the datamodule has no support of its own.
        adaptation: "adapter" or "projector" (paper, Table 4).
        residual: "pair" (published) or "single" (paper, Eq. 2).
        train_levels: Levels that learn; all by default (paper, Table 5).
        score_levels: Levels that are scored; all by default.
        pooling: "mean" (published) or "max" (paper) over patches in the image loss.
        bce: "logits" (published) or "plain" (paper) cross-entropy in the image loss.
        upsample: "logits" (published) or "probabilities" (paper) are upsampled to maps.
        seed: Of the adapters' initial weights and of the draw of ``bank_images``.
        pre_processor: Anomalib's component, or whether to use the default one.
        post_processor: Anomalib's component, or whether to use the default one.
        evaluator: Anomalib's component, or whether to use the default one.
        visualizer: Anomalib's component, or whether to use the default one.

    Raises:
        ValueError: An argument has no such value, or weights do not fit.
        FileNotFoundError: A file that an argument names does not exist.
        RuntimeError: The weights of a tag could not be had.
    """

    model: MvfaModel

    def __init__(
        self,
        backbone: str = DEFAULT_BACKBONE,
        pretrained: str | None = DEFAULT_PRETRAINED,
        image_size: int = 240,
        levels: Sequence[int] | None = None,
        residual_ratio: float = 0.1,
        class_name: str | None = None,  # noqa: ARG002  # read from the saved hyper-parameters
        normal_states: Sequence[str] | None = None,
        abnormal_states: Sequence[str] | None = None,
        templates: Sequence[str] | None = None,
        quick_gelu: bool = False,
        normalize: bool = False,
        image_score: str | None = None,
        zero_shot_weight: float = 0.5,
        few_shot_weight: float | None = None,
        calibration: str = "support",
        adapters: str | None = None,
        learning_rate: float | None = None,
        max_epochs: int = 50,
        bank_images: int = 16,
        adaptation: str = "adapter",
        residual: str = "pair",
        train_levels: Sequence[int] | None = None,
        score_levels: Sequence[int] | None = None,
        pooling: str = "mean",
        bce: str = "logits",
        upsample: str = "logits",
        seed: int = 0,
        pre_processor: nn.Module | bool = True,
        post_processor: nn.Module | bool = True,
        evaluator: Evaluator | bool = True,
        visualizer: Visualizer | bool = True,
    ) -> None:
        # Anomalib saves these locals as hyper-parameters, and reads back plain types only.
        backbone, pretrained = str(backbone), _null(str(pretrained) if pretrained is not None else None)
        levels, train_levels, score_levels = map(_int_list, (levels, train_levels, score_levels))
        normal_states = check_slots("normal_states", NORMAL_STATES if normal_states is None else normal_states)
        abnormal_states = check_slots(
            "abnormal_states", ABNORMAL_STATES if abnormal_states is None else abnormal_states
        )
        templates = check_slots("templates", TEMPLATES if templates is None else templates)
        adapters = str(adapters) if adapters is not None else None
        if image_score is not None:
            check_choice("image_score", image_score, IMAGE_SCORES)
        check_choice("calibration", calibration, CALIBRATIONS)
        check_choice("bce", bce, ("logits", "plain"))
        _check_numbers(
            residual_ratio=residual_ratio,
            zero_shot_weight=zero_shot_weight,
            few_shot_weight=few_shot_weight,
            learning_rate=learning_rate,
            max_epochs=max_epochs,
            bank_images=bank_images,
        )
        super().__init__(
            pre_processor=self.configure_pre_processor((image_size, image_size))
            if pre_processor is True
            else pre_processor,
            post_processor=post_processor,
            evaluator=evaluator,
            visualizer=visualizer,
        )
        self.model = MvfaModel(
            backbone=backbone,
            pretrained=pretrained,
            image_size=image_size,
            levels=levels,
            residual_ratio=residual_ratio,
            quick_gelu=quick_gelu,
            normalize=normalize,
            adaptation=adaptation,
            residual=residual,
            train_levels=train_levels,
            score_levels=score_levels,
            pooling=pooling,
            upsample=upsample,
            seed=seed,
        )
        if adapters is not None:
            from ..checkpoint import load_adapters

            load_adapters(self.model, adapters)
        self.loss = MvfaLoss(bce)

        self.settings: dict[str, Any] = {}
        """What the data decided where arguments left it open; saved with checkpoints."""
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
        self._settle(_defaults(self._facts))
        self._settled_for = self._facts.identity

    def _log_settings(self) -> None:
        """Say what is in use, once a checkpoint has had its say."""
        logger.info("MVFA settings: %s", ", ".join(f"{key}={value}" for key, value in self.settings.items()))

    def _match_data(self) -> None:
        """See that settings which an earlier run or a checkpoint brought suit the data at hand."""
        has_data = self._datamodule is not None or self._dataset("test") or self._dataset("val")
        if not has_data or self._facts.identity == self._settled_for:
            return
        if not self._is_fitted:
            self._begin()
        elif self.settings["few_shot_weight"] == 0:
            # Learnt from other data in any case: only the prompts and the map are those of what is tested.
            wanted = _defaults(self._facts)
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
        settings = {**defaults, **given, "calibration": self.hparams.calibration}
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
        """Train for ``max_epochs`` unless told otherwise, validate after the last, and save after each."""
        loop = self.trainer.fit_loop
        if loop.max_epochs == LIGHTNING_MAX_EPOCHS:
            loop.max_epochs = 1 if self._facts.normal_only else self.hparams.max_epochs
        if self._facts.normal_only:
            logger.warning(
                "The training data hold no abnormal image: the adapters are not trained, and only the memory bank is "
                "built. Use a FewShot datamodule to learn from labelled images.",
            )
        monitored = any(getattr(callback, "monitor", None) for callback in self.trainer.checkpoint_callbacks)
        if self.trainer.check_val_every_n_epoch == 1 and (loop.max_epochs or 0) > 1 and not monitored:
            self.trainer.check_val_every_n_epoch = loop.max_epochs
        for callback in self.trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.monitor is None:
                callback._save_on_train_epoch_end = True  # noqa: SLF001  # there is no public way to change it

    def _dataset(self, kind: str) -> Any:  # noqa: ANN401  # any dataset of anomalib items
        """Dataset behind the trainer's loaders, for runs without a datamodule."""
        loops = {"train": self.trainer.fit_loop, "val": self.trainer.validate_loop, "test": self.trainer.test_loop}
        loader = getattr(loops[kind], "_data_source", None)
        loader = getattr(loader, "instance", None)
        loader = loader[0] if isinstance(loader, list) and loader else loader
        return getattr(loader, "dataset", None) if isinstance(loader, DataLoader) else None

    # ------------------------------------------------------------------ training

    def configure_optimizers(self) -> torch.optim.Optimizer | None:
        """Return Adam over both branches; as bits go, the two optimisers of the published code."""
        if self._facts.normal_only:
            return None
        groups = [
            {"params": [p for p in adapters.parameters() if p.requires_grad]}
            for adapters in (self.model.seg_adapters, self.model.det_adapters)
        ]
        return torch.optim.Adam(groups, lr=self.settings["learning_rate"], betas=BETAS)

    def on_fit_start(self) -> None:
        """Note that from here on, settings are those of a fit."""
        self._is_fitted = True
        self._log_settings()

    def on_train_epoch_start(self) -> None:
        """Forget that the bank fits the data: a fit without training builds it anew as well."""
        self._bank_is_fresh = self._thresholds_are_set = False

    def training_step(self, batch: ImageBatch, *args, **kwargs) -> STEP_OUTPUT:  # noqa: ANN002, ANN003
        """Return the loss of a batch, from one data set, with its noun and its masks if it has any."""
        del args, kwargs
        if self._facts.normal_only:
            return None
        with_seg = batch.gt_mask is not None
        self._saw_masks |= with_seg
        seg_maps, det_scores = self.model(batch.image, self._text_features(class_name_of(batch)), with_seg)
        loss = self.loss(seg_maps, det_scores, batch.gt_mask, batch.gt_label)
        if not with_seg and self.trainer.world_size > 1:
            # Distributed training waits for a gradient of every weight; these are dropped before the step.
            loss = loss + 0.0 * sum(p.sum() for p in self.model.seg_adapters.parameters() if p.requires_grad)
        self.log("train_loss", loss, on_step=True, on_epoch=True, prog_bar=True, batch_size=batch.batch_size)
        return loss

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
        val_data = getattr(self._datamodule, "val_data", None) or self._dataset("val")
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
            support = support_of(self._datamodule, self._dataset("train"), self.hparams.bank_images, self.hparams.seed)
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
                "training images, or set few_shot_weight to 0."
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
        given = self.hparams
        target = self.settings["class_name"]
        name = target if noun in {None, self._facts.class_name} else noun
        if name not in self._texts:
            states = (given.normal_states, given.abnormal_states, given.templates)
            with torch.inference_mode(False):  # training may use what a validation has encoded
                self._texts[name] = self.model.encode_states(name, *states)
        return self._texts[name].to(self.device)

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
        checkpoint["mvfa"] = {
            "settings": self.settings,
            "settled_for": self._settled_for,
            "arguments": {name: self.hparams[name] for name in BANK_ARGUMENTS},
            "is_fitted": self._is_fitted,
            "bank_is_fresh": self._bank_is_fresh,
            "thresholds_are_set": self._thresholds_are_set,
            "backbone_fingerprint": self.model.backbone.fingerprint,
        }

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the backbone is the one that was adapted, and restore what scoring needs to know.

        Raises:
            RuntimeError: The checkpoint was made with another backbone, or is none of this model.
        """
        saved = checkpoint.get("mvfa")
        if saved is None:
            msg = "This is no checkpoint of Mvfa. Published adapters (.pth) are loaded by the argument `adapters`."
            raise RuntimeError(msg)
        if saved["backbone_fingerprint"] != self.model.backbone.fingerprint:
            msg = (
                "The checkpoint's adapters were trained on another backbone: its weights have the fingerprint "
                f"{saved['backbone_fingerprint']}, those of backbone={self.hparams.backbone!r}, "
                f"pretrained={self.hparams.pretrained!r} have {self.model.backbone.fingerprint}. Give the same "
                "backbone and weights, for instance load_from_checkpoint(..., pretrained='path of the weight file')."
            )
            raise RuntimeError(msg)
        super().on_load_checkpoint(checkpoint)
        state = checkpoint["state_dict"]
        own = self.state_dict()
        state.update({key: value for key, value in own.items() if key.startswith(BACKBONE_PREFIX)})
        self._is_fitted = saved["is_fitted"]
        self._settled_for = tuple(saved["settled_for"]) if saved["settled_for"] else None
        self._settle(saved["settings"] or _defaults(self._facts))
        self._support, self._texts = [], {}

        # What was built with other arguments than are given now is built anew, from the support of the data at hand.
        changed = [name for name in BANK_ARGUMENTS if saved["arguments"][name] != self.hparams[name]]
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
                "checkpoint of a finished one, or set few_shot_weight to 0."
            )
            raise RuntimeError(msg)
        if self.model.text_features.isnan().any():
            self.model.text_features.copy_(self._text_features(None))

    def _refuse_test_ranges(self, what: str) -> None:
        if self.hparams.calibration == "test":
            msg = (
                f"calibration='test' cannot {what}: its ranges need a whole test set. Use calibration='support' (the "
                "default), or 'none'."
            )
            raise ValueError(msg)

    # ------------------------------------------------------------------ anomalib's contract

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


def _defaults(facts: DataFacts) -> dict[str, Any]:
    """Return what the data imply for settings that arguments leave open."""
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


def _int_list(values: Sequence[int] | None) -> list[int] | None:
    return None if values is None else [int(value) for value in values]


def _check_numbers(**values: float | None) -> None:
    """Raise ValueError for a number outside its bounds."""
    bounds = {
        "residual_ratio": (0, 0.5),
        "zero_shot_weight": (0, None),
        "few_shot_weight": (0, None),
        "learning_rate": (0, None),
        "max_epochs": (1, None),
        "bank_images": (1, None),
    }
    for name, value in values.items():
        low, high = bounds[name]
        if value is not None and not (value >= low and (high is None or value <= high)):
            allowed = f"at least {low}" if high is None else f"between {low} and {high}"
            msg = f"{name}={value} must be {allowed}."
            raise ValueError(msg)
    if values["zero_shot_weight"] == 0 and values["few_shot_weight"] == 0:
        msg = "zero_shot_weight and few_shot_weight are both 0; one branch at least must have weight."
        raise ValueError(msg)
