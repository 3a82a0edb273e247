"""Training: settings, the loop, the step and everything it compiles."""
