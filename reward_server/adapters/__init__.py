"""Other clients' wire formats as thin translations onto the scoring service: a file each, `FORMATS` has them all."""

from typing import Any

from reward_server.adapters import nemo_gym, openrlhf, rerank, score, slime, tei, verl
from reward_server.answering import Format

FORMATS: tuple[Format[Any], ...] = (
    openrlhf.REWARDS,
    slime.REWARD,
    verl.CLASSIFY,
    verl.EMBEDDINGS,
    score.SCORE,
    rerank.RERANK,
    tei.PREDICT,
    nemo_gym.VERIFY,
)
