"""From rows in files to token arrays of fixed shape."""
