"""
The folder of a job: the only place that joins its paths.

``<root>/<job>/<stage>/``
    ``data/inputs/<id>/<n>``                 what the algorithm reads, one file per URL
    ``data/inputs/algoCustomData.json``      the consumer's parameters
    ``data/ddos/<id>``                       what is known of each data set
    ``data/transformations/algorithm``       the algorithm, executable
    ``data/outputs/``                        what it writes
    ``data/logs/``                           logs it writes itself
    ``algorithm.log``                        its stdout and stderr
    ``configuration.log``                    what was provisioned: sizes and checksums, never a URL
    ``filtering.log``                        the filter's report
    ``publish.log``                          what was published
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from blocks.runner import Folders


@dataclass(frozen=True)
class Workspace:
    """One stage's folder."""

    root: Path

    @property
    def inputs(self) -> Path:
        return self.root / "data" / "inputs"

    @property
    def ddos(self) -> Path:
        return self.root / "data" / "ddos"

    @property
    def algorithm(self) -> Path:
        return self.root / "data" / "transformations" / "algorithm"

    @property
    def custom_data(self) -> Path:
        return self.inputs / "algoCustomData.json"

    @property
    def outputs(self) -> Path:
        return self.root / "data" / "outputs"

    @property
    def logs(self) -> Path:
        return self.root / "data" / "logs"

    @property
    def algorithm_log(self) -> Path:
        return self.root / "algorithm.log"

    @property
    def configuration_log(self) -> Path:
        return self.root / "configuration.log"

    @property
    def filtering_log(self) -> Path:
        return self.root / "filtering.log"

    @property
    def publish_log(self) -> Path:
        return self.root / "publish.log"

    @property
    def folders(self) -> Folders:
        """The same tree as a runner wants it."""
        return Folders(
            inputs=self.inputs,
            ddos=self.ddos,
            transformations=self.algorithm.parent,
            outputs=self.outputs,
            logs=self.logs,
            log=self.algorithm_log,
        )

    def create(self) -> None:
        """Make every folder; what exists stays. 0700: a job's data are nobody else's on this machine."""
        self.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        for folder in (self.inputs, self.ddos, self.algorithm.parent, self.outputs, self.logs):
            folder.mkdir(parents=True, exist_ok=True)


def stage_workspace(root: Path, job_id: str, stage: int) -> Workspace:
    """The folder of stage *stage* of a job. Nothing is created."""
    return Workspace(root / job_id / str(stage))


def remove_job(root: Path, job_id: str) -> None:
    """
    Remove everything of a job on this machine. Safe to repeat.

    By ``rm``, which walks folders nested to any depth; ``shutil.rmtree`` recurses (Python 3.11 and 3.12) and gives
    up on the thousands of levels that an algorithm can make.

    Raises:
        subprocess.CalledProcessError: Something could not be removed; its message has no name from inside.
    """
    subprocess.run(
        ["rm", "-rf", "--", str(root / job_id)], check=True, stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
