"""The launch scripts, run against fakes of gcloud, xpk, SLURM and Python that play what a cloud may do."""

import os
import re
import shlex
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest

LAUNCH = Path(__file__).parents[1] / "launch"
RUN = {"DISTIL_CONFIG": "small", "DISTIL_OUTPUT": "/mnt/buck/runs/one"}
GOOGLE = RUN | {"DISTIL_PROJECT": "p", "DISTIL_ZONE": "z", "DISTIL_NAME": "dj", "DISTIL_BUCKET": "buck"}
GKE = GOOGLE | {"DISTIL_CLUSTER": "c"}
SLURM = RUN | {"DISTIL_GPUS": "2", "DISTIL_TIME": "1:00:00"}
AGAIN_AT_ONCE = {"DISTIL_PAUSE": "0"}
HOSTILE = "a b'c\"$(touch $HOME/pwned)`touch $HOME/pwned`\nnew;&|*~{1,2}\\end"

# Plays the lines of PLAY/HOST.play, one for each start: an exit status and a step that is committed first, or `wait`
# for SIGTERM, or `preempt`. Before, it notes its arguments.
PYTHON = r"""#!/usr/bin/env bash
here="$(basename "$HOME")"
case "$1 $2" in
  "-m venv") mkdir -p "$3/bin" && cp "$0" "$3/bin/python" && exit ;;
  "-m distil_jax") printf '%s\0' "${@:3}" > "$PLAY/$here.arguments" ;;
  *) exit 0 ;;
esac
echo "${JAX_LOCAL_DEVICE_IDS:-all}" >> "$PLAY/$here.starts"
echo $$ > "$PLAY/task"
read -r status step < "$PLAY/$here.play" || exit 99
sed -i 1d "$PLAY/$here.play"
case "$status" in
  wait) trap 'echo signal >> "$PLAY/$here.signals"; sleep 0.2; exit 75' TERM INT
    touch "$PLAY/$here.waits"; for _ in {1..2000}; do sleep 0.02; done ;;
  preempt) echo SUSPENDED > "$PLAY/state"; exit 143 ;;
esac
echo "step ${step:--} on $here"
[[ -z "$step" ]] || echo "gs://buck/runs/one/checkpoints/$step/manifest.json" >> "$PLAY/committed"
exit "$status"
"""

# Two hosts, each with a home of its own and nothing of our environment. New machines have empty homes.
GCLOUD = r"""#!/usr/bin/env bash
[[ "$1" != storage ]] || { cat "$PLAY/committed" 2> /dev/null; exit; }
echo "$4" >> "$PLAY/gcloud"
printf '%s\n' "$@" >> "$PLAY/words"
case "$4" in
  describe) cat "$PLAY/state" 2> /dev/null || { echo "ERROR: NOT_FOUND: no such resource" >&2; exit 1; } ;;
  create) echo ACTIVE > "$PLAY/state"; rm -rf "$PLAY"/host?; mkdir "$PLAY"/host{0,1} ;;
  delete) rm "$PLAY/state" ;;
  scp) for host in 0 1; do cp "$5" "$PLAY/host$host/${6#*:}"; done ;;
  ssh)
    for word in "$@"; do [[ "$word" != --command=* ]] || command="${word#--command=}"; done
    for host in 0 1; do
      env -i PATH="$PATH" PLAY="$PLAY" HOME="$PLAY/host$host" bash -c "cd && $command" > "$PLAY/said$host$$" 2>&1 &
    done
    wait
    [[ "$(cat "$PLAY/state")" == ACTIVE ]] || exit 255
    cat "$PLAY"/said?"$$" ;;
esac
"""
SRUN = '#!/usr/bin/env bash\nwhile [[ "$1" == -* ]]; do shift; done\nexec "$@"\n'
SCANCEL = '#!/usr/bin/env bash\necho "scancel $*" >> "$PLAY/slurm"\nkill -TERM "$(cat "$PLAY/task")"\n'
NOTE = '#!/usr/bin/env bash\nprintf "%s\\0" "$@" >> "$PLAY/$(basename "$0")"\n'


class Stage:
    """A checkout with nothing in it but the scripts, and the fakes before everything else on PATH."""

    def __init__(self, folder: Path) -> None:
        self.play, self.root, self.home = folder / "play", folder / "distil_jax", folder / "play" / "host0"
        for made in ("launch", "distil_jax", "configs"):
            (self.root / made).mkdir(parents=True)
        for script in LAUNCH.glob("*.sh"):
            shutil.copy(script, self.root / "launch" / script.name)
        for name in ("LICENSE", "README.md", "pyproject.toml", "setup.cfg"):
            (self.root / name).touch()
        self.home.mkdir(parents=True)
        fakes = {"python3": PYTHON, "gcloud": GCLOUD, "srun": SRUN, "scancel": SCANCEL}
        notes = dict.fromkeys(("sudo", "gcsfuse", "mountpoint", "xpk", "sbatch", "kubectl", "scontrol"), NOTE)
        (folder / "bin").mkdir()
        for name, text in (fakes | notes).items():
            (folder / "bin" / name).write_text(text)
            (folder / "bin" / name).chmod(0o755)
        path = f"{folder / 'bin'}:/usr/bin:/bin"
        self.environment = {"PATH": path, "PLAY": str(self.play), "HOME": str(self.home), "SLURM_JOB_ID": "7"}

    def script(self, *lines: str, host: int = 0) -> None:
        (self.play / f"host{host}.play").write_text("".join(f"{line}\n" for line in lines))

    def start(self, name: str, *arguments: str, **variables: str) -> subprocess.Popen:
        # bash cannot trap what was ignored before it began, as under nohup and in the background of a script.
        heard = ["env", "--default-signal=INT,HUP"]
        return subprocess.Popen(
            [*heard, self.root / "launch" / name, *arguments],
            env=self.environment | variables,
            cwd=self.play,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def run(self, name: str, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
        process = self.start(name, *arguments, **variables)
        out, error = process.communicate(timeout=60)
        return subprocess.CompletedProcess(process.args, process.returncode, out, error)

    def lines(self, name: str) -> list[str]:
        return (self.play / name).read_text().splitlines() if (self.play / name).exists() else []

    def words(self, name: str) -> list[str]:
        return (self.play / name).read_text().split("\0")[:-1]

    def wait_for(self, name: str) -> None:
        deadline = time.monotonic() + 30
        while not (self.play / name).exists():
            assert time.monotonic() < deadline, name
            time.sleep(0.02)


@pytest.fixture
def stage(tmp_path):
    return Stage(tmp_path)


PACK = [
    "mkdir -p ROOT/build",
    "tar -C ROOT --exclude=__pycache__ -czf ROOT/build/distil_jax.tar.gz "
    "LICENSE README.md configs distil_jax launch pyproject.toml setup.cfg",
]
QR, WHERE = "gcloud compute tpus queued-resources", "--project=p --zone=z --quiet"
DESCRIBE = f"{QR} describe dj '--format=value(state.state)' {WHERE}"
CREATE = f"{QR} create dj --accelerator-type=v5litepod-16 --runtime-version=v2-alpha-tpuv5-lite"
SSH = f"{QR} ssh dj --node=all --worker=all"
VARIABLES = "DISTIL_CONFIG=small DISTIL_OUTPUT=/mnt/buck/runs/one DISTIL_EXTRA=tpu DISTIL_LOCAL=/var/tmp/distil_jax"
ON_HOST = f"{SSH} '--command=cd distil_jax && exec env {VARIABLES} DISTIL_BUCKET=buck"
SETUP = [
    *PACK,
    f"{QR} scp ROOT/build/distil_jax.tar.gz dj:distil_jax.tar.gz --node=all --worker=all {WHERE}",
    f"{SSH} '--command=mkdir -p distil_jax && tar -xzf distil_jax.tar.gz -C distil_jax' {WHERE}",
    f"{ON_HOST} launch/train.sh --setup' {WHERE}",
]
TRAIN = f"{ON_HOST} launch/tpu.sh host-run' {WHERE}"
FETCH = [
    "mkdir -p runs/one",
    "gcloud storage rsync --recursive '--exclude=.*checkpoints/.*' gs://buck/runs/one runs/one",
]
FULL = RUN | {
    "DISTIL_DATA": "/mnt/my rows",
    "DISTIL_TEACHER": "bert-base-uncased",
    "DISTIL_SET": "student.layers=[0,2]  train.steps=5",
}
PYTHON_TRAIN = "ROOT/.venv/bin/python -m distil_jax train small --output /mnt/buck/runs/one"
MADE_FULL = "--set teacher.path=bert-base-uncased --set 'student.layers=[0,2]' --set train.steps=5"
TASKS = "--nodes=2 --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=0 --wait=300"
DRY_RUNS = {
    "train": ("train.sh", RUN, ["make_environment .", PYTHON_TRAIN]),
    "train, everything": (
        "train.sh",
        FULL | {"DISTIL_EXTRA": "cuda12", "DISTIL_LOCAL": "/tmp/dj"},
        [
            "make_environment '.[cuda12]'",
            "copy_folder '/mnt/my rows' /tmp/dj/data",
            f"{PYTHON_TRAIN} --set data.path=/tmp/dj/data {MADE_FULL}",
        ],
    ),
    "train, no copies": (
        "train.sh",
        FULL,
        ["make_environment .", f"{PYTHON_TRAIN} --set 'data.path=/mnt/my rows' {MADE_FULL}"],
    ),
    "train, one of several hosts": (
        "train.sh",
        RUN | {"DISTIL_COORDINATOR": "h:1", "DISTIL_NUM_PROCESSES": "2", "DISTIL_PROCESS_ID": "1"},
        ["make_environment .", PYTHON_TRAIN],
    ),
    "babysit": ("babysit.sh launch/train.sh 'x y'", RUN, ["launch/train.sh 'x y'"]),
    "create": ("tpu.sh create", GOOGLE, [DESCRIBE, f"{CREATE} --node-id=dj {WHERE}"]),
    "create, spot, slices": (
        "tpu.sh create",
        GOOGLE | {"DISTIL_CAPACITY": "spot", "DISTIL_SLICES": "2"},
        [DESCRIBE, f"{CREATE} --node-count=2 --node-prefix=dj --spot {WHERE}"],
    ),
    "setup": ("tpu.sh setup", GOOGLE, SETUP),
    "run": ("tpu.sh run", GOOGLE, [TRAIN]),
    "attempt": ("tpu.sh attempt", GOOGLE, [DESCRIBE, f"{CREATE} --node-id=dj {WHERE}", *SETUP, TRAIN]),
    "babysit tpu": (
        "tpu.sh babysit",
        GOOGLE,
        [
            "gcloud storage ls 'gs://buck/runs/one/checkpoints/*/manifest.json'",
            *[DESCRIBE, f"{CREATE} --node-id=dj {WHERE}", *SETUP, TRAIN],
        ],
    ),
    "stop": (
        "tpu.sh stop",
        {name: GOOGLE[name] for name in ("DISTIL_PROJECT", "DISTIL_ZONE", "DISTIL_NAME")},
        [f"{SSH} '--command=cd distil_jax && exec env launch/tpu.sh host-stop' {WHERE}"],
    ),
    "logs": ("tpu.sh logs", GOOGLE, [*FETCH, f"{SSH} '--command=tail --lines=100 distil_jax.log' {WHERE}"]),
    "delete": ("tpu.sh delete", GOOGLE, [f"{QR} delete dj --force {WHERE}"]),
    "gke create": (
        "gke.sh create",
        GKE,
        [
            *PACK,
            "rm -rf ROOT/build/gke",
            "mkdir ROOT/build/gke",
            "tar -xzf ROOT/build/distil_jax.tar.gz -C ROOT/build/gke",
            "xpk workload create --cluster=c --workload=dj --project=p --zone=z --tpu-type=v5litepod-16 --num-slices=1 "
            "--base-docker-image=python:3.12 --script-dir=ROOT/build/gke --storage=buck --max-restarts=5 "
            "--restart-on-exit-codes=1,4,75 --termination-grace-period-seconds=300 "
            f"'--command=exec env {VARIABLES} launch/train.sh'",
        ],
    ),
    "gke logs": (
        "gke.sh logs",
        GKE,
        [*FETCH, "kubectl logs --selector=xpk.google.com/workload=dj --prefix --tail=-1"],
    ),
    "gke delete": (
        "gke.sh delete",
        GKE,
        ["xpk workload delete --cluster=c --workload=dj --project=p --zone=z --force"],
    ),
    "slurm submit": (
        "slurm.sh submit",
        SLURM | {"DISTIL_NODES": "2"},
        [
            "sbatch --job-name=distil_jax --nodes=2 --ntasks-per-node=1 --exclusive --mem=0 --time=1:00:00 --requeue "
            "--open-mode=append --signal=B:USR1@300 --export=ALL --gpus-per-node=2 <<'JOB'",
            "#!/usr/bin/env bash",
            "exec ROOT/launch/slurm.sh job",
            "JOB",
        ],
    ),
    "slurm job": (
        "slurm.sh job",
        SLURM | {"DISTIL_NODES": "2"},
        ["make_environment '.[cuda12]'", f"srun {TASKS} ROOT/launch/train.sh"],
    ),
}


@pytest.mark.parametrize("case", DRY_RUNS)
def test_a_dry_run_prints_what_would_run_and_runs_nothing(stage, case):
    command, variables, expected = DRY_RUNS[case]
    name, *arguments = shlex.split(command)
    done = stage.run(name, "--dry-run", *arguments, **variables)
    assert done.stderr == "" and done.returncode == 0
    assert done.stdout.splitlines() == [line.replace("ROOT", str(stage.root)) for line in expected]
    assert list(stage.play.iterdir()) == [stage.home] and not (stage.root / "build").exists()


# What a script reads beside the variables that stand in it.
READS = {
    "train.sh": {"RUN"},
    "babysit.sh": {"AGAIN"},
    "tpu.sh": {"RUN", "AGAIN"},
    "gke.sh": {"RUN"},
    "slurm.sh": {"RUN", "AGAIN"},
}


def variables_of(name: str) -> set[str]:
    read = set(re.findall(r"DISTIL_[A-Z_]+", (LAUNCH / name).read_text()))
    if "RUN" in READS[name]:
        read |= set(re.search(r"RUN_VARIABLES=\((.*)\)", (LAUNCH / "contract.sh").read_text()).group(1).split())
    return read | ({"DISTIL_RETRIES", "DISTIL_PAUSE"} if "AGAIN" in READS[name] else set())


@pytest.mark.parametrize("name", READS)
def test_help_and_readme_name_every_variable(stage, name):
    readme = (LAUNCH / "README.md").read_text()
    for flag in ("--help", "-h"):
        done = stage.run(name, flag)
        assert done.returncode == 0 and done.stderr == "" and f"launch/{name}" in done.stdout
        for variable in variables_of(name):
            assert re.search(rf"\b{variable}\b", done.stdout), variable
            assert f"`{variable}`" in readme, variable


REFUSED = [
    ("train.sh", {}, "DISTIL_CONFIG is not set"),
    ("train.sh", {"DISTIL_CONFIG": "small"}, "DISTIL_OUTPUT is not set"),
    ("train.sh --quickly", RUN, "--quickly is not one of: --help --dry-run --setup"),
    ("train.sh --setup --setup", RUN, "one verb at a time"),
    ("train.sh -- x", RUN, "nothing goes after --"),
    ("train.sh", RUN | {"DISTIL_EXTRA": "gpu"}, "DISTIL_EXTRA must be tpu, cuda12, cuda13 or empty, not gpu"),
    ("train.sh", RUN | {"DISTIL_LOCAL": "here"}, "DISTIL_LOCAL must be an absolute path, not here"),
    ("train.sh", RUN | {"DISTIL_SET": "train.steps 5"}, "section.key=value separated by spaces, not train.steps"),
    ("train.sh", RUN | {"DISTIL_COORDINATOR": "h:1"}, "set all three or none"),
    (
        "train.sh",
        RUN | {"DISTIL_COORDINATOR": "h", "DISTIL_NUM_PROCESSES": "2", "DISTIL_PROCESS_ID": "1"},
        "host:port, not h",
    ),
    (
        "train.sh",
        RUN | {"DISTIL_COORDINATOR": "h:1", "DISTIL_NUM_PROCESSES": "2", "DISTIL_PROCESS_ID": "2"},
        "must be below",
    ),
    ("babysit.sh true", {}, "DISTIL_OUTPUT is not set"),
    ("babysit.sh", RUN, "name the command"),
    ("babysit.sh --for-ever true", RUN, "--for-ever is not one of"),
    (
        "babysit.sh true",
        RUN | {"DISTIL_RETRIES": "many"},
        "DISTIL_RETRIES must be a whole number of at least 0, not many",
    ),
    ("babysit.sh true", RUN | {"DISTIL_PAUSE": "-1"}, "DISTIL_PAUSE must be a whole number"),
    ("tpu.sh", GOOGLE, "name a verb"),
    ("tpu.sh destroy", GOOGLE, "destroy is not one of"),
    ("tpu.sh create run", GOOGLE, "one verb at a time: run came after create"),
    ("tpu.sh run -- --reserved", GOOGLE, "nothing goes after -- with run"),
    ("tpu.sh create", {}, "DISTIL_PROJECT is not set"),
    ("tpu.sh create", GOOGLE | {"DISTIL_NAME": "My TPU"}, "DISTIL_NAME must be up to 40"),
    ("tpu.sh create", GOOGLE | {"DISTIL_CAPACITY": "cheap"}, "DISTIL_CAPACITY must be on-demand or spot, not cheap"),
    ("tpu.sh create", GOOGLE | {"DISTIL_SLICES": "0"}, "DISTIL_SLICES must be a whole number of at least 1, not 0"),
    ("tpu.sh run", GOOGLE | {"DISTIL_BUCKET": "gs://buck"}, "without gs://"),
    ("tpu.sh run", GOOGLE | {"DISTIL_OUTPUT": "/home/me/run"}, "DISTIL_OUTPUT must be a folder in /mnt/buck"),
    ("gke.sh create", GOOGLE, "DISTIL_CLUSTER is not set"),
    ("gke.sh create", GKE | {"DISTIL_RETRIES": "x"}, "DISTIL_RETRIES must be a whole number"),
    ("gke.sh list", GKE, "list is not one of"),
    ("slurm.sh submit", RUN, "DISTIL_GPUS is not set"),
    ("slurm.sh submit", SLURM | {"DISTIL_TIME": "a day"}, "DISTIL_TIME must be a time such as"),
    ("slurm.sh submit", SLURM | {"DISTIL_COORDINATOR": "h:1"}, "SLURM provides all three"),
]


@pytest.mark.parametrize(("command", "variables", "sentence"), REFUSED)
def test_what_cannot_be_is_refused_in_one_sentence(stage, command, variables, sentence):
    name, *arguments = shlex.split(command)
    done = stage.run(name, *arguments, **variables)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(f"{name}: ") and done.stderr.count("\n") == 1 and sentence in done.stderr
    assert list(stage.play.iterdir()) == [stage.home]


# With hostile values, what arrives in the end must be exactly these.
STRANGE = {"DISTIL_CONFIG": HOSTILE, "DISTIL_OUTPUT": f"/mnt/buck/{HOSTILE}", "DISTIL_DATA": HOSTILE}
ARRIVES = ["train", HOSTILE, "--output", f"/mnt/buck/{HOSTILE}", "--set", f"data.path={HOSTILE}", "--set", "a.b=[*]"]


def test_hostile_values_arrive_as_they_are_on_this_host(stage):
    stage.script("0")
    assert stage.run("train.sh", **STRANGE, DISTIL_SET="a.b=[*]").returncode == 0
    assert stage.words("host0.arguments") == ARRIVES and not list(stage.play.rglob("pwned"))


def test_hostile_values_arrive_as_they_are_on_the_hosts_of_a_tpu(stage):
    for host in (0, 1):
        stage.script("0", host=host)
    done = stage.run("tpu.sh", "attempt", **GOOGLE | STRANGE, DISTIL_SET="a.b=[*]")
    assert done.returncode == 0, done.stderr
    assert stage.words("host0.arguments") == stage.words("host1.arguments") == ARRIVES
    assert not list(stage.play.rglob("pwned"))


def test_hostile_values_arrive_as_they_are_in_a_pod(stage):
    stage.script("0")
    assert stage.run("gke.sh", "create", **GKE | STRANGE, DISTIL_SET="a.b=[*]").returncode == 0
    (command,) = (word for word in stage.words("xpk") if word.startswith("--command="))
    pod = command.removeprefix("--command=").replace("$$(", "$(")  # as Kubernetes does
    folder = stage.root / "build" / "gke"
    subprocess.run(["bash", "-c", pod], cwd=folder, env=stage.environment, check=True, capture_output=True)
    assert "\n" not in pod and "$(" not in command.replace("$$(", "")
    assert stage.words("host0.arguments") == ARRIVES and not list(stage.play.rglob("pwned"))


def test_copies_are_made_once_and_again_when_the_source_has_changed(stage):
    rows, local = stage.play / "rows", stage.play / "local"
    (rows / "train").mkdir(parents=True)
    (rows / "train" / "a").write_text("one")
    variables = RUN | {"DISTIL_DATA": str(rows), "DISTIL_TEACHER": str(rows), "DISTIL_LOCAL": str(local)}
    for text, copied in (("one", True), ("one", False), ("three", True)):
        if text == "three":
            (rows / "train" / "a").write_text(text)
        done = stage.run("train.sh", "--setup", **variables)
        assert done.returncode == 0 and ("Copying" in done.stdout) == copied
        assert {(local / name / "train" / "a").read_text() for name in ("data", "teacher")} == {text}
    done = stage.run("train.sh", "--setup", **variables | {"DISTIL_DATA": "/nowhere"})
    assert done.returncode == 2 and "cannot read the folder /nowhere" in done.stderr


def test_a_host_with_an_old_python_and_no_bucket_gets_both(stage, tmp_path):
    (tmp_path / "bin" / "python3").write_text('#!/usr/bin/env bash\n[[ "$1" != -c ]]\n')
    for name in ("gcsfuse", "mountpoint"):
        (tmp_path / "bin" / name).unlink()
    done = stage.run("train.sh", "--setup", "--dry-run", **RUN, DISTIL_BUCKET="buck")
    install, folder, mount, *python = done.stdout.splitlines()
    assert install.startswith("sudo bash -c ") and "apt-get" in install and "install gcsfuse" in install
    assert folder == f"sudo install -d -o {os.getuid()} /mnt/buck"
    assert re.fullmatch(
        "gcsfuse .*--metadata-cache-ttl-secs=0 --metadata-cache-negative-ttl-secs=0 buck /mnt/buck", mount
    )
    assert python[0] == "python3 -m pip install --quiet --user uv" and "uv python install" in python[1]


# Exit statuses that the command has in turn, `N@STEP` where it commits a step first; how often it starts; the end.
FAILURES = [
    ("0", 1, 0),
    ("2", 1, 2),
    ("130", 1, 130),
    ("3", 1, 3),
    ("139", 1, 139),
    ("75 75 75 75 75 0", 6, 0),
    ("75@5 2", 2, 2),
    ("4 1 137 143", 4, 143),
    ("4 1 75 137 0", 5, 0),
    ("4 1 4@7 1 137 4 0", 6, 4),
    ("4 4 4@7 4 4@3 4 0", 6, 4),
    ("4 4 4@7 4 4@10 4 4 0", 8, 0),
]


@pytest.mark.parametrize(("statuses", "starts", "end"), FAILURES)
def test_babysitting_starts_again_by_the_status(stage, statuses, starts, end):
    output = stage.play / "the run"
    stage.script(*statuses.split())
    command = """echo start >> starts; read -r status < host0.play; sed -i 1d host0.play
      [[ "$status" != *@* ]] || { mkdir -p "$DISTIL_OUTPUT/checkpoints/${status#*@}"
        touch "$DISTIL_OUTPUT/checkpoints/${status#*@}/manifest.json"; }
      mkdir -p "$DISTIL_OUTPUT/checkpoints/99.orbax-checkpoint-tmp" "$DISTIL_OUTPUT/checkpoints/98"
      exit "${status%@*}" """
    variables = AGAIN_AT_ONCE | {"DISTIL_OUTPUT": str(output), "DISTIL_RETRIES": "3"}
    done = stage.run("babysit.sh", "bash", "-c", command, **variables)
    assert (len(stage.lines("starts")), done.returncode) == (starts, end), done.stderr
    assert ("giving up" in done.stderr) == (end in (4, 143))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_reaches_the_command_once_and_ends_the_babysitting(stage, number):
    stage.script("wait", "0")
    process = stage.start("babysit.sh", stage.root / "launch" / "train.sh", **RUN | AGAIN_AT_ONCE)
    stage.wait_for("host0.waits")
    os.killpg(process.pid, number)  # as a terminal does with Ctrl-C
    process.communicate(timeout=30)
    assert process.returncode == 75
    assert stage.lines("host0.signals") == ["signal"] and len(stage.lines("host0.starts")) == 1


def test_a_signal_in_the_pause_ends_the_babysitting(stage):
    stage.script("4", "0")
    process = stage.start("babysit.sh", stage.root / "launch" / "train.sh", **RUN, DISTIL_PAUSE="60")
    while "starting it again" not in process.stderr.readline():
        pass
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert process.returncode == 4 and len(stage.lines("host0.starts")) == 1


def test_a_preempted_tpu_is_made_again_and_bad_input_ends_it(stage):
    stage.script("75 10", "preempt", "2")
    stage.script("75", "4", "2", host=1)
    done = stage.run("tpu.sh", "babysit", **GOOGLE | AGAIN_AT_ONCE)
    setup = ["scp", "ssh", "ssh"]
    assert done.returncode == 2, done.stderr
    assert stage.lines("gcloud") == [
        *["describe", "create", "describe", *setup, "ssh"],  # saves and stops
        *["describe", *setup, "ssh"],  # preempted
        *["describe", "delete", "describe", "create", "describe", *setup, "ssh"],  # bad input
    ]
    assert len(stage.lines("host0.starts")) == len(stage.lines("host1.starts")) == 3
    assert "step 10 on host0" in done.stdout and "DISTIL" not in done.stderr


def test_a_tpu_that_fails_without_progress_is_given_up(stage):
    for host in (0, 1):
        stage.script(*["4"] * 9, host=host)
    done = stage.run("tpu.sh", "babysit", **GOOGLE | AGAIN_AT_ONCE, DISTIL_RETRIES="1")
    assert done.returncode == 4 and len(stage.lines("host0.starts")) == 2 and "giving up" in done.stderr


def test_a_tpu_waits_in_the_queue_and_passes_flags_on(stage, tmp_path):
    (stage.play / "state").write_text("WAITING_FOR_RESOURCES\n")
    process = stage.start("tpu.sh", "create", "--", "--reserved", **GOOGLE | AGAIN_AT_ONCE)
    while "WAITING_FOR_RESOURCES: waiting" not in process.stderr.readline():
        pass
    (stage.play / "state").write_text("FAILED\n")
    process.communicate(timeout=30)
    assert process.returncode == 0 and "--reserved" in stage.lines("words")
    assert stage.lines("gcloud")[-4:] == ["delete", "describe", "create", "describe"]


def test_a_gcloud_that_cannot_answer_is_no_missing_machine(stage, tmp_path):
    (tmp_path / "bin" / "gcloud").write_text('#!/usr/bin/env bash\necho "ERROR: no network" >&2\nexit 1\n')
    done = stage.run("tpu.sh", "create", **GOOGLE)
    assert done.returncode == 1 and done.stderr == "ERROR: no network\n"


@pytest.mark.parametrize(
    ("statuses", "together"),
    [("0 0", 0), ("75 0 2", 2), ("3 2", 2), ("75 3", 3), ("4 75 143", 75), ("4 143 1", 143), ("0 4", 4)],
)
def test_the_statuses_of_several_hosts_become_one(statuses, together):
    command = f'source "$0"; combined_status {statuses}'
    done = subprocess.run(["bash", "-c", command, LAUNCH / "contract.sh"], check=True, capture_output=True, text=True)
    assert done.stdout == f"{together}\n"


def test_a_host_that_is_lost_is_a_failure(stage):
    assert stage.run("tpu.sh", "create", **GOOGLE).returncode == 0
    (stage.play / "state").write_text("SUSPENDED\n")
    done = stage.run("tpu.sh", "run", **GOOGLE)
    assert done.returncode == 4 and "status unknown; combined 4" in done.stderr


def test_a_signal_has_the_hosts_of_a_tpu_save(stage):
    for host in (0, 1):
        stage.script("wait", host=host)
    process = stage.start("tpu.sh", "babysit", **GOOGLE | AGAIN_AT_ONCE)
    for host in (0, 1):
        stage.wait_for(f"host{host}.waits")
    process.send_signal(signal.SIGTERM)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 75 and "75 75; combined 75" in error
    assert stage.lines("host0.signals") == stage.lines("host1.signals") == ["signal"]


def test_a_run_that_a_broken_connection_left_behind_is_stopped_first(stage):
    stage.script("wait", "0")
    left = stage.start("tpu.sh", "host-run", **RUN)
    stage.wait_for("host0.waits")
    done = stage.run("tpu.sh", "host-run", **RUN)
    assert done.returncode == 0 and re.search(r"^distil_jax: host \S+ ended with status 0$", done.stdout, re.MULTILINE)
    assert "ended with status 75" in left.communicate(timeout=30)[0] and stage.lines("host0.signals") == ["signal"]


# The signal that the batch script gets, the status of the job, and whether it goes back into the queue.
@pytest.mark.parametrize(
    ("plays", "number", "end", "requeued"),
    [
        (["wait"], signal.SIGUSR1, 75, True),
        (["wait"], signal.SIGTERM, 75, False),
        (["4", "75", "2"], None, 2, False),
        (["1"] * 9, None, 1, False),
    ],
)
def test_a_slurm_job_saves_and_goes_back_into_the_queue(stage, plays, number, end, requeued):
    stage.script(*plays)
    variables = SLURM | AGAIN_AT_ONCE | {"DISTIL_RETRIES": "2"}
    process = stage.start("slurm.sh", "job", **variables)
    if number is not None:
        stage.wait_for("host0.waits")
        process.send_signal(number)
    process.communicate(timeout=30)
    assert process.returncode == end and set(stage.lines("host0.starts")) == {"0,1"}
    assert (stage.words("scontrol") if requeued else []) == (["requeue", "7"] if requeued else [])
    assert (stage.play / "scontrol").exists() == requeued
    assert stage.lines("slurm") == ([] if number is None else ["scancel --signal=TERM 7"])


def test_a_slurm_job_is_submitted_with_its_flags(stage):
    done = stage.run("slurm.sh", "submit", "--", "--partition=a b", **SLURM)
    assert done.returncode == 0 and stage.words("sbatch")[-1] == "--partition=a b"
