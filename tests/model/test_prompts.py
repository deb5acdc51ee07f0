"""The prompts: how many, which, and what a list of texts must be."""

import hashlib

import pytest

from anomalib_mvfa.model.prompts import ABNORMAL_STATES, NORMAL_STATES, TEMPLATES, Prompts


def test_ensemble_is_the_published_one():
    """Its text features are compared in test_parity; this says which prompt is at fault."""
    assert (len(NORMAL_STATES), len(ABNORMAL_STATES), len(TEMPLATES)) == (7, 5, 35)
    assert NORMAL_STATES[0] == "{}"
    assert not {*NORMAL_STATES} & {*ABNORMAL_STATES}
    assert len({*TEMPLATES}) == 35
    digest = hashlib.sha256("\n".join((*NORMAL_STATES, *ABNORMAL_STATES, *TEMPLATES)).encode()).hexdigest()
    assert digest.startswith("201c2388648bbfe7")


def test_every_state_goes_into_every_template():
    normal, abnormal = Prompts(["{}", "{} with flaw"], ["broken {}"], ["a {}.", "the {}!"]).compose("liver")
    assert normal == ["a liver.", "the liver!", "a liver with flaw.", "the liver with flaw!"]
    assert abnormal == ["a broken liver.", "the broken liver!"]


def test_what_is_not_given_is_published():
    assert Prompts.given(normal_states=None, templates=["a {}"]) == Prompts(templates=["a {}"])


@pytest.mark.parametrize("name", ["normal_states", "abnormal_states", "templates"])
@pytest.mark.parametrize("texts", [[], ["a {}", "a photo"], ["{} and {}"], ["{0}"]])
def test_what_is_wrong_is_named(name, texts):
    bad = [text for text in texts if text != "a {}"]
    with pytest.raises(ValueError, match=rf"{name} must be a non-empty list .* exactly one '{{}}' each") as error:
        Prompts.given(**{name: texts})
    assert str(error.value).endswith(f"got {bad}")


@pytest.mark.parametrize("state", ["{} with {size}", "{}} x"])
def test_other_braces_are_kept(state):
    normal, _ = Prompts.given(normal_states=[state], templates=["a {}."]).compose("liver")
    assert normal == [f"a {state.replace('{}', 'liver', 1)}."]
