"""Batched generation: order, padding, sampling, the trie over codes, and what counts as usable."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pandas as pd
import pytest
import torch
from transformers import GenerationConfig, PreTrainedConfig

from helpers import casebook, hospital, icd, inference, models, notes, profiles, prompts

ROOT = Path(__file__).parent.parent
# what `predict` reads of a profile
PROFILE = SimpleNamespace(
    max_note_tokens=256, max_new_tokens=80, batch_size=lambda samples=1: max(1, 128 // samples)
)


@pytest.fixture(scope="module")
def loaded():
    return models.load("tiny")


@pytest.fixture(scope="module")
def cases() -> pd.DataFrame:
    rows = hospital.draw(12, 51)
    texts = [notes.admission_note(t) for t in hospital.summaries(rows, 51)]
    frame = pd.DataFrame({"subject_id": range(12), "hadm_id": range(100, 112), "note": texts})
    return frame[frame["note"] != ""].reset_index(drop=True)


class Scripted(torch.nn.Module):
    """Stands where a model stands and says the same text to every prompt: generation's interface, no weights."""

    device = torch.device("cpu")
    dtype = torch.float32

    def __init__(self, tokenizer, text: str) -> None:
        super().__init__()
        self.ids = torch.tensor([tokenizer(text)["input_ids"]])
        self.config = PreTrainedConfig()
        self.generation_config = GenerationConfig()
        self.embeddings = torch.nn.Embedding(len(tokenizer), 1)

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.embeddings

    def generate(self, input_ids, num_return_sequences=1, **_):
        n = input_ids.shape[0] * num_return_sequences
        return torch.cat(
            [input_ids.repeat_interleave(num_return_sequences, 0), self.ids.expand(n, -1)], dim=1
        )


def test_answers_come_back_in_the_order_of_the_cases_whatever_the_batches(
    loaded, cases: pd.DataFrame
) -> None:
    model, tokenizer = loaded
    one = inference.predict(model, tokenizer, cases, PROFILE, max_new_tokens=12, batch_size=1)
    many = inference.predict(model, tokenizer, cases, PROFILE, max_new_tokens=12, batch_size=5)
    assert list(one["hadm_id"]) == list(many["hadm_id"]) == list(cases["hadm_id"])
    assert (one["completion"] == many["completion"]).mean() > 0.9, (
        "padding must not change answers (but for ties in float)"
    )


def test_the_model_and_tokenizer_are_left_as_they_were(loaded, cases: pd.DataFrame) -> None:
    model, tokenizer = loaded
    model.train()
    tokenizer.padding_side = "right"
    inference.predict(model, tokenizer, cases.head(2), PROFILE, max_new_tokens=2)
    assert model.training
    assert tokenizer.padding_side == "right"
    model.eval()
    tokenizer.padding_side = "left"


def test_several_samples_differ_and_are_numbered(loaded, cases: pd.DataFrame) -> None:
    model, tokenizer = loaded
    torch.manual_seed(0)
    drawn = inference.predict(
        model,
        tokenizer,
        cases.head(3),
        PROFILE,
        samples=4,
        temperature=1.2,
        max_new_tokens=16,
        batch_size=2,
    )
    assert len(drawn) == 12
    assert drawn.groupby("hadm_id")["sample"].apply(list).map(lambda s: s == [0, 1, 2, 3]).all()
    assert drawn.groupby("hadm_id")["completion"].nunique().max() > 1


def test_a_seed_gives_the_same_samples_whatever_ran_before(loaded, cases: pd.DataFrame) -> None:
    options = {"samples": 3, "temperature": 1.2, "max_new_tokens": 12, "seed": 5}
    first = inference.predict(*loaded, cases.head(2), PROFILE, **options)
    torch.rand(7)
    pd.testing.assert_frame_equal(
        inference.predict(*loaded, cases.head(2), PROFILE, **options), first
    )
    other = inference.predict(*loaded, cases.head(2), PROFILE, **(options | {"seed": 6}))
    assert (other["completion"] != first["completion"]).any()


KILLED = """
import os, signal, sys
from pathlib import Path
from types import SimpleNamespace
import pandas as pd
from helpers import inference, models

profile = SimpleNamespace(max_note_tokens=256, max_new_tokens=8, batch_size=lambda samples: 3)
model, tokenizer = models.load("tiny")
generate, calls = model.generate, []

def until_the_third(**options):
    calls.append(1)
    if len(calls) == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return generate(**options)

model.generate = until_the_third
cases = pd.read_parquet(sys.argv[1])
inference.predict(model, tokenizer, cases, profile, samples=2, temperature=1.0, seed=3, keep=Path(sys.argv[2]))
"""


def test_killed_between_batches_it_goes_on_and_ends_with_the_same_answers(
    loaded, cases: pd.DataFrame, tmp_path: Path
) -> None:
    cases.to_parquet(tmp_path / "cases.parquet")
    kept = tmp_path / "parts"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "cases.parquet"), str(kept)],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == -signal.SIGKILL and sorted(p.name for p in kept.iterdir()) == [
        "0.json",
        "3.json",
    ]
    (kept / ".6.json.99").write_text('{"rows": [')  # a batch whose writing was cut off
    asked = []
    model, tokenizer = loaded
    real = model.generate
    options = {"samples": 2, "temperature": 1.0, "seed": 3, "max_new_tokens": 8, "batch_size": 3}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", lambda **k: asked.append(len(k["input_ids"])) or real(**k))
        again = inference.predict(model, tokenizer, cases, PROFILE, keep=kept, **options)
    assert sum(asked) == len(cases) - 6, "what was kept was asked again"
    pd.testing.assert_frame_equal(
        again, inference.predict(model, tokenizer, cases, PROFILE, **options)
    )
    others = cases.assign(hadm_id=cases["hadm_id"] + 1000)
    assert list(
        inference.predict(model, tokenizer, others, PROFILE, keep=kept, **options)[
            "hadm_id"
        ].unique()
    ) == [*others["hadm_id"]]


def test_a_models_own_repetition_penalty_is_set_aside(loaded, cases: pd.DataFrame) -> None:
    model, tokenizer = loaded
    plain = inference.predict(model, tokenizer, cases.head(2), PROFILE, max_new_tokens=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.generation_config, "repetition_penalty", 1.5)
        patch.setattr(model.generation_config, "no_repeat_ngram_size", 2)
        pd.testing.assert_frame_equal(
            inference.predict(model, tokenizer, cases.head(2), PROFILE, max_new_tokens=24), plain
        )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_where_memory_runs_out_the_batch_is_halved_and_no_answer_changes(
    loaded, cases: pd.DataFrame, error: Exception, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    model, tokenizer = loaded
    options = {"max_new_tokens": 8, "keep": tmp_path}
    want = inference.predict(model, tokenizer, cases, PROFILE, max_new_tokens=8, batch_size=2)
    real = model.generate
    sizes = []

    def small(**inputs):
        sizes.append(len(inputs["input_ids"]))
        if sizes[-1] > 2:
            raise error
        return real(**inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", small)
        table = inference.predict(model, tokenizer, cases, PROFILE, batch_size=9, **options)
        pd.testing.assert_frame_equal(table, want)
        assert sizes[:3] == [9, 4, 2] and set(sizes[2:]) <= {1, 2}
        assert capsys.readouterr().out.count("memory does not hold 9 cases at once: going on") == 1
        assert model.generation_config is not None and tokenizer.padding_side == "left"
        sizes.clear()
        inference.predict(model, tokenizer, cases, PROFILE, batch_size=2, **options)
        assert not sizes, "what was answered is kept"


def test_a_single_case_that_does_not_fit_says_what_to_lower(loaded, cases: pd.DataFrame) -> None:
    model, tokenizer = loaded

    def full(**_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", full)
        with pytest.raises(MemoryError, match="a single case does not fit. Set max_note_tokens"):
            inference.predict(model, tokenizer, cases, PROFILE, batch_size=4)


def test_another_error_is_no_lack_of_memory(loaded, cases: pd.DataFrame) -> None:
    model, tokenizer = loaded
    asked = []

    def broken(**_):
        asked.append(1)
        raise RuntimeError("shapes do not match")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", broken)
        with pytest.raises(RuntimeError, match="shapes do not match"):
            inference.predict(model, tokenizer, cases, PROFILE, batch_size=4)
    assert len(asked) == 1 and tokenizer.padding_side == "left"


def test_memory_that_runs_out_before_a_batch_is_on_the_device_halves_it_too(
    loaded, cases: pd.DataFrame
) -> None:
    model, tokenizer = loaded

    class Full:
        padding_side = "right"

        def __getattr__(self, name: str):
            return getattr(tokenizer, name)

        def __call__(self, texts, **options):
            if "padding" in options and len(texts) > 1:
                raise MemoryError
            return tokenizer(texts, **options)

    table = inference.predict(model, Full(), cases.head(4), PROFILE, max_new_tokens=2)
    assert len(table) == 4


CROWDED = """
import resource
from types import SimpleNamespace
import pandas as pd
from pathlib import Path
from helpers import inference, models

profile = SimpleNamespace(max_note_tokens=999, max_new_tokens=4, batch_size=lambda samples: 256)
model, tokenizer = models.load("tiny")
case = {"subject_id": 1, "hadm_id": 2, "note": "Chief Complaint: pain. " * 40}
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 600 * 2**20,) * 2)
print(len(inference.predict(model, tokenizer, pd.DataFrame([case] * 256), profile)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of a process's memory that is kept to")
def test_a_batch_too_large_for_the_memory_of_a_cpu_is_halved_until_it_fits(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CROWDED],
        cwd=root,
        env=os.environ | {"PYTHONPATH": str(root)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "memory does not hold 256 cases at once: going on with 128" in done.stdout, done.stderr
    assert done.stdout.endswith("256\n"), done.stderr


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Pain.\n</think>\n<diagnosis>I21.4</diagnosis>", "I214"),
        ("Pain.\n</think>\n<diagnosis>i214</diagnosis>", "I214"),
        ("Pain.\n</think>\n<diagnosis>I21.01ZZ</diagnosis>", None),
        ("Pain.\n</think>\n<diagnosis>X99.99</diagnosis>", None),
        ("pain, and more pain", None),
    ],
)
def test_only_codes_that_exist_are_predictions(
    loaded, cases: pd.DataFrame, answer: str, expected: str | None
) -> None:
    _, tokenizer = loaded
    got = inference.predict(Scripted(tokenizer, answer), tokenizer, cases.head(2), PROFILE)
    assert [None if pd.isna(p) else p for p in got["predicted"]] == [expected] * 2
    assert got["completion"].iloc[0] == answer


def test_a_retired_code_counts_where_the_data_set_has_it(loaded, cases: pd.DataFrame) -> None:
    _, tokenizer = loaded
    model = Scripted(tokenizer, "Pain.\n</think>\n<diagnosis>X99.99</diagnosis>")
    got = inference.predict(model, tokenizer, cases.head(1), PROFILE, dictionary={"X9999"})
    assert got["predicted"].tolist() == ["X9999"]


def test_the_trie_leaves_only_known_codes(loaded) -> None:
    _, tokenizer = loaded
    codes = ["I214", "I219", "S72001A", "I10"]
    opening = tokenizer("note\n</think>\n<diagnosis>", return_tensors="pt")["input_ids"]
    trie = inference.CodeTrie(tokenizer, codes)
    torch.manual_seed(0)
    for _ in range(40):
        ids = opening
        for _ in range(20):
            ids = torch.cat(
                [ids, trie(ids, torch.randn(1, len(tokenizer))).argmax(-1, keepdim=True)], dim=1
            )
            if tokenizer.decode(ids[0]).endswith("</diagnosis>"):
                break
        assert prompts.parse(tokenizer.decode(ids[0])).code in codes


def test_no_code_that_may_be_answered_is_an_error(loaded, cases: pd.DataFrame) -> None:
    for codes in ([], pd.Series(dtype=str), iter(()), [float("nan"), "Sepsis"]):
        with pytest.raises(ValueError, match="valid_codes is empty"):
            inference.predict(*loaded, cases, valid_codes=codes)


def test_what_is_no_code_is_no_answer_of_the_trie(loaded) -> None:
    trie = inference.CodeTrie(loaded[1], ["I10", "Sepsis", float("nan")])
    assert trie.prefixes == inference.CodeTrie(loaded[1], ["I10"]).prefixes


def test_the_trie_leaves_everything_else_alone(loaded) -> None:
    _, tokenizer = loaded
    trie = inference.CodeTrie(tokenizer, ["I10"])
    scores = torch.randn(1, len(tokenizer))
    for text in ("the reasoning", "x\n</think>\n<diagnosis>I10</diagnosis>"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        torch.testing.assert_close(trie(ids, scores.clone()), scores)


def test_constrained_answers_of_the_real_model_are_valid(loaded, cases: pd.DataFrame) -> None:
    model, tokenizer = loaded
    codes = sorted(icd.normalise(c) for c in casebook.casebook().codes)
    got = inference.predict(
        model, tokenizer, cases.head(4), PROFILE, max_new_tokens=24, valid_codes=codes
    )
    assert got["predicted"].dropna().isin(codes).all()


def test_every_batch_is_constrained_even_by_codes_that_come_once(
    loaded, cases: pd.DataFrame
) -> None:
    _, tokenizer = loaded
    left = []

    class Constrained(Scripted):
        def generate(self, input_ids, logits_processor=(), **_):
            ids = torch.cat([input_ids, self.ids.expand(len(input_ids), -1)], dim=1)
            left.append(
                logits_processor(ids, torch.zeros(len(ids), len(tokenizer))).isfinite().sum(dim=1)
            )
            return ids

    codes = (code for code in ["I214", "I10"])
    model = Constrained(tokenizer, "x\n</think>\n<diagnosis>")
    inference.predict(model, tokenizer, cases.head(5), PROFILE, batch_size=2, valid_codes=codes)
    assert len(left) == 3 and all((count > 0).all() and (count < 10).all() for count in left)


def test_what_context_or_embeddings_do_not_hold_is_told(loaded, cases: pd.DataFrame) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    _, tokenizer = loaded
    shape = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    short = LlamaForCausalLM(
        LlamaConfig(**shape, vocab_size=len(tokenizer), max_position_embeddings=128)
    )
    with pytest.raises(
        ValueError,
        match=r"prompt of \d+ tokens and 100 of an answer .* context of 128: set max_note_tokens",
    ):
        inference.predict(short, tokenizer, cases.head(2), PROFILE, max_new_tokens=100)
    small = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=100))
    with pytest.raises(
        ValueError, match="has no embedding, there are 100: this tokenizer is not the model's"
    ):
        inference.predict(small, tokenizer, cases.head(2), PROFILE, max_new_tokens=2)


def test_a_models_own_habits_of_generation_are_set_aside_and_left_as_they_were(
    loaded, cases: pd.DataFrame
) -> None:
    model, tokenizer = loaded
    want = inference.predict(model, tokenizer, cases.head(3), PROFILE, max_new_tokens=12)[
        "completion"
    ].tolist()
    plain = model.generation_config
    first = tokenizer(want[0], add_special_tokens=False)["input_ids"][0]
    model.generation_config = odd = GenerationConfig(
        suppress_tokens=[first],
        bad_words_ids=[[first]],
        encoder_repetition_penalty=3.0,
        return_dict_in_generate=True,
        prompt_lookup_num_tokens=3,
        num_beams=2,
        eos_token_id=plain.eos_token_id,
        pad_token_id=plain.pad_token_id,
    )
    try:
        assert (
            inference.predict(model, tokenizer, cases.head(3), PROFILE, max_new_tokens=12)[
                "completion"
            ].tolist()
            == want
        )
        assert model.generation_config is odd
    finally:
        model.generation_config = plain


@pytest.mark.parametrize("wrong", [{"batch_size": 0}, {"samples": 0}, {"samples": 3}])
def test_bad_sizes_are_refused(loaded, cases: pd.DataFrame, wrong: dict) -> None:
    with pytest.raises(ValueError, match="must be >= 1"):
        inference.predict(*loaded, cases, PROFILE, **wrong)


def test_what_a_prompt_file_opens_belongs_to_the_answer(loaded, cases: pd.DataFrame) -> None:
    _, tokenizer = loaded

    def ask(note: str) -> list[dict[str, str]]:
        return [
            *prompts.messages(note),
            {"role": "assistant", "content": "<think>\nFever.\n</think>\n<diagnosis>"},
        ]

    said = inference.predict(
        Scripted(tokenizer, "I21.4</diagnosis>"),
        tokenizer,
        cases.head(3),
        PROFILE,
        batch_size=2,
        to_messages=ask,
    )
    assert set(said["predicted"]) == {"I214"} and set(said["think"]) == {"Fever."}
    assert set(said["completion"]) == {"Fever.\n</think>\n<diagnosis>I21.4</diagnosis>"}, (
        "and it is well-formed as a whole"
    )


def test_the_trie_goes_on_from_what_was_opened(loaded) -> None:
    _, tokenizer = loaded
    trie = inference.CodeTrie(tokenizer, ["I214"])
    for opened in ("Fever.\n</think>\n<diagnosis>I21", "note " * 90 + "</think><diagnosis>\nI21"):
        ids = torch.tensor([tokenizer(opened)["input_ids"]])
        scores = trie(ids, torch.zeros(1, len(tokenizer)))
        left = {tokenizer.decode([i]) for i in torch.isfinite(scores[0]).nonzero()[:, 0].tolist()}
        assert left and all(".4".startswith(text[:2]) for text in left), left
    for opened in ("I21", "answer in <diagnosis></diagnosis>.", "<diagnosis> I21 or so"):
        ids = torch.tensor([tokenizer(opened)["input_ids"]])
        assert torch.isfinite(trie(ids, torch.zeros(1, len(tokenizer)))).all(), "no constraint"


def test_the_trie_reads_tokens_as_they_stand_inside_a_text(loaded) -> None:
    """Llama-2's decoder drops the blank at the start of a text: a token " 4" would pass for "4"."""
    _, real = loaded

    class Stripping:
        def __getattr__(self, name: str):
            return getattr(real, name)

        def __len__(self) -> int:
            return len(real)

        def __call__(self, *texts, **options):
            return real(*texts, **options)

        def decode(self, ids, **options) -> str:
            return real.decode(ids, **options).removeprefix(" ")

    trie = inference.CodeTrie(Stripping(), ["I214"])
    scores = trie(torch.tensor([real("<diagnosis>I21.")["input_ids"]]), torch.zeros(1, len(real)))
    left = [real.decode([i]) for i in torch.isfinite(scores[0]).nonzero()[:, 0].tolist()]
    assert left and not any(text.startswith(" ") for text in left), left


def plain_reference(model, tokenizer, cases, size, samples=1, codes=None, seed=None, **sampling):
    """What `predict` stands for, with nothing but `generate`: the longest prompts first, a batch at a time."""
    texts = [prompts.chat(tokenizer, prompts.messages(note)) for note in cases["note"]]
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]), reverse=True)
    completions = {}
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        if seed is not None:
            torch.manual_seed(seed + start)
        batch = tokenizer(
            [texts[i] for i in chosen], return_tensors="pt", padding=True, add_special_tokens=False
        )
        width = batch["input_ids"].shape[1]
        trie = [inference.CodeTrie(tokenizer, codes)] if codes else []
        with torch.no_grad():
            out = model.generate(
                **batch,
                max_new_tokens=24,
                num_return_sequences=samples,
                logits_processor=trie,
                pad_token_id=tokenizer.pad_token_id,
                **sampling,
            )
        decoded = tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)
        for j, text in enumerate(decoded):
            completions[chosen[j // samples], j % samples] = text
    return [completions[key] for key in sorted(completions)]


@pytest.mark.parametrize("way", ["greedy", "sampled", "constrained"])
def test_predict_is_generation_by_batches_bit_by_bit(loaded, cases: pd.DataFrame, way: str) -> None:
    model, tokenizer = loaded
    drawn = {"temperature": 1.1, "top_k": 0, "top_p": 1.0}
    codes = [*casebook.casebook().codes]
    opened = cases.assign(note=[f"{note}\n{index}" for index, note in enumerate(cases["note"])])
    if way == "sampled":
        want = plain_reference(
            model, tokenizer, opened, 5, samples=3, seed=4, do_sample=True, **drawn
        )
        options = {"samples": 3, "temperature": 1.1, "seed": 4}
    elif way == "greedy":
        want, options = plain_reference(model, tokenizer, opened, 5, do_sample=False), {}
    else:
        want = plain_reference(model, tokenizer, opened, 5, codes=codes, do_sample=False)
        options = {"valid_codes": codes}
    got = inference.predict(
        model, tokenizer, opened, PROFILE, batch_size=5, max_new_tokens=24, **options
    )
    assert got["completion"].tolist() == want
    assert got["hadm_id"].tolist() == [*opened["hadm_id"].repeat(options.get("samples", 1))]


def test_lengths_and_batches_are_the_profiles(loaded, cases: pd.DataFrame) -> None:
    model, tokenizer = loaded
    asked = []
    real = model.generate
    profile = SimpleNamespace(
        max_note_tokens=9, max_new_tokens=3, batch_size=lambda samples: 6 // samples
    )

    def watched(**inputs):
        asked.append((inputs["input_ids"].shape, inputs["max_new_tokens"]))
        return real(**inputs)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", watched)
        options = {"samples": 2, "temperature": 1.0}
        inference.predict(model, tokenizer, cases.head(4), profile, **options)
        patch.setattr(profiles, "current", lambda: profile)
        inference.predict(model, tokenizer, cases.head(4), **options)
    frame = len(tokenizer(prompts.chat(tokenizer, prompts.messages("x")))["input_ids"]) - 1
    assert asked == [((3, frame + 9), 3), ((1, frame + 9), 3)] * 2


def test_no_cases_give_an_empty_table(loaded, cases: pd.DataFrame) -> None:
    table = inference.predict(*loaded, cases.head(0), PROFILE, samples=2, temperature=1.0)
    assert table.empty and list(table.columns) == list(inference.COLUMNS)


def test_the_order_of_the_cases_is_kept_whatever_their_index(loaded, cases: pd.DataFrame) -> None:
    odd = cases.assign(hadm_id=[7] * len(cases)).set_axis([3] * len(cases))
    table = inference.predict(*loaded, odd, PROFILE, batch_size=4, max_new_tokens=4)
    assert table["subject_id"].tolist() == odd["subject_id"].tolist()
    assert table.index.tolist() == list(range(len(cases)))


@pytest.mark.parametrize(
    ("where", "value", "options"),
    [
        ("attention", float("nan"), {}),
        ("attention", float("inf"), {"batch_size": 1}),
        ("norm", float("inf"), {}),
        ("norm", float("nan"), {"samples": 2, "temperature": 1.0}),
        ("norm", float("nan"), {"valid_codes": ["I10"]}),
        ("one prompt", float("nan"), {}),
        ("one prompt", float("nan"), {"batch_size": 1}),
    ],
)
def test_a_model_that_computes_no_numbers_is_no_bad_model(
    where: str, value: float, options: dict
) -> None:
    model, tokenizer = models.load("tiny")
    notes = ["CC: cough", "CC: chest pain", "CC: fever"]
    cases = pd.DataFrame({"subject_id": [1, 2, 3], "hadm_id": [1, 2, 3], "note": notes})
    with torch.no_grad():
        if where == "attention":
            model.model.layers[0].self_attn.q_proj.weight[0, 0] = value
        elif where == "norm":
            model.model.norm.weight[3] = value
        else:
            model.config.tie_word_embeddings = False
            model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.clone())
            rare = {*tokenizer(notes[2])["input_ids"]} - {*tokenizer(notes[0])["input_ids"]}
            model.get_input_embeddings().weight[list(rare)] = value
    with pytest.raises(ArithmeticError, match=r"in torch\.float32 this model .*bfloat16"):
        inference.predict(model, tokenizer, cases, PROFILE, max_new_tokens=4, **options)
    assert tokenizer.padding_side == "left" and model.generation_config.eos_token_id is not None


def test_a_model_that_rules_out_some_tokens_computes_numbers(loaded, cases: pd.DataFrame) -> None:
    """Minus infinity for a token is no fault, as long as another one is left."""
    scores = torch.tensor([[0.0, -torch.inf], [-torch.inf, 3.0]])
    assert inference._check_finite(None, None, scores) is scores
    with pytest.raises(ArithmeticError):
        inference._check_finite(None, None, torch.full((1, 2), -torch.inf))


@pytest.mark.parametrize("extra", ["token_type_ids", "length", "special_tokens_mask"])
def test_generate_gets_ids_and_mask_alone(loaded, cases: pd.DataFrame, extra: str) -> None:
    model, tokenizer = loaded
    want = inference.predict(model, tokenizer, cases.head(3), PROFILE, max_new_tokens=3)

    class Talkative:
        padding_side = "left"

        def __getattr__(self, name: str):
            return getattr(tokenizer, name)

        def __call__(self, texts, **options):
            encoding = tokenizer(texts, **options)
            if "padding" in options:
                encoding[extra] = torch.zeros_like(encoding["input_ids"])
            return encoding

    table = inference.predict(model, Talkative(), cases.head(3), PROFILE, max_new_tokens=3)
    pd.testing.assert_frame_equal(table, want)


def test_a_perfect_answer_is_perfect_where_the_tags_were_special(
    tmp_path: Path, cases: pd.DataFrame
) -> None:
    from tokenizers import AddedToken

    own = models.load_tokenizer("tiny")
    own.add_tokens([AddedToken(t, special=True) for t in prompts.TAGS], special_tokens=True)
    own.save_pretrained(tmp_path)
    own = models.load_tokenizer(str(tmp_path))
    model = Scripted(own, prompts.answer("Chest pain.", "I21.4") + "<|im_end|>")
    table = inference.predict(model, own, cases.head(2), PROFILE)
    assert table["predicted"].tolist() == ["I214"] * 2
    trie = inference.CodeTrie(own, ["I214"])
    scores = trie(
        torch.tensor([own("x</think><diagnosis>I21.4")["input_ids"]]), torch.zeros(1, len(own))
    )
    allowed = {own.decode([i]) for i in torch.isfinite(scores[0]).nonzero()[:, 0].tolist()}
    assert "</diagnosis>" in allowed and all(prompts.CLOSE.startswith(text) for text in allowed)
