"""What the first cell of each notebook does: switches of the libraries, the profile, where things
lie.

Not needed to follow the course.
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import warnings
from pathlib import Path
from typing import Any

from helpers import profiles
from helpers.machinery import places

QUIET = {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_DISABLED": "true",
    "WANDB_MODE": "disabled",
    "HF_DATASETS_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TRANSFORMERS_VERBOSITY": "error",
    "TRL_EXPERIMENTAL_SILENCE": "1",
}
COLAB_CARD = (
    "There is a GPU. To use it: Runtime > Restart session, then `%env ICD_PROFILE=t4` in a new "
    "first cell (t4 takes hours)."
)
SHIPPED = (
    "There was no run yet, so the finished one that ships with the course was copied there. "
    "FRESH=1 makes everything anew, FRESH=grpo one stage."
)
CHOSEN = []  # the profile that this process was set up for
OFFLINE = ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "TRANSFORMERS_OFFLINE")


def setup() -> tuple[profiles.Profile, Path]:
    """Environment switches, then the profile in force and its run folder; prints both, the data and
    the notice.

    Raises RuntimeError for another profile in the same process: libraries keep their switches.
    """
    profile = profiles.current()
    has_card = "google.colab" in sys.modules and profile.base == "tiny" and profiles.gpu_gb()
    if profile.name not in (CHOSEN or [profile.name]):
        raise RuntimeError(
            f"This kernel was set up for the profile {CHOSEN[0]!r}: {profile.name!r} would take "
            "effect only in part. Restart the kernel (on Colab: Runtime > Restart session), set "
            "ICD_PROFILE, and run again from the first cell."
        )
    CHOSEN[:] = [profile.name]
    run = places.run_dir()
    card_is_unusable = profiles.unusable_card()
    _switch(profile)
    take_shipped()
    places.check_room(run)
    _explain_stops()
    kind = "synthetic patients" if places.is_synthetic() else "your own data"
    places.say(f"profile  {profile.name}: {profile.about} (ICD_PROFILE changes it)")
    places.say(f"data     {places.show(places.data_dir())}: {kind}")
    places.say(f"run      {places.show(run)}\n{places.NOTICE}")
    if has_card:
        places.say(COLAB_CARD)
    if card_is_unusable:
        places.say(
            "There is an NVIDIA driver, but torch finds no card it can use: "
            "compare nvidia-smi with torch.version.cuda."
        )
    return profile, run


def take_shipped() -> None:
    """Where there is no run yet, begin with the finished one that ships with the course (in
    ICD_SHIPPED_DIR, or among the results), and say so."""
    run = places.run_dir()
    shipped = Path(os.environ.get("ICD_SHIPPED_DIR", places.results_dir())) / run.name
    is_wanted = places.is_main() and places.is_synthetic() and not run.exists()
    if is_wanted and shipped.is_dir():
        # What is cut off is found out by the sizes in made_from.json.
        shutil.copytree(shipped, run)
        places.say(SHIPPED)


def _switch(profile: profiles.Profile) -> None:
    """Nothing calls home, the trainers see one card, and the tiny profile neither asks a hub nor
    takes a card."""
    if "LOCAL_RANK" not in os.environ:  # without a launcher the trainers refuse more than one card
        os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")
    switches = dict(QUIET)
    if profile.base == "tiny":
        switches |= dict.fromkeys(OFFLINE, "1")
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the figures of the course are a CPU's
        cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else 4
        # Small matrices gain nothing from many cores.
        switches["OMP_NUM_THREADS"] = str(min(4, cores))
    for name, value in switches.items():
        os.environ.setdefault(name, value)
    libraries = "transformers|trl|peft|torch|bitsandbytes|accelerate"
    for kind in (FutureWarning, DeprecationWarning):
        warnings.filterwarnings("ignore", category=kind, module=libraries)
    # bitsandbytes misses a faster kernel that need not be there
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)


def _explain_stops() -> None:
    """In a notebook that a reader has open, say after a failed or interrupted cell how to go on."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    if shell is None or os.environ.get("ICD_HEADLESS"):  # headless, the runner says it
        return
    if _how_to_go_on not in shell.events.callbacks["post_run_cell"]:
        shell.events.register("post_run_cell", _how_to_go_on)


def _how_to_go_on(result: Any) -> None:
    if result.error_in_exec is not None:
        places.say(
            f"Nothing that was finished is lost: it lies in {places.show(places.run_dir())}. "
            "Correct what the error names (on a full disk, free some room) and run this notebook "
            "again from its first cell: it goes on, a training from its last checkpoint."
        )
