"""The journal in Redis, for many machines and disks that go away: one stream per destination, one active relay.

`writer` appends and spills to file segments while Redis cannot be reached, `spool` brings those over, `reader` reads
for the relay that holds the lease, `client` speaks the protocol. No third-party client: redis-py loads OpenTelemetry,
which the relay must not, and its time limits hold for each read of a socket, where a job needs one for all of them.
"""
