"""Batched generation: order, padding, sampling, the trie over codes, and what counts as usable."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from helpers import icd, inference, models, notes, prompts, synthetic

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def loaded():
    return models.load("tiny")


@pytest.fixture(scope="module")
def cases() -> pd.DataFrame:
    rows = synthetic.draw(12, 51)
    texts = [notes.admission_note(t) for t in synthetic.summaries(rows, 51)]
    frame = pd.DataFrame({"subject_id": range(12), "hadm_id": range(100, 112), "note": texts})
    return frame[frame["note"] != ""].reset_index(drop=True)


class Scripted(torch.nn.Module):
    """Stands where a model stands and says the same text to every prompt: generation's interface, no weights."""

    device = torch.device("cpu")

    def __init__(self, tokenizer, text: str) -> None:
        super().__init__()
        self.ids = torch.tensor([tokenizer(text)["input_ids"]])

    def generate(self, input_ids, num_return_sequences=1, **_):
        n = input_ids.shape[0] * num_return_sequences
        return torch.cat(
            [input_ids.repeat_interleave(num_return_sequences, 0), self.ids.expand(n, -1)], dim=1
        )


def test_answers_come_back_in_the_order_of_the_cases_whatever_the_batches(
    loaded, cases: pd.DataFrame
) -> None:
    model, tokenizer = loaded
    one = inference.predict(model, tokenizer, cases, max_new_tokens=12, batch_size=1)
    many = inference.predict(model, tokenizer, cases, max_new_tokens=12, batch_size=5)
    assert list(one["hadm_id"]) == list(many["hadm_id"]) == list(cases["hadm_id"])
    assert (one["completion"] == many["completion"]).mean() > 0.9, (
        "padding must not change answers (but for ties in float)"
    )


def test_the_model_and_tokenizer_are_left_as_they_were(loaded, cases: pd.DataFrame) -> None:
    model, tokenizer = loaded
    model.train()
    tokenizer.padding_side = "right"
    inference.predict(model, tokenizer, cases.head(2), max_new_tokens=2)
    assert model.training
    assert tokenizer.padding_side == "right"
    model.eval()
    tokenizer.padding_side = "left"


def test_several_samples_differ_and_are_numbered(loaded, cases: pd.DataFrame) -> None:
    model, tokenizer = loaded
    torch.manual_seed(0)
    drawn = inference.predict(
        model, tokenizer, cases.head(3), samples=4, temperature=1.2, max_new_tokens=16, batch_size=2
    )
    assert len(drawn) == 12
    assert drawn.groupby("hadm_id")["sample"].apply(list).map(lambda s: s == [0, 1, 2, 3]).all()
    assert drawn.groupby("hadm_id")["completion"].nunique().max() > 1


def test_a_seed_gives_the_same_samples_whatever_ran_before(loaded, cases: pd.DataFrame) -> None:
    options = {"samples": 3, "temperature": 1.2, "max_new_tokens": 12, "seed": 5}
    first = inference.predict(*loaded, cases.head(2), **options)
    torch.rand(7)
    pd.testing.assert_frame_equal(inference.predict(*loaded, cases.head(2), **options), first)
    other = inference.predict(*loaded, cases.head(2), **(options | {"seed": 6}))
    assert (other["completion"] != first["completion"]).any()


KILLED = """
import os, signal, sys
from pathlib import Path
import pandas as pd
from helpers import inference, models

def until_the_third(batches):
    for number, start in enumerate(batches):
        if number == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        yield start

cases = pd.read_parquet(sys.argv[1])
inference.predict(*models.load("tiny"), cases, samples=2, temperature=1.0, seed=3, max_new_tokens=8, batch_size=3,
                  keep=Path(sys.argv[2]), progress=until_the_third)
"""


def test_killed_between_batches_it_goes_on_and_ends_with_the_same_answers(
    loaded, cases: pd.DataFrame, tmp_path: Path
) -> None:
    cases.to_parquet(tmp_path / "cases.parquet")
    kept = tmp_path / "parts"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, str(tmp_path / "cases.parquet"), str(kept)], cwd=ROOT
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
        again = inference.predict(model, tokenizer, cases, keep=kept, **options)
    assert sum(asked) == len(cases) - 6, "what was kept was asked again"
    pd.testing.assert_frame_equal(again, inference.predict(model, tokenizer, cases, **options))
    others = cases.assign(hadm_id=cases["hadm_id"] + 1000)
    assert list(
        inference.predict(model, tokenizer, others, keep=kept, **options)["hadm_id"].unique()
    ) == [*others["hadm_id"]]


def test_a_models_own_repetition_penalty_is_set_aside(loaded, cases: pd.DataFrame) -> None:
    model, tokenizer = loaded
    plain = inference.predict(model, tokenizer, cases.head(2), max_new_tokens=24)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model.generation_config, "repetition_penalty", 1.5)
        patch.setattr(model.generation_config, "no_repeat_ngram_size", 2)
        pd.testing.assert_frame_equal(
            inference.predict(model, tokenizer, cases.head(2), max_new_tokens=24), plain
        )


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        MemoryError(),
    ],
    ids=["cuda", "cpu", "python"],
)
def test_out_of_memory_says_what_to_lower(loaded, cases: pd.DataFrame, error: Exception) -> None:
    model, tokenizer = loaded

    def full(**_):
        raise error

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(model, "generate", full)
        with pytest.raises(MemoryError, match="batch_size to 2 .*infer_batch_tokens"):
            inference.predict(model, tokenizer, cases, batch_size=4)
        with pytest.raises(MemoryError, match="max_note_tokens"):
            inference.predict(model, tokenizer, cases, batch_size=1)


def test_memory_that_runs_out_before_the_first_batch_is_on_the_device_says_what_to_lower(
    loaded, cases: pd.DataFrame
) -> None:
    model, tokenizer = loaded

    class Full:
        padding_side = "right"

        def __getattr__(self, name: str):
            return getattr(tokenizer, name)

        def __call__(self, *texts, **options):
            if "return_tensors" not in options:
                return tokenizer(*texts, **options)
            raise MemoryError

    with pytest.raises(
        MemoryError,
        match="^4 prompts of many tokens with 1 answers each do not fit: set batch_size to 2",
    ):
        inference.predict(model, Full(), cases, batch_size=4)


CROWDED = """
import resource, sys
import pandas as pd
from pathlib import Path
from helpers import inference, models

model, tokenizer = models.load("tiny")
case = {"subject_id": 1, "hadm_id": 2, "note": "Chief Complaint: pain. " * 40}
used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + 300 * 2**20,) * 2)
inference.predict(model, tokenizer, pd.DataFrame([case] * 256), batch_size=256, max_new_tokens=4)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="a limit of a process's memory that is kept to")
def test_a_batch_too_large_for_the_memory_of_a_cpu_says_what_to_lower(root: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CROWDED], cwd=root, capture_output=True, text=True, timeout=300
    )
    assert (
        "MemoryError: 256 prompts of" in done.stderr
        and "set batch_size to 128 (infer_batch_tokens" in done.stderr
    )


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
    got = inference.predict(Scripted(tokenizer, answer), tokenizer, cases.head(2))
    assert [None if pd.isna(p) else p for p in got["predicted"]] == [expected] * 2
    assert got["completion"].iloc[0] == answer


def test_a_retired_code_counts_where_the_data_set_has_it(loaded, cases: pd.DataFrame) -> None:
    _, tokenizer = loaded
    model = Scripted(tokenizer, "Pain.\n</think>\n<diagnosis>X99.99</diagnosis>")
    got = inference.predict(model, tokenizer, cases.head(1), dictionary={"X9999"})
    assert got["predicted"].tolist() == ["X9999"]


def test_the_trie_leaves_only_known_codes(loaded) -> None:
    _, tokenizer = loaded
    codes = ["I214", "I219", "S72001A", "I10"]
    opening = tokenizer("note\n</think>\n<diagnosis>", return_tensors="pt")["input_ids"]
    trie = inference.code_trie(tokenizer, codes, prompt_width=0)
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


def test_the_trie_leaves_everything_else_alone(loaded) -> None:
    _, tokenizer = loaded
    trie = inference.code_trie(tokenizer, ["I10"], prompt_width=0)
    scores = torch.randn(1, len(tokenizer))
    for text in ("the reasoning", "x\n</think>\n<diagnosis>I10</diagnosis>"):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        torch.testing.assert_close(trie(ids, scores.clone()), scores)


def test_constrained_answers_of_the_real_model_are_valid(loaded, cases: pd.DataFrame) -> None:
    model, tokenizer = loaded
    codes = sorted(icd.normalise(c) for c in synthetic.casebook().codes)
    got = inference.predict(model, tokenizer, cases.head(4), max_new_tokens=24, valid_codes=codes)
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
    inference.predict(model, tokenizer, cases.head(5), batch_size=2, valid_codes=codes)
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
        inference.predict(short, tokenizer, cases.head(2), max_new_tokens=100)
    small = LlamaForCausalLM(LlamaConfig(**shape, vocab_size=100))
    with pytest.raises(
        ValueError, match="has no embedding, there are 100: this tokenizer is not the model's"
    ):
        inference.predict(small, tokenizer, cases.head(2), max_new_tokens=2)


def test_a_models_own_habits_of_generation_are_set_aside_and_left_as_they_were(
    loaded, cases: pd.DataFrame
) -> None:
    from transformers import GenerationConfig

    model, tokenizer = loaded
    want = inference.predict(model, tokenizer, cases.head(3), max_new_tokens=12)[
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
            inference.predict(model, tokenizer, cases.head(3), max_new_tokens=12)[
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
        inference.predict(*loaded, cases, **wrong)


@pytest.mark.parametrize("named", [None, [0], 0])
def test_an_answer_ends_where_the_template_ends_a_turn_whatever_the_generation_config_names(
    named,
) -> None:
    """Fine-tunes of a base often name only the end of a text there: their answers ran on, and no code could be used."""
    tokenizer = models.load_tokenizer("tiny")
    end_of_turn = tokenizer.convert_tokens_to_ids("<|im_end|>")
    own = {named} if isinstance(named, int) else set(named or ())
    assert set(prompts.ends(tokenizer, named)) == own | {end_of_turn}
    other = models.load_tokenizer("tiny")
    other.eos_token = "<|endoftext|>"  # of a base that was never told of turns
    assert set(prompts.ends(other, named)) == own | {
        end_of_turn,
        tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    }


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
        batch_size=2,
        to_messages=ask,
    )
    assert set(said["predicted"]) == {"I214"} and set(said["think"]) == {"Fever."}
    assert set(said["completion"]) == {"Fever.\n</think>\n<diagnosis>I21.4</diagnosis>"}, (
        "and it is well-formed as a whole"
    )


def test_the_trie_goes_on_from_what_was_opened(loaded) -> None:
    _, tokenizer = loaded
    trie = inference.code_trie(tokenizer, ["I214"], prompt_width=0)
    trie.openings = ["Fever.\n</think>\n<diagnosis>", ""]
    ids = torch.tensor([tokenizer("I21")["input_ids"]] * 2)
    scores = trie(ids, torch.zeros(2, len(tokenizer)))
    left = {tokenizer.decode([i]) for i in torch.isfinite(scores[0]).nonzero()[:, 0].tolist()}
    assert left and all(".4".startswith(text[:2]) for text in left), left
    assert torch.isfinite(scores[1]).all(), "no tag, no constraint"


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

    trie = inference.code_trie(Stripping(), ["I214"], prompt_width=0)
    scores = trie(torch.tensor([real("<diagnosis>I21.")["input_ids"]]), torch.zeros(1, len(real)))
    left = [real.decode([i]) for i in torch.isfinite(scores[0]).nonzero()[:, 0].tolist()]
    assert left and not any(text.startswith(" ") for text in left), left
