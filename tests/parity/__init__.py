"""The same runs by TRL and by easyrl, `make parity` (docs/parity.md): scripts, for two environments."""
