"""A submission to the capstone: what a team changes in GRPO, read from its settings file and held
against the rules.

    team: Ada and Grace
    learning_rate: 5.0e-4
    rewards: [format_reward, my_reward.py:pays_the_category]

The rules (submission_rules.yaml) keep the labels equal. GRPO may see at most as many notes with
their codes, and draw at most as many completions, as in the course's own run. Base and SFT adapter
are the course's. Code of a team is read here, and run only by `functions`. docs/exercises.md has
the student's side; `make submit` (submit.py) trains and judges.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
import re
import sys
import traceback
import types
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from helpers import rewards
from helpers.machinery import artefacts, store
from helpers.profiles import Profile

RULES = yaml.safe_load(
    Path(__file__).with_name("submission_rules.yaml").read_text(encoding="utf-8")
)
ALLOWED: dict[str, dict[str, Any]] = RULES["allowed"]
REFUSED: dict[str, str] = RULES["refused"]
OWN = ("rewards", "reward_weights", "notes")  # settings of the capstone, not TRL's
SEED = 0  # of every training
SFT_TEAM = "SFT"
BASELINE_TEAM = "GRPO, the baseline"
TEAM = re.compile(r"\w[\w .,&'+-]{0,39}")  # a spreadsheet takes no such name for a formula
CODE = re.compile(r"(\w[\w-]*\.py):([A-Za-z_]\w*)")
LARGEST = 20_000  # bytes of a settings file
KEY = 12  # hexadecimal digits
WHAT_CODE_MAY = (
    "That code runs on this machine and may do all that you may do. Read it first. To run it, add "
    "RUN_CODE=1 to the make command (--run-code without make)."
)


class Refused(ValueError):
    """A settings file or a run that the rules do not allow. The message says what to change."""

    def __init__(self, name: str, problems: list[str]) -> None:
        super().__init__("\n  - ".join([f"{name} is refused:", *problems]))
        self.problems = problems


@dataclass(frozen=True)
class Submission:
    """What a settings file says. folder: where it lies, and where its code is looked for."""

    name: str
    team: str
    changes: dict[str, Any]
    folder: Path

    def text(self) -> str:
        """The settings file."""
        return yaml.safe_dump({"team": self.team, **self.changes}, sort_keys=False, width=100)


@dataclass(frozen=True)
class Spending:
    """labels: notes whose code GRPO learns from, each counted once. completions: all that it
    draws."""

    labels: int
    completions: int


@dataclass(frozen=True)
class Plan:
    """A submission that the rules allow, with all that its training depends on.

    arguments: GRPOConfig's. notes: how many labelled notes GRPO gets; None: all. code: file name ->
    its source.
    """

    team: str
    changes: dict[str, Any]
    arguments: dict[str, Any]
    rewards: list[str | dict[str, Any]]
    weights: list[float]
    notes: int | None
    spent: Spending
    code: dict[str, bytes]

    def record(self) -> dict[str, Any]:
        """All that its result depends on, of what a team can change."""
        arguments = {
            name: value
            for name, value in self.arguments.items()
            if name not in artefacts.WITHOUT_EFFECT
        }
        return {
            "arguments": arguments,
            "rewards": self.rewards,
            "reward_weights": self.weights,
            "notes": self.notes,
            "code": {name: hashlib.sha256(text).hexdigest() for name, text in self.code.items()},
            "seed": SEED,
        }

    @property
    def key(self) -> str:
        """The same for the same settings and the same code, whoever submits them."""
        return store.digest(self.record())[:KEY]


# ------------------------------------------------------------------------------- the settings file


class _Loader(yaml.SafeLoader):
    """YAML without a key that stands twice (the second one would win without a word), and without
    references, by which a short file becomes a huge one."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("references (*name) are not read")
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = sorted({str(name) for name in names if names.count(name) > 1})
        if twice:
            raise yaml.YAMLError(f"{', '.join(twice)}: stands there twice")
        return super().construct_mapping(node, deep)


def read(path: Path) -> Submission:
    """A settings file. Raises Refused where it cannot be read or names no team; the settings
    themselves are looked at by `plan`."""
    name = path.name
    try:
        raw = path.read_bytes()
        if len(raw) > LARGEST:
            raise ValueError(f"it has {len(raw):,} bytes, at most {LARGEST:,} are read")
        content = yaml.load(raw.decode("utf-8-sig"), _Loader)
    except OSError as error:
        raise Refused(name, [f"it cannot be read ({error.strerror}): {path}"]) from error
    except (ValueError, RecursionError, TypeError, yaml.YAMLError) as error:
        problem = f"it is no settings file: {' '.join(str(error).split())[:300]}"
        raise Refused(name, [problem]) from error
    if not isinstance(content, dict) or not all(isinstance(each, str) for each in content):
        raise Refused(name, ["it must hold lines such as `learning_rate: 5.0e-4`"])
    team = content.pop("team", None)
    problem = team_problem(team)
    if problem:
        raise Refused(name, [problem])
    return Submission(name, team, content, path.absolute().parent)


def team_problem(team: Any) -> str:
    """Why a team cannot have this name; "" where it can."""
    if team is None:
        return "team: is missing. Write the name of your team, as in `team: Ada and Grace`"
    if not isinstance(team, str) or not TEAM.fullmatch(team) or team != team.strip():
        return (
            f"team: {team!r} must be text of 1 to 40 letters, digits, blanks and . , & ' + - "
            "that begins with a letter or digit; put quotes around a number"
        )
    if team.casefold() in (SFT_TEAM.casefold(), BASELINE_TEAM.casefold()):
        return f"team: {team!r} is a row of the course. Take another name"
    return ""


def of_run(name: str, team: str, recorded: dict[str, Any], profile: Profile) -> Submission:
    """The submission that has the settings of a run of notebook 4.

    recorded: what the run was trained with. What the course does too is left out.
    """
    changes = {}
    for setting, value in recorded.items():
        if value != baseline(profile).get(setting):
            changes[setting] = value
    return Submission(name, team, changes, Path.cwd())


def baseline(profile: Profile) -> dict[str, Any]:
    """The settings of the course's own GRPO, as notebook 4 records them."""
    return profile.grpo | {
        "start": artefacts.BASELINE,
        "four_bit": profile.four_bit["grpo"],
        "rewards": [reward.__name__ for reward in rewards.DEFAULT],
        "reward_weights": list(rewards.DEFAULT_WEIGHTS),
        "seed": SEED,
    }


# ------------------------------------------------------------------------------- the rules


def spent(arguments: dict[str, Any], notes: int | None = None) -> Spending:
    """What a training spends, from GRPOConfig's arguments, on one device.

    One generation draws num_generations completions for each of its notes, and feeds num_iterations
    steps. No note comes twice before all have come. notes: how many there are; None: enough.
    """
    generations = math.ceil(arguments["max_steps"] / arguments.get("num_iterations", 1))
    completions = generations * drawn(arguments)
    prompts = completions // arguments["num_generations"]
    return Spending(prompts if notes is None else min(notes, prompts), completions)


def drawn(arguments: dict[str, Any]) -> int:
    """Completions of one generation."""
    return arguments["per_device_train_batch_size"] * arguments["gradient_accumulation_steps"]


def budget(profile: Profile) -> Spending:
    """What the course's own GRPO spends, and nobody may exceed. Raises Refused for a profile that
    trains by epochs."""
    if profile.grpo["max_steps"] < 1:
        problem = f"the profile {profile.name!r} trains by epochs, so it has no budget of steps"
        raise Refused("this run", [f"{problem}. Take another one (ICD_PROFILE=tiny)"])
    return spent(profile.grpo)


def plan(submission: Submission, profile: Profile) -> Plan:
    """The submission as it will be trained. Raises Refused that names every setting that the rules
    do not allow."""
    limit = budget(profile)
    problems, unknown = [], []
    changes = {}
    for name, value in submission.changes.items():
        if name in REFUSED:
            problems.append(f"{name}: cannot be changed: {REFUSED[name]}")
        elif name not in ALLOWED:
            near = difflib.get_close_matches(name, ALLOWED, 1)
            hint = f" Do you mean {near[0]}?" if near else ""
            unknown.append(f"{name}: is no setting of the capstone.{hint}")
        else:
            problem = value_problem(name, value)
            problems += [f"{name}: {problem}"] if problem else []
            is_number = ALLOWED[name]["kind"] == "number" and not problem
            changes[name] = float(value) if is_number else value
    if unknown:
        problems += [*unknown, f"allowed are: {', '.join(ALLOWED)}"]
    if problems:
        raise Refused(submission.name, problems)
    named = changes.get("rewards", baseline(profile)["rewards"])
    weights = changes.get("reward_weights", baseline(profile)["reward_weights"])
    code, problems = _code(named, submission.folder)
    if len(named) != len(weights):
        problems.append(f"reward_weights: {len(weights)} weights for {len(named)} rewards")
    own = {name: value for name, value in changes.items() if name not in OWN}
    arguments = profile.grpo | own
    notes = changes.get("notes")
    problems += _unfair(arguments, notes, limit, profile)
    if problems:
        raise Refused(submission.name, problems)
    cycle = arguments.get("num_iterations", 1)
    arguments["save_steps"] = cycle * math.ceil(profile.grpo["save_steps"] / cycle)
    weights = [float(weight) for weight in weights]
    spending = spent(arguments, notes)
    return Plan(submission.team, changes, arguments, named, weights, notes, spending, code)


def _unfair(
    arguments: dict[str, Any], notes: int | None, limit: Spending, profile: Profile
) -> list[str]:
    """What does not add up, or costs more than the course's own run."""
    group = arguments["num_generations"]
    each = drawn(arguments)
    batch = (
        f"{arguments['per_device_train_batch_size']} x {arguments['gradient_accumulation_steps']} "
        f"= {each} completions of a step (per_device_train_batch_size x "
        "gradient_accumulation_steps)"
    )
    if each % group:
        return [f"num_generations: the {batch} cannot be shared out in groups of {group}"]
    problems = []
    most = profile.max_new_tokens
    if arguments["max_completion_length"] > most:
        problems.append(f"max_completion_length: must be at most {most}, as in the course")
    if notes is not None and notes < each // group:
        problems.append(f"notes: the {batch} are about {each // group} notes, but notes is {notes}")
    spending = spent(arguments, notes)
    iterations = arguments.get("num_iterations", 1)
    if spending.completions > limit.completions:
        fits = limit.completions // each * iterations
        remedy = f"max_steps: {fits} would fit" if fits else "a smaller batch is needed"
        problems.append(
            f"it draws {spending.completions:,} completions, the course draws "
            f"{limit.completions:,}; {remedy}"
        )
    if spending.labels > limit.labels:
        fits = limit.labels // (each // group) * iterations
        problems.append(
            f"it sees {spending.labels:,} labelled notes, the course sees {limit.labels:,}; "
            f"notes: {limit.labels} would fit (it sees them again and again), and so would "
            f"max_steps: {fits}"
        )
    return problems


def value_problem(name: str, value: Any) -> str:
    """Why a setting cannot have this value, from the rule of its kind; "" where it can."""
    rule = ALLOWED[name]
    kind = rule["kind"]
    if kind == "rewards":
        return _rewards_problem(value)
    if kind == "weights":
        is_list = isinstance(value, list) and value and all(map(_is_number, value))
        return "" if is_list and any(value) else "must be a list of numbers, not all of them 0"
    if kind == "choice":
        return "" if value in rule["choices"] else f"must be one of {', '.join(rule['choices'])}"
    if kind == "flag":
        return "" if isinstance(value, bool) else "must be true or false"
    if isinstance(value, str):
        hint = " YAML takes 1e-3 for text: write 1.0e-3." if _reads_as_number(value) else ""
        return f"{value!r} is text, and must be a number.{hint}"
    if not _is_number(value) or (kind == "whole" and not isinstance(value, int)):
        return f"{value!r} must be a {'whole number' if kind == 'whole' else 'number'}"
    if "above" in rule and value <= rule["above"]:
        return f"{value} must be above {rule['above']}"
    if "least" in rule and value < rule["least"]:
        return f"{value} must be at least {rule['least']}"
    if "most" in rule and value > rule["most"]:
        return f"{value} must be at most {rule['most']}"
    return ""


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < 1e12


def _reads_as_number(text: str) -> bool:
    try:
        return _is_number(float(text))
    except ValueError:
        return False


def _rewards_problem(value: Any) -> str:
    if not isinstance(value, list) or not value:
        return "must be a list, such as [format_reward, hierarchical_reward]"
    names = []
    for reward in value:
        if isinstance(reward, str) and CODE.fullmatch(reward):
            names.append(reward.partition(":")[2])
            continue
        is_name = isinstance(reward, str)
        is_named = isinstance(reward, dict) and len(reward) == 1
        if not is_name and not (is_named and all(isinstance(x, dict) for x in reward.values())):
            return f"{reward!r} must be a name, a name with settings, or file.py:function"
        if is_name and (".py" in reward or ":" in reward):
            return f"{reward!r} must be file.py:function, with the file beside the settings file"
        try:
            names.append(rewards.named(reward).__name__)
        except (ValueError, TypeError) as error:
            return f"{error} Your own is written as my_reward.py:function."
        settings = {} if is_name else next(iter(reward.values()))
        wrong = [name for name, credit in settings.items() if not _is_number(credit)]
        if wrong:
            return f"{', '.join(wrong)} must be a number"
    twice = sorted({name for name in names if names.count(name) > 1})
    return f"{', '.join(twice)} stands there twice" if twice else ""


# ------------------------------------------------------------------------------- code of a team


def _code(named: list[Any], folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """File name -> source of a submission's own rewards, and what is wrong with them; nothing is
    run."""
    code, problems = {}, []
    for reward in named:
        match = CODE.fullmatch(reward) if isinstance(reward, str) else None
        if match:
            try:
                code[match[1]] = (folder / match[1]).read_bytes()
            except OSError as error:
                problems.append(f"rewards: {folder / match[1]} cannot be read ({error.strerror})")
    return code, problems


def functions(plan: Plan, run_code: bool) -> list[rewards.Reward]:
    """The rewards of a plan, for TRL; a team's own are tried on a few completions first.

    Raises Refused where they are code and `run_code` is not given, or do not do as a reward must.
    """
    if plan.code and not run_code:
        files = ", ".join(plan.code)
        raise Refused(f"{plan.team}: {files}", [f"it is code of the team. {WHAT_CODE_MAY}"])
    modules: dict[str, dict[str, Any]] = {}
    chosen = []
    for reward in plan.rewards:
        match = CODE.fullmatch(reward) if isinstance(reward, str) else None
        if match is None:
            chosen.append(rewards.named(reward))
            continue
        file, name = match.groups()
        if file not in modules:
            modules[file] = _module(file, plan.code[file])
        function = modules[file].get(name)
        if not callable(function):
            raise Refused(reward, [f"{file} defines no function {name}"])
        chosen.append(_watched(function, reward, name))
        _try(chosen[-1])
    return chosen


def _module(file: str, source: bytes) -> dict[str, Any]:
    """What a file of code defines. Raises Refused where it stops."""
    module = types.ModuleType(Path(file).stem)
    module.__file__ = file
    sys.modules[f"submission.{module.__name__}"] = module  # where dataclasses look for it
    module.__name__ = f"submission.{module.__name__}"
    try:
        exec(compile(source, file, "exec"), module.__dict__)
    except (Exception, SystemExit) as error:
        raise Refused(file, [_stop(error, file)]) from error
    return module.__dict__


def _watched(function: Callable[..., Any], reward: str, name: str) -> rewards.Reward:
    """A team's reward whose results are looked at: one number for each completion, each time."""

    def watched(completions: list, **columns: Any) -> list[float]:
        try:
            result = function(completions=completions, **columns)
            values = [float(value) for value in result]
        except (Exception, SystemExit) as error:
            raise Refused(reward, [_stop(error, reward.partition(":")[0])]) from error
        if len(values) != len(completions):
            problem = f"it gives {len(values)} numbers for {len(completions)} completions"
            raise Refused(reward, [problem])
        if not all(map(math.isfinite, values)):
            raise Refused(reward, ["it gives a number that is not finite"])
        return values

    watched.__name__ = name
    return watched


def _stop(error: BaseException, file: str) -> str:
    """Where and why code of a team stopped, in one line."""
    lines = [each.lineno for each in traceback.extract_tb(error.__traceback__)]
    names = [each.filename for each in traceback.extract_tb(error.__traceback__)]
    inside = [line for line, name in zip(lines, names, strict=True) if name == file]
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    where = line or (inside[-1] if inside else None)
    place = f" in line {where}" if where else ""
    return f"it stops{place}: {type(error).__name__}: {' '.join(str(error).split())[:200]}"


def _try(reward: rewards.Reward) -> None:
    """Call a reward as TRL will, with four completions of the truth table."""
    rows = rewards.truth_table()[:4]
    reward(
        completions=[[{"role": "assistant", "content": row["completion"]}] for row in rows],
        prompts=[[{"role": "user", "content": row["note"]}] for row in rows],
        code=[row["gold"] for row in rows],
        note=[row["note"] for row in rows],
    )


def described(plan: Plan, profile: Profile) -> str:
    """What a submission changes and spends, for the reader."""
    limit = budget(profile)
    before = {name: json.dumps(value) for name, value in baseline(profile).items()}
    before["notes"] = "all of the training split"
    changes = [
        f"{name} {json.dumps(value)} (before: {before.get(name, 'the default of TRL')})"
        for name, value in plan.changes.items()
    ]
    return "\n".join(
        [
            f"{plan.team}, settings {plan.key}",
            f"  changes        {'; '.join(changes) or 'nothing: this is the baseline again'}",
            f"  labelled notes {plan.spent.labels:,} of {limit.labels:,}",
            f"  completions    {plan.spent.completions:,} of {limit.completions:,}",
        ]
    )


def check_course(name: str, recorded: dict[str, Any], expected: dict[str, Any]) -> None:
    """Raises Refused where the run's own `sft` or `grpo` was trained with other settings than the
    course's."""
    expected = json.loads(json.dumps(expected))
    changed = [each for each in expected if each in recorded and recorded[each] != expected[each]]
    if changed:
        problem = (
            f"it was trained with another {', '.join(changed)}, under the name of the course's "
            'own. Give an experiment a name of its own (settings["name"]), put the notebook\'s '
            f"settings back, and run it with FRESH={name}"
        )
        raise Refused(f"{name} of this run", [problem])


def sft_settings(profile: Profile) -> dict[str, Any]:
    """The settings of the course's own SFT, as notebook 3 records them."""
    return profile.lora | profile.sft | {"four_bit": profile.four_bit["sft"], "seed": SEED}
