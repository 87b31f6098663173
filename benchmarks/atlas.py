"""The error atlas in a real browser: how long until it is open, and until a filter is seen.

    python -m benchmarks.atlas [--cases 5000 --models 6] [--out results/atlas.csv]

An invented run is written to a temporary folder, its page opened in headless Chromium at 1,280 by
900 pixels, and each action done `--repeats` times. `seen_ms` is the median time from the action to
the end of the first frame that shows it (for "open": from the request to a page that answers),
`all_ms` until every panel of the page shows it, those out of view included. `cpu_ms` is what the
page's main thread worked for all of it, whatever else the machine does; `load` is the load average
over the minute when it ended.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
import shutil
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

from helpers import atlas
from tests.atlas_fixture import invented_run

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
ACTIONS = {  # what a reader does -> the page's own call
    "zoom into a chapter": "update({filters: {node: roots[8]}})",
    "zoom out": "update({filters: {node: null}})",
    "transition cell": "update({filters: {change: [5]}})",
    "a second filter": "update({filters: {sure: [4]}})",
    "search the notes": "searches.clear(); update({filters: {note: 'chest pain'}})",
    "clear all filters": "clearFilters()",
    "colour by change": "update({measure: 'change'})",
    "another model": "update({a: 'base'})",
    "next case": "step(1)",
}
TIMED = """async () => {
  const start = performance.now();
  %s;
  await new Promise((done) => requestAnimationFrame(() => setTimeout(done)));
  const seen = performance.now() - start;
  while (!document.body.dataset.settled) await new Promise((done) => setTimeout(done, 4));
  return [seen, performance.now() - start];
}"""


def measure(page_file: Path, repeats: int) -> list[dict[str, Any]]:
    """Rows action, seen_ms, all_ms, cpu_ms for one page."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        times: dict[str, list[tuple[float, ...]]] = {"open": [], **{name: [] for name in ACTIONS}}
        for _ in range(repeats):
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            session = page.context.new_cdp_session(page)
            session.send("Performance.enable", {"timeDomain": "threadTicks"})

            def worked(session: Any = session) -> float:
                metrics = session.send("Performance.getMetrics")["metrics"]
                return 1000 * next(x["value"] for x in metrics if x["name"] == "TaskDuration")

            page.goto(page_file.as_uri())
            page.wait_for_selector("body[data-ready]", state="attached")
            opened = page.evaluate("performance.now()")
            times["open"].append((opened, opened, worked()))
            for name, call in ACTIONS.items():
                page.wait_for_timeout(500)
                before = worked()
                seen, all_seen = page.evaluate(TIMED % call)
                times[name].append((seen, all_seen, worked() - before))
            page.close()
        browser.close()
    columns = ("seen_ms", "all_ms", "cpu_ms")
    return [
        {"action": name}
        | {
            column: round(statistics.median(row[place] for row in rows))
            for place, column in enumerate(columns)
        }
        for name, rows in times.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.atlas")
    parser.add_argument("--cases", type=int, default=5000)
    parser.add_argument("--models", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--page", type=Path, help="a page that exists, instead of an invented run")
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    command = "python -m benchmarks.atlas --cases {cases} --models {models} --repeats {repeats}"
    with tempfile.TemporaryDirectory() as folder:
        page, seconds = chosen.page, None
        if page is None:
            admissions = round(1.3 * chosen.cases) + 200
            sizes = {"admissions": admissions, "test": chosen.cases, "models": chosen.models}
            run, data = invented_run(Path(folder), **sizes)
            start = time.perf_counter()
            page = atlas.write(run, data=data)
            seconds = round(time.perf_counter() - start, 1)
        rows = measure(page, chosen.repeats)
        made = {
            "cases": chosen.cases,
            "models": chosen.models,
            "page_mb": round(page.stat().st_size / 1e6, 1),
            "written_in_s": seconds,
            "command": command.format(**vars(chosen)),
            "cores": os.cpu_count(),
            "python": platform.python_version(),
            "made": date.today().isoformat(),
            "load": round(os.getloadavg()[0], 1),
        }
    for row in rows:
        print("{action:24}{seen_ms:6} ms seen{all_ms:6} ms all{cpu_ms:6} ms worked".format(**row))
    print(made)
    if chosen.out:
        with chosen.out.open("w", newline="", encoding="utf-8") as handle:
            writer = csv.DictWriter(handle, [*rows[0], *made], lineterminator="\n")
            writer.writeheader()
            writer.writerows({**row, **made} for row in rows)


if __name__ == "__main__":
    main()
