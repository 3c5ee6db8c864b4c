"""`attune doctor`: what fits, what does not and by how much, and what else would keep a run from starting."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import redis
import yaml

from cluster.cli import run_command
from cluster.config import Config
from cluster.doctor import examine, look_at_memory
from cluster.health import look_at_disk, look_at_redis
from cluster.machine import Machine, look_here
from cluster.memory import Item, Need
from cluster.plan import Part
from cluster.recipe import resolve
from cluster.sizes import LADDER, ladder_shape, ladder_tree, try_sizes
from services.stream.embedded import EmbeddedRedis

ROOT = Path(__file__).parents[2]
GB = 10**9

Run = Callable[..., tuple[int, str, dict[str, Any]]]


@pytest.fixture
def doctor(tmp_path: Path, tiny_decoder: Path, capfd: pytest.CaptureFixture[str], monkeypatch: Any) -> Run:
    """Runs `attune doctor` on a recipe of the tiny policy: exit code, what was printed, the JSON that it wrote."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("COLUMNS", "200")

    def run(*overrides: str, **sections: Any) -> tuple[int, str, dict[str, Any]]:
        tree = {"data": {}, "policy": {"model": str(tiny_decoder)}, **sections}
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(tree), encoding="utf-8")
        file = tmp_path / "doctor.json"
        file.unlink(missing_ok=True)
        capfd.readouterr()
        code = run_command(["doctor", str(path), *overrides, "--json", str(file)])
        said = capfd.readouterr()
        return code, said.out + said.err, json.loads(file.read_text()) if file.exists() else {}

    return run


def test_a_recipe_that_fits_says_where_everything_goes(doctor: Run) -> None:
    code, said, figures = doctor()
    assert code == 0, said
    assert (
        {"learner", "rollout", "reward_server", "scoring_worker"} == figures["plan"].keys() == figures["needs"].keys()
    )
    assert "2 x learner, 2 x rollout" in said
    assert all(finding["status"] in ("ok", "note") for finding in figures["findings"])
    for need in figures["needs"].values():
        assert sum(need["items"].values()) >= need["host"] - need["loading"]
    subjects = {finding["subject"] for finding in figures["findings"]}
    assert {"torch", "ray", "deepspeed", "transformers", "Redis", "disk", "memory", "shared memory"} <= subjects


def test_what_does_not_fit_is_exit_3_with_the_number_that_is_missing(doctor: Run, tmp_path: Path) -> None:
    huge = tmp_path / "huge"
    huge.mkdir()
    model = json.loads((ROOT / "recipes/models/cagsr-1.3b.json").read_text())
    (huge / "config.json").write_text(
        json.dumps({**model, "d_model": 8192, "num_layers": 96, "num_decoder_layers": 96})
    )
    code, said, figures = doctor(policy={"model": str(huge)}, learner={"ranks": 1})
    assert code == 3
    memory = next(finding for finding in figures["findings"] if finding["subject"] == "memory")
    assert memory["status"] == "short"
    there = sum(machine["memory"] for machine in figures["machines"])
    together = sum(need["count"] * need["host"] for need in figures["needs"].values())
    assert memory["missing"] >= together - there > 0
    assert f"{memory['missing'] / 1e9:,.1f} GB missing" in said

    code, said, figures = doctor(cluster={"learner_gpus": 1000})
    assert code == 3
    assert "needs 0.25 CPU, 1000 GPU" in said
    assert figures["plan"] == {}


@pytest.mark.parametrize(
    ("overrides", "named"), [(["learner.lrr=1"], "learner.lr"), (["policy.model=/nowhere"], "/nowhere")]
)
def test_a_bad_recipe_is_exit_2(doctor: Run, overrides: list[str], named: str) -> None:
    code, said, _ = doctor(*overrides)
    assert code == 2
    assert named in said


def stream(url: str) -> Config:
    return resolve(
        {"data": {}, "policy": {}, "stream": {"url": url, "connect_timeout_s": 1, "password_env": "SECRET"}}, "test"
    )


def test_redis_is_asked_for_its_version_and_for_what_it_does_when_full(tmp_path: Path, monkeypatch: Any) -> None:
    with EmbeddedRedis(tmp_path / "redis") as server:
        _, _, rest = server.url.partition("://:")
        password, _, address = rest.partition("@")
        monkeypatch.setenv("SECRET", password)
        found = look_at_redis(stream(f"redis://{address}"))
        assert found.status == "ok"
        assert "noeviction" in found.said
        client = redis.Redis.from_url(server.url)
        client.config_set("maxmemory", "64mb")
        client.config_set("maxmemory-policy", "allkeys-lru")
        found = look_at_redis(stream(f"redis://{address}"))
        assert found.status == "broken"
        assert "allkeys-lru" in found.said
        monkeypatch.setenv("SECRET", "wrong")
        found = look_at_redis(stream(f"redis://{address}"))
        assert (found.status, "password" in found.said) == ("broken", True)
    assert look_at_redis(stream(f"redis://{address}")).status == "broken"  # nobody answers any more


def test_a_disk_is_that_of_the_directory_which_will_be_made(tmp_path: Path) -> None:
    assert look_at_disk(tmp_path / "not" / "yet", 1, "commits").status == "ok"
    found = look_at_disk(tmp_path / "not" / "yet", 10**18, "commits")
    assert found.status == "short"
    assert found.missing is not None
    assert found.missing > 10**17


def test_nodes_of_one_machine_share_its_memory_and_gpus_are_held_apart() -> None:
    machine = Machine("a", 8, 10 * GB, (), address="10.0.0.1")
    machines = [machine, replace(machine, name="b"), replace(machine, name="c", address="10.0.0.2", gpus=(8 * GB,))]
    parts = {"learner": Part("learner", 3, 1, 0.5), "rollout": Part("rollout", 1, 1)}
    needs = {
        "learner": Need((Item("states", 3 * GB), Item("process", 4 * GB, "host"))),
        "rollout": Need((Item("process", 1 * GB, "host"),)),
    }
    placed = {"learner": ["a", "b", "c"], "rollout": ["a"]}
    found = list(look_at_memory(machines, parts, needs, placed, joined=True, published=2 * GB))
    first, second, gpu = found
    assert (first.status, second.status, gpu.status) == ("short", "ok", "ok")  # 4 + 4 + 1 + 2 and the driver, of 10
    assert first.missing is not None
    assert 1 * GB < first.missing < 2 * GB
    found = list(
        look_at_memory(
            machines, {**parts, "learner": Part("learner", 3, 1, 0.25)}, needs, placed, joined=True, published=0
        )
    )
    assert found[-1].status == "short"
    assert found[-1].missing == 1 * GB


def test_sizes_that_fit_more_memory_are_larger() -> None:
    here = look_here()
    assert here.memory > GB
    assert here.cpus >= 1
    counts = []
    for memory in (GB, 30 * GB, 300 * GB, 10_000 * GB):
        machine = replace(here, memory=memory, gpus=())
        found = try_sizes(resolve(ladder_tree(machine), "test"), machine)
        counts.append(sum(finding.status == "ok" for finding in found))
    assert counts == sorted(counts)
    assert counts[0] == 0
    assert counts[-1] == len(LADDER)
    # The names say what the shapes are.
    for name in ("0.5 B", "1.5 B", "7 B", "70 B"):
        assert ladder_shape(name).parameters == pytest.approx(float(name.split()[0]) * 1e9, rel=0.15)
    gpus = replace(here, memory=2000 * GB, gpus=(80 * 2**30,) * 8)
    fits = {f.subject: f for f in try_sizes(resolve(ladder_tree(gpus), "test"), gpus)}
    assert fits["7 B"].status == "ok"
    assert "GPU memory of a" in fits["70 B"].said
    one = replace(here, gpus=(8 * 2**30,))  # half of it each: the smallest still fits
    fits = {f.subject: f for f in try_sizes(resolve(ladder_tree(one), "test"), one)}
    assert fits["5 M (the quickstart)"].status != "short"
    assert fits["7 B"].status == "short"


def test_without_a_recipe_the_machine_is_looked_at(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    file = tmp_path / "machine.json"
    code = run_command(["doctor", "--json", str(file)])
    said = capfd.readouterr().out
    figures = json.loads(file.read_text())
    assert code == 0, said
    assert len(figures["sizes"]) == len(LADDER)
    assert any(finding["status"] == "short" for finding in figures["sizes"])  # 70 B
    assert "missing" in said


def test_the_same_report_for_a_program_and_for_a_person(tiny_decoder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    report = examine(resolve({"data": {}, "policy": {"model": str(tiny_decoder)}}, "test"), tmp_path)
    assert report.exit_code == 0
    assert not report.joined
