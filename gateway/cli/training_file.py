"""The YAML file of a training as requests: one, several adapters on one base, or the runs of a sweep.

base: ore-11m                 # model to start from
data: instruct.jsonl          # training rows, beside this file
heldout: heldout.jsonl        # optional: rows that only measure
name: ore-11m:refined         # name for the result
method: lora                  # and every other setting of a training
adapters:                     # instead of name: adapters trained together, each with what it does not share
  - {name: ore-11m:one, data: one.jsonl, lora: {rank: 8}}
  - {name: ore-11m:two, data: two.jsonl, learning_rate: 1e-4}
stages:                       # instead of data and its epochs: what follows one upon the other in one run
  - {data: easy.jsonl, epochs: 2}
  - {data: {easy.jsonl: 0.5, hard.jsonl: 1}, max_steps: 200}     # how often an epoch passes over each file
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from smelt.artifact.v1 import artifact_pb2
from smelt.trainer.v1 import trainer_pb2

from smeltkit import limits
from smeltkit.errors import BadConfig, UnknownSource
from smeltkit.ids import check_name

if TYPE_CHECKING:
    from gateway.cli.session import Session

_OWN_KEYS: Final = ("base", "data", "heldout", "name")
"""Keys of one training; `adapters` and `sweep` are those of several."""
_TEXTS: Final = {"base": "the model to start from", "name": "the name of the result"}
_METHODS: Final = {
    "lora": trainer_pb2.METHOD_LORA,
    "qlora": trainer_pb2.METHOD_QLORA,
    "ia3": trainer_pb2.METHOD_IA3,
    "full": trainer_pb2.METHOD_FULL,
    "pretrain": trainer_pb2.METHOD_PRETRAIN,
}


def read_file(file: Path, kind: str = "training file", keys: str = "base, data, name and method") -> dict[str, Any]:
    """The keys of a training file, or of a file of another kind; UnknownSource, BadConfig."""
    import yaml

    from smeltkit.strict_yaml import load_yaml

    try:
        with file.open("rb") as opened:
            data = opened.read(limits.TRAIN_SETTINGS_MAX_BYTES + 1)
        if len(data) > limits.TRAIN_SETTINGS_MAX_BYTES:
            raise BadConfig(
                f"{file.name} has {file.stat().st_size:,} bytes; {limits.TRAIN_SETTINGS_MAX_BYTES:,} at most can be in"
                f" a {kind}, so keep rows in the files that it names as data"
            )
        value = load_yaml(data)
    except OSError as error:
        raise UnknownSource(f"{file} cannot be read: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise BadConfig(f"{file.name} is no YAML that can be read: {error}") from error
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise BadConfig(f"{file.name} must hold keys such as {keys}")
    try:
        json.dumps(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadConfig(f"{file.name} holds what no setting can be: {error}; quote what is meant as text") from error
    return value


def trainings(value: Mapping[str, Any], file: Path) -> list[dict[str, Any]]:
    """The trainings that a file holds: itself, or each of its `adapters` over the keys that all share."""
    if "sweep" in value:
        raise BadConfig(f"{file.name} holds a sweep; use `smelt train sweep {file}`, or remove it to train once")
    if "adapters" not in value:
        return [dict(value)]
    adapters, shared = value["adapters"], {key: item for key, item in value.items() if key != "adapters"}
    if not isinstance(adapters, list) or not all(isinstance(one, dict) for one in adapters) or len(adapters) < 2:
        raise BadConfig(f"{file.name}: adapters must be a list of two or more, each with name and data of its own")
    if "name" in shared:
        raise BadConfig(f"{file.name}: name has no effect beside adapters, which have their own; remove it")
    return [merged(shared, one) for one in adapters]


def merged(value: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`value` with the keys of `over`, mappings within key by key."""
    found = dict(value)
    for key, item in over.items():
        own = found.get(key)
        found[key] = merged(own, item) if isinstance(own, Mapping) and isinstance(item, Mapping) else item
    return found


async def specs_of(session: Session, file: Path, found: Sequence[Mapping[str, Any]]) -> list[trainer_pb2.TrainSpec]:
    """Trainings as requests, their data stored."""
    stored = await stored_rows(session, file, data_paths(file, found))
    return requests_of(file, found, stored)


def data_paths(file: Path, found: Sequence[Mapping[str, Any]]) -> list[Path]:
    """The data files of trainings, each once; BadConfig for what names none, or for a training without base or name."""
    for value in found:
        for key in _TEXTS:
            text_of(value, key, file)
    names = [files_of(value, file)[0] for value in found]
    for own in names:
        form_of(own, file)
    return list(dict.fromkeys(file.parent / name for own in names for name in own))


async def stored_rows(session: Session, file: Path, paths: Sequence[Path]) -> dict[Path, artifact_pb2.Descriptor]:
    """Stores the data files that `file` names; UnknownSource."""
    from gateway.cli.uploads import upload

    for path in paths:
        if path.is_dir():
            raise UnknownSource(f"{path} is a folder; name the files in it that are data")
        if not path.is_file():
            raise UnknownSource(f"{path} does not exist; {file.name} names its data relative to its own folder")
    return dict(zip(paths, await upload(session, list(paths)), strict=True))


def requests_of(
    file: Path, found: Sequence[Mapping[str, Any]], stored: Mapping[Path, artifact_pb2.Descriptor]
) -> list[trainer_pb2.TrainSpec]:
    """Trainings as requests, from their data as stored."""
    specs = []
    for value in found:
        names, settings = files_of(value, file)
        paths = [file.parent / name for name in names]
        datasets = [stored[path].digest for path in paths]
        specs.append(_spec(value, {**form_of(names, file), **settings}, datasets, [_shown(path) for path in paths]))
    return specs


def text_of(value: Mapping[str, Any], key: str, file: Path) -> str:
    """The name that a training has under `base` or `name`; BadConfig."""
    from smeltkit.strict_yaml import no_text

    if key not in value:
        raise BadConfig(f"{file.name}: {key} is missing, {_TEXTS[key]}")
    if not isinstance(value[key], str):
        raise BadConfig(f"{file.name}: {key}, {_TEXTS[key]}, {no_text(value[key])}")
    return str(value[key])


def files_of(value: Mapping[str, Any], file: Path) -> tuple[list[str], dict[str, Any]]:
    """The data files that a training names, stage by stage and held-out rows last, and its settings without them."""
    settings = {key: item for key, item in value.items() if key not in _OWN_KEYS}
    heldout = [] if value.get("heldout") is None else [value["heldout"]]
    if not all(isinstance(name, str) and name for name in heldout):
        raise BadConfig(f"{file.name}: heldout={heldout[0]!r} must be one file")
    if "stages" not in value:
        names, own = _mixed(value, "", file)
        return [*names, *heldout], {**settings, **own}
    if "data" in value:
        raise BadConfig(f"{file.name}: data has no effect beside stages, which each have their own; move it into them")
    found, stages = value["stages"], []
    if not isinstance(found, list) or not found or not all(isinstance(one, Mapping) for one in found):
        raise BadConfig(f"{file.name}: stages must be a list of them, each with data and how long it goes on")
    names = []
    for number, stage in enumerate(found):
        where = f"stages[{number}]."
        if twice := sorted(stage.keys() & settings.keys()):
            raise BadConfig(f"{file.name}: {twice[0]} is said of the training and in {where}{twice[0]}; say it once")
        own_names, own = _mixed(stage, where, file)
        names += own_names
        stages.append({**{key: item for key, item in stage.items() if key != "data"}, **own})
    return [*names, *heldout], {**settings, "stages": stages}


def form_of(names: Sequence[str], file: Path) -> dict[str, str]:
    """The setting that says of files called .csv or .tsv what they are; BadConfig where only some are."""
    endings = {Path(name).suffix.lower().removeprefix(".") for name in names}
    found = sorted(endings & {"csv", "tsv"})
    if found and len(endings) > 1:
        raise BadConfig(
            f"{file.name}: {', '.join(names)} are of different kinds; data and held-out rows are read in one way,"
            " so store them in one format"
        )
    return {"data_format": found[0]} if found else {}


def _mixed(value: Mapping[str, Any], where: str, file: Path) -> tuple[list[str], dict[str, Any]]:
    """The data files of a training or a stage, and the setting that says how often an epoch passes over each."""
    if "mix" in value:
        raise BadConfig(
            f"{file.name}: {where}mix is what {where}data says of several files, as in data: {{a.jsonl: 0.5, b.jsonl:"
            " 1}; remove it"
        )
    data = value.get("data")
    if isinstance(data, str):
        return [data], {}
    if isinstance(data, list) and all(isinstance(name, str) for name in data):
        if twice := next((name for name in data if data.count(name) > 1), ""):
            raise BadConfig(f"{file.name}: {where}data names {twice} more than once; say how often: {{{twice}: 2}}")
        data = dict.fromkeys(data, 1)
    if not isinstance(data, Mapping) or not data or not all(isinstance(name, str) for name in data):
        raise BadConfig(
            f"{file.name}: {where}data is missing, or neither a file, nor a list of files, nor files with how often an"
            " epoch passes over each"
        )
    for name, passes in data.items():
        if not _is_number(passes, limits.TRAIN_PASSES_MIN, limits.TRAIN_PASSES_MAX):
            raise BadConfig(
                f"{file.name}: {where}data: {name}: {passes!r} must be how often an epoch passes over it,"
                f" {limits.TRAIN_PASSES_MIN:g} to {limits.TRAIN_PASSES_MAX}"
            )
    return list(data), {"mix": list(data.values())}


def _is_number(value: Any, low: float, high: float) -> bool:
    """Whether it is one within these bounds; YAML reads 1e-4 as text."""
    try:
        return not isinstance(value, bool) and low <= float(value) <= high
    except (TypeError, ValueError):
        return False


def _shown(path: Path) -> str:
    """The name of a file as messages can hold it: no folder, which is its user's own, nothing that no line holds."""
    return "".join(char if char.isprintable() else "?" for char in path.name)


def _spec(
    value: Mapping[str, Any], settings: Mapping[str, Any], datasets: list[str], names: list[str]
) -> trainer_pb2.TrainSpec:
    return trainer_pb2.TrainSpec(
        base=value["base"],
        method=_METHODS.get(str(settings.get("method", "lora")), trainer_pb2.METHOD_UNSPECIFIED),
        datasets=datasets,
        settings_json=json.dumps(settings, sort_keys=True),
        name=check_name(value["name"]),
        dataset_names=names,
    )
