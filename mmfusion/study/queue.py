"""The jobs of a study one after the other, so many at a time: what runs next, and what became of it."""

import time

from mmfusion.retrieval.report import primary_view, read_results
from mmfusion.study.diary import Diary
from mmfusion.study.estimate import time_left
from mmfusion.study.jobs import Job
from mmfusion.study.processes import Child, is_alive, start, stop
from mmfusion.study.slots import environment

PAUSE = 0.2  # seconds between two looks at what runs


class Interrupted(BaseException):
    """Ctrl-C, or a signal to stop; the runs have been stopped."""


class Queue:
    """The jobs of a study and what runs. A job takes a free slot; a slot has its share of cores and GPUs."""

    def __init__(self, jobs: list[Job], shared: dict[Job, list[str]], diary: Diary, side_by_side: int) -> None:
        self.jobs, self.shared, self.diary, self.slots = jobs, shared, diary, side_by_side
        self.waiting = [job for job in jobs if job.state() != "done"]
        self.running: dict[Job, tuple[Child, int]] = {}
        self.failed: list[Job] = []
        self.foreign: set[Job] = set()
        self.environments = [environment(slot, side_by_side) for slot in range(side_by_side)]

    def run(self) -> list[Job]:
        done = len(self.jobs) - len(self.waiting)
        study = self.jobs[0].plan.study.name
        logs = self.jobs[0].log.parent
        self.say(f"study {study}: {len(self.jobs)} runs, {done} done, {self.slots} at a time; logs in {logs}")
        for job in self.jobs:
            if job not in self.waiting:
                self.diary.cost(job)
        self.find_foreign()
        try:
            while self.waiting or self.running:
                self.start_some()
                time.sleep(PAUSE)
                self.collect()
                self.collect_foreign()
        except KeyboardInterrupt:
            self.interrupt()
            raise Interrupted from None
        return self.failed

    def start_some(self) -> None:
        for job in list(self.waiting):
            free = set(range(self.slots)) - {taken for _, taken in self.running.values()}
            if len(free) <= len(self.foreign):
                return
            if job not in self.foreign and (job.state() == "resume" or not self.awaited(job)):
                self.begin(job, min(free))

    def find_foreign(self) -> None:
        """No other command can start a run now; those that still run an earlier one left when it was killed."""
        self.foreign = {job for job in self.waiting if is_alive(job.log)}
        for job in self.foreign:
            self.say(f"{job.name} still runs, started by an earlier command: waiting for it")

    def collect_foreign(self) -> None:
        for job in [job for job in self.foreign if not is_alive(job.log)]:
            self.foreign.remove(job)
            if job.state() == "done":
                self.waiting.remove(job)
                self.diary.ends(job, "done", None, [])
                self.say(f"{job.name} is done{_score(job)}; {self.left()}")

    def beside(self, job: Job) -> list[Job]:
        return [other for other in self.jobs if other is not job and _group(other) == _group(job)]

    def awaited(self, job: Job) -> list[Job]:
        """The jobs that are about to reach the end of a stage which the job could go on from."""
        reached = self.branch(job)
        stages = self.shared[job]
        ahead = stages[stages.index(reached[1]) + 1 :] if reached else stages
        active = [other for other in self.beside(job) if other in self.running or other in self.foreign]
        return [other for other in active if set(ahead) & set(self.shared[other])]

    def branch(self, job: Job) -> tuple[Job, str] | None:
        """The latest shared stage whose end another job has reached, and that job."""
        for stage in reversed(self.shared[job]):
            for other in self.beside(job):
                if stage in self.shared[other] and other.stage_checkpoint(stage).is_file():
                    return other, stage
        return None

    def begin(self, job: Job, slot: int) -> None:
        resumed = job.state() == "resume"
        branch = None if resumed else self.branch(job)
        job.clear()
        stages = self.shared[job]
        ahead = stages if branch is None else stages[stages.index(branch[1]) + 1 :]
        command = job.command(branch and branch[0].stage_checkpoint(branch[1]), ahead)
        settings = {"MMFUSION_VERSION": job.run.name, **self.environments[slot]}
        self.running[job] = (start(command, job.log, settings), slot)
        self.waiting.remove(job)
        self.diary.starts(job, command, branch, self.slots)
        how = " goes on" if resumed else f" branches from {branch[0].name} after {branch[1]}" if branch else " starts"
        self.say(f"{job.name}{how}; {self.left()}")

    def collect(self) -> None:
        for job, (child, _) in list(self.running.items()):
            rc = child.process.poll()
            if rc is None:
                continue
            del self.running[job]
            if rc == 0 and job.state() == "done":
                self.diary.ends(job, "done", rc, [])
                minutes = (time.time() - child.started) / 60
                self.say(f"{job.name} is done in {minutes:.1f} min{_score(job)}; {self.left()}")
            else:
                self.diary.ends(job, "failed", rc, child.tail())
                self.failed.append(job)
                last = "\n".join(f"    {line}" for line in child.tail())
                self.say(f"{job.name} FAILED with exit code {rc} ({job.log}):\n{last}\n{self.left()}")

    def interrupt(self) -> None:
        children = [child for child, _ in self.running.values()]
        if children:
            self.say(f"stopping {', '.join(job.name for job in self.running)}; once more Ctrl-C kills")
        try:
            stop(children)
        finally:
            for job, (child, _) in self.running.items():
                self.diary.ends(job, "done" if job.state() == "done" else "stopped", child.process.poll(), child.tail())
            done = sum(job.state() == "done" for job in self.jobs)
            self.say(f"stopped with {done} of {len(self.jobs)} runs done; the same command goes on from here")

    def left(self) -> str:
        """How many are done, and how long the others take."""
        done = len(self.jobs) - len(self.waiting) - len(self.running) - len(self.failed)
        now = time.time()
        spent = {job: (now - child.started) / 60 for job, (child, _) in self.running.items()}
        minutes = time_left(self.waiting, spent, self.diary.jobs, self.slots)
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return f"{done} of {len(self.jobs)} done{failed}" + (f", about {minutes:.0f} min left" if minutes else "")

    def say(self, text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _group(job: Job) -> tuple[str, int]:
    return job.variant, job.seed


def _score(job: Job) -> str:
    """The primary view's nDCG@10 on val: test numbers are for the report."""
    views = read_results(job.run / "results.json").get("val", {})
    cells = views[primary_view(views)] if views else {}
    shown = next(((name, cell["value"]) for name, cell in cells.items() if name.endswith("/ndcg@10")), None)
    return f": val {shown[0]} {shown[1]:.3f}" if shown and shown[1] is not None else ""
