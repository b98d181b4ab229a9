"""Commands about models against a scripted gateway: what is sent, what is printed, how it ends."""

from __future__ import annotations

import asyncio
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scripted_gateway import DIGEST, gateway, job, raising, watched
from smelt.artifact.v1 import artifact_pb2
from smelt.importer.v1 import importer_pb2
from smelt.job.v1 import job_pb2

from smeltkit.errors import OutOfMemory, ServiceUnavailable, UnknownModel
from smeltkit.ids import digest_bytes
from smeltkit.ml.gguf_io import GgufTensor, write_gguf
from smeltkit.ml.safetensors_io import write_safetensors
from smeltkit.testing.tiny_models import tiny_config

NAMES = artifact_pb2.ListNamesResponse(
    names=[artifact_pb2.Name(name="ore-11m:latest", digest=DIGEST, size_bytes=22_000_000, revision=3)]
)
ARTIFACT = artifact_pb2.GetArtifactResponse(
    artifact=artifact_pb2.Artifact(digest=DIGEST, size_bytes=1 << 20, config_json='{"format":"gguf","scheme":"Q8_0"}')
)
DONE = job("SUCCEEDED", result_digest=DIGEST)


async def test_json_is_one_document_with_plain_numbers() -> None:
    """64-bit integers are numbers, every field is there, and nothing else is on standard output."""
    async with gateway({"ArtifactService.ListNames": lambda request: NAMES}) as running:
        ended = await running.smelt("models", "--json")
    assert ended.code == 0, ended.err
    assert json.loads(ended.out) == {
        "models": [
            {
                "name": "ore-11m:latest",
                "digest": DIGEST,
                "artifact_type": "",
                "revision": 3,
                "size_bytes": 22_000_000,
                "tenant": "",
            }
        ]
    }


async def test_table_has_no_colour_when_piped() -> None:
    """Names and sizes for people, without escape sequences."""
    async with gateway({"ArtifactService.ListNames": lambda request: NAMES}) as running:
        ended = await running.smelt("models")
    assert "ore-11m:latest" in ended.out and "21.0 MiB" in ended.out
    assert "\x1b" not in ended.out + ended.err


async def test_error_is_reason_and_message_and_its_exit_code() -> None:
    """Standard output stays empty without --json."""
    answers = {"ImporterService.Inspect": raising(UnknownModel("nothing is called 'x'; `smelt models` lists names"))}
    async with gateway(answers) as running:
        ended = await running.smelt("inspect", "x")
        as_json = await running.smelt("inspect", "x", "--json")
    assert (ended.code, ended.out) == (3, "")
    assert "UNKNOWN_MODEL" in ended.err and "`smelt models` lists names" in ended.err
    assert as_json.code == 3
    assert json.loads(as_json.out)["error"]["reason"] == "UNKNOWN_MODEL"


async def test_inspect_shows_contract_lineage_and_files() -> None:
    """The sections of the bundle's own description are told apart; tensors come when asked for."""
    config = {"contract": {"stop_ids": [2, 5]}, "lineage": {"operation": "import"}, "format": "safetensors"}
    layer = artifact_pb2.Descriptor(path="model.safetensors", size_bytes=2048, digest=DIGEST)
    reply = importer_pb2.InspectResponse(
        artifact=artifact_pb2.Artifact(digest=DIGEST, config_json=json.dumps(config), layers=[layer]),
        tensors=[importer_pb2.Tensor(name="token_embedding", dtype="BF16", shape=[8, 4], size_bytes=64)],
        parameters=11_000_000,
    )
    async with gateway({"ImporterService.Inspect": lambda request: reply}) as running:
        ended = await running.smelt("inspect", "ore", "--tensors")
        document = json.loads((await running.smelt("inspect", "ore", "--json")).out)
    for text in ("[2, 5]", "operation", "model.safetensors", "token_embedding", "8x4", "11,000,000"):
        assert text in ended.out
    assert document["artifact"]["config"]["contract"] == {"stop_ids": [2, 5]}
    assert document["tensors"][0]["shape"] == [8, 4]


def _model_folder(folder: Path, *names: str) -> Path:
    """A folder with these files: one tensor as weights, a model's dimensions, of the others their names."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            write_safetensors(path, [("weight", "F32", np.zeros((2, 3), np.float32))])
        elif path.name == "config.json":
            path.write_text(json.dumps(tiny_config("llama")))
        else:
            path.write_text(f"content of {name}")
    return folder


def _import_answers() -> dict[str, Any]:
    return {
        "ArtifactService.BeginUpload": lambda request: artifact_pb2.BeginUploadResponse(is_stored=True),
        "ImporterService.StartImport": lambda request: importer_pb2.StartImportResponse(job=job("QUEUED")),
        "ImporterService.PlanImport": lambda request: importer_pb2.PlanImportResponse(
            plan=job_pb2.Plan(write_bytes=1 << 20, steps=["fetch", "probe"])
        ),
        "JobService.WatchJob": watched(job("RUNNING"), DONE),
        "ArtifactService.GetArtifact": lambda request: ARTIFACT,
    }


async def test_import_of_a_folder_sends_the_model_files_only(tmp_path: Path) -> None:
    """Weights, configuration, tokenizer, licence and model card go; pictures, code, .git and pickles stay."""
    kept = ["LICENSE", "README.md", "config.json", "model.safetensors", "tokenizer.json"]
    left = [".gitattributes", ".git/config", "logo.png", "modeling.py", "pytorch_model.bin", "onnx/model.onnx"]
    folder = _model_folder(tmp_path / "ore", *kept, *left)
    async with gateway(_import_answers()) as running:
        ended = await running.smelt("import", str(folder), "--name", "ore", "--json")
        (request,) = running.requests["ImporterService.StartImport"]
    assert ended.code == 0, ended.err
    assert [(file.path, file.digest) for file in request.spec.upload.files] == [
        (name, digest_bytes((folder / name).read_bytes())) for name in kept
    ]
    assert (request.spec.name, request.spec.upload.origin) == ("ore:latest", "ore")
    assert request.request_id.startswith("req-")
    assert json.loads(ended.out)["artifact"]["config"]["scheme"] == "Q8_0"
    assert "importer import" in ended.err


async def test_import_from_a_hub_keeps_the_revision() -> None:
    """The address is taken apart; nothing is uploaded."""
    async with gateway(_import_answers()) as running:
        ended = await running.smelt("import", "hf://team/ore@v1.0", "--name", "ore", "--no-wait")
        (request,) = running.requests["ImporterService.StartImport"]
    assert (request.spec.hub.repository, request.spec.hub.revision) == ("team/ore", "v1.0")
    assert ended.out.strip() == "job-1"


async def test_plan_prints_and_starts_nothing() -> None:
    """Steps and sizes are shown; no job exists afterwards."""
    async with gateway(_import_answers()) as running:
        ended = await running.smelt("import", "hf://team/ore", "--name", "ore", "--plan")
        assert "ImporterService.StartImport" not in running.requests
    assert "1.0 MiB" in ended.out and "probe" in ended.out


async def test_refused_plan_ends_as_the_verb_would() -> None:
    """R-122: a script that asks first must not go on."""
    refused = job_pb2.Plan(refusals=[job_pb2.Refusal(reason="OUT_OF_MEMORY", message="needs 9 GiB of 8")])
    answers = _import_answers() | {
        "ImporterService.PlanImport": lambda request: importer_pb2.PlanImportResponse(plan=refused)
    }
    async with gateway(answers) as running:
        ended = await running.smelt("import", "hf://team/ore", "--name", "ore", "--plan")
    assert ended.code == OutOfMemory.exit_code != 0
    assert "needs 9 GiB of 8" in ended.out and not ended.err


@pytest.mark.parametrize(
    "files,name,code,reason",
    [
        (["pytorch_model.bin", "config.json"], "ore", 2, "UNSAFE_FILE"),
        (["config.json"], "ore", 3, "UNKNOWN_SOURCE"),
        (["model.safetensors"], "Bad Name", 2, "BAD_NAME"),
    ],
)
async def test_source_that_cannot_be_imported_is_refused_before_anything_is_sent(
    tmp_path: Path, files: list[str], name: str, code: int, reason: str
) -> None:
    """Only pickles, no weights, a malformed name. R-030"""
    folder = _model_folder(tmp_path / "ore", *files)
    async with gateway(_import_answers()) as running:
        ended = await running.smelt("import", str(folder), "--name", name)
        assert not running.requests
    assert ended.code == code
    assert reason in ended.err


@pytest.mark.parametrize("name,reason", [("model.safetensors", "BAD_SAFETENSORS"), ("model.gguf", "BAD_GGUF")])
@pytest.mark.parametrize("kept_bytes", [0, 5, -30])
async def test_cut_weights_are_refused_before_anything_is_sent(
    tmp_path: Path, name: str, reason: str, kept_bytes: int
) -> None:
    """The file, what is wrong and what to do, with the exit code for wrong files."""
    path = _model_folder(tmp_path / "ore", "config.json") / name
    if path.suffix == ".gguf":
        values = np.zeros((1, 2), np.float32)
        write_gguf(path, {}, [GgufTensor(name="weight", dtype="F32", shape=(1, 2), blocks=lambda: [values])])
    else:
        _model_folder(tmp_path / "ore", name)
    path.write_bytes(path.read_bytes()[:kept_bytes])
    async with gateway(_import_answers()) as running:
        ended = await running.smelt("import", str(path if path.suffix == ".gguf" else path.parent), "--name", "ore")
        assert not running.requests
    assert ended.code == 2
    for text in (reason, name, "Fetch or copy the file again"):
        assert text in ended.err


@pytest.mark.parametrize(
    ("config", "reason", "says"),
    [
        ("{", "BAD_MODEL_CONFIG", "config.json is no JSON"),
        ("[]", "BAD_MODEL_CONFIG", "nothing was sent"),
        (json.dumps({**tiny_config("llama"), "hidden_size": -1}), "BAD_MODEL_CONFIG", "hidden_size"),
        (json.dumps({"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}), "UNSUPPORTED_ARCHITECTURE", "gpt2"),
    ],
)
async def test_a_model_that_would_be_refused_is_not_sent(tmp_path: Path, config: str, reason: str, says: str) -> None:
    """A download of many gigabytes is not uploaded only to hear that its architecture is unknown."""
    folder = _model_folder(tmp_path / "ore", "config.json", "model.safetensors")
    (folder / "config.json").write_text(config)
    async with gateway(_import_answers()) as running:
        ended = await running.smelt("import", str(folder), "--name", "ore")
        assert not running.requests
    assert ended.code == 2
    assert reason in ended.err and says.lower() in ended.err.lower()


async def test_failed_job_ends_with_1_and_tells_reason_and_job() -> None:
    """The job's own reason and message are printed, and where to look next."""
    failure = job_pb2.Failure(reason="PROBE_FAILED", message="no prompt ended by a stop token; check the template")
    answers = {
        "ImporterService.StartQuantize": lambda request: importer_pb2.StartQuantizeResponse(job=job("QUEUED")),
        "JobService.WatchJob": watched(job("FAILED", error=failure)),
    }
    async with gateway(answers) as running:
        ended = await running.smelt("quantize", "ore-11m", "--scheme", "q8_0")
        (request,) = running.requests["ImporterService.StartQuantize"]
    assert ended.code == 1
    for text in ("PROBE_FAILED", "check the template", "smelt jobs trace job-1"):
        assert text in ended.err
    assert (request.spec.name, request.spec.scheme) == ("ore-11m:q8_0", "Q8_0")


async def test_interrupted_command_leaves_the_job_and_says_how_to_cancel() -> None:
    """Ctrl-C ends the command with 130; nothing is cancelled."""
    answers = _import_answers() | {"JobService.WatchJob": watched(job("RUNNING"), None)}  # type: ignore[arg-type]
    answers["JobService.WatchJob"] = lambda request: [job_pb2.WatchJobResponse(job=job("RUNNING")), None]
    async with gateway(answers) as running:
        process = await running.start("import", "hf://team/ore", "--name", "ore")
        assert process.stderr is not None
        async with asyncio.timeout(30):
            while b"running" not in await process.stderr.readline():
                pass
        process.send_signal(signal.SIGINT)
        _, err = await asyncio.wait_for(process.communicate(), 30)
        assert "JobService.CancelJob" not in running.requests
    assert process.returncode == 130
    assert b"smelt jobs cancel job-1" in err
    assert b"Traceback" not in err


async def test_job_is_polled_where_watching_is_cut_off() -> None:
    """A proxy that ends streams does not hide the result."""
    answers = _import_answers() | {
        "JobService.WatchJob": raising(ServiceUnavailable("cut off")),
        "JobService.GetJob": lambda request: job_pb2.GetJobResponse(job=DONE),
    }
    async with gateway(answers) as running:
        ended = await running.smelt("import", "hf://team/ore", "--name", "ore")
    assert ended.code == 0, ended.err
    assert "Q8_0" in ended.out


async def test_short_digests_are_asked_for_whole() -> None:
    """What a table shows can be typed; services are sent the whole digest. Names are not looked up before."""
    answers = _import_answers() | {
        "ImporterService.Inspect": lambda request: importer_pb2.InspectResponse(),
        "ImporterService.StartQuantize": lambda request: importer_pb2.StartQuantizeResponse(job=job("QUEUED")),
    }
    async with gateway(answers) as running:
        await running.smelt("inspect", DIGEST[7:19])
        await running.smelt("inspect", "ore-11m")
        quantized = await running.smelt("quantize", DIGEST[:19], "--scheme", "Q8_0")
        asked = [request.reference for request in running.requests["ArtifactService.GetArtifact"]]
        assert [request.bundle for request in running.requests["ImporterService.Inspect"]] == [DIGEST, "ore-11m"]
    assert asked == [DIGEST[7:19], DIGEST[:19]]
    assert quantized.code == 2 and "add --name NAME" in quantized.err


async def test_amount_that_nobody_forecast_is_none() -> None:
    """R-122: not 0, which would be a forecast."""
    async with gateway(_import_answers()) as running:
        ended = await running.smelt("import", "hf://team/ore", "--name", "ore", "--plan", "--json")
    document = json.loads(ended.out)
    assert (document["write_bytes"], document["time_s"], document["memory_bytes"]) == (1 << 20, None, None)


async def test_cached_result_says_so() -> None:
    """A job that did nothing is not mistaken for work."""
    answers = _import_answers() | {
        "JobService.WatchJob": watched(job("SUCCEEDED", result_digest=DIGEST, is_cached=True))
    }
    async with gateway(answers) as running:
        ended = await running.smelt("import", "hf://team/ore", "--name", "ore")
    assert "cached" in ended.err
