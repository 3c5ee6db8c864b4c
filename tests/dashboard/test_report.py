"""The report: whole without scripts, safe with them in the run's texts."""

import re
from html.parser import HTMLParser
from pathlib import Path

import pytest

from services.dashboard.report import write_report
from services.dashboard.svg import bars_svg, curve_svg
from services.errors import UserError
from tests.dashboard.scene import HOSTILE, SAMPLES, Scene, rows_of, write_rows


class Elements(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.said = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.said += data


@pytest.fixture(scope="module")
def page(finished: Path, tmp_path_factory: pytest.TempPathFactory) -> str:
    out = tmp_path_factory.mktemp("out") / "report.html"
    assert write_report(finished / "done", out) == out.stat().st_size
    return out.read_text(encoding="utf-8")


def test_it_is_one_file_that_loads_and_runs_nothing(page: str) -> None:
    elements = Elements(page)
    assert not {tag for tag, _ in elements.tags} & {"script", "img", "link", "iframe", "object", "form"}
    for tag, attributes in elements.tags:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "href")], tag
    policy = next(attributes["content"] for tag, attributes in elements.tags if attributes.get("http-equiv"))
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "script-src" not in policy
    assert "http://" not in page
    assert "https://" not in page


def test_it_has_the_curves_the_tables_and_pictures_of_samples(page: str) -> None:
    elements = Elements(page)
    labels = [attributes.get("aria-label") or "" for tag, attributes in elements.tags if tag == "svg"]
    assert any(label.startswith("reward/mean: ") and "at step 11" in label for label in labels)
    assert any(label.startswith("Histogram of judge") for label in labels)
    for said in ("judge_unclear", "rollout died", "The better answer is true.", "highest reward", "kl/reference"):
        assert said in elements.said
    shades = re.findall(r'style="--t:(\d+)%"', page)
    assert len(set(shades)) > 3, "tokens are coloured by their figures"
    assert "<span class=s" in page, "salient tokens are marked"


def test_markup_of_the_run_is_text_in_it(page: str) -> None:
    assert HOSTILE in Elements(page).said
    assert "<script" not in page


def test_markup_where_a_number_belongs_is_text_too(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "run")
    scene.step()
    shard = scene.run.samples / "step_000000.jsonl"
    reward = {"status": "ok", "value": HOSTILE}
    write_rows(shard, ({**row, "step": HOSTILE, "reward": reward, "advantage": HOSTILE} for row in rows_of(shard)))
    out = tmp_path / "report.html"
    write_report(scene.run.path, out)
    written = out.read_text(encoding="utf-8")
    assert f"step {HOSTILE}, " in Elements(written).said
    assert "<script" not in written


def test_a_run_without_steps_and_one_that_goes_on_have_a_report_too(tmp_path: Path) -> None:
    scene = Scene(tmp_path / "run")
    out = tmp_path / "report.html"
    write_report(scene.run.path, out)
    assert "no step yet" in out.read_text()
    scene.step()
    write_report(scene.run.path, out)
    assert out.read_text().count("<article>") <= SAMPLES
    assert "Ids in place of pieces" in out.read_text()


def test_what_is_no_run_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no run directory"):
        write_report(tmp_path, tmp_path / "out.html")
    scene = Scene(tmp_path / "run")
    with pytest.raises(UserError, match="cannot be written"):
        write_report(scene.run.path, tmp_path / "nowhere" / "out.html")


def test_a_curve_that_stands_still_or_is_a_point_can_be_drawn() -> None:
    for values in ([0.0], [2.0, 2.0], [1.0, -1.0, 3.0]):
        curve = {"width": 1, "step": list(range(len(values))), "mean": values}
        assert "nan" not in curve_svg(curve, spread=None, steps=len(values), marks=[0, 99], title="<a>")
        assert "<a>" not in curve_svg(curve, spread=None, steps=len(values), marks=[], title="<a>")
    assert bars_svg({"count": 0}, "x") == ""
