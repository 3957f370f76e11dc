"""Several processes, on one host or many, that run one model together: how they meet, agree and end.

Each process runs the same program with the same arguments. It holds the shards of its own devices, and all take part
in every collective: so they must do the same in the same order. `check_same` refuses arguments that differ before
anything waits for the others; `smallest` and `of_process_0` settle what a process would choose for itself.

JAX's coordination service, in process 0, knows who lives. A process that dies closes its connections: on CPUs (Gloo)
that ends those that wait for it in a collective at once. Where nothing else notices (on GPUs; a host that is gone, a
process that is stopped) it misses its heartbeats, and the service ends the others. A process that fails ends without
waiting for the others, which then end like that.
"""

import contextlib
import functools
import json
import os
import re
import socket
import sys
import threading
import time
import zlib
from collections.abc import Callable
from types import TracebackType
from typing import Any, NoReturn

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from kogpt_jax import runtime
from kogpt_jax.errors import InputError, one_line
from kogpt_jax.packing import power_bucket

# Of `initialize`. Nodes of one job may start minutes after one another, where an image has to be fetched.
START_TIMEOUT_S = 300
# After so long without a heartbeat a process counts as dead. The heartbeats have a thread of their own, which compiling
# and loading do not hold up.
HEARTBEAT_TIMEOUT_S = 20
# What a process that has ended well waits for the others, which may still be writing results.
SHUTDOWN_TIMEOUT_S = 300

# Process 0 serves the others: without it they end at once, before they can say what they have found wrong.
_LAST_WORDS_S = 1.0

_serves_others = False

# An error of JAX's, with its status first, that only the collectives and the service of several processes make.
_LOST = re.compile(r"[A-Z_]+: .*(gloo|nccl|coordination service)", re.IGNORECASE | re.DOTALL)


def initialize(
    coordinator: str = "auto",
    num_processes: int | None = None,
    process_id: int | None = None,
    *,
    start_timeout_s: int = START_TIMEOUT_S,
    heartbeat_timeout_s: int = HEARTBEAT_TIMEOUT_S,
    shutdown_timeout_s: int = SHUTDOWN_TIMEOUT_S,
) -> int:
    """Joins the other processes. Once in a process, before anything that uses JAX's devices.

    From here on an exception that nobody catches ends the process at once, instead of after the others.

    Args:
        coordinator: "HOST:PORT" where process 0 serves the others, who must reach it; "auto": as the environment says,
            ``JAX_COORDINATOR_ADDRESS`` or Slurm.
        num_processes: of the whole job; None: as ``JAX_NUM_PROCESSES``, Open MPI or Slurm says.
        process_id: of this one, from 0; None: as ``JAX_PROCESS_ID``, Open MPI or Slurm says.
        start_timeout_s: after so long without all processes this one ends, with a line on stderr and status 1.
        heartbeat_timeout_s: after so long without a sign of life a process counts as dead, and all others end.
        shutdown_timeout_s: after so long a process that has ended well stops waiting for the others to end.

    Returns:
        The process's id.

    Raises:
        InputError: something is missing, or out of range, or the port is taken on this machine.
    """
    found = runtime.process_variables()
    address = found.coordinator if coordinator == "auto" else coordinator
    if address is None:
        raise InputError("coordinator auto finds neither JAX_COORDINATOR_ADDRESS nor a Slurm step: name HOST:PORT")
    match = re.fullmatch(r".+:(\d{1,5})", address)
    if match is None or not 0 < int(match[1]) < 2**16:
        raise InputError(f"coordinator must be HOST:PORT, got {address!r}")
    num_processes = found.num_processes if num_processes is None else num_processes
    process_id = found.process_id if process_id is None else process_id
    if num_processes is None or process_id is None:
        name = "num_processes" if num_processes is None else "process_id"
        raise InputError(f"{name} is not given, and neither JAX_{name.upper()}, Open MPI nor Slurm says it")
    if num_processes < 1:
        raise InputError(f"num_processes must be at least 1, got {num_processes}")
    if not 0 <= process_id < num_processes:
        raise InputError(f"process_id must be between 0 and {num_processes - 1}, got {process_id}")
    if process_id == 0:
        _check_port(int(match[1]))
    runtime.configure()
    # It would catch SIGTERM and go on; here is no state to save.
    jax.config.update("jax_enable_preemption_service", False)
    where = f"process {process_id} of {num_processes}"
    lonely = threading.Timer(
        start_timeout_s, _end, [f"{where}: not all processes have come to {address} within {start_timeout_s} s"]
    )
    lonely.daemon = True
    lonely.start()
    try:
        jax.distributed.initialize(
            address,
            num_processes,
            process_id,
            cluster_detection_method="deactivate",  # `runtime.process_variables` has looked
            initialization_timeout=start_timeout_s + 30,  # `lonely` says more
            heartbeat_timeout_seconds=heartbeat_timeout_s,
            shutdown_timeout_seconds=shutdown_timeout_s,
        )
    finally:
        lonely.cancel()
    global _serves_others
    _serves_others = process_id == 0
    sys.excepthook = functools.partial(_end_after, sys.excepthook, where)
    return process_id


def fetch(tree: Any) -> Any:
    """Arrays on the host, whole, also where other processes hold parts of them: then all must call this."""
    if not all(array.is_fully_addressable or array.is_fully_replicated for array in jax.tree.leaves(tree)):
        mesh = jax.tree.leaves(tree)[0].sharding.mesh
        tree = _replicator(mesh)(tree)
    return jax.tree.map(np.asarray, tree)


def gather(values: np.ndarray) -> np.ndarray:
    """The values of all processes, [process, ...]. All must call this, with values of one shape and dtype."""
    if jax.process_count() == 1:
        return values[None]
    first_device = {device.process_index: device for device in reversed(jax.devices())}
    mesh = Mesh(np.array([first_device[process] for process in range(jax.process_count())]), "process")
    sharding = NamedSharding(mesh, PartitionSpec("process"))
    return fetch(jax.make_array_from_process_local_data(sharding, values[None]))


def of_process_0(values: np.ndarray) -> np.ndarray:
    """Process 0's values, in all processes."""
    return gather(values)[0]


def smallest(value: float) -> float:
    """The smallest of all processes' values, in f32."""
    return value if jax.process_count() == 1 else float(gather(np.array(value, np.float32)).min())


def check_same(what: str, content: object) -> None:
    """That all processes have the same, as ``repr`` shows it.

    Raises:
        InputError: in all of them, where one has another.
    """
    if jax.process_count() == 1:
        return
    digests = gather(np.array(zlib.crc32(repr(content).encode("utf-8", "surrogatepass")), np.uint32))
    others = np.flatnonzero(digests != digests[0])
    if others.size:
        raise InputError(f"process {others[0]} was given other {what} than process 0: all must be given the same")


def made_by_process_0(make: Callable[[], Any]) -> Any:
    """What ``make`` returns in process 0, in all processes; it must be what JSON can hold.

    Raises:
        InputError: in all processes, where ``make`` raises one.
    """
    encoded = b""
    if jax.process_index() == 0:
        try:
            content = {"value": make()}
        except InputError as error:
            content = {"error": str(error)}
        encoded = json.dumps(content).encode("ascii")
    size = int(of_process_0(np.array(len(encoded), np.int32)))
    padded = np.zeros(power_bucket(size, 1024), np.uint8)
    padded[: len(encoded)] = np.frombuffer(encoded, np.uint8)
    content = json.loads(of_process_0(padded)[:size].tobytes())
    if "error" in content:
        raise InputError(content["error"])
    return content["value"]


def leave(status: int) -> NoReturn:
    """Ends a process that has failed: the usual end would wait for the others, and they for this one."""
    if _serves_others:
        time.sleep(_LAST_WORDS_S)
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with contextlib.suppress(OSError, ValueError):  # a full disk, a closed stream
                stream.flush()
    os._exit(status)


def _end(line: str) -> NoReturn:
    if sys.stderr is not None:
        sys.stderr.write(f"kogpt: error: {line}\n")
    leave(1)


def _end_after(
    hook: Callable[..., Any],
    where: str,
    kind: type[BaseException],
    error: BaseException,
    traceback: TracebackType | None,
) -> None:
    """An excepthook; where another process is to blame, a traceback would tell nothing."""
    if _LOST.match(str(error)):
        _end(f"{where}: another process has ended or cannot be reached: {one_line(error)}")
    hook(kind, error, traceback)
    leave(130 if kind is KeyboardInterrupt else 1)


def _check_port(port: int) -> None:
    """JAX's service crashes where it cannot listen."""
    try:
        socket.create_server(("", port)).close()
    except OSError as error:
        raise InputError(f"coordinator port {port} cannot be used on this machine: {error.strerror}") from error


@functools.cache
def _replicator(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda tree: tree, out_shardings=NamedSharding(mesh, PartitionSpec()))
