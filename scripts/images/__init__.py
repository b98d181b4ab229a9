"""Container images without a daemon: built with buildah, judged as files, run with podman.

`python -m scripts.images build` makes the images of `deploy/docker/Containerfile` and says what is wrong with them;
`test` starts the whole platform from them. `catalogue` knows which images there are, `builder` makes them, `judge` and
`bill` (of materials) look at what is inside, `cpus`, `containers` and `trial` run it.
"""
