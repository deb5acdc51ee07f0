"""Slow work shows how far it is on a terminal, also below Lightning's own bar, and writes one line elsewhere."""

import io
import logging

import pytest
from rich.console import Console
from rich.progress import Progress

from anomalib_mvfa import progress


@pytest.mark.parametrize("is_terminal", [True, False])
def test_progress(is_terminal, monkeypatch, caplog):
    console = Console(file=io.StringIO(), force_terminal=is_terminal)
    monkeypatch.setattr(progress, "get_console", lambda: console)
    with caplog.at_level(logging.INFO, logger="anomalib.mvfa"), Progress(console=console, disable=not is_terminal):
        assert [*progress.progress(iter("abc"), "Filling", 3), *progress.progress("de", "Encoding")] == [*"abcde"]
    assert caplog.messages == ["Filling: 3 steps.", "Encoding: 2 steps."]
    shown = console.file.getvalue().strip()  # rich 14.1 writes an empty line for a bar that is not shown
    assert "Filling" in shown and "Encoding" in shown if is_terminal else not shown
