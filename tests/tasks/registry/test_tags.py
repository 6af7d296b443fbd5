from tasks.registry.tags import VersionTags, missing_tags

STORED = {
    "snapshot": "c0c1",
    "verdict": "keep",
    "reason": "a loss in one digit",
    "compared_with": "models:/mnist-cnn/1",
    "accuracy": "0.9956",
    "artifact_sha256": "a1b2",
    "git_commit": "fd296c5-dirty",
    "prefect.flow_run_id": "6f1b3c52-7c1e-4a0e-9d0a-2f6f0d9c7a11",
    "parameters": '{"dataset": "mnist"}',
    "fingerprint": '{"format":1,"snapshot":"c0c1","code":"a","parameters":"b","environment":"c"}',
    "decision_record": "s3://retraining/datasets/mnist/decisions/x.json",
}


def test_tags_are_written_as_they_were_read_the_record_last() -> None:
    tags = VersionTags.from_mlflow(STORED)
    assert tags
    assert tags.accuracy == 0.9956
    assert tags.to_mlflow() == STORED
    assert list(tags.to_mlflow())[-1] == "decision_record"


def test_tags_of_others_are_left_alone_and_old_versions_need_no_more_than_their_judgement() -> None:
    needed = ("snapshot", "verdict", "compared_with", "accuracy", "artifact_sha256")
    tags = VersionTags.from_mlflow({key: STORED[key] for key in needed} | {"team": "ours"})
    assert tags
    assert tags.reason == "no reason given"


def test_a_half_registered_version_has_none() -> None:
    half = {key: STORED[key] for key in ("snapshot", "verdict", "compared_with", "accuracy")}
    assert VersionTags.from_mlflow(half) is None
    assert missing_tags(half) == ["artifact_sha256"]
    assert VersionTags.from_mlflow({}) is None
