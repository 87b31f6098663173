"""What the two measures of `helpers.machinery.cpu` bring. Run: python -m benchmarks.cpu

Each is compared with doing without it in the same run.

1. `unpack_once`: 64 greedy answers of the bundled base in NF4, with the 4-bit weights unpacked at
   each call (bitsandbytes as it is) and once. The answers must be the same.
2. `keep_memory`: float32 training steps of 16 x 200 tokens, each way in a process of its own, with
   its peak memory.

Best of three. A minute or two on 2 cores.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time


def generation() -> None:
    from helpers import hospital, icd, inference, models, notes, profiles
    from helpers.machinery import cpu

    profile = profiles.get("tiny")
    icd.is_valid("I10")  # loads the library: no part of what is measured
    rows = hospital.draw(64, 1)
    import pandas as pd

    texts = [notes.admission_note(text) or "CC: pain" for text in hospital.summaries(rows, 1)]
    cases = pd.DataFrame({"subject_id": range(64), "hadm_id": range(64), "note": texts})
    real, seconds, said = cpu.unpack_once, {}, {}
    for way in ("at each call", "once"):
        cpu.unpack_once = real if way == "once" else lambda model: 0
        model, tokenizer = models.load("tiny", four_bit=True)
        times = []
        for _ in range(4):  # the first warms up
            start = time.perf_counter()
            said[way] = inference.predict(model, tokenizer, cases, profile, batch_size=64)
            times.append(time.perf_counter() - start)
        seconds[way] = min(times[1:])
        print(f"NF4 generation, 64 answers of 96 tokens, unpacked {way}: {seconds[way]:.2f} s")
    cpu.unpack_once = real
    same = (said["once"]["completion"] == said["at each call"]["completion"]).mean()
    ratio = seconds["at each call"] / seconds["once"]
    print(f"  ratio: {ratio:.2f} x the speed; {same:.0%} of the answers are the same")


def training(keep: bool) -> None:
    """Child process: seconds a step and peak memory as JSON."""
    import torch

    from helpers import models
    from helpers.machinery import cpu

    real = cpu.keep_memory
    cpu.keep_memory = lambda: False
    model, _ = models.load("tiny")
    if keep:
        real()
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(0, 2500, (16, 200))
    times = []
    for _ in range(12):
        start = time.perf_counter()
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
    print(json.dumps({"seconds": min(times[3:]), "mean": sum(times[3:]) / 9, "peak_gb": peak}))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--training", choices=["kept", "returned"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.training:
        training(args.training == "kept")
        return
    generation()
    found = {}
    for way in ("returned", "kept"):
        command = [sys.executable, "-m", "benchmarks.cpu", "--training", way]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        found[way] = json.loads(out.splitlines()[-1])
        mean, peak = found[way]["mean"], found[way]["peak_gb"]
        print(
            f"training step of 3,200 tokens, freed memory {way}: {mean:.2f} s, peak {peak:.2f} GB"
        )
    speed = found["returned"]["mean"] / found["kept"]["mean"]
    memory = found["kept"]["peak_gb"] / found["returned"]["peak_gb"]
    print(f"  ratio: {speed:.2f} x the speed, {memory:.2f} x the peak memory")


if __name__ == "__main__":
    main()
