import grimp

from deployments.stack import PROJECT
from tasks.registry.fingerprint import digest_code
from tasks.validate import DECIDES


def test_a_verdict_holds_until_code_changes_that_it_depends_on() -> None:
    """Those are the modules that validate a snapshot, and whatever of ours they import."""
    graph = grimp.build_graph("expectations", "mnist_cnn", cache_dir=None)
    entries = {"expectations.image_table", "expectations.validation"}
    imported = entries.union(*map(graph.find_upstream_modules, entries))
    files = {f"{module.replace('.', '/')}.py" for module in imported}
    assert set(DECIDES) == {file for file in files if (PROJECT / file).is_file()}


def test_the_digest_of_files_is_of_these_alone() -> None:
    assert digest_code(*DECIDES) != digest_code("expectations") != digest_code()
