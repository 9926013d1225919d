"""From keys to batches on the device: torch's DataLoader, where nothing but the keys decides what comes."""

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
from typing import Any, NoReturn, TypedDict, TypeVar, Unpack

import torch
from torch.utils.data import DataLoader, Sampler
from torch.utils.data._utils import signal_handling

from recipe.data.batch import Batch, HostBatch, Normalise
from recipe.data.datasets import BadImageError, Samples
from recipe.data.sampler import Keys, Split, TrainSampler, ValidationSampler

_SHM = "/dev/shm"
"""Where workers put batches for the main process."""

PREFETCHED = 2
"""Batches on their way to the GPU while it computes on one."""

S = TypeVar("S")
T = TypeVar("T")

_ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
"""Signals that ask a run to end: the main process decides, not a worker."""

# torch has a handler for SIGCHLD that raises, wherever the main thread is, that a worker has died. Here it is who waits
# for that worker that finds out, within 5 s.
signal_handling._SIGCHLD_handler_set = True


class WorkerError(RuntimeError):
    """The worker processes have died, or lack what they need; the message names the remedy."""


class LoaderOptions(TypedDict):
    """The arguments that both loaders take."""

    workers: int
    """processes that read images; 0 reads them in this one"""
    device: torch.device | str
    """where the batches live"""
    dtype: torch.dtype
    """of the images"""
    mean: Sequence[float]
    """of the pixels of each of the 3 channels, from 0 to 1"""
    std: Sequence[float]
    """likewise"""


class _Loader:
    """What training and validation share: worker processes, the upload to the device, the end.

    Its batches raise ``BadImageError`` where an image cannot be read and is not to be skipped, ``WorkerError`` where a
    worker process died or lacks what it needs.
    """

    def __init__(self, dataset: Samples, sampler: Sampler[Keys], **options: Unpack[LoaderOptions]) -> None:
        self._device = torch.device(options["device"])
        self._normalise = Normalise(options["mean"], options["std"], device=self._device, dtype=options["dtype"])
        self._dataset = dataset
        self._sampler = sampler
        self._workers = options["workers"]
        self._begun: Iterator[HostBatch] | None = None
        self._loader = self._new_loader()

    def close(self) -> None:
        """End the worker processes. A later pass starts new ones."""
        self._begun = None
        self._loader = self._new_loader()

    def _new_loader(self) -> DataLoader:
        processes: dict[str, Any] = {}
        if self._workers:
            processes = {
                # A forked worker sees by its parent that its rank was killed, and ends. With forkserver the
                # parent is the server, and both outlive a killed rank for ever. With spawn every worker would
                # import torch, and DeepSpeed with the main module.
                "multiprocessing_context": multiprocessing.get_context("fork"),
                "worker_init_fn": _obey_the_parent_alone,
                "persistent_workers": True,
            }
        return DataLoader(
            self._dataset,
            batch_size=None,  # the data set makes whole batches
            sampler=self._sampler,
            num_workers=self._workers,
            pin_memory=self._device.type == "cuda",
            # DataLoader draws a seed for its workers; without a generator, from the global state.
            generator=torch.Generator(),
            **processes,
        )

    def host_batches(self) -> Iterator[HostBatch]:
        """Begin a pass, which from here on the workers read ahead, over batches as they come from a worker."""
        with warnings.catch_warnings():
            # Python 3.12 warns when a process with threads forks. A worker runs PIL and copies tensors on one
            # thread; it needs no lock that another thread of this process (gloo, CUDA, a writer) may hold.
            warnings.filterwarnings("ignore", r"This process .* is multi-threaded, use of fork", DeprecationWarning)
            # The workers start with the signals blocked, so that none comes too early.
            mask = signal.pthread_sigmask(signal.SIG_BLOCK, _ENDING)
            try:
                with self._failures_told():
                    return iter(self._loader)
            finally:
                signal.pthread_sigmask(signal.SIG_SETMASK, mask)

    def _batches(self) -> Iterator[Batch]:
        host_batches, self._begun = self._begun or self.host_batches(), None
        with self._failures_told():
            if self._device.type == "cuda":
                yield from self._uploaded(host_batches)
            else:
                yield from map(self.on_device, host_batches)

    @contextmanager
    def _failures_told(self) -> Iterator[None]:
        try:
            yield
        except BadImageError as error:
            # DataLoader puts the worker's traceback before the message; the message alone says what to do.
            raise BadImageError(str(error).rpartition("BadImageError: ")[2].strip()) from None
        except (OSError, EOFError, RuntimeError) as error:
            workers = getattr(self._loader._iterator, "_workers", ())
            if isinstance(error, (ConnectionError, EOFError)):  # one has gone while it sent, or is about to
                gone = connection.wait([process.sentinel for process in workers], timeout=5)
                for process in workers:
                    if process.sentinel in gone:
                        process.join()  # its files are closed before it has an exit code
            ends = [process.exitcode for process in workers]
            if problem := _problem(error, [end for end in ends if end]):
                raise WorkerError(problem + (", or --set recipe.data.workers=0" if self._workers else "")) from error
            raise

    def _uploaded(self, host_batches: Iterator[HostBatch]) -> Iterator[Batch]:
        """The batches, made beside what the device computes, on a stream of their own."""
        stream = torch.cuda.Stream(self._device)

        def upload(host: HostBatch) -> tuple[Batch, torch.cuda.Event]:
            with torch.cuda.stream(stream):
                return self.on_device(host), stream.record_event()

        begun = ahead_in_a_thread if self._dataset.waits_for_device else ahead
        for batch, made in begun(host_batches, upload, PREFETCHED):
            current = torch.cuda.current_stream(self._device)
            current.wait_event(made)
            for tensor in (batch.images, batch.labels, batch.weights):
                # Made on another stream, its memory must not be used again before this one is done with it.
                tensor.record_stream(current)
            yield batch

    def on_device(self, host: HostBatch) -> Batch:
        """Make of what a worker sends what training takes."""
        host = self._dataset.on_device(host)
        return Batch(
            # Interleaved pixels become torch's channels_last without a copy.
            self._normalise(host.images.movedim(-1, 1), host.mirrored),
            host.labels.to(self._device, non_blocking=True),
            host.weights.to(self._device, non_blocking=True),
            tuple(host.bad_images),
            host.decoded_by_pil,
        )


def ahead(source: Iterator[S], start: Callable[[S], T], depth: int) -> Iterator[T]:
    """Yield ``start`` of each item, in order, with up to ``depth`` more started before one is asked for.

    The first comes as soon as it can. An exception of ``source`` comes after all items that came before it.
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
    """As ``ahead``, where ``start`` is what takes long: one thread calls it, item after item, while the caller goes on.

    Its exception comes in the place of its item.
    """
    thread = ThreadPoolExecutor(1)
    try:
        for started in ahead(source, lambda item: thread.submit(start, item), depth):
            yield started.result()
    finally:
        thread.shutdown(cancel_futures=True)


class TrainLoader(_Loader):
    """Yields a rank's training batches; see ``Split`` for the arguments that are not ``LoaderOptions``."""

    def __init__(
        self,
        dataset: Samples,
        *,
        global_batch: int,
        micro_batch: int,
        rank: int,
        world_size: int,
        seed: int,
        batch_changes: Sequence[tuple[int, int]] = (),
        **options: Unpack[LoaderOptions],
    ) -> None:
        split = Split(global_batch=global_batch, micro_batch=micro_batch, rank=rank, world_size=world_size, seed=seed)
        split["batch_changes"] = batch_changes
        self._order = TrainSampler(len(dataset), **split)
        self._begun_at = (0, 0)
        super().__init__(dataset, self._order, **options)

    @property
    def steps_per_epoch(self) -> int:
        return self._order.steps_per_epoch

    def begin_epoch(self, epoch: int, first_step: int = 0) -> None:
        """Have the workers read what ``epoch`` of the same arguments will begin with."""
        self._order.set_epoch(epoch, first_step)
        self._begun, self._begun_at = self.host_batches(), (epoch, first_step)

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        """Yield the micro-batches of the epoch's steps from ``first_step`` on, in order."""
        if self._begun is None or self._begun_at != (epoch, first_step):
            self.begin_epoch(epoch, first_step)
        if (erasing := self._dataset.erasing) is None:
            yield from self._batches()
        else:
            yield from map(erasing.erase, self._batches(), self._order)


class ValidationLoader(_Loader):
    """Yields a rank's share of the validation data."""

    def __init__(
        self, dataset: Samples, *, micro_batch: int, rank: int, world_size: int, **options: Unpack[LoaderOptions]
    ) -> None:
        sampler = ValidationSampler(len(dataset), micro_batch=micro_batch, rank=rank, world_size=world_size)
        super().__init__(dataset, sampler, **options)

    def begin(self) -> None:
        """Have the workers read what the next pass will begin with."""
        if self._begun is None:
            self._begun = self.host_batches()

    def batches(self) -> Iterator[Batch]:
        """Yield the same number of batches on every rank; over all ranks every readable image counts once."""
        yield from self._batches()


def _problem(error: Exception, ends: Sequence[int]) -> str:
    """What has ended the loader, and what helps; "" for what is not its matter. ``ends`` are workers' exit codes."""
    lack = _lack(error)
    if lack == errno.EMFILE or errno.EMFILE in ends:
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        return f"reading images takes more open files than the {limit:,} that a process may have here: raise ulimit -n"
    if lack == errno.ENOSPC or {errno.ENOSPC, -signal.SIGBUS} & set(ends):
        size = shutil.disk_usage(_SHM).total if os.path.isdir(_SHM) else 0
        return (
            f"the processes that read images find no room in {_SHM}, which has {size / 2**20:,.1f} MiB: enlarge it "
            "(docker run --shm-size=8g)"
        )
    if ends:
        killed = f"was killed by {signal.Signals(-ends[0]).name} (out of memory?)" if ends[0] < 0 else ""
        return f"a process that reads images {killed or f'ended with exit code {ends[0]}'}: take fewer of them"
    return ""


def _lack(error: BaseException) -> int:
    """EMFILE or ENOSPC where an exception tells of that, as torch's and those of workers do in their text; else 0."""
    text = str(error)
    if "Too many open files" in text or "ancdata" in text:  # a descriptor was sent, and none was received
        return errno.EMFILE
    return errno.ENOSPC if "No space left on device" in text or "shared memory" in text else 0


def _end_unsent(error: BaseException, batch: Any) -> NoReturn:
    os._exit(_lack(error) or 1)


def _end_for_a_lack(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    if lack := _lack(error):
        os._exit(lack)
    sys.__excepthook__(kind, error, trace)


def _obey_the_parent_alone(worker: int) -> None:
    # The threads that send batches, and the memory that they are in, would print a traceback and go on, while the main
    # process waits for ever for what was not sent.
    queues.Queue._on_queue_feeder_error = staticmethod(_end_unsent)  # type: ignore[attr-defined]
    sys.excepthook = _end_for_a_lack
    # Ctrl-C, and the launcher's SIGTERM, reach the workers too, but the step under way needs their images: the main
    # process decides, and ends them, at the latest by the SIGTERM that multiprocessing sends when the process exits.
    threading.Thread(target=_end_when_the_parent_says, args=(os.getppid(),), daemon=True).start()


def _end_when_the_parent_says(parent: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent:
        pass
    os._exit(0)
