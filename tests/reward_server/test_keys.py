"""API keys: made once, stored hashed, asked for on every route, each with its own limits."""

import asyncio
import base64
import json
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient

from cluster.cli import run_command
from reward_server.app import create_app
from reward_server.config import RewardSection
from reward_server.keys import KeyRing, key_of, load_keys, make_key
from reward_server.schema import Component, Item
from reward_server.scorers.base import Scored
from reward_server.serve import RewardServer
from services.errors import UserError

WORDS = {"words": {"kind": "length", "unit": "words"}}
BODY = {"items": [{"id": "a", "response": "one two"}]}


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """A keys file, and the keys by name: one without limits, one with two requests a minute, one with three items."""
    path = tmp_path / "keys.jsonl"
    return path, {
        "free": make_key(path, "free"),
        "slow": make_key(path, "slow", requests_per_minute=2),
        "small": make_key(path, "small", max_items=3),
    }


def serve(path: Path, *, token: str | None = None, scorers: Any = None, **section: Any) -> TestClient:
    values = {"sources": WORDS, "keys_file": path, **section}
    return TestClient(create_app(RewardSection.model_validate(values), token=token, scorers=scorers))


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def basic(key: str, user: str = "anyone") -> dict[str, str]:
    return {"Authorization": "Basic " + base64.b64encode(f"{user}:{key}".encode()).decode()}


def test_the_command_prints_a_key_once_and_keeps_its_hash(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "keys.jsonl"
    assert run_command(["reward-key", "trainer", "--file", str(path), "--requests-per-minute", "600"]) == 0
    key = capsys.readouterr().out.strip()
    assert key.startswith("attune-")
    assert len(key) > 40
    assert key not in path.read_text()
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    (record,) = load_keys(path)
    assert (record.name, record.requests_per_minute, record.max_items) == ("trainer", 600, None)
    with serve(path) as client:
        assert client.post("/v1/rewards", json=BODY, headers=bearer(key)).status_code == 200
    assert run_command(["reward-key", "trainer", "--file", str(path)]) == 2
    assert "has a key named 'trainer' already" in capsys.readouterr().err
    assert run_command(["reward-key", "no spaces", "--file", str(path)]) == 2
    assert "name:" in capsys.readouterr().err


def test_a_key_is_added_to_a_file_whose_last_line_is_open(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    first = make_key(path, "first")
    path.write_text(path.read_text().rstrip("\n"))
    second = make_key(path, "second")
    assert [key.name for key in load_keys(path)] == ["first", "second"]
    with serve(path) as client:
        for key in (first, second):
            assert client.post("/v1/rewards", json=BODY, headers=bearer(key)).status_code == 200


def test_every_key_and_the_token_count_as_bearer_and_as_password(keys: Any) -> None:
    path, secrets = keys
    with serve(path, token="the-token") as client:
        for key in (*secrets.values(), "the-token"):
            for headers in (bearer(key), basic(key), basic(key, "")):
                assert client.get("/readyz", headers=headers).status_code == 200
        free = secrets["free"]
        for wrong in (free[:-1], free + "x", free.upper(), "", "free", "anyone:" + free):
            for headers in (bearer(wrong), basic(wrong), {"Authorization": f"Basic {wrong}"}):
                assert client.get("/readyz", headers=headers).status_code == 401, headers
        twice = [("Authorization", f"Bearer {free}"), ("Authorization", f"Bearer {free}")]
        assert client.get("/readyz", headers=twice).status_code == 401


def test_all_keys_are_compared_whichever_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The time taken says nothing: as many hashes are compared for the first key as for the last, and for none."""
    import hmac

    path = tmp_path / "keys.jsonl"
    path.write_text("".join(key_of(name, f"secret-{name}").model_dump_json() + "\n" for name in "abc"))
    ring = KeyRing(path)
    counted = []
    compare = hmac.compare_digest
    monkeypatch.setattr(hmac, "compare_digest", lambda a, b: counted.append(len(a)) or compare(a, b))
    for secret in (b"secret-a", b"secret-c", b"nothing"):
        counted.clear()
        holder = ring.holder([b"Bearer " + secret])
        assert (holder.name if holder else None) == {b"secret-a": "a", b"secret-c": "c"}.get(secret)
        assert counted == [32, 32, 32]


def test_keys_come_and_go_without_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "keys.jsonl"
    first, second = make_key(path, "first", requests_per_minute=1), make_key(path, "second")
    with serve(path) as client:

        def status(key: str, method: str = "GET") -> int:
            if method == "GET":
                return client.get("/readyz", headers=bearer(key)).status_code
            return client.post("/v1/rewards", json=BODY, headers=bearer(key)).status_code

        assert status(first, "POST") == 200
        assert status(second) == 200
        third = make_key(path, "third")
        assert status(third) == 200
        assert status(first, "POST") == 429, "what a key has used is not forgotten when another comes"
        whole = path.read_text()
        path.write_text("".join(line + "\n" for line in whole.splitlines() if '"second"' not in line))
        assert [status(key) for key in (first, second, third)] == [200, 401, 200]
        path.write_text(whole + "not a key\n")
        assert [status(key) for key in (first, second, third)] == [200, 401, 200], "as before the half edit"
        path.unlink()
        assert [status(key) for key in (first, second, third)] == [200, 401, 200]
        path.write_text("")
        assert [status(key) for key in (first, second, third)] == [401, 401, 401]
        assert client.get("/readyz").status_code == 401, "a server with keys never does without"
        assert status(make_key(path, "fourth")) == 200


def test_requests_of_a_minute(keys: Any) -> None:
    path, secrets = keys
    with serve(path) as client:
        slow = bearer(secrets["slow"])
        assert [client.post("/v1/rewards", json=BODY, headers=slow).status_code for _ in range(3)] == [200, 200, 429]
        refusal = client.post("/v1/rewards", json=BODY, headers=slow)
        assert refusal.json()["error"]["message"] == "overloaded: the key slow has used its requests of this minute"
        assert 25 <= int(refusal.headers["Retry-After"]) <= 30
        pair = {"text_1": "p", "text_2": "r"}
        adapter = client.post("/score", json=pair, headers=slow)
        assert adapter.status_code == 503
        assert 25 <= int(adapter.headers["Retry-After"]) <= 30
        assert client.get("/readyz", headers=slow).status_code == 200  # only scoring counts
        assert client.post("/v1/rewards", json=BODY, headers=bearer(secrets["free"])).status_code == 200


def test_items_under_way(keys: Any) -> None:
    path, secrets = keys

    async def go() -> None:
        go_on = asyncio.Event()

        class Waits:
            revision = "1"

            async def score(self, items: Sequence[Item]) -> Sequence[Scored]:
                await go_on.wait()
                return [Scored(Component(status="ok", value=1.0))] * len(items)

        section = RewardSection.model_validate({"sources": WORDS, "keys_file": path})
        transport = httpx.ASGITransport(create_app(section, scorers={"words": Waits()}))
        async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
            two = {"items": BODY["items"] * 2}
            first = asyncio.create_task(client.post("/v1/rewards", json=two, headers=bearer(secrets["small"])))
            await asyncio.sleep(0.1)
            refusal = await client.post("/v1/rewards", json=two, headers=bearer(secrets["small"]))
            assert (refusal.status_code, refusal.headers["Retry-After"]) == (429, "1")
            assert "the key small has too many items under way" in refusal.text
            other = asyncio.create_task(client.post("/v1/rewards", json=two, headers=bearer(secrets["free"])))
            go_on.set()
            assert [(await task).status_code for task in (first, other)] == [200, 200]
            again = await client.post("/v1/rewards", json=two, headers=bearer(secrets["small"]))
            assert again.status_code == 200
            four = await client.post("/v1/rewards", json={"items": BODY["items"] * 4}, headers=bearer(secrets["small"]))
            assert four.status_code == 413
            assert "may have 3 at a time" in four.text

    asyncio.run(go())


WRONG = [
    ("not json", ":1: the line: Invalid JSON"),
    (json.dumps({"name": "a", "salt": "00" * 16}), ":1: hash: Field required"),
    (json.dumps({"name": "a", "salt": "0g" * 16, "hash": "00" * 32}), ":1: salt: String should match"),
    (json.dumps({"name": "a", "salt": "00" * 16, "hash": "00" * 32, "limit": 1}), ":1: limit: Extra inputs"),
    (json.dumps({"name": "a", "salt": "00" * 16, "hash": "00" * 32}) + "\n" * 2 + '{"name": "a"}', ":3: salt"),
    (f"{key_of('a', 'x').model_dump_json()}\n{key_of('a', 'y').model_dump_json()}", ":2: the name 'a' is there twice"),
    ("\n", "has no key: make one with `attune reward-key"),
]


@pytest.mark.parametrize(("text", "told"), WRONG)
def test_a_wrong_keys_file_is_told_with_its_line(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "keys.jsonl"
    path.write_text(text)
    with pytest.raises(UserError) as error:
        load_keys(path)
    assert str(path) in str(error.value)
    assert told in str(error.value)


def test_a_keys_file_that_is_not_there_is_told_before_anything_is_served(tmp_path: Path) -> None:
    section = RewardSection(keys_file=tmp_path / "missing.jsonl")
    with pytest.raises(UserError, match=r"reward\.keys_file: cannot read .*missing\.jsonl"):
        asyncio.run(RewardServer(section, token=None).start())


def test_keys_open_the_server_to_others(keys: Any) -> None:
    path, _ = keys
    RewardServer(RewardSection(host="0.0.0.0", keys_file=path), token=None)  # noqa: S104 - it is not started
    with pytest.raises(UserError, match=r"needs a token: set ATTUNE_REWARD_TOKEN or reward\.keys_file"):
        RewardServer(RewardSection(host="0.0.0.0"), token=None)  # noqa: S104
