"""The table of arguments that models share."""

from enum import Enum
from pathlib import Path

import pytest

from anomalib_mvfa.arguments import ARGUMENTS, check_arguments, documented, plain


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image_score": "mean"}, "image_score='mean' is unknown; choose one of: map_max, map_top, det_mean, det_max."),
        ({"max_epochs": 0}, "max_epochs=0 must be at least 1."),
        ({"residual_ratio": 0.6}, "residual_ratio=0.6 must be between 0 and 0.5."),
        ({"margin": float("nan")}, "margin=nan must be at least 0."),
    ],
)
def test_values_out_of_bounds_are_refused(values, message):
    with pytest.raises(ValueError) as error:  # noqa: PT011  # compared as a whole
        check_arguments({"self": None, "seed": 0, **values})
    assert str(error.value) == message


def test_bounds_none_and_unknown_names_pass():
    check_arguments({name: argument.low for name, argument in ARGUMENTS.items()} | {"few_shot_weight": None})
    check_arguments({name: argument.high for name, argument in ARGUMENTS.items()})
    check_arguments({"kwargs": {}, "image_score": "det_max", "calibration": None})


def test_docstrings_are_completed_by_the_table():
    @documented
    def build(levels=None, seed=0, other=1):
        """Build.

        Args:
            levels: Our own words.

        Raises:
            ValueError: Never.
        """

    of_seed = f"    seed: {ARGUMENTS['seed'].help}"
    assert build.__doc__.splitlines()[3:7] == ["    levels: Our own words.", of_seed, "", "Raises:"]

    @documented
    class Model:
        """A model."""

        def __init__(self, seed=0) -> None: ...

    assert Model.__doc__ == f"A model.\n\nArgs:\n{of_seed}\n"


class Colour(str, Enum):
    RED = "red"


def test_arguments_become_plain():
    found = plain((1, 2.5, True, None, "a", Path("b"), [Colour.RED]))
    assert found == [1, 2.5, True, None, "a", "b", ["red"]]
    assert plain(object) is object
