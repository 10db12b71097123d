"""A real gRPC server that does what a test says: answer, refuse, stall until released, die and come back."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from tagstore_proto.v1 import tagstore_pb2 as pb
from tagstore_proto.v1 import tagstore_pb2_grpc as pb_grpc

Behaviour = Callable[[grpc.ServicerContext], None]


def fails(code: grpc.StatusCode, retry_after_ms: int = 0) -> Behaviour:
    def behave(context: grpc.ServicerContext) -> None:
        if retry_after_ms:
            context.set_trailing_metadata((("retry-after-ms", str(retry_after_ms)),))
        context.abort(code, "as the test says")

    return behave


class Scripted(pb_grpc.TagStoreServicer):
    """Follows its script, a behaviour a call, then answers. Each query gets a tag with the server's name."""

    def __init__(
        self, name: str = "one", *script: Behaviour, tls: tuple[tuple[bytes, bytes], bytes] | None = None
    ) -> None:
        """`tls`: key and certificate chain, and the authority of clients' certificates."""
        self.name, self.script = name, list(script)
        self.tamper: Callable[[Any], object] = lambda response: None
        """Changes each answer before it is sent."""
        self.calls = 0
        self.metadata: list[dict[str, str]] = []
        self.released = threading.Event()
        self.port = 0
        self._tls = grpc.ssl_server_credentials([tls[0]], tls[1], require_client_auth=True) if tls else None
        self.start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def start(self) -> None:
        self._server = grpc.server(
            ThreadPoolExecutor(8),
            options=[("grpc.so_reuseport", 0), ("grpc.http2.min_ping_interval_without_data_ms", 10)],
        )
        pb_grpc.add_TagStoreServicer_to_server(self, self._server)
        address = f"127.0.0.1:{self.port}"
        self.port = (
            self._server.add_secure_port(address, self._tls)
            if self._tls
            else self._server.add_insecure_port(address)
        )
        self._server.start()

    def stop(self) -> None:
        self.released.set()
        self._server.stop(0).wait()

    def stalls(self, context: grpc.ServicerContext) -> None:
        """Stall a call until the test releases it."""
        self.released.wait(30)

    def Retrieve(self, request: pb.RetrieveRequest, context: grpc.ServicerContext) -> pb.RetrieveResponse:  # noqa: N802
        self.calls += 1
        self.metadata.append(dict(context.invocation_metadata()))
        if self.script:
            self.script.pop(0)(context)
        count = len(request.images) or len(request.vectors.data) // (4 * (request.vectors.dimension or 1))
        answer = pb.Retrieval(
            tags=[pb.RetrievedTag(tag_id=1, tag=self.name, kind=pb.KIND_OBJECT, votes=1)], excluded=2
        )
        fingerprint = request.fingerprint or "f"
        return self._tampered(
            pb.RetrieveResponse(
                store=request.store,
                version=request.version or 1,
                fingerprint=fingerprint,
                retrievals=[answer] * count,
            )
        )

    def GetTags(self, request: pb.GetTagsRequest, context: grpc.ServicerContext) -> pb.GetTagsResponse:  # noqa: N802
        self.calls += 1
        if self.script:
            self.script.pop(0)(context)
        tags = [pb.TagInfo(tag_id=i, text=f"tag {i}", kind=pb.KIND_OBJECT, count=1) for i in request.tag_ids]
        vectors = (
            pb.Vectors(data=b"\x00\x3c" * len(tags), dimension=1, dtype=pb.DTYPE_FLOAT16)
            if request.embeddings
            else None
        )
        return self._tampered(
            pb.GetTagsResponse(
                store=request.store, version=request.version or 1, tags=tags, embeddings=vectors
            )
        )

    def GetStore(self, request: pb.GetStoreRequest, context: grpc.ServicerContext) -> pb.GetStoreResponse:  # noqa: N802
        fingerprint = pb.Fingerprint(model="m", weights="w", preprocess="{}", dimension=2)
        info = pb.StoreInfo(
            store=request.store, version=request.version or 1, fingerprint=fingerprint, index="{}"
        )
        return self._tampered(pb.GetStoreResponse(store=info))

    def _tampered(self, response: Any) -> Any:
        self.tamper(response)
        return response
