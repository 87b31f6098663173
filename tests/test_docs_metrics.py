"""The examples of docs/metrics.md are run, and the page names what the code gives."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from helpers import metrics

PAGE = Path(__file__).parents[1] / "docs" / "metrics.md"
TEXT = PAGE.read_text(encoding="utf-8")


def test_every_example_gives_what_the_page_says() -> None:
    scope: dict[str, object] = {}
    blocks = [
        (TEXT[: m.start(1)].count("\n"), m[1])
        for m in re.finditer(r"^```python\n(.*?)^```", TEXT, re.M | re.S)
    ]
    assert len(blocks) >= 7
    for line, block in blocks:
        if ">>>" not in block:
            exec(compile("\n" * line + block, str(PAGE), "exec"), scope)
            continue
        example = doctest.DocTestParser().get_doctest(block, scope, PAGE.name, str(PAGE), line)
        said: list[str] = []
        runner = doctest.DocTestRunner(
            optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE, verbose=False
        )
        runner.run(example, out=said.append, clear_globs=False)
        assert not runner.failures, "".join(said)
        scope = example.globs


def test_the_page_names_every_key_and_function() -> None:
    report = metrics.report(["I10"], ["I10"], train_codes=["I10"])
    keys = {*report, *report["full"], *metrics.compare(["I10"], ["I10"], ["I10"])["full"]} - {
        *metrics.LEVELS
    }
    functions = [
        name
        for name, function in vars(metrics).items()
        if getattr(function, "__module__", "") == metrics.__name__ and name[0].islower()
    ]
    functions.remove("differences")  # the study's, described there
    missing = [
        name
        for name in [*keys, *functions]
        if f"`{name}" not in TEXT and f"metrics.{name}" not in TEXT
    ]
    assert not missing


@pytest.mark.parametrize(
    ("formula", "value"), [("2/9", 2 / 9), ("16/27", 16 / 27), ("8/15", 8 / 15), ("8/12", 8 / 12)]
)
def test_fractions_of_the_worked_example(formula: str, value: float) -> None:
    gold, predicted = (
        ["I21.01", "I21.4", "J18.9", "J18.9", "C50.911"],
        ["I21.01", "I21.01", "J18.9", "A41.9", None],
    )
    r = metrics.report(gold, predicted, n_boot=0)
    assert formula in TEXT and value in [
        pytest.approx(x) for x in (r["full"]["f1_union"], r["hf"], r["hr"], r["hp"])
    ]
