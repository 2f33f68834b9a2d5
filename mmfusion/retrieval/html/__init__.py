"""Pages for people: a run's report, and runs side by side. One file each, which opens without a network."""

from mmfusion.retrieval.html.comparison import write_comparison
from mmfusion.retrieval.html.report import write_report

__all__ = ["write_comparison", "write_report"]
