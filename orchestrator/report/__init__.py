"""The report of a run: one HTML file, drawn only from what the run left in its folder."""

from orchestrator.report.page import write_report

__all__ = ["write_report"]
