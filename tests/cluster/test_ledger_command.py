"""`attune ledger` on a live run, on a dead one, with and without its Redis: every prompt has its one true state."""

import hashlib
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from cluster.cli import run_command
from cluster.feed import Feed
from cluster.history import History
from cluster.ledger_account import RunAccount, account_of
from cluster.recipe import resolve, save_resolved
from cluster.run_dir import RunDir
from learner.commit import begin_checkpoint, commit_checkpoint
from services.records import Failure, Group, Lease, PolicyVersion, Sample, Score
from services.stream.account import Settled
from services.stream.connect import connect
from services.stream.embedded import EmbeddedRedis
from services.stream.ledger import Ledger
from services.text.sources import load_prompts

RUN_ID, V0, V1 = "abc123", PolicyVersion(1, 0), PolicyVersion(1, 1)
EMPTY = Failure(kind="data", code="empty_response", message="the policy said\nnothing")


def answered(lease: Lease, version: PolicyVersion, attempt: int | None = None) -> Group:
    score = Score(status="ok", value=1.0)
    attempt = lease.attempt if attempt is None else attempt
    sample = Sample(
        sample_id=f"{lease.group_id}:0", group_id=lease.group_id, prompt_id=lease.prompt.prompt_id, attempt=attempt,
        policy_versions=((*version, 1),), prompt="p", prompt_ids=(1,), response="r", response_ids=(2,),
        finish_reason="stop", logprobs=(-1.0,), scores={"length": score}, reward=score, created_at=0.0,
    )  # fmt: skip
    return Group(
        group_id=lease.group_id, attempt=attempt, epoch=lease.epoch, order=lease.order, version=version,
        prompt=lease.prompt, eos_ids=(2,), samples=(sample,),
    )  # fmt: skip


class Run:
    """Ten prompts: 2 committed, 2 trained, 1 scored, 1 generated, 1 leased, 1 failed, 1 gone back, 1 untouched."""

    def __init__(self, path: Path, url: str, stream: dict[str, str] | None = None) -> None:
        self.dir = RunDir(path)
        path.mkdir(exist_ok=True)
        source = path.parent / "prompts.jsonl"
        source.write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(10)), encoding="utf-8")
        data = {"source": str(source), "validation_fraction": 0.0, "test_fraction": 0.0}
        run = {"groups_per_step": 2, "seed": 4}
        config = resolve({"run": run, "data": data, "policy": {"model": "m"}, "stream": stream or {}}, "test")
        save_resolved(config, self.dir.config)
        self.dir.event("start", run_id=RUN_ID, incarnation=1, step=0)
        self.history = History(run_id=RUN_ID, incarnation=1)
        feed = Feed(load_prompts(config.data).train, seed=4, epochs=1, steps=None, groups_per_step=2)
        self.ledger = ledger = Ledger(connect(url), RUN_ID)
        ledger.claim()
        feed.register(ledger, 0)
        feed.top_up(ledger, 10)
        self.ids = ledger.ids("pending")
        ledger.open_gate(V0, "w0", 10)
        for _ in range(5):
            ledger.put_generated(answered(self.lease(), V0))
        for entry, group in ledger.read_generated("scorer", 9, 1, 60_000):
            ledger.put_scored(entry, group)
        self.history.steps[0] = self.take(0)
        self.commit()
        ledger.commit({0: self.history.steps[0]})
        self.history.steps[1] = self.take(1)
        ledger.put_generated(answered(self.lease(), V0))
        self.lease("rollout-7", ttl_s=300)
        failing = self.lease()
        ledger.fail(failing.group_id, failing.attempt, EMPTY, 0)
        lost = self.lease("rollout-1")
        ledger.release("rollout-1")
        assert not ledger.put_generated(answered(lost, V0))  # late

    def lease(self, owner: str = "rollout-0", ttl_s: float = 60) -> Lease:
        lease = self.ledger.lease(owner, V0, ttl_s)
        assert isinstance(lease, Lease)
        return lease

    def take(self, step: int) -> list[str]:
        groups = self.ledger.take(step, 2)
        assert groups is not None
        return groups

    def commit(self) -> Path:
        partial = begin_checkpoint(self.dir.path, self.history.steps_done)
        (partial / "learner.json").write_text("{}")
        return commit_checkpoint(partial, self.history.manifest())


EXPECTED = {
    "pending": 2, "leased": 1, "generated": 1, "scored": 1, "consumed": 2, "committed": 2, "failed": 1,
}  # fmt: skip


@pytest.fixture
def server(tmp_path: Path) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(tmp_path / "run" / "redis", "always") as embedded:
        yield embedded


@pytest.fixture
def run(tmp_path: Path, server: EmbeddedRedis) -> Run:
    return Run(tmp_path / "run", server.url)


def states(account: RunAccount) -> dict[str, str]:
    assert account.uncommitted is not None
    return {row.group_id: row.state for row in account.uncommitted}


def files_of(directory: Path) -> dict[str, str]:
    return {
        str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in directory.rglob("*")
        if path.is_file()
    }


def test_a_live_run_is_read_from_its_redis_and_not_touched(
    run: Run, server: EmbeddedRedis, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    before = files_of(run.dir.path)
    out = tmp_path / "account.json"
    assert run_command(["ledger", str(run.dir.path), "--uncommitted", "--json", str(out)]) == 0
    said = capfd.readouterr().out
    assert files_of(run.dir.path) == before  # its log too: nothing was written
    account = json.loads(out.read_text(encoding="utf-8"))
    assert account["counts"] == EXPECTED
    assert account["late"] == 1
    assert account["source"].startswith("Redis at 127.0.0.1:")
    assert account["committed_steps"] == 1
    lines = {row["group_id"]: row for row in account["uncommitted"]}
    assert list(lines) == [*run.ids[8:], run.ids[6], run.ids[5], run.ids[4], *run.ids[2:4], run.ids[7]]
    leased = lines[run.ids[6]]
    assert (leased["owner"], leased["attempts"]) == ("rollout-7", 1)
    assert 0 <= leased["leased_s"] < 60
    assert 200 < leased["expires_s"] <= 300
    assert "rollout-7 generates it" in leased["why"]
    assert lines[run.ids[7]]["why"] == "data empty_response: the policy said\nnothing"
    assert lines[run.ids[8]]["losses"] == 1
    assert "owner_died" in lines[run.ids[8]]["why"]
    assert lines[run.ids[9]]["why"] == "not leased yet"
    assert lines[run.ids[2]]["why"] == "trained in step 1, waits for a commit"
    assert lines[run.ids[5]]["why"] == "waits for its scores"
    assert lines[run.ids[4]]["why"] == "waits for its batch"
    # And for the eye: every one of them on a line of its own, no secret, the late answer counted.
    for group_id in lines:
        assert len([line for line in said.splitlines() if line.startswith(group_id + " ")]) == 1
    assert "Late answers, dropped: 1" in said
    assert server.url.split(":")[2].split("@")[0] not in said
    assert run_command(["ledger", str(run.dir.path)]) == 0
    assert run.ids[9] not in capfd.readouterr().out  # names are for who asks


def redis_servers() -> set[int]:
    """Those that this process has started."""
    return {child.pid for child in psutil.Process().children(recursive=True) if "redis-server" in child.name()}


def test_a_dead_run_is_read_from_a_copy_of_its_log(run: Run, server: EmbeddedRedis) -> None:
    live = account_of(run.dir.path, names=True)
    os.kill(server.pid, signal.SIGKILL)
    server._server.wait()  # pyright: ignore[reportOptionalMemberAccess]
    before, others = files_of(run.dir.path), redis_servers()
    dead = account_of(run.dir.path, names=True)
    assert str(run.dir.redis / "appendonly.aof") in dead.source
    assert dead.counts == EXPECTED
    assert dead.counters == live.counters
    assert dead.uncommitted is not None
    assert live.uncommitted is not None
    assert [(row.group_id, row.state, row.attempts, row.owner) for row in dead.uncommitted] == [
        (row.group_id, row.state, row.attempts, row.owner) for row in live.uncommitted
    ]
    assert dead.notes == ()
    assert files_of(run.dir.path) == before
    assert redis_servers() == others


def test_the_manifest_is_the_truth_where_the_driver_died_before_it_told_the_ledger(run: Run) -> None:
    run.history.failed[run.ids[8]] = EMPTY
    run.commit()
    account = account_of(run.dir.path, names=True)
    assert account.counts == {**EXPECTED, "pending": 1, "consumed": 0, "committed": 4, "failed": 2}
    assert states(account)[run.ids[8]] == "failed"
    assert account.committed_steps == 2


def test_what_a_damaged_commit_held_is_not_committed(run: Run) -> None:
    (run.dir.checkpoints / "step_1" / "COMMITTED").write_text("0\n")
    account = account_of(run.dir.path, names=True)
    assert account.counts == {**EXPECTED, "pending": 4, "committed": 0}
    assert account.committed_steps == 0
    assert account.uncommitted is not None
    assert [row.failure.code for row in account.uncommitted if row.group_id in run.ids[:2] and row.failure] == [
        "commit_gone",
        "commit_gone",
    ]
    assert any("damaged" in note for note in account.notes)


@pytest.mark.parametrize("left", [0, 1])
def test_groups_that_have_left_the_ledger_are_named_when_their_commit_is_gone(run: Run, left: int) -> None:
    ids = run.ids
    for step, groups in enumerate((ids[4:6], [ids[6], ids[8]], [ids[9]]), start=2):
        run.history.steps[step] = groups
    run.history.failed[ids[7]] = EMPTY
    run.commit()
    run.ledger.reconcile(run.history.steps, run.history.failed)
    run.ledger.settle(Settled(1, 9, 1), 10)
    whole = account_of(run.dir.path, names=True)
    assert whole.counts == {**dict.fromkeys(EXPECTED, 0), "committed": 9, "failed": 1}
    assert states(whole) == {ids[7]: "failed"}
    for step in (5, 1)[: 2 - left]:
        (run.dir.checkpoints / f"step_{step}" / "COMMITTED").write_text("0\n")
    account = account_of(run.dir.path, names=True)
    assert account.counts == {**dict.fromkeys(EXPECTED, 0), "committed": 2 * left, "pending": 10 - 2 * left}
    assert account.uncommitted is not None
    assert [row.group_id for row in account.uncommitted] == ids[2 * left :]
    assert {row.failure.code for row in account.uncommitted if row.failure} == {"commit_gone"}


def test_without_a_redis_or_a_log_the_commit_and_the_prompts_say_it(run: Run, server: EmbeddedRedis) -> None:
    run.history.failed[run.ids[7]] = EMPTY
    run.commit()
    server.kill()
    (run.dir.redis / "appendonly.aof").unlink()
    account = account_of(run.dir.path, names=True)
    assert account.counts == {**dict.fromkeys(EXPECTED, 0), "committed": 4, "failed": 1, "pending": 5}
    assert states(account) == {**dict.fromkeys([*run.ids[4:7], *run.ids[8:]], "pending"), run.ids[7]: "failed"}
    assert "the recipe's prompts" in account.source


def test_a_log_that_cannot_be_loaded_is_said(run: Run, server: EmbeddedRedis) -> None:
    server.kill()
    (run.dir.redis / "appendonly.aof").write_bytes(b"no log\r\n" * 9)
    account = account_of(run.dir.path, names=False)
    assert account.counts == {**dict.fromkeys(EXPECTED, 0), "committed": 2, "pending": 8}
    assert any("appendonly.aof cannot be read" in note for note in account.notes)
    assert account.uncommitted is None


def test_a_redis_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with EmbeddedRedis(tmp_path / "elsewhere") as own:
        password, place = own.url.removeprefix("redis://:").split("@")
        run = Run(tmp_path / "run", own.url, {"url": f"redis://{place}", "password_env": "ATTUNE_TEST_REDIS"})
        monkeypatch.delenv("ATTUNE_TEST_REDIS", raising=False)
        without = account_of(run.dir.path, names=True)
        assert any("ATTUNE_TEST_REDIS is not set" in note for note in without.notes)
        assert without.counts["committed"] == 2
        monkeypatch.setenv("ATTUNE_TEST_REDIS", "wrong")
        assert any("refuses the password" in note for note in account_of(run.dir.path, names=False).notes)
        monkeypatch.setenv("ATTUNE_TEST_REDIS", password)
        account = account_of(run.dir.path, names=True)
        assert account.counts == EXPECTED
        run.ledger.flush()
        assert any("knows nothing of this run" in note for note in account_of(run.dir.path, names=False).notes)
    monkeypatch.setattr("cluster.ledger_account.ANSWER_S", 0.5)
    assert run_command(["ledger", str(run.dir.path)]) == 0
    said = capfd.readouterr().out
    assert f"note: Redis at {place.removesuffix('/0')} cannot be used" in said
    assert password not in said


def test_what_is_no_run_is_refused(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    for directory in (tmp_path / "empty", tmp_path / "nowhere"):
        assert run_command(["ledger", str(directory)]) == 2
        said = capfd.readouterr().err
        assert f"{directory}: is no run directory" in said
        assert "Traceback" not in said
    assert list((tmp_path / "empty").iterdir()) == []
