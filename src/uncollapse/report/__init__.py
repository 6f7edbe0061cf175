"""Self-contained HTML reports of runs and comparisons: one file, no network, for people.

from uncollapse import report
report.write("runs/grpo")        # writes runs/grpo/report.html and returns its path
"""

from uncollapse.report import diagnosis
from uncollapse.report.page import render_comparison, render_run, write

__all__ = ["diagnosis", "render_comparison", "render_run", "write"]
