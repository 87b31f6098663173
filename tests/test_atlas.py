"""The atlas: what stands in the page, what may not act in it, and where a page may be written."""

from __future__ import annotations

import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest

from helpers import atlas, casebook, icd, metrics, rewards
from helpers.machinery import notebooks, places
from tests.atlas_fixture import Page, answer, invented_run, keep

HOSTILE = {
    "end of a script": "</script><script>window.owned = 1</script><!--<script>",
    "image": '<img src=x onerror="window.owned = 2">',
    "line separators": "a\u2028b\u2029c",
    "entities": "&lt;b&gt;&#60;",
    "100 KB": "<td>chest pain " * 7000,
}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return invented_run(tmp_path_factory.mktemp("made"), admissions=200, test=60)


@pytest.fixture
def run(made: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the invented run; its data folder is that of ICD_DATA_DIR."""
    monkeypatch.setenv("ICD_DATA_DIR", str(made[1]))
    monkeypatch.setenv("ICD_RUNS_DIR", str(tmp_path / "runs"))
    return Path(shutil.copytree(made[0], tmp_path / "runs" / "synthetic-tiny"))


@pytest.fixture
def real_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A data folder without truth: what is made from it counts as credentialed."""
    folder = tmp_path / "mimic"
    (folder / "hosp").mkdir(parents=True)
    monkeypatch.setenv("ICD_DATA_DIR", str(folder))
    return folder


def cases_of(run: Path) -> pd.DataFrame:
    return pd.read_parquet(run / "cases" / "cases.parquet")


def answers_of(run: Path, model: str) -> pd.DataFrame:
    return pd.read_parquet(run / "answers" / model / "answers.parquet")


def leaf_names(page: Page) -> list[str]:
    return [node[2] for node in page.numbers["nodes"]]


# ------------------------------------------------------------------------------- contents


def test_outcomes_are_those_of_metrics(run):
    page = Page(atlas.write(run))
    cases = cases_of(run)
    names = leaf_names(page)
    gold = [names[leaf] for leaf in page.numbers["cases"]["gold"]]
    for model in ("base", "sft", "grpo"):
        expected = metrics.outcomes(cases, answers_of(run, model)).set_index("hadm_id")
        shown = [names[leaf] if leaf >= 0 else None for leaf in page.columns[model]["predicted"]]
        rows = expected.loc[page.numbers["cases"]["hadm_id"]]
        assert gold == list(rows["gold"])
        assert shown == [code if isinstance(code, str) else None for code in rows["predicted"]]
    assert set(page.columns["base"]["predicted"]) == {atlas.UNUSABLE}


def test_rewards_distances_and_texts_are_those_of_the_course(run):
    page = Page(atlas.write(run))
    cases = cases_of(run).set_index("hadm_id")
    table = answers_of(run, "grpo").set_index("hadm_id")
    column = page.columns["grpo"]
    place = list(page.columns).index("grpo")
    for i, hadm_id in enumerate(page.numbers["cases"]["hadm_id"]):
        case, row = cases.loc[hadm_id], table.loc[hadm_id]
        note, _, answers = page.cases[i]
        assert note == case["note"] and answers[place][0] == row["think"]
        columns = {
            "completions": [row["completion"]],
            "code": [case["code"]],
            "note": [case["note"]],
        }
        assert column["total"][i] == pytest.approx(rewards.total(**columns)[0], abs=1e-3)
        assert column["grounding"][i] == pytest.approx(
            rewards.grounding_reward(**columns)[0], abs=1e-3
        )
        code = icd.normalise(row["predicted"])
        assert column["distance"][i] == (icd.tree_distance(code, case["code"]) if code else None)


def test_the_tree_holds_the_four_levels_with_titles_in_the_order_of_the_classification(run):
    page = Page(atlas.write(run))
    nodes = page.numbers["nodes"]
    for place, (depth, parent, key, name, title) in enumerate(nodes):
        assert parent < place and title and name
        assert (parent == -1) == (depth == 0)
        if parent >= 0:
            assert nodes[parent][0] == depth - 1
        if depth == 3:
            category = nodes[parent][2]
            assert category == icd.category(key) and title == icd.title(key)
    chapters = [int(node[2]) for node in nodes if node[0] == 0]
    assert chapters == sorted(chapters)


def test_training_counts_the_training_cases_and_sure_is_the_ideal_readers(run, made):
    page = Page(atlas.write(run))
    cases = cases_of(run)
    train = list(cases.loc[cases["split"] == "train", "code"])
    names = leaf_names(page)
    numbers = page.numbers["cases"]
    assert numbers["trained"] == [train.count(names[leaf]) for leaf in numbers["gold"]]
    ideal = casebook.ideal_reader(made[1]).loc[numbers["hadm_id"]]
    assert numbers["sure"] == pytest.approx(list(ideal["full_p"]), abs=1e-6)
    assert [names[leaf] for leaf in page.columns["ideal"]["predicted"]] == list(ideal["full"])


def test_what_mattered_is_in_the_note_and_speaks_for_the_code(run):
    page = Page(atlas.write(run))
    assert any(missed for _, missed, _ in page.cases)
    assert all(phrase in note for note, missed, _ in page.cases for phrase in missed)
    note = "CC: chest pain\nHPI: He has crushing chest pain."
    assert atlas.telling_findings(note, "I214")
    assert atlas.telling_findings(note, "A0101") == [], "the casebook lacks that code"


def test_a_malformed_answer_keeps_its_whole_completion_and_says_why(run):
    page = Page(atlas.write(run))
    place = list(page.columns).index("base")
    for _, _, answers in page.cases:
        think, problem, completion = answers[place]
        assert "</think>" in problem and completion.startswith(think)
    table = answers_of(run, "sft")
    row = next(cases_of(run).itertuples())
    text = "because\n</think>\n<diagnosis>I21.99</diagnosis>"
    table.loc[table["hadm_id"] == row.hadm_id, ["completion", "predicted"]] = [text, None]
    keep(run / "answers" / "sft", table)
    page = Page(atlas.write(run))
    first = page.numbers["cases"]["hadm_id"].index(row.hadm_id)
    assert page.cases[first][2][1] == ["because", "I21.99 does not exist", text]


def test_whether_the_reasoning_names_the_category_of_the_answer(run):
    row = next(cases_of(run).itertuples())
    for category, named in (("I21", 1), ("I50", 2), ("", 0)):
        text = f"Circulatory: {category} x.\n</think>\n<diagnosis>I21.4</diagnosis>"
        keep(run / "answers" / "sft", pd.DataFrame([answer(row, text, "I21.4")]))
        page = Page(atlas.write(run))
        first = page.numbers["cases"]["hadm_id"].index(row.hadm_id)
        assert page.columns["sft"]["named"][first] == named


# ------------------------------------------------------------------------------- which columns


def test_columns_stand_in_the_order_of_the_tables_and_experiments_after_them(run):
    keep(run / "experiments" / "small_r" / "answers" / "sft", answers_of(run, "sft"))
    keep(run / "answers" / "tfidf", answers_of(run, "sft").assign(completion="", think=""))
    page = Page(atlas.write(run))
    assert list(page.columns) == ["tfidf", "base", "sft", "grpo", "sft@small_r", "ideal"]
    assert page.columns["sft@small_r"]["label"] == "SFT · small_r"
    assert set(page.columns["tfidf"]["total"]) == {None}, "no text, so no reward"


def test_another_run_stands_beside_it_if_its_cases_are_the_same(run, tmp_path):
    other = Path(shutil.copytree(run, tmp_path / "runs" / "synthetic-small"))
    page = Page(atlas.write(run, other))
    assert "grpo:synthetic-small" in page.columns
    assert page.columns["grpo:synthetic-small"]["label"] == "GRPO · synthetic-small"
    assert page.columns["grpo:synthetic-small"]["predicted"] == page.columns["grpo"]["predicted"]
    cases = cases_of(other)
    cases.loc[3, "note"] += " and more"
    keep(other / "cases", cases, "cases.parquet")
    with pytest.raises(ValueError, match="1 with another note or code"):
        atlas.write(run, other)


def test_one_model_alone_and_cases_that_it_was_not_asked(run):
    few = answers_of(run, "grpo").head(7)
    for model in ("base", "sft"):
        shutil.rmtree(run / "answers" / model)
    keep(run / "answers" / "grpo-samples", pd.concat([few, few.assign(sample=1, predicted="A419")]))
    page = Page(atlas.write(run))
    assert list(page.columns) == ["grpo", "grpo-samples", "ideal"]
    column = page.columns["grpo-samples"]["predicted"]
    assert column.count(atlas.NOT_ASKED) == len(column) - 7
    asked = [leaf for leaf in column if leaf != atlas.NOT_ASKED]
    assert asked == page.columns["grpo"]["predicted"][:7], "the first sample counts"
    answers = page.cases[-1][2]
    assert answers[list(page.columns).index("grpo-samples")] is None


def test_what_is_half_written_or_empty_is_left_out_and_named(run, capsys):
    (run / "answers" / "sft" / "made_from.json").unlink()
    keep(run / "answers" / "base", answers_of(run, "base").head(0))
    page = Page(atlas.write(run))
    assert list(page.columns) == ["grpo", "ideal"]
    told = capsys.readouterr().out
    assert all(
        f"answers/{model}: not whole, or no case answered" in told for model in ("sft", "base")
    )


def test_old_answers_without_reasoning_or_sample_are_read(run):
    keep(run / "answers" / "sft", answers_of(run, "sft")[["hadm_id", "predicted"]])
    page = Page(atlas.write(run))
    assert set(page.columns["sft"]["grounding"]) == {None}
    assert page.cases[0][2][list(page.columns).index("sft")] == ["", None, None]


def test_macro_f1_comes_from_metrics_json_where_there_is_one(run):
    assert Page(atlas.write(run)).numbers["scores"] == {}
    scores = {"sft": {"full": {"f1_gold": 0.5, "ci": [0.4, 0.6]}}}
    (run / "metrics.json").write_text(json.dumps({"models": scores}))
    assert Page(atlas.write(run)).numbers["scores"] == scores


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: shutil.rmtree(run / "cases"), "no run folder"),
        (lambda run: shutil.rmtree(run / "answers"), "Run 05_inference first"),
        (
            lambda run: keep(run / "answers/sft", answers_of(run, "sft").drop(columns="predicted")),
            "predicted",
        ),
        (
            lambda run: keep(run / "answers/sft", answers_of(run, "sft").assign(hadm_id=range(60))),
            "60 of 60 answers are for admissions that are not in the table of cases",
        ),
    ],
)
def test_what_is_wrong_is_said_and_nothing_is_written(run, spoil, message, capsys):
    spoil(run)
    assert atlas.main([str(run)]) == 1
    assert message in capsys.readouterr().err
    assert not (run / "atlas.html").exists()


def test_the_command_writes_the_page_of_the_course_by_default(run, monkeypatch, capsys):
    monkeypatch.setattr(places, "run_dir", lambda: run)
    assert atlas.main([]) == 0
    told = capsys.readouterr().out
    assert "atlas.html" in told and " MB" in told and places.NOTICE in told
    assert (run / "atlas.html").is_file()


# ------------------------------------------------------------------------------- nothing acts, nothing leaves


@pytest.mark.parametrize("what", HOSTILE)
def test_nothing_that_others_wrote_becomes_markup(run, what):
    clean = Page(atlas.write(run))
    text = HOSTILE[what]
    cases = cases_of(run)
    cases.loc[0, "note"] += text
    keep(run / "cases", cases, "cases.parquet")
    table = answers_of(run, "sft")
    table.loc[0, "completion"] = f"{text}\n</think>\n<diagnosis>{text[:200]}</diagnosis>"
    keep(run / "answers" / "sft", table)
    name = '</title><script>window.owned = 3</script>"'
    (run / "metrics.json").write_text(json.dumps({"models": {name: {}}}))
    page = Page(atlas.write(run))
    assert [tag for tag, _ in page.tags] == [tag for tag, _ in clean.tags]
    assert "\u2028" not in page.text and page.text.isascii() == clean.text.isascii()
    i = page.numbers["cases"]["hadm_id"].index(int(cases.loc[0, "hadm_id"]))
    assert page.cases[i][0] == cases.loc[0, "note"], "and the text is whole"


def test_a_lone_surrogate_survives_the_json():
    lone = "a\ud800b"  # no parquet file holds one, a JSON of another origin may
    text = atlas._json([lone, HOSTILE["line separators"]])
    assert text.isascii() and json.loads(text)[0] == lone


def test_the_page_asks_the_network_for_nothing_and_runs_its_own_script_alone(run):
    page = Page(atlas.write(run))
    loading = {"src", "href", "action", "data", "srcset", "poster"}
    links = [
        value for _, attributes in page.tags for key, value in attributes.items() if key in loading
    ]
    assert all(link.startswith("#") for link in links)
    assert "url(" not in page.text.split("</style>")[0] and "@import" not in page.text
    policy = next(
        a["content"] for tag, a in page.tags if "content-security-policy" in str(a).lower()
    )
    assert "default-src 'none'" in policy and "script-src 'sha256-" in policy
    script = next(text for attributes, text in page.scripts if "type" not in attributes)
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", script)
    assert not re.search(r"\bfetch\(|XMLHttpRequest|WebSocket|import\(", script)


def test_the_notice_is_on_every_page(run, real_data):
    text = atlas.write(run).read_text()
    assert "Research and teaching only, never clinical use." in text


def test_credentialed_data_stay_in_the_run_folder_and_the_page_says_so(run, real_data, tmp_path):
    with pytest.raises(ValueError, match="inside the run folder alone"):
        atlas.write(run, out=tmp_path / "atlas.html")
    with pytest.raises(ValueError, match="inside the run folder alone"):
        atlas.write(run, out=run / ".." / "atlas.html")
    (run / "link").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="inside the run folder alone"):
        atlas.write(run, out=run / "link" / "atlas.html")
    assert not (tmp_path / "atlas.html").exists()
    page = Page(atlas.write(run))
    assert "must not leave this machine" in page.text and "are synthetic" not in page.text
    assert "ideal" not in page.columns and set(page.numbers["cases"]["sure"]) == {None}
    assert all(missed == [] for _, missed, _ in page.cases)


def test_a_synthetic_page_may_stand_anywhere_and_has_no_such_banner(run, tmp_path):
    page = Page(atlas.write(run, out=tmp_path / "out" / "page.html"))
    assert "must not leave" not in page.text and "are synthetic" in page.text


@pytest.mark.parametrize("column", ["hadm_id", "subject_id"])
def test_cases_of_another_hospital_count_as_credentialed(run, column):
    """The data folder of the course is the default: a run on real notes must not borrow its truth."""
    cases = cases_of(run)
    cases.loc[0, column] += 7_000_000
    keep(run / "cases", cases, "cases.parquet")
    for folder in (run / "answers").glob("[!.]*/"):
        keep(folder, pd.read_parquet(folder / "answers.parquet").tail(59))
    assert "must not leave this machine" in atlas.write(run).read_text()


def test_a_truth_without_manifest_does_not_count(run, made, tmp_path):
    data = Path(shutil.copytree(made[1], tmp_path / "copy"))
    (data / "truth" / "manifest.json").unlink()
    assert "must not leave this machine" in atlas.write(run, data=data).read_text()


def test_an_older_hospital_has_a_page_without_ideal_reader(run, made, tmp_path, capsys):
    data = Path(shutil.copytree(made[1], tmp_path / "copy"))
    manifest = data / "truth" / "manifest.json"
    manifest.write_text(json.dumps(json.loads(manifest.read_text()) | {"casebook_sha256": "old"}))
    page = Page(atlas.write(run, data=data))
    assert "are synthetic" in page.text and "ideal" not in page.columns
    assert "no ideal reader on the page" in capsys.readouterr().out


# ------------------------------------------------------------------------------- notebook and report


def test_in_a_notebook_the_page_stands_in_a_frame_while_a_person_watches(run, monkeypatch):
    page = atlas.write(run)
    monkeypatch.delenv("ICD_HEADLESS", raising=False)
    frame = Frame()
    frame.feed(atlas.show(page).data)
    assert frame.srcdoc == page.read_text(encoding="utf-8")
    monkeypatch.setenv("ICD_HEADLESS", "1")
    text = atlas.show(page).data
    assert "iframe" not in text and "atlas.html" in text and len(text) < 400


class Frame(HTMLParser):
    srcdoc = ""

    def handle_starttag(self, tag: str, attrs: list) -> None:
        self.srcdoc += dict(attrs).get("srcdoc", "")


def test_a_credentialed_page_is_never_put_into_a_notebook(run, real_data, monkeypatch):
    monkeypatch.delenv("ICD_HEADLESS", raising=False)
    page = atlas.write(run)
    text = atlas.show(page).data
    assert "credentialed" in text and "srcdoc" not in text
    assert cases_of(run)["note"][0][:30] not in text


def test_the_report_links_the_atlas_of_synthetic_data_alone(run, monkeypatch, real_data, made):
    (run / "metrics.json").write_text('{"models": {}}')
    monkeypatch.setattr(places, "run_dir", lambda: run)
    atlas.write(run)
    assert "atlas.html" not in notebooks.write_report().read_text()
    monkeypatch.setenv("ICD_DATA_DIR", str(made[1]))
    atlas.write(run)
    assert 'href="atlas.html"' in notebooks.write_report().read_text()
    (run / "atlas.html").unlink()
    assert "atlas.html" not in notebooks.write_report().read_text()
