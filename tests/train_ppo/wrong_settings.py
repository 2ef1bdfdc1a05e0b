"""Data, rewards, flags, meshes and folders that train_ppo cannot use, and the line that says why.

The tables are made as those of `wrong_models`.
"""

PROMPTS = [{"prompt": "sun"}] * 6
DATA = {
    "no prompts": (lambda b: {"train_dataset.path": ""}, "--train_dataset.path: found nothing, expected a file"),
    "prompts that are not there": (
        lambda b: {"train_dataset.path": "/no/such/prompts.jsonl"},
        "--train_dataset.path: /no/such/prompts.jsonl: no such file or folder",
    ),
    "an empty file": (lambda b: {"train_dataset.path": b.rows()}, "rows.jsonl: the file is empty"),
    "broken JSON": (
        lambda b: {"train_dataset.path": b.rows(*PROMPTS, '{"prompt": "sun')},
        "--train_dataset.path: FOLDER/rows.jsonl line 7: broken JSON at column 12",
    ),
    "no column for the prompt": (
        lambda b: {"train_dataset.path": b.rows(*PROMPTS, {"asked": "why"})},
        "rows.jsonl line 7: found `asked`, expected `messages`, `turns`, `instruction`, `prompt`",
    ),
    "a prompt that is no text": (
        lambda b: {"train_dataset.path": b.rows({"prompt": 7}, *PROMPTS)},
        "rows.jsonl line 1: column `prompt`: found 7",
    ),
    "nothing short enough": (
        lambda b: {
            "train_dataset.path": b.rows(*[{"prompt": "far too long to be kept"}] * 9),
            "train_dataset.remove_truncated_samples": True,
        },
        "rows.jsonl: found no row to use (9 rows read, left out: 9 too long)",
    ),
    "fewer prompts than a batch": (
        lambda b: {"train_dataset.path": b.rows(*PROMPTS)},
        "found 6 prompts, fewer than --train_dataset.batch_size=8",
    ),
    "held-out prompts that are not there": (
        lambda b: {"eval_dataset.path": "/no/such/prompts.jsonl"},
        "--eval_dataset.path: /no/such/prompts.jsonl: no such file or folder",
    ),
    "held-out prompts with a batch of their own": (
        lambda b: {"eval_dataset.batch_size": 8},
        "unknown flag --eval_dataset.batch_size: did you mean --train_dataset.batch_size",
    ),
    "a split that is none": (lambda b: {"train_dataset.split": "[7"}, "--train_dataset.split"),
}  # fmt: skip
REWARDS = {
    "no reward": (
        lambda b: {"load_checkpoint_reward": ""},
        "--load_checkpoint_reward and --reward_function are both empty, expected a source of reward",
    ),
    "a function that is not there": (
        lambda b: b.function("no_such"),
        "--reward_function=ppo_test_functions:no_such: found no such name in ppo_test_functions",
    ),
    "a module that is not there": (
        lambda b: {"reward_function": "no_such_module:f"},
        "--reward_function=no_such_module:f: no module no_such_module in the working directory or on PYTHONPATH",
    ),
    "not a function's name": (
        lambda b: {"reward_function": "os.system"},
        "--reward_function=os.system: expected package.module:function",
    ),
    "a column that the function needs": (
        lambda b: b.function("wants_column"),
        "--reward_function=ppo_test_functions:wants_column needs the column 'solution', the data have messages",
    ),
    "a column that no held-out row has": (
        lambda b: {
            **b.function("wants_column"),
            **dict.fromkeys(
                ("train_dataset.path", "eval_dataset.path"), b.rows({"prompt": "sun", "solution": 1}, *PROMPTS * 2)
            ),
            "train_dataset.split": "[:8]",
            "eval_dataset.split": "[8:]",
        },
        "--reward_function=ppo_test_functions:wants_column needs the column 'solution', the data have messages",
    ),
    "a function that gives too few": (
        lambda b: b.function("too_few"),
        "--reward_function=ppo_test_functions:too_few returned numbers of shape (1,), expected one for each of the 8",
    ),
    "a function that raises": (
        lambda b: b.function("raises"),
        "--reward_function=ppo_test_functions:raises raised KeyError: 'answer'",
    ),
    "more weights than rewards": (
        lambda b: {"reward_weights": "1,2"},
        "--reward_weights=1,2: expected 1 numbers separated by commas",
    ),
    "weights that are words": (lambda b: {"reward_weights": "much"}, "--reward_weights=much: expected 1 number"),
    "a rule for a missing end": (
        lambda b: {"missing_eos": "replace"},
        "--missing_eos=replace: expected none, mask, subtract:VALUE (VALUE above 0) or replace:VALUE",
    ),
}  # fmt: skip
FLAGS = {
    "misspelt flag": (lambda b: {"kl_coeff": 0.1}, "unknown flag --kl_coeff: did you mean --kl_coef"),
    "misspelt key in YAML": (
        lambda b: {"config": b.file("c.yaml", "lr: 0.1\ngama: 1\n")},
        "c.yaml, line 2: unknown key gama: did you mean gamma",
    ),
    "wrong type": (lambda b: {"ppo_epochs": "two"}, "--ppo_epochs=two: expected an integer"),
    "wrong type in YAML": (
        lambda b: {"config": b.file("c.yaml", "optimizer:\n  b1: high\n")},
        "c.yaml, line 2: optimizer.b1=high: expected a number",
    ),
    "YAML that is not there": (lambda b: {"config": "/no/such.yaml"}, "--config=/no/such.yaml: No such file"),
    "YAML that is none": (lambda b: {"config": b.file("c.yaml", "lr: [1\n")}, "c.yaml, line 2: not YAML"),
    "not one of the choices": (lambda b: {"lr_schedule": "step"}, "expected one of constant, linear, cosine"),
    "an infinite learning rate": (lambda b: {"lr": "inf"}, "--lr=inf: expected 0 or more, less than inf"),
    "temperature 0": (lambda b: {"temperature": 0}, "--temperature=0: expected more than 0"),
    "negative temperature": (lambda b: {"temperature": -1}, "--temperature=-1: expected more than 0"),
    "top_p above 1": (lambda b: {"top_p": 1.5}, "--top_p=1.5: expected more than 0, at most 1"),
    "negative learning rate": (lambda b: {"lr": -1e-5}, "--lr=-1e-05: expected 0 or more"),
    "a clip range of 0": (lambda b: {"cliprange": 0}, "--cliprange=0: expected more than 0, at most 1"),
    "a dual clip of 1": (lambda b: {"dual_clip": 1}, "--dual_clip=1: expected 0 (off) or more than 1"),
    "a second moment that never forgets": (
        lambda b: {"optimizer.b2": 1}, "--optimizer.b2=1: expected 0 or more, less than 1"
    ),
    "a horizon within one step": (
        lambda b: {"kl_target": 1, "kl_horizon": 3.2, "rollouts_per_prompt": 2},
        "--kl_horizon=3.2: expected more than 3.2, a fifth of the 16 responses of a step",
    ),
    "a horizon without a target": (lambda b: {"kl_horizon": 3}, "--kl_horizon=3: needs --kl_target"),
    "a KL loss without a gradient": (
        lambda b: {"kl_in": "loss"}, "--kl_in=loss: the gradient of --kl_estimator=k1 is 0 on average"
    ),
    "fewer than no unfrozen layers": (
        lambda b: {"num_layers_unfrozen": -2}, "--num_layers_unfrozen=-2: expected -1 or more"
    ),
    "no number": (lambda b: {"gamma": "nan"}, "--gamma=nan: expected a number"),
    "a least above the most": (
        lambda b: {"min_continuation_len": 9},
        "--min_continuation_len=9: expected at most --max_continuation_len=8",
    ),
    "no responses": (lambda b: {"train_dataset.batch_size": 0}, "--train_dataset.batch_size=0: expected 1 or more"),
    "a minibatch that does not divide": (
        lambda b: {"mini_batch_size": 3},
        "--mini_batch_size=3: does not divide the 8 responses of a step",
    ),
}  # fmt: skip
LAYOUT = {
    "two sizes": (lambda b: {"mesh_dim": "1,1"}, "--mesh_dim=1,1: expected three sizes as in 1,-1,1"),
    "sizes that are words": (lambda b: {"mesh_dim": "1,all,1"}, "--mesh_dim=1,all,1: the size of fsdp is 'all'"),
    "not the number of devices": (
        lambda b: {"mesh_dim": "1,-1,3"},
        "--mesh_dim=1,-1,3: the sizes do not make up the 8 devices there are",
    ),
    "a batch that does not divide": (
        lambda b: {"mesh_dim": "1,8,1", "train_dataset.batch_size": 12},
        "=12: does not divide by dp x fsdp = 8 of --mesh_dim=1,8,1",
    ),
    "prompts that do not divide, though their responses do": (
        lambda b: {"mesh_dim": "1,8,1", "train_dataset.batch_size": 4, "rollouts_per_prompt": 2},
        "--train_dataset.batch_size=4: does not divide by dp x fsdp = 8 of --mesh_dim=1,8,1",
    ),
    "a micro-batch that does not divide": (
        lambda b: {"mesh_dim": "2,2,2", "micro_batch_size": 6},
        "--micro_batch_size=6: expected a multiple of 4: dp x fsdp = 4 of --mesh_dim=2,2,2",
    ),
    "decoded rows that do not divide": (
        lambda b: {"mesh_dim": "2,2,2", "decode_rows": 6},
        "--decode_rows=6: does not divide by dp x fsdp = 4 of --mesh_dim=2,2,2",
    ),
    "heads that do not divide": (
        lambda b: {"mesh_dim": "1,1,8", "load_checkpoint_policy": b.other_model(num_heads=4, num_kv_heads=4)},
        "--load_checkpoint_policy: --mesh_dim: parameter layers/attn/k has kv_heads=4, which does not divide by mp=8",
    ),
    "a width that does not divide": (
        lambda b: {"mesh_dim": "1,8,1", "load_checkpoint_policy": b.other_model(width=20, num_heads=4, num_kv_heads=4)},
        "has embed=20, which does not divide by fsdp=8",
    ),
}  # fmt: skip
PLACES = {
    "a file": (lambda b: {"output_dir": b.file("taken", "mine")}, "expected a folder, found a file of that name"),
    "in a file": (lambda b: {"output_dir": b.file("taken", "mine") / "run"}, "cannot write there: Not a directory"),
    "a bucket": (lambda b: {"output_dir": "gs://bucket/run"}, "expected a local folder, found the address of a store"),
    "a folder whose export is something else": (
        lambda b: {"output_dir": b.file("hf", "mine").parent},
        "hf: is a file, expected a new folder to export to",
    ),
}  # fmt: skip
