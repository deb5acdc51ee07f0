"""What a comparison consists of: its file, and mistakes in it."""

from dataclasses import replace

import pytest
import yaml

from anomalib_mvfa.compare.config import Comparison


def test_a_comparison_survives_its_file(comparison, tmp_path):
    plan = comparison(weights={"MVFA": None}, title="Ä & <b>", group_by=r"p(\d)", reference="PatchCore", timeout_min=5)
    plan.save(tmp_path / "config.yaml")
    assert Comparison.load(tmp_path / "config.yaml") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]
    assert list(yaml.safe_load((tmp_path / "config.yaml").read_text())["methods"]) == ["PatchCore", "MVFA"]
    assert Comparison.load(tmp_path / "config.yaml", seeds=[3]) == replace(plan, seeds=[3])


def method(**changes):
    """Return a change of the methods to a single one."""
    return {"methods": {"A": {"protocol": "few_shot", "model": {"class_path": "Padim"}, **changes}}}


MISTAKES = [
    (method(protocol="one_shot"), "must be one of: full"),
    ({"methods": {"A": {"protocol": "few_shot"}}}, r"methods.A: missing \['model'\]"),
    (method(model={}), "must be a mapping with class_path"),
    (method(epochs=3), r"unknown \['epochs'\]"),
    (method(categories=[]), r"methods.A.categories=\[\] must be a list with at least one"),
    (method(categories="Brain"), "methods.A.categories='Brain' must be a list"),
    (
        method(model={"class_path": "Padim", "init_arg": {}}),
        r"methods\.A\.model names \['init_arg'\], to choose from are: class_path, init_args",
    ),
    (method(trainer={"devices": 2}), r"methods\.A\.trainer names \['devices'\], to choose from are: accumulate_grad"),
    (
        method(data={"k_shot": 2}),
        r"methods\.A\.data names \['k_shot'\], to choose from are: augmentations, eval_batch_size",
    ),
    ({"group_by": "("}, r"group_by='\(' is no regular expression"),
    ({"accelerator": "gpuu"}, "accelerator='gpuu' is unknown; choose one of: auto, gpu, .*cpu"),
    ({"paper": "table9"}, "paper='table9' is not a table of the paper"),
    ({"weights": {"MVFA": 5}}, r"weights=.* must be a mapping from names, each to text or null"),
    ({"weights": {"PatchCroe": None}}, r"weights='PatchCroe' is unknown; choose one of: PatchCore, MVFA"),
    ({"reference": "PatchCroe"}, r"reference='PatchCroe' is unknown; choose one of: PatchCore, MVFA"),
    ({"timeout_min": 0}, "timeout_min=0 must be at least 1"),
    ({"select_epoch_on_test": 1}, "select_epoch_on_test=1 must be true or false"),
    ({"methods": {}}, "methods=.* must name at least one"),
    ({"methods": ["MVFA"]}, r"methods=\['MVFA'\] must be a mapping"),
    ({"seeds": []}, "seeds=.* must name at least one"),
    ({"seeds": 0}, r"seeds=0 must be a list of whole numbers from 0 on"),
    ({"seeds": ["a"]}, r"seeds=\['a'\] must be a list of whole numbers"),
    ({"k_shots": [0]}, r"k_shots=\[0\] must be a list of whole numbers from 1 on"),
    ({"k_shots": [2, 2]}, "none twice"),
    ({"categories": "Brain"}, "categories='Brain' must be a list"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_are_named(comparison, changes, message):
    with pytest.raises(ValueError, match=message):
        comparison(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [("methods: [", "is no YAML file"), ("- a", r"missing \['data', 'methods'\]"), ("", "missing")],
)
def test_what_is_no_comparison_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Comparison.load(tmp_path / "a.yaml")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        Comparison.load(tmp_path / "b.yaml")
