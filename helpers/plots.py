"""The pictures of the course: one style, one table of names and colours, and what is drawn of a
training.

A figure that one notebook alone draws stands in that notebook. A function takes a table and draws
it; it computes nothing. It returns a Figure that pyplot does not know: as the last value of a cell
it is shown once, and needs no closing. Figures are 7 inches wide and no text is below 8.2 points,
so that all can be read at half the width of a page (500 pixels).

Taught in notebook 6.
"""

from __future__ import annotations

import itertools
import re
import textwrap
import tomllib
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rc_context, rc_params_from_file, rcParams
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter


class Name(NamedTuple):
    """What a model or a kind of answer is called in figures, its colour, and its name in the table
    of results."""

    label: str
    colour: str
    long: str = ""


_NAMES = tomllib.loads(Path(__file__).with_name("plots_names.toml").read_text(encoding="utf-8"))
LEVELS = _NAMES["levels"]
MODELS = {key: Name(**entry) for key, entry in _NAMES["models"].items()}  # in the order of tables
KINDS = {key: Name(**entry) for key, entry in _NAMES["kinds"].items()}  # of `metrics.outcomes`
INK = "#222222"
FAINT = "#8C8C8C"
DEEP = KINDS["full"].colour
MID = KINDS["category"].colour
PALE = KINDS["chapter"].colour
SAND = KINDS["wrong"].colour
SHADES = LinearSegmentedColormap.from_list("", ["#C98A1B", SAND, "#F7F7F7", MID, DEEP])  # 1: right
UNKNOWN = "#9467BD"  # a model that the table of names lacks
PARTS = ["#444444", "#7B3F98", "#1B9E77", "#C2477F", "#3E8FC4", "#A67C1E"]  # parts of a reward
WIDTH = 7.0  # inches
TINY = 8.2  # points: the smallest text
STYLE = rc_params_from_file(Path(__file__).with_name("plots.mplstyle"), use_default_template=False)
styled = rc_context(STYLE)  # decorates every function that draws


def style() -> None:
    """Make the course's style the default, and have the notebook show figures that pyplot does not
    know."""
    from IPython import get_ipython
    from IPython.core.pylabtools import select_figure_formats

    rcParams.update(STYLE)
    if shell := get_ipython():
        select_figure_formats(shell, {"png"})


def colour(model: str) -> str:
    """The colour of a model or of an arm of the study; a variant such as "sft_constrained" has that
    of its model."""
    family = re.split(r"[-+_]", model)[0]
    own = MODELS[family].colour if family in MODELS else UNKNOWN
    return _NAMES["arms"].get(model, own)


def label(model: str) -> str:
    """The name of a model in figures; an unknown one is printed as it is."""
    return MODELS[model].label if model in MODELS else model.replace("_", " ")


def long_label(model: str) -> str:
    """The name of a model in the table of results; an unknown one is printed as it is."""
    return MODELS[model].long if model in MODELS else model


def figure(height: float, rows: int = 1, columns: int = 1, **options: Any) -> tuple[Figure, Any]:
    """A figure of the course's width and its axes; `options` are those of Figure.subplots."""
    fig = Figure((WIDTH, height))
    return fig, fig.subplots(rows, columns, **options)


def percent(axis: Any, symbol: str = "%") -> None:
    """Print the shares on an axis per hundred."""
    axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=symbol))


def shortened(text: str, width: int) -> str:
    """The text, or so many of its first words as fit into `width` characters, and an ellipsis."""
    return textwrap.shorten(text, width, placeholder=" …")


def end_labels(ax: Axes, ends: Iterable[tuple[float, str, str]]) -> None:
    """Labels (y, text, colour) to the right of their curves, apart from one another."""
    ax.autoscale_view()  # else the limits are not yet those of the drawing
    to_axes = ax.transScale + ax.transLimits
    heights = []
    floor = -np.inf
    for y, text, _ in sorted(ends):
        half = 0.05 * (1 + text.count("\n"))  # of its height; that of the axes is 1
        heights.append(max(to_axes.transform((1, y))[1], floor + half))
        floor = heights[-1] + half
    excess = max(0, floor - 1.02)
    for height, (_, text, shade) in zip(heights, sorted(ends), strict=True):
        look = {"color": shade, "size": 9.5, "va": "center", "weight": "bold"}
        ax.text(1.02, height - excess, text, transform=ax.transAxes, **look)


# ------------------------------------------------------------------------------- training


@styled
def training_curve(log: pd.DataFrame) -> Figure:
    """Loss and token accuracy of a training_log.csv, as far as it has them, and on held-out data.

    A loss that falls to less than a tenth is drawn on a logarithmic axis. Raises ValueError if the
    log has no column step or none of the two.
    """
    titles = {"loss": "Loss", "mean_token_accuracy": "Token accuracy"}
    shown = [column for column in titles if column in log]
    if "step" not in log or not shown:
        raise ValueError(
            f"training_curve: the log needs step and one of {', '.join(titles)} (found: "
            f"{', '.join(log.columns)}). Read the training_log.csv of a run folder."
        )
    fig, axes = figure(2.8, 1, len(shown), squeeze=False)
    for ax, column in zip(axes[0], shown, strict=True):
        lines = {column: ("train", colour("sft")), f"eval_{column}": ("held\nout", INK)}
        _curves(ax, log, lines, titles[column])
        if column == "loss" and log[column].max() > 10 * log[column].min() > 0:
            ax.set_yscale("log")
    return fig


@styled
def grpo_panel(log: pd.DataFrame) -> Figure:
    """What to watch during GRPO: reward with its components, held-out reward, flat groups, length.

    A group is flat where all its rewards are equal: nothing can be learned from it.
    """
    if "step" not in log:
        raise ValueError(
            "grpo_panel: the log has no column step. Read the training_log.csv of a run folder."
        )
    fig, ((reward, held_out), (flat, length)) = figure(5, 2, 2)
    names = log.filter(regex="^rewards/.*/mean$").columns
    parts = {}
    for part, shade in zip(names if len(names) > 1 else (), itertools.cycle(PARTS)):
        parts[part] = (part.split("/")[1].removesuffix("_reward").replace("_", " "), shade)
    own = colour("grpo")
    _curves(reward, log, parts | {"reward": ("total", own)}, "Reward and its components")
    _curves(held_out, log, {"eval_reward": ("", own)}, "Reward on held-out notes")
    _curves(flat, log, {"frac_reward_zero_std": ("", INK)}, "Share of flat groups")
    _curves(length, log, {"completions/mean_length": ("", INK)}, "Tokens per answer")
    return fig


@styled
def compared_curves(logs: Mapping[str, pd.DataFrame], column: str) -> Figure:
    """One column of the training logs of several runs, name -> log."""
    fig, ax = figure(2.8)
    columns = {name: log.groupby("step")[column].first() for name, log in logs.items()}
    lines = {name: (name, shade) for name, shade in zip(logs, PARTS, strict=False)}
    _curves(ax, pd.DataFrame(columns).reset_index(), lines, column.capitalize())
    return fig


def _curves(ax: Axes, log: pd.DataFrame, lines: Mapping[str, tuple[str, str]], title: str) -> None:
    """Columns of the log, column -> (label, colour): raw points under a mean over a fifteenth of
    the run.

    What is measured on held-out data (`eval_...`) comes seldom and is drawn as it is, dashed.
    """
    ends = []
    for column, (name, shade) in lines.items():
        points = log.set_index("step").get(column, pd.Series(dtype=float)).dropna()
        if points.empty:
            continue
        if column.startswith("eval_"):
            ax.plot(points, "D--", color=shade, ms=5)
        else:
            ax.plot(points, ".", color=shade, ms=6, alpha=0.4, mew=0)
            points = points.rolling(max(1, len(points) // 15), min_periods=1, center=True).mean()
            ax.plot(points, color=shade)
        ends.append((float(points.iloc[-1]), name, shade))
    ax.set(title=title, xlabel="step")
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.grid(axis="y")
    if len(ends) > 1:
        end_labels(ax, ends)
    if not ends:
        ax.text(0.5, 0.5, "nothing logged", transform=ax.transAxes, ha="center", color=FAINT)


def live_plot(every: int = 5) -> Any:
    """A TrainerCallback that redraws one figure in the notebook at every k-th log. At the end it
    makes room for the figure of the saved log.

    A log with a reward gets `grpo_panel`, another `training_curve`.
    `.rows` holds a dict for each log. A picture that fails never stops a training: it warns.
    """
    from IPython import display, get_ipython
    from transformers import TrainerCallback

    class LivePlot(TrainerCallback):
        rows = []
        handle = None

        def on_train_begin(self, args, state, control, **kwargs):
            self.rows = [*state.log_history]  # of a training that goes on

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.rows.append({"step": state.global_step, **(logs or {})})
            if len(self.rows) % every or not (get_ipython() and state.is_world_process_zero):
                return
            log = pd.DataFrame(self.rows)
            picture = training_curve if log.filter(like="reward").empty else grpo_panel
            try:
                if self.handle:
                    self.handle.update(picture(log))
                else:
                    self.handle = display.display(picture(log), display_id=True)
            except Exception as error:  # hours of training must not be lost to a picture
                warnings.warn(f"live_plot: {type(error).__name__}: {error}", stacklevel=2)

        def on_train_end(self, args, state, control, **kwargs):
            if self.handle:
                self.handle.update(display.Markdown("*Training is over; its curves are below.*"))

    return LivePlot()
