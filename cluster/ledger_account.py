"""The account of every prompt of a run: from its Redis where one answers, else from its files. Reads, and nothing else.

Where the ledger is read from, in this order:

1. the run's Redis: the embedded one by the address in the run directory, or the recipe's `stream.url`;
2. the append-only file that an embedded one left: a copy of it, loaded by a server of its own elsewhere;
3. the recipe's prompts: each is pending, unless the last commit says otherwise.

Over all of them goes the manifest of the last commit, which is the truth (invariant 1): a driver may have died between
writing it and telling the ledger.
"""

import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, cast

import yaml

from cluster.config import Config
from cluster.feed import epochs_registered, groups_of_epoch
from cluster.recipe import resolve
from cluster.run_dir import RunDir
from learner.commit import latest_manifest
from services.errors import UserError
from services.records import Failure, GroupState, Prompt, epoch_of
from services.stream.account import STATES, Account, GroupRow, Settled
from services.stream.connect import address_of, connect
from services.stream.embedded import EmbeddedRedis, address_in
from services.stream.errors import StreamUnavailable
from services.text.sources import load_prompts

ANSWER_S = 5.0
_GONE = Failure(kind="infra", code="commit_gone", message="it was committed by a commit that is damaged or removed")
UNCOMMITTED: tuple[GroupState, ...] = ("pending", "leased", "generated", "scored", "consumed", "failed")
LATE = ("late", "late_scores", "late_failures")


@dataclass(frozen=True)
class Named:
    """One prompt that is not committed, and why. `leased_s` and `expires_s`: age and rest of its lease (s)."""

    group_id: str
    state: GroupState
    attempts: int
    losses: int
    owner: str | None
    leased_s: float | None
    expires_s: float | None
    step: int | None
    failure: Failure | None
    why: str

    def plain(self) -> dict[str, Any]:
        return {**self.__dict__, "failure": None if self.failure is None else self.failure.model_dump(mode="json")}


@dataclass(frozen=True)
class RunAccount:
    """`source` says where it was read; `counters` are events since the run began; `notes` what could not be had."""

    run_id: str
    source: str
    committed_steps: int
    counts: dict[str, int]
    counters: dict[str, int]
    notes: tuple[str, ...]
    uncommitted: tuple[Named, ...] | None

    @property
    def late(self) -> int:
        """Answers that came for another attempt than the group's, and were dropped."""
        return sum(self.counters.get(name, 0) for name in LATE)

    def plain(self) -> dict[str, Any]:
        rows = None if self.uncommitted is None else [row.plain() for row in self.uncommitted]
        return {**self.__dict__, "late": self.late, "uncommitted": rows}


@dataclass
class _Found:
    """What a ledger says: the state of each group, and of those not committed all that is known."""

    source: str
    rows: dict[str, GroupRow]
    committed: set[str]
    counters: dict[str, int] = field(default_factory=dict)
    now: float = field(default_factory=time.time)
    settled: Settled = field(default_factory=Settled)

    @property
    def empty(self) -> bool:
        return not self.rows and not self.committed and not self.settled.epochs


def account_of(path: Path, *, names: bool) -> RunAccount:
    """The account of the run in a directory; with `names`, every prompt that is not committed.

    Raises:
        UserError: there is no run.
        Deadline: its Redis fell silent while it was read.
    """
    run = RunDir(path)
    run_id = run.run_id()
    if run_id is None:
        raise UserError(f"{path}: is no run directory: events.jsonl has no start of a run")
    notes: list[str] = []
    found = _from_redis(run, run_id, notes) or _from_log(run, run_id, notes) or _from_recipe(run, notes)
    manifest, problems = latest_manifest(path)  # after the ledger: it is never older than what that tells of it
    notes += problems
    _lay_over(found, manifest)
    _name_unsettled(run, found, notes)
    counts = {str(state): 0 for state in STATES}
    counts["committed"] = len(found.committed)
    for row in found.rows.values():
        counts[row.state] += 1
    ordered = sorted(found.rows.values(), key=lambda row: (STATES.index(row.state), row.epoch, row.order))
    return RunAccount(
        run_id=run_id,
        source=found.source,
        committed_steps=0 if manifest is None else len(manifest["steps"]),
        counts=counts,
        counters=found.counters,
        notes=tuple(notes),
        uncommitted=tuple(_named(row, found.now) for row in ordered) if names else None,
    )


def _from_redis(run: RunDir, run_id: str, notes: list[str]) -> _Found | None:
    try:
        url = _url_of(run)
        if url is None:
            return None
        client = connect(url, ANSWER_S, socket_timeout_s=ANSWER_S)
    except UserError as error:  # no password, no answer
        notes.append(str(error))
        return None
    try:
        found = _read(Account(client, run_id, patience_s=ANSWER_S), f"Redis at {address_of(url)}")
    finally:
        client.close()
    if found.empty:
        notes.append(f"Redis at {address_of(url)} knows nothing of this run")
        return None
    return found


def _url_of(run: RunDir) -> str | None:
    config = _config_of(run)
    return address_in(run.redis) if config.stream.url is None else config.stream.resolved_url()


def _config_of(run: RunDir) -> Config:
    """Raises UserError where config.yaml cannot be read: then this is no whole run directory."""
    try:
        tree = yaml.safe_load(run.config.read_text(encoding="utf-8"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{run.config}: cannot be read: {error}") from error
    return resolve(cast(Mapping[str, Any], tree), str(run.config))


def _from_log(run: RunDir, run_id: str, notes: list[str]) -> _Found | None:
    log = run.redis / "appendonly.aof"
    try:
        if not log.is_file() or log.stat().st_size == 0:
            return None
        with _server_on_copy(log) as url:
            client = connect(url, ANSWER_S)
            try:
                found = _read(Account(client, run_id), f"the log of the run's Redis, {log}")
            finally:
                client.close()
    except (OSError, UserError) as error:
        notes.append(f"{log} cannot be read: {error}")
        return None
    return None if found.empty else replace(found, now=time.time())


@contextmanager
def _server_on_copy(log: Path) -> Iterator[str]:
    with tempfile.TemporaryDirectory(prefix="attune-ledger-") as directory:
        shutil.copyfile(log, Path(directory) / log.name)
        with EmbeddedRedis(Path(directory)) as server:
            yield server.url


def _read(account: Account, source: str) -> _Found:
    states = account.states()
    rows = {row.group_id: row for state in UNCOMMITTED for row in account.rows(state, states[state])}
    return _Found(source, rows, set(states["committed"]), account.counters(), account.now(), account.settled())


def _from_recipe(run: RunDir, notes: list[str]) -> _Found:
    found = _Found("the last commit and the recipe's prompts", {}, set())
    manifest, _ = latest_manifest(run.path)
    done = 0 if manifest is None else sum(map(len, manifest["steps"].values())) + len(manifest["failed"])
    loaded = _recipe_of(run, notes)
    if loaded is not None:
        config, prompts = loaded
        epochs = epochs_registered(len(prompts), config.run.epochs, done)
        found.rows.update((row.group_id, row) for row in _pending(config, prompts, epochs))
    return found


def _recipe_of(run: RunDir, notes: list[str]) -> tuple[Config, Sequence[Prompt]] | None:
    try:
        config = _config_of(run)
        return config, load_prompts(config.data).train
    except (UserError, StreamUnavailable) as error:
        notes.append(f"the prompts that are in no commit cannot be named: {error}")
        return None


def _pending(config: Config, prompts: Sequence[Prompt], epochs: int) -> Iterator[GroupRow]:
    """The groups of the first epochs, as if nothing had become of them."""
    for epoch in range(epochs):
        for group_id, order, _ in groups_of_epoch(prompts, config.run.seed, epoch):
            yield GroupRow(group_id, "pending", epoch, order, 0, None, None, None, None)


def _lay_over(found: _Found, manifest: Mapping[str, Any] | None) -> None:
    """The manifest over the ledger: what is in it is committed or failed, and nothing else is committed."""
    steps = {} if manifest is None else cast(dict[str, list[str]], manifest["steps"])
    truth = {group for groups in steps.values() for group in groups}
    for group_id in found.committed - truth:
        found.rows[group_id] = GroupRow(group_id, "pending", *_place(group_id), 0, None, None, None, _GONE)
    for group_id in truth:
        found.rows.pop(group_id, None)
    found.committed = truth
    for group_id, failure in ({} if manifest is None else manifest["failed"]).items():
        row = found.rows.get(group_id) or GroupRow(group_id, "failed", *_place(group_id), 0, None, None, None, None)
        found.rows[group_id] = replace(row, state="failed", owner=None, failure=Failure.model_validate(failure))


def _name_unsettled(run: RunDir, found: _Found, notes: list[str]) -> None:
    """Names the groups that the ledger has dropped as done in a commit, where that commit is damaged or removed."""
    epochs = found.settled.epochs
    known = found.committed | found.rows.keys()
    if sum(_place(group_id)[0] < epochs for group_id in known) < found.settled.committed + found.settled.failed:
        loaded = _recipe_of(run, notes)
        rows = () if loaded is None else _pending(*loaded, epochs)
        found.rows.update((row.group_id, replace(row, failure=_GONE)) for row in rows if row.group_id not in known)


def _place(group_id: str) -> tuple[int, int]:
    with suppress(ValueError):
        return epoch_of(group_id), 0
    return 0, 0


def _named(row: GroupRow, now: float) -> Named:
    leased_s = None if row.leased_at is None else round(max(0.0, now - row.leased_at), 1)
    expires_s = None if row.expires_at is None else round(row.expires_at - now, 1)
    return Named(
        group_id=row.group_id,
        state=row.state,
        attempts=row.attempt,
        losses=row.losses,
        owner=row.owner,
        leased_s=leased_s,
        expires_s=expires_s,
        step=row.step,
        failure=row.failure,
        why=_why(row, expires_s),
    )


def _why(row: GroupRow, expires_s: float | None) -> str:
    told = "" if row.failure is None else f"{row.failure.kind} {row.failure.code}: {row.failure.message}"
    if row.state == "failed":
        return told or "no reason was kept"
    if row.state == "pending":
        return f"went back: {told}" if told else "not leased yet" if row.attempt == 0 else "to be generated again"
    if row.state == "leased":
        rest = "has no end" if expires_s is None else f"ends in {expires_s:g} s" if expires_s > 0 else "is over"
        return f"{row.owner} generates it; the lease {rest}"
    if row.state == "generated":
        return "waits for its scores"
    if row.state == "scored":
        return "waits for its batch"
    return f"trained in step {row.step}, waits for a commit"
