"""A trained model leaves the course: merged, with a card filled in from the run; prompt files of others come in."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers import models, prompts
from helpers.machinery import others

LEVEL = {"f1_gold": 0.4, "ci": [0.3, 0.5], "accuracy": 0.6, "n_classes": 7}
METRICS = {
    "models": {"grpo": {"usable": 0.99, **dict.fromkeys(("chapter", "category", "full"), LEVEL)}},
    "deltas": {"grpo-sft": {"full": {"f1_gold": 0.03, "ci": [-0.01, 0.07]}}},
    "ceiling": {level: {"accuracy": 0.9} for level in ("chapter", "category", "full")},
    "environment": {"test_cases": 12, "torch": "2"},
}


PROFILE = SimpleNamespace(name="tiny", about="any laptop", base="tiny", teacher="template")


def card(folder: Path, **changed) -> str:
    options = {"model": "grpo", "data": "4,000 synthetic notes", "credentialed": False} | changed
    return models.write_card(folder, PROFILE, METRICS, **options).read_text()


def test_the_card_says_what_the_run_found_and_what_it_is_not_for(tmp_path: Path) -> None:
    text = card(tmp_path)
    assert "| full | 0.400 | 0.300 to 0.500 | 7 | 0.600 | 0.900 |" in text
    assert (
        "99.0 %" in text and "+0.030 (-0.010 to +0.070)" in text and "4,000 synthetic notes" in text
    )
    assert (
        "Never for diagnosis" in text
        and "template rationales" in text
        and "credentialed" not in text
    )
    assert text.startswith("---\nlibrary_name") and "{{" not in text and "Undefined" not in text
    assert (
        "not known"
        in models.write_card(
            tmp_path,
            PROFILE,
            METRICS | {"ceiling": None},
            model="grpo",
            data="MIMIC-IV",
            credentialed=True,
        ).read_text()
    )
    with pytest.raises(KeyError):
        card(tmp_path, model="nobody")


def test_the_card_of_a_credentialed_model_warns_and_names_no_path(tmp_path: Path) -> None:
    profile = SimpleNamespace(**vars(PROFILE) | {"base": str(tmp_path), "teacher": "someone/32B"})
    options = {"model": "grpo", "data": "MIMIC-IV", "credentialed": True}
    text = models.write_card(tmp_path, profile, METRICS, **options).read_text()
    assert "Do not share this model unless the data use agreement allows it." in text
    assert "written by someone/32B" in text and "Notes of one hospital" in text
    assert str(tmp_path) not in text, "a path of this machine"


def test_a_prompt_file_of_the_released_format(tmp_path: Path) -> None:
    path = tmp_path / "prompt.csv"
    path.write_text(
        'role,content\nsystem,"You code, carefully."\nuser,"Note:\n{note}\nWhich code?"\nassistant,<think>\n'
    )
    fill = others.read_prompt_file(path)
    turns = fill("CC: pain {braces} <|im_end|>")
    assert [turn["role"] for turn in turns] == ["system", "user"], (
        "the chat template opens the reasoning"
    )
    assert turns[1]["content"] == "Note:\nCC: pain {braces} < |im_end|>\nWhich code?"
    with pytest.raises(ValueError, match="empty"):
        fill("  ")


def test_a_prompt_file_as_a_spreadsheet_saves_it(tmp_path: Path) -> None:
    path = tmp_path / "prompt.csv"
    path.write_bytes(
        b'\xef\xbb\xbfRole, Content\r\nsystem,"Code it.\r\nOnce."\r\n\r\nuser,{note}\r\n'
    )
    assert [turn["content"] for turn in others.read_prompt_file(path)("CC: pain")] == [
        "Code it.\nOnce.",
        "CC: pain",
    ]
    path.write_bytes(b'role,content\rsystem,"Code it."\ruser,{note}\r')  # of an old Mac
    assert len(others.read_prompt_file(path)("CC: pain")) == 2
    path.write_bytes("role,content\nuser,Läs {note}\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"prompt\.csv: this is not UTF-8 .*Save the file as UTF-8"
    ):
        others.read_prompt_file(path)


NO_SYSTEM = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "<{{ m.role }}>{{ m.content }}</s>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.mark.parametrize(
    ("opens", "ends"),
    [
        ("", "<assistant><think>\n"),
        ("<think>\n", "<assistant><think>\n"),
        ("<think>", "<assistant><think>\n"),
        ("Step by step.\n<think>", "<assistant>Step by step.\n<think>\n"),
        ("<think>\nThe note", "<assistant><think>\nThe note"),
    ],
)
def test_a_last_turn_of_the_assistant_is_where_the_answer_goes_on(
    tmp_path: Path, opens: str, ends: str
) -> None:
    path, base = tmp_path / "prompt.csv", tmp_path / "base"
    shutil.copytree(models.TINY_BASE, base)
    (base / "chat_template.jinja").write_text(NO_SYSTEM)
    tokenizer = models.load_tokenizer(str(base))
    path.write_text(f'role,content\nsystem,Code it.\nuser,"Note: {{note}}"\nassistant,"{opens}"\n')
    text = prompts.chat(tokenizer, others.read_prompt_file(path)("CC: pain"))
    assert text == "<user>Code it.\n\nNote: CC: pain</s>" + ends, (
        "a refused system turn begins the user's"
    )


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ("", "found: nothing"),
        ("who,what\nuser,{note}\n", "found: who, what"),
        ("role,content\nuser,hello\n", "0 times"),
        ("role,content\nuser,{note} {note}\n", "2 times"),
        ("role,content\ntool,{note}\n", "'tool'"),
        ("role\nuser\n", "found: role"),
        ("who\nuser,{note}\n", "found: who"),
        ("role,content\n", "and a row"),
        ("role,content\nuser,Note: {note}, which code?\n", "turn 1 has not 2"),
        ("role,content\nsystem\nuser,{note}\n", "turn 1 has"),
        ("role,content\nassistant,{note}\n", "0 times"),
        ('role,content\nuser,"{note}\n', "no CSV .*end of data"),
        ('role,content\nuser,"say "I10", {note}"\n', "no CSV .*expected after"),
    ],
)
def test_a_prompt_file_that_will_not_do_is_named(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "prompt.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=what) as caught:
        others.read_prompt_file(path)
    assert "prompt.csv" in str(caught.value)
