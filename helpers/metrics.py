"""Gold and predicted codes in, hierarchical report out. Formulas, sources and worked examples: docs/metrics.md.

An unusable answer (None, NaN, whatever has not the shape of a code) is NIL at every level: a false negative for the gold class,
and no class of its own except in `f1_union`. Codes are judged by shape, so codes of no dictionary are scored like any other;
whoever demands valid codes passes None for the rest.

Intervals (95 %) come from a half-sample bootstrap over patients: each resample is a random half of them, without replacement,
and macro-F1 is averaged over the gold classes present in it. The deviations of the resamples from their own mean are laid around
the point estimate; halves need no rescaling (Shao & Wu, Annals of Statistics 17, 1989). The ordinary bootstrap repeats the lone
cases of rare codes where a new sample would lose them, and so understates the spread: `python -m benchmarks.metrics` shows it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import comb
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy import sparse
from scipy.special import bdtr

from helpers import icd

if TYPE_CHECKING:
    import pandas as pd

Array = np.ndarray
Report = dict[str, Any]
LEVELS: dict[str, Callable[[Any], Any]] = {
    "chapter": icd.chapter,
    "category": icd.category,
    "full": icd.normalise,
}
_CHUNK = 128  # resamples at a time; the largest array holds this many numbers for each class


@dataclass(frozen=True)
class _Level:
    """One level of the hierarchy: its classes, and for each case the index of its class (-1 is NIL)."""

    labels: list[Any]
    gold: Array
    predicted: tuple[Array, ...]  # one array for each model

    def counts(self, model: int = 0) -> list[Array]:
        """Support, number of predictions and true positives of each class."""
        named = self.predicted[model]
        columns = self.gold, named[named >= 0], self.gold[self.gold == named]
        return [np.bincount(column, minlength=len(self.labels)) for column in columns]


def _up(level: str) -> Callable[[Any], Any]:
    if level not in LEVELS:
        raise ValueError(f"level {level!r} does not exist: choose one of {', '.join(LEVELS)}.")
    return LEVELS[level]


def _codes(values: Iterable[Any], name: str, nil: bool = True) -> list[str | None]:
    if isinstance(values, str):
        raise ValueError(
            f"{name} is one string ({values!r:.20}): pass a list with one code for each case."
        )
    values = list(values)
    codes = [icd.normalise(value) for value in values]
    if not nil and None in codes:
        row = codes.index(None)
        raise ValueError(
            f"{name}, row {row}: {values[row]!r:.40} is not an ICD-10-CM code. Only predictions may be unusable: "
            "drop the case before it is scored."
        )
    return codes


def _same_length(**columns: Sequence[Any]) -> None:
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"unequal lengths {sizes}: row i of each must be the same case. metrics.align joins tables by hadm_id."
        )
    if 0 in sizes.values():
        raise ValueError(f"no cases: {', '.join(sizes)} are empty, so there is nothing to score.")


def _levels(gold: Iterable[Any], *predictions: Iterable[Any]) -> dict[str, _Level]:
    names = ["gold", "predicted"] if len(predictions) == 1 else ["gold", "a", "b"]
    columns = {
        name: _codes(x, name, nil=name != "gold")
        for name, x in zip(names, (gold, *predictions), strict=True)
    }
    _same_length(**columns)
    levels = {}
    for level, up in LEVELS.items():
        of = {code: up(code) for code in set().union(*columns.values()) if code is not None}
        labels = sorted(set(of.values()))
        position = {label: i for i, label in enumerate(labels)}
        index = {code: position[label] for code, label in of.items()}
        first, *rest = (
            np.array([index.get(code, -1) for code in column]) for column in columns.values()
        )
        levels[level] = _Level(labels, first, tuple(rest))
    return levels


def _f1(support: Array, named: Array, hits: Array) -> Array:
    return 2 * hits / np.maximum(support + named, 1)


def _units(patients: Sequence[Any] | None, n: int) -> Array:
    ids = list(range(n) if patients is None else patients)
    _same_length(gold=range(n), patients=ids)
    missing = next((i for i, p in enumerate(ids) if str(p) in ("None", "nan", "<NA>", "NaT")), None)
    if missing is not None:
        raise ValueError(
            f"patients, row {missing}: no id ({ids[missing]}). Every case needs its subject_id."
        )
    number = {patient: i for i, patient in enumerate(dict.fromkeys(ids))}
    return np.array([number[patient] for patient in ids])


def _resample(x: _Level, masks: Array, units: Array, n_boot: int, seed: int) -> Array:
    """Statistics of each resample of patients as deviations from their mean: (models, masks + 1, n_boot).

    They are macro-F1 over each mask of classes (masks, classes), then accuracy. A resample is a column of weights over
    patients, so one sparse product gives the counts of all classes in a whole chunk of resamples.
    """
    if n_boot < 0:
        raise ValueError(
            f"n_boot is {n_boot}: give the number of resamples, 1000 as a rule, or 0 for no intervals."
        )
    n, rows, models = int(units.max()) + 1, np.unique(x.gold), len(x.predicted)
    if n < 2 or n_boot == 0:  # nothing to resample: no interval
        return np.full((models, len(masks) + 1, 1), np.nan)

    def table(classes: Array, keep: Array) -> sparse.csr_matrix:  # cases for each class and patient
        ones = np.ones(keep.sum(), np.float32)
        return sparse.csr_matrix((ones, (classes[keep], units[keep])), shape=(len(x.labels), n))

    support = table(x.gold, x.gold >= 0)
    totals, hits = (
        [support + table(p, p >= 0) for p in x.predicted],
        [table(x.gold, x.gold == p) for p in x.predicted],
    )
    stacked = sparse.vstack([t[rows] for t in (support, *totals, *hits)]).tocsr()
    mask, half = masks[:, rows].astype(np.float32), (np.arange(n) < n // 2).astype(np.float32)
    rng, draws = np.random.default_rng(seed), []
    for start in range(0, n_boot, _CHUNK):
        size = min(_CHUNK, n_boot - start)
        weights = np.ascontiguousarray(rng.permuted(np.tile(half, (size, 1)), axis=1).T)
        s, *counts = (stacked @ weights).reshape(-1, len(rows), size)
        pairs = zip(counts[:models], counts[models:], strict=True)
        with np.errstate(invalid="ignore"):  # 0 / 0: no class of the mask is in this resample
            draws.append(
                np.stack(
                    [
                        np.vstack(
                            [
                                mask @ (2 * h / np.maximum(t, 1)) / (mask @ (s > 0)),
                                h.sum(0) / s.sum(0),
                            ]
                        )
                        for t, h in pairs
                    ]
                )
            )
    values = np.concatenate(draws, axis=-1).astype(float)
    mean = np.nansum(values, -1, keepdims=True) / np.maximum(
        (~np.isnan(values)).sum(-1, keepdims=True), 1
    )
    return np.sqrt((n // 2) / (n - n // 2)) * (
        values - mean
    )  # the factor is 1 for an even number of patients


def _interval(point: float | None, deviations: Array, low: float = 0.0) -> list[float] | list[None]:
    """The 95 % interval around the point estimate, within [low, 1]; [None, None] where there is none."""
    if point is None or np.isnan(deviations).all():
        return [None, None]
    return [
        float(end) for end in np.clip(point + np.nanquantile(deviations, [0.025, 0.975]), low, 1)
    ]


def _mean(values: Array) -> float | None:
    return float(values.mean()) if len(values) else None


def report(
    gold: Sequence[Any],
    predicted: Sequence[Any],
    *,
    patients: Sequence[Any] | None = None,
    train_codes: Iterable[Any] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Report:
    """Scores of one model at the levels chapter, category and full, and over the hierarchy.

    `patients` (one id for each case) is what the bootstrap resamples; without it every case is a patient. Shares and scores
    lie in 0 ... 1, tree_distance counts edges. None stands for what is undefined: `f1_seen` without `train_codes`, `f1_min10`
    without a class of 10 cases, tree_distance without a usable answer, an interval from one patient. Raises ValueError for
    unequal lengths, no cases, a gold code or patient that is missing.
    Sources: hP, hR, hF of Kiritchenko et al. (Canadian AI 2006) and Silla & Freitas (DMKD 22, 2011).
    """
    levels = _levels(gold, predicted)
    n = len(levels["full"].gold)
    seen = set(_codes([] if train_codes is None else train_codes, "train_codes", nil=False))
    counts, units = {level: x.counts() for level, x in levels.items()}, _units(patients, n)
    usable = int((levels["full"].predicted[0] >= 0).sum())
    agreed = sum(int(hits.sum()) for _, _, hits in counts.values())
    out: Report = {
        "n": n,
        "usable": usable / n,
        "hp": agreed / (3 * max(usable, 1)),
        "hr": agreed / (3 * n),
        "hf": 2 * agreed / (3 * (usable + n)),
        "tree_distance": _tree_distance(levels["full"]),
    }
    for level, up in LEVELS.items():
        support, named, hits = counts[level]
        f1, in_gold, often, n_union = (
            _f1(support, named, hits),
            support > 0,
            support >= 10,
            len(support) + (usable < n),
        )
        trained = {up(code) for code in seen}
        known = in_gold & np.array([label in trained for label in levels[level].labels])
        f1_gold, f1_min10, accuracy = (
            float(f1[in_gold].mean()),
            _mean(f1[often]),
            float(hits.sum() / n),
        )
        deviations = _resample(levels[level], np.stack([in_gold, often]), units, n_boot, seed)[0]
        ci, min10_ci, accuracy_ci = map(_interval, (f1_gold, f1_min10, accuracy), deviations)
        out[level] = {
            "f1_gold": f1_gold,
            "ci": ci,
            "n_classes": int(in_gold.sum()),
            "f1_union": float(f1.sum() / n_union),
            "n_classes_union": int(n_union),
            "f1_seen": _mean(f1[known]),
            "n_classes_seen": None if train_codes is None else int(known.sum()),
            "f1_min10": f1_min10,
            "f1_min10_ci": min10_ci,
            "n_classes_min10": int(often.sum()),
            "accuracy": accuracy,
            "accuracy_ci": accuracy_ci,
            "weighted_f1": float((f1 * support).sum() / n),
            "coverage": float((named[in_gold] > 0).mean()),
            "median_support": float(np.median(support[in_gold])),
        }
    return out


def _tree_distance(full: _Level) -> float | None:
    pairs = Counter(
        (g, p)
        for g, p in zip(full.gold.tolist(), full.predicted[0].tolist(), strict=True)
        if p >= 0
    )
    edges = sum(
        k * icd.tree_distance(full.labels[g], full.labels[p]) for (g, p), k in pairs.items()
    )
    return edges / pairs.total() if pairs else None


def compare(
    gold: Sequence[Any],
    a: Sequence[Any],
    b: Sequence[Any],
    *,
    patients: Sequence[Any] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Report:
    """Model b minus model a on the same cases, per level: {"f1_gold", "ci", "p", "accuracy", "accuracy_ci", "mcnemar_p"}.

    Paired: both are scored on the same resamples of patients. `p` is two-sided for `f1_gold`: with k of B resamples whose
    difference strays from their mean at least as far as the observed one lies from zero, p = (1 + k) / (1 + B).
    `mcnemar_p` is McNemar's exact test of the accuracies, which takes cases for independent. Raises as `report` does.
    """
    levels, out = _levels(gold, a, b), {}
    units = _units(patients, len(levels["full"].gold))
    for level, x in levels.items():
        gain_f1, (d_f1, d_accuracy) = _difference(x, units, n_boot, seed)
        right_a, right_b = (x.gold == predicted for predicted in x.predicted)
        gain, ci = float(right_b.mean() - right_a.mean()), _interval(gain_f1, d_f1, low=-1.0)
        strays = int((np.abs(d_f1) >= abs(gain_f1) - 1e-6).sum())
        out[level] = {
            "f1_gold": gain_f1,
            "ci": ci,
            "p": None if ci[0] is None else (1 + strays) / (1 + len(d_f1)),
            "accuracy": gain,
            "accuracy_ci": _interval(gain, d_accuracy, low=-1.0),
            "mcnemar_p": mcnemar(right_a, right_b),
            "n_classes": int((x.counts()[0] > 0).sum()),
        }
    return out


def _difference(x: _Level, units: Array, n_boot: int, seed: int) -> tuple[float, Array]:
    """Macro-F1 of the second model minus the first's; deviations of that and of the difference in accuracy, (2, n_boot)."""
    in_gold = x.counts()[0] > 0
    f1_a, f1_b = (float(_f1(*x.counts(model))[in_gold].mean()) for model in (0, 1))
    of_a, of_b = _resample(x, in_gold[None], units, n_boot, seed)
    return f1_b - f1_a, of_b - of_a


def differences(
    gold: Sequence[Any],
    a: Sequence[Any],
    b: Sequence[Any],
    *,
    patients: Sequence[Any] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> dict[str, tuple[float, Array]]:
    """Per level: macro-F1 (`f1_gold`) of b minus a, and its deviations [n_boot] under resampling of patients, as in `compare`.

    The same `seed` draws the same patients, so that several pairs of models can be averaged resample by resample.
    """
    levels = _levels(gold, a, b)
    units = _units(patients, len(levels["full"].gold))
    found = {level: _difference(x, units, n_boot, seed) for level, x in levels.items()}
    return {level: (gain, deviations[0]) for level, (gain, deviations) in found.items()}


def mcnemar(right_a: Sequence[bool], right_b: Sequence[bool]) -> float:
    """McNemar's exact two-sided p-value from two models' correctness on the same cases (Psychometrika 12, 1947)."""
    _same_length(right_a=right_a, right_b=right_b)
    a, b = np.asarray(right_a, bool), np.asarray(right_b, bool)
    only_a, only_b = int((a & ~b).sum()), int((b & ~a).sum())
    return float(min(1.0, 2 * bdtr(min(only_a, only_b), only_a + only_b, 0.5)))


def per_class(gold: Sequence[Any], predicted: Sequence[Any], level: str = "full") -> list[Report]:
    """One row for each class that is gold or predicted: class, support, predicted, precision, recall, f1 (0 / 0 is 0)."""
    _up(level)
    x = _levels(gold, predicted)[level]
    rows = zip(x.labels, *(column.tolist() for column in x.counts()), strict=True)
    return [
        {
            "class": label,
            "support": s,
            "predicted": p,
            "precision": h / max(p, 1),
            "recall": h / max(s, 1),
            "f1": 2 * h / (s + p),
        }
        for label, s, p, h in rows
    ]


def head_middle_tail(
    gold: Sequence[Any],
    predicted: Sequence[Any],
    train_codes: Iterable[Any],
    *,
    level: str = "full",
    patients: Sequence[Any] | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Report:
    """Macro-F1 and accuracy by how often a class was seen in training: head, middle, tail, unseen.

    Classes are ranked by training frequency; a class belongs to the third of the cumulative training mass that the more
    frequent classes reach, so equally frequent classes stay together. F1 counts the false positives of all cases.
    Each band: {"f1_gold", "ci", "accuracy", "n_classes", "n_cases"}, with None where the band is empty.
    """
    up, x = _up(level), _levels(gold, predicted)[level]
    train = Counter(up(code) for code in _codes(train_codes, "train_codes", nil=False))
    before = {k: sum(v for v in train.values() if v > k) for k in set(train.values())}
    band = np.array([3 * before[train[c]] // train.total() if c in train else 3 for c in x.labels])
    support, named, hits = x.counts()
    masks = np.stack([(support > 0) & (band == i) for i in range(4)])
    deviations = _resample(x, masks, _units(patients, len(x.gold)), n_boot, seed)[0]
    out = {}
    for name, mask, spread in zip(
        ("head", "middle", "tail", "unseen"), masks, deviations, strict=False
    ):
        n, f1 = int(support[mask].sum()), _mean(_f1(support, named, hits)[mask])
        out[name] = {
            "f1_gold": f1,
            "ci": _interval(f1, spread),
            "accuracy": float(hits[mask].sum() / n) if n else None,
            "n_classes": int(mask.sum()),
            "n_cases": n,
        }
    return out


def _samples(samples: Iterable[Sequence[Any]]) -> list[list[str | None]]:
    cases = [_codes(case, f"samples, case {i}") for i, case in enumerate(samples)]
    if [] in cases:
        raise ValueError(
            f"samples, case {cases.index([])}: no samples. Every case needs at least one, None if unusable."
        )
    return cases


def majority_vote(samples: Iterable[Sequence[Any]]) -> list[str | None]:
    """For each case the most frequent usable code of its samples (the earlier one in a tie); None if none is usable.

    Source: self-consistency, Wang et al. (ICLR 2023).
    """
    votes = [Counter(code for code in case if code is not None) for case in _samples(samples)]
    return [count.most_common(1)[0][0] if count else None for count in votes]


def agreement(samples: Iterable[Sequence[Any]], level: str = "full") -> list[float]:
    """For each case the share of its samples that agree with the majority vote at a level; unusable ones do not."""
    cases, up = _samples(samples), _up(level)
    return [
        sum(vote is not None and up(code) == up(vote) for code in case) / len(case)
        for case, vote in zip(cases, majority_vote(cases), strict=True)
    ]


def pass_at_k(
    gold: Sequence[Any], samples: Sequence[Sequence[Any]], k: int, level: str = "full"
) -> float:
    """The chance that one of k samples is right: the mean of 1 - C(n - c, k) / C(n, k) with c of n samples right.

    Raises ValueError where a case has fewer than k samples. Source: Chen et al. (arXiv 2107.03374, section 2.1).
    """
    truth, cases, up = _codes(gold, "gold", nil=False), _samples(samples), _up(level)
    _same_length(gold=truth, samples=cases)
    short = next((i for i, case in enumerate(cases) if not 1 <= k <= len(case)), None)
    if short is not None:
        raise ValueError(
            f"pass@{k}: case {short} has {len(cases[short])} samples. Take k between 1 and that number."
        )
    right = [
        (sum(up(code) == up(g) for code in case), len(case))
        for g, case in zip(truth, cases, strict=True)
    ]
    return float(np.mean([1 - comb(n - c, k) / comb(n, k) for c, n in right]))


def reliability(confidence: Sequence[float], correct: Sequence[bool], bins: int = 10) -> Report:
    """Reliability curve over equal-width bins, and expected calibration error (Guo et al., ICML 2017).

    {"confidence", "accuracy", "n": one entry for each bin that is not empty, "ece": sum of n_bin / n |accuracy - confidence|}.
    Raises ValueError where a confidence is missing or outside 0 ... 1.
    """
    _same_length(confidence=confidence, correct=correct)
    conf, right = np.asarray(confidence, float), np.asarray(correct, float)
    bad = np.flatnonzero(~((conf >= 0) & (conf <= 1)))
    if len(bad):
        raise ValueError(f"confidence, row {bad[0]}: {conf[bad[0]]} is not within 0 ... 1.")
    place = np.minimum((conf * bins).astype(int), bins - 1)
    n = np.bincount(place, minlength=bins)
    means = [np.bincount(place, column, bins)[n > 0] / n[n > 0] for column in (conf, right)]
    ece = float((n[n > 0] * np.abs(means[1] - means[0])).sum() / len(conf))
    return {
        "confidence": means[0].tolist(),
        "accuracy": means[1].tolist(),
        "n": n[n > 0].tolist(),
        "ece": ece,
    }


def align(
    cases: pd.DataFrame, predictions: pd.DataFrame
) -> tuple[list[str], list[list[str | None]], list[int]]:
    """(gold, samples, patients) in the order of `cases`, joined by hadm_id; the samples of a case by their number.

    `cases` has hadm_id, subject_id, code; `predictions` has hadm_id, predicted and, for k samples, sample. Raises
    ValueError for a missing column, an unknown or repeated admission and a case without a prediction.
    """
    tables = {
        "cases": (cases, ["hadm_id", "subject_id", "code"]),
        "predictions": (predictions, ["hadm_id", "predicted"]),
    }
    for name, (table, columns) in tables.items():
        if not set(columns) <= set(table):
            raise ValueError(f"{name}: a column of {columns} is missing (found: {list(table)}).")
    key = [column for column in ("hadm_id", "sample") if column in predictions]
    known, answered = cases["hadm_id"], predictions["hadm_id"]
    for what, found in {
        "admissions occur twice in cases": known[known.duplicated()],
        f"rows of predictions repeat {' and '.join(key)}": answered[predictions.duplicated(key)],
        "predictions are for admissions that are not in cases": answered[~answered.isin(known)],
        "cases have no prediction": known[~known.isin(answered)],
    }.items():
        if len(found):
            raise ValueError(
                f"{len(found)} {what}, first hadm_id {found.iloc[0]}. Score a model on the very cases it answered."
            )
    answers = (
        predictions.sort_values(key, kind="stable").groupby("hadm_id")["predicted"].apply(list)
    )
    return (
        list(cases["code"]),
        [_codes(answers[hadm], "predicted") for hadm in known],
        list(cases["subject_id"]),
    )
