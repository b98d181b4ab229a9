"""Long work: one record a job in a NATS bucket, changed only by compare-and-swap along one pure table.

model     the record and its legal changes, pure
ledger    start, get, list, watch, cancel: the record in the bucket
worker    takes queued jobs under a lease; attempt runs one of them
sweeper   gives jobs of dead workers back to the queue, and ends what nobody does
stages    results of deterministic stages by the digest of what went into them
servicer  the gRPC face
"""
