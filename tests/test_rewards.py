"""The truth table, the released formula's vectors, and a hunt for what earns too much."""

from __future__ import annotations

import doctest
import pickle
import random
import re
import time
from os.path import commonprefix

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers import grounding, hospital, icd, notes, prompts, rewards, traces
from helpers.rewards import (
    deepicd_reward,
    exact_reward,
    format_reward,
    grounding_reward,
    hierarchical_reward,
    named,
    prefix_reward,
    total,
    truth_table,
)

ALL = pytest.mark.parametrize("reward", rewards.REWARDS.values(), ids=rewards.REWARDS)
NOTE = truth_table()[0]["note"]
soup = st.lists(
    st.sampled_from(
        [
            *prompts.TAGS,
            "I21.01",
            "I21",
            "I50.9",
            "J18.9",
            "I21.01ZZ",
            "chest pain; ",
            "\n",
            " ",
            "<",
        ]
    )
    | st.text(max_size=4),
    max_size=14,
).map("".join)


def told(answer: str) -> str:
    return f"reasoning</think>\n<diagnosis>{answer}</diagnosis>"


# ---------------------------------------------------------------- what each reward gives
@pytest.mark.parametrize("row", truth_table(), ids=lambda row: row["name"])
def test_truth_table(row: dict) -> None:
    for name, value in row["expect"].items():
        got = rewards.REWARDS[name](**rewards.example(row["name"]))
        assert got == pytest.approx([value]), name
        assert type(got[0]) is float


def test_the_truth_table_is_large_and_covers_every_reward() -> None:
    rows = truth_table()
    assert len(rows) >= 20
    assert (
        len({row["name"] for row in rows})
        == len({(row["completion"], row["gold"]) for row in rows})
        == len(rows)
    )
    assert rows[0]["expect"].keys() == rewards.REWARDS.keys()


@pytest.mark.parametrize("module", [rewards, grounding])
def test_docstrings(module: object) -> None:
    outcome = doctest.testmod(module)
    assert outcome.attempted >= 2
    assert outcome.failed == 0


@pytest.mark.parametrize(
    ("gold", "completion", "value"),
    [
        ("I2101", told("I21.01"), 76),
        ("I2101", told("I2102"), 43),
        ("I2101", told("I21"), 25),
        ("I2101", told("I2101ZZ"), 61),
        ("I2101", told("I501"), 4),
        ("I2101", told("i2101"), 0),
        ("I2101", told("I2101 - STEMI"), 0),
        ("I2101", "", -6),
        ("I2101", "reasoning: I21.01", -1),
        ("I2101", "reasoning</think>\n<diagnosis>I21.01", -1),
        ("I2101", told("I21.01") + "\n<diagnosis>I50.1</diagnosis>", 75),
        ("I10", told("I10"), 46),
        ("I10", told("I100"), 31),
        ("S72001A", told("S72001A"), 106),
        ("S72001A", told("S72001D"), 73.857),
        ("H6500", told("H5400"), 4),
        ("A419", told("B349"), 0),
        ("C7A010", told("C7A010"), 0),
    ],
)
def test_the_released_formula(gold: str, completion: str, value: float) -> None:
    assert deepicd_reward([completion], [gold]) == pytest.approx([value], abs=5e-4)


def test_the_released_pattern_refuses_405_billable_codes() -> None:
    import simple_icd_10_cm as cm

    leaves = [
        code for code in cm.get_all_codes(False) if cm.is_leaf(code, False) and icd.normalise(code)
    ]
    refused = [code for code in leaves if deepicd_reward([told(code)], [code]) == [0.0]]
    assert len(refused) == 405
    assert {code[:3] for code in refused} == {
        *re.findall("...", "C4AC7AC7BD3AI1AI5AJ4AM1AO9AQA0Z3A")
    }


@given(soup | soup.map(lambda text: f"r</think>\n<diagnosis>I21.01</diagnosis>{text}"))
def test_the_released_formula_finds_what_the_plain_pattern_finds(completion: str) -> None:
    """The plain pattern backtracks, so ours is another; on short texts both must find the same."""
    inner = "((?:(?!</?{0}>).)*)"
    think = f"<think>{inner.format('think')}</think>"
    diagnosis = f"<diagnosis>{inner.format('diagnosis')}</diagnosis>"
    pattern = rf"^\s*(?:{think})?\s*{diagnosis}"
    plain = re.findall(pattern, f"<think>{completion}", re.MULTILINE | re.DOTALL)
    value = (
        -1.0 * max(0, len(plain) - 1)
        + (1 if plain and plain[0][0] else 0)
        - (0 if completion else 5)
    )
    code = plain[0][1].strip().replace(".", "") if plain else ""
    if re.fullmatch("[A-Z][0-9]{2}[A-Z0-9]{0,4}", code) and code[0] == "I":
        n = len(commonprefix([code, "I2101"]))
        value += 75 if code == "I2101" else 15 * (n / 5 + max(0, n - 2))
    else:
        value -= 1
    assert deepicd_reward([completion], ["I2101"]) == pytest.approx([value])


# ------------------------------------------------------------------------- the contract with TRL
@ALL
@given(texts=st.lists(soup, min_size=1, max_size=4))
def test_floats_within_bounds_whatever_trl_passes(reward: rewards.Reward, texts: list[str]) -> None:
    n = len(texts)
    columns = {  # the columns of the table of cases, and what GRPOTrainer adds
        "note": [NOTE] * n,
        "category": ["I21"] * n,
        "chapter": [9] * n,
        "title": ["x"] * n,
        "split": ["train"] * n,
        "hadm_id": list(range(n)),
        "prompts": [[]] * n,
        "completion_ids": [[1]] * n,
        "trainer_state": None,
        "log_extra": print,
        "log_metric": print,
    }
    plain = reward(completions=texts, code=["I21.01"] * n, **columns)
    chat = reward(
        completions=[[{"role": "assistant", "content": text}] for text in texts],
        code=["i2101 "] * n,
        **columns,
    )
    assert plain == chat
    assert all(type(value) is float for value in plain)
    if reward is not deepicd_reward:
        assert all(-1 <= value <= 1 for value in plain)


def test_a_bare_string_is_no_list_of_codes() -> None:
    for reward in (hierarchical_reward, exact_reward, prefix_reward, deepicd_reward):
        with pytest.raises(
            ValueError,
            match="`code` must be a list with one text for each of the 5 completions",
        ):
            reward([told("I21.01")] * 5, "I2101")
        for other in (["I2101", "I10"], [], None, "I"):
            with pytest.raises(ValueError, match="for each of the 1 completions"):
                reward([told("I21.01")], other)
    with pytest.raises(ValueError, match="Sepsis"):
        hierarchical_reward([told("I21.01")], ["Sepsis"])
    for gold in (None, float("nan"), 410.71, "", "Sepsis"):
        for reward in (hierarchical_reward, exact_reward, prefix_reward, deepicd_reward):
            with pytest.raises(ValueError, match="code"):
                reward([told("I21.01")], [gold])
    for note in (None, NOTE, [NOTE, NOTE], [None], [float("nan")]):
        with pytest.raises(ValueError, match="In training keep the column 'note'"):
            grounding_reward([told("I21.01")], note=note)
    for wrong in (7, None, [], {"content": "x"}):
        with pytest.raises(ValueError, match="text or messages, not"):
            format_reward([wrong])


def test_a_message_without_content_is_an_empty_completion() -> None:
    assert format_reward([[{"role": "assistant", "content": None}]]) == [0.0]


def test_a_reward_is_found_by_name_with_its_settings() -> None:
    same_chapter = rewards.example("same chapter")
    for name, function in rewards.REWARDS.items():
        assert named(name).__name__ == name, "TRL logs it under this name"
        assert named(name)(**same_chapter) == function(**same_chapter)
    changed = named({"hierarchical_reward": {"chapter_credit": 0.3, "unusable_credit": 0.0}})
    again = pickle.loads(pickle.dumps(changed))
    for reward in (changed, again):
        assert reward.__name__ == "hierarchical_reward"
        assert reward(**same_chapter, chapter=[9]) == [0.3]
        assert reward([""], ["I10"]) == [0.0]
    assert hierarchical_reward(**same_chapter) == [0.15]
    for wrong in ("total", "no_such_reward", "", "example"):
        with pytest.raises(ValueError, match=f"no reward is called {wrong}. Known: format_reward"):
            named(wrong)
    for wrong in ("chapter_credits", "code", "columns", "chapter"):  # else lost among the columns
        for name in ("hierarchical_reward", "exact_reward", "grounding_reward"):
            with pytest.raises(ValueError, match=f"{name} has no setting .'{wrong}'"):
                named({name: {wrong: 0.3}})


def test_retired_codes_count_by_a_dictionary_and_as_gold() -> None:
    assert not icd.is_valid("K5669X")
    assert hierarchical_reward([told("K56.69X")], ["K5669"]) == [-0.5]
    assert hierarchical_reward([told("K56.69X")], ["K5669"], dictionary={"K5669X"}) == [0.4]
    assert hierarchical_reward([told("K56.69X")], ["K5669X"]) == [1.0]


def test_total_is_the_weighted_sum() -> None:
    assert total([told("I21.01"), told("I21.02"), ""], ["I2101"] * 3) == pytest.approx(
        [1.1, 0.5, -0.5]
    )
    assert len(rewards.DEFAULT) == len(rewards.DEFAULT_WEIGHTS)


# ------------------------------------------------------------------------------- reward hacking
GOLD = ("I2101", "I10", "S72001A", "C7A010", "A419")


@settings(max_examples=300)
@given(soup, st.sampled_from(GOLD))
def test_nothing_earns_more_than_the_honest_right_answer(completion: str, gold: str) -> None:
    honest = total([prompts.answer("chest pain", gold)], [gold])[0]
    value = total([completion], [gold])[0]
    assert value <= honest
    if value == honest:
        parsed = prompts.parse(completion)
        assert parsed.is_well_formed
        assert parsed.code == gold


def climb(reward: rewards.Reward, gold: str, seed: int, steps: int = 400) -> tuple[float, str]:
    """Greedy search over completions: change a piece, keep what does not earn less."""
    rng = random.Random(seed)
    near = [
        gold,
        gold[:3],
        gold[:-1],
        gold + "ZZ",
        gold[0] + "00",
        gold[0] + "75.0",
        "A41.9",
        gold[:2],
    ]
    pieces = [
        *prompts.TAGS,
        *near,
        "\n",
        " ",
        "so ",
        "I10",
        "<diagnosis>" + gold[:3] + "</diagnosis>",
        "</think>\n<diagnosis>",
    ]
    best = [rng.choice(pieces) for _ in range(rng.randrange(6))]
    top = reward(["".join(best)], [gold])[0]
    for _ in range(steps):
        trial = list(best)
        for _ in range(rng.randint(1, 3)):
            at = rng.randrange(len(trial) + 1)
            trial[at : at + rng.randrange(2)] = rng.choice([[], [rng.choice(pieces)], trial[:3]])
        value = reward(["".join(trial)], [gold])[0]
        if value >= top and len(trial) < 30:
            best, top = trial, value
    return top, "".join(best)


@pytest.mark.parametrize("gold", GOLD)
def test_greedy_search_finds_no_hack(gold: str) -> None:
    honest = total([prompts.answer("chest pain", gold)], [gold])[0]
    found = [climb(total, gold, seed) for seed in range(6)]
    assert max(found)[0] <= honest
    assert max(found)[0] > 0  # the search can climb at all


def test_greedy_search_does_find_a_hack_of_the_released_reward() -> None:
    honest = deepicd_reward([prompts.answer("chest pain", "C7A010")], ["C7A010"])[0]
    value, completion = max(climb(deepicd_reward, "C7A010", seed) for seed in range(6))
    assert value > honest
    assert prompts.parse(completion).code != "C7A010"


def test_no_other_code_of_the_classification_earns_as_much() -> None:
    import simple_icd_10_cm as cm

    codes = [code for code in cm.get_all_codes(False) if icd.normalise(code) not in (None, "I2101")]
    assert len(codes) > 90_000
    assert max(total([told(code) for code in codes], ["I2101"] * len(codes))) <= 0.5 + 1e-9


@given(st.floats(0, 1), st.permutations(["I2101", "I2102", "I501", "J189", "I214"]))
def test_hedging_between_two_codes_never_pays(belief: float, codes: list[str]) -> None:
    a, b = codes[:2]

    def expected(completion: str) -> float:
        return belief * total([completion], [a])[0] + (1 - belief) * total([completion], [b])[0]

    honest = max(expected(told(a)), expected(told(b)))
    hedges = [
        told(f"{a}, {b}"),
        told(f"{a} or {b}"),
        told(a) + told(b),
        told(a[:3]),
        told(b[:3]),
        told(a[0]),
        told(""),
        "",
    ]
    assert max(map(expected, hedges)) <= honest + 1e-9


# ---------------------------------------------------------------------------------- grounding
@pytest.mark.parametrize(
    ("think", "value"),
    [
        ("crushing chest pain; sweating", 1),
        ("The patient presents with crushing chest pain. There is ST elevation on EKG.", 1),
        (
            "Findings: crushing chest pain; sweating.\n"
            "Circulatory: I21 Acute myocardial infarction.\nDetail: none.",
            1,
        ),
        ("Crushing chest pain and sweating suggest an infarction; troponin 2.4; hypertension", 1),
        ("crushing chest pain; denies fever; no cough", 1),
        ("crushing chest pain", 0.5),  # one finding alone is half of what is asked for
        ("crushing chest pain; troponin 9.9", 0.25),
        ("crushing chest pain; fever", 0.25),
        ("crushing chest pain; sweating; no hypertension", 2 / 3),
        ("leg swelling; hemoptysis; seizure", 0),
        ("This suggests I21.01, an infarction, therefore the code.", 0),
        ("fever; fever; fever. Cough", 0),
        ("crushing chest pain; crushing chest pain, crushing chest pain", 0.5),
    ],
)
def test_grounding(think: str, value: float) -> None:
    assert grounding_reward([prompts.answer(think, "I10")], note=[NOTE]) == pytest.approx([value])


def test_copying_the_note_is_worse_than_citing_it() -> None:
    few = grounding_reward([prompts.answer("crushing chest pain; sweating", "I10")], note=[NOTE])[0]
    thinks = (NOTE, NOTE + " seizure. leg swelling.")
    copied = grounding_reward([prompts.answer(think, "I10") for think in thinks], note=[NOTE] * 2)
    assert few == 1
    assert copied[0] <= 0
    assert copied[1] < copied[0]
    assert grounding_reward([prompts.answer("x y", "I10")], note=[""]) == [0.0]


@pytest.mark.parametrize(
    ("kind", "think", "value"),
    [
        ("word", "crushing chest pain; sweating", 1),
        ("empty", "The patient presents with crushing chest pain; he has sweating", 1),
        ("not", "no fever; without cough", 1),
        ("not", "fever; cough", 0),
        ("comma", "crushing chest pain, sweating", 1),
        ("comma", "no fever, no cough", 1),
        ("comma", "no fever, cough", 0.25),  # the reasoning says that there is a cough
        ("comma", "no hypertension, crushing chest pain", 0.25),
        ("contrast", "no fever but sweating", 1),
        ("contrast", "no fever but cough", 0.25),
        ("colon", "Findings: crushing chest pain; sweating", 1),
        ("colon", "seizure: crushing chest pain; sweating", 1),
        ("conclusion", "sweating, crushing chest pain suggests an infarction, seizure", 0.5),
        ("conclusion", "I21.01, seizure. Sweating. Crushing chest pain", 1),
        ("stop", "sweating. crushing chest pain", 1),
        ("stop", "no fever. cough", 0.25),
        ("stop", "no fever\n- cough", 0.25),
        ("stop", "no fever\ncough", 0.5),  # a broken line is no stop: one clause denies both
    ],
)
def test_each_kind_of_token_does_what_its_table_says(kind: str, think: str, value: float) -> None:
    assert grounding.score(think, NOTE) == pytest.approx(value)


def test_a_denied_list_in_the_note_may_be_read_either_way() -> None:
    note = "Denies fever, cough. Pulmonary: no rales but wheezing."
    assert grounding.score("no fever; no cough", note) == 1
    assert grounding.score("no fever; cough", note) == 1
    assert grounding.score("no rales; wheezing", note) == 1
    assert grounding.score("fever; rales", note) == 0


def test_the_courses_rationales_are_grounded_in_their_own_note_only() -> None:
    texts = hospital.summaries(hospital.draw(120, 3), 3)
    cases = [note for note in map(notes.admission_note, texts) if note]
    told_of = [
        prompts.answer(*traces.template_teacher(note, str(i))) for i, note in enumerate(cases)
    ]
    own = grounding_reward(told_of, note=cases)
    assert sum(own) / len(own) > 0.9
    other = grounding_reward(told_of, note=cases[1:] + cases[:1])
    assert sum(other) / len(other) < 0.1


# -------------------------------------------------------------------------------------- speed
UNITS = [
    *prompts.TAGS,
    told("I21.01") + "\n",
    "<think>\n",
    "\n",
    " ",
    "\n  ",
    "<",
    "pain, ",
    "no ",
    "a",
    "a.",
    "chest pain ",
    "\n<diagnosis>I21</diagnosis>",
]


@ALL
def test_time_is_linear_in_the_worst_case(reward: rewards.Reward) -> None:
    def seconds(unit: str, size: int, attempt: int) -> float:
        text = f"pain{attempt}</think>\n<diagnosis>" + unit * (
            size // len(unit)
        )  # another text each time: nothing is remembered
        began = time.process_time()
        reward([text], code=["I2101"], note=[text])
        return time.process_time() - began

    for unit in UNITS:
        taken = [
            min(seconds(unit, size, attempt) for attempt in range(3)) for size in (50_000, 200_000)
        ]
        assert taken[1] < 8 * taken[0] + 0.1, (
            unit
        )  # four times the text; quadratic would be sixteen
