"""A trained model leaves the course: merged, with a card filled in from the run; prompt files of others come in."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers import models, profiles, prompts

LEVEL = {"f1_gold": 0.4, "ci": [0.3, 0.5], "accuracy": 0.6, "n_classes": 7}
METRICS = {
    "models": {"grpo": {"usable": 0.99, **dict.fromkeys(("chapter", "category", "full"), LEVEL)}},
    "deltas": {"grpo-sft": {"full": {"f1_gold": 0.03, "ci": [-0.01, 0.07]}}},
    "ceiling": {level: {"accuracy": 0.9} for level in ("chapter", "category", "full")},
    "environment": {"test_cases": 12, "torch": "2"},
}


def card(folder: Path, **changed) -> str:
    options = {"model": "grpo", "data": "4,000 synthetic notes", "credentialed": False} | changed
    return models.write_card(folder, profiles.get("tiny"), METRICS, **options).read_text()


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
            profiles.get("t4"),
            METRICS | {"ceiling": None},
            model="grpo",
            data="MIMIC-IV",
            credentialed=True,
        ).read_text()
    )
    with pytest.raises(KeyError):
        card(tmp_path, model="nobody")


def test_credentialed_models_are_not_pushed_by_accident(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    done = []
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "create_repo",
        lambda self, name, **options: done.append((name, options)),
    )
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "upload_folder",
        lambda self, **options: done.append(options) or "address",
    )
    with pytest.raises(ValueError, match="no export"):
        models.push(tmp_path, "me/mine")
    card(tmp_path, credentialed=True)
    with pytest.raises(PermissionError, match="allowed_to_share"):
        models.push(tmp_path, "me/mine")
    assert not done
    assert models.push(tmp_path, "me/mine", allowed_to_share=True) == "address"
    assert done[0] == ("me/mine", {"private": True, "exist_ok": True}), (
        "private unless told otherwise"
    )
    assert json.loads((tmp_path / "course_export.json").read_text())["credentialed"] is True


def test_what_was_credentialed_stays_so_and_nothing_goes_along(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import fnmatch
    from dataclasses import replace

    import huggingface_hub

    done = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **options: None)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "upload_folder",
        lambda self, **options: done.append(options) or "address",
    )
    base, child = tmp_path / "base", tmp_path / "child"
    for folder in (base, child):
        folder.mkdir()
    card(base, credentialed=True)
    card(base, credentialed=False)  # a second card over the first
    built_on = replace(profiles.get("tiny"), base=str(base))
    text = models.write_card(
        child, built_on, METRICS, model="grpo", data="more notes", credentialed=False
    ).read_text()
    assert str(tmp_path) not in text, "a path of this machine"
    for folder in (base, child):
        with pytest.raises(PermissionError):
            models.push(folder, "me/mine")
    for broken in ('{"credentialed": null}', "{}", "[]", "", '{"credentialed": 0}'):
        (child / "course_export.json").write_text(broken)
        with pytest.raises(PermissionError):
            models.push(child, "me/mine")
    assert not done
    free = tmp_path / "free"
    free.mkdir()
    card(free)
    models.push(free, "me/mine")
    allowed = done[0]["allow_patterns"]
    sent = {
        name
        for name in (
            "model.safetensors",
            "model-00001-of-00002.safetensors",
            "model.safetensors.index.json",
            "config.json",
            "generation_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
            "chat_template.jinja",
            "README.md",
            "notes.csv",
            "case.html",
            "sub/train.parquet",
            "predictions.json",
        )
        if any(fnmatch.fnmatch(name, pattern) for pattern in allowed)
    }
    assert len(sent) == 9 and not sent & {
        "notes.csv",
        "case.html",
        "sub/train.parquet",
        "predictions.json",
    }


def test_weights_that_changed_after_the_card_are_not_pushed_under_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import huggingface_hub

    done = []
    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", lambda self, name, **options: None)
    monkeypatch.setattr(
        huggingface_hub.HfApi,
        "upload_folder",
        lambda self, **options: done.append(options) or "address",
    )
    (tmp_path / "model.safetensors").write_bytes(b"synthetic")
    card(tmp_path)
    models.push(tmp_path, "me/mine")
    (tmp_path / "model.safetensors").write_bytes(b"of MIMIC!")
    with pytest.raises(ValueError, match="not those that its card was written for"):
        models.push(tmp_path, "me/mine")
    card(tmp_path)
    (tmp_path / "model-00002.safetensors").write_bytes(b"one more")
    with pytest.raises(ValueError, match="not those"):
        models.push(tmp_path, "me/mine", allowed_to_share=True)
    card(tmp_path)
    (tmp_path / "checkpoint-20").mkdir()  # which the hub's filter takes along
    (tmp_path / "checkpoint-20" / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="not those"):
        models.push(tmp_path, "me/mine")
    assert len(done) == 1


def test_an_export_that_broke_off_is_not_pushed_with_the_card_of_the_one_before(
    tmp_path: Path, monkeypatch
) -> None:
    def killed(*_, **__):
        raise KeyboardInterrupt

    card(tmp_path)
    monkeypatch.setattr(models, "resolve", lambda *_: (str(models.TINY_BASE), "adapter"))
    monkeypatch.setattr(models, "load", killed)
    with pytest.raises(KeyboardInterrupt):
        models.merge("tiny", "adapter", tmp_path)
    with pytest.raises(ValueError, match="no export"):
        models.push(tmp_path, "me/mine")


def test_a_prompt_file_of_the_released_format(tmp_path: Path) -> None:
    path = tmp_path / "prompt.csv"
    path.write_text(
        'role,content\nsystem,"You code, carefully."\nuser,"Note:\n{note}\nWhich code?"\nassistant,<think>\n'
    )
    fill = prompts.read_template(path)
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
    assert [turn["content"] for turn in prompts.read_template(path)("CC: pain")] == [
        "Code it.\nOnce.",
        "CC: pain",
    ]
    path.write_bytes(b'role,content\rsystem,"Code it."\ruser,{note}\r')  # of an old Mac
    assert len(prompts.read_template(path)("CC: pain")) == 2
    path.write_bytes("role,content\nuser,Läs {note}\n".encode("latin-1"))
    with pytest.raises(
        ValueError, match=r"prompt\.csv: this is not UTF-8 .*Save the file as UTF-8"
    ):
        prompts.read_template(path)


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
    path, tokenizer = tmp_path / "prompt.csv", models.load_tokenizer("tiny")
    tokenizer.chat_template = NO_SYSTEM + models._THINK_TEMPLATE
    path.write_text(f'role,content\nsystem,Code it.\nuser,"Note: {{note}}"\nassistant,"{opens}"\n')
    text = prompts.chat(tokenizer, prompts.read_template(path)("CC: pain"))
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
        (f'role,content\nuser,"{"x" * 140_000} {{note}}"\n', "no CSV .*larger than field limit"),
    ],
)
def test_a_prompt_file_that_will_not_do_is_named(tmp_path: Path, text: str, what: str) -> None:
    path = tmp_path / "prompt.csv"
    path.write_text(text)
    with pytest.raises(ValueError, match=what) as caught:
        prompts.read_template(path)
    assert "prompt.csv" in str(caught.value)
