"""The plugin in fresh interpreters: most of what it does, it does only once in a process."""

import importlib
import os
import pkgutil
import subprocess
import sys
import textwrap
import venv
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
from anomalib.data import AnomalibDataModule, get_datamodule
from anomalib.models import AnomalibModule, convert_to_snake_case, get_model

import anomalib_mvfa
import anomalib_mvfa_hook
from anomalib_mvfa import plugin

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"
CLASSES = {name: value for name in anomalib_mvfa.__all__ if isinstance(value := getattr(anomalib_mvfa, name), type)}
DATA_NAMES = [name for name, value in CLASSES.items() if issubclass(value, AnomalibDataModule)]
# WinClipBaseline derives from anomalib's WinClip, and anomalib lists direct subclasses only.
MODEL_NAMES = {
    convert_to_snake_case(name): name for name, value in CLASSES.items() if AnomalibModule in value.__bases__
}
assert {"FewShot", "Scans"} <= {*DATA_NAMES}
assert {"mvfa", "mkd"} <= {*MODEL_NAMES}


def python(code: str, *options: str, **environment: str) -> str:
    """Run code in a fresh interpreter and return what it prints; warnings of ours are printed, too."""
    done = subprocess.run(
        [sys.executable, *options, "-c", textwrap.dedent(code)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=400,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout + "".join(line for line in done.stderr.splitlines(keepends=True) if "MVFA" in line)


@pytest.fixture
def small_world(tmp_path):
    """A folder with an anomalib that has the two hosts and nothing else, and a plugin that notes its calls."""
    for name, content in {
        "anomalib/__init__.py": "",
        "anomalib/data.py": "",
        "anomalib/models.py": "import anomalib.data",
        "anomalib_mvfa/__init__.py": "",
        "anomalib_mvfa/plugin.py": "def attach(host): print('attached', host.__name__)",
    }.items():
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(content)
    return tmp_path


def test_installed_hook_is_the_one_in_src():
    installed = Path(anomalib_mvfa_hook.__file__).read_text()
    assert installed == (SOURCE / "anomalib_mvfa_hook.py").read_text(), "run `make install` to install the changed hook"


def test_hook_imports_nothing_at_start_up():
    # site has imported os by the time it reads .pth files.
    new = python(
        f"""
        import os, sys
        before = set(sys.modules)
        sys.path.insert(0, {str(SOURCE)!r})
        import anomalib_mvfa_hook
        anomalib_mvfa_hook.install()
        print(*set(sys.modules) - before)
        """,
        "-S",
    )
    assert new.split() == ["anomalib_mvfa_hook"]


def test_hook_is_active_once_and_package_imports_on_first_use_only():
    # In a virtual environment site reads .pth files twice.
    code = """
    import sys
    print([type(finder).__module__ for finder in sys.meta_path].count("anomalib_mvfa_hook"))
    import anomalib_mvfa
    print({"anomalib", "torch"} & {*sys.modules}, anomalib_mvfa.__version__)
    """
    assert python(code).split() == ["1", "set()", anomalib_mvfa.__version__]


OTHER_HOOK = """
import sys

class Other:
    def find_spec(self, *args):
        specs = (finder.find_spec(*args) for finder in sys.meta_path if finder is not self)
        return next(filter(None, specs), None) if args[0] == "anomalib.data" else None

sys.meta_path.insert(0, Other())
"""
FAILING_IMPORT = """
try:
    import anomalib.engine
except ModuleNotFoundError as error:
    assert error.name == "missing_dependency"
"""
LATE_HOOK = """
import anomalib.models, anomalib_mvfa_hook, os, sys
anomalib_mvfa_hook._FINDER in sys.meta_path and print("on")
del os.environ["ANOMALIB_MVFA_PLUGIN"]
anomalib_mvfa_hook.install()
anomalib_mvfa_hook.install()
"""


@pytest.mark.parametrize(
    ("code", "off"),
    [
        ("import anomalib.models; print('done')", False),
        (f"{OTHER_HOOK}\nimport anomalib.models; print('done')", False),
        (f"{FAILING_IMPORT}\nprint('done')", False),
        (f"{LATE_HOOK}\nprint('done')", True),
    ],
    ids=["outermost import", "beside another hook", "import that fails", "hosts that are there already"],
)
def test_hook_attaches_to_both_hosts_once(small_world, code, off):
    (small_world / "anomalib/engine.py").write_text("import anomalib.models, missing_dependency")
    lines = python(code, PYTHONPATH=str(small_world), **{"ANOMALIB_MVFA_PLUGIN": "0"} if off else {}).splitlines()
    assert sorted(lines[:-1]) == ["attached anomalib.data", "attached anomalib.models"]
    assert lines[-1] == "done"


def test_hook_leaves_loaders_and_warnings_as_they_were(small_world):
    (small_world / "anomalib/models.py").write_text("import anomalib.old")
    (small_world / "anomalib/old.py").write_text("import warnings; warnings.warn('old', FutureWarning, stacklevel=2)")
    code = """
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        import anomalib.models
    print(*(warning.filename for warning in caught))
    print(type(anomalib.models.__loader__).__name__, type(anomalib.models.__spec__.loader).__name__)
    """
    lines = python(code, PYTHONPATH=str(small_world)).splitlines()
    assert lines[-2:] == [str(small_world / "anomalib/models.py"), "SourceFileLoader SourceFileLoader"]


@pytest.mark.parametrize("imports", ["import anomalib.data, anomalib.models", "import anomalib.models"])
def test_failing_plugin_only_warns_and_once(small_world, imports):
    (small_world / "anomalib_mvfa/plugin.py").write_text("raise OSError('disk on fire')")
    printed = python(f"{imports}; print('done')", PYTHONPATH=str(small_world))
    assert printed.startswith("done")
    assert printed.count("MVFA:") == 1
    for part in ("anomalib.data works, but without MVFA", "OSError: disk on fire", "ANOMALIB_MVFA_PLUGIN=0"):
        assert part in printed


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, to import torch only once")
def test_every_first_import_attaches_everything_and_the_environment_sets_defaults(tiny_config):
    by_hand = """
hooks = [finder for finder in sys.meta_path if type(finder).__module__ == "anomalib_mvfa_hook"]
sys.meta_path.remove(*hooks)
import anomalib.data, anomalib.models
assert not any(hasattr(anomalib.data, name) for name in data_names)
assert not {*model_names} & {*anomalib.models.list_models()}
import anomalib_mvfa
anomalib_mvfa.register()
once = dict(vars(anomalib.models)), dict(vars(anomalib.data)), set(anomalib.models.ALLOWED_MODULES)
anomalib_mvfa.register()
assert once == (vars(anomalib.models), vars(anomalib.data), anomalib.models.ALLOWED_MODULES)
"""
    by_environment = """
import inspect, anomalib_mvfa
kinds = [getattr(anomalib_mvfa, name) for name in model_names.values()]
found = [(name, p.default) for kind in kinds for name, p in inspect.signature(kind).parameters.items()]
assert {default for name, default in found if name == "pretrained"} == {None}
assert {default for name, default in found if name == "pre_trained"} == {False}
assert anomalib_mvfa.Mvfa().hparams["backbone"] == os.environ["ANOMALIB_MVFA_BACKBONE"]
"""
    torch_alone = """
for name in [name for name in sys.modules if name.partition(".")[0] == "lightning"]:
    del sys.modules[name]
from anomalib_mvfa import MvfaModel, build_mvfa
assert not {"anomalib", "lightning"} & {*sys.modules}
print(number, flush=True)
os._exit(0)
"""
    first_imports = [
        "import anomalib.models",
        "import anomalib.data",
        "from anomalib.cli.cli import main",
        by_hand,
        by_environment,
        torch_alone,
    ]
    printed = python(
        f"""
        import contextlib, importlib, os, sys
        data_names, model_names = {DATA_NAMES!r}, {MODEL_NAMES!r}

        # What the children need of other packages is imported once, in the order in which a first child has met it.
        reader, writer = os.pipe()
        if not os.fork():
            import anomalib.cli.cli, anomalib.models, anomalib_mvfa
            known = [name for name in sys.modules if name.partition(".")[0] not in ("anomalib", "anomalib_mvfa")]
            os.fdopen(writer, "w").write(" ".join(known))
            os._exit(0)
        os.close(writer)
        for name in os.fdopen(reader).read().split():
            with contextlib.suppress(Exception):
                importlib.import_module(name)

        for number, first in enumerate({first_imports!r}):
            child = os.fork()
            if child:
                os.waitpid(child, 0)
                continue
            try:
                assert not any(name.startswith(("anomalib.", "anomalib_mvfa.")) for name in sys.modules)
                exec(first)
                data = sys.modules["anomalib.data"]
                assert all(hasattr(data, name) for name in data_names)
                import anomalib_mvfa
                from anomalib import models
                for snake, name in model_names.items():
                    assert getattr(models, name) is getattr(anomalib_mvfa, name) and snake in models.list_models()
                assert "anomalib_mvfa" in models.ALLOWED_MODULES
                from anomalib.cli import cli
                assert cli.AnomalibCLI.__name__ == "CheckpointCli"
                print(number, flush=True)
            except BaseException as error:
                print(first, repr(error), flush=True)
            finally:
                os._exit(0)
        """,
        ANOMALIB_MVFA_BACKBONE=str(tiny_config),
        ANOMALIB_MVFA_PRETRAINED="null",
    )
    assert printed.split() == [str(number) for number in range(len(first_imports))]


def test_anomalibs_functions_know_ours(monkeypatch):
    for name in (*MODEL_NAMES.values(), *DATA_NAMES):
        monkeypatch.setattr(getattr(anomalib_mvfa, name), "__init__", lambda self: None)  # without building CLIP
    for snake, name in MODEL_NAMES.items():
        for spelling in (snake, {"class_path": name}, {"class_path": f"anomalib_mvfa.{name}"}):
            assert type(get_model(spelling)) is getattr(anomalib_mvfa, name)
    for name in DATA_NAMES:
        assert type(get_datamodule({"class_path": name})) is getattr(anomalib_mvfa, name)


def test_console_script_parses_short_names(monkeypatch, capsys):
    command = "anomalib-mvfa train --model Mvfa --data Phantom --print_config"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as stop:
        plugin.main()
    assert stop.value.code == 0
    assert "class_path: anomalib_mvfa." in capsys.readouterr().out


def test_a_name_of_anomalib_is_never_overwritten(caplog):
    theirs = type("FewShot", (), {"__module__": "anomalib.data.datamodules"})
    host = ModuleType("anomalib.data")
    host.FewShot = theirs
    plugin.attach(host)
    assert host.FewShot is theirs
    assert host.Phantom is anomalib_mvfa.Phantom
    assert "ours is anomalib_mvfa.FewShot" in caplog.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [("anomalib.models", {*MODEL_NAMES.values(), "WinClipBaseline"}), ("anomalib.data", {*DATA_NAMES, "PredictScans"})],
)
def test_anomalib_gets_models_and_data_and_nothing_else(name, expected):
    host = ModuleType(name)
    host.ALLOWED_MODULES = set()
    plugin.attach(host)
    assert {*vars(host)} & {*anomalib_mvfa.__all__} == expected


def test_package_has_the_names_of_its_stub():
    assert {*anomalib_mvfa.__all__} <= {*dir(anomalib_mvfa)}
    for name, module in anomalib_mvfa.MODULES.items():
        assert getattr(anomalib_mvfa, name) is getattr(importlib.import_module(module, "anomalib_mvfa"), name)
    with pytest.raises(AttributeError, match=r"no attribute 'Mvfaa'; its public names are .*Mvfa, "):
        anomalib_mvfa.Mvfaa  # noqa: B018


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """What pip installs, for a plain and for an editable install."""
    folders = {kind: str(tmp_path_factory.mktemp(kind)) for kind in ("build_wheel", "build_editable")}
    code = f"import hatchling.build as b; [getattr(b, kind)(folder) for kind, folder in {folders!r}.items()]"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    return [next(Path(folder).glob("*.whl")) for folder in folders.values()]


def test_wheels_have_the_start_up_files_on_top_and_the_types(wheels):
    for wheel in wheels:
        with zipfile.ZipFile(wheel) as archive:
            start = b"import anomalib_mvfa_hook; anomalib_mvfa_hook.install()\n"
            assert archive.read("anomalib_mvfa_hook.pth") == start
            assert archive.read("anomalib_mvfa_hook.start") == b"anomalib_mvfa_hook:install\n"
            assert archive.read("anomalib_mvfa_hook.py") == (SOURCE / "anomalib_mvfa_hook.py").read_bytes()
            if wheel == wheels[0]:
                assert {"anomalib_mvfa/__init__.pyi", "anomalib_mvfa/py.typed"} <= {*archive.namelist()}
    assert pkgutil.resolve_name("anomalib_mvfa_hook:install") is anomalib_mvfa_hook.install


def test_uninstall_leaves_nothing(wheels, tmp_path):
    venv.create(tmp_path)
    executable = tmp_path / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(executable)]
    code = "import sys; print([type(finder).__module__ for finder in sys.meta_path].count('anomalib_mvfa_hook'))"
    for wheel in wheels:
        subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
        # Away from the sources, which the current folder would put on the path.
        done = subprocess.run([executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True)
        assert done.stdout == "1\n"
        subprocess.run([*pip, "uninstall", "--yes", "anomalib-mvfa"], check=True)
        assert [*tmp_path.rglob("*mvfa*")] == []
