"""Two processes of four host devices each, as one run, for the tests."""

import os
import socket
import subprocess
import sys

FOUR = " --xla_force_host_platform_device_count=4"


def start(
    *command: str, stderr=subprocess.PIPE, each=((), ()), **environment: str
) -> list[subprocess.Popen]:
    """Starts `python *command` twice, told of each other as `npr_jax.base.distributed` asks for;
    `each` process has more arguments."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    common = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + FOUR,
        "JAX_PLATFORMS": "cpu",
        "NPR_COORDINATOR": address,
        "NPR_PROCESSES": "2",
    }
    return [
        subprocess.Popen(
            [sys.executable, *command, *each[i]],
            env=common | environment | {"NPR_PROCESS": str(i)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        for i in range(2)
    ]


def run_one(*command: str, timeout: float = 900, **environment: str) -> None:
    """Runs `python *command` in one process with one device."""
    common = os.environ | {"JAX_PLATFORMS": "cpu"}
    subprocess.run(
        [sys.executable, *command], env=common | environment, timeout=timeout, check=True
    )


def run(*command: str, timeout: float = 900, **environment: str) -> list[str]:
    """Runs both to their good ends; what each printed."""
    processes = start(*command, **environment)
    found = [process.communicate(timeout=timeout) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [e[-3000:] for _, e in found]
    return [out for out, _ in found]
