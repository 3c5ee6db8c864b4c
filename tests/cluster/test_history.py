"""What a run goes on from: the newest valid commit, a recipe that may go on with it, and a growing incarnation."""

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.commits import commit_failures
from cluster.config import Config
from cluster.evaluation_config import EvaluationSection
from cluster.files import read_jsonl
from cluster.history import History, Steps, begin_incarnation, open_history
from cluster.recipe import resolve, save_resolved
from cluster.run_dir import RunDir
from learner.commit import begin_checkpoint, commit_checkpoint
from services.errors import UserError
from services.records import Failure

TREE: dict[str, Any] = {
    "run": {"seed": 3, "groups_per_step": 2},
    "data": {"source": "prompts.jsonl"},
    "policy": {"model": "models/start"},
    "rollout": {"samples": 4},
}


def recipe(**sections: dict[str, Any]) -> Config:
    return resolve({**TREE, **{name: {**TREE.get(name, {}), **keys} for name, keys in sections.items()}}, "test")


@pytest.fixture
def run(tmp_path: Path) -> RunDir:
    run = RunDir(tmp_path / "run")
    run.path.mkdir()
    return run


def start(run: RunDir, config: Config, resume: str = "auto", run_id: str = "new") -> History:
    """As the driver: history first, then the recipe and the start are written down."""
    history = open_history(run, config, resume, run_id)
    save_resolved(config, run.config)
    run.event("start", run_id=history.run_id, incarnation=history.incarnation, step=history.steps_done)
    return history


def step(history: History) -> None:
    number = history.steps_done
    history.steps[number] = [f"0:p{2 * number}", f"0:p{2 * number + 1}"]


def commit(run: RunDir, history: History) -> Path:
    partial = begin_checkpoint(run.path, history.steps_done)
    (partial / "engine").mkdir()
    (partial / "engine" / "rank0.pt").write_bytes(b"weights" * 100)
    return commit_checkpoint(partial, history.manifest())


def kinds(run: RunDir) -> list[str]:
    return [event["event"] for event in read_jsonl(run.events)]


# ---- what it goes on from


@pytest.mark.parametrize("resume", ["auto", "never"])
def test_an_empty_directory_is_a_new_run(run: RunDir, resume: str) -> None:
    history = open_history(run, recipe(), resume, "abc")
    assert history == History(run_id="abc", incarnation=1)
    assert (history.steps_done, history.committed_steps, history.checkpoint) == (0, 0, None)
    assert list(run.path.iterdir()) == []


def test_a_commit_holds_all_that_came_before_it(run: RunDir) -> None:
    first = start(run, recipe(), run_id="abc")
    step(first)
    first.failed["0:p9"] = Failure(kind="data", code="prompt_refused", message="zu lang")
    first.best = {"value": 0.75, "step": 0}
    commit(run, first)
    step(first)
    path = commit(run, first)
    step(first)  # not committed
    second = start(run, recipe(), run_id="another")
    assert second.run_id == "abc"
    assert second.incarnation == 2
    assert second.steps == {0: ["0:p0", "0:p1"], 1: ["0:p2", "0:p3"]}
    assert (second.steps_done, second.committed_steps, second.checkpoint) == (2, 2, path)
    assert second.failed == first.failed
    assert second.best == first.best


def test_the_incarnation_grows_at_every_start_also_without_a_commit(run: RunDir) -> None:
    assert [start(run, recipe()).incarnation for _ in range(3)] == [1, 2, 3]
    assert open_history(run, recipe(), "auto", "x").incarnation == 4
    assert open_history(run, recipe(), "auto", "x").incarnation == 4  # asking is not starting


def test_an_older_commit_can_be_asked_for(run: RunDir) -> None:
    first = start(run, recipe())
    paths = []
    for _ in range(3):
        step(first)
        paths.append(commit(run, first))
    history = open_history(run, recipe(), str(paths[1]), "x")
    assert history.steps_done == history.committed_steps == 2
    assert history.incarnation == 2


@pytest.mark.parametrize("damage", ["short", "flipped", "gone", "manifest", "uncommitted"])
def test_a_damaged_commit_is_passed_over_and_reported(run: RunDir, damage: str) -> None:
    first = start(run, recipe())
    step(first)
    sound = commit(run, first)
    step(first)
    newest = commit(run, first)
    file = newest / "engine" / "rank0.pt"
    if damage == "short":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "flipped":
        file.write_bytes(b"W" + file.read_bytes()[1:])
    elif damage == "gone":
        file.unlink()
    elif damage == "manifest":
        manifest = newest / "manifest.json"
        manifest.write_text(manifest.read_text().replace("0:p2", "0:p7"))
    else:
        (newest / "COMMITTED").unlink()
    history = start(run, recipe())
    assert history.checkpoint == sound
    assert history.steps == {0: ["0:p0", "0:p1"]}
    refused = [event for event in read_jsonl(run.events) if event["event"] == "checkpoint_refused"]
    assert len(refused) == 1
    assert str(newest) in refused[0]["problem"]
    # Asked for by name it is the user's to know.
    with pytest.raises(UserError, match="step_2 is"):
        open_history(run, recipe(), str(newest), "x")


def test_without_a_sound_commit_nothing_is_begun_over_it(run: RunDir) -> None:
    first = start(run, recipe(), run_id="abc")
    step(first)
    (commit(run, first) / "COMMITTED").unlink()
    with pytest.raises(UserError, match=r"no commit of .* can be used: .*step_1 is not a committed checkpoint"):
        open_history(run, recipe(), "auto", "abc")


class Killed(BaseException):
    """Stands for the end of the process: nothing catches it."""


def test_going_back_can_be_cut_off_before_the_lines_are_removed(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """The next start goes on from the commit that was asked for, not from a later one that has lost its lines."""
    first = start(run, recipe())
    paths: list[Path] = []
    for number in range(4):
        step(first)
        run.write_metrics(number, {"reward/mean": 0.0})
        paths.append(commit(run, first))

    def cut_off(_steps: int) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(run, "cut_back", cut_off)
        with pytest.raises(Killed):
            begin_incarnation(run, open_history(run, recipe(), str(paths[1]), "x"), {})
    history = open_history(run, recipe(), "auto", "x")
    assert history.checkpoint == paths[1]
    begin_incarnation(run, history, {})
    assert [row["step"] for row in read_jsonl(run.metrics)] == [0, 1]
    assert sorted(path.name for path in run.checkpoints.iterdir()) == [
        "step_1",
        "step_2",
        "step_3.aside",
        "step_4.aside",
    ]


def test_later_commits_are_set_aside_newest_first(run: RunDir, monkeypatch: pytest.MonkeyPatch) -> None:
    """So that a start which is cut off among them stands at the newest that is left, all steps before it in place."""
    first = start(run, recipe())
    for _ in range(4):
        step(first)
        commit(run, first)
    rename, renamed = Path.rename, list[str]()

    def one(self: Path, target: Path) -> Path:
        if renamed:
            raise Killed
        renamed.append(self.name)
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", one)
    with pytest.raises(Killed):
        begin_incarnation(run, open_history(run, recipe(), str(run.checkpoints / "step_1"), "x"), {})
    assert renamed == ["step_4"]
    assert open_history(run, recipe(), "auto", "x").steps_done == 3


# ---- what failed after the last commit


def lose_one(history: History) -> None:
    history.failed["0:p9"] = Failure(kind="data", code="prompt_refused", message="zu lang")


def test_what_failed_after_the_last_step_is_in_its_commit(run: RunDir) -> None:
    first = start(run, recipe())
    step(first)
    commit(run, first)
    resumed = start(run, recipe())
    lose_one(resumed)
    commit_failures(run, resumed)
    commit_failures(run, resumed)
    again = open_history(run, recipe(), "auto", "x")
    assert (again.steps, again.failed) == (first.steps, resumed.failed)
    assert kinds(run) == ["start", "start", "failures_committed"]
    none = History("x", 1)
    lose_one(none)
    commit_failures(run, none)  # no step was trained: there is nothing to put it in


@pytest.mark.parametrize("writes", range(5))
def test_a_commit_that_is_given_failures_is_valid_wherever_it_is_cut_off(
    run: RunDir, monkeypatch: pytest.MonkeyPatch, writes: int
) -> None:
    """The manifest stands beside its place, and COMMITTED before and after it: five moments to be killed at."""
    first = start(run, recipe())
    step(first)
    path = commit(run, first)
    resumed = start(run, recipe())
    lose_one(resumed)
    left = [writes]

    def counted(act: Any) -> Any:
        def perform(self: Path, *arguments: Any) -> Any:
            if left[0] == 0:
                raise Killed
            left[0] -= 1
            return act(self, *arguments)

        return perform

    with monkeypatch.context() as patched:
        patched.setattr(Path, "write_text", counted(Path.write_text))
        patched.setattr(Path, "replace", counted(Path.replace))
        with pytest.raises(Killed):
            commit_failures(run, resumed)
    again = open_history(run, recipe(), "auto", "x")
    assert again.checkpoint == path
    assert again.failed == (resumed.failed if writes >= 3 else {})
    lose_one(again)
    again.committed_failures = 0
    commit_failures(run, again)
    assert open_history(run, recipe(), "auto", "x").failed == resumed.failed
    assert len((path / "COMMITTED").read_text().split()) == 1


# ---- what is refused


def test_never_refuses_a_run_that_is_there(run: RunDir) -> None:
    start(run, recipe())
    with pytest.raises(UserError, match=r"holds a run already; --resume auto goes on with it"):
        open_history(run, recipe(), "never", "x")


def test_a_checkpoint_of_another_run_is_refused(run: RunDir, tmp_path: Path) -> None:
    other = RunDir(tmp_path / "other")
    other.path.mkdir()
    theirs = start(other, recipe())
    step(theirs)
    path = commit(other, theirs)
    with pytest.raises(UserError, match=r"is no checkpoint of the run in .*/run; give --run-dir too"):
        open_history(run, recipe(), str(path), "x")


def test_a_path_that_is_no_checkpoint_is_refused(run: RunDir) -> None:
    for path in (run.path, run.path / "checkpoints" / "step_4", "newest"):
        with pytest.raises(UserError, match="is not a checkpoint"):
            open_history(run, recipe(), str(path), "x")


@pytest.mark.parametrize(
    ("sections", "said"),
    [
        ({"run": {"seed": 4}}, "run.seed: .* was started with 3, the recipe now says 4"),
        ({"run": {"groups_per_step": 8}}, "run.groups_per_step: .* was started with 2, the recipe now says 8"),
        ({"rollout": {"samples": 2}}, "rollout.samples: .* was started with 4, the recipe now says 2"),
        ({"rollout": {"temperature": 0.5}}, "rollout.temperature: .* started with 1.0, the recipe now says 0.5"),
        ({"learner": {"advantage": "grpo"}}, "learner: .* with value function '.*', the recipe now asks for 'none'"),
        ({"data": {"limit": 9}}, "data: "),
        ({"data": {"template_options": {"day": "1"}}}, "data: "),
        ({"policy": {"model": "models/other"}}, "policy: .*models/start.*models/other"),
    ],
)
def test_what_a_resumed_run_may_not_change(run: RunDir, sections: dict[str, dict[str, Any]], said: str) -> None:
    start(run, recipe())
    before = run.events.read_bytes()
    with pytest.raises(UserError, match=f"{said}.*") as caught:
        open_history(run, recipe(**sections), "auto", "x")
    assert "cannot change it: choose another run directory" in str(caught.value)
    assert run.events.read_bytes() == before


def test_what_it_may_change_is_written_down(run: RunDir) -> None:
    start(run, recipe())
    changed = recipe(
        learner={"lr": 3e-5, "kl": {"coef": 0.3}},
        run={"steps": 100},
        reward={"sources": {"length": {"kind": "length"}}},
        cluster={"batch_s": 5},
    )
    open_history(run, changed, "auto", "x")
    event = list(read_jsonl(run.events))[-1]
    assert event["event"] == "recipe_changed"
    keys = set(event["keys"])
    assert {"learner.lr", "learner.kl.coef", "run.steps", "cluster.batch_s"} <= keys
    assert {key.rsplit(".", 1)[0] for key in keys if key.startswith("reward")} == {"reward.sources"}
    start(run, changed)
    open_history(run, changed, "auto", "x")
    assert kinds(run) == ["start", "recipe_changed", "recipe_changed", "start"]


def test_the_same_recipe_changes_nothing(run: RunDir) -> None:
    config = recipe(reward={"sources": {"attention": {"kind": "attention", "preset": "comparable"}}})
    start(run, config)
    start(run, config)
    assert kinds(run) == ["start", "start"]


def test_the_manifest_is_json_that_says_what_it_holds(run: RunDir) -> None:
    history = start(run, recipe(), run_id="abc")
    step(history)
    manifest = json.loads((commit(run, history) / "manifest.json").read_text())
    assert {key: manifest[key] for key in ("schema_version", "run_id", "incarnation", "step", "steps", "failed")} == {
        "schema_version": 1,
        "run_id": "abc",
        "incarnation": 1,
        "step": 1,
        "steps": {"0": ["0:p0", "0:p1"]},
        "failed": {},
    }
    assert list(manifest["files"]) == ["engine/rank0.pt"]


def test_steps_are_what_was_put_in_and_follow_each_other() -> None:
    steps = Steps({1: ["0:b"], 0: ['0:a \n"é', "0:c"]})
    steps[2] = []
    assert steps == {0: ['0:a \n"é', "0:c"], 1: ["0:b"], 2: []}
    assert (len(steps), steps.groups, list(steps)) == (3, 3, [0, 1, 2])
    for missing in (-1, 3):
        with pytest.raises(KeyError):
            steps[missing]
    for step in (1, 4):
        with pytest.raises(ValueError, match="does not follow"):
            steps[step] = ["0:d"]
    steps.forget_from(3)
    assert len(steps) == 3
    steps.forget_from(1)
    assert (steps, steps.groups) == ({0: ['0:a \n"é', "0:c"]}, 2)
    steps[1] = ["0:b"]
    assert steps.groups == 3


def test_figures_of_different_measures_are_not_compared(run: RunDir) -> None:
    history = start(run, recipe())
    assert history.best_by("the max of greedy/reward") == (None, None)
    history.best = {"step": 3, "value": 0.3, "measure": "the max of greedy/reward"}
    assert history.best_by("the max of greedy/reward") == (0.3, None)
    best, why = history.best_by("the min of greedy/perplexity")
    assert best is None
    assert (
        why == "it was chosen by the max of greedy/reward, and the recipe now chooses by the min of greedy/perplexity"
    )
    history.best = {"step": 3, "value": 0.3}  # of an older version
    assert history.best_by("the max of greedy/reward") == (0.3, None)
    sections = [EvaluationSection(), EvaluationSection(best_goal="min"), EvaluationSection(split="test", prompts=7)]
    assert len({section.measure for section in sections}) == 3
