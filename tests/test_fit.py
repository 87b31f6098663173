"""Will it fit: the estimate against what is known, its terms against a trace of live tensors, and advice that holds."""

from __future__ import annotations

import dataclasses
import json
import weakref
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks import gpu
from helpers import fit, profiles
from helpers.profiles import Profile

GPU_PROFILES = [p for p in profiles.PROFILES.values() if p.base != "tiny"]
replace = dataclasses.replace


def peak(p: Profile, stage: str, **options: Any) -> float:
    return fit.estimate(p, stage, gpu=True, **options)["peak"]


@pytest.fixture
def card(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Pretend that there is a CUDA device with so much free and in all, in GB."""

    def pretend(free: float, total: float) -> None:
        monkeypatch.delenv("WORLD_SIZE", raising=False)
        monkeypatch.setattr(profiles, "_gpu_gb", lambda: total * 1e9 / 2**30)
        monkeypatch.setattr(fit, "device_gb", lambda: (free, total))

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
    p = replace(profiles.get("t4"), base=f"Qwen/Qwen2.5-{size}-Instruct", sft_4bit=False)
    sixteen = fit.estimate(p, "sft", gpu=True)["weights"]
    four = fit.estimate(replace(p, sft_4bit=True), "sft", gpu=True)["weights"]
    assert sixteen == pytest.approx(2 * in_all, rel=0.02)
    assert sixteen - four == pytest.approx((2 - 0.516) * without_embeddings, rel=0.02)


def test_every_known_peak_is_met_within_15_percent() -> None:
    known = [(case, guess / peak) for case, peak, guess in gpu.known_peaks()]
    assert len(known) == 12 and {"SFT", "GRPO"} == {case.split(", ")[1] for case, _ in known}
    assert not [row for row in known if not 0.85 < row[1] < 1.15]


def test_the_page_holds_the_tables_of_the_code() -> None:
    page = (gpu.ROOT / "docs" / "scaling.md").read_text(encoding="utf-8")
    for name, table in gpu.docs_tables().items():
        assert f"<!-- {name} -->\n{table}\n<!-- end -->" in page, (
            f"{name} is stale: python -m benchmarks.gpu --docs"
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
    for name in (
        f"{stage}_batch",
        "max_prompt_tokens",
        "sft_lora_r",
        "max_new_tokens",
        "grpo_max_completion",
    ):
        assert peak(replace(p, **{name: times * getattr(p, name)}), stage) >= before, name
    assert peak(replace(p, gradient_checkpointing=False), stage) > before
    one, two = (fit.estimate(p, stage, gpu=True, processes=n) for n in (1, 2))
    assert two["weights"] == one["weights"] and two["lora"] == pytest.approx(
        1.25 * one["lora"]
    )  # all of it, and DDP's buckets
    # half as many micro-steps; where the profile says how many of them are generated at once, that number stays
    shared = 1 if p.grpo_steps_per_generation else 2
    assert two["activations"] == one["activations"] and two["kv"] == pytest.approx(
        one["kv"] / shared
    )
    in_four, in_sixteen = (
        peak(replace(p, **{f"{stage}_4bit": bits}), stage) for bits in (True, False)
    )
    assert in_four < in_sixteen


def test_the_peak_is_the_larger_of_the_two_phases() -> None:
    x = fit.estimate(profiles.get("t4"), "grpo", gpu=True)
    fixed = x["weights"] + x["lora"] + x["overhead"]
    assert x["peak"] == pytest.approx(
        fixed + max(x["activations"] + x["head"], x["prefill"] + x["kv"] * 1280 / 1536)
    )
    sft = fit.estimate(profiles.get("t4"), "sft", gpu=True)
    assert sft["kv"] == sft["prefill"] == 0


def test_a_base_is_read_from_its_folder_too(tmp_path: Any) -> None:
    (tmp_path / "config.json").write_text(
        '{"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, '
        '"num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256}'
    )
    llama = replace(
        profiles.get("t4"), base=str(tmp_path), sft_4bit=False
    )  # the dimensions of Llama-3.1-8B
    assert fit.estimate(llama, "sft", gpu=True)["weights"] == pytest.approx(2 * 8.03, rel=0.01)
    assert fit.config("tiny")["hidden_size"] % 64 == 0


def test_what_is_unknown_is_let_pass_and_what_is_no_stage_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    unknown = replace(profiles.get("t4"), base="nobody/has-this-model")
    with pytest.raises(OSError):
        fit.estimate(unknown, "sft")
    fit.check(unknown, "sft")
    with pytest.raises(ValueError, match="sft, grpo"):
        fit.estimate(profiles.get("t4"), "dpo")


def test_measured_peaks_count_only_for_the_profile_as_it_ships(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profiles, "_gpu_gb", lambda: None)
    tiny = profiles.get("tiny")
    assert fit.measured(tiny, "grpo") == tiny.peak_gb["04_qlora_grpo"]
    assert (
        fit.measured(
            replace(
                tiny, grpo_batch=tiny.grpo_batch // 2, grpo_grad_accum=2 * tiny.grpo_grad_accum
            ),
            "grpo",
        )
        is None
    )
    monkeypatch.setattr(profiles, "_gpu_gb", lambda: 24.0)
    assert fit.measured(tiny, "grpo") is None  # measured on a CPU


def test_the_table_marks_what_is_not_calibrated(monkeypatch: pytest.MonkeyPatch, card: Any) -> None:
    monkeypatch.setattr(profiles, "_gpu_gb", lambda: None)
    here = fit.table(profiles.get("tiny"))
    assert (
        list(here.index) == ["SFT", "GRPO"]
        and here["estimated GB"].str.contains("rough on a CPU").all()
    )
    assert here.loc["GRPO", "measured GB"] == str(profiles.get("tiny").peak_gb["04_qlora_grpo"])
    card(15.0, 15.8)
    there = fit.table(profiles.get("t4"))
    assert (there["fits"] == "yes").all() and not there["estimated GB"].str.contains("rough").any()
    assert (
        fit.table(replace(profiles.get("t4"), base="Qwen/Qwen2.5-32B-Instruct"))["fits"] == "no"
    ).all()


# ------------------------------------------------------------------------------------------------------- its advice


@settings(deadline=None, max_examples=40)
@given(
    p=st.sampled_from(GPU_PROFILES),
    stage=st.sampled_from(["sft", "grpo"]),
    share=st.floats(0.3, 0.99),
)
def test_every_remedy_fits_and_adds_up(p: Profile, stage: str, share: float) -> None:
    room = share * peak(p, stage)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(profiles, "_gpu_gb", lambda: 80.0)
        for q, gb in fit.remedies(p, stage, room):
            assert q.validate() and peak(q, stage) == gb <= room
            if (
                q.base == p.base and q.grpo_prompts_per_step == p.grpo_prompts_per_step
            ):  # the same optimiser step
                assert getattr(q, f"{stage}_batch") * getattr(q, f"{stage}_grad_accum") == getattr(
                    p, f"{stage}_batch"
                ) * getattr(p, f"{stage}_grad_accum")


def test_the_nearest_value_is_named(card: Any) -> None:
    card(80.0, 80.0)
    p = profiles.get("paper")
    four, two = (peak(replace(p, sft_batch=n, sft_grad_accum=32 // n), "sft") for n in (4, 2))
    (q, gb), *_ = fit.remedies(p, "sft", four + 0.1)
    assert (q.sft_batch, q.sft_grad_accum, gb) == (4, 8, four)
    (q, gb), *_ = fit.remedies(p, "sft", four - 0.1)
    assert (q.sft_batch, q.sft_grad_accum, gb) == (2, 16, two)


def test_several_settings_are_lowered_together_where_none_is_enough(card: Any) -> None:
    card(11.0, 12.0)
    p = profiles.get("gpu24")
    (q, gb), (other, _) = fit.remedies(p, "sft", 9.5)
    assert (
        gb <= 9.5
        and q.sft_batch == 1
        and q.max_note_tokens < p.max_note_tokens
        and q.base == p.base
    )
    assert other.base == "Qwen/Qwen2.5-3B-Instruct"  # the next smaller one


def test_what_does_not_fit_is_refused_before_a_model_is_loaded(card: Any) -> None:
    p = profiles.get("gpu24")
    card(60.0, 80.0)
    fit.check(p, "sft")
    card(9.9, 11.0)
    with pytest.raises(MemoryError) as refusal:
        fit.check(p, "sft")
    text = str(refusal.value)
    assert f"needs about {peak(p, 'sft'):.1f} GB, there are 9.9 GB" in text
    assert (
        "sft_batch = 1, sft_grad_accum = 32" in text
        and "GB less" in text
        and "base = Qwen/Qwen2.5-3B-Instruct: " in text
    )
    card(1.0, 11.0)
    with pytest.raises(MemoryError, match="smaller profile"):
        fit.check(p, "sft")


def test_on_a_cpu_all_installed_ram_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "_gpu_gb", lambda: None)
    tiny = profiles.get("tiny")
    monkeypatch.setattr(fit, "device_gb", lambda: (0.5, 4.0))
    fit.check(tiny, "grpo")
    monkeypatch.setattr(fit, "device_gb", lambda: (0.5, 2.0))
    with pytest.raises(MemoryError, match="on a CPU a rough estimate"):
        fit.check(tiny, "grpo")


def test_where_the_measured_peak_decides_the_remedies_go_below_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(profiles, "_gpu_gb", lambda: None)
    tiny = profiles.get("tiny")
    known, guess = fit.measured(tiny, "grpo"), fit.estimate(tiny, "grpo")["peak"]
    assert (
        known and known > guess
    )  # the case at hand: the estimate fits, what was measured does not
    monkeypatch.setattr(fit, "device_gb", lambda: (known - 0.05, known - 0.05))
    with pytest.raises(MemoryError) as refusal:
        fit.check(tiny, "grpo")
    assert "gradient_checkpointing = True: " in str(refusal.value) and "\n  - : " not in str(
        refusal.value
    )


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
        peaks.append(fit.estimate(replace(p, base=str(tmp_path)), "sft"))
    assert peaks[0] == peaks[1]


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("{", "is damaged"),
        ("{}", "no hidden_size"),
        (json.dumps({"model_type": "gpt2", "n_embd": 768}), "no hidden_size"),
        (json.dumps(LLAMA | {"hidden_size": "4096"}), "no hidden_size"),
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
        fit.estimate(p, "sft")
    fit.check(p, "sft")
    there = fit.table(p)
    assert set(there["fits"]) == {"not known"} and set(there["estimated GB"]) == {"not known"}
    assert (
        "ran out of memory" in (said := fit.oom_advice(RuntimeError("out of memory"), p, "sft"))
        and "sft_batch" in said
    )


def test_free_memory_is_shared_out_among_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profiles, "_gpu_gb", lambda: None)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    total = fit.device_gb()[1]
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert fit.device_gb()[1] == pytest.approx(total / 2)


def test_out_of_memory_names_what_to_lower_and_by_how_much(card: Any) -> None:
    card(23.0, 25.4)
    p = profiles.get("gpu24")
    error = RuntimeError(
        "CUDA out of memory. Tried to allocate 1.00 GiB. GPU 0 has a total capacity of 23.64 GiB of which "
        "512.00 MiB is free. Including non-PyTorch memory, this process has 23.10 GiB memory in use."
    )
    text = fit.oom_advice(error, p, "sft")
    assert "about 0.5 GB were missing" in text and "sft_batch = 1" in text
    room = 0.95 * peak(p, "sft") - (1.0 * 2**30 - 512 * 2**20) / 1e9
    assert all(gb <= room for _, gb in fit.remedies(p, "sft", room))
    assert "how much was missing is not told" in fit.oom_advice(
        RuntimeError("out of memory"), p, "sft"
    )
    assert "about 8004.4 GB were missing" in fit.oom_advice(
        MemoryError("Unable to allocate 7.28 TiB for an array"), p, "sft"
    )


def test_memory_that_runs_out_on_a_cpu_names_what_to_lower_too() -> None:
    torch, p = pytest.importorskip("torch"), profiles.get("tiny")
    missing = "^GRPO ran out of memory: about 4000000.0 GB were missing"
    with pytest.raises(MemoryError, match=missing) as caught, fit.advice_on_memory(p, "grpo"):
        torch.empty(10**15)  # more than a process can address: torch's own error
    assert "DefaultCPUAllocator" in str(caught.value.__cause__)
    message = "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 600000000 bytes."
    text = fit.oom_advice(RuntimeError(message), p, "grpo")
    assert (
        "about 0.6 GB were missing" in text
        and "grpo_batch = " in text
        and "grpo_grad_accum = " in text
    )


@pytest.mark.parametrize(
    ("error", "ours"),
    [
        (MemoryError(), True),
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
        fit.advice_on_memory(profiles.get("tiny"), "sft"),
    ):
        raise error
    assert (caught.value is not error) == ours
    assert not ours or "SFT ran out of memory" in str(caught.value)


def test_time_is_told_by_what_is_known_and_said_to_be_unmeasured_elsewhere(
    monkeypatch: pytest.MonkeyPatch, card: Any
) -> None:
    trl = replace(
        profiles.get("gpu24"),
        grpo_batch=8,
        grpo_grad_accum=1,
        grpo_steps_per_generation=None,
        grpo_max_completion=256,
    )
    assert [round(fit.rollout_seconds(trl, new_card=new)) for new in (False, True)] == [94, 33]
    assert [round(fit.rollout_seconds(p, new_card=p.name != "t4")) for p in GPU_PROFILES] == [
        94,
        264,
        1056,
    ]  # docs/scaling.md
    card(23.0, 25.4)
    there = fit.table(profiles.get("gpu24"))["time"]
    assert (
        there["SFT"] == "time not measured"
        and "not measured" in there["GRPO"]
        and " s a step" in there["GRPO"]
    )
    monkeypatch.setattr(profiles, "_gpu_gb", lambda: None)
    tiny = profiles.get("tiny")
    assert list(fit.table(tiny)["time"]) == [
        tiny.expected(notebook) for notebook in fit.NOTEBOOK.values()
    ]
