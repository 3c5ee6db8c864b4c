"""Who may read, what a browser is told, and the stream of events, over a real socket."""

import asyncio
import json
import stat
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from fastapi.testclient import TestClient

from services.dashboard.app import Runs, create_app
from services.dashboard.cache import place_of, sweep
from services.dashboard.layout import RunFiles
from services.dashboard.serve import is_loopback, serve
from services.dashboard.watch import BACKLOG, KEPT, Message, Watched, Watcher
from services.errors import UserError
from tests.dashboard.conftest import Server, start_server, stop_server
from tests.dashboard.scene import SAMPLES, Scene, rows_of, write_rows


def ask(server: Server, path: str, **more: Any) -> httpx.Response:
    return httpx.get(server.origin + path, headers={**server.headers, **more.pop("headers", {})}, timeout=30, **more)


TOKEN = "t" * 16


@contextmanager
def within(scene: Scene, cache: Path) -> Generator[Callable[..., Any]]:
    """What the app answers about one run (path, **parameters), in this process; its index is up to date."""
    runs = Runs(scene.run.path, cache)
    headers = {"authorization": f"Bearer {TOKEN}"}
    client = TestClient(create_app(runs, token=TOKEN, hosts=["testserver"]), headers=headers)

    def answer(path: str, **more: Any) -> Any:
        return client.get(f"/api/{path}", params={"run": scene.run.path.name, **more}).json()

    try:
        deadline = time.monotonic() + 30
        while not answer("run")["progress"].get("done") and time.monotonic() < deadline:
            time.sleep(0.05)
        yield answer
    finally:
        runs.close()


@pytest.mark.parametrize("token", [None, "wrong", "x" * 4000, "ä"])
def test_nothing_of_a_run_is_told_without_the_token(server: Server, token: str | None) -> None:
    headers = {} if token is None else {"authorization": f"Bearer {token}".encode()}
    for path in ("runs", "run?run=done", "stream?run=done", "samples?run=done", "map?run=done&sample=0", "nothing"):
        answer = httpx.get(f"{server.origin}/api/{path}", headers=headers)
        assert answer.status_code == 401, path
        assert "done" not in answer.text
    assert httpx.get(f"{server.origin}/api/runs?token={server.token}").status_code == 401, "never in an address"
    basic = {"authorization": f"Basic {server.token}"}
    assert httpx.get(f"{server.origin}/api/runs", headers=basic).status_code == 401


def test_a_foreign_host_reads_nothing(server: Server) -> None:
    for host in ("attacker.example", "attacker.example:80", "127.0.0.1.attacker.example", ""):
        answer = ask(server, "/api/runs", headers={"host": host})
        assert answer.status_code in (400, 421), host
        assert "done" not in answer.text
        assert ask(server, "/", headers={"host": host}).status_code in (400, 421)
    assert ask(server, "/api/runs", headers={"host": "localhost:1234"}).status_code == 200


def test_what_a_browser_is_told(server: Server) -> None:
    for path in ("/", "/page/main.js", "/api/runs", "/api/none", "/page/none.js"):
        headers = ask(server, path).headers
        policy = headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "script-src 'self';" in policy
        assert "unsafe" not in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"
        assert "access-control-allow-origin" not in headers
    assert ask(server, "/api/runs").headers["cache-control"] == "no-store"
    assert "set-cookie" not in ask(server, "/").headers


def test_it_only_reads_and_no_name_is_a_path(server: Server) -> None:
    for method in ("POST", "PUT", "DELETE", "PATCH"):
        assert httpx.request(method, f"{server.origin}/api/runs", headers=server.headers).status_code == 405
    for name in ("../done", "/etc", "done/..", "done\x00"):
        assert ask(server, "/api/run", params={"run": name}).status_code == 404
    assert ask(server, "/page/../app.py").status_code == 404
    assert ask(server, "/page/%2e%2e/app.py").status_code == 404
    assert ask(server, "/api/samples", params={"run": "done", "limit": 10_000}).status_code == 422
    assert ask(server, "/api/map", params={"run": "done", "sample": "0:00000000:3"}).status_code == 404


HUGE = (2**63, 10**300)
"""More than SQLite's integers hold; more than a file's name may have digits."""


@pytest.mark.parametrize(
    "path",
    [
        "samples?step_from=",
        "curves?name=reward/mean&high=",
        "group?group=0:x&step=",
        "bad_batch?step=",
        "sample?sample=x&step=",
        "map?sample=x&low=",
        "histogram?low=",
    ],
)
def test_numbers_that_nothing_holds_are_refused_by_name(server: Server, path: str) -> None:
    field = path.rpartition("=")[0].rpartition("&")[2].rpartition("?")[2]
    for number in HUGE:
        answer = ask(server, f"/api/{path}{number}&run=done")
        assert answer.status_code == 422
        assert field in answer.text
    assert ask(server, f"/api/{path}{2**63 - 1}&run=done").status_code in (200, 404)


STRANGE = ("a\0b", b"\xed\xa0\xbda", '"' * 500, '"a' * 250, "a " * 250, "*", "NEAR(", "½ ٣")
"""What a text parameter may hold: the second is half a sign."""


@pytest.mark.parametrize(
    "path",
    [
        *(f"samples?{field}=" for field in ("text", "group", "flag", "code", "finish", "failed", "low=0&source")),
        "curves?name=",
        "events?level=",
        "group?step=0&group=",
        "histogram?source=",
        "map?sample=",
        "sample?sample=",
        "verdicts?source=",
    ],
)
def test_any_text_can_be_asked_for(server: Server, path: str) -> None:
    for text in STRANGE:
        answer = ask(server, f"/api/{path}{quote(text)}&run=done")
        assert answer.status_code in (200, 404), (text, answer.text)
    if path == "samples?text=":
        assert ask(server, f"/api/{path}France%00Par&run=done").json()["total"] > 0, "a space, to the search"


def test_a_tokenizer_that_cannot_be_read_leaves_ids_and_says_why(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "live")
    scene.step()
    scene.run.policy.mkdir()
    (scene.run.policy / "tokenizer.json").write_text("{")
    with within(scene, tmp_path / "cache") as answer:
        summary = answer("run")
        assert "policy/tokenizer.json cannot be read: " in summary["tokenizer"]
        sample = answer("sample", sample="0:00000000:0")
        assert sample["pieces"] is None
        assert sample["no_tokenizer"] == summary["tokenizer"]
        assert len(sample["response_ids"]) > 0


@pytest.mark.parametrize(("sizes", "shown"), [((0, 0, 0, 0), 4), ((10, 10, 10, 10), 3), ((33, 0, 0, 0), 1)])
def test_as_many_long_samples_are_shown_as_memory_allows_and_the_others_are_counted(
    tmp_path: Path, sizes: tuple[int, ...], shown: int
) -> None:
    scene = Scene(tmp_path / "live")
    scene.step()
    scene.run.write_bad_batch(0, [scene.group(0, None, None)], "no variance")
    kept, bad = scene.run.samples / "step_000000.jsonl", scene.run.path / "bad_batches" / "step_000000.jsonl"
    for file, heads in ((kept, 0), (bad, 1)):
        rows = rows_of(file)
        long = [{**row, "long": "x" * size * 2**20} for row, size in zip(rows[heads:], sizes, strict=True)]
        write_rows(file, [*rows[:heads], *long])
    with within(scene, tmp_path / "cache") as answer:
        for found in (answer("group", group="0:00000000", step=0), answer("bad_batch", step=0)):
            assert [sample["sample_id"][-1] for sample in found["samples"]] == list("0123"[:shown])
            assert found["more"] == SAMPLES - shown


def test_a_batch_that_was_not_trained_on_is_shown_and_a_large_one_says_how_much_more_it_has(
    server: Server, tmp_path: Path
) -> None:
    kept = ask(server, "/api/bad_batch", params={"run": "done", "step": 7}).json()
    assert (len(kept["samples"]), kept["more"]) == (8, 0)
    assert ask(server, "/api/bad_batch", params={"run": "done", "step": 8}).status_code == 404
    scene = Scene(tmp_path / "live")
    scene.step()
    scene.run.write_bad_batch(3, [scene.group(n, None, None) for n in range(53)], "no variance")
    large = start_server(tmp_path / "live", tmp_path / "cache")
    try:
        found = ask(large, "/api/bad_batch", params={"run": "live", "step": 3}).json()
        assert found["why"] == "no variance"
        assert (len(found["samples"]), found["more"]) == (200, 12)
        assert [row["step"] for row in ask(large, "/api/bad_batches", params={"run": "live"}).json()["batches"]] == [3]
    finally:
        stop_server(large)


def test_others_are_let_in_only_where_that_was_said(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--expose"):
        serve(finished, host="0.0.0.0")  # noqa: S104 - that is what is refused
    monkeypatch.setenv("ATTUNE_DASHBOARD_TOKEN", "short")
    with pytest.raises(UserError, match="at least 16"):
        serve(finished)
    assert all(is_loopback(host) for host in ("127.0.0.1", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "10.0.0.1", "::", "a.example"))  # noqa: S104


def read_stream(server: Server, wanted: int, last: str | None = None, run: str = "live") -> list[tuple[str, str, Any]]:
    """(id, kind, data) of the first `wanted` events that are no status or progress."""
    headers = server.headers | ({} if last is None else {"last-event-id": last})
    found: list[tuple[str, str, Any]] = []
    with httpx.stream("GET", f"{server.origin}/api/stream?run={run}", headers=headers, timeout=20) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        fields: dict[str, str] = {}
        for line in answer.iter_lines():
            if line:
                name, _, value = line.partition(": ")
                fields[name] = value
                continue
            if fields.get("event") not in (None, "status", "progress"):
                found.append((fields.get("id", ""), fields["event"], json.loads(fields["data"])))
            fields = {}
            if len(found) >= wanted:
                return found
    return found


def test_a_page_that_lost_its_connection_goes_on_where_it_was(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "live")
    scene.step()
    server = start_server(tmp_path / "live", tmp_path / "cache")
    try:
        ((first, kind, data),) = read_stream(server, 1)
        assert kind == "hello"
        assert data["steps"] == 1
        scene.step()
        scene.step()
        deadline = time.monotonic() + 20
        while ask(server, "/api/run", params={"run": "live"}).json()["steps"] < 3 and time.monotonic() < deadline:
            time.sleep(0.1)
        seen = read_stream(server, 3, last=first)
        assert "reset" not in [kind for _, kind, _ in seen]
        told = [step for _, kind, data in seen if kind == "steps" for step, _ in data["rows"]]
        assert told == [1, 2][: len(told)]
        assert told, "the steps that were missed are told"
        kinds = [kind for _, kind, _ in read_stream(server, 2, last="another.7")]
        assert kinds == ["hello", "reset"]
    finally:
        stop_server(server)


@pytest.mark.anyio
async def test_a_slow_page_is_told_to_load_anew_and_nothing_piles_up() -> None:
    watcher = Watcher(asyncio.get_running_loop())
    for number in range(10 * BACKLOG):
        watcher.put(Message(number, "steps", b"{}"))
    assert watcher.queue.qsize() == 1
    assert watcher.queue.get_nowait() is None


@pytest.mark.anyio
async def test_a_run_that_is_slow_to_open_holds_up_no_stream(finished: Path) -> None:
    begun, going_on = threading.Event(), threading.Event()

    class Slow(Runs):
        def open(self, name: str) -> Watched:
            begun.set()
            assert going_on.wait(10), "the loop of all streams stood still"
            return super().open(name)

    app = create_app(Slow(finished), token=TOKEN, hosts=["testserver"])
    transport, headers = httpx.ASGITransport(app), {"authorization": f"Bearer {TOKEN}"}
    async with httpx.AsyncClient(transport=transport, base_url="http://testserver", headers=headers) as client:
        asked = asyncio.create_task(client.get("/api/stream?run=none"))
        assert await asyncio.to_thread(begun.wait, 10)
        going_on.set()
        assert (await asked).status_code == 404


def test_what_is_kept_for_a_resume_is_bounded(finished: Path, tmp_path: Path) -> None:
    watched = Watched(Runs(finished).all()[0], tmp_path)
    for _ in range(3 * KEPT):
        watched._tell("steps", {})
    assert watched._since(f"{watched._epoch}.{3 * KEPT - 5}") is not None
    assert len(watched._since(f"{watched._epoch}.{3 * KEPT - 5}") or ()) == 5
    assert watched._since(f"{watched._epoch}.1") is None
    assert watched._since(f"{watched._epoch}.{10 * KEPT}") is None
    assert watched._since(f"{watched._epoch}.²") is None
    assert watched._since(f"{watched._epoch}.{'9' * 5000}") is None
    watched.close()


def test_two_servers_on_one_run_do_not_share_an_index(finished: Path, tmp_path: Path) -> None:
    run = Runs(finished).all()[0]
    first, second = place_of(run, tmp_path), place_of(run, tmp_path)
    assert first.directory != second.directory
    assert stat.S_IMODE(first.directory.stat().st_mode) == 0o700, "prompts stand in it"
    second.leave()
    assert not second.directory.exists()
    first.leave()
    again = place_of(run, tmp_path)
    assert again.directory == first.directory
    again.leave()


def test_a_server_that_is_asked_to_end_ends_its_streams_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scene = Scene(tmp_path / "live")
    scene.step()
    (tmp_path / "tmp").mkdir()
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    held = place_of(RunFiles("live", tmp_path / "live"), tmp_path / "cache" / "attune" / "dashboard")
    server = start_server(tmp_path / "live", tmp_path / "cache")
    with httpx.stream("GET", f"{server.origin}/api/stream?run=live", headers=server.headers, timeout=20) as answer:
        lines = answer.iter_lines()
        next(lines)
        assert list((tmp_path / "tmp").iterdir()), "an index of its own, as another holds the run's"
        began = time.monotonic()
        stop_server(server)
        assert time.monotonic() - began < 15
        list(lines)  # its end, not an error
    assert list((tmp_path / "tmp").iterdir()) == []
    held.leave()


def test_indexes_of_runs_that_are_gone_are_removed(tmp_path: Path) -> None:
    for name in ("here", "gone"):
        (tmp_path / "runs" / name).mkdir(parents=True)
        place_of(RunFiles(name, tmp_path / "runs" / name), tmp_path / "cache").leave()
    (tmp_path / "runs" / "gone").rmdir()
    sweep(tmp_path / "cache")
    assert len(list((tmp_path / "cache").iterdir())) == 1


def test_the_run_directory_is_left_as_it_is(finished: Path, server: Server) -> None:
    before = {path: path.stat().st_mtime_ns for path in finished.rglob("*")}
    for path in ("run", "curves?name=reward/mean", "samples", "failures", "choices", "histogram", "events"):
        joint = "&" if "?" in path else "?"
        assert ask(server, f"/api/{path}{joint}run=done").status_code == 200, path
    assert {path: path.stat().st_mtime_ns for path in finished.rglob("*")} == before
