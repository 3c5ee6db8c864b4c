"""The index follows the files of a run: what grows, what is cut back, what was made anew."""

import json
import math
import random
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from services.dashboard import curves, queries
from services.dashboard.index import Index, preview_lines
from services.dashboard.layout import RunFiles, encoded, find_runs, is_run, last_lines, state_of
from services.dashboard.queries import Filter, search_text
from services.dashboard.tail import Place, read_news
from services.dashboard.tokens import map_rows, pieces_of, read_rows
from services.errors import UserError
from tests.dashboard.scene import SAMPLES, Scene, rows_of, write_rows


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path / "run")


Opened = Callable[[], Index]


@pytest.fixture
def opened(scene: Scene, tmp_path: Path) -> Opened:
    (tmp_path / "cache").mkdir()
    return lambda: Index(RunFiles("run", scene.run.path), tmp_path / "cache")


def follow(index: Index) -> None:
    while index.catch_up(5.0).more:
        pass


def values(index: Index, name: str) -> list[float]:
    with closing(index_reader(index)) as database:
        column = curves.column(database, name, 0, index.reached.steps)
        return [] if column is None else column.tolist()


def index_reader(index: Index) -> Any:
    import sqlite3

    return sqlite3.connect(index.path)


def found(index: Index, wanted: Filter | None = None) -> list[dict[str, Any]]:
    with closing(index_reader(index)) as database:
        return queries.page(database, wanted or Filter(), "oldest", 0, 200)["rows"]


def expected(scene: Scene, name: str) -> list[float]:
    return [json.loads(line)[name] for line in scene.run.metrics.read_text().splitlines()]


def test_it_grows_with_the_run_and_goes_on_where_it_was(scene: Scene, opened: Opened) -> None:
    for _ in range(3):
        scene.step()
    index = opened()
    follow(index)
    assert values(index, "kl/reference") == expected(scene, "kl/reference")
    assert len(found(index)) == 3 * SAMPLES
    index.close()
    scene.step()
    again = opened()
    change = again.catch_up(5.0)
    assert [row["step"] for row in change.steps] == [3], "what was read before is not read again"
    assert len(found(again)) == 4 * SAMPLES


def test_a_line_that_is_being_written_waits_for_its_end(scene: Scene, opened: Opened) -> None:
    scene.step()
    index = opened()
    follow(index)
    with scene.run.metrics.open("a") as file:
        file.write('{"step": 1, "reward/mean": 7')
        file.flush()
        follow(index)
        assert index.reached.steps == 1
        file.write("}\n")
    follow(index)
    assert values(index, "reward/mean")[1] == 7


def test_a_cut_back_run_is_seen_also_where_it_has_grown_past_its_old_length(scene: Scene, opened: Opened) -> None:
    for _ in range(6):
        scene.step()
    index = opened()
    follow(index)
    scene.back_to(2)
    for _ in range(8):
        scene.step(response="made again")
    follow(index)
    assert values(index, "reward/mean") == expected(scene, "reward/mean")
    rows = found(index)
    assert [row["step"] for row in rows] == [step for step in range(10) for _ in range(SAMPLES)]
    assert {row["response"] for row in rows if row["step"] >= 2} == {"made again"}
    assert "made again" not in {row["response"] for row in rows if row["step"] < 2}
    assert len(found(index, Filter(text="made again"))) == 8 * SAMPLES


def test_a_cut_back_run_that_is_shorter_now_forgets_the_rest(scene: Scene, opened: Opened) -> None:
    for _ in range(5):
        scene.step()
    index = opened()
    follow(index)
    scene.back_to(2)
    change = index.catch_up(5.0)
    follow(index)
    assert change.cut
    assert index.reached.steps == 2
    assert len(found(index)) == 2 * SAMPLES
    with closing(index_reader(index)) as database:
        assert queries.events(database, "mark", 10)[-1]["data"]["incarnation"] == 2


def test_a_run_that_was_made_anew_at_the_same_place_is_another_one(
    scene: Scene, opened: Opened, tmp_path: Path
) -> None:
    scene.step()
    index = opened()
    follow(index)
    index.close()
    scene.run.unlock()
    scene.run.path.rename(tmp_path / "old")
    fresh = Scene(tmp_path / "run", seed=1)
    fresh.step(response="of the new one")
    again = opened()
    follow(again)
    assert {row["response"] for row in found(again)} == {"of the new one"}


def test_a_damaged_line_is_counted_and_passed_over(scene: Scene, opened: Opened) -> None:
    scene.step()
    with scene.run.metrics.open("a") as file:
        file.write("no row\n[1, 2]\n")
        file.write(json.dumps({"step": 10**12}) + "\n")
    scene.step()
    index = opened()
    follow(index)
    assert index.reached.damaged == 3
    assert len(values(index, "reward/mean")) == 2


def test_lines_of_a_shard_that_are_no_samples_are_counted_and_the_rest_is_read(scene: Scene, opened: Opened) -> None:
    scene.step()
    shard = scene.run.samples / "step_000000.jsonl"
    whole = shard.read_text().splitlines()
    strange = [
        "no JSON",
        '{"sample_id": 7}',
        '{"sample_id": "a", "scores": [1]}',
        '{"sample_id": "b", "policy_versions": [3]}',
        '{"sample_id": "\\ud83d"}',
        '{"sample_id": "c", "group_id": "\\ud83d"}',
        '{"sample_id": "d", "flags": ["\\ud83d"]}',
        '{"sample_id": "e", "scores": {"\\ud83d": {"status": "ok", "value": 1}}}',
        '{"sample_id": "f", "reward": {"status": "failed", "error": {"code": "\\ud83d"}}}',
        '{"sample_id": "half", "response": "half \\ud83d sign", "advantage": NaN, '
        '"reward": {"status": "ok", "value": "x"}}',
    ]
    shard.write_text("".join(line + "\n" for line in [*strange, *whole]) + '{"sample_id": "torn"')
    index = opened()
    follow(index)
    assert index.reached.damaged == 10
    rows = found(index)
    assert rows[0]["sample_id"] == "half"
    assert len(rows) == 1 + SAMPLES
    assert (rows[0]["response"], rows[0]["advantage"], rows[0]["reward"]) == ("half ? sign", None, None)
    with closing(index_reader(index)) as database:
        step, place, length = queries.place_of_sample(database, rows[-1]["sample_id"], None) or (0, 0, 0)
    assert read_rows(index.run, [(step, place, length)])[0]["sample_id"] == rows[-1]["sample_id"]


def test_what_is_no_number_is_null_for_a_browser_and_text_stays_text() -> None:
    said = {"text": "NaN is NaN", "value": math.nan, "all": [math.inf, 1.5, (None, "Infinity")]}
    assert json.loads(encoded(said)) == {"text": "NaN is NaN", "value": None, "all": [None, 1.5, [None, "Infinity"]]}
    assert json.loads(encoded({"a": "\ud83d"}))["a"] == "?"


def test_filters_and_search(scene: Scene, opened: Opened) -> None:
    for _ in range(6):
        scene.step()
    scene.step(response='a "quoted" AND (odd) response*')
    index = opened()
    follow(index)
    assert len(found(index, Filter(text='"larger than Quito"'))) == 2 * SAMPLES
    assert len(found(index, Filter(text="quoted AND odd"))) == SAMPLES, "AND is a word here"
    assert found(index, Filter(text='") OR 1 --')) == []
    assert {row["finish"] for row in found(index, Filter(finish="length"))} == {"length"}
    assert len(found(index, Filter(flag="judge_inconsistent"))) == 7
    assert {row["scores"]["judge"]["code"] for row in found(index, Filter(failed="judge"))} == {"judge_unclear"}
    assert {row["step"] for row in found(index, Filter(step_from=2, step_to=3))} == {2, 3}
    ranged = found(index, Filter(source="", low=0.0, high=0.5))
    assert all(0 <= row["reward"] < 0.5 for row in ranged)
    assert len(ranged) == sum(0 <= row["reward"] < 0.5 for row in found(index))
    assert len(found(index, Filter(has_map=True))) == 7 * 2


def test_a_histograms_counts_are_those_of_its_samples(scene: Scene, opened: Opened) -> None:
    for _ in range(8):
        scene.step()
    index = opened()
    follow(index)
    with closing(index_reader(index)) as database:
        for low, high in ((None, None), (2, 5)):
            drawn = queries.histogram(database, "judge", 7, low, high)
            edges = [*drawn["edges"][:-1], None]
            for i, count in enumerate(drawn["counts"]):
                wanted = Filter(source="judge", low=edges[i], high=edges[i + 1], step_from=low, step_to=high)
                assert queries.page(database, wanted, "newest", 0, 200)["total"] == count
            assert drawn["failed"] == (8 if low is None else 4)
        assert queries.histogram(database, "nobody", 7, None, None)["count"] == 0


SPREAD = [random.Random(5).gauss(0, 1) for _ in range(500)]


@pytest.mark.parametrize(
    "scores",
    [
        list(range(19)),
        SPREAD,
        [0.1 * number for number in range(100)],
        [1e16 + 2 * number for number in range(9)],
        [5e-324 * number for number in range(11)],
        [-1.7e308, -1.0, 0.1, 1.7e308],
    ],
    ids=["whole", "spread", "tenths", "large", "least", "widest"],
)
def test_a_bar_counts_what_its_link_selects(scene: Scene, opened: Opened, scores: list[float]) -> None:
    scene.step()
    shard = scene.run.samples / "step_000000.jsonl"
    row = rows_of(shard)[0]
    given = [{"status": "ok", "value": float(score)} for score in scores]
    write_rows(shard, ({**row, "sample_id": f"{n}", "reward": score, "scores": {"judge": score}}
                       for n, score in enumerate(given)))  # fmt: skip
    index = opened()
    follow(index)
    with closing(index_reader(index)) as database:
        for source in ("", "judge"):
            for bins in (1, 14, 40):
                drawn = queries.histogram(database, source, bins, None, None)
                assert sum(drawn["counts"]) == len(scores)
                ends = [*drawn["edges"][1:-1], None]
                for low, high, count in zip(drawn["edges"], ends, drawn["counts"], strict=False):
                    wanted = Filter(source=source, low=low, high=high)
                    assert queries.page(database, wanted, "newest", 0, 1)["total"] == count


def test_curves_keep_their_extremes_at_any_width(scene: Scene, opened: Opened) -> None:
    with scene.run.metrics.open("a") as file:
        for step in range(3000):
            file.write(json.dumps({"step": step, "a": float(step % 7), "b": 99.0 if step == 1234 else 0.0}) + "\n")
    index = opened()
    follow(index)
    with closing(index_reader(index)) as database:
        column = curves.column(database, "b", 0, 3000)
        assert column is not None
        assert max(curves.drawn(column, 0, 50)["max"]) == 99
        part = curves.column(database, "a", 700, 710)
        assert part is not None
        assert curves.drawn(part, 700, 50) == {
            "width": 1,
            "step": list(range(700, 710)),
            "mean": [float(step % 7) for step in range(700, 710)],
        }
        assert curves.column(database, "c", 0, 10) is None
    rows = preview_lines(scene.run.metrics)
    assert 100 < len(rows) <= 600
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})


def test_failures_have_their_reasons(scene: Scene, opened: Opened) -> None:
    scene.step()
    index = opened()
    follow(index)
    with closing(index_reader(index)) as database:
        (failure,) = queries.failures(database)
        verdicts = queries.verdicts(database, "judge", 10, 0, "")
        assert len(queries.verdicts(database, "judge", 10, 0, "inconsistent")["rows"]) == 1
    assert (failure["source"], failure["code"], failure["count"]) == ("judge", "judge_unclear", 1)
    assert verdicts["count"] == SAMPLES - 1
    assert verdicts["consistent"] == pytest.approx(2 / 3)


def test_a_count_of_failures_is_that_of_the_samples_which_failed_so(scene: Scene, opened: Opened) -> None:
    scene.step()
    shard = scene.run.samples / "step_000000.jsonl"
    codes = [("x", "y"), ("y", "x"), ("y", "y"), ("y", None)]
    failed = {code: {"status": "failed", "error": {"kind": "data", "code": code, "message": ""}} for code in "xy"}
    whole = {"status": "ok", "value": 1.0}
    write_rows(shard, ({**row, "scores": {"a": failed.get(a, whole), "b": failed.get(b, whole)}}
                       for row, (a, b) in zip(rows_of(shard), codes, strict=True)))  # fmt: skip
    index = opened()
    follow(index)
    with closing(index_reader(index)) as database:
        counted = {(one["source"], one["code"]): one["count"] for one in queries.failures(database)}
    assert counted == {("a", "x"): 1, ("a", "y"): 3, ("b", "x"): 1, ("b", "y"): 2}
    for (source, code), count in counted.items():
        assert len(found(index, Filter(failed=source, code=code))) == count
    assert len(found(index, Filter(failed="b"))) == 3
    assert len(found(index, Filter(code="x"))) == 2


def test_a_map_is_read_in_parts_and_only_from_among_the_runs_maps(scene: Scene) -> None:
    scene.step()
    run = RunFiles("run", scene.run.path)
    row = json.loads(scene.run.samples.joinpath("step_000000.jsonl").read_text().splitlines()[0])
    attention = scene.attention(len(row["prompt_ids"]), len(row["response_ids"]), True)
    part = map_rows(run, row, 3, 5)
    assert part is not None
    assert part[:2] == (2, len(row["prompt_ids"]))
    import numpy as np

    assert attention.map is not None
    np.testing.assert_allclose(np.frombuffer(part[2], "<f4").reshape(2, -1), np.array(attention.map[3:5]), rtol=1e-6)
    for name in ("../../outside.safetensors", "/etc/passwd", "samples/step_000000.jsonl"):
        with pytest.raises(ValueError, match="outside of the run's maps"):
            map_rows(run, {"attention": {"map_ref": name}}, 0, 1)
    assert map_rows(run, {"attention": {"map_ref": "samples/maps/gone.safetensors"}}, 0, 1) is None
    assert read_rows(run, [(99, 0, 10)]) == []


def test_pieces_add_up_to_the_text_also_where_a_sign_is_spread_over_tokens() -> None:
    text = "a né 漢字 🙂 b"

    def decode(ids: Any) -> str:
        return bytes(ids).decode(errors="replace")

    pieces = pieces_of(list(text.encode()), decode)
    assert "".join(pieces) == text
    assert len(pieces) == len(text.encode())
    broken = pieces_of([97, 0xF0, 0x9F, 98], decode)
    assert "".join(broken).startswith("a")
    assert broken[-1].endswith("b")


def test_what_is_a_run_and_how_it_stands(scene: Scene, tmp_path: Path) -> None:
    scene.step()
    assert is_run(scene.run.path)
    assert [run.name for run in find_runs(tmp_path)] == ["run"]
    assert find_runs(scene.run.path)[0].path == scene.run.path
    with pytest.raises(UserError, match="no directory"):
        find_runs(tmp_path / "nowhere")
    events = last_lines(scene.run.events, 10)
    assert state_of(events, None) == "unknown"
    assert state_of(events, {"age_s": 1.0}) == "running"
    assert state_of(events, {"age_s": 100.0}) == "silent"
    assert state_of([*events, {"event": "ended"}], {"age_s": 1.0}) == "failed"
    assert state_of([*events, {"event": "finished"}, {"event": "start"}], {"age_s": 1.0}) == "running"


def test_a_tail_reads_a_long_file_in_parts(tmp_path: Path) -> None:
    path = tmp_path / "file"
    lines = [f"line {number}" for number in range(1000)]
    path.write_text("".join(line + "\n" for line in lines))
    place, found_lines = Place(), []
    for _ in range(1000):
        news = read_news(path, place, chunk=100)
        found_lines += [line.decode() for line in news.lines]
        place = news.place
        if not news.more:
            break
    assert found_lines == lines
    path.unlink()
    gone = read_news(path, place)
    assert gone.cut
    assert gone.place == Place()


def test_what_is_typed_is_no_language() -> None:
    assert search_text("") == '""'
    assert search_text("one tw") == '"one" "tw"*'
    assert search_text('"one two"') == '"one two"'
    assert search_text("NEAR(a) *") == '"NEAR(a)"*'
    assert search_text('one\0two "th\0ree"') == '"one" "two" "th ree"'
