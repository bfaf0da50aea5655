"""Log a run to TensorBoard, with Lightning's logger. The event file is in the run's folder, below `tensorboard/`.

`metrics.csv` is the authoritative record. A run that starts or resumes removes its older event files, and writes all earlier rows to a
new file. So TensorBoard shows every row exactly once, even if the run was killed, or if the user adds this logger only when the run resumes.
"""

import contextlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from icl.config import RunConfig, flatten
from icl.config.validation import ConfigError
from icl.runs.folder import RunFolder
from icl.runs.metrics_file import whole_rows

_FLUSH_SECONDS = 10


class TensorBoardLog:
    """Event file that receives the rows of `metrics.csv`.

    Args:
        config: Settings of the run.
        folder: Folder of the run.
        step: Step from which the run continues.
    """

    def __init__(self, config: RunConfig, folder: RunFolder, step: int) -> None:
        for file in (folder.path / "tensorboard").glob("events.out.tfevents.*"):
            with contextlib.suppress(OSError):
                file.unlink()
        self._logger = _logger(folder.path, purge_step=0, flush_secs=_FLUSH_SECONDS)
        self._logger.log_hyperparams(flatten(config.to_dict()))
        if step > 0:
            for row in whole_rows(folder.metrics_file):
                if int(row["step"]) <= step:
                    self.log({key: float(value) for key, value in row.items() if value})

    def log(self, row: Mapping[str, int | float]) -> None:
        """Write one row."""
        values = {key: value for key, value in row.items() if key != "step"}
        self._logger.log_metrics(values, step=int(row["step"]))

    def finish(self, exit_code: int) -> None:
        """Close the event file. The exit code of the program is not recorded."""
        self._logger.experiment.close()


def require_tensorboard() -> None:
    """Check that a package that writes event files is installed.

    Raises:
        ConfigError: If no such package is installed.
    """
    from lightning.fabric.loggers.tensorboard import _TENSORBOARD_AVAILABLE, _TENSORBOARDX_AVAILABLE

    if not (_TENSORBOARD_AVAILABLE or _TENSORBOARDX_AVAILABLE):
        raise ConfigError(
            "`trainer.loggers` contains tensorboard, but no package that writes its files is installed. Run `pip install "
            "tensorboard`, or leave tensorboard out."
        )


def _logger(folder: Path, **options: Any) -> Any:
    from lightning.pytorch.loggers import TensorBoardLogger

    return TensorBoardLogger(save_dir=folder, name="tensorboard", version="", default_hp_metric=False, **options)
