"""The picture of the study: it draws contrasts of `analyse` and computes nothing.

Taught in notebook 7.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from helpers import plots
from helpers.study import MARGIN


@plots.styled
def arms(contrasts: Mapping[str, pd.DataFrame], names: Mapping[str, str]) -> Figure:
    """Forest plot of arm -> `analyse.contrast`: difference, interval, a small dot for each seed.

    Filled where the interval excludes 0. Shaded at chapter and category: a loss of more than
    MARGIN.
    """
    count = len(contrasts)
    figure, panels = plots.figure(1.3 + 0.48 * count, 1, 3, sharex=True, sharey=True)
    for panel, (level, title) in zip(panels, plots.LEVELS.items(), strict=True):
        panel.axvline(0, color=plots.INK, lw=1, zorder=1)
        for height, (arm, contrast) in enumerate(contrasts.items()):
            _arm(panel, height, plots.colour(arm), contrast.loc[level])
        panel.set_title(title)
        panel.xaxis.set_major_locator(MaxNLocator(4))
        plots.percent(panel.xaxis, "")
        panel.spines["left"].set_visible(False)
    left, right = panels[0].get_xlim()
    left = min(left, 2 * MARGIN)
    for panel in panels[:2]:
        panel.axvspan(left, MARGIN, color=plots.SAND, alpha=0.3, lw=0, zorder=0)
        panel.text((left + MARGIN) / 2, count - 0.42, "loss", ha="center", size=9)
    labels = [textwrap.fill(names[arm], 20) for arm in contrasts]
    panels[0].set_yticks(range(count), labels)
    panels[0].set(xlim=(left, right), ylim=(count - 0.35, -0.65))
    panels[1].set_xlabel("macro-F1 minus that of SFT (points)")
    return figure


def _arm(panel: Axes, height: int, colour: str, contrast: pd.Series) -> None:
    excludes_zero = contrast["low"] > 0 or contrast["high"] < 0
    fill = colour if excludes_zero else "white"
    seeds = contrast["per_seed"]
    panel.hlines(height, contrast["low"], contrast["high"], color=plots.INK, lw=1.6)
    panel.plot(contrast["difference"], height, "o", color=colour, mfc=fill, ms=8, mew=1.8)
    panel.plot(seeds, [height + 0.26] * len(seeds), "o", color=colour, ms=3.5, alpha=0.7, mew=0)
    panel.text(
        contrast["difference"],
        height - 0.32,
        f"{100 * contrast['difference']:+.1f}".replace("-", "−"),
        ha="center",
        va="center",
        size=9,
        weight="bold" if excludes_zero else "normal",
        bbox={"fc": "white", "ec": "none", "pad": 0.4},
        zorder=1.5,
    )
