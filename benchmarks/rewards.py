"""How fast are parsing and rewards, and does the worst case stay linear?

Run: python -m benchmarks.rewards. It compares with the alternative that released reward code uses:
one backtracking pattern for reasoning and answer (own wording of it). One process, one core; the
best of three runs each. About half a minute.
"""

from __future__ import annotations

import argparse
import re
import time
from collections.abc import Callable
from functools import partial

from helpers import prompts, rewards

INNER = r"([^<]*(?:<(?!/?{0}>)[^<]*)*)"
THINK = f"<think>{INNER.format('think')}</think>"
DIAGNOSIS = f"<diagnosis>{INNER.format('diagnosis')}</diagnosis>"
PATTERN = re.compile(rf"^\s*(?:{THINK})?\s*{DIAGNOSIS}", re.MULTILINE)
HOSTILE = {
    "line ends": "\n",
    "open think tags": "<think>\n",
    "open answers": "<diagnosis>",
    "empty answers": "<diagnosis></diagnosis>",
}


def alternative(completion: str) -> str | None:
    match = PATTERN.search("<think>" + completion)
    return match and match[2].strip().replace(".", "")


def seconds(work: Callable[[], object], repeats: int = 3) -> float:
    taken = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        taken.append(time.perf_counter() - began)
    return min(taken)


def typical(n: int) -> dict[str, list[str]]:
    """n completions of the truth table in turn, reasoning of each lengthened to some 100 words."""
    rows = [row for row in rewards.truth_table() if row["completion"]]
    filler = "The note also states hypertension and smoking; " * 14
    columns: dict[str, list[str]] = {"completions": [], "code": [], "note": []}
    for i in range(n):
        row = rows[i % len(rows)]
        columns["completions"].append(filler + row["completion"].removeprefix("<think>"))
        columns["code"].append(row["gold"])
        columns["note"].append(row["note"])
    return columns


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--n", type=int, default=20_000, help="completions (default 20000)")
    n = parser.parse_args().n
    columns = typical(n)
    texts = columns["completions"]
    rewards.hierarchical_reward(**typical(30))  # load the library of codes beforehand
    print(f"{n:,} completions of {sum(map(len, texts)) // n:,} characters on average\n")
    print(f"{'':32}{'completions/s':>15}{'64 of them, ms':>16}")
    rows = {
        "prompts.parse": lambda: [prompts.parse(text) for text in texts],
        "alternative: one pattern": lambda: [alternative(text) for text in texts],
    }
    rows |= {name: partial(reward, **columns) for name, reward in rewards.REWARDS.items()}
    rows["total (the course's default)"] = lambda: rewards.total(**columns)
    taken = {name: seconds(work) for name, work in rows.items()}
    for name, t in taken.items():
        print(f"{name:32}{n / t:15,.0f}{64_000 * t / n:16.2f}")
    ratio = taken["alternative: one pattern"] / taken["prompts.parse"]
    print(f"\nOn ordinary completions parse has {ratio:.2f} times the speed of the alternative.\n")

    ours = {
        "parse": prompts.parse,
        "the course's default": lambda text: rewards.total([text], ["I2101"]),
        "deepicd_reward": lambda text: rewards.deepicd_reward([text], ["I2101"]),
        "grounding_reward": lambda text: rewards.grounding_reward([text], note=[text]),
    }
    table("worst case, ms", ours, (10_000, 100_000, 1_000_000))
    print()
    table("worst case, ms", {"parse": prompts.parse, "alternative": alternative}, (400, 800, 1_600))


def table(heading: str, works: dict[str, Callable[[str], object]], sizes: tuple[int, ...]) -> None:
    print(f"{heading:44}" + "".join(f"{size:>10,} ch." for size in sizes))
    for what, unit in HOSTILE.items():
        for name, work in works.items():
            texts = ["pain</think>\n" + unit * (size // len(unit)) for size in sizes]
            print(
                f"{what:20}{name:24}"
                + "".join(f"{1000 * seconds(partial(work, text), 2):14.2f}" for text in texts)
            )


if __name__ == "__main__":
    main()
