"""Flows, one file each. The process of a flow run imports this package before all else of ours."""

import os

from tasks.runs.output import outlive_the_reader

# Prefect sets the variable in a process that a worker started, and which may outlive the worker.
if "PREFECT__FLOW_RUN_ID" in os.environ:
    outlive_the_reader()
