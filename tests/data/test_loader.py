import multiprocessing
import os
import re
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch
from torchvision.transforms import v2

from recipe.data import BadImageError, WorkerError, open_datasets
from recipe.data.batch import Normalise
from recipe.data.loader import ahead, ahead_in_a_thread
from recipe.data.sampler import epoch_permutation
from tests.data.images import (
    CPU,
    MEAN,
    STD,
    Pictures,
    no_more_files,
    rng_states,
    sample,
    train_loader,
    validation_loader,
    write_folder,
)

NO_FILES = r"reading images takes more than the \d+ open files that a process can have here: raise ulimit -n"
NO_SPACE = r"the loader processes have no space left in /dev/shm, which has [\d,.]+ MiB: enlarge it \(docker .*=8g\)"


def images(batches) -> torch.Tensor:
    return torch.cat([batch.images for batch in batches])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_normalisation_is_torchvisions(dtype):
    pixels = torch.arange(256, dtype=torch.uint8).repeat(3 * 4).view(4, 3, 16, 16)
    pixels = pixels.movedim(1, -1).contiguous().movedim(-1, 1)
    expected = v2.Compose([v2.ToDtype(torch.float32, scale=True), v2.Normalize(MEAN, STD)])(pixels)
    mirrored = torch.tensor([False, True, False, True])
    ours = Normalise(MEAN, STD, device=CPU, dtype=dtype)(pixels, mirrored)
    assert ours.dtype == dtype
    assert ours.is_contiguous()
    exact = Normalise(MEAN, STD, device=CPU, dtype=torch.float32)(pixels, torch.zeros(4, dtype=torch.bool))
    torch.testing.assert_close(exact, expected, rtol=0, atol=1e-6)
    exact[mirrored] = exact[mirrored].flip(-1)
    assert torch.equal(ours, exact.to(dtype))


FUSED = """
import torch
from recipe.data.batch import Normalise
from recipe.data.fused_normalise import mirror_and_look_up
from tests.data.images import MEAN, STD

pixels = torch.randint(256, (5, 13, 17, 3), dtype=torch.uint8).movedim(-1, 1)
mirrored = torch.tensor([True, False, True, True, False])
for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
    plain = Normalise(MEAN, STD, device=torch.device("cpu"), dtype=dtype)
    fused = mirror_and_look_up(pixels, mirrored, plain.table())
    assert fused.is_contiguous(memory_format=torch.channels_last)
    assert fused.dtype == dtype
    assert torch.equal(fused, plain(pixels, mirrored)), dtype
"""


def test_the_cuda_kernel_is_bit_identical():
    """In Triton's interpreter, which needs no GPU, with several blocks, the last one partly filled."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-W", "ignore", "-c", FUSED], check=True, env=environment)


def test_batches_are_started_ahead():
    started = []

    def source():
        yield from range(5)
        raise OSError("the disk has failed")

    batches = ahead(source(), lambda item: started.append(item) or item, depth=2)
    counts = []

    def take_all():
        for item in batches:
            assert item == len(counts)
            counts.append(len(started))

    with pytest.raises(OSError, match="failed"):
        take_all()
    # The first does not wait for others; the failure comes after all batches before it.
    assert counts == [1, 3, 5, 5, 5]
    assert list(ahead(iter("abc"), str.upper, depth=9)) == ["A", "B", "C"]
    assert list(ahead(iter(""), str.upper, depth=2)) == []


def test_slow_starts_run_in_a_single_thread():
    caller_continues, threads = threading.Event(), []

    def decode(item):
        threads.append(threading.get_ident())
        if item == 1:
            assert caller_continues.wait(timeout=60), "the caller waits for batches that are started ahead"
        if item == 3:
            raise BadImageError("3 is no image")
        return item * 10

    taken = []

    def take_all():
        for item in ahead_in_a_thread(iter(range(9)), decode, depth=2):
            taken.append(item)
            if item == 0:
                caller_continues.set()

    with pytest.raises(BadImageError, match="3 is no image"):
        take_all()
    assert taken == [0, 10, 20]
    assert len(set(threads)) == 1
    assert threads[0] not in [thread.ident for thread in threading.enumerate()]


@pytest.mark.parametrize("workers", [0, 2])
def test_image_sizes_follow_the_epoch(workers):
    sizes = {0: 12, 1: 12, 2: 16, 5: 8, 6: 8}
    loader = train_loader(Pictures(image_size=((0, 12), (2, 16), (5, 8))), workers=workers)
    for epoch, size in sizes.items():
        expected = train_loader(Pictures(image_size=size)).epoch(epoch, first_step=1)
        assert torch.equal(images(loader.epoch(epoch, first_step=1)), images(expected))
    loader.close()


def test_a_batch_holds_the_samples_of_its_keys():
    dataset = Pictures()
    order = epoch_permutation(1, 3, 23).tolist()
    batches = list(train_loader(dataset).epoch(3))
    assert len(batches) == 4
    for number, batch in enumerate(batches):
        samples = [sample(dataset, (3, index)) for index in order[4 * number : 4 * number + 4]]
        pixels = torch.stack([sample.image for sample in samples]).movedim(-1, 1)
        mirrored = torch.tensor([sample.mirrored for sample in samples])
        assert torch.equal(batch.images, Normalise(MEAN, STD, device=CPU, dtype=torch.float32)(pixels, mirrored))
        assert batch.labels.tolist() == [sample.label for sample in samples]
        assert batch.labels.dtype == torch.int64
        assert torch.equal(batch.weights, torch.ones(4))
        assert batch.bad_images == ()


def test_a_sample_is_the_same_for_every_split_and_worker_count():
    whole = images(train_loader(Pictures(), micro_batch=8).epoch(1))
    for world_size, micro_batch, workers in [(1, 2, 0), (1, 4, 2), (2, 4, 0), (2, 2, 2), (4, 1, 0)]:
        options = {"world_size": world_size, "micro_batch": micro_batch, "workers": workers}
        of_ranks = [train_loader(Pictures(), rank=rank, **options).epoch(1) for rank in range(world_size)]
        together = images(batch for round_of_ranks in zip(*of_ranks, strict=True) for batch in round_of_ranks)
        assert torch.equal(together, whole), (world_size, micro_batch, workers)


@pytest.mark.parametrize("workers", [0, 2])
def test_epochs_differ_and_a_resumed_epoch_is_the_rest(workers):
    source = train_loader(Pictures(), workers=workers)
    first = images(source.epoch(0))
    assert len(first) == 2 * 8
    second = images(source.epoch(1))
    assert not torch.equal(first, second)
    assert torch.equal(images(source.epoch(1, first_step=1)), second[8:])
    assert list(source.epoch(1, first_step=2)) == []
    # An abandoned epoch does not leak into the next one.
    next(iter(source.epoch(0)))
    assert torch.equal(images(source.epoch(1)), second)
    source.close()
    assert torch.equal(images(source.epoch(0)), first)


@pytest.mark.parametrize(
    ("length", "world_size", "micro_batch", "workers"), [(23, 1, 4, 2), (23, 2, 5, 0), (7, 3, 4, 2), (5, 2, 1, 0)]
)
def test_validation_counts_every_image_once(length, world_size, micro_batch, workers):
    dataset = Pictures(length)
    counted = []
    for rank in range(world_size):
        source = validation_loader(dataset, rank=rank, world_size=world_size, micro_batch=micro_batch, workers=workers)
        batches = list(source.batches())
        assert len(batches) == -(-length // (world_size * micro_batch))
        counted += [batch.images[place] for batch in batches for place in range(micro_batch) if batch.weights[place]]
    assert len(counted) == length
    ours = sorted(image.flatten().tolist() for image in counted)
    theirs = Normalise(MEAN, STD, device=CPU, dtype=torch.float32)(
        torch.stack([sample(dataset, index).image for index in range(length)]).movedim(-1, 1),
        torch.zeros(length, dtype=torch.bool),
    )
    assert ours == sorted(image.flatten().tolist() for image in theirs)


@pytest.mark.parametrize("workers", [0, 2])
def test_global_random_states_are_neither_read_nor_changed(workers):
    torch.manual_seed(0)
    train, validation = open_datasets("digits", None, image_size=8, crop="random_resized", flip=True, seed=0)
    before = rng_states()
    first = images(train_loader(train, workers=workers, global_batch=64, micro_batch=32).epoch(0))
    list(validation_loader(validation, workers=workers, micro_batch=100).batches())
    assert rng_states() == before
    torch.manual_seed(1)
    assert torch.equal(first, images(train_loader(train, workers=workers, global_batch=64, micro_batch=32).epoch(0)))


class Noted(Pictures):
    """Creates a file for each image that is read."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def image(self, index):
        (self.folder / str(index)).touch()
        return super().image(index)


def test_the_first_images_of_a_pass_are_read_ahead(tmp_path):
    train, validation = train_loader(Noted(tmp_path), workers=1), validation_loader(Noted(tmp_path), workers=1)
    expected = epoch_permutation(1, 4, 23).tolist()[8:12]
    for begin, indices in ((lambda: train.begin_epoch(4, 1), expected), (validation.begin, range(4))):
        begin()
        deadline = time.monotonic() + 30
        while not all((tmp_path / str(index)).exists() for index in indices) and time.monotonic() < deadline:
            time.sleep(0.01)
        assert all((tmp_path / str(index)).exists() for index in indices)
        for file in tmp_path.iterdir():
            file.unlink()
    plain = train_loader(Pictures())
    # A pass that was started ahead is used once; any other epoch or step starts a new one.
    for place in ((4, 1), (4, 1), (3, 0)):
        assert torch.equal(images(train.epoch(*place)), images(plain.epoch(*place)))
    train.begin_epoch(4, 1)
    assert torch.equal(images(train.epoch(2)), images(plain.epoch(2)))
    for _ in range(2):
        assert torch.equal(images(validation.batches()), images(validation_loader(Pictures()).batches()))
        validation.begin()
    train.close()
    validation.close()


class Deadly(Pictures):
    """Ends the process that reads its first image, once it is to."""

    def __init__(self, end, due):
        super().__init__()
        self.end = end
        self.due = due

    def image(self, index):
        self.due.wait()
        self.end()


@pytest.mark.parametrize(
    ("end", "message"),
    [
        (
            lambda: os.kill(os.getpid(), signal.SIGKILL),
            r"a loader process was killed by SIGKILL \(out of memory\?\): use fewer of them",
        ),
        (lambda: os._exit(3), "a loader process ended with exit code 3: use fewer of them"),
        (lambda: os.kill(os.getpid(), signal.SIGBUS), NO_SPACE),
    ],
    ids=["killed", "ended", "out of shared memory"],
)
def test_a_worker_that_dies_raises_where_its_batch_is_awaited(end, message):
    before, due = set(multiprocessing.active_children()), multiprocessing.Event()
    source = train_loader(Deadly(end, due), workers=1)
    source.begin_epoch(0)
    (worker,) = set(multiprocessing.active_children()) - before  # dead ones are not among them
    due.set()
    worker.join(60)
    with pytest.raises(WorkerError, match=f"^{message}, or --set recipe.data.workers=0$"):
        list(source.epoch(0))


KEEP_BATCHES = """
from recipe.data import WorkerError
from tests.data.images import Pictures, train_loader
try:
    # The list keeps the batches' memory and files in use.
    print(len(list(train_loader(Pictures(200), workers=2).epoch(0))))
except WorkerError as error:
    print(error, flush=True)
    raise SystemExit(3)
"""


@pytest.mark.parametrize(
    ("shell", "message"), [("ulimit -n 24", NO_FILES), ("mount -t tmpfs -o size=300k tmpfs /dev/shm", NO_SPACE)]
)
def test_a_lack_of_files_or_shared_memory_is_named_with_a_remedy(shell, message):
    unshare = ["unshare", "--mount"] if shell.startswith("mount") else []
    if unshare and subprocess.run([*unshare, "sh", "-c", shell], check=False, capture_output=True).returncode:
        pytest.skip("a separate /dev/shm cannot be mounted here")
    command = [*unshare, "sh", "-c", f'{shell} && exec "$@"', "sh", sys.executable, "-c", KEEP_BATCHES]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=120)
    assert done.returncode == 3, done
    assert re.fullmatch(f"{message}, or --set recipe.data.workers=0\n", done.stdout)


@pytest.mark.parametrize("on_bad_image", ["stop", "skip"])
def test_an_image_is_not_bad_if_the_process_has_too_many_open_files(tmp_path, on_bad_image):
    train, _ = open_datasets(
        "imagefolder", write_folder(tmp_path), image_size=16, crop="none", flip=False, seed=0, on_bad_image=on_bad_image
    )
    with no_more_files(), pytest.raises(WorkerError, match=f"^{NO_FILES}$"):
        list(train_loader(train, global_batch=2, micro_batch=2).epoch(0))


def test_close_stops_the_workers():
    before = set(multiprocessing.active_children())
    source = train_loader(Pictures(), workers=2)
    list(source.epoch(0))
    assert len(set(multiprocessing.active_children()) - before) == 2
    source.close()
    assert set(multiprocessing.active_children()) == before


def test_workers_ignore_signals_that_the_main_process_did_not_send():
    """Ctrl-C and the launcher signal the whole process group; the main process decides when its workers exit."""
    source = train_loader(Pictures(), workers=2)
    batches = source.epoch(0)
    seen = [next(batches)]
    workers = multiprocessing.active_children()
    for signum in ("INT", "TERM", "TERM"):
        subprocess.run(["kill", f"-{signum}", *(str(worker.pid) for worker in workers)], check=True)
    seen += batches
    assert len(seen) == len(list(train_loader(Pictures()).epoch(0)))
    workers[0].terminate()
    workers[0].join(timeout=30)
    assert workers[0].exitcode == 0
    source.close()


PROGRAM = """
import multiprocessing, sys, threading, time, warnings
from tests.data.images import Pictures, train_loader, validation_loader
warnings.simplefilter("error")
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
train, validation = train_loader(Pictures(), workers=2), validation_loader(Pictures(), workers=1)
list(validation.batches())
batches = train.epoch(0)
next(batches)
print(*[child.pid for child in multiprocessing.active_children()], flush=True)
time.sleep(float(sys.argv[1]))
"""


def start_program(seconds: float) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", PROGRAM, str(seconds)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_process_exits_without_output_and_workers_exit_after_it_is_killed():
    """In the middle of an epoch, with another thread running and warnings as errors."""
    quiet, killed = start_program(0), start_program(60)
    pids = [int(pid) for pid in killed.stdout.readline().split()]
    assert len(pids) == 3
    killed.kill()
    # DataLoader's workers check for their parent every five seconds.
    deadline = time.monotonic() + 60
    while any(os.path.exists(f"/proc/{pid}") for pid in pids) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not [pid for pid in pids if os.path.exists(f"/proc/{pid}")]
    killed.communicate()

    _, noise = quiet.communicate(timeout=60)
    assert noise == ""
    assert quiet.returncode == 0
