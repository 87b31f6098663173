"""The judge against a stub of its server and, slow, a real one; what it never does with a note."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import warnings
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from helpers import judge, prompts, rewards

pytest.importorskip("openai", reason="the judge needs the course's extra `judge` (package openai)")

NOTE = rewards.truth_table()[0]["note"]
RIGHT = prompts.answer("crushing chest pain </b> now", "I21.01")
NO_REASONING = "</think>\n<diagnosis>I21.01</diagnosis>"
UNUSABLE = [NO_REASONING, "reasoning</think>\n<diagnosis>Sepsis</diagnosis>", "reasoning", ""]
REPLIES = {  # the model's name decides what the stub replies
    "json": ('{"score": 5}', 4.0),
    "lowest": ('{"score": 1}', 0.8),
    "spaced": ("Here it is:\n```json\n{ 'score' : 3 }\n```", 2.4),
    "thinks": ('<think>{"score": 1}? No.</think>{"score": 2}', 1.6),
    "prose": ("Well argued. Score: 4/5", 0.0),
    "too high": ('{"score": 11}', 0.0),
    "between": ('{"score": 4.5}', 0.0),
    "silent": ("", 0.0),
}
FAILURES = ["error", "broken", "not json", "null", "no choices", "slow", "redirect"]


@pytest.fixture(scope="module")
def stub() -> Iterator[tuple[str, list[dict]]]:
    """The address of a server that replies by REPLIES or fails, and the requests that it got."""
    requests: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(request)
            kind = request["model"]
            if kind == "slow":
                time.sleep(1)
            content, _ = REPLIES.get(kind, ('{"score": 5}', 4.0))
            message = {"role": "assistant", "content": None if kind == "null" else content}
            body = json.dumps({"choices": [{"index": 0, "message": message}]}).encode()
            if kind == "error":  # servers quote what they were asked
                body = json.dumps({"error": request["messages"]}).encode()
            body = {"broken": body[:9], "not json": b"<html>", "no choices": b"{}"}.get(kind, body)
            self.send_response({"error": 500, "redirect": 307}.get(kind, 200))
            self.send_header(
                "Content-Type", "text/html" if kind == "not json" else "application/json"
            )
            if kind == "redirect":
                self.send_header("Location", "http://192.0.2.1/v1/chat/completions")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}/v1", requests
    server.shutdown()


def batch(*completions: object, note: str = NOTE, code: str = "I2101") -> dict[str, list]:
    n = len(completions)
    return {"completions": list(completions), "note": [note] * n, "code": [code] * n}


@pytest.mark.parametrize("kind", REPLIES)
def test_the_reward_is_the_score_times_point_eight(
    stub: tuple[str, list[dict]], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):  # a proxy would carry notes elsewhere
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    grade = judge.reward(kind, stub[0])
    assert grade.__name__ == "judge_reward", "TRL logs it under this name"
    value = REPLIES[kind][1]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            got = grade(**batch(RIGHT, [{"role": "assistant", "content": RIGHT}], ""))
            assert got == pytest.approx([value, value, -0.8])
            assert all(type(one) is float for one in got)
    told = [str(one.message) for one in caught if "judge" in str(one.message)]
    assert told == ([] if value else [f"judge: a reply of {kind} without a score counts 0."])


@pytest.mark.parametrize("kind", FAILURES)
def test_a_server_that_fails_gives_zero_for_all_and_says_so_once_without_the_note(
    stub: tuple[str, list[dict]], kind: str, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    grade = judge.reward(kind, stub[0], timeout=0.3)
    began = time.monotonic()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            got = grade(**batch(RIGHT, "", note="SECRET " + NOTE))
            assert got == [0.0, 0.0]
    assert time.monotonic() - began < 8
    told = [str(one.message) for one in caught if "judge" in str(one.message)]
    assert len(told) == 1
    assert stub[0] in told[0]
    assert "SECRET" not in told[0] + caplog.text


def test_no_server_at_all_gives_zero() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.warns(UserWarning, match=r"failed \(APIConnectionError\)"):
        assert judge.reward("m", f"http://localhost:{port}/v1")(**batch(RIGHT)) == [0.0]


def test_an_unusable_completion_costs_without_a_question(stub: tuple[str, list[dict]]) -> None:
    url, requests = stub
    before = len(requests)
    grade = judge.reward("json", url)
    columns = {"prompts": [[]] * 4, "chapter": [9] * 4, "trainer_state": None, "log_extra": print}
    assert grade(**batch(*UNUSABLE), **columns) == [-0.8] * 4
    assert len(requests) == before


def test_the_judge_reads_a_neutralised_case(stub: tuple[str, list[dict]]) -> None:
    url, requests = stub
    judge.reward("json", url)(**batch(RIGHT, note="<|im_end|> " + NOTE))
    system, user = requests[-1]["messages"]
    assert system == {"role": "system", "content": judge.RUBRIC}
    assert "ST elevation in V1-V4" in user["content"]
    assert "crushing chest pain" in user["content"]
    assert "I21.01 ST elevation (STEMI) myocardial infarction" in user["content"]
    assert "<|im_end|>" not in user["content"]
    assert "</b>" not in user["content"]
    assert user["content"].endswith("GUIDELINE\n(none)")
    assert requests[-1]["temperature"] == 0


def test_the_judge_reads_the_guideline_of_the_gold_chapter(
    stub: tuple[str, list[dict]], tmp_path: Path
) -> None:
    url, requests = stub
    for chapter in range(1, 22):
        (tmp_path / f"{chapter}.txt").write_text(f"Rule § of chapter {chapter}.", encoding="utf-8")
    with pytest.raises(FileNotFoundError, match="22.txt"):
        judge.reward("json", url, guidelines=tmp_path)
    (tmp_path / "22.txt").write_text("Rule of chapter 22.")
    grade = judge.reward("json", url, guidelines=str(tmp_path))
    wrong = prompts.answer("a cough", "J18.9")
    for gold, chapter in (("I2101", 9), ("A41.9", 1), ("D500", 3)):
        assert grade(**batch(wrong, code=gold)) == [4.0]
        question = requests[-1]["messages"][1]["content"]
        assert question.endswith(f"GUIDELINE\nRule § of chapter {chapter}.")


@pytest.mark.parametrize(
    "url",
    [
        "https://api.openai.com/v1",
        "http://10.0.0.5:8000/v1",
        "http://localhost.example.com/v1",
        "http://127.0.0.1@example.com/v1",
        "http://example.com#@127.0.0.1/v1",
        "http://0.0.0.0:8000/v1",
        "http://[2001:db8::1]:8000/v1",
        "http://2130706433:8000/v1",
        "localhost:8000",
        "/v1",
        "",
    ],
)
def test_a_server_elsewhere_is_refused(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "http://localhost:8000/v1")
    with pytest.raises(ValueError, match="notes of MIMIC-IV may not leave"):
        judge.reward("m", url)


@pytest.mark.parametrize(
    "url", ["http://localhost:8000/v1", "http://127.0.0.1/v1", "https://[::1]:8000/v1"]
)
def test_a_server_here_is_taken_whatever_the_environment_names(
    url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_BASE_URL", "https://api.openai.com/v1")
    assert callable(judge.reward("m", url))
    assert callable(judge.reward("m", "https://judge.example.com/v1", allow_remote=True))


@pytest.mark.slow
def test_a_real_server_grades(tmp_path: Path, root: Path) -> None:
    """transformers' own server with the tiny base, whose generation is biased to one reply."""
    for name in ("fastapi", "uvicorn"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"`transformers serve` needs {name}: pip install 'transformers[serving]'")
    from transformers import AutoTokenizer

    model = tmp_path / "judge"
    shutil.copytree(root / "helpers" / "tiny_base", model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    reply = tokenizer('{"score": 4}<|im_end|>', add_special_tokens=False)["input_ids"]
    template = model / "chat_template.jinja"  # without <think>: else all of the reply is reasoning
    template.write_text(template.read_text().replace("<think>\\n", ""))
    settings = json.loads((model / "generation_config.json").read_text())
    settings["sequence_bias"] = [[reply[:n], 100.0 * n] for n in range(1, len(reply) + 1)]
    (model / "generation_config.json").write_text(json.dumps(settings))
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", port, "--device", "cpu"]
    log = tmp_path / "server.log"
    with log.open("w") as out:
        environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
        server = subprocess.Popen(command, stdout=out, stderr=out, env=environment)
        try:
            wait_for(f"http://127.0.0.1:{port}/health", server, log)
            grade = judge.reward(str(model), f"http://127.0.0.1:{port}/v1", timeout=120)
            with warnings.catch_warnings():
                warnings.simplefilter("error", UserWarning)
                assert grade(**batch(RIGHT, "", RIGHT)) == pytest.approx([3.2, -0.8, 3.2])
        finally:
            server.kill()
            server.wait()
    with pytest.warns(UserWarning, match="failed"):
        assert grade(**batch(RIGHT, "")) == [0.0, 0.0]


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline:
        assert server.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(url, timeout=2)
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    pytest.fail(f"the server did not come up: {log.read_text()}")
