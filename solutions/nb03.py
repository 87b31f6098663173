"""Solutions of the exercises of notebook 3. Each block is what a student writes into one cell."""

# %% 3.1
r = 32
q_and_o = 2 * (256 + 256)
k_and_v = 2 * (256 + 2 * 64)
mlp = 3 * (256 + 704)
trainable = 4 * r * (q_and_o + k_and_v + mlp)

# %% 3.2
import numpy as np
from scipy.special import log_softmax


def completion_loss(logits: np.ndarray, tokens: np.ndarray, is_completion: np.ndarray) -> float:
    """Mean of -log p over the tokens of the completions."""
    log_p = log_softmax(logits[:, :-1], axis=-1)
    of_tokens = np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]
    return -of_tokens[is_completion[:, 1:]].mean()
