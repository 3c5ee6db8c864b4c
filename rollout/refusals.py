"""A request that no engine can serve."""

from services.errors import UserError


class RequestRefused(UserError, ValueError):  # noqa: N818 - reads as what happened where it is raised
    """What was asked of an engine is out of bounds; the message names the value and the bound. The data's fault."""
