"""`python -m easyrl.bench KIND [--flags]`: one benchmark."""

import importlib
import sys

from easyrl.core.command_line import load_config, run
from easyrl.core.errors import UserError, tell

KINDS = {
    "decode": "sampling responses",
    "ppo": "an iteration of PPO: rollout, scores, updates",
    "dpo": "an optimizer step on pairs",
    "rm": "an optimizer step of a reward model",
    "sft": "an optimizer step of supervised fine-tuning",
    "load": "reading weights from a safetensors file",
    "saving": "what saving checkpoints costs a training loop",
    "limits": "what the machine can do",
}


def main() -> None:
    kind = sys.argv[1] if len(sys.argv) > 1 else "--help"
    if kind in ("--help", "-help", "-h"):
        print("usage: python -m easyrl.bench KIND [--FLAG=VALUE ...]\n")
        print("\n".join(f"  {name:<8}{what}" for name, what in KINDS.items()))
        print("\npython -m easyrl.bench KIND --help lists its flags.")
        return
    if kind not in KINDS:
        error = UserError(f"unknown benchmark {kind!r}, expected one of {', '.join(KINDS)}")
        raise SystemExit(tell(error))
    del sys.argv[1]
    module = importlib.import_module(f"easyrl.bench.{kind}")
    run(module.main, module.Config, lambda argv: load_config(module.Config, argv, f"python -m easyrl.bench {kind}"))


if __name__ == "__main__":
    main()
