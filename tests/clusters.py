"""Servers and hosts of a cluster on this machine: an object store, Beam's Prism, and workers that share no disk.

A host is a network namespace with an address of its own, and a mount namespace in which the folders for temporary
files are empty: its processes see the programs of this machine, as they would see those of an image, and no data. That
takes root, on Linux.
"""

import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from pyarrow.fs import AzureFileSystem

HOME = "10.77.0.1"
"""The address by which hosts reach this machine."""

NAME = "crayon1"
"""How it calls itself to them, once `named` is before a command."""

_BRIDGE = "crayon0"
_POOL_PORT = 50000
_FORWARDER = Path(__file__).with_name("forward.py")


def program(name: str, install: str = "examples/ shows how to install with Go") -> str:
    """Find one of the servers, where `go install` puts them or on the path; skip the test where it is not there."""
    go = os.environ.get("GOBIN") or f"{os.environ.get('GOPATH') or Path.home() / 'go'}/bin"
    found = shutil.which(name) or shutil.which(name, path=go)
    if not found:
        pytest.skip(f"needs {name}, which {install}")
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
        while address and not listens(address):
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


def listens(address: tuple[str, int]) -> bool:
    try:
        socket.create_connection(address, timeout=1).close()
    except OSError:
        return False
    return True


@contextmanager
def hosts(
    count: int, folder: Path, forwarded: Sequence[int], environment: Mapping[str, str]
) -> Iterator[tuple[str, list[int]]]:
    """Start hosts with a worker pool each.

    Args:
        forwarded: ports of this machine that every host reaches as its own, as runners on one machine name them so.
        environment: what the workers find in theirs.

    Yields:
        the address of one pool that hands its workers to the hosts in turn, and the process groups of theirs.
    """
    if os.geteuid() or not shutil.which("ip") or not shutil.which("unshare"):
        pytest.skip("needs root, ip and unshare to make hosts of namespaces")
    with ExitStack() as stack:
        stack.enter_context(_bridge())
        pools, groups = [], []
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
            environ = {**os.environ, "PATH": path, "PYTHONPATH": str(Path(__file__).parents[1]), **environment}
            groups.append(stack.enter_context(running(command, log, where, env=environ)).pid)
            pools.append(f"{address}:{_POOL_PORT}")
        port = free_port()
        command = [sys.executable, str(_FORWARDER), str(port), *pools]
        stack.enter_context(running(command, folder / "pools.log", ("localhost", port)))
        yield f"localhost:{port}", groups


class Store:
    """An object store in a process of its own, which keeps what it holds on disk, so that it can be killed and started.

    Args:
        folder: for its objects and its log.
        host: by which it is reached; `HOME` is there while there are `hosts`, which have no other way to it.
    """

    scheme = ""

    def __init__(self, folder: Path, host: str = HOME) -> None:
        self.folder = folder / self.scheme
        (self.folder / "crayon").mkdir(parents=True)  # a bucket
        self.log = folder / f"{self.scheme}.log"
        self.port = free_port()
        self.address = f"{host}:{self.port}"
        self.url = f"http://{self.address}"
        self.bucket = f"{self.scheme}://crayon"

    def __enter__(self) -> "Store":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        self._stack = ExitStack()
        self._stack.enter_context(running(self.command, self.log, ("localhost", self.port), env=self.of_server))

    def kill(self) -> None:
        self._stack.close()

    @property
    def command(self) -> list[str]:
        raise NotImplementedError

    @property
    def of_server(self) -> dict[str, str]:
        """The environment of the server."""
        return dict(os.environ)

    @property
    def environment(self) -> dict[str, str]:
        """What leads the store's SDK there."""
        raise NotImplementedError


class S3(Store):
    """MinIO."""

    scheme = "s3"

    @property
    def command(self) -> list[str]:
        return [program("minio"), "server", str(self.folder), "--address", f":{self.port}"]

    @property
    def of_server(self) -> dict[str, str]:
        return {**os.environ, "MINIO_ROOT_USER": "someone", "MINIO_ROOT_PASSWORD": "something"}

    @property
    def environment(self) -> dict[str, str]:
        keys = {"AWS_ACCESS_KEY_ID": "someone", "AWS_SECRET_ACCESS_KEY": "something"}
        return {"AWS_ENDPOINT_URL": self.url, "AWS_REGION": "us-east-1", **keys}


class Gcs(Store):
    """A server that speaks the protocol of Google Cloud Storage."""

    scheme = "gs"

    @property
    def command(self) -> list[str]:
        where = ["-port", str(self.port), "-public-host", self.address, "-external-url", self.url]
        return [program("fake-gcs-server"), "-scheme", "http", "-filesystem-root", str(self.folder), *where]

    @property
    def environment(self) -> dict[str, str]:
        return {"CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url}


class Azure(Store):
    """Azurite, which stands for Azure's Blob Storage, with the account and the key that all its copies have."""

    scheme = "abfs"

    @property
    def command(self) -> list[str]:
        server = program("azurite-blob", "`npm install -g azurite` installs")
        where = ["--location", str(self.folder), "--blobHost", "0.0.0.0", "--blobPort", str(self.port)]
        return [server, *where, "--skipApiVersionCheck", "--disableTelemetry"]

    def start(self) -> None:
        super().start()
        key, place = self.environment["AZURE_STORAGE_ACCOUNT_KEY"], f"localhost:{self.port}"
        where = {"blob_storage_authority": place, "dfs_storage_authority": place}
        http = dict.fromkeys(("blob_storage_scheme", "dfs_storage_scheme"), "http")
        AzureFileSystem("devstoreaccount1", account_key=key, **where, **http).create_dir("crayon")

    @property
    def environment(self) -> dict[str, str]:
        key = "Eby8vdM02xNOcqFlqUwJPLlmEtlCDXJ1OUzFT50uSRZ6IFsuFq2UVErCz4I6tq/K1SZFPTOtr/KBHBeksoGMGw=="
        account = {"AZURE_STORAGE_ACCOUNT_NAME": "devstoreaccount1", "AZURE_STORAGE_ACCOUNT_KEY": key}
        return {"AZURE_STORAGE_USE_EMULATOR": "true", "AZURITE_BLOB_STORAGE_URL": self.url, **account}


class Prism:
    """Prism, and a worker pool on each of two hosts, while a `with` block runs.

    Args:
        folder: for logs.
        environment: of the workers.
    """

    before: Sequence[str] = ()

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._folder, self._environment = folder, environment
        self._port = free_port()

    def __enter__(self) -> "Prism":
        command = [program("prism"), "-job_port", str(self._port), "-serve_http=false"]
        with ExitStack() as stack:
            self._process = stack.enter_context(running(command, self._folder / "prism.log", ("localhost", self._port)))
            line = free_port()
            command = [sys.executable, str(_FORWARDER), str(line), f"localhost:{self._port}"]
            self._line = stack.enter_context(running(command, self._folder / "line.log", ("localhost", line)))
            pool, self._pools = stack.enter_context(hosts(2, self._folder, [self._port], self._environment))
            self._stack = stack.pop_all()
        self.flags = ["--job_endpoint", f"localhost:{line}", "--environment_config", pool]
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def kill(self) -> None:
        kill(self._process)

    def kill_line(self) -> None:
        """End the connection of the launcher."""
        kill(self._line)

    def workers(self) -> list[int]:
        """Wait for the processes that the pools start for the job."""
        found: list[int] = []
        while not found:
            time.sleep(0.1)
            for process in Path("/proc").glob("[0-9]*"):
                with suppress(OSError):  # it has ended
                    of_job = b"SdkHarness(" in (process / "cmdline").read_bytes()
                    if of_job and os.getpgid(int(process.name)) in self._pools:
                        found.append(int(process.name))
        return found

    def kill_worker(self) -> None:
        for worker in self.workers():
            os.kill(worker, signal.SIGKILL)


class JobService:
    """Beam's own job service in the launcher, which has a worker on each of two hosts."""

    def __init__(self, folder: Path, environment: Mapping[str, str]) -> None:
        self._hosts = hosts(2, folder, [], environment)
        self.before = _named(folder)

    def __enter__(self) -> "JobService":
        self.flags = ["--job_endpoint", "embed", "--direct_num_workers", "2"]
        self.flags += ["--environment_config", self._hosts.__enter__()[0]]
        return self

    def __exit__(self, *_: object) -> None:
        self._hosts.__exit__(None, None, None)


def _named(folder: Path) -> list[str]:
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
    with ExitStack() as stack:
        _ip("netns", "add", name)
        stack.callback(_ip, "netns", "delete", name)
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        # By itself it goes only with the last connection of a process that was killed there, minutes later.
        stack.callback(_ip, "link", "delete", name)
        _ip("link", "set", name, "master", _BRIDGE, "up")
        _ip("-n", name, "addr", "add", f"{address}/24", "dev", "eth0")
        for device in ("lo", "eth0"):
            _ip("-n", name, "link", "set", device, "up")
        (folder / "hosts").write_text(f"127.0.0.1 localhost\n{HOME} {NAME}\n")
        empty = dict.fromkeys((tempfile.gettempdir(), "/tmp", "/var/tmp", str(Path.home() / ".cache")))
        mounts = [f"mount --bind {folder}/hosts /etc/hosts"]
        mounts += [f"mount -t tmpfs none {path}" for path in empty if Path(path).is_dir()]
        # This Python may live below one of these; its folder is opened before they are emptied, and put back after.
        python = shlex.quote(sys.prefix)
        mounts = [f"exec 9<{python}", *mounts, f"mkdir -p {python}", f"mount -c --bind /proc/self/fd/9 {python}"]
        mounts += ["exec 9<&-"]
        yield ["ip", "netns", "exec", name, "unshare", "--mount", "sh", "-c", " && ".join([*mounts, 'exec "$@"']), "sh"]


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
