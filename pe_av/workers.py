"""Processes that read clips, and that are replaced when they hang or crash.

Each worker has a pipe of its own, so that its death is noticed at once and attributed to the clip that it was reading.
In pebble's pool, whose workers share one pipe, the death of an idle worker ended the whole pool, and on a busy machine
7 of 150 crashes went unnoticed.
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

Item = dict[str, Any]  # what was read of a clip, or {"id", "error"}
SECONDS_TO_START = 120.0
SECONDS_TO_END = 5.0  # after SIGKILL; a process that waits for a dead network drive is left behind then
# schedulers send these to all processes, but it is the training process that has a step to finish
_TRAINING_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
# held while a process starts or ends: multiprocessing then looks after all its processes, and is not thread-safe
_processes = threading.Lock()


def read_all(
    clips: Sequence[Any], read: Callable[[Any], Item], num_workers: int, time_limit: float | None = None
) -> Iterator[Item]:
    """The items of all clips, in order; the arguments are those of `Loader`."""
    if num_workers == 0:
        yield from (read_item(read, clip) for clip in clips)
        return
    pool = Pool(read, num_workers)
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


def read_item(read: Callable[[Any], Item], clip: Any) -> Item:
    """The item of a clip, read in this process; whatever goes wrong costs this clip and not the run."""
    try:
        return read(clip)
    except Exception as error:
        return _failed(clip, _line(error))


@dataclass
class _Worker:
    process: BaseProcess
    pipe: Connection


class Pool:
    """Worker processes, each with a thread here that waits for its answers and replaces it when it is gone.

    The workers are forked from a server without threads and CUDA, so that starting one is safe and quick at any time.
    """

    def __init__(self, read: Callable[[Any], Item], num_workers: int):
        """
        Args:
            read: makes an item of a clip; it travels to the workers by pickle, as the clips do.
        """
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(["pe_av.data.clips"])
        _start_server()
        self._read = read
        self._idle: queue.SimpleQueue[_Worker | None] = queue.SimpleQueue()
        for _ in range(num_workers):
            self._idle.put(None)  # a worker is started when there is something to read
        self._workers: list[_Worker] = []
        self._closed, self._close = multiprocessing.Pipe(duplex=False)  # readable once the pool is closed
        self._threads = Threads(num_workers)
        atexit.register(self.close)  # otherwise multiprocessing would wait for workers that hang

    def read(self, clip: Any, time_limit: float | None = None) -> Future:
        """The item that a worker makes of a clip, or {"id", "error"}.

        Args:
            time_limit: seconds from when a worker begins.
        """
        return self._threads.submit(self._read_one, clip, time_limit)

    def close(self) -> None:
        """Kill the workers, whatever they do, and cancel what is not read yet. Takes seconds at most."""
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
                self._retire(worker)  # it was killed while it was idle, as happens when memory is short
                worker = None
            if worker is None:
                worker = self._start()
            try:
                answer = self._ask(worker, pickle.dumps(clip), time_limit)
            except TimeoutError:
                self._retire(worker)
                worker = None
                return _failed(clip, f"reading it took more than {time_limit:g} s")
            except (EOFError, OSError):
                code = self._retire(worker)
                worker = None
                return _failed(clip, f"reading it ended the process ({code})")
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
        """The next message of a worker, after the question if there is one.

        Raises:
            TimeoutError: there was none in time.
            EOFError, OSError: the worker has died.
            CancelledError: the pool was closed.
        """
        if question is not None:
            worker.pipe.send_bytes(question)
        ready = multiprocessing.connection.wait([worker.pipe, worker.process.sentinel, self._closed], time_limit)
        if self._closed in ready:
            raise CancelledError("the pool was closed")
        if not ready:
            raise TimeoutError
        if worker.pipe not in ready:  # reading might block: a child of the dead worker may hold the other end open
            raise EOFError
        return worker.pipe.recv_bytes()

    def _retire(self, worker: _Worker) -> int | None:
        """End a worker for good; returns its exit code."""
        with _processes:
            if worker not in self._workers:
                raise CancelledError("the pool was closed")
            self._workers.remove(worker)
            return _end(worker, SECONDS_TO_END)


class Threads:
    """Threads that do tasks in the order of submission. Unlike a ThreadPoolExecutor's, they do not keep the interpreter
    from ending."""

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
        """Cancel the tasks that have not begun; the threads end after those that have."""
        while not self._tasks.empty():
            task = self._tasks.get()
            if task is not None:
                task[0].cancel()
        for _ in self._threads:
            self._tasks.put(None)

    def join(self, seconds: float) -> None:
        """Wait so long, at most, for the threads to end."""
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
            del task, future, do, arguments  # not kept alive while waiting for the next task


def _start_server() -> None:
    """Start the process that workers are forked from, with the signals ignored that are meant for the training."""
    if threading.current_thread() is not threading.main_thread():
        return  # only the main thread may set signal handlers
    before = {number: signal.signal(number, signal.SIG_IGN) for number in _TRAINING_SIGNALS}
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
        return _failed(clip, _line(error))
    if isinstance(item, str):
        return _failed(clip, item)
    return {name: torch.from_numpy(value) if isinstance(value, np.ndarray) else value for name, value in item.items()}


def _serve(read: Callable[[Any], Item], pipe: Connection) -> None:
    """The life of a worker: for each clip that arrives it sends the item, or a string that says why there is none."""
    torch.set_num_threads(1)  # the parallelism is that of the workers
    for number in _TRAINING_SIGNALS:
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
        # as arrays, since tensors pickle slowly
        return pickle.dumps({k: v.numpy() if isinstance(v, Tensor) else v for k, v in item.items()})
    except BaseException as error:  # also a SystemExit that a library raises
        return pickle.dumps(_line(error))


def _failed(clip: Any, reason: str) -> Item:
    return {"id": clip.id, "error": f"{clip.video or clip.audio}: {reason}"}


def _line(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}".removesuffix(": ")
