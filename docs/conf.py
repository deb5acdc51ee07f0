"""Configuration of the site; `make docs` builds it."""

import ast
import inspect
from pathlib import Path
from pydoc import locate

from anomalib.data import AnomalibDataModule, PredictDataset
from anomalib.models import AnomalibModule
from docutils.nodes import Element, TextElement
from sphinx.addnodes import pending_xref
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment

import anomalib_mvfa

project = "anomalib-mvfa"
author = "anomalib-mvfa contributors"
release = version = anomalib_mvfa.__version__

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"{project} {release}"

myst_enable_extensions = ["substitution"]
myst_heading_anchors = 3

napoleon_numpy_docstring = False
autodoc_typehints = "description"
autodoc_typehints_description_target = "documented"
python_maximum_signature_line_length = 88
nitpicky = True
nitpick_ignore_regex = [("py:.*", r"(?!anomalib_mvfa\.).*")]  # offline, there is no inventory of other projects' names


def _entries(names: list[str]) -> str:
    """Return directives that document public names."""
    lines = []
    for name in names:
        value = getattr(anomalib_mvfa, name)
        lines += [f".. auto{'class' if inspect.isclass(value) else 'function'}:: anomalib_mvfa.{name}"]
        lines += ["   :members:", ""] if name == "MvfaModel" else [""]
    return "\n".join(["```{eval-rst}", *lines, "```"])


def _modules() -> str:
    """Return a table of the package's files, with the first sentence of each one's docstring."""
    root = Path(anomalib_mvfa.__file__).parent
    rows = ["| file | what |", "| --- | --- |"]
    for path in sorted(root.rglob("*.py"), key=lambda path: (len(path.relative_to(root).parts), path)):
        doc = ast.get_docstring(ast.parse(path.read_text("utf-8"))) or ""
        summary = " ".join(doc.split("\n\n")[0].split()).replace("|", "\\|")
        if path.name != "__init__.py":
            rows.append(f"| `{path.relative_to(root)}` | {summary} |")
    return "\n".join(rows)


_public = [name for name in anomalib_mvfa.__all__ if not name.startswith("__")]
_bases = {"models": AnomalibModule, "data": AnomalibDataModule | PredictDataset}
_by_kind: dict[str, list[str]] = {"models": [], "data": [], "functions": []}
for _name in _public:
    _value = getattr(anomalib_mvfa, _name)
    _kinds = (kind for kind, base in _bases.items() if inspect.isclass(_value) and issubclass(_value, base))
    _by_kind[next(_kinds, "functions")].append(_name)
for _kind in _by_kind.values():
    _kind.sort(key=lambda name: (name not in {"Mvfa", "MvfaModel"}, name.lower()))

myst_substitutions = {"modules": _modules(), **{kind: _entries(names) for kind, names in _by_kind.items()}}


def _resolve(app: Sphinx, env: BuildEnvironment, node: pending_xref, text: TextElement) -> Element | None:
    """Link a full name of ours to its public entry, or leave it as text; one that does not exist is an error."""
    target = node.get("reftarget", "")
    if not target.startswith("anomalib_mvfa.") or locate(target) is None:
        return None
    entry = f"anomalib_mvfa.{target.rpartition('.')[2]}"
    python = env.get_domain("py")
    return python.resolve_xref(env, node["refdoc"], app.builder, node["reftype"], entry, node, text) or text


def setup(app: Sphinx) -> None:
    """Connect what Sphinx calls."""
    app.connect("missing-reference", _resolve)
