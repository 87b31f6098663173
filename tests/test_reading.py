"""Notes that must be read: frames, denials with scope, relations; the posterior stays exact."""

from __future__ import annotations

import hashlib
import json
import random
import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression

from helpers import casebook, hospital, icd, mimic, notes, profiles, teachers, traces
from helpers.casebook import Shown, language

BOOK = casebook.casebook()
FRAMED = [(kind, text) for kind, frame in language.FRAMES.items() for text in frame["sentences"]]
PHRASES = [
    (finding, phrase, polarity == "stated")
    for polarity, table in language.relations().items()
    for finding, phrases in table.items()
    for phrase in phrases
]


def shown(row: dict, reading: float) -> Shown:
    """What the author wrote, from the truth."""
    keys = ("present", "denied", "missing", "complaint", "sex")
    return Shown(*(row[key] for key in keys), row.get("blocks", ()), reading)


def blocks(found: list[casebook.Block]) -> list[tuple[str, list[str]]]:
    return sorted((block["frame"], sorted(block["findings"])) for block in found)


# --- the grammar --------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "template"), FRAMED)
@pytest.mark.parametrize("seed", range(3))
def test_every_frame_is_read_back_wherever_it_stands(kind: str, template: str, seed: int) -> None:
    rng = random.Random(seed)
    words = {key: rng.choice(options) for key, options in language.RULES["words"].items()}
    framed = template.format(list="chest pain, orthopnea and melena", **words)
    framed = framed.replace("melena", "black tarry stools")
    end = "" if framed.endswith("]") else "."
    turn = rng.choice(language.RULES["turns"]) + "vomiting" if end else ""
    note = f"CC: cough\nHPI: ___ yo M with fatigue. {framed}{turn}{end} Denies cough. Dysuria."
    found, spans = casebook.read(note, 1.0)
    assert blocks(found.blocks) == [(kind, ["chest_pain", "i_orthopnea", "melena"])]
    assert found.denied == ("cough",)
    assert set(found.present) == {"fatigue", "dysuria"} | ({"vomiting"} if turn else set())
    assert "chest_pain" not in spans
    # the same frame opens a section of its own
    found, _ = casebook.read(f"HPI: Fatigue.\nFAMILY: {framed}{end}", 1.0)
    assert blocks(found.blocks) == [(kind, ["chest_pain", "i_orthopnea", "melena"])]


@pytest.mark.parametrize("template", language.RULES["denials"])
def test_a_denial_reaches_to_its_turn_and_not_beyond(template: str) -> None:
    listed = template.format(list="chest pain, orthopnea or vomiting")
    note = f"HPI: ___ yo F with fatigue. {listed}, but now dysuria. Headache."
    found, _ = casebook.read(note, 1.0)
    assert set(found.denied) == {"chest_pain", "i_orthopnea", "vomiting"}
    assert set(found.present) == {"fatigue", "dysuria", "headache"}
    assert found.blocks == []


@pytest.mark.parametrize(("finding", "phrase", "stated"), PHRASES)
def test_a_relation_is_one_phrase_of_one_finding(finding: str, phrase: str, stated: bool) -> None:
    mentions = casebook.read_findings(f"ED: pulse 124, {phrase}, lipase 1240.")
    assert [(m.finding, m.present) for m in mentions][1:-1] == [(finding, stated)]
    assert ";" not in phrase  # it would be split in a rationale


def test_a_relation_says_two_things_with_the_same_words() -> None:
    """So that counting words cannot tell them apart: most pairs are met both ways round."""
    by_words: dict[tuple[str, ...], set[tuple[str, bool]]] = {}
    for finding, phrase, stated in PHRASES:
        words = tuple(sorted(re.findall(r"[\w.]+", phrase)))
        by_words.setdefault(words, set()).add((finding, stated))
    assert np.mean([len(meanings) > 1 for meanings in by_words.values()]) > 0.5


def test_the_nouns_of_denials_state_the_finding_too() -> None:
    for name, noun in language.RULES["nouns"].items():
        assert noun in BOOK.findings[name]["phrases"]
        assert BOOK.deny[BOOK.index[name]] > 0


def test_frames_name_sections_and_places_that_notes_have() -> None:
    assert sum(frame["weight"] for frame in language.FRAMES.values()) == pytest.approx(1)
    assert set(language.RULES["unframed"]) <= set(BOOK.names)
    for frame in language.FRAMES.values():
        assert set(frame["sections"]) <= set(casebook.SECTIONS)
        assert set(frame["places"]) <= set(casebook.SECTIONS)
        assert all(text.count("{list}") == 1 for text in frame["sentences"])


# --- the hospital -------------------------------------------------------------------------------


def test_reading_0_is_the_first_hospital_to_the_byte() -> None:
    texts = hospital.summaries(hospital.draw(300, 0, 0.0), 0)
    digest = hashlib.sha256("\x00".join(texts).encode()).hexdigest()
    assert digest == "091ae7066797c97edc4605fe3ca5d19fffe2cd4c567e5816eb57c69893da71ba"


def test_a_note_shows_what_the_truth_says() -> None:
    rows = hospital.draw(500, 8, 1.0)
    texts = [notes.admission_note(text) for text in hospital.summaries(rows, 8)]
    same = {"present": 0, "denied": 0, "blocks": 0}
    for row, text in zip(rows, texts, strict=True):
        found, _ = casebook.read(text, 1.0)
        same["present"] += set(found.present) == set(row["present"])
        same["denied"] += set(found.denied) == set(row["denied"]) - set(row["present"])
        same["blocks"] += blocks(found.blocks) == blocks(row["blocks"])
    # the rest have a typo in a phrase or a cue, or state the complaint in place of a finding
    assert all(count > 0.8 * len(rows) for count in same.values()), same


def test_every_note_at_reading_1_may_hold_up_to_three_blocks_and_half_as_many_at_a_half() -> None:
    counts = {r: [len(row["blocks"]) for row in hospital.draw(1500, 4, r)] for r in (0.5, 1.0)}
    assert set(counts[1.0]) == {1, 2, 3}
    assert np.mean(counts[1.0]) == pytest.approx(2, abs=0.06)
    assert np.mean(counts[0.5]) == pytest.approx(1, abs=0.08)


def test_the_manifest_says_how_much_must_be_read(tmp_path: Path) -> None:
    folder = hospital.write(tmp_path / "h", admissions=40, seed=2, reading=0.5)
    manifest = json.loads((folder / "truth/manifest.json").read_text())
    assert manifest["reading"] == 0.5
    truth = pd.read_parquet(folder / "truth/findings.parquet")
    assert (truth["reading"] == 0.5).all() and truth["blocks"].map(len).max() >= 1
    manifest["language_sha256"] = "0" * 64
    (folder / "truth/manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ValueError, match="another casebook"):
        casebook.ideal_reader(folder)


@pytest.mark.parametrize("reading", [-0.1, 1.5, float("nan")])
def test_a_reading_out_of_range_is_refused(tmp_path: Path, reading: float) -> None:
    with pytest.raises(ValueError, match="reading must be from 0 to 1"):
        hospital.write(tmp_path / "h", admissions=5, reading=reading)
    assert not (tmp_path / "h").exists()


# --- the law ------------------------------------------------------------------------------------


def test_mimics_are_distributions_over_other_diagnoses() -> None:
    np.testing.assert_allclose(BOOK.mimic.sum(axis=1), 1)
    assert (np.diag(BOOK.mimic) == 0).all() and (BOOK.mimic >= 0).all()


def test_posterior_agrees_with_a_plain_sum_over_what_each_block_may_mimic() -> None:
    """Another way to the same number: each block by a loop over mimics and slots."""
    slots = [np.flatnonzero(BOOK.slot == s) for s in range(BOOK.slot.max() + 1)]
    said = casebook.BLOCK_MENTION
    for row in hospital.draw(3, 21, 1.0):
        plain = casebook.posterior(Shown(**{**vars(shown(row, 1.0)), "blocks": ()}))
        weight = plain.copy()
        for block in row["blocks"]:
            sections = language.FRAMES[block["frame"]]["sections"]
            barred = language.RULES["unframed"]
            here = [[j for j in s if BOOK.names[j] not in barred] for s in slots]
            here = [s for s in here if s and BOOK.section[s[0]] in sections]
            given_mimic = np.ones(len(BOOK.codes))
            empty = np.ones(len(BOOK.codes))
            for other in range(len(BOOK.codes)):
                for members in here:
                    there = BOOK.p_finding[other, members].sum()
                    stated = [j for j in members if BOOK.names[j] in block["findings"]]
                    p = BOOK.p_finding[other, stated[0]] * said if stated else 1 - there * said
                    given_mimic[other] *= p
                    empty[other] *= 1 - there * said
            weight *= (BOOK.mimic @ given_mimic) / (1 - BOOK.mimic @ empty)
        expected = weight / weight.sum()
        got = casebook.posterior(shown(row, 1.0))
        np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("reading", [0.5, 1.0])
def test_the_ideal_reader_is_as_often_right_as_it_expects(reading: float) -> None:
    """Expected against realised accuracy at each level, over 6,000 patients."""
    rows = hospital.draw(6000, 31, reading)
    belief = np.stack([casebook.posterior(shown(row, reading)) for row in rows])
    for group_of in (icd.normalise, icd.category, icd.chapter):
        groups, group = np.unique([group_of(code) for code in BOOK.codes], return_inverse=True)
        mass = belief @ np.eye(len(groups))[group]
        right = groups[mass.argmax(axis=1)] == [group_of(row["code"]) for row in rows]
        surplus = mass.max(axis=1) - right
        assert abs(surplus.mean()) < 3 * surplus.std() / len(rows) ** 0.5


@pytest.mark.slow
def test_words_of_frames_length_and_author_give_nothing_away() -> None:
    """With every phrase of the casebook masked a note tells no more than the commonest code."""
    rows = hospital.draw(4000, 41, 1.0)
    texts = []
    for text in hospital.summaries(rows, 41):
        note = notes.admission_note(text)
        note = "\n".join(line for line in note.split("\n") if not line.startswith("CC: "))
        for mention in reversed(casebook.read_findings(note)):
            note = note[: mention.start] + note[mention.end :]
        texts.append(note)
    codes = np.array([row["code"] for row in rows])
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=3).fit_transform(texts)
    model = LogisticRegression(C=1.0, max_iter=200).fit(vectors[:3000], codes[:3000])
    accuracy = (model.predict(vectors[3000:]) == codes[3000:]).mean()
    commonest = pd.Series(codes).value_counts(normalize=True).iloc[0]
    assert accuracy < commonest + 0.02


# --- the teacher --------------------------------------------------------------------------------

MOTHERS = (
    "CC: cough\nHPI: ___ yo M with cough and fever and chills. "
    "Mother had chest pain and orthopnea.\nPMH: None\nMEDS: None"
)


def test_a_teacher_that_misses_a_frame_takes_what_stands_in_it_for_the_patients_own() -> None:
    careful, own = casebook.read(MOTHERS, 1.0)
    hasty, more = casebook.read(MOTHERS, 1.0, lambda clause: True)
    assert [block["frame"] for block in careful.blocks] == ["another person"] and not hasty.blocks
    assert set(more) - set(own) == {"chest_pain", "i_orthopnea"} and set(own) < set(more)
    assert all(words in MOTHERS for words in more.values())


def test_misread_is_a_rate_of_frames_that_a_key_decides() -> None:
    note = (
        "HPI: ___ yo M. Mother had 3 mm STE in V2-V4 and retrosternal squeezing at rest.\nPMH: None"
    )

    def cites_the_mother(key: str, misread: float) -> bool:
        options = {"habit": 0, "reading": 1.0, "misread": misread}
        return "STE" in traces.template_teacher(note, key, **options)[0]

    keys = [str(number) for number in range(400)]
    missed = [cites_the_mother(key, 0.3) for key in keys]
    assert missed == [cites_the_mother(key, 0.3) for key in keys]
    assert 0.2 < np.mean(missed) < 0.4
    assert not any(cites_the_mother(key, 0.0) for key in keys[:20])
    assert all(cites_the_mother(key, 1.0) for key in keys[:20])


def test_a_teacher_of_hospital_1_knows_no_frames(tmp_path: Path) -> None:
    data = hospital.write(tmp_path / "synthetic", admissions=150, seed=2)
    cases = mimic.build_cases(data, seed=0)
    pd.testing.assert_frame_equal(
        traces.from_template(cases), traces.from_template(cases, reading=0.0, misread=1.0)
    )


def test_the_teacher_takes_the_reading_of_the_hospital_from_its_manifest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = hospital.write(tmp_path / "synthetic", admissions=300, seed=2, reading=1.0)
    monkeypatch.setenv("ICD_DATA_DIR", str(data))
    cases = mimic.build_cases(data, seed=0)
    made = teachers.write(cases, "template", profiles.get("tiny"), tmp_path / "keep")
    pd.testing.assert_frame_equal(made, traces.from_template(cases, reading=1.0))
    assert made["kept"].mean() > 0.97
    assert not made.equals(traces.from_template(cases))
