"""The scripts in launch/: the commands they print, and what they do with programs that stand in for the clusters'.

The stand-ins run a command as the real ones do: through a shell on each of two hosts. `launch.train` is run for real in
tests/faults/test_processes.py.
"""

import json
import os
import re
import subprocess
import textwrap
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
HARD = '--config.data.dir=it\'s a "$HOME" `id` $(id) \\ *'  # what every shell on the way must leave alone
WORDS = ["--config=c.py", "--workdir=runs/x", HARD]
QUOTED = (
    '--config=c.py --workdir=runs/x --config.data.dir=it\\\'s\\ a\\ \\"\\$HOME\\"\\ \\`id\\`\\ \\$\\(id\\)\\ \\\\\\ \\*'
)


def run(script: str, *options: str, words=WORDS, environment=None) -> subprocess.CompletedProcess:
    command = [str(ROOT / "launch" / f"{script}.sh"), *options, *(["--", *words] if words else [])]
    environment = os.environ | {"PYTHON": "python", "HOSTNAME": "host"} | (environment or {})
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


def dry_run(script: str, *options: str, words=WORDS) -> str:
    finished = run(script, "--dry-run", *options, words=words)
    assert (finished.returncode, finished.stderr) == (0, "")
    return finished.stdout


def test_one_process_on_this_host():
    assert dry_run("host") == f"python -m launch.train {QUOTED}\n"


def test_several_processes_on_this_host():
    printed = dry_run("host", "--processes=2")
    (port,) = set(re.findall(r"127\.0\.0\.1:(\d+)", printed))
    assert printed == "".join(
        f"env JAX_COORDINATOR_ADDRESS=127.0.0.1:{port} JAX_NUM_PROCESSES=2 JAX_PROCESS_ID={i} JAX_LOCAL_DEVICE_IDS={i} "
        f"python -m launch.train {QUOTED} --distributed\n"
        for i in (0, 1)
    )


def test_slurm():
    assert (
        dry_run("slurm", "--nodes=8", "--gpus-per-node=8", "--logs=/l", "--restarts=3")
        == f"""mkdir -p /l
sbatch --job-name=rcm --ntasks-per-node=1 --exclusive --requeue --signal=TERM@300 --open-mode=append \
--output=/l/job_%j.log --nodes=8 --gpus-per-node=8 <<'END'
#!/usr/bin/env bash
export JAX_LOCAL_DEVICE_IDS=$(seq -s, 0 $((SLURM_GPUS_ON_NODE - 1)))
srun --kill-on-bad-exit=0 launch/host.sh --starts=1 --logs=/l -- --distributed {QUOTED}
code=$?
if [ $code = 1 ] || [ $code -gt 3 ]; then
    [ "${{SLURM_RESTART_COUNT:-0}}" -ge 3 ] || scontrol requeue "$SLURM_JOB_ID"
fi
exit $code
END
"""
    )


def test_tpu_vm():
    on_all = "gcloud compute tpus tpu-vm ssh rcm --zone=z --worker=all"
    # What a shell here makes of the last line's --command, a shell on the host reads as QUOTED.
    requoted = re.sub(r"([^\w./=-])", r"\\\1", f"rcm_jax/launch/host.sh --starts=1 -- --distributed {QUOTED}")
    assert dry_run("tpu_vm", "--name=rcm", "--zone=z", "--topology=v5p:4x4x4", "--spot", "--logs=/l").splitlines() == [
        "mkdir -p /l",
        "gcloud compute tpus queued-resources create rcm --zone=z --node-id=rcm --type=v5p "
        "--runtime-version=v2-alpha-tpuv5 --topology=4x4x4 --spot",
        f"{on_all} --command=pkill\\ -f\\ launch/\\[h\\]ost.sh\\;\\ while\\ pgrep\\ -f\\ launch/\\[h\\]ost.sh\\ "
        "\\>/dev/null\\;\\ do\\ sleep\\ 1\\;\\ done",
        "tar -czf /l/rcm_jax.tgz configs launch pallas_kernels rcm_jax requirements.txt",
        "gcloud compute tpus tpu-vm scp /l/rcm_jax.tgz rcm: --zone=z --worker=all",
        f"{on_all} --command=mkdir\\ -p\\ rcm_jax\\ \\&\\&\\ tar\\ -xzf\\ rcm_jax.tgz\\ -C\\ rcm_jax\\ \\&\\&\\ "
        "rcm_jax/launch/install.sh\\ tpu",
        "mkdir -p /l/start_1",
        f"{on_all} --output-directory=/l/start_1 --command={requoted}",
    ]


def test_gke():
    printed = dry_run("gke", "--name=rcm", "--topology=v5e:4x8", "--image=r/i", "--volume=runs", "--restarts=3")
    command = ["launch/host.sh", "--starts=1", "--", "--distributed", *WORDS]
    # Kubernetes reads "$$(" as "$(".
    command = json.dumps([word.replace("$(", "$$(") for word in command])
    assert (
        printed
        == f"""docker build --tag=r/i --file=launch/Dockerfile .
docker push r/i
kubectl apply --filename=- <<'END'
apiVersion: jobset.x-k8s.io/v1alpha2
kind: JobSet
metadata:
  name: rcm
  annotations:
    alpha.jobset.sigs.k8s.io/exclusive-topology: cloud.google.com/gke-nodepool
spec:
  failurePolicy:
    maxRestarts: 3
    rules:
    - action: FailJobSet
      onJobFailureReasons: [PodFailurePolicy]
  replicatedJobs:
  - name: slice
    template:
      spec:
        parallelism: 8
        completions: 8
        backoffLimit: 0
        podFailurePolicy:
          rules:
          - action: FailJob
            onExitCodes: {{containerName: train, operator: In, values: [2, 3]}}
        template:
          spec:
            restartPolicy: Never
            terminationGracePeriodSeconds: 300
            nodeSelector:
              cloud.google.com/gke-tpu-accelerator: tpu-v5-lite-podslice
              cloud.google.com/gke-tpu-topology: 4x8
            containers:
            - name: train
              image: r/i
              command: {command}
              ports:
              - containerPort: 8471
              - containerPort: 8080
              resources:
                limits: {{google.com/tpu: 4}}
              volumeMounts:
              - {{name: runs, mountPath: /runs}}
            volumes:
            - name: runs
              persistentVolumeClaim: {{claimName: runs}}
END
"""
    )


@pytest.mark.parametrize(
    ("script", "options", "words", "message"),
    [
        ("host", [], [], "nothing to train: end with -- --config=FILE --workdir=DIR"),
        ("host", ["--process=2"], WORDS, "unknown option --process=2"),
        *(
            ("host", [f"--{option}={value}"], WORDS, f"--{option}={value} must be an integer of at least 1")
            for option in ("processes", "starts")
            for value in ("0", "two", "-1", "1.5", "08", "")
        ),
        *(
            (script, [f"--restarts={value}"], WORDS, f"--restarts={value} must be an integer of at least 0")
            for script in ("slurm", "tpu_vm", "gke")
            for value in ("two", "-1", "")
        ),
        ("tpu_vm", ["--name=n"], WORDS, "--name and --zone say which slice: give both"),
        ("tpu_vm", ["--name=n", "--zone=z", "--topology=h100:8"], WORDS, "--topology=h100:8 must be v5e, v5p or v6e"),
        ("gke", ["--name=n", "--topology=v5p:2x2x2", "--image=i"], WORDS, "--volume is missing"),
        (
            "gke",
            ["--name=n", "--topology=v5p:all", "--image=i", "--volume=v"],
            WORDS,
            "--topology=v5p:all must end in a shape",
        ),
        (
            "gke",
            ["--name=n", "--topology=v5e:1x1", "--image=i", "--volume=v"],
            WORDS,
            "--topology=v5e:1x1 must have a multiple of four chips",
        ),
    ],
)
def test_a_mistake_is_one_line(script, options, words, message):
    finished = run(script, *options, words=words)
    assert finished.returncode == 2
    assert message in finished.stderr
    assert (finished.stdout, finished.stderr.count("\n")) == ("", 1)


def test_a_run_need_not_start_again():
    assert "-ge 0 ]" in dry_run("slurm", "--restarts=0")


@pytest.mark.parametrize("script", ["host", "slurm", "tpu_vm", "gke"])
def test_a_script_explains_itself(script):
    finished = run(script, "--help", words=[])
    assert finished.returncode == 0
    assert f"launch/{script}.sh" in finished.stdout
    assert "--dry-run" in finished.stdout


class StandIns:
    """Programs on PATH that stand in for others. `launch.train` ends with the next of the lines of the file codes."""

    def __init__(self, folder: Path):
        self.folder, self.bin = folder, folder / "bin"
        self.bin.mkdir()
        self.environment = {
            "PATH": f"{self.bin}:{os.environ['PATH']}",
            "PYTHON": str(self.bin / "train"),
            "FOLDER": str(folder),
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_JOB_ID": "7",
        }
        self.write(
            "train",
            """
            exec 9>"$FOLDER/lock" && flock 9
            code=$(head -n 1 "$FOLDER/codes") && sed -i 1d "$FOLDER/codes"
            printf '%s\\0' "$@" >"$FOLDER/words"
            echo "start" >>"$FOLDER/starts"
            echo "devices ${JAX_LOCAL_DEVICE_IDS:-}"
            [ "$code" != hang ] || touch "$FOLDER/hanging"
            exec 9>&-
            [ "$code" != hang ] || exec tail -f /dev/null
            exit "$code"
            """,
        )
        # Nobody waits, but that a process which does not hang has its minute to end.
        self.write("sleep", '[ "$1" != 60 ] || [ -e "$FOLDER/hanging" ] || exec /bin/sleep 60')
        # SLURM runs the job's script, which it reads, on the first node, and srun's command on two.
        self.write("sbatch", 'cat >"$FOLDER/job"; bash "$FOLDER/job"')
        self.write("scontrol", 'echo "$@" >>"$FOLDER/requeued"')
        self.write(
            "srun",
            """
            while [[ $1 == --* ]]; do shift; done
            worst=0
            for node in a b; do
                HOSTNAME=$node "$@" || { code=$?; ((code <= worst)) || worst=$code; }
            done
            exit $worst
            """,
        )
        # A slice of two hosts, each with a home; the file states says what becomes of the request for it.
        self.write(
            "gcloud",
            """
            echo "$3 $4" >>"$FOLDER/asked"
            mkdir -p "$FOLDER/a" "$FOLDER/b"
            case "$3 $4" in
            "queued-resources describe") head -n 1 "$FOLDER/states" && sed -i 1d "$FOLDER/states" ;;
            "tpu-vm scp") for host in a b; do cp "$5" "$FOLDER/$host"; done ;;
            "tpu-vm ssh")
                for word; do [[ $word != --command=* ]] || command=${word#--command=}; done
                code=0
                for host in a b; do (cd "$FOLDER/$host" && HOSTNAME=$host bash -c "$command") || code=$?; done
                exit $code ;;
            esac
            """,
        )
        self.write("pkill", "exit 1")
        self.write("pgrep", "exit 1")
        self.write("uv", 'echo "$@" >>"$FOLDER/installed"')
        self.write("python3", 'mkdir -p .uv/bin && cp "$FOLDER/bin/uv" .uv/bin')  # pip install --target=.uv uv

    def write(self, name: str, script: str) -> None:
        path = self.bin / name
        path.write_text(f"#!/usr/bin/env bash\n{textwrap.dedent(script)}\n")
        path.chmod(0o755)

    def lines(self, file: str) -> list[str]:
        path = self.folder / file
        return path.read_text().splitlines() if path.exists() else []

    def __call__(self, script: str, *options: str, codes: str) -> subprocess.CompletedProcess:
        (self.folder / "codes").write_text("\n".join(codes.split()) + "\n")
        return run(script, *options, f"--logs={self.folder / 'logs'}", environment=self.environment)

    def words(self) -> list[str]:
        return (self.folder / "words").read_text().split("\0")[:-1]


@pytest.fixture
def stand_ins(tmp_path: Path) -> StandIns:
    return StandIns(tmp_path)


@pytest.mark.parametrize(
    ("options", "codes", "code", "starts"),
    [
        ([], "0", 0, 1),
        ([], "75 1 137 0", 0, 4),
        ([], "75 3 0", 3, 2),
        ([], "2 0", 2, 1),
        (["--starts=2"], "75 75 0", 1, 2),
        (["--processes=2"], "75 75 0 0", 0, 4),
        (["--processes=2"], "3 1 0 0", 3, 2),
        (["--processes=2"], "134 2 0 0", 2, 2),
        (["--processes=2"], "hang 1 0 0", 0, 4),
    ],
)
def test_a_host_starts_again_what_another_start_may_mend(options, codes, code, starts, stand_ins):
    finished = stand_ins("host", *options, codes=codes)
    assert finished.returncode == code, finished.stderr
    assert len(stand_ins.lines("starts")) == starts
    assert stand_ins.words() == [
        "-m",
        "launch.train",
        *WORDS,
        *(["--distributed"] if options == ["--processes=2"] else []),
    ]


def test_a_host_keeps_the_output_of_each_process(stand_ins):
    stand_ins("host", "--processes=2", codes="0 0")
    assert [stand_ins.lines(f"logs/host.{i}.log") for i in (0, 1)] == [["devices 0"], ["devices 1"]]


@pytest.mark.parametrize(
    ("codes", "code", "requeued"),
    [("0 0", 0, []), ("75 75", 1, ["requeue 7"]), ("134 75", 1, ["requeue 7"]), ("134 3", 3, []), ("2 1", 2, [])],
)
def test_slurm_queues_again_what_another_start_may_mend(codes, code, requeued, stand_ins):
    finished = stand_ins("slurm", "--nodes=2", codes=codes)
    assert finished.returncode == code, finished.stderr
    assert stand_ins.lines("requeued") == requeued
    assert stand_ins.words() == ["-m", "launch.train", "--distributed", *WORDS]
    assert stand_ins.lines("logs/b.0.log") == ["devices 0,1,2,3,4,5,6,7"]


def test_slurm_gives_up(stand_ins):
    stand_ins.environment["SLURM_RESTART_COUNT"] = "3"
    assert stand_ins("slurm", "--restarts=3", codes="75 75").returncode == 1
    assert stand_ins.lines("requeued") == []


REQUEST = ["queued-resources describe", "queued-resources create", "queued-resources describe"]
START = ["queued-resources describe", "tpu-vm ssh", "tpu-vm scp", "tpu-vm ssh", "tpu-vm ssh"]


@pytest.mark.parametrize(
    ("states", "codes", "code", "asked"),
    [
        (["ACTIVE"], "0 0", 0, START),
        (["", "WAITING_FOR_RESOURCES", "ACTIVE"], "0 0", 0, [*REQUEST, *START]),
        (
            ["ACTIVE", "SUSPENDED", "", "ACTIVE"],  # taken away, and asked for again
            "75 75 0 0",
            0,
            [*START, "queued-resources describe", "queued-resources delete", *REQUEST[:2], *START],
        ),
        (["ACTIVE"], "3 3", 3, START),
    ],
)
def test_a_slice_is_asked_for_and_the_run_started_again(states, codes, code, asked, stand_ins):
    (stand_ins.folder / "states").write_text("\n".join(states) + "\n")
    finished = stand_ins("tpu_vm", "--name=n", "--zone=z", "--topology=v6e:4x4", codes=codes)
    assert finished.returncode == code, finished.stderr
    assert stand_ins.lines("asked") == asked
    assert stand_ins.words() == ["-m", "launch.train", "--distributed", *WORDS]
    assert stand_ins.lines("b/rcm_jax/logs/b.0.log")
    assert "pip install --quiet --python=.venv/bin/python --requirements=requirements.txt jax[tpu]" in stand_ins.lines(
        "installed"
    )
