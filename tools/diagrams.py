"""The five diagrams of the course, drawn from its code and its data: 16:9, ready for a slide.

    python -m tools.diagrams

Each diagram has two parts. A function `<name>_numbers` computes what the drawing says: from the
classification, the reader of notes, the config of the tiny base, bitsandbytes and the rewards. A
function that draws prints these numbers and computes nothing. docs/diagrams/ gets an SVG of each,
for print, and a PNG of 1600 x 900 pixels: Colab and slide programs do not take every SVG.

The page is measured in inches, 13.33 x 7.5, and no text is below 14 points. The same code and the
same matplotlib give the same bytes. Shown in notebooks 0, 1, 3 and 4.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle
from matplotlib.text import Text

from helpers import icd, models, notes, plots, profiles, prompts, rewards

FOLDER = Path(__file__).parent.parent / "docs" / "diagrams"
WIDTH, HEIGHT = 13 + 1 / 3, 7.5  # inches
DPI = 120  # 1600 x 900 pixels
SMALLEST = 14  # points
MARGIN = 0.45  # inches
STYLE = plots.STYLE | {
    "svg.hashsalt": "deepicd-course",  # else the names inside an SVG are new in each run
    "svg.fonttype": "path",  # the same letters on every machine
    "figure.constrained_layout.use": False,
    "font.size": SMALLEST,
}
INK = plots.INK
GREY = "#6B6B6B"
PANEL = "#F3F3F3"
SFT = plots.MODELS["sft"].colour
GRPO = plots.MODELS["grpo"].colour
FROZEN = plots.MODELS["base"].colour


# ------------------------------------------------------------------------------------------ page


@dataclass
class Page:
    """A slide: its figure, axes measured in inches, and which text lies in which box."""

    figure: Figure
    axes: Axes
    boxed: list[tuple[Text, FancyBboxPatch]] = field(default_factory=list)

    def text(self, x: float, y: float, words: str, size: float = SMALLEST, **look: Any) -> Text:
        """Words at a place of the page."""
        return self.axes.text(x, y, words, size=size, **look)

    def box(
        self,
        left: float,
        bottom: float,
        width: float,
        height: float,
        words: str = "",
        *,
        fill: str = "white",
        edge: str = GREY,
        ink: str = INK,
        size: float = SMALLEST,
        **look: Any,
    ) -> FancyBboxPatch:
        """A rounded box with words in its middle."""
        patch = FancyBboxPatch(
            (left, bottom),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.09",
            facecolor=fill,
            edgecolor=edge,
            linewidth=1.6,
            zorder=3,
        )
        self.axes.add_patch(patch)
        if words:
            place = {"ha": "center", "va": "center", "linespacing": 1.25, "zorder": 4} | look
            middle = (left + width / 2, bottom + height / 2)
            self.boxed.append((self.text(*middle, words, size, color=ink, **place), patch))
        return patch

    def arrow(
        self,
        start: tuple[float, float],
        end: tuple[float, float],
        colour: str = GREY,
        **look: Any,
    ) -> None:
        """An arrow between two places."""
        style = {"arrowstyle": "-|>", "mutation_scale": 20, "linewidth": 2.4} | look
        style |= {"shrinkA": 0, "shrinkB": 0}
        self.axes.add_patch(FancyArrowPatch(start, end, color=colour, **style))

    def line(self, xs: list[float], ys: list[float], colour: str = GREY, **look: Any) -> None:
        """A line through places."""
        self.axes.plot(xs, ys, color=colour, solid_capstyle="round", **look)


def page(title: str) -> Page:
    """An empty slide under a title of one or two lines that says what to take away."""
    figure = Figure((WIDTH, HEIGHT), dpi=DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, HEIGHT))
    axes.axis("off")
    slide = Page(figure, axes)
    top = HEIGHT - 0.38
    slide.text(MARGIN, top, title, 23, weight="bold", va="top", linespacing=1.2)
    return slide


# ------------------------------------------------------------------------------------ a: the tree

RIGHT = "I21.02"
ANSWERS = (RIGHT, "I21.4", "I48.91", "J18.9")
COMMON = {  # how people call what has a long official title
    "I20-I25": "Ischemic heart disease",
    "I21": "Heart attack (MI)",
    "I21.0": "STEMI, anterior wall",
    "I21.02": "STEMI, LAD artery",
    "I21.4": "NSTEMI",
    "I30-I5A": "Other heart diseases",
    "I48": "AF and flutter",
    "I48.9": "type not given",
    "I48.91": "AF, unspecified",
    "J09-J18": "Flu and pneumonia",
    "J18": "Pneumonia",
    "J18.9": "Pneumonia, unspecified",
}


def branch(code: str) -> list[str]:
    """The nodes from a chapter down to a code, as the classification has them."""
    import simple_icd_10_cm as cm

    return [*reversed(cm.get_ancestors(code)), code]


@cache
def tree_numbers() -> list[dict[str, Any]]:
    """For each answer: code, nodes, steps up from the right code and down to it, tree distance,
    reward, deepest level shared with the right code ("" for none)."""
    rows = []
    for code in ANSWERS:
        right, other = branch(RIGHT), branch(code)
        shared = sum(a == b for a, b in zip(right, other, strict=False))
        up, down = len(right) - shared, len(other) - shared
        if not shared:  # over the root, which has no name in the classification
            up, down = len(right), len(other)
        answer = prompts.answer("Findings.", code)
        rows.append(
            {
                "code": code,
                "nodes": other,
                "up": up,
                "down": down,
                "distance": icd.tree_distance(RIGHT, code),
                "reward": rewards.hierarchical_reward([answer], [RIGHT])[0],
                "level": icd.deepest_shared(RIGHT, code) or "",
            }
        )
    return rows


KIND = {"full": "full", "category": "category", "chapter": "chapter", "": "wrong"}
TREE_ROWS = {  # level of the tree -> height on the page
    "root": 6.0,
    "chapter": 5.24,
    "block": 4.46,
    "category": 3.68,
    "header": 2.9,
    "full code": 2.12,
}
TREE_COLUMNS = {"I21.02": 3.55, "I21.4": 6.2, "I48.91": 8.85, "J18.9": 11.5}
TREE_BOX = (2.5, 0.52)


def tree_level(node: str) -> str:
    """The row of a node."""
    if node.isdigit():
        return "chapter"
    if "-" in node:
        return "block"
    if node in ANSWERS:
        return "full code"
    return "category" if len(node) == 3 else "header"


def tree_places(rows: list[dict[str, Any]]) -> dict[str, tuple[float, float]]:
    """The place of each node: in the column of the first code that it leads to."""
    places: dict[str, tuple[float, float]] = {}
    for row in rows:
        for node in row["nodes"]:
            column = TREE_COLUMNS[row["code"]]
            places.setdefault(node, (column, TREE_ROWS[tree_level(node)]))
    return places


def draw_tree() -> Page:
    """The tree over four answers, with the distance and the reward of each."""
    rows = tree_numbers()
    near, far = rows[1], rows[3]
    slide = page(
        f"{near['code']}, a sibling, is {near['distance']} steps from the right code and earns "
        f"{near['reward']:.2f};\n{far['code']}, of another chapter, is {far['distance']} steps "
        f"away and earns {far['reward']:.2f}"
    )
    places = tree_places(rows)
    places["root"] = (7.65, TREE_ROWS["root"])
    draw_levels(slide)
    edges = {}
    for row in reversed(rows):  # the path of the right code lies above the others
        nodes = ["root", *row["nodes"]]
        for upper, lower in zip(nodes, nodes[1:], strict=False):
            edges[upper, lower] = row["code"]
    for (upper, lower), code in edges.items():
        draw_edge(slide, places[upper], places[lower], code == RIGHT)
    for node, place in places.items():
        draw_node(slide, node, place, node in rows[0]["nodes"])
    for row in rows:
        draw_answer(slide, row, places[row["code"]])
    number_steps(slide, places)
    return slide


def draw_levels(slide: Page) -> None:
    """A band for each level that the course scores, and the name of each row."""
    for name in ("chapter", "category", "full code"):
        band = (0, TREE_ROWS[name] - 0.34)
        slide.axes.add_patch(Rectangle(band, WIDTH, 0.68, color=PANEL, zorder=0))
    names = {"root": "whole tree", "header": "subcategory"}
    for name, y in TREE_ROWS.items():
        is_scored = name in ("chapter", "category", "full code")
        look = {"weight": "bold"} if is_scored else {"color": GREY}
        slide.text(MARGIN, y, names.get(name, name), va="center", **look)
    words = (
        "Steps are counted along the lines. Grey bands: the three levels that the course scores. "
        "AF: atrial fibrillation."
    )
    slide.text(MARGIN, 0.26, words, color=GREY)


def draw_edge(
    slide: Page, upper: tuple[float, float], lower: tuple[float, float], is_right: bool
) -> None:
    """The line from a node down to another: across first, then down."""
    across = upper[1] - 0.39
    shade, width = (plots.DEEP, 4.5) if is_right else (plots.FAINT, 2)
    xs, ys = [upper[0], upper[0], lower[0], lower[0]], [upper[1], across, across, lower[1]]
    slide.line(xs, ys, shade, linewidth=width, zorder=2 if is_right else 1)


def draw_node(slide: Page, node: str, place: tuple[float, float], is_right: bool) -> None:
    """The box of a node: its name, and its title where that is short."""
    width, height = TREE_BOX
    if node == "root":
        width, words = 1.8, f"{len(chapters())} chapters"
    elif node.isdigit():
        words = f"{node}  {icd.chapter_short(int(node))}"
    else:
        words = f"{node}\n{COMMON[node]}"
    fill, ink = (plots.DEEP, "white") if is_right else ("white", INK)
    edge = plots.DEEP if is_right else plots.FAINT
    look = {"fill": fill, "ink": ink, "edge": edge, "linespacing": 1.05}
    slide.box(place[0] - width / 2, place[1] - height / 2, width, height, words, **look)


def chapters() -> list[str]:
    """The chapters of the classification."""
    import simple_icd_10_cm as cm

    return [code for code in cm.get_all_codes() if cm.is_chapter(code)]


def draw_answer(slide: Page, row: dict[str, Any], place: tuple[float, float]) -> None:
    """Under a full code: distance and reward, in the colour of this kind of answer."""
    kind = plots.KINDS[KIND[row["level"]]]
    ink = "white" if row["level"] in ("full", "category") else INK
    steps = f"{row['up']} up, {row['down']} down" if row["distance"] else "no step"
    words = f"reward {row['reward']:.2f}\ndistance {row['distance']}\n({steps})"
    box = (place[0] - TREE_BOX[0] / 2, 0.68, TREE_BOX[0], 0.98)
    slide.box(*box, words, fill=kind.colour, ink=ink, edge=kind.colour, weight="bold", size=15)


def number_steps(slide: Page, places: dict[str, tuple[float, float]]) -> None:
    """The steps from the right code to its sibling, counted along the lines."""
    right = places[RIGHT]
    sibling = places[ANSWERS[1]]
    between = (TREE_ROWS["header"] + TREE_ROWS["full code"]) / 2
    spots = [
        (right[0], between),
        (right[0], (TREE_ROWS["category"] + TREE_ROWS["header"]) / 2),
        (sibling[0], TREE_ROWS["header"]),
    ]
    for number, (x, y) in enumerate(spots, 1):
        look = {"ha": "center", "va": "center", "weight": "bold", "color": INK, "zorder": 6}
        circle = {"boxstyle": "circle,pad=0.15", "facecolor": "white", "edgecolor": INK}
        slide.text(x, y, str(number), bbox=circle, **look)


# ------------------------------------------------------------------------------------ b: the stay

SUMMARY = (  # an invented discharge summary: heading, text
    ("Allergies", "penicillin"),
    ("Chief Complaint", "chest pain"),
    ("Major Surgical or Invasive Procedure", "stent in the LAD artery"),
    ("History of Present Illness", "crushing chest pressure"),
    ("Past Medical History", "HTN"),
    ("Social History", "smokes 1 ppd"),
    ("Family History", "father with MI at 52"),
    ("Physical Exam", "sweating, lungs clear"),
    ("Discharge Exam", "walks without pain"),
    ("Pertinent Results", "LAD closed on angiogram"),
    ("Brief Hospital Course", "treated for STEMI"),
    ("Medications on Admission", "lisinopril"),
    ("Discharge Medications", "clopidogrel is new"),
    ("Discharge Disposition", "to cardiac rehab"),
    ("Discharge Diagnosis", "STEMI, anterior wall"),
    ("Discharge Instructions", "after your heart attack"),
)


@cache
def stay_numbers() -> dict[str, list[tuple[str, str]]]:
    """Headings and texts of the summary: those that `notes.admission_note` takes over, and those
    that it leaves out."""
    text = "\n\n".join(f"{heading}:\n{words}" for heading, words in SUMMARY)
    note = notes.admission_note(text)
    used = [row for row in SUMMARY if row[1] in note]
    return {"used": used, "left out": [row for row in SUMMARY if row not in used]}


def draw_stay() -> Page:
    """A stay from arrival to coding, and the sections of its discharge summary by when their
    content was known."""
    parts = stay_numbers()
    slide = page(
        f"{len(parts['used'])} of {len(SUMMARY)} sections were known at admission: they make the "
        "note;\nthe others came later, and many give the answer away"
    )
    draw_timeline(slide)
    known = "Known at admission: the admission note"
    draw_sections(slide, 0.45, known, parts["used"], plots.DEEP, "white")
    later = "Known only later: would leak"
    draw_sections(slide, 6.79, later, parts["left out"], plots.SAND, INK)
    return slide


def draw_timeline(slide: Page) -> None:
    """Arrival, admission, discharge and coding on one line."""
    height = 5.42
    slide.line([0.45, 3.9], [height, height], plots.DEEP, linewidth=7, zorder=2)
    slide.arrow((3.9, height), (12.88, height), plots.SAND, linewidth=7, mutation_scale=34)
    marks = {1.2: "arrival", 3.9: "admission", 9.0: "discharge", 11.65: "coding"}
    for place, name in marks.items():
        look = {"markersize": 17, "markeredgecolor": INK, "markerfacecolor": "white"}
        slide.axes.plot(place, height, "o", markeredgewidth=2.5, zorder=5, **look)
        slide.text(place, height + 0.24, name, 16, ha="center", weight="bold")
    said = {
        2.55: "complaint,\nhistory, exam",
        6.45: "tests, procedures, treatment",
        9.0: "the summary\nis written",
        11.65: "the code\nis assigned",
    }
    for place, words in said.items():
        slide.text(place, height - 0.24, words, ha="center", va="top", color=GREY)


def draw_sections(
    slide: Page,
    left: float,
    title: str,
    sections: list[tuple[str, str]],
    shade: str,
    ink: str,
) -> None:
    """A table of sections: heading, and what an invented summary says there."""
    width, row, top = 6.09, 0.435, 4.5
    slide.axes.add_patch(Rectangle((left, 0.35), width, top - 0.35, color=PANEL, zorder=0))
    look = {"fill": shade, "edge": shade, "ink": ink, "weight": "bold", "size": 17}
    slide.box(left, top - 0.5, width, 0.5, title, **look)
    for number, (heading, words) in enumerate(sections):
        y = top - 0.77 - row * number
        heading = heading.replace("Major Surgical or Invasive Procedure", "Procedure")
        slide.text(left + 0.18, y, heading, 15, va="center")
        slide.text(left + 3.25, y, words, 15, va="center", color=GREY)


# ---------------------------------------------------------------------------------------- c: LoRA

LAYER = "model.layers.0.mlp.gate_proj.weight"


@cache
def lora_numbers() -> dict[str, int]:
    """Shapes and parameters of LoRA on the tiny base: from its config and the profile `tiny`.

    d_in and d_out are those of LAYER; `all` counts what LoRA adds to the `layers` linear layers,
    `model` the parameters of the base.
    """
    config = json.loads((models.TINY_BASE / "config.json").read_text(encoding="utf-8"))
    settings = profiles.get("tiny").lora
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    head = hidden // config["num_attention_heads"]
    keys = head * config["num_key_value_heads"]
    shapes = {
        "q_proj": (hidden, hidden),
        "k_proj": (hidden, keys),
        "v_proj": (hidden, keys),
        "o_proj": (hidden, hidden),
        "gate_proj": (hidden, inner),
        "up_proj": (hidden, inner),
        "down_proj": (inner, hidden),
    }
    rank = settings["r"]
    of_block = sum(rank * (d_in + d_out) for d_in, d_out in shapes.values())
    d_in, d_out = shapes["gate_proj"]
    return {
        "d_in": d_in,
        "d_out": d_out,
        "r": rank,
        "alpha": settings["lora_alpha"],
        "W": d_in * d_out,
        "A": rank * d_in,
        "B": d_out * rank,
        "layers": config["num_hidden_layers"] * len(shapes),
        "all": config["num_hidden_layers"] * of_block,
        "model": models.tiny_manifest()["parameters"],
    }


def draw_lora() -> Page:
    """The frozen matrix W and the trained matrices B and A of one layer, to scale."""
    sizes = lora_numbers()
    added = sizes["A"] + sizes["B"]
    slide = page(
        f"LoRA leaves W as it is and trains two thin matrices:\n{added:,} new numbers beside "
        f"{sizes['W']:,} frozen ones"
    )
    unit = 4.0 / sizes["d_out"]  # inches for one row or column
    wide, tall, thin = unit * sizes["d_in"], unit * sizes["d_out"], unit * sizes["r"]
    bottom, left, right, last = 1.62, 2.0, 5.75, 6.5  # the lower edge, and the left ones of W, B, A
    middle = bottom + tall / 2
    factor = sizes["alpha"] / sizes["r"]
    draw_matrix(slide, left, bottom, wide, tall, FROZEN)
    draw_matrix(slide, right, bottom, thin, tall, SFT)
    draw_matrix(slide, last, middle - thin / 2, wide, thin, SFT)
    for place, words in {1.15: "h  =  (", 4.6: f"+  {factor:g} ×", 8.75: ")  x"}.items():
        slide.text(place, middle, words, 30, ha="center", va="center")
    words = f"α / r = {sizes['alpha']} / {sizes['r']}"
    slide.text(4.6, middle - 0.4, words, ha="center", va="top", color=GREY)
    rows, columns, rank = sizes["d_out"], sizes["d_in"], sizes["r"]
    under = (
        (left + wide / 2, bottom, "W", f"{rows} × {columns}, frozen", FROZEN),
        (right + thin / 2, bottom, "B", f"{rows} × {rank}, starts at 0", SFT),
        (last + wide / 2, middle - thin / 2, "A", f"{rank} × {columns}\nstarts random", SFT),
    )
    for place, edge, name, words, shade in under:
        look = {"ha": "center", "va": "top", "color": shade}
        slide.text(place, edge - 0.1, name, 24, weight="bold", **look)
        slide.text(place, edge - 0.55, words, 15, **look)
    words = (
        "To scale: mlp.gate_proj of layer 0 of the tiny base; x goes in, h comes out. B starts at "
        "0: the first step starts from the base."
    )
    slide.text(MARGIN, 0.45, words, va="center", color=GREY)
    draw_shares(slide, sizes)
    return slide


def draw_matrix(
    slide: Page, left: float, bottom: float, width: float, height: float, shade: str
) -> None:
    """A matrix to scale."""
    slide.axes.add_patch(Rectangle((left, bottom), width, height, facecolor=shade))


def draw_shares(slide: Page, sizes: dict[str, int]) -> None:
    """Frozen and trained parameters of the layer and of the whole model."""
    added = sizes["A"] + sizes["B"]
    rows = (
        ("this layer", f"{sizes['W']:,}", f"{added:,}", added / sizes["W"]),
        (
            "the whole model",
            f"{sizes['model'] / 1e6:.2f} million",
            f"{sizes['all'] / 1e6:.2f} million",
            sizes["all"] / sizes["model"],
        ),
    )
    left, width = 9.75, 3.13
    for number, (name, frozen, trained, share) in enumerate(rows):
        top = 5.55 - 2.25 * number
        slide.text(left, top, name, 17, va="center", weight="bold")
        slide.text(left, top - 0.4, f"{frozen} frozen", 15, va="center", color=FROZEN)
        draw_matrix(slide, left, top - 0.86, width, 0.24, FROZEN)
        draw_matrix(slide, left, top - 1.14, width * share, 0.24, SFT)
        words = f"{trained} trained: {share:.0%}"
        slide.text(left, top - 1.42, words, 15, va="center", color=SFT)


# ----------------------------------------------------------------------------------------- d: NF4


@cache
def nf4_numbers() -> dict[str, Any]:
    """LAYER in blocks, each divided by its largest absolute weight, and the levels of NF4.

    `weights` [n] lie in -1 ... 1; `levels` and `even` [16] are NF4's levels, from bitsandbytes, and
    as many at equal distances; `error` and `even_error` the root mean square of the rounding.
    """
    import torch
    from bitsandbytes import functional
    from safetensors import safe_open

    with safe_open(models.TINY_BASE / "model.safetensors", "pt") as file:
        weight = file.get_tensor(LAYER).float()
    _, state = functional.quantize_4bit(weight, quant_type="nf4")
    blocks = weight.reshape(-1, state.blocksize)
    weights = (blocks / blocks.abs().amax(1, keepdim=True)).flatten().numpy()
    levels = functional.get_4bit_type("nf4", device="cpu").numpy()
    even = torch.linspace(-1, 1, len(levels)).numpy()
    return {
        "shape": tuple(weight.shape),
        "block": state.blocksize,
        "weights": weights,
        "levels": levels,
        "even": even,
        "error": rounding_error(weights, levels),
        "even_error": rounding_error(weights, even),
    }


def rounding_error(weights: np.ndarray, levels: np.ndarray) -> float:
    """Root mean square of the distance to the nearest level."""
    borders = (levels[1:] + levels[:-1]) / 2
    nearest = levels[np.digitize(weights, borders)]
    return float(np.sqrt(np.mean((weights - nearest).astype(float) ** 2)))


def draw_nf4() -> Page:
    """The histogram of one matrix, the levels of NF4 through it, and even levels to compare."""
    numbers = nf4_numbers()
    saved = 1 - numbers["error"] / numbers["even_error"]
    slide = page(
        "NF4 puts its 16 levels close together where most weights are:\n"
        f"{saved:.0%} less rounding error than with 16 even levels"
    )
    left, width = 2.2, 10.6
    scale = width / 2.1
    middle = left + width / 2
    counts, borders = np.histogram(numbers["weights"], bins=61, range=(-1, 1))
    heights = counts / counts.max() * 3.15
    floor = 2.62
    for count, start, end in zip(heights, borders, borders[1:], strict=False):
        place = (middle + scale * start, floor)
        bar = Rectangle(place, scale * (end - start), count, facecolor="#C9C9C9", edgecolor="white")
        slide.axes.add_patch(bar)
    for number, level in enumerate(numbers["levels"]):
        x = middle + scale * float(level)
        y = 2.02 - 0.3 * (number % 2)
        slide.line([x, x], [y + 0.17, floor + 3.3], INK, linewidth=2.2, zorder=4)
        words = f"{level:.2f}".replace("-", "−")
        slide.text(x, y, words, ha="center", va="center")
    for level in numbers["even"]:
        x = middle + scale * float(level)
        slide.line([x, x], [1.0, 1.28], plots.FAINT, linewidth=2.5)
    rows, columns = numbers["shape"]
    words = (
        f"{rows} × {columns}\nweights of\none layer,\neach divided\nby the largest\nof its block\n"
        f"of {numbers['block']}"
    )
    slide.text(MARGIN, 4.3, words, 15, va="center", linespacing=1.3)
    slide.text(MARGIN, 1.87, "16 levels\nof NF4", 15, va="center", weight="bold", linespacing=1.3)
    slide.text(MARGIN, 1.14, "16 even levels", 15, va="center", color=GREY)
    words = (
        f"Rounding error (root mean square): NF4 {numbers['error']:.4f}, even levels "
        f"{numbers['even_error']:.4f}. The bars at −1 and 1: the largest weight of each block."
    )
    slide.text(MARGIN, 0.45, words, va="center", color=GREY)
    return slide


# ---------------------------------------------------------------------------------------- e: GRPO

GOLD = "I21.4"
GROUP = (  # the four completions of notebook 4
    prompts.answer(
        "Findings: crushing chest pain; ST depression; troponin 2.4. Detail: ST depression.",
        "I21.4",
    ),
    prompts.answer("Findings: crushing chest pain; troponin 2.4. Detail: none.", "I21.9"),
    prompts.answer("Findings: palpitations. Detail: none.", "I48.91"),
    "Findings: crushing chest pain; crushing chest pain; crushing chest pain",
)
EPSILON = 1e-4  # TRL's


def advantages(values: list[float]) -> list[float]:
    """The advantages of one group, as TRL computes them with scale_rewards="group", its default.

    Source: trl.GRPOTrainer. The standard deviation is that of a sample (n - 1).
    """
    group = np.array(values)
    return [float(one) for one in (group - group.mean()) / (group.std(ddof=1) + EPSILON)]


@cache
def grpo_numbers() -> list[dict[str, Any]]:
    """For each completion: code, deepest level shared with GOLD, parts of the reward, reward and
    advantage."""
    completions, gold = list(GROUP), [GOLD] * len(GROUP)
    totals = rewards.total(completions, gold)
    rows = []
    for number, (completion, advantage) in enumerate(
        zip(completions, advantages(totals), strict=True)
    ):
        code = prompts.parse(completion).code
        rows.append(
            {
                "code": icd.dotted(code),
                "level": icd.deepest_shared(code, GOLD) or "unusable",
                "parts": [reward([completion], [GOLD])[0] for reward in rewards.DEFAULT],
                "reward": totals[number],
                "advantage": advantage,
            }
        )
    return rows


WHAT = {
    "full": "the right code",
    "category": "right category",
    "chapter": "right chapter",
    "unusable": "no answer to use",
}
GRPO_TOP, GRPO_ROW, GRPO_ZERO = 4.36, 0.83, 10.75


def draw_grpo() -> Page:
    """The loop of GRPO: one note, four completions, rewards, advantages, update."""
    rows = grpo_numbers()
    slide = page(
        "GRPO compares completions of one note with each other:\n"
        "above the mean of their group goes up, below goes down"
    )
    size = profiles.get("tiny").grpo["num_generations"]
    heads = {
        2.98: ("1  sample a group", f"here {len(rows)}; in the course {size}"),
        6.35: ("2  reward each", f"{rewards.DEFAULT_WEIGHTS[0]:g} × format + hierarchical"),
        9.3: ("3  compare: advantage", "(reward − mean) / std. deviation"),
    }
    for place, (words, detail) in heads.items():
        slide.text(place, 5.75, words, 17, weight="bold", va="center")
        slide.text(place, 5.38, detail, va="center", color=GREY)
    slide.box(MARGIN, 4.78, 1.95, 1.15, f"admission\nnote; the code\nis {GOLD}", fill=PANEL)
    words = "policy:\nSFT adapter\nover the\nbase in NF4"
    slide.box(
        MARGIN, 2.1, 1.95, 1.6, words, fill=SFT, edge=SFT, ink="white", size=16, weight="bold"
    )
    slide.arrow((MARGIN + 0.97, 4.78), (MARGIN + 0.97, 3.72))
    for number, row in enumerate(rows):
        draw_completion(slide, row, GRPO_TOP - GRPO_ROW * number)
    values = [row["reward"] for row in rows]
    mean, deviation = float(np.mean(values)), float(np.std(values, ddof=1))
    words = f"mean {mean:.2f}, std. deviation {deviation:.2f}"
    slide.text(6.35, 1.5, words, 15, va="center", color=GREY)
    draw_loop(slide)
    return slide


def draw_completion(slide: Page, row: dict[str, Any], bottom: float) -> None:
    """One completion: its answer, its reward, its advantage as a bar."""
    middle = bottom + 0.34
    slide.arrow((2.4, 2.9), (2.95, middle), linewidth=1.8, mutation_scale=14)
    kind = plots.KINDS[row["level"]]
    ink = "white" if row["level"] in ("full", "category") else INK
    words = f"{row['code'] or 'no code'}: {WHAT[row['level']]}"
    look = {"fill": kind.colour, "edge": kind.colour, "ink": ink, "size": 15}
    slide.box(2.98, bottom, 3.1, 0.68, words, **look)
    weight = rewards.DEFAULT_WEIGHTS
    form, content = row["parts"]
    sum_of = f"{weight[0] * form:.1f} + {weight[1] * content:.2f}".replace("+ -", "− ")
    total = f"{row['reward']:.2f}".replace("-", "−")
    slide.text(6.35, middle, f"{sum_of} =", 15, va="center")
    slide.text(8.65, middle, total, 17, va="center", ha="right", weight="bold")
    zero, scale = GRPO_ZERO, 0.95
    advantage = row["advantage"]
    is_up = advantage > 0
    shade = GRPO if is_up else "#7A7A7A"
    bar = Rectangle((zero, middle - 0.24), scale * advantage, 0.48, facecolor=shade)
    slide.axes.add_patch(bar)
    slide.line([zero, zero], [bottom - 0.08, bottom + 0.76], INK, linewidth=1.5, zorder=4)
    number = f"{advantage:+.2f}".replace("-", "−")
    words = f"{number} ▲" if is_up else f"{number} ▼"
    end = zero + max(0.0, scale * advantage) + 0.12
    slide.text(end, middle, words, 16, va="center", weight="bold")


def draw_loop(slide: Page) -> None:
    """The way back from the advantages to the policy."""
    slide.line([GRPO_ZERO, GRPO_ZERO, 1.42], [1.74, 0.82, 0.82], GRPO, linewidth=3)
    slide.arrow((1.42, 0.8), (1.42, 2.08), GRPO, linewidth=3)
    words = "4  update: the tokens of ▲ become more probable, those of ▼ less; then the next notes"
    slide.text(1.42, 0.45, words, 16, va="center", weight="bold")


DIAGRAMS: dict[str, Callable[[], Page]] = {
    "icd_tree": draw_tree,
    "stay": draw_stay,
    "lora": draw_lora,
    "nf4": draw_nf4,
    "grpo": draw_grpo,
}


# ---------------------------------------------------------------------------------- in words


def alternative(name: str) -> str:
    """What a diagram shows, in words: for readers who do not see it. Raises KeyError for an unknown
    name."""
    writers = {
        "icd_tree": tree_words,
        "stay": stay_words,
        "lora": lora_words,
        "nf4": nf4_words,
        "grpo": grpo_words,
    }
    return writers[name]()


def tree_words() -> str:
    """The tree, in words."""
    said = [
        f"{row['code']} at distance {row['distance']} earns {row['reward']:.2f}"
        for row in tree_numbers()
    ]
    path = ", ".join(tree_numbers()[0]["nodes"])
    return (
        f"The ICD-10-CM tree with the path of {RIGHT} (chapter {path}) and four answers: "
        f"{'; '.join(said)}."
    )


def stay_words() -> str:
    """The timeline, in words."""
    parts = {
        name: ", ".join(heading for heading, _ in rows) for name, rows in stay_numbers().items()
    }
    return (
        "A hospital stay as a line: arrival, admission, discharge, coding. Known at admission: "
        f"{parts['used']}. Known only later: {parts['left out']}."
    )


def lora_words() -> str:
    """LoRA, in words."""
    sizes = lora_numbers()
    return (
        f"LoRA on one layer, to scale: a frozen matrix W of {sizes['d_out']} × {sizes['d_in']} "
        f"({sizes['W']:,} numbers), and the trained matrices B of {sizes['d_out']} × {sizes['r']} "
        f"and A of {sizes['r']} × {sizes['d_in']} ({sizes['A'] + sizes['B']:,} numbers)."
    )


def nf4_words() -> str:
    """NF4, in words."""
    numbers = nf4_numbers()
    levels = ", ".join(f"{level:.2f}" for level in numbers["levels"])
    return (
        "A bell-shaped histogram of the weights of one layer, each divided by the largest of its "
        f"block, under the 16 levels of NF4: {levels}. Rounding error {numbers['error']:.4f}; with "
        f"even levels {numbers['even_error']:.4f}."
    )


def grpo_words() -> str:
    """The loop of GRPO, in words."""
    said = [
        f"{row['code'] or 'no code'} earns {row['reward']:.2f}, advantage {row['advantage']:+.2f}"
        for row in grpo_numbers()
    ]
    return (
        f"The loop of GRPO: the policy samples four completions of one note, whose code is {GOLD}; "
        f"each gets a reward and an advantage ({'; '.join(said)}); the update makes those above "
        "the mean more probable and the others less."
    )


# ---------------------------------------------------------------------------------------- files


def svg(name: str) -> bytes:
    """A diagram as SVG, the same bytes each time."""
    with rc_context(STYLE):
        slide = DIAGRAMS[name]()
        buffer = io.BytesIO()
        about = {"Date": None, "Description": alternative(name)}
        slide.figure.savefig(buffer, format="svg", metadata=about)
    return buffer.getvalue()


def png(name: str, drawing: bytes) -> bytes:
    """A diagram as PNG; it names the SVG that it belongs to by its hash."""
    with rc_context(STYLE):
        slide = DIAGRAMS[name]()
        buffer = io.BytesIO()
        about = {"Software": None, "Description": alternative(name)}
        about["Source"] = hashlib.sha256(drawing).hexdigest()
        slide.figure.savefig(buffer, format="png", dpi=DPI, metadata=about)
    return buffer.getvalue()


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=FOLDER, help="default: docs/diagrams")
    folder = parser.parse_args().out
    folder.mkdir(parents=True, exist_ok=True)
    for name in DIAGRAMS:
        drawing = svg(name)
        (folder / f"{name}.svg").write_bytes(drawing)
        (folder / f"{name}.png").write_bytes(png(name, drawing))
        print(folder / f"{name}.svg")
    return 0


if __name__ == "__main__":
    sys.exit(main())
