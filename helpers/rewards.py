"""What a completion earns in GRPO: rewards in TRL's signature, and a table of their values.

The signature is `reward(completions, code, **columns) -> list[float]`. `completions` are texts
or chat messages, `code` the gold codes, `note` the admission notes, one for each completion; what
else TRL passes lands in `columns`. A value is never None: TRL would then log the whole prompt.
Settings are keyword arguments that no column of the table of cases can overwrite; `named` fixes
them. `truth_table()` holds what each reward gives for the same completions.

The course trains with DEFAULT and DEFAULT_WEIGHTS: no completion earns more than the honest right
answer, and the format (0.1) never outweighs the smallest step of the hierarchy (0.15).

>>> case = example("sibling")  # I21.02 where I21.01 is right
>>> hierarchical_reward(**case), exact_reward(**case), prefix_reward(**case), deepicd_reward(**case)
([0.4], [0.0], [0.8], [43.0])

Taught in notebook 4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from os.path import commonprefix
from pathlib import Path
from typing import Any

from helpers import grounding, icd, prompts

Reward = Callable[..., list[float]]

EXACT = 1.0
CATEGORY = 0.4  # under half: the unspecified sibling must not pay like the right code
CHAPTER = 0.15
WRONG = 0.0
UNUSABLE = -0.5  # less than wrong: an earnest guess beats giving up


def hierarchical_reward(
    completions: list,
    code: list[str],
    *,
    dictionary: set[str] | None = None,
    full_credit: float = EXACT,
    category_credit: float = CATEGORY,
    chapter_credit: float = CHAPTER,
    wrong_credit: float = WRONG,
    unusable_credit: float = UNUSABLE,
    **columns: object,
) -> list[float]:
    """The credit of the deepest level shared with the gold code, whatever the length of the codes.

    An answer without a code is unusable, and so is a code that does not exist (`icd.is_valid`).
    """
    rewards = []
    for predicted, gold in predicted_and_gold(completions, code):
        if predicted == gold:
            rewards.append(full_credit)
        elif not icd.is_valid(predicted, dictionary):
            rewards.append(unusable_credit)
        elif icd.category(predicted) == icd.category(gold):
            rewards.append(category_credit)
        elif icd.chapter(predicted) == icd.chapter(gold):
            rewards.append(chapter_credit)
        else:
            rewards.append(wrong_credit)
    return rewards


def exact_reward(completions: list, code: list[str], **columns: object) -> list[float]:
    """1 for the right full code, else 0: the strict alternative."""
    return [float(predicted == gold) for predicted, gold in predicted_and_gold(completions, code)]


def format_reward(completions: list, code: Any = None, **columns: object) -> list[float]:
    """1 if the whole completion is well-formed (`prompts.parse`), else 0."""
    return [float(prompts.parse(text_of(one)).is_well_formed) for one in completions]


def prefix_reward(completions: list, code: list[str], **columns: object) -> list[float]:
    """Longest common prefix over the length of the longer code, for comparison.

    It takes spelling for hierarchy: B34 earns nothing for A41, though both are infections. It never
    asks whether a code exists.
    """
    rewards = []
    for predicted, gold in predicted_and_gold(completions, code):
        answer = predicted or ""
        shared = len(commonprefix([answer, gold]))
        rewards.append(shared / max(len(answer), len(gold)))
    return rewards


# A match begins a line, and no tag stands inside its own kind. The quantifiers are possessive: the
# released pattern backtracks over runs of line ends.
THINK = "<think>((?:[^<]++|<(?!/?think>))*+)</think>"
DIAGNOSIS = "<diagnosis>((?:[^<]++|<(?!/?diagnosis>))*+)</diagnosis>"
RELEASED = re.compile(rf"^(?:{THINK})?\s*+{DIAGNOSIS}", re.MULTILINE)


def deepicd_reward(completions: list, code: list[str], **columns: object) -> list[float]:
    """The single-code reward of the released DeepICD-R1 job, less its judge, to compare with.

    Source: DATEXIS/DeepICD-R1, src/rewards.py. Its flaws are kept:

    - It counts leading characters: H54 earns credit for H65, of another chapter, B34 none for A41.
    - A right answer earns more the longer its code: 45 for I10, 105 for S72.001A.
    - A code that does not exist can beat a sibling: for I21.01, I2101ZZ earns 61, I21.02 43.
    - Lower case is refused, and so are 405 real codes such as C7A.010: the right answer earns 0.
    - White space counts as reasoning. Text and a second answer on the line of the first are free.
    - A completion with its own `<think>` gets a second one, and no credit for its reasoning.
    """
    pairs = zip(completions, predicted_and_gold(completions, code), strict=True)
    return [released_score(text_of(completion), gold) for completion, (_, gold) in pairs]


def released_score(completion: str, gold: str) -> float:
    """The released formula for one completion."""
    if not completion:
        return -6.0
    lines = [line.strip() for line in f"<think>{completion}".split("\n")]
    answers = RELEASED.findall("\n".join(filter(None, lines)))
    if not answers:
        return -1.0
    think, answer = answers[0]
    reward = float(think != "") - (len(answers) - 1)
    predicted = answer.strip().replace(".", "")
    shared = len(commonprefix([predicted, gold]))
    if shared == 0 or not re.fullmatch("[A-Z][0-9]{2}[A-Z0-9]{0,4}", predicted):
        return reward - 1
    if predicted == gold:
        return reward + 15 * len(gold)
    return reward + 15 * (shared / len(gold) + max(0, shared - 2))


def grounding_reward(
    completions: list, code: Any = None, note: list[str] | None = None, **columns: object
) -> list[float]:
    """How far the note states what the reasoning cites: a verifiable stand-in for a judge."""
    return [
        grounding.score(prompts.parse(text).think, admission_note)
        for text, admission_note in with_each(completions, "note", note)
    ]


REWARDS: dict[str, Reward] = {
    reward.__name__: reward
    for reward in (
        format_reward,
        hierarchical_reward,
        exact_reward,
        prefix_reward,
        deepicd_reward,
        grounding_reward,
    )
}
DEFAULT = (format_reward, hierarchical_reward)
DEFAULT_WEIGHTS = (0.1, 1.0)


def named(reward: str | dict[str, dict[str, Any]]) -> Reward:
    """A reward by its name, or by {name: settings}, with the `__name__` that TRL logs.

    Raises ValueError for an unknown name, and for a setting that the reward lacks: it would
    otherwise vanish among the columns.

    >>> named({"hierarchical_reward": {"chapter_credit": 0.0}})(**example("same chapter"))
    [0.0]
    """
    if isinstance(reward, str):
        reward = {reward: {}}
    [(name, settings)] = reward.items()
    if name not in REWARDS:
        raise ValueError(f"no reward is called {name}. Known: {', '.join(REWARDS)}.")
    known = REWARDS[name].__kwdefaults__ or {}
    if unknown := sorted(settings.keys() - known.keys()):
        raise ValueError(f"{name} has no setting {unknown}, only {sorted(known)}.")
    function = partial(REWARDS[name], **settings)
    function.__name__ = name
    return function


def total(
    completions: list,
    code: list[str],
    rewards: Sequence[Reward] = DEFAULT,
    weights: Sequence[float] = DEFAULT_WEIGHTS,
    **columns: object,
) -> list[float]:
    """The weighted sum of rewards, as TRL forms it from `reward_funcs` and `reward_weights`."""
    parts = [reward(completions=completions, code=code, **columns) for reward in rewards]
    return [
        sum(weight * value for weight, value in zip(weights, values, strict=True))
        for values in zip(*parts, strict=True)
    ]


def predicted_and_gold(completions: list, code: list[str]) -> list[tuple[str | None, str]]:
    """(predicted, gold) for each completion, both normalised; predicted is None without a code.

    Raises ValueError for a gold code that lacks the shape of one.
    """
    pairs = []
    for text, raw in with_each(completions, "code", code):
        gold = icd.normalise(raw)
        if gold is None:
            raise ValueError(
                f"gold code {raw!r} does not have the shape of an ICD-10-CM code. "
                "Drop such cases: icd.normalise gives None for them."
            )
        pairs.append((prompts.parse(text).code, gold))
    return pairs


def text_of(completion: Any) -> str:
    """The text of a completion: itself, or the content of its last message."""
    if isinstance(completion, str):
        return completion
    try:
        return completion[-1]["content"] or ""
    except (TypeError, KeyError, IndexError):
        raise ValueError(
            f"a completion must be text or messages, not {type(completion).__name__}."
        ) from None


def with_each(completions: list, column: str, values: Any) -> list[tuple[str, str]]:
    """(its text, its value) for each completion. Raises ValueError unless `values` is a list with
    one text for each."""
    if (
        values is None
        or isinstance(values, str)
        or len(values) != len(completions)
        or not all(isinstance(value, str) for value in values)
    ):
        raise ValueError(
            f"`{column}` must be a list with one text for each of the {len(completions)} "
            f"completions. In training keep the column '{column}' in the data set; else put [...] "
            "around it."
        )
    return [(text_of(one), value) for one, value in zip(completions, values, strict=True)]


@lru_cache(maxsize=1)
def truth_table() -> tuple[dict, ...]:
    """Rows of name, why, gold, note, completion and expect ({reward: value})."""
    import yaml

    path = Path(__file__).with_name("rewards_truth_table.yaml")
    table = yaml.safe_load(path.read_bytes())
    shared = {"gold": table["gold"], "note": table["note"]}
    return tuple(
        {**shared, **row, "expect": dict(zip(table["rewards"], row["expect"], strict=True))}
        for row in table["rows"]
    )


def example(name: str) -> dict[str, list[str]]:
    """The arguments completions, code and note that make one row of the truth table."""
    row = next(row for row in truth_table() if row["name"] == name)
    return {"completions": [row["completion"]], "code": [row["gold"]], "note": [row["note"]]}
