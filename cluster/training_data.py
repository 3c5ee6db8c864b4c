"""What a run knows of its prompts before it starts: the splits, and what the salience rule was fitted to."""

from dataclasses import dataclass

from cluster.config import Config
from cluster.run_dir import RunDir, write_atomically
from rollout.worker import build_renderer
from services.errors import UserError
from services.text.salience import Idf, fit_idf
from services.text.sources import Splits, load_prompts


@dataclass(frozen=True)
class TrainingData:
    splits: Splits
    idf: Idf | None

    @property
    def idf_text(self) -> str | None:
        """What salience.json holds, as it is handed to the rollout actors."""
        return None if self.idf is None else self.idf.to_json()


def load_training_data(config: Config, run: RunDir | None = None) -> TrainingData:
    """Loads the splits and fits the salience rule to the training prompts; salience.json keeps it for later readers.

    Raises:
        UserError: a source or a row that cannot be used, or a training split without prompts.
    """
    splits = load_prompts(config.data)
    if not splits.train:
        raise UserError(f"data.source {config.data.source!r}: the training split has no prompts")
    renderer = build_renderer(config.policy, config.data, config.rollout.max_tokens)
    if _uses_idf(config):
        idf = fit_idf(splits.train, renderer, config.salience)
    else:
        idf = None
        for prompt in splits.train:  # a prompt that is too long is met before the run starts, not in its middle
            renderer.render(prompt)
    data = TrainingData(splits, idf)
    if run is not None and data.idf_text is not None:
        write_atomically(run.salience, data.idf_text)
    return data


def _uses_idf(config: Config) -> bool:
    return config.salience.method == "idf" or config.salience.weights == "idf"
