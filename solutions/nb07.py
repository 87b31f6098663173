"""Solutions of the exercises of notebook 7. Each block is what a student writes into one cell."""

# %% 7.1
single_seeds = {"loses more than 2 points": 1, "gains": 1}  # of the committed study

# %% 7.2
import numpy as np
from scipy import stats

from helpers.study import analyse

differences = analyse.contrast(analyse.read(), "sft", "grpo").loc["chapter", "per_seed"]
points = 100 * np.array(differences)
half = stats.t.ppf(0.975, len(points) - 1) * points.std(ddof=1) / len(points) ** 0.5
interval = (points.mean() - half, points.mean() + half)

# %% 7.3
import numpy as np


def holm(p: list[float]) -> list[float]:
    """Holm's corrected p-values, in the order of the input."""
    corrected, largest = [0.0] * len(p), 0.0
    for rank, place in enumerate(np.argsort(p, kind="stable")):
        largest = max(largest, min(1.0, p[place] * (len(p) - rank)))
        corrected[place] = largest
    return corrected
