"""Systems that lack what Linux has (macOS, Windows, ROCm, musl): what is not there is taken away, or put there."""
import ctypes
import platform
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import pytest
import torch
from helpers import ROOT, environment, flags, losses, make_data, records, run_folder, tiny
from test_max_seconds import SMALL
from torch.overrides import TorchFunctionMode

import train_baseline
import train_gpt
import train_moe

# As on Windows: modules, functions and signals of POSIX, /proc, glibc. What torch and the standard library need of them
# is imported before.
TAKE_AWAY = textwrap.dedent("""
    import asyncio, ctypes, importlib.util, multiprocessing.pool, os, runpy, signal, subprocess, sys, tempfile, time
    import torch, torch._dynamo, torch._inductor.codecache, torch.distributed
    for name in ("fcntl", "resource", "termios", "pwd", "grp"):
        sys.modules[name] = None
    for name in ("sysconf", "sysconf_names", "fork", "killpg", "getpgid", "setsid", "getuid", "nice", "statvfs",
                 "sched_getaffinity", "uname", "getloadavg", "geteuid", "forkpty"):
        if hasattr(os, name):
            delattr(os, name)
    for name in ("SIGHUP", "SIGUSR1", "SIGUSR2", "SIGPIPE", "SIGQUIT", "SIGALRM", "SIGCHLD", "alarm", "setitimer",
                 "pthread_sigmask", "pause", "sigwait"):
        delattr(signal, name)
    for name in ("clock_gettime", "CLOCK_BOOTTIME", "CLOCK_MONOTONIC"):
        delattr(time, name)
    def no_library(name, *more, **options):
        raise TypeError("LoadLibrary() argument 1 must be str, not None")
    ctypes.CDLL = no_library
    def no_proc(event, values):
        if event == "open" and str(values[0]).startswith("/proc/"):
            raise FileNotFoundError(2, "No such file or directory", values[0])
    sys.addaudithook(no_proc)
    sys.argv = sys.argv[1:]
    sys.path[:0] = [os.path.dirname(os.path.abspath(sys.argv[0])), os.getcwd()]
    runpy.run_path(sys.argv[0], run_name="__main__")
""")


def elsewhere(*argv, **options) -> subprocess.CompletedProcess:
    """A script of this project where all that is taken away."""
    command = [sys.executable, "-c", TAKE_AWAY, *map(str, argv)]
    return subprocess.run(command, env=environment(), cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


def script_flags(script: str, tmp_path) -> list[str]:
    if script == "train_grokking.py":
        return flags(prime=7, layers=1, width=16, heads=2, iterations=4, log_dir=tmp_path / "logs", experiment_name="x",
                     device="cpu", compile=False, plot=False)
    if script == "train_baseline.py":
        make_data(tmp_path / "data")
        changes = SMALL | {"data": tmp_path / "data", "log_dir": tmp_path / "logs", "experiment_name": "x"}
        return train_gpt.dashed(flags(**changes))
    return tiny(tmp_path, **({"num_experts": 4} if script == "train_moe.py" else {}))


@pytest.mark.parametrize("script", ["train_gpt.py", "train_baseline.py", "train_grokking.py"])
def test_a_script_trains_and_resumes_without_posix(script, tmp_path):
    argv = script_flags(script, tmp_path)
    first = elsewhere(script, *argv)
    assert first.returncode == 0, first.stderr[-3000:]
    assert "Traceback" not in first.stderr
    assert "start no second --resume of it" in first.stdout  # there are no locks
    more = ["--iterations", "10"] + ["--allow-change", "iterations"] * (script != "train_grokking.py")
    again = elsewhere(script, *argv, "--resume", *more)
    assert again.returncode == 0 and "Traceback" not in again.stderr, again.stderr[-3000:]


def test_losses_are_those_of_linux(tmp_path):
    assert elsewhere("train_gpt.py", *tiny(tmp_path)).returncode == 0
    here = losses(run_folder(tmp_path))
    assert records(run_folder(tmp_path))[-1]["peak_memory_mib"] == 0  # not known
    assert train_gpt.main(tiny(tmp_path, experiment_name="linux")) == 0
    assert here == losses(run_folder(tmp_path, "linux"))


def test_the_other_tools_run_without_posix(tmp_path):
    assert train_gpt.main(tiny(tmp_path)) == 0
    for argv in (
            ["generate.py", "--checkpoint", run_folder(tmp_path), "--max-tokens", 5],
            ["logger.py", "--experiment_name", "x", "--log_dir", tmp_path / "logs",
             "--images-dir", tmp_path / "images"],
            ["data/fineweb.py", "--help"], ["data/cached_fineweb.py", "--help"], ["evals/hellaswag.py", "--help"],
            ["data/stdlib.py", "--out", tmp_path / "stdlib"]):
        done = elsewhere(*argv)
        assert done.returncode == 0 and "Traceback" not in done.stderr, (argv, done.stderr[-2000:])


# --- memory


def test_glibc_keeps_what_is_freed_and_a_user_may_say_otherwise(monkeypatch):
    calls = []
    library = SimpleNamespace(mallopt=lambda *values: calls.append(values))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    monkeypatch.delenv("MALLOC_MMAP_MAX_", raising=False)
    train_gpt.keep_memory()
    assert calls == [(-4, 0), (-1, -1)]
    monkeypatch.setenv("MALLOC_MMAP_MAX_", "65536")
    train_gpt.keep_memory()
    assert len(calls) == 2


@pytest.mark.parametrize("library", [SimpleNamespace(), TypeError("LoadLibrary"), OSError("no such library")],
                         ids=["macOS, musl", "Windows", "none"])
def test_other_systems_have_no_mallopt(library, monkeypatch):
    def load(name):
        if isinstance(library, Exception):
            raise library
        return library
    monkeypatch.setattr(ctypes, "CDLL", load)
    train_gpt.keep_memory()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc")
def test_large_tensors_are_mapped_once():
    """Page faults of a tensor of 64 MiB, made and freed ten times, after twenty in which the heap grows to what it
    needs. Tells no time."""
    code = ("import resource, sys, torch, train_gpt\nif sys.argv[1] == 'keep': train_gpt.keep_memory()\n"
            "def use(): torch.ones(2**24)\nfor _ in range(20): use()\n"
            "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
            "for _ in range(10): use()\nprint(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)")
    faults = {}
    for kind in ("keep", "off"):
        done = subprocess.run([sys.executable, "-c", code, kind], env=environment(), capture_output=True, text=True)
        faults[kind] = int(done.stdout)
    assert faults["keep"] < 100 < 200 < faults["off"]


def test_runs_on_a_cpu_keep_memory(tmp_path, monkeypatch):
    for script in (train_gpt, train_moe, train_baseline):
        called = []
        monkeypatch.setattr(script, "keep_memory", lambda called=called: called.append(1))
        assert script.main([*script_flags(f"{script.__name__}.py", tmp_path / script.__name__)]) == 0
        assert called == [1]


# --- Apple's GPU


class AsMPS(TorchFunctionMode):
    """A CPU that answers to the name mps, and refuses what MPS does: float64, and tensors of another device."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        def named(value):
            return torch.device("cpu") if str(value) == "mps" and isinstance(value, str | torch.device) else value
        asked = [*args, *(kwargs or {}).values()]
        on_mps = any(named(x) is not x for x in asked if isinstance(x, str | torch.device))
        if on_mps and (torch.float64 in [x for x in asked if isinstance(x, torch.dtype)]):
            raise TypeError("MPS has no float64")
        return function(*map(named, args), **{k: named(v) for k, v in (kwargs or {}).items()})


@pytest.fixture
def mps(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    monkeypatch.setattr(torch.mps, "synchronize", lambda: None)

    class Generator(torch.Generator):
        def __new__(cls, device="cpu"):
            return super().__new__(cls, "cpu" if device == "mps" else device)
    monkeypatch.setattr(torch, "Generator", Generator)


@pytest.mark.parametrize("script, dtype", [(train_gpt, "bf16"), (train_baseline, "fp32")],
                         ids=lambda x: getattr(x, "__name__", x))
def test_mps_runs_the_plain_parts(script, dtype, tmp_path, mps):
    argv = script_flags(f"{script.__name__}.py", tmp_path)
    found = {}
    for device in ("mps", "cpu"):
        more = ["--device", device, "--dtype", dtype, "--backend", "plain", "--experiment-name", device]
        mode = AsMPS() if device == "mps" else torch.overrides.BaseTorchFunctionMode()
        with mode:
            assert script.main([*argv, *more]) == 0
        found[device] = losses(run_folder(tmp_path, device))
    assert found["mps"]["train_loss"] == found["cpu"]["train_loss"]
    for step, loss in found["cpu"]["val_loss"].items():  # summed in fp32 there
        assert found["mps"]["val_loss"][step] == pytest.approx(loss, rel=1e-5)


def test_mps_is_never_chosen_and_has_no_compiled_parts(mps, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert train_gpt.detect_hardware().device == "cpu" and train_gpt.detect_hardware("mps").device == "mps"
    s, _, notes = train_gpt.parse_settings(["--device", "mps"], 1)
    chosen = (s.preset, s.device, s.dtype, s.backend, s.kernels, s.fp8_head, s.compile)
    assert chosen == ("cpu", "mps", "fp32", "plain", "none", "off", False)
    assert "dtype fp32: bf16 only if asked for" in notes
    with pytest.raises(train_gpt.UserError, match="--device mps has the plain parts only: add --no-compile"):
        train_gpt.parse_settings(["--device", "mps", "--preset", "gpu"], 1)


def test_mps_without_such_a_gpu_is_a_sentence(monkeypatch):
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for script in (train_gpt, train_baseline):
        with pytest.raises(script.UserError, match="--device mps"):
            script.parse_settings(["--device", "mps"], 1)


# --- ROCm


@pytest.fixture
def rocm(monkeypatch):
    """An MI300X: torch calls it cuda, and its generation 9.4."""
    known = SimpleNamespace(name="AMD Instinct MI300X", total_memory=192 << 30, major=9, minor=4)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda *_: known)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: (9, 4))
    yield
    train_gpt.small_shared_memory.cache_clear()


def test_auto_takes_plain_parts_on_rocm_and_says_why(rocm):
    s, hardware, notes = train_gpt.parse_settings([], 1)
    assert (s.device, s.dtype, s.backend, s.kernels, s.fp8_head) == ("cuda", "bf16", "sdpa", "none", "off")
    assert (hardware.capability, hardware.fp8) == ((0, 0), False)
    assert "dtype bf16: ROCm 6.4" in notes and "kernels none: they need Triton, CUDA, not ROCm, and bf16" in notes
    s = train_moe.parse_settings(["--preset", "mixtral-gpu"], 1)[0]
    assert (s.moe_impl, s.kernels, s.backend) == ("bmm", "none", "sdpa")


@pytest.mark.parametrize("argv, told", [
    (["--kernels", "mlp"], "--kernels mlp needs Triton, CUDA"), (["--fp8-head", "on"], "has no FP8"),
    (["--fp8-mlp"], "has no FP8"), (["--backend", "varlen"], "needs an NVIDIA GPU from 8.0 on")])
def test_what_nvidia_alone_has_is_refused_on_rocm(argv, told, rocm):
    with pytest.raises(train_gpt.UserError, match=told):
        train_gpt.parse_settings(argv, 1)


def test_the_mlp_kernel_copies_by_descriptor_on_no_other_gpu_than_nvidias(rocm, monkeypatch):
    """Tensors that say they are on a GPU: any kernel would be told."""
    monkeypatch.setattr(train_gpt, "triton_kernel", lambda *_: pytest.fail("a kernel was called"))
    a, b = torch.randn(4, 8), torch.randn(6, 8)

    class OnGPU(torch.Tensor):
        is_cuda = True
    found = train_gpt.product_relu2(a.as_subclass(OnGPU), b)
    torch.testing.assert_close(torch.Tensor(found), (a @ b.T).relu().square())
    assert train_gpt.small_shared_memory("cuda")  # of unknown size
