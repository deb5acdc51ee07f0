"""Datamodules: few-shot and leave-one-out protocols, over BMAD and over any anomalib datamodule."""

from .bmad import BMADFewShot, BMADLeaveOneOut, BMADOneClass
from .few_shot import FewShot
from .few_shot_folder import FewShotFolder
from .full_normal import FullNormal
from .leave_one_out import LeaveOneOut
from .phantom import BrainPhantom, Phantom
from .scans import PredictScans, Scans

__all__ = [
    "BMADFewShot",
    "BMADLeaveOneOut",
    "BMADOneClass",
    "BrainPhantom",
    "FewShot",
    "FewShotFolder",
    "FullNormal",
    "LeaveOneOut",
    "Phantom",
    "PredictScans",
    "Scans",
]
