"""The server: what it answers, and to whom it does not."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from nano_moe.errors import UserError
from nano_moe.explorer import desk as desks
from nano_moe.explorer.opened import GENERATED, TEXT, find
from nano_moe.explorer.server import BODY, HOST, PORT, bind

HILL = "<b>hill"
ROUTED, LIFTED, TIGHT, HASHED, CHOOSING, DENSE = range(6)
QUESTION = {"prompt": "wave", "tokens": 5, "temperature": 0.9, "top_p": 0.95, "seed": 4}


def documents(page: bytes) -> dict:
    return json.loads(re.search(rb'id="documents">(.*?)</script', page, re.DOTALL)[1])


def test_the_page_opens_with_all_runs_and_asks_nobody_else(served):
    status, headers, page = served.send("GET", "/")
    assert status == 200 and headers["content-type"].startswith("text/html")
    overview = documents(page)["overview"]
    assert overview["live"] is True
    assert overview["command"].startswith('make explore RUNS="routed lifted')
    cards = {card["name"]: card for card in overview["runs"]}
    routed = cards["routed"]
    assert (routed["layers"], routed["n_experts"], routed["n_shared"]) == ([1, 2], 4, 1)
    assert (routed["step"], routed["ce"]) == (6, 5.25)
    assert cards["dense"]["layers"] == [] and not cards["choosing"]["causal"]
    assert cards["tight"]["capacity_factor"] == 0.75
    for name in ("x-content-type-options", "referrer-policy", "cross-origin-resource-policy"):
        assert name in headers
    assert not any("allow-origin" in name.lower() for name in headers)


def test_documents_are_those_of_the_run(served, here):
    one = find("routed")
    assert served.get(f"runs/{ROUTED}/compute") == one.compute()
    assert served.get(f"runs/{ROUTED}/balance") == one.balance()
    held = [{"number": 0, "name": "sea"}, {"number": 1, "name": HILL}]
    assert served.get(f"runs/{ROUTED}/passages") == {"domains": held, "each": 50}
    assert served.get(f"runs/{ROUTED}/passages/1/3") == one.passage(1, 3)
    assert served.get(f"runs/{ROUTED}/specialization")["domains"] == ["sea", HILL]


def test_where_there_is_none_the_fault_stands_in_its_place(served):
    assert "dense run" in served.get(f"runs/{DENSE}/balance")["error"]
    assert "sees the future" in served.get(f"runs/{CHOOSING}/specialization")["error"]
    assert "choose another" in served.get(f"runs/{ROUTED}/passages/0/777")["error"]


def test_typed_text_is_routed(served, here):
    text = "<b>näh</b> \ud83e\udd8a \u202e"
    status, body = served.post(f"runs/{LIFTED}/route", {"text": text})
    assert status == 200
    assert json.loads(body) == json.loads(json.dumps(find("lifted").route(text)))


def test_half_a_character_is_refused_in_one_line(served):
    status, body = served.post(f"runs/{ROUTED}/route", {"text": "a\ud83e b"})
    assert status == 422
    assert len(json.loads(body)["error"].splitlines()) == 1


def test_generating_streams_the_prompt_and_then_each_token(served, here):
    status, body = served.post(f"runs/{ROUTED}/generate", QUESTION)
    assert status == 200
    prompt, *steps = map(json.loads, body.decode().splitlines())
    one, settings = find("routed"), {k: v for k, v in QUESTION.items() if k != "prompt"}
    assert prompt["prompt"] == one.route("wave")
    expected = list(one.generate("wave", settings))
    for step in (*steps, *expected):
        step.pop("seconds")
    assert steps == expected and len(steps) == 5


def test_what_sees_the_future_is_not_sampled(served):
    status, body = served.post(f"runs/{CHOOSING}/generate", QUESTION)
    assert status == 422
    assert "sees the future" in json.loads(body)["error"]


def test_a_generation_given_up_leaves_the_server_at_work(served):
    with socket.create_connection((HOST, served.port)) as connection:
        body = json.dumps({**QUESTION, "tokens": 500}).encode()
        connection.sendall(
            f"POST /api/runs/0/generate HTTP/1.1\r\nHost: 127.0.0.1:{served.port}\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    assert served.post(f"runs/{ROUTED}/route", {"text": "still here"})[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "localhost", "127.0.0.1:1", "127.0.0.1.evil:80", ""]
)
def test_other_hosts_are_refused(served, host):
    for method, path in (("GET", "/"), ("GET", "/api/runs/0/compute"), ("GET", "/nowhere")):
        status, _, body = served.send(method, path, host=host)
        assert status in (400, 403) and b"overview" not in body and b"total" not in body


def test_it_answers_to_localhost_too(served):
    assert served.send("GET", "/", host=f"localhost:{served.port}")[0] == 200


def test_pages_of_other_sites_are_refused(served):
    for origin in ("http://evil.example", "null", "http://127.0.0.1:1", f"https://{HOST}"):
        assert served.post("runs/0/route", {"text": "a"}, origin=origin)[0] == 403
    own = f"http://127.0.0.1:{served.port}"
    assert served.post("runs/0/route", {"text": "a"}, origin=own)[0] == 200
    form = served.post("runs/0/route", {"text": "a"}, content_type="text/plain")
    assert form[0] == 415


@pytest.mark.parametrize(
    "path",
    [
        "/api/overview",
        "/api/runs/6/compute",
        "/api/runs/-1/compute",
        "/api/runs/0/compute/",
        "/api/runs/0/recipe.yaml",
        "/api/runs/../compute",
        "/api/runs/..%2f..%2f..%2fetc%2fpasswd",
        "/api/../../../../etc/passwd",
        "/api/runs/0/passages/0",
        "/api/runs/0/passages/0/0/0",
        "/api/runs/routed/compute",
        "/../checkpoints/routed/recipe.yaml",
        "/checkpoints/routed/recipe.yaml",
        "/docs",
    ],
)
def test_there_is_nothing_else(served, path):
    status, _, body = served.send("GET", path)
    assert status == 404
    assert json.loads(body).keys() == {"error"}


@pytest.mark.parametrize(
    ("key", "question", "status"),
    [
        ("route", {"text": "x" * (TEXT + 1)}, 422),
        ("route", {"text": 3}, 422),
        ("route", {"text": "a", "more": 1}, 422),
        ("route", ["a"], 422),
        ("route", {"text": "x" * BODY}, 413),
        ("generate", {**QUESTION, "tokens": GENERATED + 1}, 422),
        ("generate", {**QUESTION, "tokens": 0}, 422),
        ("generate", {**QUESTION, "temperature": -1}, 422),
        ("generate", {**QUESTION, "top_p": 0}, 422),
        ("generate", {**QUESTION, "seed": "x"}, 422),
        ("generate", {}, 422),
    ],
)
def test_questions_are_bounded(served, key, question, status):
    found, body = served.post(f"runs/0/{key}", question)
    assert found == status
    if status == 422:
        assert len(json.loads(body)["error"].splitlines()) == 1
    assert served.post("runs/9/route", {"text": "a"})[0] == 404


def test_a_long_text_with_every_character_escaped_fits(served):
    assert served.post("runs/0/route", {"text": "\U0001f98a" * (TEXT // 2)})[0] == 200
    assert served.post("runs/0/route", {"text": "\0" * TEXT})[0] == 200


def test_a_document_that_many_ask_for_is_made_once(here, serve, monkeypatch):
    one, made = find("routed"), []
    original = type(one).specialization
    monkeypatch.setattr(type(one), "specialization", lambda self: made.append(1) or original(self))
    with serve([one]) as running:
        found = []
        askers = [
            threading.Thread(target=lambda: found.append(running.get("runs/0/specialization")))
            for _ in range(4)
        ]
        for asker in askers:
            asker.start()
        for asker in askers:
            asker.join()
        assert len(found) == 4 and all(one == found[0] for one in found)
    assert made == [1]


def test_a_text_is_routed_between_two_parts_of_longer_work(here, serve, monkeypatch):
    one, order = find("routed"), []

    def slow(self):
        for i in range(20):
            order.append(i)
            time.sleep(0.05)
            yield
        return {"done": True}

    monkeypatch.setattr(type(one), "specialization", slow)
    with serve([one]) as running:
        one.warm_up()
        asker = threading.Thread(target=lambda: running.get("runs/0/specialization"))
        asker.start()
        while not order:
            time.sleep(0.01)
        assert running.post("runs/0/route", {"text": "meanwhile"})[0] == 200
        assert order[-1] < 19
        asker.join()
    assert order[-1] == 19


def test_a_fault_is_not_kept(here, serve, monkeypatch):
    one = find("routed")
    original = type(one).balance

    def faulty(self):
        monkeypatch.setattr(type(one), "balance", original)
        raise UserError("not yet")

    monkeypatch.setattr(type(one), "balance", faulty)
    with serve([one]) as running:
        assert running.get("runs/0/balance") == {"error": "not yet"}
        assert running.get("runs/0/balance")["steps"] == [2, 4, 6]


def test_a_port_that_is_taken_is_a_fault_only_where_it_was_asked_for():
    with bind(0) as first:
        taken = first.getsockname()[1]
        with pytest.raises(UserError, match=f"--port {taken}: taken"):
            bind(taken)
        with bind(None) as free, bind(None) as other:
            ports = {one.getsockname()[1] for one in (first, free, other)}
            assert len(ports) == 3
            assert {one.getsockname()[0] for one in (free, other)} == {HOST}
    assert PORT > 1023


def test_a_worker_that_is_stuck_does_not_hold_up_the_end(monkeypatch):
    monkeypatch.setattr(desks, "PATIENCE", 0.1)
    desk, started, release = desks.Desk([]), threading.Event(), threading.Event()
    desk.later(lambda: (started.set(), release.wait(8)))
    assert started.wait(30)
    begun = time.monotonic()
    desk.close()
    assert time.monotonic() - begun < 5
    release.set()


def test_an_unforeseen_fault_is_one_line_to_the_page(here, serve, monkeypatch):
    one = find("routed")
    monkeypatch.setattr(type(one), "compute", lambda self: {}["nothing"])
    with serve([one]) as running:
        status, _, body = running.send("GET", "/api/runs/0/compute")
        assert status == 500 and "KeyError: 'nothing'; not foreseen" in json.loads(body)["error"]
        assert running.send("GET", "/api/runs/0/passages")[0] == 200


def test_ctrl_c_ends_it_cleanly_whatever_is_under_way(here):
    process = subprocess.Popen(
        [sys.executable, "-m", "nano_moe", "explore", "routed", "--no-browser"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    try:
        port = int(re.search(r"http://127\.0\.0\.1:(\d+)/", process.stdout.readline())[1])
        body = json.dumps({**QUESTION, "tokens": 500})
        with socket.create_connection((HOST, port), timeout=120) as connection:
            connection.sendall(
                f"POST /api/runs/0/generate HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
                f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
                f"{body}".encode()
            )
            assert connection.recv(100).startswith(b"HTTP/1.1 200")
            process.send_signal(signal.SIGINT)
            process.wait(60)
            left = b"".join(iter(lambda: connection.recv(65536), b""))
        _, err = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 0, err
    assert err == "" and b"the explorer has ended" in left
