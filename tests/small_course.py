"""A course small enough to be trained in seconds: 300 admissions, 24 traces, and the real notebooks cut down to a few steps.

What is cut: numbers in the settings, and what comes after the artefact is made (its checks ask for a real training). What
trains, saves and goes on is the notebook's own code.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import psutil
from safetensors.numpy import load_file

ROOT = Path(__file__).parent.parent
ROWS = 24
PREPARE = f"""
from helpers import course, hospital, mimic, traces
import pandas as pd
course.setup()
job = course.artefact("data")
hospital.write(job.part, admissions=300, seed=0)
job.finish()
job = course.artefact("cases", {{}}, ["data"])
mimic.write_cases(course.data_dir(), job.part / "cases.parquet")
job.finish()
cases = pd.read_parquet(job.path / "cases.parquet")
job = course.artefact("traces", {{}}, ["cases"])
made = traces.from_template(cases[cases["split"] == "train"].head(80))
made[made["kept"]].head({ROWS}).to_parquet(job.part / "traces.parquet")
held_out = traces.from_template(cases[cases["split"] == "val"].head(2))
held_out.to_parquet(job.part / "held_out.parquet")
job.finish()
"""

# Put behind the settings of each copy. Where the file `hold` lies in the run folder, the notebook stops there to be killed.
EXTRA = """
import time

from transformers import TrainerCallback

from helpers import rewards


def hold(where):
    if (run / "hold").exists() and (run / "hold").read_text() == str(where):
        (run / "held").write_text("")
        time.sleep(600)


class Hold(TrainerCallback):
    def on_train_begin(self, args, state, control, **kwargs):
        print(f"training begins at step {state.global_step}")

    def on_step_end(self, args, state, control, **kwargs):
        hold(state.global_step)


def vowel_reward(completions, code=None, **columns):
    # After so few steps no answer is usable and every honest reward is the same: this one has something to compare.
    texts = [c if isinstance(c, str) else c[-1]["content"] for c in completions]
    return [sum(text.count(v) for v in "aeiou") / 20 for text in texts]


rewards.REWARDS["vowel_reward"] = vowel_reward
"""

SFT = {
    "settings": {
        "max_steps": 14,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 1,
        "r": 4,
        "lora_alpha": 8,
        "save_steps": 5,
        "warmup_steps": 2,
    },
    "cuts": {
        ".head(128)": ".head(2)",
        'training.Steps("SFT")': 'training.Steps("SFT"), Hold()',
    },
    "last": "03_training",
}
GRPO = {
    "settings": {
        "max_steps": 6,
        "num_generations": 2,
        "per_device_train_batch_size": 4,
        "gradient_accumulation_steps": 2,
        "max_completion_length": 12,
        "learning_rate": 1e-3,
        "save_steps": 2,
        "rewards": ["vowel_reward"],
        "reward_weights": [1.0],
    },
    "extra": 'display_settings.update({"watch": 2, "watch_every": 2})',
    "cuts": {
        ".head(64)": ".head(2)",
        "train.sample(24": "train.sample(2",
        'training.Steps("GRPO")': 'training.Steps("GRPO"), Hold()',
    },
    "last": "04_training",
}
INFERENCE = {
    "settings": {"max_new_tokens": 12, "cases": 6},
    "extra": """
from helpers import inference

constrained_cases, sampled_cases, samples, baseline_notes = 2, 3, 2, 60
real_predict = inference.predict


def predict(*tables, label, **options):
    hold(label)
    print(f"answers of {label}")
    return real_predict(*tables, label=label, **options)


inference.predict = predict
""",
    "cuts": {},
    "last": "its_settings = greedy",
}
CUTS = {"03_lora_sft": SFT, "04_qlora_grpo": GRPO, "05_inference": INFERENCE}


def environment(root: Path, **env: str) -> dict[str, str]:
    """Data, runs and notebooks below `root`, the tiny profile, one thread: the same sums in the same order every time.
    env: what is to be other than that."""
    there = {
        "ICD_PROFILE": "tiny",
        "ICD_DATA_DIR": str(root / "synthetic"),
        "ICD_RUNS_DIR": str(root / "runs"),
        "ICD_NOTEBOOKS_DIR": str(root / "notebooks"),
        "FRESH": "",
        "OMP_NUM_THREADS": "1",
    }
    return {
        k: v
        for k, v in os.environ.items()
        if k not in ("ICD_MAKING", "ICD_HEADLESS", "ICD_BASE", "RANK", "WORLD_SIZE")
    } | (there | env)


def run_folder(root: Path, profile: str = "tiny") -> Path:
    return root / "runs" / f"synthetic-{profile}"


def copy_notebook(
    root: Path,
    name: str,
    *,
    settings: dict | None = None,
    cuts: dict | None = None,
    extra: str = "",
) -> None:
    """The notebook `name`, cut down, among the notebooks of `root`; the rest goes beyond what stands in CUTS."""
    cut = CUTS[name]
    nb = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in nb.cells if cell.cell_type == "code"]
    last = max(i for i, cell in enumerate(cells) if str(cut["last"]) in cell.source)
    whole = "\0".join(cell.source for cell in cells[: last + 1])
    for old, new in {**cut["cuts"], **(cuts or {})}.items():
        assert whole.count(old) == 1, (
            f"{name}: {old!r} stands there {whole.count(old)} times, not once"
        )
        whole = whole.replace(old, new)
    sources = whole.split("\0")
    own = cut.get("extra", "")
    changes = {**cut["settings"], **(settings or {})}
    override = f"{EXTRA}{extra}\nsettings.update({changes!r})\n{own}"
    sources.insert(2, override)
    nb.cells = [nbformat.v4.new_code_cell(source) for source in sources]
    (root / "notebooks").mkdir(exist_ok=True)
    nbformat.write(nb, root / "notebooks" / f"{name}.ipynb")


def prepare(root: Path, **env: str) -> None:
    """Data, cases and traces below `root`."""
    (root / "notebooks").mkdir(parents=True)
    command = [sys.executable, "-c", PREPARE]
    subprocess.run(command, env=environment(root, **env), cwd=ROOT, check=True, timeout=300)


def course(root: Path, *arguments: str, **env: str) -> str:
    """What `python -m helpers.machinery.notebooks` prints; fails where it fails."""
    done = subprocess.run(
        [sys.executable, "-m", "helpers.machinery.notebooks", *arguments],
        env=environment(root, **env),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def run_notebook(root: Path, name: str) -> str:
    """Run a notebook to its end; the text that its cells printed."""
    course(root, "run", "--only", name)
    executed = nbformat.read(run_folder(root) / "notebooks" / f"{name}.ipynb", as_version=4)
    return "".join(out.get("text", "") for cell in executed.cells for out in cell.outputs)


def kill_notebook(root: Path, name: str, where: object) -> None:
    """Run a notebook and end the runner and its kernel with SIGKILL once it has come to `where`."""
    hold, held = run_folder(root) / "hold", run_folder(root) / "held"
    hold.write_text(str(where))
    child = subprocess.Popen(
        [sys.executable, "-m", "helpers.machinery.notebooks", "run", "--only", name],
        env=environment(root),
        cwd=ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    deadline = time.monotonic() + 600
    while not held.exists():
        assert child.poll() is None and time.monotonic() < deadline, (
            child.communicate()[0] if child.poll() is not None else name
        )
        time.sleep(0.1)
    kernels = psutil.Process(child.pid).children(recursive=True)  # in sessions of their own
    assert kernels
    os.killpg(child.pid, signal.SIGKILL)
    for kernel in kernels:
        kernel.kill()
    child.communicate()
    psutil.wait_procs(kernels, timeout=30)
    hold.unlink()
    held.unlink()


def weights(folder: Path) -> dict:
    """The adapter of a run, by name."""
    found = load_file(folder / "adapter_model.safetensors")
    assert found
    return found


def record(root: Path, name: str) -> dict:
    """What an artefact of the run was made from."""
    return json.loads((run_folder(root) / name / "made_from.json").read_text())


def work(root: Path, name: str) -> Path:
    """The folder of an interrupted artefact's checkpoints."""
    return next((run_folder(root) / ".making").glob(f"{name}.????????????"))
