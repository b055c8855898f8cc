"""The summary of a test run: the cases per backend, the skips with their reasons, and the expected
cases that did not run."""

import collections
import os

from emulation import emulation
from shares import EMULATED, ON_GPU


class Counts:
    """Counts the cases per backend, and the results that they compared with float64."""

    def __init__(self, config, no_triton):
        self.cases, self.comparisons = collections.Counter(), collections.Counter()
        self.skips = collections.Counter()  # by reason
        self.no_triton = no_triton  # why Triton's kernels do not run, or None
        self.is_worker = hasattr(config, "workerinput")  # the controller of pytest-xdist counts

    def pytest_collectreport(self, report):
        if report.skipped:
            self.skips[reason_of(report)] += 1

    def pytest_runtest_logreport(self, report):
        if report.skipped:
            self.skips[reason_of(report)] += 1
        if report.when == "call" and not report.skipped:
            compared = [name for key, name in report.user_properties if key == "compared"]
            self.comparisons.update(compared)
            self.cases.update(set(compared))
            for name, cases, results in (v for k, v in report.user_properties if k == "elsewhere"):
                self.cases[name] += cases
                self.comparisons[name] += results

    def missing(self):
        """The unmet demands of GPT2_EXPECT="triton=3000,...". coverage=95 demands that percentage
        of the PTX of every emulated kernel."""
        for expected in filter(None, os.environ.get("GPT2_EXPECT", "").split(",")):
            name, _, least = expected.partition("=")
            if name == "coverage":
                for kernel, covered in emulation.covered().items():
                    if 100 * covered < float(least):
                        yield f"{kernel}: {covered:.1%} of its instructions were executed"
            elif name == "launches":
                launches = sum(kernel.launches for kernel in emulation.kernels().values())
                if launches < int(least):
                    yield f"{launches} launches were emulated, at least {least} should have been"
            elif self.cases[name] < int(least):
                yield f"{name}: {self.cases[name]} cases ran, at least {least} should have"

    def pytest_sessionfinish(self, session, exitstatus):
        if not self.is_worker and exitstatus == 0 and any(self.missing()):
            session.exitstatus = 1

    def pytest_terminal_summary(self, terminalreporter):
        for name, n in sorted(self.cases.items()):
            stand_in = "emulated" if EMULATED else "in the interpreter"
            how = {"triton": f" ({stand_in}: no GPU)", "cuda": " (emulated: no GPU)"}
            how = " (on the GPU)" if ON_GPU and name in how else how.get(name, "")
            results = f"{self.comparisons[name]} results compared with float64"
            terminalreporter.write_line(f"{name}{how}: {n} cases, {results}")
        for reason, n in self.skips.most_common():
            terminalreporter.write_line(f"skipped {n}: {reason}")
        if self.no_triton:
            terminalreporter.write_line(self.no_triton, red=True)

    def pytest_unconfigure(self, config):
        """Prints the last lines of a run, in which it fails if something is missing."""
        for line in [] if self.is_worker else self.missing():
            config.pluginmanager.get_plugin("terminalreporter").write_line(line, red=True)


def reason_of(report):
    """The reason why a test or a file was skipped."""
    _, _, message = report.longrepr
    return message.removeprefix("Skipped: ")
