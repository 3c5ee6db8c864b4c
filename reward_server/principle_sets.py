"""The sets of principles that come with the server: `rl`, `training`, and the published interventions."""

from pathlib import Path

from services.errors import UserError
from services.principles import PrincipleSet, read_set

DIRECTORY = Path(__file__).resolve().parent / "principles"
NAMES = ("interventions", "rl", "training")


def named_set(name: str) -> PrincipleSet:
    """A set by its name, or by the path of a YAML file. Raises UserError."""
    if name in NAMES:
        return read_set(DIRECTORY / f"{name}.yaml")
    if Path(name).suffix not in (".yaml", ".yml"):
        raise UserError(f"principles: {name} is neither a YAML file nor one of {', '.join(NAMES)}")
    return read_set(name)
