"""Servers and hosts of a cluster on this machine: an object store, Beam's Prism, and workers that share no disk.

A host is a network namespace with an address of its own, and a mount namespace in which the folders for temporary
files are empty: its processes see the programs of this machine, as they would see those of an image, and no data. That
takes root, on Linux.
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest

HOME = "10.77.0.1"
"""The address by which hosts reach this machine."""

NAME = "crayon1"
"""How it calls itself to them, once `named` is before a command."""

_BRIDGE = "crayon0"
_POOL_PORT = 50000
_FORWARDER = Path(__file__).with_name("forward.py")


def program(name: str) -> str:
    """Find one of the servers, where `go install` puts them or on the path; skip the test where it is not there."""
    go = os.environ.get("GOBIN") or f"{os.environ.get('GOPATH') or Path.home() / 'go'}/bin"
    found = shutil.which(name) or shutil.which(name, path=go)
    if not found:
        pytest.skip(f"needs {name}, which examples/ shows how to install with Go")
    return found


def free_port() -> int:
    """A port that nothing listens on at the moment."""
    with socket.socket() as taken:
        taken.bind(("", 0))
        return int(taken.getsockname()[1])


@contextmanager
def running(
    command: Sequence[str], log: Path, address: tuple[str, int] | None = None, **options: object
) -> Iterator["subprocess.Popen[bytes]"]:
    """Run a program in a process group of its own, from when it accepts connections until the block ends."""
    with log.open("ab") as file:
        process = subprocess.Popen(command, stdout=file, stderr=file, start_new_session=True, **options)  # type: ignore
    try:
        while address and not _listens(address):
            assert process.poll() is None, log.read_text(errors="replace")[-2000:]
            time.sleep(0.1)
        yield process
    finally:
        kill(process)


def kill(process: "subprocess.Popen[bytes]") -> None:
    """End a program at once, with all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()


def _listens(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def hosts(count: int, folder: Path, forwarded: Sequence[int], environment: Mapping[str, str]) -> Iterator[str]:
    """Start hosts with a worker pool each.

    Args:
        forwarded: ports of this machine that every host reaches as its own, as runners on one machine name them so.
        environment: what the workers find in theirs.

    Yields:
        the address of one pool that hands its workers to the hosts in turn.
    """
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs root, ip and unshare to make hosts of namespaces")
    with ExitStack() as stack:
        stack.enter_context(_bridge())
        pools = []
        for number in range(2, count + 2):
            address = f"10.77.0.{number}"
            inside = stack.enter_context(_host(f"crayon{number}", address, folder))
            for port in forwarded:
                log = folder / f"forward-{number}.log"
                command = [*inside, sys.executable, str(_FORWARDER), str(port), f"{HOME}:{port}"]
                stack.enter_context(running(command, log))
            pool = [sys.executable, "-m", "apache_beam.runners.worker.worker_pool_main"]
            command = [*inside, *pool, f"--service_port={_POOL_PORT}"]
            path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
            log = folder / f"pool-{number}.log"
            where = (address, _POOL_PORT)
            stack.enter_context(running(command, log, where, env={**os.environ, "PATH": path, **environment}))
            pools.append(f"{address}:{_POOL_PORT}")
        port = free_port()
        command = [sys.executable, str(_FORWARDER), str(port), *pools]
        stack.enter_context(running(command, folder / "pools.log", ("localhost", port)))
        yield f"localhost:{port}"


def named(folder: Path) -> list[str]:
    """The words before a command that give it the name by which hosts find this machine, as a runner tells workers."""
    here = f'hostname {NAME} && mount --bind {folder}/hosts /etc/hosts && exec "$@"'
    return ["unshare", "--uts", "--mount", "sh", "-c", here, "sh"]


@contextmanager
def _bridge() -> Iterator[None]:
    _ip("link", "add", _BRIDGE, "type", "bridge")
    try:
        _ip("addr", "add", f"{HOME}/24", "dev", _BRIDGE)
        _ip("link", "set", _BRIDGE, "up")
        yield
    finally:
        _ip("link", "delete", _BRIDGE)


@contextmanager
def _host(name: str, address: str, folder: Path) -> Iterator[list[str]]:
    """Make a host; yield the words before a command that run it there."""
    _ip("netns", "add", name)
    try:
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("link", "set", name, "master", _BRIDGE, "up")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", name, "link", "set", device, "up")
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{HOME} {NAME}\n")
        empty = dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp", str(Path.home() / ".cache")))
        mounts = [f"mount --bind {folder}/hosts /etc/hosts"]
        mounts += [f"mount -t tmpfs none {path}" for path in empty if Path(path).is_dir()]
        yield ["ip", "netns", "exec", name, "unshare", "--mount", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]
    finally:
        _ip("netns", "delete", name)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
