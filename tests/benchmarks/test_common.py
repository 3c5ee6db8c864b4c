import json
import math

import pytest

from benchmarks.common import Options, commit, finish, machine, parse_options


def test_the_last_line_is_one_json_object_and_out_holds_the_same(capsys, tmp_path):
    out = tmp_path / "new" / "result.json"
    finish("ledger", Options(quick=False, out=out), {"throughput_ratio": 1.25, "samples": 3})
    last = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert set(last) == {"benchmark", "commit", "machine", "results"}
    assert last["results"] == {"throughput_ratio": 1.25, "samples": 3}
    assert last["benchmark"] == "ledger"
    assert json.loads(out.read_text()) == last


def test_a_quick_result_says_so(capsys):
    finish("ledger", Options(quick=True, out=None), {"throughput_ratio": 1.0})
    assert json.loads(capsys.readouterr().out.strip().splitlines()[-1])["quick"] is True


def test_a_figure_that_is_not_finite_is_no_result():
    with pytest.raises(ValueError, match=r"benchmark ledger\.parts: ratio is nan"):
        finish("ledger", Options(quick=False, out=None), {"parts": {"ratio": math.nan}})


def test_options_and_what_the_machine_is():
    assert parse_options("ledger", "text", ["--quick", "--out", "a.json"]).quick
    assert machine()["cores"] >= 1
    assert machine()["packages"]
    assert commit()
