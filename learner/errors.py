"""What ends a training step before its end, or the run."""


class BadBatch(Exception):  # noqa: N818 - reads as what it says where it is raised
    """A batch that the recipe does not let the policy be trained on. What was committed before is untouched."""


class NonFinite(BadBatch):
    """A loss, gradient or recorded log-probability that is not a finite number."""
