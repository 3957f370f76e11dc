"""What the ops' tests can show on a CPU only: several devices, the examples of the documentation,
values outside the contract."""

import os
import pathlib
import re
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import op_cases
import pytest
import test_decode_attention
from op_cases import DecodeAttentionCase, decode_attention_arguments

TESTS = pathlib.Path(__file__).parent
pytestmark = pytest.mark.host


def run_on_devices(code: str, num_devices: int) -> None:
    """Runs code in a process of its own, since the number of devices is fixed when JAX starts."""
    preamble = f"import jax\njax.config.update('jax_num_cpu_devices', {num_devices})\n"
    subprocess.run(
        [sys.executable, "-W", "error", "-c", preamble + code],
        check=True,
        timeout=300,
        cwd=TESTS,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(TESTS.parent)},
    )


@pytest.mark.parametrize("module", ["test_linear", "test_decode_attention"])
def test_inside_shard_map_over_two_devices_nothing_is_gathered(module):
    run_on_devices(f"import {module}\nassert len(jax.devices()) == 2\n{module}.check_shard_map(jax.devices())", 2)


@pytest.mark.slow
def test_the_examples_of_the_documentation_run():
    """One after another in one process, as a reader would type them."""
    text = (TESTS.parent / "docs" / "custom-ops.md").read_text(encoding="utf-8")
    examples = re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    assert len(examples) >= 3
    run_on_devices("\n".join(examples), 2)


@pytest.mark.parametrize("lengths", [(-1, 3), (16, 3), (2**31 - 1, 3)])
def test_a_position_outside_the_table_gives_nan_and_harms_nobody(lengths):
    """Values are not checked before a call."""
    case = DecodeAttentionCase(
        batch=2, heads=2, head_dim=64, page_len=16, max_pages=1, lengths=(0, 3), num_new=(1, 1), dtype="bf16"
    )
    arguments = decode_attention_arguments(case)
    changed = arguments | {"lengths": jnp.asarray(lengths, jnp.int32)}
    act, k_pages, _, _ = test_decode_attention.run(changed)
    assert np.all(np.isnan(act[0]))
    assert np.all(np.isfinite(act[1]))
    page = int(arguments["page_table"][0, 0])
    np.testing.assert_array_equal(k_pages[page], test_decode_attention.in_f32(arguments["k_pages"])[page])


def test_every_instruction_set_of_this_machine_is_tested():
    names = op_cases.instruction_sets()
    assert names[0] == "portable"
    if "avx2" in pathlib.Path("/proc/cpuinfo").read_text():
        assert "avx2" in names
