"""Every error Smelt raises on purpose: one tree, one table of codes.

A leaf says *what* went wrong by its reason; its family (`smeltkit.error_families`) says what a caller can do about it.
Borders translate once: `smeltkit.rpc.status` for gRPC, `gateway.http.errors` for HTTP, `gateway.cli.output` for exit
codes.

Raise a leaf with the offending value, the allowed range and the remedy in its message. A new leaf needs a line in
`contracts/interface/reasons.yaml`; a test holds the two together.
"""

from __future__ import annotations

from smeltkit.error_families import Conflict as Conflict
from smeltkit.error_families import DataLoss as DataLoss
from smeltkit.error_families import DeadlineExceeded as DeadlineExceeded
from smeltkit.error_families import Denied as Denied
from smeltkit.error_families import Exhausted as Exhausted
from smeltkit.error_families import Internal as Internal
from smeltkit.error_families import InvalidInput as InvalidInput
from smeltkit.error_families import NotFound as NotFound
from smeltkit.error_families import Refused as Refused
from smeltkit.error_families import SmeltError as SmeltError
from smeltkit.error_families import Unauthenticated as Unauthenticated
from smeltkit.error_families import Unavailable as Unavailable
from smeltkit.error_families import Unimplemented as Unimplemented
from smeltkit.error_families import all_errors as all_errors

# --- requests and settings ------------------------------------------------------------------------------------------


class BadRequest(InvalidInput):
    """A field of a request is missing or out of its range."""


class BadConfig(InvalidInput):
    """A setting is unknown, unread, malformed or out of its range."""


class BadSampling(InvalidInput):
    """A sampling value lies outside its range."""


class DeadlineRequired(InvalidInput):
    """The call came without a deadline; every call needs one."""


class BadDigest(InvalidInput):
    """A digest is not of the form sha256:<64 hex digits>."""


class BadName(InvalidInput):
    """A catalogue name is malformed."""


class AmbiguousReference(InvalidInput):
    """More than one artifact has a digest that begins like this."""


class PromptTooLong(InvalidInput):
    """Prompt and requested tokens do not fit into the model's context."""


class UnsupportedOption(InvalidInput):
    """The option has no effect here, so it is refused instead of being ignored."""


class BadCode(InvalidInput):
    """The program, tests or limits given to the sandbox break its bounds."""


# --- files from outside ---------------------------------------------------------------------------------------------


class BadFile(InvalidInput):
    """A foreign file is malformed; the message names the file and what is wrong in it."""


class BadSafetensors(BadFile):
    """A safetensors file is truncated, or its header breaks the format."""


class BadGguf(BadFile):
    """A GGUF file is truncated, or its metadata breaks the format."""


class BadTokenizer(BadFile):
    """The tokenizer file is missing, malformed or does not fit the model."""


class BadTemplate(BadFile):
    """The chat template is missing or does not render."""


class BadModelConfig(BadFile):
    """The model's config.json is missing, malformed or contradicts the weights."""


class UnsupportedArchitecture(InvalidInput):
    """The model's architecture is not one that this release knows."""


class TensorMismatch(BadFile):
    """Tensors are missing, extra, or have another shape than the architecture declares."""


class BadCertificate(BadFile):
    """A certificate is missing, expired, not issued by our authority, or that of another service."""


class UnsafeFile(BadFile):
    """Pickle, remote code or a path outside its folder: refused."""


class BadSuite(BadFile):
    """A benchmark suite or its data is malformed or has another digest than the suite declares."""


class BadSchedule(InvalidInput):
    """Steps, warm-up, horizon and tokens of a training plan do not fit together."""


class TooFewTokens(InvalidInput):
    """The text has fewer tokens than a perplexity must rest on."""


class BadGate(InvalidInput):
    """A gate has no clause, too many, or one that cannot be read."""


class BadDataset(BadFile):
    """A row of training data is malformed, too long, or holds nothing to learn."""


class BadManifest(BadFile):
    """An artifact manifest is malformed."""


class BundleIncomplete(InvalidInput):
    """A bundle lacks one of its parts and cannot be stored."""


class UnsupportedQuantization(InvalidInput):
    """This scheme cannot be made from this bundle."""


# --- things not found, and conflicts --------------------------------------------------------------------------------


class UnknownModel(NotFound):
    """No model of this name or digest is in the catalogue."""


class UnknownArtifact(NotFound):
    """No artifact of this digest or name is stored."""


class UnknownBlob(NotFound):
    """No blob of this digest is stored."""


class UnknownJob(NotFound):
    """No job of this id."""


class UnknownSuite(NotFound):
    """No benchmark suite of this name."""


class UnknownSource(NotFound):
    """The path or repository to import from does not exist."""


class UnknownRoute(NotFound):
    """The HTTP edge offers nothing at this address, or not by this method."""


class RequestIdReused(Conflict):
    """The same request id came with another request."""


class RevisionConflict(Conflict):
    """The entry changed since it was read."""


class LeaseLost(Conflict):
    """The lease of this work is held by somebody else now; its effects are refused."""


class FileChanged(Conflict):
    """A file changed while it was being stored; nothing was stored of it."""


class GpuBusy(Conflict):
    """The GPUs that the work needs are leased to others, or in use."""


class NotEmpty(Conflict):
    """The place for a backup, or the platform to restore into, holds something already."""


class PortTaken(Conflict):
    """Another process listens on the port."""


# --- refusals and access ---------------------------------------------------------------------------------------------


class IllegalTransition(Refused):
    """The job's present state does not allow the change."""


class QuantizationMismatch(Refused):
    """The stored tensor types or the stored size are not what was requested and forecast."""


class ProbeFailed(Refused):
    """The bundle does not generate what it must."""


class ReferenceRateTooLow(Refused):
    """Reference solutions pass less often than the suite records; scores would mean nothing."""


class SettingsDiffer(Refused):
    """What was used is not what was requested, so the result would be that of something else."""


class SamplesNotDistinct(Refused):
    """Samples of one problem repeat each other, so their number says nothing."""


class ReportMismatch(Refused):
    """Two reports cannot be compared, or a report's scores are not those of its records."""


class ModelReloaded(Refused):
    """The model was loaded again and again during one evaluation, so most of its time is not measured work."""


class AbsurdPerplexity(Refused):
    """The perplexity is that of guessing: the weights or the tokenizer are not the model's."""


class ScoreWithheld(Refused):
    """Infrastructure errors are left among the verdicts, so no score is given."""


class GateFailed(Refused):
    """A gate is not met."""


class IsolationTooWeak(Refused):
    """The sandbox cannot reach the configured isolation level on this host."""


class OutOfMemory(Refused):
    """The work does not fit into the memory it may use."""


class DeviceUnfit(Refused):
    """The device of this node does not compute what work there needs."""


class TrainingDiverged(Refused):
    """Loss or gradients are not finite, exactly zero or stuck; nothing was saved of it."""


class DeadGradient(Refused):
    """A trainable tensor gets no gradient, or a frozen one moved."""


class JobFailed(Refused):
    """The job ended without a result; the message carries its own reason."""


class JobCancelled(Refused):
    """The job was cancelled."""


class WorkerLost(Refused):
    """The job's workers died as often as its attempts allow."""


class NoWorker(Refused):
    """No live worker took the job within its time in the queue."""


class StoreDenied(Denied):
    """The object store refuses these credentials."""


class CallerDenied(Denied):
    """The certificate of the caller is that of a service which may not make this call."""


class KeyDenied(Denied):
    """The API key is known, but it may not be used for this."""


class NameTaken(Denied):
    """The name is not the tenant's, who may move only names that are new or that it gave itself."""


class HubDenied(Denied):
    """The model hub refuses access to this repository."""


class BadApiKey(Unauthenticated):
    """The API key is missing or unknown."""


class BadToken(Unauthenticated):
    """The call between services came without the token that the service requires."""


# --- try later ------------------------------------------------------------------------------------------------------


class TooManyRequests(Exhausted):
    """The queue of this service is full."""


class QuotaUsedUp(Exhausted):
    """What the tenant of this API key may use in a window of time, of tokens, bytes or GPU seconds, is used up."""


class DiskFull(Exhausted):
    """No space is left for the file to be written."""


class StackDown(Unavailable):
    """The local platform does not run."""


class BusUnavailable(Unavailable):
    """NATS does not answer."""


class StoreUnavailable(Unavailable):
    """The object store does not answer."""


class ServiceUnavailable(Unavailable):
    """A Smelt service does not answer."""


class DataUnavailable(Unavailable):
    """The published address of a data set does not answer."""


class HubUnavailable(Unavailable):
    """The model hub does not answer, or limits the rate."""


class EngineUnavailable(Unavailable):
    """The inference engine died or cannot start."""


class NoReplica(Unavailable):
    """No replica of the inference service takes requests."""


class ProcessLost(Unavailable):
    """A process of a training was killed; the job goes on from its last checkpoint."""


class Draining(Unavailable):
    """The service is shutting down and takes nothing new."""


# --- time, bytes, ourselves -----------------------------------------------------------------------------------------


class Timeout(DeadlineExceeded):
    """A bounded wait ended without the thing waited for."""


class CorruptRecord(DataLoss):
    """A stored record does not parse, or is not the record of its key."""


class DigestMismatch(DataLoss):
    """Bytes read do not have the digest they are stored under."""


class NotBuilt(Unimplemented):
    """The verb is declared but not built in this release."""


class InternalError(Internal):
    """An unexpected exception; see the log of the named service for the correlation id."""
