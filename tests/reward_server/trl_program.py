"""TRL's GRPO trainer on a model directory, rewarded by a reward server: MODEL PROMPTS URL KEY.

A process of its own, as TRL imports vLLM where that is installed. Prints what TRL logged, as its last line.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from reward_server.client import SyncRewardClient
from reward_server.trainers import trl_reward


def main(model_dir: str, prompts: str, url: str, key: str) -> None:
    torch.manual_seed(3)
    model: Any = AutoModelForCausalLM.from_pretrained(model_dir)
    before = model.lm_head.weight.detach().clone()
    rows = [json.loads(line) for line in Path(prompts).read_text().splitlines()]
    with tempfile.TemporaryDirectory() as out, SyncRewardClient(url, key) as client:
        options: Any = {
            "output_dir": out, "max_steps": 3, "per_device_train_batch_size": 8, "num_generations": 8,
            "max_completion_length": 8, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True,
            "save_strategy": "no", "bf16": False, "disable_tqdm": True,
        }  # fmt: skip
        trainer = GRPOTrainer(
            model=model,
            reward_funcs=trl_reward(client, reference="solution"),
            args=GRPOConfig(**options),
            train_dataset=Dataset.from_list([{"prompt": row["prompt"], "solution": row["response"]} for row in rows]),
            processing_class=AutoTokenizer.from_pretrained(model_dir),
        )
        trainer.train()
    means = [entry["rewards/attune/mean"] for entry in trainer.state.log_history if "rewards/attune/mean" in entry]
    print(json.dumps({"means": means, "moved": not torch.equal(before, model.lm_head.weight.detach())}))


if __name__ == "__main__":
    main(*sys.argv[1:])
