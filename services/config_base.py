"""The base of every section of the configuration: immutable, and closed to unknown keys."""

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section of a recipe. Each field's description gives its unit and the reason or source of its default."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
