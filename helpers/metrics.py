"""Gold and predicted codes in, hierarchical report out. Formulas, sources and worked examples:
docs/metrics.md.

An unusable answer (None, NaN, whatever has not the shape of a code) is NIL at every level: a false
negative for the gold class, and no class of its own except in `f1_union`. Codes are judged by
shape, so codes of no dictionary are scored like any other; whoever demands valid codes passes None
for the rest.

Every interval (95 %) of the course comes from one half-sample bootstrap over patients, `_Halves`:
each resample is a random half of them, without replacement, and macro-F1 is averaged over the gold
classes present in it. The deviations of the resamples from their own mean are laid around the point
estimate; halves need no rescaling (Shao & Wu, Annals of Statistics 17, 1989). The ordinary
bootstrap repeats the lone cases of rare codes where a new sample would lose them, and so
understates the spread: `python -m benchmarks.metrics` shows it.

`outcomes` and `chapter_differences` make the tidy tables that notebook 6 draws; `**boot` is n_boot
and seed.

Taught in notebook 6.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from scipy import sparse

from helpers import icd

Array = np.ndarray
Report = dict[str, Any]
Codes = Iterable[Any]  # whatever icd.normalise takes
LEVELS = {"chapter": icd.chapter, "category": icd.category, "full": icd.normalise}
KINDS = ["full", "category", "chapter", "wrong", "unusable"]  # the deepest level that is right
CHUNK = 128  # resamples at a time: the largest array holds this many numbers for each class


def report(
    gold: Codes,
    predicted: Codes,
    *,
    patients: Sequence[Any] | None = None,
    train_codes: Codes | None = None,
    n_boot: int = 1000,
    seed: int = 0,
) -> Report:
    """Scores of one model at the levels chapter, category and full, and over the hierarchy.

    `patients` (one id for each case) is what the bootstrap resamples; without it every case is a
    patient. Shares and scores lie in 0 ... 1, tree_distance counts edges. None stands for what is
    undefined: `f1_seen` without `train_codes`, `f1_min10` without a class of 10 cases,
    tree_distance without a usable answer, an interval from one patient. Raises ValueError for
    unequal lengths, no cases, a gold code or patient that is missing. Sources: hP, hR, hF of
    Kiritchenko et al. (Canadian AI 2006) and Silla & Freitas (DMKD 22, 2011).
    """
    levels = _levels(gold, predicted=predicted)
    full = levels["full"]
    n = len(full.gold)
    halves = _halves(n, patients, n_boot, seed)
    trained = None if train_codes is None else _codes(train_codes, "train_codes", nil=False)
    usable = int((full.predicted[0] >= 0).sum())
    agreed = sum(int((x.gold == x.predicted[0]).sum()) for x in levels.values())
    pairs = zip(full.gold, full.predicted[0], strict=True)
    edges = [icd.tree_distance(full.labels[g], full.labels[p]) for g, p in pairs if p >= 0]
    scores = {
        "n": n,
        "usable": usable / n,
        "hp": agreed / (3 * max(usable, 1)),
        "hr": agreed / (3 * n),
        "hf": 2 * agreed / (3 * (usable + n)),
        "tree_distance": sum(edges) / usable if usable else None,
    }
    for level, x in levels.items():
        classes = None if trained is None else {LEVELS[level](code) for code in trained}
        scores[level] = _scores(x, classes, halves)
    return scores


def _scores(x: _Level, trained: set[Any] | None, halves: _Halves) -> Report:
    """The part of the report for one level; `trained`: the classes that training showed."""
    support, named, _ = x.counts()
    f1 = _f1(x)
    in_gold = support > 0
    often = support >= 10
    seen = in_gold & np.array([label in (trained or ()) for label in x.labels])
    n_union = len(x.labels) + (x.predicted[0] < 0).any()
    ((f1_gold, f1_min10, accuracy),), (strays,) = _macro_f1(x, np.stack([in_gold, often]), halves)
    return _plain(
        f1_gold=f1_gold,
        ci=_interval(f1_gold, strays[0]),
        n_classes=in_gold.sum(),
        f1_union=f1.sum() / n_union,
        n_classes_union=n_union,
        f1_seen=f1[seen].mean() if seen.any() else None,
        n_classes_seen=None if trained is None else seen.sum(),
        f1_min10=f1_min10,
        f1_min10_ci=_interval(f1_min10, strays[1]),
        n_classes_min10=often.sum(),
        accuracy=accuracy,
        accuracy_ci=_interval(accuracy, strays[2]),
        weighted_f1=(f1 * support).sum() / len(x.gold),
        coverage=(named[in_gold] > 0).mean(),
        median_support=np.median(support[in_gold]),
    )


def macro_f1(gold: Sequence[Any], predicted: Sequence[Any]) -> float:
    """Mean F1 over the classes of `gold`, by hand: the `f1_gold` of `report`, for any two lists of
    classes."""
    scores = []
    for label in set(gold):
        hits = sum(g == p == label for g, p in zip(gold, predicted, strict=True))
        support = list(gold).count(label)
        named = list(predicted).count(label)
        scores.append(2 * hits / (support + named))
    return sum(scores) / len(scores)


def compare(gold: Codes, a: Codes, b: Codes, **resampling: Any) -> Report:
    """Model b minus model a on the same cases, per level: f1_gold, ci, p, accuracy, accuracy_ci,
    mcnemar_p.

    Paired: both are scored on the same resamples of patients. `p` is two-sided for `f1_gold`: with
    k of B resamples whose difference strays from their mean at least as far as the observed one
    lies from zero, p = (1 + k) / (1 + B). `mcnemar_p` is McNemar's exact test of the accuracies,
    which takes cases for independent. resampling: patients, n_boot and seed, as in `report`; raises
    as that does.
    """
    contrasts = {}
    for level, x, (f1, accuracy), strays in _paired(gold, a, b, **resampling):
        ci = _interval(f1, strays[0], low=-1.0)
        farther = (np.abs(strays[0]) >= abs(f1) - 1e-6).sum()
        contrasts[level] = _plain(
            f1_gold=f1,
            ci=ci,
            p=None if np.isnan(ci[0]) else (1 + farther) / (1 + len(strays[0])),
            accuracy=accuracy,
            accuracy_ci=_interval(accuracy, strays[1], low=-1.0),
            mcnemar_p=mcnemar(*(x.gold == predicted for predicted in x.predicted)),
            n_classes=len(np.unique(x.gold)),
        )
    return contrasts


def differences(
    gold: Codes, a: Codes, b: Codes, **resampling: Any
) -> dict[str, tuple[float, Array]]:
    """Per level: macro-F1 of b minus a, and its deviations [n_boot] in the resamples, as in
    `compare`, with the same options.

    The same `seed` draws the same patients, so several pairs of models can be averaged resample by
    resample.
    """
    rows = _paired(gold, a, b, **resampling)
    return {level: (float(gain[0]), strays[0]) for level, _, gain, strays in rows}


def _paired(
    gold: Codes, a: Codes, b: Codes, **resampling: Any
) -> Iterator[tuple[str, _Level, Array, Array]]:
    """For each level macro-F1 and accuracy, b minus a: (2,), and their deviations: (2, n_boot)."""
    levels = _levels(gold, a=a, b=b)
    halves = _halves(len(levels["full"].gold), **resampling)
    for level, x in levels.items():
        points, strays = _macro_f1(x, (x.counts()[0] > 0)[None], halves)
        yield level, x, points[1] - points[0], strays[1] - strays[0]


def mcnemar(right_a: Sequence[bool], right_b: Sequence[bool]) -> float:
    """McNemar's exact two-sided p-value from two models' correctness on the same cases
    (Psychometrika 12, 1947)."""
    from scipy.stats import binomtest

    _same_length(right_a=right_a, right_b=right_b)
    a = np.asarray(right_a, bool)
    b = np.asarray(right_b, bool)
    only_one = (a != b).sum()
    return float(binomtest((a > b).sum(), only_one).pvalue) if only_one else 1.0


def mean_interval(
    values: Sequence[float], patients: Sequence[Any] | None = None, **boot: int
) -> Array:
    """The 95 % interval [low, high] of a mean over cases (right or wrong, rewards ...); NaN from
    one patient.

    Raises ValueError for unequal lengths and for no values.
    """
    numbers = np.asarray(values, float)
    halves = _halves(len(numbers), patients, **boot)
    sums = np.bincount(halves.units, numbers)
    cases = np.bincount(halves.units)
    deviations = halves.deviations(lambda weights: sums @ weights / (cases @ weights))
    return _interval(numbers.mean(), deviations, numbers.min(), numbers.max())


def half_samples(patients: int, resamples: int, rng: np.random.Generator) -> Array:
    """Weights [patients, resamples]: 1 for a random half of the patients in each resample, else
    0."""
    half = (np.arange(patients) < patients // 2).astype(np.float32)
    drawn = rng.permuted(np.tile(half, (resamples, 1)), axis=1)
    return np.ascontiguousarray(drawn.T)


def head_middle_tail(
    gold: Codes,
    predicted: Codes,
    train_codes: Codes,
    **resampling: Any,
) -> Report:
    """Macro-F1 and accuracy of full codes by how often they were seen in training: head, middle,
    tail, unseen.

    Classes are ranked by training frequency; a class belongs to the third of the cumulative
    training mass that the more frequent classes reach, so equally frequent classes stay together.
    F1 counts the false positives of all cases. Each band: {"f1_gold", "ci", "accuracy",
    "n_classes", "n_cases"}, with None where it is empty. resampling: patients, n_boot and seed, as
    in `report`.
    """
    x = _levels(gold, predicted=predicted)["full"]
    train = Counter(_codes(train_codes, "train_codes", nil=False))
    ahead = {k: sum(v for v in train.values() if v > k) for k in set(train.values())}
    third = [3 * ahead[train[c]] // train.total() if c in train else 3 for c in x.labels]
    support, _, hits = x.counts()
    masks = (support > 0) & (np.arange(4)[:, None] == third)
    (points,), (strays,) = _macro_f1(x, masks, _halves(len(x.gold), **resampling))
    bands = {}
    for i, name in enumerate(["head", "middle", "tail", "unseen"]):
        n = support[masks[i]].sum()
        bands[name] = _plain(
            f1_gold=points[i],
            ci=_interval(points[i], strays[i]),
            accuracy=hits[masks[i]].sum() / n if n else None,
            n_classes=masks[i].sum(),
            n_cases=n,
        )
    return bands


def align(
    cases: pd.DataFrame, predictions: pd.DataFrame
) -> tuple[list[str], list[list[str | None]], list[int]]:
    """(gold, samples, patients) in the order of `cases`, joined by hadm_id; the samples of a case
    by their number.

    `cases` has hadm_id, subject_id, code; `predictions` has hadm_id, predicted and, for k samples,
    sample. Raises ValueError for a missing column, an unknown or repeated admission and a case
    without a prediction.
    """
    for name, table, columns in [
        ("cases", cases, {"hadm_id", "subject_id", "code"}),
        ("predictions", predictions, {"hadm_id", "predicted"}),
    ]:
        if not columns <= set(table):
            raise ValueError(f"{name}: a column of {columns} is missing (found: {list(table)}).")
    key = [column for column in ("hadm_id", "sample") if column in predictions]
    known = cases["hadm_id"]
    answered = predictions["hadm_id"]
    faults = {
        "admissions occur twice in cases": known[known.duplicated()],
        f"rows of predictions repeat {' and '.join(key)}": answered[predictions.duplicated(key)],
        "predictions are for admissions that are not in cases": answered[~answered.isin(known)],
        "cases have no prediction": known[~known.isin(answered)],
    }
    for fault, ids in faults.items():
        if len(ids):
            raise ValueError(
                f"{len(ids)} {fault}, first hadm_id {ids.iloc[0]}. Score a model on the very "
                "cases it answered."
            )
    rows = predictions.sort_values(key, kind="stable").groupby("hadm_id")["predicted"]
    answers = rows.apply(list)
    samples = [_codes(answers[hadm_id], "predicted") for hadm_id in known]
    return list(cases["code"]), samples, list(cases["subject_id"])


# ------------------------------------------------------------------------------- tidy tables


def outcomes(cases: pd.DataFrame, predictions: pd.DataFrame) -> pd.DataFrame:
    """The first sample of each predicted case beside its gold code: subject_id, hadm_id, gold,
    predicted, kind.

    `predicted` is None where the answer is unusable; `kind` is one of KINDS. Raises ValueError
    where the two tables share no case.
    """
    first = predictions[predictions["sample"] == 0] if "sample" in predictions else predictions
    first = first.drop_duplicates("hadm_id")[["hadm_id", "predicted"]]
    table = cases[["subject_id", "hadm_id", "code"]].merge(first, on="hadm_id")
    if table.empty:
        raise ValueError(
            "outcomes: cases and predictions share no hadm_id. Take both from the same run folder."
        )
    table = table.rename(columns={"code": "gold"})
    codes = [icd.normalise(code) for code in table["predicted"]]
    kinds = [
        "unusable" if code is None else icd.deepest_shared(gold, code) or "wrong"
        for gold, code in zip(table["gold"], codes, strict=True)
    ]
    return table.assign(predicted=pd.Series(codes, table.index, object), kind=kinds)


def chapter_differences(before: pd.DataFrame, after: pd.DataFrame, **boot: int) -> pd.DataFrame:
    """Full-code macro-F1 by chapter in two models' `outcomes`, and the paired difference with its
    interval.

    Columns chapter, cases, before, after, difference, low, high, on the cases that both answered. A
    chapter of fewer than 10 cases has no interval: there is no telling.
    """
    both = before.merge(after[["hadm_id", "predicted"]], on="hadm_id", suffixes=("", "_after"))
    x = _levels(both["gold"], a=both["predicted"], b=both["predicted_after"])["full"]
    chapter_of = np.array([icd.chapter(code) for code in x.labels])
    chapters = np.unique(chapter_of[x.gold])
    support = x.counts()[0]
    masks = (support > 0) & (chapters[:, None] == chapter_of)
    points, strays = _macro_f1(x, masks, _halves(len(both), both["subject_id"], **boot))
    gains = points[1] - points[0]
    rows = []
    for i, chapter in enumerate(chapters):
        cases = support[masks[i]].sum()
        interval = np.full(2, np.nan)
        if cases >= 10:
            interval = _interval(gains[i], strays[1, i] - strays[0, i], low=-1.0)
        rows.append([chapter, cases, *points[:, i], gains[i], *interval])
    columns = ["chapter", "cases", "before", "after", "difference", "low", "high"]
    return pd.DataFrame(rows, columns=columns)


# ------------------------------------------------------------------------------- the engine


@dataclass(frozen=True)
class _Level:
    """One level of the hierarchy: its classes, and for each case the index of its class (-1 is
    NIL)."""

    labels: list[Any]
    gold: Array
    predicted: list[Array]  # one for each model

    def counts(self, model: int = 0) -> list[Array]:
        """Support, number of predictions and true positives of each class."""
        named = self.predicted[model]
        columns = self.gold, named[named >= 0], self.gold[self.gold == named]
        return [np.bincount(column, minlength=len(self.labels)) for column in columns]


@dataclass(frozen=True)
class _Halves:
    """The one bootstrap: random halves of the patients. `units` holds the patient of each case,
    from 0."""

    units: Array
    n_boot: int
    seed: int

    @np.errstate(invalid="ignore")  # 0 / 0: none of the cases in question is in a half
    def deviations(self, statistic: Callable[[Array], Array]) -> Array:
        """A statistic in each half as its deviation from the mean over all: [..., n_boot]; NaN from
        one patient.

        `statistic` maps weights [patients, resamples], 1 for the patients in the half, to values
        [..., resamples].
        """
        n = int(self.units.max()) + 1
        if n < 2 or self.n_boot == 0:
            return np.full_like(statistic(np.ones((n, 1))), np.nan)
        rng = np.random.default_rng(self.seed)
        chunks = []
        for start in range(0, self.n_boot, CHUNK):
            size = min(CHUNK, self.n_boot - start)
            chunks.append(statistic(half_samples(n, size, rng)))
        values = np.concatenate(chunks, axis=-1).astype(float)
        defined = (~np.isnan(values)).sum(-1, keepdims=True)
        mean = np.nansum(values, -1, keepdims=True) / np.maximum(defined, 1)
        scale = np.sqrt((n // 2) / (n - n // 2))  # 1 for an even number of patients
        return scale * (values - mean)


def _macro_f1(x: _Level, masks: Array, halves: _Halves) -> tuple[Array, Array]:
    """Each model's macro-F1 over each mask of classes, then its accuracy: (models, masks + 1); NaN
    for an empty mask.

    Second, the deviations of these in the halves: (models, masks + 1, n_boot). Cases are counted in
    sparse tables of gold class and patient: one product with the weights counts them in a whole
    chunk of resamples.
    """
    rows = np.unique(x.gold)
    averaged = masks[:, rows].astype(np.float32)
    shape = len(x.labels), int(halves.units.max()) + 1

    def table(chosen: Array, classes: Array) -> sparse.csr_matrix:
        ones = np.ones(chosen.sum(), np.float32)
        cells = classes[chosen], halves.units[chosen]
        return sparse.csr_matrix((ones, cells), shape=shape)[rows]

    support = table(x.gold >= 0, x.gold)
    claims = [table(named >= 0, named) for named in x.predicted]
    hits = [table(x.gold == named, named) for named in x.predicted]

    def scores(weights: Array) -> Array:
        cases = support @ weights  # (gold classes, resamples)
        present = averaged @ (cases > 0)
        models = []
        for claim, hit in zip(claims, hits, strict=True):
            right = hit @ weights
            f1 = 2 * right / np.maximum(cases + claim @ weights, 1)
            models.append(np.vstack([averaged @ f1 / present, right.sum(0) / cases.sum(0)]))
        return np.stack(models)

    points = []
    for model, named in enumerate(x.predicted):
        f1 = _f1(x, model)
        means = [f1[mask].mean() if mask.any() else np.nan for mask in masks]
        points.append([*means, (x.gold == named).mean()])
    return np.array(points), halves.deviations(scores)


def _f1(x: _Level, model: int = 0) -> Array:
    support, named, hits = x.counts(model)
    return 2 * hits / np.maximum(support + named, 1)


def _interval(point: float, strays: Array, low: float = 0.0, high: float = 1.0) -> Array:
    """The 95 % interval around the point estimate, within [low, high]; NaN where there is none."""
    if np.isnan(strays).all():
        return np.full(2, np.nan)
    return np.clip(point + np.nanquantile(strays, [0.025, 0.975]), low, high)


def _plain(**numbers: Any) -> Report:
    """For JSON: numbers of Python, and None where one is not defined."""
    values = {}
    for name, number in numbers.items():
        plain = [None if each != each else each for each in np.ravel(number).tolist()]
        values[name] = plain if np.ndim(number) else plain[0]
    return values


# ------------------------------------------------------------------------------- what comes in


def _levels(gold: Codes, **predictions: Codes) -> dict[str, _Level]:
    codes = {"gold": _codes(gold, "gold", nil=False)}
    for name, predicted in predictions.items():
        codes[name] = _codes(predicted, name)
    _same_length(**codes)
    levels = {}
    for level, up in LEVELS.items():
        columns = [[up(code) for code in column] for column in codes.values()]
        labels = sorted(set().union(*columns) - {None})
        index = {label: i for i, label in enumerate(labels)}
        arrays = [np.array([index.get(label, -1) for label in column]) for column in columns]
        levels[level] = _Level(labels, arrays[0], arrays[1:])
    return levels


def _halves(
    n: int, patients: Sequence[Any] | None = None, n_boot: int = 1000, seed: int = 0
) -> _Halves:
    if n_boot < 0:
        raise ValueError(
            f"n_boot is {n_boot}: give the number of resamples, 1000 as a rule, or 0 for no "
            "intervals."
        )
    ids = pd.Series(list(range(n) if patients is None else patients))
    _same_length(gold=range(n), patients=ids)
    missing = ids.index[ids.isna()]
    if len(missing):
        raise ValueError(f"patients, row {missing[0]}: no id. Every case needs its subject_id.")
    return _Halves(pd.factorize(ids)[0], n_boot, seed)


def _codes(values: Codes, name: str, nil: bool = True) -> list[str | None]:
    if isinstance(values, str):
        raise ValueError(
            f"{name} is one string ({values!r:.20}): pass a list with one code for each case."
        )
    values = list(values)
    codes = [icd.normalise(value) for value in values]
    if not nil and None in codes:
        row = codes.index(None)
        raise ValueError(
            f"{name}, row {row}: {values[row]!r:.40} is not an ICD-10-CM code. Only predictions "
            "may be unusable: drop the case before it is scored."
        )
    return codes


def _same_length(**columns: Sequence[Any]) -> None:
    sizes = {name: len(column) for name, column in columns.items()}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"unequal lengths {sizes}: row i of each must be the same case. metrics.align joins "
            "tables by hadm_id."
        )
    if 0 in sizes.values():
        raise ValueError(f"no cases: {', '.join(sizes)} are empty, so there is nothing to score.")
