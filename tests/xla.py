"""How XLA programs the CPU for the tests, which compile far more than they compute."""

# LLVM's optimisations would cost twice what they save. Without XLA's fusion emitters compilation is cheaper by a third
# still, but programs with collectives over eight devices then wait for each other for ever, now and then.
QUICK = "--xla_backend_optimization_level=0"
