"""The pictures draw what the tables say, legibly, in one set of names and colours; a small or empty table breaks none."""

from __future__ import annotations

import itertools
import re
import subprocess
import sys
import warnings
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
import seaborn as sns
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

matplotlib.use("Agg")

from helpers import icd, metrics, plots, prompts
from tests import notebook_code

CODES = (
    "A419",
    "A4151",
    "B349",
    "C50911",
    "C3490",
    "D649",
    "D62",
    "E1165",
    "E871",
    "F329",
    "F1020",
    "G459",
    "G40909",
    "H6500",
    "H540",
    "I2101",
    "I2102",
    "I214",
    "I5021",
    "I509",
    "I4891",
    "J189",
    "J440",
    "J441",
    "K5660",
    "K8050",
    "K922",
    "L03115",
    "M5450",
    "N179",
    "N390",
    "O0993",
    "P0739",
    "Q211",
    "R079",
    "R55",
    "S72001A",
    "S72002A",
    "T391X1A",
    "V892XXA",
    "Z5111",
    "Z471",
    "U071",
)
FIGURE_TEXT_AT_HALF_WIDTH = 8.0  # pixels, in a picture 500 pixels wide
BOOT = {"n_boot": 20}  # enough for a picture
SCOPE = {"np": np, "pd": pd, "re": re, "sns": sns, "resampling": BOOT}
SCOPE |= {"icd": icd, "metrics": metrics, "plots": plots, "prompts": prompts}


def of_notebook(number: str, name: str):
    """A function of a notebook that draws, in the style that the notebook sets."""
    return plots.styled(notebook_code.function(number, name, **SCOPE))


long_tail = of_notebook("01", "long_tail")
rollout_group = of_notebook("04", "rollout_group")
confused_pairs = of_notebook("06", "confused_pairs")
pairs_figure = of_notebook("06", "pairs_figure")
score_figure = of_notebook("06", "score_figure")
how_far_up = of_notebook("06", "how_far_up")
tree_figure = of_notebook("06", "tree_figure")
chapters_figure = of_notebook("06", "chapters_figure")
agreement_figure = of_notebook("06", "agreement_figure")
mean_by = of_notebook("06", "mean_by")
confusion_figure = of_notebook("06", "confusion_figure")


def cases_of(n: int = 700, seed: int = 0, codes: tuple[str, ...] = CODES) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    weight = 1 / np.arange(1, len(codes) + 1)
    code = rng.choice(rng.permutation(codes), n, p=weight / weight.sum())
    subject = rng.integers(0, max(2, n * 2 // 3), n)
    split = np.select([subject % 5 == 0, subject % 5 == 1], ["val", "train"], "test")
    return pd.DataFrame(
        {
            "subject_id": subject,
            "hadm_id": 20_000_000 + np.arange(n),
            "code": code,
            "split": split,
        }
    )


def outcomes_of(
    cases: pd.DataFrame, right: float, unusable: float = 0.0, seed: int = 1
) -> pd.DataFrame:
    rng = np.random.default_rng(seed)
    test = cases[cases["split"] == "test"]
    chance = rng.random(len(test))
    others = rng.choice(CODES, len(test))
    answers = np.where(chance < right, test["code"], others).astype(object)
    answers[chance > 1 - unusable] = None
    return metrics.outcomes(test, test.assign(predicted=answers))


@pytest.fixture(scope="module")
def cases() -> pd.DataFrame:
    return cases_of()


@pytest.fixture(scope="module")
def tables(cases: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Outcomes of each model."""
    return {
        "base": outcomes_of(cases, 0, 1),
        "tfidf": outcomes_of(cases, 0.6, 0, 3),
        "sft": outcomes_of(cases, 0.5, 0.03),
        "grpo": outcomes_of(cases, 0.7, 0.01, 2),
    }


def grpo_log(steps: int = 40) -> pd.DataFrame:
    rng, rows = np.random.default_rng(0), []
    for step in range(1, steps + 1):
        rows.append(
            {
                "step": step,
                "loss": rng.normal(),
                "reward": 0.5 + step / 100,
                "reward_std": 0.3,
                "frac_reward_zero_std": 0.2,
                "completions/mean_length": 40.0,
                "rewards/format_reward/mean": 0.99,
                "rewards/hierarchical_reward/mean": 0.4,
            }
        )
        if step % 10 == 0:
            rows.append({"step": step, "eval_reward": 0.5 + step / 200})
    return pd.DataFrame(rows)


def sft_log() -> pd.DataFrame:
    steps = np.arange(5, 205, 5)
    log = pd.DataFrame(
        {
            "step": steps,
            "loss": 3 * np.exp(-steps / 50),
            "mean_token_accuracy": 1 - np.exp(-steps / 50),
        }
    )
    return pd.concat(
        [
            log,
            pd.DataFrame(
                {
                    "step": [100, 200],
                    "eval_loss": [0.7, 0.5],
                    "eval_mean_token_accuracy": [0.8, 0.9],
                }
            ),
        ]
    )


CEILING = {level: {"accuracy": 0.9, "f1_gold": 0.85} for level in plots.LEVELS}


def scores_of(tables: dict[str, pd.DataFrame]) -> dict:
    return {
        model: metrics.report(table["gold"], table["predicted"], **BOOT)
        for model, table in tables.items()
    }


def crossed(table: pd.DataFrame, level: str, chapter: int = 0) -> pd.DataFrame:
    if chapter:
        table = table[table["gold"].map(icd.chapter) == chapter]
    up = metrics.LEVELS[level]
    predicted = [up(code) or "–" for code in table["predicted"]]
    return pd.crosstab(table["gold"].map(up), pd.Series(predicted, table.index, dtype=object))


def rollouts(same: bool = False) -> Figure:
    completions = [
        f"<think>\n{'crushing chest pain radiating to the arm; ' * 4}$x_1$ 中文 </think>\n<diagnosis>{c}</diagnosis>"
        for c in ("I21.01", "I21.02", "J18.9", "I21.01", "I50.9", "K92.2", "I21.4")
    ]
    rewards = {
        "format_reward": [1] * 7 + [0],
        "hierarchical_reward": [1, 0.4, 0, 1, 0.15, 0, 0.4, -0.5],
    }
    advantages = np.zeros(8) if same else np.linspace(-1.2, 1.7, 8)
    return rollout_group([*completions, "no tags $\\frac$"], rewards, advantages, "I2101")


def curve_of(*agreement: float) -> pd.DataFrame:
    rng = np.random.default_rng(0)
    share = rng.choice(agreement, 200)
    table = pd.DataFrame({"subject_id": range(200), "agreement": share})
    table["right"] = rng.random(200) < share
    return mean_by(table, ["agreement"], "right")


FIGURES = {
    "long_tail": lambda c, t: long_tail(c),
    "training_curve": lambda c, t: plots.training_curve(sft_log()),
    "grpo_panel": lambda c, t: plots.grpo_panel(grpo_log()),
    "grpo_panel, two steps": lambda c, t: plots.grpo_panel(grpo_log(2)),
    "compared_curves": lambda c, t: plots.compared_curves(
        {"baseline": grpo_log(), "bolder": grpo_log(20).assign(reward=0.6)}, "reward"
    ),
    "rollout_group": lambda c, t: rollouts(),
    "rollout_group, all alike": lambda c, t: rollouts(same=True),
    "score_figure": lambda c, t: score_figure(scores_of(t), CEILING),
    "score_figure, no ceiling": lambda c, t: score_figure(scores_of(t)),
    "tree_figure": lambda c, t: tree_figure(how_far_up(t)),
    "confusion, chapters": lambda c, t: confusion_figure(crossed(t["sft"], "chapter"), "Chapters"),
    "confusion, categories": lambda c, t: confusion_figure(
        crossed(t["sft"], "category", 9), "Circulatory", 5
    ),
    "confusion, nothing usable": lambda c, t: confusion_figure(
        crossed(t["base"], "chapter"), "Chapters"
    ),
    "pairs_figure": lambda c, t: pairs_figure(confused_pairs(t["sft"])),
    "pairs_figure, none": lambda c, t: pairs_figure(confused_pairs(t["base"])),
    "chapters_figure": lambda c, t: chapters_figure(
        metrics.chapter_differences(t["sft"], t["grpo"], **BOOT)
    ),
    "chapters_figure, nothing usable": lambda c, t: chapters_figure(
        metrics.chapter_differences(t["base"], t["base"], **BOOT)
    ),
    "agreement_figure": lambda c, t: agreement_figure(curve_of(0.2, 0.4, 0.6, 0.8, 1)),
}


def texts_of(fig: Figure) -> list[str]:
    return [t.get_text() for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip()]


def drawn_texts(fig: Figure) -> list[Text]:
    """The texts a reader sees; ticks outside the limits of their axes exist, but are not drawn."""
    ticks, inside = set(), set()
    for axis in itertools.chain.from_iterable((ax.xaxis, ax.yaxis) for ax in fig.axes):
        inside |= {text for tick in axis._update_ticks() for text in (tick.label1, tick.label2)}
        every = (*axis.majorTicks, *axis.minorTicks)
        ticks |= {text for tick in every for text in (tick.label1, tick.label2)}
    return [
        text
        for text in fig.findobj(Text)
        if text.get_visible() and text.get_text().strip() and text not in ticks - inside
    ]


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_legible_at_half_width_and_stays_inside(name, cases, tables):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a glyph missing, a layout that does not fit
        fig = FIGURES[name](cases, tables)
        fig.draw_without_rendering()
    canvas, shown = fig.bbox, drawn_texts(fig)
    boxes = {text: text.get_window_extent() for text in shown}
    for text, box in boxes.items():
        size = text.get_fontsize() / 72 * 500 / fig.get_figwidth()
        assert size >= FIGURE_TEXT_AT_HALF_WIDTH, f"{text.get_text()!r} is too small"
        inside = canvas.x0 - 2 <= box.x0 and box.x1 <= canvas.x1 + 2
        inside &= canvas.y0 - 2 <= box.y0 and box.y1 <= canvas.y1 + 2
        assert inside, f"{text.get_text()!r} runs out of the picture"
    for ax in fig.axes:
        labels = [boxes[text] for text in ax.get_yticklabels() if text in boxes]
        for lower, upper in itertools.pairwise(sorted(labels, key=lambda box: box.y0)):
            assert upper.y0 >= lower.y1 - 1.5, f"y labels overlap in {name}"
        headings = [text for text in (fig._suptitle, *fig.legends) if text]
        for one, other in itertools.combinations(headings, 2):
            assert not one.get_window_extent().overlaps(other.get_window_extent())


def test_end_labels_do_not_cover_one_another():
    log = grpo_log().assign(**{f"rewards/r{i}_reward/mean": 0.4 + i / 1000 for i in range(4)})
    fig = plots.grpo_panel(log)
    fig.draw_without_rendering()
    boxes = sorted((t.get_window_extent().y0, t.get_window_extent().y1) for t in fig.axes[0].texts)
    assert len(boxes) == 7
    assert all(upper[0] >= lower[1] - 1 for lower, upper in itertools.pairwise(boxes))


# ---- a figure is shown once, and leaves the reader's settings alone -----------------------------------------------


def test_a_figure_is_unknown_to_pyplot_and_leaves_the_settings_alone(cases):
    import matplotlib.pyplot as plt

    numbers, settings = plt.get_fignums(), dict(matplotlib.rcParams)
    plots.training_curve(sft_log())
    long_tail(cases)
    assert plt.get_fignums() == numbers, "pyplot would show the figure a second time"
    assert dict(matplotlib.rcParams) == settings
    with matplotlib.rc_context():
        plots.style()
        assert matplotlib.rcParams["font.size"] >= 11 and not matplotlib.rcParams["axes.spines.top"]


def test_a_notebook_shows_a_figure_that_pyplot_does_not_know():
    code = """
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
from helpers import plots
plots.style()
figure, ax = plots.figure(2)
shown, _ = shell.display_formatter.format(figure)
assert "image/png" in shown, list(shown)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- one table of names and colours -------------------------------------------------------------------------------


def _seen(colour: str, matrix: np.ndarray) -> np.ndarray:
    linear = np.array(
        [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(colour)]
    )
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    x, y, z = to_xyz @ np.clip(matrix @ linear, 0, 1)
    f = [v ** (1 / 3) if v > 0.008856 else 7.787 * v + 16 / 116 for v in (x / 0.9505, y, z / 1.089)]
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])  # CIE L*a*b*


VISION = {  # Machado et al. 2009, severity 1, for linear RGB
    "normal": np.eye(3),
    "protanopia": np.array(
        [
            [0.152286, 1.052583, -0.204868],
            [0.114503, 0.786281, 0.099216],
            [-0.003882, -0.048116, 1.051998],
        ]
    ),
    "deuteranopia": np.array(
        [
            [0.367322, 0.860646, -0.227968],
            [0.280085, 0.672501, 0.047413],
            [-0.011820, 0.042940, 0.968881],
        ]
    ),
    "tritanopia": np.array(
        [
            [1.255528, -0.076749, -0.178779],
            [-0.078411, 0.930809, 0.147602],
            [0.004733, 0.691367, 0.303900],
        ]
    ),
}


@pytest.mark.parametrize("vision", VISION)
@pytest.mark.parametrize("names", [plots.MODELS, plots.KINDS], ids=["models", "kinds"])
def test_colours_are_told_apart_with_any_colour_vision(names, vision):
    for (a, one), (b, other) in itertools.combinations(names.items(), 2):
        apart = _seen(one.colour, VISION[vision]) - _seen(other.colour, VISION[vision])
        least = 18 if names is plots.MODELS else 11
        assert np.linalg.norm(apart) > least, f"{a} and {b} look alike with {vision}"


@pytest.mark.parametrize("model", ["tfidf", "base", "sft", "grpo", "ideal"])
def test_the_colours_that_labels_are_written_in_stand_out_from_white(model):
    lightness = _seen(plots.MODELS[model].colour, VISION["normal"])[0]
    luminance = ((lightness + 16) / 116) ** 3 if lightness > 8 else lightness / 903.3
    assert 1.05 / (luminance + 0.05) >= 3, (
        "WCAG 2.1 asks for 3:1 of large or bold text and of graphical objects"
    )


def test_one_colour_for_a_model_and_its_variants_and_one_of_its_own_for_an_arm():
    variants = ("sft", "sft_constrained", "sft+x", "sft-unquantised")
    assert {plots.colour(name) for name in variants} == {plots.MODELS["sft"].colour}
    assert plots.colour("grpo-constrained") == plots.colour("grpo")
    core = {plots.colour(arm) for arm in ("sft", "grpo", "grpo-strict", "sft-own", "sft-codes")}
    assert len(core) == 5
    assert plots.colour("something") not in {name.colour for name in plots.MODELS.values()}
    assert plots.label("sft") == "SFT" and plots.label("sft_constrained") == "sft constrained"
    assert plots.long_label("base") == "base, not adapted" and plots.long_label("mine") == "mine"


def test_errors_never_wear_the_colour_of_right(tables):
    """In the matrix a right answer is purple (more blue than red), any other one sand."""
    counts = crossed(tables["sft"], "chapter")
    fig = confusion_figure(counts, "Chapters")
    fig.draw_without_rendering()
    cells = fig.axes[0].collections[0].get_facecolors().reshape(len(counts), -1, 4)
    right = np.eye(*cells.shape[:2], dtype=bool)
    drawn = {
        (int(t.get_position()[1]), int(t.get_position()[0]))
        for t in fig.axes[0].texts
        if t.get_text()
    }
    assert len(drawn) == (counts > 0).to_numpy().sum(), "a number in each cell with cases"
    for row, column in drawn:
        red, _, blue, _ = cells[row, column]
        assert (blue > red) == right[row, column], (row, column)


def test_the_matrix_holds_every_case_once(tables):
    counts = crossed(tables["sft"], "category", 9)
    fig = confusion_figure(counts, "Circulatory", top=3)
    numbers = [int(t.get_text()) for t in fig.axes[0].texts if t.get_text()]
    ticks = [t.get_text() for t in fig.axes[0].get_xticklabels()]
    biggest = counts.sum(axis=1).nlargest(3)
    assert sum(numbers) == biggest.sum() and ticks == [*sorted(biggest.index), "other", "–"]


# ---- what is printed ----------------------------------------------------------------------------------------------


def test_bars_of_scores_print_score_ceiling_and_number_of_classes(tables):
    scores = scores_of(tables)
    fig = score_figure({**scores, "ideal": scores["tfidf"]}, CEILING)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == [
        "Base",
        "TF-IDF + LR",
        "SFT",
        "GRPO",
    ], "the ideal reader is the line"
    for ax, level in zip(fig.axes, plots.LEVELS, strict=True):
        assert f"{scores['sft'][level]['n_classes']} classes" in ax.get_title(loc="left")
        printed = {text.get_text() for text in ax.texts}
        assert printed == {f"{100 * entry[level]['f1_gold']:.0f}" for entry in scores.values()}
        assert [line.get_linestyle() for line in ax.lines] == ["--"]
    assert not any(ax.lines for ax in score_figure(scores).axes)


def test_names_of_siblings_begin_with_their_codes():
    pairs = pd.DataFrame([["I63511", "I63512", 5, 9, 2.0, 8.0]])
    pairs.columns = ["gold", "predicted", "cases", "of", "low", "high"]
    count, names = (text.get_text() for text in pairs_figure(pairs).axes[0].texts)
    truth, answer = names.split("\n→ ")
    assert count == "5 of 9"
    assert truth.startswith("I63.511 Cerebral") and answer.startswith("I63.512 Cerebral")
    assert "right" in truth and "left" in answer, "what tells them apart is not cut off"
    assert max(len(truth), len(answer)) <= 90


def test_a_difference_is_filled_where_its_interval_excludes_zero_and_few_cases_have_none():
    rows = [[1, 20, 0.1, 0.3], [2, 30, -0.2, 0.3], [3, 5, np.nan, np.nan]]
    table = pd.DataFrame(rows, columns=["chapter", "cases", "low", "high"])
    fig = chapters_figure(table.assign(difference=[0.2, 0.05, 0.1]))
    names = [label.get_text() for label in fig.axes[0].get_yticklabels()]
    assert [name.split()[0] for name in names] == ["1", "2"] and names[0].endswith("(20)")
    fills = fig.axes[0].collections[-1].get_facecolors()
    assert [to_rgb(fill) for fill in fills] == [to_rgb(plots.INK), to_rgb("white")]


def test_the_figure_of_agreement_prints_the_expected_calibration_error():
    table = pd.DataFrame({"subject_id": range(5), "agreement": [0.5, 0.5, 1, 1, 1]})
    curve = mean_by(table.assign(right=[1, 0, 1, 1, 0]), ["agreement"], "right")
    title = agreement_figure(curve).axes[0].get_title(loc="left")
    assert "20 points apart, over 5 cases" in title  # (2 · 0 + 3 · 1/3) / 5


def test_a_single_code_and_a_single_case_are_drawn():
    cases = pd.DataFrame({"subject_id": [1, 2], "hadm_id": [1, 2], "code": "I10"})
    cases["split"] = ["train", "test"]
    outcomes = metrics.outcomes(cases[1:], pd.DataFrame({"hadm_id": [2], "predicted": ["I10"]}))
    tables = {"sft": outcomes}
    figures = [
        long_tail(cases),
        tree_figure(how_far_up(tables)),
        confusion_figure(crossed(outcomes, "chapter"), ""),
        pairs_figure(confused_pairs(outcomes)),
        chapters_figure(metrics.chapter_differences(outcomes, outcomes)),
        score_figure({"sft": metrics.report(["I10"], ["I10"])}),
    ]
    for fig in figures:
        fig.draw_without_rendering()


# ---- training -----------------------------------------------------------------------------------------------------


def test_training_curve_names_its_panels_and_says_what_the_log_needs():
    fig = plots.training_curve(sft_log())
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["Loss", "Token accuracy"]
    assert {t.get_text() for t in fig.axes[0].texts} == {"held\nout", "train"}
    with pytest.raises(ValueError, match="the log needs step"):
        plots.training_curve(pd.DataFrame({"a": [1]}))
    log = pd.DataFrame({"step": [1, 2, 3], "loss": [4.0, 1.0, 0.2]})
    log["mean_token_accuracy"] = [0.5, 0.6, 0.9]
    assert [ax.get_yscale() for ax in plots.training_curve(log).axes] == ["log", "linear"]
    assert plots.training_curve(log.assign(loss=log["loss"] + 1)).axes[0].get_yscale() == "linear"


def test_grpo_panel_names_components_and_shows_flat_groups_alone():
    fig = plots.grpo_panel(grpo_log())
    assert {t.get_text() for t in fig.axes[0].texts} == {"hierarchical", "total", "format"}
    flat = grpo_log()["frac_reward_zero_std"].dropna()
    drawn = np.concatenate([line.get_ydata() for line in fig.axes[2].lines])
    shown = drawn[~np.isnan(drawn)]
    assert {*shown.round(6)} == {*flat.round(6)}, "not the spread of the whole batch"
    used = {line.get_color() for ax in fig.axes for line in ax.lines} - {plots.colour("grpo")}
    assert not used & {name.colour for name in plots.MODELS.values()}, "blue is SFT, everywhere"
    assert "nothing logged" in texts_of(plots.grpo_panel(grpo_log(5)))
    with pytest.raises(ValueError, match="column step"):
        plots.grpo_panel(pd.DataFrame({"reward": [1.0]}))


def test_rollout_group_sorts_by_advantage():
    answers = [
        f"because\n</think>\n<diagnosis>{c}</diagnosis>" for c in ("J18.9", "I21.01", "I21.02")
    ]
    rewards = {"format_reward": [1, 1, 1], "hierarchical_reward": [0.0, 1.0, 0.4]}
    fig = rollout_group(answers, rewards, [-1.0, 1.2, -0.2], "I2101")
    codes = [text for text in texts_of(fig) if text.startswith("→")]
    assert codes == ["→ I21.01", "→ I21.02", "→ J18.9"]
    assert "format 1.00, hierarchical 0.40" in texts_of(fig)
    flat = rollout_group(answers, {"r": [1, 1, 1]}, [0, 0, 0], "I2101")
    assert any("nothing to learn" in text for text in texts_of(flat))
    with pytest.raises(ValueError, match="same length"):
        rollout_group(answers, {"r": [1, 2]}, [0, 0, 0], "I2101")


def test_live_plot_collects_headless_and_answers_every_event_of_the_trainer():
    from transformers.trainer_callback import (
        CallbackHandler,
        TrainerCallback,
        TrainerControl,
        TrainerState,
    )

    live = plots.live_plot(every=2)
    assert isinstance(live, TrainerCallback)
    handler = CallbackHandler([live], None, None, None, None)
    state, control = TrainerState(global_step=3), TrainerControl()
    state.log_history = [{"step": 2, "loss": 2.0}]
    handler.on_train_begin(None, state, control)
    handler.on_log(None, state, control, {"loss": 1.0})
    assert live.rows == [{"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}], (
        "also of a training that goes on"
    )


def _in_notebook(monkeypatch) -> list:
    import IPython

    shown: list = []
    handle = SimpleNamespace(update=lambda fig: shown.append(("update", fig)))

    def display(fig, display_id):
        shown.append(("display", fig))
        return handle

    monkeypatch.setattr(IPython, "get_ipython", lambda: object())
    monkeypatch.setattr(IPython.display, "display", display)
    return shown


def _log(live, step: int, main: bool = True, **values: float) -> SimpleNamespace:
    state = SimpleNamespace(global_step=step, is_world_process_zero=main)
    live.on_log(None, state, None, values)
    return state


def test_live_plot_redraws_one_figure_every_k_logs_and_is_gone_at_the_end(monkeypatch):
    shown, live = _in_notebook(monkeypatch), plots.live_plot(every=3)
    for step in range(1, 8):
        state = _log(live, step, reward=0.1 * step)
    assert [kind for kind, _ in shown] == ["display", "update"]
    assert all(len(figure.axes) == 4 for _, figure in shown)
    live.on_train_end(None, state, None)
    assert len(shown) == 3 and "over" in shown[-1][1].data, "the saved log's figure comes below"
    short = plots.live_plot(every=9)
    short.on_train_end(None, _log(short, 1, loss=1.0), None)
    _log(plots.live_plot(every=1), 1, main=False, loss=1.0)
    assert len(shown) == 3, "only the main process draws, and only what it has logged"


def test_live_plot_never_stops_a_training(monkeypatch):
    def broken(log: pd.DataFrame) -> Figure:
        raise RuntimeError("no picture today")

    shown, live = _in_notebook(monkeypatch), plots.live_plot(every=1)
    monkeypatch.setattr(plots, "training_curve", broken)
    with pytest.warns(UserWarning, match="no picture today"):
        _log(live, 1, loss=1.0)
    assert not shown and len(live.rows) == 1


def test_names_are_those_of_metrics_and_models_stand_in_one_order():
    assert list(plots.LEVELS) == list(metrics.LEVELS) and list(plots.KINDS) == metrics.KINDS
    assert list(plots.MODELS) == ["majority", "tfidf", "base", "sft", "grpo", "ideal"]
    assert all(name.long and name.label for name in plots.MODELS.values())
