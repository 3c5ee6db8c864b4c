"""What docs/monitoring.md says of Ray's dashboard is so in the Ray that is installed: its second tab shows a dashboard
of Grafana's that the environment names, and hands over variables that ours have."""

import json
import os
import subprocess
import sys
from pathlib import Path

import ray

ROOT = Path(__file__).resolve().parents[2]
ASK = """
from ray.dashboard.modules.metrics.grafana_dashboard_factory import generate_data_grafana_dashboard
content, uid = generate_data_grafana_dashboard()
print(uid)
"""


def test_the_tab_shows_the_dashboard_that_the_variable_names() -> None:
    told = subprocess.run(
        [sys.executable, "-c", ASK],
        env={**os.environ, "RAY_GRAFANA_DATA_DASHBOARD_UID": "attune-training"},
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    assert told.stdout.split()[-1] == "attune-training"


def test_the_page_hands_over_variables_that_our_dashboards_have() -> None:
    (page,) = (Path(ray.__file__).parent / "dashboard" / "client" / "build" / "static" / "js").glob("main.*.js")
    text = page.read_text(encoding="utf-8")
    assert '"data"===' in text  # the tab that takes the uid of Ray Data
    assert "kiosk" in text
    board = json.loads((ROOT / "deploy" / "grafana" / "attune-training.json").read_text(encoding="utf-8"))
    names = {each["name"] for each in board["templating"]["list"]}
    for handed in ("SessionName", "datasource"):
        assert f'"var-{handed}"' in text
        assert handed in names
