"""Thresholds of a wanted sensitivity or specificity, and how sure they are."""

import math

import pytest

from anomalib_mvfa.model.thresholds import Evidence, Rate, parse_threshold, rates, threshold_of_rate

SCORES, LABELS = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8], [0, 0, 1, 0, 1, 0, 1, 1]


@pytest.mark.parametrize(
    ("name", "wanted", "between"),
    [
        ("sensitivity", 1.0, (0.2, 0.3)),  # the highest that finds all four
        ("sensitivity", 0.76, (0.2, 0.3)),
        ("sensitivity", 0.75, (0.4, 0.5)),
        ("sensitivity", 0.01, (0.7, 0.8)),
        ("specificity", 1.0, (0.6, 0.7)),  # the lowest that clears all four
        ("specificity", 0.75, (0.4, 0.5)),
        ("specificity", 0.5, (0.2, 0.3)),
    ],
)
def test_the_wanted_rate_is_reached_and_no_more_is_given_away(name, wanted, between):
    threshold = threshold_of_rate(name, wanted, SCORES, LABELS)
    assert threshold == pytest.approx(sum(between) / 2)
    assert Evidence(SCORES, LABELS).rates(threshold)[name].value >= wanted


def test_the_ends_lie_beyond_all_scores():
    assert threshold_of_rate("sensitivity", 1, SCORES, [1, *LABELS[1:]]) < 0.1
    assert threshold_of_rate("specificity", 1, SCORES, [*LABELS[:7], 0]) > 0.8
    assert threshold_of_rate("specificity", 1, [0.5], [0]) > 0.5
    assert math.isnan(threshold_of_rate("sensitivity", 1, [0.5], [0]))


def test_rates_count_each_kind():
    found = rates([True, True, False, True, False], [1, 1, 1, 0, 0])
    assert found == {"sensitivity": Rate(2, 3), "specificity": Rate(1, 2)}
    assert math.isnan(Rate(0, 0).value)
    low, high = Rate(4, 4).interval  # by Clopper and Pearson: all of n gives (alpha / 2) ** (1 / n)
    assert (low, high) == (pytest.approx(0.025 ** (1 / 4)), 1.0)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("0.42", ("number", 0.42)), (-3, ("number", -3)), ("sensitivity = 0.95", ("sensitivity", 0.95))],
)
def test_what_can_be_asked_for(text, expected):
    assert parse_threshold(text) == expected
    assert parse_threshold("best_f1")[0] == "best_f1"


@pytest.mark.parametrize("text", ["f1", "nan", "sensitivity=95", "specificity=0", "recall=0.9", "best_f1=1", True])
def test_what_cannot(text):
    with pytest.raises(ValueError, match=r"threshold=.* is unknown; choose best_f1, sensitivity=0\.95 or spec"):
        parse_threshold(text)


def test_doubts_are_told():
    known = Evidence(SCORES, LABELS, "support", learnt=True)
    text, doubts = known.describe("sensitivity", 0.95, 0.25)
    assert text == (
        "Image threshold 0.25 (sensitivity=0.95). On 4 normal and 4 abnormal support images: sensitivity 1.00 (4 of 4, "
        "95 % interval 0.40 to 1.00), specificity 0.50 (2 of 4, 95 % interval 0.07 to 0.93)."
    )
    assert "4 abnormal images cannot tell a sensitivity of 0.95 from 1, which takes 20 or more" in doubts[0]
    assert "optimistic: the adapters have learnt from these very images" in doubts[1]
    assert Evidence(SCORES, LABELS).describe("sensitivity", 0.75, 0.45)[1] == []
    text, (doubt,) = Evidence([0.1, 0.2], [0, 0]).describe("sensitivity", 0.9, 0.2)
    assert "(the highest score of normal images, as there are no abnormal ones)" in text
    assert "needs abnormal images, and none were at hand" in doubt
    assert "No labelled image was at hand" in Evidence([], []).describe("number", 0.3, 0.3)[0]
