"""One rank of the learner. The driver runs one of these in an actor a rank and calls all of them alike.

Every method but `address` and `pulse` is collective: it returns when all ranks have called it. Batches arrive as group
ids; each rank fetches the groups itself, so that what is computed over the whole batch is the same on all of them.
"""

import socket
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, cast

import torch
from transformers import PreTrainedModel

from learner.checkpoint import load_checkpoint, save_checkpoint
from learner.checkpoint_config import CheckpointSection
from learner.commit import Written
from learner.config import LearnerSection
from learner.drift import watch_attention
from learner.engine import Engine, Reference
from learner.faults import collective
from learner.policy import PolicyWithValue, ValueKind, verify_head
from learner.ppo import Rules, TrainerState, train_step
from learner.publish import Zero3Source, export, publish
from learner.reward_checkpoint import TrainingFiles
from learner.reward_model_config import RewardModelSection
from learner.reward_training import Data, train_scores
from learner.reward_training import updates_of as updates_of_scores
from learner.scoring_model import start_scoring_model
from learner.sft import Pair, fine_tune, updates_of
from learner.sft_config import SftSection
from learner.transfer import send
from learner.value_model import load_value_model
from learner.zero import device_of, join_ranks
from services.attention.capture import CAPTURE, Recorder, register
from services.attention.config import CaptureSection
from services.models import DTYPES, decoder_start_of, load_policy_model, load_tokenizer
from services.models_config import PolicySection
from services.records import Group, PolicyVersion
from services.stream.config import StreamSection
from services.stream.ledger import Ledger, open_ledger
from services.transfer.sender import Sender

APART_S = 60.0
"""Seconds by which a rank's own deadline passes before that of the ranks that wait for it in a collective."""


def collective_s(cluster: Mapping[str, Any], checkpoint_s: float) -> float:
    """Longest wait (s) in a collective, for a rank that does something else first, each with a deadline of its own.

    It loads a model, gathers weights or writes a checkpoint; or waits for receivers of weights to come and to form
    their group. It alone knows whom it waits for, and says so, where the others do not give it up before.
    """
    receivers_s = float(cluster["rendezvous_s"]) + 2 * float(cluster["transfer_s"])
    return max(float(cluster["start_s"]), float(cluster["publish_s"]), receivers_s, checkpoint_s) + APART_S


class LearnerWorker:
    """`config` is the whole resolved recipe as a dict, every default in it; `rank` of `world_size`."""

    def __init__(self, config: dict[str, Any], rank: int, world_size: int, run_dir: str) -> None:
        self.section = LearnerSection.model_validate(config["learner"])
        self.policy_section = PolicySection.model_validate(config["policy"])
        self.checkpoint = CheckpointSection.model_validate(config["checkpoint"])
        self.rank = rank
        self.world_size = world_size
        self.run_dir = Path(run_dir)
        self._capture = CaptureSection.model_validate(config["attention"])
        self._run: Mapping[str, Any] = config["run"]
        self._rollout: Mapping[str, Any] = config["rollout"]
        self._cluster: Mapping[str, Any] = config["cluster"]
        self._stream = StreamSection.model_validate(config["stream"])
        self._engine: Engine | None = None
        self._reference: Reference | None = None
        self._recorder: Recorder | None = None
        self._ledger: tuple[str, Ledger] | None = None
        self._sender: Sender | None = None
        self.trainer = TrainerState.start(self.section)

    def address(self) -> tuple[str, int]:
        """Where rank 0 will wait for the others: this host, and a port that is free now."""
        host = self._host()
        with socket.socket() as probe:
            probe.bind((host, 0))
            return host, probe.getsockname()[1]

    def pulse(self) -> tuple[int, bool]:
        """That this rank answers; what it does has the deadlines of the calls."""
        return 0, False

    @collective
    def setup(
        self, master_addr: str, master_port: int, resume: str | None = None, total_steps: int | None = None
    ) -> dict[str, Any]:
        """Joins the ranks and loads the policy, or what the committed checkpoint `resume` holds.

        `total_steps` of the run is for learning-rate schedules. Returns what rank 0 may want to log.
        """
        self._join(master_addr, master_port)
        value = self.section.value_function if self.section.needs_values else "none"
        watched = self.section.drift.share > 0
        policy = self._policy(value, watched=watched)
        verify_head(policy)
        if watched:
            self._recorder = watch_attention(cast(PreTrainedModel, policy.lm), self._capture)
        per_step = self.section.epochs * self.section.minibatches
        updates = None if total_steps is None else total_steps * per_step
        self._engine = Engine(policy, self.section, updates=updates, device=self._device)
        # Always from the model that the recipe names, so that a resumed run measures its KL from the same place.
        self._reference = Reference(self._policy("none"), self.section, device=self._device)
        if resume is not None:
            self.trainer = load_checkpoint(self._engine, resume).under(self.section)
        return {
            "parameters": sum(int(getattr(p, "ds_numel", p.numel())) for p in policy.lm.parameters()),
            "device": self._device,
            "family": self._engine.family,
            "updates_done": self._engine.updates_done,
        }

    @collective
    def train_step(self, step: int, group_ids: Sequence[str], stream_url: str, run_id: str) -> dict[str, Any]:
        """Trains on these groups, in this order.

        Returns `metrics`; `samples`, figures for the log by sample id; `bad`, why the step was skipped, or None.

        Raises:
            BadBatch: the recipe stops at such a batch. Names the step; what was committed is untouched.
        """
        return self.train_on(step, self._fetch(group_ids, stream_url, run_id))

    def train_on(self, step: int, groups: Sequence[Group]) -> dict[str, Any]:
        """`train_step` with the groups at hand."""
        assert self._reference is not None
        result = train_step(self.engine, self._reference, groups, step, self._rules(), self.trainer, self._recorder)
        self.trainer = result.state
        return {"metrics": result.metrics, "samples": result.samples, "bad": result.bad}

    @collective
    def publish(self, version: tuple[int, int], directory: str) -> str:
        """Writes the policy's weights for the rollout engines; the path of their manifest."""
        return publish(self.engine, PolicyVersion(*version), directory, self._bucket_bytes)

    @collective
    def offer_weights(self, version: tuple[int, int], receivers: Sequence[str]) -> str:
        """Opens a transfer of the policy's weights to these receivers; rank 0 answers with the offer, as JSON."""
        if self.rank != 0:
            return ""
        if self._sender is not None:
            self._sender.stop("another transfer took its place")
        self._sender = Sender(
            PolicyVersion(*version),
            receivers,
            name=f"learner-{self.rank}",
            host=self._host(),
            device=torch.device(self._device),
            join_s=float(self._cluster["rendezvous_s"]),
            phase_s=float(self._cluster["transfer_s"]),
            whole_s=float(self._cluster["publish_s"]),
            backend=self._cluster["transfer_backend"],
        )
        return self._sender.offer.model_dump_json()

    @collective
    def send_weights(self) -> dict[str, Any]:
        """The transfer that was offered. Rank 0 answers with the report, a `services.transfer.offer.Report` as a dict.

        Returns, and does not raise, where receivers are missing: the report names them.
        """
        if self.rank == 0 and self._sender is None:
            raise RuntimeError("offer_weights was not called")
        sender, self._sender = self._sender, None
        report = send(self.engine, Zero3Source(self.engine, self._bucket_bytes), sender)
        return {} if report is None else asdict(report)

    @collective
    def save_checkpoint(self, directory: str) -> Written:
        """Writes the learner's part of a checkpoint; `learner.commit.commit_checkpoint` makes it one."""
        return save_checkpoint(self.engine, self.trainer, load_tokenizer(self.policy_section), directory)

    @collective
    def export(self, directory: str) -> None:
        """Writes the policy as a Hugging Face model directory."""
        export(self.engine, load_tokenizer(self.policy_section), directory, self._bucket_bytes)

    def sft(
        self,
        master_addr: str,
        master_port: int,
        section: dict[str, Any],
        train: Sequence[Pair],
        validation: Sequence[Pair],
        progress: str,
        directory: str,
    ) -> list[dict[str, Any]]:
        """Fine-tunes the policy on pairs of token ids and writes it to `directory`; a report an epoch.

        Each update adds a byte to the file `progress`.

        In place of `setup`: a worker that fine-tunes does nothing else. `section` is an `SftSection` as a dict.
        """
        self._join(master_addr, master_port)
        settings = SftSection.model_validate(section)
        updates = updates_of(len(train), settings)
        policy = self._policy("none")
        verify_head(policy)
        self._engine = Engine(policy, settings.learner(self.section, updates), updates=updates, device=self._device)
        reports = fine_tune(
            self._engine,
            train,
            validation,
            settings,
            seed=self._seed,
            pad_id=self._pad_id,
            decoder_start_id=self._decoder_start_id,
            on_update=lambda: self._step_on(Path(progress)),
        )
        export(self._engine, load_tokenizer(self.policy_section), directory)
        return [asdict(report) for report in reports]

    def _step_on(self, progress: Path) -> None:
        if self.rank == 0:
            with progress.open("ab") as file:
                file.write(b".")

    def reward_model(
        self,
        master_addr: str,
        master_port: int,
        section: dict[str, Any],
        data: Data,
        work: str,
        resume: str | None,
        directory: str,
    ) -> dict[str, Any]:
        """Trains a model that scores from the policy and writes it to `directory`; the figures of what was kept.

        In place of `setup`, as `sft`. `section` is a `RewardModelSection` as a dict. `work` has the files of
        `learner.reward_checkpoint` as training goes on; `resume` is a checkpoint there, of the same training.
        """
        self._join(master_addr, master_port)
        settings = RewardModelSection.model_validate(section)
        tokenizer = load_tokenizer(self.policy_section)
        model = start_scoring_model(
            self.policy_section, settings, tokenizer, dtype=DTYPES[self.section.dtype], seed=self._seed
        )
        updates = updates_of_scores(data, settings)
        engine = Engine(model, settings.learner(self.section, updates), updates=updates, device=self._device)
        self._engine = engine
        files = TrainingFiles(engine, tokenizer, work)
        figures = train_scores(
            engine,
            data,
            settings,
            seed=self._seed,
            pad_id=model.pad_id,
            start=None if resume is None else files.load(resume),
            keep=files.keep,
            save=files.save,
            on_report=files.report,
        )
        files.finish(figures["updates"], directory)
        return figures

    def close(self) -> None:
        """Leaves the process group. Not needed before a process ends."""
        self._engine = self._reference = None
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise RuntimeError("setup was not called")
        return self._engine

    @property
    def _bucket_bytes(self) -> int:
        return int(self._cluster["bucket_mib"] * 2**20)

    @property
    def _seed(self) -> int:
        return int(self._run["seed"])

    def _join(self, address: str, port: int) -> None:
        torch.set_num_threads(self.section.threads)
        torch.manual_seed(self._seed)
        self._device = device_of(self.section)
        part = float(self._cluster["learner_gpus"])
        if self._device == "cuda" and 0 < part < 1:  # what torch kept for itself beyond it, the GPU's others would lack
            torch.cuda.set_per_process_memory_fraction(part)
        join_ranks(
            rank=self.rank,
            world_size=self.world_size,
            address=address,
            port=port,
            device=self._device,
            timeout_s=collective_s(self._cluster, self.checkpoint.timeout_s),
        )

    def _policy(self, value: ValueKind, *, watched: bool = False) -> PolicyWithValue:
        dtype = DTYPES[self.section.dtype]
        if watched:
            register()
        lm = load_policy_model(self.policy_section, dtype=dtype, attention=CAPTURE if watched else "sdpa")
        trunk, score = None, None
        if value == "separate":
            trunk = load_policy_model(self.policy_section, dtype=dtype)
        elif value == "from_reward_model":
            start = load_value_model(str(self.section.value_model), self.policy_section, dtype=dtype)
            trunk, score = start.lm, start.score
        policy = PolicyWithValue(
            lm,
            value=value,
            value_hidden=self.section.value_hidden,
            value_lm=trunk,
            value_score=score,
            seed=self._seed,
        )
        self._decoder_start_id = decoder_start_of(lm) if policy.encoder_decoder else None
        pad = lm.config.pad_token_id
        self._pad_id = int(pad) if isinstance(pad, int) else 0  # masked everywhere: any id does
        return policy

    def _rules(self) -> Rules:
        return Rules(
            seed=self._seed,
            temperature=float(self._rollout["temperature"]),
            replay=self._rollout["truncation"] == "replay",
            finish_length=self._rollout["finish_length"],
            pad_id=self._pad_id,
            decoder_start_id=self._decoder_start_id,
        )

    def _fetch(self, group_ids: Sequence[str], url: str, run_id: str) -> list[Group]:
        if self._ledger is None or self._ledger[0] != url:
            self._ledger = (url, open_ledger(url, run_id, self._stream))
        return self._ledger[1].fetch(list(group_ids), wait_s=self._stream.patience_s)

    def _host(self) -> str:
        """The address that other nodes reach this one by; loopback where the ranks are all here."""
        try:
            import ray

            if ray.is_initialized():
                return ray.util.get_node_ip_address()
        except ImportError:
            pass
        return "127.0.0.1"
