"""Hooks of models that fuse text alignment with a memory bank: evaluation, calibration, checkpoints, export.

What they do is in :mod:`~anomalib_mvfa.model.calibration`, :mod:`~anomalib_mvfa.model.state` and
:mod:`~anomalib_mvfa.model.torch_model`; here is when.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from anomalib.data import ImageBatch
from anomalib.data.utils import LabelName
from anomalib.post_processing import PostProcessor
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.types import STEP_OUTPUT

from ..contract import DataFacts, class_name_of, describe, has_label
from ..data.support import support_of
from ..progress import progress
from . import calibration
from .export import ThresholdScaledPostProcessor
from .lightning_base import AnomalibMixin, plan_epochs
from .state import BACKBONE_PREFIX, FitState, Settings, adapt_state_dict
from .torch_model import BranchScores, MvfaModel

logger = logging.getLogger("anomalib.mvfa")  # below anomalib's, whose settings it so shares


class CalibratedMixin(AnomalibMixin):
    """A model around :class:`~anomalib_mvfa.model.torch_model.MvfaModel` that data complete: settings and calibration.

    Constructors call :meth:`_init_state`.

    Attributes:
        asked: Settings that arguments ask for; None where the data decide.
        state: What the model has learnt about data; saved with checkpoints.
    """

    model: MvfaModel

    def _init_state(self, model: MvfaModel, asked: Settings, seed: int, bank_images: int, max_epochs: int = 1) -> None:
        """Take a torch model that has met no data yet, and the arguments that say how to fit and to score."""
        self.model = model
        self.asked = asked
        self.seed = seed
        self.bank_images = bank_images
        self.max_epochs = max_epochs
        self.state = FitState()
        self._facts = DataFacts()
        self._test_scores: dict[tuple[int, int], BranchScores] = {}
        # Lightning hands these to DDP: every process builds the whole bank, so there is nothing to broadcast.
        self._ddp_params_and_buffers_to_ignore = ["model.bank.seg", "model.bank.det"]

    @property
    def settings(self) -> Settings:
        """What is in use; complete once the model has met data."""
        return self.state.settings or self.asked

    # ------------------------------------------------------------------ settings

    def _begin(self) -> None:
        """Choose settings by the data at hand, and forget what came of other data."""
        self.state = FitState(data=self._facts.identity)
        self._forget_calibration()
        self._apply_settings(self._settings_for_data())

    def _settings_for_data(self) -> Settings:
        """Return what this model does on the data at hand where arguments leave it open."""
        return Settings.for_data(self._facts)

    def _apply_settings(self, defaults: Settings) -> None:
        """Put arguments over defaults, and use the result."""
        self.state.settings = self.asked.completed(defaults)
        self.model.scoring = self.settings.scoring
        with torch.no_grad():
            self.model.text_features.fill_(torch.nan)
        if self.settings.calibration == "test":
            logger.warning(
                "calibration=test: ranges come from the whole test set, as in the published numbers. The score of one "
                "image depends on the others, so these results are optimistic, and no use for a single image.",
            )

    def _match_data(self) -> None:
        """Check that settings which an earlier run or a checkpoint brought suit the data at hand."""
        has_data = self.datamodule is not None or self.dataset("test") or self.dataset("val")
        if not has_data or self._facts.identity == self.state.data:
            return
        if not self.state.is_fitted:
            self._begin()
        elif self.settings.few_shot_weight == 0:
            # Learnt from other data in any case: only the prompts and the map are those of what is tested.
            of_data = self._settings_for_data()
            self._apply_settings(replace(self.settings, class_name=of_data.class_name, map_branch=of_data.map_branch))
            self.state.data = self._facts.identity
        else:
            logger.warning(
                "The model was fitted on %s (protocol %s), and the data at hand show %s. They are scored as %s, by the "
                "bank of the fit. Fit anew to score them as what they are.",
                *(self.state.data or ("other data", "unknown"))[:2],
                self._facts.class_name,
                self.settings.class_name,
            )

    # ------------------------------------------------------------------ calibration

    def _forget_calibration(self) -> None:
        """Forget bank, value ranges and thresholds, which hold for the adapters as they were."""
        calibration.forget_calibration(self.model)
        calibration.reset_thresholds(self.post_processor)

    def _calibrate(self) -> None:
        """Compute all that scoring needs and that is not there."""
        self._prepare_to_score()
        self._set_thresholds_from_support()

    @torch.no_grad()
    def _prepare_to_score(self) -> None:
        """Compute text features, bank and ranges for the adapters as they are, unless they are there."""
        with torch.inference_mode(False):
            self._match_data()
            self._set_text_features()
            if self.settings.few_shot_weight == 0:
                return
            is_ready = calibration.is_calibrated(self.model)
            if is_ready and (calibration.thresholds_are_set(self.post_processor) or self.state.support):
                return
            support = support_of(self.datamodule, self.dataset("train"), self.bank_images, self.seed)
            if support is None and is_ready:
                return
            if support is None:
                msg = (
                    f"There are no support images to build the memory bank from: {self._no_bank}, and the data offer "
                    "none. Load a checkpoint of a finished fit, or give a FewShot datamodule or one with normal "
                    f"training images{self._or_no_bank}."
                )
                raise RuntimeError(msg)
            with self._scoring_context():
                self.state.support = calibration.score_support(self.model, support, self._preprocess)
            if self.settings.calibration != "none":
                calibration.set_ranges(self.model, (scores for scores, _ in self.state.support))

    def _set_thresholds_from_support(self, replace: bool = False) -> None:
        """Let the post-processor find its thresholds on the support, if it has none or there are better ones.

        Normal support images alone give a threshold where nothing else does: the highest of their scores, each without
        the image's own views in the bank.
        """
        labels = {item.gt_label.item() for _, item in self.state.support if item.gt_label is not None}
        is_needed = not calibration.thresholds_are_set(self.post_processor) or (replace and len(labels) == 2)
        if is_needed and labels and isinstance(self.post_processor, PostProcessor):
            learnt = bool(getattr(self, "learns", False))
            scored = [(self.model.fuse(scores), item) for scores, item in self.state.support]
            calibration.set_thresholds(self.post_processor, scored, "support", learnt)

    @torch.no_grad()
    def _calibrate_on_test(self) -> None:
        """Take ranges from a first pass over the test set, and keep its scores, so that the backbone runs once."""
        loaders = self.trainer.test_dataloaders
        self._test_scores.clear()
        with self._scoring_context():
            for loader_idx, loader in enumerate(loaders if isinstance(loaders, list) else [loaders]):
                total = int(self.trainer.num_test_batches[loader_idx])
                for batch_idx, batch in enumerate(
                    progress(islice(loader, total), "Calibrating on the test set", total)
                ):
                    tokens = self.model.tokens(self._preprocess(batch.image))
                    scores = self.model.branch_scores(tokens, self.model.text_features)
                    self._test_scores[loader_idx, batch_idx] = scores
        calibration.set_ranges(self.model, self._test_scores.values())
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
        """Images ``(B, 3, H, W)`` on the model's device, as steps get them."""
        transform = getattr(self.pre_processor, "transform", None)
        image = image.to(self.device)
        return transform(image) if transform else image

    def _set_text_features(self) -> None:
        if self.model.text_features.isnan().any():
            self.model.text_features.copy_(self._text_features(None))

    def _text_features(self, class_name: str | None) -> torch.Tensor:
        """Text features ``(E, 2)`` of a batch of this class; of what is tested, by default."""
        if class_name is None or class_name == self._facts.class_name:
            class_name = str(self.settings.class_name)
        known = self.state.text_features
        if class_name not in known:
            with torch.inference_mode(False):  # training may use what a validation has encoded
                known[class_name] = self.model.encode_states(class_name)
        return known[class_name].to(self.device)


class FusionMixin(CalibratedMixin):
    """Hooks of such a model; to be named before ``AnomalibModule``."""

    checkpoint_key: str
    """Key of the state in a checkpoint."""

    def setup(self, stage: str) -> None:
        """Choose what follows the data, and how long to train."""
        super().setup(stage)
        self._facts = describe(self.datamodule, self.dataset("train"), self.dataset("test") or self.dataset("val"))
        if stage == "fit" or self.state.settings is None:
            self._begin()
        if stage == "fit":
            plan_epochs(self.trainer, self.max_epochs)

    def _log_settings(self) -> None:
        logger.info("%s: %s", type(self).__name__, self.settings)

    # ------------------------------------------------------------------ a fit

    def on_fit_start(self) -> None:
        """Note that from here on, settings are those of a fit."""
        self.state.is_fitted = True
        self._log_settings()

    def on_train_epoch_start(self) -> None:
        """Forget the bank: a fit without training builds it anew as well."""
        self._forget_calibration()

    def on_train_epoch_end(self) -> None:
        """After the last epoch, see that the checkpoint to be saved can score, whether or not there was validation."""
        trainer = self.trainer
        by_epochs = 0 < (trainer.max_epochs or 0) <= trainer.current_epoch + 1
        by_steps = 0 < trainer.max_steps <= trainer.global_step
        if by_epochs or by_steps or trainer.should_stop:
            self._calibrate()

    def on_train_end(self) -> None:
        """See to the same where a callback has stopped training after the epoch's end."""
        self._calibrate()

    # ------------------------------------------------------------------ evaluation

    def on_validation_start(self) -> None:
        """Build the bank from the adapters as they are now."""
        self._prepare_to_score()

    def validation_step(self, batch: ImageBatch, *args, **kwargs) -> STEP_OUTPUT:  # noqa: ANN002, ANN003
        """Score a batch, with the class name of its data set."""
        del args, kwargs
        predictions = self.model(batch.image, self._text_features(class_name_of(batch)))
        return batch.update(**predictions._asdict())

    def on_validation_epoch_end(self) -> None:
        """Take thresholds from the support where validation shows one label only."""
        data = self.dataset("val")
        shows_both = all(has_label(data, label) for label in (LabelName.NORMAL, LabelName.ABNORMAL))
        self._set_thresholds_from_support(replace=not shows_both)

    def on_test_start(self) -> None:
        """Build the bank where no fit has, and take the ranges of the test set if so asked."""
        by_test = self.settings.calibration == "test"
        if by_test:
            calibration.reset_thresholds(self.post_processor)  # they were found with other ranges
        self._prepare_to_score()
        if by_test:
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
        self._calibrate()
        self._log_settings()

    # ------------------------------------------------------------------ checkpoints and export

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Leave out the frozen backbone, and add the state."""
        if (
            self.trainer.state.fn == TrainerFn.FITTING
            and self.trainer.should_stop
            and not calibration.is_calibrated(self.model)
        ):
            self._calibrate()
            checkpoint["state_dict"] = self.state_dict()
        super().on_save_checkpoint(checkpoint)
        for key in [key for key in checkpoint["state_dict"] if key.startswith(BACKBONE_PREFIX)]:
            del checkpoint["state_dict"][key]
        checkpoint["hyper_parameters"].pop("adapters", None)  # where training started, which need not be there again
        checkpoint[self.checkpoint_key] = self.state.to_checkpoint(self.model)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the backbone is the one that was in use, and restore the state.

        Raises:
            RuntimeError: The checkpoint was made with another backbone, or by another model.
        """
        saved = checkpoint.get(self.checkpoint_key)
        if saved is None or "options" not in saved:
            msg = (
                f"This is no checkpoint of this version's {type(self).__name__}. Fit the model anew; published "
                "adapters (.pth) are loaded by Mvfa's argument `adapters`."
            )
            raise RuntimeError(msg)
        super().on_load_checkpoint(checkpoint)
        backbone = f"backbone={self.hparams['backbone']!r}, pretrained={self.hparams['pretrained']!r}"
        self.state = FitState.from_checkpoint(saved, self.model, backbone)
        self._apply_settings(self.settings if self.state.settings else self._settings_for_data())
        state = checkpoint["state_dict"]
        own = self.state_dict()
        self.state.differing = adapt_state_dict(state, own, saved, self.model, self.settings)
        if state.get("post_processor._image_threshold", torch.zeros(())).isnan():
            calibration.reset_thresholds(self.post_processor)  # other options: what it was found on does not hold

    def to_torch(self, *args, **kwargs) -> Path:  # noqa: ANN002, ANN003
        """Export without the support: images of patients do not belong into an exported file."""
        support, self.state.support = self.state.support, []
        try:
            return super().to_torch(*args, **kwargs)
        finally:
            self.state.support = support

    @torch.no_grad()
    def check_exportable(self) -> None:
        """Raise an error for ranges of a test set, and where bank or ranges are missing."""
        self._refuse_test_ranges("export")
        if self.state.settings is None:
            self._begin()
        if not calibration.is_calibrated(self.model):
            msg = (
                f"The model cannot be exported, its memory bank or ranges are missing: {self._no_bank}. Export after a "
                f"fit, or from a checkpoint of a finished one{self._or_no_bank}."
            )
            raise RuntimeError(msg)
        self._set_text_features()

    @property
    def _no_bank(self) -> str:
        differing = self.state.differing
        return f"the checkpoint's was made with other values, {differing}" if differing else "no finished fit is loaded"

    @property
    def _or_no_bank(self) -> str:
        return ", or set few_shot_weight to 0" if "few_shot_weight" in self.hparams else ""

    def _refuse_test_ranges(self, what: str) -> None:
        if self.asked.calibration == "test":
            msg = (
                f"calibration='test' cannot {what}: its ranges need a whole test set. Use calibration='support' (the "
                "default), or 'none'."
            )
            raise ValueError(msg)

    @staticmethod
    def configure_post_processor() -> PostProcessor:
        """Return a post-processor that moves thresholds to 0.5 and clamps nothing."""
        return ThresholdScaledPostProcessor()
