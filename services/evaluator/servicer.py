"""Calls to verbs and back: nothing is decided here."""

from __future__ import annotations

from smelt.evaluator.v1 import evaluator_pb2 as pb
from smelt.evaluator.v1 import evaluator_pb2_grpc

from services.evaluator.messages import to_comparison, to_gate, to_report, to_samples, to_suite, to_text
from services.evaluator.suites import suites
from services.evaluator.texts import texts
from services.evaluator.verbs import Evaluator
from smeltkit.jobs.plan import to_plan
from smeltkit.rpc.context import RpcContext


class EvaluatorServicer(evaluator_pb2_grpc.EvaluatorServiceServicer):
    """Serves the verbs of `evaluator`; see evaluator.proto for what each call promises."""

    def __init__(self, evaluator: Evaluator) -> None:
        self._evaluator = evaluator

    async def ListSuites(self, request: pb.ListSuitesRequest, context: RpcContext) -> pb.ListSuitesResponse:
        return pb.ListSuitesResponse(suites=[*map(to_suite, suites().values()), *map(to_text, texts().values())])

    async def PlanEvaluation(self, request: pb.PlanEvaluationRequest, context: RpcContext) -> pb.PlanEvaluationResponse:
        return pb.PlanEvaluationResponse(plan=to_plan(await self._evaluator.plan_evaluation(request.spec)))

    async def StartEvaluation(
        self, request: pb.StartEvaluationRequest, context: RpcContext
    ) -> pb.StartEvaluationResponse:
        job = await self._evaluator.start_evaluation(request.spec, request.request_id)
        return pb.StartEvaluationResponse(job=job)

    async def StartJudgement(self, request: pb.StartJudgementRequest, context: RpcContext) -> pb.StartJudgementResponse:
        job = await self._evaluator.start_judgement(request.spec, request.request_id)
        return pb.StartJudgementResponse(job=job)

    async def StartReferenceCheck(
        self, request: pb.StartReferenceCheckRequest, context: RpcContext
    ) -> pb.StartReferenceCheckResponse:
        job = await self._evaluator.start_references(request.spec, request.request_id)
        return pb.StartReferenceCheckResponse(job=job)

    async def GetReport(self, request: pb.GetReportRequest, context: RpcContext) -> pb.GetReportResponse:
        report = await self._evaluator.report(request.digest)
        samples = to_samples(report) if request.with_samples else []
        return pb.GetReportResponse(report=to_report(report), samples=samples)

    async def Compare(self, request: pb.CompareRequest, context: RpcContext) -> pb.CompareResponse:
        return to_comparison(await self._evaluator.compare(request.baseline, request.candidate))

    async def CheckGate(self, request: pb.CheckGateRequest, context: RpcContext) -> pb.CheckGateResponse:
        return to_gate(await self._evaluator.check_gate(request.bundle_digest, request.reports, request.clauses))
