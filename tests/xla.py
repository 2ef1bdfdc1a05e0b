"""How XLA programs the CPU for the tests, which compile far more than they compute."""

from importlib.metadata import version

# Neither LLVM's optimisations nor kernels written by way of MLIR, each of which costs more than it saves. Only these
# versions are known to have the second flag, and an unknown flag ends the process.
QUICK = "--xla_backend_optimization_level=0"
if version("jaxlib").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"
