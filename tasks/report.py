"""Reports of a run: a page in the Prefect UI, links, and a summary in the store."""

import json
import tempfile
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from prefect import runtime
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.orchestration import get_client
from prefect.exceptions import ObjectNotFound
from prefect.utilities.urls import url_for

from mnist_cnn.evaluation import Evaluation
from mnist_cnn.promotion import Decision, Verdict
from tasks import keys
from tasks.records import (
    Candidate,
    ModelVersion,
    RejectedSnapshot,
    RunSummary,
    Snapshot,
    ValidatedSnapshot,
)
from tasks.services.markdown import render
from tasks.services.mlflow import client, page, registry_errors, run_page
from tasks.services.s3 import LINK_LIFE, Store
from tasks.services.step import step

_STATE_NAMES: dict[Verdict, str] = {
    "promote": "Promoted",
    "keep": "Champion kept",
    "needs-approval": "Awaiting approval",
}


@step
def report_rejection(rejected: RejectedSnapshot) -> RunSummary:
    """Publish the failed expectations of rejected data."""
    snapshot = rejected.snapshot
    links, note = _data_links(snapshot, rejected.report)
    summary = RunSummary(
        flow_run=str(runtime.flow_run.id),
        verdict="Data rejected",
        reason="; ".join(rejected.failures),
        dataset=snapshot.dataset,
        links=links,
    )
    failures = "\n".join(f"- {failure}" for failure in rejected.failures)
    _publish(summary, snapshot, f"Nothing was trained. What the data failed:\n\n{failures}", note)
    return summary


@step
def report_skip(
    validated: ValidatedSnapshot, champion: ModelVersion | None, reason: str
) -> RunSummary:
    """Publish the reason for training nothing."""
    snapshot = validated.snapshot
    present = champion.model if champion else None
    links, note = _data_links(snapshot, validated.report)
    summary = RunSummary(
        flow_run=str(runtime.flow_run.id),
        verdict="Skipped",
        reason=reason,
        dataset=snapshot.dataset,
        champion_before=present,
        champion=present,
        links=links,
    )
    body = f"Nothing was trained. The parameter `force` trains all the same.\n\n{note}"
    _publish(summary, snapshot, reason, body)
    return summary


@step
@registry_errors("the records in the MLflow run")
def report_decision(
    validated: ValidatedSnapshot,
    candidate: Candidate,
    measured: Mapping[str, Evaluation],
    decided: tuple[Decision, str],
    versions: tuple[ModelVersion, ModelVersion | None],
    cards: Mapping[str, str],
) -> RunSummary:
    """Publish verdict, checks and links.

    `measured` holds "candidate" and, if there was one, "champion"; `decided` is a decision and the
    address of its record; `versions` are the candidate and the champion before this run; `cards`
    are links by name.
    """
    snapshot = validated.snapshot
    store = Store(snapshot.store)
    decision, record = decided
    version, old_champion = versions
    ours = measured["candidate"]
    theirs = measured.get("champion")
    champion = version if decision.verdict == "promote" else old_champion
    form = _approval_form(version, snapshot.store) if decision.verdict == "needs-approval" else {}
    summary = RunSummary(
        flow_run=str(runtime.flow_run.id),
        verdict=_STATE_NAMES[decision.verdict],
        reason=decision.reason,
        dataset=snapshot.dataset,
        accuracy=ours.accuracy,
        champion_accuracy=theirs.accuracy if theirs else None,
        version=version.model,
        champion_before=old_champion.model if old_champion else None,
        champion=champion.model if champion else None,
        links={
            **form,
            "Prefect run": str(runtime.flow_run.ui_url),
            **_mlflow_links(candidate, version),
            **cards,
            **_keep_records(
                candidate,
                store,
                {
                    "decision record": record,
                    "validation report": validated.report,
                    "snapshot": snapshot.address,
                },
            ),
        },
    )
    checks = [
        {
            "check": check.name,
            "observed": "not measured" if check.observed is None else _figure(check.observed),
            "threshold": _figure(check.threshold),
            "verdict": "passed" if check.passed else "FAILED",
        }
        for check in decision.checks
    ]
    # The table artifact has each check's sentence too, without the name that begins it.
    detailed = [
        row | {"what was seen": check.sentence.removeprefix(f"{check.name}: ")}
        for row, check in zip(checks, decision.checks, strict=True)
    ]
    create_table_artifact(detailed, key="checks", description=f"Checks of {version.model}")
    body = render(
        Path(__file__).with_name("report.md"),
        version=version,
        ours=ours,
        theirs=theirs,
        decision=decision,
        checks=checks,
        warnings=validated.warnings,
    )
    _publish(summary, snapshot, decision.reason, body)
    return summary


def _publish(summary: RunSummary, snapshot: Snapshot, reason: str, body: str) -> None:
    """Publish a summary as a Markdown artifact, and store it as the run's `summary.json`."""
    links = " · ".join(f"[{name}]({address})" for name, address in summary.links.items())
    create_markdown_artifact(
        f"# {summary.verdict}\n\n{reason}\n\n{links}\n\n{body}\n",
        key="report",
        description=f"{summary.verdict}: {snapshot.dataset}",
    )
    name = keys.record(summary.flow_run, "summary")
    Store(snapshot.store).put(name, summary.model_dump_json(indent=1).encode())


def _data_links(snapshot: Snapshot, report: str) -> tuple[dict[str, str], str]:
    """Return links for a run that trained nothing, and a note on their expiry.

    Such a run has no MLflow run to copy the records into, so the links lead into S3 and expire.
    """
    store = Store(snapshot.store)
    kept = {"validation report": report, "snapshot": snapshot.address}
    links = {name: store.link(store.name_of(address)) for name, address in kept.items()}
    addresses = "\n".join(f"- {name}: `{address}`" for name, address in kept.items())
    end = f"{datetime.now(UTC) + LINK_LIFE:%Y-%m-%d %H:%M} UTC"
    note = f"The links above to what lies in S3 work until {end}; it stays at\n\n{addresses}"
    return {"Prefect run": str(runtime.flow_run.ui_url), **links}, note


def _mlflow_links(candidate: Candidate, version: ModelVersion) -> dict[str, str]:
    return {
        "MLflow run": run_page(candidate.run_id),
        "registered version": page(f"#/models/{version.name}/versions/{version.version}"),
    }


def _keep_records(candidate: Candidate, store: Store, records: Mapping[str, str]) -> dict[str, str]:
    """Copy records, given as name and address, into the MLflow run; return links to the copies.

    A link to an object in S3 expires; MLflow shows its artifacts for as long as it has the run.
    """
    links = {}
    run = run_page(candidate.run_id)
    with tempfile.TemporaryDirectory() as folder:
        for name, address in records.items():
            original = store.name_of(address)
            copy = f"{name.replace(' ', '_')}.{original.rpartition('.')[2]}"
            (Path(folder) / copy).write_bytes(store.get(original))
            links[name] = f"{run}/artifacts/records/{copy}"
        client().log_artifacts(candidate.run_id, folder, "records")
    return links


def _approval_form(version: ModelVersion, store: str) -> dict[str, str]:
    """Return the link to the form of promote/manual, filled in for this version."""
    with get_client(sync_client=True) as prefect:
        try:
            form = prefect.read_deployment_by_name("promote/manual").id
        except ObjectNotFound:  # promote/manual is not deployed on this server
            return {}
    # Prefect's form takes its values from the parameter `parameters` of its address, as JSON.
    filled_in = quote(
        json.dumps({"model": version.name, "version": int(version.version), "store": store})
    )
    page_of_form = url_for("deployment", obj_id=form)
    return {"approval form": f"{page_of_form}/run?parameters={filled_in}"}


def _figure(value: float) -> str:
    # Sizes in bytes are whole numbers, which four digits would round.
    return f"{value:,.0f}" if float(value).is_integer() else f"{value:.4g}"
