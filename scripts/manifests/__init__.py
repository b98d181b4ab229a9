"""Checks of what `deploy/` says: rendered, held to the schemas of Kubernetes, and to rules that no schema knows.

`python -m scripts.manifests` renders every overlay and every documented combination of components with `kubectl
kustomize`, offline, and prints what is wrong with them. `render` makes documents, `schemas` judges their form,
`policies` and its neighbours their meaning.
"""
