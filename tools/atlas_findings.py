"""Counts the three findings of docs/atlas.md, for each seed of the study.

`python -m tools.atlas_findings` writes results/study/findings.csv from results/study/
predictions.csv, the training splits of the seeds and the ideal reader of the test hospital (about a
minute on two cores).
"""

from __future__ import annotations

from pathlib import Path

import pandas as pd

from helpers import casebook, icd, profiles
from helpers.study import RESULTS, analyse, run

SEEDS = range(5)
RARE, COMMON = 10, 100  # training cases of a code: fewer than, at least
SURE, UNSURE = 0.99, 0.5  # probability of the ideal reader's answer


def findings(answers: pd.DataFrame) -> pd.DataFrame:
    """A row for each seed; `answers` holds code, sft, grpo (NIL: unusable), trained and sure.

    Shares are of cases. rare, common: full-code accuracy of SFT and GRPO where the code has few or
    many training cases. repaired, broken: answers that become right, or wrong, and how many of
    these were in the right category before (near), leave the chapter (far), come back to it (back);
    unusable answers are in no chapter.
    sure, unsure: accuracy where the ideal reader is sure, or is not.
    """
    rows = []
    for seed, table in answers.groupby("seed"):
        before = table["sft"] == table["code"]
        after = table["grpo"] == table["code"]
        row: dict[str, float] = {"seed": seed, "cases": len(table)}
        groups = {
            "rare": table["trained"] < RARE,
            "common": table["trained"] >= COMMON,
            "sure": table["sure"] >= SURE,
            "unsure": table["sure"] < UNSURE,
        }
        for name, group in groups.items():
            row[f"{name}_cases"] = int(group.sum())
            row[f"{name}_sft"] = before[group].mean()
            row[f"{name}_grpo"] = after[group].mean()
        chapters = {model: _level(table[model], icd.chapter) for model in ("code", "sft", "grpo")}
        categories = {model: _level(table[model], icd.category) for model in ("code", "sft")}
        in_chapter = {model: chapters[model] == chapters["code"] for model in ("sft", "grpo")}
        usable = {model: table[model] != "NIL" for model in ("sft", "grpo")}
        repaired = after & ~before
        broken = before & ~after
        row |= {
            "repaired": int(repaired.sum()),
            "near": int((repaired & (categories["sft"] == categories["code"])).sum()),
            "broken": int(broken.sum()),
            "far": int((broken & ~in_chapter["grpo"] & usable["grpo"]).sum()),
            "back": int((repaired & ~in_chapter["sft"] & usable["sft"]).sum()),
            "full_gain": after.mean() - before.mean(),
            "chapter_gain": in_chapter["grpo"].mean() - in_chapter["sft"].mean(),
            "errors_where_sure": (~after & groups["sure"]).sum() / (~after).sum(),
        }
        rows.append(row)
    return pd.DataFrame(rows)


def _level(codes: pd.Series, group_of: object) -> pd.Series:
    groups = {code: group_of(code) for code in codes.unique() if code != "NIL"}
    return codes.map(lambda code: groups.get(code, "NIL"))


def answers() -> pd.DataFrame:
    """The answers of SFT and GRPO to the test hospital's cases, a row for each case and seed."""
    profile = profiles.get("tiny")
    table = analyse.read()
    ideal = casebook.ideal_reader(run.hospital_of())["full_p"]
    tables = []
    for seed in SEEDS:
        trained = run.cases_of("train", seed, profile)["code"].map(icd.normalise).value_counts()
        tables.append(
            pd.DataFrame(
                {
                    "seed": seed,
                    "code": table["code"],
                    "sft": table[f"sft/{seed}"],
                    "grpo": table[f"grpo/{seed}"],
                    "trained": table["code"].map(trained).fillna(0),
                    "sure": table["hadm_id"].astype(int).map(ideal),
                }
            )
        )
    return pd.concat(tables, ignore_index=True)


def main(path: Path = RESULTS / "findings.csv") -> None:
    """Write the table and print it."""
    table = findings(answers()).round(4)
    table.to_csv(path, index=False)
    print(table.T.to_string())


if __name__ == "__main__":
    main()
