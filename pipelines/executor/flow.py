"""Puts video tools and image stages on Ray.

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
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from datakit.errors import ErrorKind
from datakit.process.messages import Done, Failed, ToolSpec
from pipelines.executor.actor_pool import NODE_ATTEMPTS, ActorPool, Team
from pipelines.executor.actors import Header, Restarted, StageAnswer, StageWorker, Streamed, VideoWorker
from pipelines.executor.session import RaySession
from pipelines.video_tasks.messages import Advance, VideoFacts

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

    def spend(self, cpu_s: dict[str, float]) -> None:
        add_up(self.cpu_s, cpu_s)


def add_up(total: dict[str, float], cpu_s: dict[str, float]) -> None:
    """Add CPU seconds by stage to a total."""
    for stage, seconds in cpu_s.items():
        total[stage] = total.get(stage, 0.0) + seconds


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
        stages: Sequence[StagePool] = (),
        workers: int | None = None,
        attempts: int = 2,
        threads: int = 0,
    ):
        self._ray: Any = session.ray
        self._cpus = int(session.cpus())
        cpu_pools = 1 + sum(1 for s in stages if not s.num_gpus)
        share = 1.0 / cpu_pools  # pools share the CPUs; the operating system balances them
        self._threads = threads
        with_images = any(s.pictures for s in stages)
        self._videos = ActorPool(
            session, VideoWorker, (tool, attempts, with_images), workers or self._cpus, num_cpus=share
        )
        self._stages = {
            s.name: ActorPool(
                session,
                s.worker,
                (s.spec,),
                self._most(s, session.gpus()),
                s.slots,
                num_cpus=_cpus_of(s, share, self._cpus),
                num_gpus=s.num_gpus,
            )
            for s in stages
        }
        self._plans = {s.name: s for s in stages}
        self._queues: dict[str, deque[_Batch]] = {s.name: deque() for s in stages}
        self._waiting: deque[_Job] = deque()
        self._running: dict[str, _Job] = {}
        self._answers: dict[Any, tuple[str, Team, list[_Batch]]] = {}  # task -> stage, actor, batches
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
                try:
                    job = next(source)
                except StopIteration:
                    exhausted = True
                    break
                if job is None:
                    break
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
            job.stream = job.actor.leader.process.options(
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
                    ref = actor.leader.process.remote([b.rows for b in batches], *[b.pictures() for b in batches])
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
            item: Streamed = self._ray.get(next(job.stream))
            images = next(job.stream) if isinstance(item, Header) and item.images else None
        except (self._ray.exceptions.RayActorError, self._ray.exceptions.ObjectLostError, StopIteration) as e:
            self._lose(job, str(e))
            return
        match item:
            case Header():
                self._add_batch(job, item.rows, images)
            case Restarted():
                job.restart(item.failure.cpu_s)
            case Advance():
                job.outcome.advance = item
                self.on_progress({j.outcome.key: j.outcome.advance for j in self._running.values()})
            case VideoFacts():
                job.outcome.facts = item
                job.outcome.spend(item.cpu_s)
            case Done():
                self._release(job)
            case Failed():
                self._release(job)
                job.outcome.failure = item
                job.outcome.spend({"decode": item.cpu_s})
            case _:
                raise AssertionError(f"a video worker gave a {type(item).__name__}")

    def _release(self, job: _Job) -> None:
        """Its video is through: the worker takes another one."""
        if job.actor is not None:
            self._videos.idle.append(job.actor)
        job.actor = job.stream = None

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
            answers: list[StageAnswer] = pool.answer(ref)
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
        pool.idle.append(actor)
        for batch, answer in zip(batches, answers, strict=True):
            batch.job.outcome.spend({stage: answer.cpu_s})
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


@dataclass
class _Job:
    outcome: Outcome
    make: Callable[[int], Any]
    actor: Team | None = None
    stream: Any = None
    tries: int = 0
    generation: int = 0
    batches: list[_Batch] = field(default_factory=list)

    def restart(self, cpu_s: float) -> None:
        self.generation += 1
        self.batches.clear()
        self.outcome.facts = None
        self.outcome.advance = Advance()
        self.outcome.spend({"decode": cpu_s})

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


def _cpus_of(stage: StagePool, share: float, cpus: int) -> float:
    """GPU actors take no CPU unless told to: the video workers may hold them all."""
    if stage.num_cpus is not None:
        return stage.num_cpus
    return 0.0 if stage.num_gpus else share * min(stage.threads, cpus)
