"""Loads batches onto the device through torch's DataLoader, as a function of the keys alone."""

import errno
import multiprocessing
import os
import resource
import shutil
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import connection, queues
from types import TracebackType
from typing import Any, NoReturn, TypeVar, Unpack

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data._utils import signal_handling

from recipe.data.batch import Batch, HostBatch, Normalise
from recipe.data.datasets import BadImageError, Samples
from recipe.data.sampler import Keys, Split, TrainSampler, ValidationSampler

_SHM = "/dev/shm"
"""Where workers store batches for the main process."""

PREFETCHED = 2
"""Batches uploaded ahead while the GPU computes on one."""

S = TypeVar("S")
T = TypeVar("T")

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a run to end; the main process handles them, not a worker."""

# torch installs a SIGCHLD handler that raises wherever the main thread is when a worker dies. Here, whoever waits for
# that worker's batch notices within 5 s instead.
signal_handling._SIGCHLD_handler_set = True


class WorkerError(RuntimeError):
    """Worker processes have died or lack resources; the message names the remedy."""


class _Loader:
    """The worker processes and the upload to the device, shared by training and validation.

    ``workers`` processes read the images, or this process if it is 0; ``mean`` and ``std`` of the 3 channels are on a
    scale from 0 to 1. Batches raise ``BadImageError`` if an image cannot be read and is not to be skipped, and
    ``WorkerError`` if a worker process has died or lacks resources.
    """

    def __init__(
        self,
        dataset: Samples,
        sampler: Sampler[Keys],
        *,
        workers: int,
        device: torch.device | str,
        dtype: torch.dtype,
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self._device = torch.device(device)
        self._normalise = Normalise(mean, std, device=self._device, dtype=dtype)
        self._dataset = dataset
        self._sampler = sampler
        self._workers = workers
        self._begun: Iterator[HostBatch] | None = None
        self._stream: torch.cuda.Stream | None = None
        self._loader = self._new_loader()

    def close(self) -> None:
        """Stop the worker processes; a later pass starts new ones."""
        self._begun = None
        self._loader = self._new_loader()

    def _new_loader(self) -> DataLoader:
        processes: dict[str, Any] = {}
        if self._workers:
            processes = {
                # A forked worker exits when its parent is gone, so it does not outlive a killed rank. With
                # forkserver, the parent is the server, and both would live for ever. With spawn, every worker would
                # import torch, and DeepSpeed with the main module.
                "multiprocessing_context": multiprocessing.get_context("fork"),
                "worker_init_fn": _set_up_worker,
                "persistent_workers": True,
            }
        return DataLoader(
            self._dataset,
            batch_size=None,  # the data set returns whole batches
            sampler=self._sampler,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            # DataLoader draws a seed for its workers, without a generator from the global state.
            generator=torch.Generator(),
            **processes,
        )

    def host_batches(self) -> Iterator[HostBatch]:
        """Start a pass, which the workers read ahead from now on, and return its batches as they leave the workers."""
        with warnings.catch_warnings():
            # Python 3.12 warns when a process with threads forks. A worker decodes and copies tensors on one thread
            # and needs no lock that another thread of this process (gloo, CUDA, a writer) can hold.
            warnings.filterwarnings("ignore", r"This process .* is multi-threaded, use of fork", DeprecationWarning)
            # The workers start with the signals blocked, so that none arrives before they are set up.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
            try:
                with self._explained_failures():
                    return iter(self._loader)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _batches(self) -> Iterator[Batch]:
        host_batches, self._begun = self._begun or self.host_batches(), None
        with self._explained_failures():
            if self._device.type == "cuda":
                yield from self._uploaded(host_batches)
            else:
                yield from map(self.on_device, host_batches)

    @contextmanager
    def _explained_failures(self) -> Iterator[None]:
        try:
            yield
        except BadImageError as error:
            # DataLoader puts the worker's traceback before the message, which is all the user needs.
            raise BadImageError(str(error).rpartition("BadImageError: ")[2].strip()) from None
        except (OSError, EOFError, RuntimeError) as error:
            workers = getattr(self._loader._iterator, "_workers", ())
            if isinstance(error, (ConnectionError, EOFError)):  # a worker has died while sending, or is about to
                dead = connection.wait([process.sentinel for process in workers], timeout=5)
                for process in workers:
                    if process.sentinel in dead:
                        process.join()  # its files are closed before it has an exit code
            exit_codes = [process.exitcode for process in workers]
            if problem := _problem(error, [code for code in exit_codes if code]):
                raise WorkerError(problem + (", or --set recipe.data.workers=0" if self._workers else "")) from error
            raise

    def _uploaded(self, host_batches: Iterator[HostBatch]) -> Iterator[Batch]:
        """Yield the batches, uploaded and prepared on a separate stream while the device computes."""
        # One stream for all passes: torch's allocator never gives memory that it cached for one stream to another.
        stream = self._stream = self._stream or torch.cuda.Stream(self._device)

        def upload(host: HostBatch) -> tuple[Batch, torch.cuda.Event]:
            with torch.cuda.stream(stream):
                return self.on_device(host), stream.record_event()

        started = ahead_in_a_thread if self._dataset.waits_for_device else ahead
        for batch, ready in started(host_batches, upload, PREFETCHED):
            current = torch.cuda.current_stream(self._device)
            current.wait_event(ready)
            for tensor in (batch.images, batch.labels, batch.weights):
                # Allocated on the other stream, its memory must not be reused before this one has finished with it.
                tensor.record_stream(current)
            yield batch

    def on_device(self, host: HostBatch) -> Batch:
        """Return a worker's batch, on the device and normalised."""
        host = self._dataset.on_device(host)
        return Batch(
            # Interleaved channels become torch's channels_last without a copy.
            self._normalise(host.images.movedim(-1, 1), host.mirrored),
            host.labels.to(self._device, non_blocking=True),
            host.weights.to(self._device, non_blocking=True),
            tuple(host.bad_images),
            host.decoded_by_pil,
        )


def ahead(source: Iterator[S], start: Callable[[S], T], depth: int) -> Iterator[T]:
    """Yield ``start(item)`` for each item, in order, having started up to ``depth`` items ahead.

    The first is yielded before any other is started. An exception in ``source`` is raised after all items before it.
    """
    started: deque[T] = deque()
    wanted = 1
    try:
        while True:
            while len(started) < wanted:
                started.append(start(next(source)))
            wanted = min(wanted + 1, depth + 1)
            yield started.popleft()
    except StopIteration:
        yield from started
    except Exception:
        yield from started
        raise


def ahead_in_a_thread(source: Iterator[S], start: Callable[[S], T], depth: int) -> Iterator[T]:
    """Yield like ``ahead``, for a slow ``start``: a thread calls it, one item at a time, while the caller continues.

    Its exception is raised in place of its item.
    """
    thread = ThreadPoolExecutor(1)
    try:
        for started in ahead(source, lambda item: thread.submit(start, item), depth):
            yield started.result()
    finally:
        thread.shutdown(cancel_futures=True)


class TrainLoader(_Loader):
    """Yields a rank's training batches, as divided by ``Split``."""

    def __init__(
        self,
        dataset: Samples,
        *,
        workers: int,
        device: torch.device | str,
        dtype: torch.dtype,
        mean: Sequence[float],
        std: Sequence[float],
        **split: Unpack[Split],
    ) -> None:
        self._order = TrainSampler(len(dataset), **split)
        self._begun_at = (0, 0)
        super().__init__(dataset, self._order, workers=workers, device=device, dtype=dtype, mean=mean, std=std)

    def begin_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Have the workers read ahead for a call of ``epoch`` with the same arguments."""
        self._order.set_epoch(epoch, first_step)
        self._begun, self._begun_at = self.host_batches(), (epoch, first_step)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the epoch's micro-batches from step ``first_step`` on."""
        if self._begun is None or self._begun_at != (epoch, first_step):
            self.begin_epoch(epoch, first_step)
        if (erasing := self._dataset.erasing) is None:
            yield from self._batches()
        else:
            yield from map(erasing.erase, self._batches(), self._order)


class ValidationLoader(_Loader):
    """Yields a rank's share of the validation data."""

    def __init__(self, dataset: Samples, *, micro_batch: int, rank: int, world_size: int, **options: Any) -> None:
        sampler = ValidationSampler(len(dataset), micro_batch=micro_batch, rank=rank, world_size=world_size)
        super().__init__(dataset, sampler, **options)

    def begin(self) -> None:
        """Have the workers read ahead for the next pass."""
        if self._begun is None:
            self._begun = self.host_batches()

    def batches(self) -> Iterator[Batch]:
        """Yield the same number of batches on every rank, in which every readable image counts once over all ranks."""
        yield from self._batches()


def _problem(error: Exception, exit_codes: Sequence[int]) -> str:
    """Return what has stopped the loader, and the remedy; "" if it is not the workers' or the machine's fault."""
    exhausted = _exhausted(error)
    if exhausted == errno.EMFILE or errno.EMFILE in exit_codes:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"reading images takes more than the {limit:,} open files that a process can have here: raise ulimit -n"
    if exhausted == errno.ENOSPC or {errno.ENOSPC, -signal.SIGBUS} & set(exit_codes):
        size = shutil.disk_usage(_SHM).total if os.path.isdir(_SHM) else 0
        return (
            f"the loader processes have no space left in {_SHM}, which has {size / 2**20:,.1f} MiB: enlarge it "
            "(docker run --shm-size=8g)"
        )
    if exit_codes:
        code = exit_codes[0]
        killed = f"was killed by {signal.Signals(-code).name} (out of memory?)" if code < 0 else ""
        return f"a loader process {killed or f'ended with exit code {code}'}: use fewer of them"
    return ""


def _exhausted(error: BaseException) -> int:
    """Return EMFILE or ENOSPC if an exception's text, torch's or a worker's, means one of them, otherwise 0."""
    text = str(error)
    if "Too many open files" in text or "ancdata" in text:  # a descriptor was sent but could not be received
        return errno.EMFILE
    return errno.ENOSPC if "No space left on device" in text or "shared memory" in text else 0


def _exit_unsent(error: BaseException, batch: Any) -> NoReturn:
    os._exit(_exhausted(error) or 1)


def _exit_if_exhausted(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if exhausted := _exhausted(error):
        os._exit(exhausted)
    sys.__excepthook__(kind, error, trace)


def _set_up_worker(worker: int) -> None:
    # If a thread that sends batches fails, or their shared memory does, the worker would print a traceback and continue
    # while the main process waits for ever.
    queues.Queue._on_queue_feeder_error = staticmethod(_exit_unsent)  # type: ignore[attr-defined]
    sys.excepthook = _exit_if_exhausted
    # Ctrl-C and the launcher's SIGTERM reach the workers, too, but the current step needs their images. The main
    # process stops them, at the latest with the SIGTERM that multiprocessing sends when it exits.
    threading.Thread(target=_exit_when_parent_asks, args=(os.getppid(),), daemon=True).start()


def _exit_when_parent_asks(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
