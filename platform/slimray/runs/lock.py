"""The lock of a run folder: one writer at a time, on a disk or in a bucket, kept alive by a heartbeat.

A lock is a JSON file that names its holder, which renews the heartbeat. Times are Unix seconds. Object stores have no
exclusive create, so there a process writes its token, waits SETTLE_S, and holds the lock if its token is still there.
"""

import contextlib
import logging
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow.fs as pafs

from slimray import storage
from slimray.runs.folder import MAX_STATE_BYTES, DamagedFile, Run, read_json, to_json
from slimray.spec import RunFailed, UserError
from slimray.storage import StorageError, join

HEARTBEAT_S = 15.0
STALE_S = 60.0  # a lock with an older heartbeat is free; clocks are assumed to agree within half of this
SETTLE_S = 2.0  # wait before a process that wrote its token to an object store checks if it is still there

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Owner:
    """Holder of a lock. `host` identifies machine, boot and PID namespace; `born` reveals a reused PID."""

    token: str
    host: str
    pid: int
    born: int
    heartbeat: float


@contextlib.contextmanager
def hold(run: Run, heartbeat_s: float = HEARTBEAT_S) -> Iterator[threading.Event]:
    """Keep every other writer out of `run` for the duration of the block; yields an event that is set if it is lost.

    A background thread renews the heartbeat; a temporary storage outage does not end the block. A lock is free when its
    heartbeat is older than STALE_S, or at once when its process on this machine is gone. Raises UserError if another
    process holds it. If it is lost (this process was suspended, another took over), the main thread is interrupted and
    the block ends with RunFailed. SIGTERM ends the block with SystemExit, so that the lock is released.
    """
    mine = _acquire(run)
    stop, lost = threading.Event(), threading.Event()
    in_main = threading.current_thread() is threading.main_thread()

    def beat() -> None:
        while not stop.wait(heartbeat_s):
            try:
                if _still_mine(run, mine):
                    _write_lock(run, mine, patience=SETTLE_S)  # the next beat comes soon
                    continue
            except StorageError as error:
                log.warning("the lock of run %r could not be renewed: %s", run.name, error)
                continue
            lost.set()
            if in_main:
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
            return

    thread = threading.Thread(target=beat, daemon=True, name=f"lock of {run.name}")
    thread.start()
    before = signal.signal(signal.SIGTERM, _end) if in_main else None
    try:
        yield lost
    except BaseException as error:
        if lost.is_set():
            raise RunFailed(taken_over(run, read_lock(run))) from error
        raise
    finally:
        stop.set()
        thread.join()
        if in_main:
            signal.signal(signal.SIGTERM, before)
        with contextlib.suppress(StorageError, UserError), storage.patient(SETTLE_S):  # on failure it goes stale
            _release(run, mine)
    if lost.is_set():
        raise RunFailed(taken_over(run, read_lock(run)))


def _end(number: int, frame: Any) -> None:
    sys.exit(128 + number)


def _acquire(run: Run) -> Owner:
    mine = Owner(uuid.uuid4().hex, this_host(), os.getpid(), process_birth(os.getpid()), time.time())
    for _ in range(5):
        looked = time.monotonic()
        owner = read_lock(run)
        if is_alive(owner):
            raise occupied(run, owner)
        if owner is None and isinstance(run.fs, pafs.LocalFileSystem):
            if _create_exclusively(run, mine):
                return mine
            continue
        _write_lock(run, mine)
        if time.monotonic() - looked < SETTLE_S / 2:
            time.sleep(SETTLE_S)
            owner = read_lock(run)
            if owner is not None and owner.token == mine.token:
                return mine
            raise occupied(run, owner)
        _release(run, mine)  # a rival that read the lock before this slow write may rely on its own token: start over
        time.sleep(random.uniform(0, SETTLE_S))
    raise StorageError(
        f"{run.uri}: the lock could not be acquired because the storage takes more than {SETTLE_S / 2:g} s to write it"
    )


def _still_mine(run: Run, mine: Owner) -> bool:
    """Return whether nobody else has the lock; a foreign token that disappears again is a slow rival backing off."""
    for pause in (SETTLE_S, 0):
        try:
            owner = read_lock(run)
        except UserError:  # the file was overwritten with something else
            return True
        if owner is None or owner.token == mine.token:
            return True
        time.sleep(pause)
    return False


def _release(run: Run, mine: Owner) -> None:
    owner = read_lock(run)
    if owner is not None and owner.token == mine.token:
        storage.delete(run.fs, join(run.path, "lock"))


def _create_exclusively(run: Run, mine: Owner) -> bool:
    """Create the lock on a disk, complete and only if there is none: a hard link does not replace its target."""
    path = Path(run.path, "lock")
    part = path.with_name(f".lock.{mine.token}.tmp")
    try:
        storage.write_atomic(run.fs, str(part), to_json(asdict(mine)))
        os.link(part, path)
    except FileExistsError:
        return False
    except OSError as error:
        raise StorageError(f"{path}: cannot be created ({error.strerror})") from error
    finally:
        part.unlink(missing_ok=True)
    return True


def _write_lock(run: Run, owner: Owner, patience: float | None = None) -> None:
    data = to_json(asdict(owner) | {"heartbeat": time.time()})
    storage.write_atomic(run.fs, join(run.path, "lock"), data, patience)


def read_lock(run: Run) -> Owner | None:
    """Return the holder of the lock, None if there is none; raise UserError for a lock that slimray did not write."""
    damaged = UserError(
        f"{join(run.uri, 'lock')}: is not a lock of slimray: delete it if no process writes this run, or use --restart"
    )
    try:
        found = read_json(run, "lock", MAX_STATE_BYTES)
        owner = None if found is None else Owner(**{field: found[field] for field in Owner.__dataclass_fields__})
    except (DamagedFile, KeyError):
        raise damaged from None
    if owner is None:
        return None
    fits = isinstance(owner.token, str) and isinstance(owner.host, str) and type(owner.heartbeat) in (int, float)
    if not fits or type(owner.pid) is not int or type(owner.born) is not int:
        raise damaged
    return owner


def drop_damaged_lock(run: Run) -> None:
    """Delete a lock that slimray did not write."""
    try:
        read_lock(run)
    except UserError:
        storage.delete(run.fs, join(run.path, "lock"))


def is_alive(owner: Owner | None) -> bool:
    """Return whether a lock is held: its heartbeat is within STALE_S, and its process, if on this machine, still runs.

    A heartbeat that is NaN, or more than STALE_S in the future, does not count.
    """
    if owner is None or not abs(time.time() - owner.heartbeat) <= STALE_S:
        return False
    if owner.host != this_host():
        return True
    if not 0 < owner.pid < 1 << 31:
        return False
    try:
        os.kill(owner.pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return process_birth(owner.pid) == owner.born


def wait_for_writer(run: Run, seconds: float, tell: Callable[[str], None]) -> None:
    """Wait until nobody writes `run`, at most `seconds`; the lock of a process killed elsewhere goes stale meanwhile.

    `tell` is called with one sentence if there is anything to wait for.
    """
    end, told = time.monotonic() + seconds, False
    while time.monotonic() < end:
        owner = read_lock(run)
        if not is_alive(owner):
            return
        if not told:
            age = max(0.0, time.time() - owner.heartbeat) if owner is not None else 0.0
            tell(
                f"run {run.name!r}: {_named(owner)} wrote it {age:.0f} s ago: waiting up to {seconds:.0f} s for it to "
                f"end (after {STALE_S:g} s without a heartbeat it counts as gone)"
            )
            told = True
        time.sleep(min(2.0, max(0.0, end - time.monotonic())))


def is_me(owner: Owner) -> bool:
    """Return whether this process holds the lock."""
    return (owner.host, owner.pid, owner.born) == (this_host(), os.getpid(), process_birth(os.getpid()))


def this_host() -> str:
    """Return host name, boot id and PID namespace, as containers may share a name and PIDs belong to a namespace."""
    boot, space = "", ""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        space = os.readlink("/proc/self/ns/pid")
    return " ".join(filter(None, (socket.gethostname(), boot, space)))


def process_birth(pid: int) -> int:
    """Return the start time of process `pid`: clock ticks since boot, or Unix seconds without /proc; 0 if unknown."""
    if Path("/proc/self/stat").exists():
        try:
            return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
        except (OSError, IndexError, ValueError):
            return 0
    try:
        done = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, timeout=10)
        return int(time.mktime(time.strptime(done.stdout.strip())))
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return 0


def occupied(run: Run, owner: Owner | None) -> UserError:
    """Return the error for a run that another process is writing."""
    return UserError(
        f"run {run.name!r} is being written by {_named(owner)}: wait for it, stop it, or choose another name"
    )


def taken_over(run: Run, owner: Owner | None) -> str:
    """Return the message for a run whose lock another process took over."""
    return (
        f"run {run.name!r} was taken over by {_named(owner)} because this process sent no heartbeat for {STALE_S:g} s"
    )


def _named(owner: Owner | None) -> str:
    host = "" if owner is None else " ".join(owner.host.split()[:1])
    return f"process {owner.pid} on {host[:100]}" if owner is not None and host else "another process"
