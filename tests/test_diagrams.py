"""The five diagrams: what they say is what the course computes, they can be read, and the committed files are today's."""

from __future__ import annotations

import ast
import hashlib
import html
import itertools
import re
from pathlib import Path

import matplotlib
import nbformat
import numpy as np
import pytest
from matplotlib import rc_context
from matplotlib.text import Text
from PIL import Image

from helpers import icd, models, notes, profiles, prompts, rewards
from helpers.machinery import places
from tools import diagrams

ROOT = Path(__file__).parent.parent
NAMES = sorted(diagrams.DIAGRAMS)
IN_NOTEBOOK = {
    "icd_tree": "00_start_here",
    "stay": "01_data_preparation",
    "lora": "03_lora_sft",
    "nf4": "04_qlora_grpo",
    "grpo": "04_qlora_grpo",
}


@pytest.fixture(scope="module")
def pages() -> dict[str, diagrams.Page]:
    """Every diagram, drawn once."""
    drawn = {}
    with rc_context(diagrams.STYLE):
        for name, draw in diagrams.DIAGRAMS.items():
            drawn[name] = draw()
            drawn[name].figure.canvas.draw()
    return drawn


def words(page: diagrams.Page) -> list[Text]:
    """All text of a page."""
    return [text for text in page.figure.findobj(Text) if text.get_text().strip()]


def said(page: diagrams.Page) -> str:
    """All text of a page, in one line."""
    return " ".join(" ".join(text.get_text() for text in words(page)).split())


# ---------------------------------------------------------------------------------------- reading


@pytest.mark.parametrize("name", NAMES)
def test_no_text_is_small_and_none_leaves_the_page(name: str, pages) -> None:
    figure = pages[name].figure
    assert tuple(figure.get_size_inches()) == pytest.approx((40 / 3, 7.5))
    width, height = figure.canvas.get_width_height()
    edge = 0.12 * diagrams.DPI  # inches
    for text in words(pages[name]):
        box = text.get_window_extent()
        assert text.get_size() >= 14, text.get_text()
        assert box.x0 >= edge and box.x1 <= width - edge, text.get_text()
        assert box.y0 >= edge and box.y1 <= height - edge, text.get_text()


@pytest.mark.parametrize("name", NAMES)
def test_no_text_lies_on_another(name: str, pages) -> None:
    for one, other in itertools.combinations(words(pages[name]), 2):
        overlap = one.get_window_extent().padded(-1).overlaps(other.get_window_extent().padded(-1))
        assert not overlap, (one.get_text(), other.get_text())


@pytest.mark.parametrize("name", NAMES)
def test_a_text_fits_into_its_box(name: str, pages) -> None:
    for text, patch in pages[name].boxed:
        inner, outer = text.get_window_extent(), patch.get_window_extent()
        assert outer.x0 + 3 < inner.x0 and inner.x1 < outer.x1 - 3, text.get_text()
        assert outer.y0 - 2 < inner.y0 and inner.y1 < outer.y1 + 2, text.get_text()


@pytest.mark.parametrize("name", NAMES)
def test_text_stands_out_from_what_is_behind_it(name: str, pages) -> None:
    def luminance(colour) -> float:
        channels = np.array(matplotlib.colors.to_rgb(colour))
        linear = np.where(
            channels <= 0.03928, channels / 12.92, ((channels + 0.055) / 1.055) ** 2.4
        )
        return float(linear @ [0.2126, 0.7152, 0.0722])

    behind = {id(text): patch.get_facecolor() for text, patch in pages[name].boxed}
    for text in words(pages[name]):
        pair = sorted(map(luminance, (text.get_color(), behind.get(id(text), diagrams.PANEL))))
        assert (pair[1] + 0.05) / (pair[0] + 0.05) >= 4.5, text.get_text()  # WCAG, AA


# ------------------------------------------------------------------------------------ the numbers


def test_the_tree_has_the_distances_and_rewards_of_the_course(pages) -> None:
    rows = diagrams.tree_numbers()
    assert [row["code"] for row in rows] == ["I21.02", "I21.4", "I48.91", "J18.9"]
    assert rows[0]["nodes"] == ["9", "I20-I25", "I21", "I21.0", "I21.02"]
    for row in rows:
        assert row["distance"] == icd.tree_distance("I21.02", row["code"])
        assert row["up"] + row["down"] == row["distance"], "the picture counts other steps"
        assert f"reward {row['reward']:.2f} distance {row['distance']}" in said(pages["icd_tree"])
    assert [row["distance"] for row in rows] == [0, 3, 8, 9]
    credits = [rewards.EXACT, rewards.CATEGORY, rewards.CHAPTER, rewards.WRONG]
    assert [row["reward"] for row in rows] == credits


def test_the_drawn_edges_are_those_of_the_classification() -> None:
    import simple_icd_10_cm as cm

    for row in diagrams.tree_numbers():
        for upper, lower in itertools.pairwise(row["nodes"]):
            assert cm.get_parent(lower) == upper
            assert lower in diagrams.COMMON
    assert len(diagrams.chapters()) == 22


def test_the_stay_sorts_sections_as_the_reader_of_notes_does(pages) -> None:
    parts = diagrams.stay_numbers()
    assert len(parts["used"]) == len(notes.ADMISSION), "a section of admission is missing"
    assert sorted(parts["used"] + parts["left out"]) == sorted(diagrams.SUMMARY)
    text = "\n\n".join(f"{heading}:\n{content}" for heading, content in diagrams.SUMMARY)
    note, found = notes.admission_note(text), notes.sections(text)
    assert len(found) == len(diagrams.SUMMARY) and "later" not in found
    for heading, content in parts["left out"]:
        assert content not in note
        assert heading.split()[0] in ("Discharge", "Major", "Pertinent", "Brief")
    by_content = {content: name for name, content in found.items()}
    assert {by_content[content] for _, content in parts["used"]} == set(notes.ADMISSION)
    left = next(t for t in words(pages["stay"]) if t.get_text() == "lisinopril")
    right = next(t for t in words(pages["stay"]) if t.get_text() == "treated for STEMI")
    assert left.get_position()[0] < diagrams.WIDTH / 2 < right.get_position()[0]


def test_lora_has_the_sizes_that_peft_makes(pages) -> None:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    settings = profiles.get("tiny").lora
    base = AutoModelForCausalLM.from_pretrained(models.TINY_BASE)
    frozen = sum(weight.numel() for weight in base.parameters())
    lora = LoraConfig(**settings, target_modules="all-linear", task_type="CAUSAL_LM")
    adapted = get_peft_model(base, lora)
    sizes = diagrams.lora_numbers()
    shapes = {
        name: tuple(weight.shape)
        for name, weight in adapted.named_parameters()
        if diagrams.LAYER.removesuffix(".weight") in name
    }
    [a] = [shape for name, shape in shapes.items() if "lora_A" in name]
    [b] = [shape for name, shape in shapes.items() if "lora_B" in name]
    [w] = [shape for name, shape in shapes.items() if "lora_" not in name]
    assert a == (sizes["r"], sizes["d_in"]) and b == (sizes["d_out"], sizes["r"])
    assert w == (sizes["d_out"], sizes["d_in"])
    trained = [p for p in adapted.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == sizes["all"]
    assert len(trained) == 2 * sizes["layers"] and frozen == sizes["model"]
    for number in (sizes["W"], sizes["A"] + sizes["B"]):
        assert f"{number:,}" in said(pages["lora"])


def test_nf4_is_what_bitsandbytes_does_to_this_layer(pages) -> None:
    import torch
    from bitsandbytes import functional
    from safetensors import safe_open

    numbers = diagrams.nf4_numbers()
    with safe_open(models.TINY_BASE / "model.safetensors", "pt") as file:
        weight = file.get_tensor(diagrams.LAYER).float()
    packed, state = functional.quantize_4bit(weight, quant_type="nf4")
    blocks = weight.reshape(-1, state.blocksize)
    largest = blocks.abs().amax(1, keepdim=True)
    back = functional.dequantize_4bit(packed, state).reshape(blocks.shape)
    error = ((back - blocks) / largest).pow(2).mean().sqrt()
    assert numbers["error"] == pytest.approx(float(error), rel=1e-4)
    assert numbers["error"] < numbers["even_error"]
    assert len(numbers["levels"]) == len(numbers["even"]) == 16
    assert set(np.round(numbers["levels"], 4)) >= set(
        np.round(torch.unique(back / largest).numpy(), 4)
    )
    assert np.abs(numbers["weights"]).max() == 1 and len(numbers["weights"]) == weight.numel()
    for level in numbers["levels"]:
        assert f"{level:.2f}".replace("-", "−") in said(pages["nf4"])


def test_grpo_has_the_advantages_that_trl_computes(pages) -> None:
    import torch
    from trl import GRPOConfig
    from trl.trainer.utils import nanstd

    fields = GRPOConfig.__dataclass_fields__
    for name in ("scale_rewards", "multi_objective_aggregation"):
        assert all(name not in profile.grpo for profile in profiles.PROFILES.values()), (
            f"{name} is set in a profile: diagrams.advantages is the formula of TRL's default"
        )
    assert fields["scale_rewards"].default == "group"
    assert fields["multi_objective_aggregation"].default == "sum_then_normalize"
    rows = diagrams.grpo_numbers()
    paid = torch.tensor([row["reward"] for row in rows])
    expected = (paid - paid.mean()) / (nanstd(paid) + 1e-4)
    assert [row["advantage"] for row in rows] == pytest.approx(expected.tolist(), abs=1e-5)
    assert sum(row["advantage"] for row in rows) == pytest.approx(0, abs=1e-9)
    hierarchical = rewards.hierarchical_reward([*diagrams.GROUP], [diagrams.GOLD] * 4)
    assert [row["parts"][1] for row in rows] == hierarchical
    for row in rows:
        arrow = "▲" if row["reward"] > float(paid.mean()) else "▼"
        assert f"{row['advantage']:+.2f} {arrow}".replace("-", "−") in said(pages["grpo"])


def test_the_group_is_that_of_notebook_4() -> None:
    nb = nbformat.read(ROOT / "notebooks" / "04_qlora_grpo.ipynb", as_version=4)
    [cell] = [cell for cell in nb.cells if "rollouts = [" in cell.source]
    names = ("gold", "rollouts")
    wanted = [
        node
        for node in ast.parse(cell.source).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") in names
    ]
    values = {"prompts": prompts}
    exec(compile(ast.Module(wanted, []), "cell", "exec"), values)
    assert tuple(values["rollouts"]) == diagrams.GROUP
    assert icd.normalise(values["gold"]) == icd.normalise(diagrams.GOLD)


def test_all_alike_gives_no_advantage() -> None:
    assert diagrams.advantages([0.5] * 4) == [0, 0, 0, 0]


# -------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_svg_says_what_the_code_says_today(name: str, pages) -> None:
    drawing = (diagrams.FOLDER / f"{name}.svg").read_bytes()
    written = {html.unescape(text) for text in re.findall(r"<!-- (.*?) -->", drawing.decode())}
    for text in words(pages[name]):
        for line in text.get_text().split("\n"):
            assert line in written, f"{name}.svg lacks {line!r}: run python -m tools.diagrams"
    today = f"Matplotlib v{matplotlib.__version__},"
    if today.encode() in drawing:  # another matplotlib may round a coordinate in another way
        assert drawing == diagrams.svg(name), f"{name}.svg: run python -m tools.diagrams"


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_png_is_that_of_the_svg(name: str) -> None:
    drawing = (diagrams.FOLDER / f"{name}.svg").read_bytes()
    with Image.open(diagrams.FOLDER / f"{name}.png") as picture:
        assert picture.size == (1600, 900)
        assert picture.text["Source"] == hashlib.sha256(drawing).hexdigest()
        pixels = np.asarray(picture.convert("L"))
    assert (pixels < 250).mean() > 0.03, "an empty page"


def test_nothing_else_lies_in_the_folder() -> None:
    expected = {f"{name}.{kind}" for name in NAMES for kind in ("svg", "png")} | {"README.md"}
    assert {path.name for path in diagrams.FOLDER.iterdir()} == expected


def test_the_command_writes_every_diagram(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(diagrams, "DIAGRAMS", {"lora": diagrams.draw_lora})
    monkeypatch.setattr("sys.argv", ["diagrams", "--out", str(tmp_path / "new")])
    assert diagrams.main() == 0
    assert {path.name for path in (tmp_path / "new").iterdir()} == {"lora.svg", "lora.png"}


# ---------------------------------------------------------------------------------- the notebooks


@pytest.mark.parametrize("name", NAMES)
def test_a_notebook_shows_it_on_colab_too_and_says_what_it_shows(name: str) -> None:
    # Colab shows no attachment, and opens a notebook without the files beside it.
    owner_repo = places.REPOSITORY.removeprefix("https://github.com/")
    raw = f"https://raw.githubusercontent.com/{owner_repo}/main/docs/diagrams/{name}.png"
    cells = nbformat.read(ROOT / "notebooks" / f"{IN_NOTEBOOK[name]}.ipynb", as_version=4).cells
    [cell] = [cell for cell in cells if f"/{name}.png" in cell.source]
    shown = f"[![{diagrams.alternative(name)}]({raw})](../docs/diagrams/{name}.svg)"
    assert shown in cell.source, f"expected: {shown}"
    sentences = cell.source.replace(shown, "")
    assert cell.cell_type == "markdown" and "*What to see:*" in sentences
    assert not cell.get("attachments")


def test_the_page_of_the_diagrams_shows_all_with_the_same_words() -> None:
    page = (diagrams.FOLDER / "README.md").read_text(encoding="utf-8")
    for name in NAMES:
        assert f"![{diagrams.alternative(name)}]({name}.svg)" in page, name
