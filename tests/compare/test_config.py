"""What a comparison consists of: its file, and mistakes in it."""

from dataclasses import asdict, replace

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
    (method(protocol="one_shot"), r"methods\.A\.protocol='one_shot': Input should be 'full_normal', 'few_normal'"),
    ({"methods": {"A": {"protocol": "few_shot"}}}, r"methods\.A\.model: Field required"),
    (method(model={}), r"methods\.A\.model=\{\}: must be a mapping with class_path and init_args"),
    (method(epochs=3), r"methods\.A\.epochs=3: Unexpected"),
    (method(categories=[]), r"methods\.A\.categories=\[\]: List should have at least 1 item"),
    (method(categories="Brain"), r"methods\.A\.categories='Brain': Input should be a valid list"),
    (method(model={"class_path": "Padim", "init_arg": {}}), r"names \['init_arg'\], .* are: class_path, init_args"),
    (method(trainer={"devices": 2}), r"methods\.A.*: trainer names \['devices'\], to choose from are: accumulate_grad"),
    (method(data={"k_shot": 2}), r"methods\.A.*: data names \['k_shot'\], to choose from are: augmentations, eval_ba"),
    ({"group_by": "("}, r"group_by='\(' is no regular expression"),
    ({"accelerator": "gpuu"}, "accelerator='gpuu' is unknown; choose one of: auto, gpu, .*cpu"),
    ({"paper": "table9"}, "paper='table9' is not a table of the paper"),
    ({"weights": {"MVFA": 5}}, r"weights\.MVFA=5: Input should be a valid string"),
    ({"weights": {"PatchCroe": None}}, r"weights='PatchCroe' is unknown; choose one of: MVFA, PatchCore"),
    ({"reference": "PatchCroe"}, r"reference='PatchCroe' is unknown; choose one of: MVFA, PatchCore"),
    ({"timeout_min": 0}, "timeout_min=0: Input should be greater than or equal to 1"),
    ({"select_epoch_on_test": 1}, "select_epoch_on_test=1: Input should be a valid boolean"),
    ({"methods": {}}, r"methods=\{\}: Dictionary should have at least 1 item"),
    ({"methods": ["MVFA"]}, r"methods=\['MVFA'\]: Input should be a valid dictionary"),
    ({"seeds": []}, r"seeds=\[\]: List should have at least 1 item"),
    ({"seeds": 0}, r"seeds=0: Input should be a valid list"),
    ({"seeds": ["a"]}, r"seeds\.0='a': Input should be a valid integer"),
    ({"seeds": [True]}, r"seeds\.0=True: Input should be a valid integer"),
    ({"k_shots": [0]}, r"k_shots\.0=0: Input should be greater than or equal to 1"),
    ({"k_shots": [2, 2]}, r"k_shots=\[2, 2\]: \[2, 2\] must name none twice"),
    ({"categories": "Brain"}, "categories='Brain': Input should be a valid list"),
    ({"data": {"root": "x"}}, r"names \['root'\], to choose from are: class_path, init_args"),
]


@pytest.mark.parametrize(("changes", "message"), MISTAKES)
def test_mistakes_are_named(comparison, tmp_path, changes, message):
    (tmp_path / "a.yaml").write_text(yaml.safe_dump({**asdict(comparison()), **changes}))
    with pytest.raises(ValueError, match=message) as raised:
        Comparison.load(tmp_path / "a.yaml")
    assert "\n" not in str(raised.value)
    with pytest.raises(ValueError, match="Comparison"):
        comparison(**changes)


@pytest.mark.parametrize(
    ("text", "message"),
    [("methods: [", "is no YAML file"), ("- a", "methods: Field required; data: Field req"), ("", "Field required")],
)
def test_what_is_no_comparison_is_refused(tmp_path, text, message):
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(ValueError, match=message):
        Comparison.load(tmp_path / "a.yaml")
    with pytest.raises(FileNotFoundError, match="there is no such file"):
        Comparison.load(tmp_path / "b.yaml")
