"""Every argument that the course passes is one that the installed libraries take."""

from __future__ import annotations

import ast
import inspect
import warnings
from functools import cache
from pathlib import Path

import pytest

from tools import api_drift

ARGUMENTS, NOT_FOLLOWED = api_drift.passed()
INSTALLED = [
    "SFTConfig",
    "GRPOConfig",
    "LoraConfig",
    "BitsAndBytesConfig",
    "SFTTrainer",
    "GRPOTrainer",
    "PeftModel.from_pretrained",
]


@cache
def library() -> api_drift.Library:
    return api_drift.Library.installed()


def asked(name: str) -> set[str]:
    """What a callable of the installed libraries takes, by its own account."""
    import peft
    import transformers
    import trl

    class_name, _, method = name.partition(".")
    module = next(each for each in (trl, transformers, peft) if hasattr(each, class_name))
    found = getattr(module, class_name)
    return set(inspect.signature(getattr(found, method) if method else found).parameters)


# ------------------------------------------------------------------------------ the course's arguments


def test_everything_that_is_passed_on_as_a_dict_could_be_followed() -> None:
    assert not NOT_FOLLOWED


def test_what_the_course_passes_is_read_from_profiles_helpers_and_notebooks() -> None:
    sft, grpo = ARGUMENTS["SFTConfig"], ARGUMENTS["GRPOConfig"]
    assert sft["learning_rate"] >= {"helpers/profiles", "notebooks/03_lora_sft.ipynb"}
    assert "notebooks/03_lora_sft.ipynb" in sft["ddp_find_unused_parameters"], "training.defaults"
    assert "helpers/study/run.py" in sft["max_length"] and "max_length" not in grpo, "study/run.py"
    assert "num_generations" in grpo and "num_generations" not in sft
    assert "helpers/profiles" in grpo["steps_per_generation"], "of the profile `paper` alone"
    assert "steps_per_generation" not in sft
    assert {"r", "lora_alpha", "target_modules", "lora_dropout"} <= set(ARGUMENTS["LoraConfig"])
    assert {"dtype", "device_map", "quantization_config"} <= set(
        ARGUMENTS["AutoModelForCausalLM.from_pretrained"]
    )
    assert {"input_ids", "max_new_tokens", "top_k"} <= set(ARGUMENTS["generate"])


@pytest.mark.parametrize("name", sorted(ARGUMENTS))
def test_the_installed_version_takes_every_argument(name: str) -> None:
    rows = api_drift.compare({name: ARGUMENTS[name]}, library())
    gone = [f"{row.name}({row.argument}) {row.words}" for row in rows if row.state == "GONE"]
    assert not gone, f"{gone}: passed by {ARGUMENTS[name]}"
    for row in rows:
        if row.state == "deprecated":
            warnings.warn(f"{row.name}({row.argument}): {row.words}", UserWarning, stacklevel=1)


@pytest.mark.parametrize("name", INSTALLED)
def test_the_library_itself_says_the_same_as_its_source(name: str) -> None:
    # The newest versions are judged by their source alone: here is why that can be believed.
    own = asked(name) - {"kwargs", "model_kwargs"}
    read = library().parameters(api_drift.PLACES[name]).names
    assert own <= read, f"not read: {sorted(own - read)}"
    assert set(ARGUMENTS[name]) <= own, "the course passes what the library does not name"


# ----------------------------------------------------------------------------------------- the reader


OLD = '''
@dataclass
class Base:
    seed: int = 0

@dataclass
class SFTConfig(Base):
    """Settings."""
    rate: float = field(default=1.0, metadata={"help": "The rate."})
    packing: bool = field(default=False, metadata={"help": "Deprecated. Use `rate`."})
    def __post_init__(self):
        if self.rate: warn("`seed` is deprecated and will be removed in v2.")
'''
NEW = OLD.replace('    rate: float = field(default=1.0, metadata={"help": "The rate."})\n', "")


def states(source: str, *arguments: str) -> dict[str, str]:
    library = api_drift.Library({"trl/trainer/sft_config.py": source})
    passed = {"SFTConfig": {each: {"x.py"} for each in arguments}}
    return {row.argument: row.state for row in api_drift.compare(passed, library)}


def test_an_argument_that_is_gone_or_deprecated_is_named() -> None:
    names = ("seed", "rate", "packing")
    before = {"seed": "deprecated", "rate": "taken", "packing": "deprecated"}
    assert states(OLD, *names) == before
    assert states(NEW, *names) == before | {"rate": "GONE"}
    assert states("", "seed") == {"": "GONE", "seed": "GONE"}, "the whole class is gone"


def test_what_a_function_takes_out_of_its_keywords_counts() -> None:
    source = (
        "class PreTrainedModel:\n"
        "    def from_pretrained(cls, name, *, revision='main', **kwargs):\n"
        "        dtype = kwargs.pop('dtype', None)\n"
    )
    library = api_drift.Library({"transformers/modeling_utils.py": source})
    taken = library.parameters(["PreTrainedModel.from_pretrained"]).names
    assert taken == {"name", "revision", "dtype"}


def course(root: Path, code: str) -> Path:
    (root / "helpers" / "profiles").mkdir(parents=True)
    (root / "notebooks").mkdir()
    profile = "sft: {rate: 1}\ngrpo: {beta: 0}\nlora: {r: 8}\n"
    (root / "helpers" / "profiles" / "tiny.yaml").write_text(profile)
    (root / "helpers" / "training.py").write_text(code)
    return root


def test_names_and_functions_are_followed(tmp_path: Path) -> None:
    code = (
        "def defaults(**arguments):\n"
        "    common = {'seed': 0}\n"
        "    common['optim'] = 'x'\n"
        "    return common | arguments\n"
        "def train(profile):\n"
        "    given = defaults(**profile.sft)\n"
        "    given |= {'steps': 1}\n"
        "    return SFTConfig(output_dir='x', **given)\n"
    )
    arguments, unknown = api_drift.passed(course(tmp_path, code))
    assert not unknown
    assert set(arguments["SFTConfig"]) == {"rate", "seed", "optim", "steps", "output_dir"}
    assert set(arguments["GRPOConfig"]) == {"beta"}


def test_what_cannot_be_followed_is_said(tmp_path: Path) -> None:
    _, unknown = api_drift.passed(course(tmp_path, "SFTConfig(**read_settings())\n"))
    assert unknown == ["helpers/training.py, line 1: **read_settings()"]


def test_the_table_has_a_column_for_each_version() -> None:
    rows = [api_drift.Row("SFTConfig", "rate", "taken")]
    newer = [api_drift.Row("SFTConfig", "rate", "deprecated", "Deprecated. Use `speed`.")]
    text = api_drift.table({"installed": rows, "newest": newer})
    assert "SFTConfig(rate)" in text and "taken" in text
    assert "newest: SFTConfig(rate): Deprecated. Use `speed`." in text


def test_generate_of_anything_but_a_model_is_none_of_ours() -> None:
    calls = {text: ast.parse(text).body[0].value for text in ("model.generate()", "generate()")}
    assert api_drift.callable_of(calls["model.generate()"]) == "generate"
    assert api_drift.callable_of(calls["generate()"]) == ""
