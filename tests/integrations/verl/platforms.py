"""A CPU platform for verl, which has none and would look for CUDA: enough of it to run the real FSDP engine."""

from __future__ import annotations

import contextlib
import os
from types import SimpleNamespace

import torch

os.environ["VERL_PLATFORM"] = "cpu"

from verl.plugin.platform import PlatformBase, PlatformRegistry


@PlatformRegistry.register("cpu")
class CPU(PlatformBase):
    device_name = "cpu"
    vendor_name = "cpu"
    device_module = SimpleNamespace(
        max_memory_allocated=lambda: 0, max_memory_reserved=lambda: 0, memory_allocated=lambda: 0,
        memory_reserved=lambda: 0, empty_cache=lambda: None, synchronize=lambda *a: None, is_available=lambda: False,
        current_device=lambda: "cpu", manual_seed=torch.manual_seed, manual_seed_all=torch.manual_seed,
        set_device=lambda *a: None, mem_get_info=lambda *a: (0, 0), get_rng_state=torch.get_rng_state, get_device_name=lambda *a: "CPU",
        set_rng_state=torch.set_rng_state,
    )  # fmt: skip

    def is_available(self):
        return True

    def is_platform_available(self, use_smi_check=False):
        return True

    def current_device(self):
        return "cpu"

    def device_count(self):
        return 1

    def set_device(self, device_index):
        pass

    def synchronize(self, device_index=None):
        pass

    def manual_seed(self, seed):
        torch.manual_seed(seed)

    manual_seed_all = manual_seed

    def set_allocator_settings(self, settings):
        pass

    def empty_cache(self):
        pass

    def get_device_capability(self, device_index=0):
        return (None, None)

    def communication_backend_name(self):
        return "gloo"

    def visible_devices_envvar(self):
        return "CUDA_VISIBLE_DEVICES"

    def nvtx_range(self, msg):
        return contextlib.nullcontext()

    def profiler_start(self):
        pass

    def profiler_stop(self):
        pass

    def ray_resource_name(self):
        return "CPU"

    def ray_noset_envvars(self):
        return []

    def is_ipc_supported(self):
        return False

    def cudart(self):
        return None
