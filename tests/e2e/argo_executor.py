"""Runs an Argo Workflow's tasks as real processes, in the order of its DAG, as its templates say: a stand-in for Argo.

Of the templates it obeys command, args, env, parameters, raw artifacts, output parameters and mounts; paths of a pod
lie below a folder of the task. What a cluster would bring is given: values of the environment and what they stand for.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Mapping
from graphlib import TopologicalSorter
from pathlib import Path
from typing import Any

_FIELD = re.compile(r"\{\{([a-z.\-]+)\}\}")


def executed(workflow: Mapping[str, Any], folder: Path, brought: Mapping[str, str], root: Path) -> dict[str, str]:
    """Exit code and output parameters of every task are checked; the output of each that ended with 0, by its name."""
    templates = {template["name"]: template for template in workflow["spec"]["templates"]}
    tasks = {task["name"]: task for task in templates[workflow["spec"]["entrypoint"]]["dag"]["tasks"]}
    order = TopologicalSorter({name: task.get("dependencies", []) for name, task in tasks.items()}).static_order()
    outputs: dict[str, str] = {}
    for name in order:
        task = tasks[name]
        known = {f"tasks.{done}.outputs.parameters.result": value for done, value in outputs.items()}
        given = {
            f"inputs.parameters.{one['name']}": _filled(one["value"], known) for one in task["arguments"]["parameters"]
        }
        template = templates[task["template"]]
        assert {f"inputs.parameters.{one['name']}" for one in template["inputs"]["parameters"]} == set(given)
        outputs[name] = _pod(template, given, folder / name, brought, root)
    return outputs


def _pod(
    template: Mapping[str, Any], given: Mapping[str, str], folder: Path, brought: Mapping[str, str], root: Path
) -> str:
    container, mounts = template["container"], [mount["mountPath"] for mount in template["container"]["volumeMounts"]]
    for path in mounts:
        (folder / path.lstrip("/")).mkdir(parents=True)
    for artifact in template["inputs"]["artifacts"]:
        target = folder / artifact["path"].lstrip("/")
        target.parent.mkdir(parents=True)
        target.write_text(artifact["raw"]["data"])
        mounts.append(artifact["path"])

    def placed(text: str) -> str:
        return f"{folder}{text}" if any(text == path or text.startswith(f"{path}/") for path in mounts) else text

    program, *rest = [*container["command"], *(_filled(text, given) for text in container["args"])]
    assert program == "python"
    env = {one["name"]: placed(brought.get(one["value"], one["value"])) for one in container["env"]}
    done = subprocess.run(
        [sys.executable, *map(placed, rest)], capture_output=True, text=True, timeout=240, cwd=root,
        env={"PATH": "/usr/bin:/bin", **env},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    (output,) = template["outputs"]["parameters"]
    return Path(placed(output["valueFrom"]["path"])).read_text()


def _filled(text: str, values: Mapping[str, str]) -> str:
    """`text` with every field's value; a field without one is a mistake of the Workflow."""
    return _FIELD.sub(lambda match: values[match[1]], text)
