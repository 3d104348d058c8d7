"""Which replica a request goes to. Ray's proxies run this, and need nothing of neuroflow for it."""

import pickle
import re

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica

STREAM = re.compile(r"/v1/streams/([^/]+)")


class StreamRouter(ConsistentHashRouter):
    """Requests of one session go to one replica, at a place on a ring that depends on nothing but the two names.

    The session is what the header `x-session-id` or `handle.options(session_id=)` says, or else the stream in the
    path. Where a replica has no room its requests wait, as another one would begin their streams anew. One that died
    is passed over before Ray has taken it off the ring; that needs `num_fallback_replicas` of 1 or more.
    """

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """The one replica that takes the request, in a list of its own."""
        if pending_request is not None:
            metadata = pending_request.metadata
            if metadata.is_http_request and not metadata.session_id:
                metadata.session_id = stream_of(pending_request)
        return (await super().choose_replicas(candidate_replicas, pending_request))[:1]


def stream_of(request: PendingRequest) -> str:
    """The stream that a request's path names, "" for none."""
    # What Ray's proxy on this machine has pickled a moment ago.
    path = pickle.loads(request.args[0]).asgi_scope["path"]
    found = STREAM.search(path)
    return found[1] if found else ""
