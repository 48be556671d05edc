"""The number of training threads while other work uses the cores: with a simulated clock, and beside a real process."""

import os
import subprocess
import sys

import pytest
import torch
from small_training import ALONE, study_of

from hpcres.cores import cores
from hpcres.study.file import save_study
from hpcres.training import loop
from hpcres.training.distributed import Processes
from hpcres.training.loop import train
from hpcres.training.threads import Threads, fewer

has_schedstat = pytest.mark.skipif(
    not os.path.exists("/proc/self/schedstat"), reason="only Linux counts time without a core"
)


@pytest.fixture(autouse=True)
def _threads_as_before():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


class Machine:
    """Two cores of which other work takes `taken`. A step takes 1 s with one thread and 0.5 s with two, but 3 s with
    two where a core is taken, while on average one of them waits for a core."""

    def __init__(self, taken=0):
        self.taken, self.now, self.waited = taken, 0.0, 0.0

    def step(self):
        starved = self.taken and torch.get_num_threads() == 2
        seconds = 3.0 if starved else 1.0 / torch.get_num_threads()
        self.now += seconds
        self.waited += seconds if starved else 0.0
        return seconds

    def threads(self, fixed=False):
        return Threads(fixed, lambda: self.now, lambda: self.waited)

    def trial(self, fixed=False):
        return self.threads(fixed).trial(ALONE, self.step, 0.2)

    def run(self, threads, steps):
        """The messages of so many steps."""
        said = []
        for _ in range(steps):
            threads.step_begins()
            self.step()
            said.append(threads.step_ends())
        return [message for message in said if message]


def test_other_work_lowers_two_threads_to_one_and_its_end_raises_them():
    torch.set_num_threads(2)
    machine = Machine()
    threads = machine.threads()
    assert machine.run(threads, 20) == []
    machine.taken = 1
    (said,) = machine.run(threads, 5)
    assert "the 2 threads of this process wait for a core 50% of their time" in said
    assert "continuing with 1; the number of threads changes how sums are rounded" in said
    assert torch.get_num_threads() == 1
    machine.run(threads, 300)
    assert torch.get_num_threads() == 1  # two were tried now and then, and were slower
    machine.taken = 0
    (said,) = machine.run(threads, 1500)
    assert said == "continuing with 2 threads, 2.0 times as fast"
    assert torch.get_num_threads() == 2


def test_trials_of_more_threads_cost_little_of_a_long_run():
    torch.set_num_threads(2)
    machine = Machine(taken=1)
    threads = machine.threads()
    machine.run(threads, 3600)
    assert machine.now < 1.02 * 3600


def test_fewer_threads_that_are_not_faster_are_undone():
    torch.set_num_threads(2)
    machine = Machine(taken=1)
    threads = machine.threads()
    steps = iter([3.0, 4.0, 3.0, 3.0])

    def step():
        seconds = next(steps)
        machine.now += seconds
        machine.waited += seconds if torch.get_num_threads() == 2 else 0

    machine.step = step
    lowered, back = machine.run(threads, 4)
    assert "continuing with 1" in lowered
    assert back == "continuing with 2 threads: with 1 steps are not faster"


def test_a_number_that_is_set_is_kept_with_one_warning():
    torch.set_num_threads(2)
    machine = Machine(taken=1)
    (said,) = machine.run(machine.threads(fixed=True), 10)
    assert said.startswith("warning: the 2 threads of this process wait for a core 50% of their time")
    assert torch.get_num_threads() == 2


def test_a_trial_keeps_one_thread_where_two_wait_for_a_core():
    torch.set_num_threads(2)
    seconds, message = Machine(taken=1).trial()
    assert (seconds, torch.get_num_threads()) == (1.0, 1)
    assert "the 2 threads of this process wait for a core 50% of their time" in message
    assert "continuing with 1" in message
    torch.set_num_threads(2)
    assert Machine(taken=0).trial() == (0.5, None)
    assert Machine(taken=1).trial(fixed=True) == (3.0, None)
    assert torch.get_num_threads() == 2


def test_a_trial_keeps_threads_that_wait_and_are_faster_and_a_later_step_may_lower_them():
    torch.set_num_threads(2)
    machine = Machine(taken=1)
    threads, seconds = machine.threads(), iter([0.7, 1.0])

    def step():
        machine.now += 1.0
        machine.waited += 1.0
        return next(seconds)

    assert threads.trial(ALONE, step, 0.2) == (0.7, None)
    assert torch.get_num_threads() == 2
    machine.run(threads, 1)
    assert torch.get_num_threads() == 1


def test_all_processes_time_a_step_again_where_one_has_threads_that_wait(monkeypatch):
    """A timed step waits for all processes, so that one that timed it alone would wait for ever."""
    torch.set_num_threads(2)
    monkeypatch.setattr(Processes, "largest", lambda self, *values: [max(value, 1.0) for value in values])
    machine, timed = Machine(taken=0), []
    assert machine.threads().trial(ALONE, lambda: timed.append(1) or machine.step(), 0.2) == (0.5, None)
    assert len(timed) == 2
    assert torch.get_num_threads() == 2


@pytest.mark.parametrize(
    ("threads", "waiting", "left"), [(2, 0.9, 1), (2, 0.4, 1), (16, 0.9, 15), (16, 7.5, 8), (8, 9, 1)]
)
def test_threads_that_wait_for_a_core_are_removed(threads, waiting, left):
    assert fewer(threads, waiting) == left


TWO_THREADS_ON_A_CORE = """
import hashlib, os, threading, time
from hpcres.training.threads import seconds_without_a_core
os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
begun, used, before = time.monotonic(), time.process_time(), seconds_without_a_core()
end = begun + 1.5
def work():
    while time.monotonic() < end:
        hashlib.sha256(bytes(1 << 20))
    time.sleep(1)  # the count of a thread goes with it
threads = [threading.Thread(target=work) for _ in range(2)]
for thread in threads:
    thread.start()
time.sleep(1.6)
print(seconds_without_a_core() - before, 2 * 1.5 - (time.process_time() - used))
"""


@has_schedstat
def test_the_time_without_a_core_is_what_the_clock_has_and_the_processor_has_not():
    said = subprocess.run([sys.executable, "-c", TWO_THREADS_ON_A_CORE], capture_output=True, text=True, check=True)
    waited, expected = (float(word) for word in said.stdout.split())
    assert expected > 1
    assert waited == pytest.approx(expected, rel=0.2)


BESIDE_ANOTHER_PROCESS = """
import os, subprocess, sys
cores = sorted(os.sched_getaffinity(0))[:2]
os.sched_setaffinity(0, cores)
busy = [subprocess.Popen([sys.executable, "-c", "for _ in range(10**10): pass"]) for _ in range(2)]
for one in busy:
    os.sched_setaffinity(one.pid, cores[1:])
try:
    import torch
    from hpcres.study.file import load_study
    from hpcres.training import loop
from hpcres.training.loop import train
    train(load_study(sys.argv[1]))
    print(torch.get_num_threads())
finally:
    for one in busy:
        one.kill()
"""


@has_schedstat
@pytest.mark.skipif(cores() < 2, reason="one core has no second thread to wait for")
@pytest.mark.slow  # `make test-threads`: what else runs on the machine decides it
def test_training_continues_with_one_thread_beside_work_on_one_of_two_cores(tmp_path):
    settings = {"steps": 8, "minutes": 0.05, "least_steps": 1, "threads": None}
    study = save_study(study_of(tmp_path, training=settings), "train")
    done = subprocess.run(
        [sys.executable, "-c", BESIDE_ANOTHER_PROCESS, study], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    assert "the 2 threads of this process wait for a core" in done.stderr
    assert done.stdout.split() == ["1"]


def test_a_run_prints_the_message_about_its_threads(tmp_path, monkeypatch, capfd):
    machine = Machine(taken=1)
    monkeypatch.setattr(
        loop, "Threads", lambda fixed: Threads(fixed, lambda: machine.step() and machine.now, lambda: machine.waited)
    )
    train(study_of(tmp_path, training={"steps": 3, "threads": 2}))
    assert capfd.readouterr().err.count("warning: the 2 threads of this process wait for a core") == 1


def test_the_train_command_limits_spinning_before_torch_reads_the_environment(tmp_path):
    program = """if True:
        import os, sys
        from click.testing import CliRunner
        from hpcres.cli.train import train
        assert "torch" not in sys.modules
        CliRunner().invoke(train, ["missing.yaml"])
        print(os.environ["GOMP_SPINCOUNT"], os.environ["OMP_WAIT_POLICY"])
    """
    environment = {k: v for k, v in os.environ.items() if k not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}

    def set_with(**variables):
        command = [sys.executable, "-c", program]
        done = subprocess.run(
            command, env={**environment, **variables}, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return done.stdout.split()

    assert set_with() == ["10000", "PASSIVE"]
    assert set_with(GOMP_SPINCOUNT="5") == ["5", "PASSIVE"]
