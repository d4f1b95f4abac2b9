"""The Dockerfile and the files for clusters: linting, consistency, and the Slurm script with stand-ins for Slurm."""

from __future__ import annotations

import json
import os
import re
import runpy
import signal
import socket
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from kd_d2 import load_config
from kd_d2.checkpoint import read_checkpoint
from kd_d2.config_files import shipped_configs

import pytest
import torch
import yaml
from helpers import ROOT, make_project
from packaging.requirements import Requirement

CLUSTER = ROOT / "cluster"


def _run(*command: object, **options: object) -> subprocess.CompletedProcess:
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, **options)


def _installed(program: str) -> Path:
    return Path(sys.executable).with_name(program)


def test_dockerfile_is_linted() -> None:
    done = _run(_installed("hadolint"), ROOT / "Dockerfile")
    assert done.returncode == 0, done.stdout + done.stderr


def test_slurm_script_is_linted() -> None:
    done = _run(_installed("shellcheck"), CLUSTER / "slurm.sbatch")
    assert done.returncode == 0, done.stdout + done.stderr


def test_kubernetes_file_follows_its_schema(tmp_path: Path) -> None:
    """Check the file against Kubernetes' schemas, without unknown keys, and that a misspelled key is detected."""
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    schema_version = "1.33.0"
    text = (CLUSTER / "kubernetes.yaml").read_text()
    for document in yaml.safe_load_all(text):
        kubernetes_validate.validate(document, schema_version, strict=True)
    wrong = list(yaml.safe_load_all(text.replace("readOnlyRootFilesystem", "readonlyRootFilesystem")))
    with pytest.raises(kubernetes_validate.ValidationError, match="readonlyRootFilesystem"):
        kubernetes_validate.validate(wrong[1], schema_version, strict=True)


@pytest.mark.parametrize(
    ("config", "output"),
    [
        ("StructuralKD/retinanet_R50", "StructuralKD/retinanet_R50"),
        ("projects/StructuralKD/configs/retinanet_R50.yaml", "StructuralKD/retinanet_R50"),
        ("configs/tiny/retinanet-student.yaml", "configs/tiny/retinanet-student"),
        ("{folder}/my configs/a b.yaml", "my configs/a b"),
        ("../other/my.yaml", "up/other/my"),
        ("/data/my.yaml", "data/my"),
    ],
)
def test_slurm_script_separates_configs_of_one_name(tmp_path: Path, config: str, output: str) -> None:
    """Check OUTPUT_DIR, and that a training where the script wrote it before is not started anew."""
    (tmp_path / "bin").mkdir()
    for name, body in {"scontrol": "echo localhost", "srun": 'printf "%s\\n" "$@"'}.items():
        (tmp_path / "bin" / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (tmp_path / "bin" / name).chmod(0o755)
    job = {"SLURM_JOB_NODELIST": "one", "SLURM_NNODES": "1", "SLURM_JOB_ID": "1", "KD_D2_RUN": "env"}
    environment = {**os.environ, **job, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}"}
    script = ["bash", CLUSTER / "slurm.sbatch", config.format(folder=tmp_path)]
    done = _run(*script, cwd=tmp_path, env=environment)
    assert done.stdout.splitlines()[-2:] == ["OUTPUT_DIR", f"output/{output}"]
    before = tmp_path / "output" / Path(output).name
    before.mkdir(parents=True)
    log = before / "log.txt"
    log.write_text(f"Command line: python train other.yaml --resume OUTPUT_DIR output/{before.name}\n")
    assert _run(*script, cwd=tmp_path, env=environment).returncode == 0
    log.write_text(f"Command line: python train {script[2]} --resume OUTPUT_DIR output/{before.name}\n")
    done = _run(*script, cwd=tmp_path, env=environment)
    assert (done.returncode == 2 and f"no longer in output/{before.name}: move" in done.stderr) == (
        Path(output).name != output
    )
    assert _run(*script, "OUTPUT_DIR", "output/mine", cwd=tmp_path, env=environment).returncode == 0


def test_slurm_script_without_slurm() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("SLURM_")}
    done = _run("bash", CLUSTER / "slurm.sbatch", "my.yaml", env=environment)
    assert done.returncode != 0
    assert done.stderr.endswith("SLURM_JOB_ID: is not set: submit this file with sbatch\n")


def test_compose_file_follows_its_schema() -> None:
    done = _run(_installed("check-jsonschema"), "--builtin-schema", "vendor.compose-spec", CLUSTER / "compose.yaml")
    assert done.returncode == 0, done.stdout + done.stderr


def test_containers_have_time_to_write_a_checkpoint() -> None:
    """Check that Compose gives a training as long as Kubernetes."""
    service = yaml.safe_load((CLUSTER / "compose.yaml").read_text())["services"]["train"]
    _, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    assert job["spec"]["template"]["spec"]["terminationGracePeriodSeconds"] == 180
    assert service["stop_grace_period"] == "3m"


def test_pods_may_do_no_more_than_they_must() -> None:
    """Check the restricted profile of Kubernetes' pod security standards, and that all resources are limited."""
    _, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    assert pod["automountServiceAccountToken"] is False
    assert pod["securityContext"]["runAsNonRoot"] is True
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {
        "allowPrivilegeEscalation": False, "readOnlyRootFilesystem": True, "capabilities": {"drop": ["ALL"]}
    }  # fmt: skip
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert limits.items() >= requests.items() and limits.keys() >= {"cpu", "memory", "ephemeral-storage"}
    assert pod["terminationGracePeriodSeconds"] >= 120 and "livenessProbe" in container


def test_liveness_probe_reads_the_log_of_its_own_training(tmp_path: Path) -> None:
    """Run the probe with logs of its training and of another one in the same volume, of which one is old."""
    _, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    variables = {variable["name"]: variable["value"] for variable in container["env"]}
    given = container["args"][container["args"].index("OUTPUT_DIR") + 1]
    output = variables.get(given.removeprefix("$(").removesuffix(")"), given)
    probe = [part.replace("/work", str(tmp_path)) for part in container["livenessProbe"]["exec"]["command"]]
    logs = [tmp_path / folder / "log.txt" for folder in (output, "output/another")]
    for log in logs:
        log.parent.mkdir(parents=True)
        log.touch()
    for old, status in ((logs[1], 0), (logs[0], 1)):
        os.utime(old, (0, 0))
        assert _run(*probe, cwd="/", env={**os.environ, **variables}).returncode == status
        old.touch()


def test_image_has_no_cache_folders_that_only_user_1000_can_write_to() -> None:
    """Check that the last step of the build removes the folders of all caches."""
    *_, last = re.findall(r"^RUN (.+\n(?:    .+\n)*)", (ROOT / "Dockerfile").read_text(), re.MULTILINE)
    variables = dict(re.findall(r"^    (\w+)=(/\S+)", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    removed = tuple(variables[name] for name in re.findall(r'"\$(\w+)"', last[last.index("rm -rf") :]))
    assert {"XDG_CACHE_HOME", "MPLCONFIGDIR"} <= set(variables)
    assert [path for path in variables.values() if not path.startswith(removed)] == []


def test_every_user_can_read_an_image_of_a_private_checkout(tmp_path: Path) -> None:
    """Check the modes of a checkout under umask 077 in the image, and that its check runs as a user without files."""
    build, image = (ROOT / "Dockerfile").read_text().split("\nFROM ")[1:]
    package, script = tmp_path / "kd_d2", tmp_path / "train_net.py"
    for path, mode in ((script, 0o700), (tmp_path / "README.md", 0o600), (package, 0o700)):
        path.mkdir(mode) if path == package else path.touch(mode)
    (command,) = re.findall(r"^COPY \. \.\n(?:#.*\n)*RUN (chmod .+?) \\\n", build, re.MULTILINE)
    assert _run(*command.split(), cwd=tmp_path).returncode == 0
    modes = [stat.S_IMODE(path.stat().st_mode) for path in (script, tmp_path / "README.md", package)]
    assert modes == [0o755, 0o644, 0o755]
    steps = re.findall(r"^(?:USER (\d+)|RUN python cluster/check_install\.py)", image, re.MULTILINE)
    checked_as, *after = steps
    assert checked_as not in ("0", "1000") and after == ["", "1000"]


def test_first_process_of_a_container_passes_signals_on() -> None:
    """Check that tini is installed, and starts the program in Docker and in Kubernetes."""
    image = (ROOT / "Dockerfile").read_text()
    _, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    (container,) = job["spec"]["template"]["spec"]["containers"]
    assert re.search(r"apt-get install .* tini \\\n", image.rpartition("\nFROM ")[2])
    assert json.loads(re.search(r"^ENTRYPOINT (.+)", image, re.MULTILINE)[1]) == ["tini", "--", "kd-d2"]
    assert container["command"][:2] == ["tini", "--"]


def test_image_has_all_extras() -> None:
    """Check that it has the packages of each extra, except those that only tests and documentation need."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    required = [Requirement(text) for name in extras.keys() - {"docs", "test", "dev"} for text in extras[name]]
    locked = dict(
        re.findall(r"^([\w.-]+)==(\S+)", (ROOT / "requirements" / "lock-image.txt").read_text(), re.MULTILINE)
    )
    assert len(required) > 8
    assert [str(other) for other in required if not other.specifier.contains(locked.get(other.name, "0"))] == []
    assert [text for text in extras["test"] if Requirement(text).name in locked] == []


def test_apptainer_can_write_the_caches_of_the_image() -> None:
    """Check that the command in slurm.sbatch binds the image's folder of results, in which its caches are."""
    (command,) = re.findall('"(apptainer exec [^"]+)"', (CLUSTER / "slurm.sbatch").read_text())
    (folder,) = re.findall(r"--bind \$PWD/output:(\S+) ", command)
    assert f"XDG_CACHE_HOME={folder}/.cache" in (ROOT / "Dockerfile").read_text()


def test_locks_have_the_pinned_versions_and_hashes() -> None:
    """Check that each version in requirements/ has hashes, and that no file has a URL."""
    requirements = ROOT / "requirements"

    def versions(*names: str) -> set[str]:
        text = "\n".join((requirements / name).read_text() for name in names)
        return {
            re.sub(r"[._](?=.*==)", "-", found.lower())
            for found in re.findall(r"^[\w.-]+==[^\s;]+", text, re.MULTILINE)
        }

    assert versions("lock.txt") == versions("pins.txt", "torch.txt")
    assert versions("lock-source.txt") == versions("pins.txt", "torch-source.txt")
    assert versions("lock-image.txt") < versions("lock-source.txt")
    for lock in requirements.glob("lock*.txt"):
        entries = re.split(r"\n(?=[A-Za-z])", lock.read_text())
        assert all("--hash=sha256:" in entry for entry in entries if not entry.startswith("#")), lock
    for path in requirements.iterdir():
        assert "://" not in path.read_text(), path


def test_every_package_has_a_license() -> None:
    """Check that `make licenses` was run for the versions in requirements/."""
    table = (ROOT / "docs" / "licenses.md").read_text()
    listed = {(name, version) for name, version in re.findall(r"^\| ([\w.-]+) +\| ([\w.+-]+) ", table, re.MULTILINE)}
    locked = set(re.findall(r"^([\w.-]+)==([^\s;]+)", (ROOT / "requirements" / "lock.txt").read_text(), re.MULTILINE))

    def comparable(packages: set[tuple[str, str]]) -> set[tuple[str, str]]:
        return {(re.sub(r"[._]", "-", name.lower()), version.split("+")[0]) for name, version in packages}

    assert {p for p in comparable(locked) if p[0] not in ("pip", "setuptools")} <= comparable(listed)


def test_dockerfile_builds_the_detectron2_that_setup_builds() -> None:
    commit = r"detectron2@([0-9a-f]{40})"
    files = [(ROOT / name).read_text() for name in ("Dockerfile", "tools/setup_env.sh")]
    assert len({found for text in files for found in re.findall(commit, text)}) == 1
    cuda = re.search(r"ARG CUDA=(\d+\.\d+)", files[0])[1]
    assert f"cuda-toolkit=={cuda}." in (ROOT / "requirements" / "torch-source.txt").read_text()
    assert f"is built for CUDA {cuda}," in (ROOT / "docs" / "install.md").read_text()
    copied = re.findall(r"requirements/[\w-]+\.txt", files[0])
    assert all((ROOT / path).is_file() for path in copied)


def test_files_name_what_there_is() -> None:
    """Check that configs and volumes exist, and that .dockerignore does not exclude what the build copies."""
    compose = yaml.safe_load((CLUSTER / "compose.yaml").read_text())["services"]["train"]
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    dockerfile = (ROOT / "Dockerfile").read_text()
    volumes = json.loads(re.search(r"VOLUME (\[.*\])", dockerfile)[1])
    assert [volume.split(":")[1] for volume in compose["volumes"]] == volumes
    pod = job["spec"]["template"]["spec"]
    container = pod["containers"][0]
    assert {mount["mountPath"] for mount in container["volumeMounts"]} == {*volumes, "/dev/shm", "/tmp"}
    assert {mount["name"] for mount in container["volumeMounts"]} == {volume["name"] for volume in pod["volumes"]}
    start = container["args"].index("-m")
    assert container["args"][start : start + 3] == ["-m", "kd_d2", "train"]
    assert container["args"][start + 3] in shipped_configs()
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"] == pod["subdomain"]
    endpoint = next(arg for arg in container["args"] if "endpoint" in arg)
    assert endpoint.endswith(f"={job['metadata']['name']}-0.{service['metadata']['name']}:29500")
    for text in (dockerfile, (CLUSTER / "compose.yaml").read_text(), (CLUSTER / "README.md").read_text()):
        for name in re.findall(r"StructuralKD/[\w-]+", text):
            assert name in shipped_configs()
    ignored = (ROOT / ".dockerignore").read_text().split()
    assert not {"kd_d2", "configs", "projects", "cluster", "tools", "train_net.py", "requirements", "setup.py"} & set(
        ignored
    )


def test_an_installation_that_works() -> None:
    done = _run(sys.executable, CLUSTER / "check_install.py", cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("kd_d2 works: python ")


def test_an_installation_without_optional_packages(monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    runpy.run_path(str(CLUSTER / "check_install.py"))["main"](False)
    assert capsys.readouterr().out.startswith("kd_d2 works: python ")


STANDINS = {
    "scontrol": 'if [ "$1" = show ]; then echo localhost; else echo "$@" >>"$STANDIN_LOG"; fi',
    # Each "node" is a group of processes.
    "srun": 'shift; for node in $(seq "$SLURM_NNODES"); do "$@" & pids="$pids $!"; done; echo "$pids" >"$STANDIN_LOG.pids"; '
    'for p in $pids; do wait "$p" || exit 1; done',
    "scancel": 'kill -TERM $(cat "$STANDIN_LOG.pids")',
}


@pytest.mark.slow
def test_slurm_script_on_two_nodes(tmp_path: Path) -> None:
    """Check the script: two nodes of one process each train together, a second submission resumes, SIGUSR1 requeues."""
    project = make_project(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS=(), SEED=1)
    for name, body in STANDINS.items():
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    environment = {
        **os.environ,
        "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SLURM_JOB_NODELIST": "both",
        "SLURM_NNODES": "2",
        "SLURM_JOB_ID": str(os.getpid()),
        "KD_D2_PROCESSES": "1",
        "KD_D2_RUN": "env",
        "STANDIN_LOG": str(tmp_path / "scontrol.log"),
    }
    environment["PATH"] = f"{Path(sys.executable).parent}:{environment['PATH']}"
    for iterations in (2, 4):
        script = ["bash", CLUSTER / "slurm.sbatch", project.student, "SOLVER.MAX_ITER", iterations]
        done = _run(*script, cwd=tmp_path, env=environment, timeout=300)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        output = tmp_path / "output" / "student"
        assert read_checkpoint(str(output / "model_final.pth"))["iteration"] == iterations - 1
    log = output / "log.txt"
    assert "Resuming from" in log.read_text()
    assert (output / "log.txt.rank1").is_file()
    script[3:] = ["SOLVER.MAX_ITER", "100000"]
    job = subprocess.Popen(list(map(str, script)), cwd=tmp_path, env=environment, stderr=subprocess.DEVNULL)
    while '"iteration": 19' not in (output / "metrics.json").read_text():
        assert job.poll() is None
        time.sleep(0.2)
    job.send_signal(signal.SIGUSR1)
    assert job.wait(timeout=60) == 0
    stopped = int(re.search(r"SIGTERM: training stopped after iteration (\d+)", log.read_text())[1])
    assert read_checkpoint(str(output / "model_latest.pth"))["iteration"] == stopped
    assert (tmp_path / "scontrol.log").read_text() == f"requeue {os.getpid()}\n"


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_two_machines_by_hand(tmp_path: Path) -> None:
    """Check Detectron2's launcher as on two machines with one process each, on CPUs, which run one training."""
    project = make_project(tmp_path, SOLVER__MAX_ITER=2, SOLVER__STEPS=(), SEED=1)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    command = [
        sys.executable,
        ROOT / "train_net.py",
        "--config-file",
        project.student,
        "--num-machines",
        "2",
        "--dist-url",
        url,
    ]
    machines = [
        subprocess.Popen(
            [*map(str, command), "--machine-rank", str(rank), "MODEL.DEVICE", "cpu"], stderr=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    for machine in machines:
        errors = machine.communicate(timeout=300)[1]
        assert machine.returncode == 0, errors[-3000:]
    output = Path(load_config(str(project.student)).OUTPUT_DIR)
    assert read_checkpoint(str(output / "model_final.pth"))["iteration"] == 1
    assert (output / "log.txt.rank1").is_file()
