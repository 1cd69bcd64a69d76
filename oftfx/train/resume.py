"""Checkpoints of a job, beside its output, from which it goes on where it was stopped.

tuned.checkpoints/
  job.json          what was asked for
  checkpoint-200/   the adapter, the optimizer and the Trainer's notes
"""

import hashlib
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from oftfx.files import replacing
from oftfx.train.errors import OutputError
from oftfx.train.output import writing

if TYPE_CHECKING:
    from oftfx.train.job import Job

RECORD = "job.json"
LAST = "trainer_state.json"
"""What the Trainer writes last: a checkpoint without it was cut off."""

FREE = ("out", "merge", "prompt", "unrelated", "eval_tokens", "force", "checkpoint_every", "resume")
"""What may differ when a job goes on: nothing that training sees."""


TEXTS = "sha256"
"""Under which the record keeps what the text files held."""


@dataclass(frozen=True)
class Checkpoints:
    """Where a job keeps its checkpoints, and after how many steps it makes one.

    Attributes:
        directory: Where they are.
        every: Steps from one to the next.
        asked: What the job was asked for.
        force: Whether those of an earlier run may be replaced.
        resumed: Whether the job goes on from them.
    """

    directory: Path
    every: int
    asked: dict[str, Any]
    force: bool
    resumed: bool

    def begin(self) -> None:
        """Makes the directory, in place of an earlier run's: only now, as nothing else can fail.

        Raises:
            OutputError: As for [`checkpoints`][oftfx.train.resume.checkpoints]; or nothing can be
                written there.
        """
        if self.resumed:
            return
        # Checked again: someone may have used the place while the model was loaded.
        _check_free(self.directory, self.force)
        with writing(self.directory):
            if self.directory.exists():
                shutil.rmtree(self.directory)
            self.directory.mkdir(parents=True)
            with replacing(self.directory / RECORD) as fresh:
                fresh.write_text(json.dumps(self.asked, indent=1) + "\n")

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


def directory_beside(out: Path) -> Path:
    """Where the checkpoints of a job are that writes to ``out``."""
    out = out.expanduser().resolve()
    return out.with_name(f"{out.name}.checkpoints")


def checkpoints(job: "Job") -> Checkpoints | None:
    """Finds the checkpoints of a job, or the place for them; None if it wants none.

    Raises:
        OutputError: The directory is someone else's; or it holds those of an earlier run, which
            neither is resumed nor may be replaced; or there is nothing to resume; or the earlier
            run was another job, or read other text.
    """
    if job.checkpoint_every is None and not job.resume:
        return None
    directory = directory_beside(job.out)
    asked = json.loads(json.dumps({**vars(job), "spec": job.spec.to_json()}, default=str))
    asked[TEXTS] = _digests(job)
    if job.resume:
        earlier = _earlier(directory, asked)
        every = job.checkpoint_every or earlier
    else:
        assert job.checkpoint_every is not None
        every = job.checkpoint_every
        _check_free(directory, job.force)
    return Checkpoints(directory, every, asked, job.force, job.resume)


def _check_free(directory: Path, force: bool) -> None:
    """That checkpoints can be begun: there are none, or they are ours and may go."""
    if not directory.exists() or (directory.is_dir() and not any(directory.iterdir())):
        return
    if not (directory / RECORD).is_file():
        raise OutputError(f"{directory} exists and was not written by oftfx: move it away.")
    if not force:
        raise OutputError(
            f"{directory} holds an earlier run: go on with --resume, or begin anew with --force."
        )


def _earlier(directory: Path, asked: dict[str, Any]) -> int:
    """The steps between checkpoints of an earlier run, which must have been the same job."""
    record = directory / RECORD
    if not record.is_file():
        raise OutputError(f"{directory} holds nothing to resume; leave --resume out.")
    try:
        stored = json.loads(record.read_text("utf-8"))
        every: int = stored["checkpoint_every"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise OutputError(
            f"{record} is damaged ({error}): begin anew with --force, without --resume."
        ) from error
    fixed = [key for key in asked if key not in (*FREE, TEXTS)]
    other = [key for key in fixed if stored.get(key) != asked[key]]
    if other:
        was = ", ".join(f"{key}={stored.get(key)}" for key in other)
        raise OutputError(f"{directory} was made with {was}: resume with the same.")
    texts = stored.get(TEXTS, {})  # earlier versions kept none
    for source, digest in asked[TEXTS].items():
        if texts.get(source, digest) != digest:
            raise OutputError(
                f"{source} has changed since {directory} was made: resume with the text as it "
                "was, or begin anew with --force, without --resume."
            )
    return every


def _digests(job: "Job") -> dict[str, str]:
    """What the files held from which the job takes its text."""
    found = {}
    for source in (job.data, job.held_out):
        if isinstance(source, str) and (path := Path(source).expanduser()).is_file():
            with path.open("rb") as file:
                found[source] = hashlib.file_digest(file, "sha256").hexdigest()
    return found
