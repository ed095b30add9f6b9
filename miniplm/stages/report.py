"""report: what runs came to, as one HTML file."""

from ..analysis.report.page import write_report
from ..config import ReportConfig
from ..runtime.text import printable


def report(config: ReportConfig) -> None:
    """Write the report and say where it is, and what is left out of it.

    Raises:
        UserError: a run does not exist, is not complete or not miniplm's; the output is a file of another
            kind.
    """
    left_out = write_report(config.runs, config.output)
    for line in left_out:
        print(printable(f"left out: {line}"))
    print(printable(f"report: {config.output}"))
