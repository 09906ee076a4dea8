"""A training script under a clock of ours: a step takes what a test says, and nothing else takes time."""
import contextlib
import importlib
import os
from unittest import mock


@contextlib.contextmanager
def clock(module, ms_of_step):
    """Meanwhile `module`'s training clock gains ms_of_step(step, rank) with each step."""
    class Clock(module.Clock):
        def start(self):
            self.started = 0.0

        def stop(self) -> float:
            self.started = None
            return self.total_ms

    def log_due(self, step, *more, real=module.Run.log_due):
        self.clock.total_ms += ms_of_step(step, self.world.rank)
        return real(self, step, *more)

    with mock.patch.object(module, "Clock", Clock), mock.patch.object(module.Run, "log_due", log_due):
        yield


def main(argv: list[str]) -> int:
    """A script by name, whose step takes as many ms as come next, times 1 + rank; then its flags."""
    name, ms, *flags = argv
    os.environ.pop("TORCHELASTIC_RUN_ID", None)
    module = importlib.import_module(name)
    with clock(module, lambda step, rank: float(ms) * (1 + rank)):
        return module.main(flags)
