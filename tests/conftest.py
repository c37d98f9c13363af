"""Shared fixtures: eight host devices, one cache of compiled programs, golden data."""

import atexit
import contextlib
import functools
import importlib.util
import json
import lzma
import os
import shutil
import signal
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get(
    "XLA_FLAGS", ""
)
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Programs are compiled quickly rather than well: most run once or twice. Modules that train for
# long say OPTIMISED = True. `make nightly` has the compiler's usual level everywhere.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# Of subprocesses too: a program of another precision is another program.
os.environ.setdefault("JAX_DEFAULT_MATMUL_PRECISION", "highest")
# With XLA's older emitters, which later versions lack, a train step compiles in half the time.
if os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] == "1" and version("jaxlib") < "0.11":
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# Most of the time goes into compiling, and many tests, their subprocesses and pytest's own workers
# compile the same: whoever is first does it for all. Nothing is kept from run to run.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="npr_jax_tests_")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import filelock
import hypothesis
import jax
import pytest
from jax.sharding import AbstractDevice, AbstractMesh, use_abstract_mesh

# A shell ignores Ctrl-C for what it starts in the background; some tests send it.
signal.signal(signal.SIGINT, signal.default_int_handler)


BEGUN = time.monotonic()


def pytest_collection_modifyitems(items):
    """Slow tests come last, so that what is broken shows early; where processes share the files,
    those with slow tests come first, so that no process is left with a long one at the end."""
    slow = [item for item in items if item.get_closest_marker("slow")]
    if "PYTEST_XDIST_WORKER" in os.environ:
        files = {item.path for item in slow}
        items.sort(key=lambda item: item.path not in files)
    else:
        items.sort(key=lambda item: item in slow)


def pytest_runtest_setup(item):
    """NPR_TEST_MINUTES: tests that would begin later than that are skipped, and listed."""
    minutes = float(os.environ.get("NPR_TEST_MINUTES", "inf"))
    if time.monotonic() - BEGUN > 60 * minutes:
        pytest.skip(f"NPR_TEST_MINUTES={minutes:g} are over")


@pytest.fixture(scope="module")
def plans_without_numbers():
    """The engine forks blocks of the toy model, whose plans have no numbers."""
    import bigram  # after what is set above

    from npr_jax.decode import fork_join

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fork_join, "check_block", bigram.check_block_without_numbers)
        yield


def lowered_for_cuda(function, *arguments) -> str:
    """The module of `function` for an H100, which need not be there; JAX 0.12 asks which it is."""
    device = AbstractDevice("NVIDIA H100 80GB HBM3", None, "cuda")
    with use_abstract_mesh(AbstractMesh((), (), abstract_device=device)):
        traced = jax.jit(function).trace(*arguments)
        return traced.lower(lowering_platforms=("cuda",)).as_text()


# Multiplies the numbers of random cases: `make check` has less than 1, `make nightly` more.
EXAMPLES = float(os.environ.get("NPR_EXAMPLES", "1"))


# `make check` and `make test` draw the same random cases each time, so that they can be trusted to
# pass again; `make nightly` draws new ones.
hypothesis.settings.register_profile("npr_jax", derandomize=EXAMPLES <= 1)
hypothesis.settings.load_profile("npr_jax")


def pytest_make_parametrize_id(val):
    """Bytes are named by their length: what packs them may write the time into them, and each
    process collects the tests at another time."""
    return f"{len(val)}_bytes" if isinstance(val, bytes) else None


def examples(number: int) -> int:
    """`number` random cases in `make test`, in proportion elsewhere."""
    return max(1, round(number * EXAMPLES))


def spread(cases, check: int = 0, test: int | None = None) -> list:
    """Cases of a parametrized test: `make check` runs the first `check` of them, `make test` the
    first `test` (None: all), `make nightly` all."""
    cases = list(cases)
    slow, nightly = pytest.mark.slow, pytest.mark.nightly
    test = len(cases) if test is None else test
    return [
        pytest.param(case, marks=() if n < check else slow if n < test else nightly)
        for n, case in enumerate(cases)
    ]


DATA = Path(__file__).parent / "data"


@functools.cache
def _unpacked() -> Path:
    """A copy of tests/data with its .xz files unpacked, which goes when this process ends."""
    root = Path(tempfile.mkdtemp(prefix="npr_jax_data_"))
    atexit.register(shutil.rmtree, root, ignore_errors=True)
    shutil.copytree(DATA, root, dirs_exist_ok=True)
    for packed in root.rglob("*.xz"):
        packed.with_suffix("").write_bytes(lzma.decompress(packed.read_bytes()))
        packed.unlink()
    return root


def shared_path(name: str) -> Path:
    """Path of a file or folder of tests/data, unpacked; NPR_SHARED names another such folder."""
    root = os.environ.get("NPR_SHARED")
    return (Path(root) if root else _unpacked()) / name


def read_golden(name: str):
    """The content of tests/data/golden/NAME.json.xz."""
    return json.loads(lzma.decompress((DATA / f"golden/{name}.json.xz").read_bytes()))


@contextlib.contextmanager
def optimised():
    """Programs, of subprocesses too, are compiled as they are for a user."""
    name, variable = "jax_disable_most_optimizations", "JAX_DISABLE_MOST_OPTIMIZATIONS"
    before = os.environ[variable]
    jax.config.update(name, False)
    os.environ[variable] = "0"
    try:
        yield
    finally:
        jax.config.update(name, before != "0")
        os.environ[variable] = before


@pytest.fixture(scope="module", autouse=True)
def programs(request):
    """Compiled programs hold memory maps, and a process that has 65,530 of them (Linux' usual
    limit) dies of the next; what is needed again comes from the cache on disk."""
    with optimised() if getattr(request.module, "OPTIMISED", False) else contextlib.nullcontext():
        yield
    jax.clear_caches()


@pytest.fixture(autouse=True)
def short_runs(request, monkeypatch):
    """Engines that are tested read together what their small models share, as it were long."""
    if request.module.__name__.startswith("test_engine"):
        monkeypatch.setattr("npr_jax.decode.tables._WORTH", 1)


@pytest.fixture
def patience():
    """By how much this machine, as busy as it is now, is slower than a usual one; 1 at least. Time
    limits are multiplied by it."""
    begun = time.perf_counter()
    sum(i * i for i in range(1_000_000))
    return max(1.0, (time.perf_counter() - begun) / 0.1)


@pytest.fixture
def tpu_compiler(monkeypatch):
    """For tests that compile for TPUs; skips them without libtpu (fails: NPR_REQUIRE_LIBTPU=1)."""
    if importlib.util.find_spec("libtpu") is None:
        message = "libtpu is not installed"
        required = os.environ.get("NPR_REQUIRE_LIBTPU") == "1"
        pytest.fail(message) if required else pytest.skip(message)
    # It reads the flags too, and ends a process with one that it does not know.
    flags = os.environ["XLA_FLAGS"].replace("--xla_cpu_use_fusion_emitters=false", "")
    monkeypatch.setenv("XLA_FLAGS", flags)
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")


@pytest.fixture(scope="session")
def home(tmp_path_factory):
    """A directory with problems, and models to start stages from (`train_toy.make_home`)."""
    from train_toy import make_home

    base = tmp_path_factory.getbasetemp()
    # Pytest's workers have folders of their own in one; whoever is first makes it for all.
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "stages"
    with filelock.FileLock(f"{folder}.lock"), optimised():
        if not folder.exists():
            half = Path(tempfile.mkdtemp(dir=folder.parent))
            make_home(half)
            half.rename(folder)
    return folder


@pytest.fixture
def report(request):
    """A function that adds a line to what is printed at the end of the run."""
    # Properties travel from pytest's workers to the process that prints.
    return lambda line: request.node.user_properties.append(
        ("figure", f"{request.node.name}: {line}")
    )


def pytest_terminal_summary(terminalreporter):
    ended = [r for found in terminalreporter.stats.values() for r in found]
    calls = [r for r in ended if getattr(r, "when", None) == "call"]
    lines = [value for r in calls for name, value in r.user_properties if name == "figure"]
    if lines:
        terminalreporter.section("figures")
        for line in lines:
            terminalreporter.write_line(line)
