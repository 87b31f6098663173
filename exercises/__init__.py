"""The exercises of the notebooks and their checkers. In a notebook: `from exercises import check`.

`cells.yaml` holds the texts, `nb00.py` to `nb07.py` the checkers, `core.py` what they share,
`sheet.py` the sheet to hand in (`make exercises`), `expectations.py` what a student expects. The
capstone: `submission.py` reads a settings file and its rules, `submit.py` trains and judges (`make
submit`). See docs/exercises.md.
"""

from exercises.core import check, judge

__all__ = ["check", "judge"]
