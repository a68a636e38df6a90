"""Puts video tools and image stages on Ray: all Ray code for bulk work is here, in `workers` (the actors)
and in `session` (starting and joining Ray).

A flow is a pool of video workers whose streams of clip batches go through pools of stage workers. The
driver only moves references; pictures go from worker to worker through the object store, and a worker
whose pictures are not taken waits (so memory is bounded by the number of workers).

Ray Core and not Ray Data, by measurement: a first result comes 5 s earlier on two cores, a poisoned input
is retried as often as we say (Ray Data retries a task whose worker died for ever), and a video's clips
come back together, which is what the commit protocol needs.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

import datakit
from datakit.errors import ConfigError, DatakitError, ErrorKind
from datakit.process.messages import Done, Failed, ToolSpec
from pipelines.executor.actors import Header, Restarted, StageAnswer, StageWorker, VideoWorker
from pipelines.executor.session import RaySession, end_actor
from pipelines.video_tasks.messages import Advance

NODE_ATTEMPTS = 3
"""Tries of a video whose Ray worker or node was lost."""
STREAM_OBJECTS = 8
"""Objects of a video's stream that may wait unread before its worker pauses."""
MOST_THREADS = 4
"""Decoder threads given to one video when CPUs lie idle."""
MOST_BATCHES = 8
"""Batches of clips that one call of an image stage takes together."""


@dataclass(frozen=True)
class StagePool:
    """A stage that has actors of its own, and what they take.

    Attributes:
        columns: null for clips on which the stage fails.
        pictures: whether it looks at pictures; else it gets the rows of clips that have none, too.
        slots: calls that an actor works on at once; with more than one, each call is one batch.
        worker: class of the actors.
        threads: CPUs that an actor without a GPU makes use of.
    """

    name: str
    spec: ToolSpec
    columns: tuple[str, ...]
    num_cpus: float | None = None
    num_gpus: float = 0.0
    workers: int | None = None
    pictures: bool = True
    slots: int = 1
    worker: type = StageWorker
    threads: int = 1


@dataclass
class Outcome:
    """What became of one job: its clip rows and facts, or the failure of the whole video."""

    key: str
    rows: list[dict] = field(default_factory=list)
    facts: Any = None
    failure: Failed | None = None
    cpu_s: dict[str, float] = field(default_factory=dict)
    advance: Advance = Advance()

    def spend(self, stage: str, cpu_s: float) -> None:
        self.cpu_s[stage] = self.cpu_s.get(stage, 0.0) + cpu_s


class Flow:
    """One bulk run over videos.

    Args:
        session: an entered `RaySession`.
        tool: what a video worker runs; payloads are given by `jobs`.
        stages: image stages, each over every clip.
        workers: most video workers; None: one per CPU.
        attempts: tries of a video whose process died.
        threads: decoder threads per video; 0: several only while CPUs lie idle.
    """

    def __init__(
        self,
        session: RaySession,
        tool: ToolSpec,
        stages: list[StagePool] = (),
        workers: int | None = None,
        attempts: int = 2,
        threads: int = 0,
    ):
        self._ray = session.ray
        self._cpus = int(session.cpus())
        cpu_pools = 1 + sum(1 for s in stages if not s.num_gpus)
        share = 1.0 / cpu_pools  # pools share the CPUs; the operating system balances them
        self._threads = threads
        with_images = any(s.pictures for s in stages)
        self._videos = _Pool(self._ray, VideoWorker, (tool, attempts, with_images), share, 0.0, workers or self._cpus)
        self._stages = {
            s.name: _Pool(
                self._ray,
                s.worker,
                (s.spec,),
                _cpus_of(s, share, self._cpus),
                s.num_gpus,
                self._most(s, session.gpus()),
                s.slots,
            )
            for s in stages
        }
        self._plans = {s.name: s for s in stages}
        self._queues: dict[str, deque[_Batch]] = {s.name: deque() for s in stages}
        self._waiting: deque[_Job] = deque()
        self._running: dict[str, _Job] = {}
        self._answers: dict[Any, tuple[str, Any, list[_Batch]]] = {}  # task -> stage, actor, batches
        self.on_progress: Callable[[dict[str, Advance]], None] = lambda running: None

    def run(self, jobs: Iterable[tuple[str, Callable[[int], Any]] | None]) -> Iterator[Outcome | None]:
        """Process jobs as they come.

        Args:
            jobs: (key, make) pairs, where `make(threads)` gives the payload; None: nothing yet, ask again.

        Yields:
            an outcome per job, in order of completion, and None now and then so that the caller can act.
        """
        source, exhausted = iter(jobs), False
        while not (exhausted and not self._running and not self._waiting):
            while not exhausted and len(self._waiting) < 2 * self._cpus:
                job = next(source, _END)
                if job is _END:
                    exhausted = True
                elif job is None:
                    break
                else:
                    self._waiting.append(_Job(Outcome(job[0]), job[1]))
            self._start_videos(exhausted)
            self._start_batches()
            self._collect()
            for key in [k for k, job in self._running.items() if job.finished()]:
                yield self._running.pop(key).close()
            yield None

    def _most(self, stage: StagePool, gpus: float) -> int:
        """Actors that the cluster has room for."""
        room = gpus / stage.num_gpus if stage.num_gpus else self._cpus / min(stage.threads, self._cpus)
        return stage.workers or max(1, int(room))

    def close(self) -> None:
        for pool in (self._videos, *self._stages.values()):
            pool.close()

    def _start_videos(self, exhausted: bool) -> None:
        if self._congested():
            return
        self._videos.want(len(self._waiting))
        while self._waiting and self._videos.idle:
            job = self._waiting.popleft()
            others = len(self._running) + (len(self._waiting) if exhausted else self._cpus)
            threads = self._threads or max(1, min(MOST_THREADS, self._cpus // (1 + others)))
            job.tries += 1
            job.actor = self._videos.idle.popleft()
            job.stream = job.actor.process.options(
                num_returns="streaming", _generator_backpressure_num_objects=STREAM_OBJECTS
            ).remote(job.make(threads))
            self._running[job.outcome.key] = job

    def _congested(self) -> bool:
        """Pictures are waiting: read no more of them until the stages have caught up."""
        return any(
            len(queue) > 2 * self._stages[name].size
            for name, queue in self._queues.items()
            if self._plans[name].pictures
        )

    def _start_batches(self) -> None:
        for name, queue in self._queues.items():
            pool = self._stages[name]
            pool.want(len(queue))
            while queue and pool.idle:
                count = max(1, min(len(queue) // pool.size, MOST_BATCHES)) if pool.slots == 1 else 1
                batches = [b for b in (queue.popleft() for _ in range(count)) if not b.stale()]
                if batches:
                    actor = pool.idle.popleft()
                    ref = actor.process.remote([b.rows for b in batches], *[b.pictures() for b in batches])
                    self._answers[ref] = (name, actor, batches)

    def _collect(self) -> None:
        """Wait for whatever comes first, and deal with it."""
        streams = {} if self._congested() else {j.stream: j for j in self._running.values() if j.stream is not None}
        starting = {ref: pool for pool in (self._videos, *self._stages.values()) for ref in pool.starting}
        awaited = [*starting, *self._answers, *streams]
        if not awaited:
            time.sleep(0.02)
            return
        ready, _ = self._ray.wait(awaited, num_returns=1, timeout=0.1, fetch_local=False)
        for item in ready:
            if item in starting:
                starting[item].started(item)
            elif item in streams:
                self._read_stream(streams[item])
            else:
                self._read_answer(item)

    def _read_stream(self, job: _Job) -> None:
        try:
            item = self._ray.get(next(job.stream))
            if isinstance(item, Header):
                self._add_batch(job, item.rows, next(job.stream) if item.images else None)
                return
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError, StopIteration) as e:
            self._lose(job, str(e))
            return
        if isinstance(item, Restarted):
            job.restart(item.failure.cpu_s)
        elif isinstance(item, Advance):
            job.outcome.advance = item
            self.on_progress({j.outcome.key: j.outcome.advance for j in self._running.values()})
        elif isinstance(item, (Done, Failed)):
            self._videos.idle.append(job.actor)
            job.actor = job.stream = None
            if isinstance(item, Failed):
                job.outcome.failure = item
                job.outcome.spend("decode", item.cpu_s)
        else:
            job.outcome.facts = item
            for stage, cpu_s in item.cpu_s.items():
                job.outcome.spend(stage, cpu_s)

    def _add_batch(self, job: _Job, rows: list[dict], images: Any) -> None:
        stages = {name for name, plan in self._plans.items() if images is not None or not plan.pictures}
        batch = _Batch(job, job.generation, rows, images, stages)
        job.batches.append(batch)
        for row in rows:
            for plan in self._plans.values():
                row.update(dict.fromkeys(plan.columns))
        for name in batch.open_stages:
            self._queues[name].append(batch)

    def _read_answer(self, ref: Any) -> None:
        stage, actor, batches = self._answers.pop(ref)
        pool = self._stages[stage]
        try:
            answers: list[StageAnswer] = self._ray.get(ref)
        except self._ray.exceptions.RayActorError as e:
            pool.lose(actor)
            self._again(stage, batches, e)
            return
        except self._ray.exceptions.ObjectLostError as e:  # the pictures went with their node
            pool.idle.append(actor)
            for batch in batches:
                if not batch.stale():
                    self._lose(batch.job, str(e))
            return
        except self._ray.exceptions.RayTaskError as e:
            if isinstance(e.cause, DatakitError):  # meant for the user: the stage as a whole cannot go on
                raise e.cause from None
            raise
        pool.idle.append(actor)
        for batch, answer in zip(batches, answers, strict=True):
            batch.job.outcome.spend(stage, answer.cpu_s)
            batch.take(stage, self._plans[stage].columns, answer.results)

    def _again(self, stage: str, batches: list[_Batch], error: Exception) -> None:
        for batch in batches:
            batch.tries += 1
            if batch.tries < NODE_ATTEMPTS:
                self._queues[stage].append(batch)
            else:
                failure = Failed(ErrorKind.CRASH, f"Ray worker lost ({batch.tries} attempts): {error}"[:500])
                batch.take(stage, self._plans[stage].columns, [failure] * len(batch.rows))

    def _lose(self, job: _Job, error: str) -> None:
        """The worker or the node of a video is gone: start anew elsewhere, a bounded number of times."""
        if job.actor is not None:
            self._videos.lose(job.actor)
            job.actor = job.stream = None
        job.restart(0.0)
        if job.tries >= NODE_ATTEMPTS:
            job.outcome.failure = Failed(ErrorKind.CRASH, f"Ray worker lost ({job.tries} attempts): {error}"[:500])
        else:
            self._running.pop(job.outcome.key, None)
            self._waiting.appendleft(job)


_END = object()


@dataclass
class _Job:
    outcome: Outcome
    make: Callable[[int], Any]
    actor: Any = None
    stream: Any = None
    tries: int = 0
    generation: int = 0
    batches: list[_Batch] = field(default_factory=list)

    def restart(self, cpu_s: float) -> None:
        self.generation += 1
        self.batches.clear()
        self.outcome.facts = None
        self.outcome.advance = Advance()
        self.outcome.spend("decode", cpu_s)

    def finished(self) -> bool:
        if self.stream is not None:
            return False
        return self.outcome.failure is not None or not any(b.open_stages for b in self.batches)

    def close(self) -> Outcome:
        outcome = self.outcome
        if outcome.failure is None:
            outcome.rows = [row for batch in self.batches for row in batch.rows]
            if outcome.facts is None or len(outcome.rows) != outcome.facts.clip_count:
                raise AssertionError(f"video {outcome.key}: rows were lost between workers and driver")
        return outcome


@dataclass
class _Batch:
    job: _Job
    generation: int
    rows: list[dict]
    images: Any
    open_stages: set[str]
    tries: int = 0

    def pictures(self) -> Any:
        return [[] for _ in self.rows] if self.images is None else self.images

    def stale(self) -> bool:
        """Its video failed or started anew."""
        return self.generation != self.job.generation or self.job.outcome.failure is not None

    def take(self, stage: str, columns: tuple[str, ...], results: list[dict | Failed]) -> None:
        for row, result in zip(self.rows, results, strict=True):
            if isinstance(result, Failed):
                row["errors"] = [*row["errors"], {"stage": stage, "kind": str(result.kind), "message": result.message}]
            else:
                row.update({name: result[name] for name in columns})
        self.open_stages.discard(stage)
        if not self.open_stages:
            self.images = None


class _Pool:
    """Actors of one kind, started as they are wanted, up to a number. One not yet placed gets no work."""

    def __init__(self, ray, kind: type, arguments: tuple, num_cpus: float, num_gpus: float, most: int, slots: int = 1):
        self._ray = ray
        options = dict(
            num_cpus=num_cpus, num_gpus=num_gpus, max_restarts=0, scheduling_strategy="SPREAD", max_concurrency=slots
        )
        self._remote = ray.remote(**options)(kind)
        self._arguments = arguments
        self._most = most
        self.slots = slots
        self._all: list[Any] = []
        self.idle: deque[Any] = deque()  # an actor with several slots may be in it several times
        self.starting: dict[Any, Any] = {}  # ping -> actor
        self._lost_starts = 0  # in a row

    @property
    def size(self) -> int:
        return max(1, len(self._all) - len(self.starting))

    def want(self, work: int) -> None:
        """Start actors for pieces of work that nobody is free for."""
        lacking = -(-(work - len(self.idle)) // self.slots) - len(self.starting)
        for _ in range(min(lacking, self._most - len(self._all))):
            actor = self._remote.remote(*self._arguments)
            self._all.append(actor)
            self.starting[actor.version.remote()] = actor

    def started(self, ping: Any) -> None:
        actor = self.starting.pop(ping)
        try:
            version = self._ray.get(ping)
        except self._ray.exceptions.RayTaskError as e:
            if isinstance(e.cause, DatakitError):
                raise e.cause from None
            raise
        except (
            self._ray.exceptions.RayActorError
        ) as e:  # its node went, or Ray lost it before it ran: another takes its place
            self.lose(actor)
            self._lost_starts += 1
            if self._lost_starts < NODE_ATTEMPTS:
                return
            raise ConfigError(f"a Ray worker could not start, {NODE_ATTEMPTS} times: {' '.join(str(e).split())}") from e
        self._lost_starts = 0
        if version != datakit.__version__:
            raise ConfigError(f"a Ray worker runs datakit {version}, this is {datakit.__version__}: install the same")
        self.idle.extend([actor] * self.slots)

    def lose(self, actor: Any) -> None:
        if actor in self._all:
            self._all.remove(actor)
        self.idle = deque(other for other in self.idle if other != actor)

    def close(self) -> None:
        for actor in self._all:
            end_actor(self._ray, actor)
        self._all, self.idle, self.starting = [], deque(), {}


def _cpus_of(stage: StagePool, share: float, cpus: int) -> float:
    """GPU actors take no CPU unless told to: the video workers may hold them all."""
    if stage.num_cpus is not None:
        return stage.num_cpus
    return 0.0 if stage.num_gpus else share * min(stage.threads, cpus)
