"""Datamodules: few-shot and leave-one-out protocols, over BMAD and over any anomalib datamodule."""

from .bmad import BMADFewShot, BMADLeaveOneOut, BMADOneClass
from .phantom import Phantom
from .protocols import FewShot, FullNormal, LeaveOneOut
from .scans import PredictScans, Scans

__all__ = [
    "BMADFewShot",
    "BMADLeaveOneOut",
    "BMADOneClass",
    "FewShot",
    "FullNormal",
    "LeaveOneOut",
    "Phantom",
    "PredictScans",
    "Scans",
]
