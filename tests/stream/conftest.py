"""One real embedded server for the tests of the package; each test has a ledger of its own run id on it.

`desk` is that ledger with what a driver, an actor and a scoring worker do to it in one line each.
"""

from collections.abc import Iterator
from pathlib import Path
from uuid import uuid4

import pytest
import redis

from services.records import Attention, Failure, Group, Lease, PolicyVersion, Prompt, Sample, Score
from services.stream.connect import connect
from services.stream.embedded import EmbeddedRedis
from services.stream.ledger import Ledger

V0 = PolicyVersion(0, 0)
INFRA = Failure(kind="infra", code="actor_died", message="gone")
DATA = Failure(kind="data", code="empty_response", message="nothing")


def prompt_of(group_id: str) -> Prompt:
    return Prompt(prompt_id=group_id.partition(":")[2], source="tests", text=f"prompt of {group_id}")


def group_of(lease: Lease, version: PolicyVersion = V0, *, tokens: int = 3, samples: int = 1) -> Group:
    rows = tuple(0.1 * (n + 1) for n in range(tokens))
    attention = Attention(
        layers=(1,),
        content=(0, 1),
        salient=(1,),
        salient_weights=(1.0,),
        mass=rows,
        salient_mass=rows,
        neg_entropy_sum=rows,
        peak=rows,
    )
    made = tuple(
        Sample(
            sample_id=f"{lease.group_id}:{k}",
            group_id=lease.group_id,
            prompt_id=lease.prompt.prompt_id,
            attempt=lease.attempt,
            policy_versions=((*version, tokens),),
            prompt="p",
            prompt_ids=(1, 2),
            response="r" * tokens,
            response_ids=tuple(range(tokens)),
            finish_reason="stop",
            logprobs=tuple(-row for row in rows),
            attention=attention,
            created_at=1.5,
        )
        for k in range(samples)
    )
    return Group(
        group_id=lease.group_id,
        attempt=lease.attempt,
        epoch=lease.epoch,
        order=lease.order,
        version=version,
        prompt=lease.prompt,
        eos_ids=(2,),
        samples=made,
    )


def scored(group: Group, value: float = 1.0) -> Group:
    score = Score(status="ok", value=value)
    samples = tuple(s.model_copy(update={"scores": {"attention": score}, "reward": score}) for s in group.samples)
    return group.model_copy(update={"samples": samples})


class Desk:
    """A ledger and the moves of those who work at it."""

    V0, INFRA, DATA = V0, INFRA, DATA
    prompt_of, group_of, scored = staticmethod(prompt_of), staticmethod(group_of), staticmethod(scored)

    def __init__(self, ledger: Ledger) -> None:
        self.ledger = ledger

    def fill(self, groups: int, *, limit: int | None = None, version: PolicyVersion = V0, epoch: int = 0) -> list[str]:
        """Registers `groups` groups with their prompts and opens the gate for `limit` of them (all)."""
        ids = [f"{epoch}:p{n}" for n in range(groups)]
        self.ledger.register(epoch, [(group_id, epoch * 1000 + n) for n, group_id in enumerate(ids)])
        self.ledger.attach({group_id: prompt_of(group_id) for group_id in ids})
        self.ledger.open_gate(version, "weights.json", groups if limit is None else limit)
        return ids

    def lease(self, owner: str = "actor", version: PolicyVersion = V0, ttl_s: float = 60.0) -> Lease:
        answer = self.ledger.lease(owner, version, ttl_s)
        assert isinstance(answer, Lease), answer
        return answer

    def generate(self, count: int, version: PolicyVersion = V0) -> list[Lease]:
        leases = [self.lease(version=version) for _ in range(count)]
        for lease in leases:
            assert self.ledger.put_generated(group_of(lease, version))
        return leases

    def score(self, count: int = 1000) -> list[str]:
        entries = self.ledger.read_generated("scorer", count, 1, 60_000)
        for entry, group in entries:
            assert self.ledger.put_scored(entry, scored(group))
        return [group.group_id for _, group in entries]

    def make_scored(self, count: int, version: PolicyVersion = V0) -> list[str]:
        self.generate(count, version)
        return self.score()


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedRedis]:
    with EmbeddedRedis(Path(tmp_path_factory.mktemp("redis"))) as embedded:
        yield embedded


@pytest.fixture(scope="session")
def client(server: EmbeddedRedis) -> Iterator[redis.Redis]:
    connection = connect(server.url)
    yield connection
    connection.close()


@pytest.fixture
def ledger(client: redis.Redis) -> Iterator[Ledger]:
    book = Ledger(client, f"run-{uuid4().hex[:8]}")
    yield book
    book.flush()


@pytest.fixture
def desk(ledger: Ledger) -> Desk:
    return Desk(ledger)


@pytest.fixture(scope="session")
def new_desk() -> type[Desk]:
    return Desk
