"""The tests, laid out like easyrl/ itself."""
