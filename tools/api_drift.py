"""Do TRL, transformers and PEFT still take every argument that the course passes to them?

    python -m tools.api_drift            the installed versions and the newest released ones

What the course passes is read from its source: calls in helpers/ and in the cells of the notebooks,
and the profiles, whose `sft`, `grpo` and `lora` go to SFTConfig, GRPOConfig and LoraConfig. What a
library takes is read from its source too, without importing it: so the newest versions need only be
downloaded (from PyPI, without what they depend on) and not installed.

Exit status: 0 all is taken, 1 something is gone, 2 it could not look. tests/test_api_drift.py asks
the installed libraries themselves, and compares this reader with them.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import re
import subprocess
import sys
import tempfile
import zipfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
LIBRARIES = ("trl", "transformers", "peft")
# Callable -> where its arguments are declared, one after another: "Class" stands for what makes it
PLACES = {
    "SFTConfig": ("SFTConfig",),
    "GRPOConfig": ("GRPOConfig",),
    "LoraConfig": ("LoraConfig",),
    "BitsAndBytesConfig": ("BitsAndBytesConfig",),
    "GenerationConfig": ("GenerationConfig",),
    "SFTTrainer": ("SFTTrainer",),
    "GRPOTrainer": ("GRPOTrainer",),
    "AutoModelForCausalLM.from_pretrained": ("PreTrainedModel.from_pretrained",),
    "AutoTokenizer.from_pretrained": ("PreTrainedTokenizerBase.from_pretrained",),
    "AutoConfig.from_pretrained": ("PreTrainedConfig.from_pretrained",),
    "PeftModel.from_pretrained": ("PeftModel.from_pretrained",),
    "PeftConfig.from_pretrained": ("PeftConfigMixin.from_pretrained",),
    # What is no setting goes to the model
    "generate": ("GenerationMixin.generate", "GenerationConfig", "Qwen2ForCausalLM.forward"),
}
PROFILE_FIELDS = {"sft": "SFTConfig", "grpo": "GRPOConfig", "lora": "LoraConfig"}
TRAINERS = ("sft", "grpo")

Passed = dict[str, dict[str, set[str]]]  # callable -> argument -> files that pass it


# --- what the course passes -----------------------------------------------------------------------


def profile_arguments(root: Path) -> dict[str, set[str]]:
    """Field of the profiles -> the names of arguments in it, of all profiles."""
    names: dict[str, set[str]] = {name: set() for name in PROFILE_FIELDS}
    for file in sorted((root / "helpers" / "profiles").glob("*.yaml")):
        record = yaml.safe_load(file.read_text(encoding="utf-8"))
        for name in names:
            names[name] |= set(record[name])
    return names


def changes(root: Path) -> set[str]:
    """The arguments that arms of the study change."""
    file = root / "helpers" / "study" / "arms.yaml"
    arms = yaml.safe_load(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {name for arm in arms.values() for name in arm.get("changes", {})}


def sources(root: Path) -> Iterator[tuple[str, ast.Module]]:
    """Name and syntax tree of each module of helpers/ and of each notebook's cells."""
    for file in sorted((root / "helpers").rglob("*.py")):
        yield file.relative_to(root).as_posix(), ast.parse(file.read_text(encoding="utf-8"))
    for file in sorted((root / "notebooks").glob("*.ipynb")):
        cells = json.loads(file.read_text(encoding="utf-8"))["cells"]
        code = ["".join(cell["source"]) for cell in cells if cell["cell_type"] == "code"]
        magic = re.compile(r"^( *)[%!].*$", re.MULTILINE)
        text = magic.sub(r"\1pass", "\n".join(code))
        yield file.relative_to(root).as_posix(), ast.parse(text)


def callable_of(call: ast.Call) -> str:
    """The name under which PLACES knows what is called; "" for anything else."""
    text = ast.unparse(call.func)
    if text in PLACES and text != "generate":
        return text
    is_generate = isinstance(call.func, ast.Attribute) and call.func.attr == "generate"
    is_model = is_generate and ast.unparse(call.func.value).endswith("model")
    return "generate" if is_model else ""


@dataclass
class Reader:
    """Finds the keys of dicts that are handed on as `**arguments`, by following names."""

    name: str  # of what is called with the dict
    profile: dict[str, set[str]]
    functions: dict[str, tuple[ast.FunctionDef, ast.Module]]
    unknown: list[str] = field(default_factory=list)  # what it could not follow

    def keys(
        self, node: ast.expr, tree: ast.Module, seen: frozenset[str] = frozenset()
    ) -> set[str]:
        """Keys of the dict that an expression gives; `tree` is the file that it stands in."""
        match node:
            case ast.Dict():
                names = {key.value for key in node.keys if isinstance(key, ast.Constant)}
                spread = [
                    value for key, value in zip(node.keys, node.values, strict=True) if key is None
                ]
                return names.union(*(self.keys(each, tree, seen) for each in spread))
            case ast.BinOp(op=ast.BitOr()):
                return self.keys(node.left, tree, seen) | self.keys(node.right, tree, seen)
            case ast.Attribute(attr=name) if name in self.profile:
                return self.profile[name]
            case ast.DictComp():
                return self._elements(node.generators[0].iter, tree, seen)
            case ast.Name(id=name):
                return self._of_name(name, node, tree, seen)
            case ast.Call():
                return self._of_call(node, tree, seen)
            case ast.IfExp():
                return self.keys(node.body, tree, seen) | self.keys(node.orelse, tree, seen)
            case ast.Constant():  # another variable of the same name: no dict
                return set()
        self.unknown.append(ast.unparse(node))
        return set()

    def _walk(self, node: ast.AST) -> Iterator[ast.AST]:
        """All nodes below, without the branches of an `if` that add nothing here."""
        yield node
        for child in ast.iter_child_nodes(node):
            is_branch = isinstance(node, ast.If) and child is not node.test
            if not (is_branch and self._adds_nothing(node, child)):
                yield from self._walk(child)

    def _adds_nothing(self, choice: ast.If, child: ast.AST) -> bool:
        """Whether a branch is for the other trainer (it takes that one's field of the profile),
        or only changes what is there (`if arguments.get(name)`)."""
        if ".get(" in ast.unparse(choice.test):
            return True
        branch = choice.body if child in choice.body else choice.orelse
        nodes = [each for statement in branch for each in ast.walk(statement)]
        names = {each.attr for each in nodes if isinstance(each, ast.Attribute)}
        owners = {PROFILE_FIELDS[name] for name in TRAINERS if name in names}
        is_trainer = self.name in [PROFILE_FIELDS[name] for name in TRAINERS]
        return is_trainer and bool(owners - {self.name})

    def _elements(self, node: ast.expr, tree: ast.Module, seen: frozenset[str]) -> set[str]:
        if isinstance(node, (ast.Tuple, ast.List)):
            return {each.value for each in node.elts if isinstance(each, ast.Constant)}
        return self.keys(node, tree, seen)

    def _of_name(
        self, name: str, node: ast.expr, tree: ast.Module, seen: frozenset[str]
    ) -> set[str]:
        """All that the file puts into a dict of this name."""
        if name in seen:
            return set()
        seen |= {name}
        values = []
        names = set()
        for each in self._walk(tree):
            if isinstance(each, ast.Assign):
                for target in each.targets:
                    if ast.unparse(target) == name:
                        values.append(each.value)
                    is_entry = isinstance(target, ast.Subscript)
                    if is_entry and ast.unparse(target.value) == name:
                        names.add(ast.literal_eval(target.slice))
            elif isinstance(each, ast.AugAssign) and ast.unparse(each.target) == name:
                values.append(each.value)
        if not values and not names:
            self.unknown.append(ast.unparse(node))
        return names.union(*(self.keys(value, tree, seen) for value in values))

    def _of_call(self, call: ast.Call, tree: ast.Module, seen: frozenset[str]) -> set[str]:
        """What a function of the course returns, and what it is given as `**arguments`."""
        name = ast.unparse(call.func).split(".")[-1]
        given = [word.value for word in call.keywords if word.arg is None]
        names = set().union(*(self.keys(each, tree, seen) for each in given))
        if name == "dict":
            return names | {word.arg for word in call.keywords if word.arg}
        if name not in self.functions or name in seen:
            if name not in seen:
                self.unknown.append(ast.unparse(call))
            return names
        function, home = self.functions[name]
        own = function.args.kwarg.arg if function.args.kwarg else ""
        taken = {each.arg for each in [*function.args.args, *function.args.kwonlyargs]} | {own}
        for each in ast.walk(function):
            is_argument = isinstance(each, ast.Return) and ast.unparse(each.value) in taken
            if isinstance(each, ast.Return) and each.value and not is_argument:
                names |= self.keys(each.value, home, seen | {name} | taken)
        return names


def passed(root: Path = ROOT) -> tuple[Passed, list[str]]:
    """What the course passes, and what in its calls could not be followed."""
    trees = list(sources(root))
    profile = profile_arguments(root)
    followed = profile | {"changes": changes(root)}  # fields whose keys are known
    functions = {}
    for _, tree in trees:
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                functions[node.name] = node, tree
    result: Passed = defaultdict(lambda: defaultdict(set))
    for stage, name in PROFILE_FIELDS.items():
        for argument in profile[stage]:
            result[name][argument].add("helpers/profiles")
    unknown = []
    for file, tree in trees:
        for call in ast.walk(tree):
            name = callable_of(call) if isinstance(call, ast.Call) else ""
            if not name:
                continue
            reader = Reader(name, followed, functions)
            for word in call.keywords:
                names = {word.arg} if word.arg else reader.keys(word.value, tree)
                for argument in names:
                    result[name][argument].add(file)
            unknown += [f"{file}, line {call.lineno}: **{text}" for text in reader.unknown]
    return {name: dict(arguments) for name, arguments in result.items()}, unknown


# --- what a library takes -------------------------------------------------------------------------


@dataclass(frozen=True)
class Parameters:
    """What a callable takes; of that, what the library calls deprecated: argument -> its words."""

    names: frozenset[str]
    deprecated: dict[str, str]


class Library:
    """The source of some packages: file -> text."""

    def __init__(self, files: dict[str, str]) -> None:
        self.files = files

    @classmethod
    def installed(cls, packages: Iterable[str] = LIBRARIES) -> Library:
        """The packages of this environment, without importing them."""
        files = {}
        for package in packages:
            spec = importlib.util.find_spec(package)
            if spec is None or spec.origin is None:
                raise ModuleNotFoundError(f"{package} is not installed: run `make setup`.")
            folder = Path(spec.origin).parent
            for file in folder.rglob("*.py"):
                name = file.relative_to(folder.parent).as_posix()
                files[name] = file.read_text(encoding="utf-8")
        return cls(files)

    @classmethod
    def of_wheels(cls, wheels: Iterable[Path]) -> Library:
        """Packages as they were downloaded."""
        files = {}
        for wheel in wheels:
            with zipfile.ZipFile(wheel) as archive:
                for name in archive.namelist():
                    if name.endswith(".py"):
                        files[name] = archive.read(name).decode("utf-8")
        return cls(files)

    @cached_property
    def _homes(self) -> dict[str, list[str]]:
        """Class -> files that define it, the shortest path first."""
        homes = defaultdict(list)
        for file in sorted(self.files, key=lambda name: (name.count("/"), name)):
            for name in re.findall(r"^class (\w+)", self.files[file], re.MULTILINE):
                homes[name].append(file)
        return homes

    def find(self, name: str) -> ast.ClassDef | None:
        """The class of this name; None where the packages have none."""
        for file in self._homes.get(name, [])[:1]:
            for node in ast.parse(self.files[file]).body:
                if isinstance(node, ast.ClassDef) and node.name == name:
                    return node
        return None

    def parameters(self, places: Iterable[str]) -> Parameters:
        """Of a callable whose arguments are declared in these places. Raises LookupError where one
        of them is gone."""
        nodes = []
        for place in places:
            class_name, _, method = place.partition(".")
            found = self._nodes(class_name, method or "__init__")
            if not found:
                raise LookupError(f"{place} is gone")
            nodes += found
        names = set().union(*map(_declared, nodes))
        deprecated: dict[str, str] = {}
        for node in nodes:
            deprecated |= _deprecated(node, names)
        return Parameters(frozenset(names), deprecated)

    def _nodes(self, class_name: str, method: str) -> list[ast.ClassDef | ast.FunctionDef]:
        """The method that counts; or, of a dataclass, it and its ancestors, whose fields it has."""
        found = self.find(class_name)
        if found is None:
            return []
        for node in found.body:
            if isinstance(node, ast.FunctionDef) and node.name == method:
                return [node]
        nodes = []
        if method == "__init__" and any(isinstance(node, ast.AnnAssign) for node in found.body):
            nodes.append(found)
        for base in found.bases:
            nodes += self._nodes(ast.unparse(base).split(".")[-1], method)
        return nodes


def _declared(node: ast.ClassDef | ast.FunctionDef) -> set[str]:
    """Fields of a dataclass; parameters of a function, and what it takes out of its **kwargs."""
    if isinstance(node, ast.ClassDef):
        fields = [each.target for each in node.body if isinstance(each, ast.AnnAssign)]
        return {target.id for target in fields if isinstance(target, ast.Name)}
    arguments = node.args
    names = {each.arg for each in [*arguments.args, *arguments.kwonlyargs, *arguments.posonlyargs]}
    if arguments.kwarg:
        calls = [each for each in ast.walk(node) if isinstance(each, ast.Call) and each.args]
        for call in calls:
            is_taken = ast.unparse(call.func) in ("kwargs.pop", "kwargs.get")
            if is_taken and isinstance(call.args[0], ast.Constant):
                names.add(call.args[0].value)
    return names - {"self", "cls"}


def _deprecated(node: ast.ClassDef | ast.FunctionDef, names: set[str]) -> dict[str, str]:
    """Argument -> the sentence that calls it deprecated: in the help of a field, a decorator, or a
    message. What only some of its values share counts too: the sentence tells."""
    result = {}
    for each in ast.walk(node):
        text = each.value if isinstance(each, ast.Constant) else ""
        if isinstance(each, ast.AnnAssign) and "eprecat" in ast.unparse(each):
            helps = [c.value for c in ast.walk(each) if isinstance(c, ast.Constant)]
            text = next((str(h) for h in helps if "eprecat" in str(h)), "")
            if isinstance(each.target, ast.Name) and text:
                result[each.target.id] = _sentence(text)
        elif isinstance(text, str) and "eprecat" in text:
            for sentence in re.split(r"(?<=\.)\s+|\n\s*\n", text):
                if "eprecat" in sentence:
                    quoted = set(re.findall(r"`(\w+)\b", sentence)) & names
                    result |= dict.fromkeys(quoted - set(result), _sentence(sentence))
    return result


def _sentence(text: str) -> str:
    """The sentence of a text that speaks of deprecation."""
    sentences = re.split(r"(?<=[.!])\s+", " ".join(text.split()))
    return next(sentence for sentence in sentences if "eprecat" in sentence)


# --- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One argument: in one library, and whether that takes it."""

    name: str  # of what is called
    argument: str
    state: str  # "taken", "deprecated" or "GONE"
    words: str = ""  # of the library, about its deprecation


def compare(arguments: Passed, library: Library) -> list[Row]:
    """A row for each argument that the course passes."""
    rows = []
    for name in sorted(arguments):
        try:
            known = library.parameters(PLACES[name])
        except LookupError as error:
            known = Parameters(frozenset(), {})
            rows.append(Row(name, "", "GONE", str(error)))
        for argument in sorted(arguments[name]):
            words = known.deprecated.get(argument, "")
            state = "deprecated" if words else "taken"
            rows.append(Row(name, argument, state if argument in known.names else "GONE", words))
    return rows


def download(folder: Path) -> list[Path]:
    """The newest released wheels. Raises CalledProcessError where pip cannot get them."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps"]
    command += ["--only-binary", ":all:", "--disable-pip-version-check", "-d", str(folder)]
    subprocess.run([*command, *LIBRARIES], check=True)
    return sorted(folder.glob("*.whl"))


def table(columns: dict[str, list[Row]]) -> str:
    """Arguments down, versions across; then the words of the libraries on what is deprecated."""
    states: dict[tuple[str, str], dict[str, str]] = defaultdict(dict)
    notes = []
    for title, rows in columns.items():
        for row in rows:
            states[row.name, row.argument][title] = row.state
            if row.words:
                notes.append(f"{title}: {row.name}({row.argument}): {row.words}")
    width = max(len(f"{name}({argument})") for name, argument in states)
    lines = [" " * width + "".join(f"  {title:>12}" for title in columns)]
    for (name, argument), by_title in sorted(states.items()):
        cells = "".join(f"  {by_title.get(title, '–'):>12}" for title in columns)
        lines.append(f"{f'{name}({argument})':{width}}{cells}")
    return "\n".join([*lines, "", *(notes or ["nothing that the course passes is deprecated"])])


def main() -> int:
    """The command line; see the head of this file."""
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()
    arguments, unknown = passed()
    with tempfile.TemporaryDirectory() as scratch:
        try:
            wheels = download(Path(scratch))
        except (OSError, subprocess.CalledProcessError) as error:
            print(f"the newest versions could not be downloaded: {error}", file=sys.stderr)
            return 2
        newest = Library.of_wheels(wheels)
        released = [" ".join(wheel.name.split("-")[:2]) for wheel in wheels]
    columns = {
        "installed": compare(arguments, Library.installed()),
        "newest": compare(arguments, newest),
    }
    print("installed:", ", ".join(f"{name} {version(name)}" for name in sorted(LIBRARIES)))
    print("newest:   ", ", ".join(released), end="\n\n")
    print(table(columns))
    gone = [row for rows in columns.values() for row in rows if row.state == "GONE"]
    print(f"\n{len(columns['newest'])} arguments, {len(gone)} gone")
    for text in unknown:
        print(f"not followed: {text}")
    return 1 if gone or unknown else 0


if __name__ == "__main__":
    sys.exit(main())
