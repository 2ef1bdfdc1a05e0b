"""How XLA programs the CPU for the tests, which compile far more than they compute."""

from importlib.metadata import version

# LLVM's optimisations would cost twice what they save, and programs cut up for more threads than a test has gain
# nothing; without XLA's fusion emitters, which JAX 0.12 always uses, a program compiles in half the time.
QUICK = "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
if version("jax").startswith("0.10."):
    QUICK += " --xla_cpu_use_fusion_emitters=false"


def keep_programs_of_one_device() -> None:
    """Has JAX keep compiled programs of one CPU device only, for the reason that `easyrl.core.platform` gives.

    JAX can keep all of them or none, so this stands in the place of a function of its own that is no interface.
    """
    from jax._src import compiler  # the environment has to be set before

    cache_key = compiler._get_cache_key

    def key(options, backend, computation, devices, *args, **kwargs):
        if backend.platform == "cpu" and devices.size > 1:
            return None
        return cache_key(options, backend, computation, devices, *args, **kwargs)

    compiler._get_cache_key = key
