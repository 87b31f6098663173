"""The pictures of the course: one style, one table of names and colours, chapters in the order of
the classification.

A function takes a tidy table, mostly one that `metrics` made, and draws it; it computes nothing. It
returns a Figure that pyplot does not know: as the last value of a cell it is shown once, and needs
no closing. Figures are 7 inches wide and no text is below 8.2 points, so that all can be read at
half the width of a page (500 pixels). Intervals are columns `low` and `high` of the table.

Taught in notebook 6.
"""

from __future__ import annotations

import re
import textwrap
import tomllib
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib import rc_context, rc_params_from_file, rcParams
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from helpers import icd, metrics


class Name(NamedTuple):
    """What a model or a kind of answer is called in figures, its colour, and its name in the table
    of results."""

    label: str
    colour: str
    long: str = ""


_NAMES = tomllib.loads(Path(__file__).with_name("plots_names.toml").read_text(encoding="utf-8"))
LEVELS: dict[str, str] = _NAMES["levels"]
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


def figure(
    height: float,
    rows: int = 1,
    columns: int = 1,
    fig: Figure | None = None,
    **options: Any,
) -> tuple[Figure, Any]:
    """A figure of the course's width, new or emptied, and its axes; `options` are those of
    Figure.subplots."""
    fig = fig or Figure()
    fig.clear()
    fig.set_size_inches(WIDTH, height)
    return fig, fig.subplots(rows, columns, **options)


def percent(axis: Any, symbol: str = "%") -> None:
    """Print the shares on an axis per hundred."""
    axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=symbol))


def end_labels(ax: Axes, ends: Sequence[tuple[float, str, str]], gap: float = 0.1) -> None:
    """Labels (y, text, colour) to the right of their curves, pushed up, then down, until none
    covers another."""
    ax.autoscale_view()  # else the limits are not yet those of the drawing
    to_axes = ax.transScale + ax.transLimits
    ends = sorted(ends)
    halves = [gap / 2 * (1 + text.count("\n")) for _, text, _ in ends]
    places = []
    floor = -1.0
    for (y, _, _), half in zip(ends, halves, strict=True):
        places.append(max(to_axes.transform((1, y))[1], floor + half))
        floor = places[-1] + half
    top = 1.1
    for (_, text, shade), half, place in reversed([*zip(ends, halves, places, strict=True)]):
        place = min(place, top - half)
        top = place - half
        ax.annotate(
            text,
            (1.02, place),
            xycoords="axes fraction",
            color=shade,
            size=9.5,
            va="center",
            weight="bold",
        )


# ------------------------------------------------------------------------------- the data


@styled
def code_frequencies(counts: pd.Series) -> Figure:
    """The long tail: cases per code against the rank of the code, both axes logarithmic.

    `counts`: cases[["split", "code"]].value_counts(), one line for each split.
    """
    fig, ax = figure(3.6)
    ends = []
    for split, shade in {"test": INK, "val": MID, "train": DEEP}.items():
        cases = counts[counts.index.get_level_values("split") == split].to_numpy()
        if len(cases):
            ax.plot(np.arange(1, len(cases) + 1), cases, ".-", color=shade, ms=5, lw=1.5)
            codes = f"{len(cases)} codes, {(cases < 10).sum()} below 10"
            ends.append((float(cases[-1]), f"{split}: {cases.sum():,} cases\n{codes}", shade))
    ax.axhline(10, color=FAINT, lw=1, ls=":")
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="codes, most frequent first (rank)",
        ylabel="cases",
        title="Cases of each code, by split",
    )
    end_labels(ax, ends)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter("{x:,.0f}")
    return fig


@styled
def note_lengths(
    lengths: Sequence[int], limit: int | None = None, what: str = "admission note"
) -> Figure:
    """Histogram of the tokens of notes, or of `what`; the title says how many exceed `limit`, hence
    are cut."""
    import seaborn as sns

    values = np.asarray(lengths, float)
    fig, ax = figure(2.9)
    width = max(1, np.ceil(np.ptp(values) / 50))  # a whole number: else some bars hold more lengths
    sns.histplot(
        x=values,
        bins=np.arange(values.min() - 0.5, values.max() + width + 0.5, width),
        kde=np.ptp(values) > 0,
        color=MID,
        edgecolor="white",
        ax=ax,
    )
    title = f"Length of the {what}s"
    marks = {"median": np.median(values)}
    if limit is not None:
        title += f": {np.mean(values > limit):.1%} exceed the limit and are cut"
        marks["limit"] = limit
    for name, x in marks.items():
        ax.axvline(x, color="black", lw=1.5, ls=":" if name == "median" else "--")
        ax.text(
            x,
            1,
            f"{name} {x:,.0f}",
            transform=ax.get_xaxis_transform(),
            va="bottom",
            ha="right" if x == min(marks.values()) else "left",
            size=10,
        )
    ax.set(xlabel="tokens", ylabel=f"{what}s")
    ax.set_title(title, pad=18)
    return fig


# ------------------------------------------------------------------------------- training


@styled
def training_curve(
    log: pd.DataFrame,
    columns: Sequence[str] = ("loss", "mean_token_accuracy"),
    *,
    model: str = "sft",
    fig: Figure | None = None,
) -> Figure:
    """One panel for each of these columns of a training_log.csv, with `eval_<column>` where the log
    has it.

    A loss that falls to less than a tenth is drawn on a logarithmic axis. Raises ValueError if the
    log has no column step or none of the columns.
    """
    shown = [column for column in columns if column in log]
    if "step" not in log or not shown:
        raise ValueError(
            f"training_curve: the log needs step and one of {', '.join(columns)} (found: "
            f"{', '.join(log.columns)}). Read the training_log.csv of a run folder."
        )
    fig, axes = figure(2.8, 1, len(shown), fig, squeeze=False)
    titles = {"loss": "Loss", "mean_token_accuracy": "Token accuracy"}
    for ax, column in zip(axes[0], shown, strict=True):
        lines = {column: ("train", colour(model)), f"eval_{column}": ("held\nout", INK)}
        _curves(ax, log, lines, titles.get(column, column))
        if column == "loss" and log[column].max() > 10 * log[column].min() > 0:
            ax.set_yscale("log")
    return fig


@styled
def grpo_panel(log: pd.DataFrame, *, fig: Figure | None = None) -> Figure:
    """What to watch during GRPO: reward with its components, held-out reward, spread within groups,
    length.

    TRL's `reward_std` is the spread of the whole batch: it stays up even where every group is of
    one mind and nothing can be learned. The share of flat groups (`frac_reward_zero_std`) tells.
    """
    if "step" not in log:
        raise ValueError(
            "grpo_panel: the log has no column step. Read the training_log.csv of a run folder."
        )
    fig, ((reward, held_out), (spread, length)) = figure(5, 2, 2, fig)
    parts = log.filter(regex="^rewards/.*/mean$").columns
    lines = {}
    for i, part in enumerate(parts if len(parts) > 1 else []):
        name = part.split("/")[1].removesuffix("_reward").replace("_", " ")
        lines[part] = (name, PARTS[i % len(PARTS)])
    own = colour("grpo")
    _curves(reward, log, {**lines, "reward": ("total", own)}, "Reward and its components")
    _curves(held_out, log, {"eval_reward": ("", own)}, "Reward on held-out prompts")
    lines = {
        "reward_std": ("std of\nbatch", PARTS[1]),
        "frac_reward_zero_std": ("flat\ngroups", INK),
    }
    _curves(spread, log, lines, "Spread; share of flat groups")
    _curves(length, log, {"completions/mean_length": ("", INK)}, "Tokens per answer")
    return fig


@styled
def compared_curves(logs: Mapping[str, pd.DataFrame], column: str) -> Figure:
    """One column of the training logs of several runs, name -> log."""
    fig, ax = figure(2.8)
    columns = {name: log.groupby("step")[column].first() for name, log in logs.items()}
    lines = {name: (name, PARTS[i % len(PARTS)]) for i, name in enumerate(logs)}
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


@styled
def rollout_group(
    completions: Sequence[str],
    rewards: Mapping[str, Sequence[float]],
    advantages: Sequence[float],
    gold: str,
) -> Figure:
    """One group of completions of one prompt, best first: reasoning and answer, rewards, the
    advantage as a bar.

    Raises ValueError where the lengths differ.
    """
    from helpers import prompts

    table = pd.DataFrame({"completion": completions, "advantage": advantages, **rewards})
    table = table.sort_values("advantage", ascending=False, kind="stable")
    height = 1.2 + 0.56 * len(table)
    fig, (left, right) = figure(height, 1, 2, sharey=True, width_ratios=(3, 1))
    _title(fig, f"{len(table)} answers to one note; the truth is {icd.dotted(gold)}")
    shades = [colour("grpo") if advantage > 0 else "#7A7A7A" for advantage in table["advantage"]]
    right.barh(range(len(table)), table["advantage"], color=shades, height=0.55)
    for row, (_, rollout) in enumerate(table.iterrows()):
        answer = prompts.parse(rollout["completion"])
        think = re.sub(r"[^\x20-\u24ff]", "?", " ".join(answer.think.split()))  # no glyphs
        code = icd.dotted(answer.code) or "unusable"
        paid = ", ".join(f"{name.removesuffix('_reward')} {rollout[name]:.2f}" for name in rewards)
        look = {"va": "center", "size": 9, "parse_math": False}
        left.text(0, row - 0.2, _short(think or "(no reasoning)", 70), **look)
        left.text(0, row + 0.18, f"→ {code}", weight="bold", **look)
        left.text(1, row + 0.18, _short(paid, 50), ha="right", color="#555555", **look)
    left.set(ylim=(len(table) - 0.4, -0.6), xticks=[], yticks=[])
    left.spines[:].set_visible(False)
    reach = max(table["advantage"].abs().max(), 0.1)
    right.axvline(0, color=INK, lw=1)
    right.set(xlabel="advantage", xlim=(-1.1 * reach, 1.1 * reach))
    if not table["advantage"].any():
        right.set_title("no spread:\nnothing to learn")
    return fig


def live_plot(every: int = 5, draw: Callable[[pd.DataFrame], Figure] | None = None) -> Any:
    """A TrainerCallback that redraws one figure in the notebook at every k-th log, and at the end.

    A log with a reward gets `grpo_panel`, another `training_curve`, unless `draw` says otherwise.
    `.rows` holds a dict for each log. A picture that fails never stops a training: it warns.
    """
    from IPython import display, get_ipython
    from transformers import TrainerCallback

    class LivePlot(TrainerCallback):
        def __init__(self) -> None:
            self.rows: list[dict[str, Any]] = []
            self.handle: Any = None

        def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            self.rows = [dict(row) for row in state.log_history]  # of a training that goes on

        def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
            self.rows.append({"step": state.global_step, **(logs or {})})
            if len(self.rows) % every == 0:
                self.on_train_end(args, state, control)

        def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
            if not (get_ipython() and self.rows and state.is_world_process_zero):
                return
            log = pd.DataFrame(self.rows)
            picture = draw or (grpo_panel if "reward" in log else training_curve)
            try:
                if self.handle:
                    self.handle.update(picture(log))
                else:
                    self.handle = display.display(picture(log), display_id=True)
            except Exception as error:  # hours of training must not be lost to a picture
                warnings.warn(f"live_plot: {type(error).__name__}: {error}", stacklevel=2)

    return LivePlot()


# ------------------------------------------------------------------------------- scores and errors


@styled
def score_bars(
    scores: Mapping[str, Mapping[str, Any]],
    panels: Mapping[str, str] = LEVELS,
    *,
    ceiling: Mapping[str, Mapping[str, Any]] | None = None,
    score: str = "f1_gold",
) -> Figure:
    """A score of each model with its interval, a panel for each level: model -> `metrics.report`.

    With other `panels`, key -> title: model -> `metrics.head_middle_tail`. `ceiling`, level ->
    score, is a dashed line.
    """
    models = [model for model in _in_order(scores) if model != "ideal" or not ceiling]
    sizes = {key: scores[models[0]][key]["n_classes"] for key in panels}
    panels = {key: f"{title}\n{sizes[key]} classes" for key, title in panels.items() if sizes[key]}
    height = 1.3 + 0.42 * len(models)
    fig, axes = figure(height, 1, len(panels), sharex=True, sharey=True, squeeze=False)
    rows = range(len(models))
    interval = "ci" if score == "f1_gold" else f"{score}_ci"
    for ax, (key, title) in zip(axes[0], panels.items(), strict=True):
        entries = [scores[model][key] for model in models]
        ax.barh(rows, [entry[score] for entry in entries], color=[*map(colour, models)])
        low, high = np.array([entry[interval] for entry in entries], float).T
        inks = [FAINT if model == "ideal" else INK for model in models]
        ax.hlines(rows, low, high, color=inks, lw=1.6)
        for row, entry in enumerate(entries):
            text = f"{100 * entry[score]:.0f}"
            ax.text(1.01, row, text, transform=ax.get_yaxis_transform(), va="center", weight="bold")
        if ceiling:
            line = ax.axvline(ceiling[key][score], color="black", ls="--", lw=1.5)
        ax.set_title(title)
        ax.xaxis.set_major_locator(MaxNLocator(3))
        percent(ax.xaxis, "")
        ax.spines["left"].set_visible(False)
    axes[0, 0].set_yticks(rows, [*map(label, models)])
    axes[0, 0].invert_yaxis()
    fig.supxlabel({"f1_gold": "macro-F1 (%)"}.get(score, f"{score} (%)"))
    if ceiling:
        fig.legend([line], [label("ideal")], loc="outside lower right")
    return fig


@styled
def how_far_up_the_tree(table: pd.DataFrame) -> Figure:
    """Each model's answers by the deepest level still right, of `metrics.how_far_up_the_tree`.

    Whiskers: intervals of right code and right chapter.
    """
    models = _in_order(table["model"])
    fig, ax = _rows([label(model) for model in models], 0.5)
    rows = np.arange(len(models))
    start = np.zeros(len(models))
    for kind, (name, fill, _) in KINDS.items():
        part = table[table["kind"] == kind].set_index("model").loc[models]
        bars = ax.barh(
            rows,
            part["share"],
            left=start,
            color=fill,
            height=0.66,
            hatch="////" if kind == "unusable" else None,
            label=name,
        )
        start += part["share"].to_numpy()
        ink = "white" if fill in (DEEP, MID) else INK
        texts = part["share"].map("{:.0%}".format).mask(part["share"] < 0.055, "")
        ax.bar_label(bars, texts, label_type="center", color=ink)
        if kind in ("full", "chapter"):
            ax.hlines(rows + 0.4, part["low"], part["high"], color=INK, lw=1.6)
            ax.plot(part["reached"], rows + 0.4, "|", color=INK, ms=6)
    ax.set(xlim=(0, 1), xlabel="share of cases")
    percent(ax.xaxis)
    fig.legend(loc="outside upper center", ncols=5, handlelength=1, columnspacing=1)
    return fig


@styled
def confusion(counts: pd.DataFrame, title: str, top: int = 22) -> Figure:
    """Counts of true classes (rows) against predicted ones (columns; "–": no usable answer), shaded
    by share of the row.

    Right answers are purple, all others sand. Rows: the `top` most frequent true classes, in order;
    answers of any other class are put together. `counts`: pd.crosstab of true and predicted
    chapters, or codes.
    """
    import seaborn as sns

    total = counts.sum(axis=1).nlargest(top).sort_index()
    columns = [*total.index, "other", "–"]
    others = counts.drop(columns=columns, errors="ignore").sum(axis=1)
    counts = counts.assign(other=others).reindex(total.index, columns=columns, fill_value=0)
    names = [_named(row, 38) if isinstance(row, str) else _chapter(row) for row in total.index]
    fig, ax = _rows([], 0.25 * max(len(names), 4) + 0.6, title)
    shares = counts.div(total, axis=0)
    sns.heatmap(
        shares.where(np.eye(*counts.shape, dtype=bool), -shares),
        cmap=SHADES,
        vmin=-1,
        vmax=1,
        annot=counts.astype(str).mask(counts == 0, ""),
        fmt="",
        annot_kws={"size": TINY},
        linewidths=0.5,
        linecolor="#EEEEEE",
        cbar=False,
        yticklabels=[f"{name} ({n})" for name, n in zip(names, total, strict=True)],
        ax=ax,
    )
    ax.tick_params(labelsize=9)
    return fig


@styled
def confused_pairs(pairs: pd.DataFrame) -> Figure:
    """The pairs of codes most often confused, truth above and answer below, of
    `metrics.confused_pairs`."""
    names = [f"{_named(p.gold, 46)}\n→ {_named(p.predicted, 46)}" for p in pairs.itertuples()]
    fig, ax = _rows(names, 0.5, "Codes most often confused: truth → answer", size=9)
    ax.barh(pairs.index, pairs["cases"], color=SAND, height=0.6)
    ax.hlines(pairs.index, pairs["low"], pairs["high"], color=INK, lw=1.6)
    for pair in pairs.itertuples():
        end = np.nanmax([pair.cases, pair.high])
        ax.text(end, pair.Index, f"  {pair.cases} of {pair.of}", va="center", size=9.5)
    ax.set(xlabel="cases", xlim=(0, 1.45 * np.nanmax([1, *pairs["cases"], *pairs["high"]])))
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return fig


@styled
def dumbbells(table: pd.DataFrame, before: str, after: str) -> Figure:
    """Full-code macro-F1 by chapter, from one model to the other, of `metrics.chapter_differences`.

    Right: the paired difference with its interval, filled where it excludes 0.
    """
    names = [f"{_chapter(row.chapter)} ({row.cases})" for row in table.itertuples()]
    height = 1.7 + 0.31 * len(table)
    fig, (left, right) = figure(height, 1, 2, sharey=True, width_ratios=(3, 2))
    _title(fig, "Full codes, chapter by chapter (cases)")
    rows = range(len(table))
    left.hlines(rows, table["before"], table["after"], color="#CFCFCF", lw=3, zorder=1)
    left.plot(table["before"], rows, "o", color=colour(before), ms=7, label=label(before))
    left.plot(table["after"], rows, "o", color=colour(after), ms=7, label=label(after))
    sure = (table["low"] > 0) | (table["high"] < 0)
    inks = np.where(sure, INK, FAINT)
    right.axvline(0, color=INK, lw=1)
    right.hlines(rows, table["low"], table["high"], color=inks, lw=1.8)
    fills = np.where(sure, INK, "white")
    right.scatter(table["difference"], rows, s=34, c=fills, edgecolors=inks, zorder=3)
    right.set_xlabel("difference (points)")
    left.set_xlabel("macro-F1 of its codes (%)")
    left.set_yticks(rows, names)
    left.invert_yaxis()
    for ax in (left, right):
        percent(ax.xaxis, "")
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.grid(axis="y")
    fig.legend(loc="outside lower left", ncols=2)
    return fig


@styled
def icicle(nodes: pd.DataFrame) -> Figure:
    """Chapter, category, code as bands as tall as their cases, of `metrics.tree`. Purple: mostly
    right, sand: wrong."""
    fig, ax = figure(8)
    cases = nodes["cases"].sum() / len(LEVELS)
    for x, level in enumerate(LEVELS):
        bands = nodes[nodes["level"] == level]
        tops = bands["cases"].cumsum() - bands["cases"]
        fills = SHADES(bands["right"])
        ax.bar(
            x,
            bands["cases"],
            width=1,
            bottom=tops,
            align="edge",
            color=fills,
            edgecolor="white",
            lw=0.7,
        )
        for band, top, fill in zip(bands.itertuples(), tops, fills, strict=True):
            if band.cases > 0.021 * cases:  # tall enough for a line of text
                name = _chapter(band.node) if level == "chapter" else _named(band.node, 27)
                ink = "white" if np.dot(fill[:3], (0.3, 0.59, 0.11)) < 0.55 else INK
                look = {"va": "center", "size": TINY, "color": ink}
                middle = top + band.cases / 2
                ax.text(x + 0.02, middle, name, **look)
                ax.text(x + 0.98, middle, f"{100 * band.right:.0f}", ha="right", **look)
    ax.set(xlim=(0, 3), ylim=(cases, 0), yticks=[])
    ax.set_xticks([0.5, 1.5, 2.5], [*LEVELS.values()], weight="bold")
    ax.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    fig.colorbar(
        ScalarMappable(cmap=SHADES),
        ax=ax,
        orientation="horizontal",
        aspect=45,
        pad=0.01,
        label="share of cases right at that level",
        format=PercentFormatter(1),
    )
    return fig


@styled
def reliability(curve: pd.DataFrame) -> Figure:
    """Agreement of sampled answers against accuracy: agreement, right, low, high, n, of
    `metrics.mean_by`.

    On the diagonal, agreement can be read as a probability. The grey numbers count cases.
    """
    fig, ax = figure(4.2)
    ax.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=":")
    ax.vlines(curve["agreement"], curve["low"], curve["high"], color=MID, lw=2)
    ax.plot(curve["agreement"], curve["right"], "o-", color=DEEP, ms=8)
    for point in curve.itertuples():
        ax.text(point.agreement, -0.1, str(point.n), ha="center", size=9, color="#555555")
    apart = f"{100 * metrics.calibration_error(curve):.0f} points apart"
    ax.set(
        xlim=(-0.03, 1.06),
        ylim=(-0.12, 1.06),
        xlabel="agreement of the sampled answers",
        ylabel="right code",
        title=f"Agreement and accuracy: {apart}, over {curve['n'].sum():,} cases",
    )
    percent(ax.xaxis)
    percent(ax.yaxis)
    return fig


def _rows(names: Sequence[str], unit: float, title: str = "", **look: Any) -> tuple[Figure, Axes]:
    """A figure of one row for each name, the first on top."""
    fig, ax = figure(1.1 + unit * max(len(names), 1))
    _title(fig, title)
    ax.set_yticks(range(len(names)), names, **look)
    ax.set_ylim(max(len(names), 1) - 0.45, -0.6)
    return fig, ax


def _title(fig: Figure, title: str) -> None:
    """A title from the left edge on, for figures whose axes begin after long labels."""
    if title:
        fig.suptitle(title, x=0.01, ha="left")


def _in_order(models: Iterable[str]) -> list[str]:
    """Each model once, in the order of every table; unknown ones last."""
    names = list(dict.fromkeys(models))
    return sorted(names, key=[*MODELS, *names].index)


def _chapter(number: int) -> str:
    return f"{number} {icd.chapter_short(number)}"


def _named(code: str, width: int) -> str:
    return _short(f"{icd.dotted(code)} {icd.title(code) or ''}", width)


def _short(text: str, width: int) -> str:
    return textwrap.shorten(text, width, placeholder=" …")
