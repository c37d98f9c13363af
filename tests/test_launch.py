"""The launch scripts: they parse, refuse with a message, retry rightly, and name what there is."""

import importlib
import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import typer.main
import yaml

from npr_jax.base.config import config_path, load_config
from npr_jax.cli import app
from npr_jax.train.papo import PapoConfig

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "scripts" / "launch"
DOC = ROOT / "docs" / "launch.md"
SHELL = sorted([*LAUNCH.glob("*.sh"), LAUNCH / "slurm.sbatch"])
JOBSETS = sorted(LAUNCH.glob("jobset*.yaml"))
STAGES = ("zero", "beta", "papo")


def run(script, *args, path=(), **env):
    """Runs a launch script with nothing in its environment but `env` and the system's commands."""
    env = {"PATH": os.pathsep.join([*map(str, path), "/usr/bin", "/bin"]), "HOME": "/none"} | env
    command = [str(script), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, timeout=600, env=env)


def stand_in(directory, name, text):
    path = directory / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/usr/bin/env bash\n" + text)
    path.chmod(0o755)
    return path


@pytest.mark.parametrize("script", SHELL, ids=lambda path: path.name)
def test_scripts_parse_and_stop_at_the_first_error(script):
    assert subprocess.run(["bash", "-n", script]).returncode == 0
    assert re.search(r"^set -euo pipefail$", script.read_text(), re.MULTILINE)
    if shellcheck := shutil.which("shellcheck"):
        assert subprocess.run([shellcheck, script]).returncode == 0


@pytest.mark.parametrize(
    "script, args, env, words",
    [
        ("retry.sh", [], {}, "no command"),
        ("install.sh", [], {}, "tpu or cuda"),
        ("install.sh", ["tpu"], {"PYTHON": "python0", "VENV": "/none"}, "no python0 on PATH"),
        ("tpu_vm.sh", [], {}, "no arguments for npr-jax"),
        ("gpu_node.sh", [], {}, "no arguments for npr-jax"),
        ("gpu_node.sh", ["papo", "x"], {"NPR_PROCESS": "1"}, "NPR_COORDINATOR"),
        ("gpu_node.sh", ["papo", "x"], {"NPR_COORDINATOR": "a:1"}, "NPR_PROCESSES"),
        (
            "gpu_node.sh",
            ["papo", "x"],
            {"NPR_COORDINATOR": "a:1", "NPR_PROCESSES": "2"},
            "NPR_PROCESS:",
        ),
        (
            "gpu_node.sh",
            ["papo", "x"],
            {"NPR_COORDINATOR": "a:1", "NPR_PROCESSES": "2", "NPR_PROCESS": "0"},
            "--distributed is not given",
        ),
        ("tpu_pod.sh", ["copy"], {}, "set TPU"),
        ("tpu_pod.sh", ["copy"], {"TPU": "pod"}, "set ZONE"),
        ("tpu_pod.sh", [], {"TPU": "pod", "ZONE": "z"}, "create, copy, start"),
        ("tpu_pod.sh", ["fly"], {"TPU": "pod", "ZONE": "z"}, "fly?"),
        ("tpu_pod.sh", ["create"], {"TPU": "pod", "ZONE": "z"}, "set ACCELERATOR"),
        (
            "tpu_pod.sh",
            ["create"],
            {"TPU": "pod", "ZONE": "z", "ACCELERATOR": "v5p-128"},
            "set RUNTIME",
        ),
        ("tpu_pod.sh", ["start", "papo", "x"], {"TPU": "pod", "ZONE": "z"}, "checkpoints=gs://"),
        ("slurm.sbatch", ["papo", "x"], {}, "SLURM_JOB_ID: slurm.sbatch: submit it"),
        (
            "slurm.sbatch",
            ["papo", "x"],
            {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": "/none"},
            "--gpus-per-node",
        ),
        (
            "slurm.sbatch",
            ["papo", "x"],
            {"SLURM_JOB_ID": "1", "SLURM_SUBMIT_DIR": "/none", "SLURM_GPUS_ON_NODE": "8"},
            "no /none/.venv/bin/npr-jax",
        ),
    ],
)
def test_what_is_missing_is_named(script, args, env, words):
    path = LAUNCH / script
    result = run("/bin/bash", path, *args, **env)
    assert result.returncode in (1, 2), result
    assert words in result.stderr and script in result.stderr, result.stderr
    assert len(result.stderr.splitlines()) == 1 and not result.stdout


@pytest.mark.parametrize(
    "codes, retries, last, runs",
    [
        ([0], 3, 0, 1),
        ([1, 143, 134, 0], 3, 0, 4),
        ([2], 3, 2, 1),  # a user's error
        ([3], 3, 3, 1),  # `plan`: it does not fit
        ([4], 3, 4, 1),  # `generate` has left lines out
        ([143] * 5 + [0], 1, 0, 6),  # being stopped does not count
        ([1] * 9, 2, 1, 3),
    ],
)
def test_a_run_is_tried_again_after_all_but_success_and_a_users_error(
    tmp_path, codes, retries, last, runs
):
    for number, code in enumerate(codes):
        (tmp_path / str(number)).write_text(str(code))
    program = stand_in(
        tmp_path,
        "program",
        f"cd {tmp_path}; n=$(ls ran.* 2>/dev/null | wc -l); touch ran.$n; exit $(cat $n)",
    )
    result = run(LAUNCH / "retry.sh", program, RETRIES=str(retries), RETRY_DELAY="0")
    assert result.returncode == last, result.stderr
    assert len(list(tmp_path.glob("ran.*"))) == runs


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_handed_on_and_the_run_may_save_before_it_ends(tmp_path, number):
    program = stand_in(
        tmp_path,
        "program",
        f"trap 'sleep 0.3; touch {tmp_path}/saved; exit 143' TERM\n"
        f"touch {tmp_path}/started; while true; do sleep 0.05; done",
    )
    process = subprocess.Popen(
        [LAUNCH / "retry.sh", program],
        start_new_session=True,
        # What runs the tests may ignore it, and then no shell below could trap it.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    wait_for(tmp_path / "started")
    process.send_signal(number)
    assert process.wait(10) == 143
    assert (tmp_path / "saved").exists()


def test_a_signal_ends_the_pause_between_two_tries(tmp_path):
    program = stand_in(tmp_path, "program", f"touch {tmp_path}/started; exit 1")
    process = subprocess.Popen(
        [LAUNCH / "retry.sh", program],
        env=os.environ | {"RETRY_DELAY": "60"},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert "again in 60 s" in process.stderr.readline()
    process.terminate()
    assert process.wait(10) == 143
    assert not process.stderr.read()


def wait_for(path):
    end = time.monotonic() + 60
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not come"
        time.sleep(0.02)


@pytest.mark.parametrize("script, extra", [("tpu_vm.sh", "tpu"), ("gpu_node.sh", "cuda")])
def test_a_machine_installs_once_and_runs_what_it_was_given(tmp_path, script, extra):
    venv = tmp_path / "venv"
    installed = tmp_path / "installed"
    stand_in(venv / "bin", "python", f'echo "$@" >> {installed}')
    told = 'printf "%s\\n" "$@" $JAX_COMPILATION_CACHE_DIR $XLA_PYTHON_CLIENT_MEM_FRACTION'
    stand_in(venv / "bin", "npr-jax", told)
    stand_in(tmp_path, "nvidia-smi", "")
    settings = {"VENV": str(venv), "PYTHON": sys.executable, "path": [tmp_path]}
    for _ in range(2):
        result = run(LAUNCH / script, "papo", "a b", **settings)
        fraction = ["0.92"] if extra == "cuda" else []
        cache = "/none/.cache/npr_jax/compiled"
        assert result.stdout.splitlines() == ["papo", "a b", cache, *fraction]
    (line,) = installed.read_text().splitlines()
    assert f"-e {ROOT}[{extra}] etils[epath-gcs] -c {ROOT}/constraints.txt" in line


def slurm_environment(tmp_path, restarts=0):
    return {
        "SLURM_JOB_ID": str(os.getpid()),  # JAX takes its port from it
        "SLURM_SUBMIT_DIR": str(tmp_path),
        "SLURM_GPUS_ON_NODE": "4",
        "SLURM_CPUS_PER_TASK": "3",
        "SLURM_RESTART_COUNT": str(restarts),
        "path": [tmp_path],
    }


@pytest.mark.parametrize(
    "code, restarts, queued, last",
    [(0, 0, False, 0), (2, 0, False, 2), (143, 0, True, 0), (1, 19, True, 0), (1, 20, False, 1)],
)
def test_a_slurm_job_is_queued_again_until_it_is_done(tmp_path, code, restarts, queued, last):
    stand_in(tmp_path, "srun", f'echo "$@" $JAX_LOCAL_DEVICE_IDS; exit {code}')
    stand_in(tmp_path, "scontrol", 'echo scontrol "$@"')
    program = stand_in(tmp_path, ".venv/bin/npr-jax", "")
    result = run(
        "/bin/bash",
        LAUNCH / "slurm.sbatch",
        "papo",
        "tiny_papo",
        **slurm_environment(tmp_path, restarts),
    )
    first = f"--kill-on-bad-exit=1 --cpus-per-task=3 {program} papo tiny_papo --distributed 0,1,2,3"
    assert result.stdout.splitlines() == [first] + [f"scontrol requeue {os.getpid()}"] * queued
    assert result.returncode == last


def test_jax_connects_the_processes_of_a_slurm_step(tmp_path):
    """srun stands in for Slurm's and sets what that sets; the rest is JAX's own detection."""
    stand_in(
        tmp_path,
        "srun",
        "shift 2; export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2 SLURM_LOCALID=0\n"
        'SLURM_PROCID=1 "$@" & SLURM_PROCID=0 "$@" && wait $!',
    )
    program = stand_in(tmp_path, ".venv/bin/npr-jax", "")
    program.write_text(
        f"#!{sys.executable}\n"
        "import jax, sys\n"
        "jax.config.update('jax_platforms', 'cpu')\n"
        "jax.distributed.initialize(initialization_timeout=300)\n"
        "number, count = jax.process_index(), jax.process_count()\n"
        f"open(f'{tmp_path}/{{number}}', 'w').write(f'{{count}} {{sys.argv[1:]}}')\n"
    )
    result = run("/bin/bash", LAUNCH / "slurm.sbatch", "papo", "a b", **slurm_environment(tmp_path))
    assert result.returncode == 0, result.stderr
    for number in "01":
        assert (tmp_path / number).read_text() == "2 ['papo', 'a b', '--distributed']"


def test_the_headers_of_the_slurm_script_come_before_its_commands():
    lines = LAUNCH.joinpath("slurm.sbatch").read_text().splitlines()
    headers = [i for i, line in enumerate(lines) if line.startswith("#SBATCH")]
    command = next(i for i, line in enumerate(lines) if line and not line.startswith("#"))
    assert lines[0].startswith("#!") and max(headers) < command
    options = dict(lines[i].split("--")[1].partition("=")[::2] for i in headers)
    assert options["ntasks-per-node"] == "1" and "requeue" in options
    assert options["signal"] == "TERM@300"  # to the processes, not to this shell


def test_a_pod_gets_the_same_command_on_every_host(tmp_path):
    """What would run on a host is run here, with a run that stands in."""
    stand_in(tmp_path, "gcloud", f'printf "%s\\n" "$@" > {tmp_path}/sent')
    where = {"TPU": "pod", "ZONE": "z", "path": [tmp_path]}
    arguments = ["beta", "qwen3_4b_beta", "--set", "fit.checkpoints=gs://bucket/a b"]
    result = run(LAUNCH / "tpu_pod.sh", "start", *arguments, RETRIES="7", **where)
    assert result.returncode == 0, result.stderr
    sent, _, command = (tmp_path / "sent").read_text().partition("--command=")
    assert " ".join(sent.split()) == "compute tpus tpu-vm ssh pod --zone=z --worker=all"
    program = 'printf "%s\\n" $RETRIES "$@"; echo $$ > pid; touch done; exec sleep 60'
    host = stand_in(tmp_path / "npr_jax", "scripts/launch/tpu_vm.sh", program).parents[2]
    shell = ["/bin/bash", "-c", command]
    assert subprocess.run(shell, cwd=tmp_path, timeout=120).returncode == 0
    wait_for(host / "done")
    log = (tmp_path / "npr-jax.log").read_text().splitlines()
    assert log == ["7", *arguments, "--distributed"]
    second = subprocess.run(shell, cwd=tmp_path, timeout=120, capture_output=True, text=True)
    assert second.returncode == 1 and "runs already" in second.stderr

    assert run(LAUNCH / "tpu_pod.sh", "stop", **where).returncode == 0
    stop = (tmp_path / "sent").read_text().split("--command=")[1]
    pid = int((host / "pid").read_text())
    assert subprocess.run(["/bin/bash", "-c", stop], cwd=tmp_path).returncode == 0
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists() and time.monotonic() < end:
        time.sleep(0.02)
    assert not Path(f"/proc/{pid}").exists()


def test_a_pod_is_made_with_what_was_asked_for(tmp_path):
    stand_in(tmp_path, "gcloud", 'echo "$@"')
    where = {"TPU": "pod", "ZONE": "z", "path": [tmp_path]}
    made = run(LAUNCH / "tpu_pod.sh", "create", ACCELERATOR="v6e-8", RUNTIME="r", SPOT="1", **where)
    asked = "--zone=z --accelerator-type=v6e-8 --version=r --spot"
    assert made.stdout.strip() == f"compute tpus tpu-vm create pod {asked}"


@pytest.mark.parametrize("path", JOBSETS, ids=lambda path: path.name)
def test_jobsets_restart_all_pods_together_and_agree_with_themselves(path):
    jobset = yaml.safe_load(path.read_text())
    assert (jobset["apiVersion"], jobset["kind"]) == ("jobset.x-k8s.io/v1alpha2", "JobSet")
    name = jobset["metadata"]["name"]
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] > 0
    (fail,) = jobset["spec"]["failurePolicy"]["rules"]
    assert fail == {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}

    (workers,) = jobset["spec"]["replicatedJobs"]
    assert workers["replicas"] == 1
    job = workers["template"]["spec"]
    assert job["parallelism"] == job["completions"]
    assert job["completionMode"] == "Indexed" and job["backoffLimit"] == 0

    pod = job["template"]["spec"]
    assert pod["restartPolicy"] == "Never"  # a pod failure policy needs it
    (container,) = pod["containers"]
    (rule,) = job["podFailurePolicy"]["rules"]
    assert rule["action"] == "FailJob"
    assert rule["onExitCodes"] == {
        "containerName": container["name"],
        "operator": "In",
        "values": [2],
    }
    mounted = {mount["name"] for mount in container["volumeMounts"]}
    assert mounted == {volume["name"] for volume in pod["volumes"]}
    assert "--distributed" in container["args"]

    env = {entry["name"]: entry for entry in container["env"]}
    limits = container["resources"]["limits"]
    if "google.com/tpu" in limits:  # JAX's own detection; GKE sets its variables
        x, y, z = map(int, pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x"))
        assert x * y * z == limits["google.com/tpu"] * job["parallelism"]
        assert not any(key.startswith("NPR_") for key in env)
    else:
        host, port = env["NPR_COORDINATOR"]["value"].split(":")
        assert host == f"{name}-{workers['name']}-0-0.{name}" and int(port) > 1023
        assert env["NPR_PROCESSES"]["value"] == str(job["parallelism"])
        index = env["NPR_PROCESS"]["valueFrom"]["fieldRef"]["fieldPath"]
        assert index == "metadata.annotations['batch.kubernetes.io/job-completion-index']"


def test_files_named_in_the_document_are_there():
    text = DOC.read_text()
    linked = re.findall(r"\]\((?!https?://|#)([^)#]+)", text)
    assert linked and all((DOC.parent / link).exists() for link in linked), linked
    for path in re.findall(r"\bscripts/launch/[\w.]+\w", text):
        assert (ROOT / path).exists(), path
    for script in LAUNCH.iterdir():
        assert script.name in text, f"docs/launch.md does not name {script.name}"


def test_tests_named_in_the_document_are_there():
    for path in re.findall(r"\btests/\w+\.py", DOC.read_text()):
        assert (ROOT / path).exists(), path


def commands():
    """(where, words after the program) of every npr-jax command in the document and the scripts."""
    launched = (
        r"\b(?:npr-jax|tpu_vm\.sh|gpu_node\.sh|tpu_pod\.sh start|slurm\.sbatch) +([a-z]+\b.*)"
    )
    for path in [DOC, *SHELL]:
        text = path.read_text().replace("\\\n#", "").replace("\\\n", " ")
        if path == DOC:
            blocks = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
            lines = "\n".join(blocks).splitlines() + re.findall(r"`(npr-jax [^`]+)`", text)
        else:
            lines = [line for line in text.splitlines() if line.startswith("#")]
        for line in lines:
            if match := re.search(launched, line.split(" 2>&1")[0]):
                yield path.name, shlex.split(match[1])
    for path in JOBSETS:
        (workers,) = yaml.safe_load(path.read_text())["spec"]["replicatedJobs"]
        (container,) = workers["template"]["spec"]["template"]["spec"]["containers"]
        yield path.name, container["args"]
    for path in SHELL:  # what the scripts add by themselves
        added = re.findall(r"set -- \"\$@\" (--[a-z-]+)", path.read_text())
        yield from ((path.name, [stage, *added]) for stage in STAGES if added)


def test_commands_are_found():
    found = list(commands())
    assert {name for name, _ in found} >= {"launch.md", "tpu_pod.sh", "slurm.sbatch", "jobset.yaml"}
    assert any(words[0] == "plan" for _, words in found) and len(found) > 15
    for name, words in found:
        if words[0] in STAGES and len(words) > 1 and not words[1].startswith("-"):
            assert words[1] == "CONFIG" or config_path(words[1]).is_file(), name


def test_verbs_and_options_of_every_command_exist():
    verbs = typer.main.get_command(app).commands
    for name, words in commands():
        assert words[0] in verbs, f"{name}: npr-jax has no {words[0]}"
        known = {option for parameter in verbs[words[0]].params for option in parameter.opts}
        used = {word.split("=")[0] for word in words if word.startswith("--")}
        assert used <= known, f"{name}: npr-jax {words[0]} has no {sorted(used - known)}"


def test_settings_of_every_command_are_accepted():
    (elsewhere,) = re.findall(r"`--set (fit\.\S+)`", DOC.read_text())
    settings = {("beta", "qwen3_4b_beta"): {elsewhere}}
    for _, words in commands():
        if words[0] in STAGES and len(words) > 1 and words[1].startswith("qwen3"):
            text = " ".join(words).replace("--set=", "--set ")
            settings.setdefault(tuple(words[:2]), set()).update(re.findall(r"--set (\S+)", text))
    for (stage, preset), given in settings.items():
        module = importlib.import_module(f"npr_jax.train.{stage}")
        for setting in given:
            load_config(getattr(module, f"{stage.capitalize()}Config"), preset, [setting])


def test_every_tpu_mesh_of_the_document_is_one_that_the_plan_says_fits(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    import plan

    cases = json.loads(plan.RESULTS.read_text(encoding="utf-8"))["cases"]
    known = {(case["model"], case["topology"]): case for case in cases}
    text = DOC.read_text(encoding="utf-8")
    assert plan.meshes(known) in text, "run bench/plan.py"
    named = re.findall(r"\bv\d\w:\d+(?:x\d+)+", text)
    assert len(named) > 2
    assert all(known["qwen3-4b", topology]["fits"] for topology in named), named


@pytest.mark.parametrize(
    "section, topology", [("One TPU VM", "v6e:2x4"), ("A TPU pod slice", "v5p:4x4x4")]
)
def test_tpu_commands_of_the_document_have_the_mesh_that_was_planned(section, topology):
    text = DOC.read_text(encoding="utf-8").split(f"## {section}\n")[1].split("\n## ")[0]
    settings = re.findall(r"--set (mesh\.\S+)", text)
    config = load_config(PapoConfig, "qwen3_4b_papo", settings)
    cases = json.loads((ROOT / "bench/results/plan.json").read_text(encoding="utf-8"))["cases"]
    (case,) = [c for c in cases if (c["model"], c["topology"]) == ("qwen3-4b", topology)]
    sizes = config.mesh.sizes(math.prod(case["mesh"].values()))
    assert {axis: size for axis, size in sizes.items() if size > 1} == case["mesh"]
    assert case["fits"]
