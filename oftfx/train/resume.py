"""Checkpoints of a job, beside its output, from which it goes on where it was stopped.

tuned.checkpoints/
  job.json          what was asked for
  checkpoint-200/   the adapter, the optimizer and the Trainer's notes
"""

import json
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from oftfx.train.errors import OutputError

if TYPE_CHECKING:
    from oftfx.train.job import Job

RECORD = "job.json"
LAST = "trainer_state.json"
"""What the Trainer writes last: a checkpoint without it was cut off."""

FREE = ("out", "merge", "prompt", "unrelated", "eval_tokens", "force", "checkpoint_every", "resume")
"""What may differ when a job goes on: nothing that training sees."""


class Checkpoints(NamedTuple):
    """Where a job keeps its checkpoints, and after how many steps it makes one."""

    directory: Path
    every: int

    def newest(self) -> Path | None:
        """The newest one that is whole."""
        found = {
            int(match[1]): path
            for path in self.directory.glob("checkpoint-*")
            if (match := re.fullmatch(r"checkpoint-(\d+)", path.name)) and (path / LAST).is_file()
        }
        return found[max(found)] if found else None

    def remove(self) -> None:
        """Takes the directory away: the job is done."""
        shutil.rmtree(self.directory)


def checkpoints(job: "Job") -> Checkpoints | None:
    """Prepares the checkpoints of a job; None if it wants none.

    Raises:
        OutputError: The directory is someone else's; or it holds those of an earlier run, which
            neither is resumed nor may be replaced; or there is nothing to resume; or the earlier
            run was another job.
    """
    if job.checkpoint_every is None and not job.resume:
        return None
    out = job.out.expanduser().resolve()
    directory = out.with_name(f"{out.name}.checkpoints")
    record = directory / RECORD
    asked = json.loads(json.dumps({**vars(job), "spec": job.spec.to_json()}, default=str))
    if job.resume:
        if not record.is_file():
            raise OutputError(f"{directory} holds nothing to resume; leave --resume out.")
        stored: dict[str, Any] = json.loads(record.read_text())
        other = [key for key in asked if key not in FREE and stored.get(key) != asked[key]]
        if other:
            was = ", ".join(f"{key}={stored.get(key)}" for key in other)
            raise OutputError(f"{directory} was made with {was}: resume with the same.")
        return Checkpoints(directory, job.checkpoint_every or stored["checkpoint_every"])
    if directory.exists():
        if not record.is_file():
            raise OutputError(f"{directory} exists and was not written by oftfx: move it away.")
        if not job.force:
            raise OutputError(
                f"{directory} holds an earlier run: go on with --resume, or begin anew with "
                "--force."
            )
        shutil.rmtree(directory)
    directory.mkdir(parents=True)
    record.write_text(json.dumps(asked, indent=1) + "\n")
    assert job.checkpoint_every is not None
    return Checkpoints(directory, job.checkpoint_every)
