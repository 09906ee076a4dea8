"""What installs and runs the project elsewhere: pyproject.toml, uv.lock, run.sh, Dockerfile, workflow, cluster scripts.

    python tests/test_environments.py --lock    # makes uv.lock anew

uv, check-jsonschema and hadolint are packages of requirements.txt; where one is not installed its tests are skipped.
"""
import functools
import json
import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
WORKFLOW = ROOT / ".github" / "workflows" / "test.yml"
PAGE = ROOT / "docs" / "environments.md"
FROM_PYPI = ("cu13", "trackers", "dev")  # the extras that can be locked where torch's index cannot be reached


def project() -> dict:
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def normal(requirement: str) -> str:
    return requirement.replace("'", '"').replace(" ", "")


def pins() -> set[str]:
    """What requirements.txt asks for."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    return {normal(line) for line in lines if line and not line.startswith("#")}


def tool(name: str) -> str:
    """Path of a program beside this Python or on PATH; skips the test without one."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    return found or pytest.skip(f"{name} is not installed: pip install -r requirements.txt")


def execute(*command, **options) -> subprocess.CompletedProcess:
    options = {"capture_output": True, "text": True, "timeout": 300} | options
    return subprocess.run([str(word) for word in command], **options)


# --- pyproject.toml and uv.lock


def lockable() -> str:
    """pyproject.toml without the extras whose torch comes from its own index."""
    found = project()["project"]
    lines = ["[project]", *(f"{key} = {json.dumps(found[key])}" for key in ("name", "version", "requires-python"))]
    lines += [f"dependencies = {json.dumps(found['dependencies'])}", "[project.optional-dependencies]"]
    lines += [f"{name} = {json.dumps(found['optional-dependencies'][name])}" for name in FROM_PYPI]
    return "\n".join([*lines, "[tool.uv]", "package = false", ""])


def lock(uv: str, folder: Path, text: str, *flags: str) -> subprocess.CompletedProcess:
    """`uv lock` with uv.lock in a folder of its own, for a pyproject.toml of that text."""
    (folder / "pyproject.toml").write_text(text, encoding="utf-8")
    shutil.copy(ROOT / "uv.lock", folder)
    return execute(uv, "lock", *flags, cwd=folder, env=os.environ | {"UV_CACHE_DIR": str(folder / "cache")})


@functools.cache
def locked() -> list[dict]:
    return tomllib.loads((ROOT / "uv.lock").read_text(encoding="utf-8"))["package"]


def test_pyproject_and_requirements_pin_the_same():
    found = project()["project"]
    extras = found["optional-dependencies"]
    assert list(extras) == ["cpu", "cu13", "rocm", "trackers", "dev"]
    asked = {normal(line) for line in [*found["dependencies"], *extras["cu13"], *extras["trackers"], *extras["dev"]]}
    assert asked == pins() and all("==" in line for line in asked)
    assert {normal(line) for line in [*extras["cpu"], *extras["rocm"]]} <= pins()


def test_extras_with_a_torch_each_exclude_one_another_and_name_its_index():
    uv, extras = project()["tool"]["uv"], project()["project"]["optional-dependencies"]
    assert uv["package"] is False
    assert [extra["extra"] for extra in uv["conflicts"][0]] == ["cpu", "cu13", "rocm"]
    sources = {source["extra"]: source["index"] for source in uv["sources"]["torch"]}
    urls = {index["name"]: index["url"] for index in uv["index"] if index["explicit"]}
    assert sources.keys() == {"cpu", "rocm"} and "triton" not in str(extras["rocm"])
    assert urls[sources["cpu"]].endswith("/whl/cpu") and "/whl/rocm" in urls[sources["rocm"]]
    assert urls[sources["cpu"]] in (ROOT / "run.sh").read_text(encoding="utf-8")


def test_the_lock_has_the_pinned_versions_with_hashes():
    versions = {(package["name"].replace("-", "_"), package["version"]) for package in locked()}
    for pin in pins():
        name, _, version = pin.partition(";")[0].partition("==")
        assert (name.replace("-", "_"), version) in versions, pin
    files = [wheel for package in locked() for wheel in package.get("wheels", [])]
    assert len(files) > 500 and all(wheel["hash"].startswith("sha256:") for wheel in files)


def test_the_lock_is_that_of_pyproject(tmp_path):
    """uv compares both without a network: of all extras, or of those that PyPI has."""
    whole = lock(tool("uv"), tmp_path, (ROOT / "pyproject.toml").read_text(encoding="utf-8"), "--check", "--offline")
    part = lock(tool("uv"), tmp_path, lockable(), "--check", "--offline")
    assert 0 in (whole.returncode, part.returncode), part.stderr


def test_a_lock_of_other_versions_is_found(tmp_path):
    changed = lockable().replace("numpy==", "numpy==1.")
    assert changed != lockable() and lock(tool("uv"), tmp_path, changed, "--check", "--offline").returncode != 0


# --- run.sh

STUB = """#!/bin/sh
echo "{name} $*" >>"$CALLS"
case "$*" in
    "venv "*) mkdir -p .venv/bin && ln -s "$REAL" .venv/bin/python ;;
    "-m venv "*) mkdir -p .venv/bin && cp "$0" .venv/bin/python && touch .venv/bin/pip && chmod +x .venv/bin/pip ;;
    *urllib*) exit 1 ;;
    *install*) exit "${{BROKEN:-0}}" ;;
esac
"""


def stub(folder: Path, name: str) -> Path:
    """A program that notes how it was called, and makes .venv as uv and venv do."""
    path = folder / name
    path.write_text(STUB.format(name=name), encoding="utf-8")
    path.chmod(0o755)
    return path


def setup(tmp_path: Path, installer: str, **environment) -> tuple[subprocess.CompletedProcess, list[str]]:
    """`./run.sh --setup-only` in a folder of its own with stubs for uv or for Python; their calls."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    for word in ("bash", "cmp", "cp", "dirname", "ln", "mkdir", "touch", "uname", "chmod", "sh", "cat"):
        if not (tools / word).exists():
            (tools / word).symlink_to(shutil.which(word))
    stub(tools, "uv" if installer == "uv" else "python3")
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, tmp_path)
    calls = tmp_path / "calls"
    known = {"PATH": str(tools), "CALLS": str(calls), "REAL": shutil.which("false"), **environment}
    done = execute(shutil.which("bash"), "run.sh", "--setup-only", cwd=tmp_path, env=known)
    return done, calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []


def test_run_sh_takes_uv_where_it_is_installed(tmp_path):
    done, calls = setup(tmp_path, "uv")
    assert done.returncode == 0, done.stderr
    assert calls == ["uv venv --quiet --clear --python >=3.11 .venv",
                     "uv pip install --quiet --python .venv/bin/python --requirement requirements.txt"]
    assert "into .venv with uv" in done.stdout
    assert (tmp_path / ".venv" / "installed.txt").read_bytes() == (ROOT / "requirements.txt").read_bytes()


@pytest.mark.skipif(sys.platform != "linux", reason="PyPI's torch for other systems has no CUDA")
def test_run_sh_takes_torch_without_cuda_where_its_index_answers(tmp_path):
    calls = setup(tmp_path, "uv", REAL=shutil.which("true"))[1]
    assert " --index https://download.pytorch.org/whl/cpu --index-strategy unsafe-best-match " in calls[1]
    shutil.rmtree(tmp_path / ".venv")
    stub(tmp_path / "tools", "nvidia-smi")
    assert "--index" not in setup(tmp_path, "uv", REAL=shutil.which("true"))[1][3]


def test_run_sh_takes_the_python_that_is_named(tmp_path):
    assert setup(tmp_path, "uv", PYTHON="python3.12")[1][0] == "uv venv --quiet --clear --python python3.12 .venv"


def test_run_sh_takes_pip_without_uv(tmp_path):
    done, calls = setup(tmp_path, "pip")
    assert done.returncode == 0, done.stderr
    assert "python3 -m venv --clear .venv" in calls
    assert calls[-1] == "python3 -m pip install --quiet --disable-pip-version-check --requirement requirements.txt"


@pytest.mark.parametrize("installer", ["uv", "pip"])
def test_run_sh_installs_once_and_says_what_failed(tmp_path, installer):
    done, calls = setup(tmp_path, installer, BROKEN="3")
    assert done.returncode == 1 and f"error: {installer} could not install requirements.txt" in done.stderr
    again, more = setup(tmp_path, installer)
    assert again.returncode == 0 and len(more) > len(calls) and "venv --quiet" not in "".join(more[len(calls):])
    assert setup(tmp_path, installer)[0].stdout == ""


def test_scripts_are_bash():
    for name in ("run.sh", "test.sh"):
        assert execute("bash", "-n", ROOT / name).returncode == 0
        assert os.access(ROOT / name, os.X_OK)


def test_no_link_of_somebodys_machine_is_tracked(tmp_path):
    """A worktree's links to the virtual environment and to data: a clone would have them, broken, in the way."""
    listed = execute("git", "ls-files", "--stage", cwd=ROOT)
    if listed.returncode:
        pytest.skip("this is no git repository")
    assert not [line for line in listed.stdout.splitlines() if line.startswith("120000")]
    shutil.copy(ROOT / ".gitignore", tmp_path)
    execute("git", "init", "--quiet", cwd=tmp_path)
    (tmp_path / "data").mkdir()
    for name in (".venv", "data/stdlib"):
        (tmp_path / name).symlink_to("elsewhere")
    (tmp_path / "data" / "new.py").touch()
    execute("git", "add", "--all", cwd=tmp_path)
    assert execute("git", "ls-files", cwd=tmp_path).stdout.split() == [".gitignore", "data/new.py"]


# --- Dockerfile


def instructions() -> list[tuple[str, str]]:
    """(instruction, arguments) of the Dockerfile, continued lines joined."""
    text = re.sub(r"^#.*\n", "", (ROOT / "Dockerfile").read_text(encoding="utf-8"), flags=re.M)
    lines = re.sub(r"\\\n\s*", " ", text).splitlines()
    return [tuple(line.split(None, 1)) for line in lines if line.strip()]


def test_hadolint_finds_nothing_in_the_dockerfile():
    done = execute(tool("hadolint"), ROOT / "Dockerfile")
    assert done.returncode == 0, done.stdout


def test_the_image_is_pinned_runs_as_no_root_and_starts_torchrun():
    found = instructions()
    (base,) = [rest for word, rest in found if word == "FROM"]
    assert re.fullmatch(r"nvidia/cuda:\d+\.\d+\.\d+-runtime-ubuntu\d+\.\d+", base)
    (user,) = [rest for word, rest in found if word == "USER"]
    assert user.isdecimal() and int(user) > 0 and f"--uid {user}" in str(found)
    (entry,) = [json.loads(rest) for word, rest in found if word == "ENTRYPOINT"]
    (command,) = [json.loads(rest) for word, rest in found if word == "CMD"]
    assert entry == ["torchrun"] and command[-1] == "train_gpt.py"
    words = [word for word, _ in found]
    assert words.index("USER") < words.index("ENTRYPOINT")


def test_the_image_has_the_locked_packages_and_the_uv_that_is_pinned():
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert "uv sync --frozen --extra cu13" in text
    (version,) = re.findall(r"astral-sh/uv:(\S+)", text)
    assert f"uv=={version}" in pins()


# --- GitHub Actions


def workflow() -> dict:
    return pytest.importorskip("yaml").safe_load(WORKFLOW.read_text(encoding="utf-8"))


def test_the_workflow_follows_its_schema(tmp_path):
    check = (tool("check-jsonschema"), "--builtin-schema", "vendor.github-workflows")
    done = execute(*check, WORKFLOW)
    assert done.returncode == 0, done.stdout + done.stderr
    wrong = tmp_path / "wrong.yml"
    wrong.write_text(WORKFLOW.read_text(encoding="utf-8").replace("runs-on:", "runs_on:"), encoding="utf-8")
    assert execute(*check, wrong).returncode == 1


def test_the_workflow_runs_both_commands_on_three_systems():
    job = workflow()["jobs"]["test"]
    systems = {name.partition("-")[0] for name in job["strategy"]["matrix"]["os"]}
    assert systems == {"ubuntu", "macos", "windows"} and workflow()["defaults"]["run"]["shell"] == "bash"
    commands = [step["run"] for step in job["steps"] if "run" in step]
    assert "./run.sh --iterations 20" in commands and "./test.sh" in commands
    (version,) = re.findall(r"uv==(\S+)", " ".join(commands))
    assert f"uv=={version}" in pins()
    for command in commands:
        assert execute("bash", "-n", "-c", command).returncode == 0
        assert all((ROOT / path).exists() for path in re.findall(r"\S+\.(?:py|sh)", command)), command


# --- scripts of docs/environments.md


def block(language: str) -> str:
    (found,) = re.findall(rf"^```{language}\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.M | re.S)
    return found


def check_training(text: str):
    """Every flag after the script is one of train_gpt.py's."""
    import train_gpt

    known = {field for cls in (train_gpt.Hyperparameters, train_gpt.RunSettings) for field in cls.__annotations__}
    flags = re.findall(r"--([\w-]+)", text)
    assert flags and {flag.replace("-", "_") for flag in flags} <= known


def test_the_slurm_script_is_bash_and_starts_our_trainer():
    script = block("bash")
    assert script.startswith("#!/bin/bash\n#SBATCH ")
    assert execute("bash", "-n", "-c", script).returncode == 0
    check_training("".join(re.findall(r"^.*arguments\+?=\(.*$", script, re.M)))


SRUN = """#!/bin/bash
SLURM_NNODES=2 SLURM_NODEID=1 exec "$@"
"""
TORCHRUN = """#!/bin/bash
printf '%s\\n' "$@"
"""


def test_the_slurm_script_hands_its_arguments_on_and_resumes(tmp_path):
    programs = {"srun": SRUN, "scontrol": "#!/bin/bash\necho node7\necho node8\n", ".venv/bin/torchrun": TORCHRUN}
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    for name, text in programs.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
        (tmp_path / name).chmod(0o755)
    known = {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NAME": "my run"}
    first = execute("bash", "-c", block("bash"), cwd=tmp_path, env=known).stdout.splitlines()
    assert {"--node_rank=1", "--master_addr=node7", "my run"} <= {*first} and "--resume" not in first
    (tmp_path / "logs" / "my run" / "a" / "checkpoints" / "step_000500").mkdir(parents=True)
    assert execute("bash", "-c", block("bash"), cwd=tmp_path, env=known).stdout.splitlines()[-1] == "--resume"


def test_the_skypilot_task_is_yaml_whose_commands_are_bash():
    task = pytest.importorskip("yaml").safe_load(block("yaml"))
    assert task.keys() == {"name", "workdir", "num_nodes", "resources", "setup", "run"}
    for part in ("setup", "run"):
        assert execute("bash", "-n", "-c", task[part]).returncode == 0
    check_training(task["run"].partition("train_gpt.py")[2])


def main() -> int:
    """Makes uv.lock anew: of all extras, or of those that PyPI has."""
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        for text in ((ROOT / "pyproject.toml").read_text(encoding="utf-8"), lockable()):
            done = lock(tool("uv"), Path(folder), text)
            if done.returncode == 0:
                shutil.copy(Path(folder) / "uv.lock", ROOT)
                print(f"uv.lock written: {'only ' + ' and '.join(FROM_PYPI) if text == lockable() else 'all extras'}")
                return 0
            print(" ".join(done.stderr.split())[-300:], file=sys.stderr)
    return 1


if __name__ == "__main__":
    if sys.argv[1:] != ["--lock"]:
        sys.exit(__doc__)
    sys.exit(main())
