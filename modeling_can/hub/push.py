"""
A folder on its way to the Hub, while the run that fills it goes on.

`Push` takes a snapshot and uploads it from a process of its own: this very file, run as a program, which needs
huggingface_hub alone. A process, and not a thread, because one that hangs can be ended, and because hashing does not
hold up the loop in it. Nothing here raises into a run that has begun; what went wrong is told at its end.
"""

import atexit
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import threading
import time
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_session, get_token, set_client_factory
from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled
from huggingface_hub.utils import filter_repo_objects


__all__ = [
    "CHECK_SECONDS",
    "LAST_CHECKPOINT",
    "PAUSES",
    "REQUEST_SECONDS",
    "STOP_SECONDS",
    "WAIT_SECONDS",
    "Push",
    "main",
    "unfinished_card",
]


PAUSES = (5.0, 30.0, 120.0)  # seconds before an upload is tried again, beside what huggingface_hub retries by itself
REQUEST_SECONDS = 60.0  # for which the Hub may be silent
_UPLOAD_SECONDS = 3600.0  # for all of an upload; what has arrived by then is not sent again
CHECK_SECONDS = 10.0  # for the question, before training, whether the Hub is there
WAIT_SECONDS = 1800.0  # for the last upload, at the end of a run
STOP_SECONDS = 5.0  # the same, where the run was told to stop

# What stays here: checkpoints, which only the user can ask for, paths on this machine, and hidden files.
_EXCLUDED = ["checkpoints/*", "bad_samples.jsonl", ".*"]
_LINKED = (".safetensors", ".pt")  # large, and replaced or removed but never rewritten; all else is copied
LAST_CHECKPOINT = "last-checkpoint"  # its name in a repository, as transformers has it


class Push:
    """
    The uploads of an output folder, one after the other; a newer snapshot replaces one that still waits.

    Args:
        folder (`Path`): The output folder.
        repo_id (`str`): `NAME` or `ORGANIZATION/NAME`; it is created at the first upload.
        private (`bool`): Whether it must be private.

    Raises:
        ValueError: if there is no token.
    """

    def __init__(self, folder: Path, repo_id: str, private: bool = False):
        if get_token() is None:
            raise ValueError(
                f"push_to_hub: there is no token to write to {repo_id} with; set HF_TOKEN, or log in with "
                "`hf auth login`"
            )
        self.folder, self.repo_id, self.private = Path(folder), repo_id, private
        self.snapshots = self.folder / ".push"  # on the same disk, so that large files can be linked
        self.number = 0  # of the newest snapshot
        self.waiting, self.is_busy, self.is_closed, self.process = None, False, False, None
        self.commit, self.error, self.checkpoint = None, None, None
        self.trouble = None  # what the last try said, while there are more
        self.changed = threading.Condition()
        self.thread = threading.Thread(target=self._work, daemon=True)
        self.thread.start()
        atexit.register(self.close)  # of a run that ends with an error

    def check(self) -> str | None:
        """
        What there is to say about uploading now, in words: that the Hub cannot be reached, or what will be replaced.

        Raises:
            ValueError: if the Hub says that the token is not valid.
        """
        answer = self._ask({"repo_id": self.repo_id, "folder": None}, CHECK_SECONDS)
        if answer.get("status") == 401:
            raise ValueError(
                f"push_to_hub: the Hub refuses the token ({answer['error']}); set another HF_TOKEN, or log in with "
                "`hf auth login`"
            )
        if "error" in answer:
            return f"the Hub cannot be used now: {answer['error']}. The run goes on, and uploads when it can"
        if answer["exists"]:
            return f"{self.repo_id} is on the Hub already: its files are replaced, in new commits"
        return None

    def hand_over(self, message: str, fill=None, also: dict[str, Path] | None = None):
        """
        Uploads the output folder as it is now, later, but for `_EXCLUDED`.

        Args:
            message (`str`): Of the commit.
            fill (callable, *optional*): Is given the snapshot's folder, to write what the output folder does not hold
                yet; what it wrote counts before that.
            also (`dict[str, Path]`, *optional*): Files and folders from elsewhere, by their names in the repository.
        """
        if self.number == 0:
            shutil.rmtree(self.snapshots, ignore_errors=True)  # of a run that was killed
        self.number += 1
        snapshot, also = self.snapshots / str(self.number), also or {}
        try:
            snapshot.mkdir(parents=True)
            if fill:
                fill(snapshot)
            for name, path in also.items():
                for source in filter(Path.is_file, [path, *path.rglob("*")]):
                    _put(source, snapshot / name / source.relative_to(path))
            for name in filter_repo_objects(self.names(), ignore_patterns=_EXCLUDED):
                if not (snapshot / name).exists():
                    _put(self.folder / name, snapshot / name)
        except OSError as error:  # a full disk, say
            shutil.rmtree(snapshot, ignore_errors=True)
            with self.changed:
                self.error = f"there could be no copy to upload: {error}"
            return
        self.checkpoint = also.get(LAST_CHECKPOINT)
        with self.changed:
            replaced, self.waiting = self.waiting, (self.number, snapshot, message)
            self.changed.notify_all()
        if replaced:
            shutil.rmtree(replaced[1], ignore_errors=True)

    def names(self) -> list[str]:
        """The files of the output folder; not those in folders that stay here, which may vanish meanwhile."""
        names = []
        for parent, folders, files in os.walk(self.folder):
            if Path(parent) == self.folder:
                folders[:] = filter_repo_objects(folders, ignore_patterns=["checkpoints", ".*"])
            names += [str(Path(parent, file).relative_to(self.folder)) for file in files]
        return names

    def is_idle(self) -> bool:
        return self.waiting is None and not self.is_busy

    def finish(self, seconds: float, stop=lambda: False) -> dict:
        """
        Waits for the last upload, and gives it up after some time or when `stop` answers yes. Returns what
        `results.json` says about it: `repository`, `commit`, the last one, and `error`, each `None` if there is none.
        """
        end = time.monotonic() + seconds
        is_stopped = False
        with self.changed:
            while not self.is_idle() and time.monotonic() < end and not is_stopped:
                self.changed.wait_for(self.is_idle, 0.2)
                is_stopped = stop()
            if not self.is_idle():
                reason = "you gave it up" if is_stopped else "it was not finished in the time that there was"
                last = self.trouble or self.error
                self.error = reason + (f"; the last try: {last}" if last else "")
        self.close()
        return {"repository": self.repo_id, "commit": self.commit, "error": self.error}

    def close(self):
        """Gives up what is not uploaded yet, and removes all snapshots."""
        with self.changed:
            self.is_closed = True
            self.changed.notify_all()
            if self.process:
                self.process.kill()
        self.thread.join()
        if self.number:
            shutil.rmtree(self.snapshots, ignore_errors=True)
        atexit.unregister(self.close)

    def command(self) -> str:
        """For a shell: uploads the same files."""
        upload = ["hf", "upload", self.repo_id]
        options = ["--repo-type", "model", *(["--private"] if self.private else [])]
        excluded = [word for pattern in _EXCLUDED for word in ("--exclude", pattern)]
        text = shlex.join([*upload, str(self.folder), ".", *options, *excluded])
        if self.checkpoint:
            text += " && " + shlex.join([*upload, str(self.checkpoint), LAST_CHECKPOINT, *options])
        return text

    def _work(self):
        """The thread: waits for snapshots and for the processes that upload them."""
        while True:
            with self.changed:
                self.is_busy = False
                self.changed.notify_all()
                self.changed.wait_for(lambda: self.waiting or self.is_closed)
                if self.is_closed:
                    return
                (number, snapshot, message), self.waiting, self.is_busy = self.waiting, None, True
            answer = self._upload(snapshot, message)
            shutil.rmtree(snapshot, ignore_errors=True)
            with self.changed:
                if "commit" in answer:
                    self.repo_id, self.commit = answer["repo_id"], answer["commit"]
                # What became of an older one matters no more, nor what one says that was given up.
                if number == self.number and ("commit" in answer or not self.is_closed):
                    self.error = answer.get("error")

    def _upload(self, snapshot: Path, message: str) -> dict:
        job = {"repo_id": self.repo_id, "private": self.private, "folder": str(snapshot), "message": message}
        for pause in (*PAUSES, None):
            answer = self._ask(job, _UPLOAD_SECONDS)
            if pause is None or not answer.get("is_worth_another_try"):
                break
            with self.changed:
                self.trouble = answer["error"]
                if self.changed.wait_for(lambda: self.waiting or self.is_closed, pause):
                    break
        return answer

    def _ask(self, job: dict, seconds: float) -> dict:
        """The answer of `_do`, from a process of its own."""
        with self.changed:
            if self.is_closed:
                return {"error": "given up"}
            try:
                self.process = process = subprocess.Popen(
                    # Without this folder on its path, where e.g. data.py lies
                    [sys.executable, "-P", __file__],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    bufsize=0,
                    env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
                    start_new_session=True,  # Ctrl-C is for the run, which decides
                )
            except OSError as error:
                return {"error": f"the uploading process could not be started: {error}", "is_worth_another_try": True}
        with process:
            try:
                process.stdin.write(json.dumps({**job, "request_seconds": REQUEST_SECONDS}).encode() + b"\n")
                process.wait(seconds)
            except subprocess.TimeoutExpired:
                process.kill()
                return {"error": f"the Hub did not answer within {seconds:.0f} s", "is_worth_another_try": True}
            except BrokenPipeError:
                process.wait()
            answer = process.stdout.read()
        lost = {"error": f"the uploading process ended with {process.returncode}", "is_worth_another_try": True}
        return json.loads(answer.splitlines()[-1]) if process.returncode == 0 else lost


def _put(source: Path, target: Path):
    """A copy that stays as it is, whatever becomes of its source; without the space for it where that is safe."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.suffix in _LINKED:
        try:
            return os.link(source, target)
        except OSError:
            pass  # there are file systems without links
    shutil.copyfile(source, target)


def unfinished_card(name: str, step: int, num_steps: int) -> str:
    """README.md of weights that are not trained to the end yet."""
    return f"""---
library_name: transformers
pipeline_tag: image-feature-extraction
tags:
- can
- self-supervised-learning
---

# {name}

A vision encoder **in training** with CAN ([arXiv 2210.16870](https://arxiv.org/abs/2210.16870)): these are the weights
after step {step:,} of {num_steps:,}. The next upload replaces them, and the last one this page too. `recipe.yaml` is
the input of the run, and `metrics.jsonl` holds its metrics so far.
"""


# --- The process -----------------------------------------------------------------------------------------------------


def _do(job: dict) -> dict:
    """
    Uploads a folder in one commit, and returns `repo_id` and `commit`; without a folder asks whether the repository
    `exists`. What fails returns `error`, in one line and without the token, the HTTP `status`, if there is one, and
    whether it `is_worth_another_try`.
    """
    session = get_session()
    set_client_factory(  # its own waits for an answer for ever
        lambda: type(session)(event_hooks=session.event_hooks, follow_redirects=True, timeout=job["request_seconds"])
    )
    api = HfApi()
    try:
        if job["folder"] is None:
            name = api.whoami()["name"]
            repo_id = job["repo_id"] if "/" in job["repo_id"] else f"{name}/{job['repo_id']}"
            return {"exists": api.repo_exists(repo_id)}
        repo_id = api.create_repo(job["repo_id"], private=job["private"] or None, exist_ok=True).repo_id
        if job["private"] and not api.model_info(repo_id).private:
            return {"error": f"{repo_id} is there already, and it is public; hub_private needs another hub_model_id"}
        folder = Path(job["folder"])
        operations = [
            CommitOperationAdd(path.relative_to(folder).as_posix(), str(path))
            for path in sorted(folder.rglob("*"))
            if path.is_file()
        ]
        # Not upload_folder, which makes several commits of a large folder, between which nothing fits together.
        commit = api.create_commit(repo_id, operations, commit_message=job["message"])
        return {"repo_id": repo_id, "commit": commit.oid}
    except Exception as error:  # whatever it is, the run has to hear of it
        causes = [error]
        while causes[-1].__cause__ and not isinstance(causes[-1], HfHubHTTPError):
            causes.append(causes[-1].__cause__)
        status = causes[-1].response.status_code if isinstance(causes[-1], HfHubHTTPError) else None
        refused = status is not None and 400 <= status < 500 and status not in (408, 409, 412, 429)
        text = ": ".join(dict.fromkeys(str(cause) or type(cause).__name__ for cause in causes))
        text = " ".join(re.sub(r"For more information check: \S+", "", text).split())
        return {
            "status": status,
            "error": text.replace(get_token() or "\0", "HF_TOKEN"),
            "is_worth_another_try": not refused and not isinstance(error, OfflineModeIsEnabled),
        }


def main():
    job = json.loads(sys.stdin.readline())
    # The run holds the other end of the pipe: when it is killed, this ends as well.
    threading.Thread(target=lambda: (sys.stdin.read(), os._exit(1)), daemon=True).start()
    if hasattr(os, "nice"):  # not on Windows
        os.nice(10)  # the loader of the data goes first
    answer = json.dumps(_do(job))
    sys.stdout.write(answer)
    sys.stdout.flush()
    os._exit(0)  # without waiting for threads that may hang


if __name__ == "__main__":
    main()
