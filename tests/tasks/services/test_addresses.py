import pytest

from tasks.services.addresses import without_credentials


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://anna:s3cret@host:5000/health", "https://host:5000/health"),
        ("at 'http://token@host' (https://anna:p@ss@host)", "at 'http://host' (https://host)"),
        ("Failed to parse: https://anna:se/cr#et@host/api", "Failed to parse: https://host/api"),
        ("postgresql://anna:s3cret@host/mlflow", "postgresql://host/mlflow"),
        (
            "http://127.0.0.1:5000/users?name=anna@host",
            "http://127.0.0.1:5000/users?name=anna@host",
        ),
        ("https://host/@anna or s3://bucket/a@b", "https://host/@anna or s3://bucket/a@b"),
        ("mail to anna@host", "mail to anna@host"),
    ],
)
def test_an_address_is_shown_without_user_and_password(text: str, shown: str) -> None:
    assert without_credentials(text) == shown
