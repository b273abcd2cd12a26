"""An S3 server in the test process, and what was asked of it."""

from collections.abc import Iterator
from contextlib import contextmanager

import boto3
import pytest
from moto.server import ThreadedMotoServer
from werkzeug.serving import WSGIRequestHandler

BUCKET = "bucket"


class Store:
    """A bucket, its objects and the requests since it was last asked for them."""

    def __init__(self, endpoint: str) -> None:
        self._client = boto3.client("s3", endpoint_url=endpoint)
        self._client.create_bucket(Bucket=BUCKET)
        self.requests: list[str] = []

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
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "someone")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "something")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        store = Store(f"http://{host}:{port}")
        patch.setattr(WSGIRequestHandler, "log_request", lambda self, *_: store.requests.append(self.requestline))
        yield store
    server.stop()
