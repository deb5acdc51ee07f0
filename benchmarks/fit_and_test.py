"""Fit and test at the proportions of BMAD's Brain, from the rates that train.py and test.py have measured.

K = 4 in 11 views, 50 epochs, 3,715 test images; as the published code does, the plain loop tests after every epoch.
"""

import json
from typing import Any

from common import arguments, write

VIEWS, EPOCHS, TESTED = 2 * 4 * 11, 50, 3715
PLAIN_TEST_SHARE = 3.5 / 10.5
"""Time of a test image in that of a training image, in the published code."""


def main() -> None:
    """Compute and write."""
    options = arguments(__doc__)
    train, test = (json.loads((options.output / f"{name}.json").read_text()) for name in ("train", "test"))
    plain = EPOCHS * (VIEWS * train["plain_seconds"] + TESTED * train["plain_seconds"] * PLAIN_TEST_SHARE)
    figures: dict[str, Any] = {}
    for batch in (1, 16):
        ours = EPOCHS * VIEWS * train[f"batch_{batch}_seconds"] + TESTED * test["k4_seconds"]
        figures[f"batch_{batch}_hours"] = ours / 3600
        figures[f"batch_{batch}_times_faster"] = plain / ours
    write("fit_and_test", options, {"plain_hours": plain / 3600, **figures})


if __name__ == "__main__":
    main()
