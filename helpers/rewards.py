"""Reward functions in TRL's signature: `reward(completions, code, **columns) -> list[float]`.

`completions` are strings or chat messages, `code` the gold codes, `note` the admission notes, one for each
completion; whatever else TRL passes lands in `columns`. A reward gives floats and never None (TRL would then
log the whole prompt). Settings are keyword arguments that no column of the table of cases can overwrite;
`configured` fixes them. `truth_table()` holds what each reward gives for the same completions.

The course trains with DEFAULT and DEFAULT_WEIGHTS: no completion earns more than the honest right answer, and
the format (0.1) never outweighs the smallest step of the hierarchy (0.15).
"""

from __future__ import annotations

import http.client
import inspect
import json
import re
import time
import warnings
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache, partial
from ipaddress import ip_address
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from helpers import icd, prompts

Reward = Callable[..., list[float]]


def format_reward(completions: Sequence[Any], code: Any = None, **columns: Any) -> list[float]:
    """1 if the *whole* completion is well-formed (`prompts.parse`), else 0.

    >>> format_reward(**example("right")), format_reward(**example("prose after the answer"))
    ([1.0], [0.0])
    """
    return [float(prompts.parse(_text(completion)).is_well_formed) for completion in completions]


def hierarchical_reward(
    completions: Sequence[Any],
    code: Sequence[str],
    *,
    dictionary: Collection[str] | None = None,
    full_credit: float = 1.0,
    category_credit: float = 0.4,
    chapter_credit: float = 0.15,
    wrong_credit: float = 0.0,
    unusable_credit: float = -0.5,
    **columns: Any,
) -> list[float]:
    """The credit of the deepest level shared with the gold code, whatever the length of the codes.

    Unusable, which includes codes that do not exist (by `icd.is_valid` and `dictionary`), earns less than
    wrong: an earnest guess beats giving up. The category earns under half: the unspecified sibling must not pay like
    the right code. A header (I21) earns what a wrong sibling earns, so hedging with it wins nothing.

    >>> [hierarchical_reward(**example(name))[0] for name in ("sibling", "same chapter", "wrong", "invented")]
    [0.4, 0.15, 0.0, -0.5]
    """
    credit = {
        "full": full_credit,
        "category": category_credit,
        "chapter": chapter_credit,
        None: wrong_credit,
    }
    return [
        credit[icd.deepest_shared(predicted, gold)]
        if predicted and (predicted == gold or icd.is_valid(predicted, dictionary))
        else unusable_credit
        for predicted, gold in _codes(completions, code)
    ]


def exact_reward(completions: Sequence[Any], code: Sequence[str], **columns: Any) -> list[float]:
    """1 for the right full code, else 0: the strict alternative.

    >>> exact_reward(**example("right")), exact_reward(**example("sibling"))
    ([1.0], [0.0])
    """
    return [float(predicted == gold) for predicted, gold in _codes(completions, code)]


def prefix_reward(completions: Sequence[Any], code: Sequence[str], **columns: Any) -> list[float]:
    """Longest common prefix over the length of the longer code, for comparison: it takes spelling for
    hierarchy (B34 earns nothing for A41, though both are infections) and never asks whether a code exists.

    >>> prefix_reward(**example("sibling")), prefix_reward(**example("same chapter, other letter"))
    ([0.8], [0.0])
    """
    return [
        _shared(predicted or "", gold) / max(len(predicted or ""), len(gold))
        for predicted, gold in _codes(completions, code)
    ]


# A match begins a line, and no tag stands inside its own kind. Possessive, and for text without blank lines: the
# plain pattern backtracks over runs of line ends.
_ELEMENT = "<{0}>((?:[^<]++|<(?!/?{0}>))*+)</{0}>"
_RELEASED = re.compile(
    rf"^(?:{_ELEMENT.format('think')})?\s*+{_ELEMENT.format('diagnosis')}", re.MULTILINE
)


def deepicd_reward(completions: Sequence[Any], code: Sequence[str], **columns: Any) -> list[float]:
    """The single-code reward of the released DeepICD-R1 job, less its judge, to compare with
    (DATEXIS/DeepICD-R1, src/rewards.py: mostly 15 for each leading character that fits). Its flaws are kept:

    - prefix length stands for hierarchy: H54 earns credit for H65, of another chapter, and B34 none for A41;
    - the right answer earns more the longer its code: 45 for I10, 105 for S72.001A;
    - a code that does not exist can beat an honest sibling: for I21.01, I2101ZZ earns 61 and I21.02 43;
    - lower case and 405 real codes such as C7A.010 are refused: right earns 0 there, some wrong answers more;
    - white space counts as reasoning; text beside the answer is free, and so is a second answer on its line;
    - a completion with its own `<think>` gets a second one put before it, and no credit for its reasoning.

    >>> [deepicd_reward(**example(name))[0] for name in ("right", "sibling", "invented", "empty")]
    [76.0, 43.0, 61.0, -6.0]
    """
    gold = _list("code", code, completions)
    return [
        _released(_text(c), icd.normalise(g) or g) for c, g in zip(completions, gold, strict=True)
    ]


def _released(completion: str, gold: str) -> float:
    lines = (line.strip() for line in f"<think>{completion}".split("\n"))
    matches = _RELEASED.findall("\n".join(line for line in lines if line))
    if not matches:
        return -1.0 if completion else -6.0
    think, answer = matches[0]
    reward = (1.0 if think else 0.0) - (len(matches) - 1)
    predicted = answer.strip().replace(".", "")
    n = _shared(predicted, gold)
    if not n or not re.fullmatch("[A-Z][0-9]{2}[A-Z0-9]{0,4}", predicted):
        return reward - 1
    if predicted == gold:
        return reward + 15 * len(gold)
    return reward + 15 * (n / len(gold) + (n - 2 if n >= 3 else 0))


_TOKEN = re.compile(r"[^\W_]+(?:[./'][^\W_]+)*|[,:();.!?]|\n(?=[ \t\r]*+[-*•\n])")
_EMPTY = re.compile(  # words that say nothing about the patient
    "an?|and|are|as|at|by|for|from|ha[ds]|have|s?he|hers?|his|i[nst]|its|o[fnr]|that|the|their|there|these|they|this|to|"
    "was|were|which|who|with|patient|pt|present(?:s|ed|ing)|reports|states|history|hx|findings?|noted?|shows|none|nothing|specific"
)
_NOT = re.compile("no|not|nor|den(?:ies|ied|ying)|without|neg|negative|never|absent")
_CONTRAST = re.compile("but|however|although|except|yet")
_CONCLUDES = re.compile(
    r"(?:suggest|indicat|support|favou?r|diagnos|probabl)\w*|consistent|point(?:s|ing)|likely|"
    "therefore|thus|hence|fits|coded?"
)


def grounding_reward(
    completions: Sequence[Any],
    code: Any = None,
    note: Sequence[str] | None = None,
    *,
    at_least: int = 2,
    copy_limit: float = 0.5,
    copy_penalty: float = 1.0,
    **columns: Any,
) -> list[float]:
    """The share of findings cited in the reasoning that the note states: a verifiable stand-in for a judge.

    A clause of the reasoning, between punctuation, cites a finding unless it concludes ("suggests", "likely", a code).
    The note states it if all its numbers, and over half of the pairs of its neighbouring content words, stand
    close together in one sentence of the note under the same negation. With `stated` such clauses,

        reward = share · min(1, stated / at_least) − copy_penalty · excess

    where excess goes from 0 to 1 while the share of the note's word pairs that the reasoning repeats goes
    from `copy_limit` to 1. Within −1 and 1; at most 0 if nothing is cited. It compares words, not meanings: a
    note's "myocardial infarction" does not state "MI".

    >>> [grounding_reward(**example(name))[0] for name in ("right", "half made up", "negation turned")]
    [1.0, 0.5, 0.5]
    """
    if not (at_least >= 1 and 0 <= copy_limit < 1):
        raise ValueError(
            f"grounding_reward: need {at_least=} to be 1 or more, and {copy_limit=} from 0 to below 1."
        )
    rewards = []
    for completion, text in zip(completions, _list("note", note, completions), strict=True):
        tokens = _TOKEN.findall(prompts.parse(_text(completion)).think.lower())
        stated, pairs = _note(text)
        cited = {tuple(clause) for sentence in _sentences(tokens) for clause in sentence if clause}
        good = sum(
            _is_stated([(word, readings[0]) for word, readings in clause], stated)
            for clause in cited
        )
        share = good / len(cited) * min(1.0, good / at_least) if cited else 0.0
        excess = (len(pairs & _word_pairs(tokens)) / max(1, len(pairs)) - copy_limit) / (
            1 - copy_limit
        )
        rewards.append(share - copy_penalty * max(0.0, excess))
    return rewards


@lru_cache(maxsize=1 << 15)
def _kind(token: str) -> str:
    if not token[0].isalnum():
        return "comma" if token in ",()" else "colon" if token == ":" else "stop"
    for kind, pattern in (
        ("not", _NOT),
        ("contrast", _CONTRAST),
        ("empty", _EMPTY),
        ("conclusion", _CONCLUDES),
    ):
        if pattern.fullmatch(token):
            return kind
    return "conclusion" if icd.normalise(token) else "word"


def _sentences(
    tokens: list[str], conclusions: bool = False
) -> Iterator[list[list[tuple[str, tuple[bool, ...]]]]]:
    """Sentences as clauses of content words, each word with its possible readings (negated?): in "denies fever,
    cough" the cough may be denied or not. Conclusions, and headings before a colon, are left out unless asked for."""
    clauses, readings, concluding = [[]], (False,), False
    for token in [*tokens, "."]:
        kind = _kind(token)
        if kind == "word" or (conclusions and kind == "conclusion"):
            if not concluding:
                clauses[-1].append((token, readings))
        elif kind == "stop":
            yield clauses
            clauses, readings, concluding = [[]], (False,), False
        elif kind == "conclusion":
            clauses[-1], concluding = [], True
        elif kind == "not":
            readings = (True,)
        elif kind != "empty":
            if kind == "colon" and not conclusions:
                clauses[-1] = []
            readings = (False, True) if kind != "contrast" and True in readings else (False,)
            clauses.append([])


@lru_cache(maxsize=256)  # the roll-outs of a prompt share their note
def _note(note: str) -> tuple[set[tuple[Any, ...]], set[tuple[str, str]]]:
    """What a note states, as (word, negated) and (word, word, negated) for words up to three apart in a sentence;
    and the pairs of words that follow each other."""
    stated: set[tuple[Any, ...]] = set()
    tokens = _TOKEN.findall(note.lower())
    for sentence in _sentences(tokens, conclusions=True):
        words = [word for clause in sentence for word in clause]
        for i, (word, readings) in enumerate(words):
            stated.update((word, negated) for negated in readings)
            stated.update(
                (near, word, negated)
                for near, _ in words[max(0, i - 3) : i]
                for negated in readings
            )
    return stated, _word_pairs(tokens)


def _is_stated(clause: list[tuple[str, bool]], stated: set[tuple[Any, ...]]) -> bool:
    pairs = [
        (a, b, not_b) in stated or (b, a, not_a) in stated
        for (a, not_a), (b, not_b) in zip(clause, clause[1:], strict=False)
    ]
    numbers = all(word in stated for word in clause if word[0][0].isdigit())
    return numbers and (2 * sum(pairs) > len(pairs) or (not pairs and clause[0] in stated))


def _word_pairs(tokens: list[str]) -> set[tuple[str, str]]:
    words = [token for token in tokens if token[0].isalnum()]
    return set(zip(words, words[1:], strict=False))


def length_penalty(
    completions: Sequence[Any],
    code: Any = None,
    *,
    free_length: int = 2000,
    max_length: int = 4000,
    **columns: Any,
) -> list[float]:
    """0 up to `free_length` characters, then falling linearly to −1 at `max_length`: the soft overlong
    punishment of DAPO (arXiv 2503.14476, eq. 13), in characters, which mean the same for every tokenizer.

    >>> length_penalty(["x" * 3000])
    [-0.5]
    """
    if not 0 <= free_length < max_length:
        raise ValueError(
            f"length_penalty: {free_length=} must be below {max_length=}, and neither negative."
        )
    room = max_length - free_length
    return [
        max(-1.0, min(0, free_length - len(_text(completion))) / room) for completion in completions
    ]


RUBRIC = Path(__file__).with_name("judge_rubric.txt").read_text(encoding="utf-8").strip()


def judge_reward(
    completions: Sequence[Any],
    code: Any = None,
    note: Sequence[str] | None = None,
    *,
    judge_url: str = "http://127.0.0.1:8000/v1",
    judge_model: str = "judge",
    judge_timeout: float = 60.0,
    judge_workers: int = 8,
    allow_remote: bool = False,
    **columns: Any,
) -> list[float]:
    """(score − 1) / 4 by RUBRIC from a local model; 0 for an unusable answer (not sent), and where the judge
    fails, takes over `judge_timeout` seconds or replies nonsense (a warning counts those).

    `judge_url`: an OpenAI-compatible endpoint, e.g. of `vllm serve MODEL --served-model-name judge`. Raises
    ValueError unless it is on this machine or `allow_remote` says that notes may leave it, which the data use
    agreement of MIMIC-IV forbids for any third party. Proxies and redirects are never followed.
    """
    address = _address(judge_url, allow_remote)

    def grade(completion: Any, text: str) -> float | str:
        parsed = prompts.parse(_text(completion))
        if not parsed.think or parsed.code is None:
            return 0.0
        case = (
            f"NOTE\n{prompts.neutralise(text)}\n\nREASONING\n{prompts.neutralise(parsed.think)}\n\n"
            f"CODE\n{icd.dotted(parsed.code)} {icd.title(parsed.code) or '(no such code)'}"
        )
        try:
            return _score(_ask(address, judge_model, case, judge_timeout))
        except Exception as error:  # whatever a judge does, training goes on
            return type(error).__name__

    with ThreadPoolExecutor(judge_workers) as pool:
        graded = list(pool.map(grade, completions, _list("note", note, completions)))
    if failed := [outcome for outcome in graded if isinstance(outcome, str)]:
        warnings.warn(
            f"judge_reward: {len(failed)} of {len(graded)} replies failed ({failed[0]}) and count 0. "
            f"Does {judge_url} serve the model '{judge_model}'?",
            stacklevel=2,
        )
    return [0.0 if isinstance(outcome, str) else outcome for outcome in graded]


def _address(url: str, allow_remote: bool) -> SplitResult:
    address = urlsplit(url)
    try:
        local = address.hostname == "localhost" or ip_address(address.hostname or "").is_loopback
    except ValueError:
        local = False
    if (
        address.scheme not in ("http", "https")
        or not address.hostname
        or not (local or allow_remote)
    ):
        raise ValueError(
            f"judge_reward: {url!r} is no http address on this machine. Serve the judge here, or "
            "pass allow_remote=True for notes that may leave the machine (never those of MIMIC-IV)."
        )
    return address


def _ask(address: SplitResult, model: str, case: str, timeout: float) -> str:
    kind = http.client.HTTPSConnection if address.scheme == "https" else http.client.HTTPConnection
    chat = [{"role": "system", "content": RUBRIC}, {"role": "user", "content": case}]
    body = json.dumps({"model": model, "messages": chat, "temperature": 0, "max_tokens": 512})
    connection = kind(address.hostname, address.port, timeout=timeout)
    deadline, reply = time.monotonic() + timeout, b""
    try:
        path = address.path.rstrip("/") + "/chat/completions"
        connection.request("POST", path, body.encode(), {"Content-Type": "application/json"})
        response = connection.getresponse()
        if response.status != 200:
            raise http.client.HTTPException
        while chunk := response.read1(
            1 << 16
        ):  # for a reply that trickles, the time-out never strikes
            reply += chunk
            if time.monotonic() > deadline or len(reply) > 1 << 20:
                raise TimeoutError
    finally:
        connection.close()
    return json.loads(reply)["choices"][0]["message"]["content"]


def _score(reply: str) -> float:
    """From the last score in {"score": 4}, "**Score: 4/5**" or "4". Raises IndexError if there is none."""
    reply = reply.rpartition("</think>")[2].replace("1-5", "")
    found = re.findall(r"score\D{0,12}([1-5](?:\.\d)?)(?!\d)", reply, re.IGNORECASE)
    found = found or re.findall(r"^\W*([1-5])(?:\s*/\s*5)?\W*$", reply[:50])
    return (min(5.0, float(found[-1])) - 1) / 4


DEFAULT: tuple[Reward, ...] = (format_reward, hierarchical_reward)
DEFAULT_WEIGHTS: tuple[float, ...] = (0.1, 1.0)


def configured(reward: Reward, name: str | None = None, **settings: Any) -> Reward:
    """The reward with settings fixed, picklable, with the `__name__` that TRL logs. Raises ValueError for a
    setting that it lacks, which would otherwise vanish among the columns.

    >>> configured(hierarchical_reward, chapter_credit=0.0)(**example("same chapter"))
    [0.0]
    """
    known = [
        p.name for p in inspect.signature(reward).parameters.values() if p.kind is p.KEYWORD_ONLY
    ]
    if unknown := set(settings) - set(known):
        raise ValueError(f"{reward.__name__} has no setting {sorted(unknown)}, only {known}.")
    made = partial(reward, **settings)
    made.__name__ = name or reward.__name__
    return made


def named(reward: str | dict[str, dict[str, Any]]) -> Reward:
    """A reward by its name, or by {name: settings}, as helpers/arms.yaml gives it. Raises ValueError for an unknown one."""
    name, settings = (reward, {}) if isinstance(reward, str) else next(iter(reward.items()))
    if not name.endswith("_reward") or name not in globals():
        raise ValueError(
            f"no reward is called {name}. Known: {', '.join(key for key in globals() if key.endswith('_reward'))}."
        )
    return configured(globals()[name], **settings)


def total(
    completions: Sequence[Any],
    code: Sequence[str],
    rewards: Sequence[Reward] = DEFAULT,
    weights: Sequence[float] = DEFAULT_WEIGHTS,
    **columns: Any,
) -> list[float]:
    """The weighted sum of rewards, as TRL forms it from `reward_funcs` and `reward_weights`."""
    parts = [reward(completions=completions, code=code, **columns) for reward in rewards]
    return [
        sum(w * r for w, r in zip(weights, row, strict=True)) for row in zip(*parts, strict=True)
    ]


@lru_cache(maxsize=1)
def truth_table() -> tuple[dict[str, Any], ...]:
    """Rows of name, why, gold, note, completion, expect {reward: value}; from truth_table.yaml beside this."""
    import yaml

    table = yaml.safe_load(Path(__file__).with_name("truth_table.yaml").read_text(encoding="utf-8"))
    shared = {"gold": table["gold"], "note": table["note"]}
    return tuple(
        {**shared, **row, "expect": dict(zip(table["rewards"], row["expect"], strict=True))}
        for row in table["rows"]
    )


def example(name: str) -> dict[str, list[str]]:
    """The arguments completions, code and note that make one row of the truth table."""
    row = next(row for row in truth_table() if row["name"] == name)
    return {"completions": [row["completion"]], "code": [row["gold"]], "note": [row["note"]]}


def _text(completion: Any) -> str:
    try:
        return completion if isinstance(completion, str) else completion[-1]["content"] or ""
    except (TypeError, KeyError, IndexError):
        raise ValueError(
            f"a completion must be text or messages, not {type(completion).__name__}."
        ) from None


def _list(column: str, values: Any, completions: Sequence[Any]) -> Sequence[str]:
    """`values`, if there is one for each completion. A bare string would be read letter by letter."""
    if values is None or isinstance(values, str) or len(values) != len(completions):
        found = (
            "a single string"
            if isinstance(values, str)
            else "nothing"
            if values is None
            else len(values)
        )
        raise ValueError(
            f"`{column}` must be a list of {len(completions)}, one for each completion, but is {found}."
            f" In training keep the column '{column}' in the data set; else put [...] around it."
        )
    return values


def _codes(completions: Sequence[Any], code: Sequence[str]) -> list[tuple[str | None, str]]:
    """(predicted, gold) pairs, normalised."""
    gold = [icd.normalise(one) for one in _list("code", code, completions)]
    if None in gold:
        raise ValueError(
            f"gold code {code[gold.index(None)]!r} does not have the shape of an ICD-10-CM code. "
            "Drop such cases: icd.normalise gives None for them."
        )
    return [(prompts.parse(_text(c)).code, g) for c, g in zip(completions, gold, strict=True)]


def _shared(a: str, b: str) -> int:
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
