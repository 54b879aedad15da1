"""What surrounds a command, its options and its machine: said, checked, or of no effect."""

from common import ROOT, THIRD, data, environment
from common.environment import LEFT_OVER, WITH_PROCESSES, clean
from common.launch import Processes
from common.logger import check_logger
from common.messages import BadInput
from common.run import ready

import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import SIDES, arguments, count, lessons, load_lesson, small_data, some, train
from test_command_line import assert_refused, typed

VALUES = ["", "text", "0", "-2", "3", "1", "1.5", "99999999999999999999", "\x1b[31m"]
NAMES = [
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "NODE_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "TORCHELASTIC_RUN_ID",
    "TORCHELASTIC_ERROR_FILE",
    "SLURM_NTASKS",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NODEID",
    "JSM_NAMESPACE_RANK",
    "PL_TRAINER_MAX_STEPS",
    "PL_TRAINER_FAST_DEV_RUN",
]
KEPT = ["SLURM_JOB_ID", "SLURM_JOB_NAME", "PATH", "DATA_DIR", "FRANK", "RANKS", "MASTER"]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    monkeypatch.setattr(os, "environ", dict(os.environ))


@pytest.mark.parametrize("lesson", lessons())
@pytest.mark.parametrize("value", VALUES)
def test_a_lesson_in_one_process_says_what_it_ignores(value, lesson, capsys):
    os.environ.update(dict.fromkeys([*NAMES, *KEPT], value))
    if lesson in WITH_PROCESSES:
        os.environ["TORCHELASTIC_RUN_ID"] = ""  # it starts them itself
    clean(f"plain/{lesson}.py")
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("Ignored from the environment: ")
    for name in NAMES:
        assert name not in os.environ and f"{name}" in said
    assert all(os.environ[name] == value for name in KEPT)
    clean(f"plain/{lesson}.py")
    assert capsys.readouterr().err == ""
    count("left-over variables ignored", len(NAMES))


def test_of_other_programs_nothing_is_ignored(capsys):
    os.environ.update(dict.fromkeys(NAMES, "3"))
    for script in ("", "-c", "-m", "/usr/bin/pytest", "bench/workers.py", "plain/", "x/plain.py"):
        clean(script)
    assert all(os.environ[name] == "3" for name in NAMES) and capsys.readouterr().err == ""


GOOD = {
    "TORCHELASTIC_RUN_ID": "x",
    "RANK": "1",
    "LOCAL_RANK": "1",
    "WORLD_SIZE": "4",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29400",
}


def test_a_lesson_of_torchruns_checks_what_it_needs(capsys):
    os.environ.update(GOOD | {"SLURM_PROCID": "3"})
    clean("lightning/parallel.py")
    assert os.environ["RANK"] == "1" and "SLURM_PROCID" not in os.environ
    assert capsys.readouterr().err == ""
    for name in environment.NUMBERS:
        for value in [*VALUES, None]:
            if value in ("0", "1", "3"):
                continue
            os.environ.update(GOOD)
            os.environ.pop(name) if value is None else os.environ.update({name: value})
            with pytest.raises(SystemExit) as end:
                clean("plain/parallel.py")
            said = capsys.readouterr().err
            assert end.value.code == 2 and said.count("\n") == 1 and name in said, said
            assert "\x1b" not in said
            count("left-over variables refused")
    for wrong in (
        {"RANK": "4"},
        {"LOCAL_RANK": "2"},
        {"LOCAL_WORLD_SIZE": "5"},
        {"MASTER_ADDR": ""},
        {"MASTER_PORT": "0"},
        {"MASTER_PORT": "65536"},
        {"WORLD_SIZE": "0"},
    ):
        os.environ.update(GOOD | wrong)
        with pytest.raises(SystemExit):
            clean("plain/parallel.py")
        assert capsys.readouterr().err.startswith("error: the environment")
        count("left-over variables refused")


def test_which_lessons_have_processes():
    having = [name for name in lessons() if issubclass(load_lesson("plain", name).Args, Processes)]
    third = [Path(path).stem for name, path in THIRD.items() if name in having]
    assert sorted(having + third) == sorted(WITH_PROCESSES) and len(having) >= 3
    assert all(LEFT_OVER.fullmatch(name) for name in NAMES)
    assert not any(LEFT_OVER.fullmatch(name) for name in KEPT)


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_a_real_start_with_all_of_it(side, tmp_path):
    """Before Lightning is imported, which would fail at RANK=text, and write nothing at RANK=3."""
    left_over = dict.fromkeys(NAMES, "text") | {
        "RANK": "3",
        "COLUMNS": "nonsense",
        "OMP_NUM_THREADS": "-2",
        "MPLBACKEND": "module://matplotlib_inline.backend_inline",
        "LINES": "-1",
        "PYTHONIOENCODING": "ascii",
    }
    command = [
        sys.executable,
        str(ROOT / side / "cifar.py"),
        "--data",
        "shapes",
        "--max-epochs",
        "1",
        "--limit-train-batches",
        "4",
        "--limit-val-batches",
        "1",
        "--limit-test-batches",
        "1",
        "--accelerator",
        "cpu",
        "--runs-dir",
        str(tmp_path / "ä"),
    ]
    ended = subprocess.run(command, env={**os.environ, **left_over}, capture_output=True, text=True)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    assert ended.stderr.count("Ignored from the environment: ") == 1
    assert (tmp_path / "ä" / "cifar" / side / "result.json").exists()
    assert (tmp_path / "ä" / "cifar" / side / "metrics.csv").exists()


@pytest.mark.parametrize("columns", ["", "0", "-1", "1", "text", "1000000"])
def test_any_width_of_a_terminal(columns, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(os, "environ", {**os.environ, "COLUMNS": columns})
    result = train("plain", tmp_path, monkeypatch, max_epochs=1)
    from common.proof import watch

    args = arguments(load_lesson("plain", "cifar"), "plain", "cifar", tmp_path)
    args.started = True
    watch.show(result, args)
    assert "result.json" in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    "name, value",
    [
        ("WANDB_SILENT", "maybe"),
        ("WANDB_CONSOLE", "x"),
        ("WANDB_RUN_ID", "a/b"),
        ("WANDB_TAGS", ""),
        ("WANDB_BASE_URL", "nope"),
        ("WANDB_RESUME", "x"),
        ("WANDB_INIT_TIMEOUT", "soon"),
        ("WANDB_MODE", ""),
        ("WANDB_MODE", "on"),
    ],
)
def test_what_weights_and_biases_would_not_understand(name, value, monkeypatch):
    monkeypatch.setattr(os, "environ", {**os.environ, name: value})
    with pytest.raises(BadInput, match="WANDB_"):
        check_logger("wandb")
    count("left-over variables refused")


# Options.


REFUSED = {
    "parallel": [
        *(
            ["--num-nodes", "2", "--batch-size", "8", "--devices", "1", f"--rdzv-endpoint={place}"]
            for place in (
                "127.0.0.1:99999",
                "127.0.0.1:0",
                "a..b:29400",
                f"{'x' * 64}:29400",
                ":29400",
                "host",
                "host:",
                "a b:29400",
                "-a:29400",
                "a-:29400",
                "[::1]:29400",
                "ä:29400",
                "\x1b[31m:29400",
                f"{'x.' * 200}a:29400",
                "http://a:29400",
                "a:-1",
                "a:1.5",
                "a:29400:29400",
            )
        ),
        ["--rdzv-endpoint", "127.0.0.1:99999"],
    ],
    "speed": [["--translate", "32"], ["--translate", "-1"], ["--translate", "1000000000"]],
    "cifar": [
        ["--runs-dir", "a::b"],
        ["--runs-dir", "::"],
        ["--runs-dir=memory::x"],
        ["--runs-dir=~nobody-of-this-name/runs"],
        ["--data-dir=~nobody-of-this-name/data"],
        ["--runs-dir", "x" * 300],
        ["--runs-dir", "a\0b"],
    ],
    "finetune": [
        ["--start-from=~nobody-of-this-name/x.ckpt"],
        ["--start-from", ""],
        ["--start-from", "."],
    ],
    "resume": [
        ["--ckpt-path=~nobody-of-this-name/x.ckpt"],
        ["--ckpt-path", "."],
        ["--max-time", "99"],
        ["--max-time", "00:00:00:1"],
        ["--ckpt-path", "/dev/zero"],
    ],
}


@pytest.mark.parametrize("lesson", some(REFUSED))
def test_options_that_cannot_be(lesson, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for side in SIDES:
        for words in REFUSED[lesson]:
            with pytest.raises(SystemExit) as end:
                typed(side, lesson, "--data", "shapes", "--accelerator", "cpu", *words)
            said = capsys.readouterr().err
            assert end.value.code == 2, (words, said)
            assert_refused(said.replace("\x1b", "?"), boxed=False)
            assert not [path for path in tmp_path.rglob("*") if path.is_file()], words
            count("bad inputs")


STRANGE = [
    "~/runs",
    "a b",
    "ä",
    "a[b]",
    "a*b",
    "a?b",
    "a#b",
    "a%20b",
    "{step}",
    "$HOME",
    "a'b",
    'a"b',
    "a`b`",
    "-x",
    "a:b",
    "a\nb",
    "\udcff",
    "...",
    "a;b",
    "a,b=c",
    "\x1b[31m",
    "x" * 200,
    "a/../b",
    "./a/",
    "a\\b",
]


@pytest.mark.filterwarnings("ignore:.*")
@pytest.mark.parametrize("name", STRANGE, ids=range(len(STRANGE)))
def test_results_go_into_a_folder_of_any_name(name, tmp_path, monkeypatch):
    """Into that one, and no other, on both sides."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(os, "environ", {**os.environ, "HOME": str(tmp_path / "home")})
    images = small_data(16, 8, 8)
    for side in SIDES:
        train(side, Path(name), monkeypatch, images=images, max_epochs=1, log_every_n_steps=1)
    place = Path(name).expanduser()
    for side in SIDES:
        folder = place / "cifar" / side
        assert {"result.json", "weights.pt", "metrics.csv"} <= {p.name for p in folder.iterdir()}
    found = {path.parent.resolve() for path in tmp_path.rglob("*.csv")}
    assert found == {(place / "cifar" / side).resolve() for side in SIDES}
    count("folders of strange names", 2)


# Shared memory.


@pytest.mark.parametrize("side", SIDES)
def test_too_little_shared_memory_is_refused_beforehand(side, tmp_path, monkeypatch):
    """64 MB are what Docker gives. A batch to evaluate has 6 MB, and twelve are on their way."""
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(data, "SHARED_MEMORY", tmp_path)
    images = small_data()
    many = type(images)(
        *(
            replace(part, images=part.images.repeat(9, 1, 1, 1), labels=part.labels.repeat(9))
            for part in images
        )
    )
    for free, workers, refused in (
        (64e6, 6, True),
        (64e6, 1, False),
        (1e9, 6, False),
        (0, 0, False),
        (0, 1, True),
        (64e6, 1000, True),
    ):
        monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=int(free)))  # noqa: B023
        module = load_lesson(side, "cifar")
        args = module.Args(num_workers=workers, batch_size=4, accelerator="cpu", runs_dir=tmp_path)
        args = ready(args, ROOT / side / "cifar.py")
        try:
            data._check_limits(many, args)
            assert not refused
        except BadInput as error:
            assert refused and f"--num-workers {workers} needs " in str(error)
            assert "--shm-size" in str(error)
        count("sizes of shared memory")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("unshare"), reason="there is no unshare")
def test_with_as_little_as_docker_gives(tmp_path):
    """In a namespace with a /dev/shm of 64 MB: refused, and with fewer processes it ends."""
    small = "mount -t tmpfs -o size=64m tmpfs /dev/shm && exec "
    probe = ["unshare", "-m", "sh", "-c", f"{small} true"]
    if subprocess.run(probe, capture_output=True).returncode:
        pytest.skip("no namespace can be made here")
    for workers, status in ((6, 2), (1, 0)):
        lesson = (
            f"{sys.executable} {ROOT}/plain/cifar.py --data shapes --max-epochs 1 --num-workers "
            f"{workers} --limit-train-batches 50 --accelerator cpu --runs-dir {tmp_path}"
        )
        ended = subprocess.run(
            ["unshare", "-m", "sh", "-c", small + lesson],
            capture_output=True,
            text=True,
            timeout=200,
        )
        assert ended.returncode == status, ended.stderr
        assert (f"--num-workers {workers} needs " in ended.stderr) == (status == 2)
        count("sizes of shared memory")
