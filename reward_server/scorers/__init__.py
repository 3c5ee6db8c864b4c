"""Sources of score, one file a subject; `base` has their interface."""

from reward_server.scorers.base import Scored, Scorer

__all__ = ["Scored", "Scorer"]
