"""Metrics: how fast the bootstrap is, and how often its intervals hold the truth. Run: python -m
benchmarks.metrics

Speed: three levels, 1,000 resamples, 10,000 predictions, 2,000 codes, against a loop over
scikit-learn's f1_score (timed on a few resamples and scaled up). Coverage: simulated test sets of a
long-tailed hospital; the truth is the mean over many.
"""

from __future__ import annotations

import argparse
import time

import numpy as np
import simple_icd_10_cm as cm
from sklearn.metrics import f1_score

from helpers import icd, metrics


def hospital(
    rng: np.random.Generator, patients: int, codes: list[str], skill: np.ndarray
) -> tuple[list, list, np.ndarray]:
    """Gold codes, predicted codes and patients: frequencies by Zipf's law, patients come back,
    often with the same code."""
    share = 1 / np.arange(1, len(codes) + 1)
    share /= share.sum()
    unit = np.repeat(np.arange(patients), 1 + rng.poisson(0.5, patients))
    usual, other = (
        rng.choice(len(codes), patients, p=share),
        rng.choice(len(codes), len(unit), p=share),
    )
    gold = np.where(rng.random(len(unit)) < 0.4, usual[unit], other)
    predicted = np.where(
        rng.random(len(unit)) < skill[gold], gold, rng.choice(len(codes), len(unit), p=share)
    )
    return [codes[i] for i in gold], [codes[i] for i in predicted], unit


def speed(codes: list[str], n: int = 10_000, timed: int = 3) -> None:
    rng = np.random.default_rng(0)
    gold, predicted, unit = (x[:n] for x in hospital(rng, n, codes, np.full(len(codes), 0.5)))
    gold[: len(codes)] = codes  # every code occurs
    metrics.report(gold, predicted, n_boot=0)  # loads the library of codes
    start = time.perf_counter()
    metrics.report(gold, predicted, patients=unit)
    own = time.perf_counter() - start
    start = time.perf_counter()
    for up in (icd.chapter, icd.category, icd.normalise):
        g, p = np.array([str(up(c)) for c in gold]), np.array([str(up(c)) for c in predicted])
        for _ in range(timed):
            rows = rng.integers(0, n, n)
            f1_score(g[rows], p[rows], labels=np.unique(g[rows]), average="macro", zero_division=0)
    loop = (time.perf_counter() - start) * 1000 / timed
    print(f"1,000 resamples, {n:,} predictions, {len(set(gold)):,} codes, 3 levels\n")
    print(f"| | seconds |\n|---|---|\n| metrics.report | {own:.2f} |")
    print(
        f"| loop over scikit-learn (from {timed} resamples) | {loop:.0f} |\n"
        f"| ratio | {loop / own:.0f} |\n"
    )


def ordinary(gold: list, predicted: list, unit: np.ndarray, n_boot: int, fixed: bool) -> np.ndarray:
    """Macro-F1 of full codes in resamples with replacement, over all gold classes or over those
    present in the resample."""
    labels = sorted({*gold, *predicted})
    truth, named = np.searchsorted(labels, gold), np.searchsorted(labels, predicted)
    in_gold = np.bincount(truth, minlength=len(labels)) > 0
    rng = np.random.default_rng(0)
    patients = int(unit.max()) + 1
    scores = []
    for _ in range(n_boot):
        drawn = rng.integers(0, patients, patients)
        weight = np.bincount(drawn, minlength=patients)[unit]
        support = np.bincount(truth, weight, len(labels))
        claimed = np.bincount(named, weight, len(labels))
        hits = np.bincount(truth, weight * (truth == named), len(labels))
        f1 = 2 * hits / np.maximum(support + claimed, 1)
        scores.append(f1[in_gold if fixed else support > 0].mean())
    return np.array(scores)


def coverage(codes: list[str], simulations: int, n_boot: int = 300) -> None:
    print(
        "Share of 95 % intervals of macro-F1 (full code) that hold the expected score, and their "
        "mean width"
    )
    print(f"({simulations} simulated test sets, {n_boot} resamples each)\n")
    print(
        "| codes | patients | half-sample | ordinary, centred | ordinary, percentile | fixed "
        "classes, percentile | widths |"
    )
    print("|---|---|---|---|---|---|---|")
    for k, patients in ((20, 300), (250, 400), (250, 1000), (1000, 700), (2000, 3000)):
        rng = np.random.default_rng(k + patients)
        chosen = [codes[i] for i in rng.permutation(len(codes))[:k]]
        skill = rng.beta(3, 2, k)
        draws = (hospital(rng, patients, chosen, skill)[:2] for _ in range(400))
        truth = np.mean([metrics.report(*draw, n_boot=0)["full"]["f1_gold"] for draw in draws])
        hits, widths = np.zeros(4), np.zeros(4)
        for _ in range(simulations):
            gold, predicted, unit = hospital(rng, patients, chosen, skill)
            r = metrics.report(gold, predicted, patients=unit, n_boot=n_boot)["full"]
            present, fixed = (ordinary(gold, predicted, unit, n_boot, x) for x in (False, True))
            plain, trap = (np.quantile(x, [0.025, 0.975]) for x in (present, fixed))
            intervals = [r["ci"], plain - present.mean() + r["f1_gold"], plain, trap]
            hits += [low <= truth <= high for low, high in intervals]
            widths += [high - low for low, high in intervals]
        shares, spans = (
            " | ".join(f"{x:.2f}" for x in hits / simulations),
            ", ".join(f"{x:.3f}" for x in widths / simulations),
        )
        print(f"| {k} | {patients} | {shares} | {spans} |", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument(
        "--simulations",
        type=int,
        default=200,
        help="simulated test sets for each row of the coverage table",
    )
    library = [c for c in cm.get_all_codes(False) if len(c) > 4 and "-" not in c]
    speed(library[::30][:2000])
    coverage(library, parser.parse_args().simulations)
