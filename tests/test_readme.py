"""Every command of the README is run, on small data and a tiny backbone, in the order in which it stands there."""

import inspect
import re
import shlex
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from anomalib.cli.cli import AnomalibCLI

import anomalib_mvfa
from anomalib_mvfa import Mvfa, MvfaModel, demo, plugin
from anomalib_mvfa.compare import run
from anomalib_mvfa.compare.job import CompareJob
from anomalib_mvfa.data.base import SplitDataModule
from workspace import write_workspace

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
IMAGE_SIZE = 28
WEIGHTS = "weights/ViT-L-14-336px.pt"  # in the README; a tiny CLIP here
BLOCK = re.compile(r"(<!-- not executed: (?P<why>.+?) -->\n)?```(?P<language>\w+)\n(?P<text>.*?)```", re.DOTALL)
SOURCES = "\n".join(path.read_text("utf-8") for path in (ROOT / "src" / "anomalib_mvfa").rglob("*.py"))


class Block(NamedTuple):
    """A fenced block, and why it is not executed, if it is not."""

    language: str
    text: str
    why: str | None
    line: int


BLOCKS = [
    Block(found["language"], found["text"], found["why"], README[: found.start("language")].count("\n") + 1)
    for found in BLOCK.finditer(README)
]
RUN = [block for block in BLOCKS if block.language in {"bash", "python", "yaml"} and block.why is None]
SKIPPED = [block for block in BLOCKS if block.why is not None]


def name_of(block):
    return f"{block.language}-line{block.line}"


# ---------------------------------------------------------------------------------------------------------- the reader


@pytest.fixture(scope="module")
def desk(tmp_path_factory):
    """A reader's folder, with every file that the README's commands name."""
    desk = tmp_path_factory.mktemp("desk")
    write_workspace(desk)
    slices = sorted((desk / "datasets" / "BMAD" / "Brain" / "test" / "Ungood" / "img").iterdir())
    (desk / "films").mkdir()
    for index, file in enumerate(slices[:2]):
        shutil.copy(file, desk / "films" / f"{index}.png")
    return desk


@pytest.fixture
def reader(desk, monkeypatch):
    """Sit down in that folder, where everything is small by default."""
    monkeypatch.chdir(desk)
    tiny = {"backbone": str(desk / "weights" / "tiny.json"), "pretrained": str(desk / WEIGHTS)}
    small = {"image_size": IMAGE_SIZE, "max_epochs": 1, "visualizer": False}
    _change_defaults(monkeypatch, Mvfa, **tiny, **small)
    _change_defaults(monkeypatch, MvfaModel, **tiny, image_size=IMAGE_SIZE)
    _change_defaults(monkeypatch, SplitDataModule, num_workers=0)
    monkeypatch.delenv("TRUST_REMOTE_CODE", raising=False)
    return monkeypatch


def _change_defaults(monkeypatch, cls, **values):
    function = cls.__init__
    named = [
        p.name for p in inspect.signature(function).parameters.values() if p.default is not inspect.Parameter.empty
    ]
    changed = [values.get(name, default) for name, default in zip(named, function.__defaults__, strict=True)]
    assert set(values) <= set(named)
    monkeypatch.setattr(function, "__defaults__", tuple(changed))


@pytest.mark.parametrize("block", RUN, ids=name_of)
def test_block_runs(block, reader):
    if "openvino" in block.text.lower():
        pytest.importorskip("openvino")
    if block.language == "yaml":
        _save(block.text)
    elif block.language == "python":
        text = block.text.replace("max_epochs=50", "max_epochs=1")
        reader.setenv("TRUST_REMOTE_CODE", "0")  # so that a value that the block sets does not outlive it
        exec(compile(text, f"README.md:{block.line}", "exec"), {"__name__": "readme"})  # noqa: S102  # our own text
    else:
        for line in block.text.replace("\\\n", " ").splitlines():
            _run(shlex.split(line), reader)


def _save(text):
    """Save a file whose first line is its name."""
    name = text.splitlines()[0].removeprefix("# ")
    content = yaml.safe_load(text.replace("[cuda]", "[cpu]"))
    Path(name).write_text(yaml.safe_dump(content))


def _run(words, monkeypatch):
    match words:
        case ["export", assignment]:
            variable = assignment.partition("=")[0]
            # Read at import; tests/model/test_lightning_model.py shows the effect in a fresh interpreter.
            assert f'os.environ.get("{variable}"' in SOURCES
        case ["make", "demo"]:
            assert "-m anomalib_mvfa.demo" in (ROOT / "Makefile").read_text()
            quick = {
                "model.max_epochs": 1,
                "model.image_size": IMAGE_SIZE,
                "model.visualizer": "false",
                "data.k_shot": 1,
                "data.source.init_args.size": 64,
                "trainer.accelerator": "cpu",
            }
            scores = demo.main([f"--{name}={value}" for name, value in quick.items()])
            assert set(scores) == {"untrained", "trained"}
        case ["anomalib", *arguments]:
            AnomalibCLI([*arguments, *_overrides(arguments)])
        case ["anomalib-mvfa", *arguments]:
            monkeypatch.setattr(run, "_on_this_machine", _here)
            monkeypatch.setattr("sys.argv", ["anomalib-mvfa", *arguments, *_overrides(arguments)])
            assert not plugin.main()
        case _:
            pytest.fail(f"do not know how to run {words}")


def _here(jobs, output, *_):
    """Run jobs of a comparison in this process, where models are small."""
    return (CompareJob(job, output).run() for job in jobs)


def _overrides(arguments):
    """Options that make a command cheap. Those of the README stay, but for the backbone and how long it trains."""
    command = arguments[0]
    if command in {"benchmark", "compare", "report"}:
        return []  # the files that these name are small here
    options = {"--model.backbone": "weights/tiny.json", "--model.image_size": IMAGE_SIZE}
    if "--model.pretrained" not in arguments:
        options["--model.pretrained"] = str(Path(WEIGHTS).resolve())
    # `fit` goes on from a finished run of one epoch.
    options["--model.max_epochs"] = 2 if command == "fit" or "--select_epoch_on_test" in arguments else 1
    if command != "export":
        options |= {"--trainer.accelerator": "cpu", "--trainer.enable_progress_bar": "false"}
    options["--model.visualizer"] = "true" if command == "predict" else "false"
    if command in {"train", "fit", "test", "repeat"}:
        options["--data.num_workers"] = 0
    config = arguments[arguments.index("--config") + 1] if "--config" in arguments else ""
    if Path(config).name in {"own_data.yaml", "mvtec.yaml"} or command == "repeat":
        options["--data.k_shot"] = 1
    return [f"{name}={value}" for name, value in options.items()]


def test_what_the_commands_are_said_to_write(desk):
    """Runs after the blocks."""
    results = desk / "results"
    if not results.exists():
        pytest.skip("needs the blocks to have run")
    assert (results / "Mvfa" / "BMAD" / "Brain" / "latest" / "weights" / "lightning" / "model.ckpt").is_file()
    assert {path.name for path in (results / "Mvfa" / "latest" / "images").rglob("*.png")} >= {"0.png", "1.png"}
    assert any(results.glob("Mvfa/BMAD/Liver/v*/checkpoints/every_epoch/epoch=1.ckpt"))
    for name in ("repeat.json", "Brain.pth", "compare/own_data/report/index.html"):
        assert (results / name).is_file(), name


@pytest.mark.parametrize("block", SKIPPED, ids=name_of)
def test_block_that_is_not_executed_has_valid_syntax(block):
    assert block.language == "bash"
    subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)  # noqa: S607  # whichever bash there is


def test_few_blocks_are_not_executed():
    assert len(SKIPPED) <= 4
    assert README.count("```") == 2 * len(BLOCKS)


# ------------------------------------------------------------------------------------------------------- the statements


def _tree():
    """Paths that the README's tree names: indented by two spaces a level, folders with a slash."""
    text = next(block.text for block in BLOCKS if block.language == "text" and block.text.startswith("src/"))
    parents: list[str] = []
    for line in text.splitlines():
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        parents[depth:] = [name]
        yield "".join(parents)


def test_the_tree_is_true():
    named = list(_tree())
    assert len(set(named)) == len(named)
    for path in named:
        assert (ROOT / path).is_dir() if path.endswith("/") else (ROOT / path).is_file(), path
    there = {
        str(path.relative_to(ROOT))
        for folder in ("src", "configs")
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and path.suffix != ".pyc"
    }
    assert there <= set(named)


def test_every_config_is_mentioned_outside_of_the_tree():
    commands = "".join(block.text for block in RUN if block.language == "bash")
    for config in (ROOT / "configs").glob("*.yaml"):
        assert f"configs/{config.name}" in commands or config.name == "demo.yaml", config


def test_links_exist():
    headings = {
        re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.*)$", README, re.MULTILINE)
    }
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert links
    for link in links:
        assert link[1:] in headings if link.startswith("#") else (ROOT / link).is_file(), link


def test_the_table_of_arguments_has_the_defaults():
    parameters = inspect.signature(Mvfa).parameters
    section = README.split("\n## Arguments\n")[1].split("\n## ")[0]
    rows = [line.split("|")[1:4] for line in section.splitlines() if line.startswith("| `")]
    assert len(rows) > 15
    mentioned = set()
    for names, default, _ in rows:
        for name in re.findall(r"`(\w+)`", names):
            mentioned.add(name)
            if (given := re.fullmatch(r" `(.*)` ", default)) and name not in {"backbone", "pretrained"}:
                assert parameters[name].default == yaml.safe_load(given[1]), name
    components = {"pre_processor", "post_processor", "evaluator", "visualizer"}
    assert mentioned == set(parameters) - components


def test_public_names_are_explained():
    for name in set(anomalib_mvfa.__all__) - {"__version__", "BMADOneClass", "Phantom"}:
        assert f"{name}" in README, name
