"""What ``memdec eval`` found, as one self-contained page with pictures."""

from memdec.report.page import Continuation, write_report

__all__ = ["Continuation", "write_report"]
