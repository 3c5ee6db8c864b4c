"""The `checkpoint` section of a recipe: how often a run commits, and how much of that is kept."""

from pydantic import Field

from services.config_base import Section


class CheckpointSection(Section):
    every: int = Field(
        default=10,
        ge=1,
        description="Steps between commits. A crash loses the work since the last; 10: some minutes of a usual run.",
    )
    keep: int = Field(
        default=2,
        ge=0,
        description="Commits kept, the newest; 0 keeps all. 2: one to fall back on where the newest turns out damaged.",
    )
    keep_best: bool = Field(
        default=True,
        description="Keep the commit of the best evaluation beside them, where one was written at that step.",
    )
    timeout_s: float = Field(
        default=600.0,
        gt=0,
        description="Deadline (s) for writing one commit. 600: tens of GB to a network file system.",
    )
