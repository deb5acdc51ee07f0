"""Every command of the README and of the site works, on small data and a tiny random CLIP, page by page.

A command that several pages show is taken once. All commands are parsed, and models and data built; those are run whose
code no other does: a training only if later commands read its results, since tests/test_configs.py runs all configs.
A block under the comment "not executed: reason" is only parsed.
"""

import inspect
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pandas as pd
import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI

from anomalib_mvfa import FewShot, Mvfa, plugin
from anomalib_mvfa.compare import runner
from anomalib_mvfa.compare.execute import execute
from anomalib_mvfa.data.base import SplitDataModule
from anomalib_mvfa.model.build import build_mvfa
from workspace import write_workspace

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]  # the README trains what other pages use
IMAGE_SIZE = 28
SMALL_PATCHCORE = "Patchcore, init_args: {backbone: test_resnet, pre_trained: false}}"
WEIGHTS = "weights/ViT-L-14-336px.pt"  # on the pages; a tiny random CLIP here
BLOCK = re.compile(r"(<!-- not executed: (?P<why>.+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)
LINK = re.compile(r"\]\((?!\w+://)([^)#]+)")
SOURCES = "\n".join(path.read_text("utf-8") for path in (ROOT / "src" / "anomalib_mvfa").rglob("*.py"))


class Block(NamedTuple):
    """A fenced block, and why it is not executed, if it is not."""

    language: str
    text: str
    why: str | None
    where: str

    def commands(self):
        """Return commands of the shell, one per element."""
        return [shlex.split(line, comments=True) for line in self.text.replace("\\\n", " ").splitlines()]


def blocks_of(page):
    text = page.read_text("utf-8")
    for found in BLOCK.finditer(text):
        line = text[: found.start("language")].count("\n") + 1
        yield Block(found["language"], found["text"], found["why"], f"{page.name}-line{line}")


def blocks_to_run():
    """Return blocks in order, each text once."""
    first: dict[str, Block] = {}
    for block in BLOCKS:
        if block.language in {"bash", "python", "yaml"} and block.why is None:
            first.setdefault(block.text, block)
    return list(first.values())


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
SKIPPED = [block for block in BLOCKS if block.why is not None]
DONE = []
"""Commands that have been run."""
TRAINED = [
    shlex.split("anomalib train --model Mvfa --data BMADFewShot --data.category Brain"),
    shlex.split("anomalib train --config configs/scans.yaml"),
]
"""Trainings whose results later commands read."""
BUILT = ["anomalib train", "anomalib test --config"]
"""Other commands that begin like this are not run."""


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A reader's folder, with every file that the commands name."""
    desk = tmp_path_factory.mktemp("desk")
    write_workspace(desk)
    slices = sorted((desk / "datasets" / "BMAD" / "Brain" / "test" / "Ungood" / "img").iterdir())
    (desk / "films").mkdir()
    for index, file in enumerate(slices[:2]):
        shutil.copy(file, desk / "films" / f"{index}.png")
    path = desk / "configs" / "compare" / "own_data.yaml"  # tests/compare/test_compare_configs.py runs all its methods
    config = yaml.safe_load(path.read_text())
    for name in ("WinCLIP", "CLIP"):
        del config["methods"][name], config["weights"][name]
    path.write_text(yaml.safe_dump(config, sort_keys=False))
    return desk


@pytest.fixture
def reader(desk, monkeypatch):
    """Sit down in that folder, where everything is small by default."""
    monkeypatch.chdir(desk)
    tiny = {"backbone": str(desk / "weights" / "tiny.json"), "pretrained": str(desk / WEIGHTS)}
    _change_defaults(monkeypatch, Mvfa.__init__, **tiny, image_size=IMAGE_SIZE, max_epochs=1, visualizer=False)
    _change_defaults(monkeypatch, build_mvfa, **tiny, image_size=IMAGE_SIZE)
    _change_defaults(monkeypatch, SplitDataModule.__init__, num_workers=0)
    _change_defaults(monkeypatch, FewShot.__init__, k_shot=1)
    monkeypatch.delenv("TRUST_REMOTE_CODE", raising=False)
    return monkeypatch


def _change_defaults(monkeypatch, function, **values):
    named = [
        p.name for p in inspect.signature(function).parameters.values() if p.default is not inspect.Parameter.empty
    ]
    changed = [values.get(name, default) for name, default in zip(named, function.__defaults__, strict=True)]
    assert set(values) <= set(named)
    monkeypatch.setattr(function, "__defaults__", tuple(changed))


@pytest.mark.parametrize(
    "block",
    [
        pytest.param(
            block,
            marks=[pytest.mark.slow] * (not block.where.startswith("README")),
            id=f"{block.language}-{block.where}",
        )
        for block in blocks_to_run()
    ],
)
def test_block_runs(block, reader):
    if "openvino" in block.text.lower():
        pytest.importorskip("openvino")
    if block.language == "yaml":
        _save(block.text)
    elif block.language == "python" and block.text.startswith("# own_"):
        Path(block.text.splitlines()[0].removeprefix("# ")).write_text(block.text)
    elif block.language == "python":
        text = block.text.replace("max_epochs=50", "max_epochs=1").replace("k_shot=4", "k_shot=1")
        reader.setenv("TRUST_REMOTE_CODE", "0")  # so that a value that the block sets does not outlive it
        exec(compile(text, block.where, "exec"), {"__name__": "docs"})  # noqa: S102  # our own text
    else:
        for command in block.commands():
            if command not in DONE:
                _run(command, reader)
                DONE.append(command)


def _save(text):
    """Save a file whose first line is its name."""
    name = text.splitlines()[0].removeprefix("# ")
    content = yaml.safe_load(text.replace("[cuda]", "[cpu]").replace("Patchcore}", SMALL_PATCHCORE))
    Path(name).write_text(yaml.safe_dump(content))


def _run(words, monkeypatch):
    match words:
        case ["export", assignment]:
            variable = assignment.partition("=")[0]
            # Read at import; tests/test_plugin.py shows the effect in a fresh interpreter.
            assert f'os.environ.get("{variable}"' in SOURCES
        case ["make", "demo"]:  # tests/test_demo.py runs it
            assert "-m anomalib_mvfa.demo" in (ROOT / "Makefile").read_text()
        case ["anomalib", *arguments]:
            with monkeypatch.context() as patch:
                if words not in TRAINED and " ".join(words).startswith(tuple(BUILT)):
                    patch.setattr(AnomalibCLI, "_run_subcommand", lambda cli: None)
                AnomalibCLI([*arguments, *_overrides(arguments)])
        case ["anomalib-mvfa", *arguments]:
            monkeypatch.setattr(runner, "_on_this_machine", _here)
            monkeypatch.setattr("sys.argv", ["anomalib-mvfa", *arguments, *_overrides(arguments)])
            assert not plugin.main()
        case _:
            pytest.fail(f"do not know how to run {words}")


def _here(jobs, output, *_):
    """Run jobs of a comparison in this process, where models are small."""
    return (execute(job, output) for job in jobs)


def _overrides(arguments):
    """Options that make a command cheap. Those of the pages stay, but for the backbone and how long it trains."""
    command = arguments[0]
    if command in {"benchmark", "compare", "report"}:
        return []  # the files that these name are small here
    options = {"--model.backbone": "weights/tiny.json", "--model.image_size": IMAGE_SIZE}
    if "--model.pretrained" not in arguments:
        options["--model.pretrained"] = str(Path(WEIGHTS).resolve())
    if ["anomalib", *arguments] == TRAINED[0]:
        options["--model.levels"] = "[1]"  # which is faster to export
    # `fit` goes on from a finished run of one epoch.
    options["--model.max_epochs"] = 2 if command == "fit" or "--select_epoch_on_test" in arguments else 1
    if command != "export":
        options |= {"--trainer.accelerator": "cpu", "--trainer.enable_progress_bar": "false"}
    options["--model.visualizer"] = "true" if command == "predict" else "false"
    if command in {"train", "fit", "test", "repeat"}:
        options["--data.num_workers"] = 0
    if command == "repeat":
        options["--seeds"] = 0
    config = arguments[arguments.index("--config") + 1] if "--config" in arguments else ""
    if Path(config).name in {"own_data.yaml", "mvtec.yaml", "scans.yaml"} or command == "repeat":
        options["--data.k_shot"] = 1
    return [f"{name}={value}" for name, value in options.items()]


@pytest.mark.slow
def test_what_the_commands_are_said_to_write(desk):
    """Runs after the blocks."""
    results = desk / "results"
    if not results.exists():
        pytest.skip("needs the blocks to have run")
    assert (results / "Mvfa" / "BMAD" / "Brain" / "latest" / "weights" / "lightning" / "model.ckpt").is_file()
    assert {path.name for path in (results / "Mvfa" / "latest" / "images").rglob("*.png")} >= {"0.png", "1.png"}
    for name in ("repeat/report/index.html", "Brain.pth", "compare/own_data/report/index.html"):
        assert (results / name).is_file(), name
    (benchmark,) = (path for path in desk.rglob("results.csv") if not {"compare", "repeat"} & {*path.parts})
    assert len(pd.read_csv(benchmark)) == 2


@pytest.mark.parametrize("block", SKIPPED, ids=lambda block: f"{block.language}-{block.where}")
def test_block_that_is_not_executed_has_valid_syntax(block):
    if block.language == "python":
        compile(block.text, block.where, "exec")
    else:
        assert block.language == "bash"
        subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)  # noqa: S607  # whichever bash there is


def test_few_blocks_are_not_executed():
    assert len(SKIPPED) <= 8
    shown = [command for block in BLOCKS if block.language == "bash" for command in block.commands()]
    assert all(command in shown for command in TRAINED)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_to_files_exist(page):
    links = [link for link in LINK.findall(page.read_text("utf-8")) if not (page.parent / link).is_file()]
    assert links == []
