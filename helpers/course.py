"""What a notebook says to the machinery: set up, need, artefact, compare, save a figure.

Environment: ICD_PROFILE, ICD_DATA_DIR, ICD_RUNS_DIR choose; FRESH=1 (or FRESH=sft,grpo) makes
artefacts anew. Used in every notebook.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers import profiles
from helpers.machinery import places, store
from helpers.machinery.artefacts import BASELINE, NOTEBOOKS, artefact, experiments, path, why_stale
from helpers.machinery.places import data_dir, is_synthetic, notebooks_dir, run_dir, show, write
from helpers.machinery.switches import setup

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure


def save_figure(figure: Figure, name: str) -> Figure:
    """Save a figure as figures/<name>.png of the run, for the report; returns it to be shown."""
    if places.is_main():
        folder = run_dir() / "figures"
        folder.mkdir(parents=True, exist_ok=True)
        figure.savefig(folder / f"{name}.png", dpi=150, bbox_inches="tight")
    return figure


# ------------------------------------------------------------------------------------------
# artefacts


def need(name: str, experiment: str = BASELINE) -> Path:
    """The folder of an artefact; where it is missing or stale, the notebook that makes it is run
    first.

    Raises RuntimeError where that notebook fails, ValueError for an unknown name.
    """
    if name.split("/")[0] not in NOTEBOOKS:
        raise ValueError(f"no artefact is called {name!r}. Known: {', '.join(NOTEBOOKS)}.")
    reference = f"{name}@{experiment}"
    while not places.is_main() and why_stale(reference):
        time.sleep(2)  # the main process sees to it
    reason = why_stale(reference)
    if reason:
        _make(name, experiment, reason)
    return path(reference)


def _make(name: str, experiment: str, reason: str) -> None:
    from helpers.machinery import notebooks

    notebook = NOTEBOOKS[name.split("/")[0]]
    if experiment != BASELINE:
        raise RuntimeError(
            f"{name} of the experiment {experiment!r}: {reason}. "
            f'Run {notebook} with settings["name"] = {experiment!r} and its settings.'
        )
    if notebook in os.environ.get("ICD_MAKING", "").split(","):
        raise RuntimeError(
            f"{notebook} asks for {name}, which it makes itself: {name} is missing because "
            f"{reason}. Run {notebook} from its first cell."
        )
    expected = profiles.current().expected(notebook)
    places.say(f"{name}: {reason}. Running {notebook} first ({expected}) ...")
    notebooks.run_in_subprocess(notebook)
    reason = why_stale(name)
    if reason:
        raise RuntimeError(
            f"{notebook} has run, but {name} is not whole: {reason}. Open that notebook and run it."
        )


# ----------------------------------------------------------------------------------------
# completions


def answers(
    name: str,
    cases: pd.DataFrame,
    settings: dict[str, Any],
    needs: Sequence[str],
    *,
    base: Any = None,
    adapter: Path | str | None = None,
    **options: Any,
) -> pd.DataFrame:
    """The completions of one model for cases, as the artefact answers/<name>: made batch by batch,
    or loaded.

    settings: all that changes the result, among it "four_bit" and "max_new_tokens". base: the
    profile's unless another is given. options: passed on to inference.predict.
    """
    import pandas as pd

    from helpers import inference, models

    job = artefact(f"answers/{name}", settings, needs)
    if job.why:
        profile = profiles.current()
        model, tokenizer = models.load(base or profile, adapter, four_bit=settings["four_bit"])
        options = {
            "max_new_tokens": settings["max_new_tokens"],
            "keep": job.work,
            "label": name,
        } | options
        table = inference.predict(model, tokenizer, cases, profile, **options)
        table.to_parquet(job.part / "answers.parquet")
        job.finish()
    return pd.read_parquet(job.path / "answers.parquet")


def load_answers() -> dict[str, pd.DataFrame]:
    """Model -> its table of completions, of all models that have answered."""
    import pandas as pd

    folder = run_dir() / "answers"
    names = [each.name for each in sorted(folder.glob("[!.]*/")) if store.is_whole(each)]
    return {name: pd.read_parquet(folder / name / "answers.parquet") for name in names}


def compare(a: str, b: str, *, n_boot: int = 1000, seed: int = 0) -> pd.DataFrame:
    """Two experiments side by side: for each training that one of them has, the scores of both on
    the test cases and the paired difference b − a with its 95 % interval over patients; the two
    training curves are shown.

    What is there is loaded; an adapter that has not answered the test cases yet does so first, with
    the settings of the baseline's answers. Choose settings on the validation split before you look
    here.
    """
    import pandas as pd
    from IPython.display import display

    from helpers import metrics, plots

    cases = pd.read_parquet(need("cases") / "cases.parquet")
    rows = []
    for stage in ("sft", "grpo"):
        folders = [path(f"{stage}@{experiment}") for experiment in (a, b)]
        if not all(store.is_whole(folder) for folder in folders):
            continue
        logs = [pd.read_csv(folder / "training_log.csv") for folder in folders]
        curve = "loss" if stage == "sft" else "reward"
        display(plots.compared_curves(dict(zip((a, b), logs, strict=True)), curve))
        tables = [_answers_of(stage, experiment, cases) for experiment in (a, b)]
        test = cases[cases["hadm_id"].isin(tables[0]["hadm_id"])]
        codes = []
        for table in tables:
            gold, samples, patients = metrics.align(test, table)
            codes.append([sample[0] for sample in samples])
        scores = [metrics.report(gold, column, n_boot=0) for column in codes]
        change = metrics.compare(gold, *codes, patients=patients, n_boot=n_boot, seed=seed)
        for level in metrics.LEVELS:
            row = {"training": stage, "level": level}
            for measure, interval in (("f1_gold", "ci"), ("accuracy", "accuracy_ci")):
                row |= {
                    f"{measure}, {x}": s[level][measure]
                    for x, s in zip((a, b), scores, strict=True)
                }
                low, high = pd.Series(change[level][interval], dtype=float)  # None: NaN
                row[f"{measure}, {b} − {a}"] = (
                    f"{change[level][measure]:+.3f} [{low:+.3f}, {high:+.3f}]"
                )
            rows.append(row)
    if not rows:
        raise RuntimeError(
            f"{a!r} and {b!r} have no finished training in common. There are: "
            f"{', '.join([BASELINE, *experiments()])}."
        )
    return pd.DataFrame(rows).set_index(["training", "level"]).round(3)


def _answers_of(stage: str, experiment: str, cases: pd.DataFrame) -> pd.DataFrame:
    import pandas as pd

    baseline = need(f"answers/{stage}")
    table = pd.read_parquet(baseline / "answers.parquet")
    if experiment == BASELINE:
        return table
    test = cases.set_index("hadm_id", drop=False).loc[table["hadm_id"]]
    settings = store.inputs_of(baseline)["settings"]
    return answers(
        stage,
        test,
        settings | {"name": experiment},
        ["cases", f"{stage}@{experiment}"],
        adapter=path(f"{stage}@{experiment}"),
        batch_size=settings.get("batch_size"),
    )
