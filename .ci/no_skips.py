"""A pytest plugin: a skipped test has failed, since all that tests need is installed here."""

import pytest


def _fail(report: pytest.TestReport | pytest.CollectReport) -> None:
    if report.skipped and not hasattr(report, "wasxfail"):
        report.outcome = "failed"
        reason = report.longrepr[-1] if isinstance(report.longrepr, tuple) else report.longrepr
        report.longrepr = f"{report.nodeid}: skipped, which counts as failed here: {reason}"


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    """Tests that skip."""
    report = yield
    _fail(report)
    return report


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report():
    """Modules that skip, as `pytest.importorskip` makes them."""
    report = yield
    _fail(report)
    return report
