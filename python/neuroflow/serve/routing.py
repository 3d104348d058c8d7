"""Choose the replica for a request. Runs in Ray's proxies, and needs nothing else from neuroflow."""

import pickle
import re

from ray.serve.experimental.consistent_hash_router import ConsistentHashRouter
from ray.serve.request_router import PendingRequest, RunningReplica

STREAM = re.compile(r"/v1/streams/([^/]+)")


class StreamRouter(ConsistentHashRouter):
    """Route requests of one session to one replica, by consistent hashing of the two names.

    The session comes from the header `x-session-id`, from `handle.options(session_id=)`, or else from the stream in the
    path. If the replica has no room the request waits, since another replica would have to start the stream over. A
    dead replica is skipped before Ray takes it off the ring; this needs `num_fallback_replicas` of 1 or more.
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
    """The stream named in a request's path; "" if none."""
    # Pickled a moment ago by Ray's proxy on this machine.
    path = pickle.loads(request.args[0]).asgi_scope["path"]
    found = STREAM.search(path)
    return found[1] if found else ""
