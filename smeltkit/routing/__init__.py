"""Requests for inference spread over its replicas, owned once: whoever calls inference opens `channel.open_inference`.

`demand` reads what a request asks for, `choice` decides who gets it (no transport), `replica` watches one process,
`pool` knows which there are, `channel` is what stubs and the gateway call.
"""
