"""A training whose state is on the devices of the fake CUDA driver: tensors in main memory that the driver takes for
device memory, written by what is queued on streams and by nothing else. Its values say of which step they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from tests.native.fake_cuda import Fake


class FakePlatform:
    """Which tensors are on which device, and which streams are current: PyTorch without a GPU cannot say."""

    def __init__(self, fake: Fake, devices: int = 1) -> None:
        self.library = fake.library
        self._placed: dict[int, int] = {}
        self._alive: list[torch.Tensor] = []
        self.current = {device: fake.stream(device) for device in range(devices)}

    def place(self, tensor: torch.Tensor, device: int = 0) -> torch.Tensor:
        """From now on all of its storage is on the device."""
        self._placed[tensor.untyped_storage().data_ptr()] = device
        self._alive.append(tensor.detach())
        return tensor

    def devices(self, tensors: Sequence[torch.Tensor]) -> list[int]:
        return [self._placed.get(tensor.untyped_storage().data_ptr(), -1) for tensor in tensors]

    def streams(self) -> dict[int, int]:
        return dict(self.current)


def value(key: str, step: int, elements: int) -> np.ndarray[Any, np.dtype[np.float32]]:
    """What the tensor `key` holds after `step` steps."""
    seed = sum(key.encode()) * 1000 + step
    return np.random.default_rng(seed).random(elements, np.float32)


class Written(torch.optim.Optimizer):
    """Queues the values of the next step, as the kernels of an optimizer would write them."""

    def __init__(self, training: FakeTraining) -> None:
        super().__init__(training.model.parameters(), {})
        self._training = training
        for name, parameter in training.model.named_parameters():
            momentum = torch.zeros_like(parameter)
            self.state[parameter]["momentum"] = training.moments(momentum, name)

    def step(self, closure: Any = None) -> None:
        training = self._training
        training.steps += 1
        for name, parameter in training.model.named_parameters():
            training.write(f"model/{name}", parameter)
            training.write(f"optimizer/state/{name}/momentum", self.state[parameter]["momentum"])


class FakeTraining:
    """Weights and moments that optimizer steps write, a buffer that the forward pass writes."""

    def __init__(
        self,
        fake: Fake,
        platform: FakePlatform,
        device_of: Callable[[str], int] = lambda name: 0,
        host_moments: bool = False,
        width: int = 300,
    ) -> None:
        self.fake, self.platform = fake, platform
        self.steps = 0
        self._device_of, self._host_moments = device_of, host_moments
        self.model = nn.Sequential(nn.Linear(width, 20), nn.BatchNorm1d(20), nn.Linear(20, 7))
        del self.model[1].num_batches_tracked
        for name, tensor in self.model.state_dict(keep_vars=True).items():
            platform.place(tensor, device_of(name))
        self.optimizer = Written(self)
        self.state: dict[str, Any] = {"model": self.model, "optimizer": self.optimizer}

    def moments(self, momentum: torch.Tensor, name: str) -> torch.Tensor:
        return momentum if self._host_moments else self.platform.place(momentum, self._device_of(name))

    def write(self, key: str, tensor: torch.Tensor) -> None:
        """Queues the value of the present step, and says so to PyTorch."""
        data = value(key, self.steps, tensor.numel())
        device = self.platform.devices([tensor])[0]
        if device < 0:
            tensor.detach().copy_(torch.from_numpy(data).reshape(tensor.shape))
        else:
            self.fake.kernel(self.platform.current[device], tensor.data_ptr(), data.tobytes())
            torch.autograd.graph.increment_version(tensor)

    def forward(self) -> None:
        """Buffers change before the optimizer steps, right after the boundary."""
        self.steps += 1
        self.write("model/1.running_mean", self.model[1].running_mean)
        self.steps -= 1

    def step(self) -> None:
        self.forward()
        self.optimizer.step()

    def after(self, step: int) -> dict[str, bytes]:
        """The bytes of all that is written, by key, after so many steps."""
        made = {"model/1.running_mean": value("model/1.running_mean", step, 20).tobytes()}
        for name, parameter in self.model.named_parameters():
            for key in (f"model/{name}", f"optimizer/state/{name}/momentum"):
                made[key] = value(key, step, parameter.numel()).tobytes()
        return made
