"""Where restored tensors are put: by torch's own policy without a device to hand, and on a real one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from ckptd.core.catalog import TensorInfo
from ckptd.trainer.state import AppState
from ckptd.trainer.state_optimizers import DEVICE, _new
from ckptd.trainer.state_values import encode, maker
from tests.trainer_state.memory import Memory, resumes_exactly

ELSEWHERE = nn.Parameter(torch.empty(3, 2, dtype=torch.bfloat16, device="meta"))


@pytest.mark.parametrize(
    ("name", "shape", "group", "where", "device"),
    [
        ("step", (), {}, None, "cpu"),
        ("step", (), {"fused": True}, None, "meta"),
        ("step", (), {"capturable": True}, None, "meta"),
        ("step", (), {"fused": None, "capturable": False}, DEVICE, "meta"),
        ("mu_product", (), {"fused": True}, None, "cpu"),
        ("eta", (), {}, DEVICE, "meta"),
        ("exp_avg", (3, 2), {}, None, "meta"),
        ("row_var", (3, 1), {}, None, "meta"),
    ],
)
def test_where_new_state_is_put(
    name: str, shape: tuple[int, ...], group: dict[str, Any], where: str | None, device: str
) -> None:
    """Counters stay on the CPU unless a fused or capturable step reads them on the device."""
    made = _new(ELSEWHERE, name, TensorInfo(name, "float32", shape), group, where)
    assert (made.device.type, made.dtype, tuple(made.shape)) == (device, torch.float32, shape)


def test_new_state_has_the_memory_format_of_its_parameter() -> None:
    parameter = nn.Parameter(torch.zeros(2, 3, 4, 4).to(memory_format=torch.channels_last))
    made = _new(parameter, "exp_avg", TensorInfo("exp_avg", "float32", (2, 3, 4, 4)), {}, None)
    assert made.stride() == parameter.stride()


def test_values_of_a_device_that_is_not_here_come_to_the_cpu() -> None:
    """A checkpoint of a GPU job is read by a CPU process."""
    objects = {"ema/_devices": encode({"ema/here": "cpu", "ema/there": "no such device"}, "ema/_devices")}
    make = maker("ema", objects, {}, reuse=False)
    assert make(TensorInfo("ema/there", "float16", (2,))).device.type == "cpu"


def network() -> nn.Module:
    return nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.3), nn.Linear(7, 3)).cuda()


def train(state: Any) -> None:
    state["optimizer"].zero_grad()
    state["model"](torch.randn(4, 5, device="cuda")).square().mean().backward()
    state["optimizer"].step()


ON_DEVICE: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "adamw": lambda p: torch.optim.AdamW(p),
    "fused": lambda p: torch.optim.AdamW(p, fused=True),
    "capturable": lambda p: torch.optim.AdamW(p, lr=torch.tensor(1e-3, device="cuda"), capturable=True),
    "nadam": lambda p: torch.optim.NAdam(p),
    "nadam-capturable": lambda p: torch.optim.NAdam(p, capturable=True),
    "asgd": lambda p: torch.optim.ASGD(p, t0=2),
    "adafactor": lambda p: torch.optim.Adafactor(p),
}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ON_DEVICE)
def test_optimizers_on_a_device(name: str) -> None:
    """To the bit, dropout drawn from the device's generator included, and each tensor where it was."""

    def build() -> dict[str, Any]:
        model = network()
        return {"model": model, "optimizer": ON_DEVICE[name](model.parameters())}

    restored, memory = resumes_exactly(build, train)
    assert "rng/cuda/0" in memory.objects
    for source in restored.sources():
        assert source.tensor.device == memory.boxes[source.key, source.box].device, source.key


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_state_dicts_come_back_to_the_device() -> None:
    class Average:
        value = torch.ones(3)

        def state_dict(self) -> dict[str, Any]:
            return {"value": self.value}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            self.value = state["value"]

    average = Average()
    average.value = torch.ones(3, device="cuda")
    fresh = Average()
    Memory.of(AppState({"ema": average})).restore(AppState({"ema": fresh}))
    assert torch.equal(fresh.value, average.value)
    assert fresh.value.is_cuda
