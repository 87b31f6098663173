"""Checkers of notebook 3: how many weights LoRA trains, and which tokens carry the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from exercises.core import Decoy, Trial, Verdict, checker, compare, number, try_out, verdict

LAYERS, HIDDEN, MLP, HEAD, KEY_HEADS, RANK, VOCABULARY = 4, 256, 704, 64, 2, 32, 2560


def shapes(key_heads: int = KEY_HEADS) -> dict[str, tuple[int, int]]:
    """Name -> (inputs, outputs) of the weight matrices of one layer."""
    return {
        "q": (HIDDEN, HIDDEN),
        "k": (HIDDEN, HEAD * key_heads),
        "v": (HIDDEN, HEAD * key_heads),
        "o": (HIDDEN, HIDDEN),
        "gate": (HIDDEN, MLP),
        "up": (HIDDEN, MLP),
        "down": (MLP, HIDDEN),
    }


def lora_weights(matrices: dict[str, tuple[int, int]]) -> int:
    """Weights of A [r, inputs] and B [outputs, r] for all layers."""
    return LAYERS * sum(RANK * (inputs + outputs) for inputs, outputs in matrices.values())


@checker("3.1")
def lora_by_hand(trainable: Any) -> Verdict:
    """trainable: the number of weights that LoRA trains."""
    expected = lora_weights(shapes())
    matrices = shapes()
    attention = {name: matrices[name] for name in "qkvo"}
    full = LAYERS * sum(inputs * outputs for inputs, outputs in matrices.values())
    decoys = [
        Decoy(
            lora_weights(shapes(key_heads=4)),
            "You take k and v as wide as q. Only 2 key/value heads of 64 exist here (grouped-query "
            "attention): k and v have 128 outputs.",
        ),
        Decoy(
            LAYERS * RANK * sum(inputs for inputs, _ in matrices.values()),
            "You count A only. Each matrix gets two: A reads the inputs, B writes the outputs.",
        ),
        Decoy(
            LAYERS * RANK * sum(outputs for _, outputs in matrices.values()),
            "You count B only. Each matrix gets two: A reads the inputs, B writes the outputs.",
        ),
        Decoy(expected // LAYERS, "That is one layer. There are four."),
        Decoy(lora_weights(attention), "You count attention only. all-linear means the MLP too."),
        Decoy(
            expected + RANK * (HIDDEN + VOCABULARY),
            "You count the output layer as well. all-linear leaves it out.",
        ),
        Decoy(
            lora_weights({name: shape for name, shape in matrices.items() if name != "gate"}),
            "You count two matrices in the MLP. This one has three: gate, up and down.",
        ),
        Decoy(
            full,
            "These are the frozen matrices themselves: inputs × outputs. LoRA replaces "
            "the product by a sum, r × (inputs + outputs).",
        ),
    ]
    otherwise = (
        "For one matrix with i inputs and o outputs LoRA trains r × i weights (A) and o × r (B). "
        "Sum over the seven matrices of a layer, then over the layers."
    )
    complaints = compare(
        number(trainable, "trainable"), expected, decoys, name="trainable", otherwise=otherwise
    )
    return verdict(
        complaints, f"{expected:,} of {full:,} in the same matrices: {expected / full:.0%}."
    )


# ------------------------------------------------------------------------------- 3.2


def log_softmax(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(axis=-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(axis=-1, keepdims=True))


def token_losses(logits: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """-log p of each token but the first, given those before it: [rows, length - 1]."""
    log_p = log_softmax(logits[:, :-1])
    return -np.take_along_axis(log_p, tokens[:, 1:, None], axis=-1)[..., 0]


def completion_loss(logits: np.ndarray, tokens: np.ndarray, is_completion: np.ndarray) -> float:
    """Mean of -log p over the tokens of the completions."""
    return float(token_losses(logits, tokens)[is_completion[:, 1:]].mean())


def _without_shift(logits: np.ndarray, tokens: np.ndarray, is_completion: np.ndarray) -> float:
    losses = -np.take_along_axis(log_softmax(logits), tokens[..., None], axis=-1)[..., 0]
    return float(losses[is_completion].mean())


def _mask_of_position(logits: np.ndarray, tokens: np.ndarray, is_completion: np.ndarray) -> float:
    return float(token_losses(logits, tokens)[is_completion[:, :-1]].mean())


def _all_tokens(logits: np.ndarray, tokens: np.ndarray, is_completion: np.ndarray) -> float:
    return float(token_losses(logits, tokens).mean())


def _sum(logits: np.ndarray, tokens: np.ndarray, is_completion: np.ndarray) -> float:
    return float(token_losses(logits, tokens)[is_completion[:, 1:]].sum())


def _mean_of_rows(logits: np.ndarray, tokens: np.ndarray, is_completion: np.ndarray) -> float:
    losses = token_losses(logits, tokens)
    rows = zip(losses, is_completion[:, 1:], strict=True)
    return float(np.mean([row[mask].mean() for row, mask in rows]))


def _sign(logits: np.ndarray, tokens: np.ndarray, is_completion: np.ndarray) -> float:
    return -completion_loss(logits, tokens, is_completion)


def _over_all(logits: np.ndarray, tokens: np.ndarray, is_completion: np.ndarray) -> float:
    return _sum(logits, tokens, is_completion) / tokens.size


LOSSES = (
    Decoy(
        _without_shift,
        "You compare the logits at a place with the token at the same place. The logits at place i "
        "predict the token at place i + 1.",
    ),
    Decoy(
        _mask_of_position,
        "You shift the tokens, but not is_completion. It says which token counts, so it moves "
        "with the tokens: is_completion[:, 1:]. Else the first token of the completion is lost.",
    ),
    Decoy(
        _all_tokens,
        "You count the prompt and the padding as well. Only tokens of the completion carry the "
        "loss.",
    ),
    Decoy(_sum, "That is the sum. Divide by the number of tokens of the completions."),
    Decoy(_over_all, "You divide by all tokens. Divide by the tokens of the completions."),
    Decoy(
        _mean_of_rows,
        "You average each row first. Then a token of a short completion weighs more. Take the "
        "mean over all tokens of the batch at once.",
    ),
    Decoy(_sign, "The sign: a log-probability is negative, a loss is its negative."),
)


def made_batch(seed: int, rows: int = 3, length: int = 8, vocabulary: int = 6) -> tuple:
    """Invented logits, tokens and mask: prompts of 3, completions of different lengths, padding."""
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(rows, length, vocabulary)) * 2
    tokens = rng.integers(0, vocabulary, (rows, length))
    is_completion = np.zeros((rows, length), bool)
    for row in range(rows):
        is_completion[row, 3 : 4 + row + seed % 2] = True
    return logits, tokens, is_completion


@checker("3.2")
def loss_by_hand(function: Callable) -> Verdict:
    """completion_loss(logits, tokens, is_completion) -> mean loss."""
    hint = "Log-softmax over the last axis, take the entry of the next token, keep the completion."
    batches = [made_batch(seed) for seed in range(3)]
    trials = [
        Trial(batch, completion_loss(*batch), hint, f"invented batch {i}")
        for i, batch in enumerate(batches)
    ]
    complaints = try_out(function, trials, LOSSES, most=1)
    return verdict(
        complaints,
        "This is the loss that SFTTrainer prints: a mean over the tokens of the completions, each "
        "predicted from the place before it.",
    )
