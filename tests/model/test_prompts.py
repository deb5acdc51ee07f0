"""The prompts: how many, which, and what a list of patterns must be."""

import hashlib

import pytest

from anomalib_mvfa.model.prompts import ABNORMAL_STATES, NORMAL_STATES, TEMPLATES, check_slots, compose


def test_ensemble_is_the_published_one():
    """Its text features are compared in test_parity; this says which prompt is at fault."""
    assert (len(NORMAL_STATES), len(ABNORMAL_STATES), len(TEMPLATES)) == (7, 5, 35)
    assert NORMAL_STATES[0] == "{}"
    assert not {*NORMAL_STATES} & {*ABNORMAL_STATES}
    assert len({*TEMPLATES}) == 35
    digest = hashlib.sha256("\n".join((*NORMAL_STATES, *ABNORMAL_STATES, *TEMPLATES)).encode()).hexdigest()
    assert digest.startswith("201c2388648bbfe7")


def test_every_state_goes_into_every_template():
    prompts = compose("liver", ["{}", "{} with flaw"], ["a {}.", "the {}!"])
    assert prompts == ["a liver.", "the liver!", "a liver with flaw.", "the liver with flaw!"]
    assert len(compose("Brain", NORMAL_STATES, TEMPLATES)) == 7 * 35


def test_check_slots_returns_a_plain_list():
    checked = check_slots("templates", TEMPLATES)
    assert type(checked) is list
    assert tuple(checked) == TEMPLATES


@pytest.mark.parametrize("patterns", [[], ["a {}", "a photo"], ["{} and {}"], ["{0}"]])
def test_check_slots_names_what_is_wrong(patterns):
    bad = [pattern for pattern in patterns if pattern != "a {}"]
    with pytest.raises(ValueError, match=r"templates must be a non-empty list .* exactly one '{}' each") as error:
        check_slots("templates", patterns)
    assert str(error.value).endswith(f"got {bad}")


@pytest.mark.parametrize("pattern", ["{} with {size}", "{}} x"])
def test_other_braces_are_refused_or_kept(pattern):
    try:
        checked = check_slots("states", [pattern])
    except ValueError as error:
        assert pattern in str(error)  # noqa: PT017  # refusing is one of two good answers
    else:
        assert compose("liver", checked, ["a {}."]) == [f"a {pattern.replace('{}', 'liver', 1)}."]
