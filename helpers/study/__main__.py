"""`python -m helpers.study run|show`: answers what is missing, then prints scores and verdicts.

Taught in notebook 7.
"""

from __future__ import annotations

import argparse
import os
import sys

from helpers import course, metrics
from helpers.study import ARMS, analyse, run


def main() -> int:
    """0, or 1 with a line on what is wrong."""
    core = [name for name, arm in ARMS.items() if arm.core]
    parser = argparse.ArgumentParser(prog="python -m helpers.study", description=__doc__)
    parser.add_argument("what", choices=["run", "show"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=core)
    options = parser.parse_args()
    os.environ["ICD_PROFILE"] = "tiny"  # whatever the hardware: the study's figures are a CPU's
    try:
        course.setup()
        if options.what == "run":
            run.run(options.seeds, options.arms)
        table = analyse.read()
        by_arm = analyse.scores(table).groupby("arm", sort=False)
        print(by_arm[[*metrics.LEVELS, "usable"]].agg(["mean", "std"]).round(3).to_string())
        print(f"\n{analyse.verdicts(table).round(4).to_string(index=False)}")
    except (ValueError, OSError) as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
