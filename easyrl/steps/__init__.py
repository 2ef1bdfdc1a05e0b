"""Jitted update steps: the only place where a model meets an equation."""
