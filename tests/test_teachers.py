"""The teachers that are models: who is refused, what an oracle must not say, resuming, and where a note may go."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest

from helpers import inference, profiles, prompts, teachers, traces
from helpers.machinery import servers

NOTE = (
    "CC: chest pain\nHPI: 61 yo M with crushing chest pressure for 2 hours. BP 150/90. "
    "MEDS: lisinopril 10 mg. PMH: syncope and collapse in 2019."
)
CODES = ["I2101", "J189", "A419"]
TINY = profiles.get("tiny")


@pytest.fixture
def cases() -> pd.DataFrame:
    return pd.DataFrame(
        {
            "subject_id": [1, 2, 3],
            "hadm_id": [11, 12, 13],
            "note": [NOTE, NOTE.replace("61", "62"), NOTE.replace("61", "63")],
            "code": CODES,
        }
    )


# ------------------------------------------------------------------------------- the template refuses


def test_the_template_refuses_what_the_hospital_did_not_write_and_names_the_choices(
    places: Path, cases: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = places / "mimic-iv"
    (own / "truth").mkdir(parents=True)  # a folder of that name alone proves nothing
    monkeypatch.setenv("ICD_DATA_DIR", str(own))
    with pytest.raises(ValueError, match="mimic-iv is not of its writing") as refusal:
        teachers.write(cases, "template", TINY, places)
    for choice in ("unsupervised", "oracle", "server", "ICD_TEACHER", "notebook 2"):
        assert choice in str(refusal.value)
    (own / "truth" / "manifest.json").write_text("{}")
    made = teachers.write(cases, "template", TINY, places)
    pd.testing.assert_frame_equal(made, traces.from_template(cases))


def test_an_unknown_teacher_lists_the_known(places: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="no teacher 'gpt'.*oracle"):
        teachers.check_teacher("gpt")
    monkeypatch.setenv("ICD_TEACHER", "gpt")
    with pytest.raises(ValueError, match="teacher = 'gpt'.*must be one of template"):
        profiles.current()
    monkeypatch.setenv("ICD_TEACHER", "oracle")
    assert profiles.current() == TINY.replace(teacher="oracle")


@pytest.mark.parametrize("name", ["t4", "gpu24", "paper"])
def test_a_gpu_profile_has_a_real_teacher_and_its_traces_depend_on_its_base(name: str) -> None:
    profile = profiles.get(name)
    assert profile.teacher == "unsupervised"
    assert profile.record("traces") != profile.replace(base="other/model").record("traces")
    assert TINY.record("traces") == TINY.replace(base="other/model").record("traces")


# ------------------------------------------------------------------------------------- what is checked


@pytest.mark.parametrize(
    ("think", "fault"),
    [
        ('"Crushing chest  pressure" for 2 hours points to the heart.', None),
        ("“crushing … pressure” and BP 150/90, on lisinopril.", None),
        ("1. The pain is typical.\n2) So is the age of 61.", None),
        ("A typical story, told in other words.", None),
        ('"crushing back pain" is typical.', "crushing back pain"),
        ('"crushing ... pain in the back"', "pain in the back"),
        ("Pain for 3 hours.", "'3'"),
        ("A pressure of 150/95.", "'95'"),
        ("He takes metoprolol.", "metoprolol"),
        ("Already on Warfarin.", "warfarin"),
        ("I21.01, seen in V4 of COVID-19 wards", None),
    ],
)
def test_free_text_may_state_only_what_the_note_states(think: str, fault: str | None) -> None:
    why = traces.check_trace(think, "I21.01", NOTE)
    assert (why is None) if fault is None else (fault in why and "does not say" in why)


def test_a_code_that_only_mimic_knows_is_kept() -> None:
    assert "no valid code" in traces.check_trace("A reason.", "I21.99", NOTE)
    assert traces.check_trace("A reason.", "I21.99", NOTE, {"I2199"}) is None


@pytest.mark.parametrize(
    ("think", "code", "word"),
    [
        ("So it is I21.01.", "I2101", "code"),
        ("So it is i2101", "I2101", "code"),
        ("A case of I21.", "I2101", "code"),
        ("The given code fits.", "I2101", "code"),
        ("As coded, it fits.", "I2101", "code"),
        ("It is Pneumonia,\nunspecified organism.", "J189", "title"),
        ("A syncope and collapse, as before.", "R55", None),  # the note says so itself
        ("The pressure points to the heart.", "I2101", None),
        ("Unlike J18.9 it has no cough.", "I2101", None),
        ("The pressure points to the", "I2101", "cut off"),
    ],
)
def test_how_an_oracle_betrays_what_it_was_told(think: str, code: str, word: str | None) -> None:
    fault = teachers.betrayal(think, code, NOTE)
    assert fault is None if word is None else word in fault


# ------------------------------------------------------------------------------- a model on this machine


@pytest.fixture
def replies(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the model generates, whatever it is asked; what it was asked is put in front of the list."""
    texts: list[str] = []

    def generate(model, tokenizer, batch, trie, options):
        asked.extend(batch["prompt"])
        return [texts[0]] * len(batch)

    asked: list[str] = []
    monkeypatch.setattr(inference, "_generate", generate)
    texts.append("")
    texts.append(asked)
    return texts


def test_an_unsupervised_teacher_never_sees_the_code(
    places: Path, cases: pd.DataFrame, replies: list
) -> None:
    replies[0] = '"chest pain" for 2 hours.</think>\n<diagnosis>I20.9</diagnosis>'
    made = teachers.write(cases, "unsupervised", TINY, places)
    assert made["kept"].all() and set(made["code"]) == {"I209"}
    assert not any("I21.01" in text or "STEMI" in text for text in replies[1])
    assert all("<|im_start|>" in text and "double quotes" in text for text in replies[1])


def test_an_oracle_is_told_the_code_which_is_hidden_and_appended(
    places: Path, cases: pd.DataFrame, replies: list
) -> None:
    replies[0] = '"chest pain" for 2 hours points to it.</think> <diagnosis>Z00.0</diagnosis>'
    made = teachers.write(cases, "oracle", TINY, places)
    assert made["kept"].all() and made["code"].tolist() == CODES
    assert any("I21.01 ST elevation" in text for text in replies[1])
    for row in made.itertuples():
        assert prompts.parse(prompts.answer(row.think, row.code)).code == row.code
        assert "I21" not in row.think and "Z00" not in row.think
    replies[0] = "It is I21.01, said the first line.</think>"
    made = teachers.write(cases, "oracle", TINY, places / "again")
    assert made["kept"].tolist() == [False, True, True]
    assert made["why"][0] == "names the code that it was told, or speaks of one"


def test_an_interrupted_teacher_goes_on_where_it_stopped(
    places: Path, cases: pd.DataFrame, replies: list, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(profiles.Profile, "batch_size", lambda self, samples=1: 1)
    replies[0] = "A reason.</think>\n<diagnosis>I20.9</diagnosis>"
    real = inference._generate
    calls = []

    def stops(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(1)
        return real(*arguments)

    monkeypatch.setattr(inference, "_generate", stops)
    with pytest.raises(KeyboardInterrupt):
        teachers.write(cases, "unsupervised", TINY, places / "work")
    monkeypatch.setattr(inference, "_generate", real)
    replies[1].clear()
    made = teachers.write(cases, "unsupervised", TINY, places / "work")
    assert len(replies[1]) == 1 and len(made) == 3 and made["kept"].all()


def test_the_shipped_model_can_be_asked_and_what_it_writes_is_judged(
    places: Path, cases: pd.DataFrame
) -> None:
    for teacher in ("unsupervised", "oracle"):
        made = teachers.write(cases.head(1), teacher, TINY, places / teacher)
        assert list(made.columns) == list(traces.COLUMNS) and made["hadm_id"].tolist() == [11]
        assert made["kept"][0] or made["why"][0]


# ------------------------------------------------------------------------------------- behind a server


@pytest.fixture
def server() -> Iterator[tuple[str, list[dict], dict]]:
    """The address of a server with the OpenAI API, the requests it got, and what it does."""
    requests: list[dict] = []
    does: dict = {"fails_after": 10**6}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send({"object": "list", "data": [{"id": "served", "object": "model"}]})

        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request)
            text = "<think>\nThe pressure is typical.</think>\n<diagnosis>I20.9</diagnosis>"
            message = {"role": "assistant", "content": text}
            is_up = len(requests) <= does["fails_after"]
            body = {"choices": [{"index": 0, "message": message}]}
            self.send(body if is_up else {"error": request["messages"]}, 200 if is_up else 500)

        def send(self, content: dict, status: int = 200) -> None:
            body = json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    stub = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=stub.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{stub.server_port}/v1", requests, does
    stub.shutdown()


def test_a_local_server_writes_traces_and_goes_on_where_it_failed(
    places: Path, cases: pd.DataFrame, server: tuple
) -> None:
    pytest.importorskip("openai", reason="needs the course's extra `judge`")
    url, requests, does = server
    does["fails_after"] = 1
    with pytest.raises(RuntimeError, match=r"failed \(InternalServerError\).*is kept") as failure:
        teachers.write(cases, "server", TINY, places / "work", url=url)
    assert "chest" not in str(failure.value) and failure.value.__suppress_context__
    done = len([*(places / "work").glob("*.json")])
    assert done == 1
    does["fails_after"] = 10**6
    before = len(requests)
    made = teachers.write(cases, "server", TINY, places / "work", url=url)
    assert len(requests) - before == len(cases) - done
    assert made["kept"].all() and set(made["code"]) == {"I209"}
    assert requests[-1]["model"] == "served" and requests[-1]["temperature"] == 0.7
    assert not any("I21.01" in json.dumps(request) for request in requests)
    told = teachers.write(cases, "server-oracle", TINY, places / "told", url=url, model="mine")
    assert told["code"].tolist() == CODES and requests[-1]["model"] == "mine"
    assert any("I21.01 ST elevation" in json.dumps(request) for request in requests)


@pytest.mark.parametrize(
    ("url", "is_here"),
    [
        ("http://localhost:8000/v1", True),
        ("http://LOCALHOST/v1", True),
        ("http://127.0.0.1:8000/v1", True),
        ("http://user:secret@127.0.0.1:8000/v1", True),
        ("https://[::1]:8000/v1", True),
        ("http://0.0.0.0:8000/v1", False),
        ("http://10.0.0.5:8000/v1", False),
        ("http://192.168.1.2/v1", False),
        ("http://169.254.169.254/v1", False),
        ("http://localhost.evil.org/v1", False),
        ("http://localhost.:8000/v1", False),
        ("http://127.0.0.1.evil.org/v1", False),
        ("http://localhost@evil.org/v1", False),
        ("http://127.0.0.1:8000@evil.org/v1", False),
        ("http://evil.org#@127.0.0.1/v1", False),
        ("http://evil.org?@localhost/v1", False),
        ("http://2130706433/v1", False),
        ("http://[::ffff:10.0.0.5]/v1", False),
        ("unix:///run/model.sock", False),
        ("http+unix://%2Frun%2Fmodel.sock/v1", False),
        ("/run/model.sock", False),
        ("127.0.0.1:8000", False),
        ("", False),
    ],
)
def test_a_note_goes_to_this_machine_or_where_the_reader_allows(
    url: str, is_here: bool, places: Path, cases: pd.DataFrame, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("openai", reason="needs the course's extra `judge`")
    asked = []
    monkeypatch.setattr(teachers, "_from_server", lambda *given: asked.append(1) or [""] * 3)
    if is_here:
        teachers.write(cases, "server", TINY, places, url=url)
        assert asked
        return
    with pytest.raises(ValueError, match="notes of MIMIC-IV may not leave"):
        teachers.write(cases, "server", TINY, places, url=url)
    assert not asked
    if url.startswith("http:"):
        assert servers.client(url, allow_remote=True, timeout=1)
