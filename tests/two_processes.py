"""Two processes of four host devices each, as one run, for the tests."""

import os
import socket
import subprocess
import sys


def start(*command: str, stderr=subprocess.PIPE, **environment: str) -> list[subprocess.Popen]:
    """Starts `python *command` twice, told of each other as `npr_jax.base.distributed` asks for."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"localhost:{free.getsockname()[1]}"
    common = os.environ | {
        "XLA_FLAGS": os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "NPR_COORDINATOR": address,
        "NPR_PROCESSES": "2",
    }
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env=common | environment | {"NPR_PROCESS": str(i)},
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        for i in range(2)
    ]


def run(*command: str, timeout: float = 900, **environment: str) -> list[str]:
    """Runs both to their good ends; what each printed."""
    processes = start(*command, **environment)
    found = [process.communicate(timeout=timeout) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], [e[-3000:] for _, e in found]
    return [out for out, _ in found]
