"""Checkers of notebook 0: the tree, the rewards, the parser."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from exercises.core import Trial, Verdict, checker, number, require_filled, try_out, verdict
from helpers import icd, prompts, rewards

# (right code, answer) -> {wrong reward: why somebody writes it}
PAIRS: dict[tuple[str, str], dict[float, str]] = {
    ("I21.02", "I21.01"): {
        1.0: "Only the very same code earns 1. A sibling shares the category I21.",
        0.15: "A sibling is nearer than that: it shares the category, not only the chapter.",
        0.0: "A sibling is a wrong code, but it shares the category I21.",
    },
    ("I21.02", "I21"): {
        1.0: "I21 is the category, not the full code.",
        0.0: "I21 is less than the full code, but its category is right.",
        -0.5: "I21 is a header: nobody may bill it, but it exists. So it is usable.",
    },
    ("I21.02", "I50.1"): {
        0.4: "I50 is another category than I21. The same letter does not make a category.",
        0.0: "I50.1 is heart failure: compare its chapter with that of I21.02.",
    },
    ("I21.02", "J18.9"): {
        0.15: "Look the two chapters up: one is circulatory, the other respiratory.",
        -0.5: "J18.9 exists. A real code of the wrong chapter is wrong, but usable.",
    },
    ("I21.02", "I21.01ZZ"): {
        0.4: "Partial credit is for codes that exist. I21.01ZZ has only the shape of a code.",
        0.0: "A code that does not exist is not merely wrong: it counts as no usable answer.",
        0.15: "Partial credit is for codes that exist. I21.01ZZ has only the shape of a code.",
    },
    ("A41.9", "B34.9"): {
        0.0: "You take the first letter for the chapter. A00 to B99 is one chapter, infections.",
        0.4: "A41 and B34 are two categories. They share the chapter.",
        -0.5: "B34.9 exists. A real code is always usable.",
    },
    ("H65.00", "H54.0"): {
        0.15: "You take the first letter for the chapter. H00 to H59 is the eye, H60 to H95 the "
        "ear: two chapters.",
        0.4: "H65 and H54 are two categories, and even two chapters: ear and eye.",
        -0.5: "H54.0 exists. A real code is always usable.",
    },
}


@checker("0.1")
def predicted_rewards(reward: Any) -> Verdict:
    """reward: {(right code, answer): reward}."""
    require_filled(reward, "reward")
    credits = (1.0, 0.4, 0.15, 0.0, -0.5)
    complaints = []
    for (gold, answer), mistakes in PAIRS.items():
        name = f"{answer} where {gold} is right"
        if (gold, answer) not in reward:
            complaints.append(f"{name}: this pair is missing. Keep the keys of the cell.")
            continue
        value = number(reward[gold, answer], name)
        [expected] = rewards.hierarchical_reward([prompts.answer("Findings.", answer)], [gold])
        if abs(value - expected) < 1e-9:
            continue
        known = {round(wrong, 2): why for wrong, why in mistakes.items()}
        general = f"Go down the tree: chapter {icd.chapter(gold)} or not, category or not, code?"
        if round(value, 2) not in credits:
            general = f"The hierarchical reward has only these values: {credits}."
        complaints.append(f"{name}: {value:g} is not it. {known.get(round(value, 2), general)}")
    return verdict(
        complaints, "All seven. The chapter is a range of codes, and a code has to exist to earn."
    )


# What a failing row of the truth table most often means.
ROWS = {
    "lower case, no dot": "i2101 and I21.01 are the same code. Use icd.normalise.",
    "right": "icd.normalise gives the code without its dot: I2101.",
    "own think tag": "A completion may bring its own <think>. It does not matter.",
    "windows line ends": "White space around the parts does not matter.",
    "two answers": "Two answers that differ are no answer. Do not take the first one.",
    "two codes in one answer": "Two codes in one pair of tags are no answer.",
    "answered twice": "The same code twice is one answer.",
    "answer quoted in the reasoning": "What comes before the first </think> is a thought. "
    "Cut it off before you look for the tags.",
    "answer inside the reasoning": "The reasoning never ends: without </think> there is no answer.",
    "no tags": "Without <diagnosis> tags there is no answer.",
    "unclosed answer": "An answer that no </diagnosis> closes was cut off. It does not count.",
    "no medicine in it": "A word is no code. icd.normalise gives None for it.",
    "empty answer": "Nothing stands between the tags.",
    "empty": "An empty completion has no answer.",
    "invented": "The parser looks at the shape only. Whether the code exists is asked later.",
    "no reasoning": "The code can be read although the reasoning is empty.",
    "blank reasoning": "The code can be read although the reasoning is blank.",
    "prose after the answer": "Text after the answer does not change the code.",
}
MORE_GENEROUS = ("code with its title",)  # the course reads these, the exercise need not
OWN_ROWS = {
    "two spellings": "Pain.\n</think>\n<diagnosis>I21.01</diagnosis>\n<diagnosis>i2101</diagnosis>",
    "two answers, the right one last": "Pain.\n</think>\n<diagnosis>I50.1</diagnosis>\n"
    "<diagnosis>I21.01</diagnosis>",
}
OWN_HINTS = {
    "two spellings": "Both tags hold the same code. Compare after icd.normalise.",
    "two answers, the right one last": "Two answers that differ are no answer. Do not take the "
    "last one.",
}


@checker("0.2")
def parser(my_parse: Callable[[str], Any]) -> Verdict:
    """my_parse: text of a completion -> normalised code, or None."""
    rows = [row for row in rewards.truth_table() if row["name"] not in MORE_GENEROUS]
    trials = [
        Trial(
            (row["completion"],),
            prompts.parse(row["completion"]).code,
            ROWS.get(row["name"], row["why"] + "."),
            f'"{row["name"]}"',
        )
        for row in rows
    ]
    for name, completion in OWN_ROWS.items():
        code = prompts.parse(completion).code
        trials.append(Trial((completion,), code, OWN_HINTS[name], f'"{name}"'))
    complaints = try_out(my_parse, trials)
    return verdict(complaints, f"Your parser agrees with the course's on {len(trials)} answers.")
