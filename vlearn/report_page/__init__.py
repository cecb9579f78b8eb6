"""One page that shows what a training run says of its data: as a file, or served while the run goes on."""

from vlearn.report_page.report import report

__all__ = ["report"]
