"""The tables of estimates in docs/scaling.md: `python -m benchmarks.docs_tables` writes them anew.
No GPU is needed.

Peaks that others measured, and the models they measured, stand in docs_tables.toml.
"""

from __future__ import annotations

import dataclasses
import tempfile
import tomllib
from pathlib import Path

from helpers import profiles
from helpers.machinery import memory, places
from helpers.profiles import Profile

PAGE = Path(__file__).parents[1] / "docs" / "scaling.md"
CARDS = {"t4": 16, "gpu24": 24, "paper": 80}  # GB of the card that a profile is for
KNOWN = tomllib.loads(Path(__file__).with_name("docs_tables.toml").read_text(encoding="utf-8"))


# Seconds for one layer and one token: TRL's QLoRA GRPO notebook (28 layers, 256 tokens) on a T4
# (False) and an A100 (True).
LAYER_SECONDS = {False: 94 / 256 / 28, True: 33 / 256 / 28}


def rollout_seconds(profile: Profile, *, new_card: bool) -> float:
    """Seconds that the completions of one GRPO step take with transformers' generate, by order of
    magnitude.

    A token takes the time to call each layer's many small kernels, whatever the batch; that time is
    TRL's (LAYER_SECONDS), on an A100 for cards with bf16 (`new_card`), else on a T4. The forward
    and backward passes come on top.
    """
    accumulation = profile.grpo["gradient_accumulation_steps"]
    generations = accumulation / (profile.grpo.get("steps_per_generation") or accumulation)
    tokens = generations * profile.grpo["max_completion_length"]
    return tokens * memory.config(profile.base)["num_hidden_layers"] * LAYER_SECONDS[new_card]


def peak(profile: Profile, stage: str) -> float:
    """The estimate for a GPU in GB."""
    return memory.estimate(profile, stage, gpu=True)["peak"]


def known_peaks() -> list[tuple[str, float, float]]:
    """Case, its peak in GB as somebody measured it, and the estimate of the same.

    TRL's QLoRA notebooks (`grpo_` and `sft_trl_lora_qlora`, one T4, r = 32) name a peak for each
    model. GRPO: 8 x 256 tokens, and prompts of a length that is not told; 160 is a guess. SFT: 1 x
    1,024 tokens. The TRL of October 2025 cast embeddings and output layer to float32 before QLoRA
    training, two bytes a parameter more than today. Its pull request 4335 ended that; by the
    figures that it gives, the 14B model was measured after the change. TRL 1.16 casts neither.
    """
    notebook = profiles.get("gpu24").replace(
        max_new_tokens=256,
        lora={"r": 32},
        sft={"per_device_train_batch_size": 1, "gradient_accumulation_steps": 4},
        grpo={"gradient_accumulation_steps": 1, "max_completion_length": 256},
    )
    without = dataclasses.replace(notebook, max_prompt_tokens=0)
    case = "Qwen2.5-7B, GRPO, T4: 8 x 256 tokens, prompts counted in"
    rows = [(case, KNOWN["grpo"]["Qwen2.5-7B"], peak(without, "grpo"))]
    for stage, prompt in (("grpo", 160), ("sft", 768)):
        for name, measured in KNOWN[stage].items():
            shape = KNOWN["models"][name]
            with tempfile.TemporaryDirectory() as folder:
                places.write(Path(folder) / "config.json", shape)
                same = dataclasses.replace(notebook, base=folder, max_prompt_tokens=prompt)
                estimate = peak(same, stage)
            case = f"{name}, {stage.upper()}, T4"
            if stage == "grpo":
                case += ", prompts of 160 tokens on top"
            elif "14B" not in name:
                case += ", embeddings in float32"
                embeddings = 1 if shape["tie_word_embeddings"] else 2
                estimate += shape["vocab_size"] * shape["hidden_size"] * embeddings * 2 / 1e9
            rows.append((case, measured, estimate))
    tiny = profiles.get("tiny")
    for stage, each in memory.NOTEBOOK.items():
        if each in tiny.peak_gb:
            case = f"`tiny`, {stage.upper()}, on a CPU, which set its overhead"
            estimate = memory.estimate(tiny, stage, gpu=False)["peak"]
            rows.append((case, tiny.peak_gb[each], estimate))
    return rows


def table(header: str, rows: list[list[str]]) -> str:
    """Markdown; header: names of the columns with bars between them."""
    columns = header.count("|") + 1
    lines = [f"| {header} |", "|" + "---|" * columns]
    lines += [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join(lines)


def tables() -> dict[str, str]:
    """The tables, by the name that stands in their markers."""
    on_gpu = [profile for profile in profiles.PROFILES.values() if profile.name in CARDS]
    rows = []
    for profile in on_gpu:
        row = [profile.name, f"{CARDS[profile.name]} GB", profile.base.split("/")[-1]]
        for stage in memory.NOTEBOOK:
            fits = peak(profile, stage) <= CARDS[profile.name]
            row.append(f"{peak(profile, stage):.1f}{'' if fits else ', **does not fit**'}")
        measured = [f"{notebook} {gb} GB" for notebook, gb in profile.peak_gb.items()]
        rows.append([*row, ", ".join(measured) or "not measured"])
    by_profile = table("profile | card | base | SFT | GRPO | measured", rows)

    rows = []
    for case, measured, estimate in known_peaks():
        off = round(estimate / measured - 1, 2) + 0.0
        rows.append([case, f"{measured}", f"{estimate:.1f}", f"{off:+.0%}"])
    known = table("case | known peak, GB | estimate | off by", rows)

    rows = []
    for profile in on_gpu:
        micro_steps = profile.grpo["gradient_accumulation_steps"]
        for k in range(micro_steps, 0, -1):
            if micro_steps % k == 0:
                at_once = k * profile.grpo["per_device_train_batch_size"]
                fewer = profile.replace(grpo={"steps_per_generation": k})
                rows.append([profile.name, f"{at_once}", f"{peak(fewer, 'grpo'):.1f}"])
    generation = table("profile | completions generated at once | GRPO", rows)

    least = profiles.get("gpu24").replace(
        sft={"per_device_train_batch_size": 1},
        grpo={"per_device_train_batch_size": 8, "steps_per_generation": 1},
    )
    rows = []
    for base in (name for name in reversed(memory.ON_HUB) if name.startswith("Qwen/")):
        row = [base.removeprefix("Qwen/")]
        for stage in memory.NOTEBOOK:
            for four_bit in (True, False):
                each = least.replace(base=base, four_bit={stage: four_bit})
                row.append(f"{peak(each, stage):.1f}")
        rows.append(row)
    bases = table("base | SFT in NF4 | SFT in 16 bit | GRPO in NF4 | GRPO in 16 bit", rows)
    return {"profiles": by_profile, "known": known, "generation": generation, "bases": bases}


def write(page: Path = PAGE) -> None:
    """Put the tables between their markers, `<!-- name -->` and `<!-- end -->`."""
    text = page.read_text(encoding="utf-8")
    for name, lines in tables().items():
        before, marker, rest = text.partition(f"<!-- {name} -->\n")
        end = rest.index("<!-- end -->")
        text = f"{before}{marker}{lines}\n{rest[end:]}"
    places.write(page, text)


if __name__ == "__main__":
    write()
