"""The jobs of a study one after the other, so many at a time: what runs next, and what became of it."""

import time
from contextlib import suppress

from mmfusion.branch import NEW_RUN
from mmfusion.retrieval.report import primary_view, read_results
from mmfusion.study.definition import LOGS
from mmfusion.study.diary import Diary
from mmfusion.study.estimate import time_left
from mmfusion.study.jobs import Job
from mmfusion.study.processes import END, Child, is_alive, start, stop
from mmfusion.study.progress import Progress, progress
from mmfusion.study.signals import Interrupted, Signals
from mmfusion.study.slots import environment

PAUSE = 0.2  # seconds between two looks at what runs
TELL = 60.0  # seconds between two lines that say how far it is
GOES_ON = "the same command goes on from here"


class Queue:
    """The jobs of a study and what runs. A job takes a free slot; a slot has its share of cores and GPUs."""

    def __init__(
        self, jobs: list[Job], shared: dict[Job, list[str]], diary: Diary, side_by_side: int, signals: Signals
    ) -> None:
        self.signals, self.told = signals, time.monotonic()
        self.jobs, self.shared, self.diary, self.slots = jobs, shared, diary, side_by_side
        self.waiting = [job for job in jobs if job.state() != "done"]
        self.running: dict[Job, tuple[Child, int]] = {}
        self.failed: list[Job] = []
        self.foreign: set[Job] = set()
        self.environments = [environment(slot, side_by_side) for slot in range(side_by_side)]

    def run(self) -> list[Job]:
        """Returns those that failed. Whatever goes wrong, nothing runs on afterwards.

        Raises Interrupted, and ValueError where the disk is full or what the study writes is taken away.
        """
        done = len(self.jobs) - len(self.waiting)
        study = self.jobs[0].plan.study.name
        logs = self.jobs[0].plan.folder / LOGS
        self.say(f"{study}: {len(self.jobs)} runs, {done} done, {self.slots} at a time; logs in {logs}")
        for job in self.jobs:
            if job not in self.waiting:
                self.diary.cost(job)
        self.find_foreign()
        with self.signals.counted():
            try:
                self.work()
            except OSError as error:
                raise ValueError(f"{error}. The runs are stopped; once that is mended, {GOES_ON}") from error
            finally:
                stopped = bool(self.waiting or self.running)
                self.stop_all()
        if stopped:
            raise Interrupted
        return self.failed

    def work(self) -> None:
        """Until all is done, or a signal came."""
        while (self.waiting or self.running) and not self.signals.asked:
            self.start_some()
            time.sleep(PAUSE)
            self.collect()
            self.collect_foreign()
            if time.monotonic() - self.told > TELL:
                self.tell()

    def start_some(self) -> None:
        for job in list(self.waiting):
            if self.signals.asked:
                return
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
                tail = [*child.tail(), *_advice(job, child)]
                self.diary.ends(job, "failed", rc, tail)
                self.failed.append(job)
                last = "\n".join(f"    {line}" for line in tail)
                self.say(f"{job.name} FAILED with exit code {rc} ({job.log}):\n{last}\n{self.left()}")

    def stop_all(self) -> None:
        """What still runs, and says so; nothing where all is done."""
        if not self.waiting and not self.running:
            return
        children = [child for child, _ in self.running.values()]
        names = ", ".join(job.name for job in self.running)
        with suppress(OSError):  # a terminal that is gone
            if children:
                self.say(f"stopping {names}; once more Ctrl-C kills")
        asked = self.signals.asked
        stop(children, lambda: self.signals.asked > asked)
        with suppress(OSError):  # a full disk too
            for job, (child, _) in self.running.items():
                self.diary.ends(job, "done" if job.state() == "done" else "stopped", child.process.poll(), child.tail())
        with suppress(OSError):
            done = sum(job.state() == "done" for job in self.jobs)
            self.say(f"stopped with {done} of {len(self.jobs)} runs done; {GOES_ON}")

    def tell(self) -> None:
        """What runs, and how far it is."""
        self.told = time.monotonic()
        far = {job: self.progress(job) for job in self.running}
        lines = [f"{job.name}: {there or 'no step yet'}" for job, there in far.items()]
        self.say("; ".join([*lines, *(f"{job.name} runs" for job in self.foreign), self.left()]))

    def progress(self, job: Job) -> Progress | None:
        return progress(self.running[job][0].said(END))

    def left(self) -> str:
        """How many are done, and how long the others take."""
        done = len(self.jobs) - len(self.waiting) - len(self.running) - len(self.failed)
        now = time.time()
        spent = {job: (now - child.started) / 60 for job, (child, _) in self.running.items()}
        far = {job: self.progress(job) for job in self.running}
        known = {job: there.minutes for job, there in far.items() if there is not None and there.minutes is not None}
        minutes = time_left(self.waiting, spent, self.diary.jobs, self.slots, known)
        failed = f", {len(self.failed)} failed" if self.failed else ""
        return f"{done} of {len(self.jobs)} done{failed}" + (f", about {minutes:.0f} min left" if minutes else "")

    def say(self, text: str) -> None:
        print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def _advice(job: Job, child: Child) -> list[str]:
    """What its message cannot know, as it knows nothing of studies."""
    if NEW_RUN not in child.said():
        return []
    stages = ", ".join(job.plan.stages(job.arm)[: job.plan.stages(job.arm).index(str(job.prefix)) + 1])
    return [
        f"arm {job.arm} differs from the others in stages that it shares with them ({stages}): give it `prefix: null` "
        "in the study's file, and it trains them by itself; or leave out what differs"
    ]


def _group(job: Job) -> tuple[str, int]:
    return job.variant, job.seed


def _score(job: Job) -> str:
    """The primary view's nDCG@10 on val: test numbers are for the report."""
    views = read_results(job.run / "results.json").get("val", {})
    cells = views[primary_view(views)] if views else {}
    shown = next(((name, cell["value"]) for name, cell in cells.items() if name.endswith("/ndcg@10")), None)
    return f": val {shown[0]} {shown[1]:.3f}" if shown and shown[1] is not None else ""
