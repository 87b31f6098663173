"""The pictures say what the tables say, in the right order, legibly, and a hostile or empty table breaks none of them."""

from __future__ import annotations

import io
import itertools
import warnings
from types import SimpleNamespace

import matplotlib
import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.text import Text

matplotlib.use("Agg")

from helpers import icd, metrics, plots

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


def cases_of(n: int = 1200, seed: int = 0, codes: tuple[str, ...] = CODES) -> pd.DataFrame:
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
            "category": [icd.category(c) for c in code],
            "chapter": [icd.chapter(c) for c in code],
        }
    )


def predictions_of(
    cases: pd.DataFrame, right: float, unusable: float = 0.0, seed: int = 1, samples: int = 1
) -> pd.DataFrame:
    rng, test = np.random.default_rng(seed), cases[cases["split"] == "test"]
    rows = []
    for case, sample in itertools.product(test.itertuples(), range(samples)):
        u, other = rng.random(), str(rng.choice(CODES))
        rows.append(
            (
                case.subject_id,
                case.hadm_id,
                sample,
                case.code if u < right else None if u > 1 - unusable else other,
            )
        )
    return pd.DataFrame(rows, columns=["subject_id", "hadm_id", "sample", "predicted"])


@pytest.fixture(scope="module")
def cases() -> pd.DataFrame:
    return cases_of()


@pytest.fixture(scope="module")
def tables(cases: pd.DataFrame) -> dict[str, pd.DataFrame]:
    return {
        "base": predictions_of(cases, 0, 1),
        "tfidf": predictions_of(cases, 0.6, 0, 3),
        "sft": predictions_of(cases, 0.5, 0.03),
        "grpo": predictions_of(cases, 0.7, 0.01, 2),
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


def metrics_of(cases: pd.DataFrame, tables: dict[str, pd.DataFrame]) -> dict:
    models = {}
    for name, table in tables.items():
        frame = plots.outcomes(cases, table)
        models[name] = metrics.report(
            frame["gold"].tolist(), frame["predicted"].tolist(), n_boot=50
        )
    return {
        "models": models,
        "ceiling": {level: {"accuracy": 0.9, "f1_gold": 0.85} for level in plots.LEVELS},
    }


def rollouts() -> Figure:
    completions = [
        f"<think>\n{'crushing chest pain radiating to the arm; ' * 4}$x_1$ 中文 </think>\n<diagnosis>{c}</diagnosis>"
        for c in ("I21.01", "I21.02", "J18.9", "I21.01", "I50.9", "K92.2", "I21.4")
    ]
    rewards = {
        "format_reward": [1] * 7 + [0],
        "hierarchical_reward": [1, 0.4, 0, 1, 0.15, 0, 0.4, -0.5],
    }
    return plots.rollout_group(
        [*completions, [{"role": "assistant", "content": "no tags $\\frac$"}]],
        rewards,
        gold="I2101",
    )


def contrasts_of(**differences: float) -> dict[str, dict[str, dict]]:
    rng = np.random.default_rng(0)
    return {
        arm.replace("_", "-"): {
            level: {
                "f1_gold": d,
                "ci": [d - 0.01, d + 0.01],
                "p": 0.5,
                "seeds": 5,
                "per_seed": rng.normal(d, 0.01, 5).tolist(),
            }
            for level in plots.LEVELS
        }
        for arm, d in differences.items()
    }


ARMS = {
    "grpo": "GRPO, hierarchical reward",
    "grpo-strict": "GRPO, exact code alone",
    "sft-own": "SFT on its own right answers",
    "grpo-zero": "GRPO without SFT",
    "grpo-grounded": "GRPO, hierarchical and grounding rewards",
    "grpo-prefix": "GRPO, prefix",
}
STUDY = contrasts_of(grpo=0.04, grpo_strict=0.004, sft_own=-0.03, grpo_zero=-0.5)

FIGURES = {
    "code_frequencies": lambda c, t: plots.code_frequencies(c),
    "chapters": lambda c, t: plots.chapters(c),
    "note_lengths": lambda c, t: plots.note_lengths(np.arange(50, 300), 256),
    "note_lengths, all alike, no limit": lambda c, t: plots.note_lengths([7] * 20),
    "funnel": lambda c, t: plots.funnel(
        {"discharge summaries": 6000, "with an ICD-10-CM principal diagnosis": 5000, "x": 0}
    ),
    "training_curve": lambda c, t: plots.training_curve(sft_log()),
    "grpo_panel": lambda c, t: plots.grpo_panel(grpo_log()),
    "grpo_panel, two steps": lambda c, t: plots.grpo_panel(grpo_log(2)),
    "rollout_group": lambda c, t: rollouts(),
    "score_bars": lambda c, t: plots.score_bars(metrics_of(c, t)),
    "score_bars, no ceiling": lambda c, t: plots.score_bars(
        {**metrics_of(c, t), "ceiling": None}, "accuracy"
    ),
    "how_far_up_the_tree": lambda c, t: plots.how_far_up_the_tree(c, t),
    "chapter_confusion": lambda c, t: plots.chapter_confusion(c, t["sft"]),
    "chapter_confusion, nothing usable": lambda c, t: plots.chapter_confusion(c, t["base"]),
    "category_confusion": lambda c, t: plots.category_confusion(c, t["sft"]),
    "most_confused_pairs": lambda c, t: plots.most_confused_pairs(c, t["sft"]),
    "most_confused_pairs, nothing usable": lambda c, t: plots.most_confused_pairs(c, t["base"]),
    "f1_against_frequency": lambda c, t: plots.f1_against_frequency(c, t),
    "head_middle_tail": lambda c, t: plots.head_middle_tail(c, t),
    "dumbbells": lambda c, t: plots.dumbbells(c, t["sft"], t["grpo"]),
    "dumbbells, nothing usable": lambda c, t: plots.dumbbells(c, t["base"], t["base"]),
    "icicle": lambda c, t: plots.icicle(c, t["sft"]),
    "reliability": lambda c, t: plots.reliability(
        c, predictions_of(c.iloc[:300], 0.5, 0.05, 7, samples=5)
    ),
    "grounded_vs_right": lambda c, t: plots.grounded_vs_right(
        pd.DataFrame(
            {
                "model": ["sft", "sft", "grpo", "grpo"],
                "subject_id": [1, 2, 1, 2],
                "grounded": [1, 0, 1, 1],
                "right": [1, 0, 1, 0],
            }
        )
    ),
    "study_arms": lambda c, t: plots.study_arms(STUDY, ARMS),
    "study_arms, one": lambda c, t: plots.study_arms({"grpo": STUDY["grpo"]}),
    "study_curves": lambda c, t: plots.study_curves(
        {arm: [grpo_log(), grpo_log()] for arm in list(ARMS)[:2]}, ARMS
    ),
    "study_curves, six arms alike": lambda c, t: plots.study_curves(
        dict.fromkeys(ARMS, [grpo_log(20)]), ARMS
    ),
}


def texts_of(fig: Figure) -> list[str]:
    return [t.get_text() for t in fig.findobj(Text) if t.get_visible() and t.get_text().strip()]


def drawn_texts(fig: Figure) -> list[Text]:
    """The texts a reader sees; ticks outside the limits of their axes exist, but are not drawn."""
    inside = set()
    for ax in fig.axes:
        for axis in (ax.xaxis, ax.yaxis):
            inside |= {
                label for tick in axis._update_ticks() for label in (tick.label1, tick.label2)
            }
    ticks = {
        label
        for ax in fig.axes
        for axis in (ax.xaxis, ax.yaxis)
        for tick in (*axis.majorTicks, *axis.minorTicks)
        for label in (tick.label1, tick.label2)
    }
    return [
        t
        for t in fig.findobj(Text)
        if t.get_visible() and t.get_text().strip() and (t not in ticks or t in inside)
    ]


@pytest.mark.parametrize("name", FIGURES)
def test_figure_is_legible_at_half_width_stays_inside_and_shows_once(name, cases, tables):
    import matplotlib.pyplot as plt

    before = plt.get_fignums()  # whatever another test has left open is not this one's business
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # a glyph missing, a layout that does not fit
        fig = FIGURES[name](cases, tables)
        fig.savefig(io.BytesIO(), dpi=100)
    assert plt.get_fignums() == before, (
        "pyplot still holds the figure: a notebook would show it twice"
    )
    canvas, width = fig.bbox, fig.get_figwidth()
    for text in drawn_texts(fig):
        assert text.get_fontsize() / 72 * 500 / width >= FIGURE_TEXT_AT_HALF_WIDTH, (
            f"{text.get_text()!r} is too small"
        )
        box = text.get_window_extent()
        assert box.x0 >= canvas.x0 - 2 and box.x1 <= canvas.x1 + 2, (
            f"{text.get_text()!r} runs out of the picture"
        )
        assert box.y0 >= canvas.y0 - 2 and box.y1 <= canvas.y1 + 2, (
            f"{text.get_text()!r} runs out of the picture"
        )
    for ax in fig.axes:
        labels = [t for t in ax.get_yticklabels() if t in set(drawn_texts(fig))]
        boxes = sorted((t.get_window_extent().y0, t.get_window_extent().y1) for t in labels)
        assert all(upper[0] >= lower[1] - 1.5 for lower, upper in itertools.pairwise(boxes)), (
            f"y labels overlap in {name}"
        )


def test_end_labels_do_not_cover_one_another():
    log = grpo_log().assign(**{f"rewards/r{i}_reward/mean": 0.4 + i / 1000 for i in range(4)})
    fig = plots.grpo_panel(log)
    fig.savefig(io.BytesIO())
    boxes = sorted((t.get_window_extent().y0, t.get_window_extent().y1) for t in fig.axes[0].texts)
    assert len(boxes) == 7
    assert all(upper[0] >= lower[1] - 1 for lower, upper in itertools.pairwise(boxes))


# ------------------------------------------------------------------------------------------ palette
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
@pytest.mark.parametrize("palette", [plots.MODELS, plots.KINDS], ids=["models", "kinds"])
def test_palette_is_told_apart_with_any_colour_vision(palette, vision):
    for (a, (_, one)), (b, (_, other)) in itertools.combinations(palette.items(), 2):
        distance = np.linalg.norm(_seen(one, VISION[vision]) - _seen(other, VISION[vision]))
        assert distance > (18 if palette is plots.MODELS else 11), (
            f"{a} and {b} look alike with {vision}: {distance:.1f}"
        )


@pytest.mark.parametrize("model", ["tfidf", "base", "sft", "grpo", "ideal"])
def test_the_colours_that_labels_are_written_in_stand_out_from_white(model):
    lightness = _seen(plots.MODELS[model][1], VISION["normal"])[0]
    luminance = ((lightness + 16) / 116) ** 3 if lightness > 8 else lightness / 903.3
    assert 1.05 / (luminance + 0.05) >= 3, (
        "WCAG 2.1 asks for 3:1 of large or bold text and of graphical objects"
    )


def test_one_colour_for_a_model_and_its_variants_and_one_of_its_own_for_a_core_arm():
    from helpers import study

    variants = {
        plots.colour(name) for name in ("sft", "sft_constrained", "sft+x", "sft-unquantised")
    }
    assert variants == {plots.MODELS["sft"][1]} and plots.colour(
        "grpo-constrained"
    ) == plots.colour("grpo")
    core = [name for name, arm in study.ARMS.items() if arm.core]
    assert len({plots.colour(name) for name in core}) == len(core)
    assert plots.colour("something") not in {c for _, c in plots.MODELS.values()}
    assert plots.label("sft") == "SFT" and plots.label("sft_constrained") == "sft constrained"


def test_style_and_figures_leave_the_readers_settings_alone(cases):
    before = dict(matplotlib.rcParams)
    plots.chapters(cases)
    assert dict(matplotlib.rcParams) == before
    with matplotlib.rc_context():
        plots.style()
        assert matplotlib.rcParams["font.size"] >= 11 and not matplotlib.rcParams["axes.spines.top"]


# ------------------------------------------------------------------------- pictures against numbers
def test_outcomes_put_every_case_in_one_kind():
    cases = pd.DataFrame(
        {"subject_id": range(6), "hadm_id": range(6), "code": ["I2101"] * 6, "split": "test"}
    )
    said = ["I21.01", "I2102", "I509", "J189", None, "1", "J189"]
    table = pd.DataFrame({"hadm_id": [*range(6), 0], "sample": [0] * 6 + [1], "predicted": said})
    frame = plots.outcomes(cases, table)
    assert frame["kind"].tolist() == [
        "full",
        "category",
        "chapter",
        "wrong",
        "unusable",
        "unusable",
    ]
    assert frame["predicted"].tolist() == ["I2101", "I2102", "I509", "J189", None, None]
    with pytest.raises(ValueError, match="share no hadm_id"):
        plots.outcomes(cases, table.assign(hadm_id=table["hadm_id"] + 100))


def test_stacked_bars_are_the_shares_and_whiskers_are_around_accuracy(cases, tables):
    fig = plots.how_far_up_the_tree(cases, tables)
    bars = {}
    for patch in fig.axes[0].patches:
        bars.setdefault(round(patch.get_y() + patch.get_height() / 2), []).append(patch.get_width())
    for row, table in enumerate(tables.values()):
        kinds = plots.outcomes(cases, table)["kind"]
        assert bars[row] == pytest.approx([np.mean(kinds == k) for k in plots.KINDS])
        assert sum(bars[row]) == pytest.approx(1)
    assert [t.get_text() for t in fig.axes[0].get_yticklabels()] == [
        "Base",
        "TF-IDF + LR",
        "SFT",
        "GRPO",
    ]
    assert [t.get_text() for t in fig.legends[0].get_texts()] == [
        name for name, _ in plots.KINDS.values()
    ]
    ends = fig.axes[0].collections[-1].get_segments()  # GRPO: right code, right chapter
    kinds = plots.outcomes(cases, tables["grpo"])["kind"]
    for segment, levels in zip(ends, (["full"], ["full", "category", "chapter"]), strict=True):
        assert segment[0][0] < kinds.isin(levels).mean() < segment[1][0]


def test_chapters_are_in_the_order_of_the_classification_with_equal_shares(cases):
    fig = plots.chapters(cases)
    names = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    present = sorted(cases["chapter"].unique())
    assert names == [f"{c} {icd.chapter_short(c)}" for c in present]
    train = cases.loc[cases["split"] == "train", "chapter"]
    assert [p.get_width() for p in fig.axes[0].patches[: len(present)]] == pytest.approx(
        [(train == c).mean() for c in present]
    )
    low, high = fig.axes[0].get_ylim()
    assert low > high, "the first chapter stands on top"


def test_score_bars_print_score_interval_ceiling_and_number_of_classes(cases, tables):
    table = metrics_of(cases, tables)
    fig = plots.score_bars(table)
    for ax, level in zip(fig.axes, plots.LEVELS, strict=True):
        assert f"{table['models']['sft'][level]['n_classes']} classes" in ax.get_title(loc="left")
        assert [p.get_width() for p in ax.patches] == pytest.approx(
            [table["models"][m][level]["f1_gold"] for m in ("tfidf", "base", "sft", "grpo")]
        )
        dashed = [line for line in ax.lines if line.get_linestyle() == "--"]
        assert (
            len(dashed) == 1
            and dashed[0].get_xdata()[0] == 0.85
            and dashed[0].get_color() == "black"
        )
        intervals = [
            end for line in ax.lines if line.get_linestyle() == "-" for end in line.get_xdata()
        ]
        models = [table["models"][m][level] for m in ("tfidf", "base", "sft", "grpo")]
        assert intervals == pytest.approx([end for model in models for end in model["ci"]])
    assert not any(
        line.get_linestyle() == "--"
        for ax in plots.score_bars({**table, "ceiling": None}).axes
        for line in ax.lines
    )
    with pytest.raises(ValueError, match="no model"):
        plots.score_bars({"models": {}})


@pytest.mark.parametrize("score", [0.02, 0.2, 0.78, 0.83, 0.88])
def test_no_number_covers_the_ceiling(score):
    entry = {
        level: {"f1_gold": score, "ci": [score - 0.02, score + 0.02], "n_classes": 9}
        for level in plots.LEVELS
    }
    ceiling = {level: {"f1_gold": 0.85} for level in plots.LEVELS}
    fig = plots.score_bars({"models": {"sft": entry, "grpo": entry}, "ceiling": ceiling})
    fig.savefig(io.BytesIO(), dpi=100)
    for ax in fig.axes:
        ceiling = ax.transData.transform((0.85, 0))[0]
        for text in (t for t in ax.texts if "ideal" not in t.get_text()):
            box = text.get_window_extent()
            assert not box.x0 - 2 < ceiling < box.x1 + 2, (
                f"{text.get_text()} stands on the dashed line"
            )


def _grid(fig: Figure, rows: int) -> np.ndarray:
    counts = np.zeros((rows, len(fig.axes[0].get_xticks())), int)
    for text in fig.axes[0].texts:
        x, y = text.get_position()
        counts[int(y), int(x)] = int(text.get_text())
    return counts


def test_chapter_confusion_holds_every_case_once(cases, tables):
    fig, frame = plots.chapter_confusion(cases, tables["sft"]), plots.outcomes(cases, tables["sft"])
    rows = sorted({icd.chapter(c) for c in frame["gold"]})
    counts = _grid(fig, len(rows))
    assert counts.sum() == len(frame)
    assert counts[:, -1].sum() == (frame["kind"] == "unusable").sum()
    assert np.trace(counts) == frame["kind"].isin(["full", "category", "chapter"]).sum()
    share = fig.axes[0].collections[0].get_array().reshape(counts.shape)
    assert np.asarray(share) == pytest.approx(counts / counts.sum(axis=1, keepdims=True))


def test_category_confusion_is_of_the_chapter_with_the_largest_share_of_wrong_categories(
    cases, tables
):
    frame = plots.outcomes(cases, tables["sft"])
    missed = (
        (~frame["kind"].isin(["full", "category"]))
        .groupby(frame["gold"].map(icd.chapter))
        .agg(["mean", "size"])
    )
    assert missed["size"].idxmax() != missed["mean"].idxmax(), (
        "the largest chapter is not the worst"
    )
    worst = missed.loc[missed["size"] >= 20, "mean"].idxmax()  # of three cases there is no telling
    fig = plots.category_confusion(cases, tables["sft"])
    assert f"Inside chapter {worst} " in fig.get_suptitle()
    assert (
        f"{100 * missed.loc[worst, 'mean']:.0f} % of {missed.loc[worst, 'size']} cases"
        in fig.get_suptitle()
    )
    few = cases[cases["hadm_id"].isin(frame["hadm_id"][:5])]
    assert "Inside chapter" in plots.category_confusion(few, tables["sft"]).get_suptitle()
    inside = frame[frame["gold"].map(icd.chapter) == worst]
    rows = inside["gold"].map(icd.category).nunique()
    counts = _grid(fig, rows)
    assert counts.sum() == len(inside)
    assert np.trace(counts) == inside["kind"].isin(["full", "category"]).sum()
    pooled = plots.category_confusion(cases, tables["sft"], int(worst), top=1)
    assert len(pooled.axes[0].get_yticks()) == 1
    with pytest.raises(ValueError, match="chapter 16"):
        plots.category_confusion(cases[cases["chapter"] != 16], tables["sft"], 16)


def test_confused_pairs_count_usable_wrong_answers():
    cases = pd.DataFrame(
        {
            "subject_id": range(10),
            "hadm_id": range(10),
            "code": ["I2101"] * 6 + ["J189"] * 4,
            "split": "test",
        }
    )
    said = ["I2102"] * 4 + ["I2101", None] + ["J441"] * 2 + ["J189"] * 2
    table = pd.DataFrame({"hadm_id": range(10), "predicted": said})
    pairs = plots.confused_pairs(cases, table)
    assert pairs[["gold", "predicted", "cases", "of"]].values.tolist() == [
        ["I2101", "I2102", 4, 6],
        ["J189", "J441", 2, 4],
    ]
    assert (pairs["low"] <= pairs["cases"]).all() and (pairs["cases"] <= pairs["high"]).all()
    labels = [
        t.get_text() for t in plots.most_confused_pairs(cases, table).axes[0].get_yticklabels()
    ]
    assert labels[0].startswith("I21.01 ") and "\n→ I21.02 " in labels[0]


@given(
    st.text(st.sampled_from("abcde ,"), min_size=1, max_size=120),
    st.integers(12, 60),
    st.text(st.sampled_from("abcde ,")),
)
def test_shortened_titles_fit_and_keep_their_beginning_and_whole_words(text, width, others):
    cut, words = plots._cut(text, width, others), text.split()
    assert len(cut) <= width
    assert cut == " ".join(words) or cut == text or "…" in cut
    assert not words or cut.split()[0] == words[0] or len(words[0]) > width - 4
    if max(map(len, words), default=0) < width // 3:
        assert set(cut.split()) - {"…"} <= set(words)


@pytest.mark.parametrize(
    "codes, telling",
    [
        (("I63512", "I63511"), ("left", "right")),
        (("I60", "I61"), ("subara", "intrac")),
        (("I5033", "I5023"), ("diastolic", "systolic")),
    ],
)
def test_shortened_titles_of_siblings_keep_what_tells_them_apart(codes, telling):
    for code, word in zip(codes, telling, strict=True):
        assert word in plots._named(code, 26, codes) and plots._named(code, 26, codes).startswith(
            icd.dotted(code)
        )


def test_no_two_rows_of_a_figure_bear_the_same_title():
    codes = ("I63511", "I63512", "I5023", "I5033", "I6000", "I610")
    cases = pd.DataFrame(
        {"subject_id": range(60), "hadm_id": range(60), "code": codes * 10, "split": "test"}
    )
    table = pd.DataFrame(
        {"hadm_id": range(60), "predicted": [*codes[1::-1], *codes[3:1:-1], *codes[:3:-1]] * 10}
    )
    pairs = [
        t.get_text() for t in plots.most_confused_pairs(cases, table).axes[0].get_yticklabels()
    ]
    icicle = [
        t.get_text() for t in plots.icicle(cases, table).axes[0].texts if t.get_position()[0] > 1
    ]
    rows = [
        t.get_text() for t in plots.category_confusion(cases, table, 9).axes[0].get_yticklabels()
    ]
    for names in (*(pair.replace("→ ", "").split("\n") for pair in pairs), icicle[::2], rows):
        titles = [name.split(" ", 1)[1] for name in names]
        assert len(titles) == len(set(titles)) > 1


@settings(max_examples=30, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.sampled_from(CODES[:8]), st.sampled_from([*CODES[:10], None]), st.integers(0, 9)
        ),
        min_size=1,
    )
)
def test_group_f1_is_that_of_metrics(rows):
    gold, said, patients = (list(column) for column in zip(*rows, strict=True))
    frame = pd.DataFrame(
        {"gold": gold, "predicted": pd.Series(said, dtype=object), "subject_id": patients}
    )
    draws, by_code = plots._group_f1(frame, dict.fromkeys(gold, 0), 1)
    assert draws[0, 0] == pytest.approx(metrics.report(gold, said, n_boot=0)["full"]["f1_gold"])
    expected = {row["class"]: row["f1"] for row in metrics.per_class(gold, said)}
    assert by_code.to_dict() == pytest.approx({c: expected[c] for c in by_code.index})


def test_head_middle_tail_is_that_of_metrics(cases, tables):
    frame = plots.outcomes(cases, tables["sft"])
    train = cases.loc[cases["split"] == "train", "code"].tolist()
    expected = metrics.head_middle_tail(
        frame["gold"].tolist(), frame["predicted"].tolist(), train, n_boot=0
    )
    fig = plots.head_middle_tail(cases, {"sft": tables["sft"]})
    for ax in fig.axes:
        name, classes = ax.get_title(loc="left").lower().split("\n")
        assert ax.patches[0].get_width() == pytest.approx(expected[name]["f1_gold"])
        assert int(classes.split()[0]) == expected[name]["n_classes"]


def test_dumbbells_show_the_paired_difference_on_shared_cases(cases, tables):
    some = tables["grpo"].iloc[::2]  # predictions of a subset
    fig = plots.dumbbells(cases, tables["sft"], some)
    rows = [t.get_text() for t in fig.axes[0].get_yticklabels()]
    assert [int(r.split()[0]) for r in rows] == sorted(int(r.split()[0]) for r in rows)
    assert sum(int(r.rsplit("(", 1)[1].rstrip(")")) for r in rows) == len(some)
    before, after = (line.get_xdata() for line in fig.axes[0].lines)
    difference = fig.axes[1].collections[-1].get_offsets()[:, 0]
    assert np.asarray(difference) == pytest.approx(np.asarray(after - before))
    same = plots.dumbbells(cases, some, some).axes[1]
    assert not same.collections[-1].get_offsets()[:, 0].any(), (
        "a model compared with itself differs nowhere"
    )
    spans = [np.ptp(s[:, 0]) for s in same.collections[0].get_segments() if len(s)]
    assert spans and not any(spans), "and the same patients were drawn for both"
    assert len(spans) == sum(int(r.rsplit("(", 1)[1].rstrip(")")) >= 10 for r in rows), (
        "no interval from fewer than 10 cases"
    )


def test_icicle_bands_are_as_tall_as_their_cases_at_each_level(cases, tables):
    n = len(tables["sft"])
    ax = plots.icicle(cases, tables["sft"]).axes[0]
    for x in range(3):
        bands = [p for p in ax.patches if p.get_x() == x]
        assert sum(p.get_height() for p in bands) == n
        assert all(a.get_y() + a.get_height() == b.get_y() for a, b in itertools.pairwise(bands))
    order = [int(t.get_text().split()[0]) for t in ax.texts if t.get_position()[0] == 0.02]
    assert order == sorted(order)


def test_reliability_points_are_agreement_and_accuracy():
    cases = pd.DataFrame(
        {"subject_id": range(4), "hadm_id": range(4), "code": ["I2101"] * 4, "split": "test"}
    )
    said = [
        ["I2101"] * 4,
        ["I2101"] * 4,
        ["I2101", "I2101", "J189", None],
        ["J189", "J189", "I2101", "I2101"],
    ]
    rows = [(h, s, c) for h, row in enumerate(said) for s, c in enumerate(row)]
    table = pd.DataFrame(rows, columns=["hadm_id", "sample", "predicted"])
    ax = plots.reliability(cases, table).axes[0]
    assert ax.collections[-1].get_offsets().tolist() == [[0.5, 0.5], [1.0, 1.0]]
    with pytest.raises(ValueError, match="at least 2 samples"):
        plots.reliability(cases, table[table["sample"] == 0])


def test_funnel_and_lengths_print_their_shares():
    assert any("(75 % kept)" in t for t in texts_of(plots.funnel({"a": 400, "b": 300})))
    assert any("(99.6 % kept)" in t for t in texts_of(plots.funnel({"a": 6000, "b": 5975}))), (
        "a step that took 25 took some"
    )
    assert "25.0 % exceed the limit" in plots.note_lengths([10, 20, 30, 40], 30).axes[0].get_title(
        loc="left"
    )
    texts = " ".join(texts_of(plots.note_lengths([10, 20, 30], 30, what="trace")))
    assert "length of the trace (tokens)" in texts and "note" not in texts


def test_labels_of_the_long_tail_stand_in_the_order_of_its_curves():
    codes = ["I10", "J189", "A419", "I214"]
    cases = pd.DataFrame({"code": codes * 9, "split": ["train"] * 20 + ["val"] * 4 + ["test"] * 12})
    cases.loc[35, "code"] = "K922"  # both small splits end at one case
    cases.loc[23, "code"] = "N179"
    labels = {
        t.get_text().split(":")[0]: t.get_position()[1]
        for t in plots.code_frequencies(cases).axes[0].texts
    }
    assert sorted(labels, key=labels.get) == ["val", "test", "train"]


def test_a_single_class_and_a_single_case_are_drawn():
    cases = pd.DataFrame(
        {
            "subject_id": [1, 2],
            "hadm_id": [1, 2],
            "code": "I10",
            "chapter": 9,
            "split": ["train", "test"],
        }
    )
    table = pd.DataFrame({"subject_id": [2], "hadm_id": [2], "sample": 0, "predicted": ["I10"]})
    for draw in (plots.chapters, plots.code_frequencies):
        draw(cases).savefig(io.BytesIO())
    for draw in (
        plots.chapter_confusion,
        plots.category_confusion,
        plots.most_confused_pairs,
        plots.icicle,
    ):
        draw(cases, table).savefig(io.BytesIO())
    for draw in (plots.how_far_up_the_tree, plots.f1_against_frequency, plots.head_middle_tail):
        draw(cases, {"sft": table}).savefig(io.BytesIO())
    plots.dumbbells(cases, table, table).savefig(io.BytesIO())


# ------------------------------------------------------------------------------------------ training
def test_curves_show_raw_points_a_smooth_line_and_what_was_held_out():
    log = sft_log()
    log["loss"] += np.random.default_rng(0).normal(0, 0.3, len(log))
    fig = plots.training_curve(log)
    assert [ax.get_title(loc="left") for ax in fig.axes] == ["Loss", "Token accuracy"]
    raw, smooth, held, dashed = fig.axes[0].lines
    assert raw.get_linestyle() == "None" and raw.get_ydata() == pytest.approx(log["loss"].dropna())
    assert np.abs(np.diff(smooth.get_ydata(), 2)).sum() <= np.abs(np.diff(raw.get_ydata(), 2)).sum()
    assert raw.get_markersize() >= 5 and raw.get_alpha() >= 0.4, (
        "else nobody sees the points at half width"
    )
    assert held.get_xdata().tolist() == dashed.get_xdata().tolist() == [100, 200]
    with pytest.raises(ValueError, match="the log needs step"):
        plots.training_curve(pd.DataFrame({"a": [1]}))
    log = pd.DataFrame(
        {"step": [1, 2, 3], "loss": [4.0, 1.0, 0.2], "mean_token_accuracy": [0.5, 0.6, 0.9]}
    )
    assert [ax.get_yscale() for ax in plots.training_curve(log).axes] == ["log", "linear"]
    assert plots.training_curve(log.assign(loss=log["loss"] + 1)).axes[0].get_yscale() == "linear"


def test_grpo_panel_names_components_and_does_not_call_the_batch_spread_that_of_groups():
    fig = plots.grpo_panel(grpo_log())
    assert [t.get_text() for t in fig.axes[0].texts] == ["hierarchical", "total", "format"]
    assert {t.get_text() for t in fig.axes[2].texts} == {"std of\nbatch", "flat\ngroups"}
    used = {line.get_color() for ax in fig.axes for line in ax.lines} - {plots.colour("grpo")}
    assert not used & {colour for name, (_, colour) in plots.MODELS.items()}, (
        "blue is SFT, in every figure"
    )
    fig = plots.grpo_panel(grpo_log().assign(group_reward_std=0.1))
    assert {t.get_text() for t in fig.axes[2].texts} == {"std in\ngroups", "flat\ngroups"}
    assert any(
        t.get_text() == "nothing logged" for t in plots.grpo_panel(grpo_log(5)).axes[1].texts
    )
    with pytest.raises(ValueError, match="column step"):
        plots.grpo_panel(pd.DataFrame({"reward": [1.0]}))


def test_rollout_group_sorts_by_the_advantage_of_trl():
    answers = [
        f"because\n</think>\n<diagnosis>{c}</diagnosis>" for c in ("J18.9", "I21.01", "I21.02")
    ]
    rewards = {"format_reward": [1, 1, 1], "hierarchical_reward": [0.0, 1.0, 0.4]}
    left, right = plots.rollout_group(
        answers, rewards, weights={"format_reward": 0.1}, gold="I2101"
    ).axes
    r = np.array([0.1, 1.1, 0.5])
    expected = sorted((r - r.mean()) / (r.std(ddof=1) + 1e-4), reverse=True)
    assert [p.get_width() for p in right.patches] == pytest.approx(expected)
    assert [t.get_text() for t in left.texts if t.get_text().startswith("→")] == [
        "→ I21.01",
        "→ I21.02",
        "→ J18.9",
    ]
    flat = plots.rollout_group(answers, {"r": [1, 1, 1]})
    assert any("nothing" in t for t in texts_of(flat)) and all(
        p.get_width() == 0 for p in flat.axes[1].patches
    )
    with pytest.raises(ValueError, match="one group"):
        plots.rollout_group(answers, {"r": [1, 2]})


def test_study_arms_show_difference_interval_and_seeds_of_every_arm():
    fig = plots.study_arms(STUDY, ARMS)
    assert [t.get_text().replace("\n", " ") for t in fig.axes[0].get_yticklabels()] == [
        ARMS[arm] for arm in STUDY
    ]
    for ax, level in zip(fig.axes, plots.LEVELS, strict=True):
        assert [t.get_text() for t in ax.texts] == ["+4.0", "+0.4", "−3.0", "−50.0"] + ["loss "] * (
            level != "full"
        )
        for row, (arm, levels) in enumerate(STUDY.items()):
            interval, point, seeds = ax.lines[3 * row : 3 * row + 3]
            assert list(interval.get_xdata()) == levels[level]["ci"] and set(
                interval.get_ydata()
            ) == {row}
            assert (
                list(seeds.get_xdata()) == levels[level]["per_seed"] and len(seeds.get_ydata()) == 5
            )
            assert point.get_color() == plots.colour(arm)
            assert (point.get_markerfacecolor() == "white") == (arm == "grpo-strict"), (
                "filled where the interval excludes 0"
            )
        x = [ax.lines[3 * row + 1].get_xdata()[0] for row in range(4)]
        assert x[:3] == pytest.approx([0.04, 0.004, -0.03]) and ax.get_xlim()[0] < x[3] < -0.03, (
            "far out: at the edge"
        )
        assert ax.lines[10].get_marker() == "<" and ax.get_xlim()[0] > -0.15, (
            "and does not squeeze the others"
        )
        band = [p.get_x() + p.get_width() for p in ax.patches]
        assert band == ([] if level == "full" else pytest.approx([-0.02])), (
            "the margin holds where no loss was promised"
        )


def test_study_curves_draw_each_seed_thin_and_their_mean_thick():
    logs = {"grpo": [grpo_log(30), grpo_log(20).assign(reward=2.0)], "grpo-strict": [grpo_log(30)]}
    fig = plots.study_curves(logs, ARMS)
    titles = [ax.get_title(loc="left") for ax in fig.axes]
    assert [t.split()[0] for t in titles] == ["Mean", "Share", "Reward"], (
        "reward_std is the batch's: flat groups tell more"
    )
    one, other, mean, *_ = fig.axes[0].lines
    expected = grpo_log(30).dropna(subset=["reward"])["reward"].rolling(5).mean()[4:].to_numpy()
    assert one.get_ydata() == pytest.approx(expected) and set(other.get_ydata()) == {2.0}
    assert one.get_xdata().tolist() == list(range(5, 31)), (
        "a mean of five steps begins at the fifth"
    )
    assert mean.get_linewidth() > 2 * one.get_linewidth() and mean.get_xdata().tolist() == list(
        range(5, 21)
    )
    assert mean.get_ydata() == pytest.approx((expected[:16] + 2) / 2), "as far as all seeds went"
    short = plots.study_curves({"grpo": [grpo_log(3)]}).axes[0].lines[0]
    assert short.get_xdata().tolist() == [3], "a log of three steps has a mean of three"
    assert fig.axes[2].lines[0].get_xdata().tolist() == [10, 20, 30], (
        "held-out rewards come seldom: no smoothing"
    )
    assert fig.axes[2].lines[0].get_ydata() == pytest.approx([0.55, 0.6, 0.65])
    assert sorted(t.get_text().replace("\n", " ") for t in fig.axes[0].texts) == [
        ARMS["grpo-strict"],
        ARMS["grpo"],
    ]
    bare = [grpo_log(9).drop(columns="frac_reward_zero_std")]
    assert "batch" in plots.study_curves({"grpo": bare}).axes[1].get_title(loc="left")
    with pytest.raises(ValueError, match="no log has the columns"):
        plots.study_curves({"sft": [sft_log()]})


def test_live_plot_collects_headless_and_answers_every_event_of_the_trainer():
    from transformers.trainer_callback import (
        CallbackHandler,
        TrainerCallback,
        TrainerControl,
        TrainerState,
    )

    live = plots.LiveTrainingPlot(every=2)
    handler = CallbackHandler([live], None, None, None, None)
    state, control = TrainerState(global_step=3), TrainerControl()
    for event in (
        name for name in dir(TrainerCallback) if name.startswith("on_") and name != "on_log"
    ):
        getattr(handler, event)(
            None, state, control, *([{}] if event in ("on_evaluate", "on_predict") else [])
        )
    state.log_history = [{"step": 2, "loss": 2.0}]
    handler.on_train_begin(None, state, control)
    handler.on_log(None, state, control, {"loss": 1.0})
    assert live.log.to_dict("records") == [{"step": 2, "loss": 2.0}, {"step": 3, "loss": 1.0}], (
        "also of a training that goes on"
    )
    with pytest.raises(AttributeError):
        live.something_else  # noqa: B018


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


def _log(
    live: plots.LiveTrainingPlot, step: int, main: bool = True, **values: float
) -> SimpleNamespace:
    state = SimpleNamespace(global_step=step, is_world_process_zero=main)
    live.on_log(None, state, None, values)
    return state


def test_live_plot_redraws_one_figure_every_k_logs_and_at_the_end(monkeypatch):
    shown, live = _in_notebook(monkeypatch), plots.LiveTrainingPlot(every=3, min_seconds=0)
    for step in range(1, 8):
        state = _log(live, step, reward=0.1 * step)
    assert [kind for kind, _ in shown] == ["display", "update"]
    live.on_train_end(None, state, None)
    assert [kind for kind, _ in shown] == ["display", "update", "update"] and len(
        shown[-1][1].axes
    ) == 4
    other = plots.LiveTrainingPlot(every=1)
    _log(other, 1, main=False, loss=1.0)
    assert len(shown) == 3, "only the main process draws"


def test_live_plot_never_stops_a_training(monkeypatch):
    def broken(log: pd.DataFrame) -> Figure:
        raise RuntimeError("no picture today")

    shown, live = (
        _in_notebook(monkeypatch),
        plots.LiveTrainingPlot(every=1, draw=broken, min_seconds=0),
    )
    with pytest.warns(UserWarning, match="no picture today"):
        _log(live, 1, loss=1.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _log(live, 2, loss=1.0)
    assert not shown and len(live.log) == 2
