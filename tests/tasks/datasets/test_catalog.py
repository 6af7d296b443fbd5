import pytest

from mnist_cnn.evaluation.corruptions import CORRUPTIONS, condition
from tasks.datasets.catalog import KNOWN, entry_of


@pytest.mark.parametrize("dataset", KNOWN)
def test_every_condition_that_a_policy_names_is_measured(dataset: str) -> None:
    measured = {condition(c, strength) for c in CORRUPTIONS for strength in c.strengths}
    policy = KNOWN[dataset].policy
    assert policy
    assert set(policy.factor_floors) <= measured


def test_a_data_set_of_one_s_own_has_no_policy_and_its_archives_in_the_store() -> None:
    own = entry_of("fashion")
    assert own.policy is None
    assert own.fetch is None
    assert (own.licence, own.hub_id) == ("other", "fashion")
    assert own.origin == "archives under datasets/fashion/base/"
