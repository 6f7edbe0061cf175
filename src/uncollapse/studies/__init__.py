"""One study a paper: claims fixed before the run, an experiment, a verdict."""
