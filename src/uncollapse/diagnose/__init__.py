"""Read the log of any run and say what happens to it: phases, findings, forecast, advice.

from uncollapse.diagnose import diagnose, read
for log in read("runs/grpo"):
    print(diagnose(log).headline)
"""
