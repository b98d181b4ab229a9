"""A mistake for each policy: its name, words of the finding, and the edit; of one machine, and of several."""

from __future__ import annotations

from policy_edits import (
    FROM_SECRET,
    STRICT,
    Mistake,
    add_secret,
    ask_for_slices,
    bind_admin,
    container,
    get,
    keep_apart,
    let_sandbox_out,
    live_at,
    match,
    nodes,
    on_the_host,
    open_up,
    pod,
    point,
    queue_as,
    range_in,
    range_of,
    remove,
    rename_who,
    route,
    secrets_of,
    settings,
    spoil_conf,
    spread_of,
)

MISTAKES: list[tuple[str, str, Mistake]] = [
    ("bounds", "memory", lambda d: container(d, "gateway")["resources"]["limits"].pop("memory")),
    ("probes", "no readiness probe", lambda d: container(d, "evaluator").pop("readinessProbe")),
    ("probes", "liveness kills", lambda d: container(d, "importer")["livenessProbe"].update(failureThreshold=1)),
    (
        "grpc-health",
        "port 50051",
        lambda d: container(d, "trainer")["readinessProbe"]["exec"].update(command=["python", "-m", "x", "h:50052"]),
    ),
    ("grpc-health", "port 50051", lambda d: container(d, "trainer").update(readinessProbe={"grpc": {"port": 50051}})),
    ("restricted-pod", "runAsNonRoot", lambda d: pod(d, "importer")["securityContext"].update(runAsNonRoot=False)),
    ("restricted-pod", "hostNetwork", lambda d: pod(d, "inference").update(hostNetwork=True)),
    (
        "restricted-container",
        "root file system",
        lambda d: container(d, "nats", "StatefulSet")["securityContext"].update(readOnlyRootFilesystem=False),
    ),
    (
        "restricted-container",
        "capabilities",
        lambda d: container(d, "sandbox")["securityContext"].update(
            capabilities={"drop": ["ALL"], "add": ["SYS_ADMIN"]}
        ),
    ),
    ("writable-home", "HOME", lambda d: container(d, "inference")["env"][0].update(value="/root")),
    ("identity", "default", lambda d: pod(d, "gateway").pop("serviceAccountName")),
    ("identity", "automountServiceAccountToken", lambda d: pod(d, "sandbox").update(automountServiceAccountToken=True)),
    ("end-of-life", "380", lambda d: settings(d, "inference").update(SMELT_RPC_DRAIN_GRACE_S="130")),
    ("end-of-life", "preStop", lambda d: container(d, "gateway").pop("lifecycle")),
    ("disk-fits", "sizeLimit", lambda d: pod(d, "evaluator")["volumes"][0].update(emptyDir={})),
    (
        "jobs-end",
        "a later wave",
        lambda d: get(d, "Job", "topology")["metadata"]["annotations"].update({"argocd.argoproj.io/sync-wave": "1"}),
    ),
    ("jobs-end", "backoffLimit", lambda d: get(d, "Job", "topology")["spec"].pop("backoffLimit")),
    (
        "default-deny",
        "smelt-sandbox",
        lambda d: d.remove(
            next(
                i
                for i in d
                if i["metadata"]["name"] == "default-deny" and i["metadata"]["namespace"] == "smelt-sandbox"
            )
        ),
    ),
    ("own-network-policy", "trainer", lambda d: remove(d, "NetworkPolicy", "trainer")),
    (
        "reachable",
        "lets gateway in at 50051",
        lambda d: get(d, "NetworkPolicy", "inference")["spec"]["ingress"][0]["from"].pop(0),
    ),
    (
        "reachable",
        "no Service",
        lambda d: settings(d, "importer").update(SMELT_IMPORTER_INFERENCE_ADDRESS="dns:///inferense.smelt.svc:50051"),
    ),
    ("names-resolve", "UDP", lambda d: get(d, "NetworkPolicy", "dns")["spec"]["egress"][0]["ports"].pop(0)),
    ("sandbox-is-closed", "lets something out", let_sandbox_out),
    ("headless", "clusterIP", lambda d: get(d, "Service", "inference")["spec"].pop("clusterIP")),
    ("namespaces", "restricted", lambda d: get(d, "Namespace", "smelt")["metadata"].pop("labels")),
    (
        "settings",
        "did you mean SMELT_INFERENCE_SLOTS",
        lambda d: settings(d, "inference").update(SMELT_INFERENCE_SLOT="4"),
    ),
    (
        "settings",
        "SMELT_EVALUATOR_SANDBOX_ADDRESS must be set",
        lambda d: settings(d, "evaluator").pop("SMELT_EVALUATOR_SANDBOX_ADDRESS"),
    ),
    ("settings", "slots=999", lambda d: settings(d, "sandbox").update(SMELT_SANDBOX_SLOTS="999")),
    ("settings", "HTTP_PROXY", lambda d: container(d, "importer")["env"].append({"name": "HTTP_PROXY", "value": "x"})),
    ("secrets-stay-outside", "Secret rpc", add_secret),
    (
        "secrets-stay-outside",
        "in clear",
        lambda d: settings(d, "gateway").update(SMELT_PLATFORM_NATS_PASSWORD="hunter2"),
    ),
    (
        "secrets-are-files",
        "gateway: SMELT_RPC_TOKEN is a variable",
        lambda d: container(d, "gateway")["env"].append({"name": "SMELT_RPC_TOKEN", "valueFrom": FROM_SECRET}),
    ),
    (
        "secrets-are-files",
        "no Secret is mounted as /etc/smelt/secrets/nats-password",
        lambda d: secrets_of(d, "trainer").pop(1),
    ),
    ("secrets-are-files", "secrets/secret-key", lambda d: secrets_of(d, "evaluator").pop(2)),
    (
        "references",
        "none that a cluster is told to hold",
        lambda d: secrets_of(d, "inference")[0]["secret"].update(name="other"),
    ),
    (
        "external-secrets",
        "rpc/token",
        lambda d: d.remove(
            next(i for i in d if i["kind"] == "ExternalSecret" and i["metadata"]["namespace"] == "smelt-sandbox")
        ),
    ),
    (
        "memory-fits",
        "SMELT_INFERENCE_MEMORY_BYTES",
        lambda d: settings(d, "inference").pop("SMELT_INFERENCE_MEMORY_BYTES"),
    ),
    (
        "memory-fits",
        "SMELT_INFERENCE_THREADS",
        lambda d: container(d, "inference")["resources"]["limits"].update(cpu="8"),
    ),
    ("cache-fits", "exceeds", lambda d: settings(d, "importer").update(SMELT_IMPORTER_CACHE_BYTES=str(1 << 40))),
    ("disruption-budgets", "nats", lambda d: get(d, "PodDisruptionBudget", "nats")["spec"].update(maxUnavailable=0)),
    ("spread", "gateway", lambda d: pod(d, "gateway").pop("topologySpreadConstraints")),
    (
        "one-owner-of-replicas",
        "beside a ScaledObject",
        lambda d: get(d, "Deployment", "inference")["spec"].update(replicas=3),
    ),
    ("gpu-pods", "toleration", lambda d: pod(d, "trainer").pop("tolerations")),
    ("gpu-pods", "present:NoSchedule", lambda d: pod(d, "trainer")["tolerations"][0].update(value="presnt")),
    ("gpu-pods", "affinity", lambda d: pod(d, "trainer").pop("affinity")),
    ("gpu-pods", "must be mig", lambda d: ask_for_slices(container(d, "trainer")["resources"])),
    (
        "gpu-pods",
        "spare GPU",
        lambda d: get(d, "Deployment", "trainer")["spec"]["strategy"]["rollingUpdate"].update(maxSurge=1),
    ),
    (
        "gpu-pods",
        "leave GPUs to the trainer",
        lambda d: [side.update({"nvidia.com/gpu": "1"}) for side in container(d, "inference")["resources"].values()],
    ),
    ("quotas", "pods is 60", lambda d: get(d, "ScaledObject", "inference")["spec"].update(maxReplicaCount=80)),
    ("quotas", "nvidia.com/gpu is 8", lambda d: get(d, "Deployment", "trainer")["spec"].update(replicas=9)),
    ("quotas", "of smelt-sandbox", lambda d: get(d, "Deployment", "sandbox")["spec"].update(replicas=40)),
    ("scalers", "must not fall", lambda d: get(d, "ScaledObject", "inference")["spec"].update(minReplicaCount=9)),
    ("proof", "first container", lambda d: pod(d, "trainer").pop("initContainers")),
    (
        "proof",
        "made on cpu",
        lambda d: pod(d, "trainer")["initContainers"][0]["env"][0].update(value="cpu"),
    ),
    (
        "proof",
        "given the GPUs",
        lambda d: pod(d, "trainer")["initContainers"][0]["resources"]["limits"].pop("nvidia.com/gpu"),
    ),
    (
        "scale-from-zero",
        "keeps 0 pods",
        lambda d: get(d, "ScaledObject", "inference")["spec"].update(minReplicaCount=0),
    ),
    (
        "settings",
        "nothing reads SMELT_TRAINER_SLOTS",
        lambda d: pod(d, "trainer")["initContainers"][0]["env"].append({"name": "SMELT_TRAINER_SLOTS", "value": "1"}),
    ),
    (
        "proof",
        "with a GPU, and only so, it is trainer-cuda",
        lambda d: container(d, "trainer").update(image=container(d, "trainer")["image"].replace("-cuda", "")),
    ),
    ("gpu-nodes-are-kept-free", "gateway", lambda d: pod(d, "gateway").update(tolerations=[{"operator": "Exists"}])),
    ("images", "must be a digest", lambda d: container(d, "gateway").update(image="smelt/gateway:0.1.0")),
    (
        "images",
        "must be a digest",
        lambda d: container(d, "gateway").update(image="smelt/gateway:0.1.0@sha256:" + "1" * 64),
    ),
    ("all-services", "sandbox is missing", lambda d: remove(d, "Deployment", "sandbox")),
    ("nats-cluster", "2 nodes", lambda d: get(d, "StatefulSet", "nats")["spec"].update(replicas=2)),
    (
        "bus-users",
        "meets NATS as gateway",
        lambda d: settings(d, "importer").update(SMELT_PLATFORM_NATS_USER="gateway"),
    ),
    ("bus-names", "KV_smelt_job,", lambda d: spoil_conf(d, "KV_smelt_jobs", "KV_smelt_job")),
    ("bus-names", "may publish facts", lambda d: spoil_conf(d, "smelt.evt.inference.>", "smelt.evt.trainer.>")),
    (
        "series",
        "smelt_inference_queue_dept",
        lambda d: get(d, "ScaledObject", "inference")["spec"]["triggers"][0]["metadata"].update(
            query="sum(smelt_inference_queue_dept)"
        ),
    ),
    ("monitors", "port web", lambda d: get(d, "ServiceMonitor", "smelt")["spec"]["endpoints"][0].update(port="web")),
    (
        "monitors",
        "wants a key",
        lambda d: get(d, "ServiceMonitor", "smelt")["spec"]["endpoints"][0].update(port="http"),
    ),
    ("edge", "in the clear", lambda d: get(d, "Gateway", "edge")["spec"]["listeners"][0].update(protocol="HTTP")),
    ("edge", "opens / of the gateway", lambda d: route(d)["matches"][0]["path"].update(value="/")),
    ("edge", "wants no key", lambda d: settings(d, "gateway").pop("SMELT_HTTP_API_KEYS_FILE")),
    ("edge", "LoadBalancer", lambda d: get(d, "Service", "gateway")["spec"].update(type="LoadBalancer")),
    ("narrow", "opens every port", lambda d: open_up(d, "evaluator", egress={})),
    ("narrow", "means anybody", lambda d: open_up(d, "nats", ingress={"ports": [{"port": 4222}]})),
    ("narrow", "holds the private 10.0.0.0/8", lambda d: open_up(d, "internet", egress=range_of("0.0.0.0/0"))),
    ("narrow", "tell their credentials", lambda d: open_up(d, "gateway", egress=range_of("169.254.169.254/32"))),
    ("narrow", "is of IPv6", lambda d: open_up(d, "gateway", egress=range_of("::/0"))),
    ("narrow", "is anywhere", lambda d: rename_who(d, "internet", "inference")),
    ("object-store", "in the clear", lambda d: settings(d, "platform").update(SMELT_PLATFORM_S3_SECURE="false")),
    (
        "object-store",
        "store's range and port",
        lambda d: settings(d, "platform").update(SMELT_PLATFORM_S3_ENDPOINT="s3.example.com:9000"),
    ),
    ("object-store", "store's range and port", lambda d: remove(d, "NetworkPolicy", "s3-clients")),
    (
        "resolved",
        "ClusterIssuer smelt-servces",
        lambda d: point(d, "Certificate", "trainer", "issuerRef", "smelt-servces"),
    ),
    ("resolved", "ClusterSecretStore smlt", lambda d: point(d, "ExternalSecret", "rpc", "secretStoreRef", "smlt")),
    ("resolved", "Gateway edg,", lambda d: get(d, "HTTPRoute", "gateway")["spec"]["parentRefs"][0].update(name="edg")),
    ("resolved", "no Service gatewy", lambda d: route(d)["backendRefs"][0].update(name="gatewy")),
    ("resolved", "RuntimeClass gvisr", lambda d: pod(d, "sandbox").update(runtimeClassName="gvisr")),
    ("resolved", "LocalQueue smlt", lambda d: queue_as(d, "smlt")),
    ("selectors", "importr", lambda d: rename_who(d, "internet", "importr")),
    ("selectors", "is not its pods' labels", lambda d: match(d, "Deployment", "importer", "importr")),
    ("selectors", "namespace smlt", lambda d: open_up(d, "gateway", egress=range_in("smlt"))),
    ("rights", "remove it", bind_admin),
    ("grpc-health", "liveness", lambda d: live_at(container(d, "trainer"), "127.0.0.1:50052")),
    (
        "probes",
        "monitr",
        lambda d: container(d, "nats", "StatefulSet")["readinessProbe"]["httpGet"].update(port="monitr"),
    ),
    ("identity", "runs as gateway", lambda d: pod(d, "importer").update(serviceAccountName="gateway")),
    ("sandbox-is-closed", "LEVEL is confined", lambda d: settings(d, "sandbox").update(SMELT_SANDBOX_LEVEL="confined")),
    (
        "external-secrets",
        "nobody reads",
        lambda d: get(d, "ExternalSecret", "rpc")["spec"]["data"][0].update(secretKey="x"),
    ),
    ("restricted-pod", "volume cache", lambda d: on_the_host(pod(d, "importer"))),
    ("claims", "is not in this tree", lambda d: remove(d, "PersistentVolumeClaim", "trainer-cache")),
    ("claims", "held by one pod", lambda d: get(d, "Deployment", "trainer")["spec"].update(replicas=2)),
    ("claims", "trainer-cache", lambda d: pod(d, "trainer")["volumes"][1].update(name="cash")),
    ("claims", "max_file 80G", lambda d: spoil_conf(d, "max_file: 8G", "max_file: 80G", "nats.conf")),
    (
        "spread",
        "takes the quorum",
        lambda d: pod(d, "nats", "StatefulSet")["topologySpreadConstraints"][0].pop("minDomains"),
    ),
    (
        "certificates",
        "nobody uses",
        lambda d: get(d, "Certificate", "importer")["spec"].update(secretName="importer-tsl"),
    ),
    (
        "certificates",
        "made by no Certificate",
        lambda d: get(d, "Certificate", "importer")["spec"].update(secretName="importer-tsl"),
    ),
    (
        "certificates",
        "lack importer,",
        lambda d: get(d, "Certificate", "importer")["spec"].update(dnsNames=["importr"]),
    ),
    ("certificates", "lack smelt.example.com", lambda d: get(d, "Certificate", "edge")["spec"].update(dnsNames=["x"])),
    (
        "certificates",
        "less than duration",
        lambda d: get(d, "Certificate", "trainer")["spec"].update(renewBefore="560h"),
    ),
    ("certificates", "2160h for a rollout", lambda d: get(d, "Certificate", "nats")["spec"].update(renewBefore="720h")),
    (
        "schema",
        "startupprobe",
        lambda d: container(d, "gateway").update(startupprobe=container(d, "gateway")["startupProbe"]),
    ),
    (
        "overlay-values",
        "the overlay says SMELT_PLATFORM_S3_ENDPOINT=s3.example.com:443, and s3.other:443 is rendered",
        lambda d: settings(d, "platform").update(SMELT_PLATFORM_S3_ENDPOINT="s3.other:443"),
    ),
    (
        "overlay-values",
        "and nothing is rendered",
        lambda d: settings(d, "sandbox").pop("SMELT_SANDBOX_QUEUE_PER_SLOT"),
    ),
    ("schema", "replicaCount", lambda d: get(d, "ScaledObject", "inference")["spec"].update(replicaCount=2)),
    ("schema", "sleep", lambda d: container(d, "gateway")["lifecycle"]["preStop"].update(sleep={"seconds": "10"})),
]


OF_ONE_NODE: list[tuple[str, str, Mistake]] = [
    ("nodes-suffice", "wants 3 nodes, there is one", lambda d: spread_of(d, "nats").update(minDomains=3, **STRICT)),
    ("nodes-suffice", "3 copies want a node each", lambda d: keep_apart(d, "nats")),
]

OF_MACHINES: list[tuple[str, str, Mistake]] = [
    ("jobs-end", "must be suspended", lambda d: get(d, "CronJob", "training-nodes")["spec"].update(suspend=False)),
    ("training-nodes", "one less than", lambda d: settings(d, "trainer").update(SMELT_TRAINER_NODES="3")),
    ("training-nodes", "nothing brings 1 more", lambda d: remove(d, "CronJob", "training-nodes")),
    ("training-nodes", "image and GPUs", lambda d: nodes(d)["containers"][0].update(image="smelt/trainer:0.1.0")),
    ("training-nodes", "proved first", lambda d: nodes(d).pop("initContainers")),
    ("training-nodes", "ReadWriteMany", lambda d: nodes(d)["volumes"].pop(1)),
    ("training-nodes", "no names", lambda d: nodes(d).pop("subdomain")),
    ("settings", "SMELT_NODE_WAIT_S?", lambda d: nodes(d)["containers"][0]["env"][1].update(name="SMELT_NODE_WAIT")),
    ("reachable", "in at 29400", lambda d: get(d, "NetworkPolicy", "training")["spec"]["ingress"][0]["ports"].pop(0)),
    ("cache-fits", "exceeds", lambda d: settings(d, "trainer").update(SMELT_TRAINER_CACHE_BYTES=str(1 << 40))),
]  # fmt: skip
