"""Tell people what a run did: where they look, and in words."""

from prefect import runtime, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact

from mnist_cnn.evaluation import Evaluation
from mnist_cnn.promotion import Decision
from tasks.records import (
    Candidate,
    ModelVersion,
    RejectedSnapshot,
    RunSummary,
    Snapshot,
    ValidatedSnapshot,
)
from tasks.storage import Store, worth_another_try


@task(retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=worth_another_try)
def record_decision(decision: Decision, snapshot: Snapshot) -> str:
    """Keep the decision with every check in S3 and return its address."""
    name = f"runs/{runtime.flow_run.id}/decision.json"
    return Store(snapshot.store).put(name, decision.model_dump_json(indent=1).encode())


@task(retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=worth_another_try)
def report_rejection(rejected: RejectedSnapshot) -> RunSummary:
    """Publish why the data was refused."""
    snapshot = rejected.snapshot
    summary = RunSummary(
        flow_run=str(runtime.flow_run.id),
        verdict="Data rejected",
        reason="; ".join(rejected.failures),
        dataset=snapshot.dataset,
        links=_data_links(snapshot, rejected.report),
    )
    failures = "\n".join(f"- {failure}" for failure in rejected.failures)
    _publish(summary, snapshot, f"Nothing was trained. What the data failed:\n\n{failures}")
    return summary


@task(retries=2, retry_delay_seconds=[2, 10], retry_condition_fn=worth_another_try)
def report_decision(
    validated: ValidatedSnapshot,
    candidate: Candidate,
    evaluations: tuple[Evaluation, Evaluation | None],
    decision: Decision,
    versions: tuple[ModelVersion, ModelVersion | None],
) -> RunSummary:
    """Publish verdict, checks and links; the pairs are (candidate, champion before the run)."""
    snapshot = validated.snapshot
    measured, champion_measured = evaluations
    version, old_champion = versions
    champion = version if decision.verdict == "promote" else old_champion
    summary = RunSummary(
        flow_run=str(runtime.flow_run.id),
        verdict="Promoted" if decision.verdict == "promote" else "Champion kept",
        reason=decision.reason,
        dataset=snapshot.dataset,
        accuracy=measured.accuracy,
        champion_accuracy=champion_measured.accuracy if champion_measured else None,
        version=version.model,
        champion_before=old_champion.model if old_champion else None,
        champion=champion.model if champion else None,
        links={
            **_data_links(snapshot, validated.report),
            **_mlflow_links(candidate, version),
            "decision record": Store(snapshot.store).link(
                f"runs/{runtime.flow_run.id}/decision.json"
            ),
        },
    )
    checks = [
        {
            "check": check.name,
            "observed": f"{check.observed:.4f}",
            "threshold": f"{check.threshold:.4f}",
            "verdict": "passed" if check.passed else "FAILED",
        }
        for check in decision.checks
    ]
    create_table_artifact(checks, key="checks", description=f"Checks of {version.model}")
    compared = (
        f"Champion before this run, on the same images: accuracy {champion_measured.accuracy:.2%}."
        if champion_measured
        else "There was no champion before this run."
    )
    body = [
        (
            f"Candidate {version.model}: accuracy {measured.accuracy:.2%}, "
            f"loss {measured.loss:.4f}, macro F1 {measured.macro_f1:.4f} "
            f"on {measured.images:,} test images."
        ),
        compared,
        _table(checks),
        _per_class(measured, champion_measured),
        "\n".join(f"- warning: {warning}" for warning in validated.warnings),
    ]
    _publish(summary, snapshot, "\n\n".join(body))
    return summary


def _publish(summary: RunSummary, snapshot: Snapshot, body: str) -> None:
    links = "\n".join(f"- [{name}]({address})" for name, address in summary.links.items())
    create_markdown_artifact(
        f"# {summary.verdict}\n\n{summary.reason}\n\n{body}\n\n## Links\n\n{links}\n",
        key="report",
        description=f"{summary.verdict}: {snapshot.dataset}",
    )
    name = f"runs/{summary.flow_run}/summary.json"
    Store(snapshot.store).put(name, summary.model_dump_json(indent=1).encode())


def _data_links(snapshot: Snapshot, report: str) -> dict[str, str]:
    store = Store(snapshot.store)
    return {
        "Prefect run": str(runtime.flow_run.ui_url),
        "validation report": store.link(store.name_of(report)),
        "snapshot": store.link(store.name_of(snapshot.address)),
    }


def _mlflow_links(candidate: Candidate, version: ModelVersion) -> dict[str, str]:
    import mlflow  # noqa: PLC0415 - 2 s to import

    server = mlflow.get_tracking_uri().rstrip("/")
    experiment = mlflow.get_run(candidate.run_id).info.experiment_id
    return {
        "MLflow run": f"{server}/#/experiments/{experiment}/runs/{candidate.run_id}",
        "registered version": f"{server}/#/models/{version.name}/versions/{version.version}",
    }


def _per_class(candidate: Evaluation, champion: Evaluation | None) -> str:
    rows = [
        {
            "digit": str(ours.digit),
            "images": str(ours.support),
            "recall": f"{ours.recall:.4f}",
            "precision": f"{ours.precision:.4f}",
            **(
                {"champion's recall": f"{champion.classes[ours.digit].recall:.4f}"}
                if champion
                else {}
            ),
        }
        for ours in candidate.classes
    ]
    return _table(rows)


def _table(rows: list[dict[str, str]]) -> str:
    header, lines = list(rows[0]), [list(row.values()) for row in rows]
    return "\n".join(
        f"| {' | '.join(cells)} |" for cells in [header, ["---"] * len(header), *lines]
    )
