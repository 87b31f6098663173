"""Template rationales, their checks, and the data sets for the trainers."""

from __future__ import annotations

import pandas as pd
import pytest

from helpers import hospital, icd, models, notes, prompts, traces


@pytest.fixture(scope="module")
def cases() -> pd.DataFrame:
    rows = hospital.draw(250, 41)
    texts = hospital.summaries(rows, 41)
    frame = pd.DataFrame(
        {"subject_id": [r["subject_id"] for r in rows], "hadm_id": [r["hadm_id"] for r in rows]}
    )
    frame["note"] = [notes.admission_note(t) for t in texts]
    frame["code"] = [icd.normalise(r["code"]) for r in rows]
    return frame[frame["note"] != ""].reset_index(drop=True)


def test_traces_are_well_formed_and_cite_only_the_note(cases: pd.DataFrame) -> None:
    made = traces.from_template(cases)
    assert list(made.columns) == list(traces.COLUMNS)
    assert made["kept"].mean() > 0.95
    note = dict(zip(cases["hadm_id"], cases["note"], strict=True))
    for row in made[made["kept"]].itertuples():
        parsed = prompts.parse(prompts.answer(row.think, row.code))
        assert parsed.is_well_formed
        assert parsed.code == row.code
        assert all(
            text.lower() in note[row.hadm_id].lower() for text in traces.cited_findings(row.think)
        )
        assert pd.isna(row.why)


def test_the_teacher_is_not_told_the_code_and_is_deterministic(cases: pd.DataFrame) -> None:
    blind = traces.from_template(cases.drop(columns="code"))
    pd.testing.assert_frame_equal(blind, traces.from_template(cases))


def test_the_habit_strikes_at_its_rate_and_only_towards_unspecified_siblings(
    cases: pd.DataFrame,
) -> None:
    honest, hurried = traces.from_template(cases, habit=0.0), traces.from_template(cases, habit=1.0)
    fallback = traces.fallbacks()
    for a, b in zip(honest["code"], hurried["code"], strict=True):
        assert b == fallback.get(a, a)
    could = honest["code"].isin(fallback)
    some = traces.from_template(cases)["code"]
    rate = (some[could] != honest.loc[could, "code"]).mean()
    assert abs(rate - traces.HABIT) < 4 * (traces.HABIT * (1 - traces.HABIT) / could.sum()) ** 0.5


def test_whether_the_habit_strikes_depends_on_the_key_alone_and_grows_with_the_rate() -> None:
    keys = [str(key) for key in range(20_000_000, 20_002_000)]
    struck = {rate: {key for key in keys if traces.struck(key, rate)} for rate in (0, 0.3, 0.6, 1)}
    assert not struck[0] and struck[0] < struck[0.3] < struck[0.6] < struck[1] == set(keys)
    for rate in (0.3, 0.6):
        assert abs(len(struck[rate]) / len(keys) - rate) < 0.05


def test_where_the_habit_strikes_the_telling_detail_is_left_out(cases: pd.DataFrame) -> None:
    honest, hurried = traces.from_template(cases, habit=0.0), traces.from_template(cases, habit=1.0)
    fell_back = honest["code"] != hurried["code"]
    assert fell_back.any()
    for a, b in zip(honest["think"][fell_back], hurried["think"][fell_back], strict=True):
        detail = a.partition("\nDetail: ")[2].removesuffix(".")
        assert b.endswith("\nDetail: none.")
        cited = traces.cited_findings(b)
        assert detail not in cited or len(traces.cited_findings(a)) == 1


@pytest.mark.parametrize(
    ("think", "code", "word"),
    [
        ("Findings: chest pain; fell off a horse.\nDetail: none.", "I21.4", "horse"),
        ("Findings: c. Massive stroke.", "I21.4", "stroke"),
        (
            "Findings: C. difficile, given vancomycin 125 mg; chest pain.\nDetail: none.",
            "I21.4",
            "difficile",
        ),
        ("Findings: chest pain.", "I21.01ZZ", "no valid code"),
        ("Findings: chest pain.", None, "no valid code"),
        ("Findings: chest pain.", float("nan"), "no valid code"),
        ("Findings: chest pain.", "", "no valid code"),
        ("Findings: chest pain. <diagnosis>I10</diagnosis>", "I21.4", "answer"),
        ("<think>\nFindings: chest pain.", "I21.4", "holds one of"),
        ("Findings: chest pain.</think>", "I21.4", "holds one of"),
        ("", "I21.4", "empty"),
        (" \n", "I21.4", "empty"),
        ("Findings: nothing specific.", "I21.4", "cites nothing"),
        ("Findings: ; .", "I21.4", "cites nothing"),
        ("Findings:", "I21.4", "cites nothing"),
    ],
)
def test_what_a_trace_is_dropped_for(think: str, code: str | None, word: str) -> None:
    assert word in str(
        traces.check_trace(think, code, "CC: chest pain\nHPI: ___ yo M with chest pain.")
    )


@pytest.mark.parametrize(
    "think", ["Findings: Chest  Pain.", "Findings: chest\npain.\nDetail: none.", "Findings: m; m."]
)
def test_case_and_white_space_of_a_quote_do_not_matter(think: str) -> None:
    assert (
        traces.check_trace(think, "I21.4", "CC: chest pain\nHPI: ___ yo M with chest\npain.")
        is None
    )


def test_the_table_says_of_each_trace_whether_it_is_kept_or_why_not() -> None:
    rows = [
        (1, "Findings: chest pain.", "I214", "CC: chest pain"),
        (2, "Findings: cough.", "I214", "CC: chest pain"),
        (3, "It is an infarction.", None, "CC: chest pain"),
    ]
    table = traces.checked(rows)
    assert list(table.columns) == list(traces.COLUMNS)
    assert table["kept"].tolist() == [True, False, False]
    assert pd.isna(table["why"][0]) and "cough" in table["why"][1]
    assert "no valid code" in table["why"][2]
    assert list(traces.checked([]).columns) == list(traces.COLUMNS)


def test_free_text_of_a_model_teacher_may_be_kept() -> None:
    assert (
        traces.check_trace(
            "The patient has pressure in the chest, so an infarction is likely.",
            "I21.4",
            "CC: chest pain",
        )
        is None
    )


def test_rows_for_sft_share_their_prefix_with_generation(cases: pd.DataFrame) -> None:
    tokenizer = models.load_tokenizer("tiny")
    made = traces.from_template(cases.head(40))
    dataset = traces.sft_dataset(cases, made, tokenizer, 256)
    assert len(dataset) == made["kept"].sum()
    for row in dataset:
        prompt = tokenizer.apply_chat_template(
            row["prompt"], tokenize=True, add_generation_prompt=True
        )["input_ids"]
        whole = tokenizer.apply_chat_template(row["prompt"] + row["completion"], tokenize=True)[
            "input_ids"
        ]
        assert whole[: len(prompt)] == prompt, (
            "training and generation must start at the same token"
        )
        assert tokenizer.decode(whole[len(prompt) :]).rstrip().endswith("</diagnosis><|im_end|>")


def test_nothing_kept_is_an_error(cases: pd.DataFrame) -> None:
    made = traces.from_template(cases.head(3)).assign(kept=False)
    with pytest.raises(ValueError, match="none was kept"):
        traces.sft_dataset(cases, made, models.load_tokenizer("tiny"), 256)


def test_rows_for_grpo_carry_what_the_rewards_read(cases: pd.DataFrame) -> None:
    dataset = traces.grpo_dataset(cases.head(5), models.load_tokenizer("tiny"), 40)
    assert set(dataset.column_names) == {"prompt", "code", "note"}
    assert dataset["code"][:] == cases["code"].head(5).tolist()
    tokenizer = models.load_tokenizer("tiny")
    assert all(len(tokenizer(note)["input_ids"]) <= 42 for note in dataset["note"])
