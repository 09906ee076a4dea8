"""--tracker of the training scripts: metrics of a run to wandb, tensorboard or trackio, each through its own package.

Imported by a run that asks for one, on its first process. A tracker that fails is told in one sentence, and costs its
metrics, not the run.
"""
import importlib
import os
from collections.abc import Callable
from pathlib import Path


def open_run(kind: str, folder: Path, config: dict):
    """A run of the package `kind`: it has log(numbers, step=n) and finish(). W&B is offline without a login, trackio
    local where TRACKIO_SPACE_ID names no Space."""
    if kind == "tensorboard":
        from torch.utils.tensorboard import SummaryWriter
        writer = SummaryWriter(folder / "tensorboard")
        writer.log = lambda numbers, step: [writer.add_scalar(*pair, step) for pair in numbers.items()]
        writer.finish = writer.close
        return writer
    package, name = importlib.import_module(kind), folder.name
    named = dict(project="nanospeedrun", group=folder.parent.name, name=name, config=config, resume="allow")
    if kind == "wandb":
        login = "WANDB_MODE" in os.environ or package.login(prompt=False)
        named |= dict(id=name, dir=str(folder), mode=None if login else "offline")
    return package.init(**named)


class Tracker:
    """A run of a tracker; `tell` takes the sentence about one that fails."""
    def __init__(self, kind: str, folder: Path, config: dict, tell: Callable[[str], None]):
        self.kind, self.tell = kind, tell
        self.run = self.tried(open_run, kind, folder, config)

    def log(self, step: int, numbers: dict[str, float]):
        if self.run is not None:
            self.tried(self.run.log, numbers, step=step)

    def finish(self):
        if self.run is not None:
            self.tried(self.run.finish)

    def tried(self, call, *arguments, **more):
        try:
            return call(*arguments, **more)
        except Exception as error:  # noqa: BLE001 - of any kind: its own, of its network, of its import
            self.run = None
            reason = (str(error) or repr(error)).splitlines()[0]
            repair = f"; pip install {self.kind}" if isinstance(error, ImportError) else ""
            self.tell(f"warning: --tracker {self.kind}: {reason:.200}{repair}; the run goes on without it")
