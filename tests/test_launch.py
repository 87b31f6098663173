"""The training notebooks under `accelerate launch`, unchanged: two CPU processes that talk through gloo, on the tiny profile."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import numpy as np
import psutil
import pytest
import small_course as small
import yaml

from helpers.machinery.places import NOTICE

START = "    training.run(trainer"  # the call that starts a training
STEPS = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": small.ROWS // 4}
CONFIGS = sorted((small.ROOT / "configs").glob("*.yaml"))

# Which rows each process saw, kept by process: SFT by a hash of the tokens, GRPO by the note that came with the completions.
RECORD_SFT = """
import json
import os

from helpers.machinery import store


def record(trainer):
    inner, place = trainer.compute_loss, run / f"seen-{os.environ.get('RANK', 0)}.jsonl"

    def recording(model, inputs, *rest, **options):
        rows = [[int(t) for t in row if t != tokenizer.pad_token_id] for row in inputs["input_ids"]]
        seen = {"step": trainer.state.global_step, "rows": [store.digest(row) for row in rows]}
        if model.training:  # not the look at held-out traces
            with place.open("a") as out:
                out.write(json.dumps(seen) + "\\n")
        return inner(model, inputs, *rest, **options)

    trainer.compute_loss = recording
"""
RECORD_GRPO = """
import json
import os

from helpers.machinery import store


def recorded_reward(completions, note=None, trainer_state=None, **columns):
    if trainer_state is not None:
        seen = {"step": trainer_state.global_step, "rows": [store.digest(text) for text in note]}
        with (run / f"seen-{os.environ.get('RANK', 0)}.jsonl").open("a") as out:
            out.write(json.dumps(seen) + "\\n")
    return [0.0] * len(completions)


rewards.REWARDS["recorded_reward"] = recorded_reward
"""


def seen(root: Path) -> list[list[dict]]:
    """What the processes saw, one list for each."""
    places = sorted(small.run_folder(root).glob("seen-*.jsonl"))
    return [[json.loads(line) for line in place.read_text().splitlines()] for place in places]


def rows(records: list[dict]) -> Counter[str]:
    return Counter(row for record in records for row in record["rows"])


# accelerate shards weights on accelerators only. This lets it do so on CPU processes, and writes down whether it did.
SHARDED = """
from accelerate import state as accelerate_state
from torch.distributed.tensor import DTensor

kinds, begin = accelerate_state.DistributedType, accelerate_state.AcceleratorState.__init__


def begin_sharded(self, *args, fsdp_plugin=None, **kwargs):
    begin(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fsdp_plugin is not None and self.distributed_type == kinds.MULTI_CPU:
        self.distributed_type, self.fsdp_plugin = kinds.FSDP, fsdp_plugin
        accelerate_state.PartialState._shared_state["distributed_type"] = kinds.FSDP


accelerate_state.AcceleratorState.__init__ = begin_sharded


class Hold(Hold):
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.is_world_process_zero:
            (run / "sharded").write_text(str(all(isinstance(p, DTensor) for p in model.parameters())))
"""


def launch(root: Path, name: str, config: str | Path = "configs/ddp.yaml") -> str:
    """`make launch` of a notebook, by the command that the Makefile gives; what it prints."""
    make = [
        "make",
        "-n",
        "--no-print-directory",
        "-o",
        ".venv/ready",
        "launch",
        f"NB={name}",
        f"CONFIG={config}",
    ]
    recipe = subprocess.run(make, cwd=small.ROOT, text=True, capture_output=True, check=True).stdout
    command = shlex.split(recipe.splitlines()[-1])
    assert command[0] == ".venv/bin/python", recipe
    done = subprocess.run(
        [sys.executable, *command[1:]],
        env=small.environment(root),
        cwd=small.ROOT,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def test_a_launch_that_cannot_be_says_what_is_missing() -> None:
    for given, text in (
        (
            {"CONFIG": "configs/none.yaml", "NB": "03_lora_sft"},
            "configs/none.yaml: no such file.*ddp.yaml",
        ),
        ({"CONFIG": "configs/ddp.yaml", "NB": "3_sft"}, "3_sft: no such notebook.*03_lora_sft"),
    ):
        make = [
            "make",
            "--no-print-directory",
            "-o",
            ".venv/ready",
            "launch",
            *(f"{k}={v}" for k, v in given.items()),
        ]
        done = subprocess.run(make, cwd=small.ROOT, text=True, capture_output=True)
        assert done.returncode == 2 and re.search(text, done.stdout), done.stdout + done.stderr


def moved(root: Path, name: str) -> Path:
    return Path(shutil.copytree(root, root.parent / name))


def distance(one: dict, other: dict) -> float:
    """Euclidean distance of two adapters."""
    assert one.keys() == other.keys()
    return float(np.sqrt(sum(((one[name] - other[name]) ** 2).sum() for name in one)))


def assert_written_once(root: Path, said: str, notebook: str, artefact: str) -> None:
    """One process spoke and wrote; the artefact is whole, and up to date for whoever comes next on one process."""
    run = small.run_folder(root)
    assert len(re.findall(f"^{artefact}: making it", said, re.M)) == 1
    assert said.count(NOTICE) == 1 and (run / "figures" / f"{notebook[:2]}_training.png").is_file()
    assert not [p for p in run.iterdir() if p.name.startswith(f".{artefact}")] and not list(
        (run / ".making").glob(f"{artefact}.*[!k]")
    )
    again = small.course(root, "script", notebook)
    assert (
        f"{artefact}: " in again and "is up to date, loaded" in again and "making it" not in again
    )


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data, cases, traces, and 03 such that one step is one epoch of six micro-batches."""
    root = tmp_path_factory.mktemp("launch") / "prepared"
    small.prepare(root)
    small.copy_notebook(
        root,
        "03_lora_sft",
        settings=STEPS | {"max_steps": 5},
        cuts={START: f"    record(trainer)\n{START}"},
        extra=RECORD_SFT,
    )
    return root


@pytest.fixture(scope="module")
def sft(prepared: Path) -> Path:
    """03 on one process, run as a script as well: nothing but the number of processes differs."""
    root = moved(prepared, "sft")
    small.course(root, "script", "03_lora_sft")
    return root


@pytest.mark.slow
def test_sft_on_two_processes_sees_each_trace_once_an_epoch_and_ends_like_one(
    prepared: Path, sft: Path
) -> None:
    root = moved(prepared, "sft-launched")
    said = launch(root, "03_lora_sft")
    processes = seen(root)
    assert len(processes) == 2
    for step in range(5):  # one epoch each
        halves = [
            rows([record for record in records if record["step"] == step]) for records in processes
        ]
        assert [half.total() for half in halves] == [small.ROWS // 2] * 2
        both = halves[0] + halves[1]
        assert len(both) == small.ROWS and set(both.values()) == {1}, (
            "a trace was seen twice in an epoch, or not at all"
        )
    assert rows(seen(sft)[0]) == rows(processes[0]) + rows(processes[1])
    assert_written_once(root, said, "03_lora_sft", "sft")
    # A step sums the same gradients in another order, so the last digits differ (4e-6 of the way was seen). Adam divides by
    # the size of a gradient, which lets rounding show where that is all but zero: hence not the last digit, but a thousandth.
    one, two = (small.weights(small.run_folder(r) / "sft") for r in (sft, root))
    way = distance(
        one,
        {name: np.zeros_like(value) if "lora_B" in name else value for name, value in one.items()},
    )
    assert distance(one, two) < 1e-3 * way


@pytest.mark.slow
def test_a_launch_that_was_killed_goes_on_from_its_checkpoint(prepared: Path) -> None:
    whole, root = moved(prepared, "launched-whole"), moved(prepared, "launched-killed")
    for place in (whole, root):
        small.copy_notebook(place, "03_lora_sft", settings=STEPS | {"max_steps": 8})
    launch(whole, "03_lora_sft")
    run = small.run_folder(root)
    (run / "hold").write_text("7")
    command = [
        "accelerate.commands.launch",
        "--config_file",
        "configs/ddp.yaml",
        "-m",
        "helpers.machinery.notebooks",
        "script",
        "03_lora_sft",
    ]
    child = subprocess.Popen(
        [sys.executable, "-m", *command],
        env=small.environment(root),
        cwd=small.ROOT,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 300
    while not (run / "held").exists():
        assert child.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)
    workers = psutil.Process(child.pid).children(recursive=True)
    for process in (*workers, child):
        process.kill()
    child.wait()
    psutil.wait_procs(workers, timeout=30)
    (run / "hold").unlink()
    said = launch(root, "03_lora_sft")
    assert "going on from where it was interrupted" in said and "training begins at step 5" in said
    one, two = (small.weights(small.run_folder(place) / "sft") for place in (whole, root))
    assert distance(one, two) == 0.0


@pytest.mark.slow
def test_weights_that_fsdp2_shards_are_gathered_when_they_are_saved(
    prepared: Path, sft: Path, tmp_path: Path
) -> None:
    config = yaml.safe_load((small.ROOT / "configs" / "fsdp2.yaml").read_text())
    place = tmp_path / "fsdp2.yaml"
    place.write_text(
        yaml.safe_dump(config | {"num_processes": 2, "use_cpu": True, "mixed_precision": "no"})
    )
    root = moved(prepared, "sharded")
    small.copy_notebook(
        root,
        "03_lora_sft",
        settings=STEPS | {"max_steps": 5},
        extra=SHARDED,
    )
    small.copy_notebook(root, "04_qlora_grpo", settings={"four_bit": False}, extra=SHARDED)
    for notebook, artefact in (("03_lora_sft", "sft"), ("04_qlora_grpo", "grpo")):
        said = launch(root, notebook, place)
        flag = small.run_folder(root) / "sharded"
        assert flag.read_text() == "True", "the weights were not sharded"
        flag.unlink()
        assert_written_once(root, said, notebook, artefact)
    one, two = (small.weights(small.run_folder(r) / "sft") for r in (sft, root))
    way = distance(
        one,
        {name: np.zeros_like(value) if "lora_B" in name else value for name, value in one.items()},
    )
    assert distance(one, two) < 1e-3 * way
    assert {
        name: value.shape for name, value in small.weights(small.run_folder(root) / "grpo").items()
    } == {name: value.shape for name, value in two.items()}


@pytest.mark.slow
def test_grpo_on_two_processes_sees_each_prompt_once_an_epoch_and_ends_within_noise(
    sft: Path,
) -> None:
    roots = {}
    for name, seed in (("launched", 0), ("one", 1), ("other", 2)):
        roots[name] = moved(sft, f"grpo-{name}")
        for old in small.run_folder(roots[name]).glob("seen-*.jsonl"):
            old.unlink()
        small.copy_notebook(
            roots[name],
            "04_qlora_grpo",
            extra=RECORD_GRPO,
            cuts={
                "watched, few_notes = ": "train = train.head(8)\nwatched, few_notes = ",
                # Other roll-outs of the same prompts; the processes of a launch draw from seeds of their own anyway.
                START: f"    torch.manual_seed({seed} + int(os.environ.get('RANK', 0)))\n{START}",
            },
            settings={
                "max_steps": 8,
                "rewards": ["vowel_reward", "recorded_reward"],
                "reward_weights": [1.0, 0.0],
            },
        )
    said = launch(roots["launched"], "04_qlora_grpo")
    for name in ("one", "other"):
        small.course(roots[name], "script", "04_qlora_grpo")
    processes = seen(roots["launched"])
    assert len(processes) == 2
    for epoch in ((0, 1), (2, 3), (4, 5), (6, 7)):  # 8 prompts, 4 a step
        both = sum(
            (rows([r for r in records if r["step"] in epoch]) for records in processes), Counter()
        )
        assert len(both) == 8 and set(both.values()) == {2}, (
            "each prompt once an epoch, with its group of two roll-outs"
        )
    assert rows(seen(roots["one"])[0]) == rows(processes[0]) + rows(processes[1])
    assert_written_once(roots["launched"], said, "04_qlora_grpo", "grpo")
    # The roll-outs are other ones, so the adapters differ; not by more than two runs on one process with other draws do.
    made = {name: small.weights(small.run_folder(root) / "grpo") for name, root in roots.items()}
    noise = distance(made["one"], made["other"])
    assert 0 < distance(made["launched"], made["one"]) < 1.5 * noise


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_configuration_is_one_that_accelerate_reads(path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    text = path.read_text()
    assert (
        load_config_from_file(str(path)).num_processes == yaml.safe_load(text)["num_processes"] > 1
    )
    assert ("NOT RUN" in text.splitlines()[0]) != (path.stem == "ddp")


SETUP_CELL = "from helpers import course\n\nprofile, run = course.setup()"


def test_a_script_shows_what_a_cell_says_and_where_it_failed(places: Path) -> None:
    import nbformat

    def write(*cells: str) -> None:
        nb = nbformat.v4.new_notebook(
            cells=[nbformat.v4.new_code_cell(cell) for cell in (SETUP_CELL, *cells)]
        )
        nbformat.write(nb, places / "notebooks" / "00_start_here.ipynb")

    def script(**env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "helpers.machinery.notebooks", "script", "00_start_here"],
            env={**os.environ, **env},
            cwd=small.ROOT,
            text=True,
            capture_output=True,
        )

    write("# nothing", "import os\n6 * 7\nos.environ['MPLBACKEND'] + '!'", "profile.name")
    done = script()
    assert done.returncode == 0, done.stderr
    assert "'agg!'" in done.stdout and "'tiny'" in done.stdout and "42" not in done.stdout
    assert script(RANK="1").stdout == ""
    write("x = 1\ny = x / 0")
    failed = script()
    assert (
        failed.returncode == 1
        and "00_start_here failed in cell 2" in failed.stderr
        and "y = x / 0" in failed.stdout + failed.stderr
    )
