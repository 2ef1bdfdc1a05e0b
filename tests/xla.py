"""How XLA programs the CPU for the tests, which compile far more than they compute."""

from importlib.metadata import version

# LLVM's optimisations would cost twice what they save.
QUICK = "--xla_backend_optimization_level=0"
# Without XLA's fusion emitters a program compiles in half the time. But programs with collectives over eight devices
# then wait for each other for ever, now and then, so this is for programs of one device only. In JAX 0.12 they always
# are used.
EMITTERS = "xla_cpu_use_fusion_emitters"
HAS_EMITTERS = version("jax").startswith("0.10.")
QUICK_ALONE = f"{QUICK} --{EMITTERS}=false" if HAS_EMITTERS else QUICK  # for a process that has one device


def compile_quickly_alone() -> None:
    """Has this process's programs for one CPU device compiled without fusion emitters.

    A flag of XLA holds for all programs of a process, and JAX takes options of a single one where it is jitted only: so
    they are given where JAX puts all options together, which is no part of its interface.
    """
    if not HAS_EMITTERS:
        return
    from jax._src import compiler

    get_compile_options = compiler.get_compile_options

    def quick(num_replicas, num_partitions, *args, env_options_overrides=None, backend=None, **options):
        if num_replicas * num_partitions == 1 and backend is not None and backend.platform == "cpu":
            env_options_overrides = {EMITTERS: False, **(env_options_overrides or {})}
        more = {"env_options_overrides": env_options_overrides, "backend": backend}
        return get_compile_options(num_replicas, num_partitions, *args, **more, **options)

    compiler.get_compile_options = quick
