"""The platform of an overlay as real processes on one machine, each pod on a loopback address of its own.

What runs, with which settings, ports, users and secrets, is read from the rendered overlay (`declared`). What a machine
without containers must change stands in `places` and `cluster`: names become addresses, and folders of a pod lie below
one folder. `nats` is the cluster of three servers, `link` a connection that can be cut, `replica` inference that
answers by a script, `caller` what a client does there, `chaos` what goes wrong there. Tests (tests/deploy) and the
benchmark `chaos` stand on it.
"""
