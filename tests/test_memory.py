"""Will it fit: the estimate against what is known, its terms against a trace of live tensors, and advice that holds."""

from __future__ import annotations

import json
import weakref
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import docs_tables
from helpers import profiles
from helpers.machinery import memory
from helpers.profiles import Profile

GPU_PROFILES = [p for p in profiles.PROFILES.values() if p.name in docs_tables.CARDS]
replace = Profile.replace


def peak(p: Profile, stage: str, **options: Any) -> float:
    return memory.estimate(p, stage, gpu=True, **options)["peak"]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that there is a CUDA device with so much free and in all, in GB."""

    def pretend(free: float, total: float) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        monkeypatch.setattr(profiles, "gpu_gb", lambda: total * 1e9 / 2**30)
        monkeypatch.setattr(memory, "device_gb", lambda: (free, total))

    return pretend


# ------------------------------------------------------------------------------------------- against what is known


@pytest.mark.parametrize(
    ("size", "without_embeddings", "in_all"),
    [  # billions, from the model cards
        ("0.5B", 0.36, 0.49),
        ("1.5B", 1.31, 1.54),
        ("3B", 2.77, 3.09),
        ("7B", 6.53, 7.61),
        ("14B", 13.1, 14.7),
        ("32B", 31.0, 32.5),
    ],
)
def test_weights_are_those_of_the_published_models(
    size: str, without_embeddings: float, in_all: float
) -> None:
    p = replace(profiles.get("t4"), base=f"Qwen/Qwen2.5-{size}-Instruct", four_bit={"sft": False})
    sixteen = memory.estimate(p, "sft", gpu=True)["weights"]
    four = memory.estimate(replace(p, four_bit={"sft": True}), "sft", gpu=True)["weights"]
    assert sixteen == pytest.approx(2 * in_all, rel=0.02)
    assert sixteen - four == pytest.approx((2 - 0.516) * without_embeddings, rel=0.02)


def test_every_known_peak_is_met_within_15_percent() -> None:
    known = [(case, guess / peak) for case, peak, guess in docs_tables.known_peaks()]
    assert len(known) == 12 and {"SFT", "GRPO"} == {case.split(", ")[1] for case, _ in known}
    assert not [row for row in known if not 0.85 < row[1] < 1.15]


def test_the_page_holds_the_tables_of_the_code() -> None:
    page = docs_tables.PAGE.read_text(encoding="utf-8")
    for name, table in docs_tables.tables().items():
        assert f"<!-- {name} -->\n{table}\n<!-- end -->" in page, (
            f"{name} is stale: python -m benchmarks.docs_tables"
        )


# ------------------------------------------------------------------------------------- against every live tensor


def live_peak(
    kind: str, hidden: int, inner: int, layers: int, rows: int = 2, length: int = 256
) -> float:
    """Bytes of all tensors alive at the worst moment, for each token, in a Qwen2 with LoRA of rank 2; weights left out.

    The base is in bf16 and the adapter in float32, as on a GPU, trained under autocast; "prefill" goes without, as in TRL's
    roll-outs, and "prefill float32" has all in float32, as on a CPU.
    """
    import torch
    from peft import LoraConfig, get_peft_model
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_leaves
    from transformers import Qwen2Config, Qwen2ForCausalLM

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.alive, self.now, self.peak = {}, 0, 0

        def __torch_dispatch__(
            self, function: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = function(*args, **(kwargs or {}))
            given = {
                x.untyped_storage()._cdata
                for x in tree_leaves((args, kwargs))
                if isinstance(x, torch.Tensor)
            }
            for x in tree_leaves(result):
                if not isinstance(x, torch.Tensor):
                    continue
                key = (store := x.untyped_storage())._cdata
                if key not in given and key not in self.alive:
                    self.alive[key] = store.nbytes()
                    self.now += store.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(store, self.gone, key)
            return result

        def gone(self, key: int) -> None:
            self.now -= self.alive.pop(key, 0)

    config = Qwen2Config(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        vocab_size=256,
        num_attention_heads=hidden // 64,
        num_key_value_heads=1,
        tie_word_embeddings=True,
    )
    dtype, reads = (
        torch.float32 if "float32" in kind else torch.bfloat16,
        kind.startswith("prefill"),
    )
    model = get_peft_model(
        Qwen2ForCausalLM(config).to(dtype), LoraConfig(r=2, target_modules="all-linear")
    )
    for p in model.parameters():
        p.data = p.data.float() if p.requires_grad else p.data
    if kind == "checkpointing":
        model.gradient_checkpointing_enable()
        model.enable_input_require_grads()
    ids = torch.ones(rows, length, dtype=torch.long)
    with (
        (trace := Live()),
        torch.autocast("cpu", torch.bfloat16, enabled=not reads),
        torch.set_grad_enabled(not reads),
    ):
        if reads:
            model(ids, use_cache=True, logits_to_keep=1)
        else:
            out = model.train().base_model.model.model(ids, use_cache=False).last_hidden_state
    if not reads:
        with trace:
            out.sum().backward()
    return trace.peak / rows / length


@pytest.mark.parametrize(("hidden", "inner"), [(128, 640), (128, 1280), (256, 640)])
def test_live_tensors_are_what_the_terms_say(hidden: int, inner: int) -> None:
    cache, layer = (
        2 * 4 * 64 * 2,
        2 * (10 * hidden + 6 * inner),
    )  # bytes a token: keys and values of 4 layers; what a layer keeps
    assert live_peak("prefill", hidden, inner, 4) == pytest.approx(
        2 * (6 * hidden + 6 * inner) + cache, rel=0.05
    )
    on_cpu = 4 * (6 * hidden + 4 * inner) + 2 * cache
    assert 0.85 * on_cpu < live_peak("prefill float32", hidden, inner, 4) < 1.05 * on_cpu
    traced = 2 * (4 * hidden + 18 * hidden + 7 * inner)
    assert live_peak("checkpointing", hidden, inner, 4) == pytest.approx(traced, rel=0.05)
    kept = (live_peak("all kept", hidden, inner, 4) - live_peak("all kept", hidden, inner, 2)) / 2
    assert 0.75 * layer < kept < layer


# ---------------------------------------------------------------------------------------------------- its behaviour


@settings(deadline=None, max_examples=40)
@given(
    p=st.sampled_from(GPU_PROFILES), stage=st.sampled_from(["sft", "grpo"]), times=st.integers(2, 4)
)
def test_more_never_takes_less(p: Profile, stage: str, times: int) -> None:
    before = peak(p, stage)
    batch = getattr(p, stage)["per_device_train_batch_size"]
    larger = [
        {stage: {"per_device_train_batch_size": times * batch}},
        {"max_prompt_tokens": times * p.max_prompt_tokens},
        {"lora": {"r": times * p.lora["r"]}},
        {"max_new_tokens": times * p.max_new_tokens},
        {stage: {"gradient_checkpointing": False}},
    ]
    for change in larger:
        assert peak(replace(p, **change), stage) >= before, change
    in_four, in_sixteen = (peak(replace(p, four_bit={stage: x}), stage) for x in (True, False))
    assert in_four < in_sixteen


@pytest.mark.parametrize("p", GPU_PROFILES, ids=lambda p: p.name)
@pytest.mark.parametrize("stage", ["sft", "grpo"])
def test_processes_share_the_rows(p: Profile, stage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    estimates = []
    for processes in ("1", "2"):
        monkeypatch.setenv("WORLD_SIZE", processes)
        estimates.append(memory.estimate(p, stage, gpu=True))
    one, two = estimates
    assert two["weights"] == one["weights"]
    assert two["lora"] == pytest.approx(1.25 * one["lora"])  # all of it, and DDP's buckets
    # half as many micro-steps; where the profile says how many are generated at once, that number stays
    shared = 1 if p.grpo.get("steps_per_generation") else 2
    assert two["activations"] == one["activations"]
    assert two["kv"] == pytest.approx(one["kv"] / shared)


def test_the_peak_is_the_larger_of_the_two_phases() -> None:
    x = memory.estimate(profiles.get("t4"), "grpo", gpu=True)
    fixed = x["weights"] + x["lora"] + x["overhead"]
    assert x["peak"] == pytest.approx(
        fixed + max(x["activations"] + x["head"], x["prefill"] + x["kv"] * 1280 / 1536)
    )
    sft = memory.estimate(profiles.get("t4"), "sft", gpu=True)
    assert sft["kv"] == sft["prefill"] == 0


def test_a_base_is_read_from_its_folder_too(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(
        '{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, '
        '"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}'
    )
    llama = replace(
        profiles.get("t4"), base=str(tmp_path), four_bit={"sft": False}
    )  # the dimensions of Llama-3.1-8B
    assert memory.estimate(llama, "sft", gpu=True)["weights"] == pytest.approx(2 * 8.03, rel=0.01)
    assert memory.config("tiny")["hidden_size"] % 64 == 0


def test_what_is_unknown_is_let_pass_and_what_is_no_stage_is_refused() -> None:
    unknown = replace(profiles.get("t4"), base="nobody/has-this-model")
    with pytest.raises(OSError):
        memory.estimate(unknown, "sft")
    memory.check(unknown, "sft")
    with pytest.raises(ValueError, match="sft, grpo"):
        memory.estimate(profiles.get("t4"), "dpo")


def test_measured_peaks_count_only_for_the_profile_as_it_ships(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profiles, "gpu_gb", lambda: None)
    tiny = profiles.get("tiny")
    assert memory.measured(tiny, "grpo") == tiny.peak_gb["04_qlora_grpo"]
    halved = replace(
        tiny, grpo={"per_device_train_batch_size": 16, "gradient_accumulation_steps": 4}
    )
    assert memory.measured(halved, "grpo") is None
    monkeypatch.setattr(profiles, "gpu_gb", lambda: 24.0)
    assert memory.measured(tiny, "grpo") is None  # measured on a CPU


def test_the_table_marks_what_is_not_calibrated(monkeypatch: pytest.MonkeyPatch, card: Any) -> None:
    monkeypatch.setattr(profiles, "gpu_gb", lambda: None)
    here = memory.table(profiles.get("tiny"))
    assert (
        list(here.index) == ["SFT", "GRPO"]
        and here["estimated GB"].str.contains("rough on a CPU").all()
    )
    assert here.loc["GRPO", "measured GB"] == str(profiles.get("tiny").peak_gb["04_qlora_grpo"])
    card(15.0, 15.8)
    there = memory.table(profiles.get("t4"))
    assert (there["fits"] == "yes").all() and not there["estimated GB"].str.contains("rough").any()
    assert (
        memory.table(replace(profiles.get("t4"), base="Qwen/Qwen2.5-32B-Instruct"))["fits"] == "no"
    ).all()


# ------------------------------------------------------------------------------------------------------- its advice


def test_what_does_not_fit_is_refused_before_a_model_is_loaded(card: Any) -> None:
    p = profiles.get("gpu24")
    card(60.0, 80.0)
    memory.check(p, "sft")
    card(9.9, 11.0)
    with pytest.raises(MemoryError) as refusal:
        memory.check(p, "sft")
    text = str(refusal.value)
    assert f"needs about {peak(p, 'sft'):.1f} GB (most: " in text and "there are 9.9 GB" in text
    assert "sft.per_device_train_batch_size" in text and "smaller profile" in text


def test_on_a_cpu_all_installed_ram_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "gpu_gb", lambda: None)
    tiny = profiles.get("tiny")
    monkeypatch.setattr(memory, "device_gb", lambda: (0.5, 4.0))
    memory.check(tiny, "grpo")
    monkeypatch.setattr(memory, "device_gb", lambda: (0.5, 2.0))
    with pytest.raises(MemoryError, match="needs about"):
        memory.check(tiny, "grpo")


LLAMA = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
}


def test_the_text_part_of_a_model_for_pictures_is_estimated(tmp_path: Path, card: Any) -> None:
    card(60.0, 80.0)
    p, peaks = profiles.get("gpu24"), []
    for found in (LLAMA, {"model_type": "gemma3", "text_config": LLAMA}):
        (tmp_path / "config.json").write_text(json.dumps(found))
        peaks.append(memory.estimate(replace(p, base=str(tmp_path)), "sft"))
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is damaged"),
        ("{}", "lacks hidden_size"),
        (json.dumps({"model_type": "gpt2", "n_embd": 768}), "lacks hidden_size"),
        (json.dumps(LLAMA | {"hidden_size": "4096"}), "lacks hidden_size"),
        (json.dumps(LLAMA | {"num_experts": 128}), "mixture of experts"),
    ],
)
def test_what_cannot_be_estimated_is_said_and_never_refused(
    tmp_path: Path, card: Any, text: str, why: str
) -> None:
    card(1.0, 24.0)
    (tmp_path / "config.json").write_text(text)
    p = replace(profiles.get("gpu24"), base=str(tmp_path))
    with pytest.raises(OSError, match=why):
        memory.estimate(p, "sft")
    memory.check(p, "sft")
    there = memory.table(p)
    assert set(there["fits"]) == {"not known"} and set(there["estimated GB"]) == {"not known"}


def test_free_memory_is_shared_out_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "gpu_gb", lambda: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    total = memory.device_gb()[1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert memory.device_gb()[1] == pytest.approx(total / 2)


def test_memory_that_runs_out_names_what_to_lower() -> None:
    torch = pytest.importorskip("torch")
    says = "^GRPO ran out of memory .*grpo.per_device_train_batch_size"
    with pytest.raises(MemoryError, match=says) as caught, memory.advice("grpo"):
        torch.empty(10**15)  # more than a process can address: torch's own error
    assert "DefaultCPUAllocator" in str(caught.value.__cause__)


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (RuntimeError("std::bad_alloc"), True),
        (MemoryError("Unable to allocate 7.28 TiB"), True),
        (
            RuntimeError(
                "[enforce fail] data. DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."
            ),
            True,
        ),
        (RuntimeError("unable to mmap 8 bytes from file <x>: Cannot allocate memory (12)"), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 1.00 GiB."), True),
        (RuntimeError("shapes do not match"), False),
        (MemoryError("128 prompts of 400 tokens do not fit: set batch_size to 64."), False),
        (ValueError("out of memory"), False),
    ],
)
def test_only_what_ran_out_of_memory_is_told_so(error: Exception, ours: bool) -> None:
    with (
        pytest.raises(type(error) if not ours else MemoryError) as caught,
        memory.advice("sft"),
    ):
        raise error
    assert (caught.value is not error) == ours
    assert not ours or "SFT ran out of memory" in str(caught.value)


def test_time_is_told_by_what_is_known_and_said_to_be_unmeasured_elsewhere(
    monkeypatch: pytest.MonkeyPatch, card: Any
) -> None:
    trl = replace(
        profiles.get("gpu24"),
        grpo={
            "per_device_train_batch_size": 8,
            "gradient_accumulation_steps": 1,
            "steps_per_generation": None,
            "max_completion_length": 256,
        },
    )
    assert [round(docs_tables.rollout_seconds(trl, new_card=new)) for new in (False, True)] == [
        94,
        33,
    ]
    assert [
        round(docs_tables.rollout_seconds(p, new_card=p.name != "t4")) for p in GPU_PROFILES
    ] == [
        94,
        264,
        1056,
    ]  # docs/scaling.md
    monkeypatch.setattr(profiles, "gpu_gb", lambda: None)
    tiny = profiles.get("tiny")
    assert list(memory.table(tiny)["time"]) == [
        tiny.expected(notebook) for notebook in memory.NOTEBOOK.values()
    ]
