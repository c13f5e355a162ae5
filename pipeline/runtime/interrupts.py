"""Ctrl-C and SIGTERM: how a command ends when it is interrupted, and what it then says. The only module that knows.

The first signal raises KeyboardInterrupt in the main thread, so that locks are released and half-written files removed; the
processes of a private Ray are then killed, and the command ends with 130 or 143. Libraries may swallow the exception, and
calls into compiled code delay it: a thread that the interpreter tells of signals ends the command in any case, `GRACE` seconds
after the first signal and at once after the second. Loads neither Ray nor anything else that takes time: it is the first
import of the command.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import select
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING, NoReturn, TypeVar

if TYPE_CHECKING:
    from concurrent.futures import Future

T = TypeVar("T")

GRACE = 8.0  # seconds from the first signal to the end
LONGEST = 120.0  # seconds, if something is being saved (`saving`)
TOGETHER = 0.1  # seconds within which signals count as one: wrappers pass on what the terminal has sent already
_POLL = 0.2  # seconds

# Exit codes, and what is said, of the signals.
_CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
_WORDS = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated by SIGTERM"}

_AGAIN = "nothing of it is kept, and {same} begins it again"
_FROM_CHECKPOINT = "its checkpoints are kept, and {same} resumes from the last one"
# What an interrupted stage or tool leaves. `{same}` stands for "the same command".
LEFT = {
    "images": "no images are kept, and {same} draws them again",
    "prepare": "finished shards are kept, and {same} makes the others",
    "pretrain": _FROM_CHECKPOINT,
    "evaluate": _AGAIN,
    "finetune": _FROM_CHECKPOINT,
    "segment": _AGAIN,
    "tune": "finished trials are kept, and {same} runs the others",
    "export": _AGAIN,
    "report": "all stages are finished, and {same} writes the report",
    "verify": "nothing was changed, and {same} begins again",
    "inspect": "nothing was changed in the shard set, and {same} begins again",
    "merge": "no set was changed, and {same} begins again",
    "show": "no picture was written, and {same} begins again",
    "replay": "the run was not changed, and {same} begins again",
    "sync": "what MLflow has received is not sent again, and {same} sends the rest",
    "compare": "the runs were not changed, and {same} begins again",
    "embed": "no features were written, and {same} begins again",
    "import": "nothing was written, and {same} begins again",
    "submit": "no job was submitted, and {same} begins again",
    "status": "nothing was changed, and {same} begins again",
    "job": "it goes on, and {same} would submit another; wavemim logs shows its log, wavemim stop ends it",
    "logs": "the job goes on, and {same} shows its log again",
    "stop": "a job that was told to stop still does, and {same} waits for it again",
}


class _Ending:
    """The state of this process's one command."""

    def __init__(self) -> None:
        self.installed = False
        self.code: int | None = None  # of the end of this process, once it is known
        self.raises = False  # whether a signal raises KeyboardInterrupt; otherwise it ends the process at once
        self.doing: list[str] = []  # stages that are under way, the innermost last
        self.earlier = False  # whether stages of the same command are finished
        self.restarts = False  # whether the same command would start anew
        self.finished = False  # whether everything is done and said
        self.first: int | None = None  # the signal
        self.line = ""  # what is said of it
        self.deadline = 0.0
        self.saving: Callable[[], bool] = lambda: False
        self.waits = False  # for what is being saved, as was said
        self.raised_at: float | None = None
        self.turn = threading.Lock()

    def take(self, number: int) -> None:
        """Note a signal; only the first one counts."""
        if self.first is None:
            self.first, self.line = number, line_for(number)
            self.deadline = time.monotonic() + GRACE
            # Interrupts that were swallowed where nothing can be raised are no news.
            sys.unraisablehook = lambda _: None
            threading.excepthook = lambda _: None

    def handle(self, number: int, frame: FrameType | None) -> None:
        """The handler, in the main thread."""
        now, last = time.monotonic(), self.raised_at
        self.take(number)
        if not self.raises or (last is not None and now - last > TOGETHER):
            self.end()
        elif last is None:
            self.raised_at = now
            raise KeyboardInterrupt

    def watch(self, told: socket.socket) -> None:
        """The thread: signals arrive at `told` even while the main thread cannot handle them."""
        came: float | None = None
        while True:
            ready, _, _ = select.select([told], [], [], None if self.first is None else _POLL)
            now = time.monotonic()
            numbers = told.recv(64) if ready else b""
            if ready and not numbers:  # signals are no longer handled
                return
            for number in numbers:
                if number not in _CODES:
                    continue
                self.take(number)
                if not self.raises or (came is not None and now - came > TOGETHER):
                    self.end()
                came = now if came is None else came
            if self.first is not None and now > self.deadline:
                if now > self.deadline + LONGEST - GRACE or not self.saving():
                    self.end()
                elif not self.waits:
                    self.waits = True
                    _write("a checkpoint is being written; a second signal ends the command at once")

    def end(self) -> None:
        """Say the line, kill all child processes and end. Returns only while another thread does that."""
        if not self.turn.acquire(blocking=False):
            return
        assert self.first is not None
        _write(f"wavemim: {self.line}")
        kill_children()
        os._exit(_CODES[signal.Signals(self.first)])


_ending = _Ending()


def _write(line: str) -> None:
    """Write a line to stderr, past the locks of its buffer, and in place of ^C or a progress bar."""
    clear = "\r\x1b[K" if os.isatty(2) else ""
    with contextlib.suppress(OSError):
        os.write(2, f"{clear}{line}\n".encode(errors="replace"))


def line_for(number: int) -> str:
    """What is said of a signal that comes now."""
    words = _WORDS[signal.Signals(number)]
    same = "the same command without restart=true" if _ending.restarts else "the same command"
    if _ending.finished:
        return f"{words}; everything was finished before"
    if not _ending.doing:
        return f"{words}; {f'finished stages are kept, and {same} goes on' if _ending.earlier else 'nothing was begun'}"
    what = _ending.doing[-1]
    before = "the stages before it are kept; " if _ending.earlier else ""
    return f"{words} during {what}; {before}{LEFT[what].format(same=same)}"


def _leave() -> None:
    """The end of everything that ends with the interpreter. By then all is said.

    Python would restore the default of the signals, which kills with another code, and free every object of the libraries
    one by one, which takes two seconds.
    """
    for number in _CODES:
        signal.signal(number, signal.SIG_IGN)
    if _ending.code is None:
        return
    try:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    except (OSError, ValueError):  # Python says so
        return
    os._exit(_ending.code)


def leaving(code: int) -> None:
    """Note the code with which this process is about to end."""
    _ending.code = code


def install() -> None:
    """Handle SIGINT and SIGTERM from now on, also where SIGINT was ignored. Only in the main thread."""
    if _ending.installed:
        return
    _ending.installed = True
    atexit.register(_leave)
    told, tells = socket.socketpair()
    tells.setblocking(False)
    signal.set_wakeup_fd(tells.detach(), warn_on_full_buffer=False)
    threading.Thread(target=_ending.watch, args=(told,), name="signals", daemon=True).start()
    for number in _CODES:
        signal.signal(number, _ending.handle)


@contextlib.contextmanager
def _installed() -> Iterator[None]:
    """Handle signals while the block runs, if they are not handled anyway and this is the main thread."""
    if _ending.installed or threading.current_thread() is not threading.main_thread():
        yield
        return
    with handlers_kept():
        install()
        try:
            yield
        finally:
            os.close(signal.set_wakeup_fd(-1))
            _ending.installed = False


@contextlib.contextmanager
def raised() -> Iterator[None]:
    """While the block runs, the first signal raises KeyboardInterrupt.

    Whatever became of the exception, the block then ends the process. KeyboardInterrupt without a signal becomes
    SystemExit.
    """
    with _installed():
        yield from _raised()


def _raised() -> Iterator[None]:
    _ending.finished, _ending.earlier, _ending.restarts = False, False, False
    _ending.doing.clear()
    _ending.raises = _ending.installed
    try:
        yield
    except BaseException as error:
        if _ending.first is None and not isinstance(error, KeyboardInterrupt):
            raise
        _end()
    else:
        _ending.finished = True
        if _ending.first is not None:
            _end()
    finally:
        _ending.raises = False


def _end() -> NoReturn:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(Exception):
            stream.flush()
    if _ending.first is None:
        print(f"wavemim: {line_for(signal.SIGINT)}", file=sys.stderr)
        sys.exit(_CODES[signal.SIGINT])
    while True:
        _ending.end()
        time.sleep(_POLL)


@contextlib.contextmanager
def during(what: str, *, restarts: bool = False) -> Iterator[None]:
    """Name the stage or tool that the block runs, a key of `LEFT`; of `run`, the earlier ones count as finished.

    Args:
        what: Its name.
        restarts: Whether the same command would discard what was done (restart=true).
    """
    _ending.doing.append(what)
    _ending.restarts = restarts
    yield
    _ending.doing.pop()  # not after an error: what it interrupted is still to be said
    _ending.earlier = True


def finished() -> None:
    """Note that everything is done and said: a signal that comes now says so."""
    _ending.finished = True


def interrupted() -> bool:
    """Whether the command is being ended by a signal: its end kills its Ray, and nobody has to wait for that."""
    return _ending.first is not None


@contextlib.contextmanager
def _while(name: str, value: object) -> Iterator[None]:
    before = getattr(_ending, name)
    setattr(_ending, name, value)
    try:
        yield
    finally:
        setattr(_ending, name, before)


def saving(under_way: Callable[[], bool]) -> contextlib.AbstractContextManager[None]:
    """While the block runs, the end is put off as long as something is being written, for `LONGEST` seconds at most.

    Args:
        under_way: Whether it is. Called in another thread.
    """
    return _while("saving", under_way)


def at_once() -> contextlib.AbstractContextManager[None]:
    """While the block runs, a signal ends the command at once: for long calls that an exception would have to wait for,
    where nothing has to be released."""
    return _while("raises", False)


@contextlib.contextmanager
def handlers_kept() -> Iterator[None]:
    """Put back the handlers of SIGINT and SIGTERM after the block: libraries install their own, and leave them there.

    Ray's core replaces that of SIGTERM behind Python's back, so they are installed again even if they look the same.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in _CODES}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def beside_main(call: Callable[[], T]) -> Future[T]:
    """Run a call in a daemon thread: libraries that handle Ctrl-C themselves do that in the main thread only."""
    from concurrent.futures import Future

    future: Future[T] = Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="beside main", daemon=True).start()
    return future


def kill_children() -> None:
    """Kill all processes that descend from this one. They are stopped first, so that none starts another meanwhile."""
    import psutil

    for last in (False, True):
        with contextlib.suppress(psutil.Error):
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    child.kill() if last else child.suspend()
