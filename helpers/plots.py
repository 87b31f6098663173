"""The pictures of the course: one palette, chapters in the order of the classification, intervals wherever models are compared.

Every function takes plain frames (cases, predictions) or dicts and returns a Figure that pyplot has let go of: as the last
expression of a cell it shows once. Figures are 7 inches wide and no text is below 8.2 points, so that all can be read at half the
width of a page (500 pixels). Intervals are 95 % percentile bootstraps over *patients*; two models on the same cases are resampled
together. `predictions` maps the name of a model to its table where it is a Mapping.
"""

from __future__ import annotations

import itertools
import re
import textwrap
import tomllib
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from time import monotonic
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib import rc_params_from_file
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    MultipleLocator,
    NullFormatter,
    PercentFormatter,
)

from helpers import icd

_PALETTE = tomllib.loads(Path(__file__).with_name("palette.toml").read_text(encoding="utf-8"))
MODELS: dict[str, tuple[str, str]] = {
    name: tuple(pair) for name, pair in _PALETTE["models"].items()
}  # label, colour
KINDS: dict[str, tuple[str, str]] = {name: tuple(pair) for name, pair in _PALETTE["kinds"].items()}
LEVELS = {"chapter": "Chapter", "category": "Category", "full": "Full code"}
INK, FAINT, DEEP, MID, SAND = "#222222", "#8C8C8C", "#3F1D6B", "#8066AE", "#E3BE7F"
WIDTH, TINY = 7.0, 8.2
RC = rc_params_from_file(
    str(Path(__file__).with_name("course.mplstyle")), use_default_template=False
)


def style() -> None:
    """Make the course's style the default for the reader's own plots; the functions below bring it along themselves."""
    plt.rcParams.update(RC)


def colour(model: str) -> str:
    """The colour of a model or of an arm of the study; other variants, such as "sft_constrained", take that of the model they
    begin with."""
    return (
        _PALETTE["arms"].get(model) or MODELS.get(re.split(r"[-+_]", model)[0], ("", "#9467BD"))[1]
    )


def label(model: str) -> str:
    """The name of a model as printed; an unknown name is printed as it is."""
    return MODELS[model][0] if model in MODELS else model.replace("_", " ")


def outcomes(cases: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """The first sample of each predicted case beside its gold code: subject_id, hadm_id, gold, predicted (None if unusable), kind
    (of KINDS). Raises ValueError where the two tables share no case."""
    first = predictions[predictions["sample"] == 0] if "sample" in predictions else predictions
    first = first.drop_duplicates("hadm_id")[["hadm_id", "predicted"]]
    frame = (
        cases[["subject_id", "hadm_id", "code"]]
        .merge(first, on="hadm_id")
        .rename(columns={"code": "gold"})
    )
    if frame.empty:
        raise ValueError(
            "outcomes: cases and predictions share no hadm_id. Take both from the same run folder."
        )
    frame["predicted"] = pd.Series(
        [icd.normalise(code) for code in frame["predicted"]], frame.index, object
    )
    pairs = zip(frame["gold"], frame["predicted"], strict=True)
    return frame.assign(
        kind=["unusable" if p is None else icd.deepest_shared(g, p) or "wrong" for g, p in pairs]
    )


def _drawn(function: Callable[..., Figure]) -> Callable[..., Figure]:
    @wraps(function)
    def draw(*args: Any, **kwargs: Any) -> Figure:
        before = set(plt.get_fignums())
        try:
            with plt.rc_context(RC):
                return function(*args, **kwargs)
        finally:  # a notebook would show a figure that pyplot still holds a second time
            for number in set(plt.get_fignums()) - before:
                plt.close(number)

    return draw


def _resamples(patients: Any, n_boot: int) -> Iterator[np.ndarray]:
    """Weights of the rows [n]: first all ones, then how often each bootstrap drew the row's patient."""
    ids = pd.factorize(np.asarray(patients))[0]
    rng, n = np.random.default_rng(0), ids.max() + 1
    yield np.ones(len(ids))
    for _ in range(n_boot):
        yield np.bincount(rng.integers(n, size=n), minlength=n)[ids].astype(float)


def _band(draws: Any, floor: float = 0.0) -> np.ndarray:
    """Draws [1 + n_boot, k], the point estimate first -> [3, k]: point, low, high; NaN where nothing was drawn.

    As in `metrics`, the resamples' deviations from their mean are put around the point: with rare codes their mean is off.
    """
    draws = np.asarray(draws)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # an all-NaN column stays NaN
        ends = np.nanpercentile(draws[1:] - np.nanmean(draws[1:], axis=0), [2.5, 97.5], axis=0)
    return np.vstack([draws[0], np.clip(draws[0] + ends, floor, 1.0)])


def _shares(hits: Any, patients: Any) -> np.ndarray:
    """Mean of each column of `hits` [n, k] with its interval, [3, k]."""
    hits = np.asarray(hits, float)
    return _band([w @ hits / w.sum() for w in _resamples(patients, 500)])


def _group_f1(
    frame: pd.DataFrame, group: Mapping[str, int], n: int
) -> tuple[np.ndarray, pd.Series]:
    """Macro-F1 over the gold codes of each of n groups, draws [1 + n_boot, n], and the F1 of each code.

    Each resample averages over the gold codes present in it; an unusable answer is a miss (see `metrics.report`).
    """
    codes = pd.Index(sorted(frame["gold"].unique()))
    gold, said = codes.get_indexer(frame["gold"]), codes.get_indexer(frame["predicted"])
    groups, draws, by_code = np.array([group[c] for c in codes]), [], pd.Series(dtype=float)
    for w in _resamples(frame["subject_id"], 300):
        support, claimed, hit = (
            np.bincount(i[m], w[m], len(codes))
            for i, m in ((gold, gold >= 0), (said, said >= 0), (gold, gold == said))
        )
        f1, there = 2 * hit / np.maximum(support + claimed, 1e-9), support > 0
        by_code = pd.Series(f1, codes) if by_code.empty else by_code
        count = np.bincount(groups[there], minlength=n)
        draws.append(
            np.where(count, np.bincount(groups[there], f1[there], n) / np.maximum(count, 1), np.nan)
        )
    return np.array(draws), by_code


def _cut(text: str, width: int, others: str = "") -> str:
    """Shortened between words: first go the words that `others` have too, and of these the ones in the middle."""
    words, left, cut = text.split(), {-1}, ""
    for i in sorted(
        range(len(words)),
        key=lambda i: (i > 0, words[i] in others.split(), min(i, len(words) - 1 - i)),
    ):
        more = sorted(left | {i})
        longer = " ".join(
            ("… " if b - a > 1 else "") + words[b] for a, b in itertools.pairwise(more)
        )
        longer += " …" * (more[-1] < len(words) - 1)
        left, cut = (left | {i}, longer) if len(longer) <= width else (left, cut)
    return text if len(text) <= width else cut or f"{text.strip()[: width - 1]}…"


def _named(code: str, width: int, others: Iterable[str] = ()) -> str:
    """Code and title, shortened to what tells it from the titles of the other codes."""
    rest = " ".join(icd.title(other) or "" for other in others if other != code)
    return _cut(f"{icd.dotted(code)} {icd.title(code) or ''}".strip(), width, rest)


def _chapter(number: int) -> str:
    return f"{number} {icd.chapter_short(number)}"


def _percent(axis: Any, symbol: str = "%") -> None:
    axis.set_major_formatter(PercentFormatter(1, decimals=0, symbol=symbol))


def _rows(
    names: Sequence[str], unit: float, title: str = "", ax: Axes | None = None, **options: Any
) -> tuple[Figure, Axes]:
    """A figure of horizontal bars, one row for each name, the first on top; its title starts at the left edge."""
    fig, ax = (
        (ax.figure, ax) if ax else plt.subplots(figsize=(WIDTH, 1.1 + unit * max(len(names), 1)))
    )
    ax.set_yticks(range(len(names)), names, **options)
    ax.set_ylim(max(len(names), 1) - 0.45, -0.6)
    if title:
        fig.suptitle(title, x=0.01, ha="left", size=11.5, fontweight="bold")
    return fig, ax


def _end_labels(ax: Axes, ends: Sequence[tuple[float, str, str]], gap: float = 0.1) -> None:
    """Labels (y, text, colour) to the right of their curves, moved up, and down from the top, until none covers another."""
    ax.autoscale_view()  # else the limits are not those of the drawing yet
    floor, to_axes, placed = -1.0, ax.transScale + ax.transLimits, []
    for y, text, shade in sorted(ends, key=lambda end: end[0]):
        half = gap / 2 * (1 + text.count("\n"))
        last = max(float(to_axes.transform((1, y))[1]), floor + half)
        floor = last + half
        note = ax.annotate(
            text,
            (1.02, last),
            xycoords="axes fraction",
            color=shade,
            size=9.5,
            va="center",
            weight="bold",
        )
        placed.append((note, last, half))
    top = 1.1
    for note, last, half in reversed(placed):
        note.set_position((1.02, min(last, top - half)))
        top = min(last, top - half) - half


def _panels(
    titles: Sequence[str], bands: Mapping[str, np.ndarray], ceiling: Sequence[Any], xlabel: str
) -> Figure:
    """One panel of bars per title, one bar per model: bands[model] is [3, panels] of point, low, high."""
    names = sorted(bands, key=lambda m: list(MODELS).index(m) if m in MODELS else len(MODELS))
    bounded = any(c is not None for c in ceiling)
    fig, grid = plt.subplots(
        1,
        len(titles),
        figsize=(WIDTH, 1.2 + 0.42 * len(names)),
        sharey=True,
        sharex=True,
        squeeze=False,
    )
    axes, top = (
        grid[0],
        max(0.05, *(np.nanmax(b) for b in bands.values()), *(c for c in ceiling if c is not None)),
    )
    for j, (ax, title, bound) in enumerate(zip(axes, titles, ceiling, strict=True)):
        for i, (point, low, high) in enumerate(bands[m][:, j] for m in names):
            ax.barh(i, point, color=colour(names[i]), height=0.68)
            ax.plot([low, high], [i, i], color=FAINT if names[i] == "ideal" else INK, lw=1.6)
            inside = (
                point > 0.25 * top
            )  # else beside the bar; never at its end, where the ceiling may be
            ax.text(
                0.03 * top if inside else np.nanmax([point, high, 0]) + 0.03 * top,
                i,
                f"{100 * point:.0f}" if point == point else "–",
                va="center",
                size=10.5,
                weight="bold",
                color="white" if inside else INK,
            )
        if bound is not None:
            ax.axvline(bound, color="black", ls="--", lw=1.5)
            ax.text(bound, len(names) - 0.15, "ideal reader ", ha="right", va="center", size=9.5)
        ax.set(
            title=title,
            xlim=(0, min(1.22 * top, max(top, 1.02))),
            xlabel=xlabel if j == len(titles) // 2 else None,
        )
        ax.xaxis.set_major_locator(MultipleLocator(0.5) if top > 0.6 else MaxNLocator(3))
        _percent(ax.xaxis, "")
        ax.spines["left"].set_visible(False)
    axes[0].set_yticks(range(len(names)), [label(m) for m in names])
    axes[0].set_ylim(len(names) - 0.4 + 0.6 * bounded, -0.6)
    return fig


# ------------------------------------------------------------------------------------------ the data
@_drawn
def code_frequencies(cases: pd.DataFrame) -> Figure:
    """The long tail: cases per code against the rank of the code, one line per split, both axes logarithmic."""
    fig, ax = plt.subplots(figsize=(WIDTH, 3.6))
    ends = []  # a little apart where curves end at the same height: the longer one lies above
    for split, shade in (("test", INK), ("val", MID), ("train", DEEP)):
        counts = cases.loc[cases["split"] == split, "code"].value_counts().to_numpy()
        if len(counts):
            ax.plot(np.arange(1, len(counts) + 1), counts, color=shade, marker=".", ms=5, lw=1.5)
            ends.append(
                (
                    counts[-1] + counts.sum() / 1e6,
                    f"{split}: {counts.sum():,} cases\n{len(counts)} codes, "
                    f"{(counts < 10).sum()} below 10",
                    shade,
                )
            )
    ax.set(
        xscale="log",
        yscale="log",
        xlabel="codes, most frequent first (rank)",
        ylabel="cases",
        title="Cases of each code, by split",
    )
    ax.axhline(10, color=FAINT, lw=1, ls=":")
    _end_labels(ax, ends)
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    return fig


@_drawn
def chapters(cases: pd.DataFrame) -> Figure:
    """Share of each chapter in the training cases (bars) and in the test cases (diamonds, with interval)."""
    present = sorted(cases["chapter"].unique())
    train, test = (cases[cases["split"] == s] for s in ("train", "test"))
    fig, ax = _rows([_chapter(c) for c in present], 0.29)
    reach = np.array([(train["chapter"] == c).mean() if len(train) else 0.0 for c in present])
    ax.barh(range(len(present)), reach, color="#C3B5DE", height=0.7, label="train")
    if len(test):
        point, low, high = _shares(
            np.array([test["chapter"] == c for c in present]).T, test["subject_id"]
        )
        ax.hlines(range(len(present)), low, high, color=INK, lw=1.6)
        ax.plot(point, range(len(present)), "D", color=INK, ms=4.5, label="test")
        reach = np.maximum(reach, high)
    for row, c in enumerate(present):
        n = cases.loc[cases["chapter"] == c, "code"].nunique()
        ax.text(
            reach[row] + 0.012 * reach.max(), row, f"{n} code{'s' * (n != 1)}", va="center", size=9
        )
    ax.set(xlabel="share of cases", title="Cases by chapter", xlim=(0, 1.16 * reach.max()))
    _percent(ax.xaxis)
    ax.legend(loc="lower right")
    return fig


@_drawn
def note_lengths(
    lengths: Sequence[int],
    limit: int | None = None,
    unit: str = "tokens",
    what: str = "admission note",
) -> Figure:
    """Histogram and density of the lengths of notes, or of `what`; the title says how many exceed `limit`, hence are cut."""
    values = np.asarray(lengths, float)
    fig, ax = plt.subplots(figsize=(WIDTH, 2.9))
    import seaborn as sns

    whole = max(
        1, int(np.ceil(np.ptp(values) / 50))
    )  # tokens to a bar: with a broken number some bars would stand out
    edges = np.arange(values.min() - 0.5, values.max() + whole + 0.5, whole)
    sns.histplot(
        x=values,
        bins=edges,
        kde=bool(np.ptp(values)),
        color=MID,
        alpha=0.8,
        edgecolor="white",
        linewidth=0.4,
        ax=ax,
    )
    marks = [(float(np.median(values)), "median", ":")] + (
        [(limit, "limit", "--")] if limit is not None else []
    )
    for x, name, line in marks:
        ax.axvline(x, color="black", lw=1.5, ls=line)
        ax.text(
            x,
            1.0,
            f"{name} {x:,.0f}",
            transform=ax.get_xaxis_transform(),
            va="bottom",
            size=10,
            ha="right" if x == min(m[0] for m in marks) else "left",
        )
    ax.set(xlabel=f"length of the {what} ({unit})", ylabel=f"{what.split()[-1]}s")
    over = (
        ""
        if limit is None
        else f": {100 * np.mean(values > limit):.1f} % exceed the limit and are cut"
    )
    ax.set_title(f"Length of the {what.split()[-1]}s{over}", pad=18)
    return fig


@_drawn
def funnel(steps: Mapping[str, int]) -> Figure:
    """What each step of preparing the data leaves: count, and share of the step before."""
    counts = list(steps.values())
    fig, ax = _rows([textwrap.fill(name, 28) for name in steps], 0.42, "From raw files to cases")
    ax.barh(range(len(counts)), counts, color=MID, height=0.7)
    for i, n in enumerate(counts):
        kept = f"  ({100 * n / counts[i - 1]:.3g} % kept)" if i and counts[i - 1] else ""
        ax.text(n + 0.01 * max(counts), i, f"{n:,}{kept}", va="center", size=10)
    ax.set(xlim=(0, 1.35 * max(*counts, 1)), xticks=[])
    ax.spines[["left", "bottom"]].set_visible(False)
    return fig


# ------------------------------------------------------------------------------------------ training
_OTHERS = (
    "#444444",
    "#7B3F98",
    "#1B9E77",
    "#C2477F",
    "#3E8FC4",
    "#A67C1E",
)  # what is no model of the course
_TITLES = {
    "loss": "Loss",
    "mean_token_accuracy": "Token accuracy",
    "completions/mean_length": "Tokens per answer",
}


def _curves(
    ax: Axes, log: pd.DataFrame, columns: Mapping[str, tuple[str, str]], title: str
) -> None:
    """Lines of the log, column -> (label, colour): smoothed over a fifteenth of the run, above the raw points. What is measured
    on held-out data (`eval_...`) comes seldom and is drawn as it is, dashed."""
    ends: list[tuple[float, str, str]] = []
    for column, (name, shade) in columns.items():
        if column not in log or (points := log[["step", column]].dropna()).empty:
            continue
        held = column.startswith("eval_")
        window = 1 if held else max(1, len(points) // 15)
        smooth = points[column].rolling(window, min_periods=1, center=True).mean()
        ax.plot(
            points["step"],
            points[column],
            "D" if held else ".",
            color=shade,
            ms=5 if held else 6,
            alpha=1 if held else 0.4,
            mew=0,
        )
        ax.plot(points["step"], smooth, color=shade, ls=(0, (4, 2)) if held else "-")
        ends.append((float(smooth.iloc[-1]), name, shade))
    ax.set(title=title, xlabel="step")
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    ax.yaxis.set_major_locator(MaxNLocator(4))
    ax.grid(axis="y")
    _end_labels(ax, ends if len(ends) > 1 else [])
    if not ends:
        ax.text(0.5, 0.5, "nothing logged", transform=ax.transAxes, ha="center", color=FAINT)


@_drawn
def training_curve(
    log: pd.DataFrame,
    columns: Sequence[str] = ("loss", "mean_token_accuracy"),
    *,
    model: str = "sft",
) -> Figure:
    """One panel for each of these columns of a training_log.csv, with `eval_<column>` where the log has it. A loss that falls
    to less than a tenth is drawn on a logarithmic axis.

    Raises ValueError if the log has no column step or none of the columns.
    """
    shown = [c for c in columns if c in log]
    if "step" not in log or not shown:
        raise ValueError(
            f"training_curve: the log needs step and one of {', '.join(columns)} (found: "
            f"{', '.join(map(str, log.columns[:9]))}). Read the training_log.csv of a run folder."
        )
    fig, axes = plt.subplots(1, len(shown), figsize=(WIDTH, 2.8), squeeze=False)
    for ax, c in zip(axes[0], shown, strict=True):
        _curves(
            ax,
            log,
            {c: ("train", colour(model)), f"eval_{c}": ("held\nout", INK)},
            _TITLES.get(c, c),
        )
        ax.set(yscale="log" if c == "loss" and log[c].max() > 10 * log[c].min() > 0 else "linear")
    return fig


@_drawn
def grpo_panel(log: pd.DataFrame) -> Figure:
    """What to watch during GRPO: reward with its components, held-out reward, spread within groups, length.

    TRL's `reward_std` is the spread of the whole batch: it stays up even where every group is of one mind and nothing can be
    learned. The share of flat groups (`frac_reward_zero_std`) tells, or a column `group_reward_std`.
    """
    if "step" not in log:
        raise ValueError(
            "grpo_panel: the log has no column step. Read the training_log.csv of a run folder."
        )
    parts = [c for c in log if c.startswith("rewards/") and c.endswith("/mean")]
    names = (
        {
            c: (
                c.split("/")[1].removesuffix("_reward").replace("_", " "),
                _OTHERS[i % len(_OTHERS)],
            )
            for i, c in enumerate(parts)
        }
        if len(parts) > 1
        else {}
    )
    own = "group_reward_std" in log
    fig, ((a, b), (c, d)) = plt.subplots(2, 2, figsize=(WIDTH, 5))
    _curves(a, log, names | {"reward": ("total", colour("grpo"))}, "Reward and its components")
    _curves(b, log, {"eval_reward": ("", colour("grpo"))}, "Reward on held-out prompts")
    _curves(
        c,
        log,
        {
            "group_reward_std" if own else "reward_std": (
                "std in\ngroups" if own else "std of\nbatch",
                _OTHERS[1],
            ),
            "frac_reward_zero_std": ("flat\ngroups", INK),
        },
        "Spread; share of flat groups",
    )
    _curves(
        d, log, {"completions/mean_length": ("", "#555555")}, _TITLES["completions/mean_length"]
    )
    return fig


@_drawn
def rollout_group(
    completions: Sequence[Any],
    rewards: Mapping[str, Sequence[float]],
    advantages: Any = None,
    *,
    weights: Mapping[str, float] | None = None,
    gold: str = "",
) -> Figure:
    """One group of roll-outs of one prompt, best first: completion (shortened), its rewards, its advantage as a bar.

    Without `advantages`: (r − mean) / (std + 1e-4) of the weighted sum r, sample std, as TRL does (DeepSeekMath, arXiv
    2402.03300, section 4.1.1). Raises ValueError where the lengths differ.
    """
    from helpers import prompts

    parts = {name: np.asarray(values, float) for name, values in rewards.items()}
    total = sum((weights or {}).get(name, 1.0) * values for name, values in parts.items())
    spread = total.std(ddof=1) if len(total) > 1 else 0.0
    advantage = (
        (total - total.mean()) / (spread + 1e-4)
        if advantages is None
        else np.asarray(advantages, float)
    )
    if not len(completions) == len(total) == len(advantage):
        raise ValueError(
            f"rollout_group: {len(completions)} completions, {len(total)} rewards and {len(advantage)} "
            "advantages. Pass the roll-outs of one group."
        )
    order = np.argsort(-advantage, kind="stable")
    title = f"{len(order)} answers to one note" + (
        f"; the truth is {icd.dotted(gold)}" if gold else ""
    )
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 1.2 + 0.56 * len(order)), width_ratios=(3, 1), sharey=True
    )
    _rows([], 0, title, left)
    for row, i in enumerate(order):
        text = completions[i] if isinstance(completions[i], str) else completions[i][-1]["content"]
        answer = prompts.parse(text)
        think = "".join(
            c if c.isprintable() and ord(c) < 0x2500 else "?"
            for c in " ".join(answer.think.split())
        )
        sums = "  ".join(
            f"{name.removesuffix('_reward')} {values[i]:.2f}" for name, values in parts.items()
        )
        plain: dict[str, Any] = {"va": "center", "parse_math": False}
        left.text(0, row - 0.2, _cut(think or "(no reasoning)", 70), size=9, **plain)
        left.text(
            0,
            row + 0.18,
            f"→ {icd.dotted(answer.code) or 'unusable'}",
            size=9.5,
            weight="bold",
            **plain,
        )
        left.text(1, row + 0.18, _cut(sums, 50), ha="right", size=9, color="#555555", **plain)
        right.barh(
            row, advantage[i], color=colour("grpo") if advantage[i] > 0 else "#7A7A7A", height=0.55
        )
    left.set(xlim=(0, 1), ylim=(len(order) - 0.4, -0.6), xticks=[], yticks=[])
    left.spines[:].set_visible(False)
    right.axvline(0, color=INK, lw=1)
    right.set(xlabel="advantage", xlim=np.array([-1.1, 1.1]) * max(np.abs(advantage).max(), 0.1))
    right.spines["left"].set_visible(False)
    if spread < 1e-6:
        right.text(
            0, len(order) / 2 - 0.5, " no spread:\n nothing\n to learn", va="center", size=9.5
        )
    return fig


class LiveTrainingPlot:
    """A transformers callback that redraws one small figure in the notebook at every k-th log, and once at the end.

    `trainer.add_callback(LiveTrainingPlot(every=5))`. Logs with a reward get `grpo_panel`, others `training_curve`, unless `draw`
    says otherwise. Outside a notebook it only collects (`.log`, one row per log). A picture that fails never stops a training: it
    warns once.
    """

    def __init__(
        self,
        every: int = 5,
        draw: Callable[[pd.DataFrame], Figure] | None = None,
        min_seconds: float = 3.0,
    ) -> None:
        self.every, self.draw, self.min_seconds = max(1, every), draw, min_seconds
        self.rows: list[dict[str, Any]] = []
        self._handle: Any = None
        self._drawn_at, self._broken = -np.inf, False

    def __getattr__(self, name: str) -> Callable[..., None]:
        if name.startswith(
            "on_"
        ):  # the Trainer's other events, without importing transformers for a base class
            return lambda *args, **kwargs: None
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    @property
    def log(self) -> pd.DataFrame:
        return pd.DataFrame(self.rows)

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.rows = [
            dict(row) for row in state.log_history
        ]  # of an interrupted training that goes on

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        self.rows.append({"step": state.global_step, **(logs or {})})
        if len(self.rows) % self.every == 0 and monotonic() - self._drawn_at >= self.min_seconds:
            self.on_train_end(args, state, control)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from IPython import display, get_ipython

        if (
            get_ipython() is None
            or self._broken
            or not self.rows
            or not state.is_world_process_zero
        ):
            return
        try:
            fig = (self.draw or (grpo_panel if "reward" in self.log else training_curve))(self.log)
            if self._handle is None:
                self._handle = display.display(fig, display_id=True)
            else:
                self._handle.update(fig)
        except (
            Exception
        ) as error:  # whatever goes wrong in a picture, hours of training must not be lost to it
            self._broken = True
            warnings.warn(
                f"LiveTrainingPlot stopped: {type(error).__name__}: {error}", stacklevel=2
            )
        self._drawn_at = monotonic()


# --------------------------------------------------------------------------------- scores and errors
@_drawn
def score_bars(metrics: Mapping[str, Any], score: str = "f1_gold") -> Figure:
    """A score of metrics.json, "f1_gold" or "accuracy", for each model at the three levels; the ceiling is dashed."""
    models = {m: entry for m, entry in metrics["models"].items() if m != "ideal"}
    if not models:
        raise ValueError(
            "score_bars: metrics.json holds no model. Run notebook 06_hierarchical_f1_analysis first."
        )
    ends = "ci" if score == "f1_gold" else f"{score}_ci"
    bands = {
        m: np.array([[e[v][score], *(e[v].get(ends) or [np.nan] * 2)] for v in LEVELS], float).T
        for m, e in models.items()
    }
    ceiling = [((metrics.get("ceiling") or {}).get(v) or {}).get(score) for v in LEVELS]
    titles = [
        f"{name}\n{max(e[v]['n_classes'] for e in models.values())} classes"
        for v, name in LEVELS.items()
    ]
    return _panels(
        titles,
        bands,
        ceiling,
        {"f1_gold": "macro-F1 (%)", "accuracy": "accuracy (%)"}.get(score, score),
    )


@_drawn
def how_far_up_the_tree(cases: pd.DataFrame, predictions: Mapping[str, pd.DataFrame]) -> Figure:
    """Each model's answers by the deepest level still right; whiskers: intervals of right code and right chapter."""
    fig, ax = _rows([label(m) for m in predictions], 0.5)
    hatch = {"unusable": "////"}
    for row, table in enumerate(predictions.values()):
        frame, start = outcomes(cases, table), 0.0
        hits = np.array([frame["kind"] == kind for kind in KINDS]).T
        for (kind, (_, fill)), share in zip(KINDS.items(), hits.mean(axis=0), strict=True):
            ax.barh(row, share, left=start, color=fill, height=0.66, hatch=hatch.get(kind))
            if share >= 0.055:
                ax.text(
                    start + share / 2,
                    row,
                    f"{100 * share:.0f}",
                    ha="center",
                    va="center",
                    size=10,
                    color="white" if fill in (DEEP, MID) else INK,
                    bbox={"fc": fill, "ec": "none", "pad": 0.8},
                )
            start += share
        point, low, high = _shares(hits[:, :3].cumsum(axis=1)[:, [0, 2]], frame["subject_id"])
        ax.hlines([row + 0.4] * 2, low, high, color=INK, lw=1.6)
        ax.plot(point, [row + 0.4] * 2, "|", color=INK, ms=6)
    ax.set(xlim=(0, 1), xlabel="share of cases")
    _percent(ax.xaxis)
    keys = [
        plt.Rectangle((0, 0), 1, 1, fc=fill, hatch=hatch.get(kind))
        for kind, (_, fill) in KINDS.items()
    ]
    fig.legend(
        keys,
        [name for name, _ in KINDS.values()],
        loc="outside upper center",
        ncols=5,
        handlelength=1,
        columnspacing=1,
    )
    return fig


def _matrix(
    gold: pd.Series,
    said: Any,
    columns: Sequence[Any],
    names: Sequence[str],
    title: str,
    xlabel: str,
) -> Figure:
    """Counts of gold against said, coloured by the share of their row. The i-th row's right answer is column i."""
    counts = pd.crosstab(gold, pd.Series(said, gold.index))
    counts = counts.reindex(index=columns[: len(names)], columns=columns, fill_value=0).to_numpy(
        int
    )
    total = counts.sum(axis=1, keepdims=True)
    ticks = [str(c) for c in columns]
    size = 1.2 + max(0.25 * len(names), 0.8) + 0.09 * max(map(len, ticks))
    fig, ax = plt.subplots(figsize=(WIDTH, size))
    ax.pcolormesh(counts / total, cmap="Purples", vmin=0, vmax=1, edgecolors="#EEEEEE", lw=0.5)
    for i, j in np.argwhere(counts > 0):
        ax.text(
            j + 0.5,
            i + 0.5,
            f"{counts[i, j]}",
            ha="center",
            va="center",
            size=TINY,
            color="white" if counts[i, j] > 0.55 * total[i, 0] else INK,
        )
    for i in range(len(names)):
        ax.add_patch(plt.Rectangle((i, i), 1, 1, fill=False, ec=INK, lw=1.1))
    _rows([], 0, title, ax)
    ax.set_yticks(
        np.arange(len(names)) + 0.5,
        [f"{n} ({t})" for n, t in zip(names, total[:, 0], strict=True)],
        size=9,
    )
    ax.set_xticks(
        np.arange(len(ticks)) + 0.5, ticks, size=9, rotation=90 if max(map(len, ticks)) > 3 else 0
    )
    ax.set(xlabel=xlabel, ylim=(len(names), 0))
    ax.spines[:].set_visible(False)
    return fig


@_drawn
def chapter_confusion(cases: pd.DataFrame, predictions: pd.DataFrame) -> Figure:
    """True against predicted chapter: counts, coloured by share of the row; "–" is no usable answer."""
    frame = outcomes(cases, predictions)
    gold, said = frame["gold"].map(icd.chapter), [icd.chapter(p) or "–" for p in frame["predicted"]]
    rows = sorted(set(gold))
    return _matrix(
        gold,
        said,
        [*rows, *sorted(set(said) - {*rows, "–"}), "–"],
        [_chapter(c) for c in rows],
        "True chapter (cases) against predicted chapter",
        "predicted chapter (–: no usable answer)",
    )


@_drawn
def category_confusion(
    cases: pd.DataFrame, predictions: pd.DataFrame, chapter: int | None = None, top: int = 14
) -> Figure:
    """The confusion inside one chapter, by category; without `chapter`, the worst: the largest share of wrong categories among
    the chapters of 20 cases and more.

    Rows are its `top` most frequent categories, the columns beyond them say where else answers went. Raises ValueError for a
    chapter without cases.
    """
    frame = outcomes(cases, predictions)
    missed = (
        (~frame["kind"].isin(["full", "category"]))
        .groupby(frame["gold"].map(icd.chapter))
        .agg(["mean", "size"])
    )
    chapter = chapter or int(
        missed.loc[missed["size"] >= min(20, missed["size"].max()), "mean"].idxmax()
    )
    if chapter not in missed.index:
        raise ValueError(
            f"category_confusion: no predicted case is of chapter {chapter}. Choose another chapter."
        )
    frame, wrong = frame[frame["gold"].map(icd.chapter) == chapter], missed.loc[chapter, "mean"]
    gold = frame["gold"].map(icd.category)
    rows = sorted(gold.value_counts().index[:top])
    said = [
        "–"
        if p is None
        else icd.category(p)
        if icd.category(p) in rows
        else "other here"
        if icd.chapter(p) == chapter
        else "elsewhere"
        for p in frame["predicted"]
    ]
    return _matrix(
        gold,
        said,
        [*rows, "other here", "elsewhere", "–"],
        [_named(c, 38, rows) for c in rows],
        f"Inside chapter {_chapter(chapter)}: {100 * wrong:.0f} % of {len(frame)} cases in a wrong category",
        "predicted category (–: no usable answer)",
    )


def confused_pairs(cases: pd.DataFrame, predictions: pd.DataFrame, top: int = 50) -> pd.DataFrame:
    """Usable wrong answers by pair, most frequent first: gold, predicted, cases, of (all of gold), low, high (at most of)."""
    frame = outcomes(cases, predictions)
    wrong = frame[frame["kind"].isin(["category", "chapter", "wrong"])]
    pairs = wrong.groupby(["gold", "predicted"]).size().rename("cases").reset_index()
    pairs = pairs.sort_values(["cases", "gold", "predicted"], ascending=[False, True, True]).head(
        top
    )
    hits = [
        (frame["gold"] == p.gold) & (frame["predicted"] == p.predicted) for p in pairs.itertuples()
    ]
    band = _shares(np.array(hits).T, frame["subject_id"]) * len(frame) if hits else np.zeros((3, 0))
    of = pairs["gold"].map(frame["gold"].value_counts())
    return pairs.assign(of=of, low=band[1], high=np.minimum(band[2], of)).reset_index(drop=True)


@_drawn
def most_confused_pairs(cases: pd.DataFrame, predictions: pd.DataFrame, top: int = 8) -> Figure:
    """The pairs of codes most often confused, with titles: truth above, answer below; intervals of the counts."""
    pairs = confused_pairs(cases, predictions, top)
    names = [
        f"{_named(p.gold, 46, [p.predicted])}\n→ {_named(p.predicted, 46, [p.gold])}"
        for p in pairs.itertuples()
    ]
    title = (
        "Codes most often confused: truth → answer"
        if names
        else "No code was confused with another"
    )
    fig, ax = _rows(names, 0.5, title, size=9)
    ax.barh(pairs.index, pairs["cases"], color=SAND, height=0.6)
    ax.hlines(pairs.index, pairs["low"], pairs["high"], color=INK, lw=1.6)
    for p in pairs.itertuples():
        ax.text(max(p.cases, p.high), p.Index, f"  {p.cases} of {p.of}", va="center", size=9.5)
    ax.set(xlabel="cases", xlim=(0, 1.45 * max([1, *pairs["high"]])))
    ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    return fig


@_drawn
def f1_against_frequency(cases: pd.DataFrame, predictions: Mapping[str, pd.DataFrame]) -> Figure:
    """F1 of each code (dots) against its training cases; lines: mean of codes alike in frequency, with interval."""
    counts = cases.loc[cases["split"] == "train", "code"].value_counts()
    edges = np.array([1, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000])
    fig, ax = plt.subplots(figsize=(WIDTH, 3.8))
    ends = []
    for k, (model, table) in enumerate(predictions.items()):
        frame = outcomes(cases, table)
        seen = {c: max(float(counts.get(c, 0)), 0.5) for c in sorted(frame["gold"].unique())}
        group = {c: int(np.searchsorted(edges, n, side="right")) for c, n in seen.items()}
        draws, by_code = _group_f1(frame, group, len(edges) + 1)
        bins = sorted(set(group.values()))
        x = (
            np.array(
                [np.exp(np.mean([np.log(seen[c]) for c in seen if group[c] == b])) for b in bins]
            )
            * 1.05**k
        )
        point, low, high = _band(draws)[:, bins]
        ax.plot(list(seen.values()), by_code, ".", color=colour(model), alpha=0.35, ms=7, mew=0)
        ax.vlines(x, low, high, color=colour(model), lw=1.6)
        ax.plot(x, point, "o-", color=colour(model), ms=5)
        ends.append((point[-1], label(model), colour(model)))
    unseen = " (far left: none)" * any(n < 1 for n in seen.values())
    ax.set(
        xscale="log",
        ylim=(-0.03, 1.03),
        xlabel=f"training cases of the code{unseen}",
        ylabel="F1, full code (%)",
        title="F1 of each code by its training cases",
    )
    _end_labels(ax, ends, 0.07)
    _percent(ax.yaxis, "")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.xaxis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.0f}" if value >= 1 else "")
    )
    ax.grid(axis="y")
    return fig


@_drawn
def head_middle_tail(cases: pd.DataFrame, predictions: Mapping[str, pd.DataFrame]) -> Figure:
    """Full-code macro-F1 by frequency in training, in the bands of `metrics.head_middle_tail`; empty bands are left out."""
    from helpers import metrics

    train, bands = cases.loc[cases["split"] == "train", "code"].tolist(), {}
    for m, table in predictions.items():
        frame = outcomes(cases, table)
        bands[m] = metrics.head_middle_tail(
            frame["gold"].tolist(),
            frame["predicted"].tolist(),
            train,
            patients=frame["subject_id"].tolist(),
            n_boot=300,
        )
    names = {
        name: max(b[name]["n_classes"] for b in bands.values())
        for name in ("head", "middle", "tail", "unseen")
    }
    shown = [name for name, n in names.items() if n]
    values = {
        m: np.array([[b[v]["f1_gold"], *b[v]["ci"]] for v in shown], float).T
        for m, b in bands.items()
    }
    titles = [f"{v.capitalize()}\n{names[v]} code{'s' * (names[v] != 1)}" for v in shown]
    return _panels(titles, values, [None] * len(shown), "macro-F1 of full codes (%)")


@_drawn
def dumbbells(
    cases: pd.DataFrame,
    before: pd.DataFrame,
    after: pd.DataFrame,
    names: tuple[str, str] = ("sft", "grpo"),
) -> Figure:
    """Full-code macro-F1 by chapter, from one model to the other, and the paired difference with its interval (filled where it
    excludes 0), on the cases that both answered. A chapter of fewer than 10 cases has no interval: there is no telling."""
    cases = cases[
        cases["hadm_id"].isin(before["hadm_id"]) & cases["hadm_id"].isin(after["hadm_id"])
    ]
    frames = [outcomes(cases, table).sort_values("hadm_id") for table in (before, after)]
    chapter = frames[0]["gold"].map(icd.chapter)
    present = sorted(set(chapter))
    group = {c: present.index(icd.chapter(c)) for c in set(frames[0]["gold"])}
    draws = [
        _group_f1(frame, group, len(present))[0] for frame in frames
    ]  # both with the same patients drawn
    point, low, high = _band(draws[1] - draws[0], floor=-1.0)
    enough = np.array([(chapter == c).sum() >= 10 for c in present])
    low, high = np.where(enough, low, np.nan), np.where(enough, high, np.nan)
    sure, rows, start = (low > 0) | (high < 0), range(len(present)), [d[0] for d in draws]
    fig, (left, right) = plt.subplots(
        1, 2, figsize=(WIDTH, 1.4 + 0.31 * len(rows)), sharey=True, width_ratios=(3, 2)
    )
    _rows(
        [f"{_chapter(c)} ({(chapter == c).sum()})" for c in present],
        0,
        "Full codes, chapter by chapter (cases)",
        left,
    )
    left.hlines(rows, *start, color="#CFCFCF", lw=3, zorder=1)
    for values, other, name in zip(start, start[::-1], names, strict=True):
        left.plot(values, rows, "o", color=colour(name), ms=7)
        left.text(
            values[0],
            -0.45,
            label(name),
            ha="right" if values[0] < other[0] else "left",
            color=colour(name),
            weight="bold",
            size=10,
        )
    right.axvline(0, color=INK, lw=1)
    right.hlines(rows, low, high, color=np.where(sure, INK, "#9A9A9A"), lw=1.8)
    right.scatter(
        point,
        rows,
        s=34,
        c=np.where(sure, INK, "white"),
        edgecolors=np.where(sure, INK, FAINT),
        zorder=3,
    )
    left.set(ylim=(len(rows) - 0.5, -1.2), xlabel="macro-F1 of its codes (%)")
    right.set(
        xlabel="difference (points)",
        xlim=np.array([-1.1, 1.1]) * max(0.05, np.nanmax(np.abs([point, low, high]))),
    )
    for ax in (left, right):
        _percent(ax.xaxis, "")
        ax.xaxis.set_major_locator(MaxNLocator(4))
        ax.grid(axis="y")
    return fig


@_drawn
def icicle(cases: pd.DataFrame, predictions: pd.DataFrame) -> Figure:
    """Chapter, category, code as bands as tall as their cases. Purple: mostly right at that level, sand: mostly wrong."""
    frame = outcomes(cases, predictions)
    frame = frame.assign(
        chapter=frame["gold"].map(icd.chapter),
        category=frame["gold"].map(icd.category),
        full=frame["gold"],
    )
    frame = frame.sort_values(["chapter", "gold"])
    shades = LinearSegmentedColormap.from_list("right", ["#C98A1B", SAND, "#F4F0F7", MID, DEEP])
    fig, ax = plt.subplots(figsize=(WIDTH, 8))
    for x, level in enumerate(LEVELS):
        top, deep_enough, parent = 0, list(KINDS)[: 3 - x], list(LEVELS)[max(0, x - 1)]
        for node, part in frame.groupby(level, sort=False):
            share, height = part["kind"].isin(deep_enough).mean(), len(part)
            fill = shades(share)
            ax.bar(
                x, height, bottom=top, width=1, align="edge", color=fill, edgecolor="white", lw=0.7
            )
            if height > 0.021 * len(frame):  # tall enough for a line of text
                ink = "white" if np.dot(fill[:3], (0.3, 0.59, 0.11)) < 0.55 else INK
                siblings = frame.loc[frame[parent] == part[parent].iloc[0], level].unique()
                name = _chapter(node) if level == "chapter" else _named(node, 27, siblings)
                for at, text, side in ((0.02, name, "left"), (0.98, f"{100 * share:.0f}", "right")):
                    ax.text(
                        x + at, top + height / 2, text, va="center", ha=side, size=TINY, color=ink
                    )
            top += height
    ax.set(xlim=(0, 3), ylim=(len(frame), 0), yticks=[])
    ax.set_xticks([0.5, 1.5, 2.5], list(LEVELS.values()), weight="bold")
    ax.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    ax.spines[:].set_visible(False)
    bar = fig.colorbar(
        plt.cm.ScalarMappable(cmap=shades), ax=ax, orientation="horizontal", aspect=45, pad=0.01
    )
    bar.set_label("share of cases right at that level")
    _percent(bar.ax.xaxis)
    return fig


@_drawn
def reliability(cases: pd.DataFrame, samples: pd.DataFrame) -> Figure:
    """Agreement of k sampled answers against the accuracy of the answer most agreed on. On the diagonal, agreement can be read as
    a probability. `samples`: predictions with k >= 2 samples per case, else ValueError."""
    from helpers import metrics

    by_case = samples.groupby("hadm_id")["predicted"].agg(list)
    k = int(by_case.map(len).min()) if len(by_case) else 0
    if k < 2:
        raise ValueError(
            "reliability: needs at least 2 samples of each case. Predict with more samples first."
        )
    frame = outcomes(
        cases, pd.DataFrame({"hadm_id": by_case.index, "predicted": metrics.majority_vote(by_case)})
    )
    frame["agreement"] = frame["hadm_id"].map(
        dict(zip(by_case.index, metrics.agreement(by_case), strict=True))
    )
    fig, ax = plt.subplots(figsize=(WIDTH, 4.2))
    ax.plot([0, 1], [0, 1], color=FAINT, lw=1, ls=":")
    points = []
    for x, part in frame.groupby((frame["agreement"] * min(k, 10)).round() / min(k, 10)):
        points.append([x, *_shares(part[["kind"]] == "full", part["subject_id"])[:, 0], len(part)])
        ax.text(
            x,
            0.02,
            f"{len(part)}",
            transform=ax.get_xaxis_transform(),
            ha="center",
            size=9,
            color="#555555",
        )
    x, y, low, high, n = np.array(points, float).T
    ax.vlines(x, low, high, color=MID, lw=2)
    ax.plot(x, y, color=DEEP)
    ax.scatter(x, y, s=30 + 170 * n / n.max(), color=DEEP, zorder=3)
    ax.set(
        xlim=(0, 1.06),
        ylim=(-0.12, 1.06),
        xlabel=f"agreement of {k} sampled answers",
        ylabel="right code",
        title=f"Agreement and accuracy: {100 * np.dot(n, abs(x - y)) / n.sum():.0f} points apart, over {n.sum():,.0f} cases",
    )
    _percent(ax.xaxis)
    _percent(ax.yaxis)
    return fig


@_drawn
def grounded_vs_right(frame: pd.DataFrame) -> Figure:
    """Accuracy where the reasoning is grounded in the note, and where not. frame: model, subject_id, grounded, right."""
    models = list(dict.fromkeys(frame["model"]))
    fig, ax = _rows(
        [label(m) for m in models], 0.72, "Does grounded reasoning go with right answers?"
    )
    for row, model in enumerate(models):
        for y, state in ((row - 0.19, True), (row + 0.19, False)):
            part = frame[(frame["model"] == model) & (frame["grounded"].astype(bool) == state)]
            point, low, high = (
                _shares(part[["right"]], part["subject_id"])[:, 0] if len(part) else (0, 0, 0)
            )
            ax.barh(
                y,
                point,
                color=colour(model) if state else "white",
                ec=colour(model),
                height=0.34,
                hatch=None if state else "////",
            )
            ax.plot([low, high], [y, y], color=INK, lw=1.6)
            share = f"{100 * point:.0f} %, " if len(part) else ""
            ax.text(
                max(high, point) + 0.012,
                y,
                f"{share}{'' if state else 'not '}grounded: {len(part)} cases",
                va="center",
                size=9.5,
            )
    ax.set(xlim=(0, 1.45), xlabel="right code", xticks=[0, 0.25, 0.5, 0.75, 1])
    ax.spines["bottom"].set_bounds(0, 1)
    _percent(ax.xaxis)
    return fig


# ------------------------------------------------------------------------------------------ the study
@_drawn
def study_arms(
    contrasts: Mapping[str, Mapping[str, Mapping[str, Any]]],
    names: Mapping[str, str] | None = None,
    *,
    margin: float = -0.02,
    reach: float = 0.15,
) -> Figure:
    """Forest plot of `study.contrast`: macro-F1 of each arm minus SFT at each level, 95 % interval, a small dot for each seed.

    Filled where the interval excludes 0. Shaded at chapter and category: a loss of more than the margin; an interval that keeps
    out of it shows that there is none. A difference beyond ±`reach` is an arrow at the edge.
    """
    arms, edge = list(contrasts), np.array([0.015, -0.015])
    ends = [
        x
        for levels in contrasts.values()
        for c in levels.values()
        for x in (*c["ci"], *c["per_seed"])
        if abs(x) <= reach
    ]
    span = np.array([min([*ends, 2 * margin]), max([*ends, -margin])]) - edge
    fig, axes = plt.subplots(
        1, 3, figsize=(WIDTH, 1.3 + 0.48 * len(arms)), sharey=True, sharex=True
    )
    for ax, (level, title) in zip(axes, LEVELS.items(), strict=True):
        for row, arm in enumerate(arms):
            (low, high), point, seeds = (
                contrasts[arm][level][key] for key in ("ci", "f1_gold", "per_seed")
            )
            x, sure, shade = np.clip(point, *(span + edge)), low > 0 or high < 0, colour(arm)
            ax.plot([low, high], [row, row], color=INK, lw=1.6, zorder=3)
            ax.plot(
                x,
                row,
                "o" if x == point else "<" if point < 0 else ">",
                color=shade,
                mfc=shade if sure else "white",
                ms=8,
                mew=1.8,
                zorder=4,
            )
            ax.plot(
                seeds,
                np.full(len(seeds), row + 0.26),
                "o",
                color=shade,
                ms=3.5,
                alpha=0.7,
                mew=0,
                zorder=4,
            )
            ax.text(
                x,
                row - 0.32,
                f"{100 * point:+.1f}".replace("-", "−"),
                ha="center",
                va="center",
                size=9,
                zorder=2,
                weight="bold" if sure else "normal",
                bbox={"fc": "white", "ec": "none", "pad": 0.4},
            )
        ax.axvline(0, color=INK, lw=1, zorder=1)
        if level != "full":
            ax.axvspan(span[0], margin, color=SAND, alpha=0.3, lw=0, zorder=0)
            ax.text(margin, len(arms) - 0.42, "loss ", ha="right", va="bottom", size=9)
        ax.set(
            title=title,
            xlim=span,
            xlabel="macro-F1 minus that of SFT (points)" if level == "category" else None,
        )
        ax.xaxis.set_major_locator(MaxNLocator(4))
        _percent(ax.xaxis, "")
        ax.spines["left"].set_visible(False)
    axes[0].set_yticks(
        range(len(arms)), [textwrap.fill((names or {}).get(arm, label(arm)), 20) for arm in arms]
    )
    axes[0].set_ylim(len(arms) - 0.35, -0.65)
    return fig


@_drawn
def study_curves(
    logs: Mapping[str, Sequence[pd.DataFrame]], names: Mapping[str, str] | None = None
) -> Figure:
    """Training logs of GRPO arms, arm -> one log per seed. Thin: each seed, the mean of 5 steps; thick: their mean, as far as all
    seeds went. Rewards of different arms are on different scales: compare their shapes.

    Second panel: the share of groups without spread, else the spread of the batch (see `grpo_panel`); third: held-out reward, if
    logged. Raises ValueError where no log has step and reward.
    """
    panels = {
        "reward": "Mean reward of the batch",
        "frac_reward_zero_std": "Share of groups without spread: nothing to learn",
        "reward_std": "Spread of the rewards in the batch",
        "eval_reward": "Reward on held-out prompts",
    }
    shown = [
        c for c in panels if any({"step", c} <= set(log) for each in logs.values() for log in each)
    ]
    if "reward" not in shown:
        raise ValueError(
            "study_curves: no log has the columns step and reward. Read the log-<arm>-<seed>.csv of GRPO arms."
        )
    shown = [c for c in shown if c != "reward_std" or "frac_reward_zero_std" not in shown]
    words = {arm: textwrap.fill((names or {}).get(arm, label(arm)), 18) for arm in logs}
    tall = max(1.6, 0.19 * sum(1 + text.count("\n") for text in words.values()))
    fig, axes = plt.subplots(
        len(shown), 1, figsize=(WIDTH, 0.5 + (tall + 0.45) * len(shown)), sharex=True, squeeze=False
    )
    for ax, column in zip(axes[:, 0], shown, strict=True):
        ends = []
        for arm, each in logs.items():
            shade = colour(arm)
            own = [
                log.dropna(subset=[column]).drop_duplicates("step").set_index("step")[column]
                for log in each
                if column in log
            ]
            own = [
                line.rolling(1 if column == "eval_reward" else min(5, len(line))).mean().dropna()
                for line in own
                if len(line)
            ]
            for line in own:
                ax.plot(line.index, line, color=shade, lw=0.8, alpha=0.45)
            mean = pd.concat(own, axis=1).dropna().mean(axis=1) if own else []
            if len(mean):
                ax.plot(mean.index, mean, color=shade, lw=2.6)
                ends.append((float(mean.iloc[-1]), words[arm], shade))
        ax.set(title=panels[column], xlabel="step" if column == shown[-1] else None)
        ax.yaxis.set_major_locator(MaxNLocator(4))
        if column == "frac_reward_zero_std":
            _percent(ax.yaxis)
        ax.grid(axis="y")
        _end_labels(ax, ends, 0.19 / tall)
    return fig
