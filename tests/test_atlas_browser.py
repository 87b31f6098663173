"""The atlas as a reader meets it: the file opened in a real headless Chromium, by mouse and by keyboard alone.

Screenshots are left in build/test/screenshots, for eyes. The browser can resolve no name, and asks for nothing.
"""

from __future__ import annotations

import csv
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest

from helpers import atlas, icd, metrics
from tests.atlas_fixture import answer, invented_run, keep
from tests.chromium import WAIT, chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.slow
ROOT = Path(__file__).parent.parent
HOSTILE = '</script><script>window.owned = 1</script><img src=x onerror="window.owned = 2">\u2028'
LONG = "chest pain <b>" * 7500 + "a" * 50_000  # 150 KB, the end of it one word


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """(run folder, data folder); the first test case has a hostile note and answer, the second a long one."""
    run, data = invented_run(tmp_path_factory.mktemp("browser"), admissions=600, test=150)
    cases = pd.read_parquet(run / "cases" / "cases.parquet")
    cases.loc[0, "note"] += f" {HOSTILE}"
    cases.loc[1, "note"] += f" {LONG}"
    keep(run / "cases", cases, "cases.parquet")
    table = pd.read_parquet(run / "answers" / "grpo" / "answers.parquet")
    for i, think in enumerate((HOSTILE, LONG)):
        case = next(cases.iloc[[i]].itertuples())
        table.loc[table["hadm_id"] == case.hadm_id] = pd.DataFrame(
            [answer(case, f"Findings: {think}.\n</think>\n<diagnosis>{HOSTILE}</diagnosis>", None)]
        ).to_numpy()
    keep(run / "answers" / "grpo", table)
    atlas.write(run, data=data)
    return run, data


@pytest.fixture(scope="module")
def outcomes(run: tuple[Path, Path]) -> pd.DataFrame:
    """What the page must count: kinds of sft and grpo, and gold code, by hadm_id."""
    cases = pd.read_parquet(run[0] / "cases" / "cases.parquet")
    tables = {}
    for model in ("sft", "grpo"):
        answers = pd.read_parquet(run[0] / "answers" / model / "answers.parquet")
        tables[model] = metrics.outcomes(cases, answers).set_index("hadm_id")
    return tables["sft"].assign(before=tables["sft"]["kind"], after=tables["grpo"]["kind"])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as browser:
        yield browser


class Atlas:
    """The page, by what a reader sees of it."""

    def __init__(self, page: Page, path: Path) -> None:
        self.page = page
        self.path = path
        self.asked: list[str] = []
        self.errors: list[str] = []
        page.set_default_timeout(WAIT)
        page.on("request", lambda request: self.asked.append(request.url))
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", lambda dialog: (self.errors.append(dialog.message), dialog.dismiss()))

    def open(self, view: str = "") -> Atlas:
        self.page.goto("about:blank")  # an address that differs in its view alone loads nothing
        self.page.goto(self.path.as_uri() + view)
        self.page.locator("body[data-ready]").wait_for()
        return self

    def selected(self) -> int:
        """The number of cases of the selection, once the page has settled."""
        self.settle()
        text = self.page.locator("#count").inner_text()
        return int(re.search(r"[\d,]+", text).group().replace(",", ""))

    def settle(self) -> None:
        self.page.wait_for_timeout(400)
        self.page.locator("body[data-settled]").wait_for()

    def chips(self) -> list[str]:
        self.settle()
        return [
            text.removesuffix(" ×") for text in self.page.locator("#chips .chip").all_inner_texts()
        ]

    def view(self) -> str:
        self.settle()
        return str(self.page.evaluate("location.hash"))

    def node(self, name: str) -> Any:
        return self.page.locator(f"#tree [aria-label^='{name}']:visible").first

    def case(self) -> str:
        self.settle()
        return self.page.locator("#case h3").inner_text()

    def shot(self, name: str) -> None:
        folder = ROOT / "build" / "test" / "screenshots"
        folder.mkdir(parents=True, exist_ok=True)
        self.page.screenshot(path=folder / f"atlas-{name}.png", full_page=True)


@pytest.fixture
def page(browser: Browser, run: tuple[Path, Path]) -> Iterator[Atlas]:
    """The page at 1,280 pixels in a browser that has kept nothing."""
    context = browser.new_context(viewport={"width": 1280, "height": 900}, accept_downloads=True)
    view = Atlas(context.new_page(), run[0] / "atlas.html").open()
    yield view
    assert not view.errors, view.errors
    assert all(url.startswith(("file://", "about:", "blob:")) for url in view.asked), view.asked
    context.close()


def test_a_node_of_the_tree_zooms_filters_and_goes_back(page, outcomes):
    assert page.selected() == 150
    chapter = 9
    inside = outcomes["gold"].map(icd.chapter) == chapter
    page.node("chapter 9 ").click()
    assert page.selected() == inside.sum()
    assert page.chips() == ["true chapter 9 Circulatory"]
    box = page.node("chapter 9 ").bounding_box()
    assert box["height"] > 500, "it fills the tree"
    code = outcomes.loc[inside, "gold"].value_counts().index[0]
    page.node(f"code {icd.dotted(code)},").click()
    assert page.selected() == (outcomes["gold"] == code).sum()
    page.page.locator("#crumbs button", has_text="9 Circulatory").click()
    assert page.selected() == inside.sum()
    page.page.go_back()
    assert page.selected() == (outcomes["gold"] == code).sum(), "the browser's own back"
    page.page.keyboard.press("x")
    assert page.selected() == 150 and page.chips() == []


def test_a_cell_of_the_transition_matrix_counts_filters_and_combines(page, outcomes):
    counts = pd.crosstab(outcomes["before"], outcomes["after"])
    for a in counts.index:
        for b in counts.columns:
            cell = page.page.locator(
                f"#transition [data-key=c{5 * metrics.KINDS.index(a) + metrics.KINDS.index(b)}]"
            )
            assert int(cell.inner_text()) == counts.loc[a, b]
    page.page.get_by_role("button", name="SFT wrong chapter, GRPO right code").click()
    assert page.selected() == counts.loc["wrong", "full"]
    page.page.get_by_role("button", name="SFT right category, GRPO right code").click()
    assert page.selected() == counts.loc[["wrong", "category"], "full"].sum(), "two cells, either"
    page.node("chapter 9 ").click()
    both = (outcomes["after"] == "full") & outcomes["before"].isin(["wrong", "category"])
    circulatory = outcomes["gold"].map(icd.chapter) == 9
    assert page.selected() == (both & circulatory).sum()
    page.page.keyboard.press("x")
    page.page.get_by_role("button", name=re.compile(r"\d+ repaired")).click()
    repaired = (outcomes["after"] == "full") & (outcomes["before"] != "full")
    assert page.selected() == repaired.sum()
    assert page.chips() == ["repaired: SFT wrong → GRPO right"]


def test_scores_and_intervals_of_a_selection(page, outcomes):
    from scipy.stats import binomtest

    page.node("chapter 9 ").click()
    rows = outcomes[outcomes["gold"].map(icd.chapter) == 9]
    hits = int((rows["after"] == "full").sum())
    page.settle()
    line = page.page.locator("#scores tr", has_text="right code")
    assert f"{100 * hits / len(rows):.0f} %" in line.locator("td").nth(1).inner_text()
    low, high = binomtest(hits, len(rows)).proportion_ci(method="wilson")
    shown = line.locator("td").nth(1).locator(".interval").inner_text()
    assert shown == f"[{100 * low:.0f}, {100 * high:.0f}]"
    gap = 100 * ((rows["after"] == "full").mean() - (rows["before"] == "full").mean())
    assert float(
        line.locator("td").last.locator("b").inner_text().split(" ")[0].replace("−", "-")
    ) == pytest.approx(gap, abs=0.51)


def test_the_address_holds_the_whole_view(page, browser, run):
    page.node("chapter 9 ").click()
    page.page.get_by_label("Words in the note").fill("pain")
    page.page.get_by_label("Colour").select_option("change")
    page.page.locator("#level").select_option("category")
    page.page.locator("[data-key=trained1]").click()
    page.page.get_by_label("Sort by").select_option("gain-")
    n = page.selected()
    page.page.locator("#list").focus()
    page.page.keyboard.press("End")
    case, chips, view = page.case(), page.chips(), page.view()
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    other = Atlas(context.new_page(), run[0] / "atlas.html").open(view)
    assert (other.selected(), other.case(), other.chips(), other.view()) == (n, case, chips, view)
    assert other.page.get_by_label("Words in the note").input_value() == "pain"
    assert other.page.get_by_label("Colour").input_value() == "change"
    context.close()


def test_an_address_that_fits_nothing_is_a_plain_view(page):
    page.open("#a=nobody&node=chapter:99&change=x-y&flow=1&sure=9&case=7&measure=z&level=%00")
    assert page.selected() == 150 and page.chips() == []


def test_the_search_finds_all_words_and_phrases(page, run):
    cases = pd.read_parquet(run[0] / "cases" / "cases.parquet")
    notes = cases.loc[cases["split"] == "test", "note"].str.lower()
    box = page.page.get_by_label("Words in the note")
    box.fill("Pain no")
    assert page.selected() == (notes.str.contains("pain") & notes.str.contains("no")).sum()
    box.fill('"chest pain"')
    assert page.selected() == notes.str.contains("chest pain").sum() > 0
    box.fill("zzzz")
    assert page.selected() == 0
    assert "No case passes all filters" in page.page.locator("#case").inner_text()
    box.fill("")
    assert page.selected() == 150
    table = pd.read_parquet(run[0] / "answers" / "grpo" / "answers.parquet")
    page.page.get_by_label("Words in the reasoning").fill("stemi")
    assert page.selected() == table["completion"].str.lower().str.contains("stemi").sum()


def test_confusions_and_slices_filter(page, outcomes):
    page.page.locator("#pairs .pair").first.click()
    n = page.selected()
    assert (
        page.page.locator("#pairs [aria-pressed=true] .number").inner_text().startswith(f"{n} of")
    )
    page.page.locator("#chips .chip").click()
    cell = page.page.locator("#heat button", has_text=re.compile(r"^\d+$")).nth(3)
    n = int(cell.inner_text())
    cell.click()
    assert page.selected() == n
    page.page.keyboard.press("x")
    page.settle()  # panels out of view are drawn after the others
    bands = page.page.locator("#facets [data-key^=sure]")
    numbers = [int(text.split(" ")[0]) for text in bands.locator(".number").all_inner_texts()]
    assert sum(numbers) == 150
    bands.nth(4).click()
    assert page.selected() == numbers[4]


def test_two_models_are_compared_word_by_word(page, outcomes):
    page.page.get_by_role("button", name=re.compile(r"\d+ broken")).click()
    page.settle()
    page.page.keyboard.press("n")
    page.page.keyboard.press("n")  # behind the hostile and the long one
    page.settle()
    cards = page.page.locator("#case .card")
    assert cards.count() == 2
    assert "✗" in cards.nth(1).inner_text() and "✗" not in cards.nth(0).inner_text()
    words = [set(cards.nth(k).locator(".think").first.inner_text().split()) for k in (0, 1)]
    marked = "".join(cards.nth(1).locator(".think .different").all_inner_texts())
    assert marked, "the reasons differ"
    only = words[1] - words[0]  # a citation may cut a word from its comma
    assert all(word in marked for word in only), "what only one says is underlined"
    shared = set(re.findall(r"\w+", marked)) - set(re.findall(r"\w+", " ".join(only)))
    assert len(shared) < len(words[1]), "and not everything is"
    assert "mattered, not cited" in page.page.locator("#case").inner_text()
    page.page.keyboard.press("x")
    page.page.locator("#model-a").select_option("base")
    page.settle()
    assert "BASE" in page.page.locator("#case .card").first.inner_text().upper()
    page.page.get_by_role("button", name="Swap A and B").click()
    assert page.page.locator("#model-b").input_value() == "base"
    page.page.locator("#model-a").select_option("base")
    assert "One model is chosen twice" in page.page.locator("#transition-take").inner_text()


def test_what_is_cited_is_marked_in_note_and_reasoning(page, run):
    page.page.get_by_label("Words in the reasoning").fill("findings")
    page.page.keyboard.press("Tab")
    page.page.keyboard.press("n")
    page.page.keyboard.press("n")
    page.settle()
    note = page.page.locator("#case .note")
    marked = {" ".join(text.lower().split()) for text in note.locator("mark").all_inner_texts()}
    assert marked and all(text in note.inner_text().lower() for text in marked)
    think = page.page.locator("#case .card").nth(1).locator(".think").first.inner_text()
    cited = think.split("Findings: ")[1].split(".")[0].lower().split("; ")
    assert marked & {re.sub(r"\s+", " ", phrase) for phrase in cited}


def test_marks_and_comments_are_kept_saved_and_loaded(page, browser, run, tmp_path):
    page.page.keyboard.press("n")
    case = page.case()
    page.page.keyboard.press("m")
    page.page.keyboard.press("c")
    remark = '=1+1, "quoted"\nsecond line; x < y nm?'
    page.page.keyboard.insert_text(remark)
    page.page.keyboard.press("Escape")
    page.page.keyboard.press("n")
    page.page.keyboard.press("m")
    page.open()
    assert "2 marked, 1 commented" in page.page.locator("#kept").inner_text(), "kept over a reload"
    with page.page.expect_download() as download:
        page.page.get_by_role("button", name="Save marks as CSV").click()
    file = tmp_path / "marks.csv"
    download.value.save_as(file)
    with file.open(encoding="utf-8-sig", newline="") as stream:
        rows = list(csv.DictReader(stream))
    first = next(row for row in rows if row["hadm_id"] in case)
    assert len(rows) == 2 and first["mark"] == "1" and first["a"] == "sft" and first["b"] == "grpo"
    assert first["comment"] == f"'{remark}", "no spreadsheet takes it for a formula"
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    other = Atlas(context.new_page(), run[0] / "atlas.html").open()
    assert other.page.locator("#kept").inner_text() == ""
    other.page.locator("#load").set_input_files(file)
    other.page.get_by_text("Loaded 2 cases.").wait_for()
    assert "2 marked, 1 commented" in other.page.locator("#kept").inner_text()
    other.page.locator("[data-key=mine0]").click()
    assert other.selected() == 2
    other.page.keyboard.press("n")
    other.page.keyboard.press("p")
    other.settle()
    assert other.page.locator("#comment").input_value() == remark
    other.page.locator("#load").set_input_files(
        {"name": "x.csv", "mimeType": "text/csv", "buffer": b"a;b\n1;2\n"}
    )
    other.page.get_by_text("Not loaded").wait_for()
    context.close()


def test_two_tabs_keep_the_marks_of_both(page, run):
    other = Atlas(page.page.context.new_page(), run[0] / "atlas.html").open()
    page.page.keyboard.press("m")
    other.page.get_by_text("1 marked").wait_for()  # it hears of the mark
    other.page.keyboard.press("n")
    other.page.keyboard.press("m")
    page.open()
    assert "2 marked" in page.page.locator("#kept").inner_text()


def test_loading_takes_nothing_away_and_reads_what_a_spreadsheet_writes(page):
    page.page.keyboard.press("c")
    page.page.keyboard.insert_text("my own words")
    case = re.search(r"\d+", page.case()).group()
    table = (
        f"hadm_id,mark,comment\r{case}.0,TRUE,theirs\r"  # lines of an old Mac, numbers as floats
    )
    for _ in range(2):
        page.page.locator("#load").set_input_files(
            {"name": "x.csv", "mimeType": "text/csv", "buffer": table.encode()}
        )
        page.page.get_by_text("Loaded 1 case.").wait_for()
        page.settle()
        assert page.page.locator("#comment").input_value() == "my own words\ntheirs"
    assert "1 marked, 1 commented" in page.page.locator("#kept").inner_text()


def test_a_browser_that_keeps_nothing_says_so(browser, run):
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    context.add_init_script("Storage.prototype.setItem = () => { throw new Error('denied') }")
    page = Atlas(context.new_page(), run[0] / "atlas.html").open()
    page.page.keyboard.press("m")
    page.page.get_by_text("1 marked, 0 commented; this browser keeps nothing").wait_for()
    context.close()


def test_back_takes_away_the_last_filter_alone(page):
    page.page.locator("#tree [data-key]:visible").first.click()
    (chip,) = page.chips()
    page.page.get_by_label("Words in the note").fill("pain")
    assert len(page.chips()) == 2
    page.page.go_back()
    assert page.chips() == [chip]
    assert page.page.get_by_label("Words in the note").input_value() == ""


def test_a_pair_stays_under_the_pointer(page):
    page.page.locator("#tree [data-key]:visible").first.click()
    page.settle()
    n = page.selected()
    page.page.locator("#pairs").scroll_into_view_if_needed()
    box = page.page.locator("#pairs button").first.bounding_box()
    place = (box["x"] + 20, box["y"] + 10)
    page.page.mouse.click(*place)
    assert page.selected() < n
    page.page.mouse.click(*place)
    assert page.selected() == n, "the second click takes the filter away"


def test_means_of_few_values_have_no_interval(page):
    page.page.locator("#pairs button").first.click()
    assert page.selected() < 20
    row = page.page.locator("#scores tr", has_text="reward")
    assert "[" not in row.inner_text()


def test_by_keyboard_alone(page, outcomes):
    keys = page.page.keyboard

    def tab_to(selector: str) -> None:
        for _ in range(60):
            keys.press("Tab")
            if page.page.evaluate("s => document.activeElement.matches(s)", selector):
                return
        raise AssertionError(f"Tab does not reach {selector}")

    keys.press("Tab")
    assert page.page.evaluate("document.activeElement.className") == "skip"
    tab_to("#transition *")
    start = page.page.evaluate("document.activeElement.dataset.key")
    keys.press("ArrowDown")
    assert page.page.evaluate("document.activeElement.dataset.key") != start
    keys.press("Enter")
    n = page.selected()
    assert 0 < n < 150 and len(page.chips()) == 1
    assert page.page.evaluate("document.activeElement.closest('#transition') !== null"), (
        "focus stays"
    )
    tab_to("[role=treeitem]")
    keys.press("ArrowDown")
    assert page.page.locator("#tip").is_visible()
    keys.press("Enter")
    assert page.selected() <= n and len(page.chips()) == 2
    label = page.page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert label.startswith("chapter")
    keys.press("ArrowRight")
    assert page.page.evaluate("document.activeElement.ariaLevel") == "2"
    keys.press("u")
    keys.press("x")
    assert page.selected() == 150
    tab_to("#list")
    before = page.case()
    keys.press("ArrowDown")
    keys.press("m")
    assert page.case() != before and "★ Marked" in page.page.locator("#case").inner_text()
    active = page.page.evaluate(
        "document.getElementById(document.querySelector('#list').getAttribute('aria-activedescendant')).ariaSelected"
    )
    assert active == "true"
    keys.press("?")
    page.page.get_by_role("dialog").wait_for()
    keys.press("Escape")
    keys.press("/")
    keys.insert_text("m")
    page.settle()
    assert page.page.evaluate("document.activeElement.id") == "search-note"
    assert page.page.locator("#kept").inner_text().startswith("1 marked"), (
        "a letter in a field is no command"
    )


def test_the_skip_link_keeps_the_view(page, outcomes):
    page.node("chapter 9 ").click()
    n, view = page.selected(), page.view()
    page.page.locator(".skip").focus()
    page.page.keyboard.press("Enter")
    assert page.page.evaluate("document.activeElement.id") == "cases"
    assert (page.selected(), page.view()) == (n, view) and n < 150


def test_from_the_worst_chapter_to_the_sentence_in_three_clicks(page):
    worst = page.page.locator("#heat-take").inner_text().split(" loses most in ")[1].split(":")[0]
    page.node(f"chapter {worst},").click()
    page.settle()
    page.page.locator("#pairs .pair").first.click()
    page.settle()
    page.page.get_by_role("button", name="Read the cases").click()
    note = page.page.locator("#case .note")
    assert note.bounding_box()["y"] < 900, "the note is in view without scrolling by hand"
    assert note.locator("mark, ins").count(), "and what was read, or was not, is marked in it"
    assert page.page.evaluate("document.activeElement.matches('#case h3')")


def test_the_next_case_comes_into_view(page):
    page.settle()
    page.page.keyboard.press("n")
    page.settle()
    assert "2 of 150" in page.case()
    assert 0 < page.page.locator("#case h3").bounding_box()["y"] < 900


def test_single_keys_can_be_switched_off(page):
    page.page.get_by_role("button", name="Help").click()
    page.page.get_by_label("Single keys").uncheck()
    page.page.keyboard.press("Escape")
    page.page.locator("#cases").focus()
    before = page.case()
    page.page.keyboard.press("n")
    assert page.case() == before


def test_the_list_holds_only_the_rows_in_view(page):
    page.settle()
    assert page.page.locator(".row").count() < 40
    page.page.locator("#list").focus()
    page.page.keyboard.press("End")
    assert "150 of 150" in page.case()
    last = page.page.locator(".row[aria-selected=true]")
    assert last.get_attribute("aria-posinset") == "150" and last.is_visible()


def test_what_others_wrote_is_shown_and_does_not_act(page, run):
    cases = pd.read_parquet(run[0] / "cases" / "cases.parquet")
    page.open(f"#case={cases['hadm_id'][0]}")
    page.settle()
    assert HOSTILE.strip("\u2028") in page.page.locator("#case .note").inner_text()
    assert page.page.locator("#case .card").nth(1).text_content().count("window.owned = 2") >= 2
    page.open(f"#case={cases['hadm_id'][1]}")
    page.settle()
    assert len(page.page.locator("#case .note").inner_text()) > 100_000
    assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert page.page.evaluate("window.owned") is None
    assert page.page.locator("img").count() == 0


def test_a_script_that_got_in_would_not_run(page):
    page.page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.owned = 4'}))"
    )
    assert page.page.evaluate("window.owned") is None, (
        "the page's policy names its own script alone"
    )


@pytest.mark.parametrize("width", [1280, 1024, 390])
def test_nothing_is_cut_and_nothing_shifts(browser, run, width):
    context = browser.new_context(viewport={"width": width, "height": 844})
    page = Atlas(context.new_page(), run[0] / "atlas.html")
    page.page.add_init_script(
        "window.shifts = 0; new PerformanceObserver(list => list.getEntries().forEach(e => window.shifts += e.value))"
        ".observe({type: 'layout-shift', buffered: true})"
    )
    page.open()
    page.settle()
    assert page.page.evaluate("shifts") < 0.02
    assert page.page.evaluate("document.documentElement.scrollWidth <= innerWidth"), (
        "no sideways scroll"
    )
    cut = page.page.evaluate(
        "[...document.querySelectorAll('.row .truth')].filter(box => box.firstChild.offsetWidth > box.clientWidth).length"
    )
    assert cut == 0, "the true code of a row is whole"
    notice = page.page.locator("header .notice")
    page.page.locator("#case").scroll_into_view_if_needed()
    box = notice.bounding_box()
    assert notice.is_visible() and box["y"] >= 0 and box["x"] + box["width"] <= width, (
        "in view wherever one is"
    )
    page.shot(str(width))
    context.close()


@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize(
    "view", ["", "#node=chapter:9&change=full-wrong&note=a&sure=4", "#a=sft&b=sft", "#note=zzzz"]
)
def test_axe_finds_nothing(browser, run, view, width):
    axe = pytest.importorskip(
        "axe_playwright_python.sync_playwright",
        reason="axe-playwright-python is missing: pip install -c constraints.txt -e '.[lab,test]'",
    )
    context = browser.new_context(viewport={"width": width, "height": 900}, bypass_csp=True)
    page = Atlas(context.new_page(), run[0] / "atlas.html").open(view)
    page.settle()
    options = {"runOnly": ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]}
    found = axe.Axe().run(page.page, options=options).response["violations"]
    told = [
        (rule["id"], node["html"][:160], node["failureSummary"][:300])
        for rule in found
        for node in rule["nodes"][:3]
    ]
    assert not found, told
    context.close()


def test_a_credentialed_page_says_so_on_its_face(browser, run, tmp_path):
    copy = Path(shutil.copytree(run[0], tmp_path / "mimic-tiny"))
    context = browser.new_context(viewport={"width": 1024, "height": 800})
    page = Atlas(context.new_page(), atlas.write(copy, data=tmp_path / "mimic")).open()
    assert page.page.get_by_text("must not leave this machine").is_visible()
    assert page.page.locator("[data-key^=sure]").count() == 0
    page.shot("credentialed")
    context.close()


def test_a_model_that_lacks_cases_is_named(browser, run, tmp_path):
    part = Path(shutil.copytree(run[0], tmp_path / "synthetic-part"))
    table = pd.read_parquet(part / "answers" / "sft" / "answers.parquet")
    shutil.rmtree(part / "answers" / "sft")
    keep(part / "answers" / "sft", table.tail(40))
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = Atlas(context.new_page(), atlas.write(part, data=run[1])).open()
    page.settle()
    hint = page.page.locator("#scores .hint").inner_text()
    assert hint == "SFT was asked in 40 of these cases: the scores count those of both."
    assert "of 40 answers of SFT" in page.page.locator("#transition-take").inner_text()
    page.page.locator("#model-a").select_option("grpo")
    page.settle()
    assert page.page.locator("#scores .hint").inner_text() == ""
    context.close()


def test_a_page_of_one_model_and_one_with_two_runs(browser, run, tmp_path):
    alone = Path(shutil.copytree(run[0], tmp_path / "synthetic-one"))
    for model in ("base", "sft"):
        shutil.rmtree(alone / "answers" / model)
    context = browser.new_context(viewport={"width": 1280, "height": 900})
    page = Atlas(context.new_page(), atlas.write(alone, data=run[1])).open("#a=grpo&b=grpo")
    assert page.selected() == 150
    page = Atlas(
        context.new_page(), atlas.write(run[0], alone, data=run[1], out=tmp_path / "two.html")
    ).open()
    assert page.page.locator("#model-b").input_value() == "grpo:synthetic-one"
    page.settle()
    assert page.page.locator("#transition-take").inner_text().count(" 0 ") >= 1, (
        "the same answers: no change"
    )
    assert not page.errors
    context.close()
