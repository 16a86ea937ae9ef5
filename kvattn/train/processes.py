"""Several processes as one run: who joins whom, before any device is asked for."""

import os

import jax

from kvattn.errors import UserError


def join_processes() -> None:
    """Joins the other processes of a run: JAX_COORDINATOR_ADDRESS (with JAX_NUM_PROCESSES and JAX_PROCESS_ID
    where jax cannot find them out, as it can under Slurm and MPI), a TPU slice of several hosts on GKE, or, with
    KVATTN_DISTRIBUTED=1, whatever jax finds by itself: Cloud TPU VMs (whose environment does not tell), Slurm, MPI.

    Raises UserError for numbers that are none, and where KVATTN_DISTRIBUTED=1 finds nothing to join.
    """
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "").split(",")
    asked = os.environ.get("KVATTN_DISTRIBUTED", "") == "1"
    if not asked and "JAX_COORDINATOR_ADDRESS" not in os.environ and len(hosts) < 2:
        return
    if jax.distributed.is_initialized():
        return
    numbers = {"num_processes": "JAX_NUM_PROCESSES", "process_id": "JAX_PROCESS_ID"}
    try:
        given = {name: int(os.environ[key]) for name, key in numbers.items() if key in os.environ}
    except ValueError as error:
        raise UserError(f"JAX_NUM_PROCESSES and JAX_PROCESS_ID take whole numbers ({error}).") from error
    try:
        jax.distributed.initialize(**given)
    except ValueError as error:
        raise UserError(f"jax cannot join the other processes ({error}); set JAX_COORDINATOR_ADDRESS.") from error
