"""What the answers of the study say: contrasts with intervals, scores, verdicts.

An unusable answer stands in the tables as "NIL", which has not the shape of a code: `metrics`
counts it as no answer. Taught in notebook 7; the formulas stand in docs/metrics.md.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from helpers import metrics
from helpers.study import ARMS, MARGIN, PRIMARY, RESULTS, SECONDARY


def read(results: Path = RESULTS) -> pd.DataFrame:
    """predictions.csv as text: subject_id, hadm_id, code and a column arm/seed for each run.

    Raises FileNotFoundError where the study has not begun.
    """
    path = results / "predictions.csv"
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there: the study has not begun. Run: make study")
    return pd.read_csv(path, dtype=str)


def contrast(
    table: pd.DataFrame, a: str, b: str, *, n_boot: int = 1000, seed: int = 0
) -> pd.DataFrame:
    """Arm b minus arm a from predictions.csv, one row for each level:

    difference: of macro-F1, the mean over the seeds that both have. per_seed: of the single seeds.
    low, high: 95 % bootstrap over seeds and patients. Each resample draws seeds with replacement
        and half of the patients without (as `metrics` does), and averages the paired differences
        over the drawn seeds. The spread of few seeds is widened by sqrt(n / (n - 1)), without
        which a bootstrap of 5 seeds is a tenth too narrow. p: its two-sided p-value.
    t_low, t_high: Student's interval over the seeds alone; it takes the patients as given.
    satterthwaite_low, satterthwaite_high: Student's interval with the variance of the mean over
        seeds plus that of the patients. The first has n - 1 degrees of freedom, the sum those of
        Satterthwaite (Biometrics Bulletin 2, 1946). With three or four seeds this is the one to
        believe: where three seeds decide, the bootstrap covers 81 %.

    Raises ValueError without a common seed.
    """
    seeds = [name.split("/")[1] for name in sorted(table) if name.startswith(f"{a}/")]
    seeds = [each for each in seeds if f"{b}/{each}" in table]
    if not seeds:
        command = f"python -m helpers.study run --arms {a} {b}"
        raise ValueError(f"no seed has both {a} and {b}. Run: {command}")
    resampling = {"patients": table["subject_id"], "n_boot": n_boot, "seed": seed}
    differences = [
        metrics.differences(table["code"], table[f"{a}/{each}"], table[f"{b}/{each}"], **resampling)
        for each in seeds
    ]
    drawn = np.random.default_rng(seed).integers(0, len(seeds), (n_boot, len(seeds)))
    rows = {}
    for level in metrics.LEVELS:
        points, deviations = zip(*(difference[level] for difference in differences), strict=True)
        rows[level] = _summary(np.array(points), np.stack(deviations), drawn)
    summary = pd.DataFrame.from_dict(rows, orient="index").rename_axis("level")
    return summary.assign(contrast=f"{b} - {a}")


def _summary(points: np.ndarray, deviations: np.ndarray, drawn: np.ndarray) -> dict[str, Any]:
    """Row of a contrast.

    points: [seeds]; deviations: [seeds, resamples], of the same patients for each seed; drawn:
    [resamples, seeds], the seeds of each resample. Of one seed, Student's intervals are NaN.
    """
    from scipy import stats

    n = len(points)
    mean = points.mean()
    widened = mean + (points - mean) * (n / max(n - 1, 1)) ** 0.5
    resamples = np.arange(len(drawn))[:, None]
    means = (widened[drawn] + deviations[drawn, resamples]).mean(1)
    strays = means - means.mean()
    low, high = mean + np.quantile(strays, [0.025, 0.975])
    extreme = (np.abs(strays) >= abs(mean) - 1e-9).sum()

    sd = points.std(ddof=min(n - 1, 1))
    t_half = stats.t.ppf(0.975, n - 1) * sd / n**0.5
    of_seeds = max(sd**2 / n, 1e-12)  # seeds that agree to the last case
    variance = of_seeds + deviations.mean(0).var()
    freedom = (n - 1) * (variance / of_seeds) ** 2
    half = stats.t.ppf(0.975, freedom) * variance**0.5
    return {
        "difference": mean,
        "low": low,
        "high": high,
        "t_low": mean - t_half,
        "t_high": mean + t_half,
        "satterthwaite_low": mean - half,
        "satterthwaite_high": mean + half,
        "p": (1 + extreme) / (1 + len(drawn)),
        "seeds": n,
        "per_seed": points.round(4).tolist(),
    }


def scores(table: pd.DataFrame) -> pd.DataFrame:
    """Macro-F1 per level and the share of usable answers, one row for each arm of ARMS and seed
    that has answered."""
    rows = []
    for arm in ARMS:
        seeds = [name.split("/")[1] for name in table if name.startswith(f"{arm}/")]
        for seed in sorted(seeds, key=int):
            report = metrics.report(table["code"], table[f"{arm}/{seed}"], n_boot=0)
            f1 = {level: report[level]["f1_gold"] for level in metrics.LEVELS}
            rows.append({"arm": arm, "seed": int(seed), **f1, "usable": report["usable"]})
    return pd.DataFrame(rows)


def verdicts(table: pd.DataFrame) -> pd.DataFrame:
    """The primary contrast, then the secondary ones with Holm's p: those whose arms have run.

    `holds`: the interval excludes zero (secondary: and Holm's p is below 0.05). `no_loss`, at
    category and chapter: the interval lies above MARGIN.
    """
    arms = {name.split("/")[0] for name in table}
    fixed = [each for each in (PRIMARY, *SECONDARY) if {*each[:2]} <= arms]
    if not fixed:
        return pd.DataFrame()
    contrasts = {pair: contrast(table, *pair) for pair in {each[:2] for each in fixed}}
    rows = [contrasts[a, b].loc[[level]] for a, b, level in fixed]
    verdict = pd.concat(rows).reset_index()
    verdict["kind"] = ["primary" if each == PRIMARY else "secondary" for each in fixed]
    verdict["holm"] = holm(verdict.loc[verdict["kind"] == "secondary", "p"])
    excludes_zero = (verdict["low"] > 0) | (verdict["high"] < 0)
    verdict["holds"] = excludes_zero & ~(verdict["holm"] >= 0.05)
    verdict["no_loss"] = (verdict["low"] > MARGIN).where(verdict["level"] != "full")
    return verdict


def holm(p: pd.Series) -> pd.Series:
    """Holm's adjusted p-values (Scandinavian Journal of Statistics 6, 1979): the smallest times m,
    the next times m - 1, ..."""
    ordered = p.sort_values(kind="stable")
    return (ordered * range(len(p), 0, -1)).clip(upper=1).cummax()
