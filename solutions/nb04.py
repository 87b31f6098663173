"""Solutions of the exercises of notebook 4. Each block is what a student writes into one cell."""

# %% 4.1
my_advantages = {
    "group": [1.5, -0.5, -0.5, -0.5],  # mean 0.65, standard deviation 0.3
    "ten times": [1.5, -0.5, -0.5, -0.5],  # mean 6.5, standard deviation 3
    "flat": [0, 0, 0, 0],
}

# %% 4.2
from helpers import icd, prompts


def block_reward(completions: list, code: list[str], **columns: object) -> list[float]:
    """One number for each completion: 1, 0.4, 0.25 (block), 0.15, 0 or -0.5."""
    credit = {"category": 0.4, "block": 0.25, "chapter": 0.15}
    rewards = []
    for completion, right in zip(completions, code, strict=True):
        gold = icd.normalise(right)
        predicted = prompts.parse(completion).code
        if predicted == gold:
            rewards.append(1.0)
        elif not icd.is_valid(predicted):
            rewards.append(-0.5)
        else:
            mine, wanted = icd.ancestors(predicted), icd.ancestors(gold)
            shared = [level for level in credit if mine[level] == wanted[level]]
            rewards.append(credit[shared[0]] if shared else 0.0)
    return rewards


# %% 4.3
import numpy as np


def flat_share(p: np.ndarray, n: int) -> float:
    """The expected share of flat groups of n completions, over notes with probabilities p."""
    return np.mean(p**n + (1 - p) ** n)
