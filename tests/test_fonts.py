"""Fonts of drawings: class names in any script."""

from __future__ import annotations

import logging
import warnings
from pathlib import Path

from kd_d2 import fonts
from kd_d2.analysis.drawing import titled
from kd_d2.figures import save_figure, shrink_titles, subplots
from kd_d2.fonts import FONT, font_file, installed_fonts

import matplotlib
import numpy as np
import pytest

ONLY_IN_STIX = "\u20dd\u20de"  # STIX comes with Matplotlib; DejaVu Sans lacks these characters


def of_matplotlib() -> list[str]:
    """Return the fonts that come with Matplotlib, for which the tests do not depend on the machine."""
    return [path for path in installed_fonts() if path.startswith(matplotlib.get_data_path())]


def test_another_font_has_the_characters(monkeypatch: pytest.MonkeyPatch) -> None:
    """Check that the usual font is preferred, and that characters that it lacks are drawn by another."""
    monkeypatch.setattr(fonts, "installed_fonts", of_matplotlib)
    assert font_file("gro\u00df \u00e9 \u043a\u043e\u0442") == FONT
    assert font_file(ONLY_IN_STIX) != FONT
    white = np.full((8, 200, 3), 255, np.uint8)
    first, second = (titled(white, character) for character in ONLY_IN_STIX)
    assert (first != second).any()


def test_last_resort_is_no_font(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Check that the boxes of the Last Resort font, which comes with Matplotlib, do not pass for characters."""
    monkeypatch.setattr(fonts, "installed_fonts", of_matplotlib)
    with caplog.at_level(logging.WARNING, "kd_d2"):
        assert font_file("\u0378") == FONT  # not assigned by Unicode
    assert len(caplog.messages) == 1


def test_fonts_of_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    """Check a title that another font has, and one that no font has, of which one message tells."""
    monkeypatch.setattr(fonts, "installed_fonts", of_matplotlib)
    figure, (one, other) = subplots(1, 2, figsize=(4, 2))
    one.set_title(ONLY_IN_STIX)
    other.set_title("\u732b")
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING, "kd_d2"):
        warnings.simplefilter("error")
        shrink_titles(figure)
        save_figure(figure, str(tmp_path / "figure.png"))
    assert one.title.get_fontproperties().get_file() == font_file(ONLY_IN_STIX) != FONT
    assert len(caplog.messages) == 1 and "those that are missing are drawn as boxes" in caplog.messages[0]


def test_no_font_has_the_characters(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(fonts, "installed_fonts", lambda: ["/there/is/no/font.ttf"])
    with caplog.at_level(logging.WARNING, "kd_d2"):
        assert font_file("\u732b 1") == FONT
    assert caplog.messages == [
        "No installed font has all characters of '\u732b 1'; those that are missing are drawn as boxes."
    ]
