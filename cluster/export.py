"""`attune export`: a committed checkpoint as a Hugging Face model directory."""

from pathlib import Path

from learner.commit import read_commit
from services.errors import UserError


def export_checkpoint(checkpoint: Path, directory: Path) -> None:
    """Writes the policy of a committed checkpoint: safetensors, configuration, tokenizer.

    Raises:
        UserError: it is no committed checkpoint, it is damaged, or `directory` is there already.
    """
    commit = read_commit(checkpoint)
    if directory.exists() and any(directory.iterdir()):
        raise UserError(f"{directory}: is there already and not empty; choose another")
    from learner.checkpoint import export_policy

    export_policy(commit.path, directory)
