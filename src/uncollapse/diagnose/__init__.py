"""Read the log of any run and say what happens to it: phases, findings, forecast, advice."""
