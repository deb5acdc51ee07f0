"""The commands: what they print, their exit codes, and mistakes on the command line."""

import pytest

from anomalib_mvfa import plugin
from anomalib_mvfa.compare import cli, runner
from anomalib_mvfa.compare.config import Comparison
from anomalib_mvfa.compare.job import jobs_of
from anomalib_mvfa.compare.results import read_results
from recipe import TINY, write_clip


def test_the_exit_code_and_the_output_tell(comparison, done, tmp_path, capsys):
    patchcore = comparison().methods["PatchCore"]
    methods = {"broken": Comparison(**vars(comparison())).methods["MVFA"], "PatchCore": patchcore}
    methods["broken"].trainer["max_steps"] = "many"
    plan = comparison(methods=methods, categories=["Chest"])
    plan.save(tmp_path / "plan.yaml")
    arguments = ["--config", str(tmp_path / "plan.yaml"), "--output", str(tmp_path / "run")]
    assert cli.main("compare", arguments) == 1
    out = capsys.readouterr().out
    assert "failed: broken-Chest-k2-s0: " in out
    assert "PatchCore-Chest-k2-s0: image_AUROC" in out
    assert (tmp_path / "run" / "report" / "index.html").is_file()

    del plan.methods["broken"]
    plan.save(tmp_path / "plan.yaml")
    done.clear()
    assert cli.main("compare", arguments) == 0
    assert done == []


def test_a_dry_run_lists_jobs_and_runs_none(comparison, done, tmp_path, capsys):
    plan = comparison(categories=["Chest"])
    plan.save(tmp_path / "plan.yaml")
    arguments = ["--config", str(tmp_path / "plan.yaml"), "--output", str(tmp_path / "run")]
    assert cli.main("compare", [*arguments, "--dry_run"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        "PatchCore-Chest-k2-s0  few_normal     to run",
        "MVFA-Chest-k2-s0       few_shot       to run",
        "2 jobs.",
    ]
    assert done == []
    assert not (tmp_path / "run").exists()
    runner.compare(plan, tmp_path / "run")
    assert cli.main("compare", [*arguments, "--dry_run", "--seeds", "[0,1]"]) == 0
    assert [" finished, took" in line for line in capsys.readouterr().out.splitlines()[-5:]] == [True] * 2 + [False] * 3


def test_a_dry_run_needs_no_data(comparison, tmp_path, capsys):
    data = {"class_path": "BMADOneClass", "init_args": {"root": str(tmp_path / "nowhere")}}
    comparison(data=data).save(tmp_path / "plan.yaml")
    assert cli.main("compare", ["--config", str(tmp_path / "plan.yaml"), "--dry_run"]) == 0
    shown = capsys.readouterr()
    assert [line.split()[0] for line in shown.out.splitlines()] == [job.folder for job in jobs_of(comparison())] + ["4"]
    assert "The data are not there yet" in shown.err
    assert "nowhere" in shown.err


def test_the_command_line_may_change_what_is_run(comparison, done, tmp_path):
    comparison().save(tmp_path / "plan.yaml")
    output = tmp_path / "run"
    changes = ["--categories", "Chest", "--seeds", "7", "--k_shots", "1", "--reference", "MVFA"]
    assert cli.main("compare", ["--config", str(tmp_path / "plan.yaml"), "--output", str(output), *changes]) == 0
    assert done == ["PatchCore-Chest-k1-s7", "MVFA-Chest-k1-s7"]
    saved = Comparison.load(output / "config.yaml")
    assert (saved.seeds, saved.reference) == ([7], "MVFA")


def test_repeat_is_a_comparison_of_one_model(phantom_root, done, tmp_path):
    clip = write_clip(tmp_path, TINY)
    options = {
        "--model": "Mvfa",
        "--model.backbone": clip.config,
        "--model.pretrained": clip.weights,
        "--model.image_size": 56,
        "--model.max_epochs": 2,
        "--model.visualizer": "false",
        "--data": "BMADFewShot",
        "--data.root": phantom_root,
        "--data.k_shot": 1,
        "--data.train_batch_size": 22,
        "--data.num_workers": 0,
        "--trainer.accelerator": "cpu",
        "--trainer.gradient_clip_val": 1.0,
        "--default_root_dir": tmp_path / "results",
    }
    own = ["--seeds", "0,1", "--output", str(tmp_path / "run"), "--select_epoch_on_test"]
    assert cli.main("repeat", [*own, *(str(part) for option in options.items() for part in option)]) == 0
    assert done == ["Mvfa-Brain-s0", "Mvfa-Brain-s1"]
    first, second = read_results(tmp_path / "run")
    assert first.depends_on["images"]["train"] != second.depends_on["images"]["train"]  # another draw of the support
    assert first.test_set == second.test_set
    assert first.depends_on["trainer"] == {"gradient_clip_val": 1.0}
    assert (first.weights, first.epochs) == ("clip.pt", 2)
    assert {first.selected_epoch, second.selected_epoch} <= {1, 2}
    assert "Mvfa" in (tmp_path / "run" / "report" / "index.html").read_text()


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("compare", ["--config", "nowhere.yaml"], "nowhere.yaml"),
        ("compare", ["--config", "plan.yaml", "--categories", "[Lungs]"], "BMAD has no category 'Lungs'"),
        ("compare", ["--config", "plan.yaml", "--seeds", "[0, a]"], "seeds.1"),
        ("compare", ["--config", "plan.yaml", "--k_shots", "4,"], "k_shots.1"),
        ("compare", ["--config", "plan.yaml", "--seeds=-1"], "seeds.0=-1: Input should be greater than or equal to 0"),
        ("compare", ["--config", "plan.yaml", "--workers", "0"], "workers=0 must be at least 1"),
        ("compare", ["--config", "plan.yaml", "--weights", "{Other: null}"], "weights='Other' is unknown; choose one"),
        ("compare", ["--config", "plan.yaml", "--reference", "Other"], "reference='Other' is unknown; choose one of"),
        ("report", ["nowhere"], "There is no folder 'nowhere'"),
        ("repeat", ["--seeds", "0,1,0", "--model", "Padim", "--data", "BMADFewShot"], "must name none twice"),
        ("repeat", ["--seeds", "a", "--model", "Padim", "--data", "BMADFewShot"], "seeds.0"),
    ],
)
def test_mistakes_on_the_command_line_give_one_error(
    comparison, tmp_path, monkeypatch, capsys, command, arguments, message
):
    monkeypatch.chdir(tmp_path)
    comparison().save(tmp_path / "plan.yaml")
    with pytest.raises(SystemExit) as stopped:
        cli.main(command, arguments)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert message in " ".join(error.split())
    assert error.count("error:") == 1
    assert not (tmp_path / "results").exists()


def test_the_help_lists_the_commands(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["anomalib-mvfa", "--help"])
    with pytest.raises(SystemExit):
        plugin.main()
    shown = capsys.readouterr().out
    assert all(f" {command} " in shown for command in ("train", "compare", "report", "repeat"))
