"""Processes that change, kill and damage stores: parts of `benchmarks.store.torture`."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.serving.callers import LoadProcess
from benchmarks.store.torture_readers import DEADLINE, Contents, Findings, answers_of, crash
from tagstore import errors
from tagstore.upkeep.verify import verify

_READ_ONLY = 'mount --bind "$0" "$0" && mount -o remount,ro,bind "$0" && exec "$@"'
_LOOK = """
import json, sys
from pathlib import Path
import crash
model, wrong = crash.look(Path(sys.argv[1]), close=False)
print(json.dumps([model.versions, wrong]))
"""


class Torment(crash.Harness):
    """The crash harness on a store that others read: kills, calm rounds, and copies that are damaged."""

    def __init__(self, root: Path, store: str, scratch: Path, journal: Path, seed: int, place: str) -> None:
        crash.NAME = os.environ["CRASH_STORE"] = store  # of this process and of its children
        self._root, self._scratch, self._journal, self._place = root, scratch, journal.open("a"), place
        self.findings, self._pending = Findings(), crash.Model()
        super().__init__(scratch, seed, ways=("clock",))

    def _new_store(self) -> None:
        super()._new_store()
        self.root = self._root

    def began(self, operation: crash.Operation) -> None:
        self._pending = self.model.after(operation)
        self._note(operation)

    def settled(self, model: crash.Model) -> None:
        if model not in (self.model, self._pending):
            return  # a loss, which the harness has noted
        self._note({"committed": model == self._pending})
        self.model = model

    def _note(self, note: dict[str, Any]) -> None:
        self._journal.write(json.dumps(note) + "\n")
        self._journal.flush()

    def calm_round(self) -> None:
        """Let a child do some operations, each within the deadline."""
        child, self._spare = self._spare or crash._Child(None), None
        if not child.receive(DEADLINE):
            self.findings.hangs.append("a writer did not start")
        self.interrupted = None
        for _ in range(self.rng.randint(1, 8)):
            operation = crash.draw(self.rng, self.model, self.serial, self.bundles)
            self.began(operation)
            child.send({**operation, "root": str(self.root)})
            answer = child.receive(DEADLINE)
            if answer is None or "failed" in answer:
                child.end()
                finding = f"{crash.NAME}: {operation['operation']}: {answer or 'no answer'}"
                (self.findings.lost if answer else self.findings.hangs).append(finding)
                self._resolve(operation, close=False)
                return
            self.settled(self.model.after(operation))
            self.figures.acknowledged[operation["operation"]] += 1
        child.end()

    def copy(self) -> Path:
        """Copy the store, which nobody writes now, into a root of its own.

        `lock.mdb` is not read: closing it would drop the locks of this process.
        """
        root = self._scratch / "copies"
        shutil.rmtree(root, ignore_errors=True)
        ignored = shutil.ignore_patterns("lock.mdb")
        shutil.copytree(self.root / crash.NAME, root / crash.NAME, ignore=ignored)
        return root

    def look_at_read_only_copy(self) -> None:
        """Read a copy on a file system that is mounted read-only, or without rights to write it."""
        root = self.copy()
        look = [sys.executable, "-c", _LOOK, str(root)]
        if os.geteuid() == 0:
            # a mount that only this process sees, and that ends with it
            look = ["unshare", "-m", "sh", "-c", _READ_ONLY, str(root), *look]
        else:
            subprocess.run(["chmod", "-R", "a-w", root], check=True)
        path = os.pathsep.join([str(Path(crash.__file__).parent), os.environ.get("PYTHONPATH", "")])
        try:
            run = subprocess.run(
                look, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=DEADLINE
            )
        except subprocess.TimeoutExpired:
            self.findings.hangs.append("a read-only copy was not read in time")
            return
        finally:
            subprocess.run(["chmod", "-R", "u+w", root], check=True)
        if run.returncode and ("mount: " in run.stderr or "unshare: " in run.stderr):
            self.findings.counts["read-only mounts that are not permitted here"] += 1
        elif run.returncode:
            self.findings.wrong.append(f"a read-only copy: {run.stderr[-500:]}")
        else:
            versions, wrong = json.loads(run.stdout)
            if wrong or versions != json.loads(json.dumps(self.model.versions)):
                self.findings.wrong.append(f"a read-only copy holds something else: {wrong[:3]}")
            self.findings.counts["read-only copies, compared in full"] += 1

    def look_at_damaged_copy(self) -> None:
        """Flip a bit of a copy, or cut a file off: it is noticed, or every answer is right."""
        root, cut = self.copy(), self.rng.random() < 0.5
        path = self.rng.choice([p for p in sorted(root.rglob("*")) if p.is_file() and p.stat().st_size])
        at = self.rng.randrange(path.stat().st_size)
        if cut:
            os.truncate(path, at)
        else:
            with path.open("r+b") as file:
                file.seek(at)
                byte = file.read(1)[0] ^ 1 << self.rng.randrange(8)
                file.seek(at)
                file.write(bytes([byte]))
        what = f"{path.relative_to(root)} {'cut to' if cut else 'with a bit flipped at'} {at}"
        versions = dict(
            self.rng.sample(sorted(self.model.versions.items()), min(3, len(self.model.versions)))
        )
        with LoadProcess() as process:  # damage may kill it
            asked = f"file://{root}", crash.NAME, versions, self.rng.randrange(1 << 30)
            try:
                outcomes = process(answers_of, *asked, timeout=DEADLINE)
            except TimeoutError:
                outcomes = ["hangs"]
            except (EOFError, ConnectionError):
                outcomes = ["the process died"]
        try:
            problems = [problem.what for problem in verify(root, crash.NAME, full=True)]
        except errors.TagstoreError as error:
            problems = [str(error)]
        kind = "cut" if cut else "flipped"
        bad = [outcome for outcome in outcomes if outcome not in ("right", "refused")]
        counts = self.findings.counts
        if "hangs" in outcomes:
            self.findings.hangs.append(f"{what}: no answer")
        elif bad and (cut or not problems):
            self.findings.wrong.append(f"{what}: {bad[:3]}, verify: {problems[:3]}")
        elif bad:
            effect = "killed their reader" if "process" in bad[0] else "answered wrongly"
            counts[f"flipped copies that {effect}, until `verify` named the damage"] += 1
        elif problems:
            counts[f"{kind} copies refused or named as damaged"] += 1
        else:
            counts[f"{kind} copies without harm: what is gone is not in use"] += 1
        if cut:
            self._ask_server(root, what, versions)

    def _ask_server(self, root: Path, what: str, versions: Contents) -> None:
        """Put a cut copy before the server, for a while."""
        name = f"cut-{crash.NAME}"
        (root / crash.NAME).rename(self.root / name)
        outcomes = answers_of(self._place, name, versions, self.rng.randrange(1 << 30))
        (self.root / name).rename(root / name)
        if bad := [outcome for outcome in outcomes if outcome not in ("right", "refused")]:
            self.findings.wrong.append(f"{what}, served: {bad[:3]}")
        self.findings.counts["cut copies put before the server"] += 1


def write(
    root: str, store: str, scratch: str, journal: Path, seed: int, seconds: float, place: str
) -> Findings:
    """Change a store, kill its writers, and look at damaged and read-only copies of it."""
    torment = Torment(Path(root), store, Path(scratch), journal, seed, place)
    findings, end, rng = torment.findings, time.monotonic() + seconds, torment.rng
    try:
        while time.monotonic() < end and not (findings.enough() or torment.figures.lost):
            (torment._round if rng.random() < 0.6 else torment.calm_round)()
            if rng.random() < 0.3 and torment.model.versions:
                rng.choice([torment.look_at_damaged_copy] * 2 + [torment.look_at_read_only_copy])()
    finally:
        if torment._spare:
            torment._spare.end()
    figures = torment.figures
    findings.lost += figures.lost
    if torment.model.versions and not figures.lost:
        findings.lost += [f"an orphan: {path}" for path in crash.orphans(torment.root)]
    for kind, count in figures.acknowledged.items():
        findings.counts[f"acknowledged: {kind}"] += count
    findings.counts["writers killed at a random instant"] += figures.ends["clock"]
    findings.counts["operations in flight at a death"] += sum(figures.in_flight.values())
    findings.counts["versions compared entry by entry"] += figures.versions_compared
    return findings
