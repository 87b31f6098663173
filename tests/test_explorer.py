"""The explorer shows what is there, marks what was cited and missed, and lets nothing that was written by others act."""

from __future__ import annotations

from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import explorer, icd, metrics, plots
from helpers.machinery import places

NOTE = (
    "Chief Complaint: chest pain\nHPI: 61 year old man with crushing chest pain for 2 hours, diaphoresis. Denies fever.\n"
    "ED: HR 98, ST elevation in V1-V4, troponin 2.4.\nPMH: hypertension. Family: father with MI at 52."
)
CASE = {
    "subject_id": 1,
    "hadm_id": 20000001,
    "note": NOTE,
    "code": "I2102",
    "category": "I21",
    "chapter": 9,
    "split": "test",
}
HOSTILE = '</td></table><script>alert(1)</script><img src=x onerror="alert(2)">&amp;<mark>\'"'


def answer(think: str, code: str | None, *, shown: str | None = None) -> dict:
    completion = f"<think>\n{think}\n</think>\n<diagnosis>{shown or icd.dotted(code)}</diagnosis>"
    return {"completion": completion, "think": think, "predicted": code}


ANSWERS = {
    "base": {"completion": "the the the", "think": "", "predicted": None},
    "sft": answer(
        "Findings: crushing chest pain; troponin 2.4. This suggests an infarction.", "I2109"
    ),
    "grpo": answer(
        "Crushing chest pain, ST elevation in V1-V4; points to the anterior wall.", "I2102"
    ),
}


class Page(HTMLParser):
    """Tags, their attributes and texts; complains about tags that do not close in order."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict]] = []
        self.inside: dict[str, list[str]] = {}
        self.text, self.open = "", []
        self.feed(html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "br":
            self.text += "\n"
        else:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data
        for tag in set(self.open):
            self.inside.setdefault(tag, []).append(data)


def test_case_shows_note_reasoning_paths_rewards_and_notice():
    page = Page(explorer.case_html(CASE, ANSWERS))
    assert places.NOTICE in page.text
    assert all(
        line in page.text for line in NOTE.splitlines() if "pain" not in line and "ST" not in line
    )
    assert [t for t in page.inside["b"] if t in ("Base", "SFT", "GRPO")] == ["Base", "SFT", "GRPO"]
    assert "ST elevation in V1-V4" in page.inside["mark"], (
        "what the focus model cites is marked in the note"
    )
    assert "edges from the truth" in page.text and "0 edges from the truth" in page.text
    assert page.text.count("Diseases of the circulatory system") == 3, (
        "the truth, SFT and GRPO as paths"
    )
    assert page.text.count("I20-I25") == 3 and "no usable answer" in page.text
    assert "format" in page.text and "hierarchical" in page.text and "grounding" in page.text
    assert "+1.00" in page.inside["b"] and "-0.50" in page.inside["b"]


@pytest.mark.parametrize(
    ("code", "gold", "ticks"),
    [
        ("I2109", "I2102", "✓✓✓✗"),
        ("J189", "I2102", "✗✗✗✗"),
        ("I10", "I10", "✓✓✓"),  # a category that is a code stands once
        ("I21", "I2102", "✓✓✓✗"),  # the header of the right code is not the right code
    ],
)
def test_ticks_say_on_which_level_an_answer_leaves_the_truth(code, gold, ticks):
    text = Page(explorer.case_html({**CASE, "code": gold}, {"sft": answer("", code)})).text
    path = text[text.index("edges from the truth") : text.index("rewards")]
    assert "".join(letter for letter in path if letter in "✓✗") == ticks


def test_it_is_static_html_without_scripts_or_links():
    page = Page(explorer.case_html(CASE, ANSWERS))
    assert {tag for tag, _ in page.tags} <= {
        "div",
        "p",
        "b",
        "i",
        "br",
        "table",
        "tr",
        "td",
        "span",
        "mark",
        "ins",
    }
    assert all(set(attributes) <= {"style", "valign"} for _, attributes in page.tags)


def test_without_styles_as_on_github_lines_and_cells_keep_their_order():
    html = explorer.case_html(CASE, ANSWERS)
    assert html.count("<br>") >= NOTE.count("\n") + 6, "line breaks need no style"
    cells = [attributes for tag, attributes in Page(html).tags if tag == "td"]
    assert all(attributes.get("valign") == "top" for attributes in cells)
    bold = "".join(Page(html).inside["b"])
    assert "ST elevation in V1-V4" in bold, "a citation shows where <mark> is dropped"


@pytest.mark.parametrize("where", ["note", "think", "code", "missed", "heading", "model"])
def test_nothing_that_others_wrote_becomes_html(where):
    case = CASE | ({"note": HOSTILE + NOTE} if where == "note" else {})
    answers = dict(ANSWERS)
    if where == "think":
        answers["grpo"] = answer(f"crushing chest pain {HOSTILE}", "I2102")
    if where == "code":
        answers["grpo"] = answer("crushing chest pain", None, shown=HOSTILE)
    if where == "model":
        answers = {HOSTILE: ANSWERS["sft"]}
    html = explorer.case_html(
        case,
        answers,
        missed=[HOSTILE, "diaphoresis"] if where == "missed" else (),
        heading=HOSTILE if where == "heading" else "",
    )
    page = Page(html)
    assert not {tag for tag, _ in page.tags} & {"script", "img"}
    assert all(set(attributes) <= {"style", "valign"} for _, attributes in page.tags)
    if where in ("note", "heading", "model"):
        assert HOSTILE in page.text, "and it is shown as it was written"


@settings(max_examples=60, deadline=None)
@given(
    st.text(st.sampled_from("ab <>&\"'\n.;(["), max_size=80),
    st.lists(st.text(st.sampled_from("ab <&.(["), max_size=6), max_size=5),
    st.lists(st.text(st.sampled_from("ab <&."), max_size=6), max_size=5),
)
def test_marking_changes_no_character_of_the_text(text, cited, missed):
    pieces = explorer.mark(text, cited, missed)
    assert "".join(piece for _, piece in pieces) == text


def test_cited_wins_over_missed_and_missed_is_named_in_the_legend():
    page = Page(
        explorer.case_html(
            CASE, ANSWERS, missed=["father with MI at 52", "crushing chest pain", "not in the note"]
        )
    )
    assert page.inside["ins"] == ["mattered, not cited", "father with MI at 52"]
    assert "crushing chest pain" in page.inside["mark"]
    assert "ins" not in Page(explorer.case_html(CASE, ANSWERS)).inside


def test_cited_phrases_are_the_notes_own_words():
    think = "Findings: crushing chest pain; SOB; melena. The man with crushing chest pain for 2 hours, and none of fever."
    note = NOTE + " SOB. Allergies: none. Findings as below."
    phrases = explorer.cited_phrases(think, note)
    assert phrases[0] == "man with crushing chest pain for 2 hours" and "sob" in phrases
    assert not {"melena", "none", "findings"} & set(phrases)
    assert explorer.cited_phrases("", note) == [] == explorer.cited_phrases(think, "")
    assert explorer.cited_phrases("crushing\nchest pain", NOTE) == ["crushing chest pain"]


def test_citations_in_another_order_than_the_note_are_found():
    think = "Troponin 2.4 and then, before that, crushing chest pain for 2 hours."
    assert explorer.cited_phrases("Troponin 2.4, crushing chest pain", NOTE) == [
        "crushing chest pain",
        "troponin 2.4",
    ]
    assert "crushing chest pain for 2 hours" in explorer.cited_phrases(think, NOTE)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.sampled_from(NOTE.split() + ["no", "such", "word;", "(", "["]), max_size=40).map(
        " ".join
    )
)
def test_every_cited_phrase_stands_in_the_note(think):
    flat = " ".join(NOTE.lower().split())
    assert all(phrase in flat for phrase in explorer.cited_phrases(think, NOTE))


def test_focus_decides_whose_citations_are_marked_in_the_note():
    assert "troponin 2.4" in Page(explorer.case_html(CASE, ANSWERS, focus="sft")).inside["mark"]
    assert "cited by SFT" in Page(explorer.case_html(CASE, ANSWERS, focus="sft")).text
    assert "cited by GRPO" in Page(explorer.case_html(CASE, ANSWERS, focus="gone")).text
    with pytest.raises(ValueError, match="no model answered"):
        explorer.case_html(CASE, {})


def test_a_baseline_without_text_and_a_code_of_no_release_are_shown_for_what_they_are():
    page = Page(
        explorer.case_html(CASE, {"tfidf": {"completion": float("nan"), "predicted": "I2109"}})
    )
    assert "(none)" in page.text and "(no text to reward)" in page.text and "nan" not in page.text
    page = Page(explorer.case_html(CASE, {"sft": answer("chest pain", None, shown="I21.01ZZ")}))
    assert "I21.01ZZ does not exist" in page.text


def test_rewards_are_called_as_trl_calls_them():
    seen = []

    def own_reward(completions, code, note, **columns):
        seen.append((completions, code, note))
        return [0.25]

    page = Page(explorer.case_html(CASE, {"sft": ANSWERS["sft"]}, rewards=[own_reward]))
    assert seen == [([ANSWERS["sft"]["completion"]], ["I2102"], [NOTE])]
    assert "own" in page.text and "+0.25" in page.inside["b"] and "hierarchical" not in page.text


# ------------------------------------------------------------------------------------------ widget
@pytest.fixture(scope="module")
def hospital() -> tuple[pd.DataFrame, dict[str, pd.DataFrame]]:
    rng = np.random.default_rng(0)
    codes = ["I2101", "I2102", "I509", "J189", "J441", "A419", "S72001A", "I10"]
    code = rng.choice(codes, 80)
    cases = pd.DataFrame(
        {
            "subject_id": range(80),
            "hadm_id": 20_000_000 + np.arange(80),
            "note": NOTE,
            "code": code,
            "chapter": [icd.chapter(c) for c in code],
            "split": "test",
        }
    )
    tables = {}
    for model, right in (("base", 0.0), ("sft", 0.5), ("grpo", 0.7)):
        said = (
            [c if rng.random() < right else str(rng.choice([*codes, ""])) or None for c in code]
            if right
            else [None] * 80
        )
        tables[model] = pd.DataFrame(
            [
                {"hadm_id": 20_000_000 + i, "sample": s, **answer("chest pain", said[i], shown="x")}
                for i in range(80)
                for s in (0, 1)
            ]
        )
    return cases, tables


def parts(box):
    controls, view = box.children
    return *controls.children[:4], view


def admissions(page: str) -> str:
    return Page(page).text.split("Admission ")[1].split("Admission note")[0].strip()


def test_explore_filters_by_model_chapter_and_kind(hospital):
    cases, tables = hospital
    model, chapter, kind, number, view = parts(explorer.explore(cases, tables, rewards=[]))
    assert model.value == "grpo" and number.max == 80
    present = sorted(cases["chapter"].unique())
    assert list(chapter.options)[1:] == [f"{c} {icd.chapter_short(c)}" for c in present]
    for name, table in tables.items():
        frame = metrics.outcomes(cases, table)
        for wanted in ("any answer", "any error", *(kind.label for kind in plots.KINDS.values())):
            for place in ("all chapters", *list(chapter.options)[1:3]):
                model.value, kind.label, chapter.label = name, wanted, place
                chosen = frame[frame["gold"].map(icd.chapter).isin(chapter.value)]
                labels = chosen["kind"].map(lambda kind: plots.KINDS[kind].label)
                if wanted == "any error":
                    chosen = chosen[chosen["kind"] != "full"]
                elif wanted != "any answer":
                    chosen = chosen[labels == wanted]
                assert number.description == f"Case of {len(chosen)}"
                if chosen.empty:
                    assert "No case fits" in view.value and places.NOTICE in view.value
                else:
                    assert f"{plots.label(name)}, " in admissions(view.value)
                    shown = int(admissions(view.value).split(":")[0])
                    assert shown in set(chosen["hadm_id"])


def test_explore_pages_and_stays_within_bounds(hospital):
    cases, tables = hospital
    model, chapter, kind, number, view = parts(explorer.explore(cases, tables, rewards=[]))
    assert number.value == 1 and "Admission 20000000:" in view.value
    number.value = 2
    assert "Admission 20000001:" in view.value
    number.value = 99
    assert number.value == 80 and "Admission 20000079:" in view.value
    kind.label = "any error"
    assert number.value == number.max < 80, "the last case that fits"
    model.value, kind.label = "base", "right code"
    assert number.max == 1 and "No case fits" in view.value
    kind.label = "any answer"
    assert "Admission 20000000: Base" in view.value


def test_explore_says_what_is_wrong(hospital):
    cases, tables = hospital
    with pytest.raises(ValueError, match="no predictions"):
        explorer.explore(cases, {})
    with pytest.raises(ValueError, match="share no hadm_id"):
        explorer.explore(cases.assign(hadm_id=cases["hadm_id"] + 1000), tables)


def test_what_mattered_is_dashed_for_cases_of_the_synthetic_hospital_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("ICD_DATA_DIR", str(tmp_path / "synthetic"))
    case = {**CASE, "note": "CC: chest pain\nHPI: He has crushing chest pain.", "code": "I214"}
    telling = explorer.telling_findings(case["note"], case["code"])
    assert telling and all(phrase in case["note"] for phrase in telling)
    assert explorer.telling_findings(case["note"], "A0101") == [], "the casebook lacks that code"
    answers = {"sft": answer("It is what it is.", "I214")}
    assert "<ins" not in explorer.case_html(case, answers), "no hospital wrote it: it may be real"
    truth = tmp_path / "synthetic" / "truth"
    truth.mkdir(parents=True)
    ids = pd.DataFrame({"hadm_id": [case["hadm_id"] + 1]})
    ids.to_parquet(truth / "findings.parquet")
    assert "<ins" not in explorer.case_html(case, answers), "it is of another hospital"
    (ids - 1).to_parquet(truth / "findings.parquet")
    assert "<ins" in explorer.case_html(case, answers)
