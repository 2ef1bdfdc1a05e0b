"""Every metric of train_ppo, and train_dpo's own with --online, is explained in docs/metrics.md, and nothing else is.

Names are read from syntax trees: a metric is a key of a dict or of an assignment `metrics["name"] = ...`. An f-string
such as f"ppo/val/{name}" stands for the keys that the function it wraps returns; one that depends on the run's sources
of reward is documented with <name> in its place.
"""

import ast
import re

from tests.source import REPO, modules

# Where such a metric may be given its name.
MODULES = (
    "easyrl.train_ppo",
    "easyrl.steps.ppo",
    "easyrl.steps.scoring",
    "easyrl.rewards.held_out",
    "easyrl.runtime.online",
    "easyrl.rewards.score",
    "easyrl.rewards.sources",
    "easyrl.runtime.loop",
)
NAME = re.compile(r"(env|objective|ppo|online|tokens|time|eval)/[\w/<>]+|tokens|tokens_per_second")


def function(module, name):
    return next(node for node in ast.walk(modules()[module]) if getattr(node, "name", None) == name)


def keys(tree):
    """Every string, as text or as a template with <expression> for what is filled in, that is a key in `tree`."""
    for node in ast.walk(tree):
        found = []
        if isinstance(node, ast.Dict):
            found = node.keys
        elif isinstance(node, ast.DictComp):
            found = [node.key]
        elif isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store):
            found = [node.slice]
        for key in found:
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                yield key.value
            elif isinstance(key, ast.JoinedStr):
                parts = [
                    part.value if isinstance(part, ast.Constant) else f"<{ast.unparse(part.value)}>"
                    for part in key.values
                ]
                yield "".join(map(str, parts))


def phases(tree):
    """The names of `timer.phase("name")`, which becomes the metric time/name."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("timer.phase"):
            yield ast.literal_eval(node.args[0])


def metrics_in_code():
    of_loss = {
        "ppo/policy/<name>": keys(function("easyrl.algos.ppo", "policy_loss")),
        "ppo/val/<name>": keys(function("easyrl.algos.ppo", "value_loss")),
    }
    names = {f"time/{phase}" for phase in phases(modules()["easyrl.train_ppo"])}
    for module in MODULES:
        for key in keys(modules()[module]):
            if key in of_loss:
                names |= {key.replace("<name>", name) for name in of_loss[key]}
            elif NAME.fullmatch(key):
                names.add(key)
    return names


def metrics_in_docs():
    text = (REPO / "docs" / "metrics.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| `([^`]+)` \|", text, flags=re.MULTILINE)
    assert len(rows) == len(set(rows)), "a metric is explained twice"
    return set(rows)


def test_names_of_every_kind_are_found_in_the_code():
    of_every_kind = {
        "env/reward_mean",  # a dict
        "eval/reward_mean",  # the script
        "ppo/policy/clipfrac_dual",  # of a loss, by f-string
        "ppo/policy/skipped",  # an assignment
        "time/rollout",  # a phase
        "time/step",  # the loop
        "env/reward/<name>",  # of a source of reward
    }
    assert of_every_kind <= metrics_in_code()


def test_every_metric_is_explained():
    assert not sorted(metrics_in_code() - metrics_in_docs())


def test_every_explained_metric_exists():
    assert not sorted(metrics_in_docs() - metrics_in_code())
