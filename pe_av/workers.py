"""Processes that read clips, which may hang or crash and are then replaced.

Each worker has a pipe of its own, so that its death is noticed at once and is attributed to the clip that it was
reading. In pebble's pool, whose workers share one pipe, a worker that died while it was idle ended the whole pool.
"""

import atexit
import multiprocessing
import multiprocessing.connection
import os
import pickle
import queue
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

import numpy as np
import torch
from torch import Tensor

Item = dict[str, Any]


SECONDS_TO_START = 120.0


SECONDS_TO_END = 5.0  # after SIGKILL; a process that waits for a dead network drive is then left behind


# multiprocessing looks after all its processes whenever it starts one, and not thread by thread
_processes = threading.Lock()


def start_pool(read: Callable[[Any], Item], num_workers: int) -> "Pool":
    """Processes that wait for clips, of which `Pool.read` gives them one."""
    return Pool(read, num_workers)


class Threads:
    """Threads that do tasks in the order in which they come. Unlike those of ThreadPoolExecutor, they do not keep the
    interpreter from ending."""

    def __init__(self, count: int):
        self._tasks: queue.SimpleQueue[tuple[Future, Callable, tuple] | None] = queue.SimpleQueue()
        self._threads = [threading.Thread(target=self._work, daemon=True) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def submit(self, do: Callable, *arguments: Any) -> Future:
        future: Future = Future()
        self._tasks.put((future, do, arguments))
        return future

    def stop(self) -> None:
        """Tasks that have not begun are cancelled, the threads end after the ones that have."""
        while not self._tasks.empty():
            task = self._tasks.get()
            if task is not None:
                task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)

    def join(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0.0))

    def _work(self) -> None:
        while (task := self._tasks.get()) is not None:
            future, do, arguments = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                future.set_result(do(*arguments))
            except BaseException as error:
                future.set_exception(error)
            del task, future, do, arguments  # not held while waiting for the next


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection


class Pool:
    """Processes that read clips, one thread here for each, which waits for it and replaces it when it is gone.

    They are forked from a server that has no threads and no CUDA, so that starting one, at any time, is safe and quick.
    """

    def __init__(self, read: Callable[[Any], Item], num_workers: int):
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pe_av.data.clips"])
        _start_server()
        self._read = read
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(num_workers):
            self._idle.put(None)  # started when there is something to read
        self._workers: list[_Worker] = []
        self._closed, self._close = multiprocessing.Pipe(duplex=False)  # readable once the pool is closed
        self._threads = Threads(num_workers)
        atexit.register(self.close)  # else multiprocessing would wait for workers that hang

    def read(self, clip: Any, time_limit: float | None = None) -> Future:
        """The item that a worker makes of a clip, or {"id", "error"}.

        Args:
            time_limit: seconds, from when a worker begins.
        """
        return self._threads.submit(self._read_one, clip, time_limit)

    def close(self) -> None:
        """Kill the workers, whatever they do; what is not read is cancelled. Takes seconds at most."""
        atexit.unregister(self.close)
        self._threads.stop()
        with _processes:
            self._close.close()
            for worker in self._workers:
                worker.process.kill()
        self._threads.join(SECONDS_TO_END)
        with _processes:
            deadline = time.monotonic() + SECONDS_TO_END
            while self._workers:
                _end(self._workers.pop(), max(deadline - time.monotonic(), 0.0))

    def _read_one(self, clip: Any, time_limit: float | None) -> Item:
        worker = self._idle.get()
        try:
            if worker is not None and multiprocessing.connection.wait([worker.process.sentinel], 0):
                self._retire(worker)  # killed while it was idle, as where memory is short
                worker = None
            if worker is None:
                worker = self._start()
            try:
                answer = self._ask(worker, pickle.dumps(clip), time_limit)
            except TimeoutError:
                self._retire(worker)
                worker = None
                return _bad(clip, f"reading it took more than {time_limit:g} s")
            except (EOFError, OSError):
                code = self._retire(worker)
                worker = None
                return _bad(clip, f"reading it ended the process ({code})")
            return _unpacked(clip, answer)
        finally:
            self._idle.put(worker)

    def _start(self) -> _Worker:
        ours, theirs = self._context.Pipe()
        with _processes:
            if self._close.closed:
                raise CancelledError("the pool is closed")
            process = self._context.Process(target=_serve, args=[self._read, theirs])
            process.start()
            worker = _Worker(process, ours)
            self._workers.append(worker)
        theirs.close()
        try:
            self._ask(worker, None, SECONDS_TO_START)
        except (EOFError, OSError) as error:
            raise RuntimeError(
                f"a process that reads clips did not start (exit code {self._retire(worker)})"
            ) from error
        return worker

    def _ask(self, worker: _Worker, question: bytes | None, time_limit: float | None) -> bytes:
        """What a worker says next.

        Raises:
            TimeoutError: it has not done so in time.
            EOFError, OSError: it has died.
            CancelledError: the pool was closed.
        """
        if question is not None:
            worker.pipe.send_bytes(question)
        ready = multiprocessing.connection.wait([worker.pipe, worker.process.sentinel, self._closed], time_limit)
        if self._closed in ready:
            raise CancelledError("the pool was closed")
        if not ready:
            raise TimeoutError
        if worker.pipe not in ready:  # not to be read from: a process that this one has started may hold the other end
            raise EOFError
        return worker.pipe.recv_bytes()

    def _retire(self, worker: _Worker) -> int | None:
        """Its exit code."""
        with _processes:
            if worker not in self._workers:
                raise CancelledError("the pool was closed")
            self._workers.remove(worker)
            return _end(worker, SECONDS_TO_END)


def _start_server() -> None:
    """The process that workers are forked from, deaf to the signals that are for the process that trains."""
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may set signals
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
    before = {number: signal.signal(number, signal.SIG_IGN) for number in numbers}
    try:
        forkserver.ensure_running()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end(worker: _Worker, seconds: float) -> int | None:
    worker.process.kill()
    worker.process.join(seconds)
    worker.pipe.close()
    code = worker.process.exitcode
    if code is not None:
        worker.process.close()
    return code


def _unpacked(clip: Any, answer: bytes) -> Item:
    try:
        item = pickle.loads(answer)
    except Exception as error:
        return _bad(clip, _told(error))
    if isinstance(item, str):
        return _bad(clip, item)
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in item.items()}


def _serve(read: Callable[[Any], Item], pipe: Connection) -> None:
    """A worker's life: a clip comes, what was read of it goes, or as text why nothing was."""
    torch.set_num_threads(1)  # the workers are the parallelism
    # they are for the process that trains, which has a step to finish; schedulers send them to everyone
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    try:
        pipe.send_bytes(b"ready")
        while True:
            pipe.send_bytes(_answer(read, pipe.recv_bytes()))
    except (EOFError, OSError):
        return  # the pool is closed


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    multiprocessing.connection.wait([parent.sentinel])
    os._exit(1)


def _answer(read: Callable[[Any], Item], question: bytes) -> bytes:
    try:
        item = read(pickle.loads(question))
        # arrays instead of tensors, which pickle slowly
        return pickle.dumps({k: v.numpy() if isinstance(v, Tensor) else v for k, v in item.items()})
    except BaseException as error:  # also SystemExit, which some library may think is its to raise
        return pickle.dumps(_told(error))


def read_all(
    clips: Sequence[Any], read: Callable[[Any], Item], num_workers: int, time_limit: float | None = None
) -> Iterator[Item]:
    """Every clip read, in order; the arguments are those of `Loader`."""
    if num_workers == 0:
        yield from (_item(read, clip) for clip in clips)
        return
    pool = start_pool(read, num_workers)
    pending: deque[Future] = deque()
    try:
        for clip in clips:
            pending.append(pool.read(clip, time_limit))
            if len(pending) >= 8 * num_workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.close()


def _item(read: Callable[[Any], Item], clip: Any) -> Item:
    try:
        return read(clip)
    except Exception as error:  # whatever it is, it costs this clip and not the run
        return _bad(clip, _told(error))


def _bad(clip: Any, why: str) -> Item:
    return {"id": clip.id, "error": f"{clip.video or clip.audio}: {why}"}


def _told(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
