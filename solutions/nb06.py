"""Solutions of the exercises of notebook 6. Each block is what a student writes into one cell."""

# %% 6.1
# I21.4: 2 * 2 / (3 + 2) = 0.8; J18.9: 2 * 1 / (1 + 2) = 0.667; A41.9 and K92.2: 0
f1 = {"f1_gold": 1.467 / 4, "f1_union": 1.467 / 6}  # the union adds N39.0 and "no answer"

# %% 6.2
import numpy as np
import pandas as pd


def paired_interval(
    right_a: np.ndarray, right_b: np.ndarray, patients: np.ndarray
) -> tuple[float, float]:
    """95 % interval of accuracy(b) - accuracy(a), by resampling patients."""
    gain = pd.Series(np.subtract(right_b, right_a, dtype=float))
    of_patient = gain.groupby(patients).agg(["sum", "count"]).to_numpy()
    rng = np.random.default_rng(0)
    differences = []
    for _ in range(1000):
        half = rng.permutation(len(of_patient))[: len(of_patient) // 2]
        total, cases = of_patient[half].sum(axis=0)
        differences.append(total / cases)
    deviations = np.array(differences) - np.mean(differences)
    low, high = gain.mean() + np.quantile(deviations, [0.025, 0.975])
    return low, high


# %% 6.3
from collections import Counter

from helpers import icd


def where_to(gold: list[str], predicted: list[str | None], chapter: int) -> tuple[int, float]:
    """(most frequent wrong chapter, its share of all cases of this chapter)."""
    pairs = zip(gold, predicted, strict=True)
    named = [icd.chapter(answer) for code, answer in pairs if icd.chapter(code) == chapter]
    wrong = Counter(other for other in named if other not in (None, chapter))
    most = max(wrong.values())
    other = min(name for name, count in wrong.items() if count == most)
    return other, most / len(named)
