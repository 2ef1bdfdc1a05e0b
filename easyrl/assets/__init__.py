"""The bundled tiny models, tokenizer and prompts of the quickstart, all made by `python -m easyrl.assets.build`.

`POLICY` and `REWARD_MODEL` are transformers folders with one tokenizer; the prompts are JSON lines with `instruction`.
"""

import dataclasses
from pathlib import Path
from typing import Any

_HERE = Path(__file__).parent

POLICY = _HERE / "policy"
REWARD_MODEL = _HERE / "reward_model"
TRAIN_PROMPTS = _HERE / "prompts_train.jsonl"
EVAL_PROMPTS = _HERE / "prompts_eval.jsonl"
QUICKSTART = _HERE / "quickstart_ppo.yaml"
BUNDLED = "bundled"  # the policy of the quickstart, whose place depends on where easyrl is installed


def fill_in(config: Any) -> Any:
    """A PPO config as it is, or one of the quickstart with the bundled models and prompts where it names none.

    Raises UserError for flags of held-out prompts where there are none.
    """
    if config.load_checkpoint_policy != BUNDLED:
        config.eval_dataset.check()
        return config
    reward = config.load_checkpoint_reward or ("" if config.reward_function else f"hf::{REWARD_MODEL}")
    train = dataclasses.replace(config.train_dataset, path=config.train_dataset.path or str(TRAIN_PROMPTS))
    held_out = dataclasses.replace(config.eval_dataset, path=config.eval_dataset.path or str(EVAL_PROMPTS))
    return dataclasses.replace(
        config,
        load_checkpoint_policy=f"hf::{POLICY}",
        load_checkpoint_reward=reward,
        train_dataset=train,
        eval_dataset=held_out,
    )
