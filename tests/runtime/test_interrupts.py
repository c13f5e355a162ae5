"""The end of an interrupted command, tried on small programs: no Ray. tests/stages/test_interrupts_faults.py has the stages."""

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from pipeline import cli
from pipeline.runtime import interrupts

# A command that says READY when it works, and what it does when it is interrupted.
PROGRAM = """
import subprocess, sys, time
from pipeline.runtime import interrupts
interrupts.install()
interrupts.GRACE = {grace}
with interrupts.raised():
    with interrupts.during("prepare"):
        pass
    with interrupts.during("evaluate"):
{body}
"""
WORK = "print('READY', flush=True); time.sleep(60)"


def started(body, grace=30):
    code = PROGRAM.format(grace=grace, body="\n".join(f"        {line}" for line in body.splitlines()))
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    assert process.stdout.readline().startswith("READY")
    return process


def ended(process):
    """Exit code, standard output, standard error, and seconds until the end."""
    began = time.monotonic()
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err, time.monotonic() - began


@pytest.mark.parametrize(
    ("number", "code", "words"),
    [(signal.SIGINT, 130, "interrupted"), (signal.SIGTERM, 143, "terminated by SIGTERM")],
)
def test_the_first_signal_unwinds_and_says_what_is_left_in_one_line(number, code, words):
    process = started(f"try:\n    {WORK}\nfinally:\n    print('unwound', flush=True)")
    process.send_signal(number)
    found, out, err, _ = ended(process)
    left = "the stages before it are kept; nothing of it is kept, and the same command begins it again"
    assert (found, out, err) == (code, "unwound\n", f"wavemim: {words} during evaluate; {left}\n")


@pytest.mark.parametrize(
    "body",
    [
        f"try:\n    {WORK}\nexcept KeyboardInterrupt:\n    pass",  # swallowed, and the work ends
        f"try:\n    {WORK}\nexcept KeyboardInterrupt:\n    time.sleep(60)",  # swallowed, and the work goes on
        f"try:\n    {WORK}\nexcept KeyboardInterrupt:\n    raise RuntimeError('of a library') from None",
        f"try:\n    {WORK}\nexcept KeyboardInterrupt:\n    sys.exit(0)",
        "import signal\nsignal.signal(signal.SIGINT, lambda *_: None)\n" + WORK,  # taken by a library
        "class Odd:\n    def __del__(self):\n        "
        + WORK
        + "\nOdd()\ntime.sleep(60)",  # where nothing can be raised
    ],
)
def test_whatever_a_library_makes_of_the_interrupt_the_command_ends_with_its_code(body):
    process = started(body, grace=0.5)
    process.send_signal(signal.SIGINT)
    code, _, err, seconds = ended(process)
    assert code == 130 and seconds < 20
    assert err.startswith("wavemim: interrupted during evaluate;") and err.count("\n") == 1


def test_a_second_signal_ends_it_at_once_and_two_at_the_same_moment_are_one():
    body = f"try:\n    {WORK}\nfinally:\n    print('unwinding', flush=True)\n    time.sleep(60)"
    process = started(body)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "unwinding\n"
    time.sleep(2 * interrupts.TOGETHER)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)  # the first one decides about code and words
    code, _, err, seconds = ended(process)
    assert code == 130 and err.startswith("wavemim: interrupted") and seconds < 20


def test_a_call_that_cannot_be_interrupted_is_not_waited_for():
    process = started(f"with interrupts.at_once():\n    try:\n        {WORK}\n    finally:\n        time.sleep(60)")
    process.send_signal(signal.SIGTERM)
    code, _, err, seconds = ended(process)
    assert code == 143 and err.startswith("wavemim: terminated by SIGTERM during evaluate;") and seconds < 20
    then = f"try:\n    {WORK}\nfinally:\n    print('unwound', flush=True)"
    process = started(f"with interrupts.at_once():\n    pass\n{then}")
    process.send_signal(signal.SIGTERM)
    assert ended(process)[:2] == (143, "unwound\n")


def test_what_is_being_saved_is_waited_for():
    body = "end = time.monotonic() + 2\nwith interrupts.saving(lambda: time.monotonic() < end):\n"
    body += f"    try:\n        {WORK}\n    except KeyboardInterrupt:\n        time.sleep(60)"
    process = started(body, grace=0.2)
    process.send_signal(signal.SIGTERM)
    code, _, err, seconds = ended(process)
    assert code == 143 and 1 < seconds < 20
    assert err.startswith("a checkpoint is being written;") and err.count("\n") == 2


def test_no_process_is_left():
    """Also those that descend from children, and have sessions of their own."""
    child = "import subprocess, time; subprocess.Popen(['sleep', '300'], start_new_session=True); time.sleep(300)"
    process = started(f"subprocess.Popen([sys.executable, '-c', {child!r}], stdout=subprocess.DEVNULL)\n{WORK}")
    until = time.monotonic() + 30
    while len(family := psutil.Process(process.pid).children(recursive=True)) < 2 and time.monotonic() < until:
        time.sleep(0.05)
    assert len(family) == 2
    process.send_signal(signal.SIGINT)
    assert ended(process)[0] == 130
    _, alive = psutil.wait_procs(family, timeout=10)
    assert not alive


def test_before_and_after_the_work_a_signal_ends_the_process_at_once():
    code = (
        "import time; from pipeline.runtime import interrupts; interrupts.install()\n"
        "if {after}:\n    with interrupts.raised(): pass\n"
        "try:\n    print('READY', flush=True); time.sleep(60)\nfinally:\n    time.sleep(60)"
    )
    for after, words in ((False, "nothing was begun"), (True, "everything was finished before")):
        process = subprocess.Popen(
            [sys.executable, "-c", code.format(after=after)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        assert process.stdout.readline() == "READY\n"
        process.send_signal(signal.SIGINT)
        found, _, err, _ = ended(process)
        assert (found, err) == (130, f"wavemim: interrupted; {words}\n")


def test_a_background_job_of_a_script_which_ignores_ctrl_c_ends_too():
    code = "import signal; from pipeline.runtime import interrupts; interrupts.install()\n"
    code += "print('READY', flush=True); signal.pause()"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    finally:
        signal.signal(signal.SIGINT, before)
    assert process.stdout.readline() == b"READY\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130


def test_a_program_that_calls_the_command_gets_its_own_handlers_back():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    threads = threading.active_count()
    with interrupts.raised():
        assert {signal.getsignal(number) for number in before} == {interrupts._ending.handle}
    assert {number: signal.getsignal(number) for number in before} == before
    assert signal.set_wakeup_fd(-1) == -1
    until = time.monotonic() + 10
    while threading.active_count() > threads and time.monotonic() < until:
        time.sleep(0.01)
    assert threading.active_count() == threads


def test_every_stage_and_tool_says_what_it_leaves():
    assert set(interrupts.LEFT) == {*cli.STAGES, *cli.TOOLS, "images", "report", "job"}
    for text in interrupts.LEFT.values():
        assert text.count("{same}") == 1 and "\n" not in text


@pytest.fixture
def lines():
    """What is said of Ctrl-C at moments of a command."""
    with interrupts.raised():
        yield lambda: interrupts.line_for(signal.SIGINT)


def test_the_line_is_that_of_the_moment(lines):
    assert lines() == "interrupted; nothing was begun"
    with interrupts.during("prepare"):
        assert lines() == "interrupted during prepare; finished shards are kept, and the same command makes the others"
    assert lines() == "interrupted; finished stages are kept, and the same command goes on"
    with interrupts.during("tune", restarts=True):
        kept = "finished trials are kept, and the same command without restart=true runs the others"
        assert lines() == f"interrupted during tune; the stages before it are kept; {kept}"
    interrupts.finished()
    assert lines() == "interrupted; everything was finished before"


def test_an_interrupt_without_a_signal_is_an_exit_code_too(capsys):
    with pytest.raises(SystemExit) as ending, interrupts.raised(), interrupts.during("show"):
        raise KeyboardInterrupt
    assert ending.value.code == 130
    assert capsys.readouterr().err.startswith("wavemim: interrupted during show; no picture was written")
    with pytest.raises(ValueError, match="mine"), interrupts.raised():
        raise ValueError("mine")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_handlers_that_a_library_leaves_are_replaced(number):
    def mine(*_):
        raise InterruptedError

    before = signal.signal(number, mine)
    try:
        with interrupts.handlers_kept():
            signal.signal(number, lambda *_: None)
        assert signal.getsignal(number) is mine
        with pytest.raises(InterruptedError):
            signal.raise_signal(number)
    finally:
        signal.signal(number, before)


def test_a_call_beside_the_main_thread_cannot_take_its_signals():
    def library():
        with pytest.raises(ValueError, match="main thread"):
            signal.signal(signal.SIGINT, signal.SIG_IGN)
        return "done"

    assert interrupts.beside_main(library).result(10) == "done"
    with pytest.raises(SystemExit):
        interrupts.beside_main(lambda: sys.exit(3)).result(10)


LEAVES = """
import atexit, sys, threading, time
from pipeline.runtime import interrupts

class Held:
    def __del__(self):
        print("freed", flush=True)

interrupts.install()
held = Held()
held.itself = held  # found by the collection at the end of the interpreter only
atexit.register(print, "at exit")
threading.Thread(target=lambda: (time.sleep(0.3), print("the thread"))).start()
print("said", end=" ")
{leaving}
sys.exit(3)
"""


@pytest.mark.parametrize(
    ("leaving", "printed"),
    [("interrupts.leaving(3)", "said the thread\nat exit\n"), ("", "said the thread\nat exit\nfreed\n")],
)
def test_a_command_ends_without_freeing_what_it_holds(leaving, printed):
    """All that is to happen at the end happens: would catch output that is lost, threads and functions that are left out."""
    done = subprocess.run(
        [sys.executable, "-c", LEAVES.format(leaving=leaving)], capture_output=True, text=True, timeout=60
    )
    assert (done.returncode, done.stdout, done.stderr) == (3, printed, "")


def test_output_that_nobody_takes_is_an_error_at_the_end_too():
    code = "from pipeline.runtime import interrupts; interrupts.install(); print('said'); interrupts.leaving(0)"
    buffered = {**os.environ, "PYTHONUNBUFFERED": ""}
    process = subprocess.Popen(
        [sys.executable, "-c", code], env=buffered, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait(timeout=60) == 120 and "BrokenPipeError" in errors
