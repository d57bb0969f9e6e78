"""What a config needs on accelerators that are not there: compiled ahead of time, never run."""
