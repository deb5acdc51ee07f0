"""Public names, and the modules that they live in.

This is the only table of them: ``__init__.py`` imports from it on first use, ``plugin.py`` gives from it to anomalib
what belongs there, and type checkers and the reference in the documentation read it.
"""

from .baselines.april_gan import AprilGan as AprilGan
from .baselines.bgad import Bgad as Bgad
from .baselines.clip import Clip as Clip
from .baselines.dra import Dra as Dra
from .baselines.med_clip import MedClip as MedClip
from .baselines.mkd import Mkd as Mkd
from .baselines.winclip import WinClipBaseline as WinClipBaseline
from .data import BMADFewShot as BMADFewShot
from .data import BMADLeaveOneOut as BMADLeaveOneOut
from .data import BMADOneClass as BMADOneClass
from .data import BrainPhantom as BrainPhantom
from .data import FewShot as FewShot
from .data import FewShotFolder as FewShotFolder
from .data import FullNormal as FullNormal
from .data import LeaveOneOut as LeaveOneOut
from .data import Phantom as Phantom
from .data import PredictScans as PredictScans
from .data import Scans as Scans
from .data.reading import read_image as read_image
from .model.build import build_mvfa as build_mvfa
from .model.lightning_model import Mvfa as Mvfa
from .model.plus import MvfaPlus as MvfaPlus
from .model.torch_model import MvfaModel as MvfaModel
from .model.weights import load_adapters as load_adapters
from .model.weights import save_adapters as save_adapters
from .plugin import register as register
from .results import SaveMaps as SaveMaps

MODULES: dict[str, str]
__version__: str
