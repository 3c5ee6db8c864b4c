"""An actor of tests that need no engine: it leases, answers and scores, from a thread."""

import threading

from services.records import Group, Lease, PolicyVersion, Sample, Score
from services.stream.connect import connect
from services.stream.ledger import Ledger


def scored(lease: Lease, version: PolicyVersion) -> Group:
    score = Score(status="ok", value=1.0)
    sample = Sample(
        sample_id=f"{lease.group_id}:0", group_id=lease.group_id, prompt_id=lease.prompt.prompt_id,
        attempt=lease.attempt, policy_versions=((*version, 1),), prompt="p", prompt_ids=(1,), response="r",
        response_ids=(2,), finish_reason="stop", logprobs=(-1.0,), scores={"length": score}, reward=score,
        created_at=0.0,
    )  # fmt: skip
    return Group(
        group_id=lease.group_id, attempt=lease.attempt, epoch=lease.epoch, order=lease.order, version=version,
        prompt=lease.prompt, eos_ids=(2,), samples=(sample,),
    )  # fmt: skip


class Actors:
    """An actor that leases, answers and scores, in a thread, until it is told to stop."""

    def __init__(self, url: str) -> None:
        self._ledger = Ledger(connect(url), "run", patience_s=20)
        self._end = threading.Event()
        self._failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self) -> None:
        version: PolicyVersion | None = None
        try:
            while not self._end.is_set():
                answer = self._ledger.lease("actor", version, 5.0)
                if isinstance(answer, Lease):
                    assert version is not None
                    self._ledger.put_generated(scored(answer, version))
                elif hasattr(answer, "version"):
                    version = answer.version  # pyright: ignore[reportAttributeAccessIssue]
                for entry, group in self._ledger.read_generated("scorer", 9, 1, 1_000):
                    self._ledger.put_scored(entry, group)
        except BaseException as error:
            self._failed.append(error)

    def stop(self) -> None:
        self._end.set()
        self._thread.join()
        assert not self._failed, self._failed
