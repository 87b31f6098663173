"""Solutions of the exercises of notebook 0. Each block is what a student writes into one cell."""

# %% 0.1
reward = {
    ("I21.02", "I21.01"): 0.4,  # the same category
    ("I21.02", "I21"): 0.4,  # a header exists, and its category is right
    ("I21.02", "I50.1"): 0.15,  # heart failure: circulatory, another category
    ("I21.02", "J18.9"): 0,  # pneumonia: another chapter
    ("I21.02", "I21.01ZZ"): -0.5,  # does not exist
    ("A41.9", "B34.9"): 0.15,  # A00 to B99 is one chapter
    ("H65.00", "H54.0"): 0,  # ear and eye: two chapters, one letter
}

# %% 0.2
import re

from helpers import icd


def my_parse(text: str) -> str | None:
    """The normalised code of a completion, or None."""
    _, closed, rest = text.partition("</think>")
    if not closed:
        return None
    answers = re.findall(r"<diagnosis>(.*?)</diagnosis>", rest, re.DOTALL)
    codes = {icd.normalise(answer) for answer in answers}
    return codes.pop() if len(codes) == 1 else None
