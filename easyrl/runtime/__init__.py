"""What surrounds the steps: the loop, trackers, samples, the report."""
