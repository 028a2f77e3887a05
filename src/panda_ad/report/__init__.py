"""The report an inspector reads: one self-contained HTML file per category and run."""

from panda_ad.report.build import (
    DefectRow,
    Metric,
    Neighbour,
    Report,
    ReportImage,
    build_report,
    project_2d,
    write_report,
)

__all__ = ["DefectRow", "Metric", "Neighbour", "Report", "ReportImage", "build_report", "project_2d", "write_report"]
