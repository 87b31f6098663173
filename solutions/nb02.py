"""Solutions of the exercises of notebook 2. Each block is what a student writes into one cell."""

# %% 2.1
# With the numbers of the notebook's stored run: (0.63 * 695) / (1885 * (1 - 0.718)) = 0.82.
# The same from the tables of any run:
import pandas as pd

from helpers import course, traces

cases = pd.read_parquet(course.path("cases") / "cases.parquet")
kept = pd.read_parquet(course.path("traces") / "traces.parquet").query("kept")
joined = kept.merge(cases, on="hadm_id", suffixes=("_teacher", ""))
falls_back = joined["code_teacher"] == joined["code"].map(traces.fallbacks())
share = falls_back.sum() / (joined["code_teacher"] != joined["code"]).sum()

# %% 2.2
import re

from helpers import traces


def cites_denied(think: str, note: str) -> bool:
    """Whether a trace cites a finding that the note denies and nowhere states."""
    text = " ".join(note.lower().split())
    for finding in traces.cited_findings(think):
        words = re.escape(" ".join(finding.lower().split()))
        is_denied = re.search(rf"\b(no|denies) {words}", text)
        is_stated = re.search(rf"(?<!\bno )(?<!\bdenies ){words}", text)
        if is_denied and not is_stated:
            return True
    return False
