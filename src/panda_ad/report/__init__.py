"""The report an inspector reads: one self-contained HTML file per category and run."""

from panda_ad.report.build import build_report, project_2d, write_report
from panda_ad.report.content import DefectRow, Metric, Neighbour, Report, ReportImage

__all__ = ["DefectRow", "Metric", "Neighbour", "Report", "ReportImage", "build_report", "project_2d", "write_report"]
