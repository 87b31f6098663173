"""The study of rewards: its arms (arms.yaml), and what was fixed before they ran.

Question: full-code macro-F1 of SFT + GRPO with the hierarchical reward, minus SFT alone. Each seed
has its own split of the patients, its own traces, SFT and GRPO; all arms answer the cases of one
hospital that nothing else sees. The arms of a sceptic spend the same labels on supervised training
instead.

`run` trains and answers, `analyse` computes, `pictures` draws. `python -m helpers.study run|show`
(`make study`). Taught in notebook 7.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from helpers import traces
from helpers.machinery import places

RESULTS = places.results_dir() / "study"
MARGIN = -0.02  # "no loss" at category and chapter: the interval lies above this
PRIMARY = ("sft", "grpo", "full")
SECONDARY = (
    ("sft", "grpo", "category"),
    ("sft", "grpo", "chapter"),
    ("sft", "grpo-strict", "full"),
    ("sft", "sft-codes", "full"),
    ("sft", "sft-own", "full"),
    ("grpo-strict", "grpo", "full"),
    ("sft-codes", "grpo", "full"),
    ("sft-own", "grpo", "full"),
)


@dataclass(frozen=True)
class Arm:
    """What an arm starts from, and what teaches it.

    start: the arm whose adapter it goes on from; None: the base. rewards: GRPO with these
    (`rewards.named`), weighted by `weights`; none: SFT. taught: what SFT sees: "traces" of half of
    the cases, the "codes" of all, or traces and the start's "own" right answers. Two arms train the
    start's adapter on the labels that GRPO spends: "samples", up to two right ones of eight
    completions a note; "labels", the true code after the start's reasoning where that led to its
    category, with the loss on the answer alone. habit: the teacher's. longer: times the steps of
    the profile. changes: other arguments of the trainer. core: one of the five main arms.
    """

    about: str
    start: str | None = None
    rewards: list[str | dict[str, Any]] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    taught: str = "traces"
    habit: float = traces.HABIT
    core: bool = True
    longer: float = 1.0
    changes: dict[str, Any] = field(default_factory=dict)


ARMS = {
    name: Arm(**record)
    for name, record in yaml.safe_load(
        Path(__file__).with_name("arms.yaml").read_text(encoding="utf-8")
    ).items()
}
