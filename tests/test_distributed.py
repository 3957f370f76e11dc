"""Several processes on this machine, over Gloo: the text of one process, arguments that differ, deaths.

Whatever happens, every process ends within a time that is known here, and is killed if not.
"""

import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import threading
import time
from typing import IO, Any

import pytest
import safetensors.numpy
import tolerances
from hash_weights import write_checkpoint
from small_model import CONFIG, write_byte_tokenizer

import kogpt_jax
from kogpt_jax import KoGPT, SamplingParams, distributed, runtime
from kogpt_jax.errors import InputError

_ROOT = pathlib.Path(kogpt_jax.__file__).parents[1]
_END_S = 30.0  # after a death all others have ended
_RUN_S = 150.0  # of what takes 15 s on two idle cores
# Heads for two tensor shards, a layer for each of three stages.
_WIDE = dataclasses.replace(CONFIG, model_dim=64, num_heads=8, ffn_dim=96, num_layers=3, eos_token_ids=())
_NEW_TOKENS = 9  # of prefill and a chunk
_ROWS: list[dict[str, Any]] = [
    {"prompt": "이 영화는", "temperature": 0.9, "seed": 3},
    {"prompt": "a"},
    {"prompt": "한 번 더 보고 싶다", "temperature": 0.8, "top_p": 0.9, "seed": 4},
]


class Processes:
    """Started together; killed at the end, with all that they started."""

    def __init__(self, commands: list[list[str]], *, stdin: str = "", num_devices: int = 1, **environment: str) -> None:
        """``stdin`` is process 0's; the others have none."""
        environment = {
            **os.environ,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(num_devices),
            "PYTHONPATH": str(_ROOT),
            "PYTHONWARNINGS": "error",
            **environment,
        }
        self.processes = [
            subprocess.Popen(
                [sys.executable, *command],
                cwd=_ROOT,
                env=environment,
                stdin=subprocess.PIPE if index == 0 else subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
            for index, command in enumerate(commands)
        ]
        self._texts: dict[IO[str], list[str]] = {}
        self._readers = []
        for process in self.processes:
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                self._texts[stream] = []
                reader = threading.Thread(target=self._read, args=(stream,), daemon=True)
                reader.start()
                self._readers.append(reader)
        first = self.processes[0].stdin
        assert first is not None
        first.write(stdin)
        first.close()

    def _read(self, stream: IO[str]) -> None:
        while text := stream.read(1):
            self._texts[stream].append(text)

    def stdout(self, index: int) -> str:
        stream = self.processes[index].stdout
        assert stream is not None
        return "".join(self._texts[stream])

    def stderr(self, index: int) -> str:
        stream = self.processes[index].stderr
        assert stream is not None
        return "".join(self._texts[stream])

    def wait(self, seconds: float, *, but: int | None = None) -> list[int | None]:
        """The exit statuses, None of process ``but``, which may go on."""
        end = time.monotonic() + seconds
        for index, process in enumerate(self.processes):
            if index != but:
                try:
                    process.wait(max(0.0, end - time.monotonic()))
                except subprocess.TimeoutExpired:
                    pytest.fail(f"process {index} is still there after {seconds} s\n{self.report()}")
        if but is None:
            for reader in self._readers:
                reader.join(10)
        return [None if index == but else process.returncode for index, process in enumerate(self.processes)]

    def wait_for_output(self, num_chars: int) -> None:
        """Until process 0 has printed so much."""
        end = time.monotonic() + _RUN_S
        while len(self.stdout(0)) < num_chars:
            if time.monotonic() > end or any(process.poll() is not None for process in self.processes):
                pytest.fail(f"process 0 has not printed {num_chars} characters\n{self.report()}")
            time.sleep(0.05)

    def report(self) -> str:
        return "\n".join(
            f"-- process {index}: {process.poll()}\n{self.stdout(index)}\n{self.stderr(index)}"
            for index, process in enumerate(self.processes)
        )

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        for reader in self._readers:
            reader.join(10)
        for process in self.processes:
            for stream in (process.stdout, process.stderr):
                assert stream is not None
                stream.close()


def free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]


def kogpt(*arguments: str, num_processes: int, meshes: list[str]) -> list[list[str]]:
    """The commands of a job; more meshes than one are the processes' own."""
    port = free_port()
    return [
        ["-m", "kogpt_jax", *arguments, "--dtype", "fp32", "--mesh", meshes[index % len(meshes)]]
        + ["--coordinator", f"127.0.0.1:{port}", "--num-processes", str(num_processes), "--process-id", str(index)]
        for index in range(num_processes)
    ]


def python(code: str, num_processes: int = 2) -> list[list[str]]:
    """The commands of a script, which finds ``address``, ``number`` and ``count``."""
    port = free_port()
    head = (
        "import sys; from kogpt_jax import distributed; address, count, number = sys.argv[1], *map(int, sys.argv[2:])"
    )
    return [
        ["-c", f"{head}\n{code}", f"127.0.0.1:{port}", str(num_processes), str(number)]
        for number in range(num_processes)
    ]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    directory = tmp_path_factory.mktemp("several")
    write_checkpoint(directory, _WIDE.to_hf_dict(), salt="several")
    write_byte_tokenizer(directory / "tokenizer.json")
    return directory


@pytest.fixture(scope="module")
def expected(directory: pathlib.Path) -> list[kogpt_jax.Completion]:
    """What one process writes."""
    options = [{name: value for name, value in row.items() if name != "prompt"} for row in _ROWS]
    params = [SamplingParams(max_new_tokens=_NEW_TOKENS, ignore_eos=True, **row) for row in options]
    return KoGPT.from_pretrained(directory, dtype="fp32").generate([row["prompt"] for row in _ROWS], params)


def test_the_text_is_that_of_one_process(directory, expected):
    """Rows lie over both processes, heads over the two devices of each."""
    arguments = ["generate", "--model", str(directory), "--input-format", "jsonl", "--format", "jsonl"]
    arguments += ["--ignore-eos", "--max-new-tokens", str(_NEW_TOKENS)]
    commands = kogpt(*arguments, num_processes=2, meshes=["d2p1t2"])
    lines = "".join(json.dumps(row) + "\n" for row in _ROWS)
    with Processes(commands, stdin=lines, num_devices=2) as job:
        assert job.wait(_RUN_S) == [0, 0], job.report()
        records = [json.loads(line) for line in job.stdout(0).splitlines()]
        assert job.stdout(1) == ""
    for record, completion in zip(records, expected, strict=True):
        assert record["token_ids"] == list(completion.token_ids)
        assert record["text"] == completion.text
        tolerances.assert_close(record["logprobs"], completion.logprobs, tolerances.LOGPROBS_VS_MESH)


@pytest.mark.slow
def test_the_demo_model_writes_the_same_in_four_processes():
    prompt = "배우들의 연기가"
    text = KoGPT.from_pretrained("demo", dtype="fp32").generate(prompt)[0].text
    assert text
    with Processes(kogpt("generate", "--prompt", prompt, num_processes=4, meshes=["d1p2t2"])) as job:
        assert job.wait(2 * _RUN_S) == [0] * 4, job.report()
        assert [job.stdout(index) for index in range(4)] == [f"{text}\n", "", "", ""]


@pytest.mark.slow
def test_scores_and_quantised_weights(directory, tmp_path):
    """Each process quantises its shards, and finds the scales that the whole matrices have."""
    scores = KoGPT.from_pretrained(directory, dtype="fp32", quant="w8a16").score(["첫 번째 글", "second text"])
    arguments = ["score", "--model", str(directory), "--quant", "w8a16", "--format", "jsonl"]
    commands = kogpt(*arguments, num_processes=2, meshes=["d1p1t2"])
    with Processes(commands, stdin="첫 번째 글\nsecond text\n", KOGPT_CACHE_DIR=str(tmp_path)) as job:
        assert job.wait(_RUN_S) == [0, 0], job.report()
        *records, _ = [json.loads(line) for line in job.stdout(0).splitlines()]
        assert "quantised weights are not kept" in job.stderr(0)
    assert not (tmp_path / "quantized").exists()
    for record, score in zip(records, scores, strict=True):
        logprobs = [logprob for logprob in score.logprobs if logprob is not None]
        tolerances.assert_close(record["logprobs"][1:], logprobs, tolerances.LOGPROBS_VS_MESH)


_IN_COLLECTIVES = """
import numpy as np
distributed.initialize(address, count, number, heartbeat_timeout_s=HEARTBEAT)
for step in range(10000000):
    distributed.gather(np.array(step))
    if step == 10 and number == 0:
        print("running", flush=True)
"""


def check_end_of_others(job: Processes, victim: int) -> None:
    """After ``victim`` has been killed."""
    statuses = job.wait(_END_S)
    for index in set(range(len(statuses))) - {victim}:
        assert statuses[index] not in (0, None)
        # Our own line, or where JAX's service noticed first, its line.
        own = f"kogpt: error: process {index} of {len(statuses)}: another process has ended or cannot be reached: "
        assert own in job.stderr(index) or "another task died" in job.stderr(index), job.report()


@pytest.mark.parametrize("victim", [0, 2], ids=["coordinator", "worker"])
def test_a_death_within_a_collective_ends_all(victim):
    """The heartbeats have no part in it."""
    with Processes(python(_IN_COLLECTIVES.replace("HEARTBEAT", "300"), 4)) as job:
        job.wait_for_output(len("running"))
        # While it is stopped, the others come to a collective and wait in it.
        job.processes[victim].send_signal(signal.SIGSTOP)
        time.sleep(1)
        assert [process.poll() for process in job.processes] == [None] * 4
        job.processes[victim].kill()
        check_end_of_others(job, victim)


@pytest.mark.slow
def test_a_death_while_a_model_writes_ends_all(directory):
    arguments = ["generate", "--model", str(directory), "--ignore-eos", "--max-new-tokens", "100"]
    commands = kogpt(*arguments, "--max-batch-size", "1", num_processes=2, meshes=["d1p2t1"])
    with Processes(commands, stdin="a\n" * 2000) as job:  # batches for minutes
        job.wait_for_output(1)
        job.processes[1].kill()
        check_end_of_others(job, 1)


@pytest.mark.parametrize("victim", [0, 1], ids=["coordinator", "worker"])
def test_a_process_that_stops_is_found_by_its_heartbeats(victim):
    """Nothing is closed, as where a host is gone, and on GPUs."""
    with Processes(python(_IN_COLLECTIVES.replace("HEARTBEAT", "4"))) as job:
        job.wait_for_output(len("running"))
        job.processes[victim].send_signal(signal.SIGSTOP)
        other = 1 - victim
        assert job.wait(_END_S, but=victim)[other] != 0
        job.processes[victim].kill()
        job.wait(_END_S)
        assert "another task died" in job.stderr(other)


def test_a_process_reads_what_it_holds(directory):
    code = f"""
from kogpt_jax import KoGPT, checkpoint
distributed.initialize(address, count, number)
read_ahead = checkpoint.read_ahead
def counting(blocks):
    print(sum(block.num_bytes for block in blocks))
    return read_ahead(blocks)
checkpoint.read_ahead = counting
model = KoGPT.from_pretrained({str(directory)!r}, dtype="fp32", mesh="d1p2t1")
print(sum(shard.data.nbytes for leaf in model.leaves for shard in leaf.addressable_shards))
"""
    with Processes(python(code)) as job:
        assert job.wait(_RUN_S) == [0, 0], job.report()
        counts = [[int(line) for line in job.stdout(index).splitlines() if line.isdigit()] for index in range(2)]
    (first_read, first_held), (second_read, second_held) = counts
    stored = sum(array.nbytes for array in safetensors.numpy.load_file(directory / "model.safetensors").values())
    assert first_held == first_read  # two layers and half of the vocabulary, in the dtype that is stored
    assert second_held > second_read  # one layer, and zeros where a fourth would be
    assert stored < first_read + second_read < 1.05 * stored  # both have the last LayerNorm, and a row of padding


def test_processes_agree():
    code = """
import jax, numpy as np, sys
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from kogpt_jax.errors import InputError
from kogpt_jax.sampling import RowSampling, SamplingParams
distributed.initialize(address, count, number)
assert distributed.gather(np.array([number, 7])).tolist() == [[0, 7], [1, 7]]
assert distributed.of_process_0(np.array(number + 5)) == 5
assert distributed.smallest(3.0 - number) == 2
assert distributed.made_by_process_0(lambda: {"글": [number, "\\udc80"]}) == {"글": [0, "\\udc80"]}
assert distributed.made_by_process_0(lambda: "x" * 5000) == "x" * 5000
distributed.check_same("texts", ["글"])
drawn = distributed.gather(np.asarray(RowSampling.from_params([SamplingParams(temperature=1.0)] * 3).seed))
assert drawn.shape == (2, 3) and drawn[0].tolist() == drawn[1].tolist() and len(set(drawn[0].tolist())) == 3
def refuse():
    raise InputError(f"made by {number}")
for call in (lambda: distributed.made_by_process_0(refuse), lambda: distributed.check_same("texts", number)):
    try:
        call()
    except InputError as error:
        print(error)
mesh = Mesh(np.array(jax.devices()), "x")
whole = np.arange(6.0)
array = jax.make_array_from_callback((6,), NamedSharding(mesh, PartitionSpec("x")), lambda index: whole[index])
assert not array.is_fully_addressable and array.addressable_shards[0].data.shape == (3,)
assert distributed.fetch(array).tolist() == whole.tolist()
print("done", file=sys.stderr, flush=True)
"""
    with Processes(python(code)) as job:
        assert job.wait(_RUN_S) == [0, 0], job.report()
        for index in range(2):
            assert "made by 0\n" in job.stdout(index)
            assert "process 1 was given other texts than process 0" in job.stdout(index)
            assert job.stderr(index).endswith("done\n")


@pytest.mark.parametrize("number", [0, 1])
def test_an_exception_in_one_process_ends_all(number):
    code = f"""
import numpy as np
distributed.initialize(address, count, number)
distributed.gather(np.array(0))
if number == {number}:
    raise RuntimeError("only here")
distributed.gather(np.array(0))
"""
    with Processes(python(code)) as job:
        statuses = job.wait(_RUN_S)
        assert statuses[number] == 1
        assert statuses[1 - number] != 0
        assert "RuntimeError: only here" in job.stderr(number)


def test_meshes_that_differ_are_refused_by_all(directory):
    arguments = ["generate", "--model", str(directory), "--prompt", "a"]
    with Processes(kogpt(*arguments, num_processes=2, meshes=["d1p1t2", "d2p1t1"])) as job:
        assert job.wait(_RUN_S) == [2, 2], job.report()
        for index in range(2):
            line = (
                f"process {index}: process 1 was given other model or mesh than process 0: all must be given the same"
            )
            assert f"kogpt: error: {line}\n" in job.stderr(index)
            assert job.stdout(index) == ""


def test_an_error_of_the_input_is_told_by_all():
    with Processes(kogpt("generate", num_processes=2, meshes=["d1p1t2"]), stdin="한 줄\n\n") as job:
        assert job.wait(_RUN_S) == [2, 2], job.report()
        for index in range(2):
            assert f"kogpt: error: process {index}: stdin line 2 is blank\n" in job.stderr(index)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--mesh", "d1p1t1"], "mesh d1p1t1 takes 1 of 2 devices, none of process 1"),
        (["--nan-guard"], "nan_guard needs all devices in one process"),
    ],
)
def test_what_several_processes_cannot_do(directory, options, message):
    arguments = ["generate", "--model", str(directory), "--prompt", "a"]
    commands = [command + options for command in kogpt(*arguments, num_processes=2, meshes=["d1p1t2"])]
    with Processes(commands) as job:
        assert job.wait(_RUN_S) == [2, 2], job.report()
        assert message in job.stderr(0)


def test_a_process_does_not_wait_for_ever_for_the_others():
    code = "distributed.initialize(address, count, number, start_timeout_s=2)"
    for command in python(code):
        with Processes([command]) as job:
            assert job.wait(_END_S) == [1], job.report()
            number = command[-1]
            line = f"process {number} of 2: not all processes have come to {command[-3]} within 2 s"
            assert job.stderr(0).endswith(f"kogpt: error: {line}\n")


# -- What a process is told -------------------------------------------------------------------------------------------

_VARIABLES = [
    "JAX_COORDINATOR_ADDRESS",
    "JAX_NUM_PROCESSES",
    "JAX_PROCESS_ID",
    "OMPI_COMM_WORLD_SIZE",
    "OMPI_COMM_WORLD_RANK",
    "SLURM_JOB_ID",
    "SLURM_PROCID",
    "SLURM_STEP_NODELIST",
    "SLURM_STEP_NUM_TASKS",
]


@pytest.fixture(autouse=True)
def _no_variables(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in _VARIABLES:
        monkeypatch.delenv(name, raising=False)


_SLURM = {"SLURM_JOB_ID": "123456", "SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3"}
_OPEN_MPI = {"OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_RANK": "5"}
_JAX = {"JAX_COORDINATOR_ADDRESS": "kogpt-0.kogpt:8476", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}


@pytest.mark.parametrize(
    ("variables", "found"),
    [
        ({}, (None, None, None)),
        (_JAX, ("kogpt-0.kogpt:8476", 2, 1)),
        (_OPEN_MPI, (None, 8, 5)),
        (_SLURM, (None, 4, 3)),
        (_SLURM | {"SLURM_STEP_NODELIST": "node7"}, ("node7:23456", 4, 3)),
        (_SLURM | {"SLURM_STEP_NODELIST": "node7,other"}, ("node7:23456", 4, 3)),
        (_SLURM | {"SLURM_STEP_NODELIST": "gpu-a[007-012,15],other"}, ("gpu-a007:23456", 4, 3)),
        (_SLURM | {"SLURM_STEP_NODELIST": "a[3,5]"}, ("a3:23456", 4, 3)),
        (_SLURM | _OPEN_MPI, (None, 8, 5)),
        (_SLURM | _OPEN_MPI | _JAX, ("kogpt-0.kogpt:8476", 2, 1)),
        (_SLURM | {"JAX_NUM_PROCESSES": "2"}, (None, 2, None)),  # the other must be given: nothing is mixed
        ({"SLURM_JOB_ID": "7", "SLURM_PROCID": "0"}, (None, None, None)),  # of a batch script, not of a step
    ],
)
def test_variables(monkeypatch, variables, found):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert runtime.process_variables() == found


@pytest.mark.parametrize(
    ("arguments", "variables", "message"),
    [
        ((), {}, "coordinator auto finds neither"),
        (("localhost",), {}, "coordinator must be HOST:PORT, got 'localhost'"),
        (("localhost:70000", 1, 0), {}, "coordinator must be HOST:PORT"),
        (("localhost:1234",), {}, "num_processes is not given"),
        (("localhost:1234", 2), {}, "process_id is not given, and neither JAX_PROCESS_ID"),
        (("localhost:1234", 0, 0), {}, "num_processes must be at least 1, got 0"),
        (("localhost:1234", 2, 2), {}, "process_id must be between 0 and 1, got 2"),
        ((), _JAX | {"JAX_PROCESS_ID": "one"}, "JAX_PROCESS_ID must be a number, got 'one'"),
    ],
)
def test_bad_arguments(monkeypatch, arguments, variables, message):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(InputError, match=message):
        distributed.initialize(*arguments)


def test_a_port_that_is_taken():
    with (
        socket.create_server(("", 0)) as server,
        pytest.raises(InputError, match=rf"port {server.getsockname()[1]} cannot be used on this machine: Address"),
    ):
        distributed.initialize(f"localhost:{server.getsockname()[1]}", 2, 0)
