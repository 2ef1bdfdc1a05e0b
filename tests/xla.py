"""How XLA programs the CPU for the tests, which compile far more than they compute."""

# LLVM's optimisations would cost twice what they save.
QUICK = "--xla_backend_optimization_level=0"
# Without XLA's fusion emitters a program compiles in half the time. But programs with collectives over eight devices
# then wait for each other for ever, now and then, so this is for programs of one device only.
EMITTERS = "xla_cpu_use_fusion_emitters"
QUICK_ALONE = f"{QUICK} --{EMITTERS}=false"  # for a process that has one device


def compile_quickly_alone() -> None:
    """Has this process's programs for one CPU device compiled without fusion emitters.

    A flag of XLA holds for all programs of a process, and JAX takes options of a single one where it is jitted only: so
    they are given where JAX puts all options together. That is no part of its interface: in a version that does it
    elsewhere the tests take longer, and nothing else changes.
    """
    from jax._src import compiler

    get_compile_options = getattr(compiler, "get_compile_options", None)
    if get_compile_options is None:
        return

    def quick(num_replicas, num_partitions, *args, env_options_overrides=None, backend=None, **options):
        if num_replicas * num_partitions == 1 and backend is not None and backend.platform == "cpu":
            env_options_overrides = {EMITTERS: False, **(env_options_overrides or {})}
        more = {"env_options_overrides": env_options_overrides, "backend": backend}
        return get_compile_options(num_replicas, num_partitions, *args, **more, **options)

    compiler.get_compile_options = quick
