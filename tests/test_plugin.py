"""The plugin in fresh interpreters: most of what it does, it does only once in a process."""

import importlib
import json
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
from anomalib.data import AnomalibDataModule
from anomalib.models import AnomalibModule, convert_to_snake_case

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
        timeout=120,
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


def test_hook_is_active_once():
    # In a virtual environment site reads .pth files twice.
    finders = python("import sys; print(*(type(finder).__module__ for finder in sys.meta_path))")
    assert finders.split().count("anomalib_mvfa_hook") == 1


def test_hook_attaches_when_the_outermost_import_is_done(small_world):
    code = "import anomalib.models; print('done')"
    lines = python(code, PYTHONPATH=str(small_world)).splitlines()
    assert sorted(lines[:-1]) == ["attached anomalib.data", "attached anomalib.models"]
    assert lines[-1] == "done"


def test_hook_attaches_to_a_host_that_is_imported_already(small_world):
    code = """
    import anomalib.models, anomalib_mvfa_hook, os, sys
    print("off", anomalib_mvfa_hook._FINDER in sys.meta_path)
    del os.environ["ANOMALIB_MVFA_PLUGIN"]
    anomalib_mvfa_hook.install()
    anomalib_mvfa_hook.install()
    """
    lines = python(code, PYTHONPATH=str(small_world), ANOMALIB_MVFA_PLUGIN="0").splitlines()
    assert lines[0] == "off False"
    assert sorted(lines[1:]) == ["attached anomalib.data", "attached anomalib.models"]


def test_hook_leaves_the_modules_with_their_own_loaders(small_world):
    code = """
    import anomalib.models
    print(type(anomalib.models.__loader__).__name__, type(anomalib.models.__spec__.loader).__name__)
    """
    assert python(code, PYTHONPATH=str(small_world)).splitlines()[-1] == "SourceFileLoader SourceFileLoader"


def test_hook_bears_another_that_searches_all_finders(small_world):
    code = """
    import sys

    class Other:
        def find_spec(self, *args):
            specs = (finder.find_spec(*args) for finder in sys.meta_path if finder is not self)
            return next(filter(None, specs), None) if args[0] == "anomalib.data" else None

    sys.meta_path.insert(0, Other())
    import anomalib.data
    """
    assert python(code, PYTHONPATH=str(small_world)).strip() == "attached anomalib.data"


def test_hook_draws_no_warning_away_from_the_importing_module(small_world):
    (small_world / "anomalib/models.py").write_text("import anomalib.old")
    (small_world / "anomalib/old.py").write_text("import warnings; warnings.warn('old', FutureWarning, stacklevel=2)")
    code = """
    import warnings
    with warnings.catch_warnings(record=True) as caught:
        import anomalib.models
    print(*(warning.filename for warning in caught))
    """
    assert python(code, PYTHONPATH=str(small_world)).splitlines()[-1] == str(small_world / "anomalib/models.py")


@pytest.mark.parametrize("first", [True, False], ids=["one by one", "both at once"])
def test_failing_plugin_only_warns_and_once(small_world, first):
    (small_world / "anomalib_mvfa/plugin.py").write_text("raise OSError('disk on fire')")
    imports = "import anomalib.data, anomalib.models" if first else "import anomalib.models"
    printed = python(f"{imports}; print('done')", PYTHONPATH=str(small_world))
    assert printed.startswith("done")
    assert printed.count("MVFA:") == 1
    assert "anomalib.data works, but without MVFA" in printed
    assert "OSError: disk on fire" in printed
    assert "ANOMALIB_MVFA_PLUGIN=0" in printed


def test_hook_outlives_a_failing_import_of_anomalib(small_world):
    (small_world / "anomalib/engine.py").write_text("import anomalib.models, missing_dependency")
    code = """
    try:
        import anomalib.engine
    except ModuleNotFoundError as error:
        print(error.name)
    """
    lines = python(code, PYTHONPATH=str(small_world)).splitlines()
    assert sorted(lines) == ["attached anomalib.data", "attached anomalib.models", "missing_dependency"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, to import torch only once")
def test_every_first_import_attaches_everything():
    first_imports = [
        "import anomalib.models",
        "import anomalib.data",
        "import anomalib.engine",
        "import anomalib.cli.cli",
        "import anomalib.visualization",
        "from anomalib.models.image.padim import Padim",
        "from anomalib_mvfa import Mvfa",
        "from anomalib_mvfa import AprilGan",
        "from anomalib_mvfa import MvfaModel",
        "from anomalib_mvfa import BMADFewShot",
        "import anomalib_mvfa.data",
        "import anomalib_mvfa.model.lightning_model",
        "import anomalib_mvfa.plugin; anomalib_mvfa.plugin.register()",
    ]
    printed = python(
        f"""
        import contextlib, importlib, os, sys

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

        for first in {first_imports!r}:
            child = os.fork()
            if child:
                os.waitpid(child, 0)
                continue
            try:
                assert not any(name.startswith(("anomalib.", "anomalib_mvfa.")) for name in sys.modules)
                exec(first)
                data = sys.modules["anomalib.data"]
                lacking = [name for name in {DATA_NAMES!r} if not hasattr(data, name)]
                import anomalib_mvfa
                from anomalib import models
                for snake, name in {MODEL_NAMES!r}.items():
                    assert getattr(models, name) is getattr(anomalib_mvfa, name) and snake in models.list_models()
                assert "anomalib_mvfa" in models.ALLOWED_MODULES
                print(first, lacking, flush=True)
            except BaseException as error:
                print(first, repr(error), flush=True)
            finally:
                os._exit(0)
        """,
    )
    assert printed.splitlines() == [f"{first} []" for first in first_imports]


def test_switched_off_until_registered_by_hand():
    printed = python(
        f"""
        import json
        import anomalib.data, anomalib.models

        def known():
            models = [name in anomalib.models.list_models() for name in {MODEL_NAMES!r}]
            return [*models, *(hasattr(anomalib.data, name) for name in {DATA_NAMES!r})]

        import anomalib_mvfa
        found = [known()]
        anomalib_mvfa.register()
        found.append(known())
        once = dict(vars(anomalib.models)), dict(vars(anomalib.data)), set(anomalib.models.ALLOWED_MODULES)
        anomalib_mvfa.register()
        assert once == (vars(anomalib.models), vars(anomalib.data), anomalib.models.ALLOWED_MODULES)
        print(json.dumps(found))
        """,
        ANOMALIB_MVFA_PLUGIN="0",
    )
    names = len(MODEL_NAMES) + len(DATA_NAMES)
    assert json.loads(printed) == [[False] * names, [True] * names]


@pytest.mark.parametrize(("snake", "name"), MODEL_NAMES.items())
def test_get_model_knows_ours(snake, name, monkeypatch):
    from anomalib.models import get_model

    kind = getattr(anomalib_mvfa, name)
    monkeypatch.setattr(kind, "__init__", lambda self: None)  # without building CLIP
    for spelling in (snake, {"class_path": name}, {"class_path": f"anomalib_mvfa.{name}"}):
        assert type(get_model(spelling)) is kind


@pytest.mark.parametrize("name", DATA_NAMES)
def test_get_datamodule_knows_ours(name, monkeypatch):
    from anomalib.data import get_datamodule

    monkeypatch.setattr(getattr(anomalib_mvfa, name), "__init__", lambda self: None)
    assert type(get_datamodule({"class_path": name})) is getattr(anomalib_mvfa, name)


def test_console_script_parses_short_names(monkeypatch, capsys):
    command = "anomalib-mvfa train --model Mvfa --data Phantom --print_config"
    monkeypatch.setattr(sys, "argv", command.split())
    with pytest.raises(SystemExit) as stop:
        plugin.main()
    printed = capsys.readouterr().out
    assert stop.value.code == 0
    assert "class_path: anomalib_mvfa." in printed


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


def test_package_imports_on_first_use_only():
    code = "import anomalib_mvfa, sys; print({'anomalib', 'torch'} & {*sys.modules}, anomalib_mvfa.__version__)"
    assert python(code).split() == ["set()", anomalib_mvfa.__version__]


def test_package_has_the_names_of_its_stub():
    assert {*anomalib_mvfa.__all__} <= {*dir(anomalib_mvfa)}
    for name, module in anomalib_mvfa.MODULES.items():
        assert getattr(anomalib_mvfa, name) is getattr(importlib.import_module(module, "anomalib_mvfa"), name)
    with pytest.raises(AttributeError, match=r"no attribute 'Mvfaa'; its public names are .*Mvfa, "):
        anomalib_mvfa.Mvfaa  # noqa: B018


@pytest.fixture(scope="module", params=["build_wheel", "build_editable"])
def wheel(request, tmp_path_factory):
    """What pip installs, for a plain and for an editable install."""
    folder = tmp_path_factory.mktemp(request.param)
    code = f"import hatchling.build; hatchling.build.{request.param}({str(folder)!r})"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    return next(folder.glob("*.whl"))


def test_wheel_has_the_start_up_files_on_top_and_the_types(wheel):
    with zipfile.ZipFile(wheel) as archive:
        assert archive.read("anomalib_mvfa_hook.pth") == b"import anomalib_mvfa_hook; anomalib_mvfa_hook.install()\n"
        assert archive.read("anomalib_mvfa_hook.start") == b"anomalib_mvfa_hook:install\n"
        assert pkgutil.resolve_name("anomalib_mvfa_hook:install") is anomalib_mvfa_hook.install
        assert archive.read("anomalib_mvfa_hook.py") == (SOURCE / "anomalib_mvfa_hook.py").read_bytes()
        if "editable" not in str(wheel):
            assert {"anomalib_mvfa/__init__.pyi", "anomalib_mvfa/py.typed"} <= {*archive.namelist()}


def test_uninstall_leaves_nothing(wheel, tmp_path):
    venv.create(tmp_path)
    executable = tmp_path / ("Scripts" if os.name == "nt" else "bin") / "python"
    pip = [sys.executable, "-m", "pip", "--quiet", "--python", str(executable)]
    subprocess.run([*pip, "install", "--no-deps", "--no-index", str(wheel)], check=True)
    code = "import sys; print([type(finder).__module__ for finder in sys.meta_path].count('anomalib_mvfa_hook'))"
    # Away from the sources, which the current folder would put on the path.
    active = subprocess.run([executable, "-c", code], cwd=tmp_path, check=True, capture_output=True, text=True).stdout
    assert active == "1\n"
    subprocess.run([*pip, "uninstall", "--yes", "anomalib-mvfa"], check=True)
    assert [*tmp_path.rglob("*mvfa*")] == []
