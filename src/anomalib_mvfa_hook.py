"""Makes MVFA known to anomalib whenever anomalib is imported.

anomalib finds a model only among classes that are already imported, so something must import ours. A ``.pth`` file
(from Python 3.15 on a ``.start`` file) calls :func:`install` when the interpreter starts. That happens in every
program of the environment, hence this module stands outside the package and imports nothing that Python has not
loaded by then.
"""

import os
import sys

TYPE_CHECKING = False  # as typing has it, without importing typing
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.abc import Loader
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

_HOSTS = frozenset({"anomalib.models", "anomalib.data"})
_WATCHED = _HOSTS | {"anomalib.cli.cli"}  # which few programs import
_PACKAGES = frozenset({"anomalib", "anomalib_mvfa"})

_finding: "set[str]" = set()  # names under search; another hook that searches the other finders must not get us again
_executing: "list[str]" = []  # watched modules in the middle of their import
_pending: "list[ModuleType]" = []  # hosts that are imported, and have not been given our names


def install() -> None:
    """Watch for the import of anomalib, unless ``ANOMALIB_MVFA_PLUGIN=0``; a second call changes nothing."""
    if os.environ.get("ANOMALIB_MVFA_PLUGIN") == "0" or _FINDER in sys.meta_path:
        return
    sys.meta_path.insert(0, _FINDER)
    _pending.extend(sys.modules[name] for name in _WATCHED if name in sys.modules)
    _attach_pending()


class _Finder:
    """Finds modules as the other finders do, and wraps the loaders of those that we must watch.

    These are the hosts and, until they have our names, whichever module of anomalib or ours starts a chain of imports.
    """

    def find_spec(
        self,
        name: str,
        path: "Sequence[str] | None" = None,
        target: "ModuleType | None" = None,
    ) -> "ModuleSpec | None":
        if name.partition(".")[0] not in _PACKAGES or name in _finding:
            return None
        _finding.add(name)
        try:
            finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))
            spec = next(filter(None, (finder.find_spec(name, path, target) for finder in finders)), None)
        finally:
            _finding.discard(name)
        # Not every module: our frame in the stack draws warnings to us that are meant for the importing module.
        starts_a_chain = not _executing and not sys.modules.keys() >= _HOSTS
        if spec and (name in _WATCHED or starts_a_chain) and hasattr(spec.loader, "exec_module"):
            spec.loader = _Loader(spec.loader)  # type: ignore[arg-type, assignment]
        return spec


class _Loader:
    """Stands in for a module's loader until the module is executed."""

    def __init__(self, loader: "Loader") -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> "Any":  # noqa: ANN401 (whatever the loader has)
        return getattr(self._loader, name)

    def exec_module(self, module: "ModuleType") -> None:
        name = module.__name__
        module.__loader__ = module.__spec__.loader = self._loader  # type: ignore[union-attr]
        _executing.append(name)
        try:
            self._loader.exec_module(module)
            if name in _WATCHED:
                _pending.append(module)
        finally:
            _executing.remove(name)
            _attach_pending()


def _attach_pending() -> None:
    """Give the pending hosts our names, once no watched module is half imported.

    Our modules import from all over anomalib, and their own import is often what triggers anomalib's. Attaching any
    earlier would meet half-initialised modules in one order of imports or another.
    """
    while _pending and not _executing:
        host = _pending.pop(0)
        _executing.append(__name__)  # what we import now must not attach in its turn
        try:
            from anomalib_mvfa import plugin

            plugin.attach(host)
        except Exception as error:  # noqa: BLE001 (a broken plugin must not break anomalib)
            _give_up(host.__name__, error)
        finally:
            _executing.remove(__name__)


def _give_up(host: str, error: Exception) -> None:
    """Warn, and try no more: every host would fail alike."""
    import warnings

    _pending.clear()
    if _FINDER in sys.meta_path:
        sys.meta_path.remove(_FINDER)
    warnings.warn(
        f"{host} works, but without MVFA: attaching it failed with {type(error).__name__}: {error}. "
        "Reinstall anomalib-mvfa, or set ANOMALIB_MVFA_PLUGIN=0 to do without it and silence this warning.",
        RuntimeWarning,
        stacklevel=2,
    )


_FINDER = _Finder()
