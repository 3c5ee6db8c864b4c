"""`attune evaluate`: what is refused before a model is loaded."""

from pathlib import Path

import pytest
from rich.console import Console

from cluster.evaluation_command import evaluate_models
from cluster.recipe import resolve
from services.errors import UserError
from services.text.tokenizer import train_tokenizer


def test_a_baseline_that_reads_other_words_from_the_same_ids_is_refused(tmp_path: Path) -> None:
    texts = {
        "model": "What is it? It is one and two, and brief.",
        "baseline": "Wo ist es? Es ist eins und zwei, und kurz.",
    }
    for name, text in texts.items():
        train_tokenizer([text] * 4, 300, "decoder").save_pretrained(tmp_path / name)
    config = resolve({"data": {"source": "nowhere.jsonl"}, "policy": {"model": str(tmp_path / "model")}}, "test")
    with pytest.raises(UserError, match=r"--baseline .*/baseline: has another tokenizer than .*/model"):
        evaluate_models(config, model=None, baseline=tmp_path / "baseline", split="test", console=Console())
    same = tmp_path / "model"
    with pytest.raises(UserError, match=r"nowhere\.jsonl"):  # goes on to the prompts
        evaluate_models(config, model=None, baseline=same, split="test", console=Console())
