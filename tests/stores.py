"""An S3 server in the test process, and what was asked of it."""

import re
from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
from moto.server import ThreadedMotoServer
from werkzeug.serving import WSGIRequestHandler

BUCKET = "bucket"


class Store:
    """A bucket, its objects and the requests since it was last asked for them."""

    def __init__(self) -> None:
        self._server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
        self._server.start()
        self._address = self._server.get_host_and_port()
        self.endpoint = "http://{}:{}".format(*self._address)
        self._client = boto3.client("s3", endpoint_url=self.endpoint)
        self._client.create_bucket(Bucket=BUCKET)
        self.requests: list[str] = []
        self._last_request: str | None = None

    def note(self, request: str) -> None:
        """Take note of a request, which may be the last one."""
        self.requests.append(request)
        if self._last_request and re.search(self._last_request, request):
            self._last_request = None
            self.stop()

    def stop(self) -> None:
        """Answer no longer; objects are kept."""
        server = self._server._server
        self._server.stop()
        server.server_close()

    @contextmanager
    def dying_after(self, request: str) -> Iterator[None]:
        """Die after the first request that a pattern fits, or at once for one that fits nothing; live again later."""
        self._last_request = request
        if re.search(request, ""):
            self.note("")
        try:
            yield
        finally:
            if self._last_request:  # it never came
                self.stop()
            self._last_request = None
            self._server = ThreadedMotoServer(*self._address, verbose=False)
            self._server.start()

    def put(self, name: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=name, Body=data)

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """Contents by name below a prefix; markers of empty folders, which Arrow makes, are left out."""
        listed = self._client.list_objects_v2(Bucket=BUCKET, Prefix=prefix).get("Contents", [])
        names = [entry["Key"] for entry in listed if not entry["Key"].endswith("/")]
        read = {name: self._client.get_object(Bucket=BUCKET, Key=name)["Body"].read() for name in names}
        return {name.removeprefix(prefix): data for name, data in read.items()}


@contextmanager
def s3_store() -> Iterator[Store]:
    """A store that this process and its children reach as `s3://bucket`, by the environment variables of the SDKs."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "something")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        store = Store()
        patch.setenv("AWS_ENDPOINT_URL", store.endpoint)
        patch.setattr(WSGIRequestHandler, "log_request", lambda self, *_: store.note(self.requestline))
        yield store
        store.stop()
