"""The lesson parallel as it is typed: real starts, several machines, kills, and what goes wrong.

A machine is a network namespace with an address of its own, where root may make one; else it is
another torchrun on this machine.
"""

from common import ROOT, SIDES, checkpoints

import contextlib
import functools
import http.server
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
from helpers import count, free_port, some

LIMIT = 240  # seconds for anything: a start takes 40 on two busy cores
FEW = "--data shapes --limit-val-batches 1 --limit-test-batches 1".split()
SHORT = [*FEW, "--max-epochs", "3", "--limit-train-batches", "20"]
# Some seconds for each epoch: long enough to strike within one.
LONG = [*FEW, "--max-epochs", "4", "--limit-train-batches", "400"]
PORT = 29400  # of the namespaces, where nothing else can have it


@dataclass
class Process:
    """A process that a test started, directly or not; `rank` is None for torchrun itself."""

    pid: int
    machine: str
    rank: str | None

    def signal(self, number):
        with contextlib.suppress(ProcessLookupError):  # it ended by itself
            os.kill(self.pid, number)


class Command:
    """A command in a session of its own; its output goes to files, which never fill up."""

    def __init__(self, words, out, env):
        self.out, self.err, self.words = out.with_suffix(".out"), out.with_suffix(".err"), words
        with self.out.open("w") as stdout, self.err.open("w") as stderr:
            self.process = subprocess.Popen(
                words, cwd=ROOT, env=env, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr,
                start_new_session=True,
            )  # fmt: skip

    @property
    def stdout(self):
        return self.out.read_text()

    @property
    def stderr(self):
        return self.err.read_text()

    def said(self):
        return f"{' '.join(self.words)}\n{self.stdout}\n--- stderr:\n{self.stderr}"

    def status(self, limit=LIMIT):
        """Wait for the end, and return the exit status."""
        try:
            return self.process.wait(limit)
        except subprocess.TimeoutExpired:
            pytest.fail(f"still running after {limit} s: {self.said()}")

    def finishes(self):
        assert self.status() == 0, self.said()
        assert self.stderr == "", self.said()

    def sentence(self, status):
        """Wait for the end, which must be one sentence and that status; return the sentence."""
        assert self.status() == status, self.said()
        lines = [line for line in self.stderr.splitlines() if line]
        assert len(lines) == 1 and "Traceback" not in self.stdout, self.said()
        assert lines[0].endswith("."), self.said()
        count("ends in one sentence")
        return lines[0]


class Place:
    """The folder and the processes of one test, which are known by an environment variable."""

    def __init__(self, folder):
        self.folder, self.commands = folder, 0
        self.env = {
            name: value
            for name, value in os.environ.items()
            # As typed by hand: neither make's flags nor conftest's, and no warning about SLURM.
            # What Python compiles is kept: the next start is ready in half the time.
            if not name.startswith(("MAKE", "MFL", "OMP_", "PYTHONDONTWRITE"))
        } | {"TEST_PLACE": str(folder)}

    def start(self, *words, machine=None, env=()):
        name = machine.name if machine else "here"
        self.commands += 1
        before = ["ip", "netns", "exec", machine.namespace] if machine and machine.namespace else []
        return Command(
            [*before, *map(str, words)],
            self.folder / f"{self.commands}_{name}",
            {**self.env, "TEST_MACHINE": name, **dict(env)},
        )

    def train(self, side, *options, machine=None, runs="runs", env=()):
        """Start a lesson, as make does."""
        words = (sys.executable, f"{side}/parallel.py", *options, "--runs-dir", self.folder / runs)
        return self.start(*words, machine=machine, env=env)

    def run_folder(self, side, runs="runs"):
        return self.folder / runs / "parallel" / side

    def processes(self):
        found = []
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                lines = (folder / "environ").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it ended meanwhile
                continue
            env = dict(line.partition("=")[::2] for line in lines)
            if env.get("TEST_PLACE") == str(self.folder):
                rank = env.get("RANK") if "TORCHELASTIC_RUN_ID" in env else None
                found.append(Process(int(folder.name), env["TEST_MACHINE"], rank))
        return found

    def process(self, rank, machine="here"):
        """Return the process with this rank, or torchrun where that is None."""
        found = [p for p in self.processes() if p.rank == rank and p.machine == machine]
        assert len(found) == 1, found
        return found[0]

    def kill(self, machine=None):
        """End all processes, or those of one machine, at once and without a word."""
        for process in self.processes():
            if machine in (None, process.machine):
                process.signal(signal.SIGKILL)

    def wait(self, what, done, *commands):
        """Wait until something is true, while these commands go on; return what it was."""
        end = time.monotonic() + LIMIT
        while not (result := done()):
            for command in commands:
                assert command.process.poll() is None, f"ended before {what}: {command.said()}"
            assert time.monotonic() < end, f"never: {what}\n" + "\n".join(
                command.said() for command in commands
            )
            time.sleep(0.05)
        return result

    def wait_for_checkpoints(self, side, how_many, *commands):
        pattern = "checkpoints/step_*.ckpt"
        folder = self.run_folder(side)
        done = lambda: len(list(folder.glob(pattern))) >= how_many  # noqa: E731
        self.wait(f"checkpoint {how_many}", done, *commands)

    def wait_for_nobody(self):
        """Wait until all processes are gone; return those that are not after some time."""
        end = time.monotonic() + 30
        while (left := self.processes()) and time.monotonic() < end:
            time.sleep(0.1)
        return left

    def check_files(self, side, runs="runs"):
        """Nothing is half written: all that has its final name can be read."""
        folder = self.run_folder(side, runs)
        for path in folder.glob("checkpoints/[!.]*"):
            checkpoints.read(path)
            count("checkpoints that a failure left whole")
        if (folder / "result.json").exists():
            json.loads((folder / "result.json").read_text())


@dataclass
class Machine:
    """One machine: its name, its address, and its network namespace if it has one."""

    name: str
    address: str
    namespace: str = ""


class Network:
    """Two machines at one switch, and the place where they meet, which is on the first one."""

    def __init__(self, place, addresses):
        self.place, self.apart = place, bool(addresses)
        self.switch, *names = (f"test{os.getpid()}{end}" for end in ("switch", "one", "two"))
        addresses, names = (addresses, names) if self.apart else (("127.0.0.1",) * 2, ("", ""))
        self.one, self.two = map(Machine, ("one", "two"), addresses, names)
        self.meeting_point = f"{addresses[0]}:{PORT if self.apart else free_port()}"
        if self.apart:
            ip("netns", "add", self.switch)
            ip("-n", self.switch, "link", "add", "name", "switch", "type", "bridge")
            ip("-n", self.switch, "link", "set", "switch", "up")
            self._set_up(self.one)
            self._set_up(self.two)

    def _set_up(self, machine):
        inside, outside = ("-n", machine.namespace), ("-n", self.switch)
        ip("netns", "add", machine.namespace)
        ip(*inside, "link", "set", "lo", "up")
        cable = ("link", "add", "eth", "type", "veth", "peer", "name", machine.name)
        ip(*inside, *cable, "netns", self.switch)
        ip(*outside, "link", "set", machine.name, "master", "switch", "up")
        ip(*inside, "addr", "add", f"{machine.address}/24", "dev", "eth")
        ip(*inside, "link", "set", "eth", "up")

    def cut_off(self, machine):
        """Take a machine's power: no other one hears that it ended. Set it up again, bare."""
        ip("-n", self.switch, "link", "del", machine.name)
        self.place.kill(machine.name)
        ip("netns", "del", machine.namespace)
        self._set_up(machine)

    def remove(self):
        for name in (self.one.namespace, self.two.namespace, self.switch):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def train(self, side, *options, nodes=2, devices=1, only=None):
        """Type the same command on both machines, or on one of them."""
        here = ("--devices", f"{devices}", "--num-nodes", f"{nodes}")
        words = (*here, "--rdzv-endpoint", self.meeting_point, *options)
        machines = [only] if only else [self.one, self.two]
        started = [self.place.train(side, *words, machine=machine) for machine in machines]
        return started[0] if only else started


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=60)


@functools.cache
def no_namespaces():
    """Say why there can be no network namespaces here; nothing if there can."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        return "network namespaces need root"
    if not shutil.which("ip"):
        return "network namespaces need the command ip, of iproute2"
    name = f"test{os.getpid()}"
    try:
        ip("netns", "add", name)
        ip("-n", name, "link", "add", "eth", "type", "veth", "peer", "name", "other")
    except subprocess.SubprocessError as error:
        return f"no network namespaces here: {getattr(error, 'stderr', error)}"
    finally:
        subprocess.run(["ip", "netns", "del", name], capture_output=True)
    return ""


@pytest.fixture
def place(tmp_path):
    place = Place(tmp_path)
    yield place
    left = place.wait_for_nobody()
    place.kill()
    assert not left, "left behind"
    count("tests that left no process behind")


@contextlib.contextmanager
def network_of(place, *addresses):
    network = Network(place, addresses)
    try:
        yield network
    finally:
        left = place.wait_for_nobody()  # also where they can no longer hear of each other
        place.kill()
        network.remove()
        assert not left, "left behind"


@pytest.fixture
def network(place):
    """Two machines that have a network; skips where there can be none."""
    if no_namespaces():
        pytest.skip(no_namespaces())
    with network_of(place, "10.77.0.1", "10.77.0.2") as network:
        yield network


@pytest.fixture
def machines(place):
    """Two machines: with a network of their own, or, where that cannot be, on this one."""
    addresses = () if no_namespaces() else ("10.77.0.1", "10.77.0.2")
    with network_of(place, *addresses) as network:
        yield network


@pytest.fixture(scope="session")
def undisturbed(tmp_path_factory):
    """The folder of a training with these options on one machine, which nothing disturbed."""

    @functools.cache
    def train(side, *options, devices=2):
        place = Place(tmp_path_factory.mktemp("undisturbed"))
        arguments = " ".join((*options, "--runs-dir", str(place.folder / "runs")))
        # By make, as it is typed.
        command = place.start("make", f"{side}-parallel", f"DEVICES={devices}", f"ARGS={arguments}")
        try:
            command.finishes()
        finally:
            left = place.wait_for_nobody()
            place.kill()
        assert not left
        return place.run_folder(side), command.stdout

    return train


def check_same_weights(folder, reference):
    assert (folder / "weights.pt").read_bytes() == (reference / "weights.pt").read_bytes()
    count("trainings with the undisturbed one's weights, byte for byte")


def check_same(folder, reference):
    """What a training left has the same weights, byte for byte, and all other numbers."""
    check_same_weights(folder, reference)
    ours, theirs = (json.loads((f / "result.json").read_text()) for f in (folder, reference))
    for result in (ours, theirs):  # how long it took, and on how many machines
        del result["train_seconds"]
        del result["hyperparameters"]["devices"], result["hyperparameters"]["num_nodes"]
    assert ours == theirs


def check_printed_once(stdout):
    """Of all processes, only the first one says what all would say."""
    for text in ("Starting: torchrun ", "Data: shapes", "parallel: test on shapes", "Written to "):
        assert stdout.count(text) == 1, stdout


@pytest.mark.slow
def test_two_processes_by_make(undisturbed):
    folder, stdout = undisturbed("plain", *SHORT)
    check_printed_once(stdout)
    for epoch in range(3):  # what the loop by hand prints, the first process prints
        assert stdout.count(f"Epoch {epoch}: val_loss") == 1, stdout
    assert json.loads((folder / "result.json").read_text())["hyperparameters"]["devices"] == 2


@contextlib.contextmanager
def listening(answer):
    """A program that has a port of this machine: a web server, or one that never answers."""
    if answer:
        with http.server.HTTPServer(
            ("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler
        ) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            yield server.server_address[1]
            server.shutdown()
    else:
        with socket.create_server(("127.0.0.1", 0)) as server:
            yield server.getsockname()[1]


@pytest.mark.parametrize("part", some([1, 0, 2]))  # the fastest first
def test_refused_at_once(part, place):
    cores = os.cpu_count()
    with listening(True) as web, listening(False) as mute:
        wanted = {
            ("--num-nodes", "2"): "needs the place where the machines meet",
            ("--num-nodes", "2", "--rdzv-endpoint", "nowhere.invalid:29400"): "is no machine that",
            ("--num-nodes", "2", "--rdzv-endpoint", f"127.0.0.1:{web}"): f"the port {web} of",
            ("--num-nodes", "2", "--rdzv-endpoint", f"127.0.0.1:{mute}"): f"the port {mute} of",
            ("--devices", "3"): "--batch-size 32 cannot be split evenly over --devices 3",
            ("--devices", f"{32 * cores}"): f"{4 * cores} are the most for the {cores} cores here",
        }
        # Two at a time: most of their time goes into imports.
        commands = {words: place.train("plain", *words) for words in list(wanted)[part::3]}
        assert len(commands) == 2
        for words, started in commands.items():
            assert wanted[words] in started.sentence(2), started.said()
            assert started.stdout == ""


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_two_machines(network, undisturbed, side):
    one, two = network.train(side, *SHORT)
    one.finishes()
    two.finishes()
    check_same(network.place.run_folder(side), undisturbed(side, *SHORT)[0])
    check_same_weights(network.place.run_folder(side), undisturbed("plain", *SHORT)[0])
    check_printed_once(one.stdout)
    assert two.stdout.count("\n") == 1 and two.stdout.startswith("Starting: torchrun ")
    count("trainings on two machines")


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_two_torchruns_on_one_machine(place, undisturbed, side):
    with network_of(place) as network:
        commands = network.train(side, *SHORT)
        for command in commands:
            command.finishes()
    check_same(place.run_folder(side), undisturbed(side, *SHORT)[0])
    # They meet on this machine, where each may be the first.
    check_printed_once(max((command.stdout for command in commands), key=len))


@pytest.mark.slow
def test_two_machines_with_two_devices_each(machines, undisturbed):
    one, two = machines.train("plain", *SHORT, devices=2)
    one.finishes()
    two.finishes()
    check_same(machines.place.run_folder("plain"), undisturbed("plain", *SHORT, devices=4)[0])
    count("trainings on two machines")


@pytest.mark.slow
def test_torchrun_typed_by_hand(place, undisturbed):
    torchrun = Path(sys.executable).with_name("torchrun")
    command = place.start(
        torchrun, "--nproc-per-node", "2", "plain/parallel.py", *SHORT,
        "--runs-dir", place.folder / "runs",
    )  # fmt: skip
    assert command.status() == 0, command.said()
    check_same(place.run_folder("plain"), undisturbed("plain", *SHORT)[0])


# ---- Killed, and resumed


# After which checkpoint, how many seconds later, and when the machine is set up again. torchrun
# takes 15 s to notice that another one is dead: before these are over, and after.
MOMENTS = [(1 + n // 5, n * 0.37 % 1, 20 if n % 5 < 2 else 0) for n in range(10)]


@pytest.mark.slow
@pytest.mark.parametrize("number", range(10))
def test_machine_killed_and_set_up_again(place, undisturbed, number):
    """The training comes back from the last checkpoint, and ends as if nothing had been."""
    side, (checkpoint, later, pause) = SIDES[number % 2], MOMENTS[number]
    # By their addresses, as texts, torchrun numbers the machines: the one that dies may be the
    # first, which has what the others keep.
    addresses = [("10.77.0.1", "10.77.0.2"), ("10.77.0.9", "10.77.0.10")][number // 2 % 2]
    with network_of(place, *(() if no_namespaces() else addresses)) as network:
        _kill_and_set_up_again(network, side, checkpoint, later, pause, quiet=False)
    check_same(place.run_folder(side), undisturbed(side, *LONG)[0])


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_machine_lost_unheard(network, undisturbed, side):
    """As above, but the power is gone: no other machine hears of the end."""
    _kill_and_set_up_again(network, side, 1, 0.5, 0, quiet=True)
    check_same(network.place.run_folder(side), undisturbed(side, *LONG)[0])


def _kill_and_set_up_again(network, side, checkpoint, later, pause, quiet):
    place, options = network.place, (*LONG, "--max-restarts", "3")
    one, two = network.train(side, *options)
    place.wait_for_checkpoints(side, checkpoint, one, two)
    time.sleep(later)
    if quiet:
        network.cut_off(network.two)
    else:
        place.kill("two")
    assert two.status() == -signal.SIGKILL
    time.sleep(pause)
    assert one.process.poll() is None, one.said()
    again = network.train(side, *options, only=network.two)
    one.finishes()
    again.finishes()
    # Whoever is the first resumes; what it printed tells from where.
    said = one.stdout + again.stdout
    assert said.count("Resuming from") == 1, said
    assert f"after step {400 * checkpoint:,}." in said, said
    place.check_files(side)
    count("killed machines that came back")


@pytest.mark.slow
@pytest.mark.parametrize(("side", "rank"), [("plain", "0"), ("plain", "1"), ("lightning", "0")])
def test_process_killed_and_started_again(place, undisturbed, side, rank):
    command = place.train(side, "--devices", "2", "--max-restarts", "1", *LONG)
    place.wait_for_checkpoints(side, 1, command)
    place.process(rank).signal(signal.SIGKILL)
    command.finishes()
    assert "Resuming from" in command.stdout, command.said()
    check_same(place.run_folder(side), undisturbed(side, *LONG)[0])
    count("killed processes that came back")


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_meeting_point_killed(machines, undisturbed, side):
    """The first machine keeps the meeting point: without it the others end, in one sentence."""
    place = machines.place
    one, two = machines.train(side, *LONG, "--max-restarts", "3", "--timeout", "60")
    place.wait_for_checkpoints(side, 1, one, two)
    place.kill("one")
    sentence = two.sentence(2)
    assert "or the machine that kept it is gone" in sentence
    place.check_files(side)
    one, two = machines.train(side, *LONG, "--ckpt-path", "last")
    one.finishes()
    two.finishes()
    assert "Resuming from" in one.stdout
    check_same(place.run_folder(side), undisturbed(side, *LONG)[0])


@pytest.mark.slow
@pytest.mark.parametrize(("side", "rank"), [("plain", "0"), ("plain", "1"), ("lightning", "1")])
def test_process_killed(place, undisturbed, side, rank):
    command = place.train(side, "--devices", "2", *LONG)
    place.wait_for_checkpoints(side, 1, command)
    place.process(rank).signal(signal.SIGKILL)
    sentence = command.sentence(1)
    assert f"Process {rank} of 2 was ended by SIGKILL" in sentence
    assert place.wait_for_nobody() == []
    place.check_files(side)
    # As the sentence says.
    again = place.train(side, "--devices", "2", *LONG, "--ckpt-path", "last")
    again.finishes()
    check_same(place.run_folder(side), undisturbed(side, *LONG)[0])


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_process_stopped_for_ever(place, side):
    """The others notice when --timeout is over."""
    command = place.train(side, "--devices", "2", *LONG, "--timeout", "20")
    place.wait_for_checkpoints(side, 1, command)
    place.process("1").signal(signal.SIGSTOP)
    assert "was not heard of for --timeout" in command.sentence(1)
    assert place.wait_for_nobody() == []
    place.check_files(side)


@pytest.mark.slow
@pytest.mark.parametrize("importing", [True, False])
def test_torchrun_killed(place, importing):
    """Its processes do not go on without it, at whatever they are."""
    command = place.train("plain", "--devices", "2", *LONG)
    if importing:
        place.wait("two processes", lambda: len(place.processes()) == 3, command)
    else:
        place.wait_for_checkpoints("plain", 1, command)
    place.process(None).signal(signal.SIGKILL)
    assert command.status() == -signal.SIGKILL
    assert place.wait_for_nobody() == []
    place.check_files("plain")
    assert not (place.run_folder("plain") / "result.json").exists()


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize(
    ("number", "group", "name", "status"),
    [
        (signal.SIGINT, False, "Ctrl-C", 130),
        (signal.SIGINT, True, "Ctrl-C", 130),
        (signal.SIGTERM, False, "SIGTERM", 143),
    ],
)
def test_signal(place, side, number, group, name, status):
    command = place.train(side, "--devices", "2", *LONG)
    place.wait_for_checkpoints(side, 1, command)
    (os.killpg if group else os.kill)(command.process.pid, number)
    sentence = command.sentence(status)
    assert f"Stopped by {name}" in sentence and "--ckpt-path last" in sentence
    assert place.wait_for_nobody() == []
    place.check_files(side)


@pytest.mark.slow
def test_ctrl_c_while_processes_start(place):
    command = place.train("plain", "--devices", "2", *LONG)
    place.wait("two processes", lambda: len(place.processes()) == 3, command)
    time.sleep(1)
    command.process.send_signal(signal.SIGINT)
    assert "Stopped by Ctrl-C" in command.sentence(130)
    assert place.wait_for_nobody() == []


@pytest.mark.slow
def test_ctrl_c_while_waiting_for_machines(machines):
    command = machines.train("plain", *SHORT, only=machines.one)
    machines.place.wait("it starts", lambda: "Starting" in command.stdout, command)
    time.sleep(5)
    command.process.send_signal(signal.SIGINT)
    assert "Stopped by Ctrl-C" in command.sentence(130)


# ---- Machines that do not find each other, or do not fit


@pytest.mark.slow
def test_the_other_machines_never_come(machines):
    command = machines.train("plain", *SHORT, "--timeout", "10", only=machines.one)
    sentence = command.sentence(2)
    assert "In 10 seconds not all of the 2 machines came to" in sentence


@pytest.mark.slow
def test_the_first_machine_never_comes(network):
    command = network.train("plain", *SHORT, "--timeout", "10", only=network.two)
    assert network.meeting_point in command.sentence(2)


@pytest.mark.slow
def test_no_machine_has_the_address(network):
    for address in ("10.77.0.77", "10.99.0.1"):  # one that could be here, one that cannot
        network.meeting_point = f"{address}:{PORT}"
        command = network.train("plain", *SHORT, "--timeout", "10", only=network.two)
        assert network.meeting_point in command.sentence(2)


@pytest.mark.slow
@pytest.mark.parametrize("mute", [True, False])
def test_another_program_at_the_meeting_point(network, mute):
    """Both machines say so, the one that has that program and the other."""
    place = network.place
    program = ["-m", "http.server", f"{PORT}"]
    if mute:
        code = f"import socket, time; s = socket.create_server(('', {PORT})); time.sleep(999)"
        program = ["-c", code]
    server = place.start(sys.executable, *program, machine=network.one)
    time.sleep(2)
    one, two = network.train("plain", *SHORT, "--timeout", "10")
    assert f"the port {PORT} of" in one.sentence(2)
    assert network.meeting_point in two.sentence(2)
    server.process.kill()


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_machines_with_different_settings(machines, side):
    place = machines.place
    one = machines.train(side, *SHORT, only=machines.one)
    two = machines.train(side, *SHORT, "--lr", "0.1", only=machines.two)
    for command in (one, two):
        sentence = command.sentence(2)
        assert "lr is 0.01 in process 0" in sentence and "0.1 in process 1" in sentence
    assert not place.run_folder(side).exists()


@pytest.mark.slow
def test_machines_with_different_numbers_of_devices(machines):
    one = machines.train("plain", *SHORT, only=machines.one, devices=1)
    two = machines.train("plain", *SHORT, only=machines.two, devices=2)
    for command in (one, two):
        assert "torchrun started 3 processes" in command.sentence(2)


@pytest.mark.slow
def test_machines_with_different_numbers_of_machines(machines):
    size = ("--batch-size", "36", "--timeout", "20")
    one = machines.train("plain", *SHORT, *size, only=machines.one, nodes=2)
    two = machines.train("plain", *SHORT, *size, only=machines.two, nodes=3)
    sentences = [command.sentence(command.status()) for command in (one, two)]
    assert any("--num-nodes" in sentence for sentence in sentences), sentences


@pytest.mark.slow
def test_data_missing_on_one_machine(network):
    place = network.place
    nowhere = ("--data", "cifar10", "--data-dir", f"{place.folder}/nowhere")
    one = network.train("plain", *SHORT, only=network.one)
    two = network.train("plain", *SHORT, *nowhere, only=network.two)
    assert "nowhere" in two.sentence(2)
    assert "Another process ended" in one.sentence(1)
    assert not place.run_folder("plain").exists()


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("restarts", ["0", "3"])
def test_damaged_checkpoint(place, side, restarts):
    """Said by the one process that reads it."""
    damaged = place.folder / "damaged.ckpt"
    damaged.write_bytes(b"PK\x03\x04 and no more")
    options = ("--devices", "2", *SHORT, "--max-restarts", restarts)
    command = place.train(side, *options, "--ckpt-path", str(damaged))
    sentence = command.sentence(2)
    assert f"the checkpoint '{damaged}' is cut short or altered" in sentence
    assert "Data: shapes" not in command.stdout and not place.run_folder(side).exists()
